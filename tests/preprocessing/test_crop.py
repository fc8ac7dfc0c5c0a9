import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import GRIDS, oblique, orientations

from volseg.preprocessing.crop import (
    AxisOrder,
    body_threshold,
    box_where,
    canonical_geometry,
    crop,
    from_canonical,
    to_canonical,
    uncrop,
)
from volseg.volume import BoundingBox, Geometry, Volume

SHAPE = (6, 7, 8)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_all_48_orders_become_the_same_canonical_scan_and_round_trip(grid):
    array = np.random.default_rng(0).normal(size=SHAPE)
    volume = Volume(array, Geometry(SHAPE, grid((0.7, 0.9, 2.5))))
    expected = to_canonical(array, AxisOrder.of(volume.geometry))
    expected_affine = canonical_geometry(volume.geometry, AxisOrder.of(volume.geometry)).affine
    for stored, affine in orientations(volume):
        geometry = Geometry(stored.shape, affine)
        order = AxisOrder.of(geometry)
        canonical = to_canonical(stored, order)
        np.testing.assert_array_equal(canonical, expected)
        affine = canonical_geometry(geometry, order).affine
        np.testing.assert_allclose(affine, expected_affine, atol=1e-9)
        np.testing.assert_array_equal(from_canonical(canonical, order), stored)


def test_canonical_axes_point_to_r_a_and_s():
    affine = np.diag([-1.0, -2.0, 3.0, 1.0]) @ oblique((1, 1, 1), (0.1, 0.1, 0.1))
    geometry = Geometry(SHAPE, affine)
    assert canonical_geometry(geometry, AxisOrder.of(geometry)).axis_codes == "RAS"


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=6, max_size=6))
def test_uncrop_is_the_inverse_of_crop_inside_the_box_and_fills_outside(corners):
    start = tuple(min(a, b) for a, b in zip(corners[:3], corners[3:], strict=True))
    stop = tuple(max(a, b) + 1 for a, b in zip(corners[:3], corners[3:], strict=True))
    box = BoundingBox(start, stop)
    array = np.arange(1, 217).reshape(6, 6, 6)
    uncropped = uncrop(crop(array, box), box, array.shape, fill=-1)
    np.testing.assert_array_equal(crop(uncropped, box), crop(array, box))
    assert (uncropped == -1).sum() == array.size - np.prod(box.shape)


def test_the_body_of_an_mri_is_found_at_any_intensity_scale():
    rng = np.random.default_rng(0)
    scan = np.abs(rng.normal(0, 0.02, (40, 40, 40)))
    scan[10:30, 8:32, 5:35] += 1
    for scale in (1e-3, 1.0, 1e6):
        box = _box_above(scan * scale, body_threshold(scan * scale))
        assert box == BoundingBox((10, 8, 5), (30, 32, 35))


def test_a_scan_of_air_has_no_body():
    assert _box_above(np.full(SHAPE, -1000), -500) is None


def _box_above(array, threshold):
    return box_where(lambda part: array[part] > threshold, array)


@pytest.mark.parametrize("layout", ["C", "F"])
def test_the_box_of_slabs_is_the_box_of_the_whole_array(layout, monkeypatch):
    monkeypatch.setattr(sys.modules["volseg.volume"], "SLAB_VOXELS", 40)
    rng = np.random.default_rng(0)
    for _ in range(20):
        array = np.asarray(rng.random((9, 8, 7)) > 0.99, order=layout)
        assert box_where(lambda part, array=array: array[part], array) == BoundingBox.around(array)

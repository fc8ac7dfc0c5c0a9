"""A tilted stack becomes right-angled without a change of any voxel, and back exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
from laws import oblique, orientations, ras

from volseg.errors import ScanError
from volseg.preprocessing.tilt import Straight
from volseg.volume import Geometry, Volume


def tilted(affine: np.ndarray, degrees: float, axis: int = 1) -> np.ndarray:
    """Return the affine of a stack whose slices lie `degrees` beside their normal."""
    affine = affine.copy()
    along = affine[:3, axis] / np.linalg.norm(affine[:3, axis])
    length = np.linalg.norm(affine[:3, 2])
    affine[:3, 2] += along * length * math.tan(math.radians(degrees))
    return affine


GRIDS = {
    "gantry, 18.5°": tilted(ras((0.7, 0.7, 5.0)), 18.5),
    "the other way": tilted(ras((0.7, 0.7, 5.0)), -18.5),
    "oblique, anisotropic": tilted(oblique((0.6, 1.1, 3.0)), 14.0),
    "along rows and columns": tilted(tilted(oblique((0.8, 0.8, 4.0)), 9.0), -6.0, axis=0),
    "finer than its pixels": tilted(ras((1.2, 1.2, 0.8)), 18.5),
}


def scan_of(affine, shape=(9, 11, 7), seed=0):
    values = np.random.default_rng(seed).integers(-1000, 2000, shape).astype(np.int16)
    return Volume(values, Geometry(shape, affine), slope=0.5, intercept=-3.0)


@pytest.mark.parametrize("name", GRIDS)
def test_all_voxels_are_kept_at_their_place_within_half_a_voxel(name):
    scan = scan_of(GRIDS[name])
    assert scan.geometry.is_tilted
    for array, affine in orientations(scan):
        stored = Volume(array, Geometry(array.shape, affine), slope=0.5, intercept=-3.0)
        straight = Straight.of(stored.geometry)
        seen = straight.scan(stored)
        assert not seen.geometry.is_tilted and seen.geometry.largest_cosine < 1e-9
        assert seen.geometry.voxel_volume_mm3 == pytest.approx(scan.geometry.voxel_volume_mm3)
        assert np.array_equal(straight.unstack(seen.array), array)
        assert (seen.slope, seen.intercept) == (0.5, -3.0)
        # Where a voxel of the scan went: its own number, stacked.
        numbers = np.arange(1, array.size + 1, dtype=np.int32).reshape(array.shape)
        stacked = straight.stack(numbers, 0)
        index = np.argwhere(stacked)
        assert len(index) == array.size
        before = np.argwhere(numbers > 0)[stacked[tuple(index.T)] - 1]
        off = seen.geometry.to_world_mm(index) - stored.geometry.to_world_mm(before)
        off_voxels = np.linalg.solve(seen.geometry.voxel_steps_mm, off.T)
        assert np.abs(off_voxels).max() <= 0.5 + 1e-9
        assert np.abs(off_voxels[straight.axis]).max() < 1e-9


def test_beside_its_slices_a_scan_has_its_lowest_intensity_and_a_mask_background():
    scan = scan_of(GRIDS["gantry, 18.5°"])
    straight = Straight.of(scan.geometry)
    added = straight.stack(np.ones(scan.geometry.shape, bool), False) == 0
    assert added.any()
    for slope in (0.5, -0.5):
        image = Volume(scan.array, scan.geometry, slope=slope)
        seen = straight.scan(image)
        assert set(seen.intensities()[added]) == {image.intensities().min()}
    floats = scan.array.astype(np.float32)
    floats[0, 0, 0] = np.nan
    seen = straight.scan(Volume(floats, scan.geometry))
    assert set(seen.array[added]) == {np.nanmin(floats)}
    assert not straight.mask(scan.with_array(np.ones_like(scan.array))).array[added].any()


def test_a_grid_that_is_sheared_within_its_slices_is_refused():
    affine = tilted(ras((1.0, 1.0, 2.0)), 10)
    affine[:3, 1] += 0.1 * affine[:3, 0]
    affine[:3, 2] += 0.3 * affine[:3, 0]
    with pytest.raises(ScanError) as caught:
        Straight.of(Geometry((9, 9, 9), affine))
    assert caught.value.code == "E_SHEAR"


def test_slices_of_a_tilted_stack_are_closer_than_their_steps():
    geometry = Geometry((9, 9, 9), GRIDS["gantry, 18.5°"])
    assert geometry.slice_distances_mm[2] == pytest.approx(5.0)
    assert geometry.spacing_mm[2] == pytest.approx(5.0 / math.cos(math.radians(18.5)))
    right = Geometry((9, 9, 9), oblique((0.7, 0.7, 5.0)))
    assert right.slice_distances_mm == right.spacing_mm

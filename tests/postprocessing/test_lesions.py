from __future__ import annotations

import math
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import GRIDS, oblique, orientations

from volseg.errors import VolsegError
from volseg.postprocessing import lesions as lesions_module
from volseg.postprocessing.lesions import label_lesions
from volseg.volume import Geometry, Volume

SPACING_MM = (0.7, 0.9, 2.5)


def geometry_of(mask, affine=None):
    return Geometry(mask.shape, oblique(SPACING_MM) if affine is None else affine)


def test_the_largest_lesion_of_all_labels_is_number_one():
    mask = np.zeros((10, 10, 10), np.uint8)
    mask[0, 0, 0] = 1
    mask[2:4, 2:4, 2:4] = 2
    mask[6:9, 6:9, 6:9] = 1
    lesions = label_lesions(mask, geometry_of(mask))
    assert (lesions.labels, lesions.n_voxels) == ([1, 2, 1], [27, 8, 1])
    assert (lesions.ids[7, 7, 7], lesions.ids[3, 3, 3], lesions.ids[0, 0, 0]) == (1, 2, 3)
    assert np.array_equal(lesions.ids > 0, mask > 0)
    assert lesions.ids.dtype == np.uint16


def test_touching_voxels_of_two_labels_are_two_lesions():
    mask = np.zeros((4, 4, 4), np.uint8)
    mask[1, 1, 1], mask[1, 1, 2] = 5, 3
    assert sorted(label_lesions(mask, geometry_of(mask)).labels) == [3, 5]


def test_objects_labels_gives_one_lesion_per_label_in_ascending_order():
    mask = np.zeros((6, 6, 6), np.int16)
    mask[0, 0, 0] = mask[5, 5, 5] = 7
    mask[2:4, 2:4, 2:4] = 300
    mask[0, 5, 5] = 2
    lesions = label_lesions(mask, geometry_of(mask), objects="labels")
    assert (lesions.labels, lesions.n_voxels) == ([2, 7, 300], [1, 2, 8])
    assert np.array_equal(np.array([0, *lesions.labels])[lesions.ids], mask)


@pytest.mark.parametrize("connectivity, n_lesions", [(6, 3), (18, 2), (26, 1)])
def test_connectivity_joins_over_faces_edges_and_corners(connectivity, n_lesions):
    mask = np.zeros((5, 5, 5), bool)
    mask[1, 1, 1] = mask[2, 2, 1] = mask[3, 3, 2] = True  # an edge apart, then a corner apart
    lesions = label_lesions(mask, geometry_of(mask), connectivity=connectivity)
    assert len(lesions.labels) == n_lesions


@pytest.mark.parametrize("objects", ["components", "labels"])
@pytest.mark.parametrize("dtype", [bool, np.uint8, ">i2", np.int64])
def test_an_empty_mask_has_no_lesions(objects, dtype):
    mask = np.zeros((3, 4, 5), dtype)
    lesions = label_lesions(mask, geometry_of(mask), objects=objects)
    assert (lesions.labels, lesions.n_voxels) == ([], [])
    assert lesions.ids.shape == mask.shape and not lesions.ids.any()


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, ">i2", np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("objects", ["components", "labels"])
def test_every_whole_number_dtype_and_memory_order_gives_the_same(objects, dtype):
    mask = np.random.default_rng(0).choice([0, 0, 0, 1, 2], size=(9, 8, 7)).astype(np.uint8)
    expected = label_lesions(mask, geometry_of(mask), objects=objects)
    read_only = np.asfortranarray(mask.astype(dtype))
    read_only.setflags(write=False)
    view = mask.astype(dtype)[::-1][::-1].transpose(1, 0, 2).transpose(1, 0, 2)
    for variant in (mask.astype(dtype), read_only, view):
        lesions = label_lesions(variant, geometry_of(mask), objects=objects)
        assert np.array_equal(lesions.ids, expected.ids)
        assert (lesions.labels, lesions.n_voxels) == (expected.labels, expected.n_voxels)


def test_more_lesions_than_uint16_holds():
    mask = np.zeros((82, 82, 82), np.uint8)
    mask[::2, ::2, ::2] = 1
    lesions = label_lesions(mask, geometry_of(mask))
    assert lesions.ids.dtype == np.uint32
    assert len(lesions.labels) == lesions.ids.max() == 41**3


def assert_same_numbers_in_all_48_orientations(mask, affine, objects="components"):
    geometry = Geometry(mask.shape, affine)
    expected = label_lesions(mask, geometry, objects=objects)
    masks, all_ids = (orientations(Volume(a, geometry)) for a in (mask, expected.ids))
    for (array, affine), (ids, _) in zip(masks, all_ids, strict=True):
        lesions = label_lesions(array, Geometry(array.shape, affine), objects=objects)
        assert np.array_equal(lesions.ids, ids)
        assert (lesions.labels, lesions.n_voxels) == (expected.labels, expected.n_voxels)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize("objects", ["components", "labels"])
def test_lesions_of_equal_size_have_the_same_numbers_in_all_48_orientations(objects, grid):
    mask = np.zeros((9, 10, 11), np.uint8)
    for n, (i, j, k) in enumerate(np.argwhere(np.ones((3, 3, 3))) * 3):
        mask[i, j, k : k + 1 + n % 2] = 1 + n % 3
    assert_same_numbers_in_all_48_orientations(mask, grid(SPACING_MM), objects)


def test_rounding_errors_of_centroids_do_not_change_the_numbers():
    """Lesions of equal R up to the last bits, at half a step of 1e-3 mm, where rounding fails."""
    # R = 0.561 i - 0.42075 j + offset
    affine = oblique((0.70125, 0.70125, 2.5), angles=(0, 0, math.atan2(3, 4)))
    mask = np.zeros((30, 26, 2), np.uint8)
    for i, j in np.argwhere(np.ones((10, 13))) * (3, 2):
        mask[i : i + 2, j, 0] = 1
    rng = np.random.default_rng(0)
    for _ in range(5):
        affine[:3, 3] = rng.integers(-3000, 3000, 3) / 10
        assert_same_numbers_in_all_48_orientations(mask, affine)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9))
def test_lesions_partition_the_mask_and_more_neighbours_never_make_more_lesions(seed, n_labels):
    mask = np.random.default_rng(seed).integers(0, n_labels + 1, (7, 6, 5)).astype(np.uint8)
    geometry = geometry_of(mask)
    counts = []
    for connectivity in (6, 18, 26):
        lesions = label_lesions(mask, geometry, connectivity=connectivity)
        assert np.array_equal(np.array([0, *lesions.labels])[lesions.ids], mask)
        assert np.bincount(lesions.ids.ravel(), minlength=1)[1:].tolist() == lesions.n_voxels
        assert all(a >= b for a, b in pairwise(lesions.n_voxels))
        counts.append(len(lesions.labels))
    assert counts[0] >= counts[1] >= counts[2]


def test_unknown_settings_are_refused_with_the_supported_ones():
    mask = np.ones((2, 2, 2), np.uint8)
    with pytest.raises(VolsegError, match="components, labels"):
        label_lesions(mask, geometry_of(mask), objects="lesions")
    with pytest.raises(VolsegError, match="6, 18 or 26"):
        label_lesions(mask, geometry_of(mask), connectivity=8)
    with pytest.raises(ValueError, match="float32"):
        label_lesions(mask.astype(np.float32), geometry_of(mask))
    with pytest.raises(ValueError, match="shape"):
        label_lesions(mask, Geometry((2, 2, 3), oblique(SPACING_MM)))


@pytest.mark.parametrize("order", "CF")
def test_labels_in_several_slabs_are_counted_once(order, monkeypatch):
    monkeypatch.setattr(lesions_module, "SUMMED_VOXELS", 64)
    mask = np.random.default_rng(0).choice([0, 1, 5, 9, 2**31, 2**32 - 1], (9, 8, 7))
    mask = mask.astype(np.uint32, order=order)
    mask[4:] = np.where(mask[4:] == 5, 4, mask[4:])
    lesions = label_lesions(mask, geometry_of(mask), objects="labels")
    values, counts = np.unique(mask[mask > 0], return_counts=True)
    assert (lesions.labels, lesions.n_voxels) == (values.tolist(), counts.tolist())
    assert np.array_equal(np.array([0, *lesions.labels])[lesions.ids], mask)
    many = label_lesions(mask, geometry_of(mask), objects="labels", many=2)
    assert (list(many.labels), list(many.n_voxels)) == (lesions.labels, lesions.n_voxels)


@pytest.mark.parametrize("objects", ["components", "labels"])
def test_a_mask_of_a_whole_large_scan_takes_a_few_bytes_per_voxel(objects, monkeypatch):
    """A copy, 4 bytes for the components, 2 for the numbers, twice."""
    monkeypatch.setattr(lesions_module, "SUMMED_VOXELS", 2**16)
    mask = np.ones((200, 200, 100), np.uint8, order="F")
    tracemalloc.start()
    lesions = label_lesions(mask, Geometry(mask.shape, np.eye(4)), objects=objects)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lesions.n_voxels == [mask.size]
    assert peak < 10 * mask.size

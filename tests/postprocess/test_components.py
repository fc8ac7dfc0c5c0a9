"""Components slab by slab: those of the whole mask, in the order of their first voxel, in all 48 orientations."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from laws import GRIDS, orientations
from scipy import ndimage

from volseg.errors import ScanError
from volseg.postprocess.components import by_size, find_components, relabel
from volseg.postprocess.lesions import label_lesions
from volseg.postprocess.steps import FillHoles
from volseg.volume import BoundingBox, Geometry, Volume

SHAPE = (13, 11, 17)
N_AXES = {6: 1, 18: 2, 26: 3}


def noise(share, n_labels, shape=SHAPE, seed=0, dtype=np.uint8):
    rng = np.random.default_rng(seed)
    return (rng.integers(1, n_labels + 1, shape) * (rng.random(shape) < share)).astype(dtype)


def geometry_of(mask):
    return Geometry(mask.shape, np.diag([0.7, 0.9, 2.5, 1.0]))


def truth(mask, connectivity):
    """The partition by another library, label by label."""
    ids, total = np.zeros(mask.shape, int), 0
    for label in np.unique(mask[mask != 0]):
        found, n = ndimage.label(mask == label, ndimage.generate_binary_structure(3, N_AXES[connectivity]))
        ids[found > 0] = found[found > 0] + total
        total += n
    return ids, total


@pytest.mark.parametrize("connectivity", [6, 18, 26])
@pytest.mark.parametrize("n_labels", [1, 2, 30])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("slab_voxels", [1, 400, 10**6])
def test_slabs_give_the_components_that_the_whole_has(share, n_labels, connectivity, slab_voxels):
    mask = noise(share, n_labels)
    found = find_components(mask, geometry_of(mask), connectivity=connectivity, slab_voxels=slab_voxels)
    ids = found.number[found.ids]
    expected, n = truth(mask, connectivity)
    assert len(found) == n
    pairs = np.unique(np.stack([ids.ravel(), expected.ravel()]), axis=1)
    assert pairs.shape[1] == len(np.unique(expected))  # one number for one number
    assert np.array_equal(found.values[ids], mask)
    assert np.array_equal(found.sizes[1:], np.bincount(ids.ravel(), minlength=n + 1)[1:])


@pytest.mark.parametrize("dtype", [bool, np.int8, ">i2", np.int64])
@pytest.mark.parametrize("order", ["C", "F"])
def test_they_are_numbered_by_their_first_voxel_along_the_longest_axis(dtype, order):
    mask = np.array(noise(0.2, 1), dtype, order=order)
    found = find_components(mask, geometry_of(mask), connectivity=26, slab_voxels=300)
    ids = found.number[found.ids]
    seen = ids.transpose(2, 1, 0).ravel()  # S is the longest; R the fastest
    firsts = [int(np.flatnonzero(seen == n)[0]) for n in range(1, len(found) + 1)]
    assert firsts == sorted(firsts)


def test_only_what_lies_in_the_box_is_looked_at():
    mask = noise(0.2, 3)
    box = BoundingBox((2, 3, 4), (9, 8, 12))
    found = find_components(mask, geometry_of(mask), connectivity=26, box=box)
    outside = np.ones(mask.shape, bool)
    outside[box.slices] = False
    assert not found.ids[outside].any()
    assert np.array_equal(found.ids[box.slices] > 0, mask[box.slices] > 0)


def test_more_components_than_objects_can_be_are_refused_before_they_take_memory():
    mask = noise(0.3, 8)
    n = truth(mask, 26)[1]
    assert len(find_components(mask, geometry_of(mask), connectivity=26, most=n)) == n
    for slab_voxels in (1, 10**6):
        with pytest.raises(ScanError, match="this mask is noise") as caught:
            find_components(mask, geometry_of(mask), connectivity=26, most=n - 1, slab_voxels=slab_voxels)
        assert caught.value.code == "E_SPECKS"


def test_components_are_ordered_by_size_and_equal_ones_stay_in_order():
    rng = np.random.default_rng(0)
    sizes = np.concatenate([[0], rng.choice([1, 1, 1, 2, 3, 700_000], 3000)]).astype(np.uint32)
    numbers = by_size(sizes)
    expected = np.argsort(-sizes[1:].astype(np.int64), kind="stable")
    assert numbers[0] == 0
    assert np.array_equal(np.argsort(numbers[1:]), expected)


def test_new_numbers_take_the_memory_of_the_old_ones():
    mask = noise(0.2, 3)
    found = find_components(mask, geometry_of(mask), connectivity=26, slab_voxels=300)
    before = found.number[found.ids]
    table = np.concatenate([[0], np.arange(len(found), 0, -1)]).astype(np.uint32)
    ids = relabel(found, table, np.uint32)
    assert np.shares_memory(ids, found.ids)
    assert np.array_equal(ids, table[before])


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize("n_labels", [1, 4])
def test_many_lesions_have_the_same_numbers_in_all_48_orientations(grid, n_labels):
    mask = noise(0.1, n_labels, shape=(6, 7, 7), seed=3)
    geometry = Geometry(mask.shape, grid((0.7, 0.9, 2.5)))
    expected = label_lesions(mask, geometry, many=0)
    few = label_lesions(mask, geometry)
    assert sorted(few.n_voxels, reverse=True) == list(expected.n_voxels) == sorted(expected.n_voxels, reverse=True)
    assert np.array_equal(np.array([0, *expected.labels])[expected.ids], mask)
    assert np.array_equal(np.bincount(expected.ids.ravel())[1:], expected.n_voxels)
    in_every_order = orientations(Volume(expected.ids, geometry))
    for (array, affine), (ids, _) in zip(orientations(Volume(mask, geometry)), in_every_order, strict=True):
        assert np.array_equal(label_lesions(array, Geometry(array.shape, affine), many=0).ids, ids)


def test_labelling_noise_takes_a_few_bytes_per_voxel_and_per_component():
    mask = np.asfortranarray(noise(0.195, 117, shape=(220, 220, 220)))
    tracemalloc.start()
    lesions = label_lesions(mask, geometry_of(mask))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    n = len(lesions.labels)
    assert n > mask.size // 6
    assert peak < 70 * 2**20 + 19 * n  # the ids themselves are mapped


@pytest.mark.parametrize("label", [None, 2])
def test_holes_of_noise_are_filled_as_one_by_one(label):
    mask = noise(0.7, 2, seed=5)
    expected = mask.copy()
    background, n = ndimage.label(mask == 0)
    for number in range(1, n + 1):
        inside = background == number
        at = np.argwhere(inside)
        border = np.unique(mask[ndimage.binary_dilation(inside) & ~inside])
        reaches_edge = (at == 0).any() or (at == np.array(mask.shape) - 1).any()
        if border.size == 1 and not reaches_edge and label in (None, border[0]):
            expected[inside] = border[0]
    assert (expected != mask).any()
    assert np.array_equal(FillHoles(label=label)(mask, geometry_of(mask)), expected)

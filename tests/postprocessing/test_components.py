"""Components equal those of SciPy, also slab by slab, for noise and in all 48 orientations."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from laws import GRIDS, orientations
from scipy import ndimage

from volseg.errors import ScanError
from volseg.postprocessing.components import (
    by_size,
    component_statistics,
    find_components,
    label_components,
    relabel,
)
from volseg.postprocessing.lesions import label_lesions
from volseg.postprocessing.steps import FillHoles
from volseg.volume import BoundingBox, Geometry, Volume

REACH = {4: 1, 8: 2, 6: 1, 18: 2, 26: 3}  # axes along which a neighbour may differ
DTYPES = (bool, np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.int64, np.uint64)
SHAPE = (13, 11, 17)


def labelled_by_scipy(values, connectivity):
    """Return the components of every value, and their number."""
    structure = ndimage.generate_binary_structure(values.ndim, REACH[connectivity])
    components, n = np.zeros(values.shape, np.int64), 0
    for value in np.unique(values[values != 0]):
        ids, n_ids = ndimage.label(values == value, structure)
        components[ids > 0] = ids[ids > 0] + n
        n += n_ids
    return components, n


def assert_equal_up_to_numbers(components, expected):
    np.testing.assert_array_equal(components > 0, expected > 0)
    first, second = components.ravel().tolist(), expected.ravel().tolist()
    assert len(set(zip(first, second, strict=True))) == len(set(first)) == len(set(second))


def random_lesion(rng, n_dimensions, dtype):
    """Return specks, blobs, noise or solid blocks, of odd and even lengths, in any layout."""
    shape = rng.integers(1, rng.choice([3, 9, 14]), n_dimensions)
    is_inside = rng.random(shape) < rng.choice([0.1, 0.3, 0.5, 0.7, 0.95])
    labels = rng.integers(1, rng.choice([2, 2, 4]), shape)
    values = np.array(labels * is_inside, dtype=dtype, order=rng.choice(["C", "F"]))
    return values[::-1] if rng.random() < 0.2 else values


def test_components_equal_those_of_scipy_for_2000_random_lesions():
    rng = np.random.default_rng(0)
    for n in range(2000):
        connectivity = [4, 8, 8, 6, 18, 26, 26][n % 7]
        dtype = bool if n % 2 else DTYPES[n % len(DTYPES)]
        values = random_lesion(rng, 2 if connectivity in (4, 8) else 3, dtype)
        components, n_components = label_components(values, connectivity)
        expected, n_expected = labelled_by_scipy(values, connectivity)
        assert n_components == n_expected, (connectivity, dtype, values.tolist())
        assert_equal_up_to_numbers(components, expected)


@pytest.mark.slow
@pytest.mark.parametrize("connectivity", REACH)
@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.2, 0.31, 0.5, 0.9])
def test_components_of_noise_equal_those_of_scipy_for_every_dtype(connectivity, fraction):
    rng = np.random.default_rng(1)
    for dtype in DTYPES:
        for size in (63, 64, 65):
            shape = (size,) * (2 if connectivity in (4, 8) else 3)
            values = (rng.random(shape) < fraction).astype(dtype)
            components, n = label_components(values, connectivity)
            expected, n_expected = labelled_by_scipy(values, connectivity)
            assert n == n_expected
            assert_equal_up_to_numbers(components, expected)


def test_background_of_a_row_is_not_a_component():
    row = np.array([[0, 0, 0, 1, 1, 1, 0]], bool)
    for values in (row, row.T, row[:, ::-1], np.asfortranarray(row)):
        for _ in range(50):  # the wrong pixels differed between calls
            components, n = label_components(values, 8)
            assert n == 1
            np.testing.assert_array_equal(components, values)


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 3, 1), (3, 1, 1)])
def test_a_single_row_of_bool_has_components(shape):
    values = np.array([True, False, True]).reshape(shape)
    for connectivity in (6, 18, 26):
        components, n = label_components(values, connectivity)
        assert (components.ravel().tolist(), n) == ([1, 0, 2], 2)


def test_size_centroid_and_box_match_the_voxels():
    rng = np.random.default_rng(2)
    for _ in range(300):
        components, n = label_components(random_lesion(rng, 3, bool), 26)
        padded = np.pad(components, 2)
        of_view = component_statistics(padded[2:-2, 2:-2, 2:-2])  # not contiguous
        measured = component_statistics(components)
        np.testing.assert_array_equal(of_view.centroids, measured.centroids)
        counts = np.bincount(components.ravel().astype(np.int64), minlength=n + 1)
        np.testing.assert_array_equal(measured.n_voxels, counts[1:])
        assert measured.boxes() == ndimage.find_objects(components.astype(np.int64))
        centroids = ndimage.center_of_mass(components > 0, components, range(1, n + 1))
        np.testing.assert_allclose(measured.centroids, np.array(centroids).reshape(-1, 3))


def test_a_reversed_view_has_components():
    values = np.array([[[1]], [[0]]], np.int32)[::-1]
    components, n = label_components(values, 26)
    assert (components.ravel().tolist(), n) == ([0, 1], 1)


def test_invalid_values_and_connectivity_are_refused():
    with pytest.raises(ValueError, match="8 neighbours do not exist in 3 dimensions"):
        label_components(np.zeros((2, 2, 2), bool), 8)
    with pytest.raises(ValueError, match="26 neighbours do not exist in 2 dimensions"):
        label_components(np.zeros((2, 2), bool), 26)
    with pytest.raises(ValueError, match="whole numbers, got float32"):
        label_components(np.zeros((2, 2), np.float32), 8)
    with pytest.raises(ValueError, match="skip a number: 2"):
        component_statistics(np.array([[[1, 0, 3]]], np.uint8))
    for empty in (np.zeros((0, 3), bool), np.zeros((3, 3), np.uint8)):
        components, n = label_components(empty, 8)
        assert (n, components.any(), components.shape) == (0, False, empty.shape)


def noise(fraction, n_labels, shape=SHAPE, seed=0, dtype=np.uint8):
    rng = np.random.default_rng(seed)
    return (rng.integers(1, n_labels + 1, shape) * (rng.random(shape) < fraction)).astype(dtype)


def geometry_of(mask):
    return Geometry(mask.shape, np.diag([0.7, 0.9, 2.5, 1.0]))


@pytest.mark.parametrize("connectivity", [6, 18, 26])
@pytest.mark.parametrize("n_labels", [1, 2, 30])
@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("slab_voxels", [1, 400, 10**6])
def test_slabs_give_the_components_of_the_whole(fraction, n_labels, connectivity, slab_voxels):
    mask = noise(fraction, n_labels)
    components = find_components(
        mask, geometry_of(mask), connectivity=connectivity, slab_voxels=slab_voxels
    )
    ids = components.number[components.ids]
    expected, n = labelled_by_scipy(mask, connectivity)
    assert len(components) == n
    pairs = np.unique(np.stack([ids.ravel(), expected.ravel()]), axis=1)
    assert pairs.shape[1] == len(np.unique(expected))  # a one-to-one mapping of numbers
    assert np.array_equal(components.values[ids], mask)
    assert np.array_equal(components.sizes[1:], np.bincount(ids.ravel(), minlength=n + 1)[1:])


@pytest.mark.parametrize("dtype", [bool, np.int8, ">i2", np.int64])
@pytest.mark.parametrize("order", ["C", "F"])
def test_components_are_numbered_by_their_first_voxel_along_the_longest_axis(dtype, order):
    mask = np.array(noise(0.2, 1), dtype, order=order)
    components = find_components(mask, geometry_of(mask), connectivity=26, slab_voxels=300)
    ids = components.number[components.ids]
    flat = ids.transpose(2, 1, 0).ravel()  # S is the longest axis, R the fastest
    firsts = [int(np.flatnonzero(flat == n)[0]) for n in range(1, len(components) + 1)]
    assert firsts == sorted(firsts)


def test_voxels_outside_the_box_are_ignored():
    mask = noise(0.2, 3)
    box = BoundingBox((2, 3, 4), (9, 8, 12))
    components = find_components(mask, geometry_of(mask), connectivity=26, box=box)
    outside = np.ones(mask.shape, bool)
    outside[box.slices] = False
    assert not components.ids[outside].any()
    assert np.array_equal(components.ids[box.slices] > 0, mask[box.slices] > 0)


def test_too_many_components_are_refused():
    mask = noise(0.3, 8)
    geometry, n = geometry_of(mask), labelled_by_scipy(mask, 26)[1]
    assert len(find_components(mask, geometry, connectivity=26, most=n)) == n
    for slab_voxels in (1, 10**6):
        with pytest.raises(ScanError, match="this mask is noise") as caught:
            find_components(mask, geometry, connectivity=26, most=n - 1, slab_voxels=slab_voxels)
        assert caught.value.code == "E_SPECKS"


def test_components_are_sorted_by_size_and_equal_ones_stay_in_order():
    rng = np.random.default_rng(0)
    sizes = np.concatenate([[0], rng.choice([1, 1, 1, 2, 3, 700_000], 3000)]).astype(np.uint32)
    numbers = by_size(sizes)
    expected = np.argsort(-sizes[1:].astype(np.int64), kind="stable")
    assert numbers[0] == 0
    assert np.array_equal(np.argsort(numbers[1:]), expected)


def test_relabel_reuses_the_memory_of_the_ids():
    mask = noise(0.2, 3)
    components = find_components(mask, geometry_of(mask), connectivity=26, slab_voxels=300)
    before = components.number[components.ids]
    table = np.concatenate([[0], np.arange(len(components), 0, -1)]).astype(np.uint32)
    ids = relabel(components, table, np.uint32)
    assert np.shares_memory(ids, components.ids)
    assert np.array_equal(ids, table[before])


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize("n_labels", [1, 4])
def test_many_lesions_have_the_same_numbers_in_all_48_orientations(grid, n_labels):
    mask = noise(0.1, n_labels, shape=(6, 7, 7), seed=3)
    geometry = Geometry(mask.shape, grid((0.7, 0.9, 2.5)))
    expected = label_lesions(mask, geometry, many=0)
    few, n_voxels = label_lesions(mask, geometry), list(expected.n_voxels)
    assert n_voxels == sorted(n_voxels, reverse=True) == sorted(few.n_voxels, reverse=True)
    assert np.array_equal(np.array([0, *expected.labels])[expected.ids], mask)
    assert np.array_equal(np.bincount(expected.ids.ravel())[1:], expected.n_voxels)
    masks, all_ids = (orientations(Volume(a, geometry)) for a in (mask, expected.ids))
    for (array, affine), (ids, _) in zip(masks, all_ids, strict=True):
        assert np.array_equal(label_lesions(array, Geometry(array.shape, affine), many=0).ids, ids)


def test_labelling_noise_takes_a_few_bytes_per_voxel_and_component():
    mask = np.asfortranarray(noise(0.195, 117, shape=(220, 220, 220)))
    tracemalloc.start()
    lesions = label_lesions(mask, geometry_of(mask))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    n = len(lesions.labels)
    assert n > mask.size // 6
    assert peak < 70 * 2**20 + 19 * n  # without the ids, which are memory-mapped


@pytest.mark.parametrize("label", [None, 2])
def test_holes_of_noise_are_filled_as_if_one_by_one(label):
    mask = noise(0.7, 2, seed=5)
    expected = mask.copy()
    background, n = ndimage.label(mask == 0)
    for number in range(1, n + 1):
        inside = background == number
        index = np.argwhere(inside)
        border = np.unique(mask[ndimage.binary_dilation(inside) & ~inside])
        reaches_edge = (index == 0).any() or (index == np.array(mask.shape) - 1).any()
        if border.size == 1 and not reaches_edge and label in (None, border[0]):
            expected[inside] = border[0]
    assert (expected != mask).any()
    assert np.array_equal(FillHoles(label=label)(mask, geometry_of(mask)), expected)

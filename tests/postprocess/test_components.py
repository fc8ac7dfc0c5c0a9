from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from volseg.postprocess.components import component_statistics, label_components

REACH = {4: 1, 8: 2, 6: 1, 18: 2, 26: 3}  # axes along which a neighbour may differ
DTYPES = (bool, np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.int64, np.uint64)


def labelled_by_scipy(values, connectivity):
    """Components of every value, and how many there are."""
    structure = ndimage.generate_binary_structure(values.ndim, REACH[connectivity])
    components, n = np.zeros(values.shape, np.int64), 0
    for value in np.unique(values[values != 0]):
        of_value, n_of_value = ndimage.label(values == value, structure)
        components[of_value > 0] = of_value[of_value > 0] + n
        n += n_of_value
    return components, n


def assert_equal_but_for_numbers(components, expected):
    np.testing.assert_array_equal(components > 0, expected > 0)
    pairs = set(zip(components.ravel().tolist(), expected.ravel().tolist(), strict=True))
    assert len(pairs) == len(set(components.ravel().tolist())) == len(set(expected.ravel().tolist()))


def random_lesion(rng, n_dimensions, dtype):
    """Specks, blobs, noise or solid blocks, of odd and even lengths, in any layout."""
    shape = rng.integers(1, rng.choice([3, 9, 14]), n_dimensions)
    is_inside = rng.random(shape) < rng.choice([0.1, 0.3, 0.5, 0.7, 0.95])
    labels = rng.integers(1, rng.choice([2, 2, 4]), shape)
    values = np.array(labels * is_inside, dtype=dtype, order=rng.choice(["C", "F"]))
    return values[::-1] if rng.random() < 0.2 else values


def test_components_are_those_of_scipy_for_5000_random_lesions():
    rng = np.random.default_rng(0)
    for n in range(5000):
        connectivity = [4, 8, 8, 6, 18, 26, 26][n % 7]
        dtype = bool if n % 2 else DTYPES[n % len(DTYPES)]
        values = random_lesion(rng, 2 if connectivity in (4, 8) else 3, dtype)
        components, n_components = label_components(values, connectivity)
        expected, n_expected = labelled_by_scipy(values, connectivity)
        assert n_components == n_expected, (connectivity, dtype, values.tolist())
        assert_equal_but_for_numbers(components, expected)


@pytest.mark.slow
@pytest.mark.parametrize("connectivity", REACH)
@pytest.mark.parametrize("share", [0.01, 0.05, 0.2, 0.31, 0.5, 0.9])
def test_components_of_noise_are_those_of_scipy_for_every_dtype(connectivity, share):
    rng = np.random.default_rng(1)
    for dtype in DTYPES:
        for size in (63, 64, 65):
            shape = (size,) * (2 if connectivity in (4, 8) else 3)
            values = (rng.random(shape) < share).astype(dtype)
            components, n = label_components(values, connectivity)
            expected, n_expected = labelled_by_scipy(values, connectivity)
            assert n == n_expected
            assert_equal_but_for_numbers(components, expected)


def test_background_of_a_row_is_no_component():
    row = np.array([[0, 0, 0, 1, 1, 1, 0]], bool)
    for values in (row, row.T, row[:, ::-1], np.asfortranarray(row)):
        for _ in range(50):  # the wrong pixels differed between calls
            components, n = label_components(values, 8)
            assert n == 1
            np.testing.assert_array_equal(components, values)


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 3, 1), (3, 1, 1)])
def test_a_mask_of_one_row_of_bool_has_components(shape):
    values = np.array([True, False, True]).reshape(shape)
    for connectivity in (6, 18, 26):
        components, n = label_components(values, connectivity)
        assert (components.ravel().tolist(), n) == ([1, 0, 2], 2)


def test_size_centre_and_box_are_those_of_the_voxels():
    rng = np.random.default_rng(2)
    for _ in range(300):
        components, n = label_components(random_lesion(rng, 3, bool), 26)
        padded = np.pad(components, 2)
        of_part = component_statistics(padded[2:-2, 2:-2, 2:-2])  # a view that is not in one piece
        measured = component_statistics(components)
        np.testing.assert_array_equal(of_part.centroids, measured.centroids)
        counts = np.bincount(components.ravel().astype(np.int64), minlength=n + 1)
        np.testing.assert_array_equal(measured.n_voxels, counts[1:])
        assert measured.boxes() == ndimage.find_objects(components.astype(np.int64))
        centres = ndimage.center_of_mass(components > 0, components, range(1, n + 1))
        np.testing.assert_allclose(measured.centroids, np.array(centres).reshape(-1, 3))


def test_a_view_that_runs_backwards_has_its_components():
    values = np.array([[[1]], [[0]]], np.int32)[::-1]
    components, n = label_components(values, 26)
    assert (components.ravel().tolist(), n) == ([0, 1], 1)


def test_what_has_no_components_is_refused():
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

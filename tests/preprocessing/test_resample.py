import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import GRIDS, ball, ball_volume_mm3, grid_around, oblique
from scipy import ndimage

from volseg.preprocessing.resample import (
    coarsened_mask,
    positions,
    resample,
    resample_mask,
    resampled_shape,
)
from volseg.volume import Geometry

SHAPES = st.tuples(*[st.integers(1, 24)] * 3)


def same_field(geometry, shape):
    """Return the grid of `shape` voxels over the same field of view, from edge to edge."""
    step = np.diag([*(np.array(geometry.shape) / shape), 1.0])
    step[:3, 3] = (np.diag(step)[:3] - 1) / 2
    return Geometry(shape, geometry.affine @ step)


@settings(max_examples=40, deadline=None)
@given(SHAPES, SHAPES, st.sampled_from(["C", "F"]), st.sampled_from([1, 3]))
def test_equal_to_scipy_for_any_shape_and_memory_order(shape, new_shape, layout, order):
    array = np.asarray(np.random.default_rng(0).normal(100, 50, shape), order=layout)
    factors = [m / n for m, n in zip(new_shape, shape, strict=True)]
    expected = ndimage.zoom(array, factors, order=order, mode="nearest", grid_mode=True)
    resampled = resample(array, new_shape, "linear" if order == 1 else "cubic")
    np.testing.assert_allclose(resampled, expected, atol=2e-3)


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
def test_the_original_spacing_is_the_identity_bit_for_bit(interpolation):
    array = np.random.default_rng(0).integers(-1000, 2000, (11, 12, 13)).astype(np.int16)
    np.testing.assert_array_equal(resample(array, array.shape, interpolation), array)


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
def test_a_flipped_and_transposed_view_gives_the_flipped_and_transposed_result(interpolation):
    array = np.random.default_rng(0).normal(size=(9, 10, 11))
    expected = resample(array, (6, 14, 11), interpolation)
    view = array.transpose(2, 0, 1)[::-1, :, ::-1]
    resampled = resample(view, (11, 6, 14), interpolation)
    np.testing.assert_allclose(resampled, expected.transpose(2, 0, 1)[::-1, :, ::-1], atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_a_linear_field_keeps_its_value_at_every_point_of_the_patient(grid):
    geometry = Geometry((12, 15, 9), grid((0.7, 0.9, 2.5)))
    slope = np.array([0.3, -0.2, 0.5])

    def field(geometry):
        index = np.indices(geometry.shape).reshape(3, -1).T
        return (geometry.to_world_mm(index) @ slope).reshape(geometry.shape)

    shape = resampled_shape(geometry, (1.0, 1.0, 1.5))
    new = same_field(geometry, shape)
    resampled = resample(field(geometry), shape)
    # Output voxels beyond the outermost input centres repeat the edge; all others equal the field.
    index = geometry.to_index(new.to_world_mm(np.indices(shape).reshape(3, -1).T))
    last = np.array(geometry.shape) - 1
    inside = ((index >= -1e-9) & (index <= last + 1e-9)).all(axis=1).reshape(shape)
    assert inside.mean() > 0.5
    np.testing.assert_allclose(resampled[inside], field(new)[inside], atol=1e-4)


def test_resampling_its_mask_keeps_the_volume_of_a_ball():
    geometry = grid_around(12, oblique((0.7, 0.9, 2.5)), margin=4)
    mask = ball(12, geometry).astype(np.uint8) * 7
    shape = resampled_shape(geometry, (1.0, 1.0, 1.0))
    resampled = resample_mask(mask, shape)
    assert set(np.unique(resampled)) == {0, 7}
    volume = np.count_nonzero(resampled) * same_field(geometry, shape).voxel_volume_mm3
    assert volume == pytest.approx(ball_volume_mm3(12), rel=0.02)


def test_a_mask_on_a_finer_grid_read_at_the_old_voxel_centres_is_the_mask():
    mask = np.random.default_rng(0).integers(0, 4, (7, 9, 5)).astype(np.uint8)
    shape = (11, 9, 13)
    finer = resample_mask(mask, shape)
    centres = [
        np.floor((np.arange(n) + 0.5) * m / n).astype(int)
        for n, m in zip(mask.shape, shape, strict=True)
    ]
    np.testing.assert_array_equal(finer[np.ix_(*centres)], mask)


def test_resampling_makes_no_new_labels():
    mask = np.zeros((10, 10, 10), np.uint8)
    mask[:5], mask[5:] = 2, 9
    assert set(np.unique(resample_mask(mask, (15, 7, 10)))) == {2, 9}


def test_positions_stay_inside_and_weight_the_upper_neighbour():
    lower, upper, weight = positions(4, 8)
    np.testing.assert_array_equal(lower, [0, 0, 0, 1, 1, 2, 2, 3])
    np.testing.assert_array_equal(upper, [0, 1, 1, 2, 2, 3, 3, 3])
    np.testing.assert_allclose(weight, [0, 0.25, 0.75, 0.25, 0.75, 0.25, 0.75, 0])


@settings(max_examples=40, deadline=None)
@given(st.tuples(*[st.integers(1, 12)] * 3), st.tuples(*[st.integers(1, 12)] * 3))
def test_a_coarse_voxel_is_labelled_exactly_if_it_covers_a_label(shape, new_shape):
    mask = (np.random.default_rng(sum(shape)).random(shape) < 0.05).astype(np.uint8) * 3
    coarse = coarsened_mask(mask, new_shape)
    assert coarse.shape == new_shape
    for voxel in np.ndindex(*new_shape):
        parts = []
        for index, n, m in zip(voxel, shape, new_shape, strict=True):
            nearest = int((index + 0.5) * n / m)
            covered = slice(index * n // m, -(-(index + 1) * n // m))
            parts.append(covered if m < n else slice(nearest, nearest + 1))
        assert coarse[voxel] == bool(mask[tuple(parts)].any())
    assert not mask.any() or coarse.any()

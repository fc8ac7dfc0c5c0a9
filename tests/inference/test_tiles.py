import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from volseg.inference.tiles import TiledAxis, gaussian, thinnest_axis, tile_starts, widest


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 96), st.floats(0, 0.9))
def test_tiles_cover_the_axis_and_overlap_at_least_as_requested(length, patch, overlap):
    starts = tile_starts(length, patch, overlap)
    assert starts[0] == 0
    if length <= patch:
        assert starts == [0]
        return
    assert starts[-1] + patch == length
    gaps = np.diff(starts)
    assert (gaps > 0).all()
    assert gaps.max() <= max(1, patch * (1 - overlap)) + 1


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 60), st.integers(1, 24), st.floats(0, 0.8), st.integers(0, 9))
def test_weights_sum_to_one_at_every_voxel(length, patch, overlap, margin):
    axis = TiledAxis.of(length, patch, overlap, margin)
    total = np.zeros(len(axis.source))
    for start, weights in zip(axis.starts, axis.weights, strict=True):
        total[start : start + patch] += weights
    np.testing.assert_allclose(total, 1, rtol=1e-5)
    inside = axis.source[axis.before : axis.before + length]
    np.testing.assert_array_equal(inside, np.arange(length))


def test_padding_reflects_the_scan_and_then_is_zero():
    axis = TiledAxis.of(3, 9, 0.5, margin=2)
    np.testing.assert_array_equal(axis.source, [-1, 1, 0, 0, 1, 2, 2, 1, -1])
    assert axis.before == 3


@pytest.mark.parametrize("patch", [8, 9, 96])
def test_the_gaussian_is_1_in_the_centre_symmetric_and_nowhere_zero(patch):
    weights, centre = gaussian(patch), patch // 2
    assert weights[centre] == 1
    before = weights[centre - 1 : 0 if patch % 2 == 0 else None : -1]
    np.testing.assert_allclose(weights[centre + 1 :], before)
    expected = np.exp(-0.5 * (patch // 8 / (patch / 8)) ** 2)
    assert weights[centre + patch // 8] == pytest.approx(expected)
    assert weights.min() > 0


def test_layers_lie_across_the_axis_that_needs_the_smallest_buffer():
    assert thinnest_axis((239, 239, 400), (128, 128, 128)) == 2
    assert thinnest_axis((400, 239, 239), (128, 128, 128)) == 0
    assert thinnest_axis((300, 300, 300), (128, 64, 128)) == 1
    assert thinnest_axis((50, 50, 50), (64, 64, 64)) == 2


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 64), st.floats(0, 0.8), st.data())
def test_the_widest_interval_contains_the_given_one_and_costs_no_tile(length, patch, overlap, data):
    start = data.draw(st.integers(0, length - 1))
    stop = data.draw(st.integers(start + 1, length))
    begin, end = widest(start, stop, length, patch, overlap)
    assert 0 <= begin <= start < stop <= end <= length
    n_tiles = len(tile_starts(stop - start, patch, overlap))
    assert len(tile_starts(end - begin, patch, overlap)) == n_tiles
    if end - begin < length:
        assert len(tile_starts(end - begin + 1, patch, overlap)) > n_tiles


@settings(max_examples=200)
@given(st.data())
def test_the_widest_interval_with_a_margin_takes_no_more_tiles(data):
    length, patch, margin = (data.draw(st.integers(1, n)) for n in (200, 64, 9))
    overlap = data.draw(st.sampled_from([0, 0.25, 0.5]))
    start, stop = sorted(
        data.draw(st.lists(st.integers(0, length), min_size=2, max_size=2, unique=True))
    )
    begin, end = widest(start, stop, length, patch, overlap, margin)
    assert 0 <= begin <= start < stop <= end <= length
    n_tiles = len(tile_starts(stop - start + 2 * margin, patch, overlap))
    assert len(tile_starts(end - begin + 2 * margin, patch, overlap)) == n_tiles

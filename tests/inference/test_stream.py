from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from volseg.inference.stream import BACKGROUND, ArrayPlanes, Tiling, predict_logits, predict_slabs
from volseg.inference.tiles import gaussian, tile_starts

SHAPES = st.tuples(*[st.integers(1, 24)] * 3)
PATCHES = st.tuples(*[st.integers(1, 12)] * 3)


class Identity:
    """A network that returns its channels and their negatives, which blending must reproduce."""

    head = None

    def logits(self, batch):
        return np.concatenate([batch, -batch], axis=1)


class Lopsided:
    """A network whose logits depend on the position in the patch: no symmetry hides a mistake."""

    head = None

    def logits(self, batch):
        r, a, s = np.indices(batch.shape[2:]).astype(np.float32)
        return np.stack([batch[:, 0] + r, batch[:, 0] * a, s + 0 * batch[:, 0]], axis=1)


class LeftNeighbour:
    """A network that returns each voxel's left neighbour, and 0 at the border like zero padding."""

    head = None

    def logits(self, batch):
        moved = np.zeros_like(batch)
        moved[:, :, 1:] = batch[:, :, :-1]
        return np.concatenate([moved, moved], axis=1)


class Along(ArrayPlanes):
    """An array in planes along another axis."""

    def __init__(self, array, axis):
        super().__init__(array)
        self.axis = axis

    def read(self, start, stop):
        return np.take(self._array, range(start, stop), axis=1 + self.axis)


def scan(shape, channels=1):
    return np.random.default_rng(0).normal(size=(channels, *shape)).astype(np.float32)


def blended_at_once(array, network, patch, overlap):
    """Blend without streaming: all tiles, and sums of logits and weights over the whole volume."""
    missing = [max(0, p - n) for n, p in zip(array.shape[1:], patch, strict=True)]
    pads = [(n // 2, n - n // 2) for n in missing]
    padded = np.pad(array, [(0, 0), *pads])
    weight = np.einsum("i,j,k->ijk", *(gaussian(p) for p in patch))
    total, weights = None, np.zeros(padded.shape[1:])
    for r in tile_starts(padded.shape[1], patch[0], overlap):
        for a in tile_starts(padded.shape[2], patch[1], overlap):
            for s in tile_starts(padded.shape[3], patch[2], overlap):
                box = (slice(r, r + patch[0]), slice(a, a + patch[1]), slice(s, s + patch[2]))
                logits = network.logits(padded[(slice(None), *box)][None])[0].astype(np.float64)
                total = np.zeros((len(logits), *padded.shape[1:])) if total is None else total
                total[(slice(None), *box)] += logits * weight
                weights[box] += weight
    inside = [slice(a, a + n) for (a, _), n in zip(pads, array.shape[1:], strict=True)]
    return (total / weights)[(slice(None), *inside)]


@settings(max_examples=12, deadline=None)
@given(SHAPES, PATCHES, st.floats(0, 0.8), st.integers(0, 2), st.integers(1, 4))
def test_streaming_equals_blending_all_at_once(shape, patch, overlap, axis, batch_size):
    array = scan(shape)
    tiling = Tiling(patch_shape=patch, overlap=overlap, batch_size=batch_size)

    def predict(tiling=tiling, **options):
        slabs = predict_slabs(Along(array, axis), Lopsided(), tiling, n_classes=3, **options)
        return np.concatenate([slab.float().numpy().copy() for slab in slabs], axis=1 + axis)

    logits = predict()
    expected = blended_at_once(array, Lopsided(), patch, overlap)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    np.testing.assert_array_equal(predict(read_ahead=True), logits)
    half = predict(replace(tiling, dtype=torch.float16))
    np.testing.assert_allclose(half, logits, atol=5e-3 * max(1, np.abs(logits).max()))


@settings(max_examples=20, deadline=None)
@given(SHAPES, PATCHES, st.floats(0, 0.8), st.sets(st.integers(0, 2)), st.integers(0, 5))
def test_equal_tiles_blend_to_the_volume(shape, patch, overlap, mirror, margin):
    array = scan(shape)
    tiling = Tiling(patch_shape=patch, overlap=overlap, tta_axes=sorted(mirror), margin=margin)
    logits = predict_logits(array, Identity(), tiling, n_classes=2)
    np.testing.assert_allclose(logits, np.concatenate([array, -array]), atol=1e-5)


def test_a_slab_is_yielded_as_soon_as_no_later_tile_touches_it():
    reads = []

    class Recording(ArrayPlanes):
        def read(self, start, stop):
            reads.append((start, stop))
            return super().read(start, stop)

    tiling = Tiling(patch_shape=(8, 8, 8), overlap=0.5)
    slabs = predict_slabs(Recording(scan((8, 8, 40))), Identity(), tiling, n_classes=2)
    assert next(slabs).shape == (2, 8, 8, 4)
    assert reads == [(0, 8)]  # nothing of the next layer yet
    assert [slab.shape[3] for slab in slabs] == [4] * 7 + [8]
    assert reads == [(0, 8), *((n, n + 4) for n in range(8, 40, 4))]  # each plane once


def test_tta_averages_a_lopsided_network_to_a_symmetric_one():
    array = np.zeros((1, 8, 8, 8), np.float32)
    tiling = Tiling(patch_shape=(8, 8, 8), overlap=0.5, tta_axes=(0,))
    logits = predict_logits(array, Lopsided(), tiling, n_classes=3)
    np.testing.assert_allclose(logits[0], 3.5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 20, 2)])
def test_a_scan_smaller_than_a_patch_is_padded_and_cut_back(shape):
    array = scan(shape, channels=2)
    tiling = Tiling(patch_shape=(8, 8, 8), overlap=0.5)
    logits = predict_logits(array, Identity(), tiling, n_classes=4)
    np.testing.assert_allclose(logits[:2], array, atol=1e-6)


def test_with_a_margin_the_faces_of_a_scan_have_reflect_padding():
    array = scan((12, 9, 5)) + 9
    tiling = Tiling(patch_shape=(12, 9, 5), overlap=0.5)
    without = predict_logits(array, LeftNeighbour(), tiling, n_classes=2)
    tiling = Tiling(patch_shape=(16, 13, 9), overlap=0.5, margin=2)
    padded = predict_logits(array, LeftNeighbour(), tiling, n_classes=2)
    np.testing.assert_allclose(without[0, 0], 0)
    np.testing.assert_allclose(padded[0, 0], array[0, 0], atol=1e-5)
    np.testing.assert_allclose(padded[0, 1:], array[0, :-1], atol=1e-5)


@pytest.mark.parametrize("thickness", [8, 3])  # of the scan, in a patch of 8: padding is not body
def test_empty_tiles_are_not_run_and_are_background(thickness):
    array = np.full((1, thickness, 8, 64), -3.0, np.float32)
    array[..., 20:24] = 1.0
    tiles = []  # whether each was empty
    tiling = Tiling(patch_shape=(8, 8, 8), overlap=0.5, empty_level=-1.0)
    slabs = predict_slabs(ArrayPlanes(array), Identity(), tiling, n_classes=2, on_tile=tiles.append)
    logits = np.concatenate([slab.clone().numpy() for slab in slabs], axis=3)
    assert len(tiles) == 15
    assert tiles.count(False) == 2
    np.testing.assert_allclose(logits[0, ..., 16:28], array[0, ..., 16:28], atol=1e-5)
    assert (logits[1, ..., :16] == -BACKGROUND).all()
    assert (logits[1, ..., 28:] == -BACKGROUND).all()
    assert not logits[0, ..., :16].any()

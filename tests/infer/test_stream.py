import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from volseg.infer.stream import predict_logits


class Identity:
    """A network whose classes are its channels and their negative: blending must give them back."""

    def logits(self, batch):
        return np.concatenate([batch, -batch], axis=1)


class Lopsided:
    """A network that answers with the position in the patch along the first axis: not mirror-symmetric."""

    def logits(self, batch):
        ramp = np.arange(batch.shape[2], dtype=np.float32)[None, None, :, None, None]
        return np.broadcast_to(ramp, (batch.shape[0], 2, *batch.shape[2:])).copy()


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(*[st.integers(1, 30)] * 3),
    st.tuples(*[st.integers(1, 14)] * 3),
    st.floats(0, 0.8),
    st.integers(1, 4),
    st.sets(st.integers(0, 2)),
)
def test_equal_tiles_blend_to_the_volume(shape, patch, overlap, batch_size, mirror):
    array = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    found = predict_logits(
        array, Identity(), patch_shape=patch, overlap=overlap, mirror_axes=sorted(mirror), batch_size=batch_size
    )
    np.testing.assert_allclose(found, np.concatenate([array, -array]), atol=1e-5)


def test_mirroring_averages_a_lopsided_network_to_a_symmetric_one():
    array = np.zeros((1, 8, 8, 8), np.float32)
    found = predict_logits(array, Lopsided(), patch_shape=(8, 8, 8), overlap=0.5, mirror_axes=(0,))
    np.testing.assert_allclose(found, 3.5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 20, 2)])
def test_a_scan_smaller_than_a_patch_is_padded_and_cut_back(shape):
    array = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    found = predict_logits(array, Identity(), patch_shape=(8, 8, 8), overlap=0.5)
    np.testing.assert_allclose(found[:2], array, atol=1e-6)


class LeftNeighbour:
    """A network that answers with each voxel's left neighbour, and 0 at the rim: as blind there as zero padding is."""

    def logits(self, batch):
        moved = np.zeros_like(batch)
        moved[:, :, 1:] = batch[:, :, :-1]
        return np.concatenate([moved, moved], axis=1)


def test_with_a_margin_the_faces_of_a_scan_see_their_mirror_image():
    array = np.random.default_rng(0).normal(size=(1, 12, 9, 5)).astype(np.float32) + 9
    blind = predict_logits(array, LeftNeighbour(), patch_shape=(12, 9, 5), overlap=0.5)
    seeing = predict_logits(array, LeftNeighbour(), patch_shape=(16, 13, 9), overlap=0.5, margin=2)
    np.testing.assert_allclose(blind[0, 0], 0)
    np.testing.assert_allclose(seeing[0, 0], array[0, 0], atol=1e-5)
    np.testing.assert_allclose(seeing[0, 1:], array[0, :-1], atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.tuples(*[st.integers(1, 12)] * 3), st.integers(0, 5))
def test_a_margin_is_cut_off_again(shape, margin):
    array = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    found = predict_logits(array, Identity(), patch_shape=(6, 6, 6), overlap=0.5, margin=margin)
    np.testing.assert_allclose(found[:1], array, atol=1e-5)

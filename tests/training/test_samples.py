import numpy as np
import pytest

from volseg.io.prepared import PreparedCase
from volseg.training.samples import Sampling, cut_patch, sample_batch


def case(shape=(20, 18, 12), lesion=(slice(15, 18), slice(2, 5), slice(9, 11)), name="a"):
    image = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    mask = np.zeros(shape, np.uint8)
    if lesion is not None:
        mask[lesion] = 1
    return PreparedCase(name, image, mask, {1: np.argwhere(mask == 1).astype(np.int16)}, None, {})


def test_a_patch_is_the_scan_inside_it_and_zero_outside():
    array = np.arange(1, 25, dtype=np.float32).reshape(1, 2, 3, 4)
    patch = cut_patch(array, (-1, 1, -2), (3, 3, 8))
    np.testing.assert_array_equal(patch[0, 1:, :2, 2:6], array[0, :, 1:])
    assert patch.sum() == array[0, :, 1:].sum()


def test_foreground_patches_hold_the_lesion_and_all_lie_in_the_scan():
    images, masks = sample_batch(
        [case()], Sampling(patch_shape=(8, 8, 8), n=200, foreground_fraction=0.5, seed=0)
    )
    assert (masks[:100].reshape(100, -1).max(axis=1) == 1).all()
    assert 0 < (masks[100:].reshape(100, -1).max(axis=1) == 1).mean() < 0.7
    # The scan is larger than a patch on every axis, so there is no padding.
    assert (images != 0).all()


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("fraction", [0.0, 1 / 3, 0.34, 0.5, 0.9, 1.0])
def test_the_fraction_of_foreground_patches_holds_for_every_batch_size(n, fraction):
    """Random patches hardly ever hold a lesion in the corner; those that do were centred on it."""
    corner = [case(shape=(60, 60, 60), lesion=(slice(0, 1),) * 3)]
    n_found = 0
    for step in range(50):
        _, masks = sample_batch(
            corner,
            Sampling(patch_shape=(8, 8, 8), n=n, foreground_fraction=fraction, seed=3),
            step=step,
        )
        n_found += int(masks.reshape(n, -1).max(axis=1).sum())
    assert n_found == pytest.approx(50 * n * fraction, abs=1)


def test_cuts_may_reach_beyond_the_scan_and_patches_reach_every_border():
    corners = [(slice(0, 1),) * 3, (slice(19, 20), slice(17, 18), slice(11, 12))]
    for corner in corners:
        _, masks = sample_batch(
            [case(lesion=corner)],
            Sampling(
                patch_shape=(8, 8, 8), n=50, foreground_fraction=1.0, seed=0, cut_shape=(12, 10, 14)
            ),
        )
        assert masks.shape == (50, 12, 10, 14)
        assert (masks[:, 2:-2, 1:-1, 3:-3].reshape(50, -1).max(axis=1) == 1).all()
    whole = [case(lesion=None)]
    patches, _ = sample_batch(
        whole, Sampling(patch_shape=(8, 8, 8), n=20, foreground_fraction=0.0, seed=5)
    )
    cuts, _ = sample_batch(
        whole,
        Sampling(
            patch_shape=(8, 8, 8), n=20, foreground_fraction=0.0, seed=5, cut_shape=(12, 10, 14)
        ),
    )
    np.testing.assert_array_equal(cuts[:, :, 2:-2, 1:-1, 3:-3], patches)


def test_a_scan_smaller_than_the_patch_is_centred_as_at_inference():
    small = case(shape=(6, 18, 4), lesion=None)
    images, _ = sample_batch(
        [small], Sampling(patch_shape=(10, 8, 8), n=3, foreground_fraction=1.0, seed=0)
    )
    filled = images[:, 0] != 0
    assert filled[:, 2:8, :, 2:6].all()
    assert filled.sum() == 3 * 6 * 8 * 4


def test_the_same_seed_gives_the_same_batch_and_another_one_does_not():
    cases = [case(name="a"), case(lesion=None, name="b")]

    def draw(seed):
        return sample_batch(
            cases, Sampling(patch_shape=(8, 8, 8), n=4, foreground_fraction=0.5, seed=seed)
        )

    np.testing.assert_array_equal(draw(1)[0], draw(1)[0])
    assert not np.array_equal(draw(1)[0], draw(2)[0])


def test_a_dataset_without_any_lesion_can_be_sampled():
    _, masks = sample_batch(
        [case(lesion=None)], Sampling(patch_shape=(8, 8, 8), n=4, foreground_fraction=1.0, seed=0)
    )
    assert masks.max() == 0


def test_each_patch_of_a_batch_can_be_drawn_by_itself():
    cases = [case(name="a"), case(lesion=None, name="b")]
    images, masks = sample_batch(
        cases, Sampling(patch_shape=(8, 8, 8), n=6, foreground_fraction=0.5, seed=3), step=7
    )
    for part in ([0, 1, 2], [3, 4, 5], [5, 0]):
        images_of_part, masks_of_part = sample_batch(
            cases,
            Sampling(patch_shape=(8, 8, 8), n=6, foreground_fraction=0.5, seed=3),
            step=7,
            only=part,
        )
        np.testing.assert_array_equal(images_of_part, images[part])
        np.testing.assert_array_equal(masks_of_part, masks[part])

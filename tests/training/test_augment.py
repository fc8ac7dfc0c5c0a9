import numpy as np
import pytest
import torch

from volseg.recipe import Augment
from volseg.training.augment import _blur, _coarsen, augment, enlarged_shape

PATCH = (24, 20, 16)
CHANGES = (
    "spatial",
    "elastic",
    "noise",
    "blur",
    "brightness",
    "contrast",
    "low_resolution",
    "gamma",
)
OFF = {f"{name}_probability": 0.0 for name in CHANGES}


def ball(shape, radius_mm, spacing_mm):
    index = np.moveaxis(np.indices(shape), 0, -1) - (np.array(shape) - 1) / 2
    return torch.from_numpy(
        (np.linalg.norm(index * spacing_mm, axis=-1) <= radius_mm).astype(np.float32)
    )


def changed(images, masks, settings, *, seed=0, spacing_mm=(1.0, 1.0, 1.0)):
    seeds = [(seed, index) for index in range(len(images))]
    return augment(images, masks, settings, patch_shape=PATCH, spacing_mm=spacing_mm, seeds=seeds)


def test_without_augmentation_the_centre_of_the_cut_is_returned():
    settings = Augment(flip_axes=(), **OFF)
    assert enlarged_shape(PATCH, settings) == PATCH
    images, masks = (
        torch.randn(2, 1, 26, 22, 18),
        torch.randint(0, 2, (2, 26, 22, 18), dtype=torch.uint8),
    )
    augmented, augmented_masks = changed(images, masks, settings)
    assert torch.equal(augmented, images[:, :, 1:-1, 1:-1, 1:-1])
    assert torch.equal(augmented_masks, masks[:, 1:-1, 1:-1, 1:-1])


def test_a_ball_stays_a_ball_of_its_volume_under_rotation_on_an_anisotropic_grid():
    settings = Augment(
        flip_axes=(),
        rotation_degrees=(180, 180, 180),
        scaling=(1, 1),
        **(OFF | {"spatial_probability": 1.0}),
    )
    spacing = (1.0, 1.5, 2.5)
    source = enlarged_shape(PATCH, settings)
    inside = ball(source, 9, spacing).expand(8, *source)
    images, masks = changed(inside[:, None], inside.to(torch.uint8), settings, spacing_mm=spacing)
    expected = ball(PATCH, 9, spacing).sum()
    np.testing.assert_allclose(masks.sum((1, 2, 3)).float(), expected, rtol=0.06)
    np.testing.assert_allclose(images.sum((1, 2, 3, 4)), expected, rtol=0.06)


def test_scaling_by_a_factor_scales_the_volume_by_its_cube():
    settings = Augment(
        flip_axes=(),
        rotation_degrees=(0, 0, 0),
        scaling=(0.8, 0.8),
        **(OFF | {"spatial_probability": 1.0}),
    )
    source = enlarged_shape(PATCH, settings)
    inside = ball(source, 7.5, (1, 1, 1))[None]
    _, masks = changed(inside[:, None], inside.to(torch.uint8), settings)
    np.testing.assert_allclose(masks.sum(), 0.8**3 * inside.sum(), rtol=0.1)


def test_image_and_mask_move_together():
    settings = Augment(**(OFF | {"spatial_probability": 1.0, "elastic_probability": 0.5}))
    source = enlarged_shape(PATCH, settings)
    masks = torch.zeros(6, *source, dtype=torch.uint8)
    masks[:, 5:16, 6:14, 7:15] = 1
    images, masks = changed(masks[:, None].float(), masks, settings)
    assert ((images[:, 0] > 0.5) == (masks == 1)).float().mean() > 0.995


def test_flips_reverse_exactly_the_named_axes():
    settings = Augment(flip_axes=("A",), **OFF)
    images, masks = torch.randn(16, 1, *PATCH), torch.zeros(16, *PATCH, dtype=torch.uint8)
    augmented, _ = changed(images, masks, settings)
    flipped = [torch.equal(a, b.flip(2)) for a, b in zip(augmented, images, strict=True)]
    same = [torch.equal(a, b) for a, b in zip(augmented, images, strict=True)]
    assert all(a != b for a, b in zip(flipped, same, strict=True))
    assert 0 < sum(flipped) < 16


def test_the_same_seed_gives_the_same_patches_and_intensities_change_only_the_image():
    settings = Augment(
        flip_axes=(),
        **(dict.fromkeys(OFF, 1.0) | {"spatial_probability": 0.0, "elastic_probability": 0.0}),
    )
    images, masks = torch.randn(4, 2, *PATCH), torch.randint(0, 2, (4, *PATCH), dtype=torch.uint8)
    first, second, other = (changed(images, masks, settings, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(first[1], masks)
    assert torch.isfinite(first[0]).all()


def test_a_patch_does_not_depend_on_the_rest_of_its_batch():
    settings = Augment(**dict.fromkeys(OFF, 0.7))
    source = enlarged_shape(PATCH, settings)
    images, masks = torch.randn(6, 1, *source), torch.randint(0, 3, (6, *source), dtype=torch.uint8)
    together = changed(images, masks, settings)
    for index in (0, 3, 5):
        alone = augment(
            images[index : index + 1],
            masks[index : index + 1],
            settings,
            patch_shape=PATCH,
            spacing_mm=(1.0, 1.0, 1.0),
            seeds=[(0, index)],
        )
        torch.testing.assert_close(alone[0][0], together[0][index])
        assert torch.equal(alone[1][0], together[1][index])


def test_the_inputs_are_not_modified():
    settings = Augment(**dict.fromkeys(OFF, 1.0))
    images, masks = torch.randn(2, 1, *PATCH), torch.ones(2, *PATCH, dtype=torch.uint8)
    before = images.clone()
    changed(images, masks, settings)
    assert torch.equal(images, before)


def test_labels_keep_their_values_under_rotation_including_ignored_voxels():
    settings = Augment(flip_axes=(), **(OFF | {"spatial_probability": 1.0}))
    source = enlarged_shape(PATCH, settings)
    masks = torch.zeros(4, *source, dtype=torch.uint8)
    masks[:, 8:14], masks[:, 14:20], masks[:, 20:26] = 7, 2, 255
    _, rotated = changed(masks[:, None].float(), masks, settings)
    assert set(torch.unique(rotated).tolist()) == {0, 2, 7, 255}


def test_a_negligible_elastic_field_changes_almost_nothing():
    settings = Augment(flip_axes=(), elastic_mm=1e-6, **(OFF | {"elastic_probability": 1.0}))
    source = enlarged_shape(PATCH, settings)
    images = torch.randn(2, 1, *source)
    deformed, _ = changed(images, torch.zeros(2, *source, dtype=torch.uint8), settings)
    margins = [(n - p) // 2 for n, p in zip(source, PATCH, strict=True)]
    r, a, s = (slice(m, m + p) for m, p in zip(margins, PATCH, strict=True))
    torch.testing.assert_close(deformed, images[:, :, r, a, s], atol=1e-4, rtol=1e-4)


def test_a_blur_spreads_a_point_by_its_sigma_and_keeps_a_constant():
    point = torch.zeros(1, 21, 21, 21)
    point[0, 10, 10, 10] = 1
    for sigma in (0.8, 1.0, 2.0):
        spread = _blur(point, sigma)
        offsets = torch.arange(21) - 10
        assert float(spread.sum()) == pytest.approx(1, abs=1e-5)
        for axis in (1, 2, 3):
            along = spread.sum([other for other in range(4) if other != axis])
            assert float((along * offsets**2).sum()) == pytest.approx(sigma**2, rel=0.02)
    torch.testing.assert_close(
        _blur(torch.full((2, 6, 5, 4), 3.0), 1.0), torch.full((2, 6, 5, 4), 3.0)
    )


def test_coarsening_removes_detail_finer_than_its_voxels():
    ramp = torch.arange(16.0)[:, None, None].expand(16, 16, 16)[None]
    assert torch.equal(_coarsen(ramp, 1.0), ramp)
    stripes = (torch.arange(16) % 2).float()[:, None, None].expand(16, 16, 16)[None]
    assert float(_coarsen(stripes, 0.5).std()) < 0.05

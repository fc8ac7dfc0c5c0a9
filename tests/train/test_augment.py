import numpy as np
import torch

from volseg.recipe import Augment
from volseg.train.augment import augment, enlarged_shape

PATCH = (24, 20, 16)
OFF = {f"{name}_probability": 0.0 for name in ("spatial", "noise", "blur", "brightness", "contrast", "gamma")}


def ball(shape, radius_mm, spacing_mm):
    index = np.moveaxis(np.indices(shape), 0, -1) - (np.array(shape) - 1) / 2
    return torch.from_numpy((np.linalg.norm(index * spacing_mm, axis=-1) <= radius_mm).astype(np.float32))


def changed(images, masks, settings, *, seed=0, spacing_mm=(1.0, 1.0, 1.0), n_classes=2):
    return augment(
        images,
        masks,
        settings,
        patch_shape=PATCH,
        spacing_mm=spacing_mm,
        n_classes=n_classes,
        generator=torch.Generator().manual_seed(seed),
    )


def test_switched_off_it_returns_the_middle_of_what_was_cut():
    settings = Augment(flip_axes=(), **OFF)
    assert enlarged_shape(PATCH, settings) == PATCH
    images, masks = torch.randn(2, 1, 26, 22, 18), torch.randint(0, 2, (2, 26, 22, 18), dtype=torch.uint8)
    found, found_masks = changed(images, masks, settings)
    assert torch.equal(found, images[:, :, 1:-1, 1:-1, 1:-1])
    assert torch.equal(found_masks, masks[:, 1:-1, 1:-1, 1:-1])


def test_a_ball_stays_a_ball_of_its_volume_under_rotation_on_an_anisotropic_grid():
    settings = Augment(
        flip_axes=(), rotation_degrees=(180, 180, 180), scaling=(1, 1), **(OFF | {"spatial_probability": 1.0})
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
        flip_axes=(), rotation_degrees=(0, 0, 0), scaling=(0.8, 0.8), **(OFF | {"spatial_probability": 1.0})
    )
    source = enlarged_shape(PATCH, settings)
    inside = ball(source, 7.5, (1, 1, 1))[None]
    _, masks = changed(inside[:, None], inside.to(torch.uint8), settings)
    np.testing.assert_allclose(masks.sum(), 0.8**3 * inside.sum(), rtol=0.1)


def test_image_and_mask_move_together():
    settings = Augment(**(OFF | {"spatial_probability": 1.0}))
    source = enlarged_shape(PATCH, settings)
    masks = torch.zeros(6, *source, dtype=torch.uint8)
    masks[:, 5:16, 6:14, 7:15] = 1
    images, masks = changed(masks[:, None].float(), masks, settings)
    assert ((images[:, 0] > 0.5) == (masks == 1)).float().mean() > 0.995


def test_flips_reverse_exactly_the_named_axes():
    settings = Augment(flip_axes=("A",), **OFF)
    images, masks = torch.randn(16, 1, *PATCH), torch.zeros(16, *PATCH, dtype=torch.uint8)
    found, _ = changed(images, masks, settings)
    flipped = [torch.equal(a, b.flip(2)) for a, b in zip(found, images, strict=True)]
    same = [torch.equal(a, b) for a, b in zip(found, images, strict=True)]
    assert all(a != b for a, b in zip(flipped, same, strict=True))
    assert 0 < sum(flipped) < 16


def test_the_same_seed_gives_the_same_patches_and_intensities_change_only_the_image():
    settings = Augment(flip_axes=(), **dict.fromkeys(OFF, 1.0) | {"spatial_probability": 0.0})
    images, masks = torch.randn(4, 2, *PATCH), torch.randint(0, 2, (4, *PATCH), dtype=torch.uint8)
    first, second, other = (changed(images, masks, settings, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(first[1], masks)
    assert torch.isfinite(first[0]).all()

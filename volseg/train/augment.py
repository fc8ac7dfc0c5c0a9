"""Random changes of training patches, batched on the training device. Same generator state, same result."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from volseg.recipe import Augment
from volseg.volume import WORLD_AXES

MARGIN = 1.25  # patches are cut this much larger before a rotation or scaling, so that few corners are empty


def enlarged_shape(patch_shape: tuple[int, int, int], settings: Augment) -> tuple[int, int, int]:
    """The patch that has to be cut for `augment` to return `patch_shape`; differs from it by an even number of voxels."""
    if settings.spatial_probability == 0:
        return patch_shape
    r, a, s = (p + 2 * math.ceil(p * (MARGIN - 1) / 2) for p in patch_shape)
    return r, a, s


def augment(
    images: torch.Tensor,
    masks: torch.Tensor,
    settings: Augment,
    *,
    patch_shape: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    n_classes: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, C, …) and masks (N, …) of `enlarged_shape` → the same of `patch_shape`, changed at random.

    Rotations are rigid in mm, on anisotropic grids too; image and mask are interpolated once, the mask by its shares.
    """
    moved = _draw(images.shape[0], generator) < settings.spatial_probability
    cut_images, cut_masks = _centre(images, patch_shape).clone(), _centre(masks[:, None], patch_shape)[:, 0].clone()
    if moved.any():
        grid = _sampling_grid(int(moved.sum()), tuple(images.shape[2:]), patch_shape, settings, spacing_mm, generator)
        cut_images[moved] = functional.grid_sample(images[moved], grid, align_corners=False)
        one_hot = functional.one_hot(masks[moved].long(), n_classes).movedim(-1, 1).to(images.dtype)
        cut_masks[moved] = functional.grid_sample(one_hot, grid, align_corners=False).argmax(1).to(masks.dtype)
    for name in settings.flip_axes:
        flipped = _draw(len(cut_images), generator) < 0.5
        cut_images[flipped] = cut_images[flipped].flip(2 + WORLD_AXES[name])
        cut_masks[flipped] = cut_masks[flipped].flip(1 + WORLD_AXES[name])
    return _change_intensities(cut_images, settings, generator), cut_masks


def _sampling_grid(
    n: int,
    source: tuple[int, ...],
    patch_shape: tuple[int, int, int],
    settings: Augment,
    spacing_mm: tuple[float, float, float],
    generator: torch.Generator,
) -> torch.Tensor:
    """(n, *patch_shape, 3) positions for grid_sample: a random rotation and scaling about the patch's centre."""
    angles = torch.stack([(_draw(n, generator) * 2 - 1) * math.radians(limit) for limit in settings.rotation_degrees])
    low, high = (math.log(limit) for limit in settings.scaling)
    zoom = torch.exp(_draw(n, generator) * (high - low) + low)
    spacing = torch.tensor(spacing_mm, dtype=torch.float32)
    # voxels → mm → rotated → voxels of the source, then to grid_sample's units of half the source's extent
    matrix = torch.diag(1 / spacing) @ _rotations(angles) @ torch.diag(spacing) / zoom[:, None, None]
    matrix = torch.diag(2 / torch.tensor(source, dtype=torch.float32)) @ matrix
    axes = [torch.arange(p, dtype=torch.float32) - (p - 1) / 2 for p in patch_shape]
    offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    grid = torch.einsum("nij,rasj->nrasi", matrix, offsets)
    return grid.flip(-1)  # grid_sample wants the last axis first


def _rotations(angles: torch.Tensor) -> torch.Tensor:
    """(3, n) angles about R, A and S → (n, 3, 3)."""
    total = torch.eye(3).expand(angles.shape[1], 3, 3)
    for axis, angle in enumerate(angles):
        first, second = [other for other in range(3) if other != axis]
        turn = torch.eye(3).repeat(len(angle), 1, 1)
        turn[:, first, first] = turn[:, second, second] = torch.cos(angle)
        turn[:, first, second], turn[:, second, first] = -torch.sin(angle), torch.sin(angle)
        total = turn @ total
    return total


def _change_intensities(images: torch.Tensor, settings: Augment, generator: torch.Generator) -> torch.Tensor:
    n = len(images)
    column = (-1, 1, 1, 1, 1)

    def chosen(probability: float) -> torch.Tensor:
        return (_draw(n, generator) < probability).view(column)

    def between(limits: tuple[float, float]) -> torch.Tensor:
        return (_draw(n, generator) * (limits[1] - limits[0]) + limits[0]).view(column)

    noise = torch.randn(images.shape, generator=generator) * settings.noise_sd * _draw(n, generator).view(column)
    images = torch.where(chosen(settings.noise_probability), images + noise, images)
    images = torch.where(
        chosen(settings.blur_probability), functional.avg_pool3d(images, 3, 1, 1, count_include_pad=False), images
    )
    images = torch.where(chosen(settings.brightness_probability), images * between(settings.brightness), images)
    mean = images.mean((2, 3, 4), keepdim=True)
    images = torch.where(
        chosen(settings.contrast_probability), (images - mean) * between(settings.contrast) + mean, images
    )
    low, high = images.amin((2, 3, 4), keepdim=True), images.amax((2, 3, 4), keepdim=True)
    share = (images - low) / (high - low).clamp_min(1e-6)
    return torch.where(
        chosen(settings.gamma_probability), share ** between(settings.gamma) * (high - low) + low, images
    )


def _centre(tensor: torch.Tensor, patch_shape: tuple[int, int, int]) -> torch.Tensor:
    """The middle (N, C, *patch_shape) of (N, C, …)."""
    starts = [(n - p) // 2 for n, p in zip(tensor.shape[2:], patch_shape, strict=True)]
    r, a, s = (slice(start, start + p) for start, p in zip(starts, patch_shape, strict=True))
    return tensor[:, :, r, a, s]


def _draw(n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(n, generator=generator)

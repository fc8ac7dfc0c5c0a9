"""Random augmentation of training patches, batched on the network's device.

A patch depends on its own seed alone, whatever else is in the batch. Its few random numbers are
drawn on the host; voxels are only touched on the device, and only those of the selected patches.
Image and mask are interpolated once, even when a patch is both rotated and deformed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from volseg.recipe import Augment
from volseg.volume import WORLD_AXES

# Patches are cut this much larger before a rotation or scaling, so that few corners are empty.
MARGIN = 1.25
CONTROL_POINTS = 5  # of the elastic field, along each axis
LARGEST_SIGMA = 4.0  # voxels; a wider blur uses a truncated kernel


def enlarged_shape(patch_shape: tuple[int, int, int], settings: Augment) -> tuple[int, int, int]:
    """Return the shape to cut for `augment` to return `patch_shape`; the difference is even."""
    if settings.spatial_probability == 0 and settings.elastic_probability == 0:
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
    seeds: Sequence[Sequence[int]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Augment images (N, C, …) and masks (N, …) of `enlarged_shape`; return `patch_shape`.

    Rotations are rigid in mm, on anisotropic grids too. Each mask voxel takes the label with the
    largest interpolated weight.

    Args:
        seeds: one per patch.
    """
    # Not the stream that placed the patch.
    draws = [_Draws(np.random.default_rng([*seed, 1]), settings) for seed in seeds]
    cut_images = _centre(images, patch_shape).clone()
    cut_masks = _centre(masks[:, None], patch_shape)[:, 0].clone()
    if resampled := [n for n, draw in enumerate(draws) if draw.is_rotated or draw.is_deformed]:
        grids = [
            _sampling_grid(draws[n], images, patch_shape, settings, spacing_mm) for n in resampled
        ]
        grid = torch.stack(grids)
        cut_images[resampled] = functional.grid_sample(images[resampled], grid, align_corners=False)
        cut_masks[resampled] = _resample_masks(masks[resampled], grid)
    _change_intensities(cut_images, settings, draws)
    for name in settings.flip_axes:
        flipped = [n for n, draw in enumerate(draws) if draw.decides(0.5)]
        cut_images[flipped] = cut_images[flipped].flip(2 + WORLD_AXES[name])
        cut_masks[flipped] = cut_masks[flipped].flip(1 + WORLD_AXES[name])
    return cut_images, cut_masks


class _Draws:
    """The random numbers of one patch."""

    def __init__(self, rng: np.random.Generator, settings: Augment) -> None:
        self.rng = rng
        self.is_rotated = self.decides(settings.spatial_probability)
        self.is_deformed = self.decides(settings.elastic_probability)

    def decides(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def between(self, limits: tuple[float, float]) -> float:
        return float(self.rng.uniform(*limits))

    def factor(self, limits: tuple[float, float]) -> float:
        """Draw on a log scale: enlarging and shrinking by a factor are equally likely."""
        low, high = limits
        return math.exp(self.between((math.log(low), math.log(high))))


def _sampling_grid(
    draw: _Draws,
    images: torch.Tensor,
    patch_shape: tuple[int, int, int],
    settings: Augment,
    spacing_mm: tuple[float, float, float],
) -> torch.Tensor:
    """Return (*patch_shape, 3) positions for grid_sample in images (N, C, …).

    Rotation and scaling are about the patch's centre; an elastic field is added to them.
    """
    device, spacing = images.device, np.asarray(spacing_mm)
    matrix = np.eye(3)
    if draw.is_rotated:
        limits = settings.rotation_degrees
        rotation = _rotation([math.radians(draw.between((-limit, limit))) for limit in limits])
        # voxels → mm → rotated → voxels of the source
        matrix = np.diag(1 / spacing) @ rotation @ np.diag(spacing) / draw.factor(settings.scaling)
    to_unit = 2 / np.asarray(images.shape[2:], float)  # grid_sample spans the source with [-1, 1]
    scaled = torch.from_numpy((to_unit[:, None] * matrix).astype(np.float32)).to(device)
    axes = [torch.arange(p, dtype=torch.float32, device=device) - (p - 1) / 2 for p in patch_shape]
    # Axis by axis: a sum of three broadcast terms instead of a matrix product for each voxel.
    terms = [axis[:, None] * scaled[:, n] for n, axis in enumerate(axes)]
    grid = terms[0][:, None, None] + terms[1][None, :, None] + terms[2][None, None, :]
    if draw.is_deformed:
        field_mm = draw.rng.normal(0, settings.elastic_mm, (3, *[CONTROL_POINTS] * 3))
        field = field_mm * (to_unit / spacing)[:, None, None, None]
        coarse = torch.from_numpy(field.astype(np.float32)).to(device)[None]
        fine = functional.interpolate(coarse, patch_shape, mode="trilinear", align_corners=True)[0]
        grid = grid + fine.movedim(0, -1)
    return grid.flip(-1)  # grid_sample wants the last axis first


def _rotation(angles: Sequence[float]) -> np.ndarray:
    """Return the (3, 3) rotation by these angles in radians about R, A and S."""
    total = np.eye(3)
    for axis, angle in enumerate(angles):
        first, second = [other for other in range(3) if other != axis]
        rotation = np.eye(3)
        rotation[first, first] = rotation[second, second] = math.cos(angle)
        rotation[first, second], rotation[second, first] = -math.sin(angle), math.sin(angle)
        total = rotation @ total
    return total


def _resample_masks(masks: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Return the label with the largest interpolated weight at each position; ties: the smaller."""
    best = labels = None
    for value in torch.unique(masks).tolist():
        inside = (masks == value)[:, None].float()
        weight = functional.grid_sample(inside, grid, align_corners=False)[:, 0]
        if value == 0:  # outside the source is background
            covered = torch.ones_like(inside)
            weight += 1 - functional.grid_sample(covered, grid, align_corners=False)[:, 0]
        if best is None or labels is None:
            labels = torch.full(weight.shape, value, dtype=masks.dtype, device=masks.device)
            best = weight
            continue
        wins = weight > best
        best = torch.where(wins, weight, best)
        labels = labels.masked_fill_(wins, value)
    assert labels is not None
    return labels


def _change_intensities(images: torch.Tensor, settings: Augment, draws: Sequence[_Draws]) -> None:
    """Change the intensities of each patch in place, with only the changes drawn for it."""
    for image, draw in zip(images, draws, strict=True):
        if draw.decides(settings.noise_probability):
            seed = int(draw.rng.integers(2**62))
            generator = torch.Generator(images.device).manual_seed(seed)
            noise = torch.randn(image.shape, generator=generator, device=images.device)
            image += noise * (draw.rng.random() * settings.noise_sd)
        if draw.decides(settings.blur_probability):
            image.copy_(_blur(image, draw.between(settings.blur_sigma)))
        if draw.decides(settings.brightness_probability):
            image *= draw.between(settings.brightness)
        if draw.decides(settings.contrast_probability):
            mean = image.mean((1, 2, 3), keepdim=True)
            image.sub_(mean).mul_(draw.between(settings.contrast)).add_(mean)
        if draw.decides(settings.low_resolution_probability):
            image.copy_(_coarsen(image, draw.between(settings.low_resolution)))
        if draw.decides(settings.gamma_probability):
            low, high = image.amin((1, 2, 3), keepdim=True), image.amax((1, 2, 3), keepdim=True)
            width = (high - low).clamp_min(1e-6)
            image.sub_(low).div_(width).clamp_(0, 1).pow_(draw.factor(settings.gamma))
            image.mul_(width).add_(low)
        for channel in range(1, len(image)):  # last, so that a dropped channel stays 0
            if draw.decides(settings.channel_drop_probability):
                image[channel] = 0


def _blur(image: torch.Tensor, sigma: float) -> torch.Tensor:
    """Convolve (C, r, a, s) with a Gaussian of `sigma` voxels, axis by axis, with edge padding."""
    radius = max(1, math.ceil(min(sigma, LARGEST_SIGMA) * 3))
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32, device=image.device)
    weights = torch.exp(-0.5 * (offsets / max(sigma, 1e-3)) ** 2)
    weights /= weights.sum()
    blurred = image[:, None]
    for axis in range(3):
        shape = [1, 1, 1]
        shape[axis] = len(weights)
        padding = [0, 0, 0, 0, 0, 0]
        padding[4 - 2 * axis] = padding[5 - 2 * axis] = radius
        padded = functional.pad(blurred, padding, mode="replicate")
        blurred = functional.conv3d(padded, weights.view(1, 1, *shape))
    return blurred[:, 0]


def _coarsen(image: torch.Tensor, factor: float) -> torch.Tensor:
    """Downsample (C, r, a, s) to voxels 1/factor times as large, then interpolate back."""
    shape = [max(1, round(n * factor)) for n in image.shape[1:]]
    coarse = functional.interpolate(image[None], shape, mode="nearest-exact")
    return functional.interpolate(coarse, image.shape[1:], mode="trilinear", align_corners=False)[0]


def _centre(tensor: torch.Tensor, patch_shape: tuple[int, int, int]) -> torch.Tensor:
    """Return the central (N, C, *patch_shape) of (N, C, …)."""
    starts = [(n - p) // 2 for n, p in zip(tensor.shape[2:], patch_shape, strict=True)]
    r, a, s = (slice(start, start + p) for start, p in zip(starts, patch_shape, strict=True))
    return tensor[:, :, r, a, s]

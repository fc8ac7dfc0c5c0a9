"""Random changes of training patches, batched on the device where the network is. Same seeds, same result, whoever shares the batch.

What happens to a patch is drawn from its own seed on the host, a few numbers each; voxels are only touched on the device, and only those of
the patches that were chosen. Image and mask are interpolated once, whatever is done to their geometry.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from volseg.recipe import Augment
from volseg.volume import WORLD_AXES

MARGIN = 1.25  # patches are cut this much larger before a rotation or scaling, so that few corners are empty
CONTROL_POINTS = 5  # along an axis, between which an elastic field is interpolated
LARGEST_SIGMA = 4.0  # of the blur's kernel that is computed


def enlarged_shape(patch_shape: tuple[int, int, int], settings: Augment) -> tuple[int, int, int]:
    """The patch that has to be cut for `augment` to return `patch_shape`; differs from it by an even number of voxels."""
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
    """Images (N, C, …) and masks (N, …) of `enlarged_shape` → the same of `patch_shape`, changed at random.

    Rotations are rigid in mm, on anisotropic grids too. A label wins where its interpolated share is the largest.

    Args:
        seeds: one per patch.
    """
    draws = [
        _Draws(np.random.default_rng([*seed, 1])) for seed in seeds
    ]  # another stream than that of the patch's place
    moved = [n for n, draw in enumerate(draws) if draw.decides(settings.spatial_probability)]
    bent = [n for n, draw in enumerate(draws) if draw.decides(settings.elastic_probability)]
    cut_images = _centre(images, patch_shape).clone()
    cut_masks = _centre(masks[:, None], patch_shape)[:, 0].clone()
    if chosen := sorted({*moved, *bent}):
        grids = [
            _sampling_grid(
                draws[n],
                n in moved,
                n in bent,
                images.shape[2:],
                patch_shape,
                settings,
                spacing_mm,
                images.device,
            )
            for n in chosen
        ]
        grid = torch.stack(grids)
        cut_images[chosen] = functional.grid_sample(images[chosen], grid, align_corners=False)
        cut_masks[chosen] = _moved_masks(masks[chosen], grid)
    _change_intensities(cut_images, settings, draws)
    for name in settings.flip_axes:
        flipped = [n for n, draw in enumerate(draws) if draw.decides(0.5)]
        cut_images[flipped] = cut_images[flipped].flip(2 + WORLD_AXES[name])
        cut_masks[flipped] = cut_masks[flipped].flip(1 + WORLD_AXES[name])
    return cut_images, cut_masks


class _Draws:
    """The random numbers of one patch."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def decides(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def between(self, limits: tuple[float, float]) -> float:
        return float(self.rng.uniform(*limits))

    def factor(self, limits: tuple[float, float]) -> float:
        """Equally likely to enlarge as to reduce by the same factor."""
        low, high = limits
        return math.exp(self.between((math.log(low), math.log(high))))


def _sampling_grid(
    draw: _Draws,
    is_moved: bool,
    is_bent: bool,
    source: Sequence[int],
    patch_shape: tuple[int, int, int],
    settings: Augment,
    spacing_mm: tuple[float, float, float],
    device: torch.device,
) -> torch.Tensor:
    """(*patch_shape, 3) positions for grid_sample: a random rotation and scaling about the patch's centre, and an elastic field."""
    spacing = np.asarray(spacing_mm)
    matrix = np.eye(3)
    if is_moved:
        angles = [
            math.radians(draw.between((-limit, limit))) for limit in settings.rotation_degrees
        ]
        # voxels → mm → rotated → voxels of the source
        matrix = (
            np.diag(1 / spacing)
            @ _rotation(angles)
            @ np.diag(spacing)
            / draw.factor(settings.scaling)
        )
    to_unit = 2 / np.asarray(source, float)  # grid_sample counts half of the source's extent
    scaled = torch.from_numpy((to_unit[:, None] * matrix).astype(np.float32)).to(device)
    axes = [torch.arange(p, dtype=torch.float32, device=device) - (p - 1) / 2 for p in patch_shape]
    # One axis after the other: a sum of three broadcast terms instead of a product for each voxel.
    terms = [axis[:, None] * scaled[:, n] for n, axis in enumerate(axes)]
    grid = terms[0][:, None, None] + terms[1][None, :, None] + terms[2][None, None, :]
    if is_bent:
        field = (
            draw.rng.normal(0, settings.elastic_mm, (3, *[CONTROL_POINTS] * 3))
            * (to_unit / spacing)[:, None, None, None]
        )
        coarse = torch.from_numpy(field.astype(np.float32)).to(device)[None]
        fine = functional.interpolate(coarse, patch_shape, mode="trilinear", align_corners=True)[0]
        grid = grid + fine.movedim(0, -1)
    return grid.flip(-1)  # grid_sample wants the last axis first


def _rotation(angles: Sequence[float]) -> np.ndarray:
    """Angles about R, A and S → (3, 3)."""
    total = np.eye(3)
    for axis, angle in enumerate(angles):
        first, second = [other for other in range(3) if other != axis]
        turn = np.eye(3)
        turn[first, first] = turn[second, second] = math.cos(angle)
        turn[first, second], turn[second, first] = -math.sin(angle), math.sin(angle)
        total = turn @ total
    return total


def _moved_masks(masks: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """The label with the largest interpolated share at each position; the smaller value where two have the same."""
    best = found = None
    for value in torch.unique(masks).tolist():
        share = functional.grid_sample(
            (masks == value)[:, None].float(), grid, align_corners=False
        )[:, 0]
        if value == 0:  # beyond the source is background
            share += (
                1
                - functional.grid_sample(
                    torch.ones_like(masks[:, None], dtype=torch.float32), grid, align_corners=False
                )[:, 0]
            )
        if best is None or found is None:
            best, found = (
                share,
                torch.full(share.shape, value, dtype=masks.dtype, device=masks.device),
            )
            continue
        wins = share > best
        best = torch.where(wins, share, best)
        found = found.masked_fill_(wins, value)
    assert found is not None
    return found


def _change_intensities(images: torch.Tensor, settings: Augment, draws: Sequence[_Draws]) -> None:
    """In place; each patch goes through those changes alone that were drawn for it."""
    for image, draw in zip(images, draws, strict=True):
        if draw.decides(settings.noise_probability):
            seed = int(draw.rng.integers(2**62))
            generator = torch.Generator(images.device).manual_seed(seed)
            noise = torch.randn(image.shape, generator=generator, device=images.device)
            image += noise * (draw.rng.random() * settings.noise_sd)
        if draw.decides(settings.blur_probability):
            image.copy_(_blurred(image, draw.between(settings.blur_sigma)))
        if draw.decides(settings.brightness_probability):
            image *= draw.between(settings.brightness)
        if draw.decides(settings.contrast_probability):
            mean = image.mean((1, 2, 3), keepdim=True)
            image.sub_(mean).mul_(draw.between(settings.contrast)).add_(mean)
        if draw.decides(settings.low_resolution_probability):
            image.copy_(_coarsened(image, draw.between(settings.low_resolution)))
        if draw.decides(settings.gamma_probability):
            low, high = image.amin((1, 2, 3), keepdim=True), image.amax((1, 2, 3), keepdim=True)
            reach = (high - low).clamp_min(1e-6)
            image.sub_(low).div_(reach).clamp_(0, 1).pow_(draw.factor(settings.gamma)).mul_(
                reach
            ).add_(low)
        for channel in range(1, len(image)):  # last, so that nothing makes it other than 0
            if draw.decides(settings.channel_drop_probability):
                image[channel] = 0


def _blurred(image: torch.Tensor, sigma: float) -> torch.Tensor:
    """(C, r, a, s) convolved with a Gaussian of `sigma` voxels, one axis after the other; its edge voxels go on beyond the edge."""
    reach = max(1, math.ceil(min(sigma, LARGEST_SIGMA) * 3))
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float32, device=image.device)
    weights = torch.exp(-0.5 * (offsets / max(sigma, 1e-3)) ** 2)
    weights /= weights.sum()
    found = image[:, None]
    for axis in range(3):
        shape = [1, 1, 1]
        shape[axis] = len(weights)
        ends = [0, 0, 0, 0, 0, 0]
        ends[4 - 2 * axis] = ends[5 - 2 * axis] = reach
        found = functional.conv3d(
            functional.pad(found, ends, mode="replicate"), weights.view(1, 1, *shape)
        )
    return found[:, 0]


def _coarsened(image: torch.Tensor, factor: float) -> torch.Tensor:
    """(C, r, a, s) as if it had been scanned with voxels 1/factor times as large, and interpolated back."""
    shape = [max(1, round(n * factor)) for n in image.shape[1:]]
    coarse = functional.interpolate(image[None], shape, mode="nearest-exact")
    return functional.interpolate(coarse, image.shape[1:], mode="trilinear", align_corners=False)[0]


def _centre(tensor: torch.Tensor, patch_shape: tuple[int, int, int]) -> torch.Tensor:
    """The middle (N, C, *patch_shape) of (N, C, …)."""
    starts = [(n - p) // 2 for n, p in zip(tensor.shape[2:], patch_shape, strict=True)]
    r, a, s = (slice(start, start + p) for start, p in zip(starts, patch_shape, strict=True))
    return tensor[:, :, r, a, s]

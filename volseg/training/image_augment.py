"""Random augmentation of 2D training images, batched on the network's device.

An image depends on its own seed alone, whatever else is in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional

from volseg.recipe.classification import ImageAugment

FLIPS = {"vertical": 2, "horizontal": 3}  # axis of (N, C, H, W)


def augment_images(
    images: torch.Tensor,
    settings: ImageAugment,
    seeds: Sequence[Sequence[int]],
    *,
    mask_pixel_mm: float | None = None,
) -> torch.Tensor:
    """Return augmented images (N, C, H, W); what a change moves in from outside repeats the edge.

    Args:
        seeds: one per image.
        mask_pixel_mm: edge of a pixel if the last channel is the mask of a lesion, whose outline
            changes but not its values; None if there is no mask.
    """
    draws = [_Draws(np.random.default_rng([*seed, 1]), settings) for seed in seeds]
    augmented = images.clone()
    if moved := [n for n, draw in enumerate(draws) if draw.is_moved]:
        matrices = torch.from_numpy(np.stack([draws[n].matrix(images.shape) for n in moved]))
        grid = functional.affine_grid(
            matrices.to(images), [len(moved), *images.shape[1:]], align_corners=False
        )
        augmented[moved] = functional.grid_sample(
            images[moved], grid, padding_mode="border", align_corners=False
        )
    for axis in settings.flip_axes:
        flipped = [n for n, draw in enumerate(draws) if draw.decides(0.5)]
        augmented[flipped] = augmented[flipped].flip(FLIPS[axis])
    for image, draw, seed in zip(augmented, draws, seeds, strict=True):
        if mask_pixel_mm is None:
            _change_intensities(image, settings, draw)
            continue
        _change_intensities(image[:-1], settings, draw)
        if settings.mask_jitter_mm:
            rng = np.random.default_rng([*seed, 5])
            jittered = jitter_mask(
                image[-1].cpu().numpy(), settings.mask_jitter_mm / mask_pixel_mm, rng
            )
            image[-1] = torch.from_numpy(jittered)
    return augmented


def jitter_mask(mask: np.ndarray, most: float, rng: np.random.Generator) -> np.ndarray:
    """Grow or shrink the outline of a mask, and move it, each by up to `most` pixels.

    Args:
        mask: (H, W) part of each pixel that is lesion, 0 to 1.

    Returns:
        (H, W) float32, 0 to 1, with an edge one pixel wide; the mask itself if nothing would be
        left of it, or if it fills no pixel.
    """
    inside = mask >= 0.5
    if not inside.any() or inside.all():
        return mask
    # From the pixel centre to the outline, which lies half a pixel before the nearest centre.
    to_lesion, to_rest = (
        np.asarray(ndimage.distance_transform_edt(part)) for part in (~inside, inside)
    )
    outside_by = to_lesion - to_rest
    distance = outside_by - 0.5 * np.sign(outside_by)
    grown, *shift = rng.uniform(-most, most, 3)
    moved = ndimage.shift(distance, shift, order=1, mode="nearest")
    jittered = np.clip(0.5 + grown - moved, 0, 1).astype(np.float32)
    return jittered if (jittered >= 0.5).any() else mask


class _Draws:
    """The random numbers of one image."""

    def __init__(self, rng: np.random.Generator, settings: ImageAugment) -> None:
        self.rng, self._settings = rng, settings
        self.is_moved = self.decides(settings.spatial_probability)

    def decides(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def between(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def symmetric(self, limit: float) -> float:
        return self.between(-limit, limit)

    def matrix(self, shape: Sequence[int]) -> np.ndarray:
        """Return the (2, 3) map from output to input positions, each of the axes x, y from -1 to 1.

        A rotation stays one on an image that is not square.
        """
        settings, (height, width) = self._settings, shape[2:]
        angle = math.radians(self.symmetric(settings.rotation_degrees))
        shear = math.tan(math.radians(self.symmetric(settings.shear_degrees)))
        low, high = (math.log(factor) for factor in settings.zoom)
        scale = 1 / math.exp(self.between(low, high))
        cos, sin = math.cos(angle), math.sin(angle)
        pixels = scale * np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, shear], [0, 1]])
        size = np.diag([width, height]).astype(float)
        matrix = np.linalg.inv(size) @ pixels @ size
        shift = [2 * self.symmetric(settings.shift) for _ in range(2)]
        return np.column_stack([matrix, shift]).astype(np.float32)


def _change_intensities(image: torch.Tensor, settings: ImageAugment, draw: _Draws) -> None:
    """Change one image (C, H, W) in place."""
    mean, sd = image.mean(), image.std(correction=0).clamp_min(1e-6)
    if draw.decides(settings.brightness_probability):
        image += draw.symmetric(settings.brightness) * sd
    if draw.decides(settings.contrast_probability):
        image.sub_(mean).mul_(draw.between(*settings.contrast)).add_(mean)
    if draw.decides(settings.noise_probability):
        generator = torch.Generator(image.device).manual_seed(int(draw.rng.integers(2**62)))
        noise = torch.randn(image.shape, generator=generator, device=image.device)
        image += noise * (draw.between(0, settings.noise_sd) * sd)
    if draw.decides(settings.cutout_probability):
        height, width = (max(1, round(settings.cutout * edge)) for edge in image.shape[1:])
        top = int(draw.rng.integers(image.shape[1] - height + 1))
        left = int(draw.rng.integers(image.shape[2] - width + 1))
        image[:, top : top + height, left : left + width] = mean


def mix_up(
    images: torch.Tensor, targets: torch.Tensor, alpha: float, seed: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blend each image and its target with another of the batch (Zhang et al. 2018).

    Args:
        targets: (N, outputs) float.
        alpha: parameter of the Beta distribution of the proportion; 0 changes nothing.
    """
    if alpha == 0 or len(images) < 2:
        return images, targets
    rng = np.random.default_rng([*seed, 2])
    proportion = float(rng.beta(alpha, alpha))
    order = torch.from_numpy(rng.permutation(len(images))).to(images.device)
    return (
        images * proportion + images[order] * (1 - proportion),
        targets * proportion + targets[order] * (1 - proportion),
    )

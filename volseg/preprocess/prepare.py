"""A scan → network input, and the network's logits → a mask on the scan's own grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from volseg.errors import ScanError
from volseg.preprocess.crop import (
    AxisOrder,
    body_box,
    body_threshold,
    canonical_geometry,
    crop,
    to_canonical,
)
from volseg.preprocess.normalise import Normaliser
from volseg.preprocess.resample import Interpolation, linear_positions, resample, resample_mask, resampled_shape
from volseg.volume import BoundingBox, Geometry, Volume

SLAB_VOXELS = 4_000_000  # native voxels restored at a time; bounds the float32 temporaries to some 16 MB per class


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareSettings:
    """How scans become network input: spacing along R, A and S in mm, and one normaliser per channel."""

    spacing_mm: tuple[float, float, float]
    normalisers: tuple[Normaliser, ...]
    interpolation: Interpolation = "linear"
    crop_to_body: bool = True
    body_above: float | None = None  # intensity; None: a tenth of the 99th percentile of the first channel


@dataclass(frozen=True, slots=True)
class Trail:
    """The way back: the scan's grid, its axis order, the box kept (canonical voxels), the resampled shape."""

    geometry: Geometry
    order: AxisOrder
    box: BoundingBox
    shape: tuple[int, int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """`array` (C, R, A, S) float32, contiguous, and the way back to the scan.

    `has_body` is False where the recipe crops to the body and there is none: the mask is then background by definition.
    """

    array: np.ndarray
    trail: Trail
    has_body: bool = True


def prepare(images: Mapping[str, Volume], settings: PrepareSettings) -> Prepared:
    """Canonical axes → crop to the body → resample → normalise.

    Args:
        images: channel name → scan, in the order of the network's input channels; all on one grid.

    Raises:
        ScanError: the channels lie on different grids.
    """
    volumes = list(images.values())
    first = volumes[0]
    _check_one_grid(images)
    order = AxisOrder.of(first.geometry)
    stored = to_canonical(first.array, order)
    above = _stored_threshold(first, stored, settings.body_above)
    shape = (stored.shape[0], stored.shape[1], stored.shape[2])
    body_found = body_box(stored, above) if settings.crop_to_body else None
    box = body_found or BoundingBox.whole(shape)
    cropped = canonical_geometry(first.geometry, order).crop(box)
    shape = resampled_shape(cropped, settings.spacing_mm)
    array = np.empty((len(volumes), *shape), np.float32)
    body = None
    for channel, (volume, normaliser) in enumerate(zip(volumes, settings.normalisers, strict=True)):
        values = resample(crop(to_canonical(volume.array, order), box), shape, settings.interpolation)
        if body is None:
            body = values > above
        if volume.is_scaled:  # resampling is linear, so the scale may follow it
            values = values * np.float32(volume.slope) + np.float32(volume.intercept)
        array[channel] = normaliser(values, body)
    has_body = body_found is not None or not settings.crop_to_body
    return Prepared(array, Trail(first.geometry, order, box, shape), has_body)


def prepare_mask(reference: np.ndarray, trail: Trail) -> np.ndarray:
    """A reference mask (I, J, K) on the scan's grid → label values on the prepared grid (R, A, S), contiguous."""
    return np.ascontiguousarray(resample_mask(crop(to_canonical(reference, trail.order), trail.box), trail.shape))


def restore_mask(logits: np.ndarray, trail: Trail, values: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Interpolate logits linearly on the scan's own grid and take the largest: the way back of `prepare`.

    Works slab by slab with a running maximum over the classes, so nothing of classes × native voxels exists.

    Args:
        logits: (classes, R, A, S) on the prepared grid; class 0 is the background.
        values: mask value of the classes 1, 2, …

    Returns:
        mask (I, J, K), uint8 or uint16 label values, 0 outside the box;
        confidence (I, J, K) uint8, 255 × softmax probability of the winning class; 255 outside the box.
    """
    dtype = np.uint8 if max(values) < 256 else np.uint16
    mask = np.zeros(trail.geometry.shape, dtype, order="F")
    confidence = np.full(trail.geometry.shape, 255, np.uint8, order="F")
    mask_box = crop(to_canonical(mask, trail.order), trail.box)
    confidence_box = crop(to_canonical(confidence, trail.order), trail.box)
    table = np.array([0, *values], dtype)
    r, a, s = trail.box.shape
    step = max(1, SLAB_VOXELS // (r * a))
    for start in range(0, s, step):
        part = slice(start, min(s, start + step))
        winner, probability = _reduce_slab(logits, (r, a, s), part)
        mask_box[:, :, part] = table[winner].transpose(1, 2, 0)
        confidence_box[:, :, part] = probability.transpose(1, 2, 0)
    return mask, confidence


def _reduce_slab(logits: np.ndarray, native: tuple[int, int, int], part: slice) -> tuple[np.ndarray, np.ndarray]:
    """(S part, R, A) winning class and 255 × its softmax probability for the native planes `part` along S."""
    lower, upper, weight = (values[part] for values in linear_positions(logits.shape[3], native[2]))
    first, last = int(lower[0]), int(upper[-1]) + 1
    weights = torch.from_numpy(weight.astype(np.float32))[:, None, None]
    best = winner = total = None
    for index in range(logits.shape[0]):
        planes = torch.from_numpy(np.ascontiguousarray(logits[index, :, :, first:last].transpose(2, 0, 1)))
        planes = planes.float()
        planes = torch.lerp(planes[torch.from_numpy(lower - first)], planes[torch.from_numpy(upper - first)], weights)
        if planes.shape[1:] != native[:2]:
            planes = torch.nn.functional.interpolate(
                planes[None], size=native[:2], mode="bilinear", align_corners=False
            )[0]
        if best is None or winner is None or total is None:
            best, winner, total = planes, torch.zeros(planes.shape, dtype=torch.int16), torch.ones_like(planes)
            continue
        wins = planes > best
        # Σ exp(logit − maximum), kept up to date while the maximum moves.
        total = torch.where(wins, total * torch.exp(best - planes) + 1, total + torch.exp(planes - best))
        winner[wins] = index
        best = torch.maximum(best, planes)
    assert winner is not None and total is not None
    return winner.numpy(), (255 / total).round_().to(torch.uint8).numpy()


def _stored_threshold(volume: Volume, stored: np.ndarray, above: float | None) -> float:
    """The body threshold in stored units, where the comparison is made without scaling the scan."""
    if above is None:
        return body_threshold(stored) if not volume.is_scaled else _auto_scaled(volume, stored)
    return (above - volume.intercept) / volume.slope


def _auto_scaled(volume: Volume, stored: np.ndarray) -> float:
    return (body_threshold(volume.intensities(stored)) - volume.intercept) / volume.slope


def _check_one_grid(images: Mapping[str, Volume]) -> None:
    (first_name, first), *others = images.items()
    for name, volume in others:
        difference = first.geometry.difference(volume.geometry)
        if difference:
            raise ScanError(
                f"channel {name!r} is not on the grid of {first_name!r}: {difference}",
                fix=f"resample {name!r} onto the grid of {first_name!r}",
                code="E_PAIR",
            )

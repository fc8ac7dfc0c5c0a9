"""Slices of a scan: which are stored twice, and where some are missing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from volseg.measurement.units import MAX_LEVELS_OF_DRAWING, sampled_grid
from volseg.volume import Geometry, Volume, slowest_axis

COARSER = 1.05  # times the other spacings, from which an axis is that of the slices
BLOCKS = 64  # per axis of a slice, whose means are compared: noise averages out
PADDING_SHARE, COMMON_SHARE = 0.002, 0.2  # of voxels: of the smallest value, of another one
PER_BLOCK = 2  # voxels along an axis of a block, of which its mean is taken
SLAB = 16  # slices that are copied together
NEIGHBOURS = 3  # steps on either side with which a step is compared
MIN_CONTENT = 0.25  # of the median contrast of slices; emptier ones are ends of the object


@dataclass(frozen=True, slots=True, kw_only=True)
class Slices:
    """What neighbouring slices of a scan say.

    Args:
        axis: canonical axis along which slices are stacked: 0 is R, 1 is A, 2 is S.
        n: slices.
        n_equal: pairs of neighbours with the same voxels; None for a drawing.
        jump: largest difference of neighbours, in differences of their neighbours; None if fewer
            than four slices hold something.
        jump_at: number of the slice before it, from 1 at the R, A or S end that is low.
    """

    axis: int
    n: int
    n_equal: int | None = None
    jump: float | None = None
    jump_at: int | None = None


def padding_of(scan: Volume) -> float | None:
    """Return the stored value with which a scan is padded, or to which its air is cut; or None."""
    values, counts = np.unique(sampled_grid(scan.array), return_counts=True)
    index = int(np.argmax(counts))
    share = counts[index] / counts.sum()
    is_padding = share >= (PADDING_SHARE if index == 0 else COMMON_SHARE)
    return float(values[index]) if is_padding else None


def slice_axis(canonical: Geometry) -> int:
    """Return the axis with the coarsest spacing; S if none is coarser than the others.

    >>> slice_axis(Geometry((8, 8, 8), np.diag([1.0, 1.0, 3.0, 1.0])))
    2
    """
    spacing = canonical.spacing_mm
    coarsest = int(np.argmax(spacing))
    others = max(mm for axis, mm in enumerate(spacing) if axis != coarsest)
    return coarsest if spacing[coarsest] > COARSER * others else 2


def judge_slices(scan: Volume) -> Slices:
    """Compare the neighbouring slices of a scan; the same for all 48 axis orders."""
    canonical = scan.canonical()
    axis = slice_axis(canonical.geometry)
    n_equal, steps, contrasts, padding = 0, [], [], padding_of(scan)
    last = None
    for stored in _slices(canonical.array, axis):
        blocks = _blocks(stored[_sparse(stored)], padding)
        contrasts.append(_spread(blocks))
        if last is not None:
            is_equal = np.array_equal(last[0], stored)
            n_equal += is_equal and np.unique(stored).size > MAX_LEVELS_OF_DRAWING
            steps.append(math.nan if is_equal else _mean(np.abs(blocks - last[1])))
        last = stored, blocks
    jump, at = _largest_jump(np.array(steps), np.array(contrasts))
    n = canonical.array.shape[axis]
    return Slices(axis=axis, n=n, n_equal=n_equal, jump=jump, jump_at=at)


def _slices(array: np.ndarray, axis: int) -> Iterator[np.ndarray]:
    """Yield the slices (…, …) of an array along an axis; copies if they are scattered in memory."""
    for start in range(0, array.shape[axis], SLAB):
        part = [slice(None)] * 3
        part[axis] = slice(start, start + SLAB)
        slab = np.moveaxis(array[tuple(part)], axis, 0)
        yield from slab if slowest_axis(slab) == 0 else np.ascontiguousarray(slab)


def _sparse(stored: np.ndarray) -> tuple[slice, ...]:
    return tuple(slice(None, None, max(1, n // (BLOCKS * PER_BLOCK))) for n in stored.shape)


def _blocks(stored: np.ndarray, padding: float | None) -> np.ndarray:
    """Return the means (≤ 127, ≤ 127) of blocks of a slice; NaN for those with padding."""
    rows, columns = (max(1, size // BLOCKS) for size in stored.shape)
    n, m = (stored.shape[0] // rows, stored.shape[1] // columns)
    blocks = stored[: n * rows, : m * columns].reshape(n, rows, m, columns)
    means = blocks.mean(axis=(1, 3), dtype=np.float64)
    return means if padding is None else np.where((blocks == padding).any((1, 3)), np.nan, means)


def _mean(values: np.ndarray) -> float:
    """Return the mean of the known values; NaN if fewer than a quarter are known."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size >= MIN_CONTENT * values.size else math.nan


def _spread(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.std()) if finite.size else 0.0


def _largest_jump(steps: np.ndarray, contrasts: np.ndarray) -> tuple[float | None, int | None]:
    """Return the largest step relative to the steps around it, and its number from 1."""
    if contrasts.size < 4:
        return None, None
    is_full = contrasts >= MIN_CONTENT * np.median(contrasts)
    best, at = None, None
    for index in np.flatnonzero(is_full[1:] & is_full[:-1] & np.isfinite(steps)):
        around = np.r_[
            steps[max(0, index - NEIGHBOURS) : index], steps[index + 1 : index + 1 + NEIGHBOURS]
        ]
        around = around[np.isfinite(around)]
        if around.size >= 2 and around.max() > 0:
            ratio = float(steps[index] / around.max())
            if best is None or ratio > best:
                best, at = ratio, int(index) + 1
    return best, at

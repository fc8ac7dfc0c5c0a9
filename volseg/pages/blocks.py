"""Downsample a scan and its lesion ids by blocks of whole voxels, so that no lesion vanishes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from volseg.volume import BoundingBox, Geometry, slowest_axis

Factors = tuple[int, int, int]  # size in voxels of a block along R, A and S
Slices = tuple[slice, slice, slice]

PIECE_VOXELS = 1_000_000  # processed together; bounds the temporary arrays


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks that fill a box of a scan; the last ones along an axis may be smaller."""

    box: BoundingBox
    factors: Factors

    @property
    def shape(self) -> tuple[int, int, int]:
        r, a, s = (-(-n // factor) for n, factor in zip(self.box.shape, self.factors))
        return r, a, s

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def geometry(self, grid: Geometry) -> Geometry:
        """Return the grid of the block centres; it counts the last block of an axis as full."""
        affine = grid.affine.copy()
        affine[:3, :3] *= self.factors
        first = np.array(self.box.start) + (np.array(self.factors) - 1) / 2
        affine[:3, 3] = grid.to_world_mm(first[None])[0]
        return Geometry(self.shape, affine)

    def slabs(self, array: np.ndarray) -> Iterator[tuple[Slices, Slices]]:
        """Yield slabs of whole blocks of an array: their part of it and their blocks."""
        slow = slowest_axis(array)
        across = math.prod(self.box.shape) // self.box.shape[slow]
        n = max(1, PIECE_VOXELS // (across * self.factors[slow]))
        for first in range(0, self.shape[slow], n):
            part, blocks = list(self.box.slices), [slice(0, length) for length in self.shape]
            part[slow] = self.along(slow, first, n)
            blocks[slow] = slice(first, first + n)
            yield (part[0], part[1], part[2]), (blocks[0], blocks[1], blocks[2])

    def along(self, axis: int, first: int, n: int = 1) -> slice:
        """Return the voxels along an axis of `n` blocks."""
        start = self.box.start[axis] + first * self.factors[axis]
        return slice(start, min(self.box.stop[axis], start + n * self.factors[axis]))


def block_means(part: np.ndarray, factors: Factors) -> np.ndarray:
    """Average each block in float32; blocks at the end of an axis may be smaller."""
    means = part.astype(np.float32)
    for axis, factor in enumerate(factors):
        if factor > 1:
            counts = np.full(-(-part.shape[axis] // factor), factor, np.float32)
            counts[-1] -= -part.shape[axis] % factor
            shape = [1, 1, 1]
            shape[axis] = -1
            means = _reduced(means, axis, factor, np.add) / counts.reshape(shape)
    return means


def block_ids(ids: np.ndarray, blocks: Blocks, most: int) -> np.ndarray:
    """Return lesion ids of blocks: uint8 or uint16, 0 in a block that is less than half lesion.

    A block of several lesions has the highest id: that of the smallest lesion. A lesion that lost
    over half of its volume is redrawn in all free blocks that it touches; if it touches none, it
    gets the block in which it has most voxels.

    Args:
        ids: (R, A, S), ascending from the largest lesion.
        most: ids above it are left out.
    """
    dtype = np.uint8 if most <= np.iinfo(np.uint8).max else np.uint16
    reduced = np.zeros(blocks.shape, dtype, order="F")
    present = np.zeros(most + 1, np.int64)  # voxels of each lesion in the scan
    for part, at in blocks.slabs(ids) if most else ():
        numbers = np.where(ids[part] > most, 0, ids[part])
        present += count_ids(numbers, most)
        reduced[at] = _majority(numbers, blocks.factors)
    if math.prod(blocks.factors) == 1:
        return reduced
    drawn = count_ids(reduced, most) * math.prod(blocks.factors)
    lost = [n for n in range(1, most + 1) if drawn[n] * 2 < present[n]]
    for group in _together(lost, present):
        if present[group].sum() > PIECE_VOXELS:
            _redraw_large(reduced, ids, blocks, group[0])
        else:
            _redraw(reduced, ids, blocks, group)
    return reduced


def count_ids(ids: np.ndarray, most: int) -> np.ndarray:
    """Count each number from 0 to `most`, in pieces because `bincount` copies to int64."""
    flat = ids.ravel("K")
    counts = np.zeros(most + 1, np.int64)
    for start in range(0, flat.size, PIECE_VOXELS):
        counts += np.bincount(flat[start : start + PIECE_VOXELS], minlength=most + 1)
    return counts


def _majority(ids: np.ndarray, factors: Factors) -> np.ndarray:
    """Return the highest id of each block that is ≥ half lesion, else 0."""
    if math.prod(factors) == 1 or not ids.any():
        return ids[tuple(slice(None, None, factor) for factor in factors)]
    filled = block_means(ids > 0, factors) >= 0.5
    highest = ids
    for axis, factor in enumerate(factors):
        highest = _reduced(highest, axis, factor, np.maximum)
    return np.where(filled, highest, 0)


def _redraw(reduced: np.ndarray, ids: np.ndarray, blocks: Blocks, lesions: Sequence[int]) -> None:
    """Redraw lesions in the free blocks that they touch, or in the one that they fill most."""
    for number, touched, counts in _touched(ids, blocks, lesions):
        free = reduced[touched] == 0
        reduced[tuple(along[free] for along in touched)] = number
        if not free.any() and not (reduced[touched] == number).any():
            most = int(np.argmax(counts))
            reduced[tuple(int(along[most]) for along in touched)] = number


def _touched(
    ids: np.ndarray, blocks: Blocks, lesions: Sequence[int]
) -> Iterator[tuple[int, tuple[np.ndarray, ...], np.ndarray]]:
    """Yield each lesion, the blocks that it touches and its voxels in each, in one pass."""
    is_listed = np.zeros(lesions[-1] + 2, bool)  # the last entry stands for all larger numbers
    is_listed[list(lesions)] = True
    keys = []
    for part, at in blocks.slabs(ids):
        numbers = ids[part]
        voxels = np.nonzero(is_listed.take(numbers, mode="clip"))
        places = [
            index // factor + side.start for index, factor, side in zip(voxels, blocks.factors, at)
        ]
        flat = np.ravel_multi_index(places, blocks.shape)
        keys.append(numbers[voxels].astype(np.int64) * blocks.size + flat)
    touched, counts = np.unique(np.concatenate(keys), return_counts=True)
    numbers, flat = np.divmod(touched, blocks.size)
    starts, stops = (np.searchsorted(numbers, lesions, side) for side in ("left", "right"))
    for number, part in zip(lesions, map(slice, starts, stops)):
        yield number, np.unravel_index(flat[part], blocks.shape), counts[part]


def _redraw_large(reduced: np.ndarray, ids: np.ndarray, blocks: Blocks, number: int) -> None:
    """Redraw one lesion of many voxels like `_redraw`, a slab of the scan at a time."""
    best, most = None, 0.0
    for part, at in blocks.slabs(ids):
        fraction = block_means(ids[part] == number, blocks.factors)
        drawn = reduced[at]  # a view
        drawn[(fraction > 0) & (drawn == 0)] = number
        if fraction.max(initial=0) > most:
            most = float(fraction.max())
            block = np.unravel_index(int(fraction.argmax()), fraction.shape)
            best = tuple(int(index) + side.start for index, side in zip(block, at))
    if best is not None and not (reduced == number).any():
        reduced[best] = number


def _together(lesions: Sequence[int], present: np.ndarray) -> Iterator[list[int]]:
    """Group lesions up to a number of voxels; a larger lesion is a group of its own."""
    group, size = [], 0
    for number in lesions:
        if group and size + present[number] > PIECE_VOXELS:
            yield group
            group, size = [], 0
        group.append(number)
        size += int(present[number])
    if group:
        yield group


def _reduced(array: np.ndarray, axis: int, factor: int, operation: np.ufunc) -> np.ndarray:
    """Reduce each `factor` neighbours along an axis; several times as fast as `reduceat`."""
    before = (slice(None),) * axis
    result = array[(*before, slice(0, None, factor))].copy()
    for offset in range(1, factor):
        part = array[(*before, slice(offset, None, factor))]
        into = result[(*before, slice(0, part.shape[axis]))]
        operation(into, part, out=into)
    return result

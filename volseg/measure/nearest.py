"""How near the next lesion is, looked for in the scan itself: no list of all surfaces, which of noise would fill the memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from itertools import product

import numpy as np
from scipy.spatial import KDTree
from scipy.spatial.distance import cdist

Box = tuple[slice, slice, slice]

BLOCK_EDGE = 32  # voxels, of a lesion that is looked at block by block
SMALL_BLOCK = 2**12  # voxels of a box that is looked at whole
FIRST_REACH, LAST_REACH = 2, 32  # voxels round a block; beyond, the scan is searched cell by cell
FEW_DISTANCES = 2**18  # that are worked out sooner than a tree
ROUNDING_MM = 1e-9


class NearestLesion:
    """Distances from a lesion's surface to that of the nearest other one, as `gaps_mm` has them.

    A surface point is half-way between a voxel inside and a neighbour across a face outside.

    Args:
        ids: (R, A, S) lesion ids. matrix: (3, 3) voxel → mm.
        is_apart: no voxel of a lesion is a neighbour, over a corner, of one of another.
    """

    def __init__(self, ids: np.ndarray, matrix: np.ndarray, *, is_apart: bool) -> None:
        self._ids = ids
        self._matrix = matrix
        # Distance between neighbouring planes of voxels, the smallest of the three axes.
        self._plane_mm = float(1 / np.linalg.norm(np.linalg.inv(matrix), axis=1).max())
        self._least_mm = _shortest_gap_mm(matrix) if is_apart else 0.0

    def gap_mm(self, number: int, box: Box) -> float:
        """Of one lesion, in the box around it; infinite if there is no other lesion."""
        best, reach = math.inf, FIRST_REACH
        while True:
            for block in _blocks(box):
                window = self._window(block, reach)
                if not self._least_mm and _touches(window, number):
                    return 0.0
                inside, others = _faces(window, number, block, self._corner(block, reach))
                best = min(best, _shortest(inside @ self._matrix.T, others @ self._matrix.T, best))
                if best <= self._least_mm + ROUNDING_MM:
                    return best
            if best <= reach * self._plane_mm:
                return best
            needed = 4 * reach if best == math.inf else math.ceil(best / self._plane_mm)
            if needed > LAST_REACH:
                return self._far(number, box, best)
            reach = needed

    def _window(self, block: Box, reach: int) -> np.ndarray:
        """The ids of a block and all that is `reach` + 1 voxels round it, 0 beyond the scan."""
        around = reach + 1
        inside, before = [], []
        for side, n in zip(block, self._ids.shape):
            start, stop = max(0, side.start - around), min(n, side.stop + around)
            inside.append(slice(start, stop))
            before.append((start - side.start + around, side.stop + around - stop))
        part = self._ids[tuple(inside)]
        return np.pad(part, before) if any(map(any, before)) else part

    def _corner(self, block: Box, reach: int) -> np.ndarray:
        return np.array([side.start - reach - 1 for side in block], float)

    def _far(self, number: int, box: Box, best: float) -> float:
        """Of a lesion with no other one near: the cells of the scan that hold others, the nearest first."""
        low, high = self._cells
        has_other = (high > 0) & ((low != number) | (high != number))
        cells = np.argwhere(has_other) * BLOCK_EDGE
        ends = np.minimum(cells + BLOCK_EDGE, self._ids.shape)
        apart = _apart_voxels(box, cells, ends) * self._plane_mm
        for at in np.argsort(apart, kind="stable").tolist():
            if apart[at] >= best:
                break
            i, j, k = (slice(int(a), int(b)) for a, b in zip(cells[at], ends[at]))
            cell: Box = (i, j, k)
            _, others = _faces(self._window(cell, 0), number, cell, self._corner(cell, 0))
            for block in _blocks(box):
                if (
                    _apart_voxels(block, cells[at : at + 1], ends[at : at + 1])[0] * self._plane_mm
                    >= best
                ):
                    continue
                inside, _ = _faces(self._window(block, 0), number, block, self._corner(block, 0))
                gap = _shortest(inside @ self._matrix.T, others @ self._matrix.T, best)
                best = min(best, gap)
        return best

    @cached_property
    def _cells(self) -> tuple[np.ndarray, np.ndarray]:
        """The lowest and the highest id in each cell of the scan, 0 where there is none."""
        shape = [-(-n // BLOCK_EDGE) for n in self._ids.shape]
        low, high = np.zeros(shape, np.uint32), np.zeros(shape, np.uint32)
        for i in range(shape[0]):
            for j in range(shape[1]):
                row = self._ids[
                    i * BLOCK_EDGE : (i + 1) * BLOCK_EDGE, j * BLOCK_EDGE : (j + 1) * BLOCK_EDGE
                ]
                for k in range(shape[2]):
                    some = row[..., k * BLOCK_EDGE : (k + 1) * BLOCK_EDGE]
                    filled = some[some > 0]
                    if filled.size:
                        low[i, j, k], high[i, j, k] = filled.min(), filled.max()
        return low, high


def _blocks(box: Box) -> Iterator[Box]:
    if math.prod(side.stop - side.start for side in box) <= SMALL_BLOCK:
        yield box
        return
    sides = [
        [
            slice(start, min(start + BLOCK_EDGE, side.stop))
            for start in range(side.start, side.stop, BLOCK_EDGE)
        ]
        for side in box
    ]
    yield from product(sides[0], sides[1], sides[2])


def _touches(window: np.ndarray, number: int) -> bool:
    """Whether a voxel of the lesion has a face in common with one of another."""
    is_other = (window > 0) & (window != number)
    is_inside = window == number
    pairs = ((slice(None, -1), slice(1, None)), (slice(1, None), slice(None, -1)))
    return any(
        bool((np.moveaxis(is_inside, axis, 0)[one] & np.moveaxis(is_other, axis, 0)[two]).any())
        for axis in range(3)
        for one, two in pairs
    )


def _faces(
    window: np.ndarray, number: int, block: Box, corner: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(N, 3) and (M, 3) points in voxels: those of the lesion's surface at a block, and those of others in the window."""
    start, stop = (np.array([getattr(side, end) for side in block]) for end in ("start", "stop"))
    inside, others = [], []
    for axis in range(3):
        low, high = (
            window[tuple(slice(*ends) if other == axis else slice(None) for other in range(3))]
            for ends in ((None, -1), (1, None))
        )
        index = np.nonzero(low != high)
        one, other = low[index], high[index]
        points = np.stack(index, axis=1) + corner
        points[:, axis] += 0.5
        inside.append(points[(one == number) | (other == number)])
        others.append(points[((one > 0) & (one != number)) | ((other > 0) & (other != number))])
    surface = np.concatenate(inside)
    # The next block has the others.
    return surface[
        ((surface > start - 0.75) & (surface < stop - 0.25)).all(axis=1)
    ], np.concatenate(others)


def _shortest(points_mm: np.ndarray, others_mm: np.ndarray, most: float) -> float:
    """The shortest distance from a point to another one; infinite if there is none under `most`."""
    if not len(points_mm) or not len(others_mm):
        return math.inf
    if len(points_mm) * len(others_mm) <= FEW_DISTANCES:
        return float(cdist(points_mm, others_mm).min())
    few, many = sorted((points_mm, others_mm), key=len)
    bound = most if most == math.inf else most + ROUNDING_MM
    return float(KDTree(few).query(many, distance_upper_bound=bound)[0].min())


def _apart_voxels(box: Box, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """(N,) the largest gap along an axis between a box and each of others, from (N, 3) `starts` to (N, 3) `stops`."""
    start, stop = (np.array([getattr(side, end) for side in box]) for end in ("start", "stop"))
    return np.maximum(0, np.maximum(starts - stop, start - stops)).max(axis=1)


def _shortest_gap_mm(matrix: np.ndarray) -> float:
    """Between two surfaces with a plane of voxels between them: a whole voxel along one axis, halves along the others."""
    steps = np.array(list(product(np.arange(-4, 5) / 2, repeat=3)))
    steps = steps[np.abs(steps).max(axis=1) >= 1]
    return float(np.linalg.norm(steps @ matrix.T, axis=1).min())

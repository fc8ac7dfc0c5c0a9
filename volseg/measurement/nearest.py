"""Distance to the nearest other lesion, searched in the scan itself.

A list of the surfaces of all lesions would fill the memory if the mask is noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from itertools import product

import numpy as np
from scipy.spatial import KDTree
from scipy.spatial.distance import cdist

Box = tuple[slice, slice, slice]

BLOCK_EDGE = 32  # voxels: large lesions are processed block by block
SMALL_BLOCK = 2**12  # voxels of a box that is processed whole
FIRST_REACH, LAST_REACH = 2, 32  # voxels round a block; beyond, the scan is searched cell by cell
FEW_DISTANCES = 2**18  # up to which all distances are computed faster than by a tree
ROUNDING_MM = 1e-9


class NearestLesion:
    """Distances from a lesion's surface to that of the nearest other one, as in `gaps_mm`.

    A surface point is half-way between a voxel inside and a face neighbour outside.

    Args:
        ids: (R, A, S) lesion ids.
        matrix: (3, 3) voxel → mm.
        is_apart: voxels of two lesions never touch, not even at a corner.
    """

    def __init__(self, ids: np.ndarray, matrix: np.ndarray, *, is_apart: bool) -> None:
        self._ids = ids
        self._matrix = matrix
        # Distance between neighbouring planes of voxels: the smallest over the three axes.
        self._plane_mm = float(1 / np.linalg.norm(np.linalg.inv(matrix), axis=1).max())
        self._least_mm = _shortest_gap_mm(matrix) if is_apart else 0.0

    def gap_mm(self, number: int, box: Box) -> float:
        """Return the distance of the lesion in `box`; infinite if there is no other lesion."""
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
        """Return the ids of a block and `reach` + 1 voxels round it, 0 outside the scan."""
        margin = reach + 1
        inside, padding = [], []
        for side, n in zip(block, self._ids.shape):
            start, stop = max(0, side.start - margin), min(n, side.stop + margin)
            inside.append(slice(start, stop))
            padding.append((start - side.start + margin, side.stop + margin - stop))
        part = self._ids[tuple(inside)]
        return np.pad(part, padding) if any(map(any, padding)) else part

    def _corner(self, block: Box, reach: int) -> np.ndarray:
        return np.array([side.start - reach - 1 for side in block], float)

    def _far(self, number: int, box: Box, best: float) -> float:
        """Search the cells of the scan that hold other lesions, nearest first."""
        low, high = self._cells
        has_other = (high > 0) & ((low != number) | (high != number))
        cells = np.argwhere(has_other) * BLOCK_EDGE
        ends = np.minimum(cells + BLOCK_EDGE, self._ids.shape)
        bounds_mm = _apart_voxels(box, cells, ends) * self._plane_mm
        for n in np.argsort(bounds_mm, kind="stable").tolist():
            if bounds_mm[n] >= best:
                break
            i, j, k = (slice(int(a), int(b)) for a, b in zip(cells[n], ends[n]))
            cell: Box = (i, j, k)
            _, others = _faces(self._window(cell, 0), number, cell, self._corner(cell, 0))
            for block in _blocks(box):
                apart = _apart_voxels(block, cells[n : n + 1], ends[n : n + 1])[0]
                if apart * self._plane_mm >= best:
                    continue
                inside, _ = _faces(self._window(block, 0), number, block, self._corner(block, 0))
                gap = _shortest(inside @ self._matrix.T, others @ self._matrix.T, best)
                best = min(best, gap)
        return best

    @cached_property
    def _cells(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest id in each cell of the scan, 0 in empty cells."""
        shape = [-(-n // BLOCK_EDGE) for n in self._ids.shape]
        low, high = np.zeros(shape, np.uint32), np.zeros(shape, np.uint32)
        for i, j, k in np.ndindex(*shape):
            cell = self._ids[
                i * BLOCK_EDGE : (i + 1) * BLOCK_EDGE,
                j * BLOCK_EDGE : (j + 1) * BLOCK_EDGE,
                k * BLOCK_EDGE : (k + 1) * BLOCK_EDGE,
            ]
            filled = cell[cell > 0]
            if filled.size:
                low[i, j, k], high[i, j, k] = filled.min(), filled.max()
        return low, high


def _blocks(box: Box) -> Iterator[Box]:
    if math.prod(side.stop - side.start for side in box) <= SMALL_BLOCK:
        yield box
        return
    i, j, k = (
        [slice(n, min(n + BLOCK_EDGE, s.stop)) for n in range(s.start, s.stop, BLOCK_EDGE)]
        for s in box
    )
    yield from product(i, j, k)


def _touches(window: np.ndarray, number: int) -> bool:
    """Check whether a voxel of the lesion shares a face with one of another lesion."""
    is_other = (window > 0) & (window != number)
    is_inside = window == number
    pairs = ((slice(None, -1), slice(1, None)), (slice(1, None), slice(None, -1)))
    return any(
        bool((np.moveaxis(is_inside, axis, 0)[a] & np.moveaxis(is_other, axis, 0)[b]).any())
        for axis in range(3)
        for a, b in pairs
    )


def _faces(
    window: np.ndarray, number: int, block: Box, corner: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return surface points in voxels: (N, 3) of the lesion in the block, (M, 3) of others.

    The latter are those of all other lesions in the window.
    """
    start, stop = (np.array([getattr(side, end) for side in block]) for end in ("start", "stop"))
    inside, others = [], []
    for axis in range(3):
        low, high = (
            window[tuple(slice(*ends) if n == axis else slice(None) for n in range(3))]
            for ends in ((None, -1), (1, None))
        )
        index = np.nonzero(low != high)
        a, b = low[index], high[index]
        points = np.stack(index, axis=1) + corner
        points[:, axis] += 0.5
        inside.append(points[(a == number) | (b == number)])
        others.append(points[((a > 0) & (a != number)) | ((b > 0) & (b != number))])
    surface = np.concatenate(inside)
    # Points beyond the block belong to the next block.
    is_in_block = ((surface > start - 0.75) & (surface < stop - 0.25)).all(axis=1)
    return surface[is_in_block], np.concatenate(others)


def _shortest(points_mm: np.ndarray, others_mm: np.ndarray, most: float) -> float:
    """Return the shortest distance between the point sets; it may be infinite if above `most`."""
    if not len(points_mm) or not len(others_mm):
        return math.inf
    if len(points_mm) * len(others_mm) <= FEW_DISTANCES:
        return float(cdist(points_mm, others_mm).min())
    few, many = sorted((points_mm, others_mm), key=len)
    bound = most if most == math.inf else most + ROUNDING_MM
    return float(KDTree(few).query(many, distance_upper_bound=bound)[0].min())


def _apart_voxels(box: Box, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Return (N,) the largest gap along any axis between a box and each of N others.

    Args:
        starts, stops: (N, 3) corners of the other boxes.
    """
    start, stop = (np.array([getattr(side, end) for side in box]) for end in ("start", "stop"))
    return np.maximum(0, np.maximum(starts - stop, start - stops)).max(axis=1)


def _shortest_gap_mm(matrix: np.ndarray) -> float:
    """Return the shortest distance between two surfaces with a plane of voxels between them.

    They are at least a whole voxel apart along one axis, and any number of half voxels along the
    others.
    """
    steps = np.array(list(product(np.arange(-4, 5) / 2, repeat=3)))
    steps = steps[np.abs(steps).max(axis=1) >= 1]
    return float(np.linalg.norm(steps @ matrix.T, axis=1).min())

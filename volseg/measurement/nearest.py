"""Distance to the nearest other lesion.

A few lesions are compared by their surfaces; a list of all surfaces would fill the memory if the
mask is noise, so then the scan itself is searched.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
from scipy.spatial import KDTree
from scipy.spatial.distance import cdist

from volseg.measurement.lesion_box import LesionBox
from volseg.measurement.scan import Box, CanonicalScan, n_voxels_of

MAX_POINTS = 2**20  # of all surfaces; with more, the scan is searched
BLOCK_EDGE = 32  # voxels: large lesions are processed block by block
SMALL_BLOCK = 2**12  # voxels of a box that is processed whole
FIRST_REACH, LAST_REACH = 2, 32  # voxels round a block; beyond, the scan is searched cell by cell
FEW_DISTANCES = 2**18  # up to which all distances are computed faster than by a tree
ROUNDING_MM = 1e-9
# The largest boxes are always compared: those far larger than the median, but at least and at most
# these numbers of boxes.
LARGE_BOXES = (32, 512)
FAR_LARGER = 4  # times the median radius
FIRST_BOXES = 4  # a quarter of the number of small boxes compared first
SMALL_SURFACE = 16  # points
FEW_POINTS = 64  # of a surface, for an upper bound of its distance
POINTS_AT_ONCE = 2000


class NearestDistances:
    """Distance from each lesion of a scan to the nearest other one; lesions are added in order.

    Args:
        most_points: surface points that may be held at once.
    """

    def __init__(self, view: CanonicalScan, *, most_points: int = MAX_POINTS) -> None:
        self._view = view
        self._room = most_points
        self._surfaces_mm: list[np.ndarray] = []
        self._boxes: list[tuple[int, Box]] = []

    def add(self, lesion: LesionBox) -> None:
        self._boxes.append((lesion.number, lesion.box))
        if self._room > 0:
            self._room -= lesion.form.n_surface
            self._surfaces_mm.append(lesion.start_mm + lesion.form.surface_mm)
        if self._room <= 0:
            self._surfaces_mm.clear()

    def gaps_mm(self) -> list[float]:
        """Return the distance of each lesion; NaN if there is no other one."""
        if self._room > 0:
            return gaps_mm(self._surfaces_mm)
        lesions = self._view.scan.lesions
        # Components of a single label, connected over corners, have a plane of voxels between them.
        is_apart = lesions.connectivity == 26 and min(lesions.labels) == max(lesions.labels)
        nearest = NearestLesion(self._view.ids, self._view.matrix, is_apart=is_apart)
        gaps = (nearest.gap_mm(number, box) for number, box in self._boxes)
        return [gap if math.isfinite(gap) else math.nan for gap in gaps]


def gaps_mm(surfaces: Sequence[np.ndarray]) -> list[float]:
    """Return the distance in mm from each surface to the nearest other one; NaN if there is none.

    Args:
        surfaces: points (N, 3) in mm of each lesion.
    """
    if len(surfaces) < 2:
        return [np.nan] * len(surfaces)
    boxes = _Boxes.around(surfaces)
    gaps = _gaps_of_small(surfaces)
    trees: dict[int, KDTree] = {}
    for n, points in enumerate(surfaces):
        if len(points) <= SMALL_SURFACE:
            continue
        for box_gap, other in boxes.nearest_first(n, float(gaps[n])):
            if box_gap >= gaps[n]:  # surfaces are no nearer than their boxes
                break
            if other not in trees:
                trees[other] = KDTree(surfaces[other])
            low, high = boxes.low[other], boxes.high[other]
            gap = _gap_mm(points, trees[other], low, high, float(gaps[n]))
            gaps[n], gaps[other] = min(gaps[n], gap), min(gaps[other], gap)
    return gaps.tolist()


def _gaps_of_small(surfaces: Sequence[np.ndarray]) -> np.ndarray:
    """Return (N,) the gap of each surface of up to `SMALL_SURFACE` points, all at once.

    For a larger surface, it is an upper bound: the gap to the nearest small one seen.
    """
    sizes = [len(points) for points in surfaces]
    gaps = np.full(len(surfaces), np.inf)
    if min(sizes) > SMALL_SURFACE:
        return gaps
    points, owners = np.concatenate(surfaces), np.repeat(np.arange(len(surfaces)), sizes)
    small = np.flatnonzero(np.repeat(sizes, sizes) <= SMALL_SURFACE)
    tree = KDTree(points)
    n_neighbours = min(SMALL_SURFACE + 1, len(points))  # one of them belongs to another surface
    for start in range(0, small.size, POINTS_AT_ONCE):
        chunk = small[start : start + POINTS_AT_ONCE]
        mm, neighbours = tree.query(points[chunk], k=n_neighbours)
        others = owners[neighbours]
        mm[others == owners[chunk, None]] = np.inf
        np.minimum.at(gaps, owners[chunk], mm.min(axis=1))
        np.minimum.at(gaps, others, mm)
    return gaps


@dataclass(frozen=True, slots=True, eq=False)
class _Boxes:
    """Bounding boxes in mm: large ones are always compared, small ones by their centres."""

    low: np.ndarray  # (N, 3)
    high: np.ndarray  # (N, 3)
    radii: np.ndarray  # (N,) of the balls round the boxes
    large: np.ndarray  # numbers of the large boxes
    small: np.ndarray  # numbers of the small boxes, largest first
    centres: KDTree | None  # of the small boxes

    @classmethod
    def around(cls, surfaces: Sequence[np.ndarray]) -> _Boxes:
        low = np.array([points.min(axis=0) for points in surfaces])
        high = np.array([points.max(axis=0) for points in surfaces])
        radii = np.linalg.norm(high - low, axis=1) / 2
        order = np.argsort(-radii, kind="stable")
        n_large = int(
            np.clip(np.count_nonzero(radii > FAR_LARGER * np.median(radii)), *LARGE_BOXES)
        )
        large, small = order[:n_large], order[n_large:]
        centres = KDTree((low + high)[small] / 2) if small.size else None
        return cls(low, high, radii, large, small, centres)

    def nearest_first(self, n: int, most: float) -> Iterator[tuple[float, int]]:
        """Yield (distance, number) of the other boxes nearer than `most`, nearest first."""
        waiting: list[tuple[float, int]] = []
        self._add(waiting, n, self.large, most)
        n_queried, n_next, bound = 0, FIRST_BOXES, -np.inf if self.small.size else np.inf
        while waiting or bound < most:
            if waiting and waiting[0][0] <= bound:
                yield heapq.heappop(waiting)
                continue
            assert self.centres is not None
            n_next = min(4 * n_next, self.small.size)
            ranks = np.arange(n_queried + 1, n_next + 1)
            distances, indices = self.centres.query((self.low[n] + self.high[n]) / 2, k=ranks)
            self._add(waiting, n, self.small[indices], most)
            n_queried = n_next
            # The centres of the boxes not queried yet are further away.
            bound = distances[-1] - self.radii[n] - self.radii[self.small[0]]
            if n_queried == self.small.size:
                bound = np.inf

    def _add(
        self, waiting: list[tuple[float, int]], n: int, others: np.ndarray, most: float
    ) -> None:
        apart = _apart(self.low[others], self.high[others], self.low[n], self.high[n])
        gaps = np.linalg.norm(apart, axis=1)
        is_near = (gaps < most) & (others != n)
        for gap, other in zip(gaps[is_near].tolist(), others[is_near].tolist(), strict=True):
            heapq.heappush(waiting, (gap, other))


def _gap_mm(
    points: np.ndarray, tree: KDTree, low: np.ndarray, high: np.ndarray, most: float
) -> float:
    """Return the distance of the points to those of the tree; infinite if not under `most`.

    Args:
        low, high: corners of the box of the tree's points.
    """
    # A few points give an upper bound; only points as near to the other box can be nearer.
    few = points[:: max(1, len(points) // FEW_POINTS)]
    most = min(most, float(tree.query(few)[0].min()) + ROUNDING_MM)
    near = points[np.linalg.norm(_apart(low, high, points, points), axis=1) <= most]
    return float(tree.query(near, distance_upper_bound=most)[0].min()) if len(near) else np.inf


def _apart(
    low: np.ndarray, high: np.ndarray, other_low: np.ndarray, other_high: np.ndarray
) -> np.ndarray:
    """Return the gap between boxes along each axis, 0 where they overlap."""
    return np.maximum(0, np.maximum(low - other_high, other_low - high))


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
    if n_voxels_of(box) <= SMALL_BLOCK:
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

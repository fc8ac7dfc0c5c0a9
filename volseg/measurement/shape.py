"""Shape of a lesion: surface, axes, largest diameter. All functions take a canonical (R, A, S) box.

The surface is that of marching cubes at 0.5 on the voxels. Voxels that touch along an edge only are
joined, as in the lesions themselves; Lorensen and Cline's cubes join low values that way, hence the
inverted mask. On a mask, the cube between eight voxel centres has only 256 possible patterns, so
the surface is counted, not built: area and volume are sums over how often each pattern occurs. This
takes a few bytes per voxel of a few planes, whatever the size of the lesion.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.spatial import ConvexHull, KDTree
from scipy.spatial.distance import cdist

N_CUBES = 256
COUNTED_TOGETHER = 2**16  # voxels of neighbouring planes
FEW_POINTS = 64  # up to which all distances are computed faster than a convex hull
POINTS_AT_ONCE = 2000
# The largest boxes are always compared: those far larger than the median, but at least and at most
# these numbers of boxes.
LARGE_BOXES = (32, 512)
FAR_LARGER = 4  # times the median radius
FIRST_BOXES = 4  # a quarter of the number of small boxes compared first
SMALL_SURFACE = 16  # points
ROUNDING_MM = 1e-9


@dataclass(frozen=True, slots=True)
class _Cubes:
    """Triangles of the surface in a unit cube, for each of its 256 patterns of corners.

    Bit 7 of a pattern is the corner (0, 0, 0), bit 0 the corner (1, 1, 1).
    """

    kinds: np.ndarray  # (T,) pattern of each triangle
    normals: np.ndarray  # (T, 3) outward normals, as long as the area of the triangle
    flux: np.ndarray  # (256,) flux of the field (x, 0, 0) out of all triangles of the pattern
    facing: np.ndarray  # (256,) their area as seen along x, negative if it faces down


def mesh(inside: np.ndarray, matrix: np.ndarray) -> tuple[float, float]:
    """Return the volume in mm³ and the area in mm² of the surface of a lesion.

    Args:
        inside: (R, A, S) bool of its box.
        matrix: (3, 3) voxel → mm.

    Source: IBSI RNU0 and C0JK; Lorensen and Cline, SIGGRAPH 21:163 (1987).
    """
    cubes, determinant = _cubes(), float(np.linalg.det(matrix))
    # A linear map transforms normals whose length is the area by its cofactor matrix.
    areas_mm2 = np.linalg.norm(cubes.normals @ (determinant * np.linalg.inv(matrix)), axis=1)
    area_mm2 = np.bincount(cubes.kinds, areas_mm2, minlength=N_CUBES)
    counts = _count_cubes(inside)
    x = np.arange(-1, len(inside))
    volume = float((counts @ cubes.flux + x * (counts @ cubes.facing)).sum())
    return volume * abs(determinant), float((counts @ area_mm2).sum())


def _count_cubes(inside: np.ndarray) -> np.ndarray:
    """Return (R + 1, 256) counts of each pattern between planes x and x + 1, for x from −1."""
    n_planes, counts = max(1, COUNTED_TOGETHER // inside[0].size), []
    for start in range(-1, len(inside), n_planes):
        stop = min(start + n_planes, len(inside))
        padded = np.zeros((stop + 1 - start, inside.shape[1] + 2, inside.shape[2] + 2), np.uint8)
        padded[max(0, -start) : len(inside) - start, 1:-1, 1:-1] = inside[max(0, start) : stop + 1]
        # Four bits for the four corners of a cube in each plane of voxels.
        low = 8 * padded[:, :-1, :-1] + 4 * padded[:, :-1, 1:]
        low += 2 * padded[:, 1:, :-1] + padded[:, 1:, 1:]
        offsets = N_CUBES * np.arange(stop - start)[:, None]
        kinds = (16 * low[:-1] + low[1:]).reshape(stop - start, -1) + offsets
        in_planes = np.bincount(kinds.ravel(), minlength=N_CUBES * (stop - start))
        counts.append(in_planes.reshape(-1, N_CUBES))
    return np.concatenate(counts)


@cache
def _cubes() -> _Cubes:
    from skimage.measure import marching_cubes

    kinds, triangles = [], []
    for kind in range(1, N_CUBES - 1):  # all eight corners outside, or inside: no surface
        corners = np.array([kind >> 7 - bit & 1 for bit in range(8)], np.float32).reshape(2, 2, 2)
        points, faces, _, _ = marching_cubes(1 - corners, 0.5, method="lorensen")
        kinds += [kind] * len(faces)
        triangles.append(points[faces].astype(np.float64))
    corner, second, third = np.concatenate(triangles).transpose(1, 0, 2)
    normals = np.cross(second - corner, third - corner) / 2
    normals *= -np.sign(normals[0].sum())  # the corner (1, 1, 1) alone must face (0, 0, 0)
    flux = normals[:, 0] * (corner + second + third)[:, 0] / 3
    return _Cubes(
        np.array(kinds),
        normals,
        np.bincount(kinds, flux, minlength=N_CUBES),
        np.bincount(kinds, normals[:, 0], minlength=N_CUBES),
    )


def axes_mm(inside: np.ndarray, matrix: np.ndarray) -> tuple[float, float, float]:
    """Return the major, minor and least axis in mm: 4 √λ of the covariance of the voxel centres.

    NaN for one voxel. The covariance has 1/(N − 1), without which the published values of the
    digital phantom are not met.

    Source: IBSI TDIC, P9VJ, 7J51.
    """
    planes = [inside.sum(axis=axis, dtype=np.int64) for axis in range(3)]  # projections
    n = int(planes[0].sum())
    if n < 2:
        return np.nan, np.nan, np.nan
    sums, products = np.zeros(3), np.zeros((3, 3))
    for axis, plane in enumerate(planes):
        first, second = (other for other in range(3) if other != axis)
        x, y = np.arange(plane.shape[0]), np.arange(plane.shape[1])
        products[first, second] = products[second, first] = float(x @ plane @ y)
        sums[first], sums[second] = float(x @ plane.sum(axis=1)), float(plane.sum(axis=0) @ y)
        products[first, first] = float(x**2 @ plane.sum(axis=1))
        products[second, second] = float(plane.sum(axis=0) @ y**2)
    covariance = (products - np.outer(sums, sums) / n) / (n - 1)
    values = np.linalg.eigvalsh(matrix @ covariance @ matrix.T)
    values[values < 1e-12 * values[-1]] = 0  # a lesion of one slice has no depth on oblique grids
    least, minor, major = (4 * np.sqrt(np.maximum(values, 0))).tolist()
    return major, minor, least


def outermost_points(inside: np.ndarray, axes: tuple[int, ...] = (0, 1, 2)) -> np.ndarray:
    """Return the outermost surface points (N, 3), in voxels, of each line of voxels along `axes`.

    They lie half a voxel beyond the first and the last voxel of each line, and include every
    corner of the convex hull.
    """
    points = []
    for axis in axes:
        hit = inside.any(axis=axis)
        ends = np.empty((2, int(hit.sum()), 3))
        ends[:, :, [other for other in range(3) if other != axis]] = np.argwhere(hit)
        ends[0, :, axis] = inside.argmax(axis=axis)[hit] - 0.5
        ends[1, :, axis] = inside.shape[axis] - 0.5 - np.flip(inside, axis).argmax(axis=axis)[hit]
        points += [ends[0], ends[1]]
    return np.concatenate(points)


def surface_points(inside: np.ndarray) -> np.ndarray:
    """Return every vertex (N, 3) of the surface, in voxels: half-way between inside and outside."""
    padded = np.zeros([n + 2 for n in inside.shape], bool)
    padded[1:-1, 1:-1, 1:-1] = inside
    points = []
    for axis in range(3):
        vertices = np.argwhere(np.diff(padded, axis=axis)).astype(np.float64) - 1
        vertices[:, axis] += 0.5
        points.append(vertices)
    return np.concatenate(points)


def widest_pair(points: np.ndarray, matrix: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the largest distance in mm between two of N points in voxels, and these two (2, 3)."""
    if len(points) > FEW_POINTS:
        spread = np.ptp(points, axis=0) > 0
        points = points[ConvexHull(points[:, spread]).vertices]
    points_mm = points @ matrix.T
    best, pair = -1.0, (0, 0)
    for start in range(0, len(points_mm), POINTS_AT_ONCE):
        distances = cdist(points_mm[start : start + POINTS_AT_ONCE], points_mm)
        a, b = np.unravel_index(int(distances.argmax()), distances.shape)
        if distances[a, b] > best:
            best, pair = float(distances[a, b]), (start + int(a), int(b))
    return best, points[list(pair)]


def sphericity(volume_mm3: float, area_mm2: float) -> float:
    """Return (36 π V²)^⅓ / A: 1 for a ball, less for everything else. Source: IBSI QCFX.

    >>> round(sphericity(4 / 3 * np.pi, 4 * np.pi), 12)
    1.0
    """
    return (36 * np.pi * volume_mm3**2) ** (1 / 3) / area_mm2


def equivalent_diameter_mm(volume_mm3: float) -> float:
    """Return the diameter in mm of the ball with the given volume: V = π d³ / 6.

    >>> round(equivalent_diameter_mm(523.6), 2)
    10.0
    """
    return (6 * volume_mm3 / np.pi) ** (1 / 3)


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

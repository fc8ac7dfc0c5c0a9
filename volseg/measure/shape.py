"""A lesion's form: its surface, its axes, its diameter. Everything here takes canonical (R, A, S) boxes of one lesion.

The surface is that of marching cubes at 0.5 on the voxels. Where voxels of the lesion touch along an edge only, it joins them, as the
lesions themselves are joined; Lorensen and Cline's cubes do so for what is low, hence the mask upside down. On a mask a cube between eight voxel centres can look in only 256 ways, so
the surface is counted, not built: area and volume are sums over how often each of the 256 occurs. That needs a few bytes per voxel
of a few planes, whatever the size of the lesion.
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
FEW_POINTS = 64  # of so few points all distances are found sooner than their hull
POINTS_AT_ONCE = 2000
MANY_BOXES = (
    32,
    512,
)  # the largest boxes, which are always looked at: so many at the least, and at the most
FAR_LARGER = 4  # times the usual
FIRST_BOXES = 4  # a fourth of what is looked at first of the others
SMALL_SURFACE = 16
ROUNDING_MM = 1e-9


@dataclass(frozen=True, slots=True)
class _Cubes:
    """What the surface in a unit cube looks like, for each of its 256 kinds: bit 7 is the corner (0, 0, 0), bit 0 (1, 1, 1)."""

    kinds: np.ndarray  # (T,) whose triangle it is
    normals: np.ndarray  # (T, 3) pointing out, as long as the triangle has area
    flux: np.ndarray  # (256,) of the field (x, 0, 0) out through all triangles of the kind
    facing: np.ndarray  # (256,) their area as seen along x, negative where it faces down


def mesh(inside: np.ndarray, matrix: np.ndarray) -> tuple[float, float]:
    """Volume in mm³ and area in mm² of the surface of a lesion.

    Args:
        inside: (R, A, S) bool of its box.
        matrix: (3, 3) voxel → mm.

    Source: IBSI RNU0 and C0JK; Lorensen and Cline, SIGGRAPH 21:163 (1987).
    """
    cubes, determinant = _cubes(), float(np.linalg.det(matrix))
    # A linear map takes the normal of a surface, as long as its area, by its cofactors.
    areas_mm2 = np.linalg.norm(cubes.normals @ (determinant * np.linalg.inv(matrix)), axis=1)
    area_mm2 = np.bincount(cubes.kinds, areas_mm2, minlength=N_CUBES)
    counts = _count_cubes(inside)
    x = np.arange(-1, len(inside))
    volume = float((counts @ cubes.flux + x * (counts @ cubes.facing)).sum())
    return volume * abs(determinant), float((counts @ area_mm2).sum())


def _count_cubes(inside: np.ndarray) -> np.ndarray:
    """(R + 1, 256) how often each kind of cube occurs between planes x and x + 1, for x from −1."""
    n_planes, counts = max(1, COUNTED_TOGETHER // inside[0].size), []
    for start in range(-1, len(inside), n_planes):
        stop = min(start + n_planes, len(inside))
        padded = np.zeros((stop + 1 - start, inside.shape[1] + 2, inside.shape[2] + 2), np.uint8)
        padded[max(0, -start) : len(inside) - start, 1:-1, 1:-1] = inside[max(0, start) : stop + 1]
        # Four bits for the four corners that a cube has in each plane of voxels.
        low = (
            8 * padded[:, :-1, :-1]
            + 4 * padded[:, :-1, 1:]
            + 2 * padded[:, 1:, :-1]
            + padded[:, 1:, 1:]
        )
        kinds = (16 * low[:-1] + low[1:]).reshape(stop - start, -1) + N_CUBES * np.arange(
            stop - start
        )[:, None]
        found = np.bincount(kinds.ravel(), minlength=N_CUBES * (stop - start))
        counts.append(found.reshape(-1, N_CUBES))
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
    normals *= -np.sign(normals[0].sum())  # of the corner (1, 1, 1) alone: it faces (0, 0, 0)
    flux = normals[:, 0] * (corner + second + third)[:, 0] / 3
    return _Cubes(
        np.array(kinds),
        normals,
        np.bincount(kinds, flux, minlength=N_CUBES),
        np.bincount(kinds, normals[:, 0], minlength=N_CUBES),
    )


def axes_mm(inside: np.ndarray, matrix: np.ndarray) -> tuple[float, float, float]:
    """Major, minor and least axis: 4 √λ of the covariance of the voxel centres, with 1/(N − 1); NaN for one voxel.

    Source: IBSI TDIC, P9VJ, 7J51. The published values of the digital phantom are only met with 1/(N − 1).
    """
    planes = [
        inside.sum(axis=axis, dtype=np.int64) for axis in range(3)
    ]  # the mask as seen along each axis
    n = int(planes[0].sum())
    if n < 2:
        return np.nan, np.nan, np.nan
    sums, products = np.zeros(3), np.zeros((3, 3))
    for axis, plane in enumerate(planes):
        first, second = (other for other in range(3) if other != axis)
        x, y = np.arange(plane.shape[0]), np.arange(plane.shape[1])
        products[first, second] = products[second, first] = float(x @ plane @ y)
        sums[first], sums[second] = float(x @ plane.sum(axis=1)), float(plane.sum(axis=0) @ y)
        products[first, first], products[second, second] = (
            float(x**2 @ plane.sum(axis=1)),
            float(plane.sum(axis=0) @ y**2),
        )
    covariance = (products - np.outer(sums, sums) / n) / (n - 1)
    values = np.linalg.eigvalsh(matrix @ covariance @ matrix.T)
    values[values < 1e-12 * values[-1]] = (
        0  # a lesion of one slice has no depth, however its grid is turned
    )
    least, minor, major = (4 * np.sqrt(np.maximum(values, 0))).tolist()
    return major, minor, least


def outermost_points(inside: np.ndarray, axes: tuple[int, ...] = (0, 1, 2)) -> np.ndarray:
    """(N, 3) points of the surface, in voxels, that no line along one of these axes through voxel centres leaves behind it.

    They lie half a voxel outside the first and the last voxel of each line, and hold every corner of the convex hull.
    """
    found = []
    for axis in axes:
        hit = inside.any(axis=axis)
        ends = np.empty((2, int(hit.sum()), 3))
        ends[:, :, [other for other in range(3) if other != axis]] = np.argwhere(hit)
        ends[0, :, axis] = inside.argmax(axis=axis)[hit] - 0.5
        ends[1, :, axis] = inside.shape[axis] - 0.5 - np.flip(inside, axis).argmax(axis=axis)[hit]
        found += [ends[0], ends[1]]
    return np.concatenate(found)


def surface_points(inside: np.ndarray) -> np.ndarray:
    """(N, 3) every vertex of the surface, in voxels: half-way between a voxel inside and a neighbour outside."""
    padded = np.zeros([n + 2 for n in inside.shape], bool)
    padded[1:-1, 1:-1, 1:-1] = inside
    found = []
    for axis in range(3):
        ends = np.argwhere(np.diff(padded, axis=axis)).astype(np.float64) - 1
        ends[:, axis] += 0.5
        found.append(ends)
    return np.concatenate(found)


def widest_pair(points: np.ndarray, matrix: np.ndarray) -> tuple[float, np.ndarray]:
    """Largest distance in mm between two of (N, 3) points given in voxels, and the (2, 3) two."""
    if len(points) > FEW_POINTS:
        spread = np.ptp(points, axis=0) > 0
        points = points[ConvexHull(points[:, spread]).vertices]
    places = points @ matrix.T
    best, pair = -1.0, (0, 0)
    for start in range(0, len(places), POINTS_AT_ONCE):
        distances = cdist(places[start : start + POINTS_AT_ONCE], places)
        a, b = np.unravel_index(int(distances.argmax()), distances.shape)
        if distances[a, b] > best:
            best, pair = float(distances[a, b]), (start + int(a), int(b))
    return best, points[list(pair)]


def sphericity(volume_mm3: float, area_mm2: float) -> float:
    """(36 π V²)^⅓ / A: 1 for a ball, less for everything else. Source: IBSI QCFX.

    >>> round(sphericity(4 / 3 * np.pi, 4 * np.pi), 12)
    1.0
    """
    return (36 * np.pi * volume_mm3**2) ** (1 / 3) / area_mm2


def equivalent_diameter_mm(volume_mm3: float) -> float:
    """Diameter in mm of the ball with the given volume: V = π d³ / 6.

    >>> round(equivalent_diameter_mm(523.6), 2)
    10.0
    """
    return (6 * volume_mm3 / np.pi) ** (1 / 3)


def gaps_mm(surfaces: Sequence[np.ndarray]) -> list[float]:
    """For each of the (N, 3) surfaces in mm the distance of its points to those of the nearest other one; NaN if there is none."""
    if len(surfaces) < 2:
        return [np.nan] * len(surfaces)
    boxes = _Boxes.around(surfaces)
    found = _gaps_of_small(surfaces)
    trees: dict[int, KDTree] = {}
    for n, points in enumerate(surfaces):
        if len(points) <= SMALL_SURFACE:
            continue
        for least, other in boxes.nearest_first(
            n, float(found[n])
        ):  # surfaces are no nearer than their boxes
            if least >= found[n]:
                break
            if other not in trees:
                trees[other] = KDTree(surfaces[other])
            gap = _gap_mm(
                points, trees[other], boxes.low[other], boxes.high[other], float(found[n])
            )
            found[n], found[other] = min(found[n], gap), min(found[other], gap)
    return found.tolist()


def _gaps_of_small(surfaces: Sequence[np.ndarray]) -> np.ndarray:
    """(N,) the gap of each surface of up to `SMALL_SURFACE` points, all of them at once; of a larger one that to the nearest small one seen."""
    sizes = [len(points) for points in surfaces]
    found = np.full(len(surfaces), np.inf)
    if min(sizes) > SMALL_SURFACE:
        return found
    points, owners = np.concatenate(surfaces), np.repeat(np.arange(len(surfaces)), sizes)
    small = np.flatnonzero(np.repeat(sizes, sizes) <= SMALL_SURFACE)
    tree = KDTree(points)
    n_neighbours = min(SMALL_SURFACE + 1, len(points))  # one of them belongs to another surface
    for start in range(0, small.size, POINTS_AT_ONCE):
        at = small[start : start + POINTS_AT_ONCE]
        mm, neighbours = tree.query(points[at], k=n_neighbours)
        others = owners[neighbours]
        mm[others == owners[at, None]] = np.inf
        np.minimum.at(found, owners[at], mm.min(axis=1))
        np.minimum.at(found, others, mm)
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Boxes:
    """Bounding boxes in mm, (N, 3) each, and the balls round them. The largest are always looked at, the others by their centres."""

    low: np.ndarray
    high: np.ndarray
    radii: np.ndarray
    large: np.ndarray
    small: np.ndarray
    centres: KDTree | None  # of the small ones

    @classmethod
    def around(cls, surfaces: Sequence[np.ndarray]) -> _Boxes:
        low = np.array([points.min(axis=0) for points in surfaces])
        high = np.array([points.max(axis=0) for points in surfaces])
        radii = np.linalg.norm(high - low, axis=1) / 2
        order = np.argsort(-radii, kind="stable")
        n_large = int(np.clip(np.count_nonzero(radii > FAR_LARGER * np.median(radii)), *MANY_BOXES))
        large, small = order[:n_large], order[n_large:]
        return cls(
            low, high, radii, large, small, KDTree((low + high)[small] / 2) if small.size else None
        )

    def nearest_first(self, n: int, most: float) -> Iterator[tuple[float, int]]:
        """(distance, number) of every other box nearer than `most`, in ascending order; found out as far as it is asked for."""
        waiting: list[tuple[float, int]] = []
        self._add(waiting, n, self.large, most)
        known, wanted, bound = 0, FIRST_BOXES, -np.inf if self.small.size else np.inf
        while waiting or bound < most:
            if waiting and waiting[0][0] <= bound:
                yield heapq.heappop(waiting)
                continue
            assert self.centres is not None
            wanted = min(4 * wanted, self.small.size)
            away, at = self.centres.query(
                (self.low[n] + self.high[n]) / 2, k=np.arange(known + 1, wanted + 1)
            )
            self._add(waiting, n, self.small[at], most)
            known = wanted
            # Those that are not known yet are further away, from centre to centre.
            bound = (
                np.inf
                if known == self.small.size
                else away[-1] - self.radii[n] - self.radii[self.small[0]]
            )

    def _add(
        self, waiting: list[tuple[float, int]], n: int, others: np.ndarray, most: float
    ) -> None:
        gaps = np.linalg.norm(
            _apart(self.low[others], self.high[others], self.low[n], self.high[n]), axis=1
        )
        is_near = (gaps < most) & (others != n)
        for gap, other in zip(gaps[is_near].tolist(), others[is_near].tolist(), strict=True):
            heapq.heappush(waiting, (gap, other))


def _gap_mm(
    points: np.ndarray, tree: KDTree, low: np.ndarray, high: np.ndarray, most: float
) -> float:
    """Distance of the points to those of the tree, which lie in the box from `low` to `high`; infinite if it is not under `most`."""
    # A few points tell how near the two surely are; only those that are as near to the other's box can be nearer.
    most = min(
        most, float(tree.query(points[:: max(1, len(points) // FEW_POINTS)])[0].min()) + ROUNDING_MM
    )
    near = points[np.linalg.norm(_apart(low, high, points, points), axis=1) <= most]
    return float(tree.query(near, distance_upper_bound=most)[0].min()) if len(near) else np.inf


def _apart(
    low: np.ndarray, high: np.ndarray, other_low: np.ndarray, other_high: np.ndarray
) -> np.ndarray:
    """Along each axis the gap between boxes, 0 where they overlap."""
    return np.maximum(0, np.maximum(low - other_high, other_low - high))

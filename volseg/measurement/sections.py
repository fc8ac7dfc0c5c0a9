"""Diameters of a lesion in oblique planes, such as the axial planes of the baseline scan."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain, pairwise, product

import numpy as np

from volseg.measurement.recist import SAME_LENGTH_MM, widest_across
from volseg.measurement.shape import widest_pair
from volseg.volume import Geometry, Rigid, angle_deg

MESHED_TOGETHER = 2**21  # voxels of a lesion's box
SURFACE_TOGETHER = 2**16  # faces of voxels; a larger surface (noise) is cut by a few planes at once
SOME_VOXELS, SOME_TRIANGLES, SOME_PIECES = 2**17, 2**15, 2**20  # held at once of such a surface
PIECES = 3  # line segments in a plane, per voxel that the plane meets
# Measured with masks of noise: bytes per meshed voxel, per segment, and for the cut triangles.
MESH_BYTES, PIECE_BYTES, CUTTING = 200, 100, 64 << 20
FLAT_MM = 1e-6  # a narrower section is a line


def axial_normal(geometry: Geometry) -> np.ndarray:
    """Return the unit normal (3,), in RAS, of the axial slices: of the axes nearest to R and A."""
    matrix = geometry.canonical().voxel_steps_mm
    normal = np.cross(matrix[:, 0], matrix[:, 1])
    return normal / np.linalg.norm(normal)


def tilt_deg(baseline: Geometry, followup: Geometry, transform: Rigid) -> float:
    """Return the angle in degrees between the axial slices of two scans, relative to the patient.

    Args:
        transform: from points of the baseline to points of the follow-up.
    """
    normal = transform.rotation @ axial_normal(baseline)
    other = axial_normal(followup)
    return angle_deg(normal, other if normal @ other > 0 else -other)


def section_diameters(
    inside: np.ndarray,
    matrix: np.ndarray,
    normal: np.ndarray,
    *,
    meshed_together: int = MESHED_TOGETHER,
    surface_together: int = SURFACE_TOGETHER,
    some_pieces: int = SOME_PIECES,
) -> tuple[float, float]:
    """Measure the long and the short axis of a lesion in the planes perpendicular to `normal`.

    The surface (marching cubes at 0.5 on the voxels) is cut by planes with the distance of the
    slices. If the planes are the slices themselves, the cuts are their contours and the axes those
    of `recist.diameters`. One plane meets a slice at the lesion's centroid; if the whole lesion
    lies between two planes, it is cut through its centroid instead.

    Args:
        inside: (R, A, S) bool of a lesion's box, with at least one voxel; slices are stacked
            along S.
        matrix: (3, 3) voxel → mm.
        normal: (3,) unit vector, in mm.
        meshed_together: voxels whose surface is held at once; bounds the memory.
        surface_together: faces of voxels that are cut at once.
        some_pieces: line segments held at once for a larger surface.

    Returns:
        Long and short axis in mm: the longest chord in any plane, and the longest one
        perpendicular to it there.
    """
    frame = _frame(normal)
    planes = _Planes.of(inside, matrix, normal)
    lowest, highest = planes.reach(matrix, np.zeros(3), np.array(inside.shape))
    band, triangles = highest - lowest + 1, meshed_together * 5  # a cube has at most five
    if _n_faces(inside) > surface_together:
        band = max(1, some_pieces // (PIECES * _largest_section(inside.shape)))
        meshed_together, triangles = min(meshed_together, SOME_VOXELS), SOME_TRIANGLES
    longest, widest = -1.0, -1.0
    together = (band, meshed_together, triangles)
    sections = _sections(inside, matrix, planes, frame, together)
    first = next(sections, None)
    if first is None:  # the lesion lies between two planes
        sections = _sections(inside, matrix, planes.through_centroid(), frame, together)
    for ends in sections if first is None else chain([first], sections):
        points = ends.reshape(-1, 2)
        if np.linalg.norm(np.ptp(points, axis=0)) < longest - SAME_LENGTH_MM:
            continue  # no chord is longer than the diagonal of the bounding box
        length, pair = _widest(points)
        if length < longest - SAME_LENGTH_MM:
            continue
        along = (pair[1] - pair[0]) / length if length > 0 else np.array([1.0, 0.0])
        turn = np.stack([along, (-along[1], along[0])])
        width, _ = widest_across(ends[:, 0] @ turn.T, ends[:, 1] @ turn.T)
        is_longer = length > longest + SAME_LENGTH_MM
        widest = width if is_longer else max(width, widest)
        longest = max(length, longest)
    return longest, widest


def section_bytes(shape: tuple[int, ...]) -> int:
    """Return the most bytes that `section_diameters` needs beside a box of this shape."""
    meshed = max(SOME_VOXELS, 2 * math.prod(shape) // min(shape))
    pieces = max(min(SOME_PIECES, PIECES * math.prod(shape)), PIECES * _largest_section(shape))
    return MESH_BYTES * meshed + PIECE_BYTES * pieces + CUTTING


def _largest_section(shape: tuple[int, ...]) -> int:
    """Return the most voxels that a plane meets in a box: √3 times its largest face."""
    return math.ceil(math.sqrt(3) * math.prod(shape) / min(shape))


def _n_faces(inside: np.ndarray) -> int:
    """Count the faces between inside and outside, except those at the border of the box."""
    return sum(
        int(np.count_nonzero(plane != after))
        for axis in range(3)
        for plane, after in pairwise(np.moveaxis(inside, axis, 0))
    )


def _sections(
    inside: np.ndarray,
    matrix: np.ndarray,
    planes: _Planes,
    frame: np.ndarray,
    together: tuple[int, int, int],
) -> Iterator[np.ndarray]:
    """Yield the line segments (N, 2 ends, 2) in mm of each plane that meets the lesion, in order.

    Args:
        together: numbers of planes, meshed voxels and triangles held at once; each set of planes
            meshes the surface again.
    """
    band, meshed, triangles = together
    lowest, highest = planes.reach(matrix, np.zeros(3), np.array(inside.shape))
    for first in range(lowest, highest + 1, band):
        last = first + band - 1
        pieces = [
            (number, ends @ frame.T)
            for part in _parts(inside, meshed)
            if planes.meet(matrix, inside.shape, part, first, last)
            for mesh in _meshes(inside, part, triangles)
            for number, ends in _cuts(mesh @ matrix.T, planes, first, last)
        ]
        numbers = np.concatenate([np.empty(0), *(number for number, _ in pieces)])
        ends = np.concatenate([np.empty((0, 2, 2)), *(segments for _, segments in pieces)])
        del pieces
        order = np.argsort(numbers, kind="stable")
        _, starts = np.unique(numbers[order], return_index=True)
        for members in np.split(order, starts[1:]) if order.size else ():
            yield ends[members]


class _Planes:
    """Parallel planes: plane n is at height `first` + n × `step` along `normal`, in mm.

    `centroid` is the height of the lesion's centroid.
    """

    def __init__(self, normal: np.ndarray, first: float, step: float, centroid: float) -> None:
        self.normal, self.first, self.step, self.centroid = normal, first, step, centroid

    @classmethod
    def of(cls, inside: np.ndarray, matrix: np.ndarray, normal: np.ndarray) -> _Planes:
        """Return planes with the distance of slices, one of which meets a slice at the centroid."""
        n_voxels = [inside.sum(axis=tuple({0, 1, 2} - {axis})) for axis in range(3)]
        centroid = np.array([n @ np.arange(len(n)) / n.sum() for n in n_voxels])
        step = 1 / float(np.linalg.norm(np.linalg.inv(matrix)[2]))
        to_slice = round(float(centroid[2])) - float(centroid[2])
        sense = math.copysign(1.0, float(normal @ matrix[:, 2]))
        height = float(normal @ (matrix @ centroid))
        return cls(normal, height + sense * to_slice * step, step, height)

    def through_centroid(self) -> _Planes:
        """Return planes with the same distance, one of which passes through the centroid."""
        return _Planes(self.normal, self.centroid, self.step, self.centroid)

    def reach(self, matrix: np.ndarray, start: np.ndarray, stop: np.ndarray) -> tuple[int, int]:
        """Return the lowest and highest plane that may meet voxels `start` ≤ index < `stop`."""
        corners = np.array(list(product(*zip(start - 1, stop, strict=True)))) @ matrix.T
        heights = (corners @ self.normal - self.first) / self.step
        return math.floor(heights.min()), math.ceil(heights.max())

    def meet(
        self,
        matrix: np.ndarray,
        shape: tuple[int, ...],
        part: tuple[int, int],
        first: int,
        last: int,
    ) -> bool:
        """Check whether planes `first` to `last` may meet the surface between two slices."""
        start, stop = np.array([0, 0, part[0]]), np.array([*shape[:2], part[1] + 1])
        lowest, highest = self.reach(matrix, start, stop)
        return lowest <= last and first <= highest


def _frame(normal: np.ndarray) -> np.ndarray:
    """Return two unit vectors (2, 3) that span the plane."""
    helper = np.eye(3)[int(np.argmin(np.abs(normal)))]
    first = np.cross(normal, helper)
    first /= np.linalg.norm(first)
    return np.stack([first, np.cross(normal, first)])


def _parts(inside: np.ndarray, meshed_together: int) -> Iterator[tuple[int, int]]:
    """Yield first and last slice of each part, from -1; the last is the first of the next part."""
    padded = (inside.shape[0] + 2) * (inside.shape[1] + 2)
    thick = max(1, meshed_together // padded)
    return (
        (start, min(start + thick, inside.shape[2])) for start in range(-1, inside.shape[2], thick)
    )


def _meshes(inside: np.ndarray, part: tuple[int, int], triangles: int) -> Iterator[np.ndarray]:
    """Yield triangles (T, 3 corners, 3) of the surface between two slices, in voxels of the box."""
    from skimage.measure import marching_cubes

    start, stop = part
    outside = np.ones((*(n + 2 for n in inside.shape[:2]), stop - start + 1), np.float32)
    slices = inside[:, :, max(0, start) : stop + 1]
    outside[1:-1, 1:-1, max(0, -start) : max(0, -start) + slices.shape[2]] = ~slices
    if outside.all() or not outside.any():
        return
    # The inverted mask joins voxels that touch along an edge, as in `shape`.
    points, faces, _, _ = marching_cubes(outside, 0.5, method="lorensen")
    for first in range(0, len(faces), triangles):
        yield points[faces[first : first + triangles]].astype(np.float64) + (-1, -1, start)


def _cuts(
    triangles: np.ndarray, planes: _Planes, first: int, last: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield plane numbers (N,) and segment ends (N, 2, 3) where planes cut triangles.

    Args:
        triangles: (T, 3, 3) in mm.
        first, last: planes that are used.
    """
    heights = (triangles @ planes.normal - planes.first) / planes.step
    heights = np.round(heights, 9)  # a corner in a plane must be exactly in it
    order = np.argsort(heights, axis=1, kind="stable")
    heights = np.take_along_axis(heights, order, axis=1)
    low, middle, high = np.take_along_axis(triangles, order[:, :, None], axis=1).transpose(1, 0, 2)
    lowest = np.ceil(heights[:, 0])
    for n in range(int((np.floor(heights[:, 2]) - lowest).max(initial=-1)) + 1):
        plane = lowest + n
        cut = (plane <= heights[:, 2]) & (plane >= first) & (plane <= last)
        number, (h_low, h_middle, h_high) = plane[cut], heights[cut].T
        long_edge = _between(low[cut], high[cut], h_low, h_high, number)
        lower = _between(low[cut], middle[cut], h_low, h_middle, number)
        upper = _between(middle[cut], high[cut], h_middle, h_high, number)
        short_edge = np.where((number <= h_middle)[:, None], lower, upper)
        yield number, np.stack([long_edge, short_edge], axis=1)
        is_level = h_low == h_high  # a triangle in the plane: add its other edges
        if is_level.any():
            for a, b in ((low, middle), (middle, high)):
                yield number[is_level], np.stack([a[cut][is_level], b[cut][is_level]], axis=1)


def _between(
    low: np.ndarray, high: np.ndarray, h_low: np.ndarray, h_high: np.ndarray, height: np.ndarray
) -> np.ndarray:
    """Return the points (N, 3) at `height` on the edges from `low` to `high`."""
    run = h_high - h_low
    fraction = np.clip((height - h_low) / np.where(run > 0, run, 1.0), 0.0, 1.0)
    return low + fraction[:, None] * (high - low)


def _widest(points: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the largest distance between two of N points in mm, and these two (2, 2)."""
    centred = points - points.mean(axis=0)
    _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    if sizes[-1] <= FLAT_MM * math.sqrt(len(points)):  # a line has no convex hull
        along = centred @ axes[0]
        pair = points[[int(along.argmin()), int(along.argmax())]]
        return float(np.linalg.norm(pair[1] - pair[0])), pair
    return widest_pair(points, np.eye(2))

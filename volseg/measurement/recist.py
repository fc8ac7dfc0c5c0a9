"""Diameters by RECIST 1.1: between points of the contour, in one axial slice.

Source: Eisenhauer et al., Eur J Cancer 45:228 (2009).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from volseg.measurement.shape import outermost_points, widest_pair

MEASURABLE_MM = 10.0  # long axis
MEASURABLE_NODE_MM = 15.0  # short axis of a lymph node
THICK_SLICE_MM = 5.0  # above it, the long axis must be at least twice the slice distance
ROUNDING_MM = 1e-4  # error of a float32 affine: so that ten voxels of 1 mm count as 10 mm
SAME_LENGTH_MM = 1e-9
MAX_POSITIONS = 4000  # along the long axis, at which the width is measured
MEASURED_TOGETHER = 2**20  # positions × contour segments


@dataclass(frozen=True, slots=True, eq=False)
class Diameters:
    """Long and short axis of a lesion, in the slice with the longest long axis."""

    long_mm: float
    short_mm: float
    slice: int  # index in the box
    long_ends: np.ndarray  # (2, 3) in voxels of the box
    short_ends: np.ndarray  # (2, 3)


def diameters(inside: np.ndarray, matrix: np.ndarray) -> Diameters:
    """Measure the longest chord of any axial slice, and the longest one perpendicular to it there.

    The contour runs half-way between the centres of voxels inside and outside: from centre to
    centre, a diameter would be about one voxel too short. Of slices with equally long chords, the
    one with the largest cross-section is taken, then the lowest.

    Args:
        inside: (R, A, S) bool of a lesion's box; slices are stacked along S.
        matrix: (3, 3) voxel → mm.
    """
    points = outermost_points(inside, axes=(0, 1))
    voxels = inside.sum(axis=(0, 1))
    points_mm = points @ matrix.T
    best, pair, longest = -1, np.zeros((2, 3)), -1.0
    order = np.argsort(points[:, 2], kind="stable")
    slices, starts = np.unique(points[order, 2], return_index=True)
    groups = np.split(order, starts[1:])
    # No chord is longer than the diagonal of the box round its slice: start with the largest, and
    # skip slices that cannot be longer.
    bounds = np.array([np.linalg.norm(np.ptp(points_mm[group], axis=0)) for group in groups])
    for n in np.argsort(-bounds, kind="stable"):
        if bounds[n] < longest - SAME_LENGTH_MM:
            break
        length, ends = widest_pair(points[groups[n]], matrix)
        index = int(slices[n])
        is_longer = length > longest + SAME_LENGTH_MM
        is_equal = abs(length - longest) <= SAME_LENGTH_MM
        if is_longer or (is_equal and (-voxels[index], index) < (-voxels[best], best)):
            best, pair, longest = index, ends, max(length, longest)
    short_mm, short_ends = _short_axis(inside[:, :, best], pair, matrix)
    return Diameters(longest, short_mm, best, pair, np.insert(short_ends, 2, best, axis=1))


def _short_axis(
    plane: np.ndarray, long_ends: np.ndarray, matrix: np.ndarray
) -> tuple[float, np.ndarray]:
    """Return length in mm and ends (2, 2) in voxels of the longest chord across the long axis."""
    from skimage.measure import find_contours

    along = matrix @ (long_ends[1] - long_ends[0])
    along /= np.linalg.norm(along)
    normal = np.cross(matrix[:, 0], matrix[:, 1])
    across = np.cross(normal / np.linalg.norm(normal), along)
    # (2, 2) voxels of the plane → mm along and across
    frame = np.stack([along, across]) @ matrix[:, :2]
    contours = find_contours(np.pad(plane, 1).astype(np.float32), 0.5)
    starts = np.concatenate([line[:-1] for line in contours]) - 1
    ends = np.concatenate([line[1:] for line in contours]) - 1
    width_mm, chord = widest_across(starts @ frame.T, ends @ frame.T)
    return width_mm, np.linalg.solve(frame, chord).T


def widest_across(starts: np.ndarray, ends: np.ndarray) -> tuple[float, np.ndarray]:
    """Measure the longest chord of a contour perpendicular to the long axis.

    Args:
        starts, ends: (N, 2) mm along and across the long axis, of the straight segments of the
            contour in any order.

    Returns:
        Its length in mm, and its ends: (2, 2) rows along and across, one column per end.
    """
    (u, v), (u_end, v_end) = starts.T, ends.T
    low, high = np.minimum(u, u_end), np.maximum(u, u_end)
    # Between corners of the contour the width is linear, so it is largest at a corner.
    positions = np.unique(np.round(np.concatenate([u, u_end]), 9))
    if len(positions) > MAX_POSITIONS:  # thousands of voxels across: every n-th corner
        positions = positions[:: -(-len(positions) // MAX_POSITIONS)]
    # A level segment is itself perpendicular: all of it counts.
    rise, is_level = v_end - v, np.abs(u_end - u) < 1e-9
    run, n_together = np.where(is_level, 1, u_end - u), max(1, MEASURED_TOGETHER // len(u))
    bottoms, tops = [], []
    for start in range(0, len(positions), n_together):
        chunk = positions[start : start + n_together]
        row, segment = np.nonzero((low <= chunk[:, None] + 1e-9) & (high >= chunk[:, None] - 1e-9))
        fraction = np.clip((chunk[row] - u[segment]) / run[segment], 0, 1)
        crossing = v[segment] + fraction * rise[segment]
        firsts = np.searchsorted(row, np.arange(len(chunk)))
        for extremes, extreme in ((bottoms, np.minimum), (tops, np.maximum)):
            end = extreme(v, v_end)
            values = np.where(is_level[segment], end[segment], crossing)
            extremes.append(extreme.reduceat(values, firsts))
    bottom, top = np.concatenate(bottoms), np.concatenate(tops)
    widths = top - bottom
    best = int(np.argmax(widths >= widths.max() - SAME_LENGTH_MM))  # the first of equal widths
    place = positions[best]
    return float(widths[best]), np.array([[place, place], [bottom[best], top[best]]])


def is_measurable(long_mm: float, short_mm: float, slice_mm: float, *, is_node: bool) -> bool:
    """Check whether a lesion counts as measurable disease.

    Args:
        slice_mm: distance between slices in the plane of acquisition: the largest spacing.
    """
    if is_node:
        return short_mm >= MEASURABLE_NODE_MM - ROUNDING_MM
    is_thick = slice_mm > THICK_SLICE_MM + ROUNDING_MM
    return long_mm >= max(MEASURABLE_MM, 2 * slice_mm if is_thick else 0.0) - ROUNDING_MM


def choose_targets(
    lengths_mm: Sequence[float],
    labels: Sequence[Hashable],
    *,
    most: int = 5,
    most_per_label: int = 2,
) -> list[int]:
    """Return the indices of the longest measurable lesions, limited in total and per label."""
    targets: list[int] = []
    for index in sorted(range(len(lengths_mm)), key=lambda index: -lengths_mm[index]):
        n_of_label = sum(labels[other] == labels[index] for other in targets)
        if len(targets) < most and n_of_label < most_per_label:
            targets.append(index)
    return targets


def sum_of_diameters_mm(
    lengths_mm: Sequence[float],
    labels: Sequence[Hashable],
    *,
    most: int = 5,
    most_per_label: int = 2,
) -> float:
    """Return the sum of the longest measurable diameters, limited in total and per label.

    >>> sum_of_diameters_mm([30.0, 12.0, 20.0, 11.0], [1, 1, 1, 2])
    61.0
    """
    targets = choose_targets(lengths_mm, labels, most=most, most_per_label=most_per_label)
    return sum((lengths_mm[index] for index in targets), 0.0)

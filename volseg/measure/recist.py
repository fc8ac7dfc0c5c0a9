"""Diameters as RECIST 1.1 wants them: on the contour, in one axial slice.

Source: Eisenhauer et al., Eur J Cancer 45:228 (2009).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from volseg.measure.shape import outermost_points, widest_pair

MEASURABLE_MM = 10.0  # of the long axis
MEASURABLE_NODE_MM = 15.0  # of the short axis of a lymph node
THICK_SLICE_MM = 5.0  # over it a lesion must be twice as long as slices are apart
ROUNDING_MM = 1e-4  # what a float32 affine is off by: ten voxels of 1 mm are 10 mm
SAME_LENGTH_MM = 1e-9
CONTOUR_PLACES = 4000  # along the long axis, at which the width is looked at
LOOKED_AT_TOGETHER = 2**20  # places × pieces of contour


@dataclass(frozen=True, slots=True, eq=False)
class Diameters:
    """The long and the short axis of a lesion in the slice in which the long one is longest."""

    long_mm: float
    short_mm: float
    slice: int  # of the box
    long_ends: np.ndarray  # (2, 3) in voxels of the box
    short_ends: np.ndarray  # (2, 3)


def diameters(inside: np.ndarray, matrix: np.ndarray) -> Diameters:
    """Longest chord between two points of the contour over all axial slices, and the longest one perpendicular to it there.

    The contour runs half-way between the centres of voxels inside and outside. From centre to centre a diameter would be about
    one voxel too short. Of slices with equally long chords it is the one with the largest cross-section, then the lowest.

    Args:
        inside: (R, A, S) bool of a lesion's box. matrix: (3, 3) voxel → mm. Slices follow each other along S.
    """
    points = outermost_points(inside, axes=(0, 1))
    voxels = inside.sum(axis=(0, 1))
    places = points @ matrix.T
    chosen, pair, longest = -1, np.zeros((2, 3)), -1.0
    order = np.argsort(points[:, 2], kind="stable")
    slices, starts = np.unique(points[order, 2], return_index=True)
    groups = np.split(order, starts[1:])
    # No chord is longer than the diagonal of the box round its slice: the likely slices first, the hopeless never.
    bounds = np.array([np.linalg.norm(np.ptp(places[group], axis=0)) for group in groups])
    for n in np.argsort(-bounds, kind="stable"):
        if bounds[n] < longest - SAME_LENGTH_MM:
            break
        length, ends = widest_pair(points[groups[n]], matrix)
        index = int(slices[n])
        is_longer = length > longest + SAME_LENGTH_MM
        is_equal = abs(length - longest) <= SAME_LENGTH_MM
        if is_longer or (is_equal and (-voxels[index], index) < (-voxels[chosen], chosen)):
            chosen, pair, longest = index, ends, max(length, longest)
    short_mm, short_ends = _short_axis(inside[:, :, chosen], pair, matrix)
    return Diameters(longest, short_mm, chosen, pair, np.insert(short_ends, 2, chosen, axis=1))


def _short_axis(
    plane: np.ndarray, long_ends: np.ndarray, matrix: np.ndarray
) -> tuple[float, np.ndarray]:
    """Length and (2, 2) ends, in voxels, of the longest chord of the contour that is perpendicular to the long axis."""
    from skimage.measure import find_contours

    along = matrix @ (long_ends[1] - long_ends[0])
    along /= np.linalg.norm(along)
    normal = np.cross(matrix[:, 0], matrix[:, 1])
    across = np.cross(normal / np.linalg.norm(normal), along)
    frame = (
        np.stack([along, across]) @ matrix[:, :2]
    )  # (2, 2) voxels of the plane → mm along and across
    contours = find_contours(np.pad(plane, 1).astype(np.float32), 0.5)
    starts = np.concatenate([line[:-1] for line in contours]) - 1
    ends = np.concatenate([line[1:] for line in contours]) - 1
    width_mm, chord = widest_across(starts @ frame.T, ends @ frame.T)
    return width_mm, np.linalg.solve(frame, chord).T


def widest_across(starts: np.ndarray, ends: np.ndarray) -> tuple[float, np.ndarray]:
    """Measure the longest chord of a contour perpendicular to the long axis.

    Args:
        starts, ends: (N, 2) mm along and across the long axis, of the straight pieces of the
            contour in any order.

    Returns:
        Its length in mm, and (2, 2) where its ends lie: along the long axis, and across it.
    """
    (u, v), (u_end, v_end) = starts.T, ends.T
    low, high = np.minimum(u, u_end), np.maximum(u, u_end)
    # The width along the long axis is linear between corners of the contour, so it is largest at one of them.
    places = np.unique(np.round(np.concatenate([u, u_end]), 9))
    if len(places) > CONTOUR_PLACES:  # a lesion of thousands of voxels across: at every n-th corner
        places = places[:: -(-len(places) // CONTOUR_PLACES)]
    rise, is_level = (
        v_end - v,
        np.abs(u_end - u) < 1e-9,
    )  # a level piece is itself perpendicular: all of it counts
    run, n_together = np.where(is_level, 1, u_end - u), max(1, LOOKED_AT_TOGETHER // len(u))
    bottoms, tops = [], []
    for start in range(0, len(places), n_together):
        some = places[start : start + n_together]
        place, at = np.nonzero((low <= some[:, None] + 1e-9) & (high >= some[:, None] - 1e-9))
        crossing = v[at] + np.clip((some[place] - u[at]) / run[at], 0, 1) * rise[at]
        firsts = np.searchsorted(place, np.arange(len(some)))
        for found, best, end in (
            (bottoms, np.minimum, np.minimum(v, v_end)),
            (tops, np.maximum, np.maximum(v, v_end)),
        ):
            found.append(best.reduceat(np.where(is_level[at], end[at], crossing), firsts))
    bottom, top = np.concatenate(bottoms), np.concatenate(tops)
    widths = top - bottom
    best = int(
        np.argmax(widths >= widths.max() - SAME_LENGTH_MM)
    )  # the first of those that are equally wide
    return float(widths[best]), np.array([[places[best], places[best]], [bottom[best], top[best]]])


def is_measurable(long_mm: float, short_mm: float, slice_mm: float, *, is_node: bool) -> bool:
    """Whether a lesion counts as measurable disease.

    Args:
        slice_mm: distance between slices as they were acquired, whichever way: the largest spacing of the grid.
    """
    if is_node:
        return short_mm >= MEASURABLE_NODE_MM - ROUNDING_MM
    return (
        long_mm
        >= max(MEASURABLE_MM, 2 * slice_mm if slice_mm > THICK_SLICE_MM + ROUNDING_MM else 0.0)
        - ROUNDING_MM
    )


def choose_targets(
    lengths_mm: Sequence[float],
    labels: Sequence[Hashable],
    *,
    most: int = 5,
    most_per_label: int = 2,
) -> list[int]:
    """Positions of the target lesions among measurable ones: the longest, so many in all and so many per organ."""
    chosen: list[int] = []
    for at in sorted(range(len(lengths_mm)), key=lambda at: -lengths_mm[at]):
        if (
            len(chosen) < most
            and sum(labels[other] == labels[at] for other in chosen) < most_per_label
        ):
            chosen.append(at)
    return chosen


def sum_of_diameters_mm(
    lengths_mm: Sequence[float],
    labels: Sequence[Hashable],
    *,
    most: int = 5,
    most_per_label: int = 2,
) -> float:
    """Sum of the longest measurable diameters, so many in all and so many per organ.

    >>> sum_of_diameters_mm([30.0, 12.0, 20.0, 11.0], [1, 1, 1, 2])
    61.0
    """
    return sum(
        (
            lengths_mm[at]
            for at in choose_targets(lengths_mm, labels, most=most, most_per_label=most_per_label)
        ),
        0.0,
    )

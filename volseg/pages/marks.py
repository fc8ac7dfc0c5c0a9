"""Where and in which colour a lesion is marked in the pictures of a page."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from volseg.measurement.rows import LesionMeasurement
from volseg.volume import BoundingBox, Volume

Point = tuple[float, float, float]  # RAS mm
Colour = tuple[int, int, int]  # red, green, blue from 0 to 255
LETTER_COLOUR = "#ffd24d"  # of the directions at the edges of a slice
LARGE = 1_000_000  # voxels; in a larger box only one slice of the lesion is searched


def lesion_points(ids: Volume, lesions: Sequence[LesionMeasurement]) -> dict[int, Point]:
    """Return a point in RAS mm for each lesion that has a voxel in `ids`, by lesion id.

    The point is a voxel of the lesion in the slice of its long axis, nearest to the axis' middle.
    Without a long axis it is the voxel nearest to the centroid.

    Args:
        ids: lesion ids on a grid along R, A and S.
    """
    boxes = ndimage.find_objects(ids.array)
    points = {}
    for lesion in lesions:
        number = lesion.lesion_id
        box = boxes[number - 1] if number <= len(boxes) else None
        if box is not None:
            points[number] = _point_in(box, ids, lesion)
    return points


def _point_in(box: tuple[slice, ...], ids: Volume, lesion: LesionMeasurement) -> Point:
    number, middle, depth = lesion.lesion_id, _middle(lesion), None
    if middle is not None:
        depth = round(float(ids.geometry.to_index(middle[None])[0, 2]))
    voxels = lesion_voxels(ids.array, number, BoundingBox.of(box), depth=depth)
    centroid = [getattr(lesion, f"centroid_{axis}_mm") for axis in "ras"]
    if middle is not None:
        aim, in_slice = middle, voxels[voxels[:, 2] == depth]
        voxels = in_slice if len(in_slice) else voxels
    elif None not in centroid:
        aim = np.array(centroid, float)
    else:
        aim = ids.geometry.to_world_mm(voxels).mean(axis=0)
    points = ids.geometry.to_world_mm(voxels)
    r, a, s = points[np.argmin(((points - aim) ** 2).sum(axis=1))].tolist()
    return r, a, s


def lesion_voxels(
    ids: np.ndarray, number: int, box: BoundingBox, *, depth: int | None = None, most: int = LARGE
) -> np.ndarray:
    """Return the indices (N, 3) of a lesion's voxels.

    In a box of more than `most` voxels only those in the slice nearest to `depth`, by default to
    the middle of the box.
    """
    r, a, s = box.slices
    if math.prod(box.shape) > most:
        aim = (s.start + s.stop) // 2 if depth is None else depth
        nearest = sorted(range(s.start, s.stop), key=lambda k: abs(k - aim))
        k = next(k for k in nearest if (ids[r, a, k] == number).any())
        s = slice(k, k + 1)
    return np.argwhere(ids[r, a, s] == number) + (r.start, a.start, s.start)


def _middle(lesion: LesionMeasurement) -> np.ndarray | None:
    """Return the middle (3,) of a lesion's long axis, or None if it is unknown."""
    ends = axis_ends(lesion, "long")
    return None if ends is None else (np.array(ends[0]) + ends[1]) / 2


def axis_ends(lesion: LesionMeasurement, axis: str) -> tuple[Point, Point] | None:
    """Return both ends of the `long` or the `short` axis of a lesion, or None if one is unknown."""
    first, last = (point_of(lesion, f"{axis}_axis_p{end}") for end in (0, 1))
    return None if first is None or last is None else (first, last)


def point_of(lesion: LesionMeasurement, name: str) -> Point | None:
    """Return a point of a lesion in RAS mm from its three columns; None if it is unknown."""
    r, a, s = (getattr(lesion, f"{name}_{axis}_mm") for axis in "ras")
    if r is None or a is None or s is None:
        return None
    return (r, a, s) if all(map(math.isfinite, (r, a, s))) else None


def lesion_colour(number: int) -> Colour:
    """Return a colour; hues in steps of the golden angle make neighbouring numbers differ."""
    red, green, blue = colorsys.hsv_to_rgb(
        (0.04 + (number - 1) * 0.381966) % 1, 0.85 if number % 2 else 0.6, 1.0
    )
    return round(red * 255), round(green * 255), round(blue * 255)

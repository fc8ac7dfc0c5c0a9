"""The intensity peak of a lesion: the highest mean of a ball of 1 cm³ round one of its voxels."""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import product

import numpy as np

from volseg.measurement.lesion_box import LesionBox
from volseg.volume import Volume

RADIUS_MM = 10 * (3 / (4 * math.pi)) ** (1 / 3)  # of a ball of 1 cm³: 6.2 mm
ROUNDING = 1e-6  # of the radius: an affine in float32 must not decide which voxels count

Columns = dict[tuple[int, int], list[tuple[int, int]]]


def intensity_peak(lesion: LesionBox) -> float:
    """Return the global intensity peak of a lesion; NaN if no ball has only finite intensities.

    Each ball lies round a voxel of the lesion and holds all voxels of the scan, in the lesion or
    not, whose centres are up to 6.2 mm away.

    Source: IBSI 1, section 3.2 (0F91), arXiv 1612.07003
    """
    image, box, form = lesion.view.image, lesion.box, lesion.form
    columns = _columns_in_ball(lesion.view.matrix)
    highest = -math.inf
    for start, stop in form.slabs(form.inside):
        first = slice(box[0].start + start, box[0].start + stop)
        means = _means(image, (first, box[1], box[2]), columns)[form.inside[start:stop]]
        means = means[np.isfinite(means)]
        highest = max(highest, float(means.max(initial=-math.inf)))
    return highest + 0.0 if math.isfinite(highest) else math.nan


def _columns_in_ball(matrix: np.ndarray) -> Columns:
    """Return (lowest, highest) step along R → steps along A and S, of the voxels in a ball.

    Args:
        matrix: (3, 3) voxel → mm. The columns may be tilted, so an interval need not be symmetric.
    """
    radius = RADIUS_MM * (1 + ROUNDING)
    # |step| along an axis is at most the radius times the length of a row of the inverse.
    reach = np.floor(radius * np.linalg.norm(np.linalg.inv(matrix), axis=1) + ROUNDING).astype(int)
    r = np.arange(-reach[0], reach[0] + 1)
    columns: Columns = defaultdict(list)
    for a, s in product(range(-reach[1], reach[1] + 1), range(-reach[2], reach[2] + 1)):
        steps = np.stack([r, np.full_like(r, a), np.full_like(r, s)])
        inside = r[np.linalg.norm(matrix @ steps, axis=0) <= radius]
        if inside.size:
            columns[int(inside[0]), int(inside[-1])].append((a, s))
    return columns


def _means(image: Volume, box: tuple[slice, slice, slice], columns: Columns) -> np.ndarray:
    """Return the mean of the ball round each voxel of a box; beyond the scan nothing counts."""
    beside = [step for steps in columns.values() for step in steps]
    reach = (
        max(max(-low, high) for low, high in columns),
        max(abs(a) for a, _ in beside),
        max(abs(s) for _, s in beside),
    )
    around = tuple(
        slice(max(0, side.start - n), min(size, side.stop + n))
        for side, n, size in zip(box, reach, image.array.shape, strict=True)
    )
    pads = [
        (part.start - side.start + n, side.stop + n - part.stop)
        for part, side, n in zip(around, box, reach, strict=True)
    ]
    values = np.pad(np.asarray(image.intensities(image.array[around]), np.float64), pads)
    shape = [side.stop - side.start for side in box]
    total = _summed(values, shape, reach, columns)
    n_voxels = sum((high - low + 1) * len(steps) for (low, high), steps in columns.items())
    if not any(map(any, pads)):
        return total / n_voxels
    counted = np.pad(np.ones([part.stop - part.start for part in around]), pads)
    return total / _summed(counted, shape, reach, columns)


def _summed(
    values: np.ndarray, shape: list[int], reach: tuple[int, int, int], columns: Columns
) -> np.ndarray:
    """Return the sum over the ball round each voxel of the middle of an array.

    Sums of columns are shared by all columns of one length: far fewer additions than voxels.
    """
    total = np.zeros(shape)
    for (low, high), steps in columns.items():
        along = np.zeros((shape[0], *values.shape[1:]))
        for r in range(reach[0] + low, reach[0] + high + 1):
            along += values[r : r + shape[0]]
        for a, s in steps:
            a, s = a + reach[1], s + reach[2]
            total += along[:, a : a + shape[1], s : s + shape[2]]
    return total

"""Boxes of a scan: the part that is worth preparing, and the same part on another grid."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from volseg.volume import BoundingBox

BODY_SUBSAMPLING = 4  # every fourth voxel per axis suffices for the percentile of the threshold


def body_threshold(stored: np.ndarray, slope: float = 1.0, intercept: float = 0.0) -> float:
    """Return a tenth of the 99th percentile of the intensities.

    It separates the body from MRI air, which is noise near 0 at any intensity scale.
    """
    steps = [min(BODY_SUBSAMPLING, max(1, n // 8)) for n in stored.shape]
    sample = stored[tuple(slice(None, None, step) for step in steps)]
    return (float(np.percentile(sample, 99)) * slope + intercept) / 10


def scaled_box(
    box: BoundingBox,
    shape: Sequence[int],
    new_shape: Sequence[int],
    margin_voxels: Sequence[float] = (0, 0, 0),
) -> BoundingBox:
    """Transfer a box, with a margin, between two grids over the same field of view.

    Both grids reach from edge to edge of the field of view. The box is rounded outwards to whole
    voxels and clipped to the grid.

    Args:
        shape, new_shape: voxels of the old and the new grid.
        margin_voxels: margin along each axis, in voxels of the new grid.
    """
    axes = zip(box.start, box.stop, shape, new_shape, margin_voxels, strict=True)
    ends = [
        (max(0, math.floor(start * m / n - margin)), min(m, math.ceil(stop * m / n + margin)))
        for start, stop, n, m, margin in axes
    ]
    (r, r_stop), (a, a_stop), (s, s_stop) = ends
    return BoundingBox((r, a, s), (r_stop, a_stop, s_stop))

"""What is kept of a scan to find the same scan under another name."""

from __future__ import annotations

import hashlib

import numpy as np

from volseg.evaluation.duplicates import ImagePrint, print_of_thumbnail
from volseg.volume import Volume

EDGE = 16  # voxels of the thumbnail along each axis
SLAB_VOXELS = 2_000_000


def print_of_scan(scan: Volume) -> ImagePrint:
    """Return the print of a scan; the same for all 48 axis orders, file formats and data types.

    The hash is that of shape and intensities in float32, the thumbnail holds means of 16 × 16 × 16
    blocks.
    """
    canonical = scan.canonical()
    shape = canonical.array.shape
    digest = hashlib.sha256(repr(shape).encode())
    planes = np.empty((EDGE, EDGE, shape[2]), np.float32)
    step = max(1, SLAB_VOXELS // (shape[0] * shape[1]))
    for start in range(0, shape[2], step):
        part = canonical.array[:, :, start : start + step]
        values = np.asarray(canonical.intensities(part), np.float32)
        digest.update(np.ascontiguousarray(values.T).data)
        planes[:, :, start : start + step] = _block_means(_block_means(values, 0), 1)
    thumbnail = np.nan_to_num(_block_means(planes, 2), posinf=0, neginf=0)
    return print_of_thumbnail(thumbnail, digest.hexdigest())


def _block_means(values: np.ndarray, axis: int) -> np.ndarray:
    """Return means of 16 parts along an axis; parts of a short axis share voxels."""
    n = values.shape[axis]
    starts = np.arange(EDGE) * n // EDGE
    sizes = np.maximum(1, np.diff(starts, append=n))
    sums = np.add.reduceat(values, starts, axis=axis)
    return sums / np.expand_dims(sizes, tuple(other for other in range(3) if other != axis))

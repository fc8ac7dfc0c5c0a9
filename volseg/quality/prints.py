"""What is kept of a scan to find the same scan under another name."""

from __future__ import annotations

import hashlib

import numpy as np

from volseg.evaluation.duplicates import THUMBNAIL, ImagePrint, print_of_thumbnail
from volseg.preprocessing.planes import PLANES, Plane
from volseg.volume import Volume

SLAB_VOXELS = 2_000_000
PARTS = 16  # of the depth; the middle one is kept


def print_of_scan(scan: Volume) -> ImagePrint:
    """Return the print of a scan; the same for all 48 axis orders, file formats and data types.

    The hash is that of shape and intensities in float32. The thumbnail holds the three slices
    through the middle, each of 32 × 32 means: unlike means over the whole depth they keep the
    detail that tells two patients apart.
    """
    canonical = scan.canonical()
    shape = canonical.array.shape
    digest = hashlib.sha256(repr(shape).encode())
    step = max(1, SLAB_VOXELS // (shape[0] * shape[1]))
    for start in range(0, shape[2], step):
        part = canonical.intensities(canonical.array[:, :, start : start + step])
        digest.update(np.ascontiguousarray(np.asarray(part, np.float32).T).data)
    middles = [_middle(canonical, plane) for plane in PLANES]
    thumbnail = np.stack([_block_means(_block_means(middle, 0), 1) for middle in middles])
    return print_of_thumbnail(thumbnail, digest.hexdigest(), axes=(1, 2))


def _middle(canonical: Volume, plane: Plane) -> np.ndarray:
    """Return the mean (across, up) of the slices in the middle, a sixteenth of all."""
    n = canonical.array.shape[plane.through]
    first, count = n // 2 - n // (2 * PARTS), max(1, n // PARTS)
    total = np.zeros(plane.slice_of(canonical.array, 0).shape, np.float32)
    for index in range(first, first + count):
        total += canonical.intensities(plane.slice_of(canonical.array, index))
    return total / count


def _block_means(values: np.ndarray, axis: int) -> np.ndarray:
    """Return means of 32 parts along an axis; parts of a short axis share voxels."""
    n = values.shape[axis]
    starts = np.arange(THUMBNAIL) * n // THUMBNAIL
    sizes = np.maximum(1, np.diff(starts, append=n)).astype(np.float32)
    sums = np.add.reduceat(np.nan_to_num(values.astype(np.float32)), starts, axis=axis)
    return sums / (sizes[:, None] if axis == 0 else sizes)

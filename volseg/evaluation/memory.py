"""Peak memory of comparing a predicted mask with its reference, from the contents of both."""

from __future__ import annotations

import math
from collections.abc import Sequence

from volseg.evaluation.detection import matching_bytes, most_matching_bytes
from volseg.evaluation.surface import most_surface_bytes, surface_bytes
from volseg.execution.memory import Peak
from volseg.io.header import ScanHeader
from volseg.volume import Volume

LIBRARIES = 64 << 20  # the plotting libraries and their figures
SLABS = 32 << 20  # chunks of a mask while it is read
PLANE_BYTES = 40  # per voxel of a plane while a mask is read


def plan_reading(masks: Sequence[ScanHeader], *, process: int) -> Peak:
    """Return the peak of reading masks one by one; `process`: bytes in use before.

    A mask that is not on the grid of the first is copied onto it.
    """
    held = largest = 0
    grid = masks[0].geometry
    for header in masks:
        i, j, _k = header.geometry.shape
        largest = max(largest, held + header.n_bytes + header.mask_bytes + PLANE_BYTES * i * j)
        held += header.mask_bytes_on(grid.shape)
        if not header.geometry.matches(grid):
            largest = max(largest, held + header.mask_bytes)
    return Peak({"process": process, "reading the masks": largest + SLABS})


def plan_evaluating(reference: Volume, predicted: Volume, *, process: int, copies: int = 0) -> Peak:
    """Return the peak of comparing two masks of a grid.

    Args:
        process: bytes before they were read.
        copies: bytes of other copies of the masks.
    """
    truth, guess = reference.array, predicted.array
    surfaces = surface_bytes(truth, guess, reference.geometry)
    masks = truth.nbytes + guess.nbytes + copies
    return _peak(process, masks, surfaces, matching_bytes(truth, guess))


def most_evaluating(masks: Sequence[ScanHeader], *, process: int) -> Peak:
    """Return `plan_evaluating` in the worst case, for any two masks with these headers."""
    geometry = masks[0].geometry
    voxels = math.prod(geometry.shape)
    sizes = [header.mask_bytes_on(geometry.shape) for header in masks]
    surfaces = most_surface_bytes(geometry, itemsize=max(sizes) // voxels)
    return _peak(process, sum(sizes), surfaces, most_matching_bytes(voxels))


def _peak(process: int, masks: int, surfaces: int, lesions: int) -> Peak:
    """Return the larger of two peaks: surfaces are measured before lesions are matched."""
    work = {"surfaces": surfaces} if surfaces > lesions else {"lesions": lesions}
    return Peak({"process": process, "masks": masks} | work)

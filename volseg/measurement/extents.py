"""Where the voxels of many lesions lie: centroids and boxes, from one pass over the scan."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from volseg.measurement.scan import Box
from volseg.postprocessing.components import component_statistics
from volseg.postprocessing.lesions import Lesions
from volseg.volume import BoundingBox, slabs_of

SLAB_VOXELS = 2**20


class Extents:
    """Sums and ends of the voxel indices (3, N) of N lesions; voxels are added slab by slab."""

    def __init__(self, n: int) -> None:
        self.sums = np.zeros((3, n))
        self.low = np.full((3, n), np.iinfo(np.int32).max, np.int32)
        self.high = np.full((3, n), -1, np.int32)

    def add(self, lesion: np.ndarray, index: Sequence[np.ndarray]) -> None:
        """Add M voxels: the lesion (M,) of each, and its index (M,) along each axis."""
        for axis, along in enumerate(index):
            self.sums[axis] += np.bincount(lesion, along, minlength=self.sums.shape[1])
            np.minimum.at(self.low[axis], lesion, along.astype(np.int32))
            np.maximum.at(self.high[axis], lesion, along.astype(np.int32))


def centroids_and_boxes(
    lesions: Lesions, only: np.ndarray | None = None
) -> tuple[np.ndarray, list[Box]]:
    """Return the mean indices (M, 3) and the boxes of all lesions, or of those in `only`.

    Args:
        only: (M,) ascending numbers of lesions.

    Raises:
        ValueError: a number has no voxels.
    """
    box = BoundingBox.around(lesions.ids)
    if box is None:
        raise ValueError(f"lesion ids are all 0, but there are {len(lesions.labels)} lesions")
    part = lesions.ids[box.slices]
    if only is None:
        measured = component_statistics(part)
        centroids, first, last = measured.centroids, measured.first, measured.last
    else:
        row_of = np.zeros(len(lesions.labels) + 1, np.uint32)
        row_of[only] = np.arange(1, len(only) + 1)
        extents = Extents(len(only) + 1)
        for slab in slabs_of(part, SLAB_VOXELS):
            rows = row_of[part[slab]]
            index = np.nonzero(rows)
            extents.add(rows[index], [n + side.start for n, side in zip(index, slab, strict=True)])
        first, last = extents.low.T[1:], extents.high.T[1:]
        if (last < 0).any():
            raise ValueError("lesion ids skip a number: every label needs a lesion with voxels")
        centroids = (extents.sums[:, 1:] / np.asarray(lesions.n_voxels)[only - 1]).T
    start = np.array(box.start)
    corners = zip((first + start).tolist(), (last + start + 1).tolist(), strict=True)
    boxes: list[Box] = [
        (slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2]))
        for low, high in corners
    ]
    return centroids + start, boxes

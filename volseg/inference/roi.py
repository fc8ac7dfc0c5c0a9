"""The coarse first pass: find the region of a scan to which the fine pass is restricted."""

from __future__ import annotations

import numpy as np

from volseg.inference.backend import Backend
from volseg.inference.stream import Planes, Tiling, predict_slabs
from volseg.volume import BoundingBox


def find_region(planes: Planes, backend: Backend, tiling: Tiling) -> BoundingBox | None:
    """Return the box of all voxels that a two-class network assigns to class 1; None if none."""
    starts, stops = [], []
    first = np.zeros(3, int)  # first voxel of a slab in the volume
    for slab in predict_slabs(planes, backend, tiling, n_classes=2):
        box = BoundingBox.around((slab[1] > slab[0]).cpu().numpy())
        if box is not None:
            starts.append(first + box.start)
            stops.append(first + box.stop)
        first[planes.axis] += slab.shape[1 + planes.axis]
    if not starts:
        return None
    r, a, s = np.min(starts, axis=0).tolist()
    r_stop, a_stop, s_stop = np.max(stops, axis=0).tolist()
    return BoundingBox((r, a, s), (r_stop, a_stop, s_stop))

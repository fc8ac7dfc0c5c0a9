"""The coarse first pass: where a scan holds anything at all, so that the fine pass is run only there."""

from __future__ import annotations

import numpy as np

from volseg.infer.backends import Backend
from volseg.infer.stream import Planes, Tiling, predict_slabs
from volseg.volume import BoundingBox


def find_region(planes: Planes, backend: Backend, tiling: Tiling) -> BoundingBox | None:
    """The box of all voxels that a network of two classes takes for the second; None where there is none."""
    starts, stops = [], []
    first = np.zeros(3, int)  # voxel of the volume with which a slab begins
    for slab in predict_slabs(planes, backend, tiling, n_classes=2):
        box = BoundingBox.around((slab[1] > slab[0]).cpu().numpy())
        if box is not None:
            starts.append(first + box.start)
            stops.append(first + box.stop)
        first[planes.axis] += slab.shape[1 + planes.axis]
    if not starts:
        return None
    (r, a, s), (r_stop, a_stop, s_stop) = (
        np.min(starts, axis=0).tolist(),
        np.max(stops, axis=0).tolist(),
    )
    return BoundingBox((r, a, s), (r_stop, a_stop, s_stop))

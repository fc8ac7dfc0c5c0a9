"""Whether a scan's intensities are saturated, which no header shows."""

from __future__ import annotations

import numpy as np

from volseg.io.header import ScanWarning
from volseg.volume import Volume, slabs_of

CLIPPED_FRACTION = 0.05


def intensity_warnings(volume: Volume) -> tuple[ScanWarning, ...]:
    """Return a warning if the intensities are saturated, which no header shows."""
    array = volume.array
    highest = np.fmax.reduce(array, axis=None)
    n_clipped = sum(np.count_nonzero(array[part] == highest) for part in slabs_of(array))
    clipped = n_clipped / array.size
    if clipped <= CLIPPED_FRACTION:
        return ()
    text = f"{clipped:.0%} of the voxels have the largest value, {highest:g}"
    return (ScanWarning("W_CLIP", text),)

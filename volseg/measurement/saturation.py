"""Whether a scan's intensities are saturated, which no header shows."""

from __future__ import annotations

import numpy as np

from volseg.io.header import ScanWarning
from volseg.volume import Volume, slabs_of

CLIPPED_FRACTION = 0.05


def clipped_fraction(volume: Volume) -> float:
    """Return the fraction of the voxels that have the largest value, 0 to 1."""
    array = volume.array
    highest = np.fmax.reduce(array, axis=None)
    return sum(np.count_nonzero(array[part] == highest) for part in slabs_of(array)) / array.size


def intensity_warnings(volume: Volume) -> tuple[ScanWarning, ...]:
    """Return a warning if the intensities are saturated, which no header shows."""
    clipped = clipped_fraction(volume)
    if clipped <= CLIPPED_FRACTION:
        return ()
    highest = np.fmax.reduce(volume.array, axis=None)
    text = f"{clipped:.0%} of the voxels have the largest value, {highest:g}"
    return (ScanWarning("W_CLIP", text),)

"""Whether the field of view cuts the object, seen at the sides of the grid."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from volseg.measurement.units import sampled_grid
from volseg.preprocessing.crop import body_threshold
from volseg.volume import Volume

BODY_ABOVE_HU = -500.0
SIDES = ("LR", "PA", "IS")  # first and last voxel along each canonical axis


@dataclass(frozen=True, slots=True)
class Border:
    """Which part of each side of the grid, beside the slices, is object: `L`, `R` and so on."""

    shares: dict[str, float]

    @property
    def largest(self) -> float | None:
        return max(self.shares.values(), default=None)

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.shares.values()))) if self.shares else 0.0

    def sides_over(self, share: float) -> str:
        """Return the sides of which more than this part is object, such as `L R`."""
        return " ".join(side for side, value in self.shares.items() if value > share)


def judge_border(scan: Volume, axis: int, *, is_hu: bool) -> Border:
    """Measure how much of each side is object; not along the axis of the slices.

    Slices end within the patient, so those sides are always cut.

    Args:
        axis: canonical axis of the slices. is_hu: the object is what is above -500 HU, otherwise
            above a tenth of the 99th percentile of the intensities.
    """
    canonical, above = scan.canonical(), background_below(scan, is_hu=is_hu)
    shares = {}
    for across in side_axes(canonical, axis):
        for end, side in zip((0, -1), SIDES[across], strict=True):
            face = canonical.intensities(face_of(canonical.array, across, end))
            shares[side] = float((face > above).mean())
    return Border(shares)


def side_axes(canonical: Volume, axis: int) -> list[int]:
    """Return the canonical axes whose ends are sides: not that of slices, nor one of a voxel."""
    return [n for n in range(3) if n != axis and canonical.array.shape[n] > 1]


def face_of(array: np.ndarray, across: int, end: int) -> np.ndarray:
    """Return the first (0) or last (-1) slice of an array across an axis."""
    return array[(slice(None),) * across + (end,)]


def background_below(scan: Volume, *, is_hu: bool) -> float:
    """Return the intensity that tells object from background."""
    if is_hu:
        return BODY_ABOVE_HU
    sample = np.nan_to_num(sampled_grid(scan.canonical().array))
    return body_threshold(sample, scan.slope, scan.intercept)

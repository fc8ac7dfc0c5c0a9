"""Intensities of a scan, from a regular grid of its voxels: their spread, and whether they are HU.

Every share is that of the sampled voxels, about 262 000 of a large scan.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from volseg.measurement.units import (
    MAX_LEVELS_OF_DRAWING,
    contradiction,
    looks_like_ct,
    sampled_grid,
)
from volseg.quality.border import BODY_ABOVE_HU, face_of, side_axes
from volseg.quality.slices import padding_of
from volseg.recipe import HU
from volseg.volume import Volume

HU_RANGE = (-1200.0, 3071.0)  # of 12 bits from -1024, and the noise of air below it
MISSING_INTERCEPT = -1024.0  # which stored values of CT lack before they are HU
AIR_HU = (-1100.0, -800.0)  # of voxels at the sides that count as air around the patient
SOFT_HU = 200.0  # magnitude of the HU of fat, water and soft tissue
MIN_AIR = 0.05  # of the voxels at the sides; fewer may be lung or a mattress


@dataclass(frozen=True, slots=True, kw_only=True)
class Intensities:
    """Facts about intensities; None if unknown.

    Args:
        lowest, median, highest: of the sample.
        most_common: share of the most frequent value.
        whole_numbers: share of whole numbers.
        is_drawing: at most 15 values, as a mask or drawing has.
        looks_like_ct: it holds air in HU; False if it cannot be HU; None if either may be.
        not_hu: why it cannot be HU; empty if it can.
        lacks_intercept: it would look like CT if 1024 were subtracted.
        in_hu_range: share of -1200 to 3071, without padding.
        air_hu: median of the air at the sides.
    """

    lowest: float
    median: float
    highest: float
    most_common: float
    whole_numbers: float
    is_drawing: bool
    looks_like_ct: bool | None
    not_hu: str
    lacks_intercept: bool
    in_hu_range: float
    air_hu: float | None


def judge_intensities(scan: Volume, axis: int) -> Intensities:
    """Return facts about the intensities of a scan; the same for all 48 axis orders.

    Args:
        axis: canonical axis of the slices.
    """
    stored = sampled_grid(scan.canonical().array)
    stored = stored[np.isfinite(stored)] if stored.dtype.kind == "f" else stored.ravel()
    values, counts = np.unique(scan.intensities(stored), return_counts=True)
    shares = counts / counts.sum()
    not_hu, is_ct = contradiction(scan, HU), looks_like_ct(scan)
    is_drawing = values.size <= MAX_LEVELS_OF_DRAWING
    return Intensities(
        lowest=float(values[0]),
        median=float(values[np.searchsorted(np.cumsum(shares), 0.5)]),
        highest=float(values[-1]),
        most_common=float(shares.max()),
        whole_numbers=float(shares[values == np.rint(values)].sum()),
        is_drawing=is_drawing,
        looks_like_ct=is_ct or (False if not_hu else None),
        not_hu=not_hu,
        lacks_intercept=not is_ct and not is_drawing and _lacks_intercept(scan, values, counts),
        in_hu_range=_in_hu_range(scan, values, counts),
        air_hu=_air_hu(scan, axis),
    )


def _lacks_intercept(scan: Volume, values: np.ndarray, counts: np.ndarray) -> bool:
    """Check whether 1024 less makes a CT: air at -1000, and what is denser mostly soft tissue."""
    shifted = replace(scan, intercept=scan.intercept + MISSING_INTERCEPT)
    is_dense = values + MISSING_INTERCEPT > BODY_ABOVE_HU
    is_soft = np.abs(values + MISSING_INTERCEPT) < SOFT_HU
    return bool(2 * counts[is_soft].sum() > counts[is_dense].sum()) and looks_like_ct(shifted)


def _in_hu_range(scan: Volume, values: np.ndarray, counts: np.ndarray) -> float:
    padding = padding_of(scan)
    if padding is not None and float(scan.intensities(np.array(padding))) < AIR_HU[0]:
        values, counts = values[1:], counts[1:]
    inside = (values >= HU_RANGE[0]) & (values <= HU_RANGE[1])
    return float(counts[inside].sum() / max(1, counts.sum()))


def _air_hu(scan: Volume, axis: int) -> float | None:
    """Return the median of the air at the sides of the grid; None if there is too little."""
    canonical = scan.canonical()
    faces = [
        np.asarray(canonical.intensities(face_of(canonical.array, across, end)), np.float64)
        for across in side_axes(canonical, axis)
        for end in (0, -1)
    ]
    values = np.concatenate([face.ravel() for face in faces]) if faces else np.empty(0)
    air = values[(values >= AIR_HU[0]) & (values <= AIR_HU[1])]
    return float(np.median(air)) if air.size > MIN_AIR * values.size else None

"""The unit of a scan's intensities: stated, guessed or contradicted. Every command asks here."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from volseg.preprocess.crop import AxisOrder, to_canonical
from volseg.recipe import ARBITRARY, HU, SUV, unit_named
from volseg.volume import Volume

# Codes of the warnings that a unit or a model's training scans give rise to.
MODALITY, UNIT, SPACING, FIELD_OF_VIEW, SLICES = (
    "W_MODALITY",
    "W_UNIT",
    "W_SPACING",
    "W_FOV",
    "W_SLICES",
)
UNLIKE = (MODALITY, SPACING, FIELD_OF_VIEW, SLICES)  # of a scan unlike the training scans
CODES = (*UNLIKE, UNIT)

SAMPLED = 2**18  # voxels of a scan that are looked at

# A fill value is that of many voxels, while hardly any voxel has a value near it. Where a padded
# scan was resampled, the voxels beside it are a mixture. A drawing has few values, none a fill.
MOST_LEVELS_OF_DRAWING = 15
FILL_VOXELS, FILL_RATIO, FILL_REACH = 8, 5, 0.01  # of the range of intensities
BESIDE_FILL = 2  # voxels
LEAST_CONTENT = 256  # voxels; of less nothing is said
LEAST_AWAY = (
    0.25  # of them, or the scan has too few slices to leave out what is beside a fill value
)

# Water is 0 HU, fat about -100, air -1000; only bone, contrast agent and metal are over 500.
AIR_BELOW_HU, AIR_SHARE = -200.0, 0.01  # less may be an interpolated edge
AIR_HU = (-1100.0, -900.0)
LOW_PERCENTILE, LOW_HU = 0.1, -5.0  # noise alone brings a thousandth of water or brain below
RINGING = 0.05  # of the 99.5 percentile: how far cubic interpolation overshoots below 0
DENSE_ABOVE_HU, DENSE_SHARE = 500.0, 0.3
VOID_SHARE = 0.1  # of voxels below air

# An SUV of 1 is the mean of the body by definition.
SUV_MEDIAN, SUV_P95, SUV_BELOW, SUV_NEGATIVE_SHARE = 20.0, 100.0, -1.0, 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """The unit of a scan's intensities, and why numbers that need it must not be made.

    Args:
        name: as in the column `intensity_unit`; a.u. where what was stated is contradicted.
        doubt: a sentence; empty where the unit was stated and nothing contradicts it.
        is_contradicted: the unit was stated, and the intensities cannot be in it.
    """

    name: str
    doubt: str = ""
    is_contradicted: bool = False

    @property
    def is_hu(self) -> bool:
        """Whether density, mass and calcium may be taken: HU, stated and not contradicted."""
        return self.name == HU and not self.doubt


def warnings_in(text: str) -> list[tuple[str, str]]:
    """(code, sentence) of each of a scan's warnings, as cases.csv holds them."""
    parts = re.split(r"; (?=W_[A-Z]+: )", text)
    return [(code, sentence) for code, _, sentence in (part.partition(": ") for part in parts)]


def doubt_of(warnings: str) -> str:
    """Why the unit of a scan with these warnings is in doubt; empty where it is not."""
    return next(
        (sentence for code, sentence in warnings_in(warnings) if code in (UNIT, MODALITY)), ""
    )


def shown_unit(name: str, *, is_doubted: bool) -> str:
    """The unit as pictures and pages write it after a number: with a mark where it is in doubt."""
    return f"{name} (in doubt)" if is_doubted and name != ARBITRARY else name


class _Content(NamedTuple):
    """Finite intensities, (N,), that were not filled in, and those of them away from what was."""

    inside: np.ndarray
    away: np.ndarray


def judge_unit(scan: Volume, stated: str | None, *, by: str = "--unit") -> Unit:
    """The unit of a scan's intensities; the same for all 48 axis orders.

    Args:
        stated: HU, SUV, a.u. or any other name; None has it guessed.
        by: who stated it, for the sentence of doubt.

    Raises:
        ValueError: what was stated is almost one of the first three.
    """
    if stated is None:
        return _guess(scan)
    name = unit_named(stated)
    reason = contradiction(scan, name)
    if not reason:
        return Unit(name=name)
    return Unit(name=ARBITRARY, doubt=f"{by} states {name}, but {reason}", is_contradicted=True)


def contradiction(scan: Volume, unit: str) -> str:
    """Why the intensities of a scan cannot be in this unit; empty where they can be."""
    check = CONTRADICTIONS.get(unit)
    return "" if check is None else check(_content(_sample(scan)))


def looks_like_ct(scan: Volume) -> bool:
    """Whether a scan holds air or lung in HU, and nothing contradicts HU."""
    sample = _sample(scan)
    return not not_hu(_content(sample)) and _holds_air(sample)


def robust_range(scan: Volume) -> tuple[float, float]:
    """The 0.5 and 99.5 percentiles of the finite intensities; NaN twice where there are none."""
    away = _content(_sample(scan)).away
    if not away.size:
        return math.nan, math.nan
    low, high = np.percentile(away, (0.5, 99.5))
    return float(low), float(high)


def _guess(scan: Volume) -> Unit:
    sample = _sample(scan)
    reason = not_hu(_content(sample))
    if not reason and _holds_air(sample):
        reason = (
            f"{AIR_SHARE:.0%} of the voxels or more are below {AIR_BELOW_HU:g}, so HU is a guess"
        )
        return Unit(name=HU, doubt=f"no --unit given; {reason}: pass --unit HU if it is correct")
    reason = reason or f"few voxels are below {AIR_BELOW_HU:g}"
    return Unit(name=ARBITRARY, doubt=f"no --unit given, and it does not look like HU: {reason}")


def _holds_air(sample: np.ndarray) -> bool:
    """Whether enough voxels are as dark as air; of a CT what fills its margins counts too."""
    below = np.count_nonzero(sample < AIR_BELOW_HU)
    return bool(below >= AIR_SHARE * np.count_nonzero(np.isfinite(sample)))


def not_hu(content: _Content) -> str:
    """Why intensities cannot be the HU of a patient; empty where they can."""
    values = content.inside
    constant = _constant(values)
    if constant:
        is_air = values.size > 0 and AIR_HU[0] <= values[0] <= AIR_HU[1]
        return "" if is_air else constant
    low, high = np.percentile(content.away, (LOW_PERCENTILE, 99.5))
    if low > min(LOW_HU, -RINGING * high):
        return f"there is neither air nor fat: the voxels range from {low:.4g} to {high:.4g}{_offset(values)}"
    dense = np.count_nonzero(values > DENSE_ABOVE_HU) / values.size
    if dense > DENSE_SHARE:
        return f"{dense:.0%} of the voxels are over {DENSE_ABOVE_HU:g}, as only bone and metal are{_offset(values)}"
    void = np.count_nonzero(values < AIR_HU[0]) / values.size
    if void > VOID_SHARE:
        return (
            f"{void:.0%} of the voxels are below {AIR_HU[0]:g}, but nothing is below air at -1000"
        )
    return ""


def not_suv(content: _Content) -> str:
    """Why intensities cannot be standardised uptake values; empty where they can."""
    values = content.away
    constant = _constant(values)
    if constant:
        return constant
    negative = np.count_nonzero(values < SUV_BELOW) / values.size
    if negative > SUV_NEGATIVE_SHARE:
        return f"{negative:.0%} of the voxels are below {SUV_BELOW:g}, but uptake is never negative"
    median, p95 = np.percentile(values, (50, 95))
    if median > SUV_MEDIAN or p95 > SUV_P95:
        return f"the median is {median:.4g} and the 95th percentile {p95:.4g}, but the body has a mean SUV of 1"
    return ""


def _constant(values: np.ndarray) -> str:
    if not values.size:
        return "no voxel is finite"
    return (
        f"every voxel has the same value, {values.min():.4g}"
        if values.min() == values.max()
        else ""
    )


def _offset(values: np.ndarray) -> str:
    """A hint at what went wrong, where it can be seen."""
    return "; is the rescale intercept missing?" if np.median(values) > DENSE_ABOVE_HU else ""


def _content(sample: np.ndarray) -> _Content:
    """What of a sample is the scan's own: no fill value, nor, where enough is left, beside one."""
    is_finite = np.isfinite(sample)
    is_fill = _fills(sample, is_finite)
    inside = sample[is_finite & ~is_fill]
    if inside.size < LEAST_CONTENT:
        inside = sample[is_finite]
        return _Content(inside, inside)
    away = inside
    if is_fill.any():
        is_beside = np.asarray(ndimage.maximum_filter(is_fill, size=2 * BESIDE_FILL + 1), bool)
        away = sample[is_finite & ~is_beside]
    is_enough = away.size >= max(LEAST_CONTENT, LEAST_AWAY * inside.size)
    return _Content(inside, away if is_enough else inside)


def _fills(sample: np.ndarray, is_finite: np.ndarray) -> np.ndarray:
    """Where (like the sample) a value is that stands alone: many voxels have it, few one near."""
    is_fill = np.zeros(sample.shape, bool)
    values = sample[is_finite]
    levels, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    if levels.size <= MOST_LEVELS_OF_DRAWING:
        return is_fill
    low, high = np.percentile(values, (0.5, 99.5))
    reach = max(FILL_REACH * (high - low), float(np.median(np.diff(levels))))
    below = np.concatenate([[0], np.cumsum(counts)])
    first, stop = (
        np.searchsorted(levels, levels - reach),
        np.searchsorted(levels, levels + reach, "right"),
    )
    n_near = below[stop] - below[first] - counts
    is_fill[is_finite] = ((counts >= FILL_VOXELS) & (counts >= FILL_RATIO * n_near))[places.ravel()]
    return is_fill


def _sample(scan: Volume) -> np.ndarray:
    """(I, J, K) intensities of a regular grid of about `SAMPLED` voxels; all of a small scan."""
    array = to_canonical(scan.array, AxisOrder.of(scan.geometry))
    step = max(1, math.floor((array.size / SAMPLED) ** (1 / 3)))
    steps = [step if n >= 8 * step else 1 for n in array.shape]  # of a few slices each is looked at
    return np.asarray(scan.intensities(array[:: steps[0], :: steps[1], :: steps[2]]), np.float64)


CONTRADICTIONS = {HU: not_hu, SUV: not_suv}

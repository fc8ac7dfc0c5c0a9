"""Unit of a scan's intensities: stated, guessed or contradicted. All commands use this module."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from volseg.errors import CODE_NAME
from volseg.recipe import ARBITRARY, HU, SUV, parse_unit
from volseg.volume import Volume

# Codes of warnings about the unit, and about a scan unlike the model's training scans.
UNIT = "W_UNIT"
MODALITY, SPACING, FIELD_OF_VIEW, SLICES = "W_MODALITY", "W_SPACING", "W_FOV", "W_SLICES"
UNLIKE = (MODALITY, SPACING, FIELD_OF_VIEW, SLICES)
CODES = (*UNLIKE, UNIT)

SAMPLED = 2**18  # voxels of a scan that are sampled

# Many voxels have a fill value, and hardly any a value near it. If a padded scan was resampled, the
# voxels beside the padding are a mixture. A drawing has few values, none of them a fill value.
MAX_LEVELS_OF_DRAWING = 15
FILL_VOXELS, FILL_RATIO = 8, 5
FILL_REACH = 0.01  # fraction of the intensity range
BESIDE_FILL = 2  # voxels
LEAST_CONTENT = 256  # voxels; with fewer, fill values are not left out
LEAST_AWAY = 0.25  # fraction of the voxels; below it, voxels beside a fill value are kept

# Water is 0 HU, fat about -100, air -1000; only bone, contrast agent and metal are over 500.
AIR_BELOW_HU, AIR_FRACTION = -200.0, 0.01  # fewer voxels may be an interpolated edge
AIR_HU = (-1100.0, -900.0)
LOW_PERCENTILE, LOW_HU = 0.1, -5.0  # noise alone brings a thousandth of water or brain below
RINGING = 0.05  # undershoot below 0 of cubic interpolation, as a fraction of the 99.5 percentile
DENSE_ABOVE_HU, DENSE_FRACTION = 500.0, 0.3
VOID_FRACTION = 0.1  # of voxels below air

# By definition the body has a mean SUV of 1.
SUV_MEDIAN, SUV_P95, SUV_BELOW, SUV_NEGATIVE_FRACTION = 20.0, 100.0, -1.0, 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Unit of a scan's intensities, and why numbers that depend on it must not be computed.

    Args:
        name: as in the column `intensity_unit`; a.u. if the stated unit is contradicted.
        doubt: a sentence; empty if the unit was stated and nothing contradicts it.
        is_contradicted: a unit was stated, but the intensities cannot be in it.
    """

    name: str
    doubt: str = ""
    is_contradicted: bool = False

    @property
    def is_hu(self) -> bool:
        """True if density, mass and calcium may be computed: HU, stated and not contradicted."""
        return self.name == HU and not self.doubt

    @property
    def is_suv(self) -> bool:
        """True if uptake may be computed: SUV, stated and not contradicted."""
        return self.name == SUV and not self.doubt


def warnings_in(text: str | None) -> list[tuple[str, str]]:
    """Split a `warnings` cell, of cases.csv for example, into (code, sentence) pairs."""
    parts = re.split(rf"; (?=[NW]{CODE_NAME}: )", text) if text else []
    return [(code, sentence) for code, _, sentence in (part.partition(": ") for part in parts)]


def unit_doubt_in(warnings: str) -> str:
    """Return why these warnings put the unit of a scan in doubt; empty if they do not."""
    return next((text for code, text in warnings_in(warnings) if code in (UNIT, MODALITY)), "")


def shown_unit(name: str, *, is_doubted: bool) -> str:
    """Return the unit as figures and pages show it after a number, marked if it is in doubt."""
    return f"{name} (in doubt)" if is_doubted and name != ARBITRARY else name


class _Content(NamedTuple):
    """Finite intensities (N,) that are no fill value, and those of them away from fill values."""

    inside: np.ndarray
    away: np.ndarray


def judge_unit(scan: Volume, stated: str | None, *, by: str = "--unit") -> Unit:
    """Return the unit of a scan's intensities; the same for all 48 axis orders.

    Args:
        stated: HU, SUV, a.u. or any other name; None: that which the file proves, else guess it.
        by: who stated it, for the sentence of doubt.

    Raises:
        ValueError: `stated` is a misspelling of HU, SUV or a.u.
    """
    if stated is None and scan.unit:
        stated, by = scan.unit, "the header"
    if stated is None:
        return _guess(scan)
    name = parse_unit(stated)
    reason = contradiction(scan, name)
    if not reason and scan.unit not in ("", name):
        reason = f"the scan was converted to {scan.unit}"
    if not reason:
        return Unit(name=name)
    return Unit(name=ARBITRARY, doubt=f"{by} states {name}, but {reason}", is_contradicted=True)


def contradiction(scan: Volume, unit: str) -> str:
    """Return why the intensities of a scan cannot be in this unit; empty if they can."""
    check = CONTRADICTIONS.get(unit)
    return "" if check is None else check(_content(_sample(scan)))


def looks_like_ct(scan: Volume) -> bool:
    """Check whether a scan contains air or lung in HU and nothing contradicts HU."""
    sample = _sample(scan)
    return not not_hu(_content(sample)) and _holds_air(sample)


def robust_range(scan: Volume) -> tuple[float, float]:
    """Return the 0.5 and 99.5 percentiles of the finite intensities; NaN if there are none."""
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
            f"{AIR_FRACTION:.0%} of the voxels or more are below {AIR_BELOW_HU:g}, so HU is a guess"
        )
        return Unit(name=HU, doubt=f"no --unit given; {reason}: pass --unit HU if it is correct")
    reason = reason or f"few voxels are below {AIR_BELOW_HU:g}"
    doubt = (
        f"no --unit given, and the intensities do not look like HU: {reason}; pass --unit, such as "
        "a.u. for MR or SUV for PET"
    )
    return Unit(name=ARBITRARY, doubt=doubt)


def _holds_air(sample: np.ndarray) -> bool:
    """Check whether enough voxels are as dark as air; the padding of a CT counts too."""
    below = np.count_nonzero(sample < AIR_BELOW_HU)
    return bool(below >= AIR_FRACTION * np.count_nonzero(np.isfinite(sample)))


def not_hu(content: _Content) -> str:
    """Return why intensities cannot be the HU of a patient; empty if they can."""
    values = content.inside
    constant = _constant(values)
    if constant:
        is_air = values.size > 0 and AIR_HU[0] <= values[0] <= AIR_HU[1]
        return "" if is_air else constant
    low, high = np.percentile(content.away, (LOW_PERCENTILE, 99.5))
    if low > min(LOW_HU, -RINGING * high):
        between = f"{LOW_PERCENTILE:g} to 99.5 percentile: {low:.4g} to {high:.4g}"
        return f"there is neither air nor fat ({between}){_offset(values)}"
    dense = np.count_nonzero(values > DENSE_ABOVE_HU) / values.size
    if dense > DENSE_FRACTION:
        over = f"{dense:.0%} of the voxels are over {DENSE_ABOVE_HU:g}"
        return f"{over}, as only bone and metal are{_offset(values)}"
    void = np.count_nonzero(values < AIR_HU[0]) / values.size
    if void > VOID_FRACTION:
        below = f"{void:.0%} of the voxels are below {AIR_HU[0]:g}"
        return f"{below}, darker than air at -1000"
    return ""


def not_suv(content: _Content) -> str:
    """Return why intensities cannot be standardised uptake values; empty if they can."""
    values = content.away
    constant = _constant(values)
    if constant:
        return constant
    negative = np.count_nonzero(values < SUV_BELOW) / values.size
    if negative > SUV_NEGATIVE_FRACTION:
        return f"{negative:.0%} of the voxels are below {SUV_BELOW:g}; uptake is never negative"
    median, p95 = np.percentile(values, (50, 95))
    if median > SUV_MEDIAN or p95 > SUV_P95:
        percentiles = f"the median is {median:.4g} and the 95th percentile {p95:.4g}"
        return f"{percentiles}; the body has a mean SUV of 1"
    return ""


def _constant(values: np.ndarray) -> str:
    if not values.size:
        return "no voxel is finite"
    low = values.min()
    return f"every voxel has the same value, {low:.4g}" if low == values.max() else ""


def _offset(values: np.ndarray) -> str:
    """Return a hint at the likely cause, if there is one."""
    return (
        "; perhaps the rescale intercept is missing" if np.median(values) > DENSE_ABOVE_HU else ""
    )


def _content(sample: np.ndarray) -> _Content:
    """Return the intensities of a sample without fill values, and without voxels beside them."""
    is_finite = np.isfinite(sample)
    is_fill = _fills(sample, is_finite)
    inside = sample[is_finite & ~is_fill]
    if inside.size < LEAST_CONTENT:
        finite = sample[is_finite]
        return _Content(finite, finite)
    away = inside
    if is_fill.any():
        is_beside = np.asarray(ndimage.maximum_filter(is_fill, size=2 * BESIDE_FILL + 1), bool)
        away = sample[is_finite & ~is_beside]
    is_enough = away.size >= max(LEAST_CONTENT, LEAST_AWAY * inside.size)
    return _Content(inside, away if is_enough else inside)


def _fills(sample: np.ndarray, is_finite: np.ndarray) -> np.ndarray:
    """Return a mask of isolated values: many voxels have them, few have a value near."""
    is_fill = np.zeros(sample.shape, bool)
    values = sample[is_finite]
    levels, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    if levels.size <= MAX_LEVELS_OF_DRAWING:
        return is_fill
    low, high = np.percentile(values, (0.5, 99.5))
    reach = max(FILL_REACH * (high - low), float(np.median(np.diff(levels))))
    below = np.concatenate([[0], np.cumsum(counts)])
    first = np.searchsorted(levels, levels - reach)
    stop = np.searchsorted(levels, levels + reach, "right")
    n_near = below[stop] - below[first] - counts
    is_fill[is_finite] = ((counts >= FILL_VOXELS) & (counts >= FILL_RATIO * n_near))[places.ravel()]
    return is_fill


def _sample(scan: Volume) -> np.ndarray:
    """Return the intensities of `sampled_grid`."""
    return np.asarray(scan.intensities(sampled_grid(scan.canonical().array)), np.float64)


def sampled_grid(array: np.ndarray) -> np.ndarray:
    """Return a view on a regular grid of about `SAMPLED` voxels of (R, A, S); all of few."""
    step = max(1, math.floor((array.size / SAMPLED) ** (1 / 3)))
    r, a, s = (step if n >= 8 * step else 1 for n in array.shape)  # keep all of a few slices
    return array[::r, ::a, ::s]


CONTRADICTIONS = {HU: not_hu, SUV: not_suv}

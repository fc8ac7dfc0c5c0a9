"""Confidence intervals over patients that keep their coverage even for few patients."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

FEWEST_PATIENTS = 5  # with fewer, the variance between patients is too uncertain
LEVEL = 0.95
ANY_NUMBER = (-math.inf, math.inf)
ROUNDING = 1e-9  # relative to the largest value; patients that differ by less are equal


@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence interval, or the reason why there is none.

    Args:
        low, high: its ends; NaN without an interval.
        reason: why there is no interval; empty if there is one.
    """

    low: float = math.nan
    high: float = math.nan
    reason: str = ""

    @property
    def ends(self) -> tuple[float, float] | None:
        """Lower and upper end; None without an interval."""
        return None if self.reason else (self.low, self.high)


def mean_interval(
    values: Sequence[float],
    patients: Sequence[Hashable],
    *,
    groups: Sequence[Hashable] | None = None,
    bounds: tuple[float, float] = ANY_NUMBER,
) -> Interval:
    """Return the 95 % interval of a mean, by a jackknife that leaves out whole patients.

    Two scans of one patient are not two samples, so the patient is the unit.

    Args:
        values: (N,) one per scan or lesion; NaN is left out.
        patients: (N,) the patient of each value.
        groups: (N,) the group of each value, such as its label, for a mean of group means.
        bounds: smallest and largest possible value of the metric; the interval stays inside.
    """
    groups = [None] * len(values) if groups is None else groups
    rows = [row for row in zip(values, patients, groups, strict=True) if not math.isnan(row[0])]
    of_patient = numbered([patient for _, patient, _ in rows])
    of_group = numbered([group for *_, group in rows])
    n_patients = 1 + int(of_patient.max(initial=-1))
    if n_patients < FEWEST_PATIENTS:
        return Interval(reason=too_few(n_patients))
    sums = np.zeros((n_patients, of_group.max() + 1))
    counts = np.zeros_like(sums)
    np.add.at(sums, (of_patient, of_group), [value for value, *_ in rows])
    np.add.at(counts, (of_patient, of_group), 1)
    estimate = _mean_of_means(sums.sum(axis=0), counts.sum(axis=0))
    without_one = _mean_of_means(sums.sum(axis=0) - sums, counts.sum(axis=0) - counts)
    return jackknife_interval(float(estimate), without_one, bounds=bounds)


def jackknife_interval(
    estimate: float, without_one: np.ndarray, *, bounds: tuple[float, float] = ANY_NUMBER
) -> Interval:
    """Return the 95 % interval of an estimate from its values without each patient in turn.

    Each end is the wider of two: Student's t, and t after Hall's transformation, which removes the
    bias from skewness, such as that of Dice values near 1. If all patients are equal at a bound,
    as with a sensitivity of 1, the interval is the exact one of Clopper and Pearson, with each
    patient as one success. benchmarks/intervals.py simulates the coverage.

    Args:
        without_one: (N,) the estimate without patient 1, 2, …, N.
        bounds: smallest and largest possible value of the estimate.

    Source: pseudo-values: Tukey, Ann Math Stat 29:614 (1958); transformation: Hall, J R Stat Soc B
        54:221 (1992); exact: Clopper and Pearson, Biometrika 26:404 (1934).
    """
    n = without_one.size
    if n < FEWEST_PATIENTS:
        return Interval(reason=too_few(n))
    pseudo = n * estimate - (n - 1) * without_one
    if not np.isfinite(pseudo).all():
        return Interval(reason="the value depends on a single patient")
    deviations = pseudo - pseudo.mean()
    if np.abs(deviations).max() <= ROUNDING * max(np.abs(pseudo).max(), abs(estimate)):
        return equal_patients_interval(estimate, n, bounds)
    standard_error = math.sqrt(float((deviations**2).sum()) / (n * (n - 1)))
    t = float(stdtrit(n - 1, (1 + LEVEL) / 2))
    skewness = _skewness(deviations)
    upper = max(t, _undo_hall(t, skewness, n))
    lower = min(-t, _undo_hall(-t, skewness, n))
    low, high = estimate - upper * standard_error, estimate - lower * standard_error
    return Interval(max(low, bounds[0]), min(high, bounds[1]))


def too_few(n_patients: int) -> str:
    """Return the reason why `n_patients` patients give no interval."""
    counted = f"{n_patients} patient{'' if n_patients == 1 else 's'}"
    return f"{counted}; an interval needs at least {FEWEST_PATIENTS}"


def _mean_of_means(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the (…,) mean over groups with a value, from (…, G) sums and counts of values."""
    has_value = counts > 0
    means = np.divide(sums, counts, out=np.zeros_like(sums), where=has_value)
    return means.sum(axis=-1) / has_value.sum(axis=-1)


def _skewness(deviations: np.ndarray) -> float:
    """Return the adjusted Fisher-Pearson skewness from deviations from the mean."""
    n = deviations.size
    skewness = float((deviations**3).mean() / (deviations**2).mean() ** 1.5)
    return skewness * math.sqrt(n * (n - 1)) / (n - 2)


def _undo_hall(quantile: float, skewness: float, n: int) -> float:
    """Return the t statistic that Hall's cubic transformation maps to this quantile.

    With s = skewness / √n it is g(t) = t + s t² / 3 + s² t³ / 27 + s / 6, which is increasing.
    """
    s = skewness / math.sqrt(n)
    if abs(s) < 1e-9:
        return quantile
    return 3 / s * float(np.cbrt(1 + s * (quantile - s / 6)) - 1)


def equal_patients_interval(value: float, n: int, bounds: tuple[float, float]) -> Interval:
    """Return the exact interval if all N patients are at a bound; none if equal elsewhere.

    If a fraction 1 − 0.025^(1/N) of all patients differs, N equal ones have a probability of 2.5 %.
    """
    low, high = bounds
    unseen = 1 - ((1 - LEVEL) / 2) ** (1 / n)
    if math.isfinite(high - low) and math.isclose(value, high, abs_tol=ROUNDING):
        return Interval(high - unseen * (high - low), high)
    if math.isfinite(high - low) and math.isclose(value, low, abs_tol=ROUNDING):
        return Interval(low, low + unseen * (high - low))
    reason = f"all {n} patients have the same value; how much others differ is unknown"
    return Interval(reason=reason)


def numbered(names: Sequence[Hashable]) -> np.ndarray:
    """Return (N,) the number of each name, counted from 0 in order of first appearance."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)

"""How sure a mean is: bootstrap over patients."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np

RESAMPLES = 2000


def bootstrap_interval(
    values: Sequence[float],
    patients: Sequence[Hashable],
    *,
    groups: Sequence[Hashable] | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """The interval that holds the mean with this probability, from resampling whole patients: two scans of one are no two samples.

    Args:
        values: one number per scan; NaN ones are left out.
        patients: whose scan it is.
        groups: where the mean is that of the means of groups, such as labels: to which each value belongs.

    Returns:
        Lower and upper end; NaN twice for fewer than two patients.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), the percentile interval.
    """
    groups = [None] * len(values) if groups is None else groups
    known = [row for row in zip(values, patients, groups, strict=True) if not math.isnan(row[0])]
    rows, columns = _numbered([patient for _, patient, _ in known]), _numbered([group for *_, group in known])
    if not known or rows.max() < 1:
        return math.nan, math.nan
    sums = np.zeros((rows.max() + 1, columns.max() + 1))
    counts = np.zeros_like(sums)
    np.add.at(sums, (rows, columns), [value for value, *_ in known])
    np.add.at(counts, (rows, columns), 1)
    drawn = resampled(len(sums), seed)
    totals, numbers = drawn @ sums, drawn @ counts
    # A group of which no patient was drawn says nothing about that resample.
    has = numbers > 0
    means = np.divide(totals, numbers, out=np.zeros_like(totals), where=has).sum(axis=1) / has.sum(axis=1)
    return ends(means, level)


def resampled(n_patients: int, seed: int = 0) -> np.ndarray:
    """(2000, n_patients): how often each patient is in each resample."""
    drawn = np.random.default_rng(seed).integers(n_patients, size=(RESAMPLES, n_patients))
    drawn += np.arange(RESAMPLES)[:, None] * n_patients
    return np.bincount(drawn.ravel(), minlength=RESAMPLES * n_patients).reshape(RESAMPLES, n_patients).astype(float)


def ends(found: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Where the middle share of what resamples gave begins and ends; NaN twice if one gave none."""
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _numbered(names: Sequence[Hashable]) -> np.ndarray:
    """(N,) number of each name, from 0 in the order in which they come."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)

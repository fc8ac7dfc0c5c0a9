"""How sure a mean is: bootstrap over patients."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np

RESAMPLES = 2000


def bootstrap_interval(
    values: Sequence[float], patients: Sequence[Hashable], *, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """The interval that holds the mean with this probability, from resampling whole patients: two scans of one are no two samples.

    Args:
        values: one number per scan; NaN ones are left out.
        patients: whose scan it is.

    Returns:
        Lower and upper end; NaN twice for fewer than two patients.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), the percentile interval.
    """
    grouped: dict[Hashable, list[float]] = {}
    for value, patient in zip(values, patients, strict=True):
        if not math.isnan(value):
            grouped.setdefault(patient, []).append(value)
    if len(grouped) < 2:
        return math.nan, math.nan
    sums = np.array([sum(group) for group in grouped.values()])
    counts = np.array([len(group) for group in grouped.values()])
    drawn = np.random.default_rng(seed).integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)

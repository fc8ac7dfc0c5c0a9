"""Axes of the plots on a page: linear, or logarithmic where the values are spread widely."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LOG_RATIO = 20.0  # of the largest to the smallest value from which an axis is logarithmic
MIN_JUDGED = 8  # values from which outliers are marked
FENCE = 1.5  # interquartile ranges beyond the quartiles; Tukey, Exploratory Data Analysis, 1977
OUTLIER_RULE = (
    f"Ringed: more than {FENCE} interquartile ranges beyond the quartiles on the plotted scale, "
    f"of {MIN_JUDGED} values or more"
)


@dataclass(frozen=True, slots=True)
class Scale:
    """Axis of a plot.

    Args:
        low, high: its ends; log₁₀ of them if `is_log`.
        ticks: (position between `low` and `high`, text).
    """

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    is_log: bool

    @classmethod
    def of(cls, values: Sequence[float], *, from_zero: bool = False) -> Scale:
        """Return the axis of finite values; logarithmic if all are > 0 and spread widely.

        Args:
            from_zero: a linear axis begins at 0.
        """
        low, high = float(min(values)), float(max(values))
        is_log = low > 0 and high / low >= LOG_RATIO
        if is_log:
            low, high = math.log10(low), math.log10(high)
        elif from_zero:
            low = min(low, 0.0)
        if high - low < 1e-9 * max(abs(low), abs(high), 1e-300):
            margin = abs(high) / 10 or 0.5
            low, high = low - margin, high + margin
        ticks = (_log_ticks if is_log else _ticks)(low, high)
        inside = [(value, text) for value, text in ticks if low <= value <= high]
        if len(inside) < 2:  # extend the axis to round numbers outside the range
            inside, low, high = ticks, min(low, ticks[0][0]), max(high, ticks[-1][0])
        return cls(low, high, inside, is_log)

    def scaled(self, value: float) -> float:
        return math.log10(value) if self.is_log else value

    def fraction(self, value: float) -> float:
        """Return where a value lies, from 0 at the low end to 1 at the high end."""
        return (self.scaled(value) - self.low) / (self.high - self.low)

    def unit_text(self, unit: str) -> str:
        return f"{unit}, log scale".removeprefix(", ") if self.is_log else unit

    def outliers(self, values: Sequence[float]) -> list[bool]:
        """Return which values are outliers by `OUTLIER_RULE`."""
        if len(values) < MIN_JUDGED:
            return [False] * len(values)
        scaled = np.array([self.scaled(value) for value in values])
        lower, upper = np.percentile(scaled, (25, 75))
        reach = FENCE * (upper - lower)
        return ((scaled < lower - reach) | (scaled > upper + reach)).tolist()


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Return four to eight round numbers that span `low` to `high`, as (value, text)."""
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [(n * step, f"{n * step:.6g}") for n in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Return powers of ten, over short ranges also 2 and 5 times them, as (log₁₀, text)."""
    factors = (1,) if high - low > 2.5 else (1, 2, 5)
    ticks = [
        (math.log10(factor) + power, f"{factor * 10.0**power:.6g}")
        for power in range(math.floor(low), math.ceil(high) + 1)
        for factor in factors
    ]
    below = max((value for value, _ in ticks if value <= low), default=ticks[0][0])
    above = min((value for value, _ in ticks if value >= high), default=ticks[-1][0])
    return [(value, text) for value, text in ticks if below <= value <= above]

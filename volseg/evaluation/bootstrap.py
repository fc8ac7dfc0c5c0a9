"""Bootstrap intervals over patients of any statistic of weighted cases, and of differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit

from volseg.evaluation.intervals import (
    ANY_NUMBER,
    FEWEST_PATIENTS,
    LEVEL,
    ROUNDING,
    Interval,
    equal_patients_interval,
    numbered,
    too_few,
)

N_RESAMPLES, SEED = 2000, 0
MOST_UNDEFINED = 0.05  # of the resamples, such as those without a case of a rare class
CHUNK_WEIGHTS = 200_000  # weights in memory at once: 1.6 MB, which a cache holds

# (B, n) weights of the cases, one row per resample → name of a statistic → (B,) values
Statistics = Callable[[np.ndarray], Mapping[str, np.ndarray]]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A statistic with its 95 % interval over patients; None if undefined.

    Args:
        interval: has a reason if there is none.
        p_value: two-sided, that the true value is 0; only for differences.
    """

    value: float | None
    interval: Interval
    p_value: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Resampling:
    """How patients are resampled.

    Args:
        n_resamples: number of resamples. seed: of the random choice.
        chunk_weights: largest number of weights in memory at once.
    """

    n_resamples: int = N_RESAMPLES
    seed: int = SEED
    chunk_weights: int = CHUNK_WEIGHTS

    def rows(self, of_patient: np.ndarray) -> Iterator[np.ndarray]:
        """Yield (b, n) weights: how often the patient of each case was drawn."""
        rng, n_patients = np.random.default_rng(self.seed), 1 + int(of_patient.max())
        step = max(1, self.chunk_weights // of_patient.size)
        for start in range(0, self.n_resamples, step):
            n_rows = min(step, self.n_resamples - start)
            draws = rng.integers(n_patients, size=(n_rows, n_patients))
            draws += n_patients * np.arange(n_rows)[:, None]
            counts = np.bincount(draws.ravel(), minlength=n_rows * n_patients)
            yield counts.reshape(n_rows, n_patients)[:, of_patient].astype(np.float64)

    def without_one(self, of_patient: np.ndarray) -> Iterator[np.ndarray]:
        """Yield (b, n) weights that leave out one patient after another."""
        n_patients = 1 + int(of_patient.max())
        step = max(1, self.chunk_weights // of_patient.size)
        for start in range(0, n_patients, step):
            numbers = np.arange(start, min(start + step, n_patients))
            yield (of_patient[None] != numbers[:, None]).astype(np.float64)


def bootstrap(
    statistics: Statistics,
    patients: Sequence[Hashable],
    *,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    n_relevant: Mapping[str, int] | None = None,
    resampling: Resampling | None = None,
) -> dict[str, Estimate]:
    """Return every statistic with its 95 % interval, by resampling whole patients.

    Each end is the wider of two: the BCa bootstrap, and Student's t with the standard error of the
    bootstrap, which keeps the coverage with few patients. If all patients are equal at a bound, as
    with an AUC of 1, the interval is the exact one of Clopper and Pearson with each relevant
    patient as one success.

    Args:
        statistics: returns the same names for all weights.
        patients: (n,) the patient of each case.
        bounds: name → smallest and largest possible value.
        n_relevant: name → number of patients on whom it depends, such as those with the rarer
            class for an AUC; all if not given.

    Returns:
        No interval for fewer than five patients, or if over 5 % of the resamples are undefined.

    Source: Efron, J Am Stat Assoc 82:171 (1987).
    """
    samples = _samples(statistics, numbered(patients), resampling or Resampling(), bounds or {})
    n_patients, n_relevant = len(set(patients)), n_relevant or {}
    return {
        name: Estimate(sample.known_value, sample.interval(n_patients, n_relevant.get(name)))
        for name, sample in samples.items()
    }


def bootstrap_difference(
    statistics: Statistics,
    others: Statistics,
    patients: Sequence[Hashable],
    *,
    resampling: Resampling | None = None,
) -> dict[str, Estimate]:
    """Return statistics − others, of two models on the same cases, with interval and p-value.

    Both models are judged on the same resamples, so that cases which are difficult for both do not
    widen the interval.

    Args:
        patients: (n,) the patient of each case.
    """

    def difference(weights: np.ndarray) -> dict[str, np.ndarray]:
        ours, theirs = statistics(weights), others(weights)
        return {name: ours[name] - theirs[name] for name in ours.keys() & theirs.keys()}

    samples = _samples(difference, numbered(patients), resampling or Resampling(), {})
    n_patients, estimates = len(set(patients)), {}
    for name, sample in samples.items():
        interval = sample.interval(n_patients)
        p_value = None if interval.reason else _p_value(sample.drawn)
        estimates[name] = Estimate(sample.known_value, interval, p_value)
    return estimates


def _samples(
    statistics: Statistics,
    of_patient: np.ndarray,
    resampling: Resampling,
    bounds: Mapping[str, tuple[float, float]],
) -> dict[str, _Sample]:
    """Return each statistic of all patients, of the resamples and without each patient."""
    whole = _evaluated(statistics, iter([np.ones((1, of_patient.size))]))
    drawn, left_out = {}, {}
    if of_patient.max(initial=-1) + 1 >= FEWEST_PATIENTS:
        drawn = _evaluated(statistics, resampling.rows(of_patient))
        left_out = _evaluated(statistics, resampling.without_one(of_patient))
    nothing = np.empty(0)
    return {
        name: _Sample(
            float(values[0]),
            drawn.get(name, nothing),
            left_out.get(name, nothing),
            bounds.get(name, ANY_NUMBER),
        )
        for name, values in whole.items()
    }


def _p_value(differences: np.ndarray) -> float:
    """Return the two-sided p-value that a difference is 0, from its resamples."""
    differences = differences[np.isfinite(differences)]
    fewer = min(np.count_nonzero(differences <= 0), np.count_nonzero(differences >= 0))
    return float(min(1.0, 2 * (1 + fewer) / (1 + differences.size)))


def _evaluated(statistics: Statistics, rows: Iterator[np.ndarray]) -> dict[str, np.ndarray]:
    parts = [statistics(weights) for weights in rows]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@dataclass(frozen=True, slots=True, eq=False)
class _Sample:
    """One statistic: of all patients, of the resamples and without each patient in turn."""

    value: float
    drawn: np.ndarray
    without_one: np.ndarray
    bounds: tuple[float, float]

    @property
    def known_value(self) -> float | None:
        """The value; None if it is undefined."""
        return self.value if math.isfinite(self.value) else None

    def interval(self, n_patients: int, n_relevant: int | None = None) -> Interval:
        """Return the 95 % interval, or the reason why there is none.

        Args:
            n_relevant: number of patients on whom the value depends; None: all.
        """
        if n_patients < FEWEST_PATIENTS:
            return Interval(reason=too_few(n_patients))
        if not math.isfinite(self.value):
            return Interval(reason="undefined")
        n_relevant = n_patients if n_relevant is None else n_relevant
        drawn = self.drawn[np.isfinite(self.drawn)]
        if drawn.size < (1 - MOST_UNDEFINED) * self.drawn.size:
            return Interval(reason="undefined in over 5 % of the resamples: too few such patients")
        scale = max(np.abs(drawn).max(), abs(self.value))
        if np.abs(drawn - self.value).max() <= ROUNDING * scale:
            return equal_patients_interval(self.value, n_relevant, self.bounds)
        low, high = self._bca(drawn)
        half = _student_95(n_relevant) * float(drawn.std(ddof=1))
        low, high = min(low, self.value - half), max(high, self.value + half)
        return Interval(max(low, self.bounds[0]), min(high, self.bounds[1]))

    def _bca(self, drawn: np.ndarray) -> tuple[float, float]:
        """Return bias-corrected and accelerated percentiles of the resamples."""
        below = np.count_nonzero(drawn < self.value) + np.count_nonzero(drawn == self.value) / 2
        bias = float(ndtri(np.clip(below / drawn.size, 1 / drawn.size, 1 - 1 / drawn.size)))
        deviations = self.without_one.mean() - self.without_one
        spread = float((deviations**2).sum()) if np.isfinite(deviations).all() else 0.0
        # Without a patient on whom the value depends it may be undefined: then no acceleration.
        acceleration = float((deviations**3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0
        ends = []
        for level in ((1 - LEVEL) / 2, (1 + LEVEL) / 2):
            shifted = bias + float(ndtri(level))
            share = float(ndtr(bias + shifted / (1 - acceleration * shifted)))
            ends.append(float(np.quantile(drawn, share)))
        return ends[0], ends[1]


def _student_95(n_patients: int) -> float:
    """Return the 97.5 % quantile of Student's t; of at least two patients."""
    return float(stdtrit(max(n_patients, 2) - 1, (1 + LEVEL) / 2))

"""Agreement of two sets of measurements: limits of agreement and correlation."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import nctdtrit, stdtrit

from volseg.evaluation.intervals import FEWEST_PATIENTS, Interval, jackknife_interval, too_few

Ends = tuple[float, float]
UNKNOWN: Ends = (math.nan, math.nan)
# standard deviations that hold the middle 95 % of a normal distribution
NORMAL_95 = 1.959963984540054
FEWEST = 3  # pairs; with fewer, every statistic is NaN


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Differences (predicted − reference) and correlations of N pairs, in their unit; NaN: unknown.

    Args:
        n, n_patients: number of pairs, and of the patients that they come from.
        bias: mean difference. sd: standard deviation of the differences, 1/(N − 1).
        lower_limit, upper_limit: bias ∓ 1.96 sd; 95 % of differences are expected between them.
        pearson: correlation r.
        concordance: Lin's ρ_c, which is below r if the pairs leave the line of identity.
        …_95: 95 % intervals. no_intervals: why some or all are unknown; empty if all are known.
    """

    n: int
    n_patients: int
    bias: float = math.nan
    bias_95: Ends = UNKNOWN
    sd: float = math.nan
    lower_limit: float = math.nan
    lower_limit_95: Ends = UNKNOWN
    upper_limit: float = math.nan
    upper_limit_95: Ends = UNKNOWN
    pearson: float = math.nan
    pearson_95: Ends = UNKNOWN
    concordance: float = math.nan
    concordance_95: Ends = UNKNOWN
    no_intervals: str = ""


def agreement(
    reference: Sequence[float] | np.ndarray,
    predicted: Sequence[float] | np.ndarray,
    patients: Sequence[Hashable],
) -> Agreement:
    """Return limits of agreement and correlations of paired measurements, with 95 % intervals.

    If each patient has one pair, the intervals of bias and limits are exact for normal differences.
    Otherwise the differences are not independent, and the intervals come from a jackknife over
    patients. Those of the correlations always do, on Fisher's scale.

    Args:
        reference, predicted: (N,) finite measurements of the same lesions or organs.
        patients: (N,) the patient of each pair.

    Returns:
        All NaN for fewer than three pairs. Correlations are NaN if all values of one side are
        equal, intervals for fewer than five patients.

    Source: Bland and Altman, Lancet i:307 (1986) and Stat Methods Med Res 8:135 (1999); intervals
        of the limits: Carkeet, Optom Vis Sci 92:e71 (2015); concordance, also on Fisher's scale:
        Lin, Biometrics 45:255 (1989).
    """
    x, y = np.asarray(reference, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1 or len(patients) != x.size:
        raise ValueError(
            f"reference {x.shape}, predicted {y.shape} and patients ({len(patients)},) must all "
            "have one shape (N,)"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("measurements must be finite; leave out pairs with NaN or infinity")
    n, n_patients = x.size, len(set(patients))
    if n < FEWEST:
        return Agreement(n=n, n_patients=n_patients, no_intervals=too_few(n_patients))
    statistics = _statistics(_moments(x, y).sum(axis=0, keepdims=True))
    bias, sd, lower, upper, pearson, concordance = (float(value[0]) for value in statistics)
    intervals = _intervals(x, y, patients)
    if n_patients == n >= FEWEST_PATIENTS:
        intervals |= _exact(bias, sd, n)
    return Agreement(
        n=n,
        n_patients=n_patients,
        bias=bias,
        sd=sd,
        lower_limit=lower,
        upper_limit=upper,
        pearson=pearson,
        concordance=concordance,
        no_intervals=_reasons(intervals),
        **{f"{name}_95": interval.ends or UNKNOWN for name, interval in intervals.items()},
    )


def _exact(bias: float, sd: float, n: int) -> dict[str, Interval]:
    """Return intervals of the bias and both limits for normal, independent differences.

    (limit − bias) √n / sd follows a non-central t distribution; its quantiles bound the true limit.
    """
    half = float(stdtrit(n - 1, 0.975)) * sd / math.sqrt(n)
    shift = NORMAL_95 * math.sqrt(n)
    near, far = (float(nctdtrit(n - 1, shift, p)) * sd / math.sqrt(n) for p in (0.025, 0.975))
    return {
        "bias": Interval(bias - half, bias + half),
        "lower_limit": Interval(bias - far, bias - near),
        "upper_limit": Interval(bias + near, bias + far),
    }


def _intervals(x: np.ndarray, y: np.ndarray, patients: Sequence[Hashable]) -> dict[str, Interval]:
    """Return jackknife intervals over patients of bias, both limits and both correlations."""
    index_of = {patient: index for index, patient in enumerate(dict.fromkeys(patients))}
    patient_sums = np.zeros((len(index_of), 6))
    np.add.at(patient_sums, [index_of[patient] for patient in patients], _moments(x, y))
    if len(index_of) < FEWEST_PATIENTS:
        return dict.fromkeys(_WITH_INTERVAL, Interval(reason=too_few(len(index_of))))
    total = patient_sums.sum(axis=0)
    of_all, without_one = _statistics(total[None]), _statistics(total - patient_sums)
    intervals = {}
    for name, position in _WITH_INTERVAL.items():
        estimate, left_out = float(of_all[position][0]), without_one[position]
        is_correlation = name in ("pearson", "concordance")
        interval_of = _correlation_interval if is_correlation else jackknife_interval
        intervals[name] = interval_of(estimate, left_out)
    return intervals


def _correlation_interval(estimate: float, without_one: np.ndarray) -> Interval:
    """Return the interval of a correlation, computed on Fisher's unbounded scale, artanh r."""
    if not (np.isfinite(estimate) and np.isfinite(without_one).all()):
        return Interval(reason="all volumes of one side are equal, or all but those of one patient")
    if np.abs([estimate, *without_one]).max() >= 1 - _NOISE:
        return Interval(reason="the pairs lie on a line")
    interval = jackknife_interval(math.atanh(estimate), np.arctanh(without_one))
    return Interval(math.tanh(interval.low), math.tanh(interval.high), interval.reason)


def _reasons(intervals: Mapping[str, Interval]) -> str:
    """Return why intervals are unknown; a reason common to all intervals names none of them."""
    names: dict[str, list[str]] = {}
    for name, interval in intervals.items():
        if interval.reason:
            names.setdefault(interval.reason, []).append(name)
    if any(len(without) == len(intervals) for without in names.values()):
        return next(iter(names))
    return "; ".join(f"{', '.join(without)}: {reason}" for reason, without in names.items())


def _moments(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return (N, 6) terms whose sums determine the statistics; centred against cancellation."""
    x, y = x - x.mean(), y - x.mean()
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)


def _statistics(sums: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return bias, SD, both limits, Pearson's and Lin's correlation from (B, 6) `_moments` sums."""
    n, x, y, xx, yy, xy = sums.T
    mean_x, mean_y = x / n, y / n
    var_x, var_y, covariance = xx / n - mean_x**2, yy / n - mean_y**2, xy / n - mean_x * mean_y
    bias = mean_y - mean_x
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = np.maximum(var_x + var_y - 2 * covariance, 0) * n / (n - 1)
        varies = (var_x > _NOISE * xx / n) & (var_y > _NOISE * yy / n)
        pearson = np.where(varies, np.clip(covariance / np.sqrt(var_x * var_y), -1, 1), np.nan)
        concordance = np.where(varies, 2 * covariance / (var_x + var_y + bias**2), np.nan)
    sd = np.sqrt(variance)
    return bias, sd, bias - NORMAL_95 * sd, bias + NORMAL_95 * sd, pearson, concordance


# Name of an interval → position of its estimate in `_statistics`.
_WITH_INTERVAL = {"bias": 0, "lower_limit": 2, "upper_limit": 3, "pearson": 4, "concordance": 5}
_NOISE = 1e-12  # a variance below this fraction of the mean square is rounding error

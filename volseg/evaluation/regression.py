"""Judgement of predicted numbers: errors, explained variance and an interval per prediction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from volseg.evaluation.ranking import ratio

ROUNDING = 1e-12  # a variance below this fraction of the mean square is rounding error


@dataclass(frozen=True, slots=True, eq=False)
class NumberPredictions:
    """Predicted numbers of n cases with the true ones, in one unit; checked when made.

    Args:
        predicted, targets: (n,) float64, finite.
    """

    predicted: np.ndarray
    targets: np.ndarray

    def __post_init__(self) -> None:
        for name in ("predicted", "targets"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float64))
        if self.predicted.ndim != 1 or self.predicted.shape != self.targets.shape:
            raise ValueError(
                f"predicted {self.predicted.shape} and targets {self.targets.shape} must both have "
                "one shape (n,)"
            )
        if not self.predicted.size:
            raise ValueError("there is no case to judge")
        if not (np.isfinite(self.predicted).all() and np.isfinite(self.targets).all()):
            raise ValueError("numbers must be finite; leave out cases with NaN or infinity")

    def __len__(self) -> int:
        return self.predicted.size


def number_metrics(numbers: NumberPredictions, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Return each metric of numbers under each row of weights.

    - `mae`: mean |predicted − true|. `mse`: mean squared error. `rmse`: its root.
    - `bias`: mean of predicted − true.
    - `r2`: 1 − MSE / variance of the true values; negative if worse than their mean, NaN if all
      true values are equal.

    Args:
        weights: (B, n) ≥ 0, one row per resample.

    Returns:
        Name → (B,); NaN is undefined.
    """
    error, total = numbers.predicted - numbers.targets, weights.sum(axis=1)
    mse = ratio(weights @ error**2, total)
    centred = numbers.targets - numbers.targets.mean()
    mean = ratio(weights @ centred, total)
    # Two passes: a mean of squares minus a squared mean would cancel for large values.
    variance = ratio(_squares_around(centred, mean, weights), total)
    varies = variance > ROUNDING * ratio(weights @ centred**2, total)
    return {
        "mae": ratio(weights @ np.abs(error), total),
        "mse": mse,
        "rmse": np.sqrt(mse),
        "bias": ratio(weights @ error, total),
        "r2": 1 - ratio(mse, np.where(varies, variance, 0.0)),
    }


def _squares_around(values: np.ndarray, means: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return (B,) the weighted sum of squares of (n,) values around (B,) means."""
    return (weights * (values[None] - means[:, None]) ** 2).sum(axis=1)


def mean_absolute_error(predicted: np.ndarray, targets: np.ndarray) -> float:
    """Return the mean of |predicted − true|."""
    return _metric("mae", predicted, targets)


def mean_squared_error(predicted: np.ndarray, targets: np.ndarray) -> float:
    """Return the mean of (predicted − true)²."""
    return _metric("mse", predicted, targets)


def explained_variance(predicted: np.ndarray, targets: np.ndarray) -> float:
    """Return R² = 1 − MSE / variance of the true values; NaN if all true values are equal."""
    return _metric("r2", predicted, targets)


def _metric(name: str, predicted: np.ndarray, targets: np.ndarray) -> float:
    numbers = NumberPredictions(np.ravel(predicted), np.ravel(targets))
    return float(number_metrics(numbers, np.ones((1, len(numbers))))[name][0])


def interval_half_width(residuals: Sequence[float] | np.ndarray, *, coverage: float) -> float:
    """Return h such that predicted ± h contains a new true value with this probability.

    It holds for any network and any distribution if the new case and those of `residuals` are
    exchangeable, and if the network was not trained on them.

    Args:
        residuals: (n,) predicted − true of validation cases.
        coverage: above 0 and below 1.

    Returns:
        Infinity if there are fewer than coverage / (1 − coverage) residuals.

    Source: split conformal prediction: Lei et al., J Am Stat Assoc 113:1094 (2018).

    >>> interval_half_width([-3.0, 1.0, 2.0, -1.0], coverage=0.8)
    3.0
    """
    return conformal_quantile(np.abs(np.asarray(residuals, dtype=np.float64)), coverage)


def conformal_quantile(scores: np.ndarray, coverage: float) -> float:
    """Return the ⌈(n + 1) coverage⌉-th smallest of n scores; infinity if that is above n.

    Raises:
        ValueError: the coverage is outside (0, 1), or a score is NaN.
    """
    if not 0 < coverage < 1:
        raise ValueError(f"coverage {coverage} must be above 0 and below 1")
    if np.isnan(scores).any():
        raise ValueError("scores must not be NaN; leave out those cases")
    # 1e-9: (n + 1) × 0.9 may come out above the integer that it is.
    rank = math.ceil((scores.size + 1) * coverage - 1e-9)
    return math.inf if rank > scores.size else float(np.sort(scores)[rank - 1])

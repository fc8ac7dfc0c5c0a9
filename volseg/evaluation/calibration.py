"""Calibration: do cases with a probability of 0.8 have the class 8 times of 10? And its repair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar

from volseg.evaluation.ranking import ratio

N_BINS = 10  # of the calibration error and of reliability points
SMALLEST_BIN = 5  # cases; with fewer cases there are fewer bins
SMALLEST_PROBABILITY = float(np.finfo(np.float64).eps)  # log loss stays finite, as in scikit-learn
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.05, 20.0
CHI_SQUARE_95 = 3.841  # of one degree of freedom
N_SIMULATIONS, SIMULATION_SEED = 200, 0


def case_log_losses(
    probabilities: np.ndarray, truth: np.ndarray, *, multilabel: bool
) -> np.ndarray:
    """Return (n,) −log of the probability of the true class, in nats.

    With several labels at once: the mean over the k classes of the binary log loss.

    Args:
        probabilities: (n, k); below 2.2e-16 they are taken as that.
        truth: (n, k) bool.
    """
    inside = np.clip(probabilities, SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)
    if multilabel:
        return -np.where(truth, np.log(inside), np.log1p(-inside)).mean(axis=1)
    return -np.log(np.where(truth, inside, 1.0)).sum(axis=1)


def case_briers(probabilities: np.ndarray, truth: np.ndarray, *, multilabel: bool) -> np.ndarray:
    """Return (n,) the Brier score of each case, from 0 to 1.

    It is ½ Σ over classes of (probability − truth)², which for two classes is the usual
    (p₁ − y)²; Brier's own score for k classes is twice that. With several labels at once: the mean
    over classes of (p − y)².

    Source: Brier, Mon Weather Rev 78:1 (1950).
    """
    squares = (probabilities - truth) ** 2
    return squares.mean(axis=1) if multilabel else squares.sum(axis=1) / 2


@dataclass(frozen=True, slots=True, eq=False)
class Reliability:
    """Points of a reliability diagram: bins of equally many cases, from low to high probability.

    Args:
        predicted: (m,) mean probability in each bin.
        observed: (m,) fraction of the cases in it that have the class.
        n: (m,) number of cases in it.
    """

    predicted: np.ndarray
    observed: np.ndarray
    n: np.ndarray

    @property
    def error(self) -> float:
        """Mean over cases of |observed − predicted| of their bin."""
        return float((self.n * np.abs(self.observed - self.predicted)).sum() / self.n.sum())


def reliability(
    probabilities: np.ndarray, is_true: np.ndarray, *, n_bins: int = N_BINS
) -> Reliability:
    """Return observed frequency against predicted probability in bins of equal mass.

    Cases with the same probability are in one bin, so the order of the cases does not matter. There
    are at most n / 5 bins.

    Args:
        probabilities: (n,) of a class, or of the predicted class. is_true: (n,) bool.
    """
    bins = equal_mass_bins(probabilities, n_bins)
    n = np.bincount(bins)
    return Reliability(
        np.bincount(bins, probabilities) / n, np.bincount(bins, is_true.astype(float)) / n, n
    )


def equal_mass_bins(values: np.ndarray, n_bins: int = N_BINS) -> np.ndarray:
    """Return (n,) the bin of each value, counted from 0 without gaps.

    Bin b begins at the value of rank ⌊b n / n_bins⌋; equal values are in the same bin.
    """
    ordered = np.sort(values)
    n_bins = max(1, min(n_bins, values.size // SMALLEST_BIN))
    edges = ordered[np.arange(1, n_bins) * values.size // n_bins]
    return np.unique(np.searchsorted(edges, values, side="right"), return_inverse=True)[1]


def calibration_error(
    probabilities: np.ndarray, targets: np.ndarray, *, n_bins: int = N_BINS
) -> float:
    """Return the expected calibration error (ECE) with bins of equal mass.

    For one class per case: the mean of |accuracy − mean probability| over bins of the probability
    of the predicted class. With several labels at once: the mean over classes of that of each
    class. It is above 0 even for perfect probabilities; see `error_if_calibrated`.

    Args:
        probabilities: (n, k). targets: (n,) class index, or (n, k) bool for several labels.

    Source: Nixon et al., CVPR Workshops (2019): adaptive calibration error; Guo et al., ICML
        (2017).
    """
    pairs = _judged(probabilities, targets)
    return float(np.mean([reliability(p, is_true, n_bins=n_bins).error for p, is_true in pairs]))


def error_if_calibrated(
    probabilities: np.ndarray, targets: np.ndarray, *, n_bins: int = N_BINS
) -> float:
    """Return the mean ECE that these probabilities would have if they were exactly right.

    The truth is drawn 200 times from the probabilities, with a fixed seed. An ECE near this value
    is no sign of bad calibration.
    """
    rng, errors = np.random.default_rng(SIMULATION_SEED), []
    for p, _ in _judged(probabilities, targets):
        bins = equal_mass_bins(p, n_bins)
        n = np.bincount(bins)
        predicted = np.bincount(bins, p) / n
        for _ in range(N_SIMULATIONS):
            observed = np.bincount(bins, (rng.random(p.size) < p).astype(float)) / n
            errors.append(Reliability(predicted, observed, n).error)
    return float(np.mean(errors))


def _judged(probabilities: np.ndarray, targets: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the (probability, is it true) pairs whose calibration counts."""
    if targets.ndim == 2:
        return list(zip(probabilities.T, targets.astype(bool).T, strict=True))
    predicted = probabilities.argmax(axis=1)
    return [(probabilities[np.arange(len(predicted)), predicted], predicted == targets)]


# ---- repair


def fit_temperature(logits: np.ndarray, targets: np.ndarray) -> float:
    """Return the T > 0 for which softmax(logits / T) fits the targets best.

    Dividing by T changes no ranking and no predicted class. T minimises n × log loss + ½ ln² T: the
    second term is that of a prior around 1 and matters only if there are few cases, or no mistake
    among them, where the log loss alone would have T approach 0 and every probability 1. The log
    loss of the fitting data is never above that at T = 1.

    T < 1 makes probabilities more extreme, which costs much where new cases are harder than these:
    it is kept only if a likelihood-ratio test (5 %) tells it from 1, and is 1 otherwise.

    Args:
        logits: (n, k) finite, of cases that the network was not trained on.
        targets: (n,) class index; or (n, k) bool for several labels, with a sigmoid instead.

    Source: Guo et al., ICML (2017).
    """
    logits = np.asarray(logits, dtype=np.float64)
    if logits.ndim != 2 or not logits.size or not np.isfinite(logits).all():
        raise ValueError(f"logits {logits.shape} must be (n, k), n ≥ 1, and finite")
    truth = one_hot(targets, logits.shape[1])
    is_multilabel = np.asarray(targets).ndim == 2

    def cost(log_temperature: float) -> float:
        p = apply_temperature(logits, np.exp(log_temperature), multilabel=is_multilabel)
        losses = case_log_losses(p, truth, multilabel=is_multilabel)
        return float(losses.sum()) + log_temperature**2 / 2

    bounds, options = (np.log(LOWEST_TEMPERATURE), np.log(HIGHEST_TEMPERATURE)), {"xatol": 1e-7}
    fit = minimize_scalar(cost, bounds=bounds, method="bounded", options=options)
    gain = 2 * (cost(0.0) - fit.fun)
    is_kept = gain > 0 if fit.x >= 0 else gain > CHI_SQUARE_95
    return float(np.exp(fit.x)) if is_kept else 1.0


def apply_temperature(
    logits: np.ndarray, temperature: float, *, multilabel: bool = False
) -> np.ndarray:
    """Return (n, k) probabilities: the softmax of logits / T, with several labels the sigmoid."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    if multilabel:
        magnitude = np.exp(-np.abs(scaled))  # at most 1, so it cannot overflow
        return np.where(scaled >= 0, 1.0, magnitude) / (1 + magnitude)
    weights = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def shift_prior(
    probabilities: np.ndarray,
    from_prior: Sequence[float] | np.ndarray,
    to_prior: Sequence[float] | np.ndarray,
) -> np.ndarray:
    """Return (n, k) probabilities for a population in which the classes have other frequencies.

    Each is multiplied by to / from and the row is normalised. It is exact if only the frequencies
    differ and not the look of each class, and if the probabilities were calibrated.

    Args:
        probabilities: (n, k), rows with sum 1.
        from_prior, to_prior: (k,) frequencies above 0 of the training data and of the population.

    Source: Saerens et al., Neural Comput 14:21 (2002).

    >>> shift_prior([[0.5, 0.5]], (0.5, 0.5), (0.9, 0.1)).round(3).tolist()
    [[0.9, 0.1]]
    """
    table = np.asarray(probabilities, dtype=np.float64)
    before, after = (np.asarray(prior, dtype=np.float64) for prior in (from_prior, to_prior))
    for prior in (before, after):
        if prior.shape != table.shape[1:] or not (np.isfinite(prior) & (prior > 0)).all():
            raise ValueError(f"prior {prior} must hold {table.shape[1]} frequencies above 0")
    shifted = table * (after / after.sum()) / (before / before.sum())
    return ratio(shifted, shifted.sum(axis=1, keepdims=True))


def one_hot(targets: np.ndarray, n_classes: int) -> np.ndarray:
    """Return (n, k) bool from (n,) class indices; (n, k) bool is returned as it is.

    Raises:
        ValueError: an index is outside 0 … k − 1, or the shape is another.
    """
    targets = np.asarray(targets)
    if targets.ndim == 2 and targets.shape[1] == n_classes:
        return targets.astype(bool)
    if targets.ndim != 1:
        raise ValueError(f"targets {targets.shape} must be (n,) or (n, {n_classes})")
    if targets.size and not (targets.min() >= 0 and targets.max() < n_classes):
        low, high = targets.min(), targets.max()
        raise ValueError(f"targets from {low} to {high} are not indices of {n_classes} classes")
    return targets.astype(np.int64)[:, None] == np.arange(n_classes)

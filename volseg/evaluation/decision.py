"""Curves of a class against all others: ROC, precision–recall and net benefit; points only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from volseg.evaluation.ranking import Ranking

THRESHOLDS = np.arange(1, 100) / 100  # of the decision curve


@dataclass(frozen=True, slots=True, eq=False)
class RocCurve:
    """Sensitivity against 1 − specificity, from (0, 0) to (1, 1).

    Args:
        false_positive_rate, sensitivity: (T,) that never decrease.
        thresholds: (T,) descending; cases from the threshold up are positive; the first: infinity.
    """

    false_positive_rate: np.ndarray
    sensitivity: np.ndarray
    thresholds: np.ndarray

    @property
    def area(self) -> float:
        """AUC: the area under the straight lines between the points."""
        return float(np.trapezoid(self.sensitivity, self.false_positive_rate))


def roc_curve(scores: np.ndarray, positive: np.ndarray) -> RocCurve | None:
    """Return a point per distinct score; None without positive or without negative cases."""
    true, false, thresholds = _cumulated(scores, positive)
    if not true[-1] or not false[-1]:
        return None
    return RocCurve(false / false[-1], true / true[-1], thresholds)


@dataclass(frozen=True, slots=True, eq=False)
class PrecisionRecallCurve:
    """Precision against recall, from the highest threshold to the lowest.

    Args:
        recall: (T,) never decreases. precision: (T,). thresholds: (T,) descending.
        prevalence: fraction of positive cases, which is the precision of a guess.
    """

    recall: np.ndarray
    precision: np.ndarray
    thresholds: np.ndarray
    prevalence: float


def precision_recall_curve(scores: np.ndarray, positive: np.ndarray) -> PrecisionRecallCurve | None:
    """Return a point per distinct score; None without positive cases."""
    true, false, thresholds = _cumulated(scores, positive)
    if not true[-1]:
        return None
    n_called = true + false
    return PrecisionRecallCurve(
        recall=true[1:] / true[-1],
        precision=true[1:] / n_called[1:],
        thresholds=thresholds[1:],
        prevalence=float(true[-1] / n_called[-1]),
    )


@dataclass(frozen=True, slots=True, eq=False)
class DecisionCurve:
    """Net benefit of acting on a prediction, in true positives per case.

    Acting on a case from probability t up says that one true positive is worth (1 − t) / t false
    ones, so the net benefit is TP / n − FP / n × t / (1 − t).

    Args:
        thresholds: (T,) t. model, treat_all: (T,) net benefit. Treating none has 0.
    """

    thresholds: np.ndarray
    model: np.ndarray
    treat_all: np.ndarray

    @property
    def useful(self) -> np.ndarray:
        """(T,) bool: where the model is better than treating all and than treating none."""
        return self.model > np.maximum(self.treat_all, 0) + 1e-12


def decision_curve(
    probabilities: np.ndarray, positive: np.ndarray, thresholds: np.ndarray = THRESHOLDS
) -> DecisionCurve:
    """Return the net benefit at (T,) thresholds between 0 and 1.

    The probabilities must be calibrated: the curve reads them as such.

    Source: Vickers and Elkin, Med Decis Making 26:565 (2006).
    """
    probabilities, positive = np.asarray(probabilities, np.float64), np.asarray(positive, bool)
    thresholds = np.asarray(thresholds, dtype=np.float64)
    if not probabilities.size or not ((thresholds > 0) & (thresholds < 1)).all():
        raise ValueError("a decision curve needs cases, and thresholds between 0 and 1")
    harm = thresholds / (1 - thresholds)
    acted = np.sort(probabilities[positive]), np.sort(probabilities[~positive])
    true, false = (
        (part.size - np.searchsorted(part, thresholds, side="left")) / probabilities.size
        for part in acted
    )
    prevalence = positive.mean()
    return DecisionCurve(thresholds, true - false * harm, prevalence - (1 - prevalence) * harm)


def _cumulated(
    scores: np.ndarray, positive: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return true and false positives from each threshold up, starting with none."""
    ranking = Ranking.of(scores)
    sums = ranking.sums(positive, np.ones((1, ranking.order.size)))
    true, false = (np.concatenate([[0.0], part[0].cumsum()]) for part in sums)
    return true, false, np.concatenate([[np.inf], ranking.scores])

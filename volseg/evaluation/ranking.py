"""Scores in order with ties grouped: what AUC, average precision and curves are computed from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """Scores from highest to lowest, in G groups of equal scores.

    Args:
        order: (n,) index of the cases, highest score first.
        starts: (G,) position in `order` at which each group begins.
        scores: (G,) score of each group, descending.
    """

    order: np.ndarray
    starts: np.ndarray
    scores: np.ndarray

    @classmethod
    def of(cls, scores: np.ndarray) -> Ranking:
        """Rank (n,) scores.

        Raises:
            ValueError: there is no score, or one is NaN.
        """
        scores = np.asarray(scores, dtype=np.float64)
        if scores.ndim != 1 or not scores.size or np.isnan(scores).any():
            raise ValueError(f"scores {scores.shape} must be (n,), n ≥ 1, without NaN")
        order = np.argsort(-scores, kind="stable")
        ordered = scores[order]
        is_start = np.concatenate([[True], ordered[1:] != ordered[:-1]])
        starts = np.flatnonzero(is_start)
        return cls(order, starts, ordered[starts])

    def sums(self, positive: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the weight of the positive and of the negative cases in each group.

        Args:
            positive: (n,) bool.
            weights: (B, n), one row per resample.

        Returns:
            Two arrays (B, G).
        """
        ordered, is_positive = weights[:, self.order], np.asarray(positive, bool)[self.order]
        positives, negatives = ordered * is_positive, ordered * ~is_positive
        if self.starts.size == self.order.size:  # no ties: every group is a case
            return positives, negatives
        return (
            np.add.reduceat(positives, self.starts, axis=1),
            np.add.reduceat(negatives, self.starts, axis=1),
        )


def weighted_auc(ranking: Ranking, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return (B,) the AUC under each row of (B, n) weights; NaN without both kinds of cases.

    Ties count half. With equal weights it is `roc.auc`.
    """
    return _auc_of(*ranking.sums(positive, weights))


def _auc_of(positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    n_positive, n_negative = positives.sum(axis=1), negatives.sum(axis=1)
    not_below = negatives.cumsum(axis=1)  # negatives that score as high or higher
    n_won = n_negative[:, None] - not_below + negatives / 2
    return ratio((positives * n_won).sum(axis=1), n_positive * n_negative)


def weighted_average_precision(
    ranking: Ranking, positive: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Return (B,) the average precision under each row of (B, n) weights; NaN without positives.

    It is the sum over distinct scores of precision × gain in recall, without interpolation.
    """
    return _precision_of(*ranking.sums(positive, weights))


def ranked_metrics(
    ranking: Ranking, positive: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return `weighted_auc` and `weighted_average_precision`, in less time than one by one."""
    sums = ranking.sums(positive, weights)
    return _auc_of(*sums), _precision_of(*sums)


def _precision_of(positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    n_true = positives.cumsum(axis=1)
    precision = ratio(n_true, n_true + negatives.cumsum(axis=1), otherwise=0.0)
    return ratio((positives * precision).sum(axis=1), positives.sum(axis=1))


def ratio(
    numerator: np.ndarray, denominator: np.ndarray, *, otherwise: float = np.nan
) -> np.ndarray:
    """Return numerator / denominator, and `otherwise` where the denominator is 0."""
    shape = np.broadcast_shapes(np.shape(numerator), np.shape(denominator))
    result = np.full(shape, otherwise, dtype=np.float64)
    return np.divide(numerator, denominator, out=result, where=np.asarray(denominator) > 0)

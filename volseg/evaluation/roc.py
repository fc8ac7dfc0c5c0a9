"""Area under the ROC curve."""

from __future__ import annotations

import math

import numpy as np


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Return the AUC: the probability that a positive case scores higher than a negative one.

    Args:
        scores: (N,) higher for positive cases.
        positive: (N,) bool.

    Returns:
        From 0 to 1; ties count half; NaN without positive or without negative cases.

    Raises:
        ValueError: the arrays differ in shape, or a score is NaN.

    Source: the Mann-Whitney U statistic over n₊ n₋ (Hanley & McNeil, Radiology 143:29, 1982).

    >>> auc([0.1, 0.4, 0.4, 0.8], [False, False, True, True])
    0.875
    """
    scores, positive = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=bool)
    if scores.ndim != 1 or scores.shape != positive.shape:
        raise ValueError(
            f"scores {scores.shape} and positive {positive.shape} must both have one shape (N,)"
        )
    if np.isnan(scores).any():
        n_nan = np.count_nonzero(np.isnan(scores))
        raise ValueError(f"{n_nan} of {scores.size} scores are NaN; leave out those cases")
    positives, negatives = scores[positive], np.sort(scores[~positive])
    if not positives.size or not negatives.size:
        return math.nan
    # Twice the number of pairs won: negatives strictly below, plus negatives not above.
    n_below = np.searchsorted(negatives, positives, side="left").sum()
    n_not_above = np.searchsorted(negatives, positives, side="right").sum()
    return float(n_below + n_not_above) / (2 * positives.size * negatives.size)

"""How well a score tells two groups apart."""

from __future__ import annotations

import math

import numpy as np


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve: the probability that a positive case scores higher than a negative one.

    Args:
        scores: (N,) numbers, higher for positive cases.
        positive: (N,) bool.

    Returns:
        From 0 to 1; a tie counts half; NaN if there is no positive or no negative case.

    Raises:
        ValueError: the arrays differ in shape, or a score is NaN.

    Source: the Mann-Whitney U statistic over n₊ n₋ (Hanley & McNeil, Radiology 143:29, 1982).

    >>> auc([0.1, 0.4, 0.4, 0.8], [False, False, True, True])
    0.875
    """
    scores, positive = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=bool)
    if scores.ndim != 1 or scores.shape != positive.shape:
        raise ValueError(
            f"scores have shape {scores.shape}, positive {positive.shape}; both are (N,)"
        )
    if np.isnan(scores).any():
        raise ValueError(
            f"{np.count_nonzero(np.isnan(scores))} of {scores.size} scores are NaN; leave those cases out"
        )
    above, below = scores[positive], np.sort(scores[~positive])
    if not above.size or not below.size:
        return math.nan
    # Twice the number of pairs won: negatives strictly below, plus negatives not above.
    n_won_twice = (
        np.searchsorted(below, above, side="left").sum()
        + np.searchsorted(below, above, side="right").sum()
    )
    return float(n_won_twice) / (2 * above.size * below.size)

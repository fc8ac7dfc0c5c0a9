"""Operating points: thresholds on the probability of a class, chosen on validation cases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from volseg.evaluation.ranking import Ranking

YOUDEN, MOST_ACCURATE = "youden", "accuracy"


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """A threshold on the probability of a class; a case is positive from it up.

    Args:
        name: how it was chosen: `youden`, `accuracy`, `sensitivity_0.95` or `specificity_0.9`.
        class_name: the class whose probability it is for.
        threshold: from 0, where every case is positive, to just above 1, where none is.
        sensitivity, specificity: on the cases on which it was chosen, so they flatter it.
    """

    name: str
    class_name: str
    threshold: float
    sensitivity: float
    specificity: float

    def decide(self, probabilities: np.ndarray) -> np.ndarray:
        """Return (n,) bool: which cases are positive at this point."""
        return np.asarray(probabilities) >= self.threshold

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> OperatingPoint:
        """Return a point from its fields, as `dataclasses.asdict` gives them."""
        names = str(content["name"]), str(content["class_name"])
        numbers = ("threshold", "sensitivity", "specificity")
        return cls(*names, *(float(content[name]) for name in numbers))


def youden_point(scores: np.ndarray, positive: np.ndarray, class_name: str) -> OperatingPoint:
    """Return the point with the largest sensitivity + specificity − 1.

    Source: Youden, Cancer 3:32 (1950).
    """
    cuts = Cuts.of(scores, positive)
    return cuts.point(cuts.best(cuts.sensitivity + cuts.specificity), YOUDEN, class_name)


def most_accurate_point(
    scores: np.ndarray, positive: np.ndarray, class_name: str
) -> OperatingPoint:
    """Return a point with most cases on the right side, up to chance.

    Of all thresholds whose accuracy is within one standard error of the best, it is the nearest to
    0.5, where calibrated probabilities are most accurate. The best of few cases itself is a matter
    of chance, and less accurate on new cases.

    Source: the rule of one standard error of Breiman et al., Classification and Regression Trees
    (1984), §3.4.3.
    """
    cuts = Cuts.of(scores, positive)
    right = cuts.sensitivity * cuts.n_positive + cuts.specificity * cuts.n_negative
    n = cuts.n_positive + cuts.n_negative
    rate = (right.max() + 1) / (n + 2)  # never 1, so that the standard error is never 0
    error = np.sqrt(rate * (1 - rate) * n)  # in cases
    allowed = right >= right.max() - error
    merit = np.where(allowed, -cuts.distances(0.5), -np.inf)
    return cuts.point(cuts.best(merit), MOST_ACCURATE, class_name)


def sensitive_point(
    scores: np.ndarray, positive: np.ndarray, class_name: str, *, at_least: float
) -> OperatingPoint:
    """Return the point of highest specificity with at least this sensitivity."""
    cuts = Cuts.of(scores, positive)
    allowed = cuts.sensitivity >= _checked(at_least)
    number = cuts.best(np.where(allowed, cuts.specificity, -1.0))
    return cuts.point(number, sensitive_name(at_least), class_name)


def sensitive_name(at_least: float) -> str:
    """Return the name of the point that `sensitive_point` chooses."""
    return f"sensitivity_{at_least:g}"


def specific_point(
    scores: np.ndarray, positive: np.ndarray, class_name: str, *, at_least: float
) -> OperatingPoint:
    """Return the point of highest sensitivity with at least this specificity."""
    cuts = Cuts.of(scores, positive)
    allowed = cuts.specificity >= _checked(at_least)
    number = cuts.best(np.where(allowed, cuts.sensitivity, -1.0))
    return cuts.point(number, f"specificity_{at_least:g}", class_name)


@dataclass(frozen=True, slots=True, eq=False)
class Cuts:
    """The T thresholds that separate the scores of n cases in every possible way.

    A threshold lies in the middle between two neighbouring scores, so that rounding a score does
    not move a case across it. The first lies between all scores and 1, the last between 0 and all
    scores. Of several thresholds that are equally good, the one in the widest gap between scores is
    chosen, then the lowest.

    Args:
        thresholds: (T,) descending. gaps: (T,) distance of the scores beside each.
        sensitivity, specificity: (T,) if cases from the threshold up are positive.
        n_positive, n_negative: numbers of cases, both above 0.
    """

    thresholds: np.ndarray
    gaps: np.ndarray
    sensitivity: np.ndarray
    specificity: np.ndarray
    n_positive: int
    n_negative: int

    @classmethod
    def of(cls, scores: np.ndarray, positive: np.ndarray) -> Cuts:
        """Find the thresholds for (n,) probabilities.

        Raises:
            ValueError: there is no positive or no negative case, or a score is outside [0, 1].
        """
        scores, positive = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=bool)
        n_positive, n_negative = int(positive.sum()), int((~positive).sum())
        if not n_positive or not n_negative:
            raise ValueError(
                f"an operating point needs cases of both kinds, got {n_positive} positive and "
                f"{n_negative} negative"
            )
        if not ((scores >= 0) & (scores <= 1)).all():
            raise ValueError("scores must be probabilities from 0 to 1")
        ranking = Ranking.of(scores)
        true, false = (sums[0] for sums in ranking.sums(positive, np.ones((1, scores.size))))
        above = np.concatenate([[np.nextafter(1.0, 2.0)], ranking.scores])
        below = np.concatenate([ranking.scores, [0.0]])
        return cls(
            thresholds=_between(above, below),
            gaps=above - below,
            sensitivity=np.concatenate([[0.0], true.cumsum()]) / n_positive,
            specificity=1 - np.concatenate([[0.0], false.cumsum()]) / n_negative,
            n_positive=n_positive,
            n_negative=n_negative,
        )

    def distances(self, score: float) -> np.ndarray:
        """Return (T,) how far the gap of each threshold is from a score; 0 if it lies inside."""
        return np.maximum(np.abs(self.thresholds - score) - self.gaps / 2, 0.0)

    def best(self, merit: np.ndarray) -> int:
        """Return the number of the best threshold; ties as the class says."""
        # Sums of fractions that are equal may differ in their last digit.
        equal = np.flatnonzero(merit >= merit.max() - 1e-12)
        widest = equal[self.gaps[equal] >= self.gaps[equal].max() - 1e-12]
        return int(widest[-1])

    def point(self, number: int, name: str, class_name: str) -> OperatingPoint:
        """Return the operating point at a threshold."""
        return OperatingPoint(
            name,
            class_name,
            float(self.thresholds[number]),
            float(self.sensitivity[number]),
            float(self.specificity[number]),
        )


def _between(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Return the middle of each pair; the upper end if no number lies between them."""
    middle = (above + below) / 2
    return np.where(middle > below, middle, above)


def _checked(rate: float) -> float:
    if not 0 < rate <= 1:
        raise ValueError(f"at_least must be above 0 and at most 1, got {rate}")
    return rate - 1e-12

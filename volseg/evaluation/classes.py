"""Judgement of class probabilities: confusion, rates, AUC and average precision, with averages."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from volseg.evaluation.calibration import case_briers, case_log_losses, one_hot
from volseg.evaluation.ranking import Ranking, ranked_metrics, ratio
from volseg.evaluation.regression import (
    explained_variance,
    mean_absolute_error,
    mean_squared_error,
)
from volseg.words import format_list

SUM_TOLERANCE = 1e-3  # of probabilities that were rounded, in half precision or in a table
DECISION = 0.5  # with several labels at once, a label is predicted from this probability up
OVERALL, MACRO, WEIGHTED = "overall", "macro", "weighted"
AVERAGES = (OVERALL, MACRO, WEIGHTED)


@dataclass(frozen=True, slots=True)
class Value:
    """A metric; None if undefined.

    Args:
        reason: why it is undefined, or which classes an average leaves out; empty otherwise.
    """

    value: float | None
    reason: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class ClassPredictions:
    """Probabilities of k classes for n cases, with the true classes; checked when made.

    Args:
        probabilities: (n, k) float64 in [0, 1]. Rows have the sum 1, unless a case may have several
            labels.
        targets: (n,) int class index; or (n, k) bool: several labels at once.
        names: k different class names.

    Raises:
        ValueError: shapes differ, a probability is outside [0, 1] or NaN, or a row has another sum.
    """

    probabilities: np.ndarray
    targets: np.ndarray
    names: Sequence[str]

    def __post_init__(self) -> None:
        table, targets = np.asarray(self.probabilities, dtype=np.float64), np.asarray(self.targets)
        if table.ndim != 2 or not table.size or len(table) != len(targets):
            raise ValueError(
                f"probabilities {table.shape} and targets {targets.shape} must have shapes (n, k) "
                "and (n,) or (n, k), with at least one case"
            )
        if len(self.names) != table.shape[1] or len(set(self.names)) < len(self.names):
            raise ValueError(f"{list(self.names)} must be {table.shape[1]} different class names")
        if not ((table >= 0) & (table <= 1)).all():
            raise ValueError("probabilities must be from 0 to 1; leave out cases without them")
        sums = table.sum(axis=1)
        if targets.ndim == 1 and np.abs(sums - 1).max() > SUM_TOLERANCE:
            worst = int(np.abs(sums - 1).argmax())
            raise ValueError(f"the probabilities of case {worst} have the sum {sums[worst]:.4g}")
        one_hot(targets, table.shape[1])
        object.__setattr__(self, "probabilities", table)
        object.__setattr__(self, "targets", targets)

    def __len__(self) -> int:
        return len(self.probabilities)

    @property
    def is_multilabel(self) -> bool:
        """Whether a case may have several labels, or none."""
        return self.targets.ndim == 2

    @property
    def truth(self) -> np.ndarray:
        """(n, k) bool: the true class or labels of each case."""
        return one_hot(self.targets, len(self.names))

    @property
    def decided(self) -> np.ndarray:
        """(n, k) bool: the most probable class, the first of equal ones; or labels from 0.5 up."""
        if self.is_multilabel:
            return self.probabilities >= DECISION
        return one_hot(self.probabilities.argmax(axis=1), len(self.names))


@dataclass(frozen=True, slots=True, eq=False)
class ClassMetrics:
    """All metrics of one set of predictions.

    Args:
        of_class: class name → metric → value of that class against all others.
        average: `overall`, `macro` or `weighted` → metric → value.
        confusion: (k, k) cases by true class (row) and predicted class (column); None with several
            labels at once.
        support: (k,) cases of each class.
    """

    of_class: Mapping[str, Mapping[str, Value]]
    average: Mapping[str, Mapping[str, Value]]
    confusion: np.ndarray | None
    support: np.ndarray


def evaluate_classes(
    predictions: ClassPredictions, weights: np.ndarray | None = None
) -> ClassMetrics:
    """Return every metric, for each class, overall and averaged over classes.

    A class is compared with all others. `macro` is the mean over the classes in which a metric is
    defined, `weighted` the mean weighted by their cases; the reason names classes left out.

    Args:
        weights: (n,) ≥ 0 of each case; None: all equal.
    """
    row = np.ones((1, len(predictions))) if weights is None else np.atleast_2d(weights)
    support = row @ predictions.truth
    by_class, overall = class_metrics(predictions, row), overall_metrics(predictions, row)
    names = predictions.names
    of_class, average = {name: {} for name in names}, {name: {} for name in AVERAGES}
    average[OVERALL] = {name: _value(float(values[0])) for name, values in overall.items()}
    for metric, values in by_class.items():
        reasons = [
            "" if math.isfinite(value) else _reason(metric, predictions, number)
            for number, value in enumerate(values[0])
        ]
        for name, value, reason in zip(names, values[0], reasons, strict=True):
            of_class[name][metric] = _value(float(value), reason)
        for kind, weight in ((MACRO, np.ones_like(support)), (WEIGHTED, support)):
            value = float(mean_over_classes(values, weight)[0])
            average[kind][metric] = _value(value, _left_out(names, values[0], weight[0]))
    return ClassMetrics(of_class, average, confusion(predictions, row[0]), support[0])


def confusion(
    predictions: ClassPredictions, weights: np.ndarray | None = None
) -> np.ndarray | None:
    """Return (k, k) cases by true class (row) and predicted class; None with several labels."""
    if predictions.is_multilabel:
        return None
    weights = np.ones(len(predictions)) if weights is None else weights
    return (predictions.truth * weights[:, None]).T @ predictions.decided.astype(np.float64)


def class_metrics(predictions: ClassPredictions, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Return each metric of each class against all others under each row of weights.

    Args:
        weights: (B, n) ≥ 0, one row per resample.

    Returns:
        Name → (B, k); NaN is undefined. `recall` is `sensitivity`, `precision` the positive
        predictive value, `balanced_accuracy` the mean of sensitivity and specificity.
    """
    return _rates(predictions, weights) | _ranked_metrics(predictions, weights)


def _rates(predictions: ClassPredictions, weights: np.ndarray) -> dict[str, np.ndarray]:
    truth, guess = predictions.truth, predictions.decided
    both, neither = weights @ (truth & guess), weights @ ~(truth | guess)
    missed, false = weights @ (truth & ~guess), weights @ (guess & ~truth)
    sensitivity, specificity = ratio(both, both + missed), ratio(neither, neither + false)
    return {
        "accuracy": ratio(both + neither, both + neither + missed + false),
        "balanced_accuracy": (sensitivity + specificity) / 2,
        "sensitivity": sensitivity,
        "specificity": specificity,
        "precision": ratio(both, both + false),
        "recall": sensitivity,
        "f1": ratio(2 * both, 2 * both + missed + false),
    }


def _ranked_metrics(predictions: ClassPredictions, weights: np.ndarray) -> dict[str, np.ndarray]:
    aucs, precisions = zip(
        *(
            ranked_metrics(Ranking.of(scores), truth, weights)
            for scores, truth in zip(predictions.probabilities.T, predictions.truth.T, strict=True)
        ),
        strict=True,
    )
    return {"auc": np.stack(aucs, axis=1), "average_precision": np.stack(precisions, axis=1)}


def overall_metrics(predictions: ClassPredictions, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Return the metrics that belong to no single class under each row of (B, n) weights.

    `accuracy` is the fraction of cases whose class, or whose every label, is right;
    `balanced_accuracy` the mean sensitivity over the classes that have cases.

    Returns:
        Name → (B,); NaN is undefined.
    """
    truth, total = predictions.truth, weights.sum(axis=1)
    is_right = (truth == predictions.decided).all(axis=1).astype(np.float64)
    sensitivity = ratio(weights @ (truth & predictions.decided), weights @ truth)
    if predictions.is_multilabel:
        balanced = mean_over_classes(_rates(predictions, weights)["balanced_accuracy"])
    else:
        balanced = mean_over_classes(sensitivity)
    loss, brier = (
        score(predictions.probabilities, truth, multilabel=predictions.is_multilabel)
        for score in (case_log_losses, case_briers)
    )
    return {
        "accuracy": ratio(weights @ is_right, total),
        "balanced_accuracy": balanced,
        "log_loss": ratio(weights @ loss, total),
        "brier": ratio(weights @ brier, total),
    }


def mean_over_classes(values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Return (B,) the mean of (B, k) values over classes, without NaN; NaN if all are."""
    weights = np.ones_like(values) if weights is None else weights
    is_defined = np.isfinite(values)
    sums = (np.where(is_defined, values, 0.0) * weights).sum(axis=1)
    return ratio(sums, (is_defined * weights).sum(axis=1))


def _value(value: float, reason: str = "") -> Value:
    return Value(value if math.isfinite(value) else None, reason)


def _reason(metric: str, predictions: ClassPredictions, number: int) -> str:
    """Return why a metric of a class is undefined."""
    is_true = predictions.truth[:, number]
    if metric == "precision":
        return "the class is never predicted"
    if metric == "f1":
        return "no case has the class or is predicted to have it"
    if not is_true.any():
        return "no case has the class"
    return "every case has the class" if is_true.all() else "the cases have no weight"


def _left_out(names: Sequence[str], values: np.ndarray, weights: np.ndarray) -> str:
    """Return which classes an average leaves out, or that there is none to average."""
    is_defined = np.isfinite(values)
    missing = [name for name, defined in zip(names, is_defined, strict=True) if not defined]
    if not missing:
        return ""
    if not weights[is_defined].any():
        return "undefined in every class that has cases"
    return f"without {format_list(missing, 5)}, where it is undefined"


# ---- scores by which training compares epochs


@dataclass(frozen=True, slots=True)
class Score:
    """A number by which training chooses the best epoch.

    Args:
        function: (predicted, targets) → value, NaN if undefined. For classes: (n, k) probabilities
            with (n,) class index or (n, k) bool. For numbers: (n,) and (n,).
        higher_is_better: else lower is.
        task: what is predicted.
    """

    function: Callable[[np.ndarray, np.ndarray], float]
    higher_is_better: bool
    task: Literal["classes", "numbers"] = "classes"

    def __call__(self, predicted: np.ndarray, targets: np.ndarray) -> float | None:
        """Return the score; None if it is undefined, such as an AUC without positive cases."""
        value = self.function(predicted, targets)
        return value if math.isfinite(value) else None

    def is_better(self, score: float | None, best: float | None) -> bool:
        """Check whether a score is strictly better than the best so far; undefined never is."""
        if score is None or best is None:
            return score is not None
        return score > best if self.higher_is_better else score < best


def _unnamed(probabilities: np.ndarray, targets: np.ndarray) -> ClassPredictions:
    names = [str(number) for number in range(np.shape(probabilities)[1])]
    return ClassPredictions(probabilities, targets, names)


def _macro(metric: str) -> Callable[[np.ndarray, np.ndarray], float]:
    def score(probabilities: np.ndarray, targets: np.ndarray) -> float:
        predictions = _unnamed(probabilities, targets)
        weights = np.ones((1, len(predictions)))
        return float(mean_over_classes(class_metrics(predictions, weights)[metric])[0])

    return score


def _overall(metric: str) -> Callable[[np.ndarray, np.ndarray], float]:
    def score(probabilities: np.ndarray, targets: np.ndarray) -> float:
        predictions = _unnamed(probabilities, targets)
        return float(overall_metrics(predictions, np.ones((1, len(predictions))))[metric][0])

    return score


# `auc`, `average_precision` and `f1` are means over the classes in which they are defined.
SCORES: dict[str, Score] = {
    "auc": Score(_macro("auc"), higher_is_better=True),
    "average_precision": Score(_macro("average_precision"), higher_is_better=True),
    "accuracy": Score(_overall("accuracy"), higher_is_better=True),
    "balanced_accuracy": Score(_overall("balanced_accuracy"), higher_is_better=True),
    "f1": Score(_macro("f1"), higher_is_better=True),
    "log_loss": Score(_overall("log_loss"), higher_is_better=False),
    "mae": Score(mean_absolute_error, higher_is_better=False, task="numbers"),
    "mse": Score(mean_squared_error, higher_is_better=False, task="numbers"),
    "r2": Score(explained_variance, higher_is_better=True, task="numbers"),
}

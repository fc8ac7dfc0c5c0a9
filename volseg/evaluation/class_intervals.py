"""Metrics of classes and numbers with intervals over patients: one model, two models, subgroups."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from volseg.columns import column, optional
from volseg.evaluation.bootstrap import (
    Estimate,
    Resampling,
    Statistics,
    bootstrap,
    bootstrap_difference,
)
from volseg.evaluation.calibration import calibration_error
from volseg.evaluation.classes import (
    MACRO,
    OVERALL,
    WEIGHTED,
    ClassMetrics,
    ClassPredictions,
    class_metrics,
    evaluate_classes,
    mean_over_classes,
    overall_metrics,
)
from volseg.evaluation.intervals import Interval
from volseg.evaluation.operating import OperatingPoint
from volseg.evaluation.ranking import ratio
from volseg.evaluation.regression import NumberPredictions, number_metrics

FRACTION, ANY_ERROR, FROM_BELOW = (0.0, 1.0), (0.0, np.inf), (-np.inf, 1.0)
BOUNDS = {"log_loss": ANY_ERROR, "mae": ANY_ERROR, "mse": ANY_ERROR, "rmse": ANY_ERROR}
BOUNDS |= {"r2": FROM_BELOW, "bias": (-np.inf, np.inf)}
MOST_GROUPS = 10  # values of a column of numbers; with more it is cut into thirds
NUMBER = re.compile(r"[-+]?\d+(\.\d*)?")
UNKNOWN_GROUP = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricRow:
    """One metric of a class or an average, over all cases or a subgroup; an empty cell: unknown."""

    metric: str = column("", "name of the metric; docs/classes.md defines each")
    class_name: str = column("", "class, against all others; empty for an average")
    average: str = column(
        "", "overall, macro (mean over classes) or weighted (by their cases); empty for a class"
    )
    group_column: str = column("", "column of the reference that defines the subgroup, if any", "")
    group_value: str = column("", "value in that column", "")
    model: str = column("", "model; for a difference both, as A − B", "")
    baseline: str = column(
        "", "simple model that the row is about; empty if it is about the model itself", ""
    )
    value: float | None = optional("", "value of the metric")
    low: float | None = optional("", "lower end of its 95 % interval over patients")
    high: float | None = optional("", "upper end")
    p_value: float | None = optional(
        "0 to 1", "two-sided p-value of the hypothesis that the difference is 0"
    )
    n: int = column("", "number of cases")
    n_patients: int = column("", "number of patients")
    reason: str = column(
        "", "why value or interval is missing, or which classes an average leaves out", ""
    )


def text_of_metric(row: MetricRow | None) -> str:
    """Return a value with its interval.

    >>> text_of_metric(MetricRow(metric="auc", class_name="", average="macro", n=9, n_patients=9,
    ...     value=0.91234, low=0.88, high=0.9567))
    '0.912 (95 %: 0.880 to 0.957)'
    """
    if row is None or row.value is None:
        return ""
    digits = 3 if abs(row.value) < 10 else 1
    if row.low is None or row.high is None:
        return f"{row.value:.{digits}f}"
    return f"{row.value:.{digits}f} (95 %: {row.low:.{digits}f} to {row.high:.{digits}f})"


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """Predictions of one model with the patient of each case; what intervals are computed from.

    Args:
        predictions: of classes or of numbers.
        patients: (n,) the patient of each case.
        model: its name.
    """

    predictions: ClassPredictions | NumberPredictions
    patients: Sequence[Hashable]
    model: str = ""

    def __post_init__(self) -> None:
        if len(self.patients) != len(self.predictions):
            raise ValueError(
                f"{len(self.predictions)} cases but {len(self.patients)} patients were given"
            )

    @property
    def statistics(self) -> Statistics:
        """`average\\tclass\\tmetric` → its values, from weights of the cases."""
        if isinstance(self.predictions, NumberPredictions):
            return _number_statistics(self.predictions)
        return _class_statistics(self.predictions)

    def subset(self, is_in: np.ndarray) -> Judged:
        """Return the cases where `is_in` (n,) is true."""
        patients = [name for name, take in zip(self.patients, is_in, strict=True) if take]
        p = self.predictions
        if isinstance(p, NumberPredictions):
            taken = replace(p, predicted=p.predicted[is_in], targets=p.targets[is_in])
        else:
            taken = replace(p, probabilities=p.probabilities[is_in], targets=p.targets[is_in])
        return replace(self, predictions=taken, patients=patients)


def metric_rows(judged: Judged, *, resampling: Resampling | None = None) -> list[MetricRow]:
    """Return every metric with its interval over patients.

    The calibration error (`ece`) has no interval: resampling alone raises it.
    """
    p, statistics = judged.predictions, judged.statistics
    names = list(statistics(np.ones((1, len(p)))))
    bounds = {name: BOUNDS.get(_metric_of(name), FRACTION) for name in names}
    estimates = bootstrap(
        statistics,
        judged.patients,
        bounds=bounds,
        n_relevant={name: _n_relevant(name, judged) for name in names},
        resampling=resampling,
    )
    reasons = {} if isinstance(p, NumberPredictions) else _reasons(evaluate_classes(p))
    rows = [_row(name, estimate, judged, reasons) for name, estimate in estimates.items()]
    if isinstance(p, ClassPredictions):
        ece = calibration_error(p.probabilities, p.targets)
        missing = Estimate(ece, Interval(reason="no interval: resampling alone raises it"))
        rows.append(_row(f"{OVERALL}\t\tece", missing, judged, {}))
    return rows


def difference_rows(
    judged: Judged, other: Judged, *, resampling: Resampling | None = None
) -> list[MetricRow]:
    """Return judged − other of every metric, for two models on the same cases in the same order.

    Raises:
        ValueError: patients or truth of the two differ.
    """
    if list(judged.patients) != list(other.patients) or not np.array_equal(
        judged.predictions.targets, other.predictions.targets
    ):
        raise ValueError("both models must be judged on the same cases, in the same order")
    estimates = bootstrap_difference(
        judged.statistics, other.statistics, judged.patients, resampling=resampling
    )
    both = replace(judged, model=f"{judged.model} − {other.model}")
    names = judged.statistics(np.ones((1, len(judged.predictions))))
    return [_row(name, estimates[name], both, {}) for name in names if name in estimates]


def subgroup_rows(
    judged: Judged,
    column_name: str,
    values: Sequence[str],
    *,
    resampling: Resampling | None = None,
) -> list[MetricRow]:
    """Return every metric within each group of cases; see `groups_of`.

    Args:
        values: (n,) cell of the column `column_name` for each case.
    """
    groups, rows = groups_of(values), list[MetricRow]()
    for group in dict.fromkeys(sorted(groups, key=_group_order)):
        is_in = np.array([name == group for name in groups])
        rows += [
            replace(row, group_column=column_name, group_value=group)
            for row in metric_rows(judged.subset(is_in), resampling=resampling)
        ]
    return rows


def operating_rows(
    judged: Judged, points: Sequence[OperatingPoint], *, resampling: Resampling | None = None
) -> list[MetricRow]:
    """Return rates at thresholds that were chosen on other cases.

    They are sensitivity, specificity, precision and accuracy of the class against all others, and
    are called after the point, such as `sensitivity at youden`. Points of classes that
    these predictions lack are left out.
    """
    p = judged.predictions
    if isinstance(p, NumberPredictions):
        return []
    rows = []
    for point in (point for point in points if point.class_name in p.names):
        number = list(p.names).index(point.class_name)
        truth, called = p.truth[:, number], point.decide(p.probabilities[:, number])
        names = {kind: f"{kind} at {point.name}" for kind in RATES}
        estimates = bootstrap(
            _rates_at(names, truth, called),
            judged.patients,
            bounds=dict.fromkeys(names.values(), FRACTION),
            n_relevant={
                names[kind]: _n_patients(RELEVANT[kind](truth, called)[0], judged.patients)
                for kind in RATES
            },
            resampling=resampling,
        )
        rows += [
            _row(f"\t{point.class_name}\t{name}", estimate, judged, {})
            for name, estimate in estimates.items()
        ]
    return rows


RATES = ("sensitivity", "specificity", "precision", "accuracy")


def _rates_at(names: Mapping[str, str], truth: np.ndarray, called: np.ndarray) -> Statistics:
    def statistics(weights: np.ndarray) -> dict[str, np.ndarray]:
        hits, total = weights @ (truth & called), weights.sum(axis=1)
        rates = (
            ratio(hits, weights @ truth),
            ratio(weights @ ~(truth | called), weights @ ~truth),
            ratio(hits, weights @ called),
            ratio(weights @ (truth == called), total),
        )
        return {names[kind]: rate for kind, rate in zip(RATES, rates, strict=True)}

    return statistics


def groups_of(values: Sequence[str]) -> list[str]:
    """Return the group of each case: its value, or the third in which its number lies.

    An empty cell is the group `unknown`. If all others are numbers and over ten different ones,
    the groups are thirds of the cases, named by their limits.

    >>> groups_of(["f", "", "m"])
    ['f', 'unknown', 'm']
    """
    filled = [value for value in values if value]
    if len(set(filled)) <= MOST_GROUPS or not all(map(NUMBER.fullmatch, filled)):
        return [value or UNKNOWN_GROUP for value in values]
    numbers = np.array([float(value) for value in filled])
    low, high = np.quantile(numbers, [1 / 3, 2 / 3], method="inverted_cdf")

    def third(text: str) -> str:
        if not text:
            return UNKNOWN_GROUP
        number = float(text)
        if number <= low:
            return f"up to {low:g}"
        return f"over {low:g} to {high:g}" if number <= high else f"over {high:g}"

    return [third(value) for value in values]


def _group_order(name: str) -> tuple[int, float, str]:
    """Sort thirds by their limits, names by the alphabet and unknown values last."""
    number = NUMBER.fullmatch(name.rpartition(" ")[2])
    if name == UNKNOWN_GROUP:
        return 2, 0.0, name
    is_last = not name.startswith("up to") and " to " not in name and name.startswith("over ")
    return 1 if is_last else 0, float(number[0]) if number else 0.0, name


def _class_statistics(predictions: ClassPredictions) -> Statistics:
    def statistics(weights: np.ndarray) -> dict[str, np.ndarray]:
        by_class, support = class_metrics(predictions, weights), weights @ predictions.truth
        overall = overall_metrics(predictions, weights)
        values = {f"{OVERALL}\t\t{name}": value for name, value in overall.items()}
        for kind, weight in ((MACRO, None), (WEIGHTED, support)):
            for name, value in by_class.items():
                values[f"{kind}\t\t{name}"] = mean_over_classes(value, weight)
        for number, class_name in enumerate(predictions.names):
            for name, value in by_class.items():
                values[f"\t{class_name}\t{name}"] = value[:, number]
        return values

    return statistics


def _number_statistics(predictions: NumberPredictions) -> Statistics:
    def statistics(weights: np.ndarray) -> dict[str, np.ndarray]:
        values = number_metrics(predictions, weights)
        return {f"{OVERALL}\t\t{name}": value for name, value in values.items()}

    return statistics


def _metric_of(name: str) -> str:
    return _parts(name)[2]


def _parts(name: str) -> tuple[str, str, str]:
    """Return average, class and metric of a name; a class may be called `macro`, or hold a tab."""
    average, _, other = name.partition("\t")
    class_name, _, metric = other.rpartition("\t")
    return average, class_name, metric


def _n_relevant(name: str, judged: Judged) -> int:
    """Return on how many patients a metric depends; of several groups, on the smallest."""
    predictions, (average, class_name, metric) = judged.predictions, _parts(name)
    everyone = len(set(judged.patients))
    if isinstance(predictions, NumberPredictions):
        return everyone
    if average == OVERALL and metric != "balanced_accuracy":
        return everyone
    numbers = [] if average else [list(predictions.names).index(class_name)]
    truth, decided = predictions.truth, predictions.decided
    counts = [
        _n_patients(is_in, judged.patients)
        for number in numbers or range(len(predictions.names))
        for is_in in RELEVANT[metric](truth[:, number], decided[:, number])
    ]
    return min([count for count in counts if count], default=everyone)


def _n_patients(is_in: np.ndarray, patients: Sequence[Hashable]) -> int:
    return len({patient for patient, take in zip(patients, is_in, strict=True) if take})


Masks = Callable[[np.ndarray, np.ndarray], Sequence[np.ndarray]]


def _both_kinds(truth: np.ndarray, decided: np.ndarray) -> Sequence[np.ndarray]:
    return truth, ~truth


# metric → groups of cases on each of which it depends, from truth and decision
RELEVANT: dict[str, Masks] = {
    "accuracy": lambda truth, decided: [truth | ~truth],
    "balanced_accuracy": _both_kinds,
    "sensitivity": lambda truth, decided: [truth],
    "recall": lambda truth, decided: [truth],
    "specificity": lambda truth, decided: [~truth],
    "precision": lambda truth, decided: [decided],
    "f1": lambda truth, decided: [truth | decided],
    "auc": _both_kinds,
    "average_precision": _both_kinds,
}


def _reasons(metrics: ClassMetrics) -> Mapping[str, str]:
    prefixed = {f"\t{name}": values for name, values in metrics.of_class.items()}
    prefixed |= {f"{name}\t": values for name, values in metrics.average.items()}
    return {
        f"{name}\t{metric}": value.reason
        for name, values in prefixed.items()
        for metric, value in values.items()
    }


def _row(name: str, estimate: Estimate, judged: Judged, reasons: Mapping[str, str]) -> MetricRow:
    average, class_name, metric = _parts(name)
    low, high = estimate.interval.ends or (None, None)
    reason = estimate.interval.reason if estimate.value is not None else ""
    return MetricRow(
        metric=metric,
        class_name=class_name,
        average=average,
        model=judged.model,
        value=estimate.value,
        low=low,
        high=high,
        p_value=estimate.p_value,
        n=len(judged.predictions),
        n_patients=len(set(judged.patients)),
        reason="; ".join(filter(None, (reasons.get(name, ""), reason))),
    )

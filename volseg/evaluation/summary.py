"""Summary of an evaluation: means, limits of agreement and detection rates with intervals."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from volseg.evaluation.agreement import Agreement, agreement
from volseg.evaluation.detection import (
    FALSE_POSITIVE_RATES,
    DetectionRow,
    Detections,
    Froc,
    froc,
    size_bins,
)
from volseg.evaluation.intervals import ANY_NUMBER, mean_interval
from volseg.evaluation.overlap import FRACTION, METRICS, NOT_NEGATIVE, OverlapRow


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over scans or lesions; None is unknown.

    Args:
        mean_95: its 95 % interval over patients; `no_mean_95` says why there is none, else empty.
        n, n_patients: numbers of values and patients.
    """

    mean: float | None
    mean_95: list[float] | None
    no_mean_95: str
    median: float | None
    n: int
    n_patients: int

    def as_rate(self) -> dict[str, Any]:
        """Return its entry in summary.json, without the median."""
        return {name: value for name, value in asdict(self).items() if name != "median"}


@dataclass(frozen=True, slots=True)
class DetectionRates:
    """Rates over all lesions of all cases; F1 is that of reference and predicted together."""

    n_reference: int
    n_predicted: int
    n_matched: int
    sensitivity: Mean
    precision: Mean
    f1: Mean
    false_positives_per_scan: Mean
    iou_of_matched: Mean
    sensitivity_by_diameter_mm: Mapping[str, Mean]

    def as_json(self) -> dict[str, Any]:
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        by_diameter = content.pop("sensitivity_by_diameter_mm")
        return {
            **{
                name: value.as_rate() if isinstance(value, Mean) else value
                for name, value in content.items()
            },
            "sensitivity_by_diameter_mm": {
                name: rate.as_rate() for name, rate in by_diameter.items()
            },
        }


@dataclass(frozen=True, slots=True, eq=False)
class LabelResult:
    """One label over all cases.

    Args:
        n_missed, n_false, n_absent: cases in which the prediction, the reference or both lack the
            label. They have no distances, so a mean distance flatters a model that misses: read it
            beside n_missed.
        metrics: column of evaluation.csv → its mean over cases where either mask has the label.
        reference_ml, predicted_ml: (N,) volumes in those cases. volumes: their agreement.
        curve: FROC, or None; `no_curve` says why.
    """

    label: int
    name: str
    n_missed: int
    n_false: int
    n_absent: int
    metrics: Mapping[str, Mean]
    reference_ml: np.ndarray
    predicted_ml: np.ndarray
    volumes: Agreement
    detection: DetectionRates
    curve: Froc | None
    no_curve: str


def summarise_label(rows: Sequence[OverlapRow], detections: Iterable[DetectionRow]) -> LabelResult:
    """Summarise all rows of one label; a case without a patient counts as its own patient."""
    volumes_ml = np.array([(row.reference_volume_ml, row.predicted_volume_ml) for row in rows])
    reference, predicted = volumes_ml.astype(np.float64).T
    is_present = (reference != 0) | (predicted != 0)
    present = [row for row, is_in in zip(rows, is_present, strict=True) if is_in]
    patients = [patient_of(row) for row in present]
    lesions = Detections.of(detections, rows[0].label)
    curve, no_curve = _curve(lesions, n_scans=len(rows))
    return LabelResult(
        label=rows[0].label,
        name=rows[0].label_name,
        n_missed=int(np.count_nonzero((reference > 0) & (predicted == 0))),
        n_false=int(np.count_nonzero((reference == 0) & (predicted > 0))),
        n_absent=len(rows) - len(present),
        metrics={
            name: mean_of([getattr(row, name) for row in present], patients, bounds=metric.bounds)
            for name, metric in METRICS.items()
        },
        reference_ml=reference[is_present],
        predicted_ml=predicted[is_present],
        volumes=agreement(reference[is_present], predicted[is_present], patients),
        detection=_rates(rows, lesions),
        curve=curve,
        no_curve=no_curve,
    )


def patient_of(row: OverlapRow | DetectionRow) -> tuple[str, str]:
    """Return the patient of a row, or its case if the patient is unknown."""
    return ("case", row.case_id) if row.patient is None else ("patient", row.patient)


def mean_of(
    values: Sequence[float | None],
    patients: Sequence[Hashable],
    groups: Sequence[Hashable] | None = None,
    *,
    bounds: tuple[float, float] = ANY_NUMBER,
) -> Mean:
    """Return the mean of values with its 95 % interval.

    Args:
        values: None or NaN is unknown and left out.
        groups: the group of each value, for a mean of group means.
        bounds: smallest and largest possible value.
    """
    numbers = [math.nan if value is None else float(value) for value in values]
    measured = [(n, p) for n, p in zip(numbers, patients, strict=True) if not math.isnan(n)]
    interval = mean_interval(numbers, patients, groups=groups, bounds=bounds)
    return Mean(
        mean=_mean(numbers, groups) if measured else None,
        mean_95=None if interval.ends is None else list(interval.ends),
        no_mean_95=interval.reason,
        median=float(np.median([number for number, _ in measured])) if measured else None,
        n=len(measured),
        n_patients=len({patient for _, patient in measured}),
    )


def _mean(numbers: Sequence[float], groups: Sequence[Hashable] | None) -> float:
    groups = [None] * len(numbers) if groups is None else groups
    by_group: dict[Hashable, list[float]] = {}
    for number, group in zip(numbers, groups, strict=True):
        if not math.isnan(number):
            by_group.setdefault(group, []).append(number)
    return float(np.mean([np.mean(members) for members in by_group.values()]))


def _rates(rows: Sequence[OverlapRow], lesions: Detections) -> DetectionRates:
    """Return rates as means of 0 or 1 over lesions, so that each patient can be left out."""
    truths, guesses = lesions.references, lesions.predictions
    n_false = {row.case_id: 0 for row in rows}
    for lesion in guesses:
        n_false[lesion.case_id] += lesion.status == "false"
    return DetectionRates(
        n_reference=len(truths),
        n_predicted=len(guesses),
        n_matched=lesions.n_matched,
        sensitivity=_rate(truths),
        precision=_rate(guesses),
        f1=_rate(lesions.all),
        false_positives_per_scan=mean_of(
            [*n_false.values()], [patient_of(row) for row in rows], bounds=NOT_NEGATIVE
        ),
        iou_of_matched=mean_of(
            [lesion.iou for lesion in truths], [*map(patient_of, truths)], bounds=FRACTION
        ),
        sensitivity_by_diameter_mm={
            name: _rate([lesion for lesion in truths if lesion.size_bin == name])
            for name in size_bins()
        },
    )


def _rate(lesions: Sequence[DetectionRow]) -> Mean:
    """Return the fraction of lesions with a partner."""
    is_matched = [lesion.status == "matched" for lesion in lesions]
    return mean_of(is_matched, [patient_of(lesion) for lesion in lesions], bounds=FRACTION)


def _curve(lesions: Detections, n_scans: int) -> tuple[Froc | None, str]:
    truths, guesses = lesions.references, lesions.predictions
    scores = [lesion.confidence for lesion in guesses if lesion.confidence is not None]
    n = len(guesses)
    if not truths:
        return None, "no lesion in any reference"
    if not guesses:
        return None, "no predicted lesion"
    if len(scores) < n:
        return None, f"{n - len(scores)} of {n} predicted lesions have no confidence"
    matched = np.array([lesion.status == "matched" for lesion in guesses])
    return froc(np.array(scores), matched, n_reference=len(truths), n_scans=n_scans), ""


def as_json(result: LabelResult) -> dict[str, Any]:
    """Return the entry of a label in summary.json; None is unknown."""
    dice, volume_error = result.metrics["dice"], result.metrics["volume_error_percent"]
    return {
        "name": result.name,
        "n": dice.n,
        "mean_dice": dice.mean,
        "median_dice": dice.median,
        "median_volume_error_percent": volume_error.median,
        "n_missed": result.n_missed,
        "n_false": result.n_false,
        "n_absent": result.n_absent,
        "metrics": {name: asdict(mean) for name, mean in result.metrics.items()},
        "volume_agreement_ml": {
            field.name: _plain(getattr(result.volumes, field.name)) for field in fields(Agreement)
        },
        "detection": result.detection.as_json(),
        "froc": None if result.curve is None else _curve_json(result.curve),
        "no_froc": result.no_curve,
    }


def _curve_json(curve: Froc) -> dict[str, Any]:
    return {
        "score": curve.score,
        "sensitivity_at_false_positives_per_scan": {
            f"{rate:g}": curve.sensitivity_at(rate) for rate in FALSE_POSITIVE_RATES
        },
        "threshold": curve.thresholds.tolist(),
        "sensitivity": curve.sensitivity.tolist(),
        "false_positives_per_scan": curve.false_positives_per_scan.tolist(),
    }


def _plain(value: float | str | tuple[float, float]) -> float | str | list[float] | None:
    """Convert a value to JSON, in which NaN becomes null."""
    if isinstance(value, str):
        return value
    if isinstance(value, tuple):
        return None if math.isnan(value[0]) else list(value)
    return None if math.isnan(value) else value

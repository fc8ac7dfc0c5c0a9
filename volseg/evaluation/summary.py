"""Summary of an evaluation: means, limits of agreement and detection rates with intervals."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from volseg.evaluation.agreement import Agreement, agreement
from volseg.evaluation.detection import FALSE_POSITIVE_RATES, DetectionRow, Froc, froc, size_bins
from volseg.evaluation.intervals import ANY_NUMBER, mean_interval
from volseg.evaluation.overlap import OverlapRow

FRACTION = (0.0, 1.0)
NOT_NEGATIVE = (0.0, math.inf)

# Column of evaluation.csv → its smallest and largest possible value.
METRICS = {
    "dice": FRACTION,
    "iou": FRACTION,
    "hd95_mm": NOT_NEGATIVE,
    "mean_surface_distance_mm": NOT_NEGATIVE,
    "nsd_1mm": FRACTION,
    "nsd_2mm": FRACTION,
    "volume_error_ml": ANY_NUMBER,
    "volume_error_percent": (-100.0, math.inf),
}


@dataclass(frozen=True, slots=True, eq=False)
class LabelResult:
    """One label over all cases.

    Args:
        n_missed, n_false, n_absent: cases in which the prediction, the reference or both lack the
            label. They have no distances, so a mean distance flatters a model that misses: read it
            beside n_missed.
        metrics: column of evaluation.csv → its `mean_of` over cases where either mask has the
            label.
        reference_ml, predicted_ml: (N,) volumes in those cases. volumes: their agreement.
        detection: rates over all lesions of all cases.
        curve: FROC, or None; `no_curve` says why.
    """

    label: int
    name: str
    n_missed: int
    n_false: int
    n_absent: int
    metrics: Mapping[str, Mapping[str, Any]]
    reference_ml: np.ndarray
    predicted_ml: np.ndarray
    volumes: Agreement
    detection: Mapping[str, Any]
    curve: Froc | None
    no_curve: str


def summarise_label(rows: Sequence[OverlapRow], detections: Sequence[DetectionRow]) -> LabelResult:
    """Summarise all rows of one label; a case without a patient counts as its own patient."""
    present = [row for row in rows if row.reference_volume_ml or row.predicted_volume_ml]
    patients = [patient_of(row) for row in present]
    reference = np.array([row.reference_volume_ml for row in present], dtype=np.float64)
    predicted = np.array([row.predicted_volume_ml for row in present], dtype=np.float64)
    curve, no_curve = _curve(detections, n_scans=len(rows))
    return LabelResult(
        label=rows[0].label,
        name=rows[0].label_name,
        n_missed=sum(row.reference_volume_ml > 0 and row.predicted_volume_ml == 0 for row in rows),
        n_false=sum(row.reference_volume_ml == 0 and row.predicted_volume_ml > 0 for row in rows),
        n_absent=len(rows) - len(present),
        metrics={
            name: mean_of([getattr(row, name) for row in present], patients, bounds=bounds)
            for name, bounds in METRICS.items()
        },
        reference_ml=reference,
        predicted_ml=predicted,
        volumes=agreement(reference.tolist(), predicted.tolist(), patients),
        detection=_detection(rows, detections),
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
) -> dict[str, Any]:
    """Return mean, its 95 % interval, median, and the numbers of values and patients.

    Args:
        values: None or NaN is unknown and left out.
        groups: the group of each value, for a mean of group means.
        bounds: smallest and largest possible value.

    Returns:
        `no_mean_95` says why there is no interval; empty if there is one.
    """
    numbers = [math.nan if value is None else float(value) for value in values]
    measured = [(n, p) for n, p in zip(numbers, patients, strict=True) if not math.isnan(n)]
    interval = mean_interval(numbers, patients, groups=groups, bounds=bounds)
    return {
        "mean": _mean(numbers, groups) if measured else None,
        "mean_95": None if interval.ends is None else list(interval.ends),
        "no_mean_95": interval.reason,
        "median": float(np.median([number for number, _ in measured])) if measured else None,
        "n": len(measured),
        "n_patients": len({patient for _, patient in measured}),
    }


def _mean(numbers: Sequence[float], groups: Sequence[Hashable] | None) -> float:
    groups = [None] * len(numbers) if groups is None else groups
    by_group: dict[Hashable, list[float]] = {}
    for number, group in zip(numbers, groups, strict=True):
        if not math.isnan(number):
            by_group.setdefault(group, []).append(number)
    return float(np.mean([np.mean(members) for members in by_group.values()]))


def _detection(rows: Sequence[OverlapRow], detections: Sequence[DetectionRow]) -> dict[str, Any]:
    """Return rates as means of 0 or 1 over lesions, so that each patient can be left out."""
    truths = [lesion for lesion in detections if lesion.side == "reference"]
    guesses = [lesion for lesion in detections if lesion.side == "predicted"]
    n_false = {row.case_id: 0 for row in rows}
    for lesion in guesses:
        n_false[lesion.case_id] += lesion.status == "false"
    return {
        "n_reference": len(truths),
        "n_predicted": len(guesses),
        "n_matched": sum(lesion.status == "matched" for lesion in truths),
        "sensitivity": _rate(truths),
        "precision": _rate(guesses),
        "f1": _rate([*truths, *guesses]),
        "false_positives_per_scan": _rate_of(
            list(n_false.values()), [patient_of(row) for row in rows], NOT_NEGATIVE
        ),
        "iou_of_matched": _rate_of(
            [lesion.iou for lesion in truths], [patient_of(lesion) for lesion in truths]
        ),
        "sensitivity_by_diameter_mm": {
            name: _rate([lesion for lesion in truths if lesion.size_bin == name])
            for name in size_bins()
        },
    }


def _rate(lesions: Sequence[DetectionRow]) -> dict[str, Any]:
    """Return the fraction of lesions with a partner: F1 for reference and predicted together."""
    is_matched = [lesion.status == "matched" for lesion in lesions]
    return _rate_of(is_matched, [patient_of(lesion) for lesion in lesions])


def _rate_of(
    values: Sequence[float | None],
    patients: Sequence[Hashable],
    bounds: tuple[float, float] = FRACTION,
) -> dict[str, Any]:
    summary = mean_of(values, patients, bounds=bounds)
    return {name: value for name, value in summary.items() if name != "median"}


def _curve(detections: Sequence[DetectionRow], n_scans: int) -> tuple[Froc | None, str]:
    truths = [lesion for lesion in detections if lesion.side == "reference"]
    guesses = [lesion for lesion in detections if lesion.side == "predicted"]
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
    curve = result.curve
    return {
        "name": result.name,
        "n": result.metrics["dice"]["n"],
        "mean_dice": result.metrics["dice"]["mean"],
        "median_dice": result.metrics["dice"]["median"],
        "median_volume_error_percent": result.metrics["volume_error_percent"]["median"],
        "n_missed": result.n_missed,
        "n_false": result.n_false,
        "n_absent": result.n_absent,
        "metrics": dict(result.metrics),
        "volume_agreement_ml": {
            field.name: _plain(getattr(result.volumes, field.name)) for field in fields(Agreement)
        },
        "detection": dict(result.detection),
        "froc": None
        if curve is None
        else {
            "score": curve.score,
            "sensitivity_at_false_positives_per_scan": {
                f"{rate:g}": curve.sensitivity_at(rate) for rate in FALSE_POSITIVE_RATES
            },
            "threshold": curve.thresholds.tolist(),
            "sensitivity": curve.sensitivity.tolist(),
            "false_positives_per_scan": curve.false_positives_per_scan.tolist(),
        },
        "no_froc": result.no_curve,
    }


def _plain(value: float | str | tuple[float, float]) -> float | str | list[float] | None:
    """Convert a value to JSON, in which NaN becomes null."""
    if isinstance(value, str):
        return value
    if isinstance(value, tuple):
        return None if math.isnan(value[0]) else list(value)
    return None if math.isnan(value) else value

"""Rows of an evaluation → what a paper says: means, limits of agreement and detection, each with its 95 % interval over patients."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from volseg.evaluate.agreement import Agreement, agreement
from volseg.evaluate.detection import (
    FALSE_POSITIVE_RATES,
    DetectionRow,
    Froc,
    froc,
    size_bins,
)
from volseg.evaluate.intervals import ANY_NUMBER, mean_interval
from volseg.evaluate.overlap import OverlapRow

SHARE = (0.0, 1.0)
NOT_NEGATIVE = (0.0, math.inf)

# Column of evaluation.csv → the smallest and largest value that it can have.
METRICS = {
    "dice": SHARE,
    "iou": SHARE,
    "hd95_mm": NOT_NEGATIVE,
    "mean_surface_distance_mm": NOT_NEGATIVE,
    "nsd_1mm": SHARE,
    "nsd_2mm": SHARE,
    "volume_error_ml": ANY_NUMBER,
    "volume_error_percent": (-100.0, math.inf),
}


@dataclass(frozen=True, slots=True, eq=False)
class LabelResult:
    """One label over all cases.

    Args:
        n_missed, n_false, n_absent: cases of which the prediction lacks the label, the reference does, both do. Distances
            are unknown in all of them, so that a mean distance alone flatters a model that misses: read it beside n_missed.
        metrics: column of evaluation.csv → what `mean_of` says of it, over the cases where either mask has the label.
        reference_ml, predicted_ml: (N,) volumes in those cases; `volumes` is how they agree.
        detection: rates over all lesions of all cases. curve: None without a FROC; `no_curve` says why.
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
    """All rows of one label; a case without a patient counts as a patient of its own."""
    present = [row for row in rows if row.reference_volume_ml or row.predicted_volume_ml]
    patients = [patient_of(row) for row in present]
    reference, predicted = (
        np.array([getattr(row, side) for row in present], dtype=np.float64)
        for side in ("reference_volume_ml", "predicted_volume_ml")
    )
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
    """Whose scan it is; the case itself where nobody says."""
    return ("case", row.case_id) if row.patient is None else ("patient", row.patient)


def mean_of(
    values: Sequence[float | None],
    patients: Sequence[Hashable],
    groups: Sequence[Hashable] | None = None,
    *,
    bounds: tuple[float, float] = ANY_NUMBER,
) -> dict[str, Any]:
    """Mean, its 95 % interval, median and how many of how many patients are known; None is unknown.

    Args:
        groups: the mean is that of the means of these.
        bounds: smallest and largest value that there can be.

    Returns:
        `no_mean_95` says why there is no interval; it is empty where there is one.
    """
    numbers = [math.nan if value is None else float(value) for value in values]
    known = [not math.isnan(number) for number in numbers]
    kept = [number for number, is_known in zip(numbers, known) if is_known]
    interval = mean_interval(numbers, patients, groups=groups, bounds=bounds)
    return {
        "mean": _mean(numbers, groups) if kept else None,
        "mean_95": None if interval.ends is None else list(interval.ends),
        "no_mean_95": interval.reason,
        "median": float(np.median(kept)) if kept else None,
        "n": len(kept),
        "n_patients": len({patient for patient, is_known in zip(patients, known) if is_known}),
    }


def _mean(numbers: Sequence[float], groups: Sequence[Hashable] | None) -> float:
    by_group: dict[Hashable, list[float]] = {}
    for number, group in zip(
        numbers, [None] * len(numbers) if groups is None else groups, strict=True
    ):
        if not math.isnan(number):
            by_group.setdefault(group, []).append(number)
    return float(np.mean([np.mean(each) for each in by_group.values()]))


def _detection(rows: Sequence[OverlapRow], detections: Sequence[DetectionRow]) -> dict[str, Any]:
    """Rates over lesions: each is a mean of yes and no over lesions, so that patients can be left out in turn."""
    truths = [lesion for lesion in detections if lesion.side == "reference"]
    guesses = [lesion for lesion in detections if lesion.side == "predicted"]
    false = {row.case_id: 0 for row in rows}
    for lesion in guesses:
        false[lesion.case_id] += lesion.status == "false"
    return {
        "n_reference": len(truths),
        "n_predicted": len(guesses),
        "n_matched": sum(lesion.status == "matched" for lesion in truths),
        "sensitivity": _rate(truths),
        "precision": _rate(guesses),
        "f1": _rate([*truths, *guesses]),
        "false_positives_per_scan": _rate_of(
            list(false.values()), [patient_of(row) for row in rows], NOT_NEGATIVE
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
    """Share of these lesions that have a partner. Of reference and predicted ones together it is F1."""
    return _rate_of(
        [lesion.status == "matched" for lesion in lesions],
        [patient_of(lesion) for lesion in lesions],
    )


def _rate_of(
    values: Sequence[float | None],
    patients: Sequence[Hashable],
    bounds: tuple[float, float] = SHARE,
) -> dict[str, Any]:
    summary = mean_of(values, patients, bounds=bounds)
    return {name: value for name, value in summary.items() if name != "median"}


def _curve(detections: Sequence[DetectionRow], n_scans: int) -> tuple[Froc | None, str]:
    truths = [lesion for lesion in detections if lesion.side == "reference"]
    guesses = [lesion for lesion in detections if lesion.side == "predicted"]
    known = [lesion.confidence for lesion in guesses if lesion.confidence is not None]
    if not truths:
        return None, "no lesion in any reference"
    if not guesses:
        return None, "no predicted lesion"
    if len(known) < len(guesses):
        return (
            None,
            f"{len(guesses) - len(known)} of {len(guesses)} predicted lesions have no confidence",
        )
    matched = np.array([lesion.status == "matched" for lesion in guesses])
    return froc(np.array(known), matched, n_reference=len(truths), n_scans=n_scans), ""


def as_json(result: LabelResult) -> dict[str, Any]:
    """What summary.json says of a label; None is unknown."""
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
            name: _plain(getattr(result.volumes, name))
            for name in (field.name for field in fields(Agreement))
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
    """For JSON, which has no NaN."""
    if isinstance(value, str):
        return value
    if isinstance(value, tuple):
        return None if math.isnan(value[0]) else list(value)
    return None if math.isnan(value) else value

"""`volseg evaluate`: compare predicted masks with reference masks."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from volseg.columns import row_of
from volseg.commands.batch import digest_of, failure_reason
from volseg.errors import VolsegError
from volseg.evaluation.detection import DetectionRow, NoisyMaskError, detect_lesions, with_lesions
from volseg.evaluation.memory import LIBRARIES, most_evaluating, plan_evaluating, plan_reading
from volseg.evaluation.overlap import COUNTED_TOGETHER, OverlapRow, evaluate_case, row_of_absent
from volseg.evaluation.summary import (
    METRICS,
    LabelResult,
    as_json,
    mean_of,
    patient_of,
    summarise_label,
)
from volseg.execution.local import run
from volseg.execution.memory import Budget
from volseg.io.cases import IGNORE, Case, find_cases, find_scans, has_description, stated_labels
from volseg.io.csv_text import iterate_csv
from volseg.io.files import json_text
from volseg.io.nifti import read_mask
from volseg.io.nifti_header import read_header
from volseg.options import EvaluateOptions, command
from volseg.postprocessing.lesions import MANY
from volseg.reports import EvaluateReport
from volseg.store.evaluations import DETECTIONS, EVALUATION, SUMMARY, EvaluatedCase, read_evaluation
from volseg.store.outputs import RECORDS, OutputFolder, trace_name
from volseg.store.records import STALE
from volseg.store.tables import table
from volseg.volume import Volume, slabs_of

TABLES, PICTURES = (EVALUATION, DETECTIONS, SUMMARY), ("agreement.png", "froc.png")
SAME_PLACE_MM = 0.01  # tables round centroids to four digits
Row = TypeVar("Row", OverlapRow, DetectionRow)


@command(EvaluateOptions)
def evaluate(options: EvaluateOptions) -> EvaluateReport:
    """Compare predicted with reference masks, matched by name: overlap, distances, detection.

    Raises:
        VolsegError: no case has both masks. A pair that cannot be compared becomes a failed row.
    """
    reference, predicted, min_iou = options.reference, options.predicted, options.min_iou
    truths, guesses = _masks(reference), _masks(predicted)
    common = [name for name in truths if name in guesses]
    if not common:
        raise VolsegError(
            f"no mask of {predicted} has the name of one in {reference}, "
            f"such as {next(iter(truths), 'none')!r}",
            fix="name the masks after their cases",
            code="E_DATASET",
        )
    predictions = _Predictions.of(predicted)
    stated = _stated_labels(reference)
    ignored = stated.pop(IGNORE, None)
    names = predictions.label_names | {value: name for name, value in stated.items()}

    budget = Budget(
        options.max_ram,
        options.announce,
        what="comparing these masks",
        otherwise="cut both masks to the region that matters",
        libraries=LIBRARIES,
    )

    def compare(case_id: str) -> EvaluatedCase:
        truth, guess = _read_within(budget, case_id, truths[case_id].path, guesses[case_id].path)
        masks = truth.sha256, guess.sha256
        if ignored is not None and truth.array.shape == guess.array.shape:
            for part in slabs_of(truth.array):
                unannotated = truth.array[part] == ignored  # counted as background in both
                truth.array[part][unannotated] = guess.array[part][unannotated] = 0
        values = {
            value
            for mask in (truth, guess)
            for part in slabs_of(mask.array, COUNTED_TOGETHER)
            for value in np.unique(mask.array[part]).tolist()
            if value
        }
        case_names = {value: names.get(value, f"label_{value}") for value in values}
        patient = truths[case_id].patient
        rows = evaluate_case(truth, guess, case_names, case_id=case_id)
        try:
            detections = detect_lesions(truth, guess, case_names, case_id=case_id, min_iou=min_iou)
        except NoisyMaskError as error:
            rows = [replace(row, patient=patient, notes=_joined(row.notes, error)) for row in rows]
            return EvaluatedCase(overlap=rows, detections=[], masks=masks)
        detections = [
            replace(row, patient=patient, confidence=predictions.confidence_of(row))
            for row in detections
        ]
        lesions_of = _by_label(detections)
        rows = [
            with_lesions(replace(row, patient=patient), lesions_of.get(row.label, ()))
            for row in rows
        ]
        return EvaluatedCase(overlap=rows, detections=detections, masks=masks)

    used = [reference, predicted]
    used += [mask.path for mask in (*truths.values(), *guesses.values())]
    with OutputFolder(options.out, "evaluate", inputs=used) as outputs:
        outputs.refuse_foreign([*TABLES, *PICTURES])
        compared: dict[str, EvaluatedCase] = {}
        failed: dict[str, str] = {}
        for count, outcome in enumerate(run(compare, common), start=1):
            options.progress("Comparing", count / len(common), outcome.item)
            if outcome.error is None and outcome.value is not None:
                compared[outcome.item] = outcome.value
            elif outcome.error is not None:
                failed[outcome.item] = failure_reason(outputs, outcome.item, outcome.error)
        earlier_iou, earlier = read_evaluation(outputs, failed) if failed else (None, {})
        kept = {
            name: _as_stale(earlier[name], reason)
            for name, reason in failed.items()
            # Rows of different min_iou cannot be averaged: keep earlier ones only if none is new.
            if name in earlier
            and (earlier_iou == min_iou or not compared)
            and earlier[name].masks == (digest_of(truths[name].path), digest_of(guesses[name].path))
        }
        comparisons = compared | kept
        listed = {name: comparisons[name] for name in common if name in comparisons}
        rows = _completed({name: comparison.overlap for name, comparison in listed.items()}, truths)
        detections = [row for comparison in listed.values() for row in comparison.detections]
        rows_of, lesions_of = _by_label(rows), _by_label(detections)
        results = [
            summarise_label(rows_of[label], lesions_of.get(label, ())) for label in sorted(rows_of)
        ]
        summary = {
            **_overall(rows, truths, listed.keys()),
            "labels": {str(result.label): as_json(result) for result in results},
            "min_iou": earlier_iou if kept and not compared else min_iou,
            "masks": {name: list(comparison.masks) for name, comparison in listed.items()},
            "not_predicted": sorted(set(truths) - set(guesses)),
            "not_in_reference": sorted(set(guesses) - set(truths)),
            "failed": failed,
            "warnings": [*_noisy(rows), *_stale(kept)],
        }
        failures = [
            row_of(OverlapRow, {"case_id": case_id, "status": "failed", "reason": reason})
            for case_id, reason in failed.items()
            if case_id not in kept
        ]
        with outputs.staged() as commit:
            commit.write(EVALUATION, table(OverlapRow, [*rows, *failures]))
            commit.write(DETECTIONS, table(DetectionRow, detections))
            commit.write(SUMMARY, json_text(summary))
            pictures = _pictures(results)
            for name, picture in pictures.items():
                commit.write(name, picture)
            outdated = [name for name in PICTURES if name not in pictures]
            commit.finish(removed=[*outdated, *map(trace_name, compared)])
    return EvaluateReport(
        out=options.out,
        done=list(compared),
        failed=failed,
        warnings=summary["warnings"],
        summary=summary,
    )


def _as_stale(earlier: EvaluatedCase, reason: str) -> EvaluatedCase:
    """Return the earlier results of a case that failed in this run, marked as stale."""
    stale = f"{STALE}: the last run failed ({reason}); these numbers are from an earlier one"
    notes = (row.notes.partition(STALE)[0].removesuffix("; ") for row in earlier.overlap)
    overlap = [
        replace(row, notes="; ".join(filter(None, (note, stale))))
        for row, note in zip(earlier.overlap, notes, strict=True)
    ]
    return replace(earlier, overlap=overlap)


def _stale(kept: Collection[str]) -> list[str]:
    """Return a warning if rows of an earlier run are kept."""
    if not kept:
        return []
    return [
        f"{STALE}: {len(kept)} cases, such as {next(iter(kept))}, could not be compared this time; "
        "their rows are those of an earlier run, of the same masks"
    ]


def _by_label(rows: Iterable[Row]) -> dict[int, list[Row]]:
    """Group rows by label, in order."""
    rows_by_label: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        rows_by_label[row.label].append(row)
    return rows_by_label


def _read_within(budget: Budget, case_id: str, *paths: Path) -> tuple[Volume, Volume]:
    """Read both masks of a case and announce the peak memory of comparing them.

    Raises:
        ScanError: comparing them may exceed the budget (E_RAM), or a mask cannot be read.
    """
    process, headers = budget.process, [read_header(path) for path in paths]
    reading = plan_reading(headers, process=process)
    if refusal := budget.refusal(reading, enough=most_evaluating(headers, process=process).total):
        raise refusal
    truth, guess = (read_mask(path) for path in paths)
    if truth.geometry.difference(guess.geometry):
        return truth, guess  # evaluating them raises the error
    peak = max(reading, plan_evaluating(truth, guess, process=process), key=lambda peak: peak.total)
    if refusal := budget.refusal(peak):
        raise refusal
    budget.announce(peak, case_id)
    return truth, guess


def _noisy(rows: Sequence[OverlapRow]) -> list[str]:
    """Return a warning for each case whose lesions were not matched."""
    parts = {
        row.case_id: part for row in rows for part in row.notes.split("; ") if "W_SPECKS" in part
    }
    return [f"{part.removeprefix('lesions: ')} ({case_id})" for case_id, part in parts.items()]


def _joined(notes: str, error: NoisyMaskError) -> str:
    return "; ".join(
        filter(None, (notes, f"lesions: {error.code}: {error.problem}, so they were not matched"))
    )


@dataclass(frozen=True, slots=True)
class _Mask:
    path: Path
    patient: str | None = None


def _masks(path: Path) -> dict[str, _Mask]:
    """Return case id → mask of a mask folder, results folder or dataset; with patients if known."""
    if _is_dataset(path):
        return {
            case.id: _Mask(case.reference, case.patient)
            for case in find_cases(path, None)
            if case.reference is not None
        }
    if (path / RECORDS).is_dir() and not (path / "masks").is_dir():
        raise VolsegError(
            f"{path}: holds no masks", fix="give the results of `volseg infer`", code="E_DATASET"
        )
    folder = path / "masks" if (path / "masks").is_dir() else path
    return {case.id: _Mask(_only_file(case)) for case in find_scans([folder], ("image",))}


def _is_dataset(path: Path) -> bool:
    return (
        path.is_file()
        or ((path / "cases.csv").is_file() and not (path / "masks").is_dir())
        or (path / "labels").is_dir()
        or has_description(path)
    )


def _only_file(case: Case) -> Path:
    return next(iter(case.images.values()))


def _stated_labels(reference: Path) -> dict[str, int]:
    return stated_labels(reference) if _is_dataset(reference) else {}


@dataclass(frozen=True, slots=True)
class _Predictions:
    """Lesion confidences and label names from lesions.csv of a results folder, else empty.

    Args:
        confidence: case → (label, number of voxels) → centroid in RAS mm and mean confidence of
            each such lesion; lesion numbers differ if an organ is also a label. Noisy masks, whose
            lesions are not matched, have none.
        label_names: value → name.
    """

    confidence: Mapping[str, Mapping[tuple[int, int], Sequence[tuple[np.ndarray, float]]]]
    label_names: dict[int, str]

    @classmethod
    def of(cls, folder: Path) -> _Predictions:
        table = folder / "lesions.csv"
        if not ((folder / "masks").is_dir() and table.is_file()):
            return cls({}, {})
        try:
            confidence = defaultdict(lambda: defaultdict(list))
            names: dict[int, str] = {}
            n_lines: Counter[str] = Counter()
            for line in iterate_csv(table):
                name = line["case_id"]
                n_lines[name] += 1
                if line["label_name"]:
                    names[int(line["label"])] = line["label_name"]
                if n_lines[name] > MANY:
                    confidence.pop(name, None)
                elif line["confidence_mean"]:
                    centre = np.array([float(line[f"centroid_{axis}_mm"]) for axis in "ras"])
                    key = int(line["label"]), int(line["n_voxels"])
                    confidence[name][key].append((centre, float(line["confidence_mean"])))
            return cls(confidence, names)
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise VolsegError(
                f"{table}: is not a table of lesions ({error!r})",
                fix="run `volseg infer` again",
                code="E_DATASET",
            ) from error

    def confidence_of(self, lesion: DetectionRow) -> float | None:
        """Return the confidence of a predicted lesion; None if its mask changed since the table."""
        if lesion.side != "predicted":
            return None
        centre = np.array([lesion.centroid_r_mm, lesion.centroid_a_mm, lesion.centroid_s_mm])
        entries = self.confidence.get(lesion.case_id, {}).get((lesion.label, lesion.n_voxels), ())
        for centroid, confidence in entries:
            if np.abs(centroid - centre).max() < SAME_PLACE_MM:
                return confidence
        return None


def _completed(
    compared: Mapping[str, Sequence[OverlapRow]], masks: Mapping[str, _Mask]
) -> list[OverlapRow]:
    """Return a row of every label for every case, with rows for labels absent from both masks."""
    names = {row.label: row.label_name for rows in compared.values() for row in rows}
    completed = []
    for case_id, rows in compared.items():
        row_of = {row.label: row for row in rows}
        for label in sorted(names):
            absent = row_of_absent(label, names[label], case_id=case_id)
            absent = with_lesions(replace(absent, patient=masks[case_id].patient), ())
            completed.append(row_of.get(label, absent))
    return completed


def _overall(
    rows: Sequence[OverlapRow], masks: Mapping[str, _Mask], done: Collection[str]
) -> dict[str, Any]:
    """Summarise Dice over all labels, and describe how patients were counted."""
    patients, labels = [patient_of(row) for row in rows], [row.label for row in rows]
    dice = mean_of([row.dice for row in rows], patients, labels, bounds=METRICS["dice"])
    named = {masks[case_id].patient for case_id in done} - {None}
    n_unnamed = sum(masks[case_id].patient is None for case_id in done)
    patients_text = "named by the reference"
    if n_unnamed:
        patients_text = f"{n_unnamed} of {len(done)} cases name none and count as one each"
    return {
        "n_cases": len(done),
        "n_patients": len(named) + n_unnamed,
        "patients": patients_text,
        "mean_dice": dice["mean"],
        "mean_dice_95": dice["mean_95"],
        "no_mean_dice_95": dice["no_mean_95"],
    }


def _pictures(results: Sequence[LabelResult]) -> dict[str, bytes]:
    """Draw the plots for which there is data, as PNG."""
    from volseg.pages.plots import agreement_png, froc_png

    pictures = {}
    if any(result.reference_ml.size for result in results):
        pictures["agreement.png"] = agreement_png(results)
    curves = [(result.name, result.curve) for result in results if result.curve is not None]
    if curves:
        pictures["froc.png"] = froc_png(curves)
    return pictures

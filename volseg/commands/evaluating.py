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
from volseg.evaluation.overlap import ABSENT, COUNTED_TOGETHER, METRICS, OverlapRow, evaluate_case
from volseg.evaluation.summary import (
    LabelResult,
    as_json,
    mean_of,
    patient_of,
    summarise_label,
)
from volseg.execution.local import run
from volseg.execution.memory import Budget
from volseg.io.cases import Case
from volseg.io.csv_text import iterate_csv
from volseg.io.dataset_json import IGNORE, stated_labels
from volseg.io.files import json_text
from volseg.io.layouts import find_cases, find_scans, has_description
from volseg.io.volumes import read_header, read_mask
from volseg.options import EvaluateOptions, command
from volseg.postprocessing.lesions import MANY
from volseg.reports import EvaluateReport
from volseg.store.evaluations import DETECTIONS, EVALUATION, SUMMARY, EvaluatedCase, read_evaluation
from volseg.store.outputs import RECORDS, Commit, OutputFolder, trace_name
from volseg.store.records import STALE
from volseg.store.tables import table
from volseg.volume import Volume, slabs_of
from volseg.words import format_count

TABLES, PICTURES = (EVALUATION, DETECTIONS, SUMMARY), ("agreement.png", "froc.png")
SAME_PLACE_MM = 0.01  # tables round centroids to four digits
Row = TypeVar("Row", OverlapRow, DetectionRow)


@command(EvaluateOptions)
def evaluate(options: EvaluateOptions) -> EvaluateReport:
    """Compare predicted with reference masks, matched by name: overlap, distances, detection.

    Raises:
        VolsegError: no case has both masks. A pair that cannot be compared becomes a failed row.
    """
    pairs = _MaskPairs.of(options)
    with OutputFolder(options.out, "evaluate", inputs=pairs.used) as outputs:
        outputs.refuse_foreign([*TABLES, *PICTURES])
        compared, failed = _compare(pairs, outputs)
        min_iou, kept = _kept(pairs, outputs, compared, failed)
        cases = compared | kept
        listed = {name: cases[name] for name in pairs.common if name in cases}
        rows = _completed({name: case.overlap for name, case in listed.items()}, pairs.truths)
        detections = [row for case in listed.values() for row in case.detections]
        rows_of, lesions_of = _by_label(rows), _by_label(detections)
        results = [
            summarise_label(rows_of[label], lesions_of.get(label, ())) for label in sorted(rows_of)
        ]
        summary = {
            **_overall(rows, pairs.truths, listed.keys()),
            "labels": {str(result.label): as_json(result) for result in results},
            "min_iou": min_iou,
            "masks": {name: list(case.masks) for name, case in listed.items()},
            "not_predicted": sorted(pairs.truths.keys() - pairs.guesses.keys()),
            "not_in_reference": sorted(pairs.guesses.keys() - pairs.truths.keys()),
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
            outdated = _write_pictures(commit, results)
            commit.finish(removed=[*outdated, *map(trace_name, compared)])
    return EvaluateReport(
        out=options.out,
        done=list(compared),
        failed=failed,
        warnings=summary["warnings"],
        summary=summary,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _MaskPairs:
    """The masks of a call, and how a pair of them is compared.

    Args:
        truths, guesses: case id → reference mask and predicted mask.
        label_names: value → name, where it is stated.
        ignored: value of unannotated voxels in the reference, if any.
    """

    options: EvaluateOptions
    truths: Mapping[str, _Mask]
    guesses: Mapping[str, _Mask]
    predictions: _Predictions
    label_names: Mapping[int, str]
    ignored: int | None
    budget: Budget

    @classmethod
    def of(cls, options: EvaluateOptions) -> _MaskPairs:
        truths, guesses = _masks(options.reference), _masks(options.predicted)
        if not truths.keys() & guesses.keys():
            raise VolsegError(
                f"no mask of {options.predicted} has the name of one in {options.reference}, "
                f"such as {next(iter(truths), 'none')!r}",
                fix="name the masks after their cases",
                code="E_DATASET",
            )
        predictions, stated = _Predictions.of(options.predicted), _stated_labels(options.reference)
        ignored = stated.pop(IGNORE, None)
        return cls(
            options=options,
            truths=truths,
            guesses=guesses,
            predictions=predictions,
            label_names=predictions.label_names | {value: name for name, value in stated.items()},
            ignored=ignored,
            budget=Budget(
                options.max_ram,
                options.announce,
                what="comparing these masks",
                otherwise="cut both masks to the region that matters",
                libraries=LIBRARIES,
            ),
        )

    @property
    def common(self) -> list[str]:
        """Cases that have both masks."""
        return [name for name in self.truths if name in self.guesses]

    @property
    def used(self) -> list[Path]:
        """Files and folders that the call reads."""
        masks = [mask.path for mask in (*self.truths.values(), *self.guesses.values())]
        return [self.options.reference, self.options.predicted, *masks]

    def digests(self, case_id: str) -> tuple[str, str]:
        return digest_of(self.truths[case_id].path), digest_of(self.guesses[case_id].path)

    def compare(self, case_id: str) -> EvaluatedCase:
        """Compare the two masks of a case."""
        paths = self.truths[case_id].path, self.guesses[case_id].path
        truth, guess = _read_within(self.budget, case_id, *paths)
        if self.ignored is not None and truth.array.shape == guess.array.shape:
            for part in slabs_of(truth.array):
                unannotated = truth.array[part] == self.ignored  # counted as background in both
                truth.array[part][unannotated] = guess.array[part][unannotated] = 0
        values = _labels_in(truth) | _labels_in(guess)
        names = {value: self.label_names.get(value, f"label_{value}") for value in values}
        patient, min_iou = self.truths[case_id].patient, self.options.min_iou
        rows = evaluate_case(truth, guess, names, case_id=case_id)
        detections: list[DetectionRow] = []
        try:
            for row in detect_lesions(truth, guess, names, case_id=case_id, min_iou=min_iou):
                confidence = self.predictions.confidence_of(row)
                detections.append(replace(row, patient=patient, confidence=confidence))
        except NoisyMaskError as error:
            rows = [replace(row, notes=_joined(row.notes, error)) for row in rows]
        else:
            lesions_of = _by_label(detections)
            rows = [with_lesions(row, lesions_of.get(row.label, ())) for row in rows]
        return EvaluatedCase(
            overlap=[replace(row, patient=patient) for row in rows],
            detections=detections,
            masks=(truth.sha256, guess.sha256),
        )


def _labels_in(mask: Volume) -> set[int]:
    parts = slabs_of(mask.array, COUNTED_TOGETHER)
    return {value for part in parts for value in np.unique(mask.array[part]).tolist()} - {0}


def _compare(
    pairs: _MaskPairs, outputs: OutputFolder
) -> tuple[dict[str, EvaluatedCase], dict[str, str]]:
    """Compare all pairs; return the results of those compared and the reasons of those failed."""
    compared: dict[str, EvaluatedCase] = {}
    failed: dict[str, str] = {}
    for count, outcome in enumerate(run(pairs.compare, pairs.common), start=1):
        pairs.options.progress("Comparing", count / len(pairs.common), outcome.item)
        if outcome.error is None and outcome.value is not None:
            compared[outcome.item] = outcome.value
        elif outcome.error is not None:
            failed[outcome.item] = failure_reason(outputs, outcome.item, outcome.error)
    return compared, failed


def _kept(
    pairs: _MaskPairs,
    outputs: OutputFolder,
    compared: Mapping[str, EvaluatedCase],
    failed: Mapping[str, str],
) -> tuple[float | None, dict[str, EvaluatedCase]]:
    """Return the min_iou of the rows, and the earlier results of failed cases that stay listed."""
    min_iou = pairs.options.min_iou
    earlier_iou, earlier = read_evaluation(outputs, failed) if failed else (None, {})
    # Rows of different min_iou cannot be averaged: keep earlier ones only if none is new.
    if compared and earlier_iou != min_iou:
        return min_iou, {}
    kept = {
        name: _as_stale(earlier[name], reason)
        for name, reason in failed.items()
        if name in earlier and earlier[name].masks == pairs.digests(name)
    }
    return earlier_iou if kept and not compared else min_iou, kept


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
    cases = f"{format_count(len(kept), 'case')}, such as {next(iter(kept))},"
    return [
        f"{STALE}: {cases} could not be compared this time; "
        "the rows are those of an earlier run, of the same masks"
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
            absent = ABSENT.row(label, names[label], case_id=case_id)
            absent = with_lesions(replace(absent, patient=masks[case_id].patient), ())
            completed.append(row_of.get(label, absent))
    return completed


def _overall(
    rows: Sequence[OverlapRow], masks: Mapping[str, _Mask], done: Collection[str]
) -> dict[str, Any]:
    """Summarise Dice over all labels, and describe how patients were counted."""
    patients, labels = [patient_of(row) for row in rows], [row.label for row in rows]
    dice = mean_of([row.dice for row in rows], patients, labels, bounds=METRICS["dice"].bounds)
    named = {masks[case_id].patient for case_id in done} - {None}
    n_unnamed = sum(masks[case_id].patient is None for case_id in done)
    patients_text = "named by the reference"
    if n_unnamed:
        patients_text = f"{n_unnamed} of {len(done)} cases name none and count as one each"
    return {
        "n_cases": len(done),
        "n_patients": len(named) + n_unnamed,
        "patients": patients_text,
        "mean_dice": dice.mean,
        "mean_dice_95": dice.mean_95,
        "no_mean_dice_95": dice.no_mean_95,
    }


def _write_pictures(commit: Commit, results: Sequence[LabelResult]) -> list[str]:
    """Write the plots for which there is data; return the names of the others."""
    from volseg.pages.plots import agreement_png, froc_png

    pictures = {}
    if any(result.reference_ml.size for result in results):
        pictures["agreement.png"] = agreement_png(results)
    curves = [(result.name, result.curve) for result in results if result.curve is not None]
    if curves:
        pictures["froc.png"] = froc_png(curves)
    for name, picture in pictures.items():
        commit.write(name, picture)
    return [name for name in PICTURES if name not in pictures]

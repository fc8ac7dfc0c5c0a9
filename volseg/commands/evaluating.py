"""`volseg evaluate`: compare predicted masks with reference masks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from volseg.columns import row_of
from volseg.commands.batch import failure_reason
from volseg.commands.class_tables import predicted_table
from volseg.commands.gate_judging import gate_summary
from volseg.commands.judging import METRICS as METRICS_TABLE
from volseg.commands.judging import PICTURES as TABLE_PICTURES
from volseg.commands.judging import REPORT, evaluate_tables
from volseg.commands.label_values import pairing_warnings
from volseg.commands.mask_pairs import MaskPairs
from volseg.commands.remarks import remark
from volseg.errors import VolsegError, without_notes
from volseg.evaluation.detection import DetectionRow, by_label, with_lesions
from volseg.evaluation.overlap import ABSENT, METRICS, OverlapRow
from volseg.evaluation.summary import (
    LabelResult,
    as_json,
    mean_of,
    patient_of,
    summarise_label,
)
from volseg.execution.local import run
from volseg.io.files import json_text
from volseg.measurement.specks import SPECKS
from volseg.options import EvaluateOptions, command
from volseg.preprocessing.lattice import AXES, EXTENT
from volseg.reports import EvaluateReport
from volseg.store.evaluations import DETECTIONS, EVALUATION, SUMMARY, EvaluatedCase, read_evaluation
from volseg.store.outputs import Commit, OutputFolder, trace_name
from volseg.store.records import STALE
from volseg.store.tables import table
from volseg.words import format_count

OF_TABLES = (METRICS_TABLE, REPORT, *TABLE_PICTURES)  # written for classes and numbers
TABLES, PICTURES = (EVALUATION, DETECTIONS, SUMMARY), ("agreement.png", "froc.png")


@command(EvaluateOptions)
def evaluate(options: EvaluateOptions) -> EvaluateReport:
    """Compare predictions with a reference: masks, or the classes or numbers of a classifier.

    Masks are matched by name: overlap, distances, detection. Classes and numbers are matched by
    case id: rates, AUC, calibration, errors. Both have intervals over patients.

    Raises:
        VolsegError: no case has both masks. A pair that cannot be compared becomes a failed row.

    Example:
        >>> import volseg
        >>> labels = "sample_data/labels"
        >>> result = volseg.evaluate(reference=labels, predicted=labels, out="evaluation")
        >>> result.summary["mean_dice"]
        1.0
    """
    if predicted_table(options.predicted) is not None:
        return evaluate_tables(options)
    _refuse_table_options(options)
    pairs = MaskPairs.of(options)
    with OutputFolder(options.out, "evaluate", inputs=pairs.used) as outputs:
        outputs.check_overwrites([*TABLES, *PICTURES])
        compared, failed = _compare(pairs, outputs)
        min_iou, kept = _kept(pairs, outputs, compared, failed)
        cases = compared | kept
        listed = {name: cases[name] for name in pairs.common if name in cases}
        rows = _completed(listed, pairs)
        detections = [row for case in listed.values() for row in case.detections]
        results = _label_results(rows, detections)
        warnings = [*pairs.remarks]
        warnings += [text for name in compared for text in _remarks(compared[name])]
        warnings += _stale(kept)
        warnings += pairing_warnings(rows, [case.shared for case in listed.values()])
        warnings += filter(None, [pairs.reviews.remark(listed)])
        summary = {
            **_overall(rows, listed, pairs),
            "labels": {str(result.label): as_json(result) for result in results},
            "min_iou": min_iou,
            "settings": pairs.settings,
            **_gate(pairs, compared),
            "masks": {name: list(case.masks) for name, case in listed.items()},
            **pairs.unpaired,
            "failed": failed,
            "warnings": without_notes(warnings),
        }
        with outputs.staged() as commit:
            reasons = {name: pairs.reason_for_tables(name, text) for name, text in failed.items()}
            commit.write(EVALUATION, table(OverlapRow, [*rows, *_failed_rows(reasons, kept)]))
            commit.write(DETECTIONS, table(DetectionRow, detections))
            commit.write(SUMMARY, json_text(summary))
            outdated = _write_pictures(commit, results)
            outdated += [name for name in OF_TABLES if name not in TABLES + PICTURES]
            commit.finish(removed=[*outdated, *map(trace_name, compared)])
    return EvaluateReport(
        out=options.out, done=list(compared), failed=failed, warnings=warnings, summary=summary
    )


def _gate(pairs: MaskPairs, compared: Collection[str]) -> dict[str, Any]:
    """Return what the gate of the model skipped; nothing without one."""
    masks = ((pairs.guesses[name].path, *pairs.truths[name].read_from) for name in compared)
    summary = gate_summary(pairs.options.predicted, masks)
    return {} if summary is None else {"gate": summary}


def _refuse_table_options(options: EvaluateOptions) -> None:
    for name in ("target", "by", "against"):
        if getattr(options, name):
            raise VolsegError(
                f"--{name} is for classes and numbers, but {options.predicted} has no classes.csv "
                "and no values.csv",
                fix=f"leave out --{name}, or give the results of a classifier to --predicted",
                code="E_USAGE",
            )


def _compare(
    pairs: MaskPairs, outputs: OutputFolder
) -> tuple[dict[str, EvaluatedCase], dict[str, str]]:
    """Compare all pairs; return the results of those compared and the reasons of those failed."""
    compared: dict[str, EvaluatedCase] = {}
    failed: dict[str, str] = {}
    for count, outcome in enumerate(run(pairs.compare, pairs.common), start=1):
        pairs.options.progress("Comparing", count / len(pairs.common), outcome.item)
        if outcome.error is None and outcome.value is not None:
            compared[outcome.item] = outcome.value
            pairs.options.warn(*_remarks(outcome.value))
        elif outcome.error is not None:
            failed[outcome.item] = failure_reason(outputs, outcome.item, outcome.error)
            pairs.options.report_failure(outcome.item, failed[outcome.item])
    return compared, failed


def _kept(
    pairs: MaskPairs,
    outputs: OutputFolder,
    compared: Mapping[str, EvaluatedCase],
    failed: Mapping[str, str],
) -> tuple[float | None, dict[str, EvaluatedCase]]:
    """Return the min_iou of the rows, and the earlier results of failed cases that stay listed."""
    min_iou = pairs.options.min_iou
    earlier_iou, earlier = None, {}
    if failed:
        earlier_iou, earlier = read_evaluation(outputs, failed, pairs.settings)
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


def _completed(cases: Mapping[str, EvaluatedCase], pairs: MaskPairs) -> list[OverlapRow]:
    """Return a row of every label for every case, with rows for labels absent from both masks."""
    names = {row.label: row.label_name for case in cases.values() for row in case.overlap}
    completed = []
    for case_id, case in cases.items():
        row_of_label = {row.label: row for row in case.overlap}
        for label in sorted(names):
            if label not in row_of_label:
                absent = ABSENT.row(label, names[label], case_id=case_id)
                absent = replace(absent, patient=pairs.patient_of(case_id))
                row_of_label[label] = with_lesions(absent, ())
            completed.append(row_of_label[label])
    return completed


def _label_results(
    rows: Sequence[OverlapRow], detections: Sequence[DetectionRow]
) -> list[LabelResult]:
    """Return the result of each label over all cases."""
    rows_of, lesions_of = by_label(rows), by_label(detections)
    return [summarise_label(rows_of[label], lesions_of.get(label, ())) for label in sorted(rows_of)]


def _remarks(case: EvaluatedCase) -> list[str]:
    """Return the warnings of a case: its mask looks like noise, or was brought onto a grid."""
    notes = dict.fromkeys(part for row in case.overlap for part in row.notes.split("; "))
    parts = (note.removeprefix("lesions: ").partition(": ") for note in notes)
    name = case.overlap[0].case_id if case.overlap else ""
    return [remark(code, name, text) for code, _, text in parts if code in (SPECKS, AXES, EXTENT)]


def _overall(
    rows: Sequence[OverlapRow], cases: Collection[str], pairs: MaskPairs
) -> dict[str, Any]:
    """Summarise Dice over all labels, and describe how patients were counted."""
    patients, labels = [patient_of(row) for row in rows], [row.label for row in rows]
    dice = mean_of([row.dice for row in rows], patients, labels, bounds=METRICS["dice"].bounds)
    named = {pairs.patient_of(case_id) for case_id in cases} - {None}
    n_unnamed = sum(pairs.patient_of(case_id) is None for case_id in cases)
    patients_text = "named by the reference"
    if n_unnamed:
        is_one = n_unnamed == 1
        counted = (
            "names no patient and counts as one"
            if is_one
            else "name no patient and count as one each"
        )
        patients_text = f"{n_unnamed} of {format_count(len(cases), 'case')} {counted}"
    return {
        "n_cases": len(cases),
        "n_patients": len(named) + n_unnamed,
        "patients": patients_text,
        "mean_dice": dice.mean,
        "mean_dice_95": dice.mean_95,
        "no_mean_dice_95": dice.no_mean_95,
    }


def _failed_rows(failed: Mapping[str, str], kept: Collection[str]) -> Iterator[OverlapRow]:
    """Yield a row for each failed case without earlier rows."""
    for case_id, reason in failed.items():
        if case_id not in kept:
            yield row_of(OverlapRow, {"case_id": case_id, "status": "failed", "reason": reason})


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

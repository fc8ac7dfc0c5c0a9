"""`volseg evaluate` for predicted classes and numbers: tables in, metrics and figures out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from volseg.commands.baseline_judging import Baselines
from volseg.commands.class_tables import Predicted, Reference, TruthTable
from volseg.commands.judgement import Judgement
from volseg.errors import VolsegError, without_notes
from volseg.evaluation.class_intervals import (
    Judged,
    MetricRow,
    difference_rows,
    metric_rows,
    operating_rows,
    subgroup_rows,
)
from volseg.evaluation.class_rows import JudgedRow
from volseg.io.files import json_text
from volseg.options import EvaluateOptions
from volseg.pages.about import About
from volseg.reports import EvaluateReport
from volseg.store.outputs import OutputFolder
from volseg.store.tables import table
from volseg.words import format_count

EVALUATION, METRICS, SUMMARY, REPORT = (
    *("evaluation.csv", "metrics.csv"),
    *("summary.json", "report.html"),
)
PICTURES = (
    *("roc.png", "precision_recall.png", "calibration.png", "confusion.png", "decision.png"),
    "agreement.png",
)
OF_MASKS = ("detections.csv", "froc.png")  # of an earlier evaluation of masks in the same folder
NO_MASK_OPTIONS = {"min_iou": 0.0, "objects": "components", "threshold": None, "labels": ()}


def evaluate_tables(options: EvaluateOptions) -> EvaluateReport:
    """Compare predicted with true classes or numbers, matched by case id.

    Raises:
        VolsegError: no case has both, a column is missing, or an option is only for masks.
    """
    _refuse_mask_options(options)
    about = About.now("evaluate")
    predicted = Predicted.of(options.predicted)
    reference = Reference.of(options.reference, options.target, predicted)
    truth = TruthTable.of(reference, predicted, options.target)
    for name in options.by:
        truth.reference.check_column(name, "--by")
    inputs = [truth.reference.path, truth.predicted.path]
    inputs += [] if options.against is None else [options.against]
    with OutputFolder(options.out, "evaluate", inputs=inputs) as outputs:
        outputs.check_overwrites([EVALUATION, METRICS, SUMMARY, REPORT, *PICTURES])
        baselines = Baselines.of(truth)
        warnings = [*truth.warnings, *baselines.remarks]
        options.warn(*warnings)
        for name, reason in truth.predicted.failed.items():
            options.report_failure(name, reason)
        judgement = _judge(truth, baselines.judged, options)
        pictures = judgement.pictures()
        with outputs.staged() as commit:
            commit.write(EVALUATION, table(JudgedRow, judgement.case_rows))
            commit.write(METRICS, table(MetricRow, judgement.metrics))
            summary = judgement.summary(options, without_notes(warnings))
            commit.write(SUMMARY, json_text(summary))
            commit.write_all(pictures)
            commit.write(REPORT, _page(about, judgement, pictures, without_notes(warnings)))
            commit.finish(removed=[*OF_MASKS, *(name for name in PICTURES if name not in pictures)])
    return EvaluateReport(
        out=options.out,
        done=list(truth.names),
        failed=dict(truth.predicted.failed),
        warnings=warnings,
        summary=summary,
    )


def _refuse_mask_options(options: EvaluateOptions) -> None:
    for name, default in NO_MASK_OPTIONS.items():
        if getattr(options, name) != default or options.review is not None:
            option = "review" if options.review is not None else name.replace("_", "-")
            raise VolsegError(
                f"--{option} is for masks, but {options.predicted} holds classes or numbers",
                fix=f"leave out --{option}",
                code="E_USAGE",
            )


def _judge(truth: TruthTable, baselines: Sequence[Judged], options: EvaluateOptions) -> Judgement:
    """Compute all metrics: of the model, its baselines, subgroups, and against another model."""
    judged, metrics = truth.judged, list[MetricRow]()
    n_steps = 1 + len(options.by) + (options.against is not None) + len(baselines)
    options.progress("Judging", 0.0, judged.model)
    metrics += metric_rows(judged)
    metrics += operating_rows(judged, truth.predicted.points)
    for step, baseline in enumerate(baselines, start=1):
        options.progress("Judging", step / n_steps, baseline.model)
        rows = metric_rows(baseline)
        metrics += [replace(row, model=judged.model, baseline=baseline.model) for row in rows]
    for step, name in enumerate(options.by, start=1 + len(baselines)):
        options.progress("Judging", step / n_steps, f"by {name}")
        metrics += subgroup_rows(judged, name, truth.column(name))
    if options.against is not None:
        options.progress("Judging", 1 - 1 / n_steps, "against the other model")
        metrics += _differences(truth, Predicted.of(options.against))
    options.progress("Judging", 1.0, "")
    return Judgement.of(truth, judged, metrics, baselines)


def _differences(truth: TruthTable, other: Predicted) -> list[MetricRow]:
    """Return the differences of two models on the cases that both predicted.

    Raises:
        VolsegError: they predict other things, or no case in common.
    """
    ours = truth.predicted
    if other.kind != ours.kind or set(other.classes) != set(ours.classes):
        raise VolsegError(
            f"{other.path}: predicts {', '.join(other.classes) or 'numbers'}, but {ours.path} "
            f"predicts {', '.join(ours.classes) or 'numbers'}",
            fix="give results of a model with the same classes to --against",
            code="E_DATASET",
        )
    theirs = TruthTable.of(truth.reference, _renamed(other, ours), truth.target)
    common = set(theirs.names)
    shared = [name for name in truth.names if name in common]
    if not shared:
        raise VolsegError(
            f"{other.path}: has no case of {ours.path}",
            fix="give results on the same cases to --against",
            code="E_DATASET",
        )
    first, second = (part.limited_to(shared).judged for part in (truth, theirs))
    if first.model == second.model:
        first = replace(first, model=str(ours.path.parent))
        second = replace(second, model=str(other.path.parent))
    return difference_rows(first, replace(second, patients=first.patients))


def _renamed(other: Predicted, ours: Predicted) -> Predicted:
    """Return predictions with the classes in the order of ours."""
    return replace(other, classes=ours.classes, data=ours.data)


def _page(
    about: About, judgement: Judgement, pictures: Mapping[str, bytes], warnings: Sequence[str]
) -> str:
    from volseg.pages.judgement_page import Content, judgement_html

    truth = judgement.truth
    n = format_count(len(truth.names), "case")
    patients = format_count(len(set(truth.patients)), "patient")
    sentence = (
        f"volseg evaluated the {truth.predicted.kind} that {judgement.judged.model} predicted for "
        f"{n} of {patients}: {judgement.headline or 'no metric is defined'}."
    )
    content = Content(
        sentence=sentence,
        cases=judgement.case_rows,
        metrics=judgement.metrics,
        pictures=pictures,
        remarks=warnings,
    )
    return judgement_html(about, content)

"""What a command prints when it is done."""

from __future__ import annotations

import json
import os
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import singledispatch
from pathlib import Path
from typing import Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from volseg import reports
from volseg.errors import severity_of
from volseg.terminal import one_line, takes_unicode
from volseg.words import NOUNS, format_count, format_sizes

MAX_PATIENTS = 30  # listed
MAX_WIDTH = 100  # of running text: longer lines are hard to read
FILES = {  # name → what it holds
    "classes.csv": "a row per image",
    "values.csv": "a row per image",
    "baselines.csv": "what simple models predict of the same images",
    "lesions.csv": "a row per lesion",
    "cases.csv": "a row per scan",
    "quality.csv": "a row per scan",
    "quality.png": "the middle slice of each scan",
    "quality.html": "the same on a page: open it in a browser",
    "response.csv": "a row per patient",
    "comparison.csv": "a row per pair of lesions",
    "evaluation.csv": "a row per case; for masks, per case and label",
    "detections.csv": "a row per lesion of either mask",
    "summary.json": "every mean, interval and limit of agreement",
    "agreement.png": "Bland-Altman plot, and predicted against true numbers",
    "froc.png": "sensitivity against false positives per scan",
    "metrics.csv": "every metric with its interval",
    "explain.csv": "a row per image and method, with its checks and scores",
    "randomisation.csv": "how alike the maps stay when layers get random weights",
    "saliency.csv": "mean scores against masks, with intervals",
}


def show(report: reports.RunReport) -> None:
    """Print the report of a command as text: details, then one line that sums it up, and files."""
    show_details(report)
    typer.echo(one_line(report.headline))
    for path in report.paths.values():
        if path != report.goal and path.name in FILES:
            typer.echo(f"  {path}: {FILES[path.name]}")


@singledispatch
def show_details(report: reports.RunReport) -> None:
    """Print what the summary of a report has no room for."""


@show_details.register
def _(report: reports.CasesReport) -> None:
    _print_backend(report)
    if report.objects == "components":
        typer.echo("lesions: connected components of each label, 26 neighbours, 1 = largest")
    else:
        typer.echo("structures: one per mask value, in ascending order")


def _print_backend(report: reports.CasesReport) -> None:
    if report.computed_with:
        backend, precision = report.computed_with["backend"], report.computed_with["precision"]
        typer.echo(f"computed with: {backend}, {precision}")


@show_details.register
def _(report: reports.ImagesReport) -> None:
    _print_backend(report)
    kind = "confidence sets" if "classes" in report.paths else "intervals"
    if report.coverage is not None:
        typer.echo(f"{kind} with {report.coverage:.0%} coverage on validation images")


@show_details.register
def _(report: reports.ExplainReport) -> None:
    words = {None: "not checked", "": "passed its checks"}
    for method, doubt in report.verdicts.items():
        verdict = words.get(doubt, f"UNRELIABLE: {doubt}")
        scores = report.scores.get(method)
        typer.echo(one_line(f"{method}: {f'{scores}; ' if scores else ''}{verdict}"))
    for simple in sorted(report.scores.keys() - report.verdicts.keys()):
        typer.echo(one_line(f"{simple}: {report.scores[simple]} (simple map, for comparison)"))


@show_details.register
def _(report: reports.PreprocessReport) -> None:
    fingerprint = report.fingerprint
    if "n_images" in fingerprint:
        counts = ", ".join(f"{name}: {n}" for name, n in fingerprint["counts"].items())
        images = format_count(fingerprint["n_images"], "training image")
        typer.echo(
            one_line(
                f"{images}, {fingerprint['n_validation']} for validation; median longer edge "
                f"{fingerprint['median_edge']}, resized to {fingerprint['pixels']}² pixels"
            )
        )
        if counts:
            typer.echo(one_line(f"training images per class: {counts}"))
        return
    spacing, target = (
        format_sizes(fingerprint[name]) for name in ("median_spacing_mm", "resampled_to_mm")
    )
    shape = format_sizes(fingerprint["median_shape"])
    typer.echo(
        f"{format_count(fingerprint['n_cases'], 'training case')}; median spacing {spacing} mm, "
        f"median shape {shape} (R × A × S)"
    )
    for channel, values in fingerprint["foreground"].items():
        text = (
            f"{channel} in labelled voxels: mean {values['mean']:.4g}, "
            f"standard deviation {values['sd']:.4g}, "
            f"0.5 to 99.5 percentile {values['p00_5']:.4g} to {values['p99_5']:.4g}"
        )
        typer.echo(one_line(text))
    voxels = ", ".join(f"{label}: {count}" for label, count in fingerprint["label_voxels"].items())
    typer.echo(one_line(f"voxels per label: {voxels}; resampled to {target} mm"))


@show_details.register
def _(report: reports.PlanReport) -> None:
    for line in report.reasons:
        _print_entry(f"{line['setting']}: {line['value']}", line["reason"])


@show_details.register
def _(report: reports.TrainReport) -> None:
    for name, value in report.metrics.items():
        if name != "warnings":  # they were announced, and the last line counts them
            typer.echo(one_line(f"{name.replace('_', ' ')}: {value}"))


@show_details.register
def _(report: reports.QuantiseReport) -> None:
    seconds, item = report.seconds, report.item
    headings = (one_line(name.replace("_", " ")) for name in report.scores)
    table = Table("precision", *headings, f"s per {item}", "× as fast")
    for name in seconds:
        scores = (_score(values[name], values["fp32"]) for values in report.scores.values())
        speed = f"{seconds['fp32'] / seconds[name]:.1f}"
        table.add_row(name, *scores, f"{seconds[name]:.3g}", speed)
    print_table(table)
    noun = "image" if item == "image" else "case"
    count = format_count(report.validation[f"{noun}s"], f"validation {noun}")
    typer.echo(f"{'mean over' if noun == 'case' else 'on'} {count}; seconds on this machine")


def _score(value: float | None, fp32: float | None) -> str:
    """Return a score and how it differs from that of fp32; empty if undefined."""
    return "" if value is None or fp32 is None else f"{value:.4f} ({value - fp32:+.4f})"


@show_details.register
def _(report: reports.ImportReport) -> None:
    for name, value in report.model.items():
        typer.echo(one_line(f"{name}: {value}"))


@show_details.register
def _(report: reports.AttachReport) -> None:
    for name, value in report.roles.items():
        typer.echo(one_line(f"{name}: {value}"))


@show_details.register
def _(report: reports.EvaluateReport) -> None:
    if "task" in report.summary:
        _show_judgement(report.summary)
        return
    shown = {  # column of evaluation.csv → its heading and the decimals of an interval
        "dice": ("Dice", 2),
        "hd95_mm": ("HD95 mm", 1),
        "nsd_1mm": ("NSD 1 mm", 2),
        "nsd_2mm": ("NSD 2 mm", 2),
        "volume_error_ml": ("volume mL", 1),
    }
    headings = (heading for heading, _ in shown.values())
    noun = NOUNS[report.summary["settings"]["objects"]]
    table = Table("label", *headings, f"{noun} F1", box=SIMPLE, padding=(0, 1, 0, 0))
    labels = report.summary["labels"].values()
    for label in labels:
        cells = [
            _mean_and_interval(label["metrics"][name], decimals)
            for name, (_, decimals) in shown.items()
        ]
        cells.append(_mean_and_interval(label["detection"]["f1"], 2))
        table.add_row(f"{one_line(label['name'])}\nn = {label['n']}", *cells)
    print_table(table)
    patients = format_count(report.summary["n_patients"], "patient")
    typer.echo(
        f"means with 95 % intervals over {patients} ({report.summary['patients']}); "
        "volume mL: predicted − reference"
    )
    if gate := report.summary.get("gate"):
        typer.echo(_gate_text(gate))
    for reason in _reasons_without_interval(labels, shown):
        typer.echo(f"(none): no interval; {reason}")
    for label in labels:
        if n := label["n_missed"]:
            announce(f"{label['name']}: missed in {format_count(n, 'case')}; no HD95 there")
    if missing := report.summary["not_predicted"]:
        masks = format_count(len(missing), "reference mask")
        announce(f"{masks} without a prediction, such as {missing[0]}")


def _gate_text(gate: Mapping[str, Any]) -> str:
    share = f"{gate['skipped']} of {gate['slices']} slices skipped"
    if gate["sensitivity"] is None:
        return f"gate: {share}; no slice has a label"
    kept = f"{gate['with_label_kept']} of {gate['with_label']} slices with a label kept"
    return f"gate: {share} ({gate['skipped'] / gate['slices']:.0%}); {kept} (sensitivity " + (
        f"{gate['sensitivity']:.3f})"
    )


BESIDE = {  # task → title, average and metric of simple models
    "classes": (
        ("AUC", "macro", "auc"),
        ("balanced accuracy", "overall", "balanced_accuracy"),
    ),
    "numbers": (("MAE", "overall", "mae"), ("R²", "overall", "r2")),
}
JUDGED = ("auc", "average_precision", "sensitivity", "specificity", "precision", "f1")


def _show_judgement(summary: Mapping[str, Any]) -> None:
    """Print the metrics of classes or numbers, and the differences of two models."""
    if summary["task"] == "classes":
        headings = ("AUC", "average precision", "sensitivity", "specificity", "precision", "F1")
        table = Table("class", *headings, box=SIMPLE, padding=(0, 1, 0, 0))
        for name, values in summary["metrics_by_class"].items():
            cells = [_judged_cell(values.get(metric)) for metric in JUDGED]
            table.add_row(f"{one_line(name)}\nn = {summary['support'][name]}", *cells)
        print_table(table)
    overall = summary["metrics"].get("overall", {})
    for name, value in overall.items():
        typer.echo(f"{name}: {_judged_text(value)}")
    for baseline, values in summary["baselines"].items():
        averages = values["metrics"]
        cells = {
            title: _judged_text(averages.get(average, {}).get(metric))
            for title, average, metric in BESIDE[summary["task"]]
        }
        text = ", ".join(f"{title} {cell}" for title, cell in cells.items())
        typer.echo(one_line(f"baseline {baseline.replace('_', ' ')}: {text}"))
    for models, groups in summary["difference"].items():
        area = groups.get("macro", {}).get("auc")
        areas = {} if area is None else {"AUC": area}
        for name, value in (areas | groups.get("overall", {})).items():
            p = "" if value.get("p_value") is None else f", p = {value['p_value']:.3g}"
            text = _judged_text(value)
            typer.echo(one_line(f"{models}: {name} {text}{p}"))
    patients = format_count(summary["n_patients"], "patient")
    typer.echo(f"95 % intervals: bootstrap over {patients}; every metric is in metrics.csv")


def _judged_cell(entry: Mapping[str, Any] | None) -> str:
    """Return a metric over its interval; a dash if it is undefined."""
    if entry is None or entry["value"] is None:
        return "–"
    between = entry["value_95"]
    return f"{entry['value']:.3f}" + (
        "" if between is None else f"\n{between[0]:.3f} to {between[1]:.3f}"
    )


def _judged_text(entry: Mapping[str, Any] | None) -> str:
    """Return a metric with its interval on one line: `0.890 (0.820 to 0.953)`."""
    value, _, interval = _judged_cell(entry).partition("\n")
    return f"{value} ({interval})" if interval else value


@show_details.register
def _(report: reports.MethodsReport) -> None:
    for paragraph in report.paragraphs:
        typer.echo(textwrap.fill(one_line(paragraph), MAX_WIDTH, break_on_hyphens=False) + "\n")
    numbers = ", ".join(map(str, report.left_to_author))
    typer.echo(textwrap.fill(f"items of CLAIM left to the author: {numbers}", MAX_WIDTH))


@show_details.register
def _(report: reports.CompareReport) -> None:
    statuses = ("new", "gone", "merged", "split")
    headings = ("patient", "response", "sum %", *statuses, "volume %")
    table = Table(*headings, title="RECIST 1.1")
    compared = [row for row in report.patients if row["status"] == "done"]
    for row in compared[:MAX_PATIENTS]:
        counts = (str(row[f"n_{status}"]) for status in statuses)
        sums, volume = (
            "" if row[name] is None else f"{row[name]:+.1f}"
            for name in ("change_sum_percent", "change_volume_percent")
        )
        table.add_row(one_line(row["patient"]), row["response"] or "", sums, *counts, volume)
    print_table(table)
    if (more := len(compared) - MAX_PATIENTS) > 0:
        typer.echo(f"and {format_count(more, 'more patient')}")
    typer.echo("sum: of the target diameters; response.csv has the deciding rule for each patient")
    for patient, reason in report.unpaired.items():
        typer.echo(f"unpaired: {patient}: {reason}", err=True)


def _mean_and_interval(metric: Mapping[str, Any], decimals: int) -> str:
    """Format a mean above its interval; an unknown mean is empty."""
    if metric["mean"] is None:
        return ""
    if metric["mean_95"] is None:
        interval = "(none)"
    else:
        interval = "({:.{d}f}, {:.{d}f})".format(*metric["mean_95"], d=decimals)
    return f"{metric['mean']:.{decimals + 1}f}\n{interval}"


def _reasons_without_interval(
    labels: Iterable[Mapping[str, Any]], metrics: Iterable[str]
) -> list[str]:
    """Return the distinct reasons why means of the table have no interval."""
    means = [
        mean
        for label in labels
        for mean in (*(label["metrics"][name] for name in metrics), label["detection"]["f1"])
    ]
    return sorted({mean["no_mean_95"] for mean in means if mean["mean"] is not None} - {""})


def show_problems(path: Any, problems: list[dict[str, str]]) -> None:
    """Print each problem on a line, then their number; notes do not count."""
    for problem in problems:
        fix = f"; to fix: {problem['fix']}" if problem["fix"] else ""
        text = problem["problem"]
        if not text.startswith((f"{problem['where']}:", f"{problem['where']}{os.sep}")):
            text = f"{problem['where']}: {text}"  # else it names the place already
        line = f"{severity_of(problem['code'])}: {problem['code']}: {text}{fix}"
        typer.echo(one_line(line))
    kinds = Counter(severity_of(problem["code"]) for problem in problems)
    counts = [format_count(kinds["error"], "problem")]
    if kinds["warning"]:
        counts.append(format_count(kinds["warning"], "warning"))
    is_sound = not kinds["error"] and not kinds["warning"]
    typer.echo(one_line(f"{path}: {'no problem found' if is_sound else ', '.join(counts)}"))


def show_files(folder: Path, names: Iterable[str]) -> None:
    """Print what each of these files of a folder holds; missing ones are left out."""
    for path in (folder / name for name in names):
        if path.is_file():
            typer.echo(one_line(f"  {path}: {FILES[path.name]}"))


def show_columns(tables: Mapping[str, Iterable[Any]]) -> None:
    for table, lines in tables.items():
        typer.echo(f"{table}\n")
        for name, unit, meaning, source in lines:
            text = f"{meaning} [{source}]" if source else meaning
            _print_entry(f"{name} ({unit})" if unit else name, text, margin=2)
        typer.echo()


def show_checks(checks: Iterable[Any]) -> None:
    table = Table("body", "measure", "expected", "±", "measured", "")
    n, n_passed = 0, 0
    for check in checks:
        numbers = (f"{value:.6g}" for value in (check.expected, check.tolerance, check.found))
        table.add_row(check.body, check.measure, *numbers, "pass" if check.is_passed else "FAIL")
        n, n_passed = n + 1, n_passed + check.is_passed
    print_table(table)
    typer.echo(f"{n_passed} of {n} numbers are within their tolerance")


def _print_entry(head: str, text: str, margin: int = 0) -> None:
    """Print a head and below it an indented text, no wider than the terminal."""
    width = min(Console().width, MAX_WIDTH)
    for part, indent in ((head, margin), (text, margin + 4)):
        space = " " * indent
        wrapper = textwrap.TextWrapper(width, initial_indent=space, subsequent_indent=space)
        wrapper.break_long_words = wrapper.break_on_hyphens = False
        typer.echo(wrapper.fill(one_line(part)))


def print_table(table: Table) -> None:
    """Print a table of plain text, as a label may be named `[/b]` or `:x:`; no word is cut off."""
    for column in table.columns:
        column.overflow = "fold"
        column.min_width = max(map(len, str(column.header).split()), default=0)
    Console(markup=False, emoji=False).print(table)


def announce(text: str) -> None:
    typer.echo(one_line(text), err=True)


def print_json(content: Any) -> None:
    typer.echo(json.dumps(content, ensure_ascii=not takes_unicode()))

"""The page explain.html: maps of evidence, whether they can be trusted, and their scores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from markupsafe import Markup, escape

from volseg.columns import column_names, optional
from volseg.evaluation.saliency import SIMPLE_MAPS
from volseg.evaluation.saliency_rows import (
    MOST_SIMILAR,
    ExplainRow,
    RandomisationRow,
    SaliencyRow,
)
from volseg.pages.about import About
from volseg.pages.canvas import new_figure, png_bytes
from volseg.pages.page import CONTENT_BYTES, as_base64, json_size
from volseg.pages.page_tables import Layout, fitting_table, with_picture_column
from volseg.pages.run_page import (
    Plot,
    RunPage,
    count_fact,
    failures,
    fitting_pictures,
    unpictured_remark,
)
from volseg.words import format_count, format_list

PICTURE_MEANING = "the image, and the evidence for the class laid over it; the outline is the mask"
RELIABLE, UNRELIABLE, UNCHECKED = "passed", "UNRELIABLE", "not checked"


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodRow:
    """A method, or a simple map beside it, as the page shows it."""

    method: str = optional("", "method; centre and intensity are simple maps, for comparison")
    checks: str | None = optional("", "whether the method passed the checks with this model")
    doubt: str | None = optional("", "the checks that failed")
    auprc: str | None = optional("", "mean average precision against the masks (95 % interval)")
    auprc_above_centre: str | None = optional("", "the same less that of a Gaussian in the middle")
    auprc_above_intensity: str | None = optional("", "the same less that of the brightness")
    pointing: str | None = optional("", "mean of the pointing game (95 % interval)")
    pointing_above_centre: str | None = optional("", "the same less that of a Gaussian")
    pointing_above_intensity: str | None = optional("", "the same less that of the brightness")
    n: int | None = optional("", "images with a mask")


METHOD_TABLE = Layout(
    name="methods",
    caption="Methods, and simple maps beside them",
    row_type=MethodRow,
    hint="type words",
    file="saliency.csv",
    shown=column_names(MethodRow),
)
MAP_TABLE = Layout(
    name="scans",
    caption="Maps",
    row_type=ExplainRow,
    hint="type words, such as gradcam, or a condition such as auprc < 0.2",
    file="explain.csv",
    shown=(
        *("case_id", "class_name", "probability", "is_reliable", "is_empty", "auprc"),
        *("auprc_centre", "auprc_intensity", "pointing", "ssim_head", "ssim_all", "ssim_seeds"),
        *("ssim_centre", "slice_index"),
    ),
    needed=("method", "doubt"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceRow:
    """The slices of a volume that speak for a class."""

    scan: str = optional("", "volume")
    class_name: str | None = optional("", "class or label")
    slice_index: int | None = optional("", "slice with the highest probability, from 0 at the feet")
    probability: float | None = optional("0 to 1", "its probability")
    slices: str | None = optional("", "all slices with a probability of at least 0.5")
    n_slices: int | None = optional("", "explained slices in which the class was looked for")


SLICE_TABLE = Layout(
    name="slices",
    caption="Which slice",
    row_type=SliceRow,
    hint="type words",
    file="explain.csv",
    shown=column_names(SliceRow),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Maps:
    """What the page shows.

    Args:
        rows: of each image and method. layers: of the checks. scores: means against masks.
        verdicts: method → the checks that it failed, empty if none; None if it was not checked.
        pictures: (case, method) → JPEG. remarks: sentences above the numbers.
    """

    rows: Sequence[ExplainRow]
    layers: Sequence[RandomisationRow]
    scores: Sequence[SaliencyRow]
    verdicts: Mapping[str, str | None]
    pictures: Mapping[tuple[str, str], bytes]
    remarks: Sequence[str] = ()


def explain_page(about: About, maps: Maps) -> RunPage:
    """Return the page: verdicts first, then scores, similarity by layer, and each map."""
    done = [row for row in maps.rows if row.status == "done"]
    # Pictures go by case; here an image has one of each method.
    rows = [replace(row, case_id=_name(row.case_id, row.method)) for row in done]
    montages = {_name(*key): picture for key, picture in maps.pictures.items()}
    height, pictures, n_unpictured = fitting_pictures(montages)
    failed = failures(maps.rows, "case_id", "error")
    plots = [Plot(_figure(maps.layers))] if maps.layers else []
    left = CONTENT_BYTES - json_size(pictures) - json_size(failed)
    left -= sum(len(plot.svg.encode()) for plot in plots)
    methods = fitting_table(METHOD_TABLE, _methods(maps), max_bytes=left // 2)
    slices = slice_rows(done)
    of_slices = [fitting_table(SLICE_TABLE, slices, max_bytes=left // 4)] if slices else []
    left -= sum(json_size(part.content) for part in (methods, *of_slices))
    table = fitting_table(MAP_TABLE, rows, max_bytes=left)
    n_images = len({row.case_id for row in done})
    return RunPage(
        title=f"volseg explain: {format_count(n_images, 'image')}",
        made_with=about.made_with,
        failed=failed,
        n_cases=n_images + len(failed),
        noun="images",
        files="explain.csv and saliency.csv",
        sentence=_sentence(n_images, maps.verdicts),
        remarks=[*_verdict_remarks(maps.verdicts), *maps.remarks, *unpictured_remark(n_unpictured)],
        facts=_facts(n_images, done, maps),
        plots=plots,
        tables=[methods, *of_slices, with_picture_column(table, "picture", PICTURE_MEANING)],
        pictures=pictures,
        picture_height=height,
    )


def slice_rows(rows: Sequence[ExplainRow]) -> list[SliceRow]:
    """Return, for each volume and class, which slices speak for it; none without volumes."""
    groups: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for row in rows:  # the probability is the same for all methods
        if row.scan and row.slice_index is not None and row.probability is not None:
            groups[row.scan, row.class_name or ""][row.slice_index] = row.probability
    table = []
    for (scan, class_name), of_slices in groups.items():
        best = max(of_slices, key=lambda index: of_slices[index])
        table.append(
            SliceRow(
                scan=scan,
                class_name=class_name,
                slice_index=best,
                probability=of_slices[best],
                slices=_runs([index for index, p in of_slices.items() if p >= 0.5]),
                n_slices=len(of_slices),
            )
        )
    return table


def _runs(numbers: Sequence[int]) -> str:
    """Return numbers with runs shortened.

    >>> _runs([7, 3, 4, 5])
    '3-5, 7'
    """
    runs = list[list[int]]()
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _name(case_id: str, method: str) -> str:
    return f"{case_id}: {method}"


def _sentence(n_images: int, verdicts: Mapping[str, str | None]) -> str:
    doubted = [name for name, doubt in verdicts.items() if doubt]
    trust = f"do not trust {format_list(doubted, len(verdicts))}" if doubted else ""
    if not doubted:
        is_checked = any(doubt is not None for doubt in verdicts.values())
        trust = "all methods passed their checks" if is_checked else "no method was checked"
    return f"volseg mapped what the model looked at in {format_count(n_images, 'image')}: {trust}."


def _verdict_remarks(verdicts: Mapping[str, str | None]) -> list[str]:
    return [f"Unreliable: {name}. {doubt}." for name, doubt in verdicts.items() if doubt]


def _facts(n_images: int, done: Sequence[ExplainRow], maps: Maps) -> list[tuple[str, str]]:
    facts = [count_fact(n_images, "image", "explained")]
    facts.append(count_fact(sum(bool(row.is_empty) for row in done), "map", "empty"))
    n_scored = len({row.case_id for row in done if row.auprc is not None})
    facts.append(count_fact(n_scored, "image", "with a mask"))
    n_checked = len({row.case_id for row in maps.layers})
    facts.append(count_fact(n_checked, "image", "checked"))
    return facts


def _methods(maps: Maps) -> list[MethodRow]:
    """Return a row per method, then those of the simple maps if there are masks."""
    texts: dict[str, dict[str, str]] = defaultdict(dict)
    counts = dict[str, int]()
    for score in maps.scores:
        key = f"{score.metric}_above_{score.against}" if score.against else score.metric
        texts[score.method][key] = score_text(score)
        counts[score.method] = score.n
    names = [*maps.verdicts, *(name for name in SIMPLE_MAPS if name in texts)]
    return [
        MethodRow(
            method=name,
            checks=_verdict(maps.verdicts[name]) if name in maps.verdicts else None,
            doubt=maps.verdicts.get(name) or None,
            n=counts.get(name),
            **texts.get(name, {}),
        )
        for name in names
    ]


def _verdict(doubt: str | None) -> str:
    return UNCHECKED if doubt is None else UNRELIABLE if doubt else RELIABLE


def score_text(score: SaliencyRow) -> str:
    """Return a score and its interval in words.

    >>> score_text(SaliencyRow(method="lime", metric="auprc", value=0.5, low=0.41, high=0.6))
    '0.500 (0.410 to 0.600)'
    """
    if score.value is None:
        return ""
    if score.low is None or score.high is None:
        return f"{score.value:.3f}"
    return f"{score.value:.3f} ({score.low:.3f} to {score.high:.3f})"


def _figure(layers: Sequence[RandomisationRow]) -> Markup:
    """Plot the mean similarity by the layers that are random, a line per method."""
    figure = new_figure(7, 3.2)
    plot = figure.subplots()
    names = [row.layer for row in layers if row.case_id == layers[0].case_id]
    names = list(dict.fromkeys(names))
    for method in dict.fromkeys(row.method for row in layers):
        values: dict[str, list[float]] = {name: [] for name in names}
        for row in layers:
            if row.method == method and row.ssim is not None:
                values[row.layer].append(row.ssim)
        means = [float(np.mean(values[name])) if values[name] else np.nan for name in names]
        plot.plot(["none", *names], [1.0, *means], marker=".", linewidth=1.2, label=method)
    plot.axhline(MOST_SIMILAR, color="grey", linestyle="--", linewidth=0.8)
    plot.set_title("SSIM with the trained network's map", fontsize=9, loc="left")
    plot.set_xlabel("random from the last layer back to", fontsize=8)
    plot.tick_params(axis="x", labelrotation=30, labelsize=7)
    plot.grid(alpha=0.3)
    plot.legend(fontsize=8)
    text = escape("mean similarity of maps by the layers that have random weights, by method")
    source = f"data:image/png;base64,{as_base64(png_bytes(figure))}"
    return Markup('<img src="{}" alt="{}">').format(source, text)

"""The page report.html of a run: its failures, its distributions, its scans and their lesions."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

from markupsafe import Markup

from volseg.measurement.rows import CaseRow, LesionMeasurement
from volseg.pages.about import About
from volseg.pages.histogram import histogram_svg
from volseg.pages.model_box import ModelBox, Similarity, similarity_of_run
from volseg.pages.montage import smaller_jpeg
from volseg.pages.page import CONTENT_BYTES, as_base64, json_size, render_page
from volseg.pages.page_tables import (
    LESIONS,
    PageTable,
    fitting_table,
    scan_table,
    with_doubts,
)
from volseg.store.records import ItemRow
from volseg.words import format_count, format_number

PICTURE_BYTES = 3_000_000  # all pictures together, before base64
PICTURE_HEIGHTS = (96, 72, 56, 40)  # pixels; the first height at which all pictures fit is used
MIN_PLOTTED = 5  # lesions; fewer are not plotted because the table shows them all


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPage:
    """The content of report.html of any command; each field is a value of its template.

    Args:
        made_with: versions of volseg and the model, and the start of the run.
        failed: (name, code, reason) of each failed scan or patient, of which there are `n_cases`.
        noun: of them. files: the tables in words.
        remarks: sentences above the numbers. facts: (name, value).
        pages: ids of the cases that have a viewer page.
        pictures: case id → base64 JPEG, each `picture_height` pixels high.
        digest: hash of the page's inputs, by which a later run knows them.
    """

    title: str
    made_with: Sequence[str]
    failed: Sequence[tuple[str, str, str]]
    n_cases: int
    noun: str
    files: str
    remarks: Sequence[str]
    facts: Sequence[tuple[str, str]]
    tables: Sequence[PageTable]
    boxes: Sequence[tuple[ModelBox, Similarity]] = ()
    plots: Sequence[Markup] = ()
    pages: Sequence[str] = ()
    pictures: Mapping[str, str] = field(default_factory=dict)
    picture_height: int = 0
    digest: str = ""

    def html(self) -> str:
        return render_page(
            "report.html.jinja",
            scripts=("table.js", "report.js"),
            limits="For research use only; not a medical device.",
            **{item.name: getattr(self, item.name) for item in fields(self)},
        )


def run_page(
    about: About,
    cases: Sequence[CaseRow],
    lesions: Sequence[LesionMeasurement],
    *,
    montages: Mapping[str, bytes],
    pages: Iterable[str],
    remarks: Sequence[str] = (),
) -> RunPage:
    """Return the page of a run: failures, distributions, a table of scans and one of lesions.

    Args:
        montages: case id → JPEG.
        pages: ids of the cases that have a viewer page.
    """
    height, pictures, unpictured = _fitting_pictures(montages)
    failed = failures(cases, "case_id")
    linked = sorted(pages)
    lesions = with_doubts(lesions, cases)
    remarks = [*unprocessed(cases, "scan"), *remarks]
    if unpictured:
        left_out = format_count(unpictured, "scan")
        remarks.append(f"To keep this page small, the pictures of {left_out} are left out.")
    left = CONTENT_BYTES - sum(map(json_size, (pictures, linked, failed, remarks)))
    scans = scan_table(cases, with_pictures=bool(pictures), max_bytes=left // 2)
    table = fitting_table(LESIONS, lesions, max_bytes=left - json_size(scans.content))
    return RunPage(
        title=f"volseg {about.command or 'results'}: {format_count(len(cases), 'scan')}",
        made_with=about.made_with,
        failed=failed,
        n_cases=len(cases),
        noun="scans",
        files="cases.csv and lesions.csv",
        boxes=[(box, similarity_of_run(cases, box.name)) for box in about.boxes],
        remarks=remarks,
        facts=_facts(cases, lesions),
        plots=_plots(lesions),
        tables=[scans, table],
        pages=linked,
        pictures=pictures,
        picture_height=height,
    )


def failures(rows: Sequence[ItemRow], name: str) -> list[tuple[str, str, str]]:
    """Return (name, code, reason) of each failed scan or patient; `name` is the column to use."""
    failed = []
    for row in rows:
        if row.status == "failed":
            reason = row.reason or "reason unknown"
            match = re.fullmatch(r"([EW]_[A-Z_]+): (.*)", reason, flags=re.DOTALL)
            code, text = (match[1], match[2]) if match else ("", reason)
            failed.append((getattr(row, name), code, text))
    return failed


def unprocessed(rows: Sequence[ItemRow], noun: str) -> list[str]:
    """Return a remark about the pending scans or patients; none if there are none."""
    n = sum(row.status == "pending" for row in rows)
    if not n:
        return []
    return [f"Not processed yet: {format_count(n, noun)}. Run the same command again to continue."]


def _fitting_pictures(montages: Mapping[str, bytes]) -> tuple[int, dict[str, str], int]:
    """Shrink the pictures until they fit: (height in pixels, case id → base64 JPEG, n left out)."""
    names = sorted(montages)
    sample = names[:: max(1, len(names) // 16)]
    height = PICTURE_HEIGHTS[-1]
    for height in PICTURE_HEIGHTS:
        sizes = [len(smaller_jpeg(montages[name], height)) for name in sample]
        if sum(sizes) / max(1, len(sample)) * 1.1 * len(names) <= PICTURE_BYTES:
            break
    pictures, size = {}, 0
    for name in names:
        picture = smaller_jpeg(montages[name], height)
        size += len(picture)
        if size > PICTURE_BYTES:
            break
        pictures[name] = as_base64(picture)
    return height, pictures, len(names) - len(pictures)


def _facts(cases: Sequence[CaseRow], lesions: Sequence[LesionMeasurement]) -> list[tuple[str, str]]:
    states = [case.status for case in cases]
    volumes = _known("volume_ml", lesions)
    facts = [
        (f"scans {state}", str(states.count(state)))
        for state in ("done", "failed", "pending")
        if state in states
    ]
    facts.append(("scans without lesions", str(sum(case.n_lesions == 0 for case in cases))))
    # Counted from the cases, because `lesions` has only the largest lesions of a noisy mask.
    n_lesions = sum(case.n_lesions or 0 for case in cases)
    facts.append(("lesions", str(max(n_lesions, len(lesions)))))
    if volumes:
        total_ml = math.fsum(case.total_volume_ml or 0.0 for case in cases)
        facts.append(("total volume", f"{format_number(max(total_ml, math.fsum(volumes)))} mL"))
        facts.append(("largest lesion", f"{format_number(max(volumes))} mL"))
    return facts


def _plots(lesions: Sequence[LesionMeasurement]) -> list[Markup]:
    if len(lesions) < MIN_PLOTTED:
        return []
    volumes = _known("volume_ml", lesions)
    plots = [histogram_svg(volumes, title="Volume", unit="mL", log=True)]
    for unit in sorted({lesion.intensity_unit or "" for lesion in lesions}):
        rows = [lesion for lesion in lesions if (lesion.intensity_unit or "") == unit]
        means = _known("intensity_mean", rows)
        plots.append(histogram_svg(means, title="Mean intensity", unit=unit))
    plots.append(histogram_svg(_known("long_axis_mm", lesions), title="Long axis", unit="mm"))
    return [plot for plot in plots if plot is not None]


def _known(column: str, lesions: Sequence[LesionMeasurement]) -> list[float]:
    values = (getattr(lesion, column) for lesion in lesions)
    return [value for value in values if value is not None]

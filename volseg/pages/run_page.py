"""The page report.html of a run: its failures, its distributions, its scans and their lesions."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from volseg import __version__
from volseg.measurement.rows import LesionMeasurement
from volseg.pages.histogram import histogram_svg
from volseg.pages.model_box import ModelBox, Similarity, similarity_of_run
from volseg.pages.montage import smaller_jpeg
from volseg.pages.page import CONTENT_BYTES, as_base64, json_size, render_page
from volseg.pages.page_tables import (
    LESION_COLUMNS,
    PageTable,
    fitting_table,
    scan_table,
    with_doubts,
)
from volseg.words import format_count, format_number

PICTURE_BYTES = 3_000_000  # all pictures together, before base64
PICTURE_HEIGHTS = (96, 72, 56, 40)  # pixels; the first height at which all pictures fit is used
MIN_PLOTTED = 5  # lesions; fewer are not plotted because the table shows them all


def report_html(
    about: Mapping[str, Any],
    cases: Sequence[Mapping[str, Any]],
    lesions: Sequence[Mapping[str, Any]],
    *,
    montages: Mapping[str, bytes],
    pages: Iterable[str],
    boxes: Sequence[ModelBox] = (),
    remarks: Sequence[str] = (),
    digest: str = "",
) -> str:
    """Return the page of a run: failures, distributions, a table of scans and one of lesions.

    Args:
        about: the run: `command`, `volseg`, `model`, `started`, as in run.json.
        cases, lesions: rows of cases.csv and of lesions.csv; None or a missing column means
            unknown.
        montages: case id → JPEG.
        pages: ids of the cases that have a viewer page.
        boxes: of the models that made the masks.
        remarks: sentences shown above the numbers.
        digest: hash of the page's inputs, stored in the page.
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
    table = fitting_table(
        "lesions",
        "Lesions",
        LesionMeasurement,
        lesions,
        shown=LESION_COLUMNS,
        needed=("label", "intensity_unit"),
        max_bytes=left - json_size(scans.content),
        file="lesions.csv",
        rank=lambda lesion: -(lesion.get("volume_ml") or 0),
        kept="largest",
    )
    return render_run_page(
        f"volseg {about.get('command') or 'results'}: {format_count(len(cases), 'scan')}",
        about,
        failed=failed,
        n_cases=len(cases),
        noun="scans",
        files="cases.csv and lesions.csv",
        boxes=[(box, similarity_of_run(list(cases), box.name)) for box in boxes],
        remarks=remarks,
        facts=_facts(cases, lesions),
        plots=_plots(lesions),
        tables=[scans, table],
        pages=linked,
        pictures=pictures,
        picture_height=height,
        digest=digest,
    )


def render_run_page(
    title: str,
    about: Mapping[str, Any],
    *,
    facts: Sequence[tuple[str, str]],
    tables: Sequence[PageTable],
    plots: Sequence[Markup] = (),
    pages: Sequence[str] = (),
    pictures: Mapping[str, str] | None = None,
    picture_height: int = 0,
    boxes: Sequence[tuple[ModelBox, Similarity]] = (),
    digest: str = "",
    **texts: Any,
) -> str:
    """Return report.html of any command; `texts` are the other values of its template."""
    made_with = [
        f"volseg {about.get('volseg') or __version__}",
        about.get("model"),
        about.get("started"),
    ]
    return render_page(
        "report.html.jinja",
        scripts=("table.js", "report.js"),
        title=title,
        made_with=[text for text in made_with if text],
        facts=facts,
        tables=tables,
        plots=plots,
        pages=pages,
        pictures=pictures or {},
        picture_height=picture_height,
        boxes=boxes,
        digest=digest,
        limits="For research use only; not a medical device.",
        **texts,
    )


def failures(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[str, str, str]]:
    """Return (name, code, reason) of each failed scan or patient; `name` is the column to use."""
    failed = []
    for row in rows:
        if row.get("status") == "failed":
            reason = row.get("reason") or "reason unknown"
            match = re.fullmatch(r"([EW]_[A-Z_]+): (.*)", reason, flags=re.DOTALL)
            failed.append((row[name], match[1] if match else "", match[2] if match else reason))
    return failed


def unprocessed(rows: Sequence[Mapping[str, Any]], noun: str) -> list[str]:
    """Return a remark about the pending scans or patients; none if there are none."""
    n = sum(row.get("status") == "pending" for row in rows)
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


def _facts(
    cases: Sequence[Mapping[str, Any]], lesions: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    states = [case.get("status") for case in cases]
    volumes = [lesion["volume_ml"] for lesion in lesions if lesion.get("volume_ml") is not None]
    facts = [
        (f"scans {state}", str(states.count(state)))
        for state in ("done", "failed", "pending")
        if state in states
    ]
    facts.append(("scans without lesions", str(sum(case.get("n_lesions") == 0 for case in cases))))
    # Counted from the cases, because `lesions` has only the largest lesions of a noisy mask.
    n_lesions = sum(case.get("n_lesions") or 0 for case in cases)
    facts.append(("lesions", str(max(n_lesions, len(lesions)))))
    if volumes:
        total_ml = math.fsum(case.get("total_volume_ml") or 0.0 for case in cases)
        facts.append(("total volume", f"{format_number(max(total_ml, math.fsum(volumes)))} mL"))
        facts.append(("largest lesion", f"{format_number(max(volumes))} mL"))
    return facts


def _plots(lesions: Sequence[Mapping[str, Any]]) -> list[Markup]:
    def values(column: str, rows: Sequence[Mapping[str, Any]] = lesions) -> list[float]:
        return [row[column] for row in rows if row.get(column) is not None]

    if len(lesions) < MIN_PLOTTED:
        return []
    plots = [histogram_svg(values("volume_ml"), title="Volume", unit="mL", log=True)]
    for unit in sorted({lesion.get("intensity_unit") or "" for lesion in lesions}):
        rows = [lesion for lesion in lesions if (lesion.get("intensity_unit") or "") == unit]
        means = values("intensity_mean", rows)
        plots.append(histogram_svg(means, title="Mean intensity", unit=unit))
    plots.append(histogram_svg(values("long_axis_mm"), title="Long axis", unit="mm"))
    return [plot for plot in plots if plot is not None]

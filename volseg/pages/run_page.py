"""The page report.html of a run: what it found, its failures, its scans and their lesions."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from volseg.errors import CODE_NAME
from volseg.inputs import shorten
from volseg.measurement.rows import CaseRow, LesionMeasurement
from volseg.pages.about import About
from volseg.pages.headline import Warnings, noun_of_lesions, run_sentence, warning_kinds
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
from volseg.pages.scales import OUTLIER_RULE
from volseg.pages.strips import ALL, Dot, Strip, strip_of
from volseg.store.records import ItemRow
from volseg.store.reviews import Reviews
from volseg.words import format_count, format_number

PICTURE_BYTES = 3_000_000  # all pictures together, before base64
PICTURE_HEIGHTS = (96, 72, 56, 40)  # pixels; the first height at which all pictures fit is used
MIN_PLOTTED = 5  # lesions; fewer are not plotted because the table shows them all
MAX_DOTS = 1000  # of a plot; with more lesions, a dot is a scan
MAX_OUTLIERS = 5  # named below a plot


@dataclass(frozen=True, slots=True, kw_only=True)
class Notes:
    """What the page of a run says besides its tables.

    Args:
        remarks: sentences. reviews: what a reader decided about the lesions.
    """

    remarks: Sequence[str] = ()
    reviews: Reviews | None = None

    @property
    def review_sha256(self) -> str:
        return "" if self.reviews is None else self.reviews.sha256


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot of a page, and its outliers as (name, page)."""

    svg: Markup
    outliers: Sequence[tuple[str, str]] = ()
    n_more: int = 0

    @classmethod
    def of(cls, strip: Strip) -> Plot:
        named = [(dot.name, dot.href) for dot in strip.outliers[:MAX_OUTLIERS]]
        return cls(strip.svg, named, len(strip.outliers) - len(named))


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPage:
    """The content of report.html of any command; each field is a value of its template.

    Args:
        made_with: versions of volseg and the model, and the start of the run.
        failed: (name, code, reason) of each failed scan or patient, of which there are `n_cases`.
        noun: of them. lesion_noun: of a row of the table of lesions. files: the tables in words.
        sentence: what was run, on what, what it found, and how sure that is.
        warnings: of the scans.
        remarks: sentences above the numbers. facts: (name, value).
        plots: with a note on each that follows them. reviews: entries of review.csv.
        pages: ids of the cases that have a viewer page.
        pictures: case id → base64 JPEG, each `picture_height` pixels high.
        digest: hash of the page's inputs, by which a later run knows them.
    """

    title: str
    made_with: Sequence[str]
    failed: Sequence[tuple[str, str, str]]
    n_cases: int
    remarks: Sequence[str]
    facts: Sequence[tuple[str, str]]
    tables: Sequence[PageTable]
    noun: str = "scans"
    lesion_noun: str = "lesion"
    files: str = "cases.csv and lesions.csv"
    sentence: str = ""
    warnings: Warnings = field(default_factory=Warnings)
    boxes: Sequence[tuple[ModelBox, Similarity]] = ()
    plots: Sequence[Plot] = ()
    plot_note: str = ""
    reviews: Sequence[Sequence[str | int | None]] = ()
    pages: Sequence[str] = ()
    pictures: Mapping[str, str] = field(default_factory=dict)
    picture_height: int = 0
    digest: str = ""

    def html(self) -> str:
        return render_page(
            "report.html.jinja",
            scripts=("table.js", "review.js", "report.js"),
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
    notes: Notes | None = None,
) -> RunPage:
    """Return the page of a run: failures, distributions, a table of scans and one of lesions.

    Args:
        montages: case id → JPEG.
        pages: ids of the cases that have a viewer page.
        notes: what else the page says.
    """
    notes = notes or Notes()
    height, pictures, unpictured = fitting_pictures(montages)
    failed = failures(cases, "case_id")
    linked = sorted(pages)
    lesions = with_doubts(lesions, cases)
    boxes = [(box, similarity_of_run(cases, box.name)) for box in about.boxes]
    remarks = _remarks(cases, lesions, notes, unpictured)
    entries = [] if notes.reviews is None else notes.reviews.entries()
    plots = _plots(cases, lesions, set(linked))
    left = CONTENT_BYTES - sum(map(json_size, (pictures, linked, failed, remarks, entries)))
    left -= sum(len(plot.svg.encode()) for plot in plots)
    scans = scan_table(cases, with_pictures=bool(pictures), max_bytes=left // 2)
    layout = replace(LESIONS, caption=f"{noun_of_lesions(lesions).capitalize()}s")
    table = fitting_table(layout, lesions, max_bytes=left - json_size(scans.content))
    return RunPage(
        title=f"volseg {about.command or 'results'}: {format_count(len(cases), 'scan')}",
        made_with=about.made_with,
        failed=failed,
        n_cases=len(cases),
        sentence=_sentence(about, cases, lesions, boxes),
        warnings=warning_kinds(cases),
        boxes=boxes,
        remarks=remarks,
        lesion_noun=noun_of_lesions(lesions),
        facts=_facts(cases, lesions),
        plots=plots,
        plot_note=f"A dot is a {_dot_noun(lesions)}; select it to open it. {OUTLIER_RULE}.",
        reviews=entries,
        tables=[scans, table],
        pages=linked,
        pictures=pictures,
        picture_height=height,
    )


def _sentence(
    about: About,
    cases: Sequence[CaseRow],
    lesions: Sequence[LesionMeasurement],
    boxes: Sequence[tuple[ModelBox, Similarity]],
) -> str:
    n_lesions, total_ml = _totals(cases, lesions)
    return run_sentence(
        about,
        cases,
        n_lesions=n_lesions,
        total_ml=total_ml,
        boxes=boxes,
        noun=noun_of_lesions(lesions),
    )


def _remarks(
    cases: Sequence[CaseRow],
    lesions: Sequence[LesionMeasurement],
    notes: Notes,
    unpictured: int,
) -> list[str]:
    """Return the remarks of the page; `unpictured`: how many pictures are left out."""
    remarks = [*unprocessed(cases, "scan"), *notes.remarks]
    remarks += unpictured_remark(unpictured)
    if notes.reviews:
        sizes = {(lesion.case_id, lesion.lesion_id): lesion.n_voxels for lesion in lesions}
        remarks.append(notes.reviews.summary(sizes))
    return remarks


def unpictured_remark(n: int) -> list[str]:
    """Return a remark about the scans whose pictures did not fit; none if there are none."""
    left_out = format_count(n, "scan")
    return [f"To keep this page small, the pictures of {left_out} are left out."] if n else []


def failures(
    rows: Sequence[Any], name: str, reason_column: str = "reason"
) -> list[tuple[str, str, str]]:
    """Return (name, code, reason) of each failed item; `name` is the column to use."""
    failed = []
    for row in rows:
        if row.status == "failed":
            reason = getattr(row, reason_column) or "reason unknown"
            failed.append((getattr(row, name), *code_and_text(reason)))
    return failed


def code_and_text(reason: str) -> tuple[str, str]:
    """Split the reason of a failure into its code, empty if it has none, and its text."""
    match = re.fullmatch(rf"([EW]{CODE_NAME}): (.*)", reason, flags=re.DOTALL)
    return (match[1], match[2]) if match else ("", reason)


def unprocessed(rows: Sequence[ItemRow], noun: str) -> list[str]:
    """Return a remark about the pending scans or patients; none if there are none."""
    n = sum(row.status == "pending" for row in rows)
    if not n:
        return []
    return [f"Not processed yet: {format_count(n, noun)}. Run the same command again to continue."]


def fitting_pictures(montages: Mapping[str, bytes]) -> tuple[int, dict[str, str], int]:
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


def count_fact(number: int, noun: str, state: str = "") -> tuple[str, str]:
    """Return a number of things with their name.

    >>> count_fact(1, "scan", "done"), count_fact(0, "new lesion")
    (('scan done', '1'), ('new lesions', '0'))
    """
    nouns = format_count(number, noun).partition(" ")[2]
    return f"{nouns} {state}".rstrip(), str(number)


def _facts(cases: Sequence[CaseRow], lesions: Sequence[LesionMeasurement]) -> list[tuple[str, str]]:
    states = [case.status for case in cases]
    volumes = _known("volume_ml", lesions)
    facts = [
        count_fact(states.count(state), "scan", state)
        for state in ("done", "failed", "pending")
        if state in states
    ]
    noun = noun_of_lesions(lesions)
    n_without = sum(case.n_lesions == 0 for case in cases)
    facts.append(count_fact(n_without, "scan", f"without {noun}s"))
    n_lesions, total_ml = _totals(cases, lesions)
    facts.append(count_fact(n_lesions, noun))
    if volumes:
        facts.append(("total volume", f"{format_number(total_ml)} mL"))
        facts.append((f"largest {noun}", f"{format_number(max(volumes))} mL"))
    return facts


def _totals(cases: Sequence[CaseRow], lesions: Sequence[LesionMeasurement]) -> tuple[int, float]:
    """Return the number of lesions and their volume in mL.

    They are counted from the cases, because `lesions` has only the largest of a noisy mask.
    """
    n_lesions = sum(case.n_lesions or 0 for case in cases)
    total_ml = math.fsum(case.total_volume_ml or 0.0 for case in cases)
    volumes = _known("volume_ml", lesions)
    return max(n_lesions, len(lesions)), max(total_ml, math.fsum(volumes))


def _dot_noun(lesions: Sequence[LesionMeasurement]) -> str:
    return noun_of_lesions(lesions) if len(lesions) <= MAX_DOTS else "scan"


def _plots(
    cases: Sequence[CaseRow], lesions: Sequence[LesionMeasurement], linked: Container[str]
) -> list[Plot]:
    """Return the strip plots: one per quantity and unit, with a dot per lesion or per scan."""
    if len(lesions) < MIN_PLOTTED:
        return []
    if _dot_noun(lesions) == "scan":
        strips = _scan_strips(cases, linked)
    else:
        strips = _lesion_strips(lesions, linked)
    return [Plot.of(strip) for strip in strips if strip is not None]


def _lesion_strips(
    lesions: Sequence[LesionMeasurement], linked: Container[str]
) -> Iterator[Strip | None]:
    noun = noun_of_lesions(lesions)

    def dots(column: str, unit: str, rows: Sequence[LesionMeasurement]) -> dict[str, list[Dot]]:
        groups: dict[str, list[Dot]] = defaultdict(list)
        for row in rows:
            value = getattr(row, column)
            if value is not None:
                name = f"{row.case_id}, {noun} {row.lesion_id}: {format_number(value)} {unit}"
                page = _page(row.case_id, linked, f"#lesion={row.lesion_id}")
                groups[shorten(row.label_name or "")].append(Dot(value, name.rstrip(), page))
        return groups

    yield strip_of(dots("volume_ml", "mL", lesions), title="Volume", unit="mL", noun=noun)
    for unit in sorted({lesion.intensity_unit or "" for lesion in lesions}):
        rows = [lesion for lesion in lesions if (lesion.intensity_unit or "") == unit]
        groups = dots("intensity_mean", unit, rows)
        yield strip_of(groups, title="Mean intensity", unit=unit, noun=noun)
    yield strip_of(dots("long_axis_mm", "mm", lesions), title="Long axis", unit="mm", noun=noun)


def _scan_strips(cases: Sequence[CaseRow], linked: Container[str]) -> Iterator[Strip | None]:
    quantities = (
        ("total_volume_ml", "Volume of all lesions of a scan", "mL"),
        ("n_lesions", "Lesions of a scan", ""),
        ("sum_long_axis_mm", "Sum of long axes of a scan", "mm"),
    )
    for column, title, unit in quantities:
        dots = [
            Dot(value, f"{case.case_id}: {format_number(value)} {unit}".rstrip(), page)
            for case in cases
            if case.status == "done" and (value := getattr(case, column)) is not None
            for page in [_page(case.case_id, linked)]
        ]
        yield strip_of({ALL: dots}, title=title, unit=unit, noun="scan")


def _page(case_id: str, linked: Container[str], fragment: str = "") -> str:
    """Return the address of the viewer page of a case; empty if it has none."""
    return f"viewer/{quote(case_id, safe='')}.html{fragment}" if case_id in linked else ""


def _known(column: str, lesions: Sequence[LesionMeasurement]) -> list[float]:
    values = (getattr(lesion, column) for lesion in lesions)
    return [value for value in values if value is not None]

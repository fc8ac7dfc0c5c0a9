"""Tables on pages: which columns they show, and how they fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from volseg.columns import columns_of
from volseg.comparison.changes import LesionChange
from volseg.comparison.response import PatientResponse
from volseg.measurement.rows import CaseRow, LesionMeasurement
from volseg.measurement.units import shown_unit, unit_doubt_in
from volseg.pages.page import json_size, json_value

LESION_COLUMNS = (
    "case_id",
    "lesion_id",
    "label_name",
    "volume_ml",
    "long_axis_mm",
    "short_axis_mm",
    "intensity_mean",
    "intensity_sd",
    "suv_peak",
    "mtv41_ml",
    "tlg_g",
    "density_g_cm3",
    "mass_g",
    "agatston_score",
    "sphericity",
    "class_name",
    "class_probability",
    "confidence_mean",
    "recist_measurable",
    "touches_border",
    "notes",
)
SCAN_COLUMNS = (
    "case_id",
    "montage",
    "status",
    "n_lesions",
    "total_volume_ml",
    "warnings",
    "largest_volume_ml",
    "sum_long_axis_mm",
    "n_measurable",
    "burden",
    "agatston_score",
)
RESPONSE_COLUMNS = (
    "patient",
    "response",
    "change_sum_percent",
    "warnings",
    "response_rule",
    "baseline_sum_mm",
    "followup_sum_mm",
    "change_volume_ml",
    "change_volume_percent",
    "n_baseline",
    "n_followup",
    "n_new",
    "n_gone",
    "n_merged",
    "n_split",
    "status",
    "reason",
)
CHANGE_COLUMNS = (
    "patient",
    "status",
    "label_name",
    "baseline_lesion_id",
    "followup_lesion_id",
    "is_target",
    "baseline_volume_ml",
    "followup_volume_ml",
    "change_volume_percent",
    "baseline_long_axis_mm",
    "followup_long_axis_mm",
    "change_long_axis_mm",
    "change_long_axis_percent",
    "change_intensity_mean",
    "notes",
)
VIEWER_COLUMNS = (
    "lesion_id",
    "label_name",
    "volume_ml",
    "long_axis_mm",
    "short_axis_mm",
    "intensity_mean",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How pages show a kind of row.

    Args:
        name, caption: of the table on the page.
        hint: example of a filter. file: the CSV file with all rows.
        shown: columns that come first and are visible initially if any row has a value.
        needed: further columns that stay if the page is too small for all; hidden initially.
        rank: sort key; rows with the lowest rank stay. kept: what a remark calls these rows.
    """

    name: str
    caption: str
    row_type: type
    hint: str
    file: str
    shown: Sequence[str]
    needed: Sequence[str] = ()
    rank: Callable[[Any], float] = lambda row: 0
    kept: str = "first"


LESIONS = Layout(
    name="lesions",
    caption="Lesions",
    row_type=LesionMeasurement,
    hint="type words, or a condition such as volume_ml > 1",
    file="lesions.csv",
    shown=LESION_COLUMNS,
    needed=("label", "intensity_unit"),
    rank=lambda lesion: -(lesion.volume_ml or 0),
    kept="largest",
)
LESIONS_OF_A_SCAN = replace(LESIONS, shown=VIEWER_COLUMNS)
SCANS = Layout(
    name="scans",
    caption="Scans",
    row_type=CaseRow,
    hint="type words, or a condition such as n_lesions > 1",
    file="cases.csv",
    shown=SCAN_COLUMNS,
)
PATIENTS = Layout(
    name="patients",
    caption="Patients",
    row_type=PatientResponse,
    hint="type words, or a condition such as n_new > 0",
    file="response.csv",
    shown=RESPONSE_COLUMNS,
)
CHANGES = Layout(
    name="changes",
    caption="Lesions at both time points",
    row_type=LesionChange,
    hint="type words, or a condition such as change_volume_percent > 20",
    file="comparison.csv",
    shown=CHANGE_COLUMNS,
)


CHANGES_OF_A_PATIENT = replace(
    CHANGES, shown=tuple(name for name in CHANGE_COLUMNS if name != "patient")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PageTable:
    """A table of a page; its script reads `content`: name, caption, hint, columns and rows."""

    name: str
    caption: str
    content: Mapping[str, Any]
    remark: str = ""


def scan_table(cases: Sequence[CaseRow], *, with_pictures: bool, max_bytes: int) -> PageTable:
    """Return a table with a row per scan, and with their montages if there are any."""
    table = fitting_table(SCANS, cases, max_bytes=max_bytes)
    if not with_pictures:
        return table
    meaning = "axial, coronal and sagittal slices through the largest lesion"
    return with_picture_column(table, "montage", meaning)


def with_picture_column(table: PageTable, name: str, meaning: str) -> PageTable:
    """Return a table with a second column, which the page's script fills with pictures."""
    picture = {"name": name, "unit": "", "meaning": meaning, "shown": True}
    columns = [table.content["columns"][0], picture, *table.content["columns"][1:]]
    rows = [[row[0], "", *row[1:]] for row in table.content["rows"]]
    return replace(table, content=dict(table.content) | {"columns": columns, "rows": rows})


def page_table(
    layout: Layout, rows: Sequence[Any], *, only: Sequence[str] | None = None, remark: str = ""
) -> PageTable:
    """Return a table of rows of the layout's type.

    Args:
        only: the columns to include; None for all.
    """
    units = {getattr(row, "intensity_unit", None) for row in rows}
    common_unit = (units.pop() if len(units) == 1 else None) or ""
    # Rows with different units each show their own.
    shown = (*layout.shown, "intensity_unit") if len(units) > 1 else layout.shown
    columns = _ordered_columns(layout.row_type, shown, only)
    values_of = attrgetter(*(name for name, _, _ in columns))
    values = [[json_value(value) for value in values_of(row)] for row in rows]
    descriptions = [
        {
            "name": name,
            "unit": common_unit if unit == "intensity_unit" else unit,
            "meaning": meaning,
            "shown": name in shown and _is_informative(name, [row[n] for row in values]),
        }
        for n, (name, unit, meaning) in enumerate(columns)
    ]
    content = {
        "name": layout.name,
        "caption": layout.caption,
        "hint": layout.hint,
        "columns": descriptions,
        "rows": values,
    }
    return PageTable(name=layout.name, caption=layout.caption, content=content, remark=remark)


def _ordered_columns(
    row_type: type, shown: Sequence[str], only: Sequence[str] | None
) -> list[tuple[str, str, str]]:
    """Return name, unit and meaning of the columns, those shown first."""
    columns = [
        (name, unit, meaning)
        for name, unit, meaning, _ in columns_of(row_type)
        if only is None or name in only
    ]
    position = {name: n for n, name in enumerate(shown)}
    return sorted(columns, key=lambda column: position.get(column[0], len(shown)))


def fitting_table(layout: Layout, rows: Sequence[Any], *, max_bytes: int) -> PageTable:
    """Return a table that fits: all columns, else the important ones, else fewer rows.

    Args:
        max_bytes: size limit; if not even one row fits, the table has no rows.
    """
    table = page_table(layout, rows)
    if json_size(table.content) <= max_bytes:
        return table
    only = (*layout.shown, *layout.needed)
    fitting, remark = rows, "To keep this page small, only the most important columns are included"
    while True:
        text = f"{remark}; {layout.file} has them all."
        table = page_table(layout, fitting, only=only, remark=text)
        size = json_size(table.content)
        if size <= max_bytes or not fitting:
            return table
        n = max(0, int(len(fitting) * 0.95 * max_bytes / size))
        fitting = sorted(rows, key=layout.rank)[:n]
        remark = f"Showing the {n} {layout.kept} of {len(rows)} rows and the most important columns"


def with_doubts(
    lesions: Sequence[LesionMeasurement], cases: Sequence[CaseRow]
) -> Sequence[LesionMeasurement]:
    """Return the lesions, marking the unit of those whose scan has a doubtful unit."""
    doubted = {case.case_id for case in cases if unit_doubt_in(case.warnings)}
    return [
        replace(lesion, intensity_unit=shown_unit(lesion.intensity_unit, is_doubted=True))
        if lesion.case_id in doubted and lesion.intensity_unit
        else lesion
        for lesion in lesions
    ]


def _is_informative(column: str, values: Sequence[Any]) -> bool:
    if not values:
        return True
    distinct = {value for value in values if value is not None and value != ""}
    # A single label name in all rows distinguishes none of them.
    return len(distinct) > (1 if column == "label_name" else 0)

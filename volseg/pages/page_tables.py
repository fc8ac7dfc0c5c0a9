"""Tables on pages: which columns they show, and how they fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from volseg.columns import columns_of
from volseg.comparison.changes import LesionChange
from volseg.comparison.response import PatientResponse
from volseg.measurement.rows import CaseRow, LesionMeasurement
from volseg.measurement.units import shown_unit, unit_doubt_in
from volseg.pages.page import json_size, json_value

HINTS = {  # filter examples
    LesionMeasurement: "type words, or a condition such as volume_ml > 1",
    CaseRow: "type words, or a condition such as n_lesions > 1",
    PatientResponse: "type words, or a condition such as n_new > 0",
    LesionChange: "type words, or a condition such as change_volume_percent > 20",
}
LESION_COLUMNS = (
    "case_id",
    "lesion_id",
    "label_name",
    "volume_ml",
    "long_axis_mm",
    "short_axis_mm",
    "intensity_mean",
    "intensity_sd",
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
    "largest_volume_ml",
    "sum_long_axis_mm",
    "n_measurable",
    "burden",
    "agatston_score",
    "warnings",
)
RESPONSE_COLUMNS = (
    "patient",
    "response",
    "response_rule",
    "baseline_sum_mm",
    "followup_sum_mm",
    "change_sum_percent",
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
    "warnings",
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
class PageTable:
    """A table of a page; its script reads `content`: name, caption, hint, columns and rows."""

    name: str
    caption: str
    content: Mapping[str, Any]
    remark: str = ""


def lesion_table(
    lesions: Sequence[Mapping[str, Any]], *, shown: Sequence[str] = LESION_COLUMNS
) -> PageTable:
    """Return a table with a row per lesion and all columns of lesions.csv."""
    return page_table("lesions", "Lesions", LesionMeasurement, lesions, shown=shown)


def scan_table(
    cases: Sequence[Mapping[str, Any]], *, with_pictures: bool, max_bytes: int
) -> PageTable:
    """Return a table with a row per scan; the page's script fills its picture column."""
    table = fitting_table(
        "scans", "Scans", CaseRow, cases, shown=SCAN_COLUMNS, max_bytes=max_bytes, file="cases.csv"
    )
    if not with_pictures:
        return table
    picture = {
        "name": "montage",
        "unit": "",
        "meaning": "axial, coronal and sagittal slices through the largest lesion",
        "shown": True,
    }
    columns = [table.content["columns"][0], picture, *table.content["columns"][1:]]
    rows = [[row[0], "", *row[1:]] for row in table.content["rows"]]
    return replace(table, content=dict(table.content) | {"columns": columns, "rows": rows})


def page_table(
    name: str,
    caption: str,
    row_type: type,
    rows: Sequence[Mapping[str, Any]],
    *,
    shown: Sequence[str],
    only: Sequence[str] | None = None,
    remark: str = "",
) -> PageTable:
    """Return a table whose columns are the fields of the dataclass `row_type`.

    Args:
        rows: field name → value.
        shown: columns that come first and are visible initially if any row has a value.
        only: the columns to include; None for all.
    """
    units = {row.get("intensity_unit") for row in rows}
    # Rows with different units each show their own.
    if len(units) > 1 and "intensity_unit" not in shown:
        shown = (*shown, "intensity_unit")
    columns = [column for column in columns_of(row_type) if only is None or column[0] in only]
    columns.sort(key=lambda column: shown.index(column[0]) if column[0] in shown else len(shown))
    common_unit = (units.pop() if len(units) == 1 else None) or ""
    values = [[json_value(row.get(column[0])) for column in columns] for row in rows]
    content = {
        "name": name,
        "caption": caption,
        "hint": HINTS.get(row_type, "words"),
        "columns": [
            {
                "name": column,
                "unit": common_unit if unit == "intensity_unit" else unit,
                "meaning": meaning,
                "shown": column in shown
                and (not rows or _is_informative(column, [row[n] for row in values])),
            }
            for n, (column, unit, meaning, _) in enumerate(columns)
        ],
        "rows": values,
    }
    return PageTable(name=name, caption=caption, content=content, remark=remark)


def fitting_table(
    name: str,
    caption: str,
    row_type: type,
    rows: Sequence[Mapping[str, Any]],
    *,
    shown: Sequence[str],
    max_bytes: int,
    file: str,
    needed: Sequence[str] = (),
    rank: Callable[[Mapping[str, Any]], float] = lambda row: 0,
    kept: str = "first",
) -> PageTable:
    """Return a table that fits: all columns, else the important ones, else fewer rows.

    Args:
        shown, needed: the important columns; those in `needed` are hidden initially.
        max_bytes: size limit; if not even one row fits, the table has no rows.
        file: the CSV file with all rows, named in the remark.
        rank: sort key; rows with the lowest rank are kept. kept: what the remark calls them.
    """
    table = page_table(name, caption, row_type, rows, shown=shown)
    if json_size(table.content) <= max_bytes:
        return table
    only = (*shown, *needed)
    fitting, remark = rows, "To keep this page small, only the most important columns are included"
    while True:
        text = f"{remark}; {file} has them all."
        table = page_table(name, caption, row_type, fitting, shown=shown, only=only, remark=text)
        size = json_size(table.content)
        if size <= max_bytes or not fitting:
            return table
        n = max(0, int(len(fitting) * 0.95 * max_bytes / size))
        fitting = sorted(rows, key=rank)[:n]
        remark = f"Showing the {n} {kept} of {len(rows)} rows and the most important columns"


def with_doubts(
    lesions: Sequence[Mapping[str, Any]], cases: Sequence[Mapping[str, Any]]
) -> Sequence[Mapping[str, Any]]:
    """Return the lesions, marking the unit of those whose scan has a doubtful unit."""
    doubted = {case["case_id"] for case in cases if unit_doubt_in(case.get("warnings") or "")}
    return [
        {**lesion, "intensity_unit": shown_unit(lesion["intensity_unit"], is_doubted=True)}
        if lesion.get("case_id") in doubted and lesion.get("intensity_unit")
        else lesion
        for lesion in lesions
    ]


def _is_informative(column: str, values: Sequence[Any]) -> bool:
    distinct = {value for value in values if value is not None and value != ""}
    # A single label name in all rows distinguishes none of them.
    return len(distinct) > (1 if column == "label_name" else 0)

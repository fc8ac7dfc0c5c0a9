"""HTML pages: report.html of a run, and a viewer page per scan.

Each page is a single file that makes no network request.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from itertools import islice
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from volseg import __version__
from volseg.columns import columns_of
from volseg.measurement.changes import LesionChange
from volseg.measurement.response import PatientResponse
from volseg.measurement.rows import CaseRow, LesionMeasurement
from volseg.measurement.units import shown_unit, unit_doubt_in
from volseg.pages.histogram import histogram_svg
from volseg.pages.model_box import ModelBox, Similarity, similarity_of_run, similarity_of_scan
from volseg.pages.preview import Preview, lesion_colour, lesion_points, point_of, smaller_jpeg

MAX_PAGE_BYTES = 6_000_000
NIIVUE, NIIVUE_LICENCE = "niivue-0.69.0.umd.js", "niivue-LICENSE.txt"
MAX_VIEWER_ROWS = 1000  # lesions in the table of a viewer page
MAX_CHANGE_ROWS = 5000  # lesions on a comparison page, which is built in memory
RESERVED_BYTES = 300_000  # per page, for style, script, text and one picture
POINTS_BYTES = 250  # per lesion of a viewer page, for its position and diameter end points
PICTURE_BYTES = 3_000_000  # all pictures in report.html together, before base64
PICTURE_HEIGHTS = (96, 72, 56, 40)  # pixels; the first height at which all pictures fit is used
MIN_PLOTTED = 5  # lesions; fewer are not plotted because the table shows them all
HINTS = {  # filter examples
    LesionMeasurement: "type words, or a condition such as volume_ml > 1",
    CaseRow: "type words, or a condition such as n_lesions > 1",
    PatientResponse: "type words, or a condition such as n_new > 0",
    LesionChange: "type words, or a condition such as change_volume_percent > 20",
}

# Columns shown initially; the reader can add the others.
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


def viewer_html(
    case: Mapping[str, Any],
    lesions: Sequence[Mapping[str, Any]],
    preview: Preview,
    montage: bytes,
    *,
    unit: str,
    box: ModelBox | None = None,
) -> str:
    """Return the page of one scan: slices with outlined lesions, a row per lesion, a picture.

    The picture replaces the slices in browsers without WebGL.

    Args:
        case, lesions: a row of cases.csv and rows of lesions.csv; None or a missing column means
            unknown. Only the first 1000 lesions are used.
        montage: JPEG of the scan's largest lesion.
        unit: of the intensities.
        box: the model box; None if volseg did not make the masks.
    """
    rows = sorted(lesions, key=lambda lesion: lesion["lesion_id"])[:MAX_VIEWER_ROWS]
    rows = _with_doubts(rows, [case])
    unit = shown_unit(unit, is_doubted=bool(unit_doubt_in(case.get("warnings") or "")))
    remark = ""
    n_lesions = max(case.get("n_lesions") or 0, len(lesions))
    if len(rows) < n_lesions:
        remark = f"Showing the first {len(rows)} of {n_lesions} lesions; lesions.csv has them all."
    if preview.not_drawn:
        remark += f" Not drawn: {_counted(preview.not_drawn, 'lesion')}, too small at this"
        remark += " resolution or beyond the drawing limit."
    table = lesion_table(rows, shown=VIEWER_COLUMNS)
    points = lesion_points(preview, rows)
    n_drawn = int(preview.ids.array.max(initial=0))
    content = {
        "table": table.content,
        "unit": unit,
        "window": [_number(value) for value in preview.window],
        "points": {number: [round(part, 3) for part in point] for number, point in points.items()},
        "axes": {lesion["lesion_id"]: axes for lesion in rows if (axes := _axes(lesion))},
        "colours": bytes(part for n in range(1, n_drawn + 1) for part in lesion_colour(n)).hex(),
    }
    script = _script("table.js", "viewer.js")
    facts = [
        case.get("image") or "",
        case.get("model") or "",
        f"volseg {__version__}",
        _counted(case.get("n_lesions"), "lesion"),
        f"{_shown(case.get('total_volume_ml'))} mL" if lesions else "",
    ]
    return _page(
        "viewer.html.jinja",
        scripts=(script, _asset("vendor", NIIVUE)),
        case={"case_id": case["case_id"], "warnings": case.get("warnings") or ""},
        facts=[fact for fact in facts if fact],
        unit=unit,
        shown_part=_shown_part(preview),
        box=box,
        similarity=similarity_of_scan(case.get("warnings") or ""),
        invitation="Select a lesion in the table or the slices." if rows else "No lesions found.",
        remark=remark.strip(),
        content=content,
        montage=_base64(montage),
        image=_base64(preview.packed_image),
        ids=_base64(preview.packed_ids),
        niivue=_packed_niivue(),
        licences=Markup(_asset("vendor", NIIVUE_LICENCE)),  # noqa: S704 a package file
        script=Markup(script),  # noqa: S704
    )


def image_budget(lesions: Sequence[Mapping[str, Any]]) -> int:
    """Return how many compressed bytes of image and lesion ids fit into the viewer page."""
    rows = lesions[:MAX_VIEWER_ROWS]
    table = _size(lesion_table(rows).content) + POINTS_BYTES * len(rows)
    left = MAX_PAGE_BYTES - RESERVED_BYTES - len(_packed_niivue()) - table
    return int(left * 0.74)  # base64 turns 3 bytes into 4


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
    height, pictures, unpictured = _fitting(montages)
    n_pending = sum(case.get("status") == "pending" for case in cases)
    failed = [_failure(case["case_id"], case) for case in cases if case.get("status") == "failed"]
    linked = sorted(pages)
    lesions = _with_doubts(lesions, cases)
    remarks = [*_unprocessed(n_pending, "scan"), *remarks]
    if unpictured:
        left_out = _counted(unpictured, "scan")
        remarks.append(f"To keep this page small, the pictures of {left_out} are left out.")
    left = MAX_PAGE_BYTES - RESERVED_BYTES - sum(map(_size, (pictures, linked, failed, remarks)))
    scans = scan_table(cases, with_pictures=bool(pictures), max_bytes=left // 2)
    table = fitting_table(
        "lesions",
        "Lesions",
        LesionMeasurement,
        lesions,
        shown=LESION_COLUMNS,
        needed=("label", "intensity_unit"),
        max_bytes=left - _size(scans.content),
        file="lesions.csv",
        rank=lambda lesion: -(lesion.get("volume_ml") or 0),
        kept="largest",
    )
    return _run_page(
        f"volseg {about.get('command') or 'results'}: {_counted(len(cases), 'scan')}",
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


def comparison_html(
    about: Mapping[str, Any],
    patients: Sequence[Mapping[str, Any]],
    lesions: Iterable[Mapping[str, Any]],
    *,
    most: int = MAX_CHANGE_ROWS,
) -> str:
    """Return the page of a comparison of two time points: failures, patients and lesions.

    Args:
        about: the run: `command`, `volseg`, `started`.
        patients, lesions: rows of response.csv and of comparison.csv.
        most: number of lesion rows on the page; the remaining ones are left out.
    """
    changes = list(islice(lesions, most + 1))
    remarks = _unprocessed(sum(row.get("status") == "pending" for row in patients), "patient")
    if len(changes) > most:
        remarks.insert(0, f"Showing the first {most} lesion rows; comparison.csv has them all.")
    responses = Counter(
        row.get("response") or "not classified" for row in patients if row.get("status") == "done"
    )
    failed = [_failure(row["patient"], row) for row in patients if row.get("status") == "failed"]
    left = MAX_PAGE_BYTES - RESERVED_BYTES - _size(failed)
    table = fitting_table(
        "patients",
        "Patients",
        PatientResponse,
        patients,
        shown=RESPONSE_COLUMNS,
        max_bytes=left // 2,
        file="response.csv",
    )
    has_several = any(
        ";" in str(row.get(name)) for row in patients for name in ("baseline_case", "followup_case")
    )
    scan_columns = ("baseline_case", "followup_case") if has_several else ()
    change_table = fitting_table(
        "changes",
        "Lesions at both time points",
        LesionChange,
        changes[:most],
        shown=("patient", *scan_columns, *CHANGE_COLUMNS[1:]),
        max_bytes=left - _size(table.content),
        file="comparison.csv",
    )
    return _run_page(
        f"volseg compare: {_counted(len(patients), 'patient')}",
        about,
        failed=failed,
        n_cases=len(patients),
        noun="patients",
        files="response.csv and comparison.csv",
        remarks=remarks,
        facts=[
            ("patients", str(len(patients))),
            *((name, str(count)) for name, count in sorted(responses.items())),
            ("new lesions", str(sum(row.get("n_new") or 0 for row in patients))),
            ("lesions gone", str(sum(row.get("n_gone") or 0 for row in patients))),
        ],
        tables=[table, change_table],
    )


def _unprocessed(n: int, noun: str) -> list[str]:
    if not n:
        return []
    return [f"Not processed yet: {_counted(n, noun)}. Run the same command again to continue."]


def _run_page(
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
    script = _script("table.js", "report.js")
    made_with = [
        f"volseg {about.get('volseg') or __version__}",
        about.get("model"),
        about.get("started"),
    ]
    return _page(
        "report.html.jinja",
        scripts=(script,),
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
        script=Markup(script),  # noqa: S704
        **texts,
    )


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
    values = [[_number(row.get(column[0])) for column in columns] for row in rows]
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


def _is_informative(column: str, values: Sequence[Any]) -> bool:
    distinct = {value for value in values if value is not None and value != ""}
    # A single label name in all rows distinguishes none of them.
    return len(distinct) > (1 if column == "label_name" else 0)


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
    if _size(table.content) <= max_bytes:
        return table
    only = (*shown, *needed)
    fitting, remark = rows, "To keep this page small, only the most important columns are included"
    while True:
        text = f"{remark}; {file} has them all."
        table = page_table(name, caption, row_type, fitting, shown=shown, only=only, remark=text)
        size = _size(table.content)
        if size <= max_bytes or not fitting:
            return table
        n = max(0, int(len(fitting) * 0.95 * max_bytes / size))
        fitting = sorted(rows, key=rank)[:n]
        remark = f"Showing the {n} {kept} of {len(rows)} rows and the most important columns"


def _fitting(montages: Mapping[str, bytes]) -> tuple[int, dict[str, str], int]:
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
        pictures[name] = _base64(picture)
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
        facts.append(("total volume", f"{_shown(max(total_ml, math.fsum(volumes)))} mL"))
        facts.append(("largest lesion", f"{_shown(max(volumes))} mL"))
    return facts


def _with_doubts(
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


def _failure(name: str, row: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return (name, code, reason) of a failed scan or patient."""
    reason = row.get("reason") or "reason unknown"
    match = re.fullmatch(r"([EW]_[A-Z_]+): (.*)", reason, flags=re.DOTALL)
    return (name, match[1], match[2]) if match else (name, "", reason)


def _axes(lesion: Mapping[str, Any]) -> list[list[tuple[float, float, float]]]:
    """Return the ends of the long and the short axis in RAS mm, without unknown ones."""
    axes = []
    for name in ("long", "short"):
        ends = [point_of(lesion.get(f"{name}_axis_p{end}_ras")) for end in (0, 1)]
        if ends[0] is None or ends[1] is None:
            return axes
        axes.append([ends[0], ends[1]])
    return axes


def _shown_part(preview: Preview) -> str:
    spacing = " × ".join(f"{value:.3g}" for value in preview.image.geometry.spacing_mm)
    resolution = "full resolution"
    if max(preview.factors) > 1:
        blocks = " × ".join(map(str, preview.factors))
        resolution = f"averages of {blocks} voxels; lesions were measured at full resolution"
    return f"Shown: {preview.part}, voxel size {spacing} mm ({resolution}), 256 grey levels."


def _counted(number: int | None, noun: str) -> str:
    return "" if number is None else f"{number} {noun}{'s' * (number != 1)}"


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _number(value: Any) -> Any:
    """Convert a value for JSON: non-finite to null, floats to the digits of the CSV files."""
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    return round(value, 4) if abs(value) >= 1 else float(f"{value:.6g}")


# ---- page template


def _page(template: str, *, scripts: Sequence[str], **values: Any) -> str:
    style = _asset("templates", "style.css")
    values |= {"version": __version__, "policy": _policy(scripts, style)}
    values["style"] = Markup(style)  # noqa: S704
    return _environment().get_template(template).render(**values)


def _policy(scripts: Sequence[str], style: str) -> str:
    """Return a content security policy that allows only these scripts and this style."""
    hashes = " ".join(_hash(script) for script in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src {_hash(style)}; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{_base64(hashlib.sha256(text.encode()).digest())}'"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("volseg.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {
        "ensure_ascii": False,
        "separators": (",", ":"),
        "allow_nan": False,
    }
    return environment


@cache
def _asset(folder: str, name: str) -> str:
    """Read a file of this package that is inserted into a page unchanged."""
    text = resources.files("volseg.report").joinpath(folder, name).read_text(encoding="utf-8")
    # NiiVue is compressed, so closing tags in it do no harm.
    assert name == NIIVUE or not re.search(r"</(script|style)|<!--", text, re.IGNORECASE), name
    return text


def _script(*names: str) -> str:
    return "\n".join(_asset("templates", name) for name in names)


@cache
def _packed_niivue() -> str:
    """Compress NiiVue to base64 gzip, which saves 1 MB per page."""
    return _base64(gzip.compress(_asset("vendor", NIIVUE).encode(), 9, mtime=0))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _size(content: Any) -> int:
    """Return the size in bytes of the content as HTML-escaped JSON."""
    options = _environment().policies["json.dumps_kwargs"]
    return len(htmlsafe_json_dumps(content, **options).encode())

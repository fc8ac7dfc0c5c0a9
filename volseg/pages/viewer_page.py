"""The page of one scan: slices with outlined lesions, and a row per lesion."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from functools import cache
from typing import Any

from markupsafe import Markup

from volseg import __version__
from volseg.measurement.rows import CaseRow, LesionMeasurement
from volseg.measurement.units import shown_unit, unit_doubt_in
from volseg.pages.headline import noun_of_lesions
from volseg.pages.marks import axis_ends, lesion_colour, lesion_points
from volseg.pages.model_box import ModelBox, similarity_of_scan
from volseg.pages.page import CONTENT_BYTES, as_base64, asset, json_size, json_value, render_page
from volseg.pages.page_tables import LESIONS, LESIONS_OF_A_SCAN, page_table, with_doubts
from volseg.pages.preview import Preview
from volseg.pages.windows import presets
from volseg.words import format_count, format_number, format_sizes

NIIVUE, NIIVUE_LICENCE = "niivue-0.69.0.umd.js", "niivue-LICENSE.txt"
MAX_VIEWER_ROWS = 1000  # lesions in the table
POINTS_BYTES = 250  # per lesion, for its position and diameter end points


def viewer_html(
    case: CaseRow,
    lesions: Sequence[LesionMeasurement],
    preview: Preview,
    montage: bytes,
    *,
    unit: str,
    box: ModelBox | None = None,
) -> str:
    """Return the page of one scan: slices with outlined lesions, a row per lesion, a picture.

    The picture replaces the slices in browsers without WebGL.

    Args:
        lesions: only the first 1000 are used.
        montage: JPEG of the scan's largest lesion.
        unit: of the intensities.
        box: the model box; None if volseg did not make the masks.
    """
    rows = sorted(lesions, key=lambda lesion: lesion.lesion_id)[:MAX_VIEWER_ROWS]
    rows = with_doubts(rows, [case])
    unit = shown_unit(unit, is_doubted=bool(unit_doubt_in(case.warnings)))
    n_lesions, noun = max(case.n_lesions or 0, len(lesions)), noun_of_lesions(rows)
    return render_page(
        "viewer.html.jinja",
        scripts=("table.js", "review.js", "slices.js", "surface.js", "viewer.js"),
        allowed=(asset("vendor", NIIVUE, is_packed=True),),
        case=case,
        facts=_facts(case, noun, has_lesions=bool(lesions)),
        unit=unit,
        shown_part=_shown_part(preview),
        box=box,
        similarity=similarity_of_scan(case.warnings),
        invitation=f"Select a {noun} in the table or the slices." if rows else f"No {noun}s found.",
        remark=_remark(preview, len(rows), n_lesions, noun),
        content=_content(case, preview, rows, unit),
        montage=as_base64(montage),
        image=as_base64(preview.packed_image),
        ids=as_base64(preview.packed_ids),
        niivue=packed_niivue(),
        licences=Markup(asset("vendor", NIIVUE_LICENCE)),  # noqa: S704 a package file
    )


def _content(
    case: CaseRow, preview: Preview, rows: Sequence[LesionMeasurement], unit: str
) -> dict[str, Any]:
    """Return what the page's script reads: the table, and what it draws into the slices."""
    n_drawn = int(preview.ids.array.max(initial=0))
    points = lesion_points(preview.ids, rows)
    return {
        "case": case.case_id,
        "table": page_table(LESIONS_OF_A_SCAN, rows).content,
        "unit": unit,
        "noun": noun_of_lesions(rows),
        "window": [json_value(value) for value in preview.window],
        "presets": [
            {"name": preset.name, "low": json_value(preset.low), "high": json_value(preset.high)}
            for preset in presets(unit, preview.window, preview.stored_range)
        ],
        "points": {number: [round(part, 3) for part in point] for number, point in points.items()},
        "axes": {lesion.lesion_id: axes for lesion in rows if (axes := _axes(lesion))},
        "colours": bytes(part for n in range(1, n_drawn + 1) for part in lesion_colour(n)).hex(),
    }


def _remark(preview: Preview, n_rows: int, n_lesions: int, noun: str) -> str:
    remarks = []
    if n_rows < n_lesions:
        remarks.append(
            f"Showing the first {n_rows} of {n_lesions} {noun}s; lesions.csv has them all."
        )
    if preview.not_drawn:
        remarks.append(
            f"Not drawn: {format_count(preview.not_drawn, noun)}, too small at this "
            "resolution or beyond the drawing limit."
        )
    return " ".join(remarks)


def _facts(case: CaseRow, noun: str, *, has_lesions: bool) -> list[str]:
    facts = [
        case.image,
        case.model,
        f"volseg {__version__}",
        format_count(case.n_lesions, noun),
        f"{format_number(case.total_volume_ml)} mL" if has_lesions else "",
    ]
    return [fact for fact in facts if fact]


def image_budget(lesions: Sequence[LesionMeasurement]) -> int:
    """Return how many compressed bytes of image and lesion ids fit into the viewer page."""
    rows = lesions[:MAX_VIEWER_ROWS]
    table = json_size(page_table(LESIONS, rows).content) + POINTS_BYTES * len(rows)
    left = CONTENT_BYTES - len(packed_niivue()) - table
    return int(left * 0.74)  # base64 turns 3 bytes into 4


def _axes(lesion: LesionMeasurement) -> list[list[tuple[float, float, float]]]:
    """Return the ends of the long and the short axis in RAS mm, without unknown ones."""
    axes = []
    for name in ("long", "short"):
        ends = axis_ends(lesion, name)
        if ends is None:
            return axes
        axes.append(list(ends))
    return axes


def _shown_part(preview: Preview) -> str:
    spacing = " × ".join(f"{value:.3g}" for value in preview.image.geometry.spacing_mm)
    resolution = "full resolution"
    if max(preview.factors) > 1:
        blocks = format_sizes(preview.factors)
        resolution = f"averages of {blocks} voxels; lesions were measured at full resolution"
    return f"Shown: {preview.part}, voxel size {spacing} mm ({resolution}), 256 grey levels."


@cache
def packed_niivue() -> str:
    """Compress NiiVue to base64 gzip, which saves 1 MB per page."""
    return as_base64(gzip.compress(asset("vendor", NIIVUE, is_packed=True).encode(), 9, mtime=0))

"""The page of a patient at two time points: both scans side by side on one grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from volseg.comparison.changes import LesionChange
from volseg.io.volumes import volume_bytes
from volseg.pages.page import CONTENT_BYTES, as_base64, asset, json_size, json_value, render_page
from volseg.pages.page_tables import CHANGES_OF_A_PATIENT, page_table
from volseg.pages.preview import Preview, grey_bytes, make_preview, picture_window
from volseg.pages.viewer_page import NIIVUE, NIIVUE_LICENCE, packed_niivue
from volseg.pages.windows import Window, presets
from volseg.preprocessing.regrid import ids_on_grid, resample_to_grid
from volseg.recipe import HU
from volseg.volume import Geometry, Rigid, Volume
from volseg.words import format_number

TIMES = ("baseline", "follow-up, registered")
MAX_CHANGES = 1000  # rows in the table
SMALLER = 0.7  # factor on the size of the pictures until the page fits
# Memory per voxel of the baseline, per voxel of the follow-up, and of the page and its parts.
BASELINE_BYTES, FOLLOWUP_BYTES, PAGE_BYTES = 4, 8, 320 << 20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TwoScans:
    """Two registered scans of a patient: baseline and follow-up.

    Args:
        ids: (I, J, K) lesion ids on the grid of each.
        transform: from points of the baseline to points of the follow-up.
        unit: of the intensities of both; empty if it differs or is in doubt.
    """

    names: tuple[str, str]
    scans: tuple[Volume, Volume]
    ids: tuple[np.ndarray, np.ndarray]
    transform: Rigid
    unit: str = ""


def change_page_html(two: TwoScans, changes: Sequence[LesionChange], *, patient: str) -> str:
    """Return the page of a patient: both scans with a common crosshair, and a row per lesion.

    Args:
        changes: the rows of these two scans; only the first 1000 are used.
    """
    rows = changes[:MAX_CHANGES]
    table = page_table(CHANGES_OF_A_PATIENT, rows).content
    left = int((CONTENT_BYTES - len(packed_niivue()) - json_size(table)) * 0.74)
    pictures, size = None, float(left)
    while pictures is None or pictures.size > left:
        pictures = _Pictures.of(two, max_bytes=int(size / 2))
        size *= SMALLER
    content = {
        "table": table,
        "unit": two.unit,
        "points": [_point(row, two.transform) for row in rows],
        "windows": [[json_value(value) for value in window] for window in pictures.windows],
        "presets": pictures.presets(two.unit),
    }
    return render_page(
        "compare.html.jinja",
        scripts=("table.js", "slices.js", "compare.js"),
        allowed=(asset("vendor", NIIVUE, is_packed=True),),
        patient=patient,
        names=two.names,
        times=TIMES,
        sentence=_sentence(rows),
        unit=two.unit,
        content=content,
        packed=[as_base64(part) for part in pictures.packed],
        niivue=packed_niivue(),
        licences=Markup(asset("vendor", NIIVUE_LICENCE)),  # noqa: S704 a package file
    )


def page_bytes(baseline: int, followup: int) -> int:
    """Return the memory that making a page takes, from the voxels of both scans."""
    return BASELINE_BYTES * baseline + FOLLOWUP_BYTES * followup + min(PAGE_BYTES, 40 * baseline)


@dataclass(frozen=True, slots=True, eq=False)
class _Pictures:
    """Both scans and their lesions as files: baseline, its lesions, follow-up, its lesions."""

    packed: tuple[bytes, bytes, bytes, bytes]
    windows: tuple[Window, Window]
    stored_range: Window

    @property
    def size(self) -> int:
        return sum(map(len, self.packed))

    @classmethod
    def of(cls, two: TwoScans, *, max_bytes: int) -> _Pictures:
        """Return the pictures on the grid of the baseline's preview, which shows all lesions."""
        (scan, later), (ids, later_ids) = two.scans, two.ids
        lesions, later_lesions = scan.with_array(ids), later.with_array(later_ids)
        moved = ids_on_grid(later_lesions, scan.geometry, two.transform).array
        either = ((ids > 0) | (moved > 0)).astype(np.uint8)
        preview = make_preview(scan, either, unit=two.unit, max_bytes=max_bytes)
        del either, moved
        grid = preview.image.geometry
        window = picture_window(later, later_ids, unit=two.unit)
        if two.unit == HU:  # the same grey for the same density
            window = preview.window
        image = resample_to_grid(later, grid, two.transform)
        packed = (
            preview.packed_image,
            _packed_ids(lesions, grid, None),
            volume_bytes(_as_levels(image, _stored_range(preview, window, two.unit))),
            _packed_ids(later_lesions, grid, two.transform),
        )
        return cls(packed, (preview.window, window), preview.stored_range)

    def presets(self, unit: str) -> list[dict[str, Any]]:
        """Return the windows that the page offers for both scans; only in HU are they common."""
        if unit != HU:
            return []
        return [
            {"name": preset.name, "low": json_value(preset.low), "high": json_value(preset.high)}
            for preset in presets(unit, self.windows[0], self.stored_range)
        ]


def _stored_range(preview: Preview, window: Window, unit: str) -> Window:
    if unit == HU:
        return preview.stored_range
    beyond = (window[1] - window[0]) / 4
    return window[0] - beyond, window[1] + beyond


def _as_levels(image: Volume, stored_range: Window) -> Volume:
    low, high = stored_range
    slope = float(np.float32((high - low) / 255))
    levels = grey_bytes((image.array - low) * (255 / (high - low)))
    return Volume(levels, image.geometry, slope, float(np.float32(low)))


def _packed_ids(ids: Volume, grid: Geometry, transform: Rigid | None) -> bytes:
    """Return which voxels of the grid are lesion, as the bytes of a file."""
    is_lesion = (ids_on_grid(ids, grid, transform).array > 0).astype(np.uint8)
    return volume_bytes(Volume(np.asfortranarray(is_lesion), grid))


def _point(row: LesionChange, transform: Rigid) -> list[float] | None:
    """Return where a lesion lies in RAS mm of the baseline; None if that is unknown."""
    baseline = [getattr(row, f"baseline_centroid_{axis}_mm") for axis in "ras"]
    if None not in baseline:
        return [round(float(value), 2) for value in baseline]
    followup = [getattr(row, f"followup_centroid_{axis}_mm") for axis in "ras"]
    if None in followup:
        return None
    (point,) = transform.inverse().apply(np.array([followup], float)).tolist()
    return [round(value, 2) for value in point]


def _sentence(rows: Sequence[LesionChange]) -> str:
    """Say how many lesions there are of each fate, and how their volume changed."""
    states = [row.status for row in rows]
    counts = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    if not counts:
        return "No lesion at either time."
    before, after = (
        sum(getattr(row, f"{time}_volume_ml") or 0.0 for row in rows)
        for time in ("baseline", "followup")
    )
    volumes = f"{format_number(before)} mL at baseline, {format_number(after)} mL at follow-up"
    return f"Lesions: {', '.join(counts)}; {volumes}."

"""Figures of a patient at two time points: the lesion that changed most, on a common grid."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from volseg.comparison.changes import LesionChange
from volseg.pages.canvas import new_figure, png_bytes
from volseg.pages.slices import Outline, draw_planes, surroundings
from volseg.pages.windows import lesion_window, sampled
from volseg.preprocessing.planes import PLANES
from volseg.preprocessing.regrid import ids_on_grid, resample_to_grid
from volseg.volume import BoundingBox, Geometry, Rigid, Volume

REACH_MM = 40.0  # field of view on each side of the lesion
TIMES = ("baseline", "follow-up, registered")
BEFORE, AFTER = "#4dd34d", "#ff8c33"


def change_png(
    scans: tuple[Volume, Volume],
    ids: tuple[np.ndarray, np.ndarray],
    transform: Rigid,
    changes: Sequence[LesionChange],
    *,
    title: str,
) -> bytes:
    """Draw the lesion whose volume changed most in three planes, as PNG.

    The baseline scan is above, the registered follow-up scan below.

    Args:
        scans: baseline and follow-up. ids: (I, J, K) lesion ids on the grid of each.
        transform: from points of the baseline to points of the follow-up.
        changes: the rows of the patient.
    """
    baseline = scans[0].canonical()
    row, centre = _largest_change(changes, baseline.geometry, transform)
    box = _around(centre, baseline.geometry)
    part = baseline.crop(box)
    grid = part.geometry
    pictures = (
        part.with_array(part.intensities().astype(np.float32)),
        resample_to_grid(scans[1], grid, transform),
    )
    baseline_ids = scans[0].with_array(ids[0]).canonical().crop(box)
    followup_ids = ids_on_grid(scans[1].with_array(ids[1]), grid, transform)
    outlines = (Outline(baseline_ids.array, BEFORE), Outline(followup_ids.array, AFTER))
    centre = centre - box.start
    figure = new_figure(9, 6.6, "black")
    axes = figure.subplots(len(TIMES), len(PLANES), squeeze=False)
    for plots, time, picture in zip(axes, TIMES, pictures, strict=True):
        around = surroundings(BoundingBox.of_voxels(centre[None]), grid)
        window = lesion_window([sampled(picture.array[around.slices])])
        titles = [f"{time}, {plane.name}" for plane in PLANES]
        draw_planes(plots, picture, centre, outlines, window, titles)
    caption = "no lesion" if row is None else _caption(row)
    heading = f"{title}: {caption}\ngreen: baseline   orange: follow-up"
    figure.suptitle(heading, color="white", fontsize=9)
    return png_bytes(figure)


def stack_pngs(pictures: Sequence[bytes]) -> bytes:
    """Stack PNGs vertically into one PNG."""
    if len(pictures) == 1:
        return pictures[0]
    images = [Image.open(io.BytesIO(picture)).convert("RGB") for picture in pictures]
    size = (max(image.width for image in images), sum(image.height for image in images))
    stack, top = Image.new("RGB", size), 0
    for image in images:
        stack.paste(image, (0, top))
        top += image.height
    buffer = io.BytesIO()
    stack.save(buffer, "png")
    return buffer.getvalue()


def _largest_change(
    changes: Sequence[LesionChange], grid: Geometry, transform: Rigid
) -> tuple[LesionChange | None, np.ndarray]:
    """Return the row with the largest volume change on the grid, and the voxel (3,) at its centre.

    Without a lesion on the grid: None and the grid's centre.
    """
    back = transform.inverse()
    best, centre = None, (np.array(grid.shape) - 1) // 2
    for row in changes:
        baseline = [getattr(row, f"baseline_centroid_{axis}_mm") for axis in "ras"]
        followup = [getattr(row, f"followup_centroid_{axis}_mm") for axis in "ras"]
        is_new = None in baseline
        centroid = followup if is_new else baseline
        if row.change_volume_ml is None or None in centroid:
            continue
        points = np.array([centroid], dtype=float)
        points = back.apply(points) if is_new else points
        index = np.rint(grid.to_index(points)[0]).astype(int)
        is_shown = ((index >= 0) & (index < np.array(grid.shape))).all()
        change_ml = abs(row.change_volume_ml)
        if is_shown and (best is None or change_ml > abs(best.change_volume_ml or 0.0)):
            best, centre = row, index
    return best, centre


def _around(centre: np.ndarray, grid: Geometry) -> BoundingBox:
    i, j, k = centre.tolist()
    reach = np.ceil(REACH_MM / np.array(grid.spacing_mm)).astype(int).tolist()
    return BoundingBox((i, j, k), (i + 1, j + 1, k + 1)).widened(reach, grid.shape)


def _caption(row: LesionChange) -> str:
    ids = (row.baseline_lesion_id, row.followup_lesion_id)
    numbers = " → ".join("none" if number is None else f"#{number}" for number in ids)
    percent = "" if row.change_volume_percent is None else f", {row.change_volume_percent:+.0f} %"
    return f"{row.label_name} {numbers}, {row.status}, {row.change_volume_ml:+.3g} mL{percent}"

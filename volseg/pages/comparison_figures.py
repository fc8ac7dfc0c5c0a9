"""Figures of a patient at two time points: the lesion that changed most, on a common grid."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image
from scipy import ndimage

from volseg.comparison.changes import LesionChange
from volseg.pages.canvas import Figure, FigureCanvasAgg
from volseg.pages.slices import (
    PLANES,
    draw_slice,
    label_slice,
    png_bytes,
    slice_of,
    surroundings,
    window_round,
)
from volseg.preprocessing.align import index_matrix, resample_to_grid
from volseg.preprocessing.crop import AxisOrder, canonical_geometry, to_canonical
from volseg.volume import BoundingBox, Geometry, Volume

REACH_MM = 40.0  # field of view on each side of the lesion
BEFORE, AFTER = "#4dd34d", "#ff8c33"


def change_png(
    scans: tuple[Volume, Volume],
    ids: tuple[np.ndarray, np.ndarray],
    transform: np.ndarray,
    changes: Sequence[LesionChange],
    *,
    title: str,
) -> bytes:
    """Draw the lesion whose volume changed most in three planes, as PNG.

    The baseline scan is above, the registered follow-up scan below.

    Args:
        scans: baseline and follow-up. ids: (I, J, K) lesion ids on the grid of each.
        transform: (4, 4) in RAS mm, from baseline points to follow-up points.
        changes: the rows of the patient.
    """
    order = AxisOrder.of(scans[0].geometry)
    grid = canonical_geometry(scans[0].geometry, order)
    row, centre = _largest_change(changes, grid, transform)
    box = _around(centre, grid)
    part = grid.crop(box)
    stored = to_canonical(scans[0].array, order)[box.slices]
    baseline = scans[0].intensities(stored).astype(np.float32)
    pictures = (baseline, resample_to_grid(scans[1], part, transform).array)
    baseline_ids = to_canonical(ids[0], order)[box.slices]
    numbers = (baseline_ids, _nearest(ids[1], scans[1].geometry, part, transform))
    caption = "no lesion" if row is None else _caption(row)
    return _draw(pictures, numbers, part, centre - box.start, caption, title)


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
    changes: Sequence[LesionChange], grid: Geometry, transform: np.ndarray
) -> tuple[LesionChange | None, np.ndarray]:
    """Return the row with the largest volume change on the grid, and the voxel (3,) at its centre.

    Without a lesion on the grid: None and the grid's centre.
    """
    inverse = np.linalg.inv(transform)
    best, centre = None, (np.array(grid.shape) - 1) // 2
    for row in changes:
        baseline = [getattr(row, f"baseline_centroid_{axis}_mm") for axis in "ras"]
        followup = [getattr(row, f"followup_centroid_{axis}_mm") for axis in "ras"]
        is_new = None in baseline
        centroid = followup if is_new else baseline
        if row.change_volume_ml is None or None in centroid:
            continue
        point = np.array(centroid, dtype=float)
        if is_new:
            point = inverse[:3, :3] @ point + inverse[:3, 3]
        index = np.rint(grid.to_index(point[None])[0]).astype(int)
        is_shown = ((index >= 0) & (index < np.array(grid.shape))).all()
        change_ml = abs(row.change_volume_ml)
        if is_shown and (best is None or change_ml > abs(best.change_volume_ml or 0.0)):
            best, centre = row, index
    return best, centre


def _around(centre: np.ndarray, grid: Geometry) -> BoundingBox:
    reach = np.ceil(REACH_MM / np.array(grid.spacing_mm)).astype(int)
    start, stop = np.maximum(centre - reach, 0), np.minimum(centre + reach + 1, grid.shape)
    (i, j, k), (i_stop, j_stop, k_stop) = start.tolist(), stop.tolist()
    return BoundingBox((i, j, k), (i_stop, j_stop, k_stop))


def _nearest(
    ids: np.ndarray, geometry: Geometry, grid: Geometry, transform: np.ndarray
) -> np.ndarray:
    matrix = index_matrix(grid, geometry, transform)
    return ndimage.affine_transform(
        ids,
        matrix[:3, :3],
        matrix[:3, 3],  # pyright: ignore[reportArgumentType] - SciPy's stub lacks sequences
        output_shape=grid.shape,
        order=0,
        mode="constant",
        cval=0,
    )


def _draw(
    pictures: Sequence[np.ndarray],
    numbers: Sequence[np.ndarray],
    grid: Geometry,
    centre: np.ndarray,
    caption: str,
    title: str,
) -> bytes:
    figure = Figure(figsize=(9, 6.6), layout="constrained", facecolor="black")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(PLANES), squeeze=False)
    names = ("baseline", "follow-up, registered")
    for line, (time, picture) in enumerate(zip(names, pictures, strict=True)):
        window = window_round(picture[surroundings(centre[None], grid.spacing_mm)])
        for column, (name, axis, left, right) in enumerate(PLANES):
            plot, index = axes[line][column], int(centre[axis])
            across, up = (grid.spacing_mm[other] for other in range(3) if other != axis)
            outlines = [
                (slice_of(ids, axis, index) > 0, colour)
                for ids, colour in zip(numbers, (BEFORE, AFTER), strict=True)
            ]
            shown, heading = slice_of(picture, axis, index), f"{time}, {name}"
            draw_slice(plot, shown, outlines, (across, up), window, heading)
            label_slice(plot, left, right, across)
    heading = f"{title}: {caption}\ngreen: baseline   orange: follow-up"
    figure.suptitle(heading, color="white", fontsize=9)
    return png_bytes(figure, "black")


def _caption(row: LesionChange) -> str:
    ids = (row.baseline_lesion_id, row.followup_lesion_id)
    numbers = " → ".join("none" if number is None else f"#{number}" for number in ids)
    percent = "" if row.change_volume_percent is None else f", {row.change_volume_percent:+.0f} %"
    return f"{row.label_name} {numbers}, {row.status}, {row.change_volume_ml:+.3g} mL{percent}"

"""Pictures of a patient at two times: the lesion that changed most, before and after, on one grid."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image
from scipy import ndimage

from volseg.measure.changes import LesionChange
from volseg.preprocess.align import index_matrix, resampled_onto
from volseg.preprocess.crop import AxisOrder, canonical_geometry, to_canonical
from volseg.report.canvas import Figure, FigureCanvasAgg
from volseg.report.slices import (
    PLANES,
    draw_slice,
    label_slice,
    png_bytes,
    slice_of,
    surroundings,
    window_round,
)
from volseg.volume import BoundingBox, Geometry, Volume

REACH_MM = 40.0  # shown to each side of the lesion
BEFORE, AFTER = "#4dd34d", "#ff8c33"


def change_png(
    scans: tuple[Volume, Volume],
    ids: tuple[np.ndarray, np.ndarray],
    moved: np.ndarray,
    changes: Sequence[LesionChange],
    *,
    title: str,
) -> bytes:
    """PNG of the lesion whose volume changed most: the earlier scan above, the later one as registered to it below, in three planes.

    Args:
        scans: earlier and later. ids: (I, J, K) lesion ids on the grid of each.
        moved: (4, 4) in RAS mm, from a point of the earlier scan to the same point of the patient in the later one.
        changes: the rows of the patient.
    """
    order = AxisOrder.of(scans[0].geometry)
    grid = canonical_geometry(scans[0].geometry, order)
    row, centre = _largest_change(changes, grid, moved)
    box = _around(centre, grid)
    part = grid.crop(box)
    stored = to_canonical(scans[0].array, order)[box.slices]
    pictures = (
        scans[0].intensities(stored).astype(np.float32),
        resampled_onto(scans[1], part, moved).array,
    )
    numbers = (
        to_canonical(ids[0], order)[box.slices],
        _nearest(ids[1], scans[1].geometry, part, moved),
    )
    return _draw(
        pictures,
        numbers,
        part,
        centre - box.start,
        "no lesion" if row is None else _caption(row),
        title,
    )


def stacked(pictures: Sequence[bytes]) -> bytes:
    """PNGs of one width below each other, as one PNG."""
    if len(pictures) == 1:
        return pictures[0]
    opened = [Image.open(io.BytesIO(picture)).convert("RGB") for picture in pictures]
    whole = Image.new(
        "RGB", (max(each.width for each in opened), sum(each.height for each in opened))
    )
    top = 0
    for each in opened:
        whole.paste(each, (0, top))
        top += each.height
    found = io.BytesIO()
    whole.save(found, "png")
    return found.getvalue()


def _largest_change(
    changes: Sequence[LesionChange], grid: Geometry, moved: np.ndarray
) -> tuple[LesionChange | None, np.ndarray]:
    """The row with the largest change of volume on the grid, and the voxel (3,) at its centre; the middle of the grid for none."""
    back = np.linalg.inv(moved)
    best, place = None, (np.array(grid.shape) - 1) // 2
    for row in changes:
        before = (
            row.baseline_centroid_r_mm,
            row.baseline_centroid_a_mm,
            row.baseline_centroid_s_mm,
        )
        after = (row.followup_centroid_r_mm, row.followup_centroid_a_mm, row.followup_centroid_s_mm)
        place_mm = after if None in before else before
        if row.change_volume_ml is None or None in place_mm:
            continue
        point = np.array(place_mm, dtype=float)
        if place_mm is after:
            point = back[:3, :3] @ point + back[:3, 3]
        index = np.rint(grid.to_index(point[None])[0]).astype(int)
        is_shown = ((index >= 0) & (index < np.array(grid.shape))).all()
        if is_shown and (
            best is None or abs(row.change_volume_ml) > abs(best.change_volume_ml or 0.0)
        ):
            best, place = row, index
    return best, place


def _around(centre: np.ndarray, grid: Geometry) -> BoundingBox:
    reach = np.ceil(REACH_MM / np.array(grid.spacing_mm)).astype(int)
    start, stop = np.maximum(centre - reach, 0), np.minimum(centre + reach + 1, grid.shape)
    (i, j, k), (i_stop, j_stop, k_stop) = start.tolist(), stop.tolist()
    return BoundingBox((i, j, k), (i_stop, j_stop, k_stop))


def _nearest(ids: np.ndarray, geometry: Geometry, grid: Geometry, moved: np.ndarray) -> np.ndarray:
    matrix = index_matrix(grid, geometry, moved)
    return ndimage.affine_transform(
        ids,
        matrix[:3, :3],
        matrix[:3, 3],  # pyright: ignore[reportArgumentType] - SciPy says: or a sequence
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
    for line, (time, picture) in enumerate(
        zip(("baseline", "follow-up, registered"), pictures, strict=True)
    ):
        window = window_round(picture[surroundings(centre[None], grid.spacing_mm)])
        for column, (name, axis, left, right) in enumerate(PLANES):
            plot, index = axes[line][column], int(centre[axis])
            across, up = (grid.spacing_mm[other] for other in range(3) if other != axis)
            outlines = [
                (slice_of(ids, axis, index) > 0, colour)
                for ids, colour in zip(numbers, (BEFORE, AFTER), strict=True)
            ]
            draw_slice(
                plot,
                slice_of(picture, axis, index),
                outlines,
                (across, up),
                window,
                f"{time}, {name}",
            )
            label_slice(plot, left, right, across)
    figure.suptitle(
        f"{title}: {caption}\ngreen: baseline   orange: follow-up", color="white", fontsize=9
    )
    return png_bytes(figure, "black")


def _caption(row: LesionChange) -> str:
    which = " → ".join(
        "none" if n is None else f"#{n}" for n in (row.baseline_lesion_id, row.followup_lesion_id)
    )
    percent = "" if row.change_volume_percent is None else f", {row.change_volume_percent:+.0f} %"
    return f"{row.label_name} {which}, {row.status}, {row.change_volume_ml:+.3g} mL{percent}"

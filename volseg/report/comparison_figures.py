"""Pictures of a patient at two times: the lesion that changed most, before and after, on one grid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import ndimage

from volseg.measure.response import LesionChange
from volseg.preprocess.align import index_matrix, resampled_onto
from volseg.preprocess.crop import AxisOrder, canonical_geometry, to_canonical
from volseg.report.figures import png_bytes
from volseg.volume import BoundingBox, Geometry, Volume

REACH_MM = 40.0  # shown to each side of the lesion
WINDOW_REACH_MM = 15.0  # how far round it the grey values are taken from
SCALE_BAR_MM = 10
BEFORE, AFTER = "#4dd34d", "#ff8c33"
# Title, the canonical axis that is looked along, the letters at the left and right edge (radiological convention).
PLANES = (("axial", 2, "R", "L"), ("coronal", 1, "R", "L"), ("sagittal", 0, "A", "P"))


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
    numbers = (to_canonical(ids[0], order)[box.slices], _nearest(ids[1], scans[1].geometry, part, moved))
    return _draw(pictures, numbers, part, centre - box.start, "no lesion" if row is None else _caption(row), title)


def _largest_change(
    changes: Sequence[LesionChange], grid: Geometry, moved: np.ndarray
) -> tuple[LesionChange | None, np.ndarray]:
    """The row with the largest change of volume on the grid, and the voxel (3,) at its centre; the middle of the grid for none."""
    back = np.linalg.inv(moved)
    best, place = None, (np.array(grid.shape) - 1) // 2
    for row in changes:
        before = (row.baseline_centroid_r_mm, row.baseline_centroid_a_mm, row.baseline_centroid_s_mm)
        after = (row.followup_centroid_r_mm, row.followup_centroid_a_mm, row.followup_centroid_s_mm)
        place_mm = after if None in before else before
        if row.change_volume_ml is None or None in place_mm:
            continue
        point = np.array(place_mm, dtype=float)
        if place_mm is after:
            point = back[:3, :3] @ point + back[:3, 3]
        index = np.rint(grid.to_index(point[None])[0]).astype(int)
        is_shown = ((index >= 0) & (index < np.array(grid.shape))).all()
        if is_shown and (best is None or abs(row.change_volume_ml) > abs(best.change_volume_ml or 0.0)):
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
    for line, (time, picture) in enumerate(zip(("baseline", "follow-up, registered"), pictures, strict=True)):
        low, high = _window(picture, centre, grid.spacing_mm)
        for column, (name, axis, left, right) in enumerate(PLANES):
            plot = axes[line][column]
            horizontal, vertical = (grid.spacing_mm[other] for other in range(3) if other != axis)
            plot.imshow(
                np.take(picture, centre[axis], axis=axis).T,
                cmap="gray",
                origin="lower",
                aspect=vertical / horizontal,
                vmin=low,
                vmax=high,
            )
            for ids, colour in zip(numbers, (BEFORE, AFTER), strict=True):
                outline = np.take(ids, centre[axis], axis=axis) > 0
                if outline.any() and not outline.all() and min(outline.shape) > 1:  # a single row has no contour
                    plot.contour(outline.T, levels=[0.5], colors=[colour], linewidths=1.2)
            plot.invert_xaxis()  # R (and A) grow to the left on the screen
            plot.set_axis_off()
            plot.set_title(f"{time}, {name}", color="white", fontsize=8, loc="left")
            _label(plot, left, right, horizontal)
    figure.suptitle(f"{title}: {caption}\ngreen: baseline   orange: follow-up", color="white", fontsize=9)
    return png_bytes(figure, "black")


def _window(picture: np.ndarray, centre: np.ndarray, spacing_mm: tuple[float, float, float]) -> tuple[float, float]:
    """Grey values from the surroundings of the lesion, so that it stands out whatever else is in the scan."""
    reach = np.maximum(1, np.rint(WINDOW_REACH_MM / np.array(spacing_mm)).astype(int))
    box = tuple(slice(max(0, c - n), c + n + 1) for c, n in zip(centre.tolist(), reach.tolist(), strict=True))
    low, high = np.percentile(picture[box], (5, 95))
    margin = max(0.3 * (high - low), 1e-6)
    return float(low - margin), float(high + margin)


def _label(plot: Axes, left: str, right: str, spacing_mm: float) -> None:
    style = {"transform": plot.transAxes, "color": "#ffd24d", "fontsize": 8, "va": "center"}
    plot.text(0.01, 0.5, left, ha="left", **style)
    plot.text(0.99, 0.5, right, ha="right", **style)
    start, end = plot.get_xlim()
    length = SCALE_BAR_MM / spacing_mm / abs(end - start)
    plot.plot([0.04, 0.04 + length], [0.04, 0.04], transform=plot.transAxes, color="white", linewidth=2)
    plot.text(0.04, 0.06, f"{SCALE_BAR_MM} mm", transform=plot.transAxes, color="white", fontsize=7)


def _caption(row: LesionChange) -> str:
    which = " → ".join("none" if n is None else f"#{n}" for n in (row.baseline_lesion_id, row.followup_lesion_id))
    percent = "" if row.change_volume_percent is None else f", {row.change_volume_percent:+.0f} %"
    return f"{row.label_name} {which}, {row.status}, {row.change_volume_ml:+.3g} mL{percent}"

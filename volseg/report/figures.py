"""Pictures of a case: its largest lesions in three planes."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from volseg.measure.lesions import LesionMeasurement
from volseg.preprocess.crop import AxisOrder, canonical_geometry, to_canonical
from volseg.volume import Volume

MAX_LESIONS = 3
# Title, the canonical axis that is looked along, the letters at the left and right edge (radiological convention).
PLANES = (("axial", 2, "R", "L"), ("coronal", 1, "R", "L"), ("sagittal", 0, "A", "P"))
SCALE_BAR_MM = 10
WINDOW_REACH_MM = 15.0  # how far round a lesion the grey values are taken from


def overlay_png(image: Volume, ids: np.ndarray, lesions: Sequence[LesionMeasurement], *, title: str) -> bytes:
    """PNG with a row per lesion (the largest three) and its axial, coronal and sagittal slice, lesions outlined.

    Args:
        ids: (I, J, K) lesion ids on the scan's grid.
    """
    order = AxisOrder.of(image.geometry)
    geometry = canonical_geometry(image.geometry, order)
    stored, numbers = to_canonical(image.array, order), to_canonical(ids, order)
    shown = list(lesions[:MAX_LESIONS])
    centres = [_centre(numbers == lesion.lesion_id) for lesion in shown] or [np.array(stored.shape) // 2]
    figure = Figure(figsize=(9, 3.2 * len(centres) + 0.4), layout="constrained", facecolor="black")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(centres), len(PLANES), squeeze=False)
    for row, centre in enumerate(centres):
        low, high = _window(image, stored, centre, geometry.spacing_mm)
        caption = "no lesion found" if not shown else _caption(shown[row])
        for column, (name, axis, left, right) in enumerate(PLANES):
            plot = axes[row][column]
            picture = image.intensities(_slice(stored, axis, int(centre[axis]))).astype(np.float32)
            outline = _slice(numbers, axis, int(centre[axis]))
            horizontal, vertical = (geometry.spacing_mm[other] for other in range(3) if other != axis)
            plot.imshow(picture.T, cmap="gray", origin="lower", aspect=vertical / horizontal, vmin=low, vmax=high)
            if outline.any() and min(outline.shape) > 1:  # a single row has no contour
                plot.contour((outline > 0).T, levels=[0.5], colors=["#ff5c33"], linewidths=1.2)
            plot.invert_xaxis()  # R (and A) grow to the left on the screen
            plot.set_axis_off()
            plot.set_title(f"{name}: {caption}" if column == 0 else name, color="white", fontsize=8, loc="left")
            _decorate(plot, left, right, horizontal)
    figure.suptitle(title, color="white", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, facecolor="black", metadata={"Software": None})
    return buffer.getvalue()


def _window(
    image: Volume, stored: np.ndarray, centre: np.ndarray, spacing_mm: tuple[float, float, float]
) -> tuple[float, float]:
    """Grey values from the surroundings of the lesion, so that it stands out whatever else is in the scan."""
    reach = [max(1, round(WINDOW_REACH_MM / spacing)) for spacing in spacing_mm]
    box = tuple(slice(max(0, int(c) - n), int(c) + n + 1) for c, n in zip(centre, reach, strict=True))
    low, high = np.percentile(image.intensities(stored[box]), (5, 95))
    margin = max(0.3 * (high - low), 1e-6)
    return float(low - margin), float(high + margin)


def _slice(array: np.ndarray, axis: int, index: int) -> np.ndarray:
    return np.take(array, index, axis=axis)


def _centre(inside: np.ndarray) -> np.ndarray:
    """The voxel of the lesion that lies nearest to its centroid, so that the slices surely cut it."""
    voxels = np.argwhere(inside)
    return voxels[np.argmin(((voxels - voxels.mean(axis=0)) ** 2).sum(axis=1))]


def _caption(lesion: LesionMeasurement) -> str:
    text = f"#{lesion.lesion_id} {lesion.label_name}, {lesion.volume_ml:.3g} ml"
    if lesion.intensity_mean is not None:
        text += f", {lesion.intensity_mean:.3g} {lesion.intensity_unit}"
    return f"{text}, {lesion.class_name} {lesion.class_probability:.2f}" if lesion.class_name else text


def _decorate(plot, left: str, right: str, spacing_mm: float) -> None:
    box = {"transform": plot.transAxes, "color": "#ffd24d", "fontsize": 8}
    plot.text(0.01, 0.5, left, va="center", ha="left", **box)
    plot.text(0.99, 0.5, right, va="center", ha="right", **box)
    start, end = plot.get_xlim()
    length = SCALE_BAR_MM / spacing_mm / abs(end - start)
    plot.plot([0.04, 0.04 + length], [0.04, 0.04], transform=plot.transAxes, color="white", linewidth=2)
    plot.text(0.04, 0.06, f"{SCALE_BAR_MM} mm", **(box | {"color": "white", "fontsize": 7}))

"""Pictures of a case: its largest lesions in three planes."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from volseg.measure.lesions import LesionMeasurement
from volseg.preprocess.crop import AxisOrder, canonical_geometry, to_canonical
from volseg.volume import Volume

MAX_LESIONS = 3
# Title, the canonical axis that is looked along, the letters at the left and right edge (radiological convention).
PLANES = (("axial", 2, "R", "L"), ("coronal", 1, "R", "L"), ("sagittal", 0, "A", "P"))
SCALE_BAR_MM = 10
WINDOW_REACH_MM = 15.0  # how far round a lesion the grey values are taken from


class Epoch(Protocol):
    """What a line of the history of a training says."""

    @property
    def seconds(self) -> float: ...
    @property
    def loss(self) -> float: ...
    @property
    def validation_dice(self) -> float | None: ...


def overlay_png(image: Volume, ids: np.ndarray, lesions: Sequence[LesionMeasurement], *, title: str) -> bytes:
    """PNG with a row per lesion (the largest three) and its axial, coronal and sagittal slice, lesions outlined.

    Args:
        ids: (I, J, K) lesion ids on the scan's grid.
    """
    order = AxisOrder.of(image.geometry)
    geometry = canonical_geometry(image.geometry, order)
    stored, numbers = to_canonical(image.array, order), to_canonical(ids, order)
    shown = sorted(lesions, key=lambda lesion: -lesion.n_voxels)[:MAX_LESIONS]
    places = [np.argwhere(numbers == lesion.lesion_id) for lesion in shown] or [np.array([stored.shape]) // 2]
    centres = [_centre(voxels) for voxels in places]
    figure = Figure(figsize=(9, 3.2 * len(centres) + 0.4), layout="constrained", facecolor="black")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(centres), len(PLANES), squeeze=False)
    for row, centre in enumerate(centres):
        low, high = _window(image, stored, places[row], geometry.spacing_mm)
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
    return png_bytes(figure, "black")


def _window(
    image: Volume, stored: np.ndarray, voxels: np.ndarray, spacing_mm: tuple[float, float, float]
) -> tuple[float, float]:
    """Grey values from a lesion and its surroundings, so that it stands out whatever else is in the scan."""
    reach = [max(1, round(WINDOW_REACH_MM / spacing)) for spacing in spacing_mm]
    ends = zip(voxels.min(axis=0).tolist(), voxels.max(axis=0).tolist(), reach, strict=True)
    box = tuple(slice(max(0, first - n), last + n + 1) for first, last, n in ends)
    values = image.intensities(stored[box])
    low, high = np.percentile(values[np.isfinite(values)] if np.isfinite(values).any() else np.zeros(1), (5, 95))
    margin = max(0.3 * (high - low), 1e-6)
    return float(low - margin), float(high + margin)


def _slice(array: np.ndarray, axis: int, index: int) -> np.ndarray:
    return array[(slice(None),) * axis + (index,)]  # `np.take` would first copy an array whose axes are turned


def _centre(voxels: np.ndarray) -> np.ndarray:
    """The voxel (of N, 3) that lies nearest to their centroid, so that the slices surely cut the lesion."""
    return voxels[np.argmin(((voxels - voxels.mean(axis=0)) ** 2).sum(axis=1))]


def _caption(lesion: LesionMeasurement) -> str:
    text = f"#{lesion.lesion_id} {lesion.label_name or f'value {lesion.label}'}, {lesion.volume_ml:.3g} mL"
    if lesion.intensity_mean is not None and math.isfinite(lesion.intensity_mean):
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


def curves_png(histories: Sequence[Sequence[Epoch]]) -> bytes:
    """Loss and validation Dice against the hours of training, a line per network."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for number, history in enumerate(histories):
        hours = [epoch.seconds / 3600 for epoch in history]
        name = f"fold {number}" if len(histories) > 1 else None
        left.plot(hours, [epoch.loss for epoch in history], linewidth=1.2, label=name)
        looks = [
            (hour, dice)
            for hour, epoch in zip(hours, history, strict=True)
            if (dice := epoch.validation_dice) is not None
        ]
        right.plot(
            *zip(*looks, strict=True), linewidth=1.2, label=name, marker="." if len(looks) < len(history) else None
        )
    for plot, title in ((left, "loss of the training batches"), (right, "mean Dice of the watched validation scans")):
        plot.set_title(title, fontsize=9, loc="left")
        plot.set_xlabel("hours")
        plot.grid(alpha=0.3)
    right.set_ylim(0, 1)
    if len(histories) > 1:
        right.legend(fontsize=8)
    return png_bytes(figure, "white")


def patches_png(
    images: Sequence[np.ndarray], masks: Sequence[np.ndarray], spacing_mm: tuple[float, float, float]
) -> bytes:
    """Training patches, each in the axial slice with most of its labels: the first channel, labels outlined.

    Args:
        images: (C, R, A, S) each. masks: (R, A, S) class indices each.
    """
    pictures = [
        (f"patch {number}", image[0], mask, None)
        for number, (image, mask) in enumerate(zip(images, masks, strict=True))
    ]
    return comparison_png(pictures, spacing_mm)


def comparison_png(
    pictures: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray | None]], spacing_mm: tuple[float, float, float]
) -> bytes:
    """A tile per picture (title, image, reference, predicted), all (R, A, S): the axial slice with most of either mask.

    The reference is outlined in green, the prediction in orange.
    """
    columns = min(4, max(1, len(pictures)))
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.8 * rows + 0.3), layout="constrained", facecolor="black")
    FigureCanvasAgg(figure)
    plots = figure.subplots(rows, columns, squeeze=False)
    for plot in plots.flat:
        plot.set_axis_off()
    for plot, (title, image, reference, predicted) in zip(plots.flat, pictures, strict=False):
        masks = [(reference, "#4dd34d"), *([] if predicted is None else [(predicted, "#ff8c33")])]
        voxels = sum((mask > 0).sum(axis=(0, 1)) for mask, _ in masks)
        index = int(np.argmax(voxels)) if np.any(voxels) else image.shape[2] // 2
        slice_ = image[:, :, index].astype(np.float32)
        low, high = np.percentile(slice_, (1, 99))
        plot.imshow(
            slice_.T,
            cmap="gray",
            origin="lower",
            aspect=spacing_mm[1] / spacing_mm[0],
            vmin=low,
            vmax=max(high, low + 1e-6),
        )
        for mask, colour in masks:
            outline = mask[:, :, index].astype(np.float32)  # class indices would wrap where they are averaged
            levels = np.unique(outline)
            if min(outline.shape) > 1 and len(levels) > 1:  # a single row has no contour
                plot.contour(outline.T, levels=(levels[:-1] + levels[1:]) / 2, colors=[colour], linewidths=1.0)
        plot.invert_xaxis()  # R grows to the left on the screen
        plot.set_title(title, color="white", fontsize=8, loc="left")
    figure.suptitle(
        "green: reference   orange: prediction" if pictures and pictures[0][3] is not None else "green: labels",
        color="white",
        fontsize=8,
    )
    return png_bytes(figure, "black")


def png_bytes(figure: Figure, colour: str, dpi: int = 100) -> bytes:
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a label may be named $x$, and is no formula
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor=colour, metadata={"Software": None})
    return buffer.getvalue()

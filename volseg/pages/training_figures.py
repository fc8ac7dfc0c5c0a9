"""Figures of a training: its curves, its patches, its worst cases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from volseg.pages.canvas import new_figure, png_bytes
from volseg.pages.slices import draw_slice
from volseg.pages.windows import whole_window


class Epoch(Protocol):
    """The fields of an epoch in the training history that the curves show."""

    @property
    def seconds(self) -> float: ...
    @property
    def loss(self) -> float: ...
    @property
    def validation_score(self) -> float | None: ...
    @property
    def validation_loss(self) -> float | None: ...


def curves_png(
    histories: Sequence[Sequence[Epoch]],
    score: str = "mean validation Dice",
    limits: tuple[float, float] | None = (0, 1),
) -> bytes:
    """Plot loss and validation score against time of training, one line per network.

    Args:
        score: title of the curve of scores. limits: of their axis.
    """
    figure = new_figure(9, 3.6)
    left, right = figure.subplots(1, 2)
    has_losses = False
    unit, in_unit = _time_unit(max((e.seconds for line in histories for e in line), default=0.0))
    for number, history in enumerate(histories):
        times = [epoch.seconds / in_unit for epoch in history]
        name = f"fold {number}" if len(histories) > 1 else None
        left.plot(times, [epoch.loss for epoch in history], linewidth=1.2, label=name)
        scores = [epoch.validation_score for epoch in history]
        _plot(right, times, scores, "-", name)
        losses = [epoch.validation_loss for epoch in history]
        has_losses = has_losses or any(loss is not None for loss in losses)
        _plot(left, times, losses, "--")
    loss = "loss: training, validation dashed" if has_losses else "training loss"
    for plot, title in ((left, loss), (right, score)):
        plot.set_title(title, fontsize=9, loc="left")
        plot.set_xlabel(unit)
        plot.grid(alpha=0.3)
    if limits is not None:
        right.set_ylim(*limits)
    if len(histories) > 1:
        left.legend(fontsize=8)  # left, because a network may have no validation yet
    return png_bytes(figure)


def _time_unit(longest_seconds: float) -> tuple[str, float]:
    """Return the unit of a time axis, and its seconds: minutes up to two hours."""
    return ("minutes", 60.0) if longest_seconds < 7200 else ("hours", 3600.0)


def _plot(
    plot: Any, times: Sequence[float], values: Sequence[float | None], style: str, name: Any = None
) -> None:
    """Plot the values that are known; dots show them where some are not."""
    points = [(time, value) for time, value in zip(times, values, strict=True) if value is not None]
    if points:
        marker = "." if len(points) < len(values) else None
        plot.plot(*zip(*points, strict=True), style, linewidth=1.2, label=name, marker=marker)


def images_png(images: Sequence[np.ndarray], titles: Sequence[str]) -> bytes:
    """Draw augmented training images (C, H, W) with their targets."""
    columns = min(6, max(1, len(images)))
    rows = -(-len(images) // columns)
    figure = new_figure(1.6 * columns, 1.8 * rows, "black")
    plots = figure.subplots(rows, columns, squeeze=False)
    for plot in plots.flat:
        plot.set_axis_off()
    for plot, image, title in zip(plots.flat, images, titles, strict=False):
        low, high = float(image.min()), float(image.max())
        grey = (image - low) / (high - low if high > low else 1)
        plot.imshow(np.moveaxis(grey, 0, -1) if len(grey) == 3 else grey[0], cmap="gray")
        plot.set_title(title, color="white", fontsize=7)
    return png_bytes(figure)


def patches_png(
    images: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    spacing_mm: tuple[float, float, float],
) -> bytes:
    """Draw the axial slice with most labelled voxels of each patch: first channel, outlined labels.

    Args:
        images: (C, R, A, S) each. masks: (R, A, S) class indices each.
    """
    pictures = [
        (f"patch {number}", image[0], mask, None)
        for number, (image, mask) in enumerate(zip(images, masks, strict=True))
    ]
    return comparison_png(pictures, spacing_mm)


def comparison_png(
    pictures: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray | None]],
    spacing_mm: tuple[float, float, float],
) -> bytes:
    """Draw a tile per picture: the axial slice with most voxels of both masks.

    The reference is outlined in green, the prediction in orange.

    Args:
        pictures: (title, image, reference, prediction) each; arrays are (R, A, S).
    """
    columns = min(4, max(1, len(pictures)))
    rows = -(-len(pictures) // columns)
    figure = new_figure(2.6 * columns, 2.8 * rows + 0.3, "black")
    plots = figure.subplots(rows, columns, squeeze=False)
    for plot in plots.flat:
        plot.set_axis_off()
    for plot, (title, image, reference, predicted) in zip(plots.flat, pictures, strict=False):
        masks = [(reference, "#4dd34d"), *([] if predicted is None else [(predicted, "#ff8c33")])]
        voxels = sum((mask > 0).sum(axis=(0, 1)) for mask, _ in masks)
        index = int(np.argmax(voxels)) if np.any(voxels) else image.shape[2] // 2
        slice_ = image[:, :, index].astype(np.float32)
        outlines = [(mask[:, :, index], colour, 1.2) for mask, colour in masks]
        window = whole_window(slice_)
        draw_slice(plot, slice_, outlines, spacing_mm[:2], window, title)
    has_predictions = bool(pictures) and pictures[0][3] is not None
    legend = "green: reference   orange: prediction" if has_predictions else "green: labels"
    figure.suptitle(legend, color="white", fontsize=8)
    return png_bytes(figure)

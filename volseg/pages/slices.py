"""Slices of a scan as pictures: outlined lesions, orientation letters, a scale bar."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from volseg.inputs import shorten
from volseg.pages.canvas import Axes, Figure, Text

# Name, canonical axis perpendicular to the plane, left and right letter (radiological convention).
PLANES = (("axial", 2, "R", "L"), ("coronal", 1, "R", "L"), ("sagittal", 0, "A", "P"))
SCALE_BAR_MM = 10
MOST_LETTERS = 200  # per text: the width of a figure in memory grows with its longest text
WINDOW_REACH_MM = 15.0  # margin around a lesion whose intensities set the window


def slice_of(array: np.ndarray, axis: int, index: int) -> np.ndarray:
    """Return a slice as a view; `np.take` copies arrays with permuted axes."""
    return array[(slice(None),) * axis + (index,)]


def surroundings(voxels: np.ndarray, spacing_mm: tuple[float, float, float]) -> tuple[slice, ...]:
    """Return the bounding box of voxels (N, 3), widened by 15 mm."""
    reach = [max(1, round(WINDOW_REACH_MM / spacing)) for spacing in spacing_mm]
    ends = zip(voxels.min(axis=0).tolist(), voxels.max(axis=0).tolist(), reach, strict=True)
    return tuple(slice(max(0, first - n), last + n + 1) for first, last, n in ends)


def window_round(values: np.ndarray) -> tuple[float, float]:
    """Return the window (low, high) for the intensities of a lesion and its surroundings."""
    finite = values[np.isfinite(values)]
    low, high = np.percentile(finite if finite.size else np.zeros(1), (5, 95))
    margin = max(0.3 * (high - low), 1e-6)
    return float(low - margin), float(high + margin)


def draw_slice(
    plot: Axes,
    picture: np.ndarray,
    outlines: Sequence[tuple[np.ndarray, str]],
    spacing_mm: tuple[float, float],
    window: tuple[float, float],
    title: str,
) -> None:
    """Draw a slice in grey, with the outlines of each mask in its colour.

    Args:
        picture: (across, up); the axes point to R or A and to S or A. R or A is drawn at left.
    """
    plot.imshow(
        picture.T,
        cmap="gray",
        origin="lower",
        aspect=spacing_mm[1] / spacing_mm[0],
        vmin=window[0],
        vmax=window[1],
    )
    for mask, colour in outlines:
        outline = mask.astype(np.float32)  # averaging integer class indices would overflow
        levels = np.unique(outline)
        if min(outline.shape) > 1 and len(levels) > 1:  # a single row has no contour
            plot.contour(
                outline.T, levels=(levels[:-1] + levels[1:]) / 2, colors=[colour], linewidths=1.2
            )
    plot.invert_xaxis()
    plot.set_axis_off()
    plot.set_title(title, color="white", fontsize=8, loc="left")


def label_slice(plot: Axes, left: str, right: str, spacing_mm: float) -> None:
    """Draw the orientation letters at both edges, and a scale bar."""
    style = {"transform": plot.transAxes, "color": "#ffd24d", "fontsize": 8, "va": "center"}
    plot.text(0.01, 0.5, left, ha="left", **style)
    plot.text(0.99, 0.5, right, ha="right", **style)
    start, end = plot.get_xlim()
    length = SCALE_BAR_MM / spacing_mm / abs(end - start)
    plot.plot(
        [0.04, 0.04 + length], [0.04, 0.04], transform=plot.transAxes, color="white", linewidth=2
    )
    plot.text(0.04, 0.06, f"{SCALE_BAR_MM} mm", transform=plot.transAxes, color="white", fontsize=7)


def png_bytes(figure: Figure, colour: str, dpi: int = 100) -> bytes:
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a label named $x$ is not a formula
        text.set_text(shorten(text.get_text().encode(errors="replace").decode(), MOST_LETTERS))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor=colour, metadata={"Software": None})
    return buffer.getvalue()

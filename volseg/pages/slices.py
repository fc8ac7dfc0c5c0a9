"""Slices of a scan as figures: outlined lesions, orientation letters, a scale bar."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from volseg.pages.canvas import Axes
from volseg.pages.marks import LETTER_COLOUR
from volseg.pages.windows import REACH_MM, Window
from volseg.preprocessing.planes import PLANES, Plane
from volseg.volume import BoundingBox, Geometry, Volume

SCALE_BAR_MM = 10


def surroundings(lesion: BoundingBox, grid: Geometry) -> BoundingBox:
    """Return the box of a lesion and of 15 mm around it, whose intensities set its window."""
    reach = [max(1, round(REACH_MM / spacing)) for spacing in grid.spacing_mm]
    return lesion.widened(reach, grid.shape)


def draw_planes(
    plots: Sequence[Axes],
    scan: Volume,
    centre: np.ndarray,
    outlines: Sequence[tuple[np.ndarray, str]],
    window: Window,
    titles: Sequence[str],
) -> None:
    """Draw the three slices of a scan along R, A and S through a voxel.

    Args:
        centre: (3,) index of the voxel.
        outlines: (mask, colour) each, the mask (R, A, S).
        titles: one per plane.
    """
    for plot, plane, title in zip(plots, PLANES, titles, strict=True):
        index = int(centre[plane.through])
        picture = scan.intensities(plane.slice_of(scan.array, index)).astype(np.float32)
        masks = [(plane.slice_of(mask, index) > 0, colour) for mask, colour in outlines]
        spacing_mm = scan.geometry.spacing_mm[plane.across], scan.geometry.spacing_mm[plane.up]
        draw_slice(plot, picture, masks, spacing_mm, window, title)
        _label(plot, plane, spacing_mm[0])


def draw_slice(
    plot: Axes,
    picture: np.ndarray,
    outlines: Sequence[tuple[np.ndarray, str]],
    spacing_mm: tuple[float, float],
    window: Window,
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


def _label(plot: Axes, plane: Plane, spacing_mm: float) -> None:
    """Draw the orientation letters at both edges, and a scale bar."""
    left, right = plane.letters
    style = {"transform": plot.transAxes, "color": LETTER_COLOUR, "fontsize": 8, "va": "center"}
    plot.text(0.01, 0.5, left, ha="left", **style)
    plot.text(0.99, 0.5, right, ha="right", **style)
    start, end = plot.get_xlim()
    length = SCALE_BAR_MM / spacing_mm / abs(end - start)
    plot.plot(
        [0.04, 0.04 + length], [0.04, 0.04], transform=plot.transAxes, color="white", linewidth=2
    )
    plot.text(0.04, 0.06, f"{SCALE_BAR_MM} mm", transform=plot.transAxes, color="white", fontsize=7)

"""Slices of a scan as figures: outlined lesions, orientation letters, a scale bar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from volseg.pages.canvas import Axes
from volseg.pages.marks import LETTER_COLOUR
from volseg.pages.windows import REACH_MM, Window
from volseg.preprocessing.planes import PLANES, Plane
from volseg.volume import BoundingBox, Geometry, Volume

SCALE_BAR_MM = 10
ARROW, ARROW_COLOUR = 0.12, "#59d8ff"  # length as a fraction of the picture


@dataclass(frozen=True, slots=True, eq=False)
class Outline:
    """Which voxels of a slice are outlined, and how.

    Args:
        ids: (R, A, S) lesion ids or a mask.
        only: outline this lesion alone; None: all of them together.
        without: leave out this lesion.
    """

    ids: np.ndarray
    colour: str
    width: float = 1.2
    only: int | None = None
    without: int | None = None

    def on(self, plane: Plane, index: int) -> np.ndarray:
        """Return which pixels (across, up) of a slice are inside."""
        ids = plane.slice_of(self.ids, index)
        if self.only is not None:
            return ids == self.only
        return (ids > 0) if self.without is None else (ids > 0) & (ids != self.without)


def surroundings(lesion: BoundingBox, grid: Geometry) -> BoundingBox:
    """Return the box of a lesion and of 15 mm around it, whose intensities set its window."""
    reach = [max(1, round(REACH_MM / spacing)) for spacing in grid.spacing_mm]
    return lesion.widened(reach, grid.shape)


def draw_planes(
    plots: Sequence[Axes],
    scan: Volume,
    centre: np.ndarray,
    outlines: Sequence[Outline],
    window: Window,
    titles: Sequence[str],
) -> None:
    """Draw the three slices of a scan along R, A and S through a voxel.

    Args:
        centre: (3,) index of the voxel.
        outlines: an arrow points to the lesion of each that is outlined alone.
        titles: one per plane.
    """
    for plot, plane, title in zip(plots, PLANES, titles, strict=True):
        index = int(centre[plane.through])
        picture = scan.intensities(plane.slice_of(scan.array, index)).astype(np.float32)
        masks = [(item.on(plane, index), item.colour, item.width) for item in outlines]
        spacing_mm = scan.geometry.spacing_mm[plane.across], scan.geometry.spacing_mm[plane.up]
        draw_slice(plot, picture, masks, spacing_mm, window, title)
        _label(plot, plane, spacing_mm[0])
        for item, (mask, *_) in zip(outlines, masks):
            if item.only is not None:
                _point_at(plot, mask, (centre[plane.across], centre[plane.up]))


def draw_slice(
    plot: Axes,
    picture: np.ndarray,
    outlines: Sequence[tuple[np.ndarray, str, float]],
    spacing_mm: tuple[float, float],
    window: Window,
    title: str,
) -> None:
    """Draw a slice in grey, with the outlines of each mask in its colour and line width.

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
    for mask, colour, width in outlines:
        outline = mask.astype(np.float32)  # averaging integer class indices would overflow
        levels = np.unique(outline)
        if min(outline.shape) > 1 and len(levels) > 1:  # a single row has no contour
            plot.contour(
                outline.T, levels=(levels[:-1] + levels[1:]) / 2, colors=[colour], linewidths=width
            )
    plot.invert_xaxis()
    plot.set_axis_off()
    plot.set_title(title, color="white", fontsize=8, loc="left")


def _point_at(plot: Axes, mask: np.ndarray, centre: tuple[float, float]) -> None:
    """Draw an arrow that ends at the edge of a lesion, and comes from where there is room.

    Args:
        mask: (across, up) pixels of the lesion. centre: one of them.
    """
    size = np.array(mask.shape)
    towards_middle = np.where(np.array(centre) < (size - 1) / 2, 1.0, -1.0)
    tip = np.array(centre, float)
    while (tip >= 0).all() and (tip <= size - 1).all() and mask[tuple(np.rint(tip).astype(int))]:
        tip += towards_middle / 2
    tail = tip + towards_middle * np.maximum(ARROW * size, 1)
    arrow = {"arrowstyle": "-|>", "color": ARROW_COLOUR, "linewidth": 1.4, "mutation_scale": 9}
    plot.annotate("", tuple(tip), tuple(tail), arrowprops=arrow | {"shrinkA": 0, "shrinkB": 1})


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

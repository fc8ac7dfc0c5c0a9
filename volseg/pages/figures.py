"""Figure of a case: its largest lesions in three planes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from volseg.inputs import shorten
from volseg.measurement.rows import LesionMeasurement
from volseg.measurement.units import shown_unit
from volseg.pages.canvas import new_figure, png_bytes
from volseg.pages.marks import lesion_voxels
from volseg.pages.slices import Outline, draw_planes
from volseg.pages.windows import Window
from volseg.preprocessing.planes import PLANES
from volseg.volume import BoundingBox, Volume

MAX_LESIONS = 3
MAX_VOXELS = 2**22  # bounding boxes of lesions up to this size are read entirely
LESION, OTHER = "#ff5c33", "#c9a06a"


def overlay_png(
    image: Volume,
    ids: np.ndarray,
    lesions: Sequence[LesionMeasurement],
    *,
    title: str,
    window: Window,
    is_doubted: bool = False,
) -> bytes:
    """Draw axial, coronal and sagittal slices through the three largest lesions, as PNG.

    A row shows one lesion: an arrow points to it, and the others have a thin outline.

    Args:
        ids: (I, J, K) lesion ids on the scan's grid; lesions are outlined.
        window: of all pictures of the scan.
        is_doubted: the unit of the intensities is doubtful; the captions mark it.
    """
    numbers = image.with_array(ids).canonical().array
    image = image.canonical()
    grid = image.geometry
    shown = sorted(lesions, key=lambda lesion: -lesion.n_voxels)[:MAX_LESIONS]
    captions = [_caption(lesion, is_doubted=is_doubted) for lesion in shown]
    shown_ids = [lesion.lesion_id for lesion in shown]
    voxels = [_voxels_of(numbers, number) for number in shown_ids]
    if not shown:
        captions, voxels, shown_ids = ["no lesion found"], [np.array([grid.shape]) // 2], [0]
    figure = new_figure(9, 3.2 * len(captions) + 0.4, "black")
    axes = figure.subplots(len(captions), len(PLANES), squeeze=False)
    for plots, number, indices, caption in zip(axes, shown_ids, voxels, captions, strict=True):
        outlines = [Outline(numbers, OTHER, 0.6, without=number)]
        outlines += [Outline(numbers, LESION, 1.5, only=number)] if number else []
        first, *others = (plane.name for plane in PLANES)
        titles = (f"{first}: {caption}", *others)
        draw_planes(plots, image, _centre(indices), outlines, window, titles)
    figure.suptitle(title, color="white", fontsize=10)
    return png_bytes(figure)


def _voxels_of(numbers: np.ndarray, number: int) -> np.ndarray:
    box = BoundingBox.where(lambda part: numbers[part] == number, numbers)
    assert box is not None, "a lesion has voxels"
    return lesion_voxels(numbers, number, box, most=MAX_VOXELS)


def _centre(voxels: np.ndarray) -> np.ndarray:
    """Return the voxel (of N, 3) nearest to their centroid, which may lie outside the lesion."""
    return voxels[np.argmin(((voxels - voxels.mean(axis=0)) ** 2).sum(axis=1))]


def _caption(lesion: LesionMeasurement, *, is_doubted: bool) -> str:
    label = shorten(lesion.label_name or f"value {lesion.label}")
    text = f"#{lesion.lesion_id} {label}, {lesion.volume_ml:.3g} mL"
    if lesion.intensity_mean is not None and math.isfinite(lesion.intensity_mean):
        unit = shown_unit(lesion.intensity_unit, is_doubted=is_doubted)
        text += f", {lesion.intensity_mean:.3g} {unit}"
    if lesion.class_name:
        text += f", {shorten(lesion.class_name)} {lesion.class_probability:.2f}"
    return text

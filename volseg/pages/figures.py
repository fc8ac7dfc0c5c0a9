"""Figure of a case: its largest lesions in three planes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from volseg.inputs import shorten
from volseg.measurement.rows import LesionMeasurement
from volseg.measurement.units import shown_unit
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
from volseg.preprocessing.crop import AxisOrder, canonical_geometry, to_canonical
from volseg.volume import BoundingBox, Volume, slabs_of

MAX_LESIONS = 3
MOST_VOXELS = 2**22  # bounding boxes of lesions up to this size are read entirely
LESION = "#ff5c33"


def overlay_png(
    image: Volume,
    ids: np.ndarray,
    lesions: Sequence[LesionMeasurement],
    *,
    title: str,
    is_doubted: bool = False,
) -> bytes:
    """Draw axial, coronal and sagittal slices through the three largest lesions, as PNG.

    Args:
        ids: (I, J, K) lesion ids on the scan's grid; lesions are outlined.
        is_doubted: the unit of the intensities is doubtful; the captions mark it.
    """
    order = AxisOrder.of(image.geometry)
    geometry = canonical_geometry(image.geometry, order)
    stored, numbers = to_canonical(image.array, order), to_canonical(ids, order)
    shown = sorted(lesions, key=lambda lesion: -lesion.n_voxels)[:MAX_LESIONS]
    voxels = [_voxels_of(numbers, lesion.lesion_id) for lesion in shown]
    voxels = voxels or [np.array([stored.shape]) // 2]
    centres = [_centre(indices) for indices in voxels]
    figure = Figure(figsize=(9, 3.2 * len(centres) + 0.4), layout="constrained", facecolor="black")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(centres), len(PLANES), squeeze=False)
    for row, centre in enumerate(centres):
        around = stored[surroundings(voxels[row], geometry.spacing_mm)]
        window = window_round(image.intensities(_sample(around)))
        caption = "no lesion found" if not shown else _caption(shown[row], is_doubted=is_doubted)
        for column, (name, axis, left, right) in enumerate(PLANES):
            index = int(centre[axis])
            picture = image.intensities(slice_of(stored, axis, index)).astype(np.float32)
            outline = slice_of(numbers, axis, index) > 0
            across, up = (geometry.spacing_mm[other] for other in range(3) if other != axis)
            plot, heading = axes[row][column], f"{name}: {caption}" if column == 0 else name
            draw_slice(plot, picture, [(outline, LESION)], (across, up), window, heading)
            label_slice(plot, left, right, across)
    figure.suptitle(title, color="white", fontsize=10)
    return png_bytes(figure, "black")


def _sample(part: np.ndarray) -> np.ndarray:
    """Return the part, thinned to every n-th voxel along each axis if it is large."""
    step = 1 if part.size <= MOST_VOXELS else math.ceil((part.size / MOST_VOXELS) ** (1 / 3))
    return part[::step, ::step, ::step]


def _voxels_of(numbers: np.ndarray, number: int) -> np.ndarray:
    """Return the (N, 3) voxel indices of a lesion, of a large one only in its middle slice."""
    starts, stops = [], []
    for part in slabs_of(numbers):
        box = BoundingBox.around(numbers[part] == number)
        if box is not None:
            starts.append([side.start + first for side, first in zip(part, box.start)])
            stops.append([side.start + end for side, end in zip(part, box.stop)])
    start, stop = np.min(starts, axis=0), np.max(stops, axis=0)
    inside = numbers[tuple(slice(a, b) for a, b in zip(start.tolist(), stop.tolist()))]
    if inside.size <= MOST_VOXELS:
        return np.argwhere(inside == number) + start
    planes = sorted(range(inside.shape[2]), key=lambda k: abs(2 * k + 1 - inside.shape[2]))
    k = next(k for k in planes if (inside[:, :, k] == number).any())
    return np.insert(np.argwhere(inside[:, :, k] == number), 2, k, axis=1) + start


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

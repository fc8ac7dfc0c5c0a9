"""Pictures of a case: its largest lesions in three planes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from volseg.inputs import shortened
from volseg.measure.rows import LesionMeasurement
from volseg.measure.units import shown_unit
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
from volseg.volume import BoundingBox, Volume, slabs_of

MAX_LESIONS = 3
MOST_VOXELS = 2**22  # of a lesion's box, all of which are looked at
LESION = "#ff5c33"


def overlay_png(
    image: Volume,
    ids: np.ndarray,
    lesions: Sequence[LesionMeasurement],
    *,
    title: str,
    is_doubted: bool = False,
) -> bytes:
    """PNG with a row per lesion (the largest three) and its axial, coronal and sagittal slice, lesions outlined.

    Args:
        ids: (I, J, K) lesion ids on the scan's grid.
        is_doubted: whether the unit of the intensities is in doubt, which the captions then say.
    """
    order = AxisOrder.of(image.geometry)
    geometry = canonical_geometry(image.geometry, order)
    stored, numbers = to_canonical(image.array, order), to_canonical(ids, order)
    shown = sorted(lesions, key=lambda lesion: -lesion.n_voxels)[:MAX_LESIONS]
    places = [_voxels_of(numbers, lesion.lesion_id) for lesion in shown] or [
        np.array([stored.shape]) // 2
    ]
    centres = [_centre(voxels) for voxels in places]
    figure = Figure(figsize=(9, 3.2 * len(centres) + 0.4), layout="constrained", facecolor="black")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(centres), len(PLANES), squeeze=False)
    for row, centre in enumerate(centres):
        window = window_round(
            image.intensities(_sample(stored[surroundings(places[row], geometry.spacing_mm)]))
        )
        caption = "no lesion found" if not shown else _caption(shown[row], is_doubted=is_doubted)
        for column, (name, axis, left, right) in enumerate(PLANES):
            index = int(centre[axis])
            picture = image.intensities(slice_of(stored, axis, index)).astype(np.float32)
            outline = slice_of(numbers, axis, index) > 0
            across, up = (geometry.spacing_mm[other] for other in range(3) if other != axis)
            title_of = f"{name}: {caption}" if column == 0 else name
            draw_slice(
                axes[row][column], picture, [(outline, LESION)], (across, up), window, title_of
            )
            label_slice(axes[row][column], left, right, across)
    figure.suptitle(title, color="white", fontsize=10)
    return png_bytes(figure, "black")


def _sample(part: np.ndarray) -> np.ndarray:
    """The part, or of a large one every n-th voxel."""
    step = 1 if part.size <= MOST_VOXELS else math.ceil((part.size / MOST_VOXELS) ** (1 / 3))
    return part[::step, ::step, ::step]


def _voxels_of(numbers: np.ndarray, number: int) -> np.ndarray:
    """(N, 3) indices of the voxels of a lesion; of a large one only of those in the middle slice of its box that has any."""
    slabs = [(part, BoundingBox.around(numbers[part] == number)) for part in slabs_of(numbers)]
    found = [
        (
            [side.start + a for side, a in zip(part, box.start)],
            [side.start + b for side, b in zip(part, box.stop)],
        )
        for part, box in slabs
        if box is not None
    ]
    start, stop = (
        np.min([low for low, _ in found], axis=0),
        np.max([high for _, high in found], axis=0),
    )
    inside = numbers[tuple(slice(a, b) for a, b in zip(start.tolist(), stop.tolist()))]
    if inside.size <= MOST_VOXELS:
        return np.argwhere(inside == number) + start
    planes = sorted(range(inside.shape[2]), key=lambda k: abs(2 * k + 1 - inside.shape[2]))
    k = next(k for k in planes if (inside[:, :, k] == number).any())
    return np.insert(np.argwhere(inside[:, :, k] == number), 2, k, axis=1) + start


def _centre(voxels: np.ndarray) -> np.ndarray:
    """The voxel (of N, 3) that lies nearest to their centroid, so that the slices surely cut the lesion."""
    return voxels[np.argmin(((voxels - voxels.mean(axis=0)) ** 2).sum(axis=1))]


def _caption(lesion: LesionMeasurement, *, is_doubted: bool) -> str:
    text = f"#{lesion.lesion_id} {shortened(lesion.label_name or f'value {lesion.label}')}, {lesion.volume_ml:.3g} mL"
    if lesion.intensity_mean is not None and math.isfinite(lesion.intensity_mean):
        text += f", {lesion.intensity_mean:.3g} {shown_unit(lesion.intensity_unit, is_doubted=is_doubted)}"
    return (
        f"{text}, {shortened(lesion.class_name)} {lesion.class_probability:.2f}"
        if lesion.class_name
        else text
    )

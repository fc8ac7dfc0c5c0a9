"""Mask → cleaner mask. A step is a frozen dataclass whose `__call__` is the maths.

A recipe lists steps in order. Components are connected through faces, edges and corners (26
neighbours), within one label. No step changes its input or depends on the stored axis order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from volseg.postprocessing.components import Components, find_components
from volseg.postprocessing.lesions import Lesions, label_lesions
from volseg.recipe import Step
from volseg.registry import check_name, make_row
from volseg.volume import BoundingBox, Geometry, slabs_of

MaskStep = Callable[[np.ndarray, Geometry], np.ndarray]
Label = Annotated[int, Field(ge=1)] | None


def make_steps(settings: Sequence[Step]) -> list[MaskStep]:
    """Return the steps of a recipe in its order.

    Raises:
        VolsegError: an unknown name or setting, or an invalid value.
    """
    for step in settings:
        check_name("post-processing step", step.step, STEPS)
    return [
        make_row(f"post-processing step {step.step!r}", STEPS[step.step], step.settings)
        for step in settings
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveSmall:
    """Remove components smaller than a volume.

    Args:
        min_volume_mm3: smallest volume to keep, > 0.
        label: remove only components of this label; None: of every label.
    """

    min_volume_mm3: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    label: Label = None

    def __call__(self, mask: np.ndarray, geometry: Geometry) -> np.ndarray:
        lesions = label_lesions(_only(mask, self.label), geometry)
        # With the tolerance, a lesion of exactly this volume stays despite rounding in |det A|.
        min_voxels = math.ceil(self.min_volume_mm3 / geometry.voxel_volume_mm3 * (1 - 1e-9))
        return _keep(mask, lesions, np.asarray(lesions.n_voxels) >= min_voxels)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepLargest:
    """Keep the largest components of each label.

    Args:
        label: process only this label; None: each label separately.
        n: number of components to keep, ≥ 1; equal sizes are ordered by centroid (R, then A, S).
    """

    label: Label = None
    n: Annotated[int, Field(ge=1)] = 1

    def __call__(self, mask: np.ndarray, geometry: Geometry) -> np.ndarray:
        lesions = label_lesions(_only(mask, self.label), geometry)
        labels = np.asarray(lesions.labels)
        kept = np.zeros(len(labels), bool)
        for label in np.unique(labels):
            kept[np.flatnonzero(labels == label)[: self.n]] = True  # sorted by size
        return _keep(mask, lesions, kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class FillHoles:
    """Fill cavities: background enclosed by one label.

    Background is enclosed if it does not reach the edge of the array through faces. A cavity
    between two labels stays, because it could belong to either.

    Args:
        label: fill only cavities in this label; None: in every label.
    """

    label: Label = None

    def __call__(self, mask: np.ndarray, geometry: Geometry) -> np.ndarray:
        filled = mask.copy(order="K")
        box = BoundingBox.around(mask)
        if box is None:
            return filled
        part = filled[box.slices]  # cavities lie inside the box of the labels
        background = find_components(part == 0, geometry.crop(box), connectivity=6)
        low, high = _adjacent_labels(part, background)
        is_filled = low == high if self.label is None else (low == high) & (low == self.label)
        fill = np.where(is_filled, low, 0).astype(part.dtype)
        for slab in slabs_of(part):
            numbers = background.number[background.ids[slab]]
            inside = numbers > 0
            part[slab][inside] = fill[numbers[inside]]
        return filled


def _adjacent_labels(part: np.ndarray, background: Components) -> tuple[np.ndarray, np.ndarray]:
    """Return the lowest and highest label (N + 1,) adjacent to each background component.

    They differ for components that reach the edge of the array.
    """
    part = part.view(np.uint8) if part.dtype == np.bool_ else part
    least, most = np.iinfo(part.dtype).min, np.iinfo(part.dtype).max
    low, high = (np.full(len(background) + 1, value, part.dtype) for value in (most, least))
    for axis in range(3):
        before, after = (
            tuple(slice(*ends) if other == axis else slice(None) for other in range(3))
            for ends in ((None, -1), (1, None))
        )
        for inside, outside in ((before, after), (after, before)):
            ids, labels = background.ids[inside], part[outside]
            for slab in slabs_of(labels):
                at_border = (ids[slab] > 0) & (labels[slab] != 0)
                numbers, adjacent = background.number[ids[slab][at_border]], labels[slab][at_border]
                np.minimum.at(low, numbers, adjacent)
                np.maximum.at(high, numbers, adjacent)
        for plane in (0, -1):
            numbers = background.number[np.unique(np.take(background.ids, plane, axis=axis))]
            low[numbers], high[numbers] = least, most
    low[0], high[0] = least, most
    return low, high


def _only(mask: np.ndarray, label: int | None) -> np.ndarray:
    """Return the mask with every other label set to 0."""
    return mask if label is None else mask * (mask == label)


def _keep(mask: np.ndarray, lesions: Lesions, kept: np.ndarray) -> np.ndarray:
    """Return the mask without the lesions that are not kept, (N,) bool."""
    is_kept, cleaned = np.concatenate([[True], kept]), np.empty_like(mask)
    for slab in slabs_of(mask):
        cleaned[slab] = mask[slab] * is_kept[lesions.ids[slab]]
    return cleaned


STEPS: dict[str, type] = {
    "remove_small": RemoveSmall,
    "keep_largest": KeepLargest,
    "fill_holes": FillHoles,
}

"""Mask → cleaner mask. A step is a frozen dataclass whose `__call__` is the maths; a recipe lists steps in order.

Components are connected through faces, edges and corners (26 neighbours), within one label. No step changes its
input, and none depends on the axis order in which a scan is stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from volseg.errors import VolsegError
from volseg.postprocess.components import Components, find_components
from volseg.postprocess.lesions import Lesions, label_lesions
from volseg.recipe import Step
from volseg.volume import BoundingBox, Geometry, slabs_of

MaskStep = Callable[[np.ndarray, Geometry], np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveSmall:
    """Remove components smaller than a volume; one of exactly that volume stays.

    Args:
        min_volume_mm3: smallest volume that is kept, > 0.
        label: remove only components of this label; None: of every label.
    """

    min_volume_mm3: float
    label: int | None = None

    def __post_init__(self) -> None:
        _check_label(self.label)
        if (
            not isinstance(self.min_volume_mm3, int | float)
            or not 0 < self.min_volume_mm3 < math.inf
        ):
            raise VolsegError(
                f"min_volume_mm3 = {self.min_volume_mm3!r} is not a volume",
                fix="give a number over 0, such as 10 mm³",
                code="E_RECIPE",
            )

    def __call__(self, mask: np.ndarray, geometry: Geometry) -> np.ndarray:
        lesions = label_lesions(_only(mask, self.label), geometry)
        # The small allowance keeps the last bit of |det A| from deciding over a lesion of exactly that volume.
        fewest = math.ceil(self.min_volume_mm3 / geometry.voxel_volume_mm3 * (1 - 1e-9))
        return _keep(mask, lesions, np.asarray(lesions.n_voxels) >= fewest)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepLargest:
    """Keep the largest components of each label.

    Args:
        label: touch only this label; None: each label by itself.
        n: how many components stay, ≥ 1; of two equal ones the first by centroid (R, then A, then S).
    """

    label: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        _check_label(self.label)
        if not isinstance(self.n, int) or self.n < 1:
            raise VolsegError(
                f"n = {self.n!r} is no number of components to keep",
                fix="1 is usual",
                code="E_RECIPE",
            )

    def __call__(self, mask: np.ndarray, geometry: Geometry) -> np.ndarray:
        lesions = label_lesions(_only(mask, self.label), geometry)
        labels = np.asarray(lesions.labels)
        kept = np.zeros(len(labels), bool)
        for label in np.unique(labels):
            kept[np.flatnonzero(labels == label)[: self.n]] = True  # the largest first
        return _keep(mask, lesions, kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class FillHoles:
    """Fill cavities: background that cannot reach the edge of the array through faces, and borders on one label only.

    A cavity between two labels stays, since it could be either. So does a notch that is open at the edge of the array.

    Args:
        label: fill only the cavities of this label; None: of every label.
    """

    label: int | None = None

    def __post_init__(self) -> None:
        _check_label(self.label)

    def __call__(self, mask: np.ndarray, geometry: Geometry) -> np.ndarray:
        filled = mask.copy(order="K")
        box = BoundingBox.around(mask)
        if box is None:
            return filled
        part = filled[
            box.slices
        ]  # a view; what is enclosed by labels lies strictly inside their box
        background = find_components(part == 0, geometry.crop(box), connectivity=6)
        low, high = _labels_round(part, background)
        is_filled = low == high if self.label is None else (low == high) & (low == self.label)
        fill = np.where(is_filled, low, 0).astype(part.dtype)
        for slab in slabs_of(part):
            numbers = background.number[background.ids[slab]]
            inside = numbers > 0
            part[slab][inside] = fill[numbers[inside]]
        return filled


def _labels_round(part: np.ndarray, background: Components) -> tuple[np.ndarray, np.ndarray]:
    """(N + 1,) lowest and highest label that each part of the background borders on; different where it reaches the edge."""
    part = part.view(np.uint8) if part.dtype == np.bool_ else part
    least, most = np.iinfo(part.dtype).min, np.iinfo(part.dtype).max
    low, high = (np.full(len(background) + 1, value, part.dtype) for value in (most, least))
    for axis in range(3):
        before, after = (
            tuple(slice(*ends) if other == axis else slice(None) for other in range(3))
            for ends in ((None, -1), (1, None))
        )
        for one, other in ((before, after), (after, before)):
            ids, labels = background.ids[one], part[other]
            for slab in slabs_of(labels):
                at_border = (ids[slab] > 0) & (labels[slab] != 0)
                numbers, found = background.number[ids[slab][at_border]], labels[slab][at_border]
                np.minimum.at(low, numbers, found)
                np.maximum.at(high, numbers, found)
        for plane in (0, -1):
            numbers = background.number[np.unique(np.take(background.ids, plane, axis=axis))]
            low[numbers], high[numbers] = least, most
    low[0], high[0] = least, most
    return low, high


def _check_label(label: int | None) -> None:
    if label is not None and (not isinstance(label, int) or label < 1):
        raise VolsegError(
            f"label = {label!r} is not a label",
            fix="give a value of the mask from 1, or leave it out",
            code="E_RECIPE",
        )


def _only(mask: np.ndarray, label: int | None) -> np.ndarray:
    """The mask with every other label set to 0."""
    return mask if label is None else mask * (mask == label)


def _keep(mask: np.ndarray, lesions: Lesions, kept: np.ndarray) -> np.ndarray:
    """The mask without the lesions whose entry in (N,) bool is False."""
    is_kept, cleaned = np.concatenate([[True], kept]), np.empty_like(mask)
    for slab in slabs_of(mask):
        cleaned[slab] = mask[slab] * is_kept[lesions.ids[slab]]
    return cleaned


STEPS = {"remove_small": RemoveSmall, "keep_largest": KeepLargest, "fill_holes": FillHoles}


def make_steps(settings: Sequence[Step]) -> list[MaskStep]:
    """The steps of a recipe, ready to be applied in its order.

    Raises:
        VolsegError: a name or a setting that is not known, or a value that makes no sense.
    """
    made = []
    for step in settings:
        if step.step not in STEPS:
            raise VolsegError(
                f"post-processing step {step.step!r} is unknown",
                fix=f"use one of {', '.join(STEPS)}",
                code="E_RECIPE",
            )
        try:
            made.append(STEPS[step.step](**step.settings))
        except TypeError as error:
            raise VolsegError(
                f"step {step.step!r}: {error}",
                fix="see volseg/postprocess/steps.py",
                code="E_RECIPE",
            ) from error
    return made

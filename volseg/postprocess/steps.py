"""Mask → cleaner mask. A step is a frozen dataclass whose `__call__` is the maths; a recipe lists steps in order.

Components are connected through faces, edges and corners (26 neighbours), within one label. No step changes its
input, and none depends on the axis order in which a scan is stored.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import binary_dilation

from volseg.errors import VolsegError
from volseg.postprocess.components import component_statistics, label_components
from volseg.postprocess.lesions import Lesions, label_lesions
from volseg.recipe import Step
from volseg.volume import BoundingBox, Geometry

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
        if not isinstance(self.min_volume_mm3, int | float) or not 0 < self.min_volume_mm3 < math.inf:
            raise VolsegError(
                f"min_volume_mm3 = {self.min_volume_mm3!r} is not a volume",
                fix="give a number over 0, such as 10 mm³",
                code="E_RECIPE",
            )

    def __call__(self, mask: np.ndarray, geometry: Geometry) -> np.ndarray:
        lesions = label_lesions(_only(mask, self.label), geometry)
        # The small allowance keeps the last bit of |det A| from deciding over a lesion of exactly that volume.
        fewest = math.ceil(self.min_volume_mm3 / geometry.voxel_volume_mm3 * (1 - 1e-9))
        return _keep(mask, lesions, [n >= fewest for n in lesions.n_voxels])


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
            raise VolsegError(f"n = {self.n!r} is no number of components to keep", fix="1 is usual", code="E_RECIPE")

    def __call__(self, mask: np.ndarray, geometry: Geometry) -> np.ndarray:
        lesions = label_lesions(_only(mask, self.label), geometry)
        n_seen: Counter[int] = Counter()
        kept = []
        for label in lesions.labels:  # the largest first
            n_seen[label] += 1
            kept.append(n_seen[label] <= self.n)
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
        part = filled[box.slices]  # a view; what is enclosed by labels lies strictly inside their box
        background, _ = label_components(part == 0, 6)
        for n, inner in enumerate(component_statistics(background).boxes(), start=1):
            if any(side.start == 0 or side.stop == size for side, size in zip(inner, part.shape, strict=True)):
                continue
            around = tuple(slice(side.start - 1, side.stop + 1) for side in inner)
            cavity = background[around] == n
            border = np.unique(part[around][binary_dilation(cavity) & ~cavity])
            if border.size == 1 and self.label in (None, border[0]):
                part[around][cavity] = border[0]
        return filled


def _check_label(label: int | None) -> None:
    if label is not None and (not isinstance(label, int) or label < 1):
        raise VolsegError(
            f"label = {label!r} is not a label", fix="give a value of the mask from 1, or leave it out", code="E_RECIPE"
        )


def _only(mask: np.ndarray, label: int | None) -> np.ndarray:
    """The mask with every other label set to 0."""
    return mask if label is None else mask * (mask == label)


def _keep(mask: np.ndarray, lesions: Lesions, kept: list[bool]) -> np.ndarray:
    """The mask without the lesions whose entry is False."""
    return mask * np.array([True, *kept])[lesions.ids]


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
                f"post-processing step {step.step!r} is unknown", fix=f"use one of {', '.join(STEPS)}", code="E_RECIPE"
            )
        try:
            made.append(STEPS[step.step](**step.settings))
        except TypeError as error:
            raise VolsegError(
                f"step {step.step!r}: {error}", fix="see volseg/postprocess/steps.py", code="E_RECIPE"
            ) from error
    return made

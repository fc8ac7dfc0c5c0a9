"""A scan with its lesions: what their measurements depend on, and its canonical views."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from volseg.measurement.units import Unit
from volseg.postprocessing.lesions import Lesions, stable_voxel_mm3
from volseg.recipe import Measure
from volseg.volume import AxisOrder, Volume

Box = tuple[slice, slice, slice]
DEFAULTS = Measure()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SegmentedScan:
    """A scan with its lesions, and all that their measurements depend on.

    Args:
        case_id: name of the scan.
        image: the scan as read: own grid, original intensities.
        lesions: its lesions, on the same grid.
        unit: of the intensities. If it is in doubt, density, mass, calcium score and class are left
            empty, with the reason in `notes`.
        label_names: label value → name.
        settings: which labels are lymph nodes, whether calcium is scored, and so on.
        organ_voxels: voxels of the organ, lesions excluded; None if no label is the organ. If 0,
            the organ was not segmented, and the burden is unknown.
        confidence: (I, J, K) probability of the predicted label, and in the background of any
            label; uint8 from 0 to 255, or floating point from 0 to 1.
        classes: class name → probability, for lesions 1, 2, …, at least up to the last of those
            measured in full; None for a lesion that was not classified.
        model: name of the model, copied into the rows.
    """

    case_id: str
    image: Volume
    lesions: Lesions
    unit: Unit
    label_names: Mapping[int, str]
    settings: Measure = DEFAULTS
    organ_voxels: int | None = None
    confidence: np.ndarray | None = None
    classes: Sequence[Mapping[str, float] | None] | None = None
    model: str | None = None

    @property
    def is_calcium_scored(self) -> bool:
        """True if calcium is to be scored and the unit allows it."""
        return self.settings.calcium and self.unit.is_hu

    @property
    def voxel_mm3(self) -> float:
        """Voxel volume, the same to the last bit for all axis orders."""
        return stable_voxel_mm3(self.image.geometry)

    def check(self, only: np.ndarray | None = None) -> None:
        """Check the arrays; `only` are the (M,) lesions that are measured in full.

        Raises:
            ValueError: arrays of different shape, or inconsistent numbers of lesions.
        """
        ids, n = self.lesions.ids, len(self.lesions.labels)
        if ids.shape != self.image.array.shape:
            raise ValueError(
                f"lesion ids have shape {ids.shape}, but the image {self.image.array.shape}"
            )
        if ids.dtype.kind not in "iu" or ids.min() < 0:
            raise ValueError(
                f"lesion ids must be integers from 0, got {ids.dtype} from {ids.min()}"
            )
        if int(ids.max()) != n:
            raise ValueError(f"lesion ids go up to {ids.max()}, but there are {n} labels")
        if self.confidence is not None:
            _check_confidence(self.confidence, ids.shape)
        n_needed = n if only is None else int(only.max(initial=0))
        if self.classes is not None and not n_needed <= len(self.classes) <= n:
            raise ValueError(f"{len(self.classes)} lesions are classified, but there are {n}")


def _check_confidence(confidence: np.ndarray, shape: tuple[int, ...]) -> None:
    if confidence.shape != shape:
        raise ValueError(f"confidence has shape {confidence.shape}, but the image {shape}")
    if confidence.dtype == np.uint8:
        return
    if confidence.dtype.kind != "f":
        raise ValueError(f"confidence must be uint8 or floating point, got {confidence.dtype}")
    highest = np.fmax.reduce(confidence, axis=None)
    if highest > 1:
        raise ValueError(f"confidence must be from 0 to 1, got {highest}")


@dataclass(frozen=True, slots=True, eq=False)
class CanonicalScan:
    """Canonical (R, A, S) views of a scan, its lesion ids and its confidence.

    They are the same for all 48 axis orders.
    """

    scan: SegmentedScan
    image: Volume
    ids: np.ndarray
    confidence: np.ndarray | None
    order: AxisOrder
    memory: tuple[int, int, int]  # axes from slowest to fastest in memory
    matrix: np.ndarray  # (3, 3) voxel → mm
    voxel_mm3: float

    @classmethod
    def of(cls, scan: SegmentedScan) -> CanonicalScan:
        order, confidence = AxisOrder.of(scan.image.geometry), scan.confidence
        image = scan.image.canonical()
        strides = [-abs(stride) for stride in image.array.strides]
        i, j, k = np.argsort(strides, kind="stable").tolist()
        return cls(
            scan=scan,
            image=image,
            ids=order.apply(scan.lesions.ids),
            confidence=None if confidence is None else order.apply(confidence),
            order=order,
            memory=(i, j, k),
            matrix=image.geometry.voxel_steps_mm,
            voxel_mm3=scan.voxel_mm3,
        )

    @property
    def slice_axis(self) -> int | None:
        """Axis (R, A, S) along which the scan has a single slice; None for a volume."""
        return self.ids.shape.index(1) if 1 in self.ids.shape else None

    def box_of(self, stored: Box) -> Box:
        """Convert a box of the stored array to one of the canonical views."""
        sides = []
        for axis, flip, n in zip(self.order.axes, self.order.flipped, self.ids.shape, strict=True):
            side = stored[axis]
            sides.append(slice(n - side.stop, n - side.start) if flip else side)
        return sides[0], sides[1], sides[2]


def n_voxels_of(box: Box) -> int:
    """Return the number of voxels of a box."""
    return math.prod(side.stop - side.start for side in box)

"""Masks that look like noise: the largest lesions are measured in full, the others in one pass.

No patient has more than 10 000 lesions, nor hundreds that each spread over the whole scan. Shapes
are measured in a box round each lesion, so time grows with the boxes: those of the organs in a CT
fill it about twice, those of 117 random values 117 times.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import merge
from operator import attrgetter
from typing import Any

import numpy as np

from volseg import __version__
from volseg.measurement.lesions import (
    DEFAULTS,
    NO_CLASS,
    CanonicalScan,
    centres_mm,
    confidence_columns,
    intensity_columns,
    measure_lesions,
    point_text,
    sizes_and_boxes,
    voxel_volume_mm3,
    withheld,
)
from volseg.measurement.ragged import Ragged
from volseg.measurement.recist import MEASURABLE_MM, ROUNDING_MM
from volseg.measurement.rows import LesionMeasurement
from volseg.measurement.shape import equivalent_diameter_mm
from volseg.measurement.units import HU
from volseg.postprocessing.components import by_size
from volseg.postprocessing.lesions import MANY
from volseg.recipe import Measure
from volseg.volume import Volume, slabs_of
from volseg.words import format_thousands

SPECKS = "W_SPECKS"  # code of the warning that a mask looks like noise
TOGETHER_VOXELS = 2**20  # of lesions measured together
TOGETHER_ROWS = 2**17
SLAB_VOXELS = 2**20
# Voxels in the boxes of lesions measured in full: at most 16 scans, but always 2²⁴.
BOXES, FEW_BOXES = 16, 2**24


@dataclass(frozen=True, kw_only=True, eq=False)
class Specks:
    """Lesions of a scan that are not among its largest; iterating measures them in batches.

    Args:
        image, ids, confidence, labels, case_id, label_names: as in `measure_largest`.
        unit, unit_doubt, settings, connectivity, model: as in `measure_largest`.
        has_classes: whether the largest lesions have a class.
        sizes: (N + 1,) voxels of each lesion of the scan; 0 for index 0 and for lesions measured
            in full.
        n: number of these lesions.
        n_lesions: number of all lesions of the scan.
        scans_in_boxes: how often the boxes of all lesions would fill the scan, if that is the
            reason; 0 if the reason is their number.
    """

    image: Volume
    ids: np.ndarray
    confidence: np.ndarray | None
    labels: Sequence[int]
    case_id: str
    label_names: Mapping[int, str]
    unit: str
    unit_doubt: str
    has_classes: bool
    settings: Measure
    connectivity: int | None
    model: str | None
    sizes: np.ndarray
    n: int
    n_lesions: int
    scans_in_boxes: float = 0.0
    together_voxels: int = TOGETHER_VOXELS
    together_rows: int = TOGETHER_ROWS

    def __len__(self) -> int:
        return self.n

    @property
    def volume_ml(self) -> float:
        """Volume of all of them."""
        return int(self.sizes.sum(dtype=np.int64)) * voxel_volume_mm3(self.image) / 1000

    @property
    def most_voxels(self) -> int:
        """Voxels of the largest of them."""
        return int(self.sizes.max(initial=0))

    @property
    def warning(self) -> str:
        """Warning for every table and page that shows numbers of the scan."""
        n_full = self.n_lesions - self.n
        reason = f"{format_thousands(self.n_lesions)} components"
        if self.scans_in_boxes:
            boxes = f"the boxes round {format_thousands(self.n_lesions)} lesions"
            reason = f"{boxes} would fill the scan {self.scans_in_boxes:.0f} times"
        limit = f"only the {format_thousands(n_full)} largest have every column"
        return f"{SPECKS}: {reason}: this mask looks like noise; {limit}"

    @property
    def touches_border(self) -> bool:
        """True if any lesion of the scan touches the border."""
        ends = ((axis, end) for axis in range(3) for end in (0, -1))
        return any(bool(np.moveaxis(self.ids, axis, 0)[end].any()) for axis, end in ends)

    @property
    def may_be_measurable(self) -> bool:
        """True if one of them may be long enough to be measurable.

        In a connected lesion, each voxel adds at most the diagonal of its face.
        """
        matrix = CanonicalScan.of(self.image, self.ids, None).geometry.voxel_steps_mm
        diagonals = (matrix[:, 0] + matrix[:, 1], matrix[:, 0] - matrix[:, 1])
        diagonal_mm = max(float(np.linalg.norm(diagonal)) for diagonal in diagonals)
        is_connected = self.connectivity is not None
        return not (is_connected and self.most_voxels * diagonal_mm < MEASURABLE_MM - ROUNDING_MM)

    def __iter__(self) -> Iterator[LesionMeasurement]:
        scan = CanonicalScan.of(self.image, self.ids, self.confidence)
        for start, stop in self._ranges():
            yield from self._rows(scan, start, stop)

    def _unmeasured(self) -> list[str]:
        """Return the columns, or groups of columns, that only the largest lesions have."""
        is_scored = self.settings.calcium and self.unit == HU and not self.unit_doubt
        return [
            "form",
            "axes",
            "nearest_lesion_mm",
            "intensity_mean_eroded1",
            *(["volume_expected_ml"] if self.confidence is not None else []),
            *(["calcium"] if is_scored else []),
            *(["class"] if self.has_classes and not self.unit_doubt else []),
        ]

    def _ranges(self) -> Iterator[tuple[int, int]]:
        """Yield ranges of lesion numbers that are measured together."""
        start = 1
        while start < len(self.sizes):
            voxels = self.sizes[start : start + self.together_rows].cumsum(dtype=np.int64)
            stop = start + max(1, int(np.searchsorted(voxels, self.together_voxels, "right")))
            if self.sizes[start:stop].any():
                yield start, stop
            start = stop

    def _rows(self, scan: CanonicalScan, start: int, stop: int) -> Iterator[LesionMeasurement]:
        sizes = self.sizes[start:stop]
        filled = np.flatnonzero(sizes)
        numbers, counts, n = filled + start, sizes[filled].astype(np.int64), len(filled)
        extents, intensity_values, confidence_values = _collect(scan, start, sizes)
        voxel_mm3 = voxel_volume_mm3(self.image)
        doubt_note, settings = "", self.settings
        if self.unit_doubt:
            doubt_note = withheld(self.unit_doubt, settings, has_classes=self.has_classes)
            settings = settings.model_copy(update={"calcium": False})
        unit = "" if self.unit_doubt else self.unit
        intensities = intensity_columns(intensity_values, voxel_mm3, unit, settings)
        confidences: list[tuple[dict[str, Any], str]] = [({"confidence_mean": None}, "")] * n
        if confidence_values is not None:
            confidences = confidence_columns(confidence_values, None, voxel_mm3)
        low, high = extents.low[:, filled], extents.high[:, filled]
        shape = np.array(scan.ids.shape)[:, None]
        touches = ((low == 0) | (high == shape - 1)).any(axis=0).tolist()
        centroids_mm = centres_mm((extents.sums[:, filled] / counts).T, scan.geometry).tolist()
        reach = np.abs(scan.geometry.voxel_steps_mm).sum(axis=1)[:, None] / 2
        low_mm = (extents.low_mm[:, filled] - reach).T
        high_mm = (extents.high_mm[:, filled] + reach).T
        del extents, intensity_values, confidence_values
        shared: dict[str, Any] = {
            "case_id": self.case_id,
            "intensity_unit": self.unit,
            "connectivity": self.connectivity,
            "model": self.model,
            "volseg_version": __version__,
            **NO_CLASS,
            **{f"spacing_{axis}_mm": mm for axis, mm in zip("ras", scan.spacing_mm)},
        }
        n_full, n_all = map(format_thousands, (self.n_lesions - self.n, self.n_lesions))
        largest = f"only the {n_full} largest of {n_all}"
        size_note = f"{', '.join(self._unmeasured())}: not measured, since {largest} lesions are"
        for index, (number, size) in enumerate(zip(numbers.tolist(), counts.tolist())):
            label = int(self.labels[number - 1])
            intensity, note = intensities[index]
            confidence, confidence_note = confidences[index]
            r, a, s = centroids_mm[index]
            name_note = (
                "" if label in self.label_names else f"label_name: value {label} has no name"
            )
            notes = (name_note, doubt_note, note, confidence_note, size_note)
            yield LesionMeasurement(
                **shared,
                lesion_id=number,
                label=label,
                label_name=self.label_names.get(label),
                n_voxels=size,
                volume_mm3=size * voxel_mm3,
                volume_ml=size * voxel_mm3 / 1000,
                equiv_sphere_diameter_mm=equivalent_diameter_mm(size * voxel_mm3),
                **intensity,
                **confidence,
                centroid_r_mm=r,
                centroid_a_mm=a,
                centroid_s_mm=s,
                touches_border=touches[index],
                bbox_min_ras=point_text(low_mm[index]),
                bbox_max_ras=point_text(high_mm[index]),
                notes="; ".join(filter(None, notes)),
            )


class _Extents:
    """Extents of L lesions along R, A, S, in voxels and mm; voxels are added slab by slab."""

    def __init__(self, n: int, affine: np.ndarray) -> None:
        self._affine = affine
        self.sums = np.zeros((3, n))  # of indices
        self.low = np.full((3, n), np.iinfo(np.int32).max, np.int32)
        self.high = np.full((3, n), -1, np.int32)
        # Of voxel centres.
        self.low_mm, self.high_mm = np.full((3, n), np.inf), np.full((3, n), -np.inf)

    def add(self, lesion: np.ndarray, index: Sequence[np.ndarray]) -> None:
        """Add M voxels: the lesion (M,) of each, and its index (M,) along each axis."""
        for axis in range(3):
            self.sums[axis] += np.bincount(lesion, index[axis], minlength=self.sums.shape[1])
            np.minimum.at(self.low[axis], lesion, index[axis].astype(np.int32))
            np.maximum.at(self.high[axis], lesion, index[axis].astype(np.int32))
            i, j, k, origin = self._affine[axis].tolist()
            mm = i * index[0] + j * index[1] + k * index[2] + origin
            np.minimum.at(self.low_mm[axis], lesion, mm)
            np.maximum.at(self.high_mm[axis], lesion, mm)


def _collect(
    scan: CanonicalScan, start: int, sizes: np.ndarray
) -> tuple[_Extents, Ragged, Ragged | None]:
    """Collect the voxels of the lesions from number `start` on that have voxels in `sizes`.

    A single lesion may fill a large part of the scan, so only its stored values are collected.

    Returns:
        Extents, intensities and confidence of the lesions.
    """
    n, stop, n_collected = int(sizes.sum(dtype=np.int64)), start + len(sizes), 0
    extents, numbers = _Extents(len(sizes), scan.geometry.affine), np.empty(0, np.int32)
    if len(sizes) > 1:
        numbers = np.empty(n, np.int32)
    stored = np.empty(n, scan.image.array.dtype)
    confidence = None if scan.confidence is None else np.empty(n, scan.confidence.dtype)
    has_gaps = not sizes.all()
    for slab in slabs_of(scan.ids, SLAB_VOXELS):
        ids = scan.ids[slab]
        is_member = (ids >= start) & (ids < stop)
        if has_gaps:
            is_member[is_member] = sizes[ids[is_member] - start] > 0
        voxels = np.nonzero(is_member)
        piece = slice(n_collected, n_collected + len(voxels[0]))
        lesion = ids[voxels].astype(np.int64) - start
        extents.add(lesion, [along + side.start for along, side in zip(voxels, slab, strict=True)])
        stored[piece] = scan.image.array[slab][voxels]
        if len(sizes) > 1:
            numbers[piece] = lesion
        if confidence is not None and scan.confidence is not None:
            confidence[piece] = scan.confidence[slab][voxels]
        n_collected = piece.stop
    if len(sizes) == 1:
        confidences = None if confidence is None else Ragged.of([confidence])
        return extents, Ragged.of([stored], scan.image), confidences
    counts = sizes[sizes > 0].astype(np.int64)
    starts = np.cumsum(counts) - counts
    values = scan.image.intensities(stored)
    intensities = Ragged(values[np.lexsort((values, numbers))], starts, counts)
    if confidence is None:
        return extents, intensities, None
    confidence = confidence[np.lexsort((confidence, numbers))]
    return extents, intensities, Ragged(confidence, starts, counts)


@dataclass(frozen=True, slots=True, eq=False)
class MeasuredLesions:
    """Lesions of a scan: the largest with every column, the others measured on iteration."""

    largest: Sequence[LesionMeasurement]
    specks: Specks | None = None

    def __len__(self) -> int:
        return len(self.largest) + len(self.specks or ())

    def __iter__(self) -> Iterator[LesionMeasurement]:
        """Yield all rows by number, without keeping those of specks."""
        return merge(self.largest, self.specks or (), key=attrgetter("lesion_id"))

    @property
    def touches_border(self) -> bool:
        """True if any lesion touches the border."""
        if any(lesion.touches_border for lesion in self.largest):
            return True
        return self.specks is not None and self.specks.touches_border


def measure_largest(
    image: Volume,
    ids: np.ndarray,
    labels: Sequence[int],
    *,
    case_id: str,
    label_names: Mapping[int, str],
    intensity_unit: str,
    unit_doubt: str = "",
    confidence: np.ndarray | None = None,
    classes: Sequence[Mapping[str, float] | None] | None = None,
    settings: Measure = DEFAULTS,
    connectivity: int | None = None,
    model: str | None = None,
    most: int = MANY,
    most_boxes: int | None = None,
) -> MeasuredLesions:
    """Measure the lesions of a scan in bounded memory and time, whatever their number and spread.

    Args:
        most: number of lesions measured in full: the largest; of equal ones, the first.
        most_boxes: voxels that the boxes of these lesions may have in total; None: 16 times those
            of the scan, but at least 2²⁴.
        classes: of at least the lesions measured in full, in the order of all lesions.

    The other arguments are those of `measure_lesions`.

    Returns:
        Within both limits, all rows are those of `measure_lesions`. Beyond, the largest lesions
        have the same rows as without limits; the others have the columns that a single pass over
        the scan gives, and say in `notes` what was not measured.

    Memory on top of the scan, the ids and the confidence: itemsize + 2 bytes per voxel of the
    largest lesion, 8 bytes per lesion, 10 kB per lesion measured in full, and 150 MB.
    """
    n = len(labels)
    most_boxes = max(FEW_BOXES, BOXES * ids.size) if most_boxes is None else most_boxes
    only, sizes, in_boxes = _split(ids, n, most, most_boxes)
    options: dict[str, Any] = {"case_id": case_id, "label_names": label_names, "settings": settings}
    options |= {"unit_doubt": unit_doubt, "connectivity": connectivity, "model": model}
    largest = measure_lesions(
        image,
        ids,
        labels,
        intensity_unit=intensity_unit,
        confidence=confidence,
        classes=classes,
        only=only,
        **options,
    )
    if only is None:
        return MeasuredLesions(largest)
    specks = Specks(
        image=image,
        ids=ids,
        confidence=confidence,
        labels=labels,
        unit=intensity_unit,
        has_classes=classes is not None,
        sizes=sizes,
        n=n - len(largest),
        n_lesions=n,
        scans_in_boxes=in_boxes / ids.size,
        **options,
    )
    return MeasuredLesions(largest, specks)


def _split(
    ids: np.ndarray, n: int, most: int, most_boxes: int
) -> tuple[np.ndarray | None, np.ndarray, int]:
    """Choose the lesions to measure in full.

    Returns:
        Their numbers (M,), None for all; voxels (n + 1,) of the other lesions, 0 for those
        measured in full; and the voxels in all boxes if these exceed the limit, else 0.
    """
    sizes, only = np.zeros(n + 1, np.uint32), None
    if n > most:
        for slab in slabs_of(ids, SLAB_VOXELS):
            np.add.at(sizes, ids[slab].ravel("K"), np.uint32(1))
        sizes[0] = 0
        only = np.flatnonzero(by_size(sizes) <= most)[1:]
    elif n * ids.size <= most_boxes:
        return None, sizes, 0
    counts, boxes = sizes_and_boxes(ids, only, n)
    numbers = np.arange(1, n + 1) if only is None else only
    sizes[numbers] = counts
    order = np.argsort(-counts, kind="stable")
    kept = order[: max(1, np.count_nonzero(np.cumsum(boxes[order]) <= most_boxes))]
    full = np.sort(numbers[kept])
    sizes[full] = 0
    in_boxes = 0 if len(full) == len(numbers) else int(boxes.sum())
    return None if len(full) == n else full, sizes, in_boxes

"""Lesions of noise: the largest are measured in full, the others in one look at the scan.

No patient has more than 10 000 lesions, nor hundreds that each spread over the whole scan. Forms
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
from volseg.measure.lesions import (
    AS_USUAL,
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
from volseg.measure.ragged import Ragged
from volseg.measure.recist import MEASURABLE_MM, ROUNDING_MM
from volseg.measure.rows import LesionMeasurement
from volseg.measure.shape import equivalent_diameter_mm
from volseg.measure.units import HU
from volseg.postprocess.components import by_size
from volseg.postprocess.lesions import MANY
from volseg.recipe import Measure
from volseg.volume import Volume, slabs_of
from volseg.words import spaced

SPECKS = "W_SPECKS"  # code of the warning that a mask looks like noise
TOGETHER_VOXELS = 2**20  # of lesions that are looked at together
TOGETHER_ROWS = 2**17
SLAB_VOXELS = 2**20
BOXES = 16  # times the voxels of the scan that the boxes of lesions measured in full may have
FEW_BOXES = 2**24  # voxels that they may have in any case


@dataclass(frozen=True, kw_only=True, eq=False)
class Specks:
    """The lesions of a scan that are not among its largest. Iterating over them makes their rows, some at a time.

    Args:
        image, ids, confidence, labels, case_id, label_names, unit, unit_doubt, settings, connectivity, model: as `measure_largest` got them.
        has_classes: whether the largest have a class.
        sizes: (N + 1,) voxels of each lesion of the scan; 0 for those that are measured in full, and for 0.
        n: of them. n_lesions: all lesions of the scan.
        scans_in_boxes: how often the boxes of all lesions would fill the scan, where that is why;
            0 where it is their number.
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
        """Of all of them."""
        return int(self.sizes.sum(dtype=np.int64)) * voxel_volume_mm3(self.image) / 1000

    @property
    def most_voxels(self) -> int:
        """Of the largest of them."""
        return int(self.sizes.max(initial=0))

    @property
    def warning(self) -> str:
        """What a reader of any number of the scan must know."""
        n_full = self.n_lesions - self.n
        lesions = f"{spaced(self.n_lesions)} components"
        if self.scans_in_boxes:
            lesions = f"the boxes round {spaced(self.n_lesions)} lesions would fill the scan {self.scans_in_boxes:.0f} times"
        return f"{SPECKS}: {lesions}: this mask looks like noise; only the {spaced(n_full)} largest have every column"

    @property
    def touches_border(self) -> bool:
        """Whether any lesion of the scan does."""
        ends = ((axis, at) for axis in range(3) for at in (0, -1))
        return any(bool(np.moveaxis(self.ids, axis, 0)[at].any()) for axis, at in ends)

    @property
    def may_be_measurable(self) -> bool:
        """Whether one of them may be long enough to be measurable: each voxel adds at most the diagonal of its face."""
        matrix = CanonicalScan.of(self.image, self.ids, None).geometry.affine[:3, :3]
        diagonal_mm = max(
            float(np.linalg.norm(matrix[:, 0] + sign * matrix[:, 1])) for sign in (1, -1)
        )
        connected = self.connectivity is not None
        return not (connected and self.most_voxels * diagonal_mm < MEASURABLE_MM - ROUNDING_MM)

    def __iter__(self) -> Iterator[LesionMeasurement]:
        scan = CanonicalScan.of(self.image, self.ids, self.confidence)
        for start, stop in self._ranges():
            yield from self._rows(scan, start, stop)

    def _unmeasured(self) -> list[str]:
        """What rows of the largest hold and those of the others do not."""
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
        """Numbers of lesions that are looked at together."""
        start = 1
        while start < len(self.sizes):
            some = self.sizes[start : start + self.together_rows]
            stop = start + max(
                1, int(np.searchsorted(some.cumsum(dtype=np.int64), self.together_voxels, "right"))
            )
            if self.sizes[start:stop].any():
                yield start, stop
            start = stop

    def _rows(self, scan: CanonicalScan, start: int, stop: int) -> Iterator[LesionMeasurement]:
        sizes = self.sizes[start:stop]
        at = np.flatnonzero(sizes)
        numbers, counts, n = at + start, sizes[at].astype(np.int64), len(at)
        places, intensities_of, confidence_of = _looked_at(scan, start, sizes)
        volume_mm3 = voxel_volume_mm3(self.image)  # of a voxel
        doubt_note, settings = "", self.settings
        if self.unit_doubt:
            doubt_note = withheld(self.unit_doubt, settings, has_classes=self.has_classes)
            settings = settings.model_copy(update={"calcium": False})
        unit = "" if self.unit_doubt else self.unit
        intensities = intensity_columns(intensities_of, volume_mm3, unit, settings)
        trusts: list[tuple[dict[str, Any], str]] = [({"confidence_mean": None}, "")] * n
        if confidence_of is not None:
            trusts = confidence_columns(confidence_of, None, volume_mm3)
        low, high = places.low[:, at], places.high[:, at]
        shape = np.array(scan.ids.shape)[:, None]
        touches = ((low == 0) | (high == shape - 1)).any(axis=0).tolist()
        centroids_mm = centres_mm((places.sums[:, at] / counts).T, scan.geometry).tolist()
        reach = np.abs(scan.geometry.affine[:3, :3]).sum(axis=1)[:, None] / 2
        low_mm, high_mm = (places.low_mm[:, at] - reach).T, (places.high_mm[:, at] + reach).T
        del places, intensities_of, confidence_of
        shared: dict[str, Any] = {
            "case_id": self.case_id,
            "intensity_unit": self.unit,
            "connectivity": self.connectivity,
            "model": self.model,
            "volseg_version": __version__,
            **NO_CLASS,
            **{f"spacing_{axis}_mm": mm for axis, mm in zip("ras", scan.spacing_mm)},
        }
        why = (
            f"{', '.join(self._unmeasured())}: not measured, since only the {spaced(self.n_lesions - self.n)} largest of "
            f"{spaced(self.n_lesions)} lesions are"
        )
        for at, (number, size) in enumerate(zip(numbers.tolist(), counts.tolist())):
            label = int(self.labels[number - 1])
            intensity, note = intensities[at]
            trust, trust_note = trusts[at]
            r, a, s = centroids_mm[at]
            unnamed = "" if label in self.label_names else f"label_name: value {label} has no name"
            yield LesionMeasurement(
                **shared,
                lesion_id=number,
                label=label,
                label_name=self.label_names.get(label),
                n_voxels=size,
                volume_mm3=size * volume_mm3,
                volume_ml=size * volume_mm3 / 1000,
                equiv_sphere_diameter_mm=equivalent_diameter_mm(size * volume_mm3),
                **intensity,
                **trust,
                centroid_r_mm=r,
                centroid_a_mm=a,
                centroid_s_mm=s,
                touches_border=touches[at],
                bbox_min_ras=point_text(low_mm[at]),
                bbox_max_ras=point_text(high_mm[at]),
                notes="; ".join(filter(None, (unnamed, doubt_note, note, trust_note, why))),
            )


class _Places:
    """Where each of L lesions lies along R, A, S, in voxels and mm; voxels are added by slab."""

    def __init__(self, n: int, affine: np.ndarray) -> None:
        self._affine = affine
        self.sums = np.zeros((3, n))  # of indices
        self.low, self.high = (
            np.full((3, n), np.iinfo(np.int32).max, np.int32),
            np.full((3, n), -1, np.int32),
        )
        self.low_mm, self.high_mm = (
            np.full((3, n), np.inf),
            np.full((3, n), -np.inf),
        )  # of voxel centres

    def add(self, lesion: np.ndarray, index: Sequence[np.ndarray]) -> None:
        """(M,) which lesion each voxel belongs to, and (M,) where it lies along each axis."""
        for axis in range(3):
            self.sums[axis] += np.bincount(lesion, index[axis], minlength=self.sums.shape[1])
            np.minimum.at(self.low[axis], lesion, index[axis].astype(np.int32))
            np.maximum.at(self.high[axis], lesion, index[axis].astype(np.int32))
            i, j, k, origin = self._affine[axis].tolist()
            mm = i * index[0] + j * index[1] + k * index[2] + origin
            np.minimum.at(self.low_mm[axis], lesion, mm)
            np.maximum.at(self.high_mm[axis], lesion, mm)


def _looked_at(
    scan: CanonicalScan, start: int, sizes: np.ndarray
) -> tuple[_Places, Ragged, Ragged | None]:
    """Look at the lesions from number `start` on that have voxels in `sizes`.

    Of a single lesion, which may be a large part of the scan, nothing grows but its stored values.

    Returns:
        Their places, intensities and confidence.
    """
    n, stop, at = int(sizes.sum(dtype=np.int64)), start + len(sizes), 0
    places, numbers = _Places(len(sizes), scan.geometry.affine), np.empty(0, np.int32)
    if len(sizes) > 1:
        numbers = np.empty(n, np.int32)
    stored = np.empty(n, scan.image.array.dtype)
    confidence = None if scan.confidence is None else np.empty(n, scan.confidence.dtype)
    skips = not sizes.all()
    for slab in slabs_of(scan.ids, SLAB_VOXELS):
        ids = scan.ids[slab]
        is_wanted = (ids >= start) & (ids < stop)
        if skips:
            is_wanted[is_wanted] = sizes[ids[is_wanted] - start] > 0
        voxels = np.nonzero(is_wanted)
        piece = slice(at, at + len(voxels[0]))
        lesion = ids[voxels].astype(np.int64) - start
        places.add(lesion, [along + side.start for along, side in zip(voxels, slab, strict=True)])
        stored[piece] = scan.image.array[slab][voxels]
        if len(sizes) > 1:
            numbers[piece] = lesion
        if confidence is not None and scan.confidence is not None:
            confidence[piece] = scan.confidence[slab][voxels]
        at = piece.stop
    if len(sizes) == 1:
        return (
            places,
            Ragged.of([stored], scan.image),
            None if confidence is None else Ragged.of([confidence]),
        )
    counts = sizes[sizes > 0].astype(np.int64)
    starts = np.cumsum(counts) - counts
    values = scan.image.intensities(stored)
    intensities = Ragged(values[np.lexsort((values, numbers))], starts, counts)
    if confidence is None:
        return places, intensities, None
    return (
        places,
        intensities,
        Ragged(confidence[np.lexsort((confidence, numbers))], starts, counts),
    )


@dataclass(frozen=True, slots=True, eq=False)
class MeasuredLesions:
    """The lesions of a scan: the largest with every column, and the others, whose rows are made when they are asked for."""

    largest: Sequence[LesionMeasurement]
    specks: Specks | None = None

    def __len__(self) -> int:
        return len(self.largest) + len(self.specks or ())

    def __iter__(self) -> Iterator[LesionMeasurement]:
        """All rows, by number; each only as long as it is looked at."""
        return merge(self.largest, self.specks or (), key=attrgetter("lesion_id"))

    @property
    def touches_border(self) -> bool:
        """Whether any of them does."""
        return any(lesion.touches_border for lesion in self.largest) or (
            self.specks is not None and self.specks.touches_border
        )


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
    settings: Measure = AS_USUAL,
    connectivity: int | None = None,
    model: str | None = None,
    most: int = MANY,
    most_boxes: int | None = None,
) -> MeasuredLesions:
    """Measure the lesions of a scan in bounded memory and time, however many and however spread.

    Args:
        most: lesions that are measured in full, the largest; of equal ones the first.
        most_boxes: voxels that the boxes round these lesions may have together; None: 16 times
            those of the scan, or 2²⁴ if that is more.
        classes: of these lesions at least, the first of all.
        The others are those of `measure_lesions`.

    Returns:
        Within both limits all rows are those of `measure_lesions`. Of more, the largest have the same rows as without the limit; the
        others have the columns that one look at the scan gives, and say in `notes` that the others were not measured.

    Memory: beside the scan, the ids and the confidence 2 + the bytes of a voxel for each voxel of the largest lesion, 8 bytes per lesion,
    some 10 kB per lesion measured in full, and some 150 MB.
    """
    n = len(labels)
    only, sizes, in_boxes = _split(
        ids, n, most, max(FEW_BOXES, BOXES * ids.size) if most_boxes is None else most_boxes
    )
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
    """Choose the lesions that are measured in full.

    Returns:
        (M,) their numbers, None for all; (n + 1,) voxels of the others, 0 for those in full; and
        the voxels in all boxes, where those are why there are others, else 0.
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
    return (
        None if len(full) == n else full,
        sizes,
        0 if len(full) == len(numbers) else int(boxes.sum()),
    )

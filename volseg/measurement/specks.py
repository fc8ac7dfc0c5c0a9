"""Masks that look like noise: the largest lesions are measured in full, the others in one pass.

No patient has more than 10 000 lesions, nor hundreds that each spread over the whole scan. Shapes
are measured in a box round each lesion, so time grows with the boxes: those of the organs in a CT
fill it about twice, those of 117 random values 117 times.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from heapq import merge
from operator import attrgetter

import numpy as np

from volseg.measurement import confidence, intensities
from volseg.measurement.cells import Cells, LesionRows, point_cells
from volseg.measurement.extents import SLAB_VOXELS, Extents, centroids_and_boxes
from volseg.measurement.lesions import measure_lesions
from volseg.measurement.ragged import Ragged
from volseg.measurement.recist import MEASURABLE_MM, ROUNDING_MM
from volseg.measurement.rows import LesionMeasurement
from volseg.measurement.scan import Box, CanonicalScan, SegmentedScan, n_voxels_of
from volseg.postprocessing.components import by_size
from volseg.postprocessing.lesions import MANY, Lesions, centres_mm
from volseg.volume import Volume, slabs_of
from volseg.words import format_thousands

SPECKS = "W_SPECKS"  # code of the warning that a mask looks like noise
TOGETHER_VOXELS = 2**20  # of lesions measured together
TOGETHER_ROWS = 2**17
# Voxels in the boxes of lesions measured in full: at most 16 scans, but always 2²⁴.
BOXES, FEW_BOXES = 16, 2**24


@dataclass(frozen=True, kw_only=True, eq=False)
class Specks:
    """Lesions of a scan that are not among its largest; iterating measures them in batches.

    Args:
        sizes: (N + 1,) voxels of each lesion of the scan; 0 for index 0 and for lesions measured
            in full.
        scans_in_boxes: how often the boxes of all lesions would fill the scan, if that is the
            reason; 0 if the reason is their number.
    """

    scan: SegmentedScan
    sizes: np.ndarray
    scans_in_boxes: float = 0.0
    together_voxels: int = TOGETHER_VOXELS
    together_rows: int = TOGETHER_ROWS

    @cached_property
    def n(self) -> int:
        """Number of these lesions."""
        return int(np.count_nonzero(self.sizes))

    def __len__(self) -> int:
        return self.n

    @property
    def n_lesions(self) -> int:
        """Number of all lesions of the scan."""
        return len(self.sizes) - 1

    @property
    def volume_ml(self) -> float:
        """Volume of all of them."""
        return int(self.sizes.sum(dtype=np.int64)) * self.scan.voxel_mm3 / 1000

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
        ids = self.scan.lesions.ids
        ends = ((axis, end) for axis in range(3) for end in (0, -1) if ids.shape[axis] > 1)
        return any(bool(np.moveaxis(ids, axis, 0)[end].any()) for axis, end in ends)

    @property
    def may_be_measurable(self) -> bool:
        """True if one of them may be long enough to be measurable.

        In a connected lesion, each voxel adds at most the diagonal of its face.
        """
        matrix = CanonicalScan.of(self.scan).matrix
        diagonals = (matrix[:, 0] + matrix[:, 1], matrix[:, 0] - matrix[:, 1])
        diagonal_mm = max(float(np.linalg.norm(diagonal)) for diagonal in diagonals)
        is_connected = self.scan.lesions.connectivity is not None
        return not (is_connected and self.most_voxels * diagonal_mm < MEASURABLE_MM - ROUNDING_MM)

    def __iter__(self) -> Iterator[LesionMeasurement]:
        view = CanonicalScan.of(self.scan)
        rows = LesionRows(view)
        n_full, n_all = map(format_thousands, (self.n_lesions - self.n, self.n_lesions))
        why = f"not measured, since only the {n_full} largest of {n_all} lesions are"
        unmeasured = Cells({}, f"{', '.join(self._unmeasured())}: {why}")
        for start, stop in self._ranges():
            lesions = _measured(view, start, self.sizes[start:stop])
            for number, size, centroid_mm, cells in lesions:
                yield rows.row(number, size, centroid_mm, (*cells, unmeasured))

    def _unmeasured(self) -> list[str]:
        """Return the columns, or groups of columns, that only the largest lesions have."""
        scan = self.scan
        return [
            "form",
            "axes",
            "nearest_lesion_mm",
            "intensity_mean_eroded1",
            *(["volume_expected_ml"] if scan.confidence is not None else []),
            *(["suv_peak"] if scan.unit.is_suv else []),
            *(["calcium"] if scan.is_calcium_scored else []),
            *(["class"] if scan.classes is not None and not scan.unit.doubt else []),
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


def _measured(
    view: CanonicalScan, start: int, sizes: np.ndarray
) -> Iterator[tuple[int, int, list[float], list[Cells]]]:
    """Measure the lesions from number `start` on that have voxels in `sizes`.

    Yields:
        Number, voxels, centroid in mm and columns of each.
    """
    filled = np.flatnonzero(sizes)
    counts = sizes[filled].astype(np.int64)
    extents, values, confidence_values = _collect(view, start, sizes)
    centroids = (extents.sums[:, filled] / counts).T
    cells = [_place_cells(view, extents, filled), intensities.value_cells(values, view)]
    if confidence_values is not None:
        cells.append(confidence.value_cells(confidence_values))
    del extents, values, confidence_values
    centroids_mm = centres_mm(centroids, view.image.geometry).tolist()
    numbers = (filled + start).tolist()
    for number, size, centroid_mm, *columns in zip(numbers, counts.tolist(), centroids_mm, *cells):
        yield number, size, centroid_mm, columns


class _Extents(Extents):
    """Extents of N lesions, also in mm, from the centres of their voxels."""

    def __init__(self, n: int, affine: np.ndarray) -> None:
        super().__init__(n)
        self._affine = affine
        self.low_mm, self.high_mm = np.full((3, n), np.inf), np.full((3, n), -np.inf)

    def add(self, lesion: np.ndarray, index: Sequence[np.ndarray]) -> None:
        super().add(lesion, index)
        for axis in range(3):
            i, j, k, origin = self._affine[axis].tolist()
            mm = i * index[0] + j * index[1] + k * index[2] + origin
            np.minimum.at(self.low_mm[axis], lesion, mm)
            np.maximum.at(self.high_mm[axis], lesion, mm)


def _place_cells(view: CanonicalScan, extents: _Extents, filled: np.ndarray) -> Iterator[Cells]:
    """Return where each of the `filled` lesions lies."""
    low, high = extents.low[:, filled], extents.high[:, filled]
    sizes = np.array(view.ids.shape)[:, None]
    touches = ((low == 0) | (high == sizes - 1)) & (sizes > 1)
    reach = np.abs(view.matrix).sum(axis=1)[:, None] / 2
    low_mm, high_mm = extents.low_mm[:, filled] - reach, extents.high_mm[:, filled] + reach
    for touches_border, low, high in zip(touches.any(axis=0).tolist(), low_mm.T, high_mm.T):
        corners = point_cells("bbox_min", low) | point_cells("bbox_max", high)
        yield Cells(corners | {"touches_border": touches_border})


def _collect(
    view: CanonicalScan, start: int, sizes: np.ndarray
) -> tuple[_Extents, Ragged, Ragged | None]:
    """Return extents, intensities and confidence of the lesions that have voxels in `sizes`.

    A single lesion may fill a large part of the scan, so only its stored values are collected.
    """
    n, n_collected = int(sizes.sum(dtype=np.int64)), 0
    extents = _Extents(len(sizes), view.image.geometry.affine)
    numbers = np.empty(n if len(sizes) > 1 else 0, np.int32)
    arrays = [view.image.array, *([] if view.confidence is None else [view.confidence])]
    collected = [np.empty(n, array.dtype) for array in arrays]
    for slab, voxels, lesion in _members(view.ids, start, sizes):
        piece = slice(n_collected, n_collected + len(lesion))
        extents.add(lesion, [along + side.start for along, side in zip(voxels, slab, strict=True)])
        if numbers.size:
            numbers[piece] = lesion
        for values, array in zip(collected, arrays, strict=True):
            values[piece] = array[slab][voxels]
        n_collected = piece.stop
    counts = sizes[sizes > 0].astype(np.int64)
    stored = collected.pop(0)
    intensity_values = _grouped(stored, numbers, counts, view.image)
    del stored
    confidence_values = _grouped(collected[0], numbers, counts) if collected else None
    return extents, intensity_values, confidence_values


def _members(
    ids: np.ndarray, start: int, sizes: np.ndarray
) -> Iterator[tuple[Box, tuple[np.ndarray, ...], np.ndarray]]:
    """Yield slabs of the scan, with the index of each voxel of the lesions and its lesion, from 0.

    The lesions are those from number `start` on that have voxels in `sizes`.
    """
    has_gaps = not sizes.all()
    for slab in slabs_of(ids, SLAB_VOXELS):
        part = ids[slab]
        is_member = (part >= start) & (part < start + len(sizes))
        if has_gaps:
            is_member[is_member] = sizes[part[is_member] - start] > 0
        voxels = np.nonzero(is_member)
        yield slab, voxels, part[voxels].astype(np.int64) - start


def _grouped(
    values: np.ndarray, numbers: np.ndarray, counts: np.ndarray, image: Volume | None = None
) -> Ragged:
    """Group stored values (N,) by the lesion of each; `numbers` is empty for a single lesion."""
    if not numbers.size:
        return Ragged.of([values], image)
    values = values if image is None else image.intensities(values)
    return Ragged(values[np.lexsort((values, numbers))], np.cumsum(counts) - counts, counts)


@dataclass(frozen=True, slots=True, eq=False)
class MeasuredLesions:
    """Lesions of a scan: the largest with every column, the others measured on iteration.

    `scan` has no confidence, unless it is needed to measure the others.
    """

    scan: SegmentedScan
    largest: Sequence[LesionMeasurement]
    specks: Specks | None = None

    def __len__(self) -> int:
        return len(self.largest) + len(self.specks or ())

    def __iter__(self) -> Iterator[LesionMeasurement]:
        """Yield all rows by number, without keeping those of specks."""
        return merge(self.largest, self.specks or (), key=attrgetter("lesion_id"))

    @property
    def lesion_ids(self) -> Volume:
        """Number of the lesion in each voxel, 1 for the largest."""
        return self.scan.image.with_array(self.scan.lesions.ids)

    @property
    def touches_border(self) -> bool:
        """True if any lesion touches the border."""
        if any(lesion.touches_border for lesion in self.largest):
            return True
        return self.specks is not None and self.specks.touches_border


def measure_largest(
    scan: SegmentedScan, *, most: int = MANY, most_boxes: int | None = None
) -> MeasuredLesions:
    """Measure the lesions of a scan in bounded memory and time, whatever their number and spread.

    Args:
        most: number of lesions measured in full: the largest; of equal ones, the first.
        most_boxes: voxels that the boxes of these lesions may have in total; None: 16 times those
            of the scan, but at least 2²⁴.

    Returns:
        Within both limits, all rows are those of `measure_lesions`. Beyond, the largest lesions
        have the same rows as without limits; the others have the columns that a single pass over
        the scan gives, and say in `notes` what was not measured.

    Memory on top of the scan, the ids and the confidence: itemsize + 2 bytes per voxel of the
    largest lesion, 8 bytes per lesion, 10 kB per lesion measured in full, and 150 MB.
    """
    n_voxels = scan.lesions.ids.size
    most_boxes = max(FEW_BOXES, BOXES * n_voxels) if most_boxes is None else most_boxes
    only, sizes, in_boxes = _split(scan.lesions, most, most_boxes)
    largest = measure_lesions(scan, only=only)
    if only is None:
        return MeasuredLesions(replace(scan, confidence=None), largest)
    specks = Specks(scan=scan, sizes=sizes, scans_in_boxes=in_boxes / n_voxels)
    return MeasuredLesions(scan, largest, specks)


def _split(
    lesions: Lesions, most: int, most_boxes: int
) -> tuple[np.ndarray | None, np.ndarray, int]:
    """Choose the lesions to measure in full.

    Returns:
        Their numbers (M,), None for all; voxels (n + 1,) of the other lesions, 0 for those
        measured in full; and the voxels in all boxes if these exceed the limit, else 0.
    """
    n = len(lesions.labels)
    sizes, only = np.zeros(n + 1, np.uint32), None
    sizes[1:] = lesions.n_voxels
    if n > most:
        only = np.flatnonzero(by_size(sizes) <= most)[1:]
    elif n * lesions.ids.size <= most_boxes:
        return None, sizes, 0
    _, boxes = centroids_and_boxes(lesions, only)
    in_box = np.array([n_voxels_of(box) for box in boxes], np.int64)
    numbers = np.arange(1, n + 1) if only is None else only
    order = np.argsort(-sizes[numbers].astype(np.int64), kind="stable")
    kept = order[: max(1, np.count_nonzero(np.cumsum(in_box[order]) <= most_boxes))]
    full = np.sort(numbers[kept])
    sizes[full] = 0
    total = 0 if len(full) == len(numbers) else int(in_box.sum())
    return None if len(full) == n else full, sizes, total

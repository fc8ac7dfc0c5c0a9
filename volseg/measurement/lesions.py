"""Scan and numbered lesions → one row of numbers per lesion.

Everything is measured on the scan's own grid and in its original intensities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from volseg import __version__
from volseg.measurement.density import SCHNEIDER, agatston, core, density_g_cm3, statistics
from volseg.measurement.nearest import NearestLesion
from volseg.measurement.ragged import Ragged
from volseg.measurement.recist import Diameters, diameters, is_measurable, sum_of_diameters_mm
from volseg.measurement.rows import LesionMeasurement
from volseg.measurement.shape import (
    axes_mm,
    equivalent_diameter_mm,
    gaps_mm,
    mesh,
    outermost_points,
    sphericity,
    surface_points,
    widest_pair,
)
from volseg.postprocessing.components import component_statistics
from volseg.recipe import Measure
from volseg.volume import AxisOrder, BoundingBox, Geometry, Volume, slabs_of

Box = tuple[slice, slice, slice]
DEFAULTS = Measure()
SMALL_VOXELS = 125  # of a box whose shape is cached
MEASURED_TOGETHER = 2**20  # voxels in the boxes of lesions
EXPECTED_REACH = 2  # voxels round a lesion that count for its expected volume
MOST_POINTS = 2**20  # of all surfaces; above, nearest lesions are searched in the scan itself


def measure_lesions(
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
    only: np.ndarray | None = None,
    most_points: int = MOST_POINTS,
) -> list[LesionMeasurement]:
    """Measure the lesions of a scan; the numbers are the same for all 48 axis orders.

    Args:
        image: the scan as read: own grid, original intensities.
        ids: (I, J, K) integers on the same grid; n in the voxels of lesion n, 0 elsewhere.
        labels: label value of lesion 1, 2, …, N.
        case_id: name of the scan.
        label_names: label value → name.
        intensity_unit: such as `HU`, which allows densities to be computed.
        unit_doubt: why the scan may not be in that unit (`judge_unit`). If set, density, mass,
            calcium score and class are left empty, with this text in `notes`.
        confidence: (I, J, K) probability of the predicted label, and in the background of any
            label; uint8 from 0 to 255, or floating point from 0 to 1.
        classes: class name → probability, for lesions 1, 2, …, N or up to the last of `only`; None
            for a lesion that was not classified.
        settings: which labels are lymph nodes, whether calcium is scored, and so on.
        connectivity, model: how the lesions were found, copied into the rows.
        only: (M,) ascending numbers of the lesions to measure; None: all.
        most_points: surface points that may be held index once.

    Returns:
        N rows, or M with `only`; none for an empty mask.

    Raises:
        ValueError: arrays of different shape, or inconsistent numbers of lesions.
    """
    _check(image, ids, labels, confidence, classes, only)
    box = BoundingBox.around(ids)
    if box is None:
        return []
    numbers = np.arange(1, len(labels) + 1) if only is None else only
    counts, centroids, stored_boxes = _counts_and_boxes(ids, box, only, len(labels))
    centroids_mm = centres_mm(centroids, image.geometry)
    scan = CanonicalScan.of(image, ids, confidence)
    voxel_mm3 = voxel_volume_mm3(image)
    spacing_r_mm, spacing_a_mm, spacing_s_mm = scan.spacing_mm
    forms = _Forms(scan.geometry.voxel_steps_mm)
    rows, surfaces = [], _Surfaces(most_points if only is None else 0)
    boxes = [scan.box_of(_shift(stored, box)) for stored in stored_boxes]
    doubt_note = ""
    if unit_doubt:
        doubt_note = withheld(unit_doubt, settings, has_classes=classes is not None)
        classes, settings = None, settings.model_copy(update={"calcium": False})
    for batch in _batches(boxes):
        lesions = [_Lesion.of(scan, int(numbers[index]), boxes[index], forms) for index in batch]
        unit = "" if unit_doubt else intensity_unit
        intensities = _intensities(lesions, voxel_mm3, unit, settings)
        confidences = _confidences(lesions, voxel_mm3)
        for index, lesion, (intensity, intensity_note), (confidence_values, confidence_note) in zip(
            batch, lesions, intensities, confidences, strict=True
        ):
            n, form = lesion.number, lesion.form
            label = int(labels[n - 1])
            name_note = "" if label in label_names else f"label_name: value {label} has no name"
            n_voxels = int(counts[index])
            axes_note = "axes: a single voxel has none" if n_voxels == 1 else ""
            is_node = label_names.get(label) in settings.lymph_nodes
            scores, class_note = _class(classes[n - 1]) if classes is not None else (NO_CLASS, "")
            notes = (name_note, axes_note, doubt_note, intensity_note, confidence_note, class_note)
            r, a, s = centroids_mm[index].tolist()
            rows.append(
                partial(
                    LesionMeasurement,
                    case_id=case_id,
                    lesion_id=n,
                    label=label,
                    label_name=label_names.get(label),
                    n_voxels=n_voxels,
                    volume_mm3=n_voxels * voxel_mm3,
                    volume_ml=n_voxels * voxel_mm3 / 1000,
                    equiv_sphere_diameter_mm=equivalent_diameter_mm(n_voxels * voxel_mm3),
                    **intensity,
                    intensity_unit=intensity_unit,
                    **form.columns,
                    **_axes(lesion, is_node=is_node),
                    **_extent(lesion),
                    centroid_r_mm=r,
                    centroid_a_mm=a,
                    centroid_s_mm=s,
                    touches_border=_touches_border(lesion.box, scan.ids.shape),
                    **confidence_values,
                    **scores,
                    spacing_r_mm=spacing_r_mm,
                    spacing_a_mm=spacing_a_mm,
                    spacing_s_mm=spacing_s_mm,
                    connectivity=connectivity,
                    model=model,
                    volseg_version=__version__,
                    notes="; ".join(filter(None, notes)),
                )
            )
            surfaces.add(lesion)
    if surfaces.has_all:
        gaps = gaps_mm(surfaces.points_mm)
    else:
        # Components of a single label, connected over corners, have a plane of voxels between them.
        is_apart = connectivity == 26 and min(labels) == max(labels)
        nearest = NearestLesion(scan.ids, scan.geometry.voxel_steps_mm, is_apart=is_apart)
        distances = (nearest.gap_mm(int(n), box_) for n, box_ in zip(numbers, boxes, strict=True))
        gaps = [gap if math.isfinite(gap) else math.nan for gap in distances]
    return [row(nearest_lesion_mm=_rounded(gap)) for row, gap in zip(rows, gaps, strict=True)]


def voxel_volume_mm3(image: Volume) -> float:
    """Return the voxel volume to 12 digits, since |det A| differs in its last bit by axis order."""
    return float(f"{image.geometry.voxel_volume_mm3:.12g}")


def sizes_and_boxes(
    ids: np.ndarray, only: np.ndarray | None, n_lesions: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (M,) the voxels of each lesion, or of `only`, and (M,) those of their boxes."""
    box = BoundingBox.around(ids)
    if box is None:
        raise ValueError(f"lesion ids are all 0, but there are {n_lesions} lesions")
    counts, _, boxes = _counts_and_boxes(ids, box, only, n_lesions)
    return counts, np.array([_n_voxels(_shift(stored, box)) for stored in boxes], np.int64)


def _counts_and_boxes(
    ids: np.ndarray, box: BoundingBox, only: np.ndarray | None, n_lesions: int
) -> tuple[np.ndarray, np.ndarray, Sequence[Box | None]]:
    """Return (M,) voxel counts, (M, 3) mean indices and boxes of each lesion, or of `only`.

    The boxes are relative to `box`, which holds all lesions.
    """
    part = ids[box.slices]
    if only is None:
        measured = component_statistics(part)
        return measured.n_voxels, measured.centroids + box.start, measured.boxes()
    row_of = np.zeros(n_lesions + 1, np.uint32)
    row_of[only] = np.arange(1, len(only) + 1)
    n = len(only) + 1
    counts, sums = np.zeros(n, np.int64), np.zeros((3, n))
    low, high = np.full((3, n), np.iinfo(np.int32).max, np.int32), np.full((3, n), -1, np.int32)
    for slab in slabs_of(part, MEASURED_TOGETHER):
        rows = row_of[part[slab]]
        index = np.nonzero(rows)
        inside = rows[index]
        counts += np.bincount(inside, minlength=n)
        for axis in range(3):
            along = (index[axis] + slab[axis].start).astype(np.int32)
            sums[axis] += np.bincount(inside, along, minlength=n)
            np.minimum.at(low[axis], inside, along)
            np.maximum.at(high[axis], inside, along)
    corners = zip(counts[1:].tolist(), low.T[1:].tolist(), high.T[1:].tolist())
    boxes = [
        tuple(slice(start, stop + 1) for start, stop in zip(starts, stops)) if count else None
        for count, starts, stops in corners
    ]
    with np.errstate(invalid="ignore"):
        centroids = (sums[:, 1:] / counts[1:]).T + box.start
    return counts[1:], centroids, boxes  # type: ignore[return-value]


class _Surfaces:
    """Surfaces of lesions in mm, dropped once they have more than `most_points` points in all."""

    def __init__(self, most_points: int) -> None:
        self._room = most_points
        self.points_mm: list[np.ndarray] = []

    @property
    def has_all(self) -> bool:
        return self._room > 0

    def add(self, lesion: _Lesion) -> None:
        if not self.has_all:
            return
        n = lesion.form.n_surface
        self._room -= n
        if self.has_all:
            self.points_mm.append(lesion.start_mm + lesion.form.surface_mm)
        else:
            self.points_mm.clear()


@dataclass(frozen=True, slots=True, eq=False)
class CanonicalScan:
    """Canonical (R, A, S) views of a scan, its lesion ids and its confidence.

    They are the same for all 48 axis orders.
    """

    image: Volume
    ids: np.ndarray
    confidence: np.ndarray | None
    order: AxisOrder
    memory: tuple[int, int, int]  # axes from slowest to fastest in memory
    spacing_mm: tuple[float, float, float]

    @classmethod
    def of(cls, image: Volume, ids: np.ndarray, confidence: np.ndarray | None) -> CanonicalScan:
        order = AxisOrder.of(image.geometry)
        canonical = image.canonical()
        strides = canonical.array.strides
        i, j, k = np.argsort([-abs(stride) for stride in strides], kind="stable").tolist()
        return cls(
            canonical,
            order.apply(ids),
            None if confidence is None else order.apply(confidence),
            order,
            (i, j, k),
            canonical.geometry.spacing_mm,
        )

    @property
    def geometry(self) -> Geometry:
        return self.image.geometry

    def box_of(self, stored: Box) -> Box:
        """Convert a box of the stored array to one of the canonical views."""
        sides = []
        for axis, flip, n in zip(self.order.axes, self.order.flipped, self.ids.shape, strict=True):
            side = stored[axis]
            sides.append(slice(n - side.stop, n - side.start) if flip else side)
        return sides[0], sides[1], sides[2]


def _batches(boxes: Sequence[Box]) -> Iterator[range]:
    """Yield ranges of lesions measured together: thousands of small ones, or a single large one."""
    first, size = 0, 0
    for index, box in enumerate(boxes):
        voxels = _n_voxels(box)
        if index > first and size + voxels > MEASURED_TOGETHER:
            yield range(first, index)
            first, size = index, 0
        size += voxels
    yield range(first, len(boxes))


def _n_voxels(box: Box) -> int:
    return math.prod(side.stop - side.start for side in box)


@dataclass(frozen=True, slots=True, eq=False)
class _Lesion:
    """A lesion in its bounding box; `start_mm` (3,) is the centre of the box's first voxel, RAS."""

    scan: CanonicalScan
    number: int
    box: Box
    start_mm: np.ndarray
    form: _Form

    @classmethod
    def of(cls, scan: CanonicalScan, number: int, box: Box, forms: _Forms) -> _Lesion:
        start_mm = scan.geometry.to_world_mm(np.array([side.start for side in box]))
        return cls(scan, number, box, start_mm, forms.of(scan.ids[box] == number))

    def values(self, array: np.ndarray, inside: np.ndarray | None = None) -> np.ndarray:
        """Return the values (N,) of a canonical view where `inside` is true, in any order.

        Default: the lesion. Boolean indexing is several times faster in memory order.
        """
        axes, mask = self.scan.memory, self.form.inside if inside is None else inside
        return array[self.box].transpose(axes)[mask.transpose(axes)]

    def core_values(self, array: np.ndarray) -> np.ndarray:
        """Return the values (N,) of a canonical view in the core of the lesion, in any order."""
        if not self.is_large:
            has_core = self.form.has_core
            return self.values(array, self.form.core) if has_core else array[:0, 0, 0].copy()

        inside = self.form.inside.transpose(self.scan.memory)
        values = array[self.box].transpose(self.scan.memory)

        def parts() -> Iterator[np.ndarray]:
            for start, stop in _slabs(inside):
                low, high = max(0, start - 1), stop + 1
                yield values[start:stop][core(inside[low:high])[start - low : stop - low]]

        return _concatenated(parts, array.dtype)

    def halo_confidence(self) -> np.ndarray:
        """Return the confidence (N,) in the background round the lesion, in any order."""
        assert self.scan.confidence is not None
        ids, confidence, reach = self.scan.ids, self.scan.confidence, EXPECTED_REACH
        if not self.is_large:
            return _halo_values(confidence, ids, self.box, self.form.halo, (reach, reach))
        axes = self.scan.memory
        inside = self.form.inside.transpose(axes)
        ids, confidence = ids.transpose(axes), confidence.transpose(axes)
        first, *others = (self.box[axis] for axis in axes)

        def parts() -> Iterator[np.ndarray]:
            n = len(inside)
            for start, stop in _slabs(inside):
                # Voxels up to `reach` before and after this slab grow into it.
                low, high = max(0, start - reach), min(n, stop + reach)
                before, after = (0 if start else reach), (0 if stop < n else reach)
                grown = _grown(np.pad(inside[low:high], reach), reach)
                halo = grown[start - low + reach - before : stop - low + reach + after]
                box = (slice(first.start + start, first.start + stop), others[0], others[1])
                yield _halo_values(confidence, ids, box, halo, (before, after))

        return _concatenated(parts, confidence.dtype)

    @property
    def is_large(self) -> bool:
        """True if the box is so large that arrays of its size must be processed in slabs."""
        return self.form.inside.size > MEASURED_TOGETHER


def _halo_values(
    confidence: np.ndarray, ids: np.ndarray, box: Box, halo: np.ndarray, ends: tuple[int, int]
) -> np.ndarray:
    """Return the confidence (N,) in the background voxels of `halo`.

    Args:
        halo: bool of the box, extended by `ends` voxels before and after it along the first axis,
            and by `EXPECTED_REACH` along the others.
    """
    sides, halo_sides = [], []
    for axis, (side, n) in enumerate(zip(box, ids.shape, strict=True)):
        before, after = (EXPECTED_REACH, EXPECTED_REACH) if axis else ends
        start, stop = max(0, side.start - before), min(n, side.stop + after)
        sides.append(slice(start, stop))
        halo_sides.append(slice(start - side.start + before, stop - side.start + before))
    part = tuple(sides)
    return confidence[part][halo[tuple(halo_sides)] & (ids[part] == 0)]


def _slabs(array: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield start and stop of slabs along the first axis."""
    step = max(1, MEASURED_TOGETHER // array[0].size)
    return ((start, min(start + step, len(array))) for start in range(0, len(array), step))


def _concatenated(parts: Callable[[], Iterator[np.ndarray]], dtype: np.dtype) -> np.ndarray:
    """Concatenate the parts; computing them twice avoids a second copy in memory."""
    values = np.empty(sum(part.size for part in parts()), dtype)
    start = 0
    for part in parts():
        values[start : start + part.size] = part
        start += part.size
    return values


@dataclass(frozen=True, eq=False)
class _Form:
    """Shape of a lesion, independent of its position: points are mm from its box's first voxel."""

    inside: np.ndarray  # (R, A, S) bool
    columns: Mapping[str, float]
    diameters: Diameters
    axes_mm: np.ndarray  # (4, 3) ends of the long axis, then of the short axis
    extent_mm: np.ndarray  # (2, 3) lowest and highest R, A, S, edges of voxels included
    matrix: np.ndarray  # (3, 3) voxel → mm

    @classmethod
    def of(cls, inside: np.ndarray, matrix: np.ndarray) -> _Form:
        volume_mm3, area_mm2 = mesh(inside, matrix)
        major, minor, least = axes_mm(inside, matrix)
        roundness = sphericity(volume_mm3, area_mm2)
        columns = {
            "volume_mesh_mm3": volume_mm3,
            "surface_area_mm2": area_mm2,
            "sphericity": roundness,
            "compactness": roundness**3,
            "major_axis_mm": major,
            "minor_axis_mm": minor,
            "least_axis_mm": least,
            "elongation": minor / major,
            "flatness": least / major,
            "max3d_diameter_mm": widest_pair(outermost_points(inside), matrix)[0],
        }
        axes = diameters(inside, matrix)
        ends_mm = np.concatenate([axes.long_ends, axes.short_ends]) @ matrix.T
        return cls(inside, columns, axes, ends_mm, _extent_mm(inside, matrix), matrix)

    @cached_property
    def n_surface(self) -> int:
        """Number of surface points."""
        if self.inside.size <= MEASURED_TOGETHER:
            return len(self.surface_mm)
        n = 0
        for axis in range(3):
            planes = np.moveaxis(self.inside, axis, 0)
            n += int(np.count_nonzero(planes[0])) + int(np.count_nonzero(planes[-1]))
            for start, stop in _slabs(planes):
                part = planes[start : stop + 1]
                n += int(np.count_nonzero(part[1:] != part[:-1]))
        return n

    @cached_property
    def surface_mm(self) -> np.ndarray:
        """All surface points (N, 3)."""
        return surface_points(self.inside) @ self.matrix.T

    @cached_property
    def core(self) -> np.ndarray:
        """(R, A, S) bool, true where a voxel and its six neighbours lie in the lesion."""
        return core(self.inside)

    @cached_property
    def has_core(self) -> bool:
        return bool(self.core.any())

    @cached_property
    def halo(self) -> np.ndarray:
        """(R, A, S) bool of the lesion grown by `EXPECTED_REACH` voxels.

        It covers the box and `EXPECTED_REACH` voxels on every side.
        """
        return _grown(np.pad(self.inside, EXPECTED_REACH), EXPECTED_REACH)


class _Forms:
    """Shapes of the lesions of a scan; small ones, often equal in a noisy mask, are cached."""

    def __init__(self, matrix: np.ndarray) -> None:
        self._matrix = matrix
        self._cache: dict[tuple[tuple[int, ...], bytes], _Form] = {}

    def of(self, inside: np.ndarray) -> _Form:
        if inside.size > SMALL_VOXELS:
            return _Form.of(inside, self._matrix)
        key = (inside.shape, inside.tobytes())
        if key not in self._cache:
            self._cache[key] = _Form.of(inside, self._matrix)
        return self._cache[key]


def _extent_mm(inside: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Return (2, 3) the lowest and highest R, A, S of a lesion, edges of voxels included.

    In mm from the centre of its box's first voxel.
    """
    centres = outermost_points(inside, axes=(0,)) @ matrix.T
    # Along the first axis, the points already lie half a voxel beyond the centres.
    reach = np.abs(matrix[:, 1:]).sum(axis=1) / 2
    return np.stack([centres.min(axis=0) - reach, centres.max(axis=0) + reach])


def _extent(lesion: _Lesion) -> dict[str, str]:
    low, high = lesion.start_mm + lesion.form.extent_mm
    return {"bbox_min_ras": point_text(low), "bbox_max_ras": point_text(high)}


def _axes(lesion: _Lesion, *, is_node: bool) -> dict[str, Any]:
    axes, ends = lesion.form.diameters, lesion.start_mm + lesion.form.axes_mm
    slice_mm = max(lesion.scan.spacing_mm)
    return {
        "long_axis_mm": axes.long_mm,
        "short_axis_mm": axes.short_mm,
        "axis_slice": axes.slice + lesion.box[2].start,
        "long_axis_p0_ras": point_text(ends[0]),
        "long_axis_p1_ras": point_text(ends[1]),
        "short_axis_p0_ras": point_text(ends[2]),
        "short_axis_p1_ras": point_text(ends[3]),
        "recist_measurable": is_measurable(axes.long_mm, axes.short_mm, slice_mm, is_node=is_node),
    }


def point_text(point_mm: np.ndarray) -> str:
    """Return R, A and S with three decimals, as a JSON list.

    Spreadsheets take a cell that begins with a minus for a formula. The numbers are rounded twice,
    so that the last bit does not decide the last digit.
    """
    r, a, s = (round(_rounded(value), 3) + 0.0 for value in point_mm.tolist())
    return f"[{r:.3f}, {a:.3f}, {s:.3f}]"


def _rounded(value: float) -> float:
    """Round to 1e-9, above the differences between axis orders."""
    return round(value, 9)


def _check(
    image: Volume,
    ids: np.ndarray,
    labels: Sequence[int],
    confidence: np.ndarray | None,
    classes: Sequence[Mapping[str, float] | None] | None,
    only: np.ndarray | None,
) -> None:
    if ids.shape != image.array.shape:
        raise ValueError(f"lesion ids have shape {ids.shape}, but the image {image.array.shape}")
    if ids.dtype.kind not in "iu" or ids.min() < 0:
        raise ValueError(f"lesion ids must be integers from 0, got {ids.dtype} from {ids.min()}")
    if int(ids.max()) != len(labels):
        raise ValueError(f"lesion ids go up to {ids.max()}, but there are {len(labels)} labels")
    if confidence is not None and confidence.shape != ids.shape:
        raise ValueError(f"confidence has shape {confidence.shape}, but the image {ids.shape}")
    if confidence is not None and confidence.dtype != np.uint8:
        if confidence.dtype.kind != "f":
            raise ValueError(f"confidence must be uint8 or floating point, got {confidence.dtype}")
        highest = np.fmax.reduce(confidence, axis=None)
        if highest > 1:
            raise ValueError(f"confidence must be from 0 to 1, got {highest}")
    n_needed = len(labels) if only is None else int(only.max(initial=0))
    if classes is not None and not n_needed <= len(classes) <= len(labels):
        raise ValueError(f"{len(classes)} lesions are classified, but there are {len(labels)}")


def centres_mm(indices: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Convert mean voxel indices (N, 3) to RAS mm (N, 3), rounded to 1e-9 mm.

    The last bits differ between axis orders. Without rounding they would decide the last printed
    digit of a centroid such as 0.24415 mm, and the sign of a centroid at 0.
    """
    return np.round(geometry.to_world_mm(indices), 9) + 0.0


def _shift(lesion_box: Box | None, by: BoundingBox) -> Box:
    if lesion_box is None:
        raise ValueError("lesion ids skip a number: every label needs a lesion with voxels")
    sides = zip(lesion_box, by.start, strict=True)
    i, j, k = (slice(side.start + start, side.stop + start) for side, start in sides)
    return i, j, k


def _touches_border(box: Box, shape: tuple[int, ...]) -> bool:
    return any(side.start == 0 or side.stop == size for side, size in zip(box, shape, strict=True))


def _intensities(
    lesions: Sequence[_Lesion], voxel_mm3: float, unit: str, settings: Measure
) -> list[tuple[dict[str, Any], str]]:
    """Return the columns derived from the intensities of each lesion, and notes on empty ones."""
    image = lesions[0].scan.image
    # The core first, so that the values of a lesion as large as the scan are held only once.
    cores = Ragged.of([lesion.core_values(image.array) for lesion in lesions], image)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.where(cores.counts > 0, cores.sum() / cores.counts + 0.0, np.nan).tolist()
    core_means = [mean if count else None for mean, count in zip(means, cores.counts.tolist())]
    del cores
    return intensity_columns(
        Ragged.of([lesion.values(image.array) for lesion in lesions], image),
        voxel_mm3,
        unit,
        settings,
        core_means=core_means,
        calcium=lambda n: _calcium(lesions[n], voxel_mm3, settings),
    )


def intensity_columns(
    values: Ragged,
    voxel_mm3: float,
    unit: str,
    settings: Measure,
    *,
    core_means: Sequence[float | None] | None = None,
    calcium: Callable[[int], tuple[dict[str, Any], str]] | None = None,
) -> list[tuple[dict[str, Any], str]]:
    """Return the columns derived from the intensities of each lesion, and notes on empty ones.

    Args:
        core_means: mean of the core of each lesion, None if it has no core. None: not measured.
        calcium: returns the calcium columns and a note of lesion n, from 0. None: not scored.
    """
    is_hu = unit == "HU"
    calibration = settings.density_g_cm3 or SCHNEIDER
    with np.errstate(invalid="ignore", divide="ignore"):  # lesions with NaN are left empty below
        columns = {f"intensity_{name}": x.tolist() for name, x in statistics(values).items()}
        densities = density_g_cm3(values, calibration).tolist() if is_hu else []
    (low_hu, _), (high_hu, _) = calibration[0], calibration[-1]
    # Values are sorted: those not finite or outside the calibration are at the ends.
    has_lost = ~(np.isfinite(values.first) & np.isfinite(values.last))
    lost = _counts(values, has_lost, lambda part: ~np.isfinite(part))
    over = _counts(values, values.last > high_hu, lambda part: part > high_hu)
    under = _counts(values, values.first < low_hu, lambda part: part < low_hu)
    need_hu = f"density, mass{', calcium' if settings.calcium else ''}"
    unit_notes = [f"{need_hu}: need HU, but the unit is {unit}"] if unit and not is_hu else []
    measured = []
    for n, size in enumerate(values.counts.tolist()):
        if lost[n]:
            unscored = ["agatston_score", "calcium"] if settings.calcium and is_hu else []
            names = ["intensity", *(["mass", "density"] if is_hu else []), *unscored]
            notes = [f"{', '.join(names)}: {lost[n]} of {size} voxels are not finite", *unit_notes]
            measured.append((dict.fromkeys(INTENSITY_COLUMNS, math.nan), "; ".join(notes)))
            continue
        row: dict[str, Any] = {name: column[n] for name, column in columns.items()}
        notes = [*unit_notes]
        if not row["intensity_sd"]:
            # The same NaN object, so that equal rows compare equal.
            row |= {"intensity_skewness": math.nan, "intensity_kurtosis": math.nan}
            notes.append("intensity_skewness and kurtosis: all intensities are equal")
        core_mean = math.nan if core_means is None else core_means[n]
        if core_mean is not None and core_means is not None:
            row["intensity_mean_eroded1"] = core_mean
        if core_mean is None:
            notes.append("intensity_mean_eroded1: no voxel has all its neighbours in the lesion")
        if is_hu:
            mass_g = densities[n] * size * voxel_mm3 / 1000
            row |= {"density_g_cm3": densities[n], "mass_g": mass_g}
            for count, end, word in ((over[n], high_hu, "over"), (under[n], low_hu, "under")):
                if count:
                    text = f"{count} voxels are {word} {end:g} HU, where the calibration ends"
                    notes.append(f"mass: {text}")
        if settings.calcium and is_hu and calcium is not None:
            scored, note = calcium(n)
            row |= scored
            notes += [note] if note else []
        measured.append((row, "; ".join(notes)))
    return measured


def _counts(
    values: Ragged, has_any: np.ndarray, is_counted: Callable[[np.ndarray], np.ndarray]
) -> list[int]:
    """Count the values of each of L lesions that satisfy `is_counted`.

    Args:
        has_any: (L,) bool, whether a lesion has such values; used to skip counting.
    """
    if not has_any.any():
        return [0] * len(has_any)
    counts = values.sum(lambda part, lesion: is_counted(part).astype(np.float64))
    return counts.astype(np.int64).tolist()


def _calcium(lesion: _Lesion, voxel_mm3: float, settings: Measure) -> tuple[dict[str, Any], str]:
    hu = lesion.scan.image.intensities(lesion.scan.image.array[lesion.box])
    score, counted = agatston(
        hu,
        lesion.form.inside,
        lesion.scan.geometry.voxel_steps_mm,
        threshold_hu=settings.calcium_threshold_hu,
    )
    volume_mm3 = int(counted.sum()) * voxel_mm3
    row: dict[str, Any] = {"agatston_score": score, "calcium_volume_mm3": volume_mm3}
    if settings.calcium_mg_per_ml_hu is None:
        return row, "calcium_mass_mg: the recipe has no calcium_mg_per_ml_hu"
    total_hu = float(np.sort(hu[counted].astype(np.float64)).sum())
    row["calcium_mass_mg"] = settings.calcium_mg_per_ml_hu * total_hu * voxel_mm3 / 1000
    return row, ""


def _confidences(lesions: Sequence[_Lesion], voxel_mm3: float) -> list[tuple[dict[str, Any], str]]:
    """Return the confidence columns of each lesion, and a note if they are unknown."""
    confidence = lesions[0].scan.confidence
    if confidence is None:
        return [({"confidence_mean": None}, "")] * len(lesions)
    # In the background, confidence is the probability of any label.
    halos = Ragged.of([lesion.halo_confidence() for lesion in lesions])
    with np.errstate(invalid="ignore"):
        halo_sums = halos.sum()
    del halos
    values = Ragged.of([lesion.values(confidence) for lesion in lesions])
    return confidence_columns(values, halo_sums, voxel_mm3)


def confidence_columns(
    values: Ragged, halo_sums: np.ndarray | None, voxel_mm3: float
) -> list[tuple[dict[str, Any], str]]:
    """Return the confidence columns and a note, from the confidence in each lesion's voxels.

    Args:
        halo_sums: (L,) sum of the confidence round each lesion; None: not measured.
    """
    full = 255 if values.values.dtype == np.uint8 else 1
    with np.errstate(invalid="ignore"):
        sums = values.sum()
        means = (sums / values.counts / full).tolist()
        tenths = (values.percentile(10) / full).tolist()
        totals = sums + (0 if halo_sums is None else halo_sums)
        expected_ml = (totals / full * voxel_mm3 / 1000).tolist()
    measured = []
    for mean, tenth, expected in zip(means, tenths, expected_ml, strict=True):
        if not math.isfinite(mean):
            measured.append(({"confidence_mean": None}, "confidence: not finite"))
            continue
        row: dict[str, Any] = {"confidence_mean": mean, "confidence_p10": tenth}
        note = ""
        if halo_sums is not None:
            is_finite = math.isfinite(expected)
            row["volume_expected_ml"] = expected if is_finite else None
            if not is_finite:
                note = "volume_expected_ml: the confidence round the lesion is not finite"
        measured.append((row, note))
    return measured


def _grown(inside: np.ndarray, reach: int) -> np.ndarray:
    """Return (R, A, S) bool of the lesion dilated by `reach` voxels along each axis."""
    for axis in range(3):
        grown, others = inside.copy(), (slice(None),) * axis
        for step in range(1, min(reach + 1, inside.shape[axis])):
            ahead, behind = (*others, slice(step, None)), (*others, slice(None, -step))
            grown[ahead] |= inside[behind]
            grown[behind] |= inside[ahead]
        inside = grown
    return inside


def withheld(unit_doubt: str, settings: Measure, *, has_classes: bool) -> str:
    """Return a note on the columns left empty because the unit is in doubt."""
    calcium, classes = settings.calcium * ["calcium"], has_classes * ["class"]
    return f"{', '.join(['density', 'mass', *calcium, *classes])}: {unit_doubt}"


def _class(probabilities: Mapping[str, float] | None) -> tuple[dict[str, Any], str]:
    """Return the class columns of a lesion, and a note if they are unknown."""
    if not probabilities:
        return NO_CLASS, "class: not classified"
    if not all(math.isfinite(probability) for probability in probabilities.values()):
        return NO_CLASS, "class: a probability is not finite"
    name = max(probabilities, key=lambda candidate: probabilities[candidate])
    text = ";".join(f"{key}={value:.4f}" for key, value in probabilities.items())
    return {
        "class_name": name,
        "class_probability": float(probabilities[name]),
        "class_probabilities": text,
    }, ""


def summarise(
    lesions: Sequence[LesionMeasurement],
    settings: Measure,
    *,
    unit: str,
    organ_voxels_ml: float | None,
    n_specks: int = 0,
    specks_ml: float = 0.0,
    may_be_measurable: bool = False,
) -> dict[str, Any]:
    """Return the columns of cases.csv that follow from the lesions of a scan.

    Args:
        unit: of the intensities.
        organ_voxels_ml: volume of the organ's own label, without lesions; None if no label is the
            organ. If it is 0, the organ was not found, and the burden is unknown.
        n_specks, specks_ml: number and volume of further lesions, not measured in full.
        may_be_measurable: whether one of these may be measurable; the number is then unknown.
    """
    total_ml = float(sum(lesion.volume_ml for lesion in lesions)) + specks_ml
    targets = [lesion for lesion in lesions if lesion.recist_measurable]
    lengths = []
    for lesion in targets:
        is_node = lesion.label_name in settings.lymph_nodes
        lengths.append(float((lesion.short_axis_mm if is_node else lesion.long_axis_mm) or 0.0))
    sum_mm = sum_of_diameters_mm(
        lengths,
        [lesion.label for lesion in targets],
        most=settings.max_targets,
        most_per_label=settings.max_targets_per_label,
    )
    organ_ml = organ_voxels_ml + total_ml if organ_voxels_ml else None
    scores = [lesion.agatston_score for lesion in lesions]
    is_scored = (
        settings.calcium
        and unit == "HU"
        and not n_specks
        and not any(score is None or math.isnan(score) for score in scores)
    )
    return {
        "n_lesions": len(lesions) + n_specks,
        "total_volume_ml": total_ml,
        "largest_volume_ml": max((lesion.volume_ml for lesion in lesions), default=None),
        "n_measurable": None if may_be_measurable else len(targets),
        "sum_long_axis_mm": None if may_be_measurable else sum_mm,
        "organ_volume_ml": organ_ml,
        "burden": total_ml / organ_ml if organ_ml else None,
        "agatston_score": float(sum(score or 0.0 for score in scores)) if is_scored else None,
    }


INTENSITY_COLUMNS = tuple(
    f"intensity_{name}" for name in ("mean", "sd", "min", "p10", "median", "p90", "max")
)
NO_CLASS: dict[str, Any] = {
    "class_name": None,
    "class_probability": None,
    "class_probabilities": None,
}

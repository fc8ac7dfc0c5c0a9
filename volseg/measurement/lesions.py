"""Scan and numbered lesions → one row of numbers per lesion.

Everything is measured on the scan's own grid and in its original intensities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from volseg.measurement.cells import Cells, LesionRows, point_cells, rounded_mm
from volseg.measurement.confidence import class_cells, confidence_cells
from volseg.measurement.extents import centroids_and_boxes
from volseg.measurement.form import Forms
from volseg.measurement.intensities import intensity_cells
from volseg.measurement.lesion_box import LesionBox
from volseg.measurement.nearest import MAX_POINTS, NearestDistances
from volseg.measurement.recist import is_measurable
from volseg.measurement.rows import LesionMeasurement
from volseg.measurement.scan import Box, CanonicalScan, SegmentedScan, n_voxels_of
from volseg.postprocessing.lesions import centres_mm

# Columns that a scan of one slice, or of one that is not axial, leaves empty.
OF_VOLUMES = (
    "volume_mesh_mm3",
    "surface_area_mm2",
    "sphericity",
    "compactness",
    "least_axis_mm",
    "flatness",
    "max3d_diameter_mm",
)
OF_AXIAL_SLICES = (
    "long_axis_mm",
    "short_axis_mm",
    "axis_slice",
    *(
        f"{axis}_axis_{end}_{along}_mm"
        for axis in ("long", "short")
        for end in ("p0", "p1")
        for along in "ras"
    ),
    "recist_measurable",
)
MEASURED_TOGETHER = 2**20  # voxels in the boxes of lesions


def measure_lesions(
    scan: SegmentedScan,
    *,
    only: np.ndarray | None = None,
    most_points: int = MAX_POINTS,
    together: int = MEASURED_TOGETHER,
) -> list[LesionMeasurement]:
    """Measure the lesions of a scan; the numbers are the same for all 48 axis orders.

    Args:
        only: (M,) ascending numbers of the lesions to measure; None: all.
        most_points: surface points that may be held at once.
        together: voxels processed at once; bounds the memory.

    Returns:
        N rows, or M with `only`; none for an empty mask.

    Raises:
        ValueError: arrays of different shape, or inconsistent numbers of lesions.
    """
    scan.check(only)
    if not scan.lesions.labels:
        return []
    numbers = np.arange(1, len(scan.lesions.labels) + 1) if only is None else only
    centroids, stored_boxes = centroids_and_boxes(scan.lesions, only)
    view = CanonicalScan.of(scan)
    boxes = [view.box_of(stored) for stored in stored_boxes]
    forms = Forms(view.matrix, together)
    distances = NearestDistances(view, most_points=most_points if only is None else 0)
    measured: list[tuple[Cells, ...]] = []
    for batch in _batches(boxes, together):
        lesions = [LesionBox.of(view, int(numbers[n]), boxes[n], forms) for n in batch]
        measured += zip(*(measure(lesions) for measure in MEASURES), strict=True)
        for lesion in lesions:
            distances.add(lesion)
    rows = LesionRows(view)
    sizes = np.asarray(scan.lesions.n_voxels)[numbers - 1]
    places = centres_mm(centroids, scan.image.geometry)
    lesions = zip(numbers.tolist(), sizes.tolist(), places.tolist(), strict=True)
    gaps = (Cells({"nearest_lesion_mm": rounded_mm(gap)}) for gap in distances.gaps_mm())
    return [
        rows.row(*lesion, (*cells, gap))
        for lesion, cells, gap in zip(lesions, measured, gaps, strict=True)
    ]


def _batches(boxes: Sequence[Box], together: int) -> Iterator[range]:
    """Yield ranges of lesions measured together: thousands of small ones, or a single large one."""
    first, size = 0, 0
    for index, box in enumerate(boxes):
        voxels = n_voxels_of(box)
        if index > first and size + voxels > together:
            yield range(first, index)
            first, size = index, 0
        size += voxels
    yield range(first, len(boxes))


def shape_cells(lesions: Sequence[LesionBox]) -> list[Cells]:
    """Return the columns that follow from the shape and the place of each lesion."""
    return [_shape_cells(lesion) for lesion in lesions]


def _shape_cells(lesion: LesionBox) -> Cells:
    form, scan = lesion.form, lesion.view.scan
    axes, ends = form.diameters, lesion.start_mm + form.axes_mm
    low, high = lesion.start_mm + form.extent_mm
    slice_mm = max(lesion.view.image.geometry.slice_distances_mm)
    label, n_voxels = (
        values[lesion.number - 1] for values in (scan.lesions.labels, scan.lesions.n_voxels)
    )
    is_node = scan.label_names.get(label) in scan.settings.lymph_nodes
    values = {
        **form.columns,
        "long_axis_mm": axes.long_mm,
        "short_axis_mm": axes.short_mm,
        "axis_slice": axes.slice + lesion.box[2].start,
        **point_cells("long_axis_p0", ends[0]),
        **point_cells("long_axis_p1", ends[1]),
        **point_cells("short_axis_p0", ends[2]),
        **point_cells("short_axis_p1", ends[3]),
        "recist_measurable": is_measurable(axes.long_mm, axes.short_mm, slice_mm, is_node=is_node),
        **point_cells("bbox_min", low),
        **point_cells("bbox_max", high),
        "touches_border": lesion.touches_border,
    }
    notes = ["axes: a single voxel has none"] if n_voxels == 1 else []
    slice_axis = lesion.view.slice_axis
    if slice_axis is not None:
        values |= dict.fromkeys(OF_VOLUMES)
        columns = ", ".join((*OF_VOLUMES, "equiv_sphere_diameter_mm"))
        notes.append(f"{columns}: the scan has a single slice")
    if slice_axis in (0, 1):
        values |= dict.fromkeys(OF_AXIAL_SLICES)
        notes.append(f"{', '.join(OF_AXIAL_SLICES)}: the slice of the scan is not axial")
    return Cells(values, "; ".join(notes))


Measure = Callable[[Sequence[LesionBox]], Sequence[Cells]]
# Notes are in this order.
MEASURES: tuple[Measure, ...] = (shape_cells, intensity_cells, confidence_cells, class_cells)

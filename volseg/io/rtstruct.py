"""Contours in DICOM (RTSTRUCT) to labels: drawn on the slices of their scan, never between."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from volseg.io.dicom_frames import rest_of
from volseg.io.dicom_object import FIX, DicomObject, choose_segments, items_of, names_of
from volseg.io.dicom_seg import MAX_LISTED, overlap_refusal
from volseg.io.dicom_series import TO_RAS
from volseg.io.gzip_stream import opened_raw, refusal
from volseg.io.header import ReferenceGrid, ScanHeader, ScanWarning
from volseg.io.polygons import fill_polygons
from volseg.io.series import split_segments
from volseg.io.text_header import shown
from volseg.volume import Geometry
from volseg.words import format_count, format_list

RTSTRUCT = "1.2.840.10008.5.1.4.1.1.481.3"
CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
OFF_PLANE = 0.01  # of the distance of slices, from which a contour is beside its slice
TILTED = 0.1  # of the distance of slices, that a contour may span
EDGE = 0.5  # of a pixel, to which the scan reaches beyond the centre of its last one
LEFT_OUT, SPARSE, BESIDE, CUT = "W_ROI", "W_SPARSE", "W_PLANES", "W_CUT"


@dataclass(slots=True)
class Region:
    """A region of interest as it is drawn.

    Args:
        number: the label. contours: (N, 3) points each, in voxels of the scan.
        others: kinds of contours that bound nothing, such as POINT.
    """

    number: int
    name: str
    contours: list[np.ndarray] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class Drawing:
    """Regions with their contours by slice.

    Args:
        axis: of the scan, along which slices follow each other.
        polygons: number of the region → slice → (N, 2) corners each, on the two other axes.
    """

    names: dict[int, str]
    axis: int
    polygons: dict[int, dict[int, list[np.ndarray]]]


def read_header(file: DicomObject, path: Path, grid: ReferenceGrid | None) -> ScanHeader:
    """Return the header of a mask on the grid of the scan on which contours are drawn.

    Its warnings say what was left out, and where contours are missing.

    Raises:
        ScanError: the scan is not given (`E_NOGEOM`) or is another one (`E_PAIR`), or there is no
            closed contour (`E_LABELS`).

    Source: DICOM PS3.3 C.8.8.6 (ROI contour)
    """
    if grid is None:
        problem = "holds contours, which have no grid of their own"
        fix = "give its scan: in the column image of cases.csv, or read_mask(path, like=scan)"
        raise refusal(path, "E_NOGEOM", problem, fix)
    regions, notes = _regions(file, path, grid)
    drawn = [region for region in regions if region.contours]
    if not drawn:
        kinds = sorted({kind for region in regions for kind in region.others})
        problem = f"holds no closed contour{': ' * bool(kinds)}{format_list(kinds, 3)}"
        raise refusal(path, "E_LABELS", problem, "give the contours of a region")
    drawing, oddities = _draw(drawn, grid.geometry, path)
    notes += oddities
    if open_ones := [region for region in regions if region.others]:
        listed = [f"{shown(region.name)} ({region.others[0]})" for region in open_ones]
        text = f"contours that bound nothing are left out: {format_list(listed, 5)}"
        notes.append(ScanWarning(LEFT_OUT, text))
    return ScanHeader(
        geometry=grid.geometry,
        dtype=np.dtype(np.min_scalar_type(max(drawing.names))),
        path=file.path,
        content=drawing,
        frame_of_reference=grid.frame_of_reference,
        warnings=tuple(notes),
    )


def _regions(
    file: DicomObject, path: Path, grid: ReferenceGrid
) -> tuple[list[Region], list[ScanWarning]]:
    """Return the chosen regions, with their contours in voxels of the scan, and notes on names."""
    data = file.data
    items = {int(item.ROINumber): item for item in items_of(data, "StructureSetROISequence")}
    names, notes = names_of(data, items, "ROIName")
    if names and min(names) < 1:
        problem = f"numbers a region {min(names)}, but 0 is the background"
        raise refusal(path, "E_LABELS", problem, FIX)
    regions = {
        number: Region(number, names[number])
        for number in choose_segments(names, split_segments(path)[1], path, "ROI")
    }
    for item in items_of(data, "ROIContourSequence"):
        region = regions.get(int(item.ReferencedROINumber))
        if region is None:
            continue
        _check_space(items[region.number], data, grid, path)
        for contour in items_of(item, "ContourSequence"):
            _add_contour(region, contour, grid.geometry, path)
    return list(regions.values()), notes


def _check_space(item: Any, data: Any, grid: ReferenceGrid, path: Path) -> None:
    """Refuse contours in another frame of reference than the scan's."""
    frame = str(item.get("ReferencedFrameOfReferenceUID") or data.get("FrameOfReferenceUID") or "")
    if frame and grid.frame_of_reference and frame != grid.frame_of_reference:
        problem = "is drawn in another frame of reference than that of the scan"
        raise refusal(path, "E_PAIR", problem, "give the scan on which it was drawn")


def _add_contour(region: Region, contour: Any, geometry: Geometry, path: Path) -> None:
    kind = str(contour.get("ContourGeometricType") or "unknown")
    points = _points(contour, path)
    if kind not in CLOSED or len(points) < 3:
        region.others.append(kind if kind not in CLOSED else f"{len(points)} points")
        return
    region.contours.append(geometry.to_index(points * TO_RAS))


def _points(contour: Any, path: Path) -> np.ndarray:
    """Return (N, 3) points in mm, in DICOM's axes.

    pydicom's own conversion of each number takes most of the time.
    """
    element = contour.get_item("ContourData")
    stored = None if element is None else element.value
    if isinstance(stored, bytes):
        text = stored.decode("latin-1").replace("\0", " ").strip()
        stored = text.split("\\") if text else []
    numbers = np.array([] if stored is None else stored, dtype=float).ravel()
    if len(numbers) % 3 or not np.isfinite(numbers).all():
        raise refusal(path, "E_DAMAGED", "holds a contour whose points are not x, y, z", FIX)
    return numbers.reshape(-1, 3)


def _draw(
    regions: Sequence[Region], geometry: Geometry, path: Path
) -> tuple[Drawing, list[ScanWarning]]:
    """Sort contours by slice, and describe what is unusual."""
    contours = [contour for region in regions for contour in region.contours]
    spans = np.array([np.ptp(contour, axis=0) for contour in contours])
    axis = int(spans.sum(axis=0).argmin())
    if spans[:, axis].max() > TILTED:
        problem = (
            f"its contours are not parallel to the slices: they span {spans[:, axis].max():.2g}"
        )
        raise refusal(path, "E_PAIR", problem, "give the scan on which it was drawn")
    polygons: dict[int, dict[int, list[np.ndarray]]] = {}
    notes: list[ScanWarning] = []
    off = 0.0
    for region in regions:
        heights = np.array([contour[:, axis].mean() for contour in region.contours])
        slices = np.rint(heights).astype(int)
        _check_slices(region, heights, slices, geometry.shape[axis], path)
        off = max(off, float(np.abs(heights - slices).max()))
        in_plane = [np.delete(contour, axis, axis=1) for contour in region.contours]
        by_slice = defaultdict(list)
        for index, polygon in zip(slices.tolist(), in_plane, strict=True):
            by_slice[index].append(polygon)
        polygons[region.number] = dict(by_slice)
        notes += _notes_on(region, by_slice, np.delete(geometry.shape, axis))
    if off > OFF_PLANE:
        mm = off * geometry.spacing_mm[axis]
        text = f"contours lie up to {mm:.3g} mm beside the slices, and are drawn on the nearest"
        notes.append(ScanWarning(BESIDE, text))
    names = {region.number: region.name for region in regions}
    return Drawing(names, axis, polygons), notes


def _check_slices(
    region: Region, heights: np.ndarray, slices: np.ndarray, n: int, path: Path
) -> None:
    """Refuse contours outside the scan, or of several heights on one slice."""
    fix = "give the scan on which it was drawn"
    outside = int(((slices < 0) | (slices >= n)).sum())
    if outside:
        count = f"{outside} of {format_count(len(slices), 'contour')}"
        problem = f"{count} of {shown(region.name)} lie outside the slices of the scan"
        raise refusal(path, "E_PAIR", problem, fix)
    order = np.argsort(heights)
    is_same = np.diff(slices[order]) == 0
    if (is_same & (np.diff(heights[order]) > TILTED)).any():
        problem = f"contours of {shown(region.name)} of several heights lie at one slice"
        raise refusal(path, "E_PAIR", problem, fix)


def _notes_on(
    region: Region, by_slice: dict[int, list[np.ndarray]], size: np.ndarray
) -> Iterator[ScanWarning]:
    """Yield what is unusual with the contours of a region."""
    n_spanned = max(by_slice) - min(by_slice) + 1
    if len(by_slice) < n_spanned:
        text = (
            f"{shown(region.name)} has contours on {len(by_slice)} of the {n_spanned} slices that "
            "it spans; the others stay background"
        )
        yield ScanWarning(SPARSE, text)
    points = np.concatenate([polygon for part in by_slice.values() for polygon in part])
    if ((points < -EDGE) | (points > size - 1 + EDGE)).any():
        text = f"{shown(region.name)} reaches beyond the scan and is cut off there"
        yield ScanWarning(CUT, text)


def read_voxels(header: ScanHeader, path: Path) -> tuple[np.ndarray, str]:
    """Return the labels (I, J, K), the numbers of the regions, and the SHA-256 of the file.

    Raises:
        ScanError: regions overlap (`E_OVERLAP`).
    """
    drawing = header.content
    assert isinstance(drawing, Drawing)
    labels = np.zeros(header.geometry.shape, header.dtype, order="F")
    slices = np.moveaxis(labels, drawing.axis, 0)
    overlaps: dict[tuple[int, int], None] = {}
    for number, by_slice in drawing.polygons.items():
        for index, polygons in by_slice.items():
            box, inside = fill_polygons(polygons, (slices.shape[1], slices.shape[2]))
            target = slices[index][box]
            others = np.unique(target[inside & (target != 0)])[:MAX_LISTED].tolist()
            overlaps |= {(other, number): None for other in others}
            target[inside] = number
    if overlaps:
        raise overlap_refusal(list(overlaps), drawing.names, path)
    with opened_raw(header.path) as file:
        return labels, hashlib.sha256(rest_of(file)).hexdigest()


def read_names(header: ScanHeader) -> dict[int, str]:
    """Return label → name of the regions that are taken."""
    assert isinstance(header.content, Drawing)
    return {number: name for number, name in header.content.names.items() if name}

"""Write masks as DICOM segmentations and contours, sound ones and faulty ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from dicom_files import LPS, NAME, group, numbers, orientation, save
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import UID, ExplicitVRLittleEndian, SegmentationStorage, generate_uid

from volseg.volume import Geometry, Volume

LABELMAP = UID("1.2.840.10008.5.1.4.1.1.66.7")
RTSTRUCT = UID("1.2.840.10008.5.1.4.1.1.481.3")


@dataclass(frozen=True, kw_only=True)
class Seg:
    """How a segmentation is written.

    Args:
        kind: BINARY, FRACTIONAL or LABELMAP. names: label → name.
        keeps_empty: write also frames without a voxel.
        distance: state the distance of slices.
        seed: of the order of the frames.
        edit: called with the data set before it is written.
    """

    kind: str = "BINARY"
    names: Mapping[int, str] = field(default_factory=dict)
    syntax: UID = ExplicitVRLittleEndian
    keeps_empty: bool = False
    distance: bool = True
    seed: int = 0
    edit: Callable[[Dataset], object] = lambda header: None


def write_seg(layers: Volume | Sequence[Volume], path: Path, how: Seg | None = None) -> Path:
    """Write labels; several layers hold segments that may overlap."""
    how, layers = how or Seg(), [layers] if isinstance(layers, Volume) else layers
    geometry = layers[0].geometry
    frames = _frames(layers, how)
    frames = [frames[index] for index in np.random.default_rng(how.seed).permutation(len(frames))]
    header = _common(LABELMAP if how.kind == "LABELMAP" else SegmentationStorage, "SEG")
    header.SegmentationType = how.kind
    header.Rows, header.Columns = geometry.shape[1], geometry.shape[0]
    header.NumberOfFrames, header.SamplesPerPixel = len(frames), 1
    header.PhotometricInterpretation, header.PixelRepresentation = "MONOCHROME2", 0
    bits = 1 if how.kind == "BINARY" else 8
    header.BitsAllocated = header.BitsStored = bits
    header.HighBit = bits - 1
    if how.kind == "FRACTIONAL":
        header.MaximumFractionalValue = 200
    labels = sorted({int(label) for layer in layers for label in np.unique(layer.array)} - {0})
    header.SegmentSequence = [
        group(SegmentNumber=label, SegmentLabel=how.names.get(label, f"segment {label}"))
        for label in labels
    ]
    measures = group(PixelSpacing=numbers(reversed(geometry.spacing_mm[:2])))
    if how.distance:
        measures.SpacingBetweenSlices = numbers([geometry.spacing_mm[2]])[0]
    shared = group(
        PixelMeasuresSequence=measures,
        PlaneOrientationSequence=group(ImageOrientationPatient=orientation(geometry)),
    )
    header.SharedFunctionalGroupsSequence = [shared]
    header.PerFrameFunctionalGroupsSequence = [_place(geometry, *frame[:2]) for frame in frames]
    content = _pixels([pixels for _, _, pixels in frames], bits)
    header.PixelData = content + bytes(len(content) % 2)
    header["PixelData"].VR = "OB" if bits == 8 else "OW"
    how.edit(header)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(header, path, how.syntax)
    return path


def _frames(layers: Sequence[Volume], how: Seg) -> list[tuple[int, int, np.ndarray]]:
    """Return slice, segment (0 in a label map) and pixels (rows, columns) of each frame."""
    frames = []
    for layer in layers:
        for k in range(layer.geometry.shape[2]):
            pixels = layer.array[:, :, k].T
            if how.kind == "LABELMAP":
                frames.append((k, 0, pixels))
                continue
            for label in np.unique(layer.array)[1:]:
                value = 150 if how.kind == "FRACTIONAL" else 1
                frames.append((k, int(label), np.where(pixels == label, value, 0)))
    return [frame for frame in frames if how.keeps_empty or frame[2].any()]


def _place(geometry: Geometry, index: int, segment: int) -> Dataset:
    affine = geometry.affine
    position = numbers(LPS * (affine[:3, 3] + index * affine[:3, 2]))
    item = group(PlanePositionSequence=group(ImagePositionPatient=position))
    if segment:
        item.SegmentIdentificationSequence = [group(ReferencedSegmentNumber=segment)]
    return item


def _pixels(frames: Sequence[np.ndarray], bits: int) -> bytes:
    stack = np.stack(frames).astype(np.uint8)
    return np.packbits(stack.ravel(), bitorder="little").tobytes() if bits == 1 else stack.tobytes()


def refer_to(path: Path, series: str) -> Path:
    """Let a mask say of which series it is."""
    header = dcmread(path)
    item = group(SeriesInstanceUID=series)
    if header.Modality == "SEG":
        header.ReferencedSeriesSequence = [item]
    else:
        study = group(RTReferencedSeriesSequence=item)
        header.ReferencedFrameOfReferenceSequence = [group(RTReferencedStudySequence=study)]
    header.save_as(path)
    return path


def _common(sop_class: UID, modality: str) -> Dataset:
    header = Dataset()
    header.SOPClassUID, header.Modality = sop_class, modality
    header.SOPInstanceUID, header.SeriesInstanceUID = generate_uid(), generate_uid()
    header.PatientName, header.PatientID, header.PatientBirthDate = NAME, NAME, "19611111"
    header.SeriesDescription, header.StudyDate = f"Thorax {NAME}", "20111111"
    header.ContentCreatorName = NAME
    return header


@dataclass(frozen=True, kw_only=True)
class Roi:
    """A region of contours: (N, 3) points each, in RAS mm."""

    number: int
    contours: Sequence[np.ndarray]
    name: str = "GTV"
    kind: str = "CLOSED_PLANAR"


def write_rtstruct(rois: Sequence[Roi], path: Path, *, frame: str = "") -> Path:
    """Write contours; `frame` is the UID of their frame of reference."""
    header = _common(RTSTRUCT, "RTSTRUCT")
    header.StructureSetLabel, header.StructureSetDate = NAME, "20111111"
    header.StructureSetROISequence = [
        group(ROINumber=roi.number, ROIName=roi.name, ReferencedFrameOfReferenceUID=frame)
        for roi in rois
    ]
    header.ROIContourSequence = []
    for roi in rois:
        item = group(ReferencedROINumber=roi.number)
        item.ContourSequence = [
            group(
                ContourGeometricType=roi.kind,
                NumberOfContourPoints=len(contour),
                ContourData=numbers((np.asarray(contour) * LPS).ravel()),
            )
            for contour in roi.contours
        ]
        header.ROIContourSequence.append(item)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(header, path)
    return path


def contour_on(geometry: Geometry, polygon: np.ndarray, index: float) -> np.ndarray:
    """Return the points (N, 3) in RAS mm of a polygon (N, 2) in voxels, on a slice."""
    return geometry.to_world_mm(np.column_stack([polygon, np.full(len(polygon), float(index))]))

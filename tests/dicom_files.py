"""Write volumes as DICOM series, sound ones and faulty ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    generate_uid,
)

from volseg.volume import Geometry, Volume

NAME = "PLANTED^NAME"
STUDY, SERIES, FRAME = (f"1.2.826.0.1.3680043.8.498.1234567890{end}" for end in "123")
LPS = np.array([-1.0, -1.0, 1.0])
Edit = Callable[[Dataset, int], None]


@dataclass(frozen=True, kw_only=True)
class Series:
    """How a volume is written.

    Args:
        slopes: (slope, intercept) of each slice, by default 1 and 0.
        edit: called with each file's data set and its slice, before it is written.
        seed: of the order of the files and of the UIDs.
    """

    syntax: UID = ExplicitVRLittleEndian
    slopes: Sequence[tuple[float, float]] = ()
    edit: Edit = field(default=lambda header, index: None)
    seed: int = 0


def oblique_volume(shape=(9, 7, 5), seed=0, *, spacing=(0.7, 1.3, 2.9), dtype=np.int16) -> Volume:
    """Return random voxels on a rotated, anisotropic grid off the origin."""
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = rotation * spacing
    affine[:3, 3] = rng.uniform(-200, 200, 3)
    info = np.iinfo(dtype)
    array = rng.integers(max(info.min, -2000), min(info.max, 3000), shape).astype(dtype)
    return Volume(np.asfortranarray(array), Geometry(shape, affine))


def write_series(volume: Volume, folder: Path, how: Series | None = None) -> Path:
    """Write a file per slice of the third axis, with names in random order."""
    how = how or Series()
    folder.mkdir(parents=True, exist_ok=True)
    uid = generate_uid(entropy_srcs=[str(folder), str(how.seed)])
    names = np.random.default_rng(how.seed).permutation(volume.geometry.shape[2])
    for index in range(volume.geometry.shape[2]):
        header = slice_header(volume, index, how)
        header.SeriesInstanceUID = uid
        how.edit(header, index)
        save(header, folder / f"IM{names[index]:04d}", how.syntax)
    return folder


def complete(header: Dataset, index: int = 0) -> None:
    """Add what DICOM demands of an image, and a patient."""
    header.StudyInstanceUID, header.SeriesInstanceUID = STUDY, SERIES
    header.FrameOfReferenceUID, header.PositionReferenceIndicator = FRAME, ""
    header.PatientSex, header.StudyTime, header.ReferringPhysicianName = "O", "101010", NAME
    header.StudyID, header.AccessionNumber, header.SeriesNumber = "1", "7", 1
    header.Manufacturer, header.InstanceNumber = "none", index + 1
    header.AcquisitionDate = header.ContentDate = header.SeriesDate = "20111111"


def slice_header(volume: Volume, index: int, how: Series) -> Dataset:
    """Return the data set of a slice, with its pixels."""
    affine = volume.geometry.affine
    header = image_header(volume.array[:, :, index].T)
    header.SOPClassUID = CTImageStorage
    header.Modality = "CT"
    header.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    header.InstanceNumber = index + 1
    place = affine[:3, 3] + index * affine[:3, 2]
    header.ImagePositionPatient = numbers(LPS * place)
    header.ImageOrientationPatient = orientation(volume.geometry)
    header.PixelSpacing = numbers(reversed(volume.geometry.spacing_mm[:2]))
    header.SliceThickness = numbers([volume.geometry.spacing_mm[2]])[0]
    slope, intercept = how.slopes[index] if how.slopes else (1, 0)
    header.RescaleSlope, header.RescaleIntercept = slope, intercept
    return header


def image_header(pixels: np.ndarray) -> Dataset:
    """Return a data set with pixels (rows, columns), and all that names a patient."""
    header = Dataset()
    header.SOPInstanceUID = generate_uid()
    header.StudyInstanceUID = generate_uid()
    header.PatientName, header.PatientID, header.PatientBirthDate = NAME, NAME, "19611111"
    header.SeriesDescription, header.StudyDate = f"Thorax {NAME}", "20111111"
    header.Rows, header.Columns = pixels.shape
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated = header.BitsStored = 8 * pixels.dtype.itemsize
    header.HighBit = header.BitsStored - 1
    header.PixelRepresentation = int(pixels.dtype.kind == "i")
    content = np.ascontiguousarray(pixels).tobytes()
    header.PixelData = content + bytes(len(content) % 2)
    header["PixelData"].VR = "OB" if pixels.dtype.itemsize == 1 else "OW"
    return header


def save(header: Dataset, path: Path, syntax: UID = ExplicitVRLittleEndian) -> None:
    header.file_meta = FileMetaDataset()
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    if syntax.is_encapsulated:
        header.compress(syntax, generate_instance_uid=False)
    elif not syntax.is_little_endian:
        pixels = np.frombuffer(header.PixelData, f"u{header.BitsAllocated // 8}")
        header.PixelData = pixels.byteswap().tobytes()
    header.file_meta.TransferSyntaxUID = syntax
    dcmwrite(path, header, enforce_file_format=True)


def write_enhanced(volume: Volume, path: Path, how: Series | None = None) -> Path:
    """Write all slices into one enhanced MR file, in random order."""
    how = how or Series()
    order = np.random.default_rng(how.seed).permutation(volume.geometry.shape[2])
    frames = np.stack([volume.array[:, :, index].T for index in order])
    header = image_header(frames[0])
    header.SOPClassUID, header.Modality = EnhancedMRImageStorage, "MR"
    header.SeriesInstanceUID, header.NumberOfFrames = generate_uid(), len(frames)
    header.PixelData = frames.tobytes() + bytes(frames.nbytes % 2)
    header.SharedFunctionalGroupsSequence = [
        group(
            PixelMeasuresSequence=group(
                PixelSpacing=numbers(reversed(volume.geometry.spacing_mm[:2])),
                SliceThickness=numbers([volume.geometry.spacing_mm[2]])[0],
            ),
            PlaneOrientationSequence=group(ImageOrientationPatient=orientation(volume.geometry)),
        )
    ]
    affine = volume.geometry.affine
    header.PerFrameFunctionalGroupsSequence = [
        group(
            PlanePositionSequence=group(
                ImagePositionPatient=numbers(LPS * (affine[:3, 3] + index * affine[:3, 2]))
            ),
            PixelValueTransformationSequence=group(
                RescaleSlope=how.slopes[index][0] if how.slopes else 1,
                RescaleIntercept=how.slopes[index][1] if how.slopes else 0,
            ),
        )
        for index in order
    ]
    how.edit(header, 0)
    save(header, path, how.syntax)
    return path


def group(**values: Any) -> Dataset:
    """Return a data set; a data set in it becomes a sequence of one item."""
    result = Dataset()
    for name, value in values.items():
        setattr(result, name, [value] if isinstance(value, Dataset) else value)
    return result


def orientation(geometry: Geometry) -> list[str]:
    axes = geometry.affine[:3, :2] / np.linalg.norm(geometry.affine[:3, :2], axis=0)
    return numbers((LPS[:, None] * axes).T.ravel())


def numbers(values: Any) -> list[str]:
    """Return numbers as DICOM stores them: text of at most 16 characters."""
    return [f"{float(value):.9g}"[:16] for value in values]

"""Masks in DICOM: the one segmentation or set of contours in a file or folder."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np

from volseg.errors import VolsegError
from volseg.io import dicom_seg, rtstruct
from volseg.io.dicom_frames import Skipped, Unusable, holds_dicom, read_frames, reason_of
from volseg.io.dicom_object import DicomObject, items_of, read_object
from volseg.io.dicom_seg import Segmentation
from volseg.io.dicom_series import files_below, read_folder
from volseg.io.gzip_stream import COPY_AGAIN, refusal
from volseg.io.header import ReferenceGrid, ScanHeader
from volseg.io.paths import visible_paths
from volseg.io.series import place_of
from volseg.words import format_list

KINDS = ("SEG", "RTSTRUCT")
FIX = "give a DICOM segmentation (SEG) or contours (RTSTRUCT), or a mask in another format"


def mask_files(folder: Path) -> list[Path]:
    """List the segmentations and contours in a folder and in those below."""
    return sorted(path for path in files_below(folder) if is_mask(read_frames(path)))


def lone_masks(folder: Path) -> list[Path]:
    """List the segmentations and contours in a folder, but not below; none beside a series."""
    paths = [path for path in visible_paths(folder) if path.is_file()]
    files = [path for path in paths if is_mask(read_frames(path))]
    return [] if files and read_folder(folder).volumes else files


def is_mask(file: object) -> bool:
    """Check whether a file without a slice holds a segmentation or contours."""
    return isinstance(file, Skipped) and file.reason.removeprefix("not an image: ") in KINDS


def referenced_series(path: Path) -> list[str]:
    """Return the UIDs of the series of which a file is a mask; none if it does not say so."""
    try:
        data = read_object(path).data
        items = items_of(data, "ReferencedSeriesSequence")
        for frame in items_of(data, "ReferencedFrameOfReferenceSequence"):
            for study in items_of(frame, "RTReferencedStudySequence"):
                items += items_of(study, "RTReferencedSeriesSequence")
        return list(dict.fromkeys(str(item.SeriesInstanceUID) for item in items))
    except Exception:  # a damaged file is no mask of anything; reading it as one says why
        return []


def read_header(path: Path, grid: ReferenceGrid | None = None) -> ScanHeader:
    """Read and check the header of a mask, without pixels.

    Args:
        path: of a file, or of a folder with one mask; `RS.dcm#GTV-1,3` takes two of its regions.
        grid: of the scan, which contours need. A segmentation has a grid of its own.

    Raises:
        ScanError: it is no mask, or cannot be trusted; `code` is the reason.
    """
    file = read_object(_file_of(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on values that are not used
            return _header_of(file, path, grid)
    except Unusable as error:
        code, _, text = str(error).partition(": ")
        raise refusal(path, code, text, "export it again") from error
    except VolsegError:
        raise
    except Exception as error:  # pydicom converts a value when it is asked for
        raise refusal(path, "E_DAMAGED", reason_of(error), COPY_AGAIN) from error


def _header_of(file: DicomObject, path: Path, grid: ReferenceGrid | None) -> ScanHeader:
    if grid is not None and grid.series in referenced_series(file.path):
        # Some writers, such as rt-utils, make up a frame of reference.
        grid = replace(grid, frame_of_reference="")
    if file.sop_class in dicom_seg.CLASSES:
        header = dicom_seg.read_header(file, path, grid)
        frames = header.frame_of_reference, "" if grid is None else grid.frame_of_reference
        if all(frames) and frames[0] != frames[1]:
            problem = "is in another frame of reference than the scan"
            raise refusal(path, "E_PAIR", problem, "give the scan that was segmented")
        return header
    if file.sop_class == rtstruct.RTSTRUCT:
        return rtstruct.read_header(file, path, grid)
    raise refusal(path, "E_LABELS", "is DICOM, but no mask", FIX)


def _file_of(path: Path) -> Path:
    place = place_of(path)
    if not place.is_dir():
        return place
    files = mask_files(place)
    if len(files) == 1:
        return files[0]
    if not holds_dicom(place):
        problem = "is a folder without DICOM files"
        raise refusal(path, "E_NOTFILE", problem, "give the path of a mask")
    names = format_list([str(file.relative_to(place)) for file in files], 3)
    problem = f"holds {len(files)} DICOM masks: {names}" if files else "holds no DICOM mask"
    raise refusal(path, "E_LABELS", problem, "give the file of one of them" if files else FIX)


def read_voxels(header: ScanHeader, path: Path) -> tuple[np.ndarray, str]:
    """Return the labels (I, J, K) and the SHA-256 of the file.

    Raises:
        ScanError: regions overlap (`E_OVERLAP`), or pixels are missing or damaged.
    """
    is_seg = isinstance(header.content, Segmentation)
    return (dicom_seg if is_seg else rtstruct).read_voxels(header, path)


def read_names(header: ScanHeader) -> dict[int, str]:
    """Return label → name of the regions."""
    is_seg = isinstance(header.content, Segmentation)
    return (dicom_seg if is_seg else rtstruct).read_names(header)

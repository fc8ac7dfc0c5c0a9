"""DICOM series as volumes: read a header; read voxels. `folder#key` is one of several volumes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from volseg.errors import ScanError, VolsegError
from volseg.io.dicom_frames import Frame, rest_of
from volseg.io.dicom_pixels import CODEC_FIX, codec_problem, stored_dtype, stored_values
from volseg.io.dicom_series import (
    DicomFolder,
    DicomVolume,
    Finding,
    collect,
    key_for,
    read_folder,
)
from volseg.io.dicom_suv import suv_of
from volseg.io.gzip_stream import opened_raw, refusal
from volseg.io.header import ScanHeader, ScanWarning, checked_grid, rounded
from volseg.io.series import IN_SUV, TILT, place_of, split_marks, split_series
from volseg.io.voxels import joined_digest
from volseg.recipe.units import SUV
from volseg.words import format_list


def folder_of(place: Path) -> DicomFolder:
    """List the volumes of a folder and of those below, or of a file."""
    return read_folder(place) if place.is_dir() else collect([place])


def find_volume(path: Path) -> DicomVolume:
    """Return the volume that a path names, or the only one of its folder or file.

    Raises:
        ScanError: there is none, or several and none is named.
    """
    place, key = split_series(path)
    folder = folder_of(place)
    if TILT in split_marks(path)[1]:
        folder.volumes = [volume.although_tilted() for volume in folder.volumes]
    if key is not None:
        matching = [volume for volume in folder.volumes if volume.key == key]
        if not matching:
            text = f"has no series {key}; it has {_listed(folder)}"
            raise refusal(path, "E_SERIES", text, f"volseg check {place} lists the series")
        return matching[0]
    usable = [volume for volume in folder.volumes if volume.error is None]
    if len(usable) == 1:
        return usable[0]
    if not folder.volumes:
        raise _none_found(folder, path)
    if not usable:
        return folder.volumes[0]
    text = f"holds {len(usable)} series: {_listed(folder)}"
    raise refusal(path, "E_SERIES", text, "choose one with --series, or give it a folder")


def key_of(path: Path) -> str:
    """Return the key of the volume at a path; of its name if there is none to read."""
    try:
        return find_volume(path).key
    except VolsegError:
        return key_for(path.name)


def is_pet(path: Path) -> bool:
    """Check whether a path names a DICOM series of PET."""
    try:
        return find_volume(path).frames[0].modality == "PT"
    except VolsegError:
        return False


def _listed(folder: DicomFolder) -> str:
    return format_list([volume.key for volume in folder.volumes], 5) or "none"


def _none_found(folder: DicomFolder, path: Path) -> ScanError:
    reasons = list(dict.fromkeys(skipped.reason for skipped in folder.skipped))
    if not reasons:
        text, fix = "is a folder without DICOM files", "give a scan, or the folder of a series"
        return refusal(path, "E_NOTFILE", text, fix)
    code, colon, text = reasons[0].partition(": ")
    if colon and code.startswith("E_"):
        return refusal(path, code, text, "export the series again")
    text = f"holds no DICOM image: {format_list(reasons, 3)}"
    return refusal(path, "E_NOTIMAGE", text, "give the folder of the images")


def read_header(path: Path) -> ScanHeader:
    """Read and check the headers of a series, without pixels.

    Args:
        path: one that ends in `#SUVbw` is read in SUV by body weight.

    Raises:
        ScanError: the series is no volume that can be trusted; `code` is the reason.

    Source: DICOM PS3.3 C.7.6.2 (image plane), C.7.6.16 (functional groups), PS3.5 8 (pixels)
    """
    volume = find_volume(path)
    if IN_SUV not in split_marks(path)[1] or volume.error is not None:
        return header_of(volume, path)
    files = list(dict.fromkeys(frame.path for frame in volume.frames))
    suv = suv_of(files, split_marks(path)[0])
    frames = [_times(frame, suv.factor) for frame in volume.frames]
    header = header_of(replace(volume, frames=tuple(frames)), path)
    warnings = (*header.warnings, ScanWarning("N_SUV", str(suv)))
    return replace(header, unit=SUV, warnings=warnings)


def _times(frame: Frame, factor: float) -> Frame:
    """Return a slice whose intensities are multiplied by a factor."""
    return replace(frame, slope=frame.slope * factor, intercept=frame.intercept * factor)


def header_of(volume: DicomVolume, path: Path) -> ScanHeader:
    """Return the header of a volume, or refuse it, as `read_header` does."""
    error = volume.error or pixel_finding(volume)
    if error is not None:
        raise refusal(path, error.code, error.text, error.fix)
    assert volume.affine is not None
    affine = rounded(volume.affine)
    geometry, warnings = checked_grid(volume.shape, affine, path, source="DICOM header")
    warnings += [ScanWarning(finding.code, finding.text) for finding in volume.findings]
    scales = {(frame.slope, frame.intercept) for frame in volume.frames}
    dtype, (slope, intercept) = np.dtype(np.float32), (1.0, 0.0)
    if len(scales) == 1:
        dtype, ((slope, intercept),) = stored_dtype(volume.frames[0].pixels), scales
    return ScanHeader(
        geometry=geometry,
        dtype=dtype,
        slope=slope,
        intercept=intercept,
        path=place_of(path),
        content=volume,
        parts=tuple(dict.fromkeys(frame.path for frame in volume.frames)),
        frame_of_reference=volume.frames[0].frame_of_reference,
        series=volume.frames[0].series,
        warnings=tuple(warnings),
    )


def modality_of(header: ScanHeader) -> str:
    """Return the modality that the header of a series states, such as CT; empty if none is."""
    volume = header.content
    return volume.frames[0].modality if isinstance(volume, DicomVolume) else ""


def pixel_finding(volume: DicomVolume) -> Finding | None:
    """Return why pixels cannot be decoded, or differ in type between slices; None if they can."""
    problems = [codec_problem(syntax) for syntax in {f.pixels.syntax for f in volume.frames}]
    problem = next(filter(None, problems), None)
    if problem is not None:
        return Finding("E_CODEC", problem, CODEC_FIX)
    try:
        dtypes = {stored_dtype(frame.pixels) for frame in volume.frames}
    except ValueError as error:
        return Finding("E_DTYPE", str(error), "export the series again")
    if len(dtypes) == 1:
        return None
    text = f"its slices are stored as {format_list(sorted(map(str, dtypes)), 3)}"
    return Finding("E_DTYPE", text, "export the series again")


def read_voxels(header: ScanHeader, path: Path) -> tuple[np.ndarray, str]:
    """Return the stored (I, J, K) in Fortran order, and the SHA-256 of its files' SHA-256.

    Slices with a slope of their own are returned as intensities in float32.

    Raises:
        ScanError: pixels are missing or damaged, or files were replaced after the header was read.
    """
    volume = header.content
    assert isinstance(volume, DicomVolume)
    slices = np.empty(header.geometry.shape[::-1], header.dtype)
    digests: dict[Path, str] = {}
    for place, frame, content in _contents(volume):
        if frame.path not in digests:
            if not frame.pixels.is_of(content):
                text = f"{frame.path.name} was replaced while it was being read"
                raise refusal(path, "E_CHANGED", text, "run again")
            digests[frame.path] = hashlib.sha256(content).hexdigest()
        values = stored_values(content, frame.pixels, frame.path, number=frame.number)
        if header.dtype.kind == "f":
            values = values * frame.slope + frame.intercept
        slices[place] = values
    return slices.T, joined_digest([digests[part] for part in header.parts])


def _contents(volume: DicomVolume) -> Iterator[tuple[int, Frame, bytes]]:
    """Yield index, frame and file of each slice; a file with several frames is read once."""
    order = sorted(range(len(volume.frames)), key=lambda index: str(volume.frames[index].path))
    last, content = None, b""
    for index in order:
        frame = volume.frames[index]
        if frame.path != last:
            with opened_raw(frame.path) as file:
                content = rest_of(file)
            last = frame.path
        yield index, frame, content

"""The table of file formats, from which every command knows which files are scans.

To add one, write `io/<name>.py` and its row at the foot of this file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from volseg.io import dicom, dicom_masks, metaimage, mgh, nifti, nrrd, seg_nrrd, stacks
from volseg.io.dicom_frames import SUFFIXES as DICOM_SUFFIXES
from volseg.io.dicom_frames import holds_dicom, is_dicom
from volseg.io.header import ReferenceGrid, ScanHeader
from volseg.io.series import place_of, split_marks, split_series, split_spacing, split_volume
from volseg.io.voxels import FileContent, read_voxels
from volseg.volume import Volume


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A file format of scans and masks.

    Args:
        name: for messages.
        suffixes: endings of its files, in lower case; a folder is searched for them.
        read_header: reads and checks the header, without voxels.
        read_voxels: returns the stored (I, J, K) in native byte order, and the hash of the file;
            by default the voxels are stored one after another, first index fastest.
        encode: (volume, path, header of the scan that the volume was made from, if any) → the
            contents of the file; None if volseg only reads the format.
        partner_suffixes: endings of the other file of a pair, by which a scan may be opened too.
        holds_masks: False if it stores intensities only, as a compressed picture does.
        holds_scans: False if it stores labels only.
        holds_tilt: True if masks of tilted scans are written in it, on the scan's own affine.
        read_on: reads the header of a mask that may need the grid of its scan, as contours do.
        read_names: header → label → name, if it stores names.
        encode_named: as `encode`, with label → name in place of the header.
    """

    name: str
    suffixes: tuple[str, ...]
    read_header: Callable[[Path], ScanHeader]
    read_voxels: Callable[[ScanHeader, Path], tuple[np.ndarray, str]] = read_voxels
    encode: Callable[[Volume, Path, ScanHeader | None], FileContent] | None = None
    partner_suffixes: tuple[str, ...] = ()
    holds_masks: bool = True
    holds_scans: bool = True
    holds_tilt: bool = False
    read_on: Callable[[Path, ReferenceGrid | None], ScanHeader] | None = None
    read_names: Callable[[ScanHeader], dict[int, str]] | None = None
    encode_named: Callable[[Volume, Path, Mapping[int, str]], FileContent] | None = None


def format_of(path: Path) -> Format:
    """Return the format of a file by its name; if that is unknown, DICOM or NIfTI.

    A folder is one of DICOM. NIfTI checks the contents.
    """
    place = place_of(path)
    name = place.name.lower()
    matching = (row for row in FORMATS if name.endswith(row.suffixes + row.partner_suffixes))
    row = next(matching, None)
    if row is not None:
        return row
    if name.endswith(stacks.SUFFIXES) or split_spacing(path)[1] is not None:
        return STACK
    if os.path.isdir(place) and stacks.is_stack(place) and not holds_dicom(place):
        return STACK
    is_series = name.endswith(DICOM_SUFFIXES) or os.path.isdir(place) or is_dicom(place)
    return DICOM_SERIES if is_series else NIFTI


def mask_format_of(path: Path) -> Format:
    """Return the format of a mask: in DICOM, segmentations and contours are files of their own."""
    row = format_of(path)
    return DICOM_MASKS if row.name == DICOM else row


def is_there(path: Path) -> bool:
    """Check whether the file of a volume exists, or a folder with DICOM files."""
    place, is_stack = place_of(path), split_spacing(path)[1] is not None
    return os.path.isfile(place) or (os.path.isdir(place) and (is_stack or holds_dicom(place)))


def is_scan(path: Path) -> bool:
    """Check whether the name is that of a scan or mask; a pair counts once."""
    return path.name.lower().endswith(SUFFIXES)


def stem_of(path: Path) -> str:
    """Return the file name without the suffix of its format, ignoring case.

    The stem of `scan.nii.gz#3`, a volume of several in a file, is `scan_3`; that of a DICOM series
    its key, because names of folders may be those of patients.
    """
    path, spacing_mm = split_spacing(path)
    if spacing_mm is not None:
        return path.stem if path.name.lower().endswith(stacks.SUFFIXES) else path.name
    _, key = split_series(path)
    if key is not None or format_of(path).name == DICOM:
        return key or dicom.key_of(path)
    file, number = split_volume(path)
    row, mark = format_of(file), "" if number is None else f"_{number}"
    for suffix in sorted(row.suffixes + row.partner_suffixes, key=len, reverse=True):
        if file.name.lower().endswith(suffix):
            return file.name[: -len(suffix)] + mark
    return path.name


def table_name(path: Path) -> str:
    """Return the name of a scan in tables: of DICOM the key, since folders may name patients."""
    place, spacing_mm = split_spacing(path)
    if spacing_mm is not None:
        return place.name
    return stem_of(path) if format_of(path).name == DICOM else split_marks(path)[0].name


def is_dicom_scan(path: Path) -> bool:
    """Check whether a path names a DICOM series, whose folder may be named after a patient."""
    return format_of(path).name == DICOM


def without_places(text: str, names: Mapping[Path, str]) -> str:
    """Return a message for tables, in which the names of files stand for their paths.

    Args:
        names: path of a volume → its name; files in its folder, and the folder, get it too.
    """
    for path, name in names.items():
        place = place_of(path)
        text = _without_place(text, str(place if place.is_dir() else place.parent), name)
    return text


def _without_place(text: str, folder: str, name: str) -> str:
    """Return a text with this name for each path in a folder, up to the next `: ` or `; `."""
    kept, done = [], 0
    while (start := text.find(folder, done)) >= 0:
        after = start + len(folder)
        if text[after : after + 1] in ("", *"/#:; "):
            ends = [at for end in (": ", "; ") if (at := text.find(end, after)) >= 0]
            kept += [text[done:start], name]
            done = min(ends, default=len(text))
        else:  # another folder, whose name starts so
            kept.append(text[done:after])
            done = after
    return "".join([*kept, text[done:]])


def result_suffix(name: str) -> str:
    """Return the suffix of masks in a format of `volseg infer --format`.

    >>> result_suffix("nifti"), result_suffix("seg.nrrd")
    ('.nii.gz', '.seg.nrrd')
    """
    return RESULT_SUFFIX if name == "nifti" else f".{name}"


DICOM = "DICOM"
DICOM_SERIES = Format(
    name=DICOM,
    suffixes=(),  # in a folder of scans such a file is a picture
    read_header=dicom.read_header,
    read_voxels=dicom.read_voxels,
    holds_masks=False,
)
DICOM_MASKS = Format(
    name=DICOM,
    suffixes=(),
    read_header=dicom_masks.read_header,
    read_on=dicom_masks.read_header,
    read_voxels=dicom_masks.read_voxels,
    holds_scans=False,
    read_names=dicom_masks.read_names,
)
STACK = Format(
    name="array or pictures",
    suffixes=(),  # without a spacing, such files are those of classifiers
    read_header=stacks.read_header,
    read_voxels=stacks.read_voxels,
)
NIFTI = Format(
    name="NIfTI",
    suffixes=(".nii", ".nii.gz"),
    read_header=nifti.read_header,
    encode=nifti.encode,
    holds_tilt=True,
)
FORMATS = (
    NIFTI,
    Format(
        name="NIfTI pair",
        suffixes=(".hdr", ".hdr.gz"),
        partner_suffixes=(".img", ".img.gz"),
        read_header=nifti.read_header,
    ),
    Format(
        name="MGH",
        suffixes=(".mgz", ".mgh", ".mgh.gz"),
        read_header=mgh.read_header,
        encode=mgh.encode,
    ),
    Format(  # before NRRD, with whose suffix its own ends
        name="Slicer segmentation",
        suffixes=(".seg.nrrd",),
        read_header=seg_nrrd.read_header,
        read_voxels=seg_nrrd.read_voxels,
        encode=seg_nrrd.encode,
        holds_scans=False,
        read_names=seg_nrrd.read_names,
        encode_named=seg_nrrd.encode_named,
    ),
    Format(
        name="NRRD",
        suffixes=(".nrrd",),
        read_header=nrrd.read_header,
        encode=nrrd.encode,
    ),
    Format(
        name="NRRD header",
        suffixes=(".nhdr",),
        read_header=nrrd.read_header,
    ),
    Format(
        name="MetaImage",
        suffixes=(".mha",),
        read_header=metaimage.read_header,
        encode=metaimage.encode,
    ),
    Format(
        name="MetaImage header",
        suffixes=(".mhd",),
        read_header=metaimage.read_header,
    ),
    STACK,
    DICOM_SERIES,
)
SUFFIXES = tuple(suffix for row in FORMATS for suffix in row.suffixes)
READABLE = ", ".join(SUFFIXES)  # for messages
WRITABLE = ", ".join(suffix for row in FORMATS if row.encode for suffix in row.suffixes)
RESULT_SUFFIX = ".nii.gz"  # of the masks that volseg writes unless another format is requested

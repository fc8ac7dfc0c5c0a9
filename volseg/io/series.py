"""Paths of volumes: `scan.nii.gz#3` is the third of a file, `folder#s…` a DICOM series.

`RS.dcm#GTV-1,3` is the mask of two regions of a DICOM file that holds more.
A mark at the end says how a volume is read: `folder#s…#SUVbw` is a PET in SUV.
`scan.npy#0.8x0.8x2.5mm` is an array whose voxels have this spacing.
"""

from __future__ import annotations

import re
from pathlib import Path

NUMBER = re.compile(r"[1-9][0-9]{0,5}")
KEY = re.compile(r"s[0-9a-f]{12}")  # of a DICOM series in a folder
SPACING = re.compile(r"([0-9.e+-]{1,24})x([0-9.e+-]{1,24})x([0-9.e+-]{1,24})mm")
SPACING_FORM = "--spacing I,J,K in mm, such as 0.8,0.8,2.5"
IN_SUV = "SUVbw"  # convert a PET to standardised uptake values
TILT = "tilt"  # accept a stack that is not at right angles to its slices
MARKS = (IN_SUV, TILT)


def split_marks(path: Path) -> tuple[Path, tuple[str, ...]]:
    """Return the path of a volume, and the marks that say how it is read.

    >>> split_marks(Path("study#s0123456789ab#SUVbw"))[1]
    ('SUVbw',)
    """
    marks: tuple[str, ...] = ()
    while True:
        name, _, mark = path.name.rpartition("#")
        if not name or mark not in MARKS or path.exists():
            return path, marks
        path, marks = path.with_name(name), (mark, *marks)


def with_mark(path: Path, mark: str) -> Path:
    """Return the path of a volume that is read in the way of a mark."""
    return path if mark in split_marks(path)[1] else path.with_name(f"{path.name}#{mark}")


def like_scan(mask: Path, scan: Path) -> Path:
    """Return the path of a mask that may be tilted if its scan may be."""
    return with_mark(mask, TILT) if TILT in split_marks(scan)[1] else mask


def split_volume(path: Path) -> tuple[Path, int | None]:
    """Return the file, and the number of the volume in it, from 1; None if the path names none.

    >>> split_volume(Path("scan.nii.gz#3"))[1]
    3
    """
    path, _ = split_marks(path)
    name, _, number = path.name.rpartition("#")
    if not name or not NUMBER.fullmatch(number) or path.exists():
        return path, None
    return path.with_name(name), int(number)


def split_series(path: Path) -> tuple[Path, str | None]:
    """Return the folder or file, and the key of the DICOM series in it; None if none is named.

    >>> split_series(Path("study#s0123456789ab"))[1]
    's0123456789ab'
    """
    path, _ = split_marks(path)
    name, _, key = path.name.rpartition("#")
    if not name or not KEY.fullmatch(key) or path.exists():
        return path, None
    return path.with_name(name), key


def split_segments(path: Path) -> tuple[Path, str | None]:
    """Return the file of a mask, and the names or numbers of the segments to take, by commas.

    >>> split_segments(Path("RS.dcm#GTV-1,3"))[1]
    'GTV-1,3'
    """
    path, _ = split_marks(path)
    name, _, segments = path.name.partition("#")
    if not name or not segments or path.exists():
        return path, None
    return path.with_name(name), segments


def place_of(path: Path) -> Path:
    """Return the file or folder that holds a volume."""
    return split_segments(split_series(split_volume(split_spacing(path)[0])[0])[0])[0]


def split_spacing(path: Path) -> tuple[Path, tuple[float, float, float] | None]:
    """Return the file or folder, and the spacing (I, J, K) in mm; None if the path names none.

    >>> split_spacing(Path("scan.npy#0.8x0.8x2.5mm"))[1]
    (0.8, 0.8, 2.5)
    """
    path, _ = split_marks(path)
    name, _, text = path.name.rpartition("#")
    match = SPACING.fullmatch(text)
    if not name or match is None or path.exists():
        return path, None
    try:
        i, j, k = map(float, match.groups())
    except ValueError:
        return path, None
    return path.with_name(name), (i, j, k)


def with_spacing(path: Path, spacing_mm: tuple[float, float, float]) -> Path:
    """Return the path of an array or stack whose voxels have this spacing."""
    return path.with_name(f"{path.name}#{'x'.join(map(repr, spacing_mm))}mm")


def with_series(place: Path, key: str) -> Path:
    """Return the path of a DICOM series in a folder or file."""
    return place.with_name(f"{place.name}#{key}")


def with_volume(path: Path, number: int) -> Path:
    """Return the path of a volume of a file."""
    return path.with_name(f"{path.name}#{number}")

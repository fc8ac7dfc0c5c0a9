"""Paths of volumes: `scan.nii.gz#3` is the third of a file, `folder#s…` a DICOM series.

`scan.npy#0.8x0.8x2.5mm` is an array whose voxels have this spacing.
"""

from __future__ import annotations

import re
from pathlib import Path

NUMBER = re.compile(r"[1-9][0-9]{0,5}")
KEY = re.compile(r"s[0-9a-f]{12}")  # of a DICOM series in a folder
SPACING = re.compile(r"([0-9.e+-]{1,24})x([0-9.e+-]{1,24})x([0-9.e+-]{1,24})mm")
SPACING_FORM = "--spacing I,J,K in mm, such as 0.8,0.8,2.5"


def split_volume(path: Path) -> tuple[Path, int | None]:
    """Return the file, and the number of the volume in it, from 1; None if the path names none.

    >>> split_volume(Path("scan.nii.gz#3"))[1]
    3
    """
    name, _, number = path.name.rpartition("#")
    if not name or not NUMBER.fullmatch(number) or path.exists():
        return path, None
    return path.with_name(name), int(number)


def split_series(path: Path) -> tuple[Path, str | None]:
    """Return the folder or file, and the key of the DICOM series in it; None if none is named.

    >>> split_series(Path("study#s0123456789ab"))[1]
    's0123456789ab'
    """
    name, _, key = path.name.rpartition("#")
    if not name or not KEY.fullmatch(key) or path.exists():
        return path, None
    return path.with_name(name), key


def place_of(path: Path) -> Path:
    """Return the file or folder that holds a volume."""
    return split_series(split_volume(split_spacing(path)[0])[0])[0]


def split_spacing(path: Path) -> tuple[Path, tuple[float, float, float] | None]:
    """Return the file or folder, and the spacing (I, J, K) in mm; None if the path names none.

    >>> split_spacing(Path("scan.npy#0.8x0.8x2.5mm"))[1]
    (0.8, 0.8, 2.5)
    """
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

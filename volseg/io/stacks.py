"""Volumes without geometry: NumPy arrays, folders of pictures, TIFF files of several pages.

The path names the voxel spacing, `scan.npy#0.8x0.8x2.5mm`. An array has the axes (I, J, K). Of a
picture, I runs along a row to the right and J down a column; K counts pictures. These axes are
taken for R, A and S.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from volseg.io.gzip_stream import COPY_AGAIN, opened_raw, refusal, skip
from volseg.io.header import ScanHeader, checked_grid, rounded, volume_shape
from volseg.io.medmnist import ERRORS, opened_archive
from volseg.io.npy import array_header, read_array
from volseg.io.paths import visible_paths
from volseg.io.series import SPACING_FORM, place_of, split_spacing
from volseg.io.voxels import joined_digest

ARRAYS, PAGES = (".npy", ".npz"), (".tif", ".tiff")
PICTURES = (".png", *PAGES)  # lossless ones of scans
SUFFIXES = ARRAYS + PICTURES
FIX = (
    f"give {SPACING_FORM} (infer, measure and check), add #0.8x0.8x2.5mm to its path in a table of "
    "cases, or store it as NIfTI"
)
NUMBER = re.compile(r"[0-9]{1,12}(?=[^0-9]*\Z)")  # the last one of a name


def is_stack(path: Path) -> bool:
    """Check whether a path is that of an array, a TIFF file or a folder of pictures."""
    place = place_of(path)
    if os.path.isdir(place):
        return any(_is_picture(file) for file in visible_paths(place))
    return place.name.lower().endswith(SUFFIXES)


def stacks_in(path: Path) -> list[Path]:
    """Return the arrays and stacks at a path: itself, or those in a folder or its subfolders.

    The pictures of a folder are one stack, unless it holds TIFF files of several pages.
    """
    if not path.is_dir():
        return [path] if is_stack(path) else []
    files = visible_paths(path)
    pictures = [file for file in files if _is_picture(file)]
    arrays = [file for file in files if file.name.lower().endswith(ARRAYS)]
    if pictures and not any(_n_pages(file) > 1 for file in pictures):
        return [*arrays, path]
    folders = [file for file in files if file.is_dir() and is_stack(file)]
    return sorted([*arrays, *pictures, *folders])


def _is_picture(path: Path) -> bool:
    return path.name.lower().endswith(PICTURES) and path.is_file()


def _n_pages(path: Path) -> int:
    from volseg.io.images import page_layout  # imports the table of formats, which imports this

    return page_layout(path).n_pages if path.name.lower().endswith(PAGES) else 1


def read_header(path: Path) -> ScanHeader:
    """Read shape and type of an array or stack, without voxels.

    Raises:
        ScanError: the path names no spacing (`E_NOGEOM`), or there is no such volume.
    """
    place, spacing_mm = split_spacing(path)
    if spacing_mm is None:
        if not place.is_dir():
            with opened_raw(place):  # a missing file is that first
                pass
        raise refusal(path, "E_NOGEOM", "holds no voxel spacing", FIX)
    if place.is_dir():
        files = _ordered(place)
        shape, dtype = _layout_of_pictures(files, place)
    else:
        files = [place]
        shape, dtype = _layout_of_file(place)
    one = "store each volume in a file of its own"
    voxels = volume_shape(shape, place, one=one).shape
    affine = rounded(np.diag([*spacing_mm, 1.0]))
    geometry, warnings = checked_grid(voxels, affine, place, source="--spacing")
    return ScanHeader(
        geometry=geometry,
        dtype=_read_type(dtype, place),
        path=place,
        parts=tuple(files),
        warnings=tuple(warnings),
    )


def read_voxels(header: ScanHeader, path: Path) -> tuple[np.ndarray, str]:
    """Return the stored (I, J, K), and the SHA-256 of the SHA-256 of its files.

    Raises:
        ScanError: voxels are missing or damaged, or files were replaced after the header was read.
    """
    digests = [_digest_of(file) for file in header.parts]
    place = header.path
    if place.is_dir() or place.name.lower().endswith(PICTURES):
        array = _read_pictures(header)
    else:
        with _opened_array(place) as file:
            array = read_array(file).reshape(header.geometry.shape)
    if digests != [_digest_of(file) for file in header.parts]:
        raise refusal(path, "E_CHANGED", "was replaced while it was being read", "run again")
    return array.astype(header.dtype, order="F", copy=False), joined_digest(digests)


def _digest_of(path: Path) -> str:
    digest = hashlib.sha256()
    with opened_raw(path, digest) as file:
        skip(file, sys.maxsize)
    return digest.hexdigest()


def _read_type(dtype: np.dtype, place: Path) -> np.dtype:
    """Return the type in which voxels are read: native, and one that masks and scans may have."""
    if dtype.kind == "b":
        return np.dtype(np.uint8)
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        fix = "store numbers: integers or floating point up to 64 bits"
        raise refusal(place, "E_DTYPE", f"holds values of type {dtype}", fix)
    return np.dtype(np.float32) if dtype == np.float16 else dtype.newbyteorder("=")


# ---- arrays


def _layout_of_file(place: Path) -> tuple[tuple[int, ...], np.dtype]:
    """Return the shape and type of an array or of a TIFF file."""
    if place.name.lower().endswith(PICTURES):
        return _layout_of_pictures([place], place)
    with _opened_array(place) as file:
        shape, dtype = array_header(file)
        start = file.tell()
    n_bytes = dtype.itemsize
    for size in shape:
        n_bytes *= int(size)
    if not place.name.lower().endswith(".npz") and os.path.getsize(place) - start < n_bytes:
        text = f"holds {os.path.getsize(place) - start:,} of {n_bytes:,} voxel bytes"
        raise refusal(place, "E_TRUNCATED", text, COPY_AGAIN)
    return shape, dtype


@contextmanager
def _opened_array(place: Path) -> Iterator[Any]:
    """Open an array, the only one of an archive; damage becomes the user's error."""
    if place.name.lower().endswith(".npz"):
        with (
            opened_archive(place) as archive,
            archive.open(_only_member(archive, place)) as file,
        ):
            yield file
        return
    try:
        with opened_raw(place):  # refuses what is no file, and says why
            pass
        with open(place, "rb") as file:
            yield file
    except ERRORS as error:
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        text = f"cannot be read as NumPy array ({reason})"
        raise refusal(place, "E_DAMAGED", text, COPY_AGAIN) from error


def _only_member(archive: zipfile.ZipFile, place: Path) -> str:
    names = archive.namelist()
    if len(names) != 1:
        listed = ", ".join(name.removesuffix(".npy") for name in names[:5]) or "none"
        text = f"holds {len(names)} arrays: {listed}"
        raise refusal(place, "E_NDIM", text, "store one array of three axes alone")
    return names[0]


# ---- pictures


def _ordered(folder: Path) -> list[Path]:
    """Return the pictures of a folder by the last number of their names, which has no gap."""
    files = [file for file in visible_paths(folder) if _is_picture(file)]
    if not files:
        fix = f"give a folder of pictures ({', '.join(PICTURES)})"
        raise refusal(folder, "E_NOTIMAGE", "is a folder without pictures", fix)
    numbers = _numbers_of(files, folder)
    ordered = sorted(files, key=numbers.__getitem__)
    for before, after in pairwise(ordered):
        step = numbers[after] - numbers[before]
        if step != 1:
            what = "a slice is missing" if step else "two slices have one number"
            text = f"{what}: {after.name} follows {before.name}"
            raise refusal(folder, "E_GAP", text, "export the slices again, with numbers in a row")
    return ordered


def _numbers_of(files: list[Path], folder: Path) -> dict[Path, int]:
    """Return the number at the end of each name, which is all in which they differ."""
    matches = {file: NUMBER.search(file.stem) for file in files}
    numbers = {file: int(match[0]) for file, match in matches.items() if match is not None}
    starts = {NUMBER.sub("", file.stem) for file in files}
    if len(numbers) < len(files) or len(starts) > 1:
        lone = next((file for file in files if file not in numbers), files[-1])
        text = f"{lone.name} and {files[0].name} are not the slices of one stack by their names"
        fix = "name them alike, with the number of the slice at the end, each stack in its folder"
        raise refusal(folder, "E_SERIES", text, fix)
    return numbers


def _layout_of_pictures(files: list[Path], place: Path) -> tuple[tuple[int, ...], np.dtype]:
    from volseg.io.images import page_layout  # imports the table of formats, which imports this

    layouts = [page_layout(file) for file in files]
    first = layouts[0]
    for file, layout in zip(files, layouts, strict=True):
        if layout.is_colour:
            fix = "store one grey value or label per pixel"
            raise refusal(place, "E_RGB", f"{file.name} is in colour", fix)
        if (layout.size, layout.dtype) != (first.size, first.dtype):
            text = f"{file.name} has {layout.text}, and {files[0].name} {first.text}"
            raise refusal(place, "E_SHAPE", text, "export the slices again, all of one size")
        if layout.n_pages > 1 and len(files) > 1:
            text = f"{file.name} has {layout.n_pages} pages among other pictures"
            raise refusal(place, "E_NDIM", text, "give each TIFF file of several pages alone")
    n = first.n_pages if len(files) == 1 else len(files)
    return (first.size[1], first.size[0], n), first.dtype


def _read_pictures(header: ScanHeader) -> np.ndarray:
    """Return the voxels (I, J, K) of pictures; one is decoded at a time."""
    from volseg.io.images import pages_of  # imports the table of formats, which imports this

    array = np.empty(header.geometry.shape, header.dtype, order="F")
    index = 0
    for file in header.parts:
        for page in pages_of(file):
            if index >= array.shape[2] or page.T.shape != array.shape[:2]:
                text = f"page {index + 1} has another size than the first, or is one too many"
                raise refusal(header.path, "E_SHAPE", text, "export the slices again")
            array[:, :, index] = page.T
            index += 1
    if index < array.shape[2]:
        text = f"holds {index} of {array.shape[2]} slices"
        raise refusal(header.path, "E_TRUNCATED", text, COPY_AGAIN)
    return array

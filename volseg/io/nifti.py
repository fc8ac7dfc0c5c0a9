"""Voxels of NIfTI-1 and NIfTI-2 files, in and out: one strict reader and one writer."""

from __future__ import annotations

import hashlib
import io
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from isal import igzip
from nibabel.nifti1 import Nifti1Header

from volseg.errors import ScanError
from volseg.io.files import atomic_write, read_back_problem, sha256_of
from volseg.io.gzip_stream import CHUNK_BYTES, fill, opened, opened_raw, refusal, skip
from volseg.io.nifti_header import (
    MAX_BYTES,
    MAX_TAIL_BYTES,
    NiftiHeader,
    check_voxel_bytes,
    header_file,
    load_header,
    new_header,
    raw_header,
    scan_files,
)
from volseg.volume import Volume, slabs_of

MAX_LABELS = 1000  # a mask with more distinct values is taken for an image
LABEL_TOLERANCE = 1e-3  # distance from a whole number
MAX_INTENSITY = float(np.finfo(np.float32).max)


def read_volume(path: Path | str, *, max_bytes: int = MAX_BYTES, is_finite: bool = True) -> Volume:
    """Read a scan in its stored dtype (native byte order); `Volume.intensities` scales on demand.

    Args:
        max_bytes: a header that requests more voxel bytes is refused before memory is allocated.
        is_finite: False accepts a scan with some NaN or infinite voxels.

    Raises:
        ScanError: as `read_header`; also if voxels are missing (`E_TRUNCATED`), damaged (`E_CRC`),
            not finite (`E_NAN`) or all equal (`E_CONST`). A gzip file is read to its end, so its
            checksum is always verified.
    """
    path = Path(path)
    header, raw = load_header(path, max_bytes)
    array, sha256 = _read_voxels(header, raw, path)
    range_of = _range if is_finite or array.dtype.kind != "f" else _finite_range
    low, high = range_of(array, path)
    if low == high:
        raise refusal(
            path, "E_CONST", f"every voxel is {low:g}", "export the scan again: this one is empty"
        )
    if max(abs(low), abs(high)) * abs(header.slope) > MAX_INTENSITY:
        text = f"intensities reach {high:g} × {header.slope:g}"
        raise refusal(path, "E_SCALE", text, "export the scan again")
    return Volume(array, header.geometry, header.slope, header.intercept, sha256)


def read_mask(
    path: Path | str, *, max_bytes: int = MAX_BYTES, max_labels: int = MAX_LABELS
) -> Volume:
    """Read a mask or label map in the smallest unsigned dtype that holds its labels.

    It may be empty. Scaled or floating-point labels within 0.001 of a whole number are rounded:
    truncation would turn 6.9999 into 6.

    Raises:
        ScanError: as `read_header`; `E_LABELS` for fractional or negative values, or more than
            `max_labels` distinct ones, as when an image is given in place of its mask.
    """
    path = Path(path)
    header, raw = load_header(path, max_bytes)
    array, sha256 = _read_voxels(header, raw, path)
    stored = Volume(array, header.geometry, header.slope, header.intercept)
    _range(stored.array, path)  # NaN labels
    highest = _check_labels(stored, path, max_labels)
    dtype = np.min_scalar_type(highest)
    if stored.array.dtype.kind in "iu" and not stored.is_scaled:
        labels = stored.array.astype(dtype, order="K", copy=False)
    else:
        labels = np.empty(stored.array.shape, dtype, order="F")
        for k in range(stored.geometry.shape[2]):
            labels[:, :, k] = np.rint(stored.intensities(stored.array[:, :, k]))
    return Volume(labels, stored.geometry, sha256=sha256)


def scan_digest(path: Path) -> str:
    """Return `Volume.sha256` of a scan without loading it into memory.

    Raises:
        ScanError: the scan cannot be read.
    """
    digests = []
    for file in scan_files(path):
        digest = hashlib.sha256()
        with opened_raw(file, digest) as stream:
            skip(stream, sys.maxsize)
        digests.append(digest.hexdigest())
    return "+".join(digests)


def write_volume(volume: Volume, path: Path | str, like: Path | str | None = None) -> None:
    """Write `.nii` or `.nii.gz` atomically, and verify it by reading it back.

    Equal volumes give equal bytes on one machine: the file holds no time, name or description.

    Args:
        volume: labels or intensities; booleans are stored as uint8.
        path: the target; its folder must exist.
        like: the scan that `volume` was made from. Its geometry fields are copied, so that the
            affine equals that of the scan bit for bit, even from a qform or from NIfTI-2. Without
            it the affine is stored in float32, which is exact for one read from a NIfTI-1 sform.

    Raises:
        EnvironmentProblem: disk full, folder not writable, or other bytes were read back.
        ScanError: `read_volume` would refuse the grid, for example a single slice.
        ValueError: the suffix, dtype or scale cannot be stored, or the grid is not that of `like`.
    """
    path = Path(path)
    name = path.name.lower()
    if not name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"volumes are written as .nii or .nii.gz, not {path.name!r}")
    if volume.array.dtype == np.bool_:
        volume = Volume(volume.array.view(np.uint8), volume.geometry)
    prefix, voxels = _stored(volume, path, like)
    atomic_write(
        path,
        lambda file: _write(file, name.endswith(".gz"), prefix, voxels),
        lambda temporary: _verify(temporary, path, prefix, voxels),
    )


def volume_bytes(volume: Volume) -> bytes:
    """Return the bytes of a `.nii.gz`, to embed in another file.

    The affine is stored in float32. Equal volumes give equal bytes.

    Raises:
        ScanError, ValueError: as `write_volume`.
    """
    packed = io.BytesIO()
    _write(packed, True, *_stored(volume, Path("volume.nii.gz"), None), level=3)
    return packed.getvalue()


# ---- reading


def _read_voxels(header: NiftiHeader, raw: Nifti1Header, path: Path) -> tuple[np.ndarray, str]:
    """Return the stored (I, J, K), in Fortran order and native byte order, and its SHA-256.

    The SHA-256 is that of the file, or of both files of a pair.

    Raises:
        ScanError: `E_CHANGED` if the file was replaced after its header was read.
    """
    flat = np.empty(math.prod(header.geometry.shape), header.dtype)
    target = flat.view(np.uint8).data
    digest, block = hashlib.sha256(), raw.binaryblock
    header_path = header_file(path)
    before = "" if header_path == header.data_path else sha256_of(header_path) + "+"
    with opened(header.data_path, digest) as stream:
        start = bytearray(min(len(block), header.data_offset))
        is_whole = fill(stream, memoryview(start)) == len(start)
        is_unchanged = is_whole and (bool(before) or block.startswith(start))
        skip(stream, header.data_offset - len(start))
        n_read = fill(stream, target)
        if n_read == len(target):
            n_read += skip(stream, MAX_TAIL_BYTES + 1)  # the end holds the checksum of gzip
    if not is_unchanged or (before and raw_header(header_path)[0].binaryblock != block):
        raise refusal(path, "E_CHANGED", "was replaced while it was being read", "run again")
    check_voxel_bytes(n_read, len(target), path)
    if not flat.dtype.isnative:
        flat = flat.byteswap(inplace=True).view(flat.dtype.newbyteorder("="))
    return flat.reshape(header.geometry.shape, order="F"), before + digest.hexdigest()


def _finite_range(array: np.ndarray, path: Path) -> tuple[float, float]:
    """Return the smallest and largest finite stored value, a slab at a time."""
    slabs = (array[part] for part in slabs_of(array))
    finite = (slab[np.isfinite(slab)] for slab in slabs)
    ranges = [(values.min(), values.max()) for values in finite if values.size]
    if not ranges:
        return _range(array, path)
    return float(min(low for low, _ in ranges)), float(max(high for _, high in ranges))


def _range(array: np.ndarray, path: Path) -> tuple[float, float]:
    """Return the smallest and largest stored value; refuse values that are not finite."""
    with np.errstate(invalid="ignore"):
        low, high = float(array.min()), float(array.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        n_nan, n_infinite = np.count_nonzero(np.isnan(array)), np.count_nonzero(np.isinf(array))
        raise refusal(
            path,
            "E_NAN",
            f"{n_nan:,} voxels are NaN and {n_infinite:,} infinite, of {array.size:,}",
            "fill them in the tool that made the scan, for example with the value of air",
        )
    return low, high


def _check_labels(stored: Volume, path: Path, max_labels: int) -> int:
    """Return the largest label of a mask; refuse one with invalid labels."""
    question = "was an image given in place of its mask?"
    if stored.array.dtype == np.uint8 and not stored.is_scaled and max_labels >= 256:
        return int(stored.array.max())  # always valid
    labels: set[int] = set()
    for k in range(stored.geometry.shape[2]):
        with np.errstate(over="ignore", invalid="ignore"):  # the bounds below catch an absurd scale
            whole = values = stored.intensities(stored.array[:, :, k])
            if values.dtype.kind == "f":
                whole = np.rint(values)
                fractions = values[np.abs(values - whole) > LABEL_TOLERANCE]
                if fractions.size:
                    text = ", ".join(f"{value:g}" for value in np.unique(fractions)[:5])
                    rule = "are not whole numbers" if "," in text else "is not a whole number"
                    problem = f"mask holds {text}, which {rule}"
                    fix = f"resample labels with nearest neighbour; or {question}"
                    raise refusal(path, "E_LABELS", problem, fix)
        low, high = whole.min(), whole.max()
        if low < 0 or high >= 2**53:
            problem = f"mask holds the label {low if low < 0 else high:,.0f}"
            raise refusal(path, "E_LABELS", problem, f"number labels from 0 up; or {question}")
        labels.update(_distinct(whole.astype(np.int64)).tolist())
        if len(labels) > max_labels:
            problem = f"mask holds more than {max_labels:,} distinct values"
            raise refusal(path, "E_LABELS", problem, question)
    return max(labels)


def _distinct(labels: np.ndarray) -> np.ndarray:
    """Return the distinct values ≥ 0, by counting where that is faster than sorting."""
    if labels.max() < 2**16:
        return np.flatnonzero(np.bincount(labels.ravel()))
    return np.unique(labels)


# ---- writing


def _stored(volume: Volume, path: Path, like: Path | str | None) -> tuple[bytes, memoryview]:
    """Return all bytes before the first voxel, and those of the voxels, rarely a copy."""
    prefix = new_header(volume, path, like).binaryblock + bytes(4)  # four zeros: no extensions
    array = np.asfortranarray(volume.array, dtype=volume.array.dtype.newbyteorder("<"))
    return prefix, array.reshape(-1, order="F").view(np.uint8).data


def _write(
    file: BinaryIO, compressed: bool, prefix: bytes, voxels: memoryview, *, level: int = 1
) -> None:
    if compressed:
        with igzip.IGzipFile(
            filename="", mode="wb", compresslevel=level, fileobj=file, mtime=0
        ) as packed:
            _write(cast(BinaryIO, packed), False, prefix, voxels)
        return
    for chunk in _chunks(prefix, voxels):
        file.write(chunk)


def _verify(temporary: Path, path: Path, prefix: bytes, voxels: memoryview) -> None:
    """Compare a whole file, including its checksum, with what was written into it."""
    buffer = memoryview(bytearray(CHUNK_BYTES))
    try:
        with opened(temporary) as stream:
            for chunk in _chunks(prefix, voxels):
                part = buffer[: len(chunk)]
                if fill(stream, part) != len(chunk) or part != chunk:
                    raise read_back_problem(path)
            if skip(stream, 1):
                raise read_back_problem(path)
    except ScanError as error:
        raise read_back_problem(path) from error


def _chunks(prefix: bytes, voxels: memoryview) -> Iterator[memoryview]:
    yield memoryview(prefix)
    for start in range(0, len(voxels), CHUNK_BYTES):
        yield voxels[start : start + CHUNK_BYTES]

"""Scans and masks in any file format, in and out: one strict reader and one writer."""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from volseg.errors import ScanError, VolsegError, given_path
from volseg.io import nifti
from volseg.io.formats import DICOM, STACK, WRITABLE, Format, format_of, is_scan, mask_format_of
from volseg.io.gzip_stream import opened_raw, refusal, skip
from volseg.io.header import (
    MAX_BYTES,
    ReferenceGrid,
    ScanHeader,
    check_size,
    is_compressed,
    refuse_tilt,
)
from volseg.io.series import (
    IN_SUV,
    TILT,
    like_scan,
    split_marks,
    split_segments,
    split_series,
    split_spacing,
    split_volume,
    with_mark,
    with_volume,
)
from volseg.io.voxels import (
    StreamedContent,
    finite_range,
    highest_label,
    holds_fractions,
    joined_digest,
    value_range,
    write_content,
)
from volseg.volume import Geometry, Volume

MAX_LABELS = 1000  # a mask with more distinct values is taken for an image
MAX_INTENSITY = float(np.finfo(np.float32).max)


def read_header(path: Path | str, *, max_bytes: int = MAX_BYTES) -> ScanHeader:
    """Read the header of a scan, without voxels; it is checked against the size of the file.

    Args:
        path: `scan.nii.gz#3` is the third volume of a file that holds several. A path that ends in
            `#tilt` may be of a tilted stack of slices, and one in `#SUVbw` of a PET in SUV.
        max_bytes: a header that asks for more voxel bytes is refused.

    Raises:
        ScanError: the file or its header cannot be trusted; `code` is the reason.
    """
    path = Path(path)
    row = format_of(path)
    header = row.read_header(path)
    check_size(header, path, max_bytes)
    plain, marks = split_marks(path)
    if TILT not in marks:
        refuse_tilt(header.geometry, plain)
    if IN_SUV in marks and row.name != DICOM:
        problem = f"{row.name} does not say what SUV needs, such as dose and weight"
        fix = "give the DICOM series; if its intensities are SUV already, --unit SUV"
        raise refusal(plain, "E_SUV", problem, fix)
    return header


def read_mask_header(
    path: Path | str, like: Path | Geometry | None = None, *, max_bytes: int = MAX_BYTES
) -> ScanHeader:
    """Read the header of a mask, as `read_header` does; its warnings say how it is drawn.

    Args:
        like: the scan, or its grid, on which a mask of contours is drawn; others ignore it.

    Raises:
        ScanError: as `read_header`; also of the scan, or if contours belong to another one.
    """
    path = _like_scan(Path(path), like)
    row = mask_format_of(path)
    if row.read_on is None:
        return read_header(path, max_bytes=max_bytes)
    header = row.read_on(path, _reference_grid(like))
    check_size(header, path, max_bytes)
    plain, marks = split_marks(path)
    if TILT not in marks:
        refuse_tilt(header.geometry, plain)
    return header


def _like_scan(path: Path, like: Path | Geometry | None) -> Path:
    """Return the path of a mask, which may be tilted if its scan may be."""
    if isinstance(like, Geometry):
        return with_mark(path, TILT) if like.is_tilted else path
    return path if like is None else like_scan(path, like)


def _reference_grid(like: Path | Geometry | None) -> ReferenceGrid | None:
    if like is None or isinstance(like, Geometry):
        return None if like is None else ReferenceGrid(like)
    header = read_header(like)
    return ReferenceGrid(header.geometry, header.frame_of_reference, header.series)


def mask_notes(path: Path, like: Path | Geometry | None) -> list[str]:
    """Describe what was left out of a mask in drawing it on its scan, each as `W_CODE: sentence`.

    Raises:
        ScanError: as `read_mask_header`.
    """
    if mask_format_of(path).read_on is None:
        return []
    return [f"{note.code}: {note.text}" for note in read_mask_header(path, like).warnings]


def volume_of(path: Path, number: int) -> Path:
    """Return the path of this volume of a file that holds several, or the path of any other file.

    Reading it refuses a number that the file lacks.
    """
    try:
        read_header(path)
    except ScanError as error:
        is_series = format_of(path).name in (DICOM, STACK.name)  # a volume for each of them
        return with_volume(path, number) if error.code == "E_NDIM" and not is_series else path
    return path


def read_volume(path: Path | str, *, is_finite: bool = True) -> Volume:
    """Read a scan in its stored dtype (native byte order); `Volume.intensities` scales on demand.

    Args:
        is_finite: False accepts a scan with some NaN or infinite voxels.

    Raises:
        ScanError: as `read_header`; also if voxels are missing (`E_TRUNCATED`), damaged (`E_CRC`),
            not finite (`E_NAN`) or all equal (`E_CONST`), or if the file format holds no scans
            (`E_LABELS`). A gzip file is read to its end, so its
            checksum is always verified.

    Example:
        >>> scan = read_volume("sample_data/images/phantom_15.nii.gz")
        >>> scan.array.shape == scan.geometry.shape, scan.geometry.affine.shape
        (True, (4, 4))
    """
    path = given_path(path)
    if not format_of(path).holds_scans:
        read_header(path)  # a missing or damaged file is that first
        problem = f"{format_of(path).name} holds labels only, no scan"
        raise refusal(path, "E_LABELS", problem, "give the scan from which it was made")
    stored = _read_stored(read_header(path), format_of(path), path)
    return checked_scan(stored, path, is_finite=is_finite)


def checked_scan(volume: Volume, path: Path | str, *, is_finite: bool = True) -> Volume:
    """Return the scan, or refuse its intensities as `read_volume` does.

    Args:
        path: of the scan, or its name in memory, for messages.
    """
    range_of = value_range if is_finite or volume.array.dtype.kind != "f" else finite_range
    low, high = range_of(volume.array, path)
    if low == high:
        raise refusal(
            path, "E_CONST", f"every voxel is {low:g}", "export the scan again: this one is empty"
        )
    if max(abs(low), abs(high)) * abs(volume.slope) > MAX_INTENSITY:
        text = f"intensities reach {high:g} × {volume.slope:g}"
        raise refusal(path, "E_SCALE", text, "export the scan again")
    return volume


def read_mask(
    path: Path | str,
    *,
    like: Path | Geometry | None = None,
    max_labels: int = MAX_LABELS,
    threshold: float | None = None,
) -> Volume:
    """Read a mask or label map in the smallest unsigned dtype that holds its labels.

    It may be empty. Scaled or floating-point labels within 0.001 of a whole number are rounded:
    truncation would turn 6.9999 into 6.

    Args:
        like: the scan, or its grid, on which contours (RTSTRUCT) are drawn; other masks have a
            grid of their own.
        max_labels: a mask with more distinct values is refused.
        threshold: a mask that holds fractions, such as probabilities, is 1 from this value up and
            0 below; None refuses it.

    Raises:
        ScanError: as `read_header`; `E_LABELS` for fractional or negative values, or more than
            `max_labels` distinct ones, as when an image is given in place of its mask, or if the
            file format holds no masks.

    Example:
        >>> mask = read_mask("sample_data/labels/phantom_15.nii.gz")
        >>> sorted(set(mask.array.ravel().tolist()))
        [0, 1]
    """
    path = given_path(path)
    row = mask_format_of(path)
    if not row.holds_masks:
        read_header(path)  # refuses what is no such file at all
        problem = f"{row.name} holds intensities only, no mask"
        raise refusal(path, "E_LABELS", problem, "give the mask in another format, such as NIfTI")
    stored = _read_stored(read_mask_header(path, like), row, path)
    return checked_mask(stored, path, max_labels=max_labels, threshold=threshold)


def checked_mask(
    stored: Volume,
    path: Path | str,
    *,
    max_labels: int = MAX_LABELS,
    threshold: float | None = None,
) -> Volume:
    """Return the labels of a mask as `read_mask` does, or refuse them.

    Args:
        path: of the mask, or its name in memory, for messages.
    """
    value_range(stored.array, path, fill="0, the background")  # NaN labels
    if threshold is not None and holds_fractions(stored):
        labels = np.empty(stored.array.shape, np.uint8, order="F")
        for k in range(stored.geometry.shape[2]):
            labels[:, :, k] = stored.intensities(stored.array[:, :, k]) >= threshold
        return Volume(labels, stored.geometry, sha256=stored.sha256)
    dtype = np.min_scalar_type(highest_label(stored, path, max_labels))
    if stored.array.dtype.kind in "iu" and not stored.is_scaled:
        labels = stored.array.astype(dtype, order="K", copy=False)
    else:
        labels = np.empty(stored.array.shape, dtype, order="F")
        for k in range(stored.geometry.shape[2]):
            labels[:, :, k] = np.rint(stored.intensities(stored.array[:, :, k]))
    return Volume(labels, stored.geometry, sha256=stored.sha256)


def _read_stored(header: ScanHeader, row: Format, path: Path) -> Volume:
    array, sha256 = row.read_voxels(header, path)
    sha256 += _volume_mark(path)
    return Volume(array, header.geometry, header.slope, header.intercept, sha256, unit=header.unit)


def scan_digest(path: Path) -> str:
    """Return `Volume.sha256` of a scan without loading it into memory.

    Raises:
        ScanError: the scan cannot be read.
    """
    return _digest_of(read_header(path).files, path)


def mask_digest(path: Path, like: Path | Geometry | None = None) -> str:
    """Return `Volume.sha256` of a mask without loading it into memory; `like` as in `read_mask`.

    Raises:
        ScanError: the mask cannot be read.
    """
    return _digest_of(read_mask_header(path, like).files, path)


def _digest_of(files: Iterable[Path], path: Path) -> str:
    digests = []
    for file in files:
        digest = hashlib.sha256()
        with opened_raw(file, digest) as stream:
            skip(stream, sys.maxsize)
        digests.append(digest.hexdigest())
    return joined_digest(digests) + _volume_mark(path)


def _volume_mark(path: Path | str) -> str:
    """Return what tells the volumes of a file apart, and how it is read, behind its SHA-256."""
    place, spacing_mm = split_spacing(Path(path))
    file, number = split_volume(place)
    _, segments = split_segments(split_series(file)[0])
    marks = [str(mark) for mark in (segments, number, spacing_mm) if mark is not None]
    return "".join(f"#{mark}" for mark in (*marks, *split_marks(Path(path))[1]))


def write_volume(
    volume: Volume,
    path: Path | str,
    like: Path | str | None = None,
    label_names: Mapping[int, str] | None = None,
) -> None:
    """Write a volume atomically in the format of the suffix, and verify it by reading it back.

    Equal volumes give equal bytes on one machine: the file holds no time, name or description.

    Args:
        volume: labels or intensities; booleans are stored as uint8.
        path: the target; its folder must exist.
        like: the scan that `volume` was made from. A NIfTI file gets its geometry fields, so that
            the affine equals that of the scan bit for bit, even from a qform or from NIfTI-2; for
            a scan of another format it is NIfTI-2 if float32 is not exact. Without `like` the
            affine is stored in float32, which is exact for one read from a NIfTI-1 sform.
        label_names: label → name, stored where the format has names.

    Raises:
        EnvironmentProblem: disk full, folder not writable, or other bytes were read back.
        ScanError: `read_volume` would refuse the grid, for example a single slice.
        ValueError: the suffix, dtype or scale cannot be stored, or the grid is not that of `like`.

    Example:
        >>> mask = read_mask("sample_data/labels/phantom_15.nii.gz")
        >>> write_volume(mask.with_array(1 - mask.array), "background.nii.gz")
    """
    path = given_path(path)
    if not isinstance(volume, Volume):
        raise VolsegError(
            f"{path}: a volume is needed, which has a grid, not a value of type "
            f"{type(volume).__name__}",
            fix="give result.volume('mask'), or volseg.Volume(array, geometry)",
            code="E_TYPE",
        )
    row = format_of(path)
    if row.encode is None or not is_scan(path):
        raise ValueError(f"volumes are written as {WRITABLE}, not {path.name!r}")
    if volume.array.dtype == np.bool_:
        volume = Volume(volume.array.view(np.uint8), volume.geometry)
    source = None if like is None else read_header(like)
    if not row.holds_tilt:
        refuse_tilt(volume.geometry, path, fix="write it as NIfTI with `like`, its scan")
    elif source is None:
        refuse_tilt(volume.geometry, path, fix="give `like`, the scan that it belongs to")
    if source and not np.array_equal(source.geometry.affine, volume.geometry.affine):
        raise ValueError(f"the volume lies on another grid than {like}")
    if label_names and row.encode_named is not None:
        content = row.encode_named(volume, path, label_names)
    else:
        content = row.encode(volume, path, source)
    write_content(path, content, compressed=is_compressed(path))


def write_streamed(
    voxels: BinaryIO, grid: Volume, path: Path | str, like: Path | str | None = None
) -> None:
    """Write voxels that lie in a file, in Fortran order, as `write_volume` does.

    Args:
        grid: their geometry, dtype and scale; its voxels are not used and should take no memory.

    Raises:
        as `write_volume`.
    """
    path = Path(path)
    source = None if like is None else read_header(like)
    if source and not np.array_equal(source.geometry.affine, grid.geometry.affine):
        raise ValueError(f"the volume lies on another grid than {like}")
    prefix = nifti.encode(grid, path, source).prefix
    content = StreamedContent(prefix, memoryview(b""), source=voxels)
    write_content(path, content, compressed=is_compressed(path))


def volume_bytes(volume: Volume) -> bytes:
    """Return the bytes of a `.nii.gz`, to embed in another file.

    The affine is stored in float32. Equal volumes give equal bytes.

    Raises:
        ScanError, ValueError: as `write_volume`.
    """
    packed = io.BytesIO()
    nifti.encode(volume, Path("volume.nii.gz")).write_gzip(packed, level=3)
    return packed.getvalue()

"""NIfTI-1 and NIfTI-2: one strict reader and one writer.

Common readers disagree on faulty files: they fill truncated ones with zeros, scale metres by 1000,
or mirror scans without an orientation. Here such a file raises a `ScanError` with a stable code,
the offending values and a fix. Harmless oddities are `ScanWarning`s of the header.
"""

from __future__ import annotations

import errno
import hashlib
import io
import math
import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, cast

import numpy as np
from isal import igzip, igzip_lib
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError

from volseg.errors import ScanError
from volseg.inputs import kind_of, open_regular
from volseg.io.files import atomic_write, read_back_problem, sha256_of
from volseg.io.label_table import parse_label_table
from volseg.volume import SAME_GRID_TOLERANCE_VOXELS, Geometry, Volume, slabs_of

SUFFIXES = (".nii", ".nii.gz", ".hdr", ".hdr.gz")  # .img is opened through its .hdr
MAX_BYTES = 16 * 2**30  # voxel bytes that a header may request
MAX_LABELS = 1000  # a mask with more distinct values is taken for an image

MIN_SPACING_MM, MAX_SPACING_MM = 0.01, 100.0
ANISOTROPIC_RATIO = 20.0  # largest / smallest spacing that raises a warning
FAR_ORIGIN_MM = 10_000.0  # longer than any scanner table
ROUNDED_COSINE, MAX_COSINE = 1e-5, 1e-3  # between two axes: header rounding; real shear
SPACING_TOLERANCE = 0.01  # relative difference between pixdim and the affine
MIN_SLOPE, MAX_SLOPE = 1e-15, 1e15  # keeps every scaled integer inside float32
LABEL_TOLERANCE = 1e-3  # distance from a whole number
CLIPPED_FRACTION = 0.05
MAX_INTENSITY = float(np.finfo(np.float32).max)
MAX_TAIL_BYTES = 2**20  # after the last voxel
MAX_OFFSET_BYTES = 64 * 2**20  # header extensions before the first voxel
GZIP_MAX_RATIO = 1032  # upper bound of deflate compression
CHUNK_BYTES = 2**18


class Digest(Protocol):
    """A running hash."""

    def update(self, data, /) -> None: ...


@dataclass(frozen=True, slots=True)
class ScanWarning:
    """A harmless oddity: `code`, such as `W_SHEAR`, and one line of `text`."""

    code: str
    text: str


@dataclass(frozen=True, slots=True, eq=False)
class NiftiHeader:
    """The checked header of a NIfTI file.

    Args:
        geometry: the grid, from the sform if it is set, else from the qform.
        dtype: dtype of the stored values, in the byte order of the file.
        slope, intercept: intensity = stored value × slope + intercept.
        data_path, data_offset: file and byte (after decompression) of the first voxel.
        warnings: oddities of header and file name.
    """

    geometry: Geometry
    dtype: np.dtype
    slope: float
    intercept: float
    data_path: Path
    data_offset: int
    warnings: tuple[ScanWarning, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of all voxels, uncompressed."""
        return math.prod(self.geometry.shape) * self.dtype.itemsize

    @property
    def mask_bytes(self) -> int:
        """Upper bound of the bytes of the labels that `read_mask` makes of these voxels."""
        is_exact = self.dtype.kind in "iu" and self.slope == 1 and self.intercept == 0
        return self.n_bytes if is_exact else math.prod(self.geometry.shape) * 8


def read_geometry(path: Path | str) -> Geometry:
    """Read the grid of a scan without its voxels; raise as `read_header` does."""
    return read_header(path).geometry


def read_header(path: Path | str, *, max_bytes: int = MAX_BYTES) -> NiftiHeader:
    """Read the header of `.nii`, `.nii.gz` or an `.hdr`/`.img` pair, without voxels.

    The header is checked against the size of the file.

    Raises:
        ScanError: the file or its header cannot be trusted; `code` is the reason.
    """
    return _load_header(Path(path), max_bytes)[0]


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
    header, raw = _load_header(path, max_bytes)
    array, sha256 = _read_voxels(header, raw, path)
    range_of = _range if is_finite or array.dtype.kind != "f" else _finite_range
    low, high = range_of(array, path)
    if low == high:
        raise _refusal(
            path, "E_CONST", f"every voxel is {low:g}", "export the scan again: this one is empty"
        )
    if max(abs(low), abs(high)) * abs(header.slope) > MAX_INTENSITY:
        text = f"intensities reach {high:g} × {header.slope:g}"
        raise _refusal(path, "E_SCALE", text, "export the scan again")
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
    header, raw = _load_header(path, max_bytes)
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


def read_label_table(path: Path | str) -> dict[int, str]:
    """Return value → name from the label table between header and voxels; {} if there is none.

    Raises:
        ScanError: as `read_header`.

    Source: the CARET extension of NIfTI-1, an XML element `Label` with a `Key` for each value.
    """
    header, _ = _load_header(Path(path), MAX_BYTES)
    block = bytearray(header.data_offset)
    with _opened(header.data_path) as stream:
        del block[_fill(stream, memoryview(block)) :]
    return parse_label_table(block.decode("utf-8", "replace"))


def intensity_warnings(volume: Volume) -> tuple[ScanWarning, ...]:
    """Return a warning if the intensities are saturated, which no header shows."""
    array = volume.array
    highest = np.fmax.reduce(array, axis=None)
    n_clipped = sum(np.count_nonzero(array[part] == highest) for part in slabs_of(array))
    clipped = n_clipped / array.size
    if clipped <= CLIPPED_FRACTION:
        return ()
    text = f"{clipped:.0%} of the voxels have the largest value, {highest:g}"
    return (ScanWarning("W_CLIP", text),)


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
    header = _new_header(volume, path, like)
    prefix = header.binaryblock + bytes(4)  # four zero bytes: no extensions
    # Rarely a copy.
    array = np.asfortranarray(volume.array, dtype=volume.array.dtype.newbyteorder("<"))
    voxels = array.reshape(-1, order="F").view(np.uint8).data
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
    header = _new_header(volume, Path("volume.nii.gz"), None)
    array = np.asfortranarray(volume.array, dtype=volume.array.dtype.newbyteorder("<"))
    packed = io.BytesIO()
    prefix = header.binaryblock + bytes(4)
    _write(packed, True, prefix, array.reshape(-1, order="F").view(np.uint8).data, level=3)
    return packed.getvalue()


def stem_of(path: Path) -> str:
    """Return the file name without `.nii`, `.nii.gz`, `.hdr`, `.img` etc., ignoring case."""
    return re.sub(r"\.(nii|hdr|img)(\.gz)?$", "", path.name, flags=re.IGNORECASE)


# ---- header


def _load_header(path: Path, max_bytes: int) -> tuple[NiftiHeader, Nifti1Header]:
    """Return the checked header, and nibabel's view of the raw fields."""
    header_path = _header_path(path)
    raw, is_single, header_is_gzip = _raw_header(header_path)
    shape = _shape(raw, path)
    dtype = _dtype(raw, path)
    slope, intercept, warnings = _scale(raw, path)
    geometry, more = _geometry(raw, shape, path)
    warnings += more
    offset = _offset(raw, is_single, path)
    if is_single and offset == 0:
        offset = raw.sizeof_hdr + 4
        text = f"vox_offset is 0; the voxels are taken from byte {offset}"
        warnings.append(ScanWarning("W_OFFSET", text))
    if header_path.suffix.lower().endswith(".gz") != header_is_gzip:
        kind = "gzip" if header_is_gzip else "not compressed"
        warnings.append(ScanWarning("W_EXT", f"the contents are {kind}, unlike the file name"))
    data_path = header_path if is_single else _partner(header_path, ".img")
    header = NiftiHeader(geometry, dtype, slope, intercept, data_path, offset, tuple(warnings))
    _check_size(header, path, max_bytes)
    return header, raw


def _header_path(path: Path) -> Path:
    return _partner(path, ".hdr") if re.search(r"\.img(\.gz)?$", path.name, re.IGNORECASE) else path


def _raw_header(path: Path) -> tuple[Nifti1Header, bool, bool]:
    """Return nibabel's header, whether header and voxels share one file, and whether it is gzip."""
    with _opened(path) as stream:
        block = bytearray(540)
        del block[_fill(stream, memoryview(block)) :]
        is_gzip = isinstance(stream, _Inflated)
    if not block:
        raise _refusal(path, "E_EMPTY", "the file is empty", _COPY_AGAIN)
    for endianness in "<>":
        size = int(np.frombuffer(bytes(block[:4]).ljust(4), endianness + "i4")[0])
        if size not in _FORMATS:
            continue
        header_type, magic_at, single, pair = _FORMATS[size]
        if len(block) < size:
            text = f"holds {len(block)} of {size} header bytes"
            raise _refusal(path, "E_TRUNCATED", text, _COPY_AGAIN)
        if not block.startswith((single, pair), magic_at):
            magic = bytes(block[magic_at : magic_at + len(single)])
            raise _refusal(
                path,
                "E_NOTNIFTI",
                f"magic is {magic!r}, as in ANALYZE or a damaged file",
                "convert it to NIfTI from the original: ANALYZE does not store left and right",
            )
        header = header_type(bytes(block[:size]), endianness, check=False)
        return header, block.startswith(single, magic_at), is_gzip
    problem, fix = _other_format(bytes(block))
    raise _refusal(path, "E_NOTNIFTI", problem, fix)


def _shape(raw: Nifti1Header, path: Path) -> tuple[int, int, int]:
    n_dims, *sizes = (int(n) for n in raw["dim"])
    if not 1 <= n_dims <= 7 or min(sizes[:n_dims]) < 1:
        raise _refusal(path, "E_DIM", f"dim is {[n_dims, *sizes]}", _COPY_AGAIN)
    sizes = sizes[:n_dims]
    while len(sizes) > 3 and sizes[-1] == 1:
        sizes.pop()
    if len(sizes) != 3 or min(sizes) < 2:
        raise _refusal(
            path,
            "E_NDIM",
            f"has shape {'×'.join(map(str, sizes))}; a volume has three axes of at least 2 voxels",
            "give one 3-D volume: extract it from a series, export all slices of the scan, or "
            "give each channel its own file",
        )
    i, j, k = sizes
    return i, j, k


def _dtype(raw: Nifti1Header, path: Path) -> np.dtype:
    code = int(raw["datatype"])
    if code not in _DTYPES:
        name = _REFUSED_DTYPES.get(code, "unknown")
        raise _refusal(
            path,
            "E_DTYPE",
            f"voxels are of type {name} (datatype {code})",
            "export grey values as integers or floats of 16 to 64 bits",
        )
    return np.dtype(_DTYPES[code]).newbyteorder(raw.endianness)


def _scale(raw: Nifti1Header, path: Path) -> tuple[float, float, list[ScanWarning]]:
    """Return slope and intercept; a slope of 0 (standard) or NaN (custom) means no scaling."""
    slope, intercept = float(raw["scl_slope"]), float(raw["scl_inter"])
    if slope == 0 and intercept != 0 and not math.isnan(intercept):
        text = f"scl_slope is 0, so the intercept {intercept:g} is not applied"
        return 1.0, 0.0, [ScanWarning("W_SCALE", f"{text}; other readers may apply it")]
    if slope == 0 or math.isnan(slope):
        return 1.0, 0.0, []
    if not MIN_SLOPE <= slope <= MAX_SLOPE or not abs(intercept) <= MAX_SLOPE:
        raise _refusal(
            path,
            "E_SCALE",
            f"scl_slope is {slope:g} and scl_inter {intercept:g}",
            "export the scan again, or store real intensities with slope 1 and intercept 0",
        )
    return slope, intercept, []


def _offset(raw: Nifti1Header, is_single: bool, path: Path) -> int:
    offset = float(raw["vox_offset"])
    lowest = raw.sizeof_hdr + 4 if is_single and offset != 0 else 0
    if not (lowest <= offset <= MAX_OFFSET_BYTES and offset.is_integer()):
        raise _refusal(path, "E_HEADER", f"vox_offset is {offset:g}", _COPY_AGAIN)
    return int(offset)


def _check_size(header: NiftiHeader, path: Path, max_bytes: int) -> None:
    """Refuse a header whose voxels exceed the limit or the file, before memory is allocated."""
    n_bytes, shape = header.n_bytes, "×".join(map(str, header.geometry.shape))
    requested = f"header asks for {shape} voxels, {n_bytes:,} bytes"
    if n_bytes > max_bytes:
        raise _refusal(
            path,
            "E_TOOBIG",
            f"{requested}, above the limit of {max_bytes:,}",
            "crop or resample the scan; if its size is wrong, copy the file again",
        )
    with _opened(header.data_path) as stream:
        is_gzip = isinstance(stream, _Inflated)
        file_size = os.stat(header.data_path).st_size
    if is_gzip and header.data_offset + n_bytes > file_size * GZIP_MAX_RATIO:
        text = f"{requested}, more than {file_size:,} bytes of gzip can hold"
        raise _refusal(path, "E_TOOBIG", text, _COPY_AGAIN)
    if not is_gzip:
        if header.data_offset > file_size:
            text = f"vox_offset is {header.data_offset:,} in a file of {file_size:,} bytes"
            raise _refusal(path, "E_HEADER", text, _COPY_AGAIN)
        _check_voxel_bytes(file_size - header.data_offset, n_bytes, path)


def _check_voxel_bytes(available: int, required: int, path: Path) -> None:
    if available < required:
        text = f"holds {available:,} of {required:,} voxel bytes"
        raise _refusal(path, "E_TRUNCATED", text, _COPY_AGAIN)
    if available > required + MAX_TAIL_BYTES:
        raise _refusal(
            path,
            "E_BOMB",
            f"holds more than {MAX_TAIL_BYTES:,} bytes after its last voxel",
            "its header is wrong or the file is malicious: export the scan again",
        )


# ---- geometry


def _geometry(
    raw: Nifti1Header, shape: tuple[int, int, int], path: Path
) -> tuple[Geometry, list[ScanWarning]]:
    unit = int(raw["xyzt_units"]) & 7
    if unit not in (0, 2):  # an unknown unit is read as mm, which every scanner uses
        name = {1: "metre", 3: "micron"}.get(unit, f"code {unit}, unknown to NIfTI")
        raise _refusal(
            path,
            "E_UNITS",
            f"unit of length is {name}",
            "store spacing and affine in mm and set xyzt_units to 2 (mm)",
        )
    codes = {name: int(raw[name]) for name in ("sform_code", "qform_code")}
    if not all(0 <= code <= 5 for code in codes.values()):
        raise _refusal(
            path, "E_NOGEOM", f"{codes} holds a code unknown to NIfTI", "convert the original again"
        )
    pixdim = raw["pixdim"][1:4].astype(np.float64)
    with np.errstate(all="ignore"):  # absurd headers may overflow; the checks below catch that
        if codes["sform_code"] > 0:
            geometry = _grid(shape, np.asarray(raw.get_sform()), "sform", path)
            warnings = _check_grid(geometry, path)
            return geometry, warnings + _check_against_sform(raw, pixdim, geometry, path)
        if codes["qform_code"] > 0:
            if not (np.isfinite(pixdim).all() and (pixdim > 0).all()):
                text = f"pixdim is {_listed(pixdim)} mm"
                raise _refusal(path, "E_GEOM", text, "set the true spacing in pixdim")
            try:
                affine = _qform(raw)
            except ValueError as error:
                text = f"qform is not a rotation ({error})"
                raise _refusal(path, "E_NOGEOM", text, "export again, with an sform") from error
            geometry = _grid(shape, affine, "qform", path)
            return geometry, _check_grid(geometry, path)
    raise _refusal(
        path,
        "E_NOGEOM",
        "neither sform_code nor qform_code is set, so left and right are unknown",
        "convert the original again (dcm2niix sets them); never guess",
    )


def _qform(raw: Nifti1Header) -> np.ndarray:
    """Return the affine of the qform as nibabel computes it; a qfac (pixdim[0]) of 0 means 1.

    Raises:
        ValueError: quaternion, qfac or pixdim is invalid.
    """
    header = raw.copy()
    if header["pixdim"][0] == 0:
        header["pixdim"][0] = 1
    try:
        return np.asarray(header.get_qform())
    except HeaderDataError as error:
        raise ValueError(str(error)) from error


def _grid(shape: tuple[int, int, int], affine: np.ndarray, source: str, path: Path) -> Geometry:
    try:
        return Geometry(shape, affine)
    except ValueError as error:
        rows = "; ".join(_listed(row) for row in affine[:3])
        text = f"{source} [{rows}] is not a finite, invertible affine"
        raise _refusal(path, "E_GEOM", text, "export the scan again") from error


def _check_grid(geometry: Geometry, path: Path) -> list[ScanWarning]:
    warnings = []
    spacing = np.array(geometry.spacing_mm)
    if not (spacing.min() >= MIN_SPACING_MM and spacing.max() <= MAX_SPACING_MM):
        limits = f"{MIN_SPACING_MM:g} to {MAX_SPACING_MM:g} mm"
        text = f"voxel spacing is {_listed(spacing)} mm, outside {limits}"
        raise _refusal(path, "E_SPACING", text, "store spacing and affine in mm")
    if spacing.max() / spacing.min() > ANISOTROPIC_RATIO:
        warnings.append(ScanWarning("W_ANISO", f"voxel spacing is {_listed(spacing)} mm"))
    axes = geometry.affine[:3, :3] / spacing
    cosine = float(np.abs(axes.T @ axes - np.eye(3)).max())
    if cosine > MAX_COSINE:
        raise _refusal(
            path,
            "E_SHEAR",
            f"its axes are {math.degrees(math.asin(min(1.0, cosine))):.2f}° away from right angles",
            "resample it to a right-angled grid; dcm2niix does so for CT with gantry tilt",
        )
    if cosine > ROUNDED_COSINE:
        text = f"axes are at right angles only within {cosine:.1e}"
        warnings.append(ScanWarning("W_SHEAR", text))
    corners = geometry.to_world_mm(np.array([(0, 0, 0), np.array(geometry.shape) - 1]))
    distance_mm = np.abs(corners).max()
    if distance_mm > FAR_ORIGIN_MM:
        text = f"the scan lies {distance_mm / 1000:,.1f} m off the origin"
        warnings.append(ScanWarning("W_ORIGIN", text))
    return warnings


def _check_against_sform(
    raw: Nifti1Header, pixdim: np.ndarray, geometry: Geometry, path: Path
) -> list[ScanWarning]:
    """Check pixdim and qform, on which other readers may rely, against the sform."""
    spacing = np.array(geometry.spacing_mm)
    difference = np.abs(np.abs(pixdim) - spacing)
    if not np.isfinite(pixdim).all() or (difference > SPACING_TOLERANCE * spacing).any():
        raise _refusal(
            path,
            "E_PIXDIM",
            f"pixdim gives a spacing of {_listed(pixdim)} mm, but the sform {_listed(spacing)} mm",
            "find out which is correct and store it in both",
        )
    if (pixdim < 0).any():
        return [ScanWarning("W_QS", f"pixdim {_listed(pixdim)} is negative; the sform is used")]
    if int(raw["qform_code"]) == 0:
        return []
    try:
        offset = geometry.corner_offset_voxels(Geometry(geometry.shape, _qform(raw)))
    except ValueError:
        return [ScanWarning("W_QS", "the qform is not a rotation; the sform is used")]
    if offset > SAME_GRID_TOLERANCE_VOXELS:
        text = f"qform and sform differ by {offset:.1f} voxels; the sform is used"
        return [ScanWarning("W_QS", text)]
    return []


# ---- voxels


def _read_voxels(header: NiftiHeader, raw: Nifti1Header, path: Path) -> tuple[np.ndarray, str]:
    """Return the stored (I, J, K), in Fortran order and native byte order, and its SHA-256.

    The SHA-256 is that of the file, or of both files of a pair.

    Raises:
        ScanError: `E_CHANGED` if the file was replaced after its header was read.
    """
    flat = np.empty(math.prod(header.geometry.shape), header.dtype)
    target = flat.view(np.uint8).data
    digest, block = hashlib.sha256(), raw.binaryblock
    header_path = _header_path(path)
    before = "" if header_path == header.data_path else sha256_of(header_path) + "+"
    with _opened(header.data_path, digest) as stream:
        start = bytearray(min(len(block), header.data_offset))
        is_whole = _fill(stream, memoryview(start)) == len(start)
        is_unchanged = is_whole and (bool(before) or block.startswith(start))
        _skip(stream, header.data_offset - len(start))
        n_read = _fill(stream, target)
        if n_read == len(target):
            n_read += _skip(stream, MAX_TAIL_BYTES + 1)  # the end holds the checksum of gzip
    if not is_unchanged or (before and _raw_header(header_path)[0].binaryblock != block):
        raise _refusal(path, "E_CHANGED", "was replaced while it was being read", "run again")
    _check_voxel_bytes(n_read, len(target), path)
    if not flat.dtype.isnative:
        flat = flat.byteswap(inplace=True).view(flat.dtype.newbyteorder("="))
    return flat.reshape(header.geometry.shape, order="F"), before + digest.hexdigest()


def scan_files(path: Path) -> tuple[Path, ...]:
    """Return the file of a scan, or its `.hdr` and `.img`, in this order.

    Raises:
        ScanError: one of a pair is missing.
    """
    header_path = _header_path(path)
    is_pair = re.search(r"\.hdr(\.gz)?$", header_path.name, re.IGNORECASE)
    return (header_path, _partner(path, ".img")) if is_pair else (path,)


def scan_digest(path: Path) -> str:
    """Return `Volume.sha256` of a scan without loading it into memory.

    Raises:
        ScanError: the scan cannot be read.
    """
    digests = []
    for file in scan_files(path):
        digest = hashlib.sha256()
        with _opened_raw(file, digest) as stream:
            _skip(stream, sys.maxsize)
        digests.append(digest.hexdigest())
    return "+".join(digests)


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
        raise _refusal(
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
                    raise _refusal(path, "E_LABELS", problem, fix)
        low, high = whole.min(), whole.max()
        if low < 0 or high >= 2**53:
            problem = f"mask holds the label {low if low < 0 else high:,.0f}"
            raise _refusal(path, "E_LABELS", problem, f"number labels from 0 up; or {question}")
        labels.update(_distinct(whole.astype(np.int64)).tolist())
        if len(labels) > max_labels:
            problem = f"mask holds more than {max_labels:,} distinct values"
            raise _refusal(path, "E_LABELS", problem, question)
    return max(labels)


def _distinct(labels: np.ndarray) -> np.ndarray:
    """Return the distinct values ≥ 0, by counting where that is faster than sorting."""
    if labels.max() < 2**16:
        return np.flatnonzero(np.bincount(labels.ravel()))
    return np.unique(labels)


# ---- writing


def _new_header(volume: Volume, path: Path, like: Path | str | None) -> Nifti1Header:
    """Return a new little-endian header whose affine reads back as that of the volume."""
    source = None if like is None else _load_header(Path(like), MAX_BYTES)[1]
    is_long = max(volume.geometry.shape) > np.iinfo(np.int16).max
    header_type = Nifti2Header if is_long or isinstance(source, Nifti2Header) else Nifti1Header
    header = header_type(endianness="<")
    dtype = volume.array.dtype.newbyteorder("=")
    if dtype not in map(np.dtype, _DTYPES.values()):
        raise ValueError(f"cannot write voxels of type {dtype}: the reader would refuse them")
    header.set_data_dtype(dtype)
    header["dim"] = [3, *volume.geometry.shape, 1, 1, 1, 1]
    header["vox_offset"] = header.sizeof_hdr + 4
    header["scl_slope"], header["scl_inter"] = volume.slope, volume.intercept
    if (float(header["scl_slope"]), float(header["scl_inter"])) != (volume.slope, volume.intercept):
        raise ValueError(
            f"slope {volume.slope!r} or intercept {volume.intercept!r} is not a float32 number"
        )
    affine = volume.geometry.affine
    if source is None:
        with np.errstate(over="ignore"):
            header.set_qform(affine, code=1)
            header.set_sform(affine, code=1)
            affine = affine.astype(header["srow_x"].dtype)
        header["xyzt_units"] = 2
    else:
        for field in _GEOMETRY_FIELDS:
            header[field] = source[field]
    geometry, _ = _geometry(header, _shape(header, path), path)
    if not np.array_equal(geometry.affine, affine):
        raise ValueError(
            f"the volume lies on another grid than {like}:\n{affine}\nand\n{geometry.affine}"
        )
    return header


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
        with _opened(temporary) as stream:
            for chunk in _chunks(prefix, voxels):
                part = buffer[: len(chunk)]
                if _fill(stream, part) != len(chunk) or part != chunk:
                    raise read_back_problem(path)
            if _skip(stream, 1):
                raise read_back_problem(path)
    except ScanError as error:
        raise read_back_problem(path) from error


def _chunks(prefix: bytes, voxels: memoryview) -> Iterator[memoryview]:
    yield memoryview(prefix)
    for start in range(0, len(voxels), CHUNK_BYTES):
        yield voxels[start : start + CHUNK_BYTES]


# ---- bytes


@contextmanager
def _opened(path: Path, digest: Digest | None = None) -> Iterator[io.RawIOBase]:
    """Open a file, decompressed if its contents are gzip, whatever its name.

    Args:
        digest: receives all stored bytes of the file by the time its end is reached.
    """
    with _opened_raw(path, digest) as file:
        start = file.read(2)
        is_gzip = start == b"\x1f\x8b"
        file.seek(0)
        yield _Inflated(file, path) if is_gzip else file


@contextmanager
def _opened_raw(path: Path, digest: Digest | None = None) -> Iterator[io.RawIOBase]:
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise _read_refusal(path, error) from error
    if not stat.S_ISREG(mode):  # reading a pipe or a device might never end
        text = f"is {kind_of(mode)}, not a file"
        raise _refusal(path, "E_NOTFILE", text, "give the path of a NIfTI file")
    try:
        with open_regular(path) as buffered:
            file = cast(io.RawIOBase, buffered.raw)
            yield file if digest is None else _Digested(file, digest)
    except OSError as error:
        raise _read_refusal(path, error) from error


class _Digested(io.RawIOBase):
    """A file that hashes each of its bytes once, also if they are read again after a seek."""

    def __init__(self, file: io.RawIOBase, digest: Digest) -> None:
        self._file, self._digest = file, digest
        self._hashed = self._position = 0

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = self._file.seek(offset, whence)
        return self._position

    def readinto(self, target) -> int:
        n = self._file.readinto(target) or 0
        n_new = self._position + n - self._hashed
        if n_new > 0:
            self._digest.update(memoryview(target)[n - n_new : n])
            self._hashed += n_new
        self._position += n
        return n


class _Inflated(io.RawIOBase):
    """The bytes inside a gzip file; its end is reached only if all checksums are correct."""

    def __init__(self, file: io.RawIOBase, path: Path) -> None:
        self._file = file
        self._path = path
        self._pending = b""
        self._member = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)

    def readable(self) -> bool:
        return True

    def readinto(self, target) -> int:
        while True:
            if self._member.eof and not self._next_member():
                return 0
            packed = b""
            if self._member.needs_input:
                packed = self._pending or self._file.read(CHUNK_BYTES)
                self._pending = b""
                if not packed:
                    problem = "the gzip stream has no end"
                    raise _refusal(self._path, "E_TRUNCATED", problem, _COPY_AGAIN)
            try:
                plain = self._member.decompress(packed, min(len(target), 4 * CHUNK_BYTES))
            except igzip_lib.IsalError as error:  # pyright: ignore[reportGeneralTypeIssues]
                problem = f"the gzip stream is damaged ({error})"
                raise _refusal(self._path, "E_CRC", problem, _COPY_AGAIN) from error
            if plain:
                target[: len(plain)] = plain
                return len(plain)

    def _next_member(self) -> bool:
        """Start the next gzip member, after any zero padding; return False at the end."""
        pending = self._member.unused_data.lstrip(b"\0")
        while len(pending) < 2 and (more := self._file.read(CHUNK_BYTES)):
            pending = (pending + more).lstrip(b"\0")
        if not pending:
            return False
        if not pending.startswith(b"\x1f\x8b"):
            fix = "copy the file again, or gunzip and gzip it"
            raise _refusal(self._path, "E_GZIP", "other bytes follow the gzip stream", fix)
        self._pending = pending
        self._member = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
        return True


def _fill(stream: io.RawIOBase, target: memoryview) -> int:
    """Read until `target` is full or the stream ends; return the number of bytes read."""
    filled = 0
    while filled < len(target) and (n := stream.readinto(target[filled:])):
        filled += n
    return filled


def _skip(stream: io.RawIOBase, n_bytes: int) -> int:
    """Read and discard up to `n_bytes`; return the number of bytes read."""
    scratch = memoryview(bytearray(min(n_bytes, CHUNK_BYTES)))
    skipped = 0
    while skipped < n_bytes and (n := stream.readinto(scratch[: n_bytes - skipped])):
        skipped += n
    return skipped


def _partner(path: Path, suffix: str) -> Path:
    """Find the other file of an `.hdr`/`.img` pair, ignoring case, compressed or not."""
    stem = stem_of(path)
    for ending in (suffix, suffix + ".gz", suffix.upper(), suffix.upper() + ".GZ"):
        candidate = path.with_name(stem + ending)
        if os.path.exists(candidate):
            return candidate
    fix = "put .hdr and .img of the same name into one folder"
    raise _refusal(path, "E_MISSING", f"its {suffix} file is missing", fix)


def _listed(values: np.ndarray) -> str:
    return " ".join(f"{value:.6g}" for value in values)


def _other_format(block: bytes) -> tuple[str, str]:
    """Return the problem and the fix for a file of another format."""
    for start, magic, name, fix in _OTHER_FORMATS:
        if block.startswith(magic, start):
            return f"is {name}, not NIfTI", fix
    size = int.from_bytes(block[:4], "little")
    return (
        f"is not NIfTI: its header size reads {size}, not 348 or 540",
        "give a NIfTI file (.nii, .nii.gz, .hdr)",
    )


def _read_refusal(path: Path, error: OSError | ValueError) -> ScanError:
    number = error.errno if isinstance(error, OSError) else errno.ENOENT
    default = ("E_READ", "cannot be read", "check the disk or network share")
    code, problem, fix = _READ_PROBLEMS.get(number or 0, default)
    reason = f" ({error.strerror})" if isinstance(error, OSError) and code == "E_READ" else ""
    return _refusal(path, code, problem + reason, fix)


def _refusal(path: Path, code: str, problem: str, fix: str) -> ScanError:
    name = str(path)
    if not name.isprintable():  # such as a line break
        name = repr(name)[1:-1]
    return ScanError(f"{name}: {problem}", fix=fix, code=code)


# sizeof_hdr → type, offset of the magic, magic of a single file and of a pair
_FORMATS: dict[int, tuple[type[Nifti1Header], int, bytes, bytes]] = {
    348: (Nifti1Header, 344, b"n+1\0", b"ni1\0"),
    540: (Nifti2Header, 4, b"n+2\0\r\n\x1a\n", b"ni2\0\r\n\x1a\n"),
}
_DTYPES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8",
    256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
}  # fmt: skip
_REFUSED_DTYPES = {
    1: "bit", 32: "complex64", 128: "RGB colour", 1536: "float128", 1792: "complex128",
    2048: "complex256", 2304: "RGBA colour",
}  # fmt: skip
_GEOMETRY_FIELDS = (
    "pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d",
    "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z",
)  # fmt: skip
_OTHER_FORMATS = (
    (0, b"version https://git-lfs", "a Git LFS pointer", "fetch the file with: git lfs pull"),
    (0, b"<", "a web page or XML", "download it again: the server may have sent a login page"),
    (0, b"\x1f\x8b", "gzip inside gzip", "decompress it once"),
    (0, b"PK\x03\x04", "a zip archive", "unpack it first"),
    (0, b"NRRD", "NRRD", "rename it to .nrrd or convert it to NIfTI"),
    (0, b"ObjectType", "MetaImage", "rename it to .mha or convert it to NIfTI"),
    (0, b"\x89HDF", "HDF5 or MINC", "convert it to NIfTI"),
    (0, b"\x93NUMPY", "a NumPy array", "store it as NIfTI, with its affine"),
    (128, b"DICM", "DICOM", "convert the series to NIfTI, for example with dcm2niix"),
)
_COPY_AGAIN = "copy or export the file again"
_NOT_THERE = ("E_MISSING", "does not exist", "check the path")
_READ_PROBLEMS = {
    errno.ENOENT: _NOT_THERE,
    errno.ENOTDIR: _NOT_THERE,
    errno.ENAMETOOLONG: _NOT_THERE,
    errno.ELOOP: ("E_NOTFILE", "is a symbolic link to itself", "give the path of a NIfTI file"),
    errno.EACCES: ("E_PERM", "may not be read", "ask for permission to read the file"),
    errno.EPERM: ("E_PERM", "may not be read", "ask for permission to read the file"),
}

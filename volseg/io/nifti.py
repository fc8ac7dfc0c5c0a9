"""NIfTI-1 and NIfTI-2: one strict reader and one writer.

The common readers accept files that they then read differently: zero-filled when cut off, 1000 times larger when the
unit is the metre, mirrored when no orientation is stored. Here such a file is a `ScanError` with a stable code, the
values found and a fix. What is merely odd is a `ScanWarning` of the header.
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

SUFFIXES = (".nii", ".nii.gz", ".hdr", ".hdr.gz")  # .img is reached through its .hdr
MAX_BYTES = 16 * 2**30  # voxel bytes that a header may ask for
MAX_LABELS = 1000  # distinct values beyond which a mask is taken for an image

MIN_SPACING_MM, MAX_SPACING_MM = 0.01, 100.0
ANISOTROPIC_RATIO = 20.0  # largest over smallest spacing, beyond which a warning is due
FAR_ORIGIN_MM = 10_000.0  # no scanner table is that long
ROUNDED_COSINE, MAX_COSINE = 1e-5, 1e-3  # between two axes: rounding of the header; real shear
SPACING_TOLERANCE = 0.01  # relative difference between pixdim and the affine
MIN_SLOPE, MAX_SLOPE = 1e-15, 1e15  # keeps every scaled integer inside float32
LABEL_TOLERANCE = 1e-3  # distance from a whole number
CLIPPED_FRACTION = 0.05
MAX_INTENSITY = float(np.finfo(np.float32).max)
MAX_TAIL_BYTES = 2**20  # after the last voxel
MAX_OFFSET_BYTES = 64 * 2**20  # header extensions before the first voxel
GZIP_MAX_RATIO = 1032  # deflate cannot compress more than that
CHUNK_BYTES = 2**18


class Digest(Protocol):
    """A hash that is being computed."""

    def update(self, data, /) -> None: ...


@dataclass(frozen=True, slots=True)
class ScanWarning:
    """Something odd which does not stop the work: `code`, such as `W_SHEAR`, and one line of `text`."""

    code: str
    text: str


@dataclass(frozen=True, slots=True, eq=False)
class NiftiHeader:
    """What a NIfTI file says about its voxels.

    Args:
        geometry: the grid, from the sform, or else from the qform.
        dtype: of the stored values, in the byte order of the file.
        slope, intercept: intensity = stored value × slope + intercept.
        data_path, data_offset: the file and the byte (after decompression) of the first voxel.
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
        """Most bytes of the labels that `read_mask` makes of these voxels, whatever they are."""
        is_exact = self.dtype.kind in "iu" and self.slope == 1 and self.intercept == 0
        return self.n_bytes if is_exact else math.prod(self.geometry.shape) * 8


def read_geometry(path: Path | str) -> Geometry:
    """The grid of a scan, without its voxels; raises as `read_header`."""
    return read_header(path).geometry


def read_header(path: Path | str, *, max_bytes: int = MAX_BYTES) -> NiftiHeader:
    """Header of `.nii`, `.nii.gz` or an `.hdr`/`.img` pair, checked against the size of the file; no voxel is read.

    Raises:
        ScanError: the file or its header cannot be trusted; `code` says why.
    """
    return _load_header(Path(path), max_bytes)[0]


def read_volume(path: Path | str, *, max_bytes: int = MAX_BYTES, is_finite: bool = True) -> Volume:
    """A scan, in its stored dtype (native byte order), scaled only on demand by `Volume.intensities`.

    Args:
        max_bytes: refuse, before any memory is taken, a header that asks for more voxel bytes.
        is_finite: False lets a scan pass of which some voxels are NaN or infinite.

    Raises:
        ScanError: as `read_header`, and when voxels are missing (`E_TRUNCATED`), damaged (`E_CRC`), not finite
            (`E_NAN`) or all equal (`E_CONST`). A gzip file is read to its end, so its checksum is always verified.
    """
    path = Path(path)
    header, raw = _load_header(path, max_bytes)
    array, sha256 = _read_voxels(header, raw, path)
    low, high = (
        _range(array, path) if is_finite or array.dtype.kind != "f" else _finite_range(array, path)
    )
    if low == high:
        raise _refusal(
            path, "E_CONST", f"every voxel is {low:g}", "export the scan again: this one is empty"
        )
    if max(abs(low), abs(high)) * abs(header.slope) > MAX_INTENSITY:
        raise _refusal(
            path,
            "E_SCALE",
            f"intensities reach {high:g} × {header.slope:g}",
            "export the scan again",
        )
    return Volume(array, header.geometry, header.slope, header.intercept, sha256)


def read_mask(
    path: Path | str, *, max_bytes: int = MAX_BYTES, max_labels: int = MAX_LABELS
) -> Volume:
    """A mask or label map, in the smallest unsigned dtype that holds its labels; it may be empty.

    Scaled or floating-point labels are rounded if they lie within 0.001 of a whole number: truncation would turn
    6.9999 into 6.

    Raises:
        ScanError: as `read_header`, and `E_LABELS` for values that are fractional, negative or more than
            `max_labels` different ones, as when an image is given in place of its mask.
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
    """Value → name from the label table that some tools keep between header and voxels; empty where there is none.

    Raises:
        ScanError: as `read_header`.

    Source: the CARET extension of NIfTI-1 files, an XML element `Label` with an attribute `Key` for each value.
    """
    header, _ = _load_header(Path(path), MAX_BYTES)
    block = bytearray(header.data_offset)
    with _opened(header.data_path) as stream:
        del block[_fill(stream, memoryview(block)) :]
    return parse_label_table(block.decode("utf-8", "replace"))


def intensity_warnings(volume: Volume) -> tuple[ScanWarning, ...]:
    """Oddities of a scan's intensities that its header cannot show: saturation."""
    highest = np.fmax.reduce(volume.array, axis=None)
    clipped = (
        sum(np.count_nonzero(volume.array[part] == highest) for part in slabs_of(volume.array))
        / volume.array.size
    )
    if clipped <= CLIPPED_FRACTION:
        return ()
    return (
        ScanWarning("W_CLIP", f"{clipped:.0%} of the voxels have the largest value, {highest:g}"),
    )


def write_volume(volume: Volume, path: Path | str, like: Path | str | None = None) -> None:
    """Write `.nii` or `.nii.gz`, whole or not at all, read back before it appears under its name.

    Equal volumes give equal bytes on one machine: no time stamp, no file name, no description is stored.

    Args:
        volume: labels or intensities; booleans are stored as uint8.
        path: the target; its folder must exist.
        like: the scan that `volume` was made from. Its geometry fields are copied as they stand, so that the affine
            of the file is that of the scan bit for bit, also where it comes from a qform or from NIfTI-2. Without
            it, the affine is stored in float32, which changes nothing for one that was read from a NIfTI-1 sform.

    Raises:
        EnvironmentProblem: disk full, folder not writable, or other bytes were read back.
        ScanError: the grid is one that `read_volume` refuses, such as a single slice.
        ValueError: the suffix, dtype or scale cannot be stored, or the grid is not that of `like`.
    """
    path = Path(path)
    name = path.name.lower()
    if not name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"volumes are written as .nii or .nii.gz, not {path.name!r}")
    if volume.array.dtype == np.bool_:
        volume = Volume(volume.array.view(np.uint8), volume.geometry)
    header = _new_header(volume, path, like)
    prefix = header.binaryblock + bytes(4)  # the four bytes say: no extensions
    array = np.asfortranarray(
        volume.array, dtype=volume.array.dtype.newbyteorder("<")
    )  # most often no copy
    voxels = array.reshape(-1, order="F").view(np.uint8).data
    atomic_write(
        path,
        lambda file: _write(file, name.endswith(".gz"), prefix, voxels),
        lambda temporary: _verify(temporary, path, prefix, voxels),
    )


def volume_bytes(volume: Volume) -> bytes:
    """The bytes of a `.nii.gz`, for a file that holds more than the volume.

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
    """File name without `.nii`, `.nii.gz`, `.hdr`, `.img` and the like, in either case."""
    return re.sub(r"\.(nii|hdr|img)(\.gz)?$", "", path.name, flags=re.IGNORECASE)


# ---- header


def _load_header(path: Path, max_bytes: int) -> tuple[NiftiHeader, Nifti1Header]:
    """The checked header, and nibabel's view of the raw fields."""
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
        warnings.append(
            ScanWarning("W_OFFSET", f"vox_offset is 0; the voxels are taken from byte {offset}")
        )
    if header_path.suffix.lower().endswith(".gz") != header_is_gzip:
        kind = "gzip" if header_is_gzip else "not compressed"
        warnings.append(ScanWarning("W_EXT", f"the contents are {kind}, against the name"))
    data_path = header_path if is_single else _partner(header_path, ".img")
    header = NiftiHeader(geometry, dtype, slope, intercept, data_path, offset, tuple(warnings))
    _check_size(header, path, max_bytes)
    return header, raw


def _header_path(path: Path) -> Path:
    return _partner(path, ".hdr") if re.search(r"\.img(\.gz)?$", path.name, re.IGNORECASE) else path


def _raw_header(path: Path) -> tuple[Nifti1Header, bool, bool]:
    """nibabel's header; whether header and voxels are one file; whether it is gzip."""
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
            raise _refusal(
                path, "E_TRUNCATED", f"holds {len(block)} of {size} header bytes", _COPY_AGAIN
            )
        if not block.startswith((single, pair), magic_at):
            raise _refusal(
                path,
                "E_NOTNIFTI",
                f"magic is {bytes(block[magic_at : magic_at + len(single)])!r}, as in ANALYZE or a damaged file",
                "convert it to NIfTI from the original: ANALYZE stores no left and right",
            )
        return (
            header_type(bytes(block[:size]), endianness, check=False),
            block.startswith(single, magic_at),
            is_gzip,
        )
    what, fix = _other_format(bytes(block))
    raise _refusal(path, "E_NOTNIFTI", what, fix)


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
            "give one 3-D volume: extract it from a series, export all slices of the scan, or give each channel a file of its own",
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
    """Slope and intercept; by the standard a slope of 0 (by custom, of NaN) means that there is no scale."""
    slope, intercept = float(raw["scl_slope"]), float(raw["scl_inter"])
    if slope == 0 and intercept != 0 and not math.isnan(intercept):
        text = f"scl_slope is 0, so the intercept {intercept:g} is not applied; other readers may apply it"
        return 1.0, 0.0, [ScanWarning("W_SCALE", text)]
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
    """Refuse what cannot fit, before any memory is taken for it."""
    wanted, shape = header.n_bytes, "×".join(map(str, header.geometry.shape))
    if wanted > max_bytes:
        raise _refusal(
            path,
            "E_TOOBIG",
            f"header asks for {shape} voxels, {wanted:,} bytes, above the limit of {max_bytes:,}",
            "crop or resample the scan; if its size is not true, copy the file again",
        )
    with _opened(header.data_path) as stream:
        is_gzip = isinstance(stream, _Inflated)
        held = os.stat(header.data_path).st_size
    if is_gzip and header.data_offset + wanted > held * GZIP_MAX_RATIO:
        raise _refusal(
            path,
            "E_TOOBIG",
            f"header asks for {shape} voxels, {wanted:,} bytes, more than {held:,} bytes of gzip can hold",
            _COPY_AGAIN,
        )
    if not is_gzip:
        if header.data_offset > held:
            raise _refusal(
                path,
                "E_HEADER",
                f"vox_offset is {header.data_offset:,} in a file of {held:,} bytes",
                _COPY_AGAIN,
            )
        _check_held(held - header.data_offset, wanted, path)


def _check_held(held: int, wanted: int, path: Path) -> None:
    if held < wanted:
        raise _refusal(
            path, "E_TRUNCATED", f"holds {held:,} of {wanted:,} voxel bytes", _COPY_AGAIN
        )
    if held > wanted + MAX_TAIL_BYTES:
        raise _refusal(
            path,
            "E_BOMB",
            f"goes on for more than {MAX_TAIL_BYTES:,} bytes after its last voxel",
            "its header is wrong or the file was made to do harm: export the scan again",
        )


# ---- geometry


def _geometry(
    raw: Nifti1Header, shape: tuple[int, int, int], path: Path
) -> tuple[Geometry, list[ScanWarning]]:
    unit = int(raw["xyzt_units"]) & 7
    if unit not in (0, 2):  # unknown is taken for mm, as every scanner means it
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
    with np.errstate(
        all="ignore"
    ):  # nonsense in a header may overflow; the checks below catch what comes of it
        if codes["sform_code"] > 0:
            geometry = _grid(shape, np.asarray(raw.get_sform()), "sform", path)
            warnings = _check_grid(geometry, path)
            return geometry, warnings + _check_against_sform(raw, pixdim, geometry, path)
        if codes["qform_code"] > 0:
            if not (np.isfinite(pixdim).all() and (pixdim > 0).all()):
                raise _refusal(
                    path,
                    "E_GEOM",
                    f"pixdim is {_listed(pixdim)} mm",
                    "set the true spacing in pixdim",
                )
            try:
                affine = _qform(raw)
            except ValueError as error:
                raise _refusal(
                    path,
                    "E_NOGEOM",
                    f"qform is not a rotation ({error})",
                    "export again, with an sform",
                ) from error
            geometry = _grid(shape, affine, "qform", path)
            return geometry, _check_grid(geometry, path)
    raise _refusal(
        path,
        "E_NOGEOM",
        "neither sform_code nor qform_code is set, so left and right are unknown",
        "convert the original again (dcm2niix sets them); never guess",
    )


def _qform(raw: Nifti1Header) -> np.ndarray:
    """Affine of the qform, computed as nibabel does; a qfac (pixdim[0]) of 0 means 1.

    Raises:
        ValueError: quaternion, qfac or pixdim are not valid.
    """
    tidy = raw.copy()
    if tidy["pixdim"][0] == 0:
        tidy["pixdim"][0] = 1
    try:
        return np.asarray(tidy.get_qform())
    except HeaderDataError as error:
        raise ValueError(str(error)) from error


def _grid(shape: tuple[int, int, int], affine: np.ndarray, source: str, path: Path) -> Geometry:
    try:
        return Geometry(shape, affine)
    except ValueError as error:
        rows = "; ".join(_listed(row) for row in affine[:3])
        raise _refusal(
            path,
            "E_GEOM",
            f"{source} [{rows}] is not a finite, invertible affine",
            "export the scan again",
        ) from error


def _check_grid(geometry: Geometry, path: Path) -> list[ScanWarning]:
    warnings = []
    spacing = np.array(geometry.spacing_mm)
    if not (spacing.min() >= MIN_SPACING_MM and spacing.max() <= MAX_SPACING_MM):
        raise _refusal(
            path,
            "E_SPACING",
            f"voxel spacing is {_listed(spacing)} mm, outside {MIN_SPACING_MM:g} to {MAX_SPACING_MM:g} mm",
            "store spacing and affine in mm",
        )
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
        warnings.append(
            ScanWarning("W_SHEAR", f"axes are at right angles only within {cosine:.1e}")
        )
    corners = geometry.to_world_mm(np.array([(0, 0, 0), np.array(geometry.shape) - 1]))
    if np.abs(corners).max() > FAR_ORIGIN_MM:
        warnings.append(
            ScanWarning(
                "W_ORIGIN", f"the scan lies {np.abs(corners).max() / 1000:,.1f} m off the origin"
            )
        )
    return warnings


def _check_against_sform(
    raw: Nifti1Header, pixdim: np.ndarray, geometry: Geometry, path: Path
) -> list[ScanWarning]:
    """The other two statements about the grid, pixdim and qform, on which other readers may rely."""
    spacing = np.array(geometry.spacing_mm)
    if (
        not np.isfinite(pixdim).all()
        or (np.abs(np.abs(pixdim) - spacing) > SPACING_TOLERANCE * spacing).any()
    ):
        raise _refusal(
            path,
            "E_PIXDIM",
            f"pixdim gives a spacing of {_listed(pixdim)} mm, but the sform {_listed(spacing)} mm",
            "find out which is true and store it in both",
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
        return [
            ScanWarning("W_QS", f"qform and sform differ by {offset:.1f} voxels; the sform is used")
        ]
    return []


# ---- voxels


def _read_voxels(header: NiftiHeader, raw: Nifti1Header, path: Path) -> tuple[np.ndarray, str]:
    """(I, J, K) in Fortran order, as stored, in native byte order; and the SHA-256 of the file, or files, they come from.

    Raises:
        ScanError: `E_CHANGED` when the file is no longer the one whose header was read.
    """
    flat = np.empty(math.prod(header.geometry.shape), header.dtype)
    target = flat.view(np.uint8).data
    digest, block = hashlib.sha256(), raw.binaryblock
    header_path = _header_path(path)
    before = "" if header_path == header.data_path else sha256_of(header_path) + "+"
    with _opened(header.data_path, digest) as stream:
        start = bytearray(min(len(block), header.data_offset))
        is_as_read = _fill(stream, memoryview(start)) == len(start) and (
            bool(before) or block.startswith(start)
        )
        _skip(stream, header.data_offset - len(start))
        held = _fill(stream, target)
        if held == len(target):
            held += _skip(stream, MAX_TAIL_BYTES + 1)  # to the end, where gzip keeps its checksum
    if not is_as_read or (before and _raw_header(header_path)[0].binaryblock != block):
        raise _refusal(path, "E_CHANGED", "was replaced while it was being read", "run again")
    _check_held(held, len(target), path)
    if not flat.dtype.isnative:
        flat = flat.byteswap(inplace=True).view(flat.dtype.newbyteorder("="))
    return flat.reshape(header.geometry.shape, order="F"), before + digest.hexdigest()


def scan_files(path: Path) -> tuple[Path, ...]:
    """The files behind the name of a scan: one, or an `.hdr` and its `.img`, in this order.

    Raises:
        ScanError: half of a pair is missing.
    """
    header_path = _header_path(path)
    is_pair = re.search(r"\.hdr(\.gz)?$", header_path.name, re.IGNORECASE)
    return (header_path, _partner(path, ".img")) if is_pair else (path,)


def scan_digest(path: Path) -> str:
    """`Volume.sha256` of a file that is not to be read into memory.

    Raises:
        ScanError: it cannot be read.
    """
    digests = []
    for file in scan_files(path):
        digest = hashlib.sha256()
        with _opened_raw(file, digest) as stream:
            _skip(stream, sys.maxsize)
        digests.append(digest.hexdigest())
    return "+".join(digests)


def _finite_range(array: np.ndarray, path: Path) -> tuple[float, float]:
    """Smallest and largest of the finite stored values, a slab at a time."""
    some = (array[part] for part in slabs_of(array))
    ends = [
        (finite.min(), finite.max()) for slab in some if (finite := slab[np.isfinite(slab)]).size
    ]
    if not ends:
        return _range(array, path)
    return float(min(low for low, _ in ends)), float(max(high for _, high in ends))


def _range(array: np.ndarray, path: Path) -> tuple[float, float]:
    """Smallest and largest stored value, all of them finite."""
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
    """The largest label of a valid mask."""
    mistaken = "was an image given in place of its mask?"
    if stored.array.dtype == np.uint8 and not stored.is_scaled and max_labels >= 256:
        return int(stored.array.max())  # nothing below can be wrong
    found: set[int] = set()
    for k in range(stored.geometry.shape[2]):
        with np.errstate(
            over="ignore", invalid="ignore"
        ):  # nonsense in the scale; the bounds below catch it
            whole = values = stored.intensities(stored.array[:, :, k])
            if values.dtype.kind == "f":
                whole = np.rint(values)
                fractions = values[np.abs(values - whole) > LABEL_TOLERANCE]
                if fractions.size:
                    held = ", ".join(f"{value:g}" for value in np.unique(fractions)[:5])
                    problem = f"mask holds {held}, which {'are no whole numbers' if ',' in held else 'is not a whole number'}"
                    raise _refusal(
                        path,
                        "E_LABELS",
                        problem,
                        f"resample labels with nearest neighbour; or {mistaken}",
                    )
        low, high = whole.min(), whole.max()
        if low < 0 or high >= 2**53:
            problem = f"mask holds the label {low if low < 0 else high:,.0f}"
            raise _refusal(path, "E_LABELS", problem, f"number labels from 0 up; or {mistaken}")
        found.update(_distinct(whole.astype(np.int64)).tolist())
        if len(found) > max_labels:
            raise _refusal(
                path, "E_LABELS", f"mask holds more than {max_labels:,} distinct values", mistaken
            )
    return max(found)


def _distinct(labels: np.ndarray) -> np.ndarray:
    """Distinct values ≥ 0; by counting where that is quicker than sorting."""
    return (
        np.flatnonzero(np.bincount(labels.ravel())) if labels.max() < 2**16 else np.unique(labels)
    )


# ---- writing


def _new_header(volume: Volume, path: Path, like: Path | str | None) -> Nifti1Header:
    """A blank little-endian header of the volume, whose affine reads back as the volume's own."""
    source = None if like is None else _load_header(Path(like), MAX_BYTES)[1]
    is_long = max(volume.geometry.shape) > np.iinfo(np.int16).max
    header_type = Nifti2Header if is_long or isinstance(source, Nifti2Header) else Nifti1Header
    header = header_type(endianness="<")
    dtype = volume.array.dtype.newbyteorder("=")
    if dtype not in map(np.dtype, _DTYPES.values()):
        raise ValueError(f"voxels of type {dtype} are not written, as they would not be read")
    header.set_data_dtype(dtype)
    header["dim"] = [3, *volume.geometry.shape, 1, 1, 1, 1]
    header["vox_offset"] = header.sizeof_hdr + 4
    header["scl_slope"], header["scl_inter"] = volume.slope, volume.intercept
    if (float(header["scl_slope"]), float(header["scl_inter"])) != (volume.slope, volume.intercept):
        raise ValueError(
            f"slope {volume.slope!r} or intercept {volume.intercept!r} is not a float32 number"
        )
    if source is None:
        with np.errstate(over="ignore"):
            header.set_qform(volume.geometry.affine, code=1)
            header.set_sform(volume.geometry.affine, code=1)
            wanted = volume.geometry.affine.astype(header["srow_x"].dtype)
        header["xyzt_units"] = 2
    else:
        for field in _GEOMETRY_FIELDS:
            header[field] = source[field]
        wanted = volume.geometry.affine
    geometry, _ = _geometry(header, _shape(header, path), path)
    if not np.array_equal(geometry.affine, wanted):
        raise ValueError(
            f"the volume lies on another grid than {like}:\n{wanted}\nand\n{geometry.affine}"
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
    """Compare a file with what was written into it, to its end and its checksum."""
    held = memoryview(bytearray(CHUNK_BYTES))
    try:
        with _opened(temporary) as stream:
            for chunk in _chunks(prefix, voxels):
                if _fill(stream, held[: len(chunk)]) != len(chunk) or held[: len(chunk)] != chunk:
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
    """The contents of a file, decompressed if they are gzip whatever the name says.

    Args:
        digest: is told of all bytes of the file, as stored, by the time that the end is reached.
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
    if not stat.S_ISREG(mode):  # a pipe or a device would be read for ever
        raise _refusal(
            path, "E_NOTFILE", f"is {kind_of(mode)}, not a file", "give the path of a NIfTI file"
        )
    try:
        with open_regular(path) as buffered:
            file = cast(io.RawIOBase, buffered.raw)
            yield file if digest is None else _Digested(file, digest)
    except OSError as error:
        raise _read_refusal(path, error) from error


class _Digested(io.RawIOBase):
    """A file whose bytes are hashed in passing. They are read once from start to end; seeking to the start begins anew."""

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
        fresh = self._position + n - self._hashed
        if fresh > 0:
            self._digest.update(memoryview(target)[n - fresh : n])
            self._hashed += fresh
        self._position += n
        return n


class _Inflated(io.RawIOBase):
    """The bytes inside a gzip file; its end is reached only if the checksum of every member is right."""

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
                    raise _refusal(
                        self._path, "E_TRUNCATED", "the gzip stream has no end", _COPY_AGAIN
                    )
            try:
                plain = self._member.decompress(packed, min(len(target), 4 * CHUNK_BYTES))
            except igzip_lib.IsalError as error:  # pyright: ignore[reportGeneralTypeIssues]
                raise _refusal(
                    self._path, "E_CRC", f"the gzip stream is damaged ({error})", _COPY_AGAIN
                ) from error
            if plain:
                target[: len(plain)] = plain
                return len(plain)

    def _next_member(self) -> bool:
        """Go on to what follows a finished member; by custom that may be zeros."""
        rest = self._member.unused_data.lstrip(b"\0")
        while len(rest) < 2 and (more := self._file.read(CHUNK_BYTES)):
            rest = (rest + more).lstrip(b"\0")
        if not rest:
            return False
        if not rest.startswith(b"\x1f\x8b"):
            raise _refusal(
                self._path,
                "E_GZIP",
                "other bytes follow the gzip stream",
                "copy the file again, or gunzip and gzip it",
            )
        self._pending = rest
        self._member = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
        return True


def _fill(stream: io.RawIOBase, target: memoryview) -> int:
    """Read until `target` is full or the stream ends; the number of bytes read."""
    filled = 0
    while filled < len(target) and (n := stream.readinto(target[filled:])):
        filled += n
    return filled


def _skip(stream: io.RawIOBase, n_bytes: int) -> int:
    """Read and forget up to `n_bytes`; the number of bytes read."""
    scratch = memoryview(bytearray(min(n_bytes, CHUNK_BYTES)))
    skipped = 0
    while skipped < n_bytes and (n := stream.readinto(scratch[: n_bytes - skipped])):
        skipped += n
    return skipped


def _partner(path: Path, suffix: str) -> Path:
    """The other half of an `.hdr`/`.img` pair, in either case, compressed or not."""
    stem = stem_of(path)
    for ending in (suffix, suffix + ".gz", suffix.upper(), suffix.upper() + ".GZ"):
        candidate = path.with_name(stem + ending)
        if os.path.exists(candidate):
            return candidate
    raise _refusal(
        path,
        "E_MISSING",
        f"its {suffix} file is missing",
        "put .hdr and .img of one name into one folder",
    )


def _listed(values: np.ndarray) -> str:
    return " ".join(f"{value:.6g}" for value in values)


def _other_format(block: bytes) -> tuple[str, str]:
    """What a file is that is not NIfTI, and what to do about it."""
    for start, magic, what, fix in _OTHER_FORMATS:
        if block.startswith(magic, start):
            return f"is {what}, not NIfTI", fix
    size = int.from_bytes(block[:4], "little")
    return (
        f"is not NIfTI: its header size reads {size}, not 348 or 540",
        "give a NIfTI file (.nii, .nii.gz, .hdr)",
    )


def _read_refusal(path: Path, error: OSError | ValueError) -> ScanError:
    number = error.errno if isinstance(error, OSError) else errno.ENOENT
    code, what, fix = _READ_PROBLEMS.get(
        number or 0, ("E_READ", "cannot be read", "check the disk or network share")
    )
    reason = f" ({error.strerror})" if isinstance(error, OSError) and code == "E_READ" else ""
    return _refusal(path, code, what + reason, fix)


def _refusal(path: Path, code: str, problem: str, fix: str) -> ScanError:
    name = str(path)
    shown = (
        name if name.isprintable() else repr(name)[1:-1]
    )  # a line break in a name must not break the line
    return ScanError(f"{shown}: {problem}", fix=fix, code=code)


_FORMATS: dict[
    int, tuple[type[Nifti1Header], int, bytes, bytes]
] = {  # sizeof_hdr → type, magic: where, single, pair
    348: (Nifti1Header, 344, b"n+1\0", b"ni1\0"),
    540: (Nifti2Header, 4, b"n+2\0\r\n\x1a\n", b"ni2\0\r\n\x1a\n"),
}
_DTYPES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
}  # fmt: skip
_REFUSED_DTYPES = {
    1: "bit", 32: "complex64", 128: "RGB colour", 1536: "float128", 1792: "complex128", 2048: "complex256",
    2304: "RGBA colour",
}  # fmt: skip
_GEOMETRY_FIELDS = (
    "pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d",
    "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z",
)  # fmt: skip
_OTHER_FORMATS = (
    (
        0,
        b"version https://git-lfs",
        "a Git LFS pointer",
        "fetch the file itself with: git lfs pull",
    ),
    (
        0,
        b"<",
        "a web page or XML",
        "download the file again: the server may have sent a login page",
    ),
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

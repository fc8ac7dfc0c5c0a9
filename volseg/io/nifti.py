"""NIfTI-1 and NIfTI-2: read a header and refuse ambiguous ones; encode a volume."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError

from volseg.io.gzip_stream import COPY_AGAIN, refusal
from volseg.io.header import (
    ScanHeader,
    ScanWarning,
    checked_grid,
    listed,
    read_start,
    volume_shape,
)
from volseg.io.series import split_volume
from volseg.io.voxels import FileContent, voxel_bytes
from volseg.volume import SAME_GRID_TOLERANCE_VOXELS, Geometry, Volume

SPACING_TOLERANCE = 0.01  # relative difference between pixdim and the affine
MIN_SLOPE, MAX_SLOPE = 1e-15, 1e15  # keeps every scaled integer inside float32
MAX_OFFSET_BYTES = 64 * 2**20  # header extensions before the first voxel


def read_header(path: Path) -> ScanHeader:
    """Read the header of `.nii`, `.nii.gz` or an `.hdr`/`.img` pair, without voxels.

    Of a file that holds several volumes, `scan.nii#3` is the third.

    The grid is that of the sform if it is set and not all zeros, else of the qform.

    Raises:
        ScanError: the file or its header cannot be trusted; `code` is the reason.
    """
    path, number = split_volume(path)
    header_path = _header_file(path)
    stored, name_warnings = read_start(header_path, 540)
    raw, is_single = _parse(stored, header_path)
    n_dims, *sizes = (int(n) for n in raw["dim"])
    if not 1 <= n_dims <= 7 or min(sizes[:n_dims]) < 1:
        raise refusal(path, "E_DIM", f"dim is {[n_dims, *sizes]}", COPY_AGAIN)
    series = volume_shape(sizes[:n_dims], path, volume=number)
    shape = series.shape
    dtype = _dtype(raw, path)
    slope, intercept, warnings = _scale(raw, path)
    geometry, grid_warnings = grid_of(raw, shape, path)
    offset, offset_warnings = _offset(raw, is_single, path)
    n_bytes = math.prod(shape) * dtype.itemsize
    return ScanHeader(
        geometry=geometry,
        dtype=dtype,
        slope=slope,
        intercept=intercept,
        path=header_path,
        stored=raw.binaryblock,
        data_path=header_path if is_single else _partner(header_path, ".img"),
        data_offset=offset + series.n_before * n_bytes,
        n_after=series.n_after * n_bytes,
        warnings=(*warnings, *grid_warnings, *offset_warnings, *name_warnings),
    )


def encode(volume: Volume, path: Path, like: ScanHeader | None = None) -> FileContent:
    """Return the contents of a `.nii` file whose affine reads back as that of the volume.

    Args:
        path: the future file, for messages.
        like: header of the scan on this grid: a NIfTI scan gives its geometry fields.

    Raises:
        ScanError: `read_header` would refuse the grid, for example a line of voxels.
        ValueError: the dtype, scale or affine cannot be stored.
    """
    source = None if like is None or not _is_nifti(like.stored) else _parse(like.stored, path)[0]
    header = _new_header(volume, source, is_exact=like is not None)
    affine = volume.geometry.affine
    if source is None:
        with np.errstate(over="ignore"):
            # A qform holds no tilt: other readers must take the sform.
            header.set_qform(affine, code=0 if volume.geometry.is_tilted else 1)
            header.set_sform(affine, code=1)
            affine = affine.astype(header["srow_x"].dtype)
        header["xyzt_units"] = 2
    else:
        for field in _GEOMETRY_FIELDS:
            header[field] = source[field]
        if _is_zero_sform(source):
            header["sform_code"] = 0  # other readers would take it
    geometry, _ = grid_of(header, volume_shape(volume.geometry.shape, path).shape, path)
    if not np.array_equal(geometry.affine, affine):
        raise ValueError(f"the affine reads back as\n{geometry.affine}\nnot\n{affine}")
    prefix = header.binaryblock + bytes(4)  # four zeros: no extensions
    return FileContent(prefix, voxel_bytes(volume.array, "<"))


def _new_header(volume: Volume, source: Nifti1Header | None, *, is_exact: bool) -> Nifti1Header:
    """Return a little-endian header without geometry.

    It is NIfTI-2 if `source` is, an axis is too long for NIfTI-1, or NIfTI-1 would round an affine
    that must be exact.
    """
    affine, dtype = volume.geometry.affine, volume.array.dtype.newbyteorder("=")
    is_long = max(volume.geometry.shape) > np.iinfo(np.int16).max
    is_rounded = source is None and not np.array_equal(affine, affine.astype(np.float32))
    if is_long or isinstance(source, Nifti2Header) or (is_exact and is_rounded):
        header = Nifti2Header(endianness="<")
    else:
        header = Nifti1Header(endianness="<")
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
    return header


# ---- fields


def _is_nifti(stored: bytes) -> bool:
    return any(stored.startswith((one, two), at) for _, at, one, two in _FORMATS.values())


def _parse(stored: bytes, path: Path) -> tuple[Nifti1Header, bool]:
    """Return nibabel's header, and whether header and voxels share one file."""
    for endianness in "<>":
        size = int(np.frombuffer(stored[:4].ljust(4), endianness + "i4")[0])
        if size not in _FORMATS:
            continue
        header_type, magic_at, single, pair = _FORMATS[size]
        if len(stored) < size:
            text = f"holds {len(stored)} of {size} header bytes"
            raise refusal(path, "E_TRUNCATED", text, COPY_AGAIN)
        if not stored.startswith((single, pair), magic_at):
            magic = stored[magic_at : magic_at + len(single)]
            raise refusal(
                path,
                "E_NOTNIFTI",
                f"magic is {magic!r}, as in ANALYZE or a damaged file",
                "convert it to NIfTI from the original: ANALYZE does not store left and right",
            )
        header = header_type(stored[:size], endianness, check=False)
        return header, stored.startswith(single, magic_at)
    problem, fix = _other_format(stored)
    raise refusal(path, "E_NOTNIFTI", problem, fix)


def _dtype(raw: Nifti1Header, path: Path) -> np.dtype:
    code = int(raw["datatype"])
    if code not in _DTYPES:
        name = _REFUSED_DTYPES.get(code, "unknown")
        raise refusal(
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
        raise refusal(
            path,
            "E_SCALE",
            f"scl_slope is {slope:g} and scl_inter {intercept:g}",
            "export the scan again, or store real intensities with slope 1 and intercept 0",
        )
    return slope, intercept, []


def _offset(raw: Nifti1Header, is_single: bool, path: Path) -> tuple[int, list[ScanWarning]]:
    """Return the byte of the first voxel."""
    offset, first = float(raw["vox_offset"]), raw.sizeof_hdr + 4
    if is_single and offset == 0:
        text = f"vox_offset is 0; the voxels are taken from byte {first}"
        return first, [ScanWarning("W_OFFSET", text)]
    lowest = first if is_single else 0
    if not (lowest <= offset <= MAX_OFFSET_BYTES and offset.is_integer()):
        raise refusal(path, "E_HEADER", f"vox_offset is {offset:g}", COPY_AGAIN)
    return int(offset), []


def _other_format(stored: bytes) -> tuple[str, str]:
    """Return the problem and the fix for a file of another format."""
    for start, magic, name, fix in _OTHER_FORMATS:
        if stored.startswith(magic, start):
            return f"is {name}, not NIfTI", fix
    size = int.from_bytes(stored[:4], "little")
    return (
        f"is not NIfTI: its header size reads {size}, not 348 or 540",
        "give a NIfTI file",
    )


# ---- geometry


def grid_of(
    raw: Nifti1Header, shape: tuple[int, int, int], path: Path | str
) -> tuple[Geometry, list[ScanWarning]]:
    """Return the grid that a header states, and its oddities; refuse an ambiguous one."""
    unit = int(raw["xyzt_units"]) & 7
    if unit not in (0, 2):  # an unknown unit is read as mm, which every scanner uses
        name = {1: "metre", 3: "micron"}.get(unit, f"code {unit}, unknown to NIfTI")
        raise refusal(
            path,
            "E_UNITS",
            f"unit of length is {name}",
            "store spacing and affine in mm and set xyzt_units to 2 (mm)",
        )
    codes = {name: int(raw[name]) for name in ("sform_code", "qform_code")}
    if not all(0 <= code <= 5 for code in codes.values()):
        raise refusal(
            path, "E_NOGEOM", f"{codes} holds a code unknown to NIfTI", "convert the original again"
        )
    pixdim = raw["pixdim"][1:4].astype(np.float64)
    has_sform = codes["sform_code"] > 0
    if _is_zero_sform(raw) and codes["qform_code"] > 0:
        has_sform = False
    with np.errstate(all="ignore"):  # absurd headers may overflow; the checks below catch that
        if has_sform:
            sform = np.asarray(raw.get_sform())
            geometry, warnings = checked_grid(shape, sform, path, source="sform")
            return geometry, warnings + _check_against_sform(raw, pixdim, geometry, path)
        if codes["qform_code"] > 0:
            return _grid_of_qform(raw, shape, path)
    raise refusal(
        path,
        "E_NOGEOM",
        "neither sform_code nor qform_code is set, so left and right are unknown",
        "convert the original again (dcm2niix sets them); never guess",
    )


def _grid_of_qform(
    raw: Nifti1Header, shape: tuple[int, int, int], path: Path | str
) -> tuple[Geometry, list[ScanWarning]]:
    pixdim = raw["pixdim"][1:4].astype(np.float64)
    if not (np.isfinite(pixdim).all() and (pixdim > 0).all()):
        raise refusal(
            path, "E_GEOM", f"pixdim is {listed(pixdim)} mm", "set the true spacing in pixdim"
        )
    try:
        affine = _qform(raw)
    except ValueError as error:
        text = f"qform is not a rotation ({error})"
        raise refusal(path, "E_NOGEOM", text, "export again, with an sform") from error
    geometry, warnings = checked_grid(shape, affine, path, source="qform")
    if int(raw["sform_code"]) > 0:
        warnings.append(ScanWarning("W_QS", "the sform is all zeros; the qform is used"))
    return geometry, warnings


def _is_zero_sform(raw: Nifti1Header) -> bool:
    """Check for the matrix of zeros that some tools leave in the sform while its code is set."""
    return not any(raw[row][:3].any() for row in ("srow_x", "srow_y", "srow_z"))


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


def _check_against_sform(
    raw: Nifti1Header, pixdim: np.ndarray, geometry: Geometry, path: Path | str
) -> list[ScanWarning]:
    """Check pixdim and qform, on which other readers may rely, against the sform."""
    spacing = np.array(geometry.spacing_mm)
    # Of a tilted stack some converters store the distance of the slices instead.
    distances = np.stack([spacing, geometry.slice_distances_mm])
    is_near = np.abs(np.abs(pixdim) - distances) <= SPACING_TOLERANCE * spacing
    if not np.isfinite(pixdim).all() or not is_near.any(axis=0).all():
        raise refusal(
            path,
            "E_PIXDIM",
            f"pixdim gives a spacing of {listed(pixdim)} mm, but the sform {listed(spacing)} mm",
            "find out which is correct and store it in both",
        )
    if (pixdim < 0).any():
        return [ScanWarning("W_QS", f"pixdim {listed(pixdim)} is negative; the sform is used")]
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


# ---- pairs of files


def _header_file(path: Path) -> Path:
    """Return the file that holds the header: that of an `.img` is its `.hdr`."""
    return _partner(path, ".hdr") if re.search(r"\.img(\.gz)?$", path.name, re.IGNORECASE) else path


def _partner(path: Path, suffix: str) -> Path:
    """Find the other file of an `.hdr`/`.img` pair, ignoring case, compressed or not."""
    stem = re.sub(r"\.(nii|hdr|img)(\.gz)?$", "", path.name, flags=re.IGNORECASE)
    for ending in (suffix, suffix + ".gz", suffix.upper(), suffix.upper() + ".GZ"):
        candidate = path.with_name(stem + ending)
        if os.path.exists(candidate):
            return candidate
    fix = "put .hdr and .img of the same name into one folder"
    raise refusal(path, "E_MISSING", f"its {suffix} file is missing", fix)


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
    (0, b"\0\0\0\1", "FreeSurfer MGH", "rename it to .mgh, or to .mgz if it is compressed"),
    (0, b"PK\x03\x04", "a zip archive", "unpack it first"),
    (0, b"NRRD", "NRRD", "rename it to .nrrd, or to .nhdr if its voxels lie in another file"),
    (0, b"ObjectType", "MetaImage", "rename it to .mha, or .mhd if its voxels lie in another file"),
    (0, b"\x89HDF", "HDF5 or MINC", "convert it to NIfTI"),
    (0, b"\x93NUMPY", "a NumPy array", "store it as NIfTI, with its affine"),
    (128, b"DICM", "DICOM", "give its name the end .dcm, or give the folder of the series"),
)

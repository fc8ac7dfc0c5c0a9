"""Headers of NIfTI: read one, refuse what common readers interpret differently; make a new one."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError

from volseg.io.gzip_stream import COPY_AGAIN, GZIP_MAX_RATIO, Inflated, fill, opened, refusal
from volseg.volume import SAME_GRID_TOLERANCE_VOXELS, Geometry, Volume

SUFFIXES = (".nii", ".nii.gz", ".hdr", ".hdr.gz")  # .img is opened through its .hdr
MAX_BYTES = 16 * 2**30  # voxel bytes that a header may request

MIN_SPACING_MM, MAX_SPACING_MM = 0.01, 100.0
ANISOTROPIC_RATIO = 20.0  # largest / smallest spacing that raises a warning
FAR_ORIGIN_MM = 10_000.0  # longer than any scanner table
ROUNDED_COSINE, MAX_COSINE = 1e-5, 1e-3  # between two axes: header rounding; real shear
SPACING_TOLERANCE = 0.01  # relative difference between pixdim and the affine
MIN_SLOPE, MAX_SLOPE = 1e-15, 1e15  # keeps every scaled integer inside float32
MAX_TAIL_BYTES = 2**20  # after the last voxel
MAX_OFFSET_BYTES = 64 * 2**20  # header extensions before the first voxel


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
    return load_header(Path(path), max_bytes)[0]


def load_header(path: Path, max_bytes: int) -> tuple[NiftiHeader, Nifti1Header]:
    """Return the checked header, and nibabel's view of the raw fields."""
    header_path = header_file(path)
    raw, is_single, header_is_gzip = raw_header(header_path)
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


def new_header(volume: Volume, path: Path, like: Path | str | None) -> Nifti1Header:
    """Return a new little-endian header whose affine reads back as that of the volume."""
    source = None if like is None else load_header(Path(like), MAX_BYTES)[1]
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


def scan_files(path: Path) -> tuple[Path, ...]:
    """Return the file of a scan, or its `.hdr` and `.img`, in this order.

    Raises:
        ScanError: one of a pair is missing.
    """
    header_path = header_file(path)
    is_pair = re.search(r"\.hdr(\.gz)?$", header_path.name, re.IGNORECASE)
    return (header_path, _partner(path, ".img")) if is_pair else (path,)


def stem_of(path: Path) -> str:
    """Return the file name without `.nii`, `.nii.gz`, `.hdr`, `.img` etc., ignoring case."""
    return re.sub(r"\.(nii|hdr|img)(\.gz)?$", "", path.name, flags=re.IGNORECASE)


# ---- fields


def raw_header(path: Path) -> tuple[Nifti1Header, bool, bool]:
    """Return nibabel's header, whether header and voxels share one file, and whether it is gzip."""
    with opened(path) as stream:
        block = bytearray(540)
        del block[fill(stream, memoryview(block)) :]
        is_gzip = isinstance(stream, Inflated)
    if not block:
        raise refusal(path, "E_EMPTY", "the file is empty", COPY_AGAIN)
    for endianness in "<>":
        size = int(np.frombuffer(bytes(block[:4]).ljust(4), endianness + "i4")[0])
        if size not in _FORMATS:
            continue
        header_type, magic_at, single, pair = _FORMATS[size]
        if len(block) < size:
            text = f"holds {len(block)} of {size} header bytes"
            raise refusal(path, "E_TRUNCATED", text, COPY_AGAIN)
        if not block.startswith((single, pair), magic_at):
            magic = bytes(block[magic_at : magic_at + len(single)])
            raise refusal(
                path,
                "E_NOTNIFTI",
                f"magic is {magic!r}, as in ANALYZE or a damaged file",
                "convert it to NIfTI from the original: ANALYZE does not store left and right",
            )
        header = header_type(bytes(block[:size]), endianness, check=False)
        return header, block.startswith(single, magic_at), is_gzip
    problem, fix = _other_format(bytes(block))
    raise refusal(path, "E_NOTNIFTI", problem, fix)


def _shape(raw: Nifti1Header, path: Path) -> tuple[int, int, int]:
    n_dims, *sizes = (int(n) for n in raw["dim"])
    if not 1 <= n_dims <= 7 or min(sizes[:n_dims]) < 1:
        raise refusal(path, "E_DIM", f"dim is {[n_dims, *sizes]}", COPY_AGAIN)
    sizes = sizes[:n_dims]
    while len(sizes) > 3 and sizes[-1] == 1:
        sizes.pop()
    if len(sizes) != 3 or min(sizes) < 2:
        raise refusal(
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


def _offset(raw: Nifti1Header, is_single: bool, path: Path) -> int:
    offset = float(raw["vox_offset"])
    lowest = raw.sizeof_hdr + 4 if is_single and offset != 0 else 0
    if not (lowest <= offset <= MAX_OFFSET_BYTES and offset.is_integer()):
        raise refusal(path, "E_HEADER", f"vox_offset is {offset:g}", COPY_AGAIN)
    return int(offset)


def _check_size(header: NiftiHeader, path: Path, max_bytes: int) -> None:
    """Refuse a header whose voxels exceed the limit or the file, before memory is allocated."""
    n_bytes, shape = header.n_bytes, "×".join(map(str, header.geometry.shape))
    requested = f"header asks for {shape} voxels, {n_bytes:,} bytes"
    if n_bytes > max_bytes:
        raise refusal(
            path,
            "E_TOOBIG",
            f"{requested}, above the limit of {max_bytes:,}",
            "crop or resample the scan; if its size is wrong, copy the file again",
        )
    with opened(header.data_path) as stream:
        is_gzip = isinstance(stream, Inflated)
        file_size = os.stat(header.data_path).st_size
    if is_gzip and header.data_offset + n_bytes > file_size * GZIP_MAX_RATIO:
        text = f"{requested}, more than {file_size:,} bytes of gzip can hold"
        raise refusal(path, "E_TOOBIG", text, COPY_AGAIN)
    if not is_gzip:
        if header.data_offset > file_size:
            text = f"vox_offset is {header.data_offset:,} in a file of {file_size:,} bytes"
            raise refusal(path, "E_HEADER", text, COPY_AGAIN)
        check_voxel_bytes(file_size - header.data_offset, n_bytes, path)


def check_voxel_bytes(available: int, required: int, path: Path) -> None:
    """Refuse a file with fewer voxel bytes than its header asks for, or many more."""
    if available < required:
        text = f"holds {available:,} of {required:,} voxel bytes"
        raise refusal(path, "E_TRUNCATED", text, COPY_AGAIN)
    if available > required + MAX_TAIL_BYTES:
        raise refusal(
            path,
            "E_BOMB",
            f"holds more than {MAX_TAIL_BYTES:,} bytes after its last voxel",
            "its header is wrong or the file is malicious: export the scan again",
        )


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


# ---- geometry


def _geometry(
    raw: Nifti1Header, shape: tuple[int, int, int], path: Path
) -> tuple[Geometry, list[ScanWarning]]:
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
    with np.errstate(all="ignore"):  # absurd headers may overflow; the checks below catch that
        if codes["sform_code"] > 0:
            geometry = _grid(shape, np.asarray(raw.get_sform()), "sform", path)
            warnings = _check_grid(geometry, path)
            return geometry, warnings + _check_against_sform(raw, pixdim, geometry, path)
        if codes["qform_code"] > 0:
            if not (np.isfinite(pixdim).all() and (pixdim > 0).all()):
                text = f"pixdim is {_listed(pixdim)} mm"
                raise refusal(path, "E_GEOM", text, "set the true spacing in pixdim")
            try:
                affine = _qform(raw)
            except ValueError as error:
                text = f"qform is not a rotation ({error})"
                raise refusal(path, "E_NOGEOM", text, "export again, with an sform") from error
            geometry = _grid(shape, affine, "qform", path)
            return geometry, _check_grid(geometry, path)
    raise refusal(
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
        raise refusal(path, "E_GEOM", text, "export the scan again") from error


def _check_grid(geometry: Geometry, path: Path) -> list[ScanWarning]:
    warnings = []
    spacing = np.array(geometry.spacing_mm)
    if not (spacing.min() >= MIN_SPACING_MM and spacing.max() <= MAX_SPACING_MM):
        limits = f"{MIN_SPACING_MM:g} to {MAX_SPACING_MM:g} mm"
        text = f"voxel spacing is {_listed(spacing)} mm, outside {limits}"
        raise refusal(path, "E_SPACING", text, "store spacing and affine in mm")
    if spacing.max() / spacing.min() > ANISOTROPIC_RATIO:
        warnings.append(ScanWarning("W_ANISO", f"voxel spacing is {_listed(spacing)} mm"))
    axes = geometry.directions
    cosine = float(np.abs(axes.T @ axes - np.eye(3)).max())
    if cosine > MAX_COSINE:
        raise refusal(
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
        raise refusal(
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


def _listed(values: np.ndarray) -> str:
    return " ".join(f"{value:.6g}" for value in values)


# ---- files


def header_file(path: Path) -> Path:
    """Return the file that holds the header: that of an `.img` is its `.hdr`."""
    return _partner(path, ".hdr") if re.search(r"\.img(\.gz)?$", path.name, re.IGNORECASE) else path


def _partner(path: Path, suffix: str) -> Path:
    """Find the other file of an `.hdr`/`.img` pair, ignoring case, compressed or not."""
    stem = stem_of(path)
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
    (0, b"PK\x03\x04", "a zip archive", "unpack it first"),
    (0, b"NRRD", "NRRD", "rename it to .nrrd or convert it to NIfTI"),
    (0, b"ObjectType", "MetaImage", "rename it to .mha or convert it to NIfTI"),
    (0, b"\x89HDF", "HDF5 or MINC", "convert it to NIfTI"),
    (0, b"\x93NUMPY", "a NumPy array", "store it as NIfTI, with its affine"),
    (128, b"DICM", "DICOM", "convert the series to NIfTI, for example with dcm2niix"),
)

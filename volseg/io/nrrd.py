"""NRRD and its detached header, NHDR: read a header and refuse ambiguous ones; encode a volume.

The fields are read here, not by pynrrd: that takes any number, opens any data file and reads the
whole of it before its size is checked. The tests compare with it.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from volseg.io.gzip_stream import COPY_AGAIN, Encoding, Part, opened_raw, refusal
from volseg.io.header import (
    ScanHeader,
    ScanWarning,
    SeriesShape,
    checked_grid,
    rounded,
    volume_shape,
)
from volseg.io.series import split_volume
from volseg.io.text_header import (
    MAX_HEADER_BYTES,
    data_file,
    header_refusal,
    lines_of,
    numbers,
    read_text_start,
    shown,
    whole_numbers,
)
from volseg.io.voxels import FileContent, voxel_bytes
from volseg.volume import LPS_TO_RAS, Volume

MAX_AXES = 16


def read_header(path: Path) -> ScanHeader:
    """Read the header of `.nrrd` or `.nhdr`, without voxels.

    The affine is made of `space directions` and `space origin`, turned to RAS and rounded to
    float32, so that a mask in NIfTI-1 has the same affine bit for bit.

    Raises:
        ScanError: the file or its header cannot be trusted; `code` is the reason.

    Source: https://teem.sourceforge.net/nrrd/format.html
    """
    path, number = split_volume(path)
    fields = read_fields(path)
    axes = fields.axes()
    shape = _series(axes, path, number)
    return scan_header(fields, axes, shape)


def encode(volume: Volume, path: Path, like: ScanHeader | None = None) -> FileContent:
    """Return the contents of an `.nrrd` file: voxels in gzip, the affine in float64 and LPS.

    Args:
        path: the future file, for messages.
        like: not needed, because the grid is that of the volume.

    Raises:
        ScanError: `read_header` would refuse the grid, for example a line of voxels.
        ValueError: the dtype or scale cannot be stored.
    """
    volume_shape(volume.geometry.shape, path)
    checked_grid(volume.geometry.shape, rounded(volume.geometry.affine), path, source="affine")
    return encode_with(volume, {})


def encode_with(volume: Volume, keys: dict[str, str]) -> FileContent:
    """Return the contents of an `.nrrd` file with more key/value pairs.

    Raises:
        ValueError: the dtype or scale cannot be stored.
    """
    if volume.is_scaled:
        raise ValueError("NRRD holds no slope and intercept")
    name = volume.array.dtype.newbyteorder("=").name
    if name not in _DTYPES:
        raise ValueError(f"cannot write voxels of type {name} as NRRD")
    affine = LPS_TO_RAS @ volume.geometry.affine + 0.0  # without -0
    directions = " ".join(_vector_text(affine[:3, axis]) for axis in range(3))
    lines = [
        "NRRD0004",
        "# https://teem.sourceforge.net/nrrd/format.html",
        f"type: {name}",
        "dimension: 3",
        "space: left-posterior-superior",
        f"sizes: {' '.join(map(str, volume.geometry.shape))}",
        f"space directions: {directions}",
        "kinds: domain domain domain",
        "endian: little",
        "encoding: gzip",
        f"space origin: {_vector_text(affine[:3, 3])}",
        *(f"{key}:={value}" for key, value in keys.items()),
    ]
    prefix = "".join(f"{line}\n" for line in [*lines, ""]).encode()
    return FileContent(prefix, voxel_bytes(volume.array, "<"), "gzip")


def _vector_text(vector: np.ndarray) -> str:
    return f"({','.join(map(repr, vector.tolist()))})"


# ---- fields


@dataclass(frozen=True, slots=True)
class Axes:
    """The axes of the stored array, the fastest first.

    Args:
        sizes: samples along each axis.
        spatial: the three axes that have a direction.
        affine: (4, 4) float64, index along `spatial` → RAS mm.
    """

    sizes: tuple[int, ...]
    spatial: tuple[int, int, int]
    affine: np.ndarray

    @property
    def n_before(self) -> int:
        """Values of each voxel that are stored side by side."""
        return math.prod(self.sizes[: self.spatial[0]])


@dataclass(frozen=True, slots=True)
class Fields:
    """The header of a file as text.

    Args:
        stored: its bytes, to the empty line at its end.
        values: name in lower case and without spaces → text, of the fields of the format.
        keys: the key/value pairs of other programs.
    """

    path: Path
    stored: bytes
    values: dict[str, str]
    keys: dict[str, str]

    @property
    def is_attached(self) -> bool:
        """The voxels follow in the same file."""
        return "datafile" not in self.values

    def require(self, name: str) -> str:
        if not self.values.get(name):
            raise header_refusal(self.path, f"lacks the field {name}")
        return self.values[name]

    def axes(self) -> Axes:
        """Return the checked axes.

        Raises:
            ScanError: they are not those of a scan in space (`E_NOGEOM`, `E_UNITS`, `E_NDIM`).
        """
        (n_axes, *more) = whole_numbers(self.require("dimension"), "dimension", self.path)
        sizes = whole_numbers(self.require("sizes"), "sizes", self.path)
        if more or n_axes != len(sizes) or not 1 <= n_axes <= MAX_AXES or min(sizes) < 1:
            text = (
                f"dimension is {self.values['dimension']}, sizes is {shown(self.values['sizes'])}"
            )
            raise refusal(self.path, "E_DIM", text, COPY_AGAIN)
        spatial, affine = _affine(self, n_axes)
        return Axes(tuple(sizes), spatial, affine)


def read_fields(path: Path) -> Fields:
    """Read the text before the voxels.

    Raises:
        ScanError: it is not the header of NRRD, or a field is stated twice.
    """
    start = read_text_start(path)
    if not start.startswith(_MAGIC):
        problem = f"is not NRRD: it starts with {start[:8]!r}"
        raise refusal(path, "E_NOTNRRD", problem, "give a file of NRRD, versions 1 to 5")
    ends = [at + len(gap) for gap in (b"\n\n", b"\n\r\n") if (at := start.find(gap)) >= 0]
    if not ends and len(start) == MAX_HEADER_BYTES:
        raise header_refusal(path, f"has no end within {MAX_HEADER_BYTES:,} bytes")
    fields = parse_fields(start[: min(ends, default=None)], path)
    if not ends and fields.is_attached:
        raise header_refusal(path, "has no empty line at its end, which separates it from voxels")
    return fields


def parse_fields(stored: bytes, path: Path) -> Fields:
    """Return the fields of a header, as `Fields.stored` holds it.

    Raises:
        ScanError: a line is no field, or a field is stated twice.
    """
    values: dict[str, str] = {}
    keys: dict[str, str] = {}
    for line in lines_of(stored, path)[1:]:
        if not line or line.startswith("#"):
            continue
        name, colon, value = line.partition(":")
        if not colon:
            raise header_refusal(path, f"holds {shown(line)}, which is no field")
        is_key = value.startswith("=")
        kind, name = (keys, name) if is_key else (values, name.replace(" ", "").lower())
        if kind.setdefault(name, value[is_key:].strip()) != value[is_key:].strip():
            raise header_refusal(path, f"states {shown(name)} twice")
    return Fields(path, stored, values, keys)


def _affine(fields: Fields, n_axes: int) -> tuple[tuple[int, int, int], np.ndarray]:
    """Return the axes with a direction, and the affine (4, 4) to RAS mm."""
    path, values = fields.path, fields.values
    space = values.get("space", "").lower()
    missing = [name for name in ("space", "space directions", "space origin")
               if not values.get(name.replace(" ", ""))]  # fmt: skip
    if missing or space not in _TO_RAS:
        text = f"lacks {' and '.join(missing)}" if missing else f"has the space {shown(space)}"
        problem = f"its header {text}, so its place in the patient is unknown"
        fix = "export it with left-posterior-superior directions and origin; never guess"
        raise refusal(path, "E_NOGEOM", problem, fix)
    units = re.findall(r'"([^"]*)"', values.get("spaceunits", ""))
    if not {unit.strip().lower() for unit in units} <= _MILLIMETRES:
        problem = f"unit of length is {shown(values['spaceunits'])}"
        raise refusal(path, "E_UNITS", problem, "store directions and origin in mm")
    text = values["spacedirections"]
    vectors = re.findall(r"none|\([^()]*\)", text)
    spatial = [axis for axis, vector in enumerate(vectors) if vector != "none"]
    if re.sub(r"none|\([^()]*\)", "", text).strip() or len(vectors) != n_axes:
        raise header_refusal(path, f"states space directions as {shown(text)}")
    if len(spatial) != 3:
        problem = f"{len(spatial)} of its {n_axes} axes have a direction; a volume has 3"
        raise refusal(path, "E_NDIM", problem, "give one 3-D volume")
    i, j, k = spatial
    affine = np.eye(4)
    for column, axis in enumerate(spatial):
        affine[:3, column] = _vector(vectors[axis], "space directions", path)
    affine[:3, 3] = _vector(values["spaceorigin"], "space origin", path)
    with np.errstate(all="ignore"):  # absurd values; the grid refuses them
        affine[:3] *= np.array(_TO_RAS[space])[:, None]
    return (i, j, k), rounded(affine + 0.0)


def _vector(text: str, name: str, path: Path) -> np.ndarray:
    """Return the three numbers in parentheses."""
    if not re.fullmatch(r"\([^()]*\)", text):
        raise header_refusal(path, f"states {name} as {shown(text)}")
    vector = numbers(text[1:-1], name, path, ",")
    if len(vector) != 3:
        raise header_refusal(path, f"states {name} as {shown(text)}")
    return vector


# ---- voxels


def _series(axes: Axes, path: Path, number: int | None) -> SeriesShape:
    """Return the sizes of the chosen volume; refuse several values per voxel."""
    first, _, last = axes.spatial
    between = axes.sizes[first:last + 1]  # fmt: skip
    inner = axes.n_before * math.prod(between) // math.prod(axes.sizes[n] for n in axes.spatial)
    if inner > 1:
        problem = f"holds {inner} values per voxel, as colours, vectors and layers are"
        fix = "store one volume; rename a segmentation of 3D Slicer to .seg.nrrd"
        raise refusal(path, "E_NDIM", problem, fix)
    sizes = [axes.sizes[axis] for axis in axes.spatial]
    return volume_shape([*sizes, *axes.sizes[last + 1 :]], path, volume=number)


def scan_header(fields: Fields, axes: Axes, series: SeriesShape) -> ScanHeader:
    """Return the header of a scan, with the place of its voxels in the file.

    Raises:
        ScanError: the voxels are of an unknown type or encoding, or lie in a place out of reach.
    """
    path, values = fields.path, fields.values
    dtype, encoding = _dtype(fields), _encoding(fields)
    geometry, warnings = checked_grid(series.shape, axes.affine, path, source="space directions")
    if values.get("oldmin") or values.get("oldmax"):
        text = "old min and old max, the range before quantisation, are not applied"
        warnings.append(ScanWarning("W_SCALE", text))
    data_path = path if fields.is_attached else _data_file(fields)
    part = Part(len(fields.stored) if fields.is_attached else 0, encoding)
    n_bytes = math.prod(series.shape) * dtype.itemsize
    n_stored = math.prod(axes.sizes) * dtype.itemsize
    return ScanHeader(
        geometry=geometry,
        dtype=dtype,
        path=path,
        stored=fields.stored,
        data_path=data_path,
        data_offset=_skipped(fields, data_path, part, n_stored) + series.n_before * n_bytes,
        part=part,
        max_tail=0,
        n_after=series.n_after * n_bytes,
        warnings=tuple(warnings),
    )


def _dtype(fields: Fields) -> np.dtype:
    stated = fields.require("type").lower()
    name = next((name for name, also in _DTYPES.items() if stated == name or stated in also), None)
    if name is None:
        problem = f"voxels are of type {shown(stated)}"
        raise refusal(fields.path, "E_DTYPE", problem, "export integers or floats of 8 to 64 bits")
    dtype = np.dtype(name)
    order = fields.values.get("endian", "").lower()
    if order != "little" and order != "big":
        if dtype.itemsize > 1:
            raise header_refusal(fields.path, "does not state the byte order (endian)")
        return dtype
    return dtype.newbyteorder(order)


def _encoding(fields: Fields) -> Encoding:
    stated = fields.require("encoding").lower()
    if stated not in _ENCODINGS:
        problem = f"voxels are encoded as {shown(stated)}"
        raise refusal(fields.path, "E_ENCODING", problem, "store them as raw or gzip")
    return _ENCODINGS[stated]


def _data_file(fields: Fields) -> Path:
    name = fields.values["datafile"]
    if name.upper().startswith("LIST") or re.search(r"%[0-9]*d", name):
        problem = "its voxels are spread over several files"
        raise refusal(fields.path, "E_MANYFILES", problem, "store the volume in one file")
    return data_file(fields.path, name)


def _skipped(fields: Fields, data_path: Path, part: Part, n_bytes: int) -> int:
    """Return the bytes, decompressed, between the start of the data and the first voxel."""
    path, skips = fields.path, []
    for name in ("lineskip", "byteskip"):
        (skip, *more) = whole_numbers(fields.values.get(name) or "0", name, path)
        if more or skip < -1:
            raise header_refusal(path, f"states {name} as {shown(fields.values[name])}")
        skips.append(skip)
    lines, skip = skips
    if lines != 0 or (skip != 0 and part.encoding != "raw"):  # readers disagree on these
        problem = f"has a line skip of {lines} and a byte skip of {skip}"
        raise refusal(path, "E_HEADER", problem, "store the voxels without a header of their own")
    if skip >= 0:
        return skip
    with opened_raw(data_path):  # refuses a missing file, a folder or a pipe
        size = os.stat(data_path).st_size - part.start
    return max(0, size - n_bytes)


_MAGIC = tuple(f"NRRD000{n}{end}".encode() for n in range(1, 6) for end in ("\n", "\r\n"))
_TO_RAS = {
    "right-anterior-superior": (1, 1, 1), "ras": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1), "las": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1), "lps": (-1, -1, 1),
}  # fmt: skip
_MILLIMETRES = {"", "mm", "millimeter", "millimeters", "millimetre", "millimetres"}
_ENCODINGS: dict[str, Encoding] = {"raw": "raw", "gzip": "gzip", "gz": "gzip"}
# NumPy's name → the other names of the format; `long` is not among them
_DTYPES = {
    "int8": ("signed char", "int8_t"),
    "uint8": ("uchar", "unsigned char", "uint8_t"),
    "int16": ("short", "short int", "signed short", "signed short int", "int16_t"),
    "uint16": ("ushort", "unsigned short", "unsigned short int", "uint16_t"),
    "int32": ("int", "signed int", "int32_t"),
    "uint32": ("uint", "unsigned int", "uint32_t"),
    "int64": ("longlong", "long long", "long long int", "signed long long",
              "signed long long int", "int64_t"),
    "uint64": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64_t"),
    "float32": ("float",),
    "float64": ("double",),
}  # fmt: skip

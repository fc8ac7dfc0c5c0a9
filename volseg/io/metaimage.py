"""MetaImage, MHA and MHD: read a header and refuse ambiguous ones; encode a volume."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from isal import isal_zlib

from volseg.io.gzip_stream import COPY_AGAIN, Encoding, Part, opened_raw, refusal
from volseg.io.header import ScanHeader, checked_grid, rounded, volume_shape
from volseg.io.series import split_volume
from volseg.io.text_header import (
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

LOCAL = "LOCAL"  # the voxels follow the header
LAST = "ElementDataFile"  # the last field of a header
ZLIB_START = b"\x78"
LENGTH_TOLERANCE = 0.01  # of the rows of the matrix, whose length is 1


def read_header(path: Path) -> ScanHeader:
    """Read the header of `.mha` or `.mhd`, without voxels.

    The affine is made of matrix, spacing and offset, turned from LPS to RAS and rounded to float32,
    so that a mask in NIfTI-1 has the same affine bit for bit.

    Raises:
        ScanError: the file or its header cannot be trusted; `code` is the reason.

    Source: https://docs.itk.org/en/latest/learn/metaio.html
    """
    path, number = split_volume(path)
    fields = _read_fields(path)
    sizes = _sizes(fields)
    series = volume_shape(sizes, path, volume=number)
    dtype = _dtype(fields)
    geometry, warnings = checked_grid(
        series.shape, _affine(fields, len(sizes)), path, source="matrix and spacing"
    )
    n_bytes = math.prod(series.shape) * dtype.itemsize
    data_path, part, first = _place(fields, math.prod(sizes) * dtype.itemsize)
    return ScanHeader(
        geometry=geometry,
        dtype=dtype,
        path=path,
        stored=fields.stored,
        data_path=data_path,
        data_offset=first + series.n_before * n_bytes,
        part=part,
        max_tail=0,
        n_after=series.n_after * n_bytes,
        warnings=tuple(warnings),
    )


def encode(volume: Volume, path: Path, like: ScanHeader | None = None) -> FileContent:
    """Return the contents of an `.mha` file: voxels in zlib, the affine in float64 and LPS.

    Args:
        path: the future file, for messages.
        like: not needed, because the grid is that of the volume.

    Raises:
        ScanError: `read_header` would refuse the grid, for example a line of voxels.
        ValueError: the dtype or scale cannot be stored.
    """
    geometry = volume.geometry
    volume_shape(geometry.shape, path)
    checked_grid(geometry.shape, rounded(geometry.affine), path, source="affine")
    if volume.is_scaled:
        raise ValueError("MetaImage is written without slope and intercept")
    kind = volume.array.dtype.newbyteorder("=").str[1:]
    name = next((name for name, dtype in _DTYPES.items() if dtype == kind), None)
    if name is None:
        raise ValueError(f"cannot write voxels of type {volume.array.dtype} as MetaImage")
    flips = np.diag(LPS_TO_RAS)[:3]
    packed = isal_zlib.compress(voxel_bytes(volume.array, "<"), 1)  # readers need its length
    lines = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": "True",
        "CompressedDataSize": str(len(packed)),
        "TransformMatrix": _listed((geometry.directions * flips[:, None]).T.ravel()),
        "Offset": _listed(geometry.affine[:3, 3] * flips),
        "CenterOfRotation": "0 0 0",
        "ElementSpacing": _listed(np.array(geometry.spacing_mm)),
        "DimSize": " ".join(map(str, geometry.shape)),
        "ElementType": name,
        LAST: LOCAL,
    }
    prefix = "".join(f"{key} = {value}\n" for key, value in lines.items()).encode()
    return FileContent(prefix, memoryview(packed))


def _listed(values: np.ndarray) -> str:
    return " ".join(map(repr, (values + 0.0).tolist()))  # without -0


# ---- fields


@dataclass(frozen=True, slots=True)
class _Fields:
    """The header of a file as text.

    Args:
        stored: its bytes, to the end of the line that names the data file.
        values: name → text; of names with the same meaning the first in `_SYNONYMS`.
    """

    path: Path
    stored: bytes
    values: dict[str, str]

    def get(self, name: str, default: str = "") -> str:
        return self.values.get(name) or default

    def require(self, name: str, fix: str = COPY_AGAIN, code: str = "E_HEADER") -> str:
        if not self.get(name):
            raise refusal(self.path, code, f"its header lacks the field {name}", fix)
        return self.values[name]

    def is_true(self, name: str, default: str = "") -> bool:
        text = self.get(name, default).lower()
        if text not in ("true", "false", "1", "0"):
            raise header_refusal(self.path, f"states {name} as {shown(text)}")
        return text in ("true", "1")


def _read_fields(path: Path) -> _Fields:
    """Read the text before the voxels.

    Raises:
        ScanError: it is not the header of an image, or a field is stated twice.
    """
    start = read_text_start(path)
    marks = [at for mark in _LAST_MARKS if (at := start.find(mark)) >= 0]
    if not marks or not re.match(r"[A-Za-z]+ *=", start[:99].decode("latin-1")):
        problem = f"is not MetaImage: it starts with {start[:10]!r} and names no {LAST}"
        raise refusal(path, "E_NOTMETA", problem, "give a file of MetaImage")
    end = start.find(b"\n", min(marks) + 1)
    stored = start if end < 0 else start[: end + 1]
    values: dict[str, str] = {}
    for line in lines_of(stored, path):
        if not line:
            continue
        name, equals, value = (part.strip() for part in line.partition("="))
        if not equals:
            raise header_refusal(path, f"holds {shown(line)}, which is no field")
        name = _SYNONYMS.get(name, name)
        if values.setdefault(name, value) != value:
            raise header_refusal(path, f"states {shown(name)} twice")
    fields = _Fields(path, stored, values)
    if fields.get("ObjectType", "Image").lower() != "image":
        problem = f"holds an object of type {shown(values['ObjectType'])}"
        raise refusal(path, "E_NOTMETA", problem, "give an image")
    return fields


def _sizes(fields: _Fields) -> list[int]:
    path = fields.path
    n_axes = whole_numbers(fields.require("NDims"), "NDims", path)
    sizes = whole_numbers(fields.require("DimSize"), "DimSize", path)
    if n_axes != [len(sizes)] or min(sizes) < 1:
        text = f"NDims is {fields.get('NDims')}, DimSize is {shown(fields.get('DimSize'))}"
        raise refusal(path, "E_DIM", text, COPY_AGAIN)
    if not 3 <= len(sizes) <= 4:
        problem = f"has {len(sizes)} axes; a volume has 3"
        raise refusal(path, "E_NDIM", problem, "give one 3-D volume")
    channels = fields.get("ElementNumberOfChannels", "1")
    if channels != "1":
        problem = f"holds {shown(channels)} values per voxel, as colours and vectors are"
        raise refusal(path, "E_NDIM", problem, "store one volume, or each channel in its file")
    return sizes


def _affine(fields: _Fields, n_axes: int) -> np.ndarray:
    """Return the affine (4, 4) to RAS mm; refuse to guess a part of it."""
    path, fix = fields.path, "export it with spacing, matrix and offset; never guess"
    parts = {}
    for name, n in (("ElementSpacing", 1), ("TransformMatrix", n_axes), ("Offset", 1)):
        text = fields.require(name, fix, "E_NOGEOM")
        parts[name] = numbers(text, name, path)
        if len(parts[name]) != n * n_axes:
            raise header_refusal(path, f"states {name} as {shown(text)}")
    unit = fields.get("DistanceUnits", "mm")
    if unit not in ("mm", "?"):
        problem = f"unit of length is {shown(unit)}"
        raise refusal(path, "E_UNITS", problem, "store spacing and offset in mm")
    matrix = parts["TransformMatrix"].reshape(n_axes, n_axes)  # a row per axis of the array
    if np.any(matrix[:3, 3:]) or np.any(matrix[3:, :3]):
        problem = "its matrix mixes space and time"
        raise refusal(path, "E_GEOM", problem, "store one 3-D volume")
    spacing = parts["ElementSpacing"][:3]
    if not (spacing > 0).all():
        text = f"its spacing is {shown(fields.get('ElementSpacing'))}"
        raise refusal(path, "E_GEOM", text, "export the scan again")
    affine = np.eye(4)
    with np.errstate(all="ignore"):  # absurd values; the grid refuses them
        lengths = np.linalg.norm(matrix[:3, :3], axis=1)
        if not (np.abs(lengths - 1) <= LENGTH_TOLERANCE).all():
            text = f"the rows of its matrix {shown(fields.get('TransformMatrix'))} have no length 1"
            raise refusal(path, "E_GEOM", text, "export the scan again")
        affine[:3, :3] = matrix[:3, :3].T * spacing
        affine[:3, 3] = parts["Offset"][:3]
        affine[:3] *= np.diag(LPS_TO_RAS)[:3, None]
    return rounded(affine + 0.0)


# ---- voxels


def _dtype(fields: _Fields) -> np.dtype:
    path, stated = fields.path, fields.require("ElementType")
    if stated not in _DTYPES:
        problem = f"voxels are of type {shown(stated)}"
        raise refusal(path, "E_DTYPE", problem, "export integers or floats of 8 to 64 bits")
    for name, neutral in (
        ("ElementToIntensityFunctionSlope", 1),
        ("ElementToIntensityFunctionOffset", 0),
    ):
        text = fields.get(name, str(neutral))
        if not (numbers(text, name, path) == neutral).all():
            problem = f"{name} is {shown(text)}, which only some readers apply"
            raise refusal(path, "E_SCALE", problem, "store real intensities")
    dtype = np.dtype(_DTYPES[stated])
    if dtype.itemsize == 1:
        return dtype
    fields.require("BinaryDataByteOrderMSB")
    return dtype.newbyteorder(">" if fields.is_true("BinaryDataByteOrderMSB") else "<")


def _place(fields: _Fields, n_bytes: int) -> tuple[Path, Part, int]:
    """Return the file of the voxels, its part, and the byte of the first voxel.

    Args:
        n_bytes: of all voxels, decompressed.
    """
    path, name = fields.path, fields.require(LAST)
    if not fields.is_true("BinaryData", "True"):
        raise refusal(path, "E_ENCODING", "voxels are stored as text", "store them as binary data")
    if name.upper().startswith("LIST") or "%" in name:
        problem = "its voxels are spread over several files"
        raise refusal(path, "E_MANYFILES", problem, "store the volume in one file")
    is_local = name.upper() == LOCAL
    data_path = path if is_local else data_file(path, name)
    start = len(fields.stored) if is_local else 0
    (skip, *more) = whole_numbers(fields.get("HeaderSize", "0"), "HeaderSize", path)
    is_packed = fields.is_true("CompressedData", "False")
    if more or skip < -1 or (skip != 0 and (is_local or is_packed)):
        raise header_refusal(path, f"states HeaderSize as {shown(fields.get('HeaderSize'))}")
    with opened_raw(data_path) as file:
        size = os.stat(data_path).st_size - start
        file.seek(start)
        first = file.read(1)
    if not is_packed:
        return data_path, Part(start, "raw"), max(0, size - n_bytes) if skip == -1 else skip
    _check_packed_size(fields, size)
    encoding: Encoding = "zlib" if first == ZLIB_START else "gzip"
    return data_path, Part(start, encoding), 0


def _check_packed_size(fields: _Fields, size: int) -> None:
    """Compare the stated with the true number of compressed bytes."""
    text = fields.get("CompressedDataSize")
    if not text:
        return
    stated = whole_numbers(text, "CompressedDataSize", fields.path)
    if stated != [size]:
        problem = f"holds {size:,} compressed bytes, its header states {shown(text)}"
        code = "E_TRUNCATED" if size < stated[0] else "E_HEADER"
        raise refusal(fields.path, code, problem, COPY_AGAIN)


_LAST_MARKS = tuple(f"{LAST}{gap}=".encode() for gap in ("", " ", "  ", "\t"))
_SYNONYMS = {
    "Rotation": "TransformMatrix",
    "Orientation": "TransformMatrix",
    "Position": "Offset",
    "Origin": "Offset",
    "ElementByteOrderMSB": "BinaryDataByteOrderMSB",
}
_DTYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2",
    "MET_INT": "i4", "MET_UINT": "u4", "MET_LONG": "i4", "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip

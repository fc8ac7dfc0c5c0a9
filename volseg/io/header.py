"""What the header of a scan says in any format, and what is refused in all of them."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from volseg.inputs import MAX_SPACING_MM, MIN_SPACING_MM
from volseg.io.gzip_stream import (
    COPY_AGAIN,
    GZIP_MAX_RATIO,
    WHOLE,
    Inflated,
    Part,
    fill,
    opened,
    refusal,
)
from volseg.volume import MAX_COSINE, Geometry

MAX_BYTES = 16 * 2**30  # voxel bytes that a header may request
MIN_SLICE_EDGE = 8  # voxels; values on a surface are stored in one row, or in a few
MAX_TAIL_BYTES = 2**20  # after the last voxel
ANISOTROPIC_RATIO = 20.0  # largest / smallest spacing that raises a warning
TILTED = "W_TILT"  # code of the warning about a grid that is not right-angled
TILT_FIX = "give --tilt resample to infer, measure, preprocess or train"
FAR_ORIGIN_MM = 10_000.0  # longer than any scanner table
ROUNDED_COSINE = 1e-5  # between two axes; above it is more than the rounding of a header


@dataclass(frozen=True, slots=True)
class ScanWarning:
    """A harmless oddity: `code`, such as `W_SHEAR`, and one line of `text`."""

    code: str
    text: str


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ScanHeader:
    """The checked header of a scan.

    Args:
        geometry: the grid.
        dtype: dtype of the stored values, in the byte order of the file.
        slope, intercept: intensity = stored value × slope + intercept.
        unit: of the intensities, if the file proves it; empty if it does not.
        path: file of the header.
        stored: bytes of the header as stored, decompressed; empty if the reader needs none.
        n_after: bytes of later volumes of a series, behind the voxels.
        data_path, data_offset: file and byte (after decompression) of the first voxel; None if
            the voxels are not stored one after another.
        part: of `data_path` that holds the voxels, to which `data_offset` refers.
        max_tail: bytes that may follow the last voxel.
        parts: files of a scan that has a file for each slice.
        content: what the format's reader of voxels needs besides.
        frame_of_reference, series: UIDs of the space and series of a DICOM file; empty if unknown.
            Not for results.
        warnings: oddities of header and file name.
    """

    geometry: Geometry
    dtype: np.dtype
    slope: float = 1.0
    intercept: float = 0.0
    unit: str = ""
    path: Path
    stored: bytes = b""
    data_path: Path | None = None
    data_offset: int | None = None
    part: Part = WHOLE
    max_tail: int = MAX_TAIL_BYTES
    n_after: int = 0
    parts: tuple[Path, ...] = ()
    content: object = None
    frame_of_reference: str = ""
    series: str = ""
    warnings: tuple[ScanWarning, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of the scan."""
        return self.parts or tuple(dict.fromkeys((self.path, self.data_path or self.path)))

    @property
    def n_bytes(self) -> int:
        """Bytes of all voxels, uncompressed."""
        return math.prod(self.geometry.shape) * self.dtype.itemsize

    @property
    def mask_bytes(self) -> int:
        """Upper bound of the bytes of the labels that `read_mask` makes of these voxels."""
        is_exact = self.dtype.kind in "iu" and self.slope == 1 and self.intercept == 0
        return self.n_bytes if is_exact else math.prod(self.geometry.shape) * 8

    def mask_bytes_on(self, shape: tuple[int, int, int]) -> int:
        """Return `mask_bytes` of the same labels on a grid of another shape."""
        return self.mask_bytes // math.prod(self.geometry.shape) * math.prod(shape)


@dataclass(frozen=True, slots=True)
class ReferenceGrid:
    """The grid on which contours are drawn: that of their scan.

    Args:
        frame_of_reference, series: UIDs of its space and series; empty if unknown.
    """

    geometry: Geometry
    frame_of_reference: str = ""
    series: str = ""


def read_start(path: Path, n_bytes: int) -> tuple[bytes, list[ScanWarning]]:
    """Return up to `n_bytes` from the start of a file, decompressed.

    Warns of a name that does not say whether the file is compressed.

    Raises:
        ScanError: the file is empty or cannot be read.
    """
    with opened(path) as stream:
        start = bytearray(n_bytes)
        del start[fill(stream, memoryview(start)) :]
        is_gzip = isinstance(stream, Inflated)
    if not start:
        raise refusal(path, "E_EMPTY", "the file is empty", COPY_AGAIN)
    if is_compressed(path) == is_gzip:
        return bytes(start), []
    kind = "gzip" if is_gzip else "not compressed"
    return bytes(start), [ScanWarning("W_EXT", f"the contents are {kind}, unlike the file name")]


def is_compressed(path: Path) -> bool:
    """Check whether the name says that the contents are gzip, as `.nii.gz` and `.mgz` do."""
    return path.name.lower().endswith("gz")


@dataclass(frozen=True, slots=True)
class SeriesShape:
    """The sizes of a volume, and which one it is of the volumes of a file.

    Args:
        shape: voxels (I, J, K); K is 1 for a single slice.
        n_before, n_after: volumes of the file before and behind it.
    """

    shape: tuple[int, int, int]
    n_before: int = 0
    n_after: int = 0


def volume_shape(
    sizes: Sequence[int], path: Path | str, *, volume: int | None = None, one: str = ""
) -> SeriesShape:
    """Return the sizes of the chosen volume; refuse lines, and a series if none is chosen.

    Args:
        volume: number of the volume in a series, from 1; a file of one volume ignores it.
        one: how to take one of several, for the message about a series in memory.
    """
    sizes = list(sizes)
    while len(sizes) > 3 and sizes[-1] == 1:
        sizes.pop()
    text = f"has shape {'×'.join(map(str, sizes))}"
    sizes += [1] * (3 - len(sizes))
    (i, j, k), series = sizes[:3], sizes[3:]
    if not _is_volume_or_slice(i, j, k) or sum(size > 1 for size in series) > 1:
        problem = (
            f"{text}; a volume has three axes of at least 2 voxels, and a single slice two of at "
            f"least {MIN_SLICE_EDGE}"
        )
        raise refusal(path, "E_NDIM", problem, "give one 3-D volume, or give each channel its file")
    n = math.prod(series)
    if n == 1:
        return SeriesShape((i, j, k))
    if volume is None:
        fix = f"choose one of them with --volume 1 to {n} (infer and measure), or store it alone"
        problem = f"{text}: {n} volumes" if one else f"{text}: {n} volumes in one file"
        raise refusal(path, "E_NDIM", problem, one or fix)
    if volume > n:
        problem = f"has {n} volumes, so there is no volume {volume}"
        raise refusal(path, "E_NDIM", problem, f"give --volume 1 to {n}")
    return SeriesShape((i, j, k), volume - 1, n - volume)


def _is_volume_or_slice(i: int, j: int, k: int) -> bool:
    _, second, _ = sorted((i, j, k))
    return min(i, j, k) > 1 or (min(i, j, k) == 1 and second >= MIN_SLICE_EDGE)


def checked_grid(
    shape: tuple[int, int, int], affine: np.ndarray, path: Path | str, *, source: str
) -> tuple[Geometry, list[ScanWarning]]:
    """Return the grid of a scan and its oddities; refuse one that no scanner makes.

    A tilted one is an oddity; who cannot use it calls `refuse_tilt`.

    Args:
        source: what the affine was read from, such as `sform`, for messages.
    """
    try:
        geometry = Geometry(shape, affine)
    except ValueError as error:
        rows = "; ".join(listed(row) for row in affine[:3])
        text = f"{source} [{rows}] is not a finite, invertible affine"
        raise refusal(path, "E_GEOM", text, "export the scan again") from error
    warnings = []
    if 1 in shape:
        text = "a single slice: volumes are those within it, and 3D shapes are unknown"
        warnings.append(ScanWarning("W_SLICE", text))
    spacing = np.array(geometry.spacing_mm)
    if not (spacing.min() >= MIN_SPACING_MM and spacing.max() <= MAX_SPACING_MM):
        limits = f"{MIN_SPACING_MM:g} to {MAX_SPACING_MM:g} mm"
        text = f"voxel spacing is {listed(spacing)} mm, outside {limits}"
        raise refusal(path, "E_SPACING", text, "store spacing and affine in mm")
    if spacing.max() / spacing.min() > ANISOTROPIC_RATIO:
        warnings.append(ScanWarning("W_ANISO", f"voxel spacing is {listed(spacing)} mm"))
    cosine = geometry.largest_cosine
    if cosine > MAX_COSINE:
        warnings.append(ScanWarning(TILTED, _tilt(cosine)))
    elif cosine > ROUNDED_COSINE:
        text = f"axes are at right angles only within {cosine:.1e}"
        warnings.append(ScanWarning("W_SHEAR", text))
    corners = geometry.to_world_mm(np.array([(0, 0, 0), np.array(geometry.shape) - 1]))
    distance_mm = np.abs(corners).max()
    if distance_mm > FAR_ORIGIN_MM:
        text = f"the scan lies {distance_mm / 1000:,.1f} m off the origin"
        warnings.append(ScanWarning("W_ORIGIN", text))
    return geometry, warnings


def refuse_tilt(geometry: Geometry, path: Path | str, fix: str = TILT_FIX) -> None:
    """Refuse axes that are not at right angles, which most commands and formats assume.

    Args:
        fix: what to do besides resampling.

    Raises:
        ScanError: the grid is tilted or sheared (`E_SHEAR`).
    """
    if geometry.is_tilted:
        raise refusal(
            path,
            "E_SHEAR",
            _tilt(geometry.largest_cosine),
            f"{fix}, or resample it to a right-angled grid",
        )


def _tilt(cosine: float) -> str:
    degrees = math.degrees(math.asin(min(1.0, cosine)))
    return f"its axes are {degrees:.2f}° away from right angles"


def rounded(affine: np.ndarray) -> np.ndarray:
    """Return an affine (4, 4) rounded to float32, in which a mask in NIfTI-1 stores it exactly."""
    with np.errstate(all="ignore"):  # absurd values become infinite, which the grid refuses
        return affine.astype(np.float32).astype(np.float64)


def check_size(header: ScanHeader, path: Path, max_bytes: int) -> None:
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
    if header.data_path is None or header.data_offset is None:
        return
    with opened(header.data_path, part=header.part) as stream:
        is_packed = isinstance(stream, Inflated)
        size = max(0, os.stat(header.data_path).st_size - header.part.start)
    if is_packed and header.data_offset + n_bytes > size * GZIP_MAX_RATIO:
        text = f"{requested}, more than {size:,} compressed bytes can hold"
        raise refusal(path, "E_TOOBIG", text, COPY_AGAIN)
    if not is_packed:
        if header.data_offset > size:
            text = f"the first voxel is at byte {header.data_offset:,} of {size:,}"
            raise refusal(path, "E_HEADER", text, COPY_AGAIN)
        check_voxel_bytes(size - header.data_offset, header, path)


def check_voxel_bytes(available: int, header: ScanHeader, path: Path) -> None:
    """Refuse a file with fewer voxel bytes than its header asks for, or many more."""
    required = header.n_bytes + header.n_after
    if available < required:
        text = f"holds {available:,} of {required:,} voxel bytes"
        raise refusal(path, "E_TRUNCATED", text, COPY_AGAIN)
    if available > required + header.max_tail:
        more = f"more than {header.max_tail:,} bytes" if header.max_tail else "other bytes"
        raise refusal(
            path,
            "E_BOMB",
            f"holds {more} after its last voxel",
            "its header is wrong or the file is malicious: export the scan again",
        )


def listed(values: np.ndarray) -> str:
    """Return numbers for a message."""
    return " ".join(f"{value:.6g}" for value in values)

"""What the header of a scan says in any format, and what is refused in all of them."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from volseg.io.gzip_stream import COPY_AGAIN, GZIP_MAX_RATIO, Inflated, fill, opened, refusal
from volseg.volume import Geometry

MAX_BYTES = 16 * 2**30  # voxel bytes that a header may request
MAX_TAIL_BYTES = 2**20  # after the last voxel
MIN_SPACING_MM, MAX_SPACING_MM = 0.01, 100.0
ANISOTROPIC_RATIO = 20.0  # largest / smallest spacing that raises a warning
FAR_ORIGIN_MM = 10_000.0  # longer than any scanner table
ROUNDED_COSINE, MAX_COSINE = 1e-5, 1e-3  # between two axes: header rounding; real shear


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
        path: file of the header.
        stored: bytes of the header as stored, decompressed; empty if the reader needs none.
        data_path, data_offset: file and byte (after decompression) of the first voxel; None if
            the voxels are not stored one after another.
        warnings: oddities of header and file name.
    """

    geometry: Geometry
    dtype: np.dtype
    slope: float = 1.0
    intercept: float = 0.0
    path: Path
    stored: bytes = b""
    data_path: Path | None = None
    data_offset: int | None = None
    warnings: tuple[ScanWarning, ...] = ()

    @property
    def n_bytes(self) -> int:
        """Bytes of all voxels, uncompressed."""
        return math.prod(self.geometry.shape) * self.dtype.itemsize

    @property
    def mask_bytes(self) -> int:
        """Upper bound of the bytes of the labels that `read_mask` makes of these voxels."""
        is_exact = self.dtype.kind in "iu" and self.slope == 1 and self.intercept == 0
        return self.n_bytes if is_exact else math.prod(self.geometry.shape) * 8


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


def volume_shape(sizes: Sequence[int], path: Path | str) -> tuple[int, int, int]:
    """Return the three sizes of a volume; refuse any other number of axes."""
    sizes = list(sizes)
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


def checked_grid(
    shape: tuple[int, int, int], affine: np.ndarray, path: Path | str, *, source: str
) -> tuple[Geometry, list[ScanWarning]]:
    """Return the grid of a scan and its oddities; refuse one that no scanner makes.

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
    spacing = np.array(geometry.spacing_mm)
    if not (spacing.min() >= MIN_SPACING_MM and spacing.max() <= MAX_SPACING_MM):
        limits = f"{MIN_SPACING_MM:g} to {MAX_SPACING_MM:g} mm"
        text = f"voxel spacing is {listed(spacing)} mm, outside {limits}"
        raise refusal(path, "E_SPACING", text, "store spacing and affine in mm")
    if spacing.max() / spacing.min() > ANISOTROPIC_RATIO:
        warnings.append(ScanWarning("W_ANISO", f"voxel spacing is {listed(spacing)} mm"))
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
    return geometry, warnings


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
    with opened(header.data_path) as stream:
        is_gzip = isinstance(stream, Inflated)
        file_size = os.stat(header.data_path).st_size
    if is_gzip and header.data_offset + n_bytes > file_size * GZIP_MAX_RATIO:
        text = f"{requested}, more than {file_size:,} bytes of gzip can hold"
        raise refusal(path, "E_TOOBIG", text, COPY_AGAIN)
    if not is_gzip:
        if header.data_offset > file_size:
            text = f"the first voxel is at byte {header.data_offset:,} of {file_size:,}"
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


def listed(values: np.ndarray) -> str:
    """Return numbers for a message."""
    return " ".join(f"{value:.6g}" for value in values)

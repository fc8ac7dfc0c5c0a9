"""Stored voxels: read them from a file, write and verify them, check their values."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast

import numpy as np
from isal import igzip

from volseg.errors import ScanError
from volseg.io.files import atomic_write, read_back_problem, sha256_of
from volseg.io.gzip_stream import CHUNK_BYTES, fill, opened, refusal, skip
from volseg.io.header import MAX_TAIL_BYTES, ScanHeader, check_voxel_bytes, read_start
from volseg.volume import Volume, slabs_of

LABEL_TOLERANCE = 1e-3  # distance from a whole number


def read_voxels(header: ScanHeader, path: Path) -> tuple[np.ndarray, str]:
    """Return the stored (I, J, K), in Fortran order and native byte order, and its SHA-256.

    For formats that store the voxels one after another, with the first index running fastest. The
    SHA-256 is that of the file, or of both files of a pair.

    Raises:
        ScanError: voxels are missing (`E_TRUNCATED`) or damaged (`E_CRC`), or the file was replaced
            after its header was read (`E_CHANGED`).
    """
    assert header.data_path is not None and header.data_offset is not None
    flat = np.empty(math.prod(header.geometry.shape), header.dtype)
    target = flat.view(np.uint8).data
    digest = hashlib.sha256()
    is_pair = header.path != header.data_path
    before = sha256_of(header.path) + "+" if is_pair else ""
    with opened(header.data_path, digest) as stream:
        start = bytearray(0 if is_pair else min(len(header.stored), header.data_offset))
        is_whole = fill(stream, memoryview(start)) == len(start)
        is_unchanged = is_whole and header.stored.startswith(start)
        skip(stream, header.data_offset - len(start))
        n_read = fill(stream, target)
        if n_read == len(target):
            # The end holds the checksum of gzip.
            n_read += skip(stream, header.n_after + MAX_TAIL_BYTES + 1)
    if is_pair:
        is_unchanged = read_start(header.path, len(header.stored))[0] == header.stored
    if not is_unchanged:
        raise refusal(path, "E_CHANGED", "was replaced while it was being read", "run again")
    check_voxel_bytes(n_read, len(target) + header.n_after, path)
    if not flat.dtype.isnative:
        flat = flat.byteswap(inplace=True).view(flat.dtype.newbyteorder("="))
    return flat.reshape(header.geometry.shape, order="F"), before + digest.hexdigest()


def joined_digest(digests: Sequence[str]) -> str:
    """Return one digest for the SHA-256 of all files of a scan, in their order."""
    joined = "+".join(digests)
    return joined if len(digests) <= 2 else hashlib.sha256(joined.encode()).hexdigest()


# ---- writing


@dataclass(frozen=True, slots=True, eq=False)
class FileContent:
    """The uncompressed contents of a file: all bytes before the first voxel, then the voxels."""

    prefix: bytes
    voxels: memoryview

    def chunks(self) -> Iterator[memoryview]:
        yield memoryview(self.prefix)
        for start in range(0, len(self.voxels), CHUNK_BYTES):
            yield self.voxels[start : start + CHUNK_BYTES]

    def write_gzip(self, file: BinaryIO, *, level: int = 1) -> None:
        """Write without name and time, so that equal contents give equal bytes."""
        with igzip.IGzipFile(
            filename="", mode="wb", compresslevel=level, fileobj=file, mtime=0
        ) as packed:
            self.write_plain(cast(BinaryIO, packed))

    def write_plain(self, file: BinaryIO) -> None:
        for chunk in self.chunks():
            file.write(chunk)


@dataclass(frozen=True, slots=True, eq=False)
class StreamedContent(FileContent):
    """The same with voxels that lie in a file, uncompressed and from its start."""

    source: BinaryIO

    def chunks(self) -> Iterator[memoryview]:
        yield memoryview(self.prefix)
        buffer = memoryview(bytearray(CHUNK_BYTES))
        self.source.seek(0)
        while n := self.source.readinto(buffer):  # type: ignore[attr-defined] a raw file has it
            yield buffer[:n]


def voxel_bytes(array: np.ndarray, byte_order: Literal["<", ">"]) -> memoryview:
    """Return the bytes of (I, J, K) in Fortran order and `<` or `>`, rarely a copy."""
    array = np.asfortranarray(array, dtype=array.dtype.newbyteorder(byte_order))
    return array.reshape(-1, order="F").view(np.uint8).data


def write_content(path: Path, content: FileContent, *, compressed: bool) -> None:
    """Write a file atomically, and verify it by reading it back.

    Raises:
        EnvironmentProblem: disk full, folder not writable, or other bytes were read back.
    """
    write = content.write_gzip if compressed else content.write_plain
    atomic_write(path, write, lambda temporary: _verify(temporary, path, content))


def _verify(temporary: Path, path: Path, content: FileContent) -> None:
    """Compare a whole file, including its checksum, with what was written into it."""
    buffer = memoryview(bytearray(CHUNK_BYTES))
    try:
        with opened(temporary) as stream:
            for chunk in content.chunks():
                part = buffer[: len(chunk)]
                if fill(stream, part) != len(chunk) or part != chunk:
                    raise read_back_problem(path)
            if skip(stream, 1):
                raise read_back_problem(path)
    except ScanError as error:
        raise read_back_problem(path) from error


# ---- values


def value_range(
    array: np.ndarray, path: Path | str, *, fill: str = "the value of air"
) -> tuple[float, float]:
    """Return the smallest and largest stored value; refuse values that are not finite.

    Args:
        fill: what to put in place of these, for the message.
    """
    with np.errstate(invalid="ignore"):
        low, high = float(array.min()), float(array.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        n_nan, n_infinite = np.count_nonzero(np.isnan(array)), np.count_nonzero(np.isinf(array))
        raise refusal(
            path,
            "E_NAN",
            f"{n_nan:,} voxels are NaN and {n_infinite:,} infinite, of {array.size:,}",
            f"fill them in the tool that made the file, for example with {fill}",
        )
    return low, high


def finite_range(array: np.ndarray, path: Path | str) -> tuple[float, float]:
    """Return the smallest and largest finite stored value; refuse an array without any."""
    slabs = (array[part] for part in slabs_of(array))
    finite = (slab[np.isfinite(slab)] for slab in slabs)
    ranges = [(values.min(), values.max()) for values in finite if values.size]
    if not ranges:
        return value_range(array, path)
    return float(min(low for low, _ in ranges)), float(max(high for _, high in ranges))


def highest_label(stored: Volume, path: Path | str, max_labels: int) -> int:
    """Return the largest label of a mask; refuse one with invalid labels (`E_LABELS`)."""
    if stored.array.dtype == np.uint8 and not stored.is_scaled and max_labels >= 256:
        return int(stored.array.max())  # always valid
    labels: set[int] = set()
    for k in range(stored.geometry.shape[2]):
        with np.errstate(over="ignore", invalid="ignore"):  # absurd scales are refused as labels
            whole = _whole_numbers(stored, k, path)
        labels.update(_distinct(whole).tolist())
        if len(labels) > max_labels:
            problem = f"mask holds more than {max_labels:,} distinct values"
            fix = f"if each value is an object, give --objects labels; or {_QUESTION}"
            raise refusal(path, "E_LABELS", problem, fix)
    return max(labels)


def holds_fractions(stored: Volume) -> bool:
    """Check whether a mask holds other values than whole numbers, as a map of probabilities."""
    if stored.array.dtype.kind != "f" and not stored.is_scaled:
        return False
    planes = (stored.array[:, :, k] for k in range(stored.geometry.shape[2]))
    return any(_fractions(stored.intensities(plane)).size for plane in planes)


def _fractions(values: np.ndarray) -> np.ndarray:
    """Return the values (N,) that are not whole numbers."""
    return values[np.abs(values - np.rint(values)) > LABEL_TOLERANCE]


def _whole_numbers(stored: Volume, k: int, path: Path | str) -> np.ndarray:
    """Return the labels of slice `k` as int64."""
    values = whole = stored.intensities(stored.array[:, :, k])
    if values.dtype.kind == "f":
        whole = np.rint(values)
        fractions = _fractions(values)
        if fractions.size:
            text = ", ".join(f"{value:g}" for value in np.unique(fractions)[:5])
            rule = "are not whole numbers" if "," in text else "is not a whole number"
            problem = f"mask holds {text}, which {rule}"
            raise refusal(path, "E_LABELS", problem, _fix_of_fractions(stored, path))
    low, high = whole.min(), whole.max()
    if low < 0 or high >= 2**53:
        problem = f"mask holds the label {low if low < 0 else high:,.0f}"
        raise refusal(path, "E_LABELS", problem, f"number labels from 0 up; or {_QUESTION}")
    return whole.astype(np.int64)


def _fix_of_fractions(stored: Volume, path: Path | str) -> str:
    low, high = stored.intensities(np.array(value_range(stored.array, path)))
    if low >= 0 and high <= 1:
        return "a map of probabilities must be thresholded; measure and evaluate: --threshold 0.5"
    return f"resample labels with nearest neighbour; or {_QUESTION}"


def _distinct(labels: np.ndarray) -> np.ndarray:
    """Return the distinct values ≥ 0, by counting where that is faster than sorting."""
    if labels.max() < 2**16:
        return np.flatnonzero(np.bincount(labels.ravel()))
    return np.unique(labels)


_QUESTION = "was an image given in place of its mask?"

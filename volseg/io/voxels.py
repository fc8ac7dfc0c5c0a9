"""Stored voxels: read them from a file, write and verify them, check their values."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from isal import igzip

from volseg.errors import ScanError
from volseg.io.files import atomic_write, read_back_problem, sha256_of
from volseg.io.gzip_stream import (
    CHUNK_BYTES,
    WHOLE,
    Part,
    fill,
    opened,
    opened_raw,
    refusal,
    skip,
)
from volseg.io.header import ScanHeader, check_voxel_bytes, read_start
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
    flat = np.empty(math.prod(header.geometry.shape), header.dtype)
    sha256 = read_into(flat.view(np.uint8).data, header, path)
    if not flat.dtype.isnative:
        flat = flat.byteswap(inplace=True).view(flat.dtype.newbyteorder("="))
    return flat.reshape(header.geometry.shape, order="F"), sha256


def read_into(target: memoryview, header: ScanHeader, path: Path) -> str:
    """Fill `target` with the bytes of the voxels as stored; return the SHA-256 of `read_voxels`.

    Raises:
        ScanError: as `read_voxels`.
    """
    with opened_voxels(header, path) as voxels:
        voxels.n_read = fill(voxels.stream, target)
    return voxels.sha256


class OpenedVoxels:
    """The bytes of the voxels as they are read; `n_read` counts them."""

    def __init__(self, stream: io.RawIOBase) -> None:
        self.stream, self.n_read, self.sha256 = stream, 0, ""


@contextmanager
def opened_voxels(header: ScanHeader, path: Path) -> Iterator[OpenedVoxels]:
    """Open the file at its first voxel; at the end check its length and that it did not change.

    The caller reads the voxels and counts the bytes; `sha256` is set at the end.

    Raises:
        ScanError: as `read_voxels`.
    """
    assert header.data_path is not None and header.data_offset is not None
    digest = hashlib.sha256()
    is_apart = header.path != header.data_path or header.part.start > 0
    before = sha256_of(header.path) + "+" if header.path != header.data_path else ""
    with opened(header.data_path, digest, header.part) as stream:
        start = bytearray(0 if is_apart else min(len(header.stored), header.data_offset))
        is_whole = fill(stream, memoryview(start)) == len(start)
        is_unchanged = is_whole and header.stored.startswith(start)
        skip(stream, header.data_offset - len(start))
        voxels = OpenedVoxels(stream)
        yield voxels
        if voxels.n_read >= header.n_bytes:
            # The end holds the checksum of gzip.
            voxels.n_read += skip(stream, header.n_after + header.max_tail + 1)
    if is_apart:
        is_unchanged = read_start(header.path, len(header.stored))[0] == header.stored
    if not is_unchanged:
        raise refusal(path, "E_CHANGED", "was replaced while it was being read", "run again")
    check_voxel_bytes(voxels.n_read, header, path)
    voxels.sha256 = before + digest.hexdigest()


def joined_digest(digests: Sequence[str]) -> str:
    """Return one digest for the SHA-256 of all files of a scan, in their order."""
    joined = "+".join(digests)
    return joined if len(digests) <= 2 else hashlib.sha256(joined.encode()).hexdigest()


# ---- writing


@dataclass(frozen=True, slots=True, eq=False)
class FileContent:
    """The uncompressed contents of a file: all bytes before the first voxel, then the voxels.

    Args:
        encoding: of the voxels alone, in formats whose header is never compressed.
    """

    prefix: bytes
    voxels: memoryview
    encoding: Literal["raw", "gzip"] = "raw"

    def chunks(self) -> Iterator[memoryview]:
        yield from _chunks_of(memoryview(self.prefix))
        yield from self.voxel_chunks()

    def voxel_chunks(self) -> Iterator[memoryview]:
        yield from _chunks_of(self.voxels)

    def write_gzip(self, file: BinaryIO, *, level: int = 1) -> None:
        """Write all of it without name and time, so that equal contents give equal bytes."""
        _write_gzip(self.chunks(), file, level=level)

    def write_plain(self, file: BinaryIO) -> None:
        """Write the header as it is, and the voxels in their encoding."""
        file.write(self.prefix)
        if self.encoding == "gzip":
            _write_gzip(self.voxel_chunks(), file, level=1)
        else:
            file.writelines(self.voxel_chunks())


def _chunks_of(view: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(view), CHUNK_BYTES):
        yield view[start : start + CHUNK_BYTES]


def _write_gzip(chunks: Iterator[memoryview], file: BinaryIO, *, level: int) -> None:
    with igzip.IGzipFile(
        filename="", mode="wb", compresslevel=level, fileobj=file, mtime=0
    ) as packed:
        for chunk in chunks:
            packed.write(chunk)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class StreamedContent(FileContent):
    """The same with voxels that lie in a file, uncompressed and from its start."""

    source: BinaryIO

    def voxel_chunks(self) -> Iterator[memoryview]:
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
    is_one = compressed or content.encoding == "raw"
    atomic_write(path, write, lambda temporary: _verify(temporary, path, content, is_one))


def _verify(temporary: Path, path: Path, content: FileContent, is_one: bool) -> None:
    """Compare a whole file, including its checksum, with what was written into it.

    Args:
        is_one: header and voxels share an encoding.
    """
    try:
        if is_one:
            _compare(temporary, path, WHOLE, content.chunks())
            return
        with opened_raw(temporary) as file:
            if file.read(len(content.prefix)) != content.prefix:
                raise read_back_problem(path)
        part = Part(len(content.prefix), content.encoding)
        _compare(temporary, path, part, content.voxel_chunks())
    except ScanError as error:
        raise read_back_problem(path) from error


def _compare(temporary: Path, path: Path, part: Part, chunks: Iterator[memoryview]) -> None:
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with opened(temporary, part=part) as stream:
        for chunk in chunks:
            read = buffer[: len(chunk)]
            if fill(stream, read) != len(chunk) or read != chunk:
                raise read_back_problem(path)
        if skip(stream, 1):
            raise read_back_problem(path)


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

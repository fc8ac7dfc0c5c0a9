"""Read files whose contents may be gzip or zlib: checksums verified, all stored bytes hashed."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, cast

from isal import igzip_lib

from volseg.errors import ScanError
from volseg.inputs import NotAFileError, open_regular

CHUNK_BYTES = 2**18
GZIP_MAX_RATIO = 1032  # upper bound of deflate compression
COPY_AGAIN = "copy or export the file again"


Encoding = Literal["raw", "gzip", "zlib"]


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a file that holds the voxels.

    Args:
        start: stored byte at which it begins.
        encoding: None if the contents say whether they are gzip.
    """

    start: int = 0
    encoding: Encoding | None = None


WHOLE = Part()


class Digest(Protocol):
    """A running hash."""

    def update(self, data, /) -> None: ...


@contextmanager
def opened(path: Path, digest: Digest | None = None, part: Part = WHOLE) -> Iterator[io.RawIOBase]:
    """Open a file or its part, decompressed if its contents are gzip, whatever its name.

    Args:
        digest: receives all stored bytes of the file by the time its end is reached.
    """
    with opened_raw(path, digest) as file:
        skip(file, part.start)  # read, because the digest needs these bytes
        encoding = part.encoding
        if encoding is None:
            encoding = "gzip" if file.read(2) == b"\x1f\x8b" else "raw"
            file.seek(part.start)
        yield file if encoding == "raw" else Inflated(file, path, encoding)


@contextmanager
def opened_raw(path: Path, digest: Digest | None = None) -> Iterator[io.RawIOBase]:
    """Open a regular file as it is stored; `digest` as in `opened`."""
    try:
        with open_regular(path) as buffered:  # refuses a pipe or a device, which might never end
            file = cast(io.RawIOBase, buffered.raw)
            yield file if digest is None else _Digested(file, digest)
    except NotAFileError as error:
        problem = f"is {error.kind}, not a file"
        raise refusal(path, "E_NOTFILE", problem, "give the path of a scan") from error
    except OSError as error:
        raise _read_refusal(path, error) from error


def fill(stream: io.RawIOBase, target: memoryview) -> int:
    """Read until `target` is full or the stream ends; return the number of bytes read."""
    filled = 0
    while filled < len(target) and (n := stream.readinto(target[filled:])):
        filled += n
    return filled


def skip(stream: io.RawIOBase, n_bytes: int) -> int:
    """Read and discard up to `n_bytes`; return the number of bytes read."""
    scratch = memoryview(bytearray(min(n_bytes, CHUNK_BYTES)))
    skipped = 0
    while skipped < n_bytes and (n := stream.readinto(scratch[: n_bytes - skipped])):
        skipped += n
    return skipped


def refusal(path: Path | str, code: str, problem: str, fix: str) -> ScanError:
    """Return the error for a file or a scan in memory, with its name in one line."""
    name = str(path)
    if not name.isprintable():  # such as a line break
        name = repr(name)[1:-1]
    return ScanError(f"{name}: {problem}", fix=fix, code=code)


class Inflated(io.RawIOBase):
    """The bytes inside a gzip or zlib stream; its end is reached only if checksums are correct."""

    def __init__(self, file: io.RawIOBase, path: Path, encoding: Encoding = "gzip") -> None:
        self._file = file
        self._path = path
        self._pending = b""
        self._encoding = encoding
        flag = igzip_lib.DECOMP_GZIP if encoding == "gzip" else igzip_lib.DECOMP_ZLIB
        self._member = igzip_lib.IgzipDecompressor(flag=flag)

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
                    problem = f"the {self._encoding} stream has no end"
                    raise refusal(self._path, "E_TRUNCATED", problem, COPY_AGAIN)
            try:
                plain = self._member.decompress(packed, min(len(target), 4 * CHUNK_BYTES))
            except igzip_lib.IsalError as error:  # pyright: ignore[reportGeneralTypeIssues]
                problem = f"the {self._encoding} stream is damaged ({error})"
                raise refusal(self._path, "E_CRC", problem, COPY_AGAIN) from error
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
        if self._encoding != "gzip" or not pending.startswith(b"\x1f\x8b"):
            problem = f"other bytes follow the {self._encoding} stream"
            fix = "copy the file again, or decompress and compress it"
            raise refusal(self._path, "E_GZIP", problem, fix)
        self._pending = pending
        self._member = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
        return True


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


def _read_refusal(path: Path, error: OSError) -> ScanError:
    default = ("E_READ", f"cannot be read ({error.strerror})", "check the disk or network share")
    code, problem, fix = _READ_PROBLEMS.get(error.errno or 0, default)
    return refusal(path, code, problem, fix)


_NOT_THERE = ("E_MISSING", "does not exist", "check the path")
_READ_PROBLEMS = {
    errno.ENOENT: _NOT_THERE,
    errno.ENOTDIR: _NOT_THERE,
    errno.ENAMETOOLONG: _NOT_THERE,
    errno.ELOOP: ("E_NOTFILE", "is a symbolic link to itself", "give the path of a scan"),
    errno.EACCES: ("E_PERM", "may not be read", "ask for permission to read the file"),
    errno.EPERM: ("E_PERM", "may not be read", "ask for permission to read the file"),
}

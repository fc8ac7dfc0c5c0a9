"""Writing files so that they appear whole or not at all, and naming their contents by a checksum."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from volseg.errors import EnvironmentProblem

TEMPORARY_PREFIX = ".tmp-"  # what a killed process may leave behind; never a finished file


def atomic_write(path: Path, write: Callable[[BinaryIO], None], verify: Callable[[Path], None] | None = None) -> None:
    """Put a file at `path`, whole or not at all, and durable once this returns.

    Args:
        path: the target; its folder must exist. An older file there is replaced.
        write: writes the contents into the open temporary file, which lies beside the target.
        verify: reads the temporary file back and raises if it is not what was meant.

    Raises:
        EnvironmentProblem: the disk is full (`E_DISK`), the folder cannot be written (`E_PERM`) or is missing
            (`E_MISSING`). After this or any other exception the target is as before and no temporary file remains.
    """
    temporary = path.with_name(TEMPORARY_PREFIX + secrets.token_hex(8))
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if verify is not None:
            verify(temporary)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise environment_problem(path, error) from error
        raise


def write_bytes_atomic(path: Path, data: bytes | str) -> None:
    """`atomic_write` of bytes, or of text in UTF-8, read back and compared."""
    payload = data.encode() if isinstance(data, str) else data

    def verify(temporary: Path) -> None:
        if temporary.read_bytes() != payload:
            raise read_back_problem(path)

    atomic_write(path, lambda file: _write_all(file, payload), verify)


def write_lines_atomic(path: Path, lines: Iterable[str]) -> None:
    """`atomic_write` of lines in UTF-8 that are made one at a time, read back and compared by their checksum."""
    digest = hashlib.sha256()

    def write(file: BinaryIO) -> None:
        for line in lines:
            data = f"{line}\n".encode()
            digest.update(data)
            _write_all(file, data)

    def verify(temporary: Path) -> None:
        if sha256_of(temporary) != digest.hexdigest():
            raise read_back_problem(path)

    atomic_write(path, write, verify)


def write_json_atomic(path: Path, obj: Any, *, indent: int | None = 2) -> None:
    """`atomic_write` of JSON: UTF-8, keys in their own order; without `indent` on one line, which is many times faster.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot hold; use None.
    """
    write_bytes_atomic(path, json.dumps(obj, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def make_folder(path: Path) -> None:
    """Make a folder and those above it.

    Raises:
        EnvironmentProblem: it cannot be made there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise environment_problem(path, error) from error


def sha256_of(path: Path) -> str:
    """SHA-256 of the bytes of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_back_problem(path: Path) -> EnvironmentProblem:
    """What a `verify` raises when the disk returns other bytes than were written."""
    return EnvironmentProblem(
        f"{path}: the bytes read back differ from those written",
        fix="check the disk or the network share, then run again",
        code="E_DISK",
    )


def _write_all(file: BinaryIO, payload: bytes) -> None:
    file.write(payload)


def _sync_folder(folder: Path) -> None:
    """Make a rename in the folder durable; some network file systems cannot, and say EINVAL."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def environment_problem(path: Path, error: OSError) -> EnvironmentProblem:
    """What a failed write means for the user."""
    code, fix = _FIXES.get(error.errno or 0, ("E_DISK", "check the disk and the path, then run again"))
    return EnvironmentProblem(f"{path}: cannot be written ({error.strerror or error})", fix=fix, code=code)


_FULL = ("E_DISK", "free some space or choose another output folder, then run again: finished files are kept")
_FORBIDDEN = ("E_PERM", "choose an output folder which you may write to")
_NO_FOLDER = ("E_MISSING", "create the folder first, and check that no part of the path is a file")
_FIXES: dict[int, tuple[str, str]] = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: ("E_DISK", "raise the limit on file size (ulimit -f) or choose another file system"),
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.EROFS: _FORBIDDEN,
    errno.EEXIST: ("E_PERM", "a file of this name stands in the way: move it or choose another folder"),
    errno.EISDIR: ("E_PERM", "a folder of this name stands in the way: move it or choose another name"),
    errno.ENOENT: _NO_FOLDER,
    errno.ENOTDIR: _NO_FOLDER,
}

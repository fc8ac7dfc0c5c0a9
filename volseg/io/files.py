"""Write files atomically and durably, and identify their contents by a checksum."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from volseg.errors import EnvironmentProblem, VolsegError
from volseg.inputs import MAX_TEXT_BYTES, open_regular, read_bytes

RECORDS = ".volseg"  # folder inside results, for their records
TEMPORARY_PREFIX = ".tmp-"  # files that a killed process may leave behind; never finished ones


def atomic_write(
    path: Path, write: Callable[[BinaryIO], None], verify: Callable[[Path], None] | None = None
) -> None:
    """Write a file whole or not at all; it is durable when this returns.

    Args:
        path: the target; its folder must exist. An existing file is replaced.
        write: writes the contents into the open temporary file, which lies beside the target.
        verify: reads the temporary file back and raises if its contents are wrong.

    Raises:
        EnvironmentProblem: the disk is full (`E_DISK`), the folder is not writable (`E_PERM`) or
            missing (`E_MISSING`). After this or any other exception the target is unchanged and
            no temporary file remains.
    """
    temporary = path.with_name(TEMPORARY_PREFIX + secrets.token_hex(8))
    try:
        with open(temporary, "xb") as file:
            write(file)
            sync_file(file)
        if verify is not None:
            verify(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise environment_problem(path, error) from error
        raise


def write_bytes_atomic(path: Path, data: bytes | str) -> None:
    """Write bytes, or text in UTF-8, with `atomic_write`, and verify them."""
    payload = data.encode() if isinstance(data, str) else data

    def verify(temporary: Path) -> None:
        if temporary.read_bytes() != payload:
            raise read_back_problem(path)

    atomic_write(path, lambda file: _write_all(file, payload), verify)


def write_json_atomic(path: Path, obj: Any, *, indent: int | None = 2) -> None:
    """Write JSON with `atomic_write`: UTF-8, keys in insertion order.

    Args:
        indent: None writes one line, which is many times faster.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot hold; use None.
    """
    write_bytes_atomic(path, json_text(obj, indent=indent))


def json_text(obj: Any, *, indent: int | None = 2) -> str:
    """Return the text of a JSON file.

    Raises:
        ValueError: as `write_json_atomic`.
    """
    return json.dumps(obj, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"


def write_sealed(path: Path, text: str) -> None:
    """Write a text file with a seal as its first line, by which volseg recognises it if unchanged.

    Raises:
        VolsegError: the file exists and volseg did not write it, or it was changed (`E_EXISTS`).
    """
    refuse_unsealed(path)
    write_bytes_atomic(path, (_seal_of(text) + text).encode())


def refuse_unsealed(path: Path) -> None:
    """Check that `write_sealed` may write this file; raise as it does."""
    if not os.path.lexists(path):
        return
    try:
        content = read_bytes(path, max_bytes=MAX_TEXT_BYTES).decode()
        first, line_end, text = content.partition("\n")
        is_sealed = not path.is_symlink() and first + line_end == _seal_of(text)
    except (OSError, ValueError):
        is_sealed = False
    if not is_sealed:
        raise VolsegError(
            f"{path}: already exists and was not written by volseg, or was changed since",
            fix="move or rename it, or choose another --out",
            code="E_EXISTS",
        )


def _seal_of(text: str) -> str:
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"# Written by volseg, which replaces it only while it is unchanged: {digest}\n"


def refuse_file(path: Path) -> None:
    """Check that neither a folder nor one of its parents is a file.

    Raises:
        VolsegError: one of them is not a folder (`E_EXISTS`).
    """
    for folder in (path, *path.parents):
        if os.path.isdir(folder):
            return
        if os.path.lexists(folder):
            raise VolsegError(
                f"{folder}: is not a folder",
                fix="move or rename it, or choose another --out",
                code="E_EXISTS",
            )


def make_folder(path: Path) -> None:
    """Make a folder and its parents.

    Raises:
        VolsegError: as `refuse_file`.
        EnvironmentProblem: the folder cannot be made.
    """
    refuse_file(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise environment_problem(path, error) from error


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a regular file in hexadecimal; raise OSError for any other path."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_back_problem(path: Path) -> EnvironmentProblem:
    """Return the error for a `verify` that reads back other bytes than were written."""
    return EnvironmentProblem(
        f"{path}: the bytes read back differ from those written",
        fix="check the disk or the network share, then run again",
        code="E_DISK",
    )


def _write_all(file: BinaryIO, payload: bytes) -> None:
    file.write(payload)


def sync_file(file: BinaryIO) -> None:
    """Make the contents of an open file durable."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make a rename in the folder durable, except on network file systems without support."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def environment_problem(path: Path, error: OSError) -> EnvironmentProblem:
    """Return the user's error for a failed write."""
    default = ("E_DISK", "check the disk and the path, then run again")
    code, fix = _FIXES.get(error.errno or 0, default)
    return EnvironmentProblem(
        f"{path}: cannot be written ({error.strerror or error})", fix=fix, code=code
    )


_FREE_SPACE = "free space or choose another output folder, then run again: finished files are kept"
_FULL = ("E_DISK", _FREE_SPACE)
_FORBIDDEN = ("E_PERM", "choose an output folder that you may write to")
_NO_FOLDER = ("E_MISSING", "create the folder first, and check that no part of the path is a file")
_FIXES: dict[int, tuple[str, str]] = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: ("E_DISK", "raise the file size limit (ulimit -f) or choose another file system"),
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.EROFS: _FORBIDDEN,
    errno.EEXIST: ("E_PERM", "a file of this name exists: move it or choose another folder"),
    errno.EISDIR: ("E_PERM", "a folder of this name exists: move it or choose another name"),
    errno.ENOENT: _NO_FOLDER,
    errno.ENOTDIR: _NO_FOLDER,
}

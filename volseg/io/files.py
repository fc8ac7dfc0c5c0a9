"""Writing files so that they appear whole or not at all, and naming their contents by a checksum."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from volseg.errors import EnvironmentProblem, VolsegError
from volseg.inputs import open_regular, read_json

SEAL = "written_by_volseg"  # key of a JSON file that stands alone: hash of all else in it
TEMPORARY_PREFIX = ".tmp-"  # what a killed process may leave behind; never a finished file


def atomic_write(
    path: Path, write: Callable[[BinaryIO], None], verify: Callable[[Path], None] | None = None
) -> None:
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
    """`atomic_write` of bytes, or of text in UTF-8, read back and compared."""
    payload = data.encode() if isinstance(data, str) else data

    def verify(temporary: Path) -> None:
        if temporary.read_bytes() != payload:
            raise read_back_problem(path)

    atomic_write(path, lambda file: _write_all(file, payload), verify)


def write_json_atomic(path: Path, obj: Any, *, indent: int | None = 2) -> None:
    """`atomic_write` of JSON: UTF-8, keys in their own order; without `indent` on one line, which is many times faster.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot hold; use None.
    """
    write_bytes_atomic(path, json_text(obj, indent=indent))


def json_text(obj: Any, *, indent: int | None = 2) -> str:
    """The text of a JSON file.

    Raises:
        ValueError: as `write_json_atomic`.
    """
    return json.dumps(obj, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file that stands alone, with a seal by which volseg knows it again as long as nobody changed it.

    Raises:
        VolsegError: a file that volseg did not write, or that was changed since, is there (`E_EXISTS`).
    """
    refuse_unsealed(path)
    write_json_atomic(path, dict(content) | {SEAL: _seal_of(content)})


def refuse_unsealed(path: Path) -> None:
    """Check that a file may be written by `write_sealed`; raises as that does."""
    if not os.path.lexists(path):
        return
    try:
        content = read_json(path)
        is_sealed = not path.is_symlink() and content.pop(SEAL) == _seal_of(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        is_sealed = False
    if not is_sealed:
        raise VolsegError(
            f"{path}: already there, and not as volseg wrote it",
            fix="move or rename it, or give another name to --out",
            code="E_EXISTS",
        )


def read_sealed(path: Path) -> Any:
    """What a JSON file holds, which may have been changed since it was written, without its seal.

    Raises:
        OSError, ValueError: it cannot be read, or is not JSON.
    """
    content = read_json(path)
    return (
        {name: value for name, value in content.items() if name != SEAL}
        if isinstance(content, dict)
        else content
    )


def _seal_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def refuse_file(path: Path) -> None:
    """Check that a folder is there or can be made: neither it nor one above it is something else.

    Raises:
        VolsegError: what is in the way (`E_EXISTS`).
    """
    for folder in (path, *path.parents):
        if os.path.isdir(folder):
            return
        if os.path.lexists(folder):
            raise VolsegError(
                f"{folder}: is not a folder",
                fix="move or rename it, or give another --out",
                code="E_EXISTS",
            )


def make_folder(path: Path) -> None:
    """Make a folder and those above it.

    Raises:
        VolsegError: as `refuse_file`.
        EnvironmentProblem: it cannot be made there.
    """
    refuse_file(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise environment_problem(path, error) from error


def sha256_of(path: Path) -> str:
    """SHA-256 of the bytes of a regular file, in hexadecimal; raises OSError where it is none."""
    with open_regular(path) as file:
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


def sync_file(file: BinaryIO) -> None:
    """Make what was written into an open file durable."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
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
    code, fix = _FIXES.get(
        error.errno or 0, ("E_DISK", "check the disk and the path, then run again")
    )
    return EnvironmentProblem(
        f"{path}: cannot be written ({error.strerror or error})", fix=fix, code=code
    )


_FULL = (
    "E_DISK",
    "free some space or choose another output folder, then run again: finished files are kept",
)
_FORBIDDEN = ("E_PERM", "choose an output folder which you may write to")
_NO_FOLDER = ("E_MISSING", "create the folder first, and check that no part of the path is a file")
_FIXES: dict[int, tuple[str, str]] = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: (
        "E_DISK",
        "raise the limit on file size (ulimit -f) or choose another file system",
    ),
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.EROFS: _FORBIDDEN,
    errno.EEXIST: (
        "E_PERM",
        "a file of this name stands in the way: move it or choose another folder",
    ),
    errno.EISDIR: (
        "E_PERM",
        "a folder of this name stands in the way: move it or choose another name",
    ),
    errno.ENOENT: _NO_FOLDER,
    errno.ENOTDIR: _NO_FOLDER,
}

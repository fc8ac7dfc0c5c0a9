"""Headers that are lines of text, and the data file that one may name: all of it is untrusted."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from volseg.io.gzip_stream import CHUNK_BYTES, COPY_AGAIN, opened_raw, refusal

MAX_HEADER_BYTES = 2**20  # a thousand segments with all fields of 3D Slicer are half of it
MAX_SHOWN = 40  # characters of a field in a message
_CONTROL = frozenset(range(32)) - frozenset(b"\t\r\n")
_WHOLE_NUMBER = re.compile(r"[-+]?[0-9]{1,18}")
_NUMBER = re.compile(r"[-+]?([0-9]{1,99}\.?[0-9]{0,99}|\.[0-9]{1,99})([eE][-+]?[0-9]{1,4})?")


def read_text_start(path: Path) -> bytes:
    """Return the first MiB of a file as it is stored.

    Raises:
        ScanError: the file is empty or cannot be read.
    """
    start = b""
    with opened_raw(path) as file:
        while len(start) < MAX_HEADER_BYTES:
            piece = file.read(min(CHUNK_BYTES, MAX_HEADER_BYTES - len(start)))
            if not piece:
                break
            start += piece
    if not start:
        raise refusal(path, "E_EMPTY", "the file is empty", COPY_AGAIN)
    return start


def lines_of(stored: bytes, path: Path) -> list[str]:
    """Return the lines of a header, without the spaces at their ends.

    Raises:
        ScanError: it holds control characters, as voxels do (`E_HEADER`).
    """
    if not _CONTROL.isdisjoint(stored):
        raise header_refusal(path, "holds bytes that are not text")
    return [line.rstrip() for line in stored.decode("utf-8", "replace").split("\n")]


def header_refusal(path: Path, problem: str):
    """Return the error for a header that says nothing certain."""
    return refusal(path, "E_HEADER", f"its header {problem}", COPY_AGAIN)


def shown(text: str) -> str:
    """Return a value of a header for a message, in one line."""
    return repr(text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…")


def whole_numbers(text: str, name: str, path: Path) -> list[int]:
    """Return the whole numbers of a field.

    Raises:
        ScanError: one of its words is no such number (`E_HEADER`).
    """
    words = text.split()
    if not words or not all(map(_WHOLE_NUMBER.fullmatch, words)):
        raise header_refusal(path, f"states {name} as {shown(text)}")
    return [int(word) for word in words]


def numbers(text: str, name: str, path: Path, separator: str | None = None) -> np.ndarray:
    """Return the numbers of a field as (N,) float64, N ≥ 1.

    Raises:
        ScanError: one of its words is no number (`E_HEADER`).
    """
    words = [word.strip() for word in text.split(separator)]
    if not words or not all(map(_NUMBER.fullmatch, words)):
        raise header_refusal(path, f"states {name} as {shown(text)}")
    return np.array([float(word) for word in words])


def data_file(path: Path, name: str) -> Path:
    """Return the path of the data file that a header names, which must lie in its folder.

    Raises:
        ScanError: the name leads elsewhere (`E_OUTSIDE`), also through a symbolic link.
    """
    folder = path.parent
    outside = refusal(
        path,
        "E_OUTSIDE",
        f"its voxels lie in {shown(name)}, which is not a file in the folder of the header",
        "put the data file beside the header and write its name alone",
    )
    if "\\" in name or ":" in name or not name.isprintable() or Path(name).is_absolute():
        raise outside
    try:
        resolved = (folder / name).resolve()
        is_inside = resolved.is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError) as error:  # too long, or a loop of links
        raise outside from error
    if ".." in Path(name).parts or not is_inside or not name:
        raise outside
    return folder / name

"""Safe reading of untrusted files: regular files only, with size limits and strict JSON.

A file that cannot be read raises `OSError`, one with unusable content `ValueError`, each with one
line of text. The caller turns it into a `VolsegError` that says what the file is for.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import stat
import tomllib
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

# For JSON and CSV: 100 000 cases need less. Parsed content takes about 20 times as much memory.
MAX_TEXT_BYTES = 32 << 20
MAX_TOML_BYTES = 1 << 20
CHUNK_BYTES = 2**20
MAX_DEPTH = 64  # nested lists and objects; deeper ones would exhaust the stack of recursive code
MAX_INTEGER = 2**63 - 1
MAX_DIGITS = 20  # of a 64-bit number, including its sign
MAX_NAME = 200  # characters in the name of a label, channel or column
MIN_SPACING_MM, MAX_SPACING_MM = 0.01, 100.0  # of voxels
MAX_LABEL = 2**32 - 1  # the largest value of a mask
# Byte sequences that may mean a number out of range or half of a surrogate pair; other content
# needs no full check. Mapping all digits to 0 and searching bytes is ten times faster than a
# regular expression, which matters for the 100 000 rows of a noisy mask.
_ALIKE = bytes.maketrans(b"123456789+DE", b"0000000000de")
_DOUBTFUL = (b"0" * 18, b"e000", rb"\ud")
# Tokens that delimit TOML keys: quoted text and comments, whose dots do not count, then dots, then
# separators. An unclosed quote ends the TOML.
_TOML_PARTS = re.compile(
    r'''"""(?:[^"\\]|\\[\s\S]|"{1,2}(?!"))*+"{3,5}|"(?!"")(?:[^"\\\n]|\\.)*+"'''
    r"""|'{3}(?:[^']|'{1,2}(?!'))*+'{3,5}|'(?!'')[^'\n]*+'|#.*+"""
    r"""|(?P<open>["'])|(?P<dot>\.)|(?P<end>[=,\n{}\[\]])"""
)


class NotAFileError(OSError):
    """A folder, pipe, device or socket in place of a file; it was not read."""

    def __init__(self, path: Path | str, kind: str) -> None:
        super().__init__(errno.EINVAL, f"is {kind}, not a file", str(path))
        self.kind = kind


def kind_of(mode: int) -> str:
    """Name the kind of file: `a folder`, `a pipe`, `a socket`, `a file` or `a device`."""
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFREG: "a file",
    }
    return kinds.get(stat.S_IFMT(mode), "a device")


def open_regular(path: Path | str) -> io.BufferedReader:
    """Open a regular file, or a link to one, for reading bytes.

    Never waits for a pipe and never opens a device.

    Raises:
        OSError: it is missing or cannot be opened; `NotAFileError` if it is not a regular file.
    """
    try:
        _refuse_other_kinds(path, os.stat(path).st_mode)
        flags = [getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY")]
        descriptor = os.open(path, os.O_RDONLY | flags[0] | flags[1] | flags[2])
    except ValueError as error:  # a zero byte or half of a surrogate pair in the name
        raise FileNotFoundError(errno.ENOENT, "does not exist", str(path)) from error
    try:
        # Check what was opened, in case the file was replaced in between.
        _refuse_other_kinds(path, os.fstat(descriptor).st_mode)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: Path | str, *, max_bytes: int) -> bytes:
    """Read the bytes of a regular file.

    Raises:
        OSError: as for `open_regular`.
        ValueError: it is larger than `max_bytes`.
    """
    content = bytearray()
    with open_regular(path) as file:
        # One `read(max_bytes)` would allocate all of it even for a short file.
        while chunk := file.read(CHUNK_BYTES):
            content += chunk
            if len(content) > max_bytes:
                raise ValueError(f"holds more than {max_bytes / 2**20:g} MB")
    return bytes(content)


def read_text(path: Path | str, *, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Read the text of a regular UTF-8 file, with or without a byte order mark.

    Raises:
        OSError, ValueError: as for `read_bytes`; also if it is not UTF-8.
    """
    return read_bytes(path, max_bytes=max_bytes).decode("utf-8-sig")


def read_json(path: Path | str, *, max_bytes: int = MAX_TEXT_BYTES, is_finite: bool = True) -> Any:
    """Read a JSON file with the rules of `parse_json`.

    Raises:
        OSError, ValueError: as for `read_bytes` and `parse_json`.
    """
    return parse_json(read_bytes(path, max_bytes=max_bytes), is_finite=is_finite)


def parse_json(data: bytes | str, *, is_finite: bool = True) -> Any:
    """Parse untrusted JSON.

    Args:
        data: text, or its bytes in UTF-8, UTF-16 or UTF-32.
        is_finite: False accepts NaN and infinity, which some tools write.

    Raises:
        ValueError: it is not JSON; it is nested deeper than `MAX_DEPTH`; an object repeats a name;
            an integer needs more than 64 bits; a number is NaN or infinite; a text contains half of
            a surrogate pair.
    """
    try:
        if isinstance(data, bytes):
            has_mark = data.startswith(b"\xef\xbb\xbf")
            data = data.decode("utf-8-sig" if has_mark else json.detect_encoding(data))
        alike = data.encode("utf-8", "surrogatepass").translate(_ALIKE)
        is_doubtful = any(part in alike for part in _DOUBTFUL)
        content = _decoder(is_finite, is_doubtful).decode(data)
        if data.count("{") + data.count("[") > MAX_DEPTH:
            _check_depth(content)
        if is_doubtful:
            _check_values(content, is_finite=is_finite)
    except RecursionError:
        raise _nested() from None
    except MemoryError:
        raise ValueError("needs more memory than is available") from None
    return content


@cache
def _decoder(is_finite: bool, is_doubtful: bool) -> json.JSONDecoder:
    return json.JSONDecoder(
        object_pairs_hook=_object_of,
        parse_constant=_refuse_constant if is_finite else None,
        parse_int=_integer_of if is_doubtful else None,
    )


def read_toml(path: Path | str) -> dict[str, Any]:
    """Read a TOML file with the limits of `parse_json`; NaN and infinity are left to the caller.

    Raises:
        OSError, ValueError: as for `read_bytes`; also if it is not TOML.
    """
    text = read_text(path, max_bytes=MAX_TOML_BYTES)
    _check_keys(text)
    try:
        content = tomllib.loads(text)
        _check_depth(content)
        _check_values(content, is_finite=False)
    except RecursionError:
        raise _nested() from None
    return content


def _refuse_other_kinds(path: Path | str, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise NotAFileError(path, kind_of(mode))


def _object_of(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        repeated = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        raise ValueError(f"{shorten(repeated)!r} appears twice in one object")
    return content


def _integer_of(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a whole number of {len(text)} digits does not fit into 64 bits")
    return int(text)


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"contains {text}, which is not a JSON number")


def _check_keys(text: str) -> None:
    """Refuse a TOML key `a.b.c` with too many parts: parsing time grows with their square."""
    dots = 0
    for part in _TOML_PARTS.finditer(text):
        if part["open"]:
            return  # the parser reports it
        dots = dots + 1 if part["dot"] else 0 if part["end"] else dots
        if dots >= MAX_DEPTH:
            raise _nested()


def _check_depth(content: Any) -> None:
    level = [content] if isinstance(content, dict | list) else []
    for _ in range(MAX_DEPTH):
        level = [
            value
            for container in level
            for value in (container.values() if isinstance(container, dict) else container)
            if isinstance(value, dict | list)
        ]
        if not level:
            return
    raise _nested()


def _check_values(content: Any, *, is_finite: bool) -> None:
    """Check every number and text; the depth of `content` was checked before."""
    if isinstance(content, dict):
        for name, value in content.items():
            _check_values(name, is_finite=is_finite)
            _check_values(value, is_finite=is_finite)
    elif isinstance(content, list):
        for value in content:
            _check_values(value, is_finite=is_finite)
    elif isinstance(content, str):
        try:
            content.encode()
        except UnicodeEncodeError as error:
            problem = f"the text {shorten(content)!a} contains half of a surrogate pair"
            raise ValueError(problem) from error
    elif isinstance(content, int) and not -MAX_INTEGER - 1 <= content <= MAX_INTEGER:
        raise ValueError(f"a whole number of {content.bit_length()} bits does not fit into 64 bits")
    elif isinstance(content, float) and is_finite and not math.isfinite(content):
        raise ValueError("a number is too large to be finite")


def _nested() -> ValueError:
    return ValueError(f"is nested more than {MAX_DEPTH} levels deep")


def label_value(text: str) -> int | None:
    """Parse a mask value written in digits; None if the text is not one.

    >>> label_value("7"), label_value("1.7"), label_value("9" * 5000)
    (7, None, None)
    """
    if not text.isdecimal() or len(text) > len(str(MAX_LABEL)) or int(text) > MAX_LABEL:
        return None
    return int(text)


def shorten(text: str, length: int = 60) -> str:
    """Shorten a text for a message or a figure: a longer one ends with `…`.

    >>> shorten("a" * 100, 5)
    'aaaa…'
    """
    return text if len(text) <= length else text[: length - 1] + "…"

"""Files that a stranger made: only regular files are opened, no more is read than a bound allows, and JSON is taken strictly.

Whatever is wrong with a file is an `OSError` (it cannot be read) or a `ValueError` (its contents cannot be used), each with one
line of text; who reads it says in a `VolsegError` what the file was for.
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

MAX_TEXT_BYTES = (
    32 << 20
)  # of a JSON or CSV file: that of 100 000 cases is smaller; parsed, it takes about 20 times as much
MAX_TOML_BYTES = 1 << 20
READ_TOGETHER = 2**20  # bytes
MAX_DEPTH = 64  # lists and objects within each other; more would exhaust the stack of whoever walks through them
MAX_INTEGER = 2**63 - 1
MAX_DIGITS = 20  # of a 64-bit number, with its sign
MAX_NAME = 200  # characters of the name of a label, a channel or a column
MAX_LABEL = 2**32 - 1  # the largest value of a mask
# Bytes in which a number may be too long or too large, or a character half of a pair; all others need no second look. Digits
# are made alike and bytes looked for, not a pattern, which takes ten times as long: noise has 100 000 rows.
_ALIKE = bytes.maketrans(b"123456789+DE", b"0000000000de")
_DOUBTFUL = (b"0" * 18, b"e000", rb"\ud")
# What decides where a key of TOML begins and ends: text in quotes and comments, in which dots count for nothing, dots,
# and what stands between keys. A quote that is not closed is where the TOML ends.
_TOML_PARTS = re.compile(
    r'''"""(?:[^"\\]|\\[\s\S]|"{1,2}(?!"))*+"{3,5}|"(?!"")(?:[^"\\\n]|\\.)*+"'''
    r"""|'{3}(?:[^']|'{1,2}(?!'))*+'{3,5}|'(?!'')[^'\n]*+'|#.*+|(?P<open>["'])|(?P<dot>\.)|(?P<end>[=,\n{}\[\]])"""
)


class NotAFileError(OSError):
    """A folder, pipe, device or socket is where a file was expected; it was not read."""

    def __init__(self, path: Path | str, kind: str) -> None:
        super().__init__(errno.EINVAL, f"is {kind}, not a file", str(path))
        self.kind = kind


def kind_of(mode: int) -> str:
    """What a file's mode says that it is, with its article: `a folder`, `a pipe`, `a device`, `a socket` or `a file`."""
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFREG: "a file",
    }
    return kinds.get(stat.S_IFMT(mode), "a device")


def open_regular(path: Path | str) -> io.BufferedReader:
    """Open a regular file, or a link to one, for reading bytes. Never waits for a pipe and never opens a device.

    Raises:
        OSError: it is not there or cannot be opened; `NotAFileError` where it is something else than a file.
    """
    try:
        _refuse_other_kinds(path, os.stat(path).st_mode)
        flags = (
            os.O_RDONLY
            | getattr(os, "O_NONBLOCK", 0)
            | getattr(os, "O_CLOEXEC", 0)
            | getattr(os, "O_BINARY", 0)
        )
        descriptor = os.open(path, flags)
    except ValueError as error:  # a zero byte or half of a surrogate pair in the name
        raise FileNotFoundError(errno.ENOENT, "does not exist", str(path)) from error
    try:
        _refuse_other_kinds(
            path, os.fstat(descriptor).st_mode
        )  # of what was opened, if it was replaced meanwhile
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: Path | str, *, max_bytes: int) -> bytes:
    """The bytes of a regular file.

    Raises:
        OSError: as `open_regular`. ValueError: it holds more than `max_bytes`.
    """
    content = bytearray()
    with open_regular(path) as file:
        while part := file.read(
            READ_TOGETHER
        ):  # at once, `read` would take `max_bytes` of memory for a short file, too
            content += part
            if len(content) > max_bytes:
                raise ValueError(f"holds more than {max_bytes / 2**20:g} MB")
    return bytes(content)


def read_text(path: Path | str, *, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """The text of a regular file in UTF-8, with or without a byte order mark.

    Raises:
        OSError, ValueError: as `read_bytes`; also where it is not UTF-8.
    """
    return read_bytes(path, max_bytes=max_bytes).decode("utf-8-sig")


def read_json(path: Path | str, *, max_bytes: int = MAX_TEXT_BYTES, is_finite: bool = True) -> Any:
    """The content of a JSON file, as `parse_json`.

    Raises:
        OSError, ValueError: as `read_bytes` and `parse_json`.
    """
    return parse_json(read_bytes(path, max_bytes=max_bytes), is_finite=is_finite)


def parse_json(data: bytes | str, *, is_finite: bool = True) -> Any:
    """The content of JSON that a stranger wrote.

    Args:
        data: text, or its bytes in UTF-8, UTF-16 or UTF-32.
        is_finite: False takes NaN and infinity, which some tools write.

    Raises:
        ValueError: it is not JSON; it is nested more than `MAX_DEPTH` deep; a name appears twice in one object; an integer needs
            more than 64 bits; a number is NaN or infinite; a text holds half of a surrogate pair.
    """
    try:
        if isinstance(data, bytes):
            data = data.decode(
                "utf-8-sig" if data.startswith(b"\xef\xbb\xbf") else json.detect_encoding(data)
            )
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
        raise ValueError("needs more memory than there is") from None
    return content


@cache
def _decoder(is_finite: bool, is_doubtful: bool) -> json.JSONDecoder:
    return json.JSONDecoder(
        object_pairs_hook=_object_of,
        parse_constant=_refuse_constant if is_finite else None,
        parse_int=_integer_of if is_doubtful else None,
    )


def read_toml(path: Path | str) -> dict[str, Any]:
    """The content of a TOML file, with the bounds of `parse_json`; NaN and infinity are left to who checks the values.

    Raises:
        OSError, ValueError: as `read_bytes`; also where it is not TOML.
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
        twice = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        raise ValueError(f"{shortened(twice)!r} appears twice in one object")
    return content


def _integer_of(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a whole number of {len(text)} digits does not fit into 64 bits")
    return int(text)


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"holds {text}, which is not a number in JSON")


def _check_keys(text: str) -> None:
    """Refuse a TOML key `a.b.c` of more parts than levels are allowed: the parser's time grows with their number squared."""
    dots = 0
    for part in _TOML_PARTS.finditer(text):
        if part["open"]:
            return  # the parser will say so
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
    """Look at every number and text, of content that is nested no deeper than allowed."""
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
            raise ValueError(
                f"the text {shortened(content)!a} holds half of a surrogate pair"
            ) from error
    elif isinstance(content, int) and not -MAX_INTEGER - 1 <= content <= MAX_INTEGER:
        raise ValueError(f"a whole number of {content.bit_length()} bits does not fit into 64 bits")
    elif isinstance(content, float) and is_finite and not math.isfinite(content):
        raise ValueError("a number is too large to be finite")


def _nested() -> ValueError:
    return ValueError(f"is nested more than {MAX_DEPTH} levels deep")


def label_value(text: str) -> int | None:
    """The value of a mask that a text says in digits; None where it says none.

    >>> label_value("7"), label_value("1.7"), label_value("9" * 5000)
    (7, None, None)
    """
    if not text.isdecimal() or len(text) > len(str(MAX_LABEL)) or int(text) > MAX_LABEL:
        return None
    return int(text)


def shortened(text: str, length: int = 60) -> str:
    """A text for a message or a picture: of a longer one its beginning and `…`.

    >>> shortened("a" * 100, 5)
    'aaaa…'
    """
    return text if len(text) <= length else text[: length - 1] + "…"

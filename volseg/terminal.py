"""Standard output and error of a command.

Any text can be printed in any encoding; a full disk or a closed pipe is reported as one error.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TextIO, cast

from volseg.errors import EnvironmentProblem, VolsegError
from volseg.inputs import shorten

PLAIN = "volseg.plain"  # name of the error handler
# Replacements for characters that an encoding lacks; others become an escape such as `\u2603`.
LOOK_ALIKES = str.maketrans(
    {
        "→": "->",
        "−": "-",
        "–": "-",
        "×": "x",
        "±": "+/-",
        "≤": "<=",
        "≥": ">=",
        "²": "2",
        "³": "3",
        "…": "...",
        "“": '"',
        "”": '"',
        "’": "'",
        "µ": "u",
        "°": " deg",
        "·": ".",
    }
)


@contextmanager
def printing() -> Iterator[None]:
    """Replace standard output and error by streams that accept any text.

    Raises:
        EnvironmentProblem: standard output is closed or cannot be written.
    """
    _open_closed_descriptors()
    streams = sys.stdout, sys.stderr
    if sys.stdout is None:
        raise EnvironmentProblem(
            "stdout is closed, so results cannot be printed",
            fix="redirect it to a file or to /dev/null",
            code="E_STDOUT",
        )
    codecs.register_error(PLAIN, _plain)
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=PLAIN)
    sys.stdout = cast(TextIO, _Output(streams[0]))
    sys.stderr = cast(TextIO, _Messages(streams[1])) if streams[1] is not None else None
    try:
        yield
        sys.stdout.flush()
    except SystemExit:
        sys.stdout.flush()
        raise
    finally:
        sys.stdout, sys.stderr = streams


def takes_unicode() -> bool:
    """Return whether standard output can encode every character."""
    return str(getattr(sys.stdout, "encoding", "")).lower().replace("-", "").startswith("utf")


def one_line(text: str) -> str:
    """Escape what would break the line or move the cursor.

    >>> one_line("a.nii\\nb")
    'a.nii\\\\nb'
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or _is_surrogate(char) else repr(char)[1:-1] for char in text
    )


def problem_of(error: OSError | MemoryError) -> VolsegError:
    """Turn an unhandled error of the operating system into one for the user."""
    if isinstance(error, MemoryError):
        fix = "use smaller inputs or a machine with more memory"
        return EnvironmentProblem("this machine has too little memory", fix=fix, code="E_RAM")
    path = error.filename
    prefix = f"{shorten(os.fsdecode(path), 200)}: " if isinstance(path, str | bytes) else ""
    if error.errno == errno.ENAMETOOLONG:
        problem = f"{prefix}the path is too long for this system"
        return VolsegError(problem, fix="give a shorter path", code="E_PATH")
    return EnvironmentProblem(
        f"{prefix}{error.strerror or error}",
        fix="check the path, its permissions and the disk",
        code="E_OS",
    )


class _Stream:
    """A text stream that handles failures of `write` and `flush` itself."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        if name == "buffer":  # typer would write UTF-8 into it where the encoding is ASCII
            raise AttributeError(name)
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if text == "":
            return 0  # only a test whether this is a text stream
        try:
            return self._stream.write(text)
        except OSError as error:
            self._failed(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        """Discard buffered text, which the interpreter would try to write again at exit."""
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


class _Output(_Stream):
    def _failed(self, error: OSError) -> NoReturn:
        super()._failed(error)
        is_closed = error.errno == errno.EPIPE
        reason = "its reader has closed it" if is_closed else error.strerror or str(error)
        raise EnvironmentProblem(
            f"stdout cannot be written ({reason})",
            fix="free some space or read all of the output; files in --out are complete",
            code="E_STDOUT",
        ) from error


class _Messages(_Stream):
    """Standard error: a message that cannot be written must not stop the work."""


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(LOOK_ALIKES)
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end


def _open_closed_descriptors() -> None:
    """Open descriptors 0, 1 and 2 if they are closed.

    Otherwise the next file would get the number, and the output of libraries would end up in it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            with suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one


def _is_surrogate(char: str) -> bool:
    return "\ud800" <= char <= "\udfff"

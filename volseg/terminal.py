"""Standard output and error of a command: any text can be printed in any encoding, and a full disk or closed pipe is one error."""

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
from volseg.inputs import shortened

PLAIN = "volseg.plain"  # name of the error handler
# What is printed for characters that an encoding lacks; for all others their number, as `\u2603`.
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
    """Print in this block to streams that take every text; what goes wrong with them is an error of the environment.

    Raises:
        EnvironmentProblem: standard output is closed, or what was printed could not be written.
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
    """Whether standard output has every character."""
    return str(getattr(sys.stdout, "encoding", "")).lower().replace("-", "").startswith("utf")


def one_line(text: str) -> str:
    """The text with what would break a line, or move the cursor, written as an escape.

    >>> one_line("a.nii\\nb")
    'a.nii\\\\nb'
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or _is_surrogate(char) else repr(char)[1:-1] for char in text
    )


def problem_of(error: OSError | MemoryError) -> VolsegError:
    """What an error of the system, which nobody expected where it happened, means for the user."""
    if isinstance(error, MemoryError):
        text = "the memory of this machine is not enough"
        return EnvironmentProblem(
            text, fix="use smaller inputs or a machine with more memory", code="E_RAM"
        )
    where = (
        f"{shortened(os.fsdecode(error.filename), 200)}: "
        if isinstance(error.filename, str | bytes)
        else ""
    )
    if error.errno == errno.ENAMETOOLONG:
        return VolsegError(
            f"{where}the path is too long for this system", fix="give a shorter path", code="E_PATH"
        )
    return EnvironmentProblem(
        f"{where}{error.strerror or error}",
        fix="check the path, its permissions and the disk",
        code="E_OS",
    )


class _Stream:
    """A text stream whose `write` and `flush` say what to do where they fail."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        if name == "buffer":  # typer would write UTF-8 into it where the encoding is ASCII
            raise AttributeError(name)
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if text == "":
            return 0  # asks only whether this is a stream of text
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
        """Forget what waits to be written: else the interpreter would try again at its end."""
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


class _Output(_Stream):
    def _failed(self, error: OSError) -> NoReturn:
        super()._failed(error)
        what = (
            "nobody reads it any more"
            if error.errno == errno.EPIPE
            else error.strerror or str(error)
        )
        raise EnvironmentProblem(
            f"stdout cannot be written ({what})",
            fix="free some space or read all of the output; files in --out are complete",
            code="E_STDOUT",
        ) from error


class _Messages(_Stream):
    """Standard error: a message that cannot be written is no reason to stop the work that it is about."""


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(LOOK_ALIKES)
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end


def _open_closed_descriptors() -> None:
    """Open 0, 1 and 2 where they are closed: the next file would get the number, and what libraries print there would be in it."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            with suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one


def _is_surrogate(char: str) -> bool:
    return "\ud800" <= char <= "\udfff"

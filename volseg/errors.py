"""Errors that the user can fix, and what their codes mean.

The command line prints an error in one line, without a traceback.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

MAX_MESSAGE = 200  # characters of an unexpected exception's text in a row
CODE_NAME = r"_[A-Z0-9_]{1,40}"  # regular expression of a code after its letter, as in E_4D
SEVERITIES = {"E": "error", "W": "warning", "N": "note"}  # first letter of a code → what it marks


def severity_of(code: str) -> str:
    """Return what a code marks: an error, a warning, or a note that needs no action.

    >>> [severity_of(code) for code in ("E_GRID", "W_NAN", "N_HEAD")]
    ['error', 'warning', 'note']
    """
    return SEVERITIES[code[0]]


def is_note(text: str) -> bool:
    """Check whether a sentence begins with the code of a note, such as `N_HEAD`."""
    return text.startswith("N_")


def without_notes(texts: Iterable[str]) -> list[str]:
    return [text for text in texts if not is_note(text)]


class VolsegError(Exception):
    """An error that states what happened, with the values, and how to fix it.

    Args:
        problem: one sentence that names the file or setting and its value.
        fix: one sentence on what to do.
        code: short stable name for tables and scripts, e.g. `E_TRUNCATED`.
    """

    exit_code = 2

    def __init__(self, problem: str, *, fix: str, code: str = "E_REQUEST") -> None:
        super().__init__(f"{problem}; to fix: {fix}")
        self.problem = problem
        self.fix = fix
        self.code = code

    def __reduce__(self):
        return _rebuild, (type(self), self.problem, self.fix, self.code)


class ScanError(VolsegError):
    """One scan or mask cannot be used; the other cases of a batch are unaffected."""

    exit_code = 4


@contextmanager
def named(path: Path, kind: type[VolsegError] = VolsegError) -> Iterator[None]:
    """Name a file in errors about its content, which become errors of this kind."""
    try:
        yield
    except VolsegError as error:
        raise kind(f"{path}: {error.problem}", fix=error.fix, code=error.code) from error


class UnexpectedError(ScanError):
    """A bug that one item ran into; the other items of a batch are unaffected.

    Args:
        error: the exception. `trace` is its traceback as text, without frames or their variables.
    """

    def __init__(self, error: BaseException) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        message = (str(error).strip().splitlines() or [""])[0][:MAX_MESSAGE]
        super().__init__(
            f"unexpected {type(error).__name__}{where}: {message}",
            fix="report this line as a bug",
            code="E_BUG",
        )
        self.trace = "".join(traceback.format_exception(error))

    def __reduce__(self):
        return _rebuild, (ScanError, self.problem, self.fix, self.code)


class EnvironmentProblem(VolsegError):
    """A problem of the machine: disk full, folder not writable or in use by another run."""

    exit_code = 5


def given_path(path: PathLike[str] | str) -> Path:
    """Return a path that a caller gave.

    Raises:
        VolsegError: it is of another type, such as an image in memory (`E_TYPE`).
    """
    if isinstance(path, str | PathLike):
        return Path(path)
    kind = type(path)
    raise VolsegError(
        f"a path is needed, not a {kind.__module__.partition('.')[0]}.{kind.__qualname__}",
        fix="give the path of a file; volseg.segment and volseg.measure_mask take scans in memory",
        code="E_TYPE",
    )


def missing_path(path: Path) -> VolsegError:
    """Return the error for a file or folder that does not exist."""
    return VolsegError(f"{path}: does not exist", fix="check the path", code="E_MISSING")


def _rebuild(kind: type[VolsegError], problem: str, fix: str, code: str) -> VolsegError:
    return kind(problem, fix=fix, code=code)

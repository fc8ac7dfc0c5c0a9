"""Problems which the user can repair. The command line prints them as one line, without a traceback."""

from __future__ import annotations

import traceback
from pathlib import Path

MAX_SAID = 200  # characters of an unexpected exception's text in a row


class VolsegError(Exception):
    """What happened, with the values, and what to do about it.

    Args:
        problem: one sentence that names the file or setting and the values found.
        fix: one sentence that says what to do.
        code: short stable name for tables and scripts, such as `E_TRUNCATED`.
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
    """One scan or mask cannot be used; the other cases of a batch are not touched by it."""

    exit_code = 4


class UnexpectedError(ScanError):
    """A bug that one item met; the other items of a batch are not touched by it.

    Args:
        error: what was raised. `trace` is its traceback as text, without the frames and what they hold.
    """

    def __init__(self, error: BaseException) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        said = (str(error).strip().splitlines() or [""])[0][:MAX_SAID]
        super().__init__(
            f"unexpected {type(error).__name__}{where}: {said}",
            fix="report it with this line",
            code="E_BUG",
        )
        self.trace = "".join(traceback.format_exception(error))

    def __reduce__(self):
        return _rebuild, (ScanError, self.problem, self.fix, self.code)


class EnvironmentProblem(VolsegError):
    """The machine stands in the way: disk full, folder not writable, in use by another run."""

    exit_code = 5


def _rebuild(kind: type[VolsegError], problem: str, fix: str, code: str) -> VolsegError:
    return kind(problem, fix=fix, code=code)

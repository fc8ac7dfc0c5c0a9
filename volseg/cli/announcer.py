"""Lines on stderr while a command runs: each warning, note and failure once, when it occurs."""

from __future__ import annotations

import re
from collections import Counter

from volseg.cli.show import announce
from volseg.errors import CODE_NAME, severity_of
from volseg.options.shared import failure_line, remark_line
from volseg.reports import RunReport
from volseg.words import format_count

MAX_REMARKS, MAX_FAILURES = 5, 20  # warnings or notes of one code, and failures, printed in full
FAILED = "failed"
KIND = re.compile(rf"(?:warning: |note: )?([WN]{CODE_NAME}|{FAILED}): ")


class Announcer:
    """Prints what a command announces; of many lines of one kind the first, and their number."""

    def __init__(self) -> None:
        self._printed: set[str] = set()
        self._counts: Counter[str] = Counter()

    def __call__(self, line: str) -> None:
        """Print a line, unless it was announced before."""
        if line in self._printed:
            return
        self._printed.add(line)
        match = KIND.match(line)
        kind = match[1] if match else ""
        self._counts[kind] += 1
        if not kind or self._counts[kind] <= _most(kind):
            announce(line)

    def finish(self, report: RunReport) -> None:
        """Print what was returned but not announced, and how many lines were left out."""
        for text in (*report.notes, *report.warnings):
            self(remark_line(text))
        for name, reason in report.failed.items():
            self(failure_line(name, reason))
        for kind, count in self._counts.items():
            more = count - _most(kind)
            if kind and more > 0:
                noun = "" if kind == FAILED else severity_of(kind)
                what = format_count(more, f"more {noun}") if noun else f"{more} more"
                announce(f"{kind}: {what}{_where(report)}")


def _most(kind: str) -> int:
    return MAX_FAILURES if kind == FAILED else MAX_REMARKS


def _where(report: RunReport) -> str:
    """Return where all lines are listed, if the command wrote a table."""
    tables = [path for path in report.paths.values() if path.suffix == ".csv"]
    return f"; {tables[0]} has all of them" if tables else "; --json lists all of them"

"""The time budget of a command, counted from its start."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path


class OutOfTimeError(Exception):
    """Work was stopped because its time was over; what was done until then is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeBudget:
    """The total seconds of a call (None: no limit), from `started` (`time.monotonic`)."""

    seconds: float | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def ends(self) -> float:
        """The `time.monotonic` time at which the budget ends; infinite without a limit."""
        return math.inf if self.seconds is None else self.started + self.seconds

    def spent(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self.started

    def left(self, reserved: float = 0.0) -> float | None:
        """Return the seconds left minus those reserved, at least 1; None without a limit."""
        return None if self.seconds is None else max(1.0, self.seconds - self.spent() - reserved)


def process_age(root: Path = Path("/")) -> float:
    """Return the seconds since this process started, including the start of Python itself.

    Args:
        root: where `proc` is mounted. Without it (not Linux), the CPU time is returned instead.
    """
    try:
        uptime = float((root / "proc/uptime").read_text(encoding="ascii").split()[0])
        # The program name, in parentheses, may contain anything; the start is the 22nd field.
        fields = (root / "proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return max(0.0, uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, AttributeError):
        return time.process_time()

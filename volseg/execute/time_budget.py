"""How much of a time budget is left, counted from when the command was started."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path


class OutOfTime(Exception):
    """Something was stopped because its time was over; what was done until then counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeBudget:
    """Seconds that a call may take in all; `seconds` None for no limit. `started` is a time of `time.monotonic`."""

    seconds: float | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def ends(self) -> float:
        """The time of `time.monotonic` at which it is over; infinite without a limit."""
        return math.inf if self.seconds is None else self.started + self.seconds

    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def left(self, reserved: float = 0.0) -> float | None:
        """Seconds until the end less those reserved for later, at least one; None without a limit."""
        return None if self.seconds is None else max(1.0, self.seconds - self.spent() - reserved)


def process_age(root: Path = Path("/")) -> float:
    """Seconds since this process was started, such as those in which Python and its packages were loaded.

    Args:
        root: where `proc` is mounted. Without it (not Linux), the CPU time that the process has used.
    """
    try:
        uptime = float((root / "proc/uptime").read_text(encoding="ascii").split()[0])
        # The name of the program, in parentheses, may hold anything; the start is the 22nd field.
        fields = (root / "proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return max(0.0, uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, AttributeError):
        return time.process_time()

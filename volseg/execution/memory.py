"""Peak memory: announced before the work, which is refused if the budget is too small."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from volseg.errors import ScanError
from volseg.execution.cpu import (
    enough_bytes,
    release_large_blocks,
    resident_bytes,
    trim_freed_memory,
)

LIBRARIES = 110 << 20  # bytes of libraries that are imported when needed
PROCESS_GROWTH = 1.1  # steps in which process memory is counted, to announce fewer changes


@dataclass(frozen=True, slots=True)
class Peak:
    """Peak memory of a piece of work in bytes, by purpose."""

    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in self.parts.items())
        return f"{self.total / 2**30:.2f} GB ({parts})"


def announcement(peak: object, name: str) -> str:
    """Format a line for the user: the memory that the largest case takes."""
    return f"memory: at most {peak}, for {name}"


def over_budget(problem: str, max_ram: int, *, enough: int, otherwise: str) -> ScanError:
    """Return the error for work that does not fit.

    Args:
        problem: the work and the memory it takes.
        max_ram: budget in bytes.
        enough: bytes that would be enough.
        otherwise: an alternative to more memory.
    """
    return ScanError(
        f"{problem}, and the budget is {max_ram / 2**30:.2f} GB",
        fix=f"give --max-ram {enough_bytes(enough)}, or {otherwise}",
        code="E_RAM",
    )


class Budget:
    """The memory budget of a batch whose cases run one after another.

    Args:
        max_ram: bytes of main memory; None for no limit.
        what: the work on a case, e.g. `measuring this mask`.
        otherwise: an alternative if a case takes too much.
        libraries: bytes of libraries that will be imported.
    """

    def __init__(
        self,
        max_ram: int | None,
        announce: Callable[[str], None],
        *,
        what: str,
        otherwise: str,
        libraries: int = LIBRARIES,
    ) -> None:
        release_large_blocks()
        trim_freed_memory()
        self.max_ram = max_ram
        self._announce, self._what, self._otherwise = announce, what, otherwise
        self._announced = 0
        self._process = resident_bytes() + libraries

    @property
    def process(self) -> int:
        """Bytes of the process before the next case, including libraries and earlier rows."""
        trim_freed_memory()
        while self._process < resident_bytes():
            self._process = round(PROCESS_GROWTH * self._process)
        return self._process

    def refusal(self, peak: Peak, *, enough: int | None = None) -> ScanError | None:
        """Return why a case is not started; None if it fits.

        Args:
            enough: bytes that would be enough, if more than this peak.
        """
        if self.max_ram is None or peak.total <= self.max_ram:
            return None
        problem = f"{self._what} takes up to {peak}"
        return over_budget(
            problem, self.max_ram, enough=enough or peak.total, otherwise=self._otherwise
        )

    def announce(self, peak: Peak, name: str) -> None:
        """Announce a peak to the user, unless a larger one was announced before."""
        if peak.total > self._announced:
            self._announced = peak.total
            self._announce(announcement(peak, name))

    def refused(self, peaks: Mapping[str, Peak]) -> dict[str, ScanError]:
        """Return an error for each case that does not fit; announce the largest of the others."""
        refusals = {
            name: refusal
            for name, peak in peaks.items()
            if (refusal := self.refusal(peak)) is not None
        }
        fitting = peaks.keys() - refusals.keys()
        if fitting:
            largest = max(sorted(fitting), key=lambda name: peaks[name].total)
            self.announce(peaks[largest], largest)
        return refusals

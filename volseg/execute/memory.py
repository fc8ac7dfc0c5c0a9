"""Peaks of main memory: announced before the work that takes them, or refused where a budget is too small."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from volseg.errors import ScanError
from volseg.execute.cpu import (
    enough_bytes,
    give_back_freed_memory,
    give_back_large_blocks,
    resident_bytes,
)

LIBRARIES = 110 << 20  # bytes of those that are imported when they are needed
PROCESS_GROWTH = (
    1.1  # steps in which what a process holds is counted, so that not every case is announced
)


@dataclass(frozen=True, slots=True)
class Peak:
    """Bytes at the peak of a piece of work, by what they are for."""

    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        listed = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in self.parts.items())
        return f"{self.total / 2**30:.2f} GB ({listed})"


def announcement(peak: object, name: str) -> str:
    """A line for the user: what the largest case takes."""
    return f"memory: at most {peak}, for {name}"


def over_budget(problem: str, max_ram: int, *, enough: int, otherwise: str) -> ScanError:
    """The refusal of work that does not fit.

    Args:
        problem: what takes how much. max_ram: bytes of the budget. enough: bytes that would do. otherwise: what else to do.
    """
    return ScanError(
        f"{problem}, and the budget is {max_ram / 2**30:.2f} GB",
        fix=f"give --max-ram {enough_bytes(enough)}, or {otherwise}",
        code="E_RAM",
    )


class Budget:
    """What the cases of a batch may take one after another, and what was announced of it.

    Args:
        max_ram: bytes of main memory; None for no limit.
        what: the work on a case, such as `measuring this mask`. otherwise: what to do where it takes too much.
        libraries: bytes of those that are imported meanwhile.
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
        give_back_large_blocks()
        give_back_freed_memory()
        self.max_ram = max_ram
        self._announce, self._what, self._otherwise = announce, what, otherwise
        self._announced = 0
        self._process = resident_bytes() + libraries

    @property
    def process(self) -> int:
        """Bytes for the process before the next case: its libraries, also those that it will import, and rows of the cases before."""
        give_back_freed_memory()
        while self._process < resident_bytes():
            self._process = round(PROCESS_GROWTH * self._process)
        return self._process

    def refusal(self, peak: Peak, *, enough: int | None = None) -> ScanError | None:
        """Why a case is not begun; None if it fits.

        Args:
            enough: bytes that would do, where they are more than this peak.
        """
        if self.max_ram is None or peak.total <= self.max_ram:
            return None
        problem = f"{self._what} takes up to {peak}"
        return over_budget(
            problem, self.max_ram, enough=enough or peak.total, otherwise=self._otherwise
        )

    def announce(self, peak: Peak, name: str) -> None:
        """Tell the user, unless as much was announced before."""
        if peak.total > self._announced:
            self._announced = peak.total
            self._announce(announcement(peak, name))

    def refused(self, peaks: Mapping[str, Peak]) -> dict[str, ScanError]:
        """The cases that do not fit, and why; announces the largest of the others."""
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

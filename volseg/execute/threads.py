"""How many threads are fastest on a CPU that others may use as well."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

COUNTED = 2  # steps of each number of threads, after a first one that is not counted
AGAIN_SECONDS = 30.0  # after which the numbers next to the best one are tried again, and twice as long after each time
MUCH_SLOWER = 3.0  # times the seconds of the best number, after which one step of another is enough


class Threads:
    """Finds the number of threads with which a step takes least time, and looks again from time to time.

    Threads that share the work of a step wait for the slowest of them. Where other programs use the same cores, that one
    may not run for many milliseconds at each of hundreds of waits, and two threads can be ten times slower than one.

    Args:
        most: threads at most.
        apply: sets the number.
        first: with which it begins; None for `most`.
        clock: gives the time in seconds.
    """

    def __init__(
        self,
        most: int,
        apply: Callable[[int], None],
        *,
        first: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most, self._apply, self._clock = most, apply, clock
        self._wait = AGAIN_SECONDS
        self._seconds: dict[int, float] = {}  # number of threads → seconds per step, of this round
        self.is_settled = most == 1
        self._settled_at = clock()
        self._change(most if first is None else first)

    @property
    def fastest(self) -> float:
        """Seconds of a step with the best number of a round of trials that is not over; infinite where there is none."""
        return math.inf if self.is_settled else min(self._seconds.values(), default=math.inf)

    def begin(self) -> None:
        """Say that the steps from now on are of another network: what was measured in a round begun before is void."""
        if not self.is_settled:
            self._change(min(self._seconds, key=lambda n: self._seconds[n], default=self.n))
            self._seconds = {}

    def took(self, seconds: float) -> None:
        """Say how long the last step took; the number for the next one is set."""
        if self._most == 1:
            return
        if self.is_settled:
            if self._clock() - self._settled_at >= self._wait:
                self._wait *= 2
                self.is_settled, self._timed, self._seconds = False, [], {}
            return
        self._timed.append(seconds)
        is_slow = seconds > MUCH_SLOWER * min(self._seconds.values(), default=math.inf)
        if len(self._timed) <= COUNTED and not is_slow:
            return
        self._seconds[self.n] = statistics.median(self._timed[1:] or self._timed)
        best = min(self._seconds, key=lambda n: self._seconds[n])
        nearby = (best // 2, min(2 * best, self._most))
        untried = [n for n in nearby if n >= 1 and n not in self._seconds]
        self._change(untried[0] if untried else best)
        self.is_settled, self._settled_at = not untried, self._clock()

    def _change(self, n: int) -> None:
        self.n, self._timed = n, list[float]()
        self._apply(n)

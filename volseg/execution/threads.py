"""Search for the fastest number of threads on a CPU shared with other programs."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

TIMED_STEPS = 2  # per number of threads, after a first one that is ignored
AGAIN_SECONDS = 30.0  # until the neighbours of the best number are retried; doubles each time
MUCH_SLOWER = 3.0  # times the best: then one step of a number of threads is enough


class Threads:
    """A search for the number of threads with the shortest step, repeated from time to time.

    Threads wait for the slowest of them hundreds of times per step. If other programs use the same
    cores, each wait may last many milliseconds, and two threads can be ten times slower than one.

    Args:
        most: maximum number of threads.
        apply: sets the number of threads.
        first: number to start with; None for `most`.
        clock: returns the time in seconds.
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
        self._seconds: dict[int, float] = {}  # threads → seconds per step, in this round
        self.is_settled = most == 1
        self._settled_at = clock()
        self._change(most if first is None else first)

    @property
    def fastest(self) -> float:
        """Fastest seconds per step in the current round of trials; infinite without one."""
        return math.inf if self.is_settled else min(self._seconds.values(), default=math.inf)

    def begin(self) -> None:
        """Start timing another network: discard the measurements of an unfinished round."""
        if not self.is_settled:
            self._change(min(self._seconds, key=lambda n: self._seconds[n], default=self.n))
            self._seconds = {}

    def took(self, seconds: float) -> None:
        """Record how long the last step took; set the number of threads for the next one."""
        if self._most == 1:
            return
        if self.is_settled:
            if self._clock() - self._settled_at >= self._wait:
                self._wait *= 2
                self.is_settled, self._timed, self._seconds = False, [], {}
            return
        self._timed.append(seconds)
        is_slow = seconds > MUCH_SLOWER * min(self._seconds.values(), default=math.inf)
        if len(self._timed) <= TIMED_STEPS and not is_slow:
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

"""Progress on stderr: bars on a terminal, a few lines a minute in a log."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from volseg import options
from volseg.cli.show import announce
from volseg.terminal import one_line

SILENT_SECONDS = 20  # after which a line says that a step is still running
SECONDS_PER_LINE = 15  # of progress, where stderr is not a terminal


@contextmanager
def progress_on_stderr(first_stage: str = "") -> Iterator[options.Progress]:
    """Yield a progress callback that draws a bar per stage, or logs lines, on stderr.

    Lines are for a stderr that is not a terminal. `first_stage` runs before the first call.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        with Lines(first_stage) as lines:
            yield lines.show
        return
    layout = (
        TextColumn("{task.description}", markup=False),  # a path such as a[/b] is not markup
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
    )
    with Progress(*layout, console=console) as progress:
        bars: dict[str, TaskID] = {}

        def show(stage: str, fraction: float, detail: str) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage, total=1.0, detail="")
            elif fraction == 0:
                progress.reset(bars[stage])  # the remaining time is estimated from here
            progress.update(bars[stage], completed=fraction, detail=one_line(detail))

        yield show


class Lines:
    """Progress for a log file: stage, percentage and remaining time, a few times a minute.

    As a context manager, it also reports a step that takes long and is still running.
    """

    def __init__(self, stage: str = "") -> None:
        self._stage, self._began, self._first = stage, time.monotonic(), 0.0
        self._last_line = self._last_update = self._began
        self._detail, self._is_over = "loading packages", threading.Event()
        self._thread = threading.Thread(target=self._watch, name="volseg-progress", daemon=True)

    def __enter__(self) -> Lines:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(1.0):
            now = time.monotonic()
            if self._stage and now - self._last_line >= SILENT_SECONDS:
                self._last_line = now
                waited = timedelta(seconds=round(now - self._last_update))
                announce(f"{self._stage}: still running after {waited}, {self._detail}")

    def show(self, stage: str, fraction: float, detail: str) -> None:
        now = time.monotonic()
        self._last_update, self._detail = now, detail
        if stage != self._stage or fraction == 0:
            self._stage, self._began, self._first = stage, now, fraction
        if now - self._last_line < SECONDS_PER_LINE:
            return
        self._last_line = now
        gained = fraction - self._first  # an earlier call may have done part of the stage
        seconds = round((now - self._began) * (1 - fraction) / gained) if gained > 0 else None
        left = "" if seconds is None else f", {timedelta(seconds=seconds)} left"
        announce(f"{stage}: {fraction:.0%}{left}, {detail}")

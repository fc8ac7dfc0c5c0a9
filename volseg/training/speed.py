"""Measure how long a training step takes on this machine."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from volseg.execution.threads import Threads
from volseg.training.loop import start_run
from volseg.training.objective import Objective
from volseg.training.ranks import Team
from volseg.training.run import Job
from volseg.training.schedule import RunSettings

MOST_STEPS = 12  # timed steps, after a warm-up step that allocates memory and selects kernels
MOST_SECONDS = 3.0  # no further step is timed after these
LONG_SECONDS = 60.0  # a warm-up step longer than this is the result
SETTLING_SECONDS = 40.0  # limit for finding the fastest number of threads


def seconds_per_step(
    objective: Objective,
    team: Team,
    *,
    seed: int = 0,
    threads: Threads | None = None,
    until: float = math.inf,
    tick: Callable[[str], None] = lambda doing: None,
) -> float:
    """Return the seconds of one training step of the objective's network.

    A step cuts and augments its patches, runs forward and backward, and updates the weights. The
    trained weights are discarded.

    Args:
        objective: one training case is enough, and validation cases are not needed.
        team: called in the process that leads it, with the others serving.
        threads: the search for the fastest number of threads, which is finished first.
        until: time of `time.monotonic` after which only indispensable steps are started.
        tick: called after each step.
    """
    settings = RunSettings(seed=seed, epochs=1, patience=1)
    job = Job(objective=objective, settings=settings, checkpoints=Path())
    run = start_run(job, team, identity="timed")
    run.network.train()
    if threads is not None:
        threads.begin()
    seconds: list[float] = []
    started = time.monotonic()
    with run.batches:
        while not _is_enough(seconds, time.monotonic() - started, until, threads):
            was_settled = threads is None or threads.is_settled
            began = time.monotonic()
            with team.in_step():
                loss = run.step(team.broadcast(0.0))
            float(loss)  # waits for a GPU
            seconds.append(time.monotonic() - began)
            tick("timing a step")
            if threads is not None:
                threads.took(seconds[-1])
            if not was_settled and threads is not None and threads.is_settled:
                seconds = [seconds[0]]  # time the settled number of threads only
        team.broadcast(None)
    fastest = math.inf if threads is None else threads.fastest
    return min(fastest, statistics.median(seconds[1:] or seconds))


def _is_enough(
    seconds: Sequence[float], elapsed: float, until: float, threads: Threads | None
) -> bool:
    """Tell whether these step times, measured in `elapsed` seconds, suffice for a median."""
    if len(seconds) < 2:
        return sum(seconds) > LONG_SECONDS
    if time.monotonic() > until:
        return True
    if threads is not None and not threads.is_settled:
        return elapsed > SETTLING_SECONDS
    return len(seconds) > MOST_STEPS or sum(seconds[1:]) > MOST_SECONDS

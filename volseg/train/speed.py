"""How long a step of training takes here and now, found out by a few of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from volseg.execute.threads import Threads
from volseg.io.prepared import PreparedCase
from volseg.plan import Plan
from volseg.recipe import Recipe
from volseg.train.loop import Job, Run, RunSettings
from volseg.train.ranks import Team

MOST_STEPS = 12  # that are timed, after a first one in which memory and kernels are found
MOST_SECONDS = 3.0  # after which no further one is timed
LONG_SECONDS = 60.0  # of the first step, which is then itself the answer
SETTLING_SECONDS = 40.0  # after which the number of threads is looked for no longer


def seconds_per_step(
    training: Sequence[PreparedCase],
    recipe: Recipe,
    plan: Plan,
    *,
    team: Team,
    seed: int = 0,
    threads: Threads | None = None,
    until: float = math.inf,
    tick: Callable[[str], None] = lambda doing: None,
) -> float:
    """Seconds of one step of the recipe's network with this plan: cutting, augmenting, forward, backward, optimizer.

    Nothing of it is kept.

    Args:
        training: cases of which patches are cut; one is enough.
        team: called in the process that leads it, with the others serving.
        threads: whose fastest number is found first.
        until: a time of `time.monotonic` after which no step is begun that the answer can do without.
        tick: called after each step.
    """
    settings = RunSettings(seed=seed, epochs=1, patience=1)
    job = Job(training, recipe, plan, settings, Path(), {}, "timed", resume=False)
    if team.size > 1:
        team.tell(job.sent())
    run = Run(job, team)
    run.network.train()
    if threads is not None:
        threads.begin()
    taken: list[float] = []
    started = time.monotonic()
    with run.batches:
        while not _is_enough(taken, time.monotonic() - started, until, threads):
            was_settled = threads is None or threads.is_settled
            began = time.monotonic()
            with team.in_step():
                loss = run.step(team.tell(0.0))
            float(loss)  # waits for a GPU
            taken.append(time.monotonic() - began)
            tick("timing a step")
            if threads is not None:
                threads.took(taken[-1])
            if not was_settled and threads is not None and threads.is_settled:
                taken = [taken[0]]  # the others are to be with the threads of now
        team.tell(None)
    fastest = math.inf if threads is None else threads.fastest
    return min(fastest, statistics.median(taken[1:] or taken))


def _is_enough(
    taken: Sequence[float], passed: float, until: float, threads: Threads | None
) -> bool:
    """Whether the steps that were taken in the seconds that passed tell how long one takes."""
    if len(taken) < 2:
        return sum(taken) > LONG_SECONDS
    if time.monotonic() > until:
        return True
    if threads is not None and not threads.is_settled:
        return passed > SETTLING_SECONDS
    return len(taken) > MOST_STEPS or sum(taken[1:]) > MOST_SECONDS

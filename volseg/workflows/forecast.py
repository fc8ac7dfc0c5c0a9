"""What a training takes, found out on its first case before the others are touched."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from volseg.errors import VolsegError
from volseg.execute.threads import Threads
from volseg.inputs import read_json
from volseg.io.cases import Case, survey_cases
from volseg.io.prepared import CASE_FILE, PreparedCase, read_prepared_case
from volseg.recipe import Recipe
from volseg.store.outputs import OutputFolder
from volseg.workflows.batch import Inputs, Progress, silent
from volseg.workflows.planning import auto_recipe
from volseg.workflows.preparing import (
    HASHING,
    LOOKING,
    MASKS,
    PREPARED_FILE,
    PREPARING,
    case_key,
    inputs_of,
    look_at,
    prepare_case,
    training_cases,
)

if TYPE_CHECKING:  # torch takes seconds to import; only a workflow that needs it pays
    from volseg.plan import CaseFingerprint, Plan
    from volseg.sizing import Budget
    from volseg.train.ranks import Team

TIMED_CASES = (
    3  # at most, where one alone says that the time is too short: the first loads packages as well
)
TIMING_SECONDS = 10.0  # after which no further case is timed
LOOKED_SECONDS = 4.0  # for a look at further masks: how large lesions are decides how large patches and the network are
GUARDED_SECONDS = 5.0  # of a stage, before which its pace says little
STAGES = (MASKS, HASHING, LOOKING, PREPARING)  # in the order in which they come


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What is ahead.

    Args:
        n_cases: to train and to validate on.
        stages: seconds of each of `STAGES` for the whole dataset, less what an earlier call did of it.
        step: seconds of a step of the smallest network that can learn.
        flops: floating-point operations per second that it reaches; None for a network that is not modelled.
    """

    n_cases: int
    stages: Mapping[str, float]
    step: float
    flops: float | None

    @property
    def preparing(self) -> float:
        """Seconds until the first step of training."""
        return sum(self.stages.values())

    def after(self, stage: str) -> float:
        """Seconds of the stages that follow."""
        later = STAGES[STAGES.index(stage) + 1 :]
        return sum(self.stages[name] for name in later)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Timed:
    """One case, prepared by a plan of its own."""

    seconds: Mapping[str, float]  # of each stage
    recipe: Recipe
    plan: Plan
    fingerprint: CaseFingerprint
    prepared: PreparedCase


def forecast_of(
    dataset: Path,
    recipe: Recipe | None,
    plan: Plan | None,
    prepared: Path,
    budget: Budget,
    enough: float,
    *,
    team: Team,
    threads: Threads | None = None,
    until: float = math.inf,
    seed: int,
    progress: Progress = silent,
) -> Forecast | None:
    """Prepare a case of about the median size, take a few steps on it, and reckon what all of them will take.

    The network is that of the plan which follows from this case and as many others as a few seconds allow a look at. Where
    preparing all exceeds `enough` seconds, up to two more cases are timed. None where no case can be used: who prepares
    the dataset says why.

    Args:
        recipe, plan: None where they follow from the data; the recipe then from the timed case alone.
        prepared: folder where cases are prepared, of which an earlier call may have done some.
        budget: memory that training may take.
        until: a time of `time.monotonic` by which the answer is wanted.
    """
    from volseg.plan import combine_fingerprints, make_plan, size_of
    from volseg.train.speed import seconds_per_step

    channels = None if recipe is None else recipe.data.channels
    may_miss = recipe is not None and recipe.data.missing == "empty"
    cases, mistakes = survey_cases(dataset, channels, may_miss=may_miss)
    cases = [case for case in cases if case.reference is not None and case.split != "test"]
    if mistakes or not cases:
        return None
    size = {case.id: _bytes(case) for case in cases}
    missing = [case for case in cases if not (prepared / "cases" / case.id / CASE_FILE).is_file()]
    is_seen = _has_fingerprint(prepared)
    middle = float(np.median([size[case.id] for case in missing or cases]))
    began, rates, timed = time.monotonic(), list[Mapping[str, float]](), None
    stages: dict[str, float] = {}
    for case in sorted(missing or cases, key=lambda case: abs(size[case.id] - middle)):
        progress("Timing the first case", len(rates) / TIMED_CASES, case.id)
        try:
            timed = _time_case(dataset, case, recipe, plan, prepared, budget, seed)
        except VolsegError:  # who prepares the dataset names all of them
            if time.monotonic() - began > TIMING_SECONDS:
                return None
            continue
        rates.append({stage: seconds / size[case.id] for stage, seconds in timed.seconds.items()})
        todo: dict[str, Sequence[Case]] = dict.fromkeys(STAGES, cases)
        todo[PREPARING] = missing
        if is_seen:
            todo[LOOKING] = ()
        if is_seen or recipe is not None:
            todo[MASKS] = ()
        stages = {
            stage: min(rate[stage] for rate in rates) * sum(size[each.id] for each in todo[stage])
            for stage in STAGES
        }
        is_long = time.monotonic() - began > TIMING_SECONDS or time.monotonic() > until
        if sum(stages.values()) <= enough or len(rates) == TIMED_CASES or is_long:
            break
    if timed is None:
        return None
    used = timed.plan
    if plan is None:
        others = [case for case in cases if case.id != timed.prepared.id]
        seen = _look_at_some(
            dataset, others, timed.recipe, seed, min(time.monotonic() + LOOKED_SECONDS, until)
        )
        used = make_plan(combine_fingerprints([timed.fingerprint, *seen]), timed.recipe, budget)
    chosen = used.complete(timed.recipe)
    step = seconds_per_step(
        [timed.prepared],
        chosen,
        used,
        team=team,
        seed=seed,
        threads=threads,
        until=until,
        tick=lambda doing: progress("Timing the first case", 1.0, doing),
    )
    network = size_of(used, timed.recipe)
    flops = None
    if network is not None:
        n, outputs = len(chosen.data.channels), chosen.data.n_outputs
        flops = network.step_flops(n, outputs) * chosen.train.accumulate / step
    return Forecast(n_cases=len(cases), stages=stages, step=step, flops=flops)


def _time_case(
    dataset: Path,
    case: Case,
    recipe: Recipe | None,
    plan: Plan | None,
    prepared: Path,
    budget: Budget,
    seed: int,
) -> _Timed:
    """Everything that happens to a case before training, on this one."""
    from volseg.plan import combine_fingerprints, make_plan

    laps = [time.monotonic()]
    stated = recipe if recipe is not None else auto_recipe(dataset, [case], silent)
    laps.append(time.monotonic())
    placed = next(
        found for found in training_cases(dataset, stated, seed, silent) if found.id == case.id
    )
    digests = Inputs(of_masks=True)
    inputs = inputs_of(placed, digests)
    laps.append(time.monotonic())
    fingerprint = look_at(placed, stated, seed)
    laps.append(time.monotonic())
    chosen = (
        make_plan(combine_fingerprints([fingerprint]), stated, budget)
        if plan is None
        else plan.overruled_by(stated)
    )
    with OutputFolder(prepared, "preprocess") as outputs:
        prepare_case(
            placed, stated, chosen, outputs, case_key(inputs, stated, chosen, seed), seed, digests
        )
    laps.append(time.monotonic())
    seconds: dict[str, float] = dict(zip(STAGES, np.diff(laps).tolist(), strict=True))
    made = read_prepared_case(prepared / "cases", case.id)
    return _Timed(
        seconds=seconds, recipe=stated, plan=chosen, fingerprint=fingerprint, prepared=made
    )


def _look_at_some(
    dataset: Path, cases: Sequence[Case], recipe: Recipe, seed: int, until: float
) -> Iterator[CaseFingerprint]:
    """Cases from all over the list, first its middle, then its quarters, and so on, until a time of `time.monotonic`."""
    placed = {case.id: case for case in training_cases(dataset, recipe, seed, silent)}
    n = len(cases)
    places = dict.fromkeys(
        n * odd // 2**level
        for level in range(1, n.bit_length() + 1)
        for odd in range(1, 2**level, 2)
    )
    for place in places:
        if time.monotonic() > until:
            return
        with suppress(
            VolsegError, KeyError
        ):  # who prepares the dataset names what is wrong with a case
            yield look_at(placed[cases[place].id], recipe, seed)


def _bytes(case: Case) -> int:
    """Of its files, for which the time to read and prepare it is taken to be in proportion."""
    total = 1
    for path in (*case.images.values(), case.reference):
        if path is not None and path.is_file():
            total += path.stat().st_size
    return total


def _has_fingerprint(prepared: Path) -> bool:
    try:
        return "fingerprint" in read_json(prepared / PREPARED_FILE)
    except (OSError, ValueError):
        return False


class Guard:
    """A progress callback that ends a stage as soon as its pace shows that the budget does not hold what is ahead.

    Args:
        ends: the time of `time.monotonic` at which all has to be over.
        least: seconds after the last stage without which nothing can be trained.
        refuse: raises; called with the seconds that are ahead before training.
        clock: gives the time of `time.monotonic`.
    """

    def __init__(
        self,
        progress: Progress,
        forecast: Forecast,
        ends: float,
        least: float,
        refuse: Callable[[float], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._progress, self._forecast, self._ends, self._least = progress, forecast, ends, least
        self._refuse = refuse
        self._clock = clock
        self._stage, self._began, self._last = "", clock(), clock()

    def show(self, stage: str, share: float, detail: str) -> None:
        """Report, and refuse if the time is too short."""
        self._progress(stage, share, detail)
        now = self._clock()
        if stage != self._stage:
            self._stage, self._began = stage, self._last
        self._last = now
        passed = now - self._began
        if stage not in STAGES or share <= 0 or passed < GUARDED_SECONDS:
            return
        ahead = passed * (1 - share) / share + self._forecast.after(stage)
        if share < 1 and now + ahead + self._least > self._ends:
            self._refuse(ahead)

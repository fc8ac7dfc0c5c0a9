"""Forecast the time of a training from its first case, before the others are read."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from volseg.commands.batch import Inputs
from volseg.commands.planning import auto_recipe
from volseg.commands.preparing import (
    ANALYSING,
    HASHING,
    MASKS,
    PREPARED_FILE,
    PREPARING,
    case_inputs,
    case_key,
    look_at,
    prepare_case,
    training_cases,
)
from volseg.errors import VolsegError
from volseg.execution.threads import Threads
from volseg.inputs import read_json
from volseg.io.cases import Case, survey_cases
from volseg.io.prepared import CASE_FILE, PreparedCase, read_prepared_case
from volseg.options import Progress, ignore_progress
from volseg.recipe import Recipe
from volseg.store.outputs import OutputFolder

if TYPE_CHECKING:  # torch takes seconds to import; only a command that needs it pays
    from volseg.planning.fingerprint import CaseFingerprint
    from volseg.sizing import Budget
    from volseg.training.ranks import Team

# At most; used if one case says that the time is too short, as the first also loads packages.
TIMED_CASES = 3
TIMING_SECONDS = 10.0  # after this, no further case is timed
LOOKED_SECONDS = 4.0  # for analysing further masks: lesion size decides patch and network size
GUARDED_SECONDS = 5.0  # of a stage, before its pace is reliable
STAGES = (MASKS, HASHING, ANALYSING, PREPARING)  # in order


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Expected time of the work ahead.

    Args:
        n_cases: cases for training and validation.
        stages: seconds of each of `STAGES` for all cases that no earlier call has prepared.
        step: seconds per training step of the smallest network that can learn.
        flops: floating-point operations per second reached; None if the network is not modelled.
    """

    n_cases: int
    stages: Mapping[str, float]
    step: float
    flops: float | None

    @property
    def preparing(self) -> float:
        """Seconds until the first training step."""
        return sum(self.stages.values())

    def after(self, stage: str) -> float:
        """Sum the seconds of the stages after this one."""
        later = STAGES[STAGES.index(stage) + 1 :]
        return sum(self.stages[name] for name in later)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Timed:
    """One case, prepared with a plan made from it alone."""

    seconds: Mapping[str, float]  # per stage
    recipe: Recipe  # as stated
    closed: Recipe
    fingerprint: CaseFingerprint
    prepared: PreparedCase


def make_forecast(
    dataset: Path,
    recipe: Recipe | None,
    prepared: Path,
    budget: Budget,
    enough: float,
    *,
    team: Team,
    threads: Threads | None = None,
    until: float = math.inf,
    seed: int,
    progress: Progress = ignore_progress,
) -> Forecast | None:
    """Prepare a case of about median size, train a few steps on it and extrapolate to all cases.

    The plan is made from this case and those analysed within `LOOKED_SECONDS`. If preparing all
    cases exceeds `enough` seconds, up to two more are timed.

    Args:
        recipe: None to derive it from the timed case.
        prepared: folder for prepared cases; an earlier call may have prepared some.
        budget: memory for training.
        until: deadline, as a time of `time.monotonic`.

    Returns:
        None if no case can be used; preparing the dataset reports why.
    """
    from volseg.planning.close import close, size_of
    from volseg.planning.fingerprint import combine_fingerprints
    from volseg.training.speed import seconds_per_step

    channels = None if recipe is None else recipe.data.channels
    allow_missing = recipe is not None and recipe.data.missing == "empty"
    cases, mistakes = survey_cases(dataset, channels, allow_missing=allow_missing)
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
            timed = _time_case(dataset, case, recipe, prepared, budget, seed)
        except VolsegError:  # preparing the dataset reports every error
            if time.monotonic() - began > TIMING_SECONDS:
                return None
            continue
        rates.append({stage: seconds / size[case.id] for stage, seconds in timed.seconds.items()})
        todo: dict[str, Sequence[Case]] = dict.fromkeys(STAGES, cases)
        todo[PREPARING] = missing
        if is_seen:
            todo[ANALYSING] = ()
        if is_seen or recipe is not None:
            todo[MASKS] = ()
        stages = {
            stage: min(rate[stage] for rate in rates) * sum(size[case.id] for case in todo[stage])
            for stage in STAGES
        }
        is_long = time.monotonic() - began > TIMING_SECONDS or time.monotonic() > until
        if sum(stages.values()) <= enough or len(rates) == TIMED_CASES or is_long:
            break
    if timed is None:
        return None
    closed = timed.closed
    if timed.recipe.open_keys:
        others = [case for case in cases if case.id != timed.prepared.id]
        deadline = min(time.monotonic() + LOOKED_SECONDS, until)
        fingerprints = _sample_fingerprints(dataset, others, timed.recipe, seed, deadline)
        combined = combine_fingerprints([timed.fingerprint, *fingerprints])
        closed = close(timed.recipe, combined, budget).recipe
    step = seconds_per_step(
        [timed.prepared],
        closed,
        team=team,
        seed=seed,
        threads=threads,
        until=until,
        tick=lambda doing: progress("Timing the first case", 1.0, doing),
    )
    network = size_of(closed)
    flops = None
    if network is not None:
        n, outputs = len(closed.data.channels), closed.data.n_outputs
        flops = network.step_flops(n, outputs) * closed.train.accumulate / step
    return Forecast(n_cases=len(cases), stages=stages, step=step, flops=flops)


def _time_case(
    dataset: Path,
    case: Case,
    recipe: Recipe | None,
    prepared: Path,
    budget: Budget,
    seed: int,
) -> _Timed:
    """Run and time every stage before training on one case."""
    from volseg.planning.close import close
    from volseg.planning.fingerprint import combine_fingerprints

    laps = [time.monotonic()]
    stated = recipe if recipe is not None else auto_recipe(dataset, [case], ignore_progress)
    laps.append(time.monotonic())
    cases = training_cases(dataset, stated, seed, ignore_progress)
    case = next(training_case for training_case in cases if training_case.id == case.id)
    digests = Inputs(of_masks=True)
    inputs = case_inputs(case, digests)
    laps.append(time.monotonic())
    fingerprint = look_at(case, stated, seed)
    laps.append(time.monotonic())
    closed = close(stated, combine_fingerprints([fingerprint]), budget).recipe
    with OutputFolder(prepared, "preprocess") as outputs:
        key = case_key(inputs, closed, seed)
        prepare_case(case, closed, outputs, key, seed, digests)
    laps.append(time.monotonic())
    seconds: dict[str, float] = dict(zip(STAGES, np.diff(laps).tolist(), strict=True))
    prepared_case = read_prepared_case(prepared / "cases", case.id)
    return _Timed(
        seconds=seconds,
        recipe=stated,
        closed=closed,
        fingerprint=fingerprint,
        prepared=prepared_case,
    )


def _sample_fingerprints(
    dataset: Path, cases: Sequence[Case], recipe: Recipe, seed: int, until: float
) -> Iterator[CaseFingerprint]:
    """Yield fingerprints of cases spread over the list, until a deadline."""
    case_of = {case.id: case for case in training_cases(dataset, recipe, seed, ignore_progress)}
    n = len(cases)
    indices = dict.fromkeys(
        n * odd // 2**level
        for level in range(1, n.bit_length() + 1)
        for odd in range(1, 2**level, 2)
    )
    for index in indices:
        if time.monotonic() > until:
            return
        with suppress(VolsegError, KeyError):  # preparing the dataset reports every error
            yield look_at(case_of[cases[index].id], recipe, seed)


def _bytes(case: Case) -> int:
    """Return the size of the case's files; reading and preparing take time in proportion."""
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
    """Progress callback that stops a stage once its pace shows that the time budget is too short.

    Args:
        ends: deadline of the whole run, as a time of `time.monotonic`.
        least: minimum seconds of training after the last stage.
        refuse: raises; called with the seconds left before training can start.
        clock: returns the time of `time.monotonic`.
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

    def show(self, stage: str, fraction: float, detail: str) -> None:
        """Report progress, and refuse if the time is too short."""
        self._progress(stage, fraction, detail)
        now = self._clock()
        if stage != self._stage:
            self._stage, self._began = stage, self._last
        self._last = now
        passed = now - self._began
        if stage not in STAGES or fraction <= 0 or passed < GUARDED_SECONDS:
            return
        ahead = passed * (1 - fraction) / fraction + self._forecast.after(stage)
        if fraction < 1 and now + ahead + self._least > self._ends:
            self._refuse(ahead)

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

from volseg.commands.automatic_recipe import MASKS, auto_recipe
from volseg.commands.batch import REFUSE, Inputs, case_files, of_tilt
from volseg.commands.preparing import HASHING, PREPARED_FILE, PREPARING, Preparation
from volseg.commands.training_cases import ANALYSING, TrainingSet, labelled_cases
from volseg.errors import VolsegError
from volseg.execution.threads import Threads
from volseg.inputs import read_json
from volseg.io.cases import Case
from volseg.io.layouts import survey_cases
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
class Source:
    """The data of a training before they are prepared.

    Args:
        recipe: None to derive it from the timed case.
        prepared: folder for prepared cases; an earlier call may have prepared some.
        budget: memory for training.
    """

    dataset: Path
    recipe: Recipe | None
    prepared: Path
    budget: Budget
    seed: int
    tilt: str = REFUSE


@dataclass(frozen=True, slots=True, kw_only=True)
class _Timed:
    """One case, prepared with a plan made from it alone."""

    seconds: Mapping[str, float]  # per stage
    recipe: Recipe  # as stated
    closed: Recipe
    fingerprint: CaseFingerprint
    prepared: PreparedCase


class _Ahead:
    """The cases ahead. Reading and preparing take time in proportion to the size of the files."""

    def __init__(self, source: Source, cases: Sequence[Case]) -> None:
        folder = source.prepared / "cases"
        missing = [case for case in cases if not (folder / case.id / CASE_FILE).is_file()]
        is_seen = _has_fingerprint(source.prepared)
        todo: dict[str, Sequence[Case]] = dict.fromkeys(STAGES, cases)
        todo[PREPARING] = missing
        if is_seen:
            todo[ANALYSING] = ()
        if is_seen or source.recipe is not None:
            todo[MASKS] = ()
        self._size = {case.id: _bytes(case) for case in cases}
        self._total = {stage: sum(self._size[case.id] for case in todo[stage]) for stage in STAGES}
        self._candidates = missing or cases

    def from_median(self) -> list[Case]:
        """Return the cases to time, those of about median size first."""
        sizes = [self._size[case.id] for case in self._candidates]
        middle = float(np.median(sizes))
        return sorted(self._candidates, key=lambda case: abs(self._size[case.id] - middle))

    def seconds(self, timed: Sequence[_Timed]) -> dict[str, float]:
        """Return the seconds of each stage for all cases, at the fastest pace measured."""
        return {
            stage: min(case.seconds[stage] / self._size[case.prepared.id] for case in timed)
            * self._total[stage]
            for stage in STAGES
        }


def make_forecast(
    source: Source,
    team: Team,
    *,
    enough: float,
    threads: Threads | None = None,
    until: float = math.inf,
    progress: Progress = ignore_progress,
) -> Forecast | None:
    """Prepare a case of about median size, train a few steps on it and extrapolate to all cases.

    The plan is made from this case and those analysed within `LOOKED_SECONDS`. If preparing all
    cases exceeds `enough` seconds, up to two more are timed.

    Args:
        until: deadline, as a time of `time.monotonic`.

    Returns:
        None if no case can be used; preparing the dataset reports why.
    """
    from volseg.planning.close import size_of
    from volseg.training.segmentation import SegmentationObjective
    from volseg.training.speed import seconds_per_step

    cases = _usable_cases(source)
    if not cases:
        return None
    ahead = _Ahead(source, cases)
    timed = _time_cases(source, ahead, enough=enough, until=until, progress=progress)
    if not timed:
        return None
    closed = _closed(source, timed[-1], cases, until)
    step = seconds_per_step(
        SegmentationObjective([timed[-1].prepared], (), closed),
        team,
        seed=source.seed,
        threads=threads,
        until=until,
        tick=lambda doing: progress("Timing the first case", 1.0, doing),
    )
    network = size_of(closed)
    flops = None
    if network is not None:
        n, outputs = len(closed.data.channels), closed.data.n_outputs
        flops = network.step_flops(n, outputs) * closed.train.accumulate / step
    return Forecast(n_cases=len(cases), stages=ahead.seconds(timed), step=step, flops=flops)


def _usable_cases(source: Source) -> list[Case]:
    """Return the cases for training and validation; none if the dataset has mistakes."""
    recipe = source.recipe
    channels = None if recipe is None else recipe.data.channels
    allow_missing = recipe is not None and recipe.data.missing == "empty"
    survey = survey_cases(source.dataset, channels, allow_missing=allow_missing)
    return [] if survey.mistakes else labelled_cases(survey.cases)


def _time_cases(
    source: Source, ahead: _Ahead, *, enough: float, until: float, progress: Progress
) -> list[_Timed]:
    """Time one case, or up to `TIMED_CASES` while more than `enough` seconds are expected."""
    began, timed = time.monotonic(), list[_Timed]()
    for case in ahead.from_median():
        progress("Timing the first case", len(timed) / TIMED_CASES, case.id)
        try:
            timed.append(_time_case(source, case))
        except VolsegError:  # preparing the dataset reports every error
            if time.monotonic() - began > TIMING_SECONDS:
                return []
            continue
        is_long = time.monotonic() - began > TIMING_SECONDS or time.monotonic() > until
        if is_long or len(timed) == TIMED_CASES or sum(ahead.seconds(timed).values()) <= enough:
            break
    return timed


def _time_case(source: Source, case: Case) -> _Timed:
    """Run and time every stage before training on one case."""
    from volseg.planning.close import close
    from volseg.planning.fingerprint import combine_fingerprints

    stated = source.recipe
    laps = [time.monotonic()]
    if stated is None:
        stated = auto_recipe(source.dataset, of_tilt([case], source.tilt))
    laps.append(time.monotonic())
    data = TrainingSet(source.dataset, stated, source.seed, source.tilt)
    case = next(training_case for training_case in data.cases() if training_case.id == case.id)
    digests = Inputs(of_masks=True)
    digests.of(case)
    laps.append(time.monotonic())
    fingerprint = data.analyse(case)
    laps.append(time.monotonic())
    closed = close(stated, combine_fingerprints([fingerprint]), source.budget).recipe
    with OutputFolder(source.prepared, "preprocess") as outputs:
        Preparation(data, closed, outputs, digests).prepare(case)
    laps.append(time.monotonic())
    return _Timed(
        seconds=dict(zip(STAGES, np.diff(laps).tolist(), strict=True)),
        recipe=stated,
        closed=closed,
        fingerprint=fingerprint,
        prepared=read_prepared_case(source.prepared / "cases", case.id),
    )


def _closed(source: Source, timed: _Timed, cases: Sequence[Case], until: float) -> Recipe:
    """Return the recipe closed with the timed case, and others if they decide open values."""
    from volseg.planning.close import close
    from volseg.planning.fingerprint import combine_fingerprints

    if not timed.recipe.open_keys:
        return timed.closed
    others = [case for case in cases if case.id != timed.prepared.id]
    deadline = min(time.monotonic() + LOOKED_SECONDS, until)
    data = TrainingSet(source.dataset, timed.recipe, source.seed, source.tilt)
    fingerprints = _sample_fingerprints(data, others, deadline)
    combined = combine_fingerprints([timed.fingerprint, *fingerprints])
    return close(timed.recipe, combined, source.budget).recipe


def _sample_fingerprints(
    data: TrainingSet, cases: Sequence[Case], until: float
) -> Iterator[CaseFingerprint]:
    """Yield fingerprints of cases spread over the list, until a deadline."""
    case_of = {case.id: case for case in data.cases()}
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
            yield data.analyse(case_of[cases[index].id])


def _bytes(case: Case) -> int:
    """Return the size of the case's files, at least 1."""
    return 1 + sum(path.stat().st_size for path in case_files(case) if path.is_file())


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

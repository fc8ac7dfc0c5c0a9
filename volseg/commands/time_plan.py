"""The time budget of a training: foreseen, refused, fitted and divided among its networks."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from volseg.commands.earlier import Fitted, read_fitted, write_fitted
from volseg.commands.fitting import (
    Fit,
    Folds,
    TooShortError,
    best_plan,
    fit_to_time,
    refuse_time,
    suggested,
)
from volseg.commands.forecast import Forecast, Guard, Source, make_forecast
from volseg.commands.training_call import Call
from volseg.options import Progress
from volseg.planning.close import Closed, close, fill, step_flops
from volseg.recipe import Recipe
from volseg.sizing import LEAST_STEPS
from volseg.training.loop import Trained
from volseg.training.segmentation import SegmentationObjective
from volseg.training.speed import seconds_per_step
from volseg.words import duration, format_count, format_sizes

if TYPE_CHECKING:
    from volseg.commands.training_data import TrainingData

# Time reserved for export and pictures: this fraction of the budget up to these seconds, but at
# least `FINISHING_LEAST` seconds for the pictures and each network, within `FINISHING_MOST`.
FINISHING_FRACTION, FINISHING_SECONDS = 0.03, 60.0
FINISHING_LEAST, FINISHING_MOST = 3.0, 0.1
STEPS_FRACTION = 0.7  # of a network's time spent in steps; validation takes the remainder
# More than one case is timed if preparing exceeds this fraction of the budget.
PREPARING_FRACTION = 0.5
# A budget that is too short is refused by then, if the first case can be timed so soon.
ANSWER_SECONDS = 18.0
# Preparing first is suggested if it takes at least this fraction of the time still needed.
PREPARE_FIRST_FRACTION = 0.2
# Once the data are prepared, training starts even if only this fraction of the steps fits.
LATE_FRACTION = 0.5
STARTING_SECONDS = 20.0  # to load Python and its packages from a slow disk, in suggested budgets
FINE_TUNING_STEPS = 20  # that a network initialised from a trained one needs at least


@dataclass(frozen=True, slots=True, eq=False)
class TimePlan:
    """How a call of `train` spends its time; without a budget, each part takes what it needs."""

    call: Call

    @property
    def least_steps(self) -> int:
        """Steps that each network needs: fewer for fine-tuning or with few epochs."""
        options = self.call.options
        least = LEAST_STEPS if options.init is None else FINE_TUNING_STEPS
        return least if options.epochs is None else min(least, options.epochs)  # an epoch has ≥ 1

    def least_seconds(self, step: float, recipe: Recipe | None) -> float:
        """Return the seconds from the first step to the end without which no network can learn."""
        networks = self.call.options.folds or 1
        steps = networks * self.least_steps * step
        return self.finishing(networks) + steps / _steps_fraction(recipe)

    def finishing(self, networks: int) -> float:
        """Return the seconds of the time budget reserved for export and pictures."""
        seconds = self.call.time.seconds or 0.0
        usual = min(FINISHING_FRACTION * seconds, FINISHING_SECONDS)
        return max(usual, min(FINISHING_LEAST * (1 + networks), FINISHING_MOST * seconds))

    def foresee(self, recipe: Recipe | None) -> Outlook | None:
        """Forecast the time needed from the first case.

        Returns:
            None without a time budget, or for a resumed run.

        Raises:
            VolsegError: the time budget is too short.
        """
        call = self.call
        seconds = call.time.seconds
        if seconds is None or call.options.preview or read_fitted(call.work) is not None:
            return None
        source = Source(
            dataset=call.options.dataset,
            recipe=recipe,
            prepared=call.prepared,
            budget=replace(call.budget(), is_least=True),
            seed=call.options.seed,
            tilt=call.options.tilt,
        )
        forecast = make_forecast(
            source,
            call.team,
            enough=PREPARING_FRACTION * seconds,
            threads=call.threads,
            until=call.time.started + ANSWER_SECONDS,
            progress=call.progress,
        )
        if forecast is None:
            return None
        outlook = Outlook(self, forecast, recipe)
        if call.time.spent() + forecast.preparing + outlook.least > seconds:
            outlook.refuse(forecast.preparing)
        return outlook

    def fit(self, data: TrainingData) -> Fitted:
        """Return how many networks fit the time, and their plan.

        Raises:
            VolsegError: the time is too short for one network to learn.
        """
        options, work, folds = self.call.options, self.call.work, data.folds
        if (earlier := read_fitted(work)) is not None:  # a resumed run
            return Fitted(options.folds or earlier.folds, fill(data.stated, earlier.plan))
        if options.folds is None and folds > 1:
            folds = min(folds, len({case.record["patient"] for case in data.cases}))
        if self.call.time.seconds is None or options.preview:
            return Fitted(folds, data.plan)
        fit = self._fit_time(data, folds)
        fitted = Fitted(fit.folds, fit.plan)
        write_fitted(work, fitted)
        return fitted

    def _fit_time(self, data: TrainingData, folds: int) -> Fit:
        """Fit number and size of the networks to the time left."""
        fraction = _steps_fraction(data.stated)
        seconds = (self.call.time.left(self.finishing(folds)) or 0.0) * fraction
        self.call.progress("Planning", 0.0, f"{duration(self.call.time.left() or 0.0)} left")
        plan, least = data.plan, None
        if data.stated.leaves_size_open:
            plan, least = self._best_and_least(data, seconds, folds)
        is_late = data.forecast is not None and self.call.time.spent() > ANSWER_SECONDS
        networks = Folds(
            n=folds,
            may_drop=self.call.options.folds is None,
            least_steps=self.least_steps,
            enough=LATE_FRACTION if is_late else 1.0,
        )
        try:
            fit = fit_to_time(
                plan, seconds, networks, time_step=partial(self._time_step, data), smaller=least
            )
        except TooShortError as error:
            self._refuse(error.needed / fraction + self.finishing(folds), data)
        self._announce(fit, seconds)
        return fit

    def _best_and_least(
        self, data: TrainingData, seconds: float, folds: int
    ) -> tuple[Closed, Closed]:
        """Return the plan of the best networks for these seconds, and of the smallest."""
        budget = self.call.budget()
        least = close(data.stated, data.fingerprint, replace(budget, is_least=True))
        flops = step_flops(least.recipe)
        assert flops is not None, "a network chosen by the plan has a size"
        speed = None if data.forecast is None else data.forecast.flops
        speed = speed or flops / self._time_step(data, least)

        def plan_for(total: float) -> Closed:
            return close(data.stated, data.fingerprint, replace(budget, flops=total))

        return best_plan(plan_for, least, speed * seconds, folds, flops), least

    def _time_step(self, data: TrainingData, candidate: Closed) -> float:
        call = self.call
        return seconds_per_step(
            SegmentationObjective(data.cases, (), candidate.recipe),
            call.team,
            seed=call.options.seed,
            threads=call.threads,
            tick=lambda doing: call.progress.tick("Planning", 0.5, doing),
        )

    def _refuse(self, needed: float, data: TrainingData) -> NoReturn:
        """Raise an error: the time left is too short for the training itself."""
        call = self.call
        assert call.time.seconds is not None
        stated = call.options.folds or 1
        refuse_time(
            call.time.seconds,
            needed + STARTING_SECONDS,
            f"{self.least_steps} steps for each network with validation take about "
            f"{duration(needed)}",
            remedy=f", or --folds 1 instead of {stated}" if stated > 1 else "",
            kept=_kept(data.folder) if data.folder != call.options.dataset else "",
        )

    def _announce(self, fit: Fit, seconds: float) -> None:
        announce = self.call.options.announce
        for reason in fit.reasons:
            announce(f"time budget: {reason}")
        steps = seconds / fit.folds / fit.seconds_per_step
        patch = format_sizes(fit.plan.recipe.patch_shape)
        per_network = " each" if fit.folds > 1 else ""
        announce(
            f"training {format_count(fit.folds, 'network')} with patches of {patch} voxels, about "
            f"{steps:.0f} steps{per_network}"
        )

    def reserved(self, networks: int, recipe: Recipe) -> float:
        """Return the seconds to keep for what follows the networks: classifier and finishing."""
        seconds = self.finishing(networks)
        if recipe.classify is not None:
            seconds += (self.call.time.left() or 0.0) * recipe.classify.time_fraction
        return seconds

    def affordable(self, waiting: int, left: float | None, trained: Collection[Trained]) -> int:
        """Return how many waiting networks get enough steps at the pace of the trained ones."""
        if left is None or not trained:
            return waiting
        pace = min(
            int(network.metrics["steps"]) / max(1e-3, float(network.metrics["training_seconds"]))
            for network in trained
        )
        n = math.floor(left * STEPS_FRACTION * pace / (LATE_FRACTION * self.least_steps))
        return min(waiting, n)

    def has_time_for(self, stage: str) -> Callable[[str], bool]:
        """Return a callback that reports the next item, and returns False without time for it."""
        began: list[float] = []

        def has_time(name: str) -> bool:
            now = time.monotonic()
            durations = [later - earlier for earlier, later in pairwise([*began, now])]
            if now + max(durations, default=0.0) > self.call.time.ends:
                self.call.options.announce(f"time budget: no time was left for {name}")
                return False
            began.append(now)
            self.call.progress(stage, 1 - 1 / len(began), name)
            return True

        return has_time


@dataclass(frozen=True, slots=True, eq=False)
class Outlook:
    """The time ahead of a training whose data are not prepared yet.

    Args:
        recipe: as stated; None if it is derived from the data.
    """

    times: TimePlan
    forecast: Forecast
    recipe: Recipe | None

    @property
    def least(self) -> float:
        """Seconds from the first step to the end without which no network can learn."""
        return self.times.least_seconds(self.forecast.step, self.recipe)

    def guarded(self, progress: Progress) -> Progress:
        """Return a progress callback that refuses once preparing proves to take too long."""
        ends = self.times.call.time.ends
        return Guard(progress, self.forecast, ends, LATE_FRACTION * self.least, self.refuse).show

    def refuse(self, ahead: float) -> NoReturn:
        """Raise an error: the time is too short for `ahead` seconds of preparing plus training."""
        call, least = self.times.call, self.least
        assert call.time.seconds is not None
        is_smallest = self.recipe is None or self.recipe.leaves_size_open
        network = "the smallest network that can learn" if is_smallest else "the recipe's network"
        is_long = ahead >= PREPARE_FIRST_FRACTION * (ahead + least)
        refuse_time(
            call.time.seconds,
            call.time.spent() + ahead + least,
            f"reading and preparing {format_count(self.forecast.n_cases, 'case')} takes about "
            f"{duration(ahead)} more, and {self.times.least_steps} steps of {network} with "
            f"validation take about {duration(least)}",
            remedy=self._prepare_first() if is_long else "",
            kept=_kept(call.prepared),
        )

    def _prepare_first(self) -> str:
        """Return the advice to prepare the data in a call of its own."""
        options = self.times.call.options
        is_path = isinstance(options.recipe, str | Path)
        recipe = f" --recipe {shlex.quote(str(options.recipe))}" if is_path else ""
        absolute = options.out.resolve()  # as `.` and `..` have no name
        folder = absolute.parent / f"{absolute.name or 'model'}_prepared"
        source, apart, out = (shlex.quote(str(p)) for p in (options.dataset, folder, options.out))
        shorter = suggested(STARTING_SECONDS + self.least)
        return (
            f"; or prepare the data first: volseg preprocess {source}{recipe} --out {apart}, "
            f"and then volseg train {apart} --out {out} --time-budget {shorter}"
        )


def _kept(prepared: Path) -> str:
    return f"; the prepared data are kept in {prepared} for the next call with this --out"


def _steps_fraction(recipe: Recipe | None) -> float:
    """Return the fraction of the training time spent in steps of the fine networks."""
    if recipe is None:
        return STEPS_FRACTION
    others = [part.time_fraction for part in (recipe.roi, recipe.classify) if part is not None]
    return STEPS_FRACTION * (1 - sum(others))

"""The time budget of a training on images: refused with a number if no network can learn in it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from volseg.commands.fitting import refuse_time
from volseg.commands.forecast import GUARDED_SECONDS
from volseg.commands.image_data import PREPARING, READING
from volseg.commands.time_plan import FINE_TUNING_STEPS, FINISHING_FRACTION, FINISHING_SECONDS
from volseg.commands.training_call import Call
from volseg.recipe import ClassifyRecipe
from volseg.recipe.section import closed
from volseg.sizing import LEAST_STEPS
from volseg.words import duration

if TYPE_CHECKING:  # torch takes seconds to import; only a command that needs it pays
    from volseg.training.images import ImageObjective

BASELINE_SECONDS = 120.0  # at most, for all of them
STAGES = (READING, PREPARING)  # in order; each takes about the same time
FORWARD = 0.5  # time to predict an image, in parts of that to learn from it; a third is usual
TIMING_FRACTION = 0.1  # of the budget, after which no further step is timed


@dataclass(frozen=True, slots=True, eq=False)
class ImageTime:
    """How a training on images spends its time; without a budget, each part takes what it needs."""

    call: Call

    def baselines(self, recipe: ClassifyRecipe) -> float:
        """Return the seconds for all baselines."""
        if not recipe.train.baselines:
            return 0.0
        seconds = self.call.time.seconds
        if seconds is None:
            return BASELINE_SECONDS
        return min(BASELINE_SECONDS, recipe.train.baseline_fraction * seconds)

    def left(self, recipe: ClassifyRecipe) -> float | None:
        """Return the seconds for the networks: those of baselines, judgement and files are kept."""
        seconds = self.call.time.seconds or 0.0
        finishing = min(FINISHING_FRACTION * seconds, FINISHING_SECONDS)
        return self.call.time.left(self.baselines(recipe) + finishing)

    def check(self, objective: ImageObjective, networks: int) -> None:
        """Time a step, and refuse a budget in which so many networks cannot learn.

        Raises:
            VolsegError: the time left is too short.
        """
        from volseg.training.speed import seconds_per_step

        call, recipe = self.call, objective.recipe
        left = self.left(recipe)
        if left is None or call.time.seconds is None:
            return
        call.progress("Planning", 0.0, f"{duration(left)} left")
        step = seconds_per_step(
            objective,
            call.team,
            seed=call.options.seed,
            threads=call.threads,
            until=time.monotonic() + TIMING_FRACTION * call.time.seconds,
            tick=lambda doing: call.progress.tick("Planning", 0.5, doing),
        )
        steps = self.least_steps(recipe)
        least = networks * steps * self._seconds(step, objective)
        left = self.left(recipe) or 0.0
        if least <= left:
            return
        per_network = f" for each of {networks} networks" if networks > 1 else ""
        kept = 1 - FINISHING_FRACTION
        kept -= recipe.train.baseline_fraction if recipe.train.baselines else 0.0
        is_chosen = networks > 1 and call.options.folds is not None
        refuse_time(
            call.time.seconds,
            (call.time.spent() + least) / kept,
            f"{steps} steps{per_network} with validation take about {duration(least)}, and "
            f"{duration(left)} of it are left",
            remedy=f", or --folds 1 instead of {networks}" if is_chosen else "",
        )

    def least_steps(self, recipe: ClassifyRecipe) -> int:
        """Return the steps that each network needs: fewer for fine-tuning or with few epochs."""
        options = self.call.options
        least = LEAST_STEPS if options.init is None else FINE_TUNING_STEPS
        if options.epochs is None:
            return least
        return min(least, options.epochs * closed(recipe.train.steps_per_epoch))

    def _seconds(self, step: float, objective: ImageObjective) -> float:
        """Return the seconds of a step with its part of the validation after each epoch."""
        train, infer = objective.recipe.train, objective.recipe.infer
        copies = 2 ** len(infer.tta_axes)
        image = FORWARD * step / closed(train.batch_size)
        validation = len(objective.validation_images) * copies * image
        return step + validation / closed(train.steps_per_epoch)

    def guarded(self) -> Callable[[str, float, str], None]:
        """Return a progress callback that refuses once reading proves to take too long."""
        return _Guard(self.call).show


@dataclass(slots=True, eq=False)
class _Guard:
    """Progress of reading and preparing, which ends if the budget is too short for these alone."""

    call: Call
    clock: Callable[[], float] = time.monotonic
    began: dict[str, float] = field(default_factory=dict)

    def show(self, stage: str, fraction: float, detail: str) -> None:
        """Report progress, and refuse if the time is too short."""
        self.call.progress(stage, fraction, detail)
        now, seconds = self.clock(), self.call.time.seconds
        passed = now - self.began.setdefault(stage, now)
        if seconds is None or stage not in STAGES or not 0 < fraction < 1:
            return
        whole = passed / fraction
        ahead = whole - passed + whole * (len(STAGES) - 1 - STAGES.index(stage))
        if passed >= GUARDED_SECONDS and now + ahead > self.call.time.ends:
            refuse_time(
                seconds,
                now - self.call.time.started + ahead,
                f"reading and preparing the images takes about {duration(ahead)} more, before "
                "the first step of training",
                remedy="; or prepare them first, with `volseg preprocess`",
            )

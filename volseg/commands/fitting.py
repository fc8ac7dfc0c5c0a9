"""Fit the number and size of networks to a time budget. Pure: timing comes in as a function."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from volseg.errors import VolsegError
from volseg.sizing import LEAST_STEPS, STEPS
from volseg.words import format_sizes

if TYPE_CHECKING:  # pydantic takes a while to import
    from volseg.planning.close import Closed

ROOM = 2  # each of several networks gets at least this many times `least_steps`
SUGGESTED = 1.5  # times the needed seconds are suggested, as the speed of a machine varies


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The training that fits the time, and the reasons for deviations from the plan."""

    plan: Closed
    folds: int
    seconds_per_step: float
    reasons: Sequence[str] = ()


class TooShortError(Exception):
    """The time is too short for any network to learn; `needed` seconds would suffice."""

    def __init__(self, needed: float) -> None:
        super().__init__(f"{needed:.0f} s are needed")
        self.needed = needed


@dataclass(frozen=True, slots=True, kw_only=True)
class Folds:
    """The networks to train, and what each needs.

    Args:
        n: how many if there is enough time.
        may_drop: False if the user stated the number of folds.
        least_steps: of each network.
        enough: train one network if it gets at least this fraction of its steps.
    """

    n: int
    may_drop: bool
    least_steps: int = LEAST_STEPS
    enough: float = 1.0


def fit_to_time(
    plan: Closed,
    seconds: float,
    folds: Folds,
    *,
    time_step: Callable[[Closed], float],
    smaller: Closed | None = None,
) -> Fit:
    """Give each network `least_steps`: with fewer folds, else with a smaller network.

    Several folds are kept only while each gets `ROOM` times as many steps, so that a machine that
    slows down does not spoil all of them.

    Args:
        plan: what to train if there is enough time.
        seconds: for the steps of all networks together.
        time_step: returns the seconds of a step with a plan.
        smaller: the plan of the smallest network that can learn; None if the recipe states the
            network.

    Raises:
        TooShortError: even the smallest network with the fewest folds gets too few steps.
    """
    n, least_steps = folds.n, folds.least_steps
    fewest = 1 if folds.may_drop else n
    step = time_step(plan)
    steps = seconds / step
    reasons: list[str] = []
    if steps < fewest * least_steps and smaller is not None and smaller.recipe != plan.recipe:
        least_step = time_step(smaller)
        if least_step < step:
            patch = format_sizes(smaller.recipe.patch_shape)
            reasons.append(
                f"a smaller network, patches of {patch} voxels: "
                f"{seconds:.0f} s allow only {steps / fewest:.0f} steps of the planned network"
            )
            plan, step, steps = smaller, least_step, seconds / least_step
    if steps < folds.enough * fewest * least_steps:
        raise TooShortError(fewest * least_steps * step)
    affordable = max(fewest, min(n, math.floor(steps / (ROOM * least_steps))))
    if affordable < n:
        reason = (
            f"{affordable} instead of {n} folds: {seconds:.0f} s allow about "
            f"{steps / n:.0f} steps for each of {n} networks, and each should get at least "
            f"{ROOM * least_steps}"
        )
        reasons.insert(0, reason)
    return Fit(plan=plan, folds=affordable, seconds_per_step=step, reasons=tuple(reasons))


def best_plan(
    plan_for: Callable[[float], Closed],
    smallest: Closed,
    flops: float,
    folds: int,
    step_flops: float,
) -> Closed:
    """Return the best plan with time for `STEPS` steps in each fold, or in one; else the smallest.

    Args:
        plan_for: returns the plan of one network for a number of floating-point operations.
        flops: floating-point operations of all networks together.
        step_flops: those of a step of the smallest plan.
    """
    for n in dict.fromkeys((folds, 1)):
        if flops / n / step_flops >= STEPS:
            return plan_for(flops / n)
    return smallest


def refuse_time(
    seconds: float, needed: float, what: str, *, remedy: str = "", kept: str = ""
) -> NoReturn:
    """Raise an error that suggests a sufficient time budget.

    Args:
        what: what the time is needed for.
        remedy: an alternative to more time.
        kept: what was done so far and is reused next time.
    """
    raise VolsegError(
        f"the time budget of {seconds:g} s is too short: {what}",
        fix=f"give --time-budget {suggested(needed)} or more{remedy}{kept}",
        code="E_BUDGET",
    )


def suggested(needed: float) -> str:
    """Return a value for `--time-budget` that holds the needed seconds, with room."""
    seconds = SUGGESTED * needed
    if seconds < 115:
        return f"{math.ceil(seconds / 10) * 10}s"
    if seconds < 7200:
        return f"{math.ceil(seconds / 60)}m"
    return f"{math.ceil(seconds / 360) / 10:g}h"

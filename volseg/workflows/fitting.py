"""How many networks, and of what size, a time budget holds. Pure: what takes time comes in as a function."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from volseg.errors import VolsegError
from volseg.sizing import LEAST_STEPS, STEPS

if TYPE_CHECKING:  # pydantic takes a while to import
    from volseg.plan import Plan

ROOM = 2  # times the steps that a network needs at least are planned for each of several
SUGGESTED = 1.5  # times what a budget needs is suggested: a machine is not equally fast from one minute to the next


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What is trained, and why it is not what was planned."""

    plan: Plan
    folds: int
    seconds_per_step: float
    reasons: Sequence[str] = ()


class TooShortError(Exception):
    """The time does not hold the least that a network needs to learn; `needed` are the seconds that would."""

    def __init__(self, needed: float) -> None:
        super().__init__(f"{needed:.0f} s are needed")
        self.needed = needed


def fit_to_time(
    plan: Plan,
    seconds: float,
    *,
    folds: int,
    may_drop_folds: bool,
    time_step: Callable[[Plan], float],
    smaller: Callable[[], Plan] | None = None,
    least_steps: int = LEAST_STEPS,
    enough: float = 1.0,
) -> Fit:
    """Give each network `least_steps`: with fewer folds, else with a smaller network.

    Several folds are kept only while each has `ROOM` times as many, so that a machine that gets slower does not spoil all.

    Args:
        plan: what would be trained if there were time enough.
        seconds: of the steps of all networks together.
        folds: networks that would be trained. may_drop_folds: not where the user stated their number.
        time_step: seconds that a step takes with a plan.
        smaller: gives the plan of the smallest network that can learn; None where the network is stated.

        enough: share of these steps with which one network is trained all the same, rather than refused.

    Raises:
        TooShortError: not even the smallest network of the fewest folds has its steps.
    """
    fewest = 1 if may_drop_folds else folds
    taken = time_step(plan)
    steps = seconds / taken
    reasons: list[str] = []
    if steps < fewest * least_steps and smaller is not None:
        least = smaller()
        if least != plan and (least_taken := time_step(least)) < taken:
            reasons.append(
                f"a smaller network, patches of {' × '.join(map(str, least.patch_shape))} voxels: "
                f"{seconds:.0f} s allow only {steps / fewest:.0f} steps of the planned one"
            )
            plan, taken, steps = least, least_taken, seconds / least_taken
    if steps < enough * fewest * least_steps:
        raise TooShortError(fewest * least_steps * taken)
    affordable = max(fewest, min(folds, math.floor(steps / (ROOM * least_steps))))
    if affordable < folds:
        reasons.insert(
            0,
            f"{affordable} instead of {folds} folds: {seconds:.0f} s allow about {steps / folds:.0f} steps in each "
            f"of {folds} networks; at least {ROOM * least_steps} in each are planned",
        )
    return Fit(plan=plan, folds=affordable, seconds_per_step=taken, reasons=tuple(reasons))


def best_plan(
    plan_for: Callable[[float], Plan],
    smallest: Plan,
    flops: float,
    folds: int,
    steps_of: Callable[[Plan, float], float],
) -> Plan:
    """The best network that the time allows `STEPS` steps: each of the folds, else one network; else the smallest.

    Args:
        plan_for: the plan that floating-point operations allow one network.
        flops: that all networks together may take.
        steps_of: how many steps of a plan so many operations are.
    """
    for n in dict.fromkeys((folds, 1)):
        if steps_of(smallest, flops / n) >= STEPS:
            return plan_for(flops / n)
    return smallest


def refuse_time(
    seconds: float, needed: float, what: str, *, remedy: str = "", kept: str = ""
) -> NoReturn:
    """Say that a time budget is too short, how long it should be, and what else would do.

    Args:
        what: for what the time is needed.
        remedy: another way than more time. kept: what was done and is used next time.
    """
    raise VolsegError(
        f"the time budget of {seconds:g} s is too short: {what}",
        fix=f"give --time-budget {suggested(needed)} or more{remedy}{kept}",
        code="E_BUDGET",
    )


def suggested(needed: float) -> str:
    """A duration for `--time-budget` that holds what is needed, with room."""
    seconds = SUGGESTED * needed
    return f"{math.ceil(seconds / 10) * 10}s" if seconds < 115 else f"{math.ceil(seconds / 60)}m"

"""The limits of a run, its progress towards them, and the learning rate on the way."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

WARM_UP = 0.03  # fraction of the run in which the learning rate rises


class Stop(StrEnum):
    """Why a run ended."""

    FINISHED = "finished"  # all epochs
    PATIENCE = "patience"  # too many validations without a new best score
    TIME = "time"
    INTERRUPTED = "interrupted"  # by Ctrl-C
    DIVERGED = "diverged"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """Limits and seed of a run.

    Args:
        epochs: None to train until the time is over; then `seconds` is required.
        patience: stop after this many consecutive validations without a new best score.
        seconds: time budget of the loop and its final validation, None for no limit.
        freeze: patterns of the names of parameters that are not trained.
    """

    seed: int = 0
    epochs: int | None
    patience: int
    seconds: float | None = None
    freeze: tuple[str, ...] = ()


class Spent(Protocol):
    """What a run has used so far, with the seconds kept for its final validation."""

    step: int
    seconds: float
    reserve: float


class Clock:
    """The progress of a run, in steps or seconds; with both limits, the one reached first."""

    def __init__(
        self, settings: RunSettings, steps_per_epoch: int, spent: Spent, began: float
    ) -> None:
        self._budget, self._spent = settings.seconds, spent
        self._steps = math.inf if settings.epochs is None else settings.epochs * steps_per_epoch
        self._started = began - spent.seconds

    @property
    def ends(self) -> float:
        """The time of `time.monotonic` at which the run, with its validation, has to end."""
        return math.inf if self._budget is None else self._started + self._budget

    def seconds(self) -> float:
        return time.monotonic() - self._started

    def done(self) -> float:
        """Return the fraction of the run done."""
        fraction = self._spent.step / self._steps
        if self._budget is not None:
            available = max(1.0, self._budget - self._spent.reserve)
            fraction = max(fraction, self.seconds() / available)
        return min(1.0, fraction)

    def reached(self) -> Stop | None:
        """Return the limit that was reached."""
        if self._spent.step >= self._steps:
            return Stop.FINISHED
        return Stop.TIME if self.done() >= 1 else None


def learning_rate_factor(done: float, kind: str) -> float:
    """Return the factor at a fraction of a run: linear warm-up, then cosine or polynomial decay."""
    if done < WARM_UP:
        return max(0.05, done / WARM_UP)
    decay = (done - WARM_UP) / (1 - WARM_UP)
    return (1 - decay) ** 0.9 if kind == "poly" else 0.5 * (1 + math.cos(math.pi * decay))

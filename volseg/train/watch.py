"""How good a network is while it is trained: a look now and then at some validation cases, within the time that there is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from volseg.evaluate.validation import ValidationRow
from volseg.infer.backends import TorchBackend
from volseg.infer.stream import predict_logits
from volseg.io.prepared import PreparedCase
from volseg.models import build_segmentation, set_weights
from volseg.plan import Plan
from volseg.recipe import Recipe
from volseg.train.validate import tiling_of, validate

WATCHED_OVERLAP = 0.25  # cheap and close: the final metrics use the recipe's own overlap
LOOKING_SHARE = 0.15  # of a time budget that looks may take: they are rarer where they take long
FEWEST_LOOKS = (
    6  # that a time budget should leave room for: fewer cases are watched where they take long
)
SECOND_OPINION = 0.1  # share of a time budget up to which two sets of weights are validated on all cases, and not one
LARGEST_RESERVE = 0.35  # share of a time budget that is kept for validation


class Watch:
    """Looks at averaged weights, and knows what that takes.

    Without a time budget it looks after every epoch, at as many cases as the recipe says. With one it looks when there has been training for
    long enough to afford it, and at as many cases as that allows, at least one.

    Args:
        validation: cases, of which some are looked at in training and all in the end.
        seconds: the budget of the whole run, None for no limit.
        tick: called with what is looked at, tile by tile.
    """

    def __init__(
        self,
        validation: Sequence[PreparedCase],
        recipe: Recipe,
        plan: Plan,
        device: torch.device,
        seconds: float | None,
        *,
        tick: Callable[[str], None] = lambda doing: None,
    ) -> None:
        self._validation, self._recipe, self._plan, self._device = validation, recipe, plan, device
        self._seconds, self._tick = seconds, tick
        self._network = build_segmentation(recipe)
        self._cases = _spread(validation, recipe.train.validation_cases)
        self._seconds_per_tile = 0.0
        self._trained_for = 0.0  # seconds of training since the last look
        if seconds is not None:
            self._seconds_per_tile = self._time_a_tile()
            each = self._cost(self._cases, WATCHED_OVERLAP) / len(self._cases)
            self._cases = _spread(
                validation,
                min(len(self._cases), int(LOOKING_SHARE * seconds / FEWEST_LOOKS / each)),
            )

    @property
    def reserve(self) -> float:
        """Seconds of the budget that are kept for the last look and for the validation of all cases."""
        if self._seconds is None:
            return 0.0
        final = self._cost(self._validation, self._recipe.infer.overlap) * (
            2 if self.compares_last else 1
        )
        return min(
            self._cost(self._cases, WATCHED_OVERLAP) + final, LARGEST_RESERVE * self._seconds
        )

    @property
    def compares_last(self) -> bool:
        """Whether to choose in the end between the best weights and the last on all cases: where only some were watched, and there is time."""
        if len(self._cases) == len(self._validation):
            return False
        final = self._cost(self._validation, self._recipe.infer.overlap)
        return self._seconds is None or final <= SECOND_OPINION * self._seconds

    def is_due(self, trained_for: float) -> bool:
        """Whether to look now, after so many more seconds of training."""
        self._trained_for += trained_for
        return (
            LOOKING_SHARE * self._trained_for >= self._cost(self._cases, WATCHED_OVERLAP)
            or self._seconds is None
        )

    def look(
        self, weights: Mapping[str, torch.Tensor], until: float = math.inf
    ) -> list[ValidationRow]:
        """What these weights are worth on the watched cases; nothing where time was over before all were seen."""
        began = time.monotonic()
        rows = self._validate(weights, self._cases, WATCHED_OVERLAP, until)
        self._trained_for = 0.0
        if len({row.case_id for row in rows}) < len(self._cases):
            return []
        self._seconds_per_tile = (time.monotonic() - began) / self._tiles(
            self._cases, WATCHED_OVERLAP
        )
        return rows

    def validate(
        self, weights: Mapping[str, torch.Tensor], until: float = math.inf
    ) -> list[ValidationRow]:
        """What they are worth on all validation cases, with the overlap of inference.

        Until that time (`time.monotonic`) the cases come in a drawn order, so that those that are seen stand for all.
        """
        cases = self._validation
        if until < math.inf:
            cases = [cases[index] for index in np.random.default_rng(0).permutation(len(cases))]
        rows = self._validate(weights, cases, self._recipe.infer.overlap, until)
        places = {case.id: place for place, case in enumerate(self._validation)}
        return sorted(rows, key=lambda row: places[row.case_id])

    def _validate(
        self,
        weights: Mapping[str, torch.Tensor],
        cases: Sequence[PreparedCase],
        overlap: float,
        until: float,
    ) -> list[ValidationRow]:
        network = set_weights(self._network, weights)
        return validate(
            network,
            cases,
            self._recipe,
            self._plan,
            self._device,
            overlap=overlap,
            until=until,
            on_tile=lambda case_id: self._tick(f"validating {case_id}"),
        )

    def _cost(self, cases: Sequence[PreparedCase], overlap: float) -> float:
        return self._seconds_per_tile * self._tiles(cases, overlap)

    def _tiles(self, cases: Sequence[PreparedCase], overlap: float) -> int:
        tiling = tiling_of(self._plan, overlap)
        return sum(tiling.count(case.mask.shape) for case in cases)

    def _time_a_tile(self) -> float:
        backend, tiling = TorchBackend(self._network, self._device), tiling_of(self._plan, 0.0)
        r, a, s = self._plan.patch_shape
        tiles = np.zeros((len(self._recipe.data.channels), r, a, s * tiling.batch_size), np.float32)
        predict_logits(
            tiles, backend, tiling, n_classes=self._recipe.data.n_outputs
        )  # finds memory and kernels
        began = time.monotonic()
        predict_logits(tiles, backend, tiling, n_classes=self._recipe.data.n_outputs)
        return max(time.monotonic() - began, 1e-6) / tiling.batch_size


def _spread(cases: Sequence[PreparedCase], n: int) -> list[PreparedCase]:
    """At most `n` cases, and one at least, evenly spread over the list."""
    return [
        cases[round(index)] for index in np.linspace(0, len(cases) - 1, max(1, min(n, len(cases))))
    ]

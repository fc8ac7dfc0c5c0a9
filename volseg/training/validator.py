"""Validation during training: on a few cases, as often as the time budget allows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch

from volseg.evaluation.validation import ValidationRow
from volseg.inference.stream import predict_logits
from volseg.inference.torch_backend import TorchBackend
from volseg.io.prepared import PreparedCase
from volseg.networks import build_segmentation, copy_weights
from volseg.recipe import Recipe
from volseg.training.validate import ScanPredictor, tiling_of, validate

T = TypeVar("T")
SUBSET_OVERLAP = 0.25  # cheap and close enough: the final metrics use the recipe's own overlap
# Fractions of a time budget
VALIDATION_FRACTION = 0.15  # for all intermediate validations together
COMPARISON_FRACTION = 0.1  # largest cost of a full validation for which two sets of weights get one
LARGEST_RESERVE = 0.35  # kept for the final validation
FEWEST_VALIDATIONS = 6  # a time budget should have room for; else fewer cases are validated on


class Validator:
    """Validates averaged weights, and knows how long that takes.

    Without a time budget it validates after every epoch, on as many cases as the recipe says. With
    one it validates when enough training has passed to afford it, on as many cases as the budget
    allows, at least one.

    Args:
        validation: all cases, for the final validation; a subset is used during training.
        seconds: the budget of the whole run, None for no limit.
        tick: called tile by tile with the case being validated.
    """

    def __init__(
        self,
        validation: Sequence[PreparedCase],
        recipe: Recipe,
        device: torch.device,
        seconds: float | None,
        *,
        tick: Callable[[str], None] = lambda doing: None,
    ) -> None:
        self._validation, self._recipe, self._device = validation, recipe, device
        self._seconds, self._tick = seconds, tick
        self._network = build_segmentation(recipe)
        self._subset = spread(validation, recipe.train.validation_cases)
        self._seconds_per_tile = 0.0
        self._trained_for = 0.0  # seconds of training since the last validation
        if seconds is not None:
            self._seconds_per_tile = self._time_a_tile()
            per_case = self._cost(self._subset, SUBSET_OVERLAP) / len(self._subset)
            affordable = int(VALIDATION_FRACTION * seconds / FEWEST_VALIDATIONS / per_case)
            self._subset = spread(validation, min(len(self._subset), affordable))

    @property
    def reserve(self) -> float:
        """Seconds of the budget kept for a last subset validation and for the full validation."""
        if self._seconds is None:
            return 0.0
        full = self._cost(self._validation, self._recipe.infer.overlap)
        final = full * (2 if self.compares_last else 1)
        needed = self._cost(self._subset, SUBSET_OVERLAP) + final
        return min(needed, LARGEST_RESERVE * self._seconds)

    @property
    def compares_last(self) -> bool:
        """True if the best and the last weights are compared on all cases at the end.

        This is worth it if only a subset was validated during training, and there is time for it.
        """
        if len(self._subset) == len(self._validation):
            return False
        full = self._cost(self._validation, self._recipe.infer.overlap)
        return self._seconds is None or full <= COMPARISON_FRACTION * self._seconds

    def due_after(self, seconds: float) -> bool:
        """Add seconds of training; tell whether to validate now."""
        self._trained_for += seconds
        cost = self._cost(self._subset, SUBSET_OVERLAP)
        return VALIDATION_FRACTION * self._trained_for >= cost or self._seconds is None

    def validate_subset(
        self, weights: Mapping[str, torch.Tensor], until: float = math.inf
    ) -> list[ValidationRow]:
        """Validate on the subset; return no rows if time ran out before its last case."""
        began = time.monotonic()
        rows = self._validate(weights, self._subset, SUBSET_OVERLAP, until)
        self._trained_for = 0.0
        if len({row.case_id for row in rows}) < len(self._subset):
            return []
        elapsed = time.monotonic() - began
        self._seconds_per_tile = elapsed / self._tiles(self._subset, SUBSET_OVERLAP)
        return rows

    def validate_all(
        self, weights: Mapping[str, torch.Tensor], until: float = math.inf
    ) -> list[ValidationRow]:
        """Validate on all cases, with the overlap of inference.

        With a time limit (`time.monotonic`) the order is random, so that the cases done by then
        represent all of them. Rows are in the order of the cases.
        """
        cases = self._validation
        if until < math.inf:
            cases = [cases[index] for index in np.random.default_rng(0).permutation(len(cases))]
        rows = self._validate(weights, cases, self._recipe.infer.overlap, until)
        order = {case.id: index for index, case in enumerate(self._validation)}
        return sorted(rows, key=lambda row: order[row.case_id])

    def _validate(
        self,
        weights: Mapping[str, torch.Tensor],
        cases: Sequence[PreparedCase],
        overlap: float,
        until: float,
    ) -> list[ValidationRow]:
        network = copy_weights(self._network, weights)
        return validate(
            ScanPredictor(network, self._recipe, self._device, overlap),
            cases,
            until=until,
            on_tile=lambda case_id: self._tick(f"validating {case_id}"),
        )

    def _cost(self, cases: Sequence[PreparedCase], overlap: float) -> float:
        return self._seconds_per_tile * self._tiles(cases, overlap)

    def _tiles(self, cases: Sequence[PreparedCase], overlap: float) -> int:
        tiling = tiling_of(self._recipe, overlap)
        return sum(tiling.count(case.mask.shape) for case in cases)

    def _time_a_tile(self) -> float:
        backend, tiling = TorchBackend(self._network, self._device), tiling_of(self._recipe, 0.0)
        r, a, s = self._recipe.patch_shape
        n_classes = self._recipe.data.n_outputs
        tiles = np.zeros((len(self._recipe.data.channels), r, a, s * tiling.batch_size), np.float32)
        predict_logits(tiles, backend, tiling, n_classes=n_classes)  # warm-up
        began = time.monotonic()
        predict_logits(tiles, backend, tiling, n_classes=n_classes)
        return max(time.monotonic() - began, 1e-6) / tiling.batch_size


def spread(cases: Sequence[T], n: int) -> list[T]:
    """Return up to `n` cases, at least one, evenly spread over the list."""
    places = np.linspace(0, len(cases) - 1, max(1, min(n, len(cases))))
    return [cases[round(place)] for place in places]

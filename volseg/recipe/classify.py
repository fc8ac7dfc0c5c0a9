"""The section [classify]: a 2D network that scores each lesion from slices through it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from volseg.recipe.section import (
    BatchSize,
    Intensity,
    Name,
    Positive,
    Repeats,
    Section,
    Weight,
    refuse_empty_window,
)
from volseg.recipe.train import Network

MAX_PIXELS = 2**28  # in a batch of the classifier


class Classify(Section):
    """A 2D network that scores each lesion from slices through it."""

    column: Name  # of cases.csv: a number per case
    # name = [lowest, highest] value; cases outside all ranges are not used
    classes: Annotated[
        dict[Name, tuple[Intensity, Intensity]], Field(min_length=2, max_length=1000)
    ]
    network: Network
    field_of_view_mm: Annotated[float, Field(gt=0, le=10_000)] = 48.0
    pixels: Annotated[int, Field(ge=8, le=4096)] = 64
    low: Intensity  # intensity window of the slices
    high: Intensity
    batch_size: BatchSize = 32
    epochs: Repeats = 60
    learning_rate: Positive = 1e-3
    weight_decay: Weight = 1e-2
    time_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15  # of --time-budget

    @model_validator(mode="after")
    def _window_is_not_empty(self) -> Classify:
        refuse_empty_window(self.low, self.high)
        return self

    @model_validator(mode="after")
    def _batch_is_not_too_large(self) -> Classify:
        n = self.batch_size * self.pixels**2
        if n > MAX_PIXELS:
            raise ValueError(
                f"batch_size {self.batch_size} × {self.pixels}² pixels must be at most "
                f"{MAX_PIXELS:,} pixels, got {n:,}"
            )
        return self

"""The maximum over the slices: for findings that one slice decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from volseg.networks import Count
from volseg.networks.sequence import SequenceSettings
from volseg.networks.sequence.base import Projection, SequenceNetwork, cleared
from volseg.networks.sequence.pooling import max_of_slices


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(SequenceSettings):
    """Settings of the maximum.

    Args:
        features: linear combinations of the slice's features, of which the maximum is taken.
        dropout: probability with which a feature of a slice is dropped in training.
    """

    features: Count = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5

    def build(self, in_features: int) -> SequenceNetwork:
        return Max(in_features, self)


class Max(SequenceNetwork):
    """The largest value of each linear combination of features over the slices."""

    def __init__(self, in_features: int, settings: Settings) -> None:
        super().__init__()
        self.out_features = settings.features
        self.project = Projection(in_features, settings.features, settings.dropout)

    def contextual(self, slices: torch.Tensor, is_slice: torch.Tensor) -> torch.Tensor:
        return cleared(self.project(slices), is_slice)

    def pool(self, contextual: torch.Tensor, is_slice: torch.Tensor) -> torch.Tensor:
        return max_of_slices(contextual, is_slice)

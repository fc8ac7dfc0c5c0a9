"""The mean of the slices: what they have in common; the simplest model of a scan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from volseg.networks.sequence import SequenceSettings
from volseg.networks.sequence.base import SequenceNetwork, cleared
from volseg.networks.sequence.pooling import mean_of_slices


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(SequenceSettings):
    """Settings of the mean.

    Args:
        dropout: probability with which a feature of a slice is dropped in training.
    """

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5

    def build(self, in_features: int) -> SequenceNetwork:
        return Mean(in_features, self)


class Mean(SequenceNetwork):
    """The mean of each feature over the slices, with nothing else to learn than the head."""

    def __init__(self, in_features: int, settings: Settings) -> None:
        super().__init__()
        self.out_features = in_features
        self.dropout = nn.Dropout(settings.dropout)

    def contextual(self, slices: torch.Tensor, is_slice: torch.Tensor) -> torch.Tensor:
        return cleared(self.dropout(slices), is_slice)

    def pool(self, contextual: torch.Tensor, is_slice: torch.Tensor) -> torch.Tensor:
        return mean_of_slices(contextual, is_slice)

"""Gated attention over the slices: a weighted mean, whose weights the slices decide (MIL)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from volseg.networks import Count
from volseg.networks.sequence import SequenceSettings
from volseg.networks.sequence.base import Projection, SequenceNetwork, cleared
from volseg.networks.sequence.pooling import GatedAttention


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(SequenceSettings):
    """Settings of gated attention.

    Args:
        features: of a slice after a linear layer and ReLU.
        dropout: probability with which a feature of a slice is dropped in training.
    """

    features: Count = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5

    def build(self, in_features: int) -> SequenceNetwork:
        return Attention(in_features, self)


class Attention(SequenceNetwork):
    """A linear layer with ReLU on each slice, then gated attention over the slices."""

    def __init__(self, in_features: int, settings: Settings) -> None:
        super().__init__()
        self.out_features = settings.features
        self.project = Projection(in_features, settings.features, settings.dropout)
        self.attention = GatedAttention(settings.features)

    def contextual(self, slices: torch.Tensor, is_slice: torch.Tensor) -> torch.Tensor:
        return cleared(torch.relu(self.project(slices)), is_slice)

    def pool(self, contextual: torch.Tensor, is_slice: torch.Tensor) -> torch.Tensor:
        return self.attention(contextual, is_slice)

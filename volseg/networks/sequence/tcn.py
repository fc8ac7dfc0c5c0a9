"""A temporal convolutional network: each slice with its neighbours, up to a fixed distance.

Unlike the causal one of Bai et al., arXiv 1803.01271 (2018), it looks to both sides, as no slice of
a scan comes later than another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from volseg.networks import Count
from volseg.networks.sequence import SequenceSettings
from volseg.networks.sequence.base import InOrder, Projection, SequenceNetwork, cleared


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(SequenceSettings):
    """Settings of a temporal convolutional network.

    Args:
        features: of a slice after a linear layer, and of each convolution.
        layers: convolutions over 3 slices that lie 1, 2, 4, … apart, so that a slice sees
            2^layers − 1 to either side.
        dropout: probability with which a feature of a slice is dropped in training.
    """

    features: Count = 32
    layers: Annotated[int, Field(ge=1, le=8)] = 3
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5

    @property
    def reach(self) -> int:
        """Number of slices to either side that a slice sees."""
        return 2**self.layers - 1

    def build(self, in_features: int) -> SequenceNetwork:
        return Tcn(in_features, self)


class Tcn(InOrder):
    """A linear layer on each slice, residual dilated convolutions, and gated attention."""

    def __init__(self, in_features: int, settings: Settings) -> None:
        super().__init__(settings.features)
        self.project = Projection(in_features, settings.features, settings.dropout)
        self.blocks = nn.ModuleList(
            _Block(settings.features, 2**layer) for layer in range(settings.layers)
        )

    def contextual(self, slices: torch.Tensor, is_slice: torch.Tensor) -> torch.Tensor:
        x = cleared(self.project(slices), is_slice)
        for block in self.blocks:
            x = cleared(block(x, is_slice), is_slice)
        return x


class _Block(nn.Module):
    """Layer norm, ReLU and a dilated convolution, added to the input."""

    def __init__(self, features: int, dilation: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.convolution = nn.Conv1d(features, features, 3, padding=dilation, dilation=dilation)

    def forward(self, slices: torch.Tensor, is_slice: torch.Tensor) -> torch.Tensor:
        active = cleared(torch.relu(self.norm(slices)), is_slice)
        return slices + self.convolution(active.transpose(1, 2)).transpose(1, 2)

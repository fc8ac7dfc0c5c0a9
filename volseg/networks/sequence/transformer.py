"""A transformer encoder over the slices: each slice attends to all others, wherever they lie.

Source: Vaswani et al., NeurIPS (2017); layer norm first as in Xiong et al., ICML (2020).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from volseg.errors import VolsegError
from volseg.networks import Count
from volseg.networks.sequence import SequenceSettings
from volseg.networks.sequence.base import InOrder, Projection, SequenceNetwork, cleared

LONGEST_WAVE = 1000.0  # slices over 2π: of the slowest sine that tells positions apart


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(SequenceSettings):
    """Settings of a transformer encoder.

    Args:
        features: of a slice in it, a multiple of 2 and of `heads`.
        layers: encoder layers one after the other. heads: of the attention in each.
        dropout: probability with which a feature is dropped in training, of a slice and in layers.
    """

    features: Count = 32
    layers: Annotated[int, Field(ge=1, le=8)] = 1
    heads: Annotated[int, Field(ge=1, le=64)] = 4
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5

    def __post_init__(self) -> None:
        if self.features % self.heads or self.features % 2:
            raise VolsegError(
                f"sequence 'transformer': features = {self.features} is no multiple of 2 and of "
                f"heads = {self.heads}",
                fix="32 features with 4 heads are usual",
                code="E_RECIPE",
            )

    def build(self, in_features: int) -> SequenceNetwork:
        return Transformer(in_features, self)


class Transformer(InOrder):
    """A linear layer on each slice, its position, encoder layers, and gated attention."""

    def __init__(self, in_features: int, settings: Settings) -> None:
        super().__init__(settings.features)
        self.project = Projection(in_features, settings.features, settings.dropout)
        self.layers = nn.ModuleList(_layer(settings) for _ in range(settings.layers))
        self.norm = nn.LayerNorm(settings.features)

    def contextual(self, slices: torch.Tensor, is_slice: torch.Tensor) -> torch.Tensor:
        x = self.project(slices)
        x = cleared(x + positions(x.shape[1], x.shape[2]).to(x), is_slice)
        for layer in self.layers:
            x = cleared(layer(x, src_key_padding_mask=~is_slice), is_slice)
        return cleared(self.norm(x), is_slice)


def positions(n: int, features: int) -> torch.Tensor:
    """Return (n, features) sines and cosines of the number of each slice, from 0."""
    rates = torch.exp(torch.arange(0, features, 2) * (-math.log(LONGEST_WAVE) / features))
    angles = torch.arange(n)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


def _layer(settings: Settings) -> nn.Module:
    return nn.TransformerEncoderLayer(
        settings.features,
        settings.heads,
        dim_feedforward=2 * settings.features,
        dropout=settings.dropout,
        batch_first=True,
        norm_first=True,
    )

"""A bidirectional LSTM over the slices: each slice with all those before and after it.

Source: Hochreiter and Schmidhuber, Neural Comput 9:1735 (1997).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from volseg.networks import Count
from volseg.networks.sequence import SequenceSettings
from volseg.networks.sequence.base import InOrder, Projection, SequenceNetwork


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(SequenceSettings):
    """Settings of a bidirectional LSTM.

    Args:
        features: of a slice after a linear layer, and of the LSTM in each direction.
        layers: LSTMs one after the other.
        dropout: probability with which a feature of a slice is dropped in training.
    """

    features: Count = 32
    layers: Annotated[int, Field(ge=1, le=8)] = 1
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5

    def build(self, in_features: int) -> SequenceNetwork:
        return Lstm(in_features, self)


class Lstm(InOrder):
    """A linear layer on each slice, an LSTM in both directions, and gated attention."""

    def __init__(self, in_features: int, settings: Settings) -> None:
        super().__init__(2 * settings.features)
        self.project = Projection(in_features, settings.features, settings.dropout)
        self.lstm = nn.LSTM(
            settings.features,
            settings.features,
            settings.layers,
            batch_first=True,
            bidirectional=True,
        )

    def contextual(self, slices: torch.Tensor, is_slice: torch.Tensor) -> torch.Tensor:
        lengths = is_slice.sum(1).cpu()
        projected = torch.relu(self.project(slices))
        packed = pack_padded_sequence(projected, lengths, batch_first=True, enforce_sorted=False)
        n = slices.shape[1]
        return pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=n)[0]

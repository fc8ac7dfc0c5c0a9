"""Base of the networks of sequences: what each slice means, and what all slices mean together."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import nn


class SequenceNetwork(nn.Module, ABC):
    """A network of sequences of slice features: (N, S, in_features) → (N, out_features).

    Sequences of a batch have different lengths. `is_slice` (N, S) bool tells their slices from the
    padding after the last one. Padding changes nothing: a sequence gives the same numbers alone and
    beside longer ones.

    A subclass sets `out_features`, and defines `contextual` and `pool`.
    """

    out_features: int

    @abstractmethod
    def contextual(self, slices: torch.Tensor, is_slice: torch.Tensor) -> torch.Tensor:
        """Return (N, S, out_features): each slice with what the others say of it; 0 in padding."""

    @abstractmethod
    def pool(self, contextual: torch.Tensor, is_slice: torch.Tensor) -> torch.Tensor:
        """Return (N, out_features) of the slices of each sequence."""

    def forward(self, slices: torch.Tensor, is_slice: torch.Tensor) -> torch.Tensor:
        """Return (N, out_features): what the head of scans gets."""
        return self.pool(self.contextual(slices, is_slice), is_slice)


class InOrder(SequenceNetwork, ABC):
    """A network in which the order counts; its slices are pooled by gated attention."""

    def __init__(self, out_features: int) -> None:
        from volseg.networks.sequence.pooling import GatedAttention

        super().__init__()
        self.out_features = out_features
        self.attention = GatedAttention(out_features)

    def pool(self, contextual: torch.Tensor, is_slice: torch.Tensor) -> torch.Tensor:
        return self.attention(contextual, is_slice)


class Projection(nn.Sequential):
    """Features of each slice → fewer: dropout and a linear layer."""

    def __init__(self, in_features: int, out_features: int, dropout: float) -> None:
        super().__init__(nn.Dropout(dropout), nn.Linear(in_features, out_features))


def cleared(slices: torch.Tensor, is_slice: torch.Tensor) -> torch.Tensor:
    """Return (N, S, features) with 0 in the padding, whatever it held."""
    return slices.masked_fill(~is_slice[..., None], 0.0)

"""Pooling of the slices of a scan, without those that are padding."""

from __future__ import annotations

import torch
from torch import nn

HIDDEN = 64  # features in which attention compares slices


def mean_of_slices(slices: torch.Tensor, is_slice: torch.Tensor) -> torch.Tensor:
    """Return (N, features), the mean over the slices of each sequence (N, S, features)."""
    weights = is_slice[..., None].to(slices.dtype)
    return (slices * weights).sum(1) / weights.sum(1)


def max_of_slices(slices: torch.Tensor, is_slice: torch.Tensor) -> torch.Tensor:
    """Return (N, features), the largest value of each feature over the slices."""
    return slices.masked_fill(~is_slice[..., None], -torch.inf).amax(1)


class GatedAttention(nn.Module):
    """A weighted mean of the slices, whose weights the slices themselves decide.

    The weight of a slice h is softmax of wᵀ (tanh(V h) ⊙ sigmoid(U h)) over the slices.
    Source: Ilse et al., ICML (2018), arXiv 1802.04712, equation 9.
    """

    def __init__(self, features: int, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.content = nn.Linear(features, hidden)
        self.gate = nn.Linear(features, hidden)
        self.score = nn.Linear(hidden, 1, bias=False)

    def weights(self, slices: torch.Tensor, is_slice: torch.Tensor) -> torch.Tensor:
        """Return (N, S) weights of sum 1 over the slices of each sequence, 0 in padding."""
        gated = torch.tanh(self.content(slices)) * torch.sigmoid(self.gate(slices))
        scores = self.score(gated)[..., 0]
        return scores.masked_fill(~is_slice, -torch.inf).softmax(1)

    def forward(self, slices: torch.Tensor, is_slice: torch.Tensor) -> torch.Tensor:
        """Return (N, features) of sequences (N, S, features)."""
        return (self.weights(slices, is_slice)[..., None] * slices).sum(1)

"""The network of scans: embeddings of slices → logits, of the scan or of each slice."""

from __future__ import annotations

import torch
from torch import nn

from volseg.networks.image_network import ImageNetwork
from volseg.networks.sequence.base import SequenceNetwork


class ScanNetwork(ImageNetwork):
    """A network of scans (N, S, features + 1) → logits (N, out_channels).

    The last number of a slice is 1, and 0 in the padding of scans with fewer slices, as in
    `stack_scans`. Features are scaled by batch norm over the slices of all scans, without padding.
    """

    def __init__(self, network: SequenceNetwork, in_features: int, out_channels: int) -> None:
        super().__init__()
        self.norm = SliceNorm(in_features)
        self.sequence = network
        self.dropout = nn.Dropout(0.0)
        self.head = nn.Linear(network.out_features, out_channels)
        self.stage_prefixes = [("norm.",), ("sequence.",)]

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Return (N, features) of scans (N, S, features + 1)."""
        slices, is_slice = split_padding(images)
        return self.sequence(self.norm(slices, is_slice), is_slice)

    def slice_logits(self, scans: torch.Tensor) -> torch.Tensor:
        """Return (N, S, out_channels): the head on each slice with its context."""
        slices, is_slice = split_padding(scans)
        return self.head(self.sequence.contextual(self.norm(slices, is_slice), is_slice))


class SliceNorm(nn.Module):
    """Batch norm without factors over the slices of a batch that are no padding, which stays 0."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(features, affine=False)

    def forward(self, slices: torch.Tensor, is_slice: torch.Tensor) -> torch.Tensor:
        """Return (N, S, features) of slices (N, S, features)."""
        result = torch.zeros_like(slices)
        result[is_slice] = self.norm(slices[is_slice])
        return result


def split_padding(scans: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return slices (N, S, features), and (N, S) bool that is False in padding."""
    return scans[..., :-1], scans[..., -1] > 0

"""The mean of the slices: what they have in common; the simplest model of a scan."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from volseg.networks.sequence import SequenceSettings
from volseg.networks.sequence.base import SequenceNetwork, SingleSlices
from volseg.networks.sequence.pooling import mean_of_slices


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(SequenceSettings):
    """The mean has no settings."""

    def build(self, in_features: int) -> SequenceNetwork:
        return Mean(in_features)


class Mean(SingleSlices):
    """The mean of each feature over the slices."""

    def pool(self, contextual: torch.Tensor, is_slice: torch.Tensor) -> torch.Tensor:
        return mean_of_slices(contextual, is_slice)

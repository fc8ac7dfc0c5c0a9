"""The network that embeds the slices of scans: given, not trained, and run once per slice."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from volseg.inference.images import embed_images
from volseg.networks import unique_tensors
from volseg.networks.image_network import ImageNetwork
from volseg.recipe.classification import ImageInfer


@dataclass(frozen=True, slots=True, eq=False)
class SliceEncoder:
    """A network on its device, as the training of a classifier of scans uses it."""

    network: ImageNetwork
    infer: ImageInfer
    device: torch.device

    @property
    def n_features(self) -> int:
        return self.network.head.in_features

    @property
    def digest(self) -> str:
        """Hash of its weights but those of the head."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.weights.items()):
            if not name.startswith("head."):
                digest.update(name.encode() + tensor.numpy().tobytes())
        return digest.hexdigest()

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.cpu() for name, tensor in unique_tensors(self.network).items()}

    def embed(self, images: np.ndarray) -> np.ndarray:
        """Return (S, features) float32 of slices (S, C, H, W)."""
        return embed_images(self.network.to(self.device), images, self.infer, self.device)

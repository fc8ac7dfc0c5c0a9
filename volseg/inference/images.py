"""Outputs of a 2D network for many images, and what they mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from volseg.image_bundle import Judgement
from volseg.networks.image_network import PLANES_NDIM, ImageNetwork
from volseg.preprocessing.resample import send
from volseg.recipe.classification import LABELS, NUMBER, ImageInfer, Target
from volseg.recipe.section import closed

FLIPS = {"vertical": -2, "horizontal": -1}  # axis of (…, H, W)


def predict_outputs(
    network: nn.Module, images: np.ndarray, settings: ImageInfer, device: torch.device
) -> np.ndarray:
    """Return (N, outputs) float32 of images (N, C, H, W), averaged over flipped copies (TTA)."""
    network.eval()
    outputs = []
    with torch.inference_mode():
        for batch in _batches(images, settings.batch_size, device):
            copies = flipped_copies(batch, settings.tta_axes)
            outputs.append(torch.stack([network(copy).float() for copy in copies]).mean(0).cpu())
    return torch.cat(outputs).numpy()


def embed_images(
    network: ImageNetwork, images: np.ndarray, settings: ImageInfer, device: torch.device
) -> np.ndarray:
    """Return (N, features) float32: what the network's head gets."""
    network.eval()
    with torch.inference_mode():
        batches = _batches(images, settings.batch_size, device)
        return torch.cat([_embed(network, batch).float().cpu() for batch in batches]).numpy()


def _embed(network: ImageNetwork, images: torch.Tensor) -> torch.Tensor:
    """Return (N, features), of several planes their mean."""
    if images.ndim == PLANES_NDIM:
        embedded = network.embed(images.flatten(0, 1))
        return embedded.unflatten(0, images.shape[:2]).mean(1)
    return network.embed(images)


def to_predictions(outputs: np.ndarray, data: Target, temperature: float = 1.0) -> np.ndarray:
    """Return (N, outputs) float64: probabilities, or numbers in their own unit.

    Args:
        temperature: divides the logits of classes and labels (temperature scaling).
    """
    outputs = outputs.astype(np.float64)
    if data.kind == NUMBER:
        return outputs * closed(data.sd) + closed(data.mean)
    logits = outputs / temperature
    if data.kind == LABELS:
        return 1 / (1 + np.exp(-np.clip(logits, -500, 500)))
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True)


def judged_predictions(
    outputs: np.ndarray, data: Target, judgement: Judgement, measurements: np.ndarray | None
) -> np.ndarray:
    """Return (N, outputs) float64 predictions of a model: fused and calibrated as it states.

    Args:
        measurements: (N, k) that the model is fused with; None if it is not.
    """
    if judgement.fusion is not None:
        assert measurements is not None, "a fused model needs measurements"
        outputs = judgement.fusion(outputs, measurements)
    return to_predictions(outputs, data, judgement.temperature)


def _batches(images: np.ndarray, size: int, device: torch.device) -> Iterator[torch.Tensor]:
    for start in range(0, len(images), size):
        yield send(torch.from_numpy(np.array(images[start : start + size])), device)


def flipped_copies(batch: torch.Tensor, axes: Sequence[str]) -> list[torch.Tensor]:
    """Return images (…, H, W) as they are, and flipped along each combination of the axes."""
    copies = [batch]
    for axis in axes:
        copies += [copy.flip(FLIPS[axis]) for copy in copies]
    return copies

"""Train the 2D classifier on slices through the reference lesions.

It has a loop of its own, as it trains for seconds; `loop` serves the networks of volumes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from volseg.evaluation.roc import auc
from volseg.io.prepared import PreparedCase
from volseg.networks import build_classifier, copy_weights, unique_tensors
from volseg.recipe import Classify

SHIFT_PIXELS = 3  # largest shift of a training slice, as predicted centroids are off-centre
EMA_DECAY = 0.98


def train_classifier(
    split: tuple[Sequence[PreparedCase], Sequence[PreparedCase]],
    settings: Classify,
    *,
    device: torch.device,
    seed: int,
    seconds: float | None,
    report: Callable[[int, float], None],
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the averaged weights and metrics; cases without a class or slices are skipped.

    Args:
        split: training and validation cases.
        seconds: time budget, over which the learning rate falls; None for the recipe's epochs.
        report: called after each epoch with its number and the fraction of the run done.
    """
    slices, targets = _stack(split[0], settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of the random weights and dropout
        run = _Run(slices, targets, settings, device, seed)
        n_epochs = run.train(math.inf if seconds is None else seconds, report)
    network = copy_weights(run.network, run.averaged)
    metrics = {"classifier_training_lesions": len(targets), "classifier_epochs": n_epochs}
    return run.averaged, metrics | _validate(network, split[1], settings, device)


class _Run:
    """A classifier in training."""

    def __init__(
        self,
        slices: torch.Tensor,
        targets: torch.Tensor,
        settings: Classify,
        device: torch.device,
        seed: int,
    ) -> None:
        self._slices, self._targets, self._settings = slices, targets, settings
        self._device = device
        self.network = build_classifier(settings).to(device)
        self._optimizer = torch.optim.AdamW(
            self.network.parameters(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
        tensors = unique_tensors(self.network)
        self.averaged = {key: tensor.clone() for key, tensor in tensors.items()}
        counts = torch.bincount(targets, minlength=len(settings.classes)).clamp_min(1)
        weights = (len(targets) / len(counts) / counts).float().to(device)
        self._loss = nn.CrossEntropyLoss(weights, label_smoothing=0.05)
        self._generator = torch.Generator().manual_seed(seed)

    def train(self, seconds: float, report: Callable[[int, float], None]) -> int:
        """Train the recipe's epochs, or fewer within these seconds; return their number."""
        started, epoch, done = time.monotonic(), 0, 0.0
        self.network.train()
        while done < 1:
            for group in self._optimizer.param_groups:
                group["lr"] = self._settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
            order = torch.randperm(len(self._targets), generator=self._generator)
            for batch in order.split(self._settings.batch_size):
                self._step(batch)
                if time.monotonic() - started >= seconds:
                    break
            epoch += 1
            done = max(epoch / self._settings.epochs, (time.monotonic() - started) / seconds)
            report(epoch, min(1.0, done))
        return epoch

    def _step(self, batch: torch.Tensor) -> None:
        images = _augment(self._slices[batch], self._generator).to(self._device)
        logits = _mean_logits(self.network, images)
        loss = self._loss(logits, self._targets[batch].to(self._device))
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        for key, tensor in unique_tensors(self.network).items():
            self.averaged[key].lerp_(tensor, 1 - EMA_DECAY)


def has_class(case: PreparedCase) -> bool:
    """Tell whether the classifier can learn from this case."""
    return case.slices is not None and case.record.get("class") is not None


def _stack(cases: Sequence[PreparedCase], settings: Classify) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (n, planes, 2, H, W) slices and (n,) class indices."""
    names = list(settings.classes)
    usable = [case for case in cases if has_class(case)]
    slices = np.stack([case.slices for case in usable if case.slices is not None])
    targets = [names.index(case.record["class"]) for case in usable]
    return torch.from_numpy(slices), torch.tensor(targets)


def _mean_logits(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return (n, classes) logits of (n, planes, 2, H, W), averaged over planes as in inference."""
    return network(images.flatten(0, 1)).view(*images.shape[:2], -1).mean(dim=1)


def _augment(slices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Flip, rotate by 90°, shift, brighten and add noise; lesion size is informative and stays."""
    for axis in (3, 4):
        flipped = torch.rand(len(slices), generator=generator) < 0.5
        slices = torch.where(flipped.view(-1, 1, 1, 1, 1), slices.flip(axis), slices)
    rotated = torch.rand(len(slices), generator=generator) < 0.5
    slices = torch.where(rotated.view(-1, 1, 1, 1, 1), slices.transpose(3, 4), slices)
    shift = torch.randint(-SHIFT_PIXELS, SHIFT_PIXELS + 1, (2,), generator=generator)
    x, y = (shift + SHIFT_PIXELS).tolist()
    padded = functional.pad(slices.flatten(0, 1), (SHIFT_PIXELS,) * 4, mode="replicate")
    h, w = slices.shape[-2:]
    slices = padded[..., y : y + h, x : x + w].reshape(slices.shape).clone()
    offset = (torch.rand(len(slices), generator=generator) - 0.5) * 0.1
    noise = torch.randn(slices[:, :, 0].shape, generator=generator) * 0.02
    slices[:, :, 0] += offset.view(-1, 1, 1, 1) + noise
    return slices


def _validate(
    network: nn.Module, cases: Sequence[PreparedCase], settings: Classify, device: torch.device
) -> dict[str, Any]:
    """Return the one-vs-rest AUC of each class on the validation cases that have a class."""
    if not any(has_class(case) for case in cases):
        return {}
    slices, targets = _stack(cases, settings)
    network.eval()
    with torch.inference_mode():
        probabilities = _mean_logits(network, slices.to(device)).softmax(dim=1).cpu().numpy()
    metrics: dict[str, Any] = {"classifier_validation_lesions": len(targets)}
    for index, name in enumerate(settings.classes):
        area = auc(probabilities[:, index], targets.numpy() == index)
        if not math.isnan(area):  # NaN: all cases are on one side
            metrics[f"validation_auc_{name}"] = round(area, 4)
    return metrics

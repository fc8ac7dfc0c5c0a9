"""Losses of classes, labels and numbers. A row of `LOSSES` is a loss; its fields are keys."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

from volseg.errors import VolsegError
from volseg.recipe.classification import CLASSES, LABELS, NUMBER, ImageLoss
from volseg.registry import check_name, make_row


class LossTerm(ABC):
    """A loss per image of (N, outputs) logits and targets, which are probabilities or numbers."""

    kinds: ClassVar[tuple[str, ...]]
    __slots__ = ()

    @abstractmethod
    def per_output(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return (N, outputs): the sum over the outputs is the loss of an image."""


@dataclass(frozen=True, slots=True)
class CrossEntropy(LossTerm):
    """Cross-entropy of one class of several.

    Args:
        label_smoothing: part of the target that is spread over all classes (Szegedy et al. 2016).
        focal_gamma: > 0 down-weights images already classified correctly (Lin et al. 2017).
    """

    kinds: ClassVar[tuple[str, ...]] = (CLASSES,)
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    focal_gamma: Annotated[float, Field(ge=0, le=10)] = 0.0

    def per_output(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logs = outputs.log_softmax(1)
        smooth = self.label_smoothing
        targets = targets * (1 - smooth) + smooth / outputs.shape[1]
        return -targets * logs * _focus(logs.exp(), self.focal_gamma)


@dataclass(frozen=True, slots=True)
class BinaryCrossEntropy(LossTerm):
    """Cross-entropy of several labels, each of which an image has or not."""

    kinds: ClassVar[tuple[str, ...]] = (LABELS,)
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    focal_gamma: Annotated[float, Field(ge=0, le=10)] = 0.0

    def per_output(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        targets = targets * (1 - self.label_smoothing) + self.label_smoothing / 2
        present = (
            targets * functional.logsigmoid(outputs) * _focus(outputs.sigmoid(), self.focal_gamma)
        )
        absent = (
            (1 - targets)
            * functional.logsigmoid(-outputs)
            * _focus((-outputs).sigmoid(), self.focal_gamma)
        )
        return -(present + absent) / outputs.shape[1]


@dataclass(frozen=True, slots=True)
class SquaredError(LossTerm):
    kinds: ClassVar[tuple[str, ...]] = (NUMBER,)

    def per_output(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return functional.mse_loss(outputs, targets, reduction="none")


@dataclass(frozen=True, slots=True)
class AbsoluteError(LossTerm):
    kinds: ClassVar[tuple[str, ...]] = (NUMBER,)

    def per_output(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return functional.l1_loss(outputs, targets, reduction="none")


@dataclass(frozen=True, slots=True)
class Huber(LossTerm):
    """Squared error up to `delta` standard deviations of the number, absolute beyond."""

    kinds: ClassVar[tuple[str, ...]] = (NUMBER,)
    delta: Annotated[float, Field(gt=0, le=100)] = 1.0

    def per_output(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return functional.huber_loss(outputs, targets, reduction="none", delta=self.delta)


LOSSES: dict[str, type[LossTerm]] = {
    "cross_entropy": CrossEntropy,
    "binary_cross_entropy": BinaryCrossEntropy,
    "squared_error": SquaredError,
    "absolute_error": AbsoluteError,
    "huber": Huber,
}
DEFAULT_LOSS = {CLASSES: "cross_entropy", LABELS: "binary_cross_entropy", NUMBER: "huber"}


def make_loss(settings: ImageLoss, kind: str) -> LossTerm:
    """Return the loss of a closed recipe.

    Raises:
        VolsegError: there is no such loss, it refuses a key, or is not one of this kind of target.
    """
    check_name("loss", settings.name, LOSSES)
    row = LOSSES[settings.name]
    if kind not in row.kinds:
        fitting = [name for name, loss in LOSSES.items() if kind in loss.kinds]
        raise VolsegError(
            f"loss {settings.name!r} does not fit a target of kind {kind!r}",
            fix=f"use one of {', '.join(fitting)}",
            code="E_RECIPE",
        )
    return make_row(f"loss {settings.name!r}", row, settings.settings)


class ImageCriterion(nn.Module):
    """The mean loss of a batch; `weights` has one number per class, or per label."""

    weights: torch.Tensor | None

    def __init__(self, term: LossTerm, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self._term = term
        tensor = None if weights is None else torch.tensor(weights, dtype=torch.float32)
        self.register_buffer("weights", tensor, persistent=False)

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        losses = self._term.per_output(outputs.float(), targets)
        if self.weights is None:
            return losses.sum(1).mean()
        return (losses * self.weights).sum() / (targets * self.weights).sum().clamp_min(1e-6)


def _focus(probabilities: torch.Tensor, gamma: float) -> torch.Tensor | float:
    return (1 - probabilities) ** gamma if gamma else 1.0

"""The objective of classification: images, a loss of their targets, and a score of validation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from volseg.errors import VolsegError
from volseg.evaluation.classes import SCORES, Score
from volseg.inference.images import predict_outputs, to_predictions
from volseg.io.prepared_images import ImageSet
from volseg.networks import build_images, copy_weights
from volseg.networks.image_network import ImageNetwork
from volseg.recipe.classification import CLASSES, LABELS, NUMBER, ClassifyRecipe
from volseg.recipe.section import closed
from volseg.training.compress import Distillation
from volseg.training.image_batches import ImageBatches, class_weights
from volseg.training.image_losses import ImageCriterion, make_loss
from volseg.training.objective import (
    EveryEpoch,
    Optimisation,
    ParameterGroup,
    Total,
)


@dataclass(frozen=True, slots=True, eq=False)
class Outputs:
    """The network's outputs of all validation images, (N, outputs), with their targets."""

    logits: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Taught:
    """What a teacher says of each training image, as it is: asking again for every augmented copy
    takes most of a training.

    Args:
        outputs: (N, outputs) float32 of its networks, their mean. teacher: hash of its weights.
    """

    outputs: np.ndarray
    teacher: str


@dataclass(frozen=True, eq=False)
class ImageObjective:
    """Train the recipe's network on images; keep the weights with the best validation score.

    Args:
        starts_trained: the network starts from given weights, so that its base may be frozen.
        taught: what a teacher says of the training images, learned besides the targets.
    """

    training: ImageSet
    validation_images: ImageSet
    recipe: ClassifyRecipe
    starts_trained: bool = False
    taught: Taught | None = None

    @property
    def _score(self) -> Score:
        return SCORES[closed(self.recipe.train.monitor)]

    @property
    def score_name(self) -> str:
        return f"validation_{self.recipe.train.monitor}"

    @property
    def higher_is_better(self) -> bool:
        return self._score.higher_is_better

    @property
    def train(self) -> Optimisation:
        return cast(Optimisation, self.recipe.train)

    def identity(self) -> Sequence[Any]:
        cases = [*self.training.cases, *self.validation_images.cases]
        keys = [[case.id, case.sha256, case.target] for case in cases]
        teacher = "" if self.taught is None else self.taught.teacher
        return [self.recipe.sha256, keys, len(self.training), self.starts_trained, teacher]

    def network(self) -> ImageNetwork:
        network = build_images(self.recipe)
        # Convolutions on a CPU are faster with channels last.
        network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        return network

    def groups(self, network: nn.Module) -> list[ParameterGroup]:
        assert isinstance(network, ImageNetwork)
        decay = self.recipe.train.layer_decay if self.starts_trained else 1.0
        stages = [names for names in network.stages() if names]
        return [ParameterGroup(names, decay**depth) for depth, names in enumerate(reversed(stages))]

    def prepare(self, network: nn.Module, step: int) -> None:
        assert isinstance(network, ImageNetwork)
        train = self.recipe.train
        is_frozen = self.starts_trained and step < train.freeze_epochs * closed(
            train.steps_per_epoch
        )
        if is_frozen != bool(network.frozen):
            network.freeze(len(network.stages()) - 1 if is_frozen else 0)

    def batches(
        self, seed: int, device: torch.device, *, rank: int = 0, ranks: int = 1
    ) -> ImageBatches:
        assert ranks == 1, "images are trained on one device"
        targets = target_array(self.training, self.recipe)
        taught = None if self.taught is None else self.taught.outputs
        return ImageBatches(
            self.training, targets, self.recipe, seed=seed, device=device, taught=taught
        )

    def loss(self, total: Total | None) -> nn.Module:
        supervised = self._supervised()
        if self.taught is None:
            return supervised
        return TaughtLoss(Distillation(kind=closed(self.recipe.data.kind), supervised=supervised))

    def _supervised(self) -> ImageCriterion:
        weights, train = None, self.recipe.train
        if train.balance == "weights":
            weights = class_weights(target_array(self.training, self.recipe))
        return ImageCriterion(make_loss(train.loss, closed(self.recipe.data.kind)), weights)

    def validation(
        self, device: torch.device, seconds: float | None, tick: Callable[[str], None]
    ) -> ImageValidation:
        return ImageValidation(self, device, tick)

    def score(self, rows: Sequence[Outputs]) -> float | None:
        (outputs,) = rows
        predicted = to_predictions(outputs.logits, self.recipe.data)
        if self.recipe.data.kind == NUMBER:
            numbers = to_predictions(outputs.targets, self.recipe.data)
            return self._score(predicted[:, 0], numbers[:, 0])
        targets = outputs.targets > 0
        truth = targets if self.recipe.data.kind == LABELS else targets.argmax(axis=1)
        return self._score(predicted, truth)

    def validation_loss(self, rows: Sequence[Outputs]) -> float:
        (outputs,) = rows
        logits, targets = torch.from_numpy(outputs.logits), torch.from_numpy(outputs.targets)
        return float(self._supervised()(logits, targets))

    def metrics(self, rows: Sequence[Outputs]) -> Mapping[str, Any]:
        score = self.score(rows)
        facts = {"validation_images": len(rows[0].targets)}
        return facts if score is None else facts | {self.score_name: round(score, 4)}

    def n_missed(self, rows: Sequence[Outputs]) -> int:
        return 0 if rows else len(self.validation_images)

    def check(self) -> None:
        for image, case in zip(self.training.pixels, self.training.cases, strict=True):
            if not np.isfinite(image).all():
                raise VolsegError(
                    f"{case.id}: holds values that are not finite",
                    fix="correct the image or leave it out",
                    code="E_VALUES",
                )

    def out_of_memory(self, device: torch.device) -> VolsegError:
        return VolsegError(
            f"a batch of {self.recipe.train.batch_size} images of {self.recipe.images.pixels}² "
            f"pixels does not fit into the memory of {device}",
            fix="lower train.batch_size or images.pixels in the recipe",
            code="E_BUDGET",
        )


class TaughtLoss(nn.Module):
    """The loss of a student, whose targets are followed by the teacher's outputs."""

    def __init__(self, distillation: Distillation) -> None:
        super().__init__()
        self._distillation = distillation

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        n = outputs.shape[1]
        return self._distillation(outputs, targets[:, n:], targets[:, :n])


class ImageValidation(EveryEpoch):
    """Validates on all images after every epoch, as that costs little."""

    def __init__(
        self, objective: ImageObjective, device: torch.device, tick: Callable[[str], None]
    ) -> None:
        self._objective, self._device, self._tick = objective, device, tick
        self._network = objective.network()
        images = objective.validation_images
        self._targets = target_array(images, objective.recipe)

    def validate_subset(
        self, weights: Mapping[str, torch.Tensor], until: float = math.inf
    ) -> list[Outputs]:
        network = copy_weights(self._network, weights).to(self._device)
        infer = self._objective.recipe.infer
        images = self._objective.validation_images.pixels
        self._tick("validating")
        return [Outputs(predict_outputs(network, images, infer, self._device), self._targets)]

    validate_all = validate_subset


def known_targets(images: ImageSet, recipe: ClassifyRecipe) -> np.ndarray:
    """Return class indices (N,), labels (N, k) of zeros and ones, or numbers (N,)."""
    targets = target_array(images, recipe)
    if recipe.data.kind == NUMBER:
        return to_predictions(targets, recipe.data)[:, 0]
    return targets.argmax(axis=1) if recipe.data.kind == CLASSES else targets.astype(int)


def target_array(images: ImageSet, recipe: ClassifyRecipe) -> np.ndarray:
    """Return (N, outputs) float32: 1 for the class or the labels, or the scaled number."""
    data, cases = recipe.data, images.cases
    targets = np.zeros((len(cases), data.n_outputs), np.float32)
    for row, case in zip(targets, cases, strict=True):
        if data.kind == NUMBER:
            row[0] = (cast(float, case.target) - closed(data.mean)) / closed(data.sd)
        elif data.kind == CLASSES:
            row[cast(int, case.target)] = 1
        else:
            row[list(cast(tuple[int, ...], case.target))] = 1
    return targets

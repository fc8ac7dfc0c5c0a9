"""The objective of self-supervised pretraining: two views of an image have one embedding."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from volseg.errors import VolsegError
from volseg.io.prepared_images import ImageSet
from volseg.networks import build_images, copy_weights
from volseg.preprocessing.resample import send
from volseg.recipe.classification import ClassifyRecipe
from volseg.recipe.section import closed
from volseg.training.image_batches import drawn_indices
from volseg.training.objective import (
    EveryEpoch,
    Optimisation,
    ParameterGroup,
    ReadyBatches,
    Total,
)
from volseg.training.pretrain import SimSiam, Views

NETWORK = "network."  # start of the names of the weights to keep
VALIDATION_SEED = 0


class TwoViews(SimSiam):
    """SimSiam of both views in one tensor: (N, 2, C, H, W) → loss ()."""

    def forward(self, views: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(views[:, 0], views[:, 1])


class _Itself(nn.Module):
    """The loss that the module computes itself."""

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return outputs


@dataclass(frozen=True, slots=True, eq=False)
class Similarity:
    """Loss of the validation images, and how much their projections differ."""

    loss: float
    spread: float


@dataclass(frozen=True, eq=False)
class PretrainObjective:
    """Train the base of the recipe's network on images without labels."""

    training: ImageSet
    validation_images: ImageSet
    recipe: ClassifyRecipe

    @property
    def score_name(self) -> str:
        return "validation_loss"

    @property
    def higher_is_better(self) -> bool:
        return False

    @property
    def train(self) -> Optimisation:
        return cast(Optimisation, self.recipe.train)

    def identity(self) -> Sequence[Any]:
        cases = [*self.training.cases, *self.validation_images.cases]
        return ["pretrain", self.recipe.sha256, [[case.id, case.sha256] for case in cases]]

    def network(self) -> TwoViews:
        return TwoViews(build_images(self.recipe))

    def groups(self, network: nn.Module) -> list[ParameterGroup]:
        names = [name for name, _ in network.named_parameters()]
        return [ParameterGroup([name for name in names if not name.startswith("network.head.")])]

    def prepare(self, network: nn.Module, step: int) -> None:
        pass

    def batches(
        self, seed: int, device: torch.device, *, rank: int = 0, ranks: int = 1
    ) -> ViewBatches:
        assert ranks == 1, "images are trained on one device"
        return ViewBatches(self.training, closed(self.recipe.train.batch_size), seed, device)

    def loss(self, total: Total | None) -> nn.Module:
        return _Itself()

    def validation(
        self, device: torch.device, seconds: float | None, tick: Callable[[str], None]
    ) -> ViewValidation:
        return ViewValidation(self, device)

    def score(self, rows: Sequence[Similarity]) -> float:
        return rows[0].loss

    def validation_loss(self, rows: Sequence[Similarity]) -> None:
        return None

    def metrics(self, rows: Sequence[Similarity]) -> Mapping[str, Any]:
        return {
            "validation_loss": round(rows[0].loss, 4),
            "spread": round(rows[0].spread, 4),
            "training_images": len(self.training),
        }

    def n_missed(self, rows: Sequence[Similarity]) -> int:
        return 0 if rows else len(self.validation_images)

    def check(self) -> None:
        if not all(np.isfinite(image).all() for image in self.training.pixels):
            raise VolsegError(
                "an image holds values that are not finite",
                fix="`volseg check` names it",
                code="E_VALUES",
            )

    def out_of_memory(self, device: torch.device) -> VolsegError:
        return VolsegError(
            f"two views of {self.recipe.train.batch_size} images do not fit into the memory of "
            f"{device}",
            fix="lower train.batch_size or images.pixels in the recipe",
            code="E_BUDGET",
        )


class ViewBatches(ReadyBatches):
    """Two views of each image of a batch; a batch depends on its seed and step alone."""

    def __init__(self, images: ImageSet, size: int, seed: int, device: torch.device) -> None:
        self._images, self._seed, self._device = images, seed, device
        self._size = max(2, min(size, len(images)))

    def at(self, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        indices = drawn_indices(len(self._images), self._size, step, self._seed)
        images = np.stack([self._images.pixels[index] for index in indices])
        batch = send(torch.from_numpy(images), self._device)
        return [(two_views(batch, (self._seed, step)), torch.zeros(len(batch)))]


def two_views(images: torch.Tensor, seed: Sequence[int]) -> torch.Tensor:
    """Return (N, 2, C, H, W): two random views of each image."""
    state = np.random.SeedSequence(list(seed)).generate_state(1)[0]
    generator = torch.Generator().manual_seed(int(state))
    views = Views()
    return torch.stack([views(images, generator), views(images, generator)], dim=1)


class ViewValidation(EveryEpoch):
    """The loss of the same views of the validation images after every epoch."""

    def __init__(self, objective: PretrainObjective, device: torch.device) -> None:
        self._objective, self._device = objective, device
        self._network = objective.network()

    def validate_subset(
        self, weights: Mapping[str, torch.Tensor], until: float = math.inf
    ) -> list[Similarity]:
        network = cast(TwoViews, copy_weights(self._network, weights)).to(self._device).eval()
        pixels, size = self._objective.validation_images.pixels, 64
        losses, spreads, n = 0.0, 0.0, 0
        with torch.inference_mode():
            for start in range(0, len(pixels), size):
                images = torch.from_numpy(np.array(pixels[start : start + size])).to(self._device)
                views = two_views(images, (VALIDATION_SEED, start))
                losses += float(network(views)) * len(images)
                spreads += network.spread(images) * len(images) if len(images) > 1 else 0.0
                n += len(images)
        return [Similarity(losses / n, spreads / n)]

    validate_all = validate_subset

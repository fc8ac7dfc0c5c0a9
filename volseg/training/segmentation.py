"""The objective of segmentation: patches, an overlap loss, and the Dice of whole scans."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from volseg.errors import VolsegError
from volseg.evaluation.validation import ValidationRow, mean_dice, summary
from volseg.io.prepared import PreparedCase, read_prepared_case
from volseg.networks import build_segmentation
from volseg.recipe import Recipe, Train
from volseg.training.batches import Batches
from volseg.training.losses import SegmentationLoss
from volseg.training.objective import ParameterGroup, Total
from volseg.training.validator import Validator
from volseg.words import format_sizes

SCORE = "validation_dice"


@dataclass(frozen=True, eq=False)
class SegmentationObjective:
    """Train the recipe's network on patches; keep the weights with the best validation Dice."""

    training: Sequence[PreparedCase]
    validation_cases: Sequence[PreparedCase]
    recipe: Recipe

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle for a process that trains too but does not validate; it maps the same files."""
        paths = [(case.folder, case.id) for case in self.training]
        return _read, (paths, self.recipe)

    @property
    def score_name(self) -> str:
        return SCORE

    @property
    def higher_is_better(self) -> bool:
        return True

    @property
    def train(self) -> Train:
        return self.recipe.train

    def identity(self) -> Sequence[Any]:
        cases = [*self.training, *self.validation_cases]
        keys = [[case.id, case.record.get("key")] for case in cases]
        return [self.recipe.sha256, keys, len(self.training)]

    def network(self) -> nn.Module:
        return build_segmentation(self.recipe)

    def groups(self, network: nn.Module) -> list[ParameterGroup]:
        return [ParameterGroup([name for name, _ in network.named_parameters()])]

    def prepare(self, network: nn.Module, step: int) -> None:
        pass

    def batches(self, seed: int, device: torch.device, *, rank: int = 0, ranks: int = 1) -> Batches:
        return Batches(self.training, self.recipe, seed=seed, device=device, rank=rank, ranks=ranks)

    def loss(self, total: Total | None) -> SegmentationLoss:
        train = self.recipe.train
        regions = self.recipe.data.region_classes
        return SegmentationLoss(
            train.loss, class_weights=train.class_weights, regions=regions, total=total
        )

    def validation(
        self, device: torch.device, seconds: float | None, tick: Callable[[str], None]
    ) -> Validator:
        return Validator(self.validation_cases, self.recipe, device, seconds, tick=tick)

    def score(self, rows: Sequence[ValidationRow]) -> float:
        return mean_dice(rows)

    def validation_loss(self, rows: Sequence[ValidationRow]) -> None:
        return None

    def metrics(self, rows: Sequence[ValidationRow]) -> Mapping[str, Any]:
        return summary(rows)

    def n_missed(self, rows: Sequence[ValidationRow]) -> int:
        return len(self.validation_cases) - len({row.case_id for row in rows})

    def check(self) -> None:
        for case in self.training:
            case.check()

    def out_of_memory(self, device: torch.device) -> VolsegError:
        n, patch = self.recipe.batch_size, format_sizes(self.recipe.patch_shape)
        return VolsegError(
            f"{n} patches of {patch} voxels do not fit into the memory of {device}",
            fix="lower train.batch_size or train.patch_shape in the recipe, "
            "or set them to 'auto' and give the memory with --vram",
            code="E_BUDGET",
        )


def _read(paths: Sequence[tuple[Path | None, str]], recipe: Recipe) -> SegmentationObjective:
    training = [read_prepared_case(folder or Path(), case_id) for folder, case_id in paths]
    return SegmentationObjective(training, (), recipe)

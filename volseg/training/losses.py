"""Segmentation losses: an overlap term over the labels plus a voxel-wise term."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

from volseg.errors import VolsegError
from volseg.io.prepared import IGNORED
from volseg.recipe import Loss
from volseg.recipe.section import Positive
from volseg.registry import check_keys, check_name, keys_of, make_row

SMOOTH = 1e-5  # makes the loss of a label that is absent, and was not predicted, zero


class SegmentationLoss(nn.Module):
    """The training loss of logits and class indices: one number.

    Overlap is computed over the whole batch, so that a patch without a lesion is not a failure, and
    without the background. Sources: Milletari et al. 2016 (Dice), Sudre et al. 2017 (generalised
    Dice), Salehi et al. 2017 (Tversky), Lin et al. 2017 (focal).

    Args:
        class_weights: one for the background and one per label; they weight the Dice or Tversky
            term of a label and the voxel-wise term of its voxels.
        regions: the class indices of each output, where outputs may overlap.
        total: sums a tensor over the ranks that share the batch, so that each has the whole loss.
    """

    class_weights: torch.Tensor | None
    regions: torch.Tensor | None  # (outputs, 256): 1 where a class belongs to an output

    def __init__(
        self,
        settings: Loss,
        *,
        class_weights: Sequence[float] | None = None,
        regions: Sequence[Sequence[int]] | None = None,
        total: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self._total = total or (lambda tensor: tensor)
        self._overlap, self._voxel = make_terms(settings)
        weights = None
        if class_weights is not None:
            weights = torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)
        members = None
        if regions is not None:
            members = torch.zeros(len(regions), IGNORED + 1)
            for output, classes in enumerate(regions):
                members[output, list(classes)] = 1
        self.register_buffer("regions", members, persistent=False)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the loss; with deep supervision the weighted mean over the depths.

        Args:
            logits: (N, outputs, R, A, S), or with deep supervision (N, depths, outputs, R, A, S),
                the final output first.
            target: (N, R, A, S) class indices, `IGNORED` for unannotated voxels.
        """
        if logits.ndim == target.ndim + 1:
            return self._loss(logits, target)
        weights = [0.5**depth for depth in range(logits.shape[1])]
        terms = [w * self._loss(logits[:, depth], target) for depth, w in enumerate(weights)]
        return torch.stack(terms).sum() / sum(weights)

    def _loss(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits, target = logits.float(), target.long()
        annotated = target != IGNORED
        target = torch.where(annotated, target, 0)
        if self.regions is not None:
            probabilities = logits.sigmoid()
            truth = self.regions[:, target].movedim(0, 1)
        else:
            probabilities = logits.softmax(1)[:, 1:]
            one_hot = functional.one_hot(target, logits.shape[1]).movedim(-1, 1)
            truth = one_hot[:, 1:].to(logits.dtype)
        counted = annotated[:, None].to(logits.dtype)
        tp, fp, fn = self._total(_soft_counts(probabilities * counted, truth * counted))
        terms = self._overlap(tp, fp, fn)
        if self.class_weights is not None and terms.ndim:
            terms = terms * self.class_weights[1:]
        return terms.mean() + self._voxel_term(logits, target, truth, annotated)

    def _voxel_term(
        self,
        logits: torch.Tensor,
        target: torch.Tensor,
        truth: torch.Tensor,
        annotated: torch.Tensor,
    ) -> torch.Tensor:
        """Return the weighted mean over the annotated voxels."""
        weight = annotated.to(logits.dtype)
        if self.regions is not None:
            losses = self._voxel.of_regions(logits, truth)
        else:
            losses = self._voxel.of_classes(logits, target)
            if self.class_weights is not None:
                weight = weight * self.class_weights[target]
        loss, total_weight = self._total(torch.stack([(losses * weight).sum(), weight.sum()]))
        return loss / total_weight.clamp_min(1e-6)


def _soft_counts(probabilities: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Return soft true positives, false positives and false negatives of the batch: (3, labels)."""
    axes = [0, *range(2, truth.ndim)]
    tp = (probabilities * truth).sum(axes)
    return torch.stack([tp, probabilities.sum(axes) - tp, truth.sum(axes) - tp])


def make_terms(settings: Loss) -> tuple[Overlap, VoxelTerm]:
    """Return the overlap term and the voxel-wise term of a recipe.

    Raises:
        VolsegError: an unknown name or setting, an invalid value, or no term at all.
    """
    check_name("train.loss.overlap", settings.overlap, OVERLAPS)
    check_name("train.loss.voxel", settings.voxel, VOXEL_TERMS)
    rows = (*OVERLAPS.values(), *VOXEL_TERMS.values())
    keys = ["overlap", "voxel", *(key for row in rows for key in keys_of(row))]
    check_keys("train.loss", settings.settings, keys)
    if settings.overlap == settings.voxel == "none":
        raise VolsegError(
            "train.loss has neither an overlap nor a voxel term",
            fix=f"give overlap, one of {', '.join(OVERLAPS)}",
            code="E_RECIPE",
        )
    return _row(OVERLAPS[settings.overlap], settings), _row(VOXEL_TERMS[settings.voxel], settings)


def _row(row: type[Any], settings: Loss) -> Any:
    keys = keys_of(row)
    values = {key: value for key, value in settings.settings.items() if key in keys}
    return make_row("train.loss", row, values)


class Overlap(Protocol):
    """True positives, false positives, false negatives per label → a term per label, or one."""

    def __call__(self, tp: torch.Tensor, fp: torch.Tensor, fn: torch.Tensor) -> torch.Tensor: ...


class VoxelTerm(Protocol):
    """A loss per voxel (N, R, A, S) of logits (N, outputs, R, A, S)."""

    def of_classes(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Outputs exclude each other; `target` (N, R, A, S) holds class indices."""
        ...

    def of_regions(self, logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """Outputs may overlap; `truth` (N, outputs, R, A, S) is 1 inside and 0 outside."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Dice:
    def __call__(self, tp: torch.Tensor, fp: torch.Tensor, fn: torch.Tensor) -> torch.Tensor:
        return 1 - (2 * tp + SMOOTH) / (2 * tp + fp + fn + SMOOTH)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tversky:
    """Dice with weights for false positive and false negative voxels; Dice is 0.5 and 0.5."""

    tversky_fp_weight: Positive = 0.3
    tversky_fn_weight: Positive = 0.7

    def __call__(self, tp: torch.Tensor, fp: torch.Tensor, fn: torch.Tensor) -> torch.Tensor:
        errors = self.tversky_fp_weight * fp + self.tversky_fn_weight * fn
        return 1 - (tp + SMOOTH) / (tp + errors + SMOOTH)


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneralisedDice:
    """Weight labels by their inverse squared volume; an absent label counts as the rarest."""

    def __call__(self, tp: torch.Tensor, fp: torch.Tensor, fn: torch.Tensor) -> torch.Tensor:
        volume = tp + fn
        weights = torch.where(volume > 0, volume.clamp_min(1) ** -2, 0)
        weights = weights / weights.max().clamp_min(1e-30)  # 1 for the rarest
        weights = torch.where(volume > 0, weights, 1)
        overlap, total = (weights * tp).sum(), (weights * (2 * tp + fp + fn)).sum()
        return 1 - (2 * overlap + SMOOTH) / (total + SMOOTH)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoOverlap:
    def __call__(self, tp: torch.Tensor, fp: torch.Tensor, fn: torch.Tensor) -> torch.Tensor:
        return tp.new_zeros(())


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossEntropy:
    """Cross-entropy, of sigmoids for regions; the focal loss with `focal_gamma` over 0.

    Args:
        focal_gamma: over 0 down-weights voxels already classified correctly.
    """

    focal_gamma: Annotated[float, Field(ge=0, le=100)] = 0.0
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0

    def of_classes(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        losses = functional.cross_entropy(
            logits, target, reduction="none", label_smoothing=self.label_smoothing
        )
        if not self.focal_gamma:
            return losses
        return self._focal(losses, logits.softmax(1).gather(1, target[:, None])[:, 0])

    def of_regions(self, logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        soft = truth * (1 - self.label_smoothing) + self.label_smoothing / 2
        losses = functional.binary_cross_entropy_with_logits(logits, soft, reduction="none")
        if self.focal_gamma:
            losses = self._focal(losses, torch.where(truth > 0, logits, -logits).sigmoid())
        return losses.mean(1)

    def _focal(self, losses: torch.Tensor, p_true: torch.Tensor) -> torch.Tensor:
        return losses * (1 - p_true).clamp_min(SMOOTH) ** self.focal_gamma


@dataclass(frozen=True, slots=True, kw_only=True)
class NoVoxelTerm:
    def of_classes(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(target, dtype=logits.dtype)

    def of_regions(self, logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(truth[:, 0])


OVERLAPS: dict[str, type[Overlap]] = {
    "dice": Dice,
    "generalised_dice": GeneralisedDice,
    "tversky": Tversky,
    "none": NoOverlap,
}
VOXEL_TERMS: dict[str, type[VoxelTerm]] = {"cross_entropy": CrossEntropy, "none": NoVoxelTerm}

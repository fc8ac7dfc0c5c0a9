"""Segmentation losses: an overlap term over the labels plus a voxel-wise term."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional

from volseg.io.prepared import IGNORED
from volseg.recipe import Loss

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
        self._settings = settings
        self._overlap = OVERLAPS[settings.overlap]
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
        terms = self._overlap(tp, fp, fn, self._settings)
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
        """Return the weighted mean cross-entropy, or focal loss, over the annotated voxels."""
        smoothing, gamma = self._settings.label_smoothing, self._settings.focal_gamma
        if self.regions is not None:
            soft = truth * (1 - smoothing) + smoothing / 2
            losses = functional.binary_cross_entropy_with_logits(logits, soft, reduction="none")
            if gamma:
                p_true = torch.where(truth > 0, logits, -logits).sigmoid()
                losses = losses * (1 - p_true).clamp_min(SMOOTH) ** gamma
            losses, weight = losses.mean(1), annotated.to(logits.dtype)
        else:
            losses = functional.cross_entropy(
                logits, target, reduction="none", label_smoothing=smoothing
            )
            if gamma:
                p_true = logits.softmax(1).gather(1, target[:, None])[:, 0]
                losses = losses * (1 - p_true).clamp_min(SMOOTH) ** gamma
            weight = annotated.to(logits.dtype)
            if self.class_weights is not None:
                weight = weight * self.class_weights[target]
        loss, total_weight = self._total(torch.stack([(losses * weight).sum(), weight.sum()]))
        return loss / total_weight.clamp_min(1e-6)


def _soft_counts(probabilities: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Return soft true positives, false positives and false negatives of the batch: (3, labels)."""
    axes = [0, *range(2, truth.ndim)]
    tp = (probabilities * truth).sum(axes)
    return torch.stack([tp, probabilities.sum(axes) - tp, truth.sum(axes) - tp])


def _dice(tp: torch.Tensor, fp: torch.Tensor, fn: torch.Tensor, settings: Loss) -> torch.Tensor:
    return 1 - (2 * tp + SMOOTH) / (2 * tp + fp + fn + SMOOTH)


def _tversky(tp: torch.Tensor, fp: torch.Tensor, fn: torch.Tensor, settings: Loss) -> torch.Tensor:
    errors = settings.tversky_fp_weight * fp + settings.tversky_fn_weight * fn
    return 1 - (tp + SMOOTH) / (tp + errors + SMOOTH)


def _generalised_dice(
    tp: torch.Tensor, fp: torch.Tensor, fn: torch.Tensor, settings: Loss
) -> torch.Tensor:
    """Weight labels by their inverse squared volume; an absent label counts as the rarest."""
    volume = tp + fn
    weights = torch.where(volume > 0, volume.clamp_min(1) ** -2, 0)
    weights = weights / weights.max().clamp_min(1e-30)  # 1 for the rarest
    weights = torch.where(volume > 0, weights, 1)
    overlap, total = (weights * tp).sum(), (weights * (2 * tp + fp + fn)).sum()
    return 1 - (2 * overlap + SMOOTH) / (total + SMOOTH)


def _none(tp: torch.Tensor, fp: torch.Tensor, fn: torch.Tensor, settings: Loss) -> torch.Tensor:
    return tp.new_zeros(())


# True positives, false positives and false negatives per label → one term per label, or one in all.
Overlap = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Loss], torch.Tensor]
OVERLAPS: dict[str, Overlap] = {
    "dice": _dice,
    "generalised_dice": _generalised_dice,
    "tversky": _tversky,
    "none": _none,
}

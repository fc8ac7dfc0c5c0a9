"""Losses for segmentation: an overlap term over the labels plus a term voxel by voxel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional

from volseg.io.prepared import IGNORED
from volseg.recipe import Loss

SMOOTH = 1e-5  # so that a label that is nowhere, and was not found, costs nothing


class SegmentationLoss(nn.Module):
    """Logits and class indices → one number.

    The overlap is that of the whole batch, so that a patch without a lesion does not count as a failure, and of the labels alone: the
    background has no share in it. Source of the terms: Milletari et al. 2016 (Dice), Sudre et al. 2017 (generalised Dice), Salehi et al.
    2017 (Tversky), Lin et al. 2017 (focal).

    Args:
        class_weights: of the background and each label, by which a label's Dice or Tversky term and each of its voxels count.
        regions: outputs that may overlap: the class indices of which each is made.
        total: sums a tensor over the ranks that share the batch, so that each computes the loss of all of it.
    """

    class_weights: torch.Tensor | None
    regions: torch.Tensor | None  # (outputs, 256): whether a class belongs to an output

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
        weights = (
            None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        )
        self.register_buffer("class_weights", weights, persistent=False)
        belongs = None
        if regions is not None:
            belongs = torch.zeros(len(regions), IGNORED + 1)
            for output, classes in enumerate(regions):
                belongs[output, list(classes)] = 1
        self.register_buffer("regions", belongs, persistent=False)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """
        Args:
            logits: (N, outputs, R, A, S), or (N, depths, outputs, R, A, S) of a network with deep supervision, the final ones first.
            target: (N, R, A, S) class indices, `IGNORED` where it is not known.
        """
        if logits.ndim == target.ndim + 1:
            return self._one(logits, target)
        shares = [0.5**depth for depth in range(logits.shape[1])]
        terms = [share * self._one(logits[:, depth], target) for depth, share in enumerate(shares)]
        return torch.stack(terms).sum() / sum(shares)

    def _one(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits, target = logits.float(), target.long()
        known = target != IGNORED
        target = torch.where(known, target, 0)
        if self.regions is not None:
            probabilities = logits.sigmoid()
            truth = self.regions[:, target].movedim(0, 1)
        else:
            probabilities = logits.softmax(1)[:, 1:]
            truth = (
                functional.one_hot(target, logits.shape[1]).movedim(-1, 1)[:, 1:].to(logits.dtype)
            )
        judged = known[:, None].to(logits.dtype)
        both, extra, missed = self._total(_sums(probabilities * judged, truth * judged))
        terms = self._overlap(both, extra, missed, self._settings)
        if self.class_weights is not None and terms.ndim:
            terms = terms * self.class_weights[1:]
        return terms.mean() + self._voxels(logits, target, truth, known)

    def _voxels(
        self, logits: torch.Tensor, target: torch.Tensor, truth: torch.Tensor, known: torch.Tensor
    ) -> torch.Tensor:
        """Cross-entropy, or focal loss, as the weighted mean over the known voxels."""
        smoothing, gamma = self._settings.label_smoothing, self._settings.focal_gamma
        if self.regions is not None:
            soft = truth * (1 - smoothing) + smoothing / 2
            each = functional.binary_cross_entropy_with_logits(logits, soft, reduction="none")
            if gamma:
                right = torch.where(truth > 0, logits, -logits).sigmoid()
                each = each * (1 - right).clamp_min(SMOOTH) ** gamma
            each, weight = each.mean(1), known.to(logits.dtype)
        else:
            each = functional.cross_entropy(
                logits, target, reduction="none", label_smoothing=smoothing
            )
            if gamma:
                right = logits.softmax(1).gather(1, target[:, None])[:, 0]
                each = each * (1 - right).clamp_min(SMOOTH) ** gamma
            weight = known.to(logits.dtype)
            if self.class_weights is not None:
                weight = weight * self.class_weights[target]
        lost, of = self._total(torch.stack([(each * weight).sum(), weight.sum()]))
        return lost / of.clamp_min(1e-6)


def _sums(probabilities: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """(3, labels) over the batch: what both have, what only the network has, what only the truth has."""
    axes = [0, *range(2, truth.ndim)]
    both = (probabilities * truth).sum(axes)
    return torch.stack([both, probabilities.sum(axes) - both, truth.sum(axes) - both])


def _dice(
    both: torch.Tensor, extra: torch.Tensor, missed: torch.Tensor, settings: Loss
) -> torch.Tensor:
    return 1 - (2 * both + SMOOTH) / (2 * both + extra + missed + SMOOTH)


def _tversky(
    both: torch.Tensor, extra: torch.Tensor, missed: torch.Tensor, settings: Loss
) -> torch.Tensor:
    wrong = settings.tversky_fp_weight * extra + settings.tversky_fn_weight * missed
    return 1 - (both + SMOOTH) / (both + wrong + SMOOTH)


def _generalised_dice(
    both: torch.Tensor, extra: torch.Tensor, missed: torch.Tensor, settings: Loss
) -> torch.Tensor:
    """Labels weighted by the inverse square of their volume; one that is nowhere counts as the rarest that is there."""
    volume = both + missed
    weights = torch.where(volume > 0, volume.clamp_min(1) ** -2, 0)
    weights = weights / weights.max().clamp_min(1e-30)  # 1 for the rarest
    weights = torch.where(volume > 0, weights, 1)
    shared, total = (weights * both).sum(), (weights * (2 * both + extra + missed)).sum()
    return 1 - (2 * shared + SMOOTH) / (total + SMOOTH)


def _none(
    both: torch.Tensor, extra: torch.Tensor, missed: torch.Tensor, settings: Loss
) -> torch.Tensor:
    return both.new_zeros(())


# What both, only the network and only the truth have of each label → one number per label, or one over all of them.
Overlap = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Loss], torch.Tensor]
OVERLAPS: dict[str, Overlap] = {
    "dice": _dice,
    "generalised_dice": _generalised_dice,
    "tversky": _tversky,
    "none": _none,
}

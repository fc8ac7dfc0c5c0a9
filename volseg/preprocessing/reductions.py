"""Logits of a tile → label and confidence, interpolating only the classes that matter.

An interpolated logit is a mean of those around it, which saves most of the work: a tile whose
prepared voxels all have the same certain label needs no interpolation; other tiles interpolate only
the classes that can win. This changes a probability by at most `NEGLIGIBLE`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from volseg.errors import ScanError
from volseg.preprocessing.segments import BLOCK, Segment, interpolate

LARGEST_EXPONENT = 80.0  # its exponential still fits into float32
CERTAIN = 255  # confidence of a probability of 1
DOUBT = 0.1  # background tiles in which any label is less probable are skipped
NEGLIGIBLE = 2.0**-10  # error of a probability: a quarter of one count of the confidence

Reduced = tuple[torch.Tensor, torch.Tensor]  # winner and confidence of each native voxel


class LargestWins:
    """Reduction of exclusive classes to the largest logit; class 0 is the background."""

    def __init__(self, n_classes: int) -> None:
        # Descending, so that the first of several classes with equal logits wins.
        self._rank = torch.arange(n_classes, 0, -1).to(_rank_dtype(n_classes))[:, None, None, None]

    def certain(self, logits: torch.Tensor) -> int | None:
        """Return the label that a tile certainly has, by a quick test of its logits, or None."""
        first = int(logits[:, 0, 0, 0].argmax())
        others = [part.amax(0) for part in (logits[:first], logits[first + 1 :]) if len(part)]
        runner_up = others[0] if len(others) == 1 else torch.maximum(*others)
        low, high = (logits[first] - runner_up).aminmax()
        # Maximal probability of all other classes together, relative to the winner.
        doubt = DOUBT / (1 - DOUBT) if first == 0 else NEGLIGIBLE
        is_certain = math.log((len(logits) - 1) / doubt) <= float(low) <= float(high) < math.inf
        return first if is_certain else None

    def __call__(self, logits: torch.Tensor, tile: Sequence[Segment]) -> Reduced | None:
        """Reduce logits on prepared voxels to winner and confidence on native ones.

        None if all voxels are background.
        """
        rank = self._rank = self._rank.to(logits.device)
        best = logits.amax(0)
        _check_finite(best)
        top = ((logits == best) * rank).amax(0)
        # Probability of each class relative to the winner.
        ratio = torch.sub(logits, best).clamp_(min=-LARGEST_EXPONENT).exp_()
        total = ratio.sum(0)
        is_certain = (total <= 1 + NEGLIGIBLE) | ((top == len(rank)) & (total <= 1 / (1 - DOUBT)))
        first = int(top[0, 0, 0])
        if bool(((top == first) & is_certain).all()):
            return constant_tile(tile, len(rank) - first)
        needed = self._needed(logits, best, ratio, top, is_certain)
        values = interpolate(logits if needed is None else logits[needed], tile)
        best = values.amax(0)
        winner = len(rank) - ((values == best) * (rank if needed is None else rank[needed])).amax(0)
        won = values.sub_(best).clamp_(min=-LARGEST_EXPONENT).exp_().sum(0).reciprocal_()
        return winner, torch.where(winner == 0, 1 - won, won).mul_(CERTAIN).round_().to(torch.uint8)

    def _needed(
        self,
        logits: torch.Tensor,
        best: torch.Tensor,
        ratio: torch.Tensor,
        top: torch.Tensor,
        is_certain: torch.Tensor,
    ) -> torch.Tensor | None:
        """Return the classes to interpolate, None for all.

        Omitting the others changes no probability in the tile by more than `NEGLIGIBLE`: let M be
        the largest logit at each prepared voxel, and R the mean logit of the classes that win
        anywhere in a block. At a native voxel x, exp(logit) of a class is at most its largest ratio
        at a corner × exp(M(x)), and that of the winner at least exp(R(x)). So their quotient is at
        most that ratio × exp of the largest M - R at a corner.
        """
        if len(logits) <= 2:
            return None
        ranks = top.float()[None]
        is_open = (_pooled(ranks) != -_pooled(-ranks)) | (_pooled((~is_certain).float()[None]) > 0)
        is_open = is_open.flatten()
        ratio = _pooled(ratio).flatten(1)[:, is_open]
        if 2 * len(_not_negligible(ratio)) > len(ratio):
            return None
        wins = ratio >= 1
        winners = wins.any(1).nonzero().flatten()
        weights = wins[winners].float()
        weights /= weights.sum(0)
        corners = _corners(torch.cat([best[None], logits[winners]]))[:, is_open]
        gap = corners[0] - (weights[..., None] * corners[1:]).sum(0)
        return _not_negligible(ratio * gap.amax(1).clamp_(max=LARGEST_EXPONENT).exp_())


class Regions:
    """Reduction of overlapping classes, present where their logit is > 0; the last one wins."""

    def __init__(self, n_classes: int) -> None:
        self._rank = torch.arange(1, n_classes + 1).to(_rank_dtype(n_classes))[:, None, None, None]

    def certain(self, logits: torch.Tensor) -> int | None:
        """Return 0 (background) if no class is likely at any voxel of the tile, or None."""
        low, high = logits.amax(0).aminmax()
        is_background = -math.inf < float(low) <= float(high) <= math.log(DOUBT / (1 - DOUBT))
        return 0 if is_background else None

    def __call__(self, logits: torch.Tensor, tile: Sequence[Segment]) -> Reduced | None:
        """Reduce logits on prepared voxels to winner and confidence on native ones.

        None if all voxels are background.
        """
        rank = self._rank = self._rank.to(logits.device)
        _check_finite(logits.amax(0))
        top = ((logits > 0) * rank).amax(0)
        doubtful = math.log(DOUBT / (1 - DOUBT))
        is_certain = ((logits > -math.log(NEGLIGIBLE)) * rank).amax(0) == top
        is_certain &= (top > 0) | (logits.amax(0) <= doubtful)
        first = int(top[0, 0, 0])
        if bool(((top == first) & is_certain).all()):
            return constant_tile(tile, first)
        needed = (logits.flatten(1).amax(1) > doubtful).nonzero().flatten()
        values = interpolate(logits[needed], tile)
        winner = ((values > 0) * rank[needed]).amax(0)
        logit = torch.where(winner == 0, values.amax(0), (values * (rank[needed] == winner)).sum(0))
        return winner, logit.sigmoid_().mul_(CERTAIN).round_().to(torch.uint8)


def constant_tile(tile: Sequence[Segment], label: int) -> Reduced | None:
    """Return winner and confidence of a tile with one certain label; None for background."""
    if label == 0:
        return None
    shape = [len(segment.lower) for segment in tile]
    return torch.tensor(label).expand(shape), torch.tensor(CERTAIN, dtype=torch.uint8).expand(shape)


def _check_finite(largest: torch.Tensor) -> None:
    """Refuse logits that are not finite; `largest` is the maximum per voxel, NaN if one is NaN."""
    if not bool(largest.isfinite().all()):
        raise ScanError(
            "the output of the network is not finite",
            fix="use --precision fp32; if that fails too, the model does not suit this scan's "
            "intensities",
            code="E_LOGITS",
        )


def _rank_dtype(n: int) -> torch.dtype:
    return torch.uint8 if n < 256 else torch.int16 if n < 32768 else torch.int32


def _not_negligible(bound: torch.Tensor) -> torch.Tensor:
    """Return the indices of the classes without which the sum of the rest is negligible.

    Args:
        bound: (classes, blocks) upper bound of the ratio of each class.
    """
    ascending = bound.amax(1).sort()
    return ascending.indices[ascending.values.cumsum(0) > NEGLIGIBLE].sort().values


def _whole_blocks(values: torch.Tensor) -> torch.Tensor:
    """Repeat the last voxels of (classes, r, a, s) until each axis has whole blocks plus one."""
    pads = [(0, (1 - n) % BLOCK if n > 1 else BLOCK) for n in reversed(values.shape[1:])]
    padding = [n for pair in pads for n in pair]
    if not any(padding):
        return values
    return torch.nn.functional.pad(values[None], padding, mode="replicate")[0]


def _pooled(values: torch.Tensor) -> torch.Tensor:
    """Return the maximum of each block, including its far faces: (n, blocks, blocks, blocks)."""
    values = _whole_blocks(values)
    for axis in (1, 2, 3):
        values = values.unfold(axis, BLOCK + 1, BLOCK).amax(-1)
    return values


def _corners(values: torch.Tensor) -> torch.Tensor:
    """Return the voxels of each block, including its far faces: (n, blocks, voxels)."""
    values = _whole_blocks(values)
    for axis in (1, 2, 3):
        values = values.unfold(axis, BLOCK + 1, BLOCK)
    return values.flatten(4).flatten(1, 3)

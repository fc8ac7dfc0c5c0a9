"""Losses for segmentation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.losses import DiceCELoss
from torch import nn


def dice_cross_entropy(class_weights: Sequence[float] | None = None) -> nn.Module:
    """Soft Dice over the labels of the whole batch plus cross-entropy.

    Takes logits (N, classes, R, A, S) and class indices (N, 1, R, A, S). The background has no share in the Dice term, and
    the batch is pooled, so that a patch without a lesion does not count as a failure.
    """
    weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
    return DiceCELoss(to_onehot_y=True, softmax=True, include_background=False, batch=True, weight=weights)

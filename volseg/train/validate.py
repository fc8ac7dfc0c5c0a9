"""What a network is worth on whole validation scans: sliding window, per case and label, on the prepared grid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from volseg.evaluate.overlap import dice
from volseg.evaluate.validation import ValidationRow
from volseg.infer.backends import TorchBackend
from volseg.infer.stream import Tiling, predict_logits
from volseg.io.prepared import PreparedCase
from volseg.plan import Plan
from volseg.recipe import Recipe
from volseg.train.losses import IGNORED


def predicted_classes(
    network: nn.Module, case: PreparedCase, recipe: Recipe, plan: Plan, device: torch.device, *, overlap: float
) -> np.ndarray:
    """(R, A, S) class index of each prepared voxel, 0 where the reference is not known."""
    tiling = Tiling(patch_shape=plan.patch_shape, overlap=overlap)
    backend = TorchBackend(network, device)
    logits = predict_logits(np.asarray(case.image), backend, tiling, n_classes=recipe.data.n_outputs)
    if recipe.data.regions_class_order is None:
        found = logits.argmax(axis=0)
    else:  # nested: the last region that is there
        found = (np.arange(1, len(logits) + 1)[:, None, None, None] * (logits > 0)).max(axis=0)
    found[case.mask == IGNORED] = 0
    return found


def validate(
    network: nn.Module,
    cases: Sequence[PreparedCase],
    recipe: Recipe,
    plan: Plan,
    device: torch.device,
    *,
    overlap: float,
    fold: int = 0,
) -> list[ValidationRow]:
    """A row per case and label."""
    ml = float(np.prod(plan.spacing_mm)) / 1000
    rows = []
    for case in cases:
        found = predicted_classes(network, case, recipe, plan, device, overlap=overlap)
        truth = np.where(case.mask == IGNORED, 0, case.mask)
        for index, (value, name) in enumerate(recipe.data.label_names.items(), start=1):
            rows.append(
                ValidationRow(
                    case_id=case.id,
                    patient=str(case.record.get("patient", case.id)),
                    fold=fold,
                    label=value,
                    label_name=name,
                    dice=dice(truth, found, index),
                    reference_volume_ml=float((truth == index).sum()) * ml,
                    predicted_volume_ml=float((found == index).sum()) * ml,
                )
            )
    return rows

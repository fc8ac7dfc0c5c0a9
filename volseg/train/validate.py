"""What a network is worth on whole validation scans: sliding window, per case and label, on the prepared grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from volseg.columns import column
from volseg.evaluate.intervals import bootstrap_interval
from volseg.evaluate.overlap import dice
from volseg.infer.backends import TorchBackend
from volseg.infer.stream import Tiling, predict_logits
from volseg.io.prepared import PreparedCase
from volseg.plan import Plan
from volseg.recipe import Recipe
from volseg.train.losses import IGNORED


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationRow:
    """One label of one validation scan. NaN is unknown and is written as an empty cell."""

    case_id: str = column("", "name of the case")
    patient: str = column("", "whose scan it is")
    fold: int = column("", "the network that never saw it: 0 but for cross-validation")
    label: int = column("", "value in the mask")
    label_name: str = column("", "name of that value")
    dice: float = column("0 to 1", "2 |R ∩ P| / (|R| + |P|); 0 if one mask is empty; empty if both are")
    reference_volume_ml: float = column("mL", "volume in the reference mask, on the prepared grid")
    predicted_volume_ml: float = column("mL", "volume in the predicted mask, on the prepared grid")


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


def mean_dice(rows: Sequence[ValidationRow]) -> float:
    """Mean over labels and cases; a label absent from mask and prediction counts as 1, one found where none is as 0."""
    return float(np.nan_to_num([row.dice for row in rows], nan=1.0).mean())


def summary(rows: Sequence[ValidationRow], seed: int = 0) -> dict[str, Any]:
    """Mean Dice per label over the cases that have the label or were given it, with its 95 % interval over patients."""
    found: dict[str, Any] = {"validation_cases": len({row.case_id for row in rows})}
    for name in dict.fromkeys(row.label_name for row in rows):
        own = [row for row in rows if row.label_name == name]
        known = [row.dice for row in own if not np.isnan(row.dice)]
        if not known:
            continue
        found[f"validation_dice_{name}"] = round(float(np.mean(known)), 4)
        low, high = bootstrap_interval([row.dice for row in own], [row.patient for row in own], seed=seed)
        if not np.isnan(low):
            found[f"validation_dice_{name}_95"] = [round(low, 4), round(high, 4)]
    return found

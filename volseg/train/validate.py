"""What a network is worth on whole validation scans: sliding window, per case and label, on the prepared grid."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from volseg.evaluate.overlap import dice
from volseg.evaluate.validation import ValidationRow
from volseg.execute.time_budget import OutOfTime
from volseg.infer.backends import TorchBackend
from volseg.infer.stream import ArrayPlanes, Tiling, predict_slabs
from volseg.io.prepared import IGNORED, PreparedCase
from volseg.plan import Plan
from volseg.recipe import Recipe

TILED_VOXELS = 64**3  # of the tiles that are run together


def tiling_of(plan: Plan, overlap: float) -> Tiling:
    """Small tiles go through the network together: one alone leaves most of a device idle."""
    together = max(1, TILED_VOXELS // math.prod(plan.patch_shape))
    return Tiling(patch_shape=plan.patch_shape, overlap=overlap, batch_size=together)


def predicted_classes(
    network: nn.Module,
    case: PreparedCase,
    recipe: Recipe,
    plan: Plan,
    device: torch.device,
    *,
    overlap: float,
    on_tile: Callable[[bool], None] = lambda is_empty: None,
) -> np.ndarray:
    """(R, A, S) uint8 class index of each prepared voxel, 0 where the reference is not known.

    Logits become classes slab by slab, so that memory does not grow with classes × voxels. `on_tile` is called after
    each tile; what it raises ends the prediction.
    """
    case.check()
    tiling = tiling_of(plan, overlap)
    backend = TorchBackend(network, device)
    planes = ArrayPlanes(np.asarray(case.image))
    slabs = predict_slabs(planes, backend, tiling, n_classes=recipe.data.n_outputs, on_tile=on_tile)
    found = np.concatenate(
        [_classes(slab, recipe).cpu().numpy() for slab in slabs], axis=planes.axis
    )
    found[case.mask == IGNORED] = 0
    return found


def _classes(logits: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """(outputs, R, A, S) → (R, A, S) uint8 class indices."""
    order = recipe.data.regions_class_order
    if order is None:
        return logits.argmax(dim=0).to(torch.uint8)
    found = torch.zeros(logits.shape[1:], dtype=torch.uint8, device=logits.device)
    index = {value: number for number, value in enumerate(recipe.data.label_names, start=1)}
    for region, value in zip(
        logits, order, strict=True
    ):  # a later region is written over an earlier one
        found[region > 0] = index[value]
    return found


def validate(
    network: nn.Module,
    cases: Sequence[PreparedCase],
    recipe: Recipe,
    plan: Plan,
    device: torch.device,
    *,
    overlap: float,
    until: float = math.inf,
    on_tile: Callable[[str], None] = lambda case_id: None,
) -> list[ValidationRow]:
    """A row per case and label, or region where labels overlap.

    Args:
        until: a time of `time.monotonic` after which no tile is begun: the cases done by then have rows.
        on_tile: called after each tile with the case's id, for progress.
    """
    ml = float(np.prod(plan.spacing_mm)) / 1000
    rows = []

    def look(case: PreparedCase) -> np.ndarray:
        def after_tile(is_empty: bool) -> None:
            on_tile(case.id)
            if time.monotonic() > until:
                raise OutOfTime

        return predicted_classes(
            network, case, recipe, plan, device, overlap=overlap, on_tile=after_tile
        )

    for case in cases:
        try:
            found = look(case)
        except OutOfTime:
            break
        truth = np.where(case.mask == IGNORED, 0, case.mask)
        for value, name, classes in _judged(recipe):
            own, predicted = np.isin(truth, classes), np.isin(found, classes)
            rows.append(
                ValidationRow(
                    case_id=case.id,
                    patient=str(case.record.get("patient", case.id)),
                    fold=0,
                    label=value,
                    label_name=name,
                    dice=dice(own, predicted, 1),
                    reference_volume_ml=float(own.sum()) * ml,
                    predicted_volume_ml=float(predicted.sum()) * ml,
                )
            )
    return rows


def _judged(recipe: Recipe) -> list[tuple[int, str, tuple[int, ...]]]:
    """(mask value, name, class indices) of each label, or of each region."""
    data = recipe.data
    if data.regions is None or data.region_classes is None or data.regions_class_order is None:
        return [
            (value, name, (index,))
            for index, (value, name) in enumerate(data.label_names.items(), start=1)
        ]
    return list(zip(data.regions_class_order, data.regions, data.region_classes, strict=True))

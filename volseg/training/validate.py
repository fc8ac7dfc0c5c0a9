"""Validate a network on whole scans: sliding window, per case and label, on the prepared grid."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from volseg.evaluation.overlap import dice
from volseg.evaluation.validation import ValidationRow
from volseg.execution.time_budget import OutOfTimeError
from volseg.inference.stream import ArrayPlanes, Tiling, predict_slabs
from volseg.inference.torch_backend import TorchBackend
from volseg.io.prepared import IGNORED, PreparedCase
from volseg.recipe import Recipe

BATCH_VOXELS = 64**3  # of a batch of tiles


def tiling_of(recipe: Recipe, overlap: float) -> Tiling:
    """Return a tiling with small tiles in batches, as a single one leaves most of a device idle.

    Unlike `Tiling.of` it has neither mirrored copies nor a margin, which would take longer.
    """
    batch_size = max(1, BATCH_VOXELS // math.prod(recipe.patch_shape))
    return Tiling(patch_shape=recipe.patch_shape, overlap=overlap, batch_size=batch_size)


@dataclass(frozen=True, slots=True, eq=False)
class ScanPredictor:
    """Predicts whole prepared scans by sliding window. `overlap` is a fraction of the patch."""

    network: nn.Module
    recipe: Recipe
    device: torch.device
    overlap: float

    def classes(
        self, case: PreparedCase, on_tile: Callable[[bool], None] = lambda is_empty: None
    ) -> np.ndarray:
        """Predict the (R, A, S) uint8 class index of each voxel, 0 where it is unannotated.

        Logits become classes slab by slab, so that memory does not grow with classes × voxels.
        `on_tile` is called after each tile; an exception from it ends the prediction.
        """
        case.check()
        tiling = tiling_of(self.recipe, self.overlap)
        backend = TorchBackend(self.network, self.device)
        planes = ArrayPlanes(np.asarray(case.image))
        n_classes = self.recipe.data.n_outputs
        slabs = predict_slabs(planes, backend, tiling, n_classes=n_classes, on_tile=on_tile)
        classes = [_classes(slab, self.recipe).cpu().numpy() for slab in slabs]
        predicted = np.concatenate(classes, axis=planes.axis)
        predicted[case.mask == IGNORED] = 0
        return predicted


def _classes(logits: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Return (R, A, S) uint8 class indices of (outputs, R, A, S) logits."""
    order = recipe.data.regions_class_order
    if order is None:
        return logits.argmax(dim=0).to(torch.uint8)
    classes = torch.zeros(logits.shape[1:], dtype=torch.uint8, device=logits.device)
    index = {value: number for number, value in enumerate(recipe.data.label_names, start=1)}
    for region, value in zip(logits, order, strict=True):  # later regions overwrite earlier ones
        classes[region > 0] = index[value]
    return classes


def validate(
    predictor: ScanPredictor,
    cases: Sequence[PreparedCase],
    *,
    until: float = math.inf,
    on_tile: Callable[[str], None] = lambda case_id: None,
) -> list[ValidationRow]:
    """Return a row per case and label, or per case and region where labels overlap.

    Args:
        until: time of `time.monotonic` after which no tile is started; only the cases completed by
            then have rows.
        on_tile: called after each tile with the case's id, for progress.
    """
    rows = []

    def predict(case: PreparedCase) -> np.ndarray:
        def after_tile(is_empty: bool) -> None:
            on_tile(case.id)
            if time.monotonic() > until:
                raise OutOfTimeError

        return predictor.classes(case, after_tile)

    for case in cases:
        try:
            prediction = predict(case)
        except OutOfTimeError:
            break
        rows += _rows(case, prediction, predictor.recipe)
    return rows


def _rows(case: PreparedCase, prediction: np.ndarray, recipe: Recipe) -> Iterator[ValidationRow]:
    ml = float(np.prod(recipe.spacing_mm)) / 1000
    truth = np.where(case.mask == IGNORED, 0, case.mask)
    for value, name, classes in _targets(recipe):
        reference, predicted = np.isin(truth, classes), np.isin(prediction, classes)
        yield ValidationRow(
            case_id=case.id,
            patient=str(case.record.get("patient", case.id)),
            fold=0,
            label=value,
            label_name=name,
            dice=dice(reference, predicted, 1),
            reference_volume_ml=float(reference.sum()) * ml,
            predicted_volume_ml=float(predicted.sum()) * ml,
        )


def _targets(recipe: Recipe) -> list[tuple[int, str, tuple[int, ...]]]:
    """Return (mask value, name, class indices) of each label, or of each region."""
    data = recipe.data
    if data.regions is None or data.region_classes is None or data.regions_class_order is None:
        labels = enumerate(data.label_names.items(), start=1)
        return [(value, name, (index,)) for index, (value, name) in labels]
    return list(zip(data.regions_class_order, data.regions, data.region_classes, strict=True))

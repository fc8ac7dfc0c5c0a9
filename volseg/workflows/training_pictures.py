"""Pictures of a training: the patches that the network will see, and the validation cases that it did worst on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from volseg.evaluate.validation import ValidationRow
from volseg.io.prepared import PreparedCase
from volseg.recipe import Recipe
from volseg.workflows.prepared import Split

if TYPE_CHECKING:
    import torch

    from volseg.plan import Plan
    from volseg.train.loop import Trained

PREVIEWED = 12  # patches
WORST = 6  # validation cases


def preview_png(training: Sequence[PreparedCase], recipe: Recipe, plan: Plan, seed: int) -> bytes:
    """The first batches of the training as the network will see them."""
    import torch

    from volseg.report.training_figures import patches_png
    from volseg.train.batches import Batches

    images, masks = [], []
    with Batches(training, recipe, plan, seed=seed, device=torch.device("cpu")) as batches:
        for step in range(-(-PREVIEWED // plan.batch_size)):
            for batch_images, batch_masks in batches.at(step):
                images += list(batch_images.numpy())
                masks += list(batch_masks.numpy())
    return patches_png(images[:PREVIEWED], masks[:PREVIEWED], plan.spacing_mm)


def worst_cases_png(
    rows: Sequence[ValidationRow],
    trained: Mapping[int, Trained],
    splits: Sequence[Split],
    recipe: Recipe,
    plan: Plan,
    device: torch.device,
    *,
    before: Callable[[str], bool] = lambda case_id: True,
) -> bytes:
    """A picture of the validation cases with the lowest mean Dice: reference and prediction outlined.

    `before` is called with the id of each case; where it says no, the picture ends with the one before. Nothing without any.
    """
    from volseg.models import build_segmentation, set_weights
    from volseg.report.training_figures import comparison_png
    from volseg.train.validate import predicted_classes

    scores: dict[tuple[int, str], list[float]] = {}
    for row in rows:
        scores.setdefault((row.fold, row.case_id), []).append(
            1.0 if math.isnan(row.dice) else row.dice
        )
    worst = sorted(scores, key=lambda key: sum(scores[key]) / len(scores[key]))[:WORST]
    pictures = []
    for number, case_id in worst:
        if not before(case_id):
            break
        case = next(case for case in splits[number][1] if case.id == case_id)
        network = set_weights(build_segmentation(recipe), trained[number].weights)
        found = predicted_classes(network, case, recipe, plan, device, overlap=recipe.infer.overlap)
        score = sum(scores[number, case_id]) / len(scores[number, case_id])
        pictures.append(
            (
                f"{case_id}: Dice {score:.3f}",
                np.asarray(case.image[0]),
                np.asarray(case.mask),
                found,
            )
        )
    return comparison_png(pictures, plan.spacing_mm) if pictures else b""

"""Pictures of a training: augmented patches, and the validation cases with the lowest Dice."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from volseg.commands.prepared import Split
from volseg.evaluation.validation import ValidationRow
from volseg.io.prepared import PreparedCase
from volseg.recipe import Recipe

if TYPE_CHECKING:
    import torch

    from volseg.training.loop import Trained

N_PATCHES = 12
N_WORST = 6


def preview_png(training: Sequence[PreparedCase], recipe: Recipe, seed: int) -> bytes:
    """Draw the first patches of the training as the network will see them."""
    import torch

    from volseg.pages.training_figures import patches_png
    from volseg.training.batches import Batches

    images, masks = [], []
    with Batches(training, recipe, seed=seed, device=torch.device("cpu")) as batches:
        for step in range(-(-N_PATCHES // recipe.batch_size)):
            for batch_images, batch_masks in batches.at(step):
                images += list(batch_images.numpy())
                masks += list(batch_masks.numpy())
    return patches_png(images[:N_PATCHES], masks[:N_PATCHES], recipe.spacing_mm)


def worst_cases_png(
    rows: Sequence[ValidationRow],
    trained: Mapping[int, Trained],
    splits: Sequence[Split],
    recipe: Recipe,
    device: torch.device,
    *,
    before: Callable[[str], bool] = lambda case_id: True,
) -> bytes:
    """Draw the validation cases with the lowest mean Dice, with reference and prediction outlined.

    `before` is called with the id of each case; when it returns False, the picture ends with the
    case before. Empty without any case.
    """
    from volseg.networks import build_segmentation, copy_weights
    from volseg.pages.training_figures import comparison_png
    from volseg.training.validate import ScanPredictor

    scores: dict[tuple[int, str], list[float]] = {}
    for row in rows:
        score = 1.0 if math.isnan(row.dice) else row.dice
        scores.setdefault((row.fold, row.case_id), []).append(score)
    means = {key: sum(values) / len(values) for key, values in scores.items()}
    pictures, overlap = [], recipe.infer.overlap
    for number, case_id in sorted(means, key=lambda key: means[key])[:N_WORST]:
        if not before(case_id):
            break
        case = next(case for case in splits[number][1] if case.id == case_id)
        network = copy_weights(build_segmentation(recipe), trained[number].weights)
        predicted = ScanPredictor(network, recipe, device, overlap).classes(case)
        title = f"{case_id}: Dice {means[number, case_id]:.3f}"
        pictures.append((title, np.asarray(case.image[0]), np.asarray(case.mask), predicted))
    return comparison_png(pictures, recipe.spacing_mm) if pictures else b""

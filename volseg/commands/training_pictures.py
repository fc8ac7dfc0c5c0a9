"""Pictures of a training: augmented patches, and the validation cases with the lowest Dice."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from volseg.commands.prepared import Split
from volseg.commands.training_networks import Result
from volseg.io.prepared import PreparedCase
from volseg.networks import build_segmentation, copy_weights
from volseg.pages.training_figures import comparison_png, patches_png
from volseg.recipe import Recipe
from volseg.training.batches import Batches
from volseg.training.validate import ScanPredictor

N_PATCHES = 12
N_WORST = 6


def preview_png(training: Sequence[PreparedCase], recipe: Recipe, seed: int) -> bytes:
    """Draw the first patches of the training as the network will see them."""
    images, masks = [], []
    with Batches(training, recipe, seed=seed, device=torch.device("cpu")) as batches:
        for step in range(-(-N_PATCHES // recipe.batch_size)):
            for batch_images, batch_masks in batches.at(step):
                images += list(batch_images.numpy())
                masks += list(batch_masks.numpy())
    return patches_png(images[:N_PATCHES], masks[:N_PATCHES], recipe.spacing_mm)


def worst_cases_png(
    result: Result,
    splits: Sequence[Split],
    recipe: Recipe,
    device: torch.device,
    *,
    before: Callable[[str], bool],
) -> bytes:
    """Draw the validation cases with the lowest mean Dice, with reference and prediction outlined.

    `before` is called with the id of each case; when it returns False, the picture ends with the
    case before. Empty without any case.
    """
    scores: dict[tuple[int, str], list[float]] = {}
    for row in result.rows:
        score = 1.0 if math.isnan(row.dice) else row.dice
        scores.setdefault((row.fold, row.case_id), []).append(score)
    means = {key: sum(values) / len(values) for key, values in scores.items()}
    pictures, overlap = [], recipe.infer.overlap
    for number, case_id in sorted(means, key=lambda key: means[key])[:N_WORST]:
        if not before(case_id):
            break
        case = next(case for case in splits[number][1] if case.id == case_id)
        network = copy_weights(build_segmentation(recipe), result.trained[number].weights)
        predicted = ScanPredictor(network, recipe, device, overlap).classes(case)
        title = f"{case_id}: Dice {means[number, case_id]:.3f}"
        pictures.append((title, np.asarray(case.image[0]), np.asarray(case.mask), predicted))
    return comparison_png(pictures, recipe.spacing_mm) if pictures else b""

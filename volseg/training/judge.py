"""What validation images say of a network: temperature, operating points, sets, outliers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from volseg.evaluation.calibration import calibration_error, fit_temperature
from volseg.evaluation.classes import SCORES
from volseg.evaluation.conformal import OutlierModel, fit_conformal, fit_outliers
from volseg.evaluation.operating import (
    OperatingPoint,
    most_accurate_point,
    sensitive_point,
    youden_point,
)
from volseg.evaluation.regression import interval_half_width
from volseg.image_bundle import SENSITIVITY_TO_KEEP, Judgement
from volseg.inference.images import to_predictions
from volseg.recipe.classification import CLASSES, NUMBER, ClassifyRecipe

# of the operating points for ruling out: usual, and of gates and filters
SENSITIVITIES = (0.95, SENSITIVITY_TO_KEEP)
FEWEST_FOR_OUTLIERS = 30  # training images


def judge(
    outputs: np.ndarray,
    targets: np.ndarray,
    recipe: ClassifyRecipe,
    *,
    embeddings: tuple[np.ndarray, np.ndarray],
    training_targets: Sequence[Any],
) -> tuple[Judgement, dict[str, Any]]:
    """Return the judgement of a model, and its metrics on the same validation images.

    Args:
        outputs: (n, outputs) logits of the validation images. targets: as in training.
        embeddings: of training images, (m, d), and of validation images.
        training_targets: class index of each training image, or anything for other targets.
    """
    outliers = _outliers(*embeddings, training_targets, recipe)
    if recipe.data.kind == NUMBER:
        return _judge_numbers(outputs, targets, recipe, outliers)
    temperature = fit_temperature(outputs, _known(targets, recipe))
    before = to_predictions(outputs, recipe.data)
    probabilities = to_predictions(outputs, recipe.data, temperature)
    truth, names = _known(targets, recipe), recipe.data.names
    coverage = recipe.infer.coverage
    judgement = Judgement(
        temperature=temperature,
        points=tuple(_points(probabilities, targets > 0, names)),
        sets=fit_conformal(probabilities, truth, coverage=coverage),
        coverage=coverage,
        outliers=outliers,
    )
    metrics: dict[str, Any] = {"temperature": round(temperature, 4)}
    for name in ("auc", "average_precision", "accuracy", "balanced_accuracy", "f1", "log_loss"):
        value = SCORES[name](probabilities, truth)
        if value is not None:
            metrics[f"validation_{name}"] = round(value, 4)
    metrics["validation_ece"] = round(calibration_error(probabilities, truth), 4)
    metrics["validation_ece_without_temperature"] = round(calibration_error(before, truth), 4)
    return judgement, metrics


def _judge_numbers(
    outputs: np.ndarray, targets: np.ndarray, recipe: ClassifyRecipe, outliers: OutlierModel | None
) -> tuple[Judgement, dict[str, Any]]:
    predicted = to_predictions(outputs, recipe.data)[:, 0]
    truth = to_predictions(targets, recipe.data)[:, 0]
    coverage = recipe.infer.coverage
    half_width: float | None = interval_half_width(predicted - truth, coverage=coverage)
    if not math.isfinite(half_width):  # too few validation images for this coverage
        half_width = None
    judgement = Judgement(half_width=half_width, coverage=coverage, outliers=outliers)
    scores = {name: SCORES[name](predicted, truth) for name in ("mae", "mse", "r2")}
    return judgement, {
        f"validation_{name}": round(value, 4) for name, value in scores.items() if value is not None
    }


def _known(targets: np.ndarray, recipe: ClassifyRecipe) -> np.ndarray:
    """Return (n,) class indices, or (n, k) bool for several labels."""
    return targets.argmax(axis=1) if recipe.data.kind == CLASSES else targets > 0


def _points(
    probabilities: np.ndarray, positive: np.ndarray, names: Sequence[str]
) -> Sequence[OperatingPoint]:
    """Return the operating points of each class; of two classes, those of the second."""
    points = []
    for index, name in enumerate(names):
        scores, is_of_class = probabilities[:, index], positive[:, index]
        if (len(names) == 2 and index == 0) or is_of_class.all() or not is_of_class.any():
            continue
        points += [
            youden_point(scores, is_of_class, name),
            most_accurate_point(scores, is_of_class, name),
            *(sensitive_point(scores, is_of_class, name, at_least=rate) for rate in SENSITIVITIES),
        ]
    return points


def _outliers(
    training: np.ndarray, validation: np.ndarray, targets: Sequence[Any], recipe: ClassifyRecipe
) -> OutlierModel | None:
    if len(training) < FEWEST_FOR_OUTLIERS:
        return None
    classes = np.array(targets) if recipe.data.kind == CLASSES else None
    return fit_outliers(training, classes).with_threshold(validation)

"""Recipes of classifiers that leave everything to the plan, and what a request must agree with."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from volseg.errors import VolsegError
from volseg.io.cases import dataset_error
from volseg.io.image_cases import ImageSurvey, looks_like_images
from volseg.io.prepared_images import has_prepared_images
from volseg.recipe import AnyRecipe, ClassifyRecipe, as_any_recipe
from volseg.recipe.classification import Target
from volseg.recipe.images import ZScoreImage
from volseg.recipe.section import AUTO, closed
from volseg.recipe.train import Network
from volseg.words import format_list

DEFAULT_NETWORK = "cnn_small"
STUDENT_FEATURES = 8  # of the first block of a student, which is to be small; 32 is usual
OF_IMAGES = "only for models that classify images, but this one segments"  # refuses an option


def is_of_images(
    dataset: Path, recipe: Path | str | AnyRecipe | None, target: str | None = None
) -> bool:
    """Tell whether a request is about classifying images, rather than segmenting scans."""
    if recipe is not None:
        return isinstance(as_any_recipe(recipe), ClassifyRecipe)
    return target is not None or has_prepared_images(dataset) or looks_like_images(dataset)


def automatic_image_recipe(dataset: Path, target: str) -> ClassifyRecipe:
    """Return a recipe that leaves everything to the plan."""
    name = re.sub(r"[^a-z0-9]+", "_", dataset.absolute().name.casefold()).strip("_")[:50]
    content: dict[str, Any] = {
        "task": "classify",
        "name": name or "images",
        "description": f"Predicts {target!r} from images; the plan derives all settings "
        "from the data.",
        "intended_use": f"Predicting {target!r} from images like the training images.",
        "limits": "Not tested on images from elsewhere.",
        "data_source": f"The dataset named {dataset.absolute().name!r}; it was trained without a "
        "recipe, so nothing else is known of its origin.",
        "data": {"target": target},
        "network": {"name": DEFAULT_NETWORK, "features": AUTO},
    }
    return ClassifyRecipe.model_validate(content)


def unlabelled_recipe(dataset: Path) -> ClassifyRecipe:
    """Return a recipe for images without labels, whose intensities are standardised."""
    recipe = automatic_image_recipe(dataset, "image")
    data = Target(target="image", kind="classes", classes=("image", "other"), mean=0, sd=1)
    images = recipe.images.model_copy(update={"normalise": ZScoreImage()})
    train = recipe.train.model_copy(update={"monitor": "log_loss", "balance": "none"})
    return recipe.model_copy(update={"data": data, "images": images, "train": train})


def student_recipe(recipe: ClassifyRecipe, teacher: ClassifyRecipe) -> ClassifyRecipe:
    """Return an automatic recipe with the data and images of the teacher, and a narrow network."""
    from volseg.networks.cnn_small import features_for

    features = features_for(closed(teacher.images.pixels), first=STUDENT_FEATURES)
    network = Network.model_validate({"name": DEFAULT_NETWORK, "features": features})
    parts = {"data": teacher.data, "images": teacher.images, "network": network}
    return recipe.model_copy(update=parts)


def only_target(dataset: Path, survey: ImageSurvey) -> str:
    """Return the one column that can be the target."""
    if survey.mistakes and not survey.cases:
        raise dataset_error(survey.mistakes, str(dataset))
    if survey.likely_target is not None:
        return survey.likely_target
    names = [column.name for column in survey.target_columns]
    if not names:
        raise VolsegError(
            f"{dataset}: says nothing of its images that could be learned: no class or number "
            "with at least two different values",
            fix="put the images of each class into a folder of its own, or give a table with a "
            "column of classes or numbers",
            code="E_TARGET",
        )
    raise VolsegError(
        f"{dataset}: which column to predict is not stated; those that could be are "
        f"{format_list(names, 10)}",
        fix="name it: --target COLUMN, or data.target in a recipe",
        code="E_TARGET",
    )


def refuse_other_target(
    target: str | None,
    recipe: ClassifyRecipe,
    fix: str = "leave out --target, or change data.target in the recipe",
) -> None:
    """Refuse a requested target that is not that of the recipe."""
    if target not in (None, recipe.data.target):
        raise VolsegError(
            f"--target {target}: {recipe.name!r} has the target {recipe.data.target!r}",
            fix=fix,
            code="E_USAGE",
        )

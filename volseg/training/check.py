"""Check a recipe before anything is computed: its names, their settings, networks and patches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from volseg.errors import VolsegError
from volseg.evaluation.classes import SCORES
from volseg.measurement.fusible import FUSIBLE
from volseg.networks import (
    architecture,
    build_images,
    check_classifier,
    check_segmentation,
    settings_type,
)
from volseg.networks.sequence import sequence_settings
from volseg.postprocessing.steps import make_steps
from volseg.recipe import AUTO, ClassifyRecipe, Recipe
from volseg.recipe.classification import NUMBER
from volseg.recipe.section import closed
from volseg.registry import check_keys, check_name, keys_of
from volseg.training.image_losses import LOSSES, make_loss
from volseg.training.losses import make_terms


def recipe_problems(recipe: Recipe) -> list[VolsegError]:
    """Return every mistake in a recipe's steps, losses, networks and their settings.

    Where the recipe leaves its network to the plan, the patch is not checked.
    """
    problems = []
    for check in _checks(recipe):
        try:
            check()
        except VolsegError as problem:
            problems.append(problem)
    return problems


def check_recipe(recipe: Recipe) -> None:
    """Raise one VolsegError with all of `recipe_problems`, if there are any."""
    problems = recipe_problems(recipe)
    if len(problems) > 1:
        raise VolsegError(
            f"recipe {recipe.name!r}: {len(problems)} mistakes: "
            + "; ".join(problem.problem for problem in problems),
            fix="; ".join(dict.fromkeys(problem.fix for problem in problems)),
            code=problems[0].code,
        )
    for problem in problems:
        raise problem


def check_image_recipe(recipe: ClassifyRecipe) -> None:
    """Check the recipe of a classifier; raise one VolsegError with its first mistake, if any."""
    for problem in image_recipe_problems(recipe):
        raise problem


def image_recipe_problems(recipe: ClassifyRecipe) -> Iterator[VolsegError]:
    """Yield the mistakes in network, loss and score of a recipe, as far as it is closed."""
    train, data = recipe.train, recipe.data
    checks: list[Callable[[], Any]] = []
    if train.monitor != AUTO:
        checks.append(partial(check_monitor, recipe))
    if train.loss.name != AUTO:
        check_loss = partial(make_loss, train.loss, data.kind)
        if data.kind == AUTO:  # which kinds the loss fits is checked when the plan is made
            check_loss = partial(check_name, "loss", train.loss.name, LOSSES)
        checks.append(check_loss)
    checks.append(partial(_check_image_network, recipe))
    if recipe.fusion is not None:
        checks += [
            partial(check_name, "measurement", name, dict.fromkeys(FUSIBLE))
            for name in recipe.fusion.measurements
        ]
    for check in checks:
        try:
            check()
        except VolsegError as problem:
            yield problem


def check_monitor(recipe: ClassifyRecipe) -> None:
    """Check that the score that selects the best epoch exists, and fits the target."""
    name, kind = str(recipe.train.monitor), recipe.data.kind
    check_name("score", name, SCORES)
    needed = "numbers" if kind == NUMBER else "classes"
    if kind != AUTO and SCORES[name].task != needed:
        fitting = [name for name, score in SCORES.items() if score.task == needed]
        raise VolsegError(
            f"train.monitor {name!r} does not fit a target of kind {kind!r}",
            fix=f"use one of {', '.join(fitting)}",
            code="E_RECIPE",
        )


def _check_image_network(recipe: ClassifyRecipe) -> None:
    import torch

    if recipe.sequence is not None:
        sequence_settings(recipe.sequence.name, **recipe.sequence.settings)
    if recipe.open_keys:
        row, settings = settings_type(recipe.network.name), recipe.network.settings
        check_keys(f"network {recipe.network.name!r}", settings, keys_of(row))
        return
    with torch.device("meta"):
        build_images(recipe)
    pixels = closed(recipe.images.pixels)
    for problem, fix in architecture(recipe.network).patch_mistakes((pixels, pixels)):
        raise VolsegError(f"images.pixels {problem}", fix=fix, code="E_RECIPE")


def _checks(recipe: Recipe) -> Iterator[Callable[[], Any]]:
    for part, section in ((recipe, "train"), (recipe.coarse, "roi.train")):
        if part is not None:
            yield partial(check_segmentation, part, section=section)
            yield partial(make_terms, part.train.loss)
    for step in recipe.postprocess:
        yield partial(make_steps, [step])
    if recipe.classify is not None:
        yield partial(check_classifier, recipe.classify)

"""Check a recipe before anything is computed: its names, their settings, networks and patches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from volseg.errors import VolsegError
from volseg.networks import check_classifier, check_segmentation
from volseg.postprocessing.steps import make_steps
from volseg.recipe import Recipe
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


def _checks(recipe: Recipe) -> Iterator[Callable[[], Any]]:
    for part, section in ((recipe, "train"), (recipe.coarse, "roi.train")):
        if part is not None:
            yield partial(check_segmentation, part, section=section)
            yield partial(make_terms, part.train.loss)
    for step in recipe.postprocess:
        yield partial(make_steps, [step])
    if recipe.classify is not None:
        yield partial(check_classifier, recipe.classify)

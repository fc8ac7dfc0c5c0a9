"""Read recipes, and say what is wrong with them."""

from __future__ import annotations

import os
import re
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from volseg.errors import VolsegError
from volseg.inputs import NotAFileError, read_toml, shorten
from volseg.recipe.classification import ClassifyRecipe
from volseg.recipe.segment import SegmentRecipe
from volseg.words import lower_first

# A recipe is one of these, told apart by its key `task`.
Recipe = SegmentRecipe
AnyRecipe = SegmentRecipe | ClassifyRecipe
TASKS: dict[str, type[AnyRecipe]] = {"segment": SegmentRecipe, "classify": ClassifyRecipe}
R = TypeVar("R", SegmentRecipe, ClassifyRecipe)

MAX_MISTAKES = 20  # listed in one message


def load_recipe(recipe: str | Path) -> Recipe:
    """Read a recipe of segmentation from a TOML file, or a shipped one by its name.

    Raises:
        VolsegError: as `load_any_recipe`, or it is the recipe of another task.
    """
    return _of_task(load_any_recipe(recipe), SegmentRecipe, str(recipe))


def load_any_recipe(recipe: str | Path) -> AnyRecipe:
    """Read a recipe of any task from a TOML file, or a shipped one by its name.

    Raises:
        VolsegError: the file is missing, is not TOML, or has mistakes, which are all listed.
    """
    path = _find(recipe)
    try:
        content = read_toml(path)
    except NotAFileError as error:
        raise VolsegError(
            f"{path}: {error.strerror}", fix="give a TOML file", code="E_NOTFILE"
        ) from error
    except OSError as error:
        raise VolsegError(
            f"{path}: cannot be read ({error.strerror})", fix="check its permissions", code="E_PERM"
        ) from error
    except ValueError as error:
        raise VolsegError(
            f"{path}: not a TOML file ({error})", fix="correct that line", code="E_RECIPE"
        ) from error
    return parse_any_recipe(content, where=str(path))


def as_recipe(recipe: Path | str | AnyRecipe) -> Recipe:
    """Return a recipe of segmentation, or read it from a file or by its name.

    Raises:
        VolsegError: it is none of these (`E_TYPE`), or as `load_recipe`.
    """
    where = recipe.name if isinstance(recipe, AnyRecipe) else str(recipe)
    return _of_task(as_any_recipe(recipe), SegmentRecipe, where)


def as_any_recipe(recipe: Path | str | AnyRecipe) -> AnyRecipe:
    """Return the recipe itself, or read it from a file or by its name.

    Raises:
        VolsegError: it is none of these (`E_TYPE`), or as `load_any_recipe`.
    """
    if isinstance(recipe, AnyRecipe):
        return recipe
    if not isinstance(recipe, str | PathLike):
        raise VolsegError(
            f"recipe is of type {type(recipe).__name__}",
            fix="give a Recipe, the path of a TOML file or the name of a shipped recipe",
            code="E_TYPE",
        )
    return load_any_recipe(recipe)


def parse_recipe(content: object, *, where: str) -> Recipe:
    """Return the recipe of segmentation with this content; `where` names it in errors."""
    return _of_task(parse_any_recipe(content, where=where), SegmentRecipe, where)


def parse_image_recipe(content: object, *, where: str) -> ClassifyRecipe:
    """Return the recipe of a classifier with this content; `where` names it in errors."""
    return _of_task(parse_any_recipe(content, where=where), ClassifyRecipe, where)


def _of_task(recipe: AnyRecipe, task: type[R], where: str) -> R:
    if isinstance(recipe, task):
        return recipe
    (needed,) = (name for name, model in TASKS.items() if model is task)
    raise VolsegError(
        f"{where}: the recipe's task is {recipe.task!r}, and {needed!r} is needed here",
        fix=f'give a recipe with task = "{needed}"',
        code="E_TASK",
    )


def parse_any_recipe(content: object, *, where: str) -> AnyRecipe:
    """Return the recipe of any task with this parsed content; `where` names it in errors."""
    task = content.get("task", "segment") if isinstance(content, dict) else "segment"
    model = TASKS.get(task) if isinstance(task, str) else None
    try:
        if model is not None:
            return model.model_validate(content)
        mistakes = [f"task: {shorten(repr(task))} is unknown; known tasks are {', '.join(TASKS)}"]
    except ValidationError as error:
        mistakes = validation_messages(error, TASKS[task])
    raise VolsegError(
        f"{where}: {len(mistakes)} mistake{'s' * (len(mistakes) > 1)}: {listed(mistakes)}",
        fix="correct the recipe; pipelines/README.md explains each key",
        code="E_RECIPE",
    )


def validation_messages(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Return a sentence for each mistake that a model, such as `Recipe`, found in its input."""
    mistakes = _of_the_likeliest(error.errors(include_input=False, include_url=False))
    return [text for mistake in mistakes for text in _sentences(mistake, model)]


def _of_the_likeliest(mistakes: list[Any]) -> list[Any]:
    """Return the mistakes without those of the alternative "auto", which each open value has."""
    places = [_keys(mistake["loc"]) for mistake in mistakes]
    return [
        mistake
        for mistake, place in zip(mistakes, places, strict=True)
        if mistake["loc"][-1:] != ("literal['auto']",)
        or sum(other[: len(place)] == place for other in places) == 1
    ]


def _keys(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Return a place in a recipe without the names that pydantic gives to types and unions."""
    return tuple(part for part in location if not re.search(r"[\[(]|^constrained-", str(part)))


def listed(mistakes: list[str]) -> str:
    """Join mistakes to one line, with the first `MAX_MISTAKES` in full."""
    more = len(mistakes) - MAX_MISTAKES
    shown = "; ".join(shorten(text, 1000) for text in mistakes[:MAX_MISTAKES])
    return shown + (f"; and {more} more" if more > 0 else "")


def shipped_recipes() -> dict[str, Path]:
    """Return name → file of the shipped recipes, in the package or in pipelines/ of a checkout."""
    package = Path(__file__).parents[1]
    for folder in (package / "pipelines", package.parent / "pipelines"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.toml"))}
    return {}


def _find(recipe: str | Path) -> Path:
    shipped = shipped_recipes()
    path = Path(recipe)
    # A pipe passes: it is refused where it is opened.
    if os.path.exists(path) and not (str(recipe) in shipped and path.is_dir()):
        return path
    if str(recipe) in shipped:
        return shipped[str(recipe)]
    raise VolsegError(
        f"{recipe}: there is no such recipe",
        fix=f"give a TOML file, or one of {', '.join(shipped)}",
        code="E_RECIPE",
    )


def _sentences(mistake: Any, model: type[BaseModel]) -> list[str]:
    path = ".".join(shorten(str(part)) for part in _keys(mistake["loc"]))
    if mistake["type"] == "extra_forbidden":
        parts = (*_keys(mistake["loc"][:-1]), mistake["loc"][-1])  # the key is the user's
        path = ".".join(shorten(str(part)) for part in parts)
        keys = ", ".join(_known_keys(mistake["loc"], model))
        return [f"{path}: unknown key; known keys are {keys}"]
    lines = mistake["msg"].removeprefix("Value error, ").splitlines()
    name = path or model.model_config.get("title") or model.__name__.strip("_").lower()
    return [f"{name}: {lower_first(line)}" for line in lines]


def _known_keys(location: tuple[int | str, ...], model: type[BaseModel]) -> list[str]:
    """Return the keys of the section that has an unknown key at this location."""
    candidates: list[type[BaseModel]] = [model]
    for part in location[:-1]:
        field = candidates[0].model_fields.get(str(part))
        if field is not None:
            candidates = _models_in(field.annotation)
        else:  # the tag of a union, such as `window` in preprocess.normalise.window.hihg
            tagged = [
                candidate
                for candidate in candidates
                if (tag := candidate.model_fields.get("method")) is not None
                and part in get_args(tag.annotation)
            ]
            candidates = tagged or candidates
    return list(candidates[0].model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]

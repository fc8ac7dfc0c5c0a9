"""`volseg check`, and facts about volseg itself: the columns and the shipped model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from volseg.columns import columns_of
from volseg.commands.batch import check_pair
from volseg.commands.preparing import PREPARED_FILE, read_training_case
from volseg.errors import VolsegError
from volseg.inputs import read_json
from volseg.io.cases import Case
from volseg.io.layouts import survey_cases
from volseg.io.volumes import read_header, read_mask, read_volume
from volseg.measurement.units import judge_unit
from volseg.postprocessing.steps import make_steps
from volseg.recipe import Recipe, as_recipe, load_recipe, shipped_recipes
from volseg.store.tables import TABLES
from volseg.volume import Volume


def check(path: Path | str, recipe: Path | str | Recipe | None = None) -> list[dict[str, str]]:
    """Return every problem of a dataset, scan, recipe or model, each with its fix.

    Args:
        recipe: also check a dataset against this recipe: channels, label values and grids.
    """
    path = Path(path)
    try:
        if path.suffix == ".toml" or (not path.exists() and str(path) in shipped_recipes()):
            _check_names(load_recipe(path))
        elif (path / "model.json").is_file():
            from volseg.bundle import load_bundle
            from volseg.inference.memory import check_patch

            bundle = load_bundle(path)
            for part in (bundle, bundle.coarse):
                if part is not None:
                    check_patch(part)
                    part.segmentation_networks()
            bundle.classifier_network()
        elif (path / PREPARED_FILE).is_file():
            raise VolsegError(
                f"{path}: is a prepared folder",
                fix="check the dataset that it was made from",
                code="E_USAGE",
            )
        elif path.is_dir() or path.suffix == ".csv":
            recipe = None if recipe is None else as_recipe(recipe)
            channels = None if recipe is None else recipe.data.channels
            allow_missing = recipe is not None and recipe.data.missing == "empty"
            cases, mistakes = survey_cases(path, channels, allow_missing=allow_missing)
            fix = "correct the dataset"
            problems = [_problem(str(path), "E_REQUEST", mistake, fix) for mistake in mistakes]
            return problems + [problem for case in cases for problem in _check_case(case, recipe)]
        else:
            warnings = read_header(path).warnings
            read_volume(path)
            return [_problem(str(path), warning.code, warning.text) for warning in warnings]
    except VolsegError as error:
        return [_problem_of(str(path), error)]
    return []


def _check_names(recipe: Recipe) -> None:
    """Check the names of post-processing steps and networks in a recipe."""
    from volseg.networks import check_networks

    make_steps(recipe.postprocess)
    if not recipe.leaves_size_open:  # else the plan chooses the network
        check_networks(recipe)


def _check_case(case: Case, recipe: Recipe | None) -> Iterator[dict[str, str]]:
    volumes: dict[str, Volume] = {}
    for name, path in case.images.items():
        try:
            volumes[name] = read_volume(path)
            for warning in read_header(path).warnings:
                yield _problem(case.id, warning.code, warning.text)
        except VolsegError as error:
            yield _problem_of(case.id, error)
    if recipe is not None and recipe.data.channels[0] in volumes:
        first = volumes[recipe.data.channels[0]]
        doubt = judge_unit(first, recipe.data.intensity_unit, by="the recipe").doubt
        if doubt:
            fix = "correct data.intensity_unit or the scan"
            yield _problem(case.id, "W_UNIT", doubt, fix)
    if case.reference is None:
        return
    try:
        mask = read_mask(case.reference)
        if not mask.array.any():
            yield _problem(case.id, "W_EMPTY", f"{case.reference}: holds no labelled voxel")
        if recipe is not None and volumes.keys() == case.images.keys():
            read_training_case(case, recipe)
            return
        for name, volume in volumes.items():
            check_pair(volume, mask, str(case.images[name]), str(case.reference))
    except VolsegError as error:
        yield _problem_of(case.id, error)


def _problem(where: str, code: str, problem: str, fix: str = "") -> dict[str, str]:
    return {"where": where, "code": code, "problem": problem, "fix": fix}


def _problem_of(where: str, error: VolsegError) -> dict[str, str]:
    return _problem(where, error.code, error.problem, error.fix)


def table_columns() -> dict[str, list[tuple[str, str, str, str]]]:
    """Return (name, unit, meaning, source) of every column of every table."""
    return {name: columns_of(row_type) for name, row_type in TABLES.items()}


def shipped_model_text() -> str:
    """Return what to print when the shipped model is used, without loading it."""
    from volseg.bundle import shipped_bundle

    recipe = read_json(shipped_bundle() / "model.json")["recipe"]
    return (
        f"using the model that ships with volseg: {recipe['name']}. For: {recipe['intended_use']} "
        f"Limits: {recipe['limits']}"
    )

"""`volseg check` and the facts about volseg itself: columns and the shipped model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from volseg.columns import columns_of
from volseg.errors import VolsegError
from volseg.evaluate.detection import DetectionRow
from volseg.evaluate.overlap import OverlapRow
from volseg.evaluate.validation import ValidationRow
from volseg.execute.cpu import total_memory
from volseg.inputs import read_json
from volseg.io.cases import Case, survey_cases
from volseg.io.nifti import read_header, read_mask, read_volume
from volseg.measure.changes import LesionChange
from volseg.measure.response import PatientResponse
from volseg.measure.rows import CaseRow, LesionMeasurement
from volseg.measure.units import judge_unit
from volseg.postprocess.steps import make_steps
from volseg.recipe import Recipe, load_recipe, shipped_recipes
from volseg.volume import Volume
from volseg.workflows.batch import check_pair
from volseg.workflows.preparing import PREPARED_FILE, as_recipe, read_training_case


def check(path: Path | str, recipe: Path | str | Recipe | None = None) -> list[dict[str, str]]:
    """Every problem of a dataset, scan, recipe or model at once, each with its fix; an empty list where there is none.

    Args:
        recipe: for which a dataset is to be fit: its channels, label values and grids are looked at too.
    """
    path = Path(path)
    try:
        if path.suffix == ".toml" or (not path.exists() and str(path) in shipped_recipes()):
            _check_names(load_recipe(path))
        elif (path / "model.json").is_file():
            from volseg.bundle import load_bundle
            from volseg.infer.memory import check_patch, network_bytes

            bundle = load_bundle(path)
            for part in (bundle, bundle.coarse):
                if part is not None:
                    check_patch(part, network_bytes(part), total_memory())
                    part.segmentation_networks()
            bundle.classifier_network()
        elif (path / PREPARED_FILE).is_file():
            raise VolsegError(
                f"{path}: is a prepared folder",
                fix="check the dataset that it was made from",
                code="E_USAGE",
            )
        elif path.is_dir() or path.suffix == ".csv":
            chosen = None if recipe is None else as_recipe(recipe)
            channels = None if chosen is None else chosen.data.channels
            may_miss = chosen is not None and chosen.data.missing == "empty"
            cases, mistakes = survey_cases(path, channels, may_miss=may_miss)
            found = [
                {
                    "where": str(path),
                    "code": "E_REQUEST",
                    "problem": mistake,
                    "fix": "correct the dataset",
                }
                for mistake in mistakes
            ]
            return found + [problem for case in cases for problem in _check_case(case, chosen)]
        else:
            header = read_header(path)
            read_volume(path)
            return [
                {"where": str(path), "code": warning.code, "problem": warning.text, "fix": ""}
                for warning in header.warnings
            ]
    except VolsegError as error:
        return [_problem(str(path), error)]
    return []


def _check_names(recipe: Recipe) -> None:
    """The names in a recipe that are files or rows of tables."""
    from volseg.models import check_networks

    make_steps(recipe.postprocess)
    if not recipe.is_open:  # else the plan says what network it is
        check_networks(recipe)


def _check_case(case: Case, recipe: Recipe | None) -> Iterator[dict[str, str]]:
    volumes: dict[str, Volume] = {}
    for name, path in case.images.items():
        try:
            volumes[name] = read_volume(path)
            for warning in read_header(path).warnings:
                yield {"where": case.id, "code": warning.code, "problem": warning.text, "fix": ""}
        except VolsegError as error:
            yield _problem(case.id, error)
    if recipe is not None and recipe.data.channels[0] in volumes:
        doubt = judge_unit(
            volumes[recipe.data.channels[0]], recipe.data.intensity_unit, by="the recipe"
        ).doubt
        if doubt:
            yield {
                "where": case.id,
                "code": "W_UNIT",
                "problem": doubt,
                "fix": "correct data.intensity_unit or the scan",
            }
    if case.reference is None:
        return
    try:
        mask = read_mask(case.reference)
        if not mask.array.any():
            text = f"{case.reference}: holds no labelled voxel"
            yield {"where": case.id, "code": "W_EMPTY", "problem": text, "fix": ""}
        if recipe is not None and volumes.keys() == case.images.keys():
            read_training_case(case, recipe)
            return
        for name, volume in volumes.items():
            check_pair(volume, mask, str(case.images[name]), str(case.reference))
    except VolsegError as error:
        yield _problem(case.id, error)


def _problem(where: str, error: VolsegError) -> dict[str, str]:
    return {"where": where, "code": error.code, "problem": error.problem, "fix": error.fix}


def table_columns() -> dict[str, list[tuple[str, str, str, str]]]:
    """(name, unit, meaning, source) of every column of every table."""
    tables = {
        "lesions.csv": LesionMeasurement,
        "cases.csv": CaseRow,
        "comparison.csv": LesionChange,
        "response.csv": PatientResponse,
        "evaluation.csv": OverlapRow,
        "detections.csv": DetectionRow,
        "validation.csv": ValidationRow,
    }
    return {name: columns_of(row) for name, row in tables.items()}


def shipped_model_text() -> str:
    """Return what to print when the shipped model is used, without loading it."""
    from volseg.bundle import shipped_bundle

    recipe = read_json(shipped_bundle() / "model.json")["recipe"]
    return (
        f"using the model that ships with volseg: {recipe['name']}. For: {recipe['intended_use']} "
        f"Limits: {recipe['limits']}"
    )

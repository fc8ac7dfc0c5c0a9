"""`volseg check`, and facts about volseg itself: the columns and the shipped model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from volseg.columns import columns_of
from volseg.commands.automatic_recipe import unnamed_values
from volseg.commands.checking_images import check_images
from volseg.commands.checking_scans import ScanQuality, case_of_scan, output_names
from volseg.commands.image_planning import check_image_model, target_problems
from volseg.commands.placing import place_mask
from volseg.commands.preparing import PREPARED_FILE
from volseg.commands.problems import Problem, problem_at, problem_of
from volseg.commands.training_cases import TrainingSet, read_training_case
from volseg.errors import VolsegError, given_path, severity_of
from volseg.evaluation.class_rows import CLASSES, PROBABILITY, described_columns
from volseg.inputs import read_json
from volseg.io.cases import ONE_CHANNEL, Case, Survey
from volseg.io.dicom_layout import are_slices, descriptions
from volseg.io.image_cases import looks_like_images
from volseg.io.images import is_image, read_image
from volseg.io.layouts import (
    Spacing,
    find_scans,
    of_spacing,
    spacing_remarks,
    survey_cases,
)
from volseg.io.volumes import mask_notes, read_header, read_mask, read_volume
from volseg.measurement.units import judge_unit
from volseg.options import Progress, ignore_progress
from volseg.options.declare import voxel_spacing
from volseg.recipe import (
    AnyRecipe,
    ClassifyRecipe,
    Recipe,
    as_any_recipe,
    load_any_recipe,
    shipped_recipes,
)
from volseg.store.outputs import MODEL, OutputFolder, folder_content
from volseg.store.tables import TABLES, VARIANTS
from volseg.volume import Volume

# Advice on a remark, where it is not to edit a table: a head that was understood needs none.
ADVICE = {
    "N_HEAD": "",
    "N_SERIES": "",
    "N_SPACING": "",
    "N_SKIPPED": "",
    "W_SKIPPED": "export what is missing again",
    "W_DICOM": "",  # it says what to do
    "W_LIST": "add them to the list, or delete the list",
}


def check(
    path: Path | str,
    recipe: Path | str | AnyRecipe | None = None,
    *,
    out: Path | str | None = None,
    spacing: Sequence[float] | str | None = None,
    progress: Progress = ignore_progress,
) -> list[Problem]:
    """Return every problem of a dataset, scan, recipe or model, each with its fix.

    Args:
        recipe: also check a dataset against this recipe: channels, label values and grids.
        out: also judge the quality of scans; the folder, created if missing, gets quality.csv, a
            row of facts and flags per scan, quality.png, a sheet with the middle slice of each, and
            quality.html, a page with both.
        spacing: voxel spacing I,J,K in mm of arrays and stacks of pictures, which state none.
        progress: called with a stage, the fraction of it that is done, and a detail.

    Raises:
        VolsegError: `out` cannot be used, or `path` holds no 3D scans to write about.

    Example:
        >>> import volseg
        >>> [problem["code"] for problem in volseg.check("sample_data")]
        ['W_EMPTY', 'W_EMPTY']
    """
    path, spacing_mm = given_path(path), _stated_spacing(spacing)
    quality = ScanQuality(progress, is_judged=out is not None)
    if out is None:
        return _every_problem(path, recipe, spacing_mm, quality)
    with OutputFolder(given_path(out), "check", inputs=[path]) as outputs:
        outputs.check_overwrites(output_names())
        problems = _every_problem(path, recipe, spacing_mm, quality)
        if not quality and not any(severity_of(problem["code"]) == "error" for problem in problems):
            raise VolsegError(
                f"{path}: holds no 3D scans, so there is no quality.csv to write",
                fix="leave out --out",
                code="E_USAGE",
            )
        if quality:
            quality.write(outputs)
    return problems


def _stated_spacing(spacing: Sequence[float] | str | None) -> Spacing | None:
    try:
        return voxel_spacing(spacing)
    except ValueError as error:
        problem, fix = error.args
        raise VolsegError(f"--spacing {problem}", fix=fix, code="E_USAGE") from error


def _every_problem(
    path: Path,
    recipe: Path | str | AnyRecipe | None,
    spacing_mm: Spacing | None,
    quality: ScanQuality,
) -> list[Problem]:
    problems: list[Problem] = []
    try:
        if spacing_mm is None:
            problems.extend(_problems(path, recipe, quality))
        else:
            given = None if recipe is None else as_any_recipe(recipe)
            survey = _survey_of_stacks(path, spacing_mm)
            problems.extend(
                _check_dataset(path, given if isinstance(given, Recipe) else None, survey, quality)
            )
    except VolsegError as error:
        problems.append(problem_of(str(path), error))
    return problems


def _problems(
    path: Path, recipe: Path | str | AnyRecipe | None, quality: ScanQuality
) -> Iterable[Problem]:
    if path.suffix == ".toml" or (not path.exists() and str(path) in shipped_recipes()):
        return _check_recipe(path)
    if (path / "model.json").is_file():
        return _check_model(path)
    if (path / PREPARED_FILE).is_file():
        raise VolsegError(
            f"{path}: is a prepared folder",
            fix="check the dataset that it was made from",
            code="E_USAGE",
        )
    if (content := folder_content(path)) is not None:
        state = "began and did not finish" if content == MODEL else "wrote"  # without model.json
        raise VolsegError(
            f"{path}: holds {content}, which volseg {state}",
            fix="check the dataset or the scans that it was made from",
            code="E_USAGE",
        )
    given = None if recipe is None else as_any_recipe(recipe)
    if isinstance(given, ClassifyRecipe):
        problems = (problem_of(str(path), error) for error in target_problems(path, given))
        return chain(check_images(path, given.data.target), problems)
    if given is None and looks_like_images(path):
        return check_images(path)
    if path.is_dir() or path.suffix == ".csv":
        survey = survey_cases(path) if given is None else TrainingSet(path, given).survey()
        return _check_dataset(path, given, survey, quality)
    return _check_scan(path, quality)


def _check_recipe(path: Path) -> Iterator[Problem]:
    from volseg.training.check import image_recipe_problems, recipe_problems

    recipe = load_any_recipe(path)
    is_of_images = isinstance(recipe, ClassifyRecipe)
    problems = image_recipe_problems(recipe) if is_of_images else recipe_problems(recipe)
    for problem in problems:
        yield problem_of(str(path), problem)


def _check_model(path: Path) -> Iterable[Problem]:
    from volseg.attached import load_attached, role_folder
    from volseg.bundle import load_bundle
    from volseg.image_bundle import is_image_model
    from volseg.inference.memory import check_patch

    if is_image_model(path):
        return check_image_model(path)
    bundle = load_bundle(path)
    for part in (bundle, bundle.coarse_bundle):
        if part is not None:
            check_patch(part)
            part.segmentation_networks()
    bundle.classifier_network()
    attached = load_attached(bundle, path)
    return chain.from_iterable(check_image_model(path / role_folder(role)) for role in attached)


def _check_scan(path: Path, quality: ScanQuality) -> Iterator[Problem]:
    if is_image(path) and not are_slices([path]):
        read_image(path)
        return
    header = read_header(path)
    quality.add(case_of_scan(path), ONE_CHANNEL, read_volume(path), header)
    for warning in header.warnings:
        yield problem_at(str(path), warning.code, warning.text)
    yield from quality.problems(str(path))


def _survey_of_stacks(path: Path, spacing_mm: Spacing) -> Survey:
    """Return the cases of a dataset, with this spacing of those that state none."""
    cases = find_scans([path], None, spacing=spacing_mm)
    cases = [of_spacing(case, spacing_mm) for case in cases]
    return Survey(cases, [], spacing_remarks(cases, spacing_mm), {})


def _check_dataset(
    path: Path, recipe: Recipe | None, survey: Survey, quality: ScanQuality
) -> Iterator[Problem]:
    for mistake in survey.mistakes:
        yield problem_at(str(path), "E_DATASET", mistake, "correct the dataset")
    for remark in _with_descriptions(survey.remarks, path):
        code, _, text = remark.partition(": ")
        fix = ADVICE.get(code, "`volseg cases` writes a table to look at and edit")
        yield problem_at(str(path), code, text, fix)
    checker = _CaseChecker(path, recipe, quality)
    for count, case in enumerate(survey.cases, start=1):
        yield from checker.problems_of(case)
        quality.progress("Checking", count / len(survey.cases), case.id)
    yield from quality.problems(str(path))
    if recipe is None or not checker.labels:
        return
    for value, name in recipe.data.label_names.items():
        if value not in checker.labels:
            yield problem_at(
                str(path),
                "W_LABELS",
                f"no mask holds label {name!r} (value {value}) of recipe {recipe.name!r}",
                "correct data.labels in the recipe, or add cases with this label",
            )


def _with_descriptions(remarks: Sequence[str], path: Path) -> Iterator[str]:
    """Yield remarks; those on DICOM series with what the scanner calls them."""
    names = descriptions(path) if any(text.startswith("N_SERIES") for text in remarks) else {}
    for remark in remarks:
        key = next((key for key in names if f": {key}: " in remark), None)
        yield remark if key is None else remark.replace(key, f"{key} ({names[key]})", 1)


class _CaseChecker:
    """Checks each case of a dataset, with the recipe if there is one."""

    def __init__(self, dataset: Path, recipe: Recipe | None, quality: ScanQuality) -> None:
        self._dataset, self._recipe, self._quality = dataset, recipe, quality
        self.labels: set[int] = set()  # in the masks that could be read

    def problems_of(self, case: Case) -> Iterator[Problem]:
        """Yield the problems of a case, and collect the values of its mask."""
        volumes: dict[str, Volume] = {}
        failed: set[str] = set()
        for name, path in case.images.items():
            try:
                volumes[name], header = read_volume(path), read_header(path)
                self._quality.add(case, name, volumes[name], header)
                for warning in header.warnings:
                    yield problem_at(case.id, warning.code, warning.text)
            except VolsegError as error:
                self._quality.fail(case, name, error)
                failed.add(str(error))
                yield problem_of(case.id, error)
        yield from self._unit_problems(case, volumes)
        if case.reference is None:
            return
        try:
            yield from self._mask_problems(case, case.reference, volumes)
        except VolsegError as error:
            if str(error) not in failed:  # contours need the scan
                yield problem_of(case.id, error)

    def _unit_problems(self, case: Case, volumes: Mapping[str, Volume]) -> Iterator[Problem]:
        data = None if self._recipe is None else self._recipe.data
        if data is not None and (first := volumes.get(data.channels[0])) is not None:
            doubt = judge_unit(first, data.intensity_unit, by="the recipe").doubt
            if doubt:
                fix = "correct data.intensity_unit or the scan"
                yield problem_at(case.id, "W_UNIT", doubt, fix)

    def _mask_problems(
        self, case: Case, path: Path, volumes: Mapping[str, Volume]
    ) -> Iterator[Problem]:
        """Yield a problem of the mask at `path`.

        Raises:
            VolsegError: the mask cannot be read, or does not fit the scans or the recipe.
        """
        scan = next(iter(case.images.values()))
        mask = read_mask(path, like=scan)
        values = np.unique(mask.array).tolist()
        self.labels.update(values)
        if not mask.array.any():
            yield problem_at(case.id, "W_EMPTY", f"{path}: holds no labelled voxel")
        if self._recipe is not None and volumes.keys() == case.images.keys():
            for note in read_training_case(case, self._recipe).notes:
                yield _problem_of_note(case.id, path, note)
            return
        for note in mask_notes(path, scan):
            yield _problem_of_note(case.id, path, note)
        if self._recipe is None and (problem := unnamed_values(values, self._dataset)):
            yield problem_at(case.id, "E_LABELS", problem, "correct the mask, or name the value")
        for name, volume in volumes.items():
            names = {"mask_name": str(path), "grid_name": str(case.images[name])}
            for note in place_mask(mask, volume.geometry, **names).notes:
                yield _problem_of_note(case.id, path, note)


def _problem_of_note(where: str, path: Path, note: str) -> Problem:
    """Return a harmless oddity of a mask, given as `W_CODE: sentence`."""
    code, _, text = note.partition(": ")
    return problem_at(where, code, f"{path}: {text}")


def table_columns() -> dict[str, list[tuple[str, str, str, str]]]:
    """Return (name, unit, meaning, source) of every column of every table."""
    tables = {name: columns_of(row_type) for name, row_type in TABLES.items()}
    tables |= {f"{name} of classes and numbers": columns_of(VARIANTS[name]) for name in VARIANTS}
    meaning = "probability of each class of `class_probabilities`; only if a lesion was classified"
    tables["lesions.csv"].append((f"{PROBABILITY}<class>", "0 to 1", meaning, ""))
    return tables | {CLASSES: described_columns()}


def shipped_model_text() -> str:
    """Return what to print when the shipped model is used, without loading it."""
    from volseg.bundle import shipped_bundle

    recipe = read_json(shipped_bundle() / "model.json")["recipe"]
    return (
        f"using the model that ships with volseg: {recipe['name']}. For: {recipe['intended_use']} "
        f"Limits: {recipe['limits']}"
    )

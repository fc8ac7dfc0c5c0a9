"""Load a prepared folder, and split its cases into training and validation."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from volseg.commands.planning import N_FOLDS
from volseg.commands.preparing import PREPARED_FILE, preparation_settings
from volseg.errors import VolsegError
from volseg.inputs import read_json
from volseg.io.cases import is_valid_id
from volseg.io.prepared import PreparedCase, read_prepared_case
from volseg.recipe import Recipe, as_recipe, parse_recipe
from volseg.words import format_count

if TYPE_CHECKING:
    from volseg.planning.close import Closed
    from volseg.planning.fingerprint import DatasetFingerprint

SLICES = 3  # through a lesion, for the classifier
Split = tuple[Sequence[PreparedCase], Sequence[PreparedCase]]  # training, validation


def split_cases(
    cases: Sequence[PreparedCase], fold: int | None, seed: int, folds: int = N_FOLDS
) -> tuple[list[PreparedCase], list[PreparedCase]]:
    """Return the training and validation cases.

    Without a fold the prepared split decides; else validation is fold `fold` of `folds` random
    parts of the patients, drawn with the seed.
    """
    if fold is None:
        split_of = {case.id: case.record["split"] for case in cases}
    else:
        patient_of = {case.id: case.record["patient"] for case in cases}
        held_out = _held_out(set(patient_of.values()), fold, folds, seed)
        split_of = {
            name: "val" if patient in held_out else "train" for name, patient in patient_of.items()
        }
    training = [case for case in cases if split_of[case.id] == "train"]
    validation = [case for case in cases if split_of[case.id] == "val"]
    if not training or not validation:
        raise VolsegError(
            f"{len(training)} training and {len(validation)} validation cases are too few",
            fix="add cases; training and validation need at least one each",
            code="E_DATASET",
        )
    return training, validation


def _held_out(patients: Collection[str], fold: int, folds: int, seed: int) -> set[str]:
    """Return the patients of one of `folds` random parts.

    Raises:
        VolsegError: there are fewer patients than folds.
    """
    if len(patients) < folds:
        raise VolsegError(
            f"{format_count(len(patients), 'patient')} cannot be divided into {folds} folds",
            fix=f"give --folds {len(patients)} or fewer",
            code="E_USAGE",
        )
    order = np.random.default_rng(seed).permutation(sorted(patients))
    return set(order[fold::folds].tolist())


def load_prepared(
    folder: Path, recipe: Path | str | Recipe | None
) -> tuple[Closed, DatasetFingerprint, list[PreparedCase]]:
    """Load closed recipe with reasons, fingerprint and cases of a prepared folder.

    Args:
        recipe: its training settings replace the folder's; None keeps them.

    Raises:
        VolsegError: the folder is not a complete prepared folder, or does not fit the recipe.
    """
    from volseg.planning.close import Closed, fill
    from volseg.planning.fingerprint import DatasetFingerprint

    try:
        header = read_json(folder / PREPARED_FILE)
        stored = parse_recipe(header["recipe"], where=str(folder / PREPARED_FILE))
        plan = Closed.from_json(header["plan"])
        fingerprint = DatasetFingerprint.model_validate(header["fingerprint"])
        names, keys = list(header["cases"]), dict(header["keys"])
        if not all(isinstance(name, str) and is_valid_id(name) for name in names):
            raise ValueError("cases holds a name that is not a case id")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VolsegError(
            f"{folder}: not a prepared folder ({error})",
            fix="run `volseg preprocess` again",
            code="E_PREPARED",
        ) from error
    recipe = stored if recipe is None else as_recipe(recipe)
    if preparation_settings(recipe) not in map(preparation_settings, (stored, plan.recipe)):
        raise VolsegError(
            f"{folder}: was prepared for recipe {stored.name!r} with other [data], [preprocess] or "
            "[classify] settings",
            fix="run `volseg preprocess` with this recipe first, or give the dataset itself",
            code="E_PREPARED",
        )
    plan = fill(recipe, plan)
    if not names:
        raise VolsegError(
            f"{folder}: preparing it was interrupted",
            fix="run `volseg preprocess` again",
            code="E_PREPARED",
        )
    return plan, fingerprint, _read_cases(folder, keys, names, plan.recipe)


def _read_cases(
    folder: Path, keys: Mapping[str, str], names: Sequence[str], recipe: Recipe
) -> list[PreparedCase]:
    """Read prepared cases; refuse those made with other settings than `keys` stand for."""
    cases = [read_prepared_case(folder / "cases", case_id) for case_id in names]
    outdated = [case.id for case in cases if case.record["key"] != keys.get(case.id)]
    if outdated:
        raise VolsegError(
            f"{folder}: preparing it again was interrupted: {len(outdated)} of its {len(cases)} "
            f"cases, such as {outdated[0]}, were prepared with other settings or from other files",
            fix="run `volseg preprocess` again; it prepares only the cases that differ",
            code="E_PREPARED",
        )
    for case in cases:
        if problem := _mismatch(case, recipe):
            raise VolsegError(
                f"{folder / 'cases' / case.id}: not a prepared case of this recipe ({problem})",
                fix="run `volseg preprocess` again",
                code="E_PREPARED",
            )
    return cases


def _mismatch(case: PreparedCase, recipe: Recipe) -> str:
    """Describe how the arrays and class of a case differ from the recipe's; empty if they fit."""
    data, classify = recipe.data, recipe.classify
    if len(case.image) != len(data.channels):
        return f"{format_count(len(case.image), 'channel')}, not {len(data.channels)}"
    if len(case.foreground) != len(data.labels):
        return f"voxels of {format_count(len(case.foreground), 'label')}, not {len(data.labels)}"
    if classify is None:
        return ""
    if case.record.get("class") not in (None, *classify.classes):
        return f"class {case.record['class']!r}, not one of {', '.join(classify.classes)}"
    shape = (SLICES, 2, classify.pixels, classify.pixels)
    if case.slices is not None and case.slices.shape != shape:
        return f"slices of shape {case.slices.shape}, not {shape}"
    return ""


def prepared_warnings(folder: Path) -> list[str]:
    """Return the stored warnings of a prepared folder, and one for the cases missing from it."""
    try:
        content = read_json(folder / PREPARED_FILE)
        warnings, failed = list(map(str, content.get("warnings", ()))), dict(content["failed"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # `load_prepared` reports what is wrong
    if failed:
        names = ", ".join(list(failed)[:5])
        cases = format_count(len(failed), "case")
        are = "is" if len(failed) == 1 else "are"
        warnings.append(f"W_LEFT_OUT: {cases} could not be prepared and {are} not used: {names}")
    return warnings

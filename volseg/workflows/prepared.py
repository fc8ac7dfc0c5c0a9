"""A prepared folder → recipe, plan and cases, and the cases to train on and to validate on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from volseg.errors import VolsegError
from volseg.inputs import read_json
from volseg.io.cases import ID_PATTERN
from volseg.io.prepared import PreparedCase, read_prepared_case
from volseg.recipe import Recipe, parse_recipe
from volseg.workflows.planning import N_FOLDS
from volseg.workflows.preparing import PREPARED_FILE, as_recipe, preparation_of

if TYPE_CHECKING:
    from volseg.plan import DatasetFingerprint, Plan

SLICES = 3  # through a lesion, for the classifier
Split = tuple[Sequence[PreparedCase], Sequence[PreparedCase]]  # to train on, to validate on


def split_cases(
    cases: Sequence[PreparedCase], fold: int | None, seed: int, folds: int = N_FOLDS
) -> tuple[list[PreparedCase], list[PreparedCase]]:
    """Training and validation cases: the prepared split, or one of `folds` shares of the patients drawn with the seed."""
    if fold is None:
        sides = [
            [case for case in cases if case.record["split"] == side] for side in ("train", "val")
        ]
    else:
        if not 0 <= fold < folds:
            raise VolsegError(
                f"fold {fold} does not exist", fix=f"give 0 to {folds - 1}", code="E_USAGE"
            )
        patients = np.random.default_rng(seed).permutation(
            sorted({case.record["patient"] for case in cases})
        )
        if len(patients) < folds:
            raise VolsegError(
                f"{len(patients)} patients cannot be divided into {folds} folds",
                fix=f"give --folds {len(patients)} or fewer",
                code="E_USAGE",
            )
        held_out = set(patients[fold::folds].tolist())
        sides = [
            [case for case in cases if (case.record["patient"] in held_out) == out]
            for out in (False, True)
        ]
    if not all(sides):
        raise VolsegError(
            f"{len(sides[0])} cases to train on and {len(sides[1])} to validate on are too few",
            fix="add cases; training and validation need at least one each",
            code="E_DATASET",
        )
    return sides[0], sides[1]


def load_prepared(
    folder: Path, recipe: Path | str | Recipe | None, changed: Plan | None = None
) -> tuple[Recipe, Plan, DatasetFingerprint, list[PreparedCase]]:
    """Recipe, plan, fingerprint and cases of a prepared folder.

    Args:
        recipe: whose training settings replace the folder's; None keeps them.
        changed: a plan in place of the folder's.

    Raises:
        VolsegError: it is no prepared folder, was not finished, or does not fit the recipe or the plan.
    """
    from volseg.plan import DatasetFingerprint, Plan

    try:
        header = read_json(folder / PREPARED_FILE)
        own = parse_recipe(header["recipe"], where=str(folder / PREPARED_FILE))
        plan, fingerprint = (
            Plan.model_validate(header["plan"]),
            DatasetFingerprint.model_validate(header["fingerprint"]),
        )
        listed, keys = list(header["cases"]), dict(header["keys"])
        if not all(isinstance(name, str) and re.fullmatch(ID_PATTERN, name) for name in listed):
            raise ValueError("cases holds a name that is not a case id")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VolsegError(
            f"{folder}: not a prepared folder ({error})",
            fix="run `volseg preprocess` again",
            code="E_PREPARED",
        ) from error
    chosen = own if recipe is None else as_recipe(recipe)
    if changed is not None:
        changed = changed.overruled_by(chosen)
        if (changed.spacing_mm, changed.windows) != (plan.spacing_mm, plan.windows):
            raise VolsegError(
                f"{folder}: was prepared with another spacing or other windows than those of the plan",
                fix="run `volseg preprocess` with this plan first, or train from the dataset",
                code="E_PLAN",
            )
        plan = changed
    if preparation_of(chosen) != preparation_of(own):
        raise VolsegError(
            f"{folder}: was prepared for recipe {own.name!r} with other [data], [preprocess] or [classify] settings",
            fix="run `volseg preprocess` with this recipe first",
            code="E_PREPARED",
        )
    plan = plan.overruled_by(chosen)
    chosen = plan.complete(chosen)
    if not listed:
        raise VolsegError(
            f"{folder}: preparing it was interrupted",
            fix="run `volseg preprocess` again",
            code="E_PREPARED",
        )
    cases = [read_prepared_case(folder / "cases", case_id) for case_id in listed]
    others = [case.id for case in cases if case.record["key"] != keys.get(case.id)]
    if others:
        raise VolsegError(
            f"{folder}: preparing it again was interrupted: {len(others)} of its {len(cases)} cases, such as "
            f"{others[0]}, were prepared with other settings or from other files than the rest",
            fix="run `volseg preprocess` again: it prepares only those that differ",
            code="E_PREPARED",
        )
    for case in cases:
        if problem := _misfit(case, chosen):
            raise VolsegError(
                f"{folder / 'cases' / case.id}: not a prepared case of this recipe ({problem})",
                fix="run `volseg preprocess` again",
                code="E_PREPARED",
            )
    return chosen, plan, fingerprint, cases


def _misfit(case: PreparedCase, recipe: Recipe) -> str:
    """How the arrays and the class of a case are not what the recipe makes; empty where they are."""
    data, classify = recipe.data, recipe.classify
    if len(case.image) != len(data.channels):
        return f"{len(case.image)} channels, not {len(data.channels)}"
    if len(case.foreground) != len(data.labels):
        return f"voxels of {len(case.foreground)} labels, not {len(data.labels)}"
    if classify is None:
        return ""
    if case.record.get("class") not in (None, *classify.classes):
        return f"class {case.record['class']!r}, not one of {', '.join(classify.classes)}"
    if case.slices is not None and case.slices.shape != (
        SLICES,
        2,
        classify.pixels,
        classify.pixels,
    ):
        return f"slices of shape {case.slices.shape}, not {(SLICES, 2, classify.pixels, classify.pixels)}"
    return ""


def prepared_warnings(folder: Path) -> list[str]:
    """What was odd about the cases of a prepared folder, and which of them are not in it."""
    try:
        content = read_json(folder / PREPARED_FILE)
        found, failed = [str(text) for text in content.get("warnings", ())], dict(content["failed"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # who loads the folder says what is wrong with it
    if failed:
        found.append(
            f"W_LEFT_OUT: {len(failed)} cases could not be prepared and are not trained on: {', '.join(list(failed)[:5])}"
        )
    return found

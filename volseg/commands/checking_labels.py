"""`volseg check` of a model of images: classes that its out-of-fold probabilities contradict."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from volseg.commands.problems import Problem, problem_at
from volseg.errors import VolsegError
from volseg.evaluation.class_rows import PROBABILITY
from volseg.evaluation.label_errors import doubtful_labels
from volseg.io.csv_text import iterate_csv
from volseg.io.targets import value_of
from volseg.recipe.classification import CLASSES, Target
from volseg.words import format_list

VALIDATION = "validation.csv"
MAX_NAMED, MAX_LISTED = 5, 20  # images named in one line, and listed one by one
LABEL_CODE = "W_LABEL"


def label_problems(model: Path, data: Target) -> Iterator[Problem]:
    """Yield how many images of validation.csv may have a wrong class, and the worst of them.

    Raises:
        VolsegError: validation.csv cannot be read.
    """
    if data.kind != CLASSES or not (model / VALIDATION).is_file():
        return
    names, probabilities, targets = _read(model / VALIDATION, data)
    doubtful = doubtful_labels(probabilities, targets)
    if doubtful:
        worst = format_list([names[doubt.index] for doubt in doubtful], MAX_NAMED)
        text = f"{label_summary(len(doubtful), len(names))}: {worst}"
        fix = "look at them, correct their classes in the dataset, and train again"
        yield problem_at(str(model / VALIDATION), LABEL_CODE, text, fix)
    for doubt in doubtful[:MAX_LISTED]:
        yield problem_at(
            names[doubt.index],
            LABEL_CODE,
            f"is labelled {_shown(data, doubt.given, doubt.given_probability)}, but looks like "
            f"{_shown(data, doubt.likely, doubt.likely_probability)} to a network that was not "
            "trained on it",
            "look at the image, and correct its class or leave it out",
        )


def label_summary(n_doubtful: int, n_images: int) -> str:
    """Return how many classes are doubtful."""
    return f"{n_doubtful} of {n_images} validation images may have a wrong class"


def _read(path: Path, data: Target) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return ids, probabilities (n, k) and given classes (n,) of validation images."""
    names, table, targets = list[str](), list[list[float]](), list[int]()
    try:
        for cells in iterate_csv(path):
            target = value_of(cells["target"], data)
            if not isinstance(target, int):
                raise ValueError(f"{cells['case_id']} has no class")
            names.append(cells["case_id"])
            table.append([float(cells[PROBABILITY + name]) for name in data.names])
            targets.append(target)
    except (OSError, ValueError, KeyError) as error:
        raise VolsegError(
            f"{path}: cannot be read, so no class was checked ({error})",
            fix="copy the model again",
            code="E_ROW",
        ) from error
    return names, np.array(table).reshape(len(names), len(data.names)), np.array(targets, int)


def _shown(data: Target, number: int, probability: float) -> str:
    return f"{data.names[number]!r} (probability {probability:.3f})"

"""Rows of classes.csv and values.csv, which `infer` writes and `evaluate` reads, and of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from volseg.columns import column, columns_of, optional
from volseg.errors import VolsegError
from volseg.recipe.classification import SEPARATOR

CLASSES, VALUES = "classes.csv", "values.csv"
BASELINES = "baselines.csv"  # beside either
PROBABILITY = "probability_"  # followed by the name of a class


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassRow:
    """One case of classes.csv; an empty cell is unknown.

    Args:
        probabilities: class name → probability; in the file a column `probability_<class>` each.
    """

    case_id: str = column("", "name of the case")
    patient: str | None = optional("", "patient of the image; empty if unknown")
    class_name: str | None = optional(
        "", "most probable class; with several labels at once those of at least 0.5, joined by |"
    )
    class_probability: float | None = optional(
        "0 to 1", "its probability; empty with several labels at once"
    )
    top_classes: str | None = optional(
        "",
        "the most probable classes, most probable first, joined by |; at most as many as "
        "`infer.top_k` of the model's recipe (3)",
    )
    confidence_set: str | None = optional(
        "",
        "classes that remain possible, joined by |; the true one is among them at the "
        "rate that the model states; with several labels at once the labels that cannot be "
        "excluded, and empty if all can be",
        source="split conformal prediction (LAC)",
    )
    out_of_distribution: bool | None = optional(
        "", "true if the image is unlike the training images; empty if the model cannot tell"
    )
    model: str | None = optional("", "name of the model")
    status: str = column("", "done or failed", "done")
    error: str | None = optional("", "code and reason of a failure")
    probabilities: Mapping[str, float] | None = optional(
        "0 to 1", "probability of that class; one column for each class"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueRow:
    """One case of values.csv; an empty cell is unknown."""

    case_id: str = column("", "name of the case")
    patient: str | None = optional("", "patient of the image; empty if unknown")
    value: float | None = optional("", "predicted number, in the unit of the target")
    value_low: float | None = optional(
        "",
        "lower end of the interval that contains the true value at the rate that the model states",
        source="split conformal prediction",
    )
    value_high: float | None = optional("", "its upper end")
    out_of_distribution: bool | None = optional(
        "", "true if the image is unlike the training images; empty if the model cannot tell"
    )
    model: str | None = optional("", "name of the model")
    status: str = column("", "done or failed", "done")
    error: str | None = optional("", "code and reason of a failure")


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineRow:
    """What a baseline predicts of one case for one class, or as a number; baselines.csv."""

    case_id: str = column("", "name of the case")
    baseline: str = column("", "name of a simple model; docs/images.md lists them")
    class_name: str | None = optional("", "class or label of the probability; empty for a number")
    probability: float | None = optional("0 to 1", "its probability; empty for a number")
    value: float | None = optional("", "predicted number, in the unit of the target")


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedRow:
    """One case of evaluation.csv of a classifier or of predicted numbers."""

    case_id: str = column("", "name of the case")
    patient: str = column("", "its patient; its own name if the reference names none")
    reference: str | None = optional("", "true class, labels joined by |, or number")
    predicted: str | None = optional("", "predicted class, labels or number")
    is_right: bool | None = optional("", "whether both are equal; empty for numbers")
    reference_probability: float | None = optional("0 to 1", "probability of the true class")
    error: float | None = optional("", "predicted − true number; empty for classes")
    is_covered: bool | None = optional(
        "", "whether the confidence set, or the interval, contains the truth"
    )
    out_of_distribution: bool | None = optional("", "as in the results")
    status: str = column("", "done or failed", "done")
    reason: str | None = optional("", "code and reason of a failure")


def class_columns(names: Sequence[str]) -> list[str]:
    """Return the header of classes.csv for these classes.

    >>> class_columns(["benign", "malignant"])[4:6]
    ['probability_benign', 'probability_malignant']
    """
    before, after = _fixed()
    return [*before, *(PROBABILITY + name for name in names), *after]


def class_cells(row: ClassRow, names: Sequence[str]) -> list[Any]:
    """Return the values of a row in the order of `class_columns`; None is unknown."""
    before, after = _fixed()
    return [
        *(getattr(row, name) for name in before),
        *((row.probabilities or {}).get(name) for name in names),
        *(getattr(row, name) for name in after),
    ]


def class_names_of(columns: Sequence[str]) -> list[str]:
    """Return the classes of a classes.csv from its header."""
    return [name.removeprefix(PROBABILITY) for name in columns if name.startswith(PROBABILITY)]


def described_columns() -> list[tuple[str, str, str, str]]:
    """List name, unit, meaning and source of the columns of classes.csv."""
    described = {entry[0]: entry for entry in columns_of(ClassRow)}
    before, after = _fixed()
    _, unit, meaning, source = described["probabilities"]
    probabilities = (f"{PROBABILITY}<class>", unit, meaning, source)
    return [*(described[name] for name in before), probabilities, *(described[n] for n in after)]


def joined(names: Sequence[str]) -> str:
    """Return the cell of several classes.

    Raises:
        VolsegError: a name holds the separator.
    """
    for name in names:
        if SEPARATOR in name:
            raise VolsegError(
                f"the class name {name!r} contains {SEPARATOR!r}, which separates classes",
                fix="rename the class in the dataset",
                code="E_CLASS",
            )
    return SEPARATOR.join(names)


def _fixed() -> tuple[list[str], list[str]]:
    """Return the columns before and after the probabilities."""
    names = [name for name in ClassRow.__dataclass_fields__ if name != "probabilities"]
    first = names.index("class_probability") + 1
    return names[:first], names[first:]

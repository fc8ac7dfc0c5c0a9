"""A report of one scan or image as text: sections of sentences, and tables of values.

Every number is a `Part` with the key of the cell that holds it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from volseg.manuscript.facts import (
    Clause,
    Document,
    Facts,
    Part,
    Path,
    Sentence,
    Statement,
    Topic,
    clause,
    key_of,
    parts_of,
    sentence,
    state,
    value_at,
)
from volseg.manuscript.of_models import sentences_of_model

RESEARCH_ONLY = "For research use only; not a medical device."
UNKNOWN = (Part("–"),)
Cell = tuple[Part, ...]
MAX_LABELS = 8  # of the Dice in run.json
Named = tuple[str, Sentence]  # what a sentence is about, and the sentence


@dataclass(frozen=True, slots=True)
class FactTable:
    """A table whose cells name their sources."""

    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True, slots=True)
class Line:
    """A sentence of a section, and what it is about; empty if the sentence says it."""

    statement: Statement
    name: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a report: lines, a table below them, and remarks below that."""

    title: str
    lines: tuple[Line, ...] = ()
    table: FactTable | None = None
    remarks: tuple[Line, ...] = ()


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of a report.

    Args:
        name: of its file, without folder. alt: what it shows, for those who cannot see it.
    """

    name: str
    data: bytes
    caption: Statement
    alt: str

    @property
    def media_type(self) -> str:
        return "image/png" if self.name.endswith(".png") else "image/jpeg"


@dataclass(frozen=True, slots=True)
class CaseReport:
    """The content of a report.

    Args:
        title: names the scan or image. made_with: run, model and version.
        findings: the first section. about: the others.
        no_pictures: why there are none; empty if there are.
    """

    title: Statement
    made_with: tuple[Line, ...]
    findings: Section
    about: tuple[Section, ...]
    pictures: tuple[Picture, ...] = field(default=())
    no_pictures: str = ""


def joined(statements: Iterable[Statement]) -> Statement:
    """Return several sentences as one text."""
    parts = list[Part]()
    keys = dict[str, None]()
    for stated in statements:
        parts += [Part(" "), *stated.parts] if parts else stated.parts
        keys |= dict.fromkeys(stated.keys)
    return Statement(tuple(parts), tuple(keys), (), Topic.NONE)


def statement(*parts: Part) -> Statement:
    """Return a sentence of parts."""
    keys = dict.fromkeys(key for part in parts for key in part.keys)
    return Statement(parts, tuple(keys), (), Topic.NONE)


def words(text: str, *keys: str, name: str = "") -> Line:
    """Return a sentence without values, and the keys that decided it."""
    return Line(Statement((Part(text),), keys, (), Topic.NONE), name)


def lines_of(facts: Facts, sentences: Iterable[Sentence | Named]) -> Iterator[Line]:
    """Yield the sentences whose facts are known."""
    for item in sentences:
        name, line = item if isinstance(item, tuple) else ("", item)
        yield from (Line(stated, name) for stated in state(facts, [line]))


def cell_of(facts: Facts, template: str, *more: str, **paths: Path) -> Cell:
    """Return the parts of a template such as `{lesion.volume_ml:short}`; a dash if one is unknown.

    Args:
        more: templates that follow if their values are known. paths: as those of a clause.
    """
    clauses = [Clause(text=text, paths=paths) for text in (template, *more)]
    return parts_of(facts, clauses) or UNKNOWN


def table_of(columns: Iterable[tuple[str, Sequence[Cell]]]) -> FactTable | None:
    """Return a table of the columns of which anything is known; None without any."""
    filled = [
        (name, cells) for name, cells in columns if any(c not in (UNKNOWN, ()) for c in cells)
    ]
    if not filled:
        return None
    rows = tuple(zip(*(cells for _, cells in filled), strict=True))
    return FactTable(tuple(name for name, _ in filled), rows)


def row_document(table: str, case_id: str, content: Mapping[str, Any], which: str = "") -> Document:
    """Return a row of a table as facts; its keys name the table, the case and `which` row."""
    return Document(", ".join(filter(None, (table, case_id, which))), content)


# ---- what is the same for scans and images


def title_of(facts: Facts, alias: str, noun: str) -> Statement:
    """Return the title of a report: what it is of, and its name."""
    (part,) = cell_of(facts, "{name}", name=(alias, "case_id"))
    return statement(Part(f"Report of {noun} "), part)


def made_with(facts: Facts, alias: str) -> tuple[Line, ...]:
    """Return when and with what the case was computed."""
    done = value_at(facts, ("run", "done"))
    if not isinstance(done, list):  # run.json of images does not say which the run computed
        run = "Last run of these results {run.started}"
    elif value_at(facts, (alias, "case_id")) in done:
        run = "Run of {run.started}"
    else:
        run = "Kept from before the run of {run.started}"
    line = sentence(
        f"{run}, volseg {{run.volseg}}", clause(", model {model}", model=(alias, "model"))
    )
    return tuple(lines_of(facts, [line]))


PURPOSE: tuple[Named, ...] = (
    ("Intended use", sentence("{recipe.intended_use}")),
    ("Intended use", sentence(clause("{run.model_box.intended_use}", "recipe.intended_use"))),
    ("Limits", sentence("{recipe.limits}")),
    ("Limits", sentence(clause("{run.model_box.limits}", "recipe.limits"))),
)
TRAINING: tuple[Named, ...] = (
    ("Training data", sentence("{recipe.data_source}")),
    (
        "Trained on",
        sentence(
            "{metrics.training_cases:count} scans",
            ", validated on {metrics.validation_cases:count} others",
        ),
    ),
    (
        "Trained on",
        sentence(
            clause("{run.model_box.training_cases:count} scans", "metrics.training_cases"),
            ", validated on {run.model_box.validation_cases:count} others",
        ),
    ),
    (
        "Trained on",
        sentence(
            "{fingerprint.n_images:count} images of {fingerprint.n_patients:count} patients",
            ", validated on {fingerprint.n_validation:count} other images; an image without a "
            "named patient counts as one patient",
        ),
    ),
)


def purpose(facts: Facts, alias: str) -> Section:
    """Return what the model is for and not for, what it was trained on and how well it did."""
    title = "What the model is for, and not for"
    if not value_at(facts, (alias, "model")):
        no_model = "No model of volseg made this mask, so its accuracy is not known here."
        return Section(title, (words(no_model, key_of(facts, (alias, "model"))),))
    lines = [*lines_of(facts, PURPOSE)]
    stated = {line.name for line in lines}
    for name in ("Intended use", "Limits"):
        if name not in stated:
            lines.append(words("Not stated with these results.", name=name))
    lines += lines_of(facts, TRAINING)
    lines.append(_validation(facts))
    return Section(title, tuple(lines))


def _validation(facts: Facts) -> Line:
    """Return what validation said of the model, or that nothing is known."""
    # What the judgement of a classifier says, the findings say of this image.
    stated = [
        line
        for line in state(facts, sentences_of_model(facts))
        if line.topic is Topic.VALIDATION and not any(": judgement." in key for key in line.keys)
    ]
    if not stated:
        stated = [*state(facts, map(_dice_of_box, range(MAX_LABELS)))]
    if not stated:
        return words("How well the model does is not known here.", name="Validation")
    return Line(joined(stated), "Validation")


def _dice_of_box(index: int) -> Sentence:
    """Return the Dice of a label as run.json has it, where model.json cannot be read."""
    at = ("run", "model_box", "dice", str(index))
    text = "Mean Dice of {label} on the validation cases: {mean:score}"
    return sentence(clause(text, label=(*at, "label"), mean=(*at, "mean")))

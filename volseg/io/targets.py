"""What a column of a table says of its cases: one class, several labels, or a number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from volseg.errors import VolsegError
from volseg.inputs import shorten
from volseg.io.target_cells import is_missing, is_number, kind_of, plain_name
from volseg.recipe.classification import (
    CLASSES,
    LABELS,
    MAX_CLASSES,
    NUMBER,
    SEPARATOR,
    Target,
    split_names,
)
from volseg.recipe.section import AUTO
from volseg.words import format_list

LARGEST = 1e30  # number to learn; float32, in which networks calculate, ends at 3.4e38
MOST_TEXTS = 100  # different texts in a column that count as classes
Value = int | float | tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class TargetCells:
    """The cells of the target column.

    Args:
        name: of the column. cells: case id → text, empty if unknown.
    """

    name: str
    cells: Mapping[str, str]

    @property
    def texts(self) -> list[str]:
        """The cells that are not blank."""
        return [cell.strip() for cell in self.cells.values() if cell.strip()]

    def describe(self, data: Target) -> Target:
        """Return the section with kind and classes in place of "auto".

        Raises:
            VolsegError: the column is blank, or holds neither classes nor numbers.
        """
        # Unknown values are mistakes of single cells, not classes.
        texts = [text for text in self.texts if not is_missing(text)]
        if not texts:
            raise self._unusable("is blank for every training image", "fill it in")
        classes = data.classes
        kind = kind_of(texts) if data.kind == AUTO else data.kind
        if data.kind == AUTO and kind == NUMBER and classes != AUTO and classes:
            kind = CLASSES  # numbers are put into the stated classes, such as ranges
        if kind == NUMBER:
            classes = ()
            if len(set(texts)) == 1:
                raise self._unusable(
                    f"holds only {shorten(texts[0])!r}", "add images with other numbers"
                )
        elif classes == AUTO:
            classes = self._classes(texts, kind)
        return Target.model_validate(data.model_dump() | {"kind": kind, "classes": classes})

    def _classes(self, texts: Sequence[str], kind: str) -> tuple[str, ...]:
        """Return the names of the classes in the cells, or refuse them."""
        names = _names(texts, several=kind == LABELS)
        if len(names) == 1 and kind == CLASSES:
            raise self._unusable(f"holds only {shorten(names[0])!r}", "add images of another class")
        joined = [name for name in names if SEPARATOR in name]
        if joined:
            raise self._unusable(
                f"holds the class {shorten(joined[0])!r}, and {SEPARATOR} separates several labels",
                f'rename the class, or write kind = "{LABELS}" under [data] of the recipe',
            )
        if len(names) > (MOST_TEXTS if kind == CLASSES else MAX_CLASSES):
            shown = format_list([shorten(name) for name in names], 3)
            raise self._unusable(
                f"holds {len(names)} different texts ({shown})",
                "name a column of classes or numbers, or list the classes in the recipe",
            )
        return names

    def values(self, data: Target) -> tuple[dict[str, Value], list[str]]:
        """Return case id → value of a described column, None where blank; and its mistakes."""
        values: dict[str, Value] = {}
        mistakes = []
        for case_id, cell in self.cells.items():
            try:
                values[case_id] = value_of(cell, data)
            except ValueError as error:
                mistakes.append(f"{case_id}: column {self.name}: {error}")
        return values, mistakes

    def _unusable(self, problem: str, fix: str) -> VolsegError:
        return VolsegError(f"column {self.name!r} {problem}", fix=fix, code="E_TARGET")


def value_of(cell: str, data: Target) -> Value:
    """Return the index of the class, the indices of the labels, or the number; None if blank.

    Raises:
        ValueError: the cell is none of them.
    """
    text = cell.strip()
    if not text:
        return None
    if data.kind == NUMBER:
        return _number(text)
    if isinstance(data.classes, Mapping):
        number, ranges = _number(text), enumerate(data.classes.values())
        # None outside all ranges: such cases are not used.
        return next((index for index, (low, high) in ranges if low <= number <= high), None)
    indices = _indices(text, data)
    return indices[0] if data.kind == CLASSES else indices


def _indices(text: str, data: Target) -> tuple[int, ...]:
    """Return the indices of the class or the labels in a cell."""
    names = {plain_name(name): index for index, name in enumerate(data.names)}
    parts = [text] if data.kind == CLASSES else split_names(text)
    unknown = [part for part in parts if plain_name(part) not in names]
    if unknown:
        listed = format_list(list(data.names), 10)
        problem = f"{shorten(unknown[0])!r} is not one of the classes {listed}"
        raise ValueError(problem + _hint(unknown[0]))
    return tuple(sorted({names[plain_name(part)] for part in parts}))


def count_classes(values: Sequence[Value], data: Target) -> dict[str, int]:
    """Return class or label → number of cases, in the order of the outputs."""
    counts: Counter[int] = Counter()
    for value in values:
        if isinstance(value, tuple):
            counts.update(value)
        elif isinstance(value, int):
            counts[value] += 1
    return {name: counts[index] for index, name in enumerate(data.names)}


def _names(texts: Sequence[str], *, several: bool) -> tuple[str, ...]:
    """Return the distinct names, numbers in ascending order, else in alphabetical order."""
    parts = [part for text in texts for part in (split_names(text) if several else [text.strip()])]
    by_plain = {plain_name(part): part for part in reversed(parts) if part}
    names = [plain_name(name) if is_number(name) else name for name in by_plain.values()]
    if all(map(is_number, names)):
        return tuple(sorted(names, key=float))
    return tuple(sorted(names, key=str.casefold))


def _hint(text: str) -> str:
    """Return what to do about a cell that is no value."""
    if is_missing(text):
        return ": leave the cell empty where the value is unknown"
    return ": write a decimal point" if is_number(text.replace(",", ".")) else ""


def _number(text: str) -> float:
    if not is_number(text):
        raise ValueError(f"{shorten(text)!r} is not a number{_hint(text)}")
    if abs(float(text)) > LARGEST:
        raise ValueError(f"{shorten(text)!r} is not a number from {-LARGEST:g} to {LARGEST:g}")
    return float(text)

"""Sentences made from stored facts: a template names the keys whose values it shows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from string import Formatter
from typing import Any

from volseg.manuscript.formats import FORMATS, clean


class Topic(StrEnum):
    """A paragraph of the text, in their order; `NONE`: the sentence is for the checklist alone."""

    NONE = ""
    DATA = "data"
    TRAINING = "training"
    INFERENCE = "inference"
    VALIDATION = "validation"
    EVALUATION = "evaluation"


Path = tuple[str, ...]  # alias of a document, then the names on the way to a value


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """A file of facts: its name for readers, and its content as parsed JSON."""

    name: str
    content: Mapping[str, Any]


Facts = Mapping[str, Document]  # alias in templates → document
SHORT: Mapping[str, Path] = {  # first name of a path in templates → what it stands for
    "recipe": ("model", "recipe"),
    "train": ("model", "recipe", "train"),
    "metrics": ("model", "metrics"),
    "fingerprint": ("model", "fingerprint"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Clause:
    """A part of a sentence, left out if one of its facts is unknown.

    Args:
        text: template with fields such as `{train.batch_size:number}`: the path of the value (see
            `SHORT`), or a name in `paths`, then its format. A sum of counts is
            `{run.done+run.kept:count}`.
        when: key → the value that it must have.
        unless: keys that must be missing or empty. needs: keys that must not.
        paths: name of a field → where its value is, if names on the way may contain dots.
    """

    text: str
    when: Mapping[str, Any] = field(default_factory=dict)
    unless: tuple[str, ...] = ()
    needs: tuple[str | Path, ...] = ()
    paths: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentence:
    """A sentence of the text and of the checklist; the first clause must be known.

    Args:
        items: numbers of the checklist that it answers; it stands at the first.
        topic: paragraph of the text in which it stands.
    """

    clauses: tuple[Clause, ...]
    items: tuple[int, ...]
    topic: Topic = Topic.NONE


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a sentence, or a cell: words, or a value with the keys that it comes from.

    Args:
        keys: none for words. rule: the format that made the text of the values.
    """

    text: str
    keys: tuple[str, ...] = ()
    rule: str = ""


@dataclass(frozen=True, slots=True)
class Statement:
    """A sentence with its values filled in.

    Args:
        keys: those of its values, and those that decided what it says.
    """

    parts: tuple[Part, ...]
    keys: tuple[str, ...]
    items: tuple[int, ...]
    topic: Topic

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts)


def sentence(
    *clauses: str | Clause, items: tuple[int, ...] = (), topic: Topic = Topic.NONE
) -> Sentence:
    """Return a sentence of templates and clauses."""
    parts = tuple(Clause(text=part) if isinstance(part, str) else part for part in clauses)
    return Sentence(clauses=parts, items=items, topic=topic)


def clause(
    text: str,
    *unless: str,
    when: Mapping[str, Any] | None = None,
    needs: tuple[str | Path, ...] = (),
    **paths: Path,
) -> Clause:
    """Return a clause; see `Clause`."""
    return Clause(text=text, when=when or {}, unless=unless, needs=needs, paths=paths)


def literal(name: str) -> str:
    """Return a name from a file as text of a template."""
    return clean(name).replace("{", "{{").replace("}", "}}")


def state(facts: Facts, sentences: Iterable[Sentence]) -> Iterator[Statement]:
    """Yield the sentences whose facts are known."""
    for line in sentences:
        filled = _of_clauses(facts, line.clauses)
        if filled is not None:
            parts, keys = filled
            yield Statement(tuple(_with_full_stop(parts)), keys, line.items, line.topic)


def parts_of(facts: Facts, clauses: Sequence[Clause]) -> tuple[Part, ...]:
    """Return the clauses whose facts are known, without a full stop; none if the first is not."""
    filled = _of_clauses(facts, clauses)
    return () if filled is None else tuple(filled[0])


def _of_clauses(
    facts: Facts, clauses: Sequence[Clause]
) -> tuple[list[Part], tuple[str, ...]] | None:
    """Return the parts and keys of the known clauses; None if the first is unknown."""
    filled_or_not = [_filled(facts, part) for part in clauses]
    if filled_or_not[0] is None:
        return None
    filled = [part for part in filled_or_not if part is not None]
    keys = dict.fromkeys(key for _, names in filled for key in names)
    return [part for parts, _ in filled for part in parts], tuple(keys)


def value_at(facts: Facts, path: Path) -> Any:
    """Return the value at a path; None if there is none."""
    document = facts.get(path[0])
    value: Any = None if document is None else document.content
    for name in path[1:]:
        if isinstance(value, list):
            value = value[int(name)] if name.isdecimal() and int(name) < len(value) else None
        else:
            value = value.get(name) if isinstance(value, Mapping) else None
    return value


def value_part(facts: Facts, paths: Sequence[Path], rule: str = "text") -> Part | None:
    """Return values in a format, as one part; None if one of them is unknown."""
    shown = FORMATS[rule](*(value_at(facts, path) for path in paths))
    return Part(shown, tuple(key_of(facts, path) for path in paths), rule) if shown else None


def key_of(facts: Facts, path: Path) -> str:
    """Return where a value stands, for readers: `model.json: recipe.train.batch_size`."""
    names = (name if re.fullmatch(r"[\w-]+", name) else json.dumps(name) for name in path[1:])
    return f"{facts[path[0]].name}: {'.'.join(names)}"


def _filled(facts: Facts, template: Clause) -> tuple[list[Part], list[str]] | None:
    """Return a clause with its values, and its keys; None if a value is unknown."""
    if not _applies(facts, template):
        return None
    parts = list[Part]()
    for words, name, rule, _ in Formatter().parse(template.text):
        if words:
            parts.append(Part(words))
        if name is None:
            continue
        value = value_part(facts, _paths(template, name), rule or "text")
        if value is None:
            return None
        parts.append(value)
    deciding = [key_of(facts, _path(path)) for path in (*template.when, *template.needs)]
    return parts, [*deciding, *(key for part in parts for key in part.keys)]


def _with_full_stop(parts: list[Part]) -> list[Part]:
    """Return a sentence that ends with one full stop, whatever its last value ends with."""
    while parts and not parts[-1].text.rstrip(" ."):
        parts = parts[:-1]
    ended = [*parts[:-1], *(replace(part, text=part.text.rstrip(" .")) for part in parts[-1:])]
    return [*ended, Part(".")]


def _applies(facts: Facts, part: Clause) -> bool:
    return (
        all(value_at(facts, _path(key)) == value for key, value in part.when.items())
        and not any(_is_stated(value_at(facts, _path(key))) for key in part.unless)
        and all(_is_stated(value_at(facts, _path(key))) for key in part.needs)
    )


def _is_stated(value: Any) -> bool:
    return value is not None and value not in ("", [], {})


def _paths(part: Clause, name: str) -> list[Path]:
    if name in part.paths:
        return [part.paths[name]]
    return list(map(_path, name.split("+")))


def _path(text: str | Path) -> Path:
    """Return the path that a template writes with dots; a path as it is."""
    if isinstance(text, tuple):
        return text
    first, *others = text.split(".")
    return (*SHORT.get(first, (first,)), *others)

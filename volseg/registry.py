"""Rows of a table by the name that a recipe gives: `step = "fill_holes"` is `STEPS["fill_holes"]`.

A row is a frozen dataclass: its fields are the keys that a recipe may set, their annotations the
values that these may have.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from volseg.errors import VolsegError
from volseg.inputs import shorten
from volseg.words import lower_first

Row = TypeVar("Row")


def check_name(kind: str, name: str, names: Iterable[str]) -> None:
    """Check that a name is one of the known ones.

    Args:
        kind: what the name is of, for the message, such as "network".

    Raises:
        VolsegError: it is not; the fix lists the known names.
    """
    listed = list(names)
    if name not in listed:
        raise VolsegError(
            f"{kind} {shorten(name)!r} is unknown",
            fix=f"{_nearest(name, listed)}use one of {', '.join(listed)}",
            code="E_RECIPE",
        )


def keys_of(row: type) -> list[str]:
    """Return the keys that a recipe may set for this row."""
    return [field.name for field in fields(row)]


def check_keys(what: str, keys: Iterable[str], allowed: list[str]) -> None:
    """Check that all keys are allowed.

    Raises:
        VolsegError: they are not; the fix lists the known keys.
    """
    unknown = [key for key in keys if key not in allowed]
    if unknown:
        raise VolsegError(
            f"{what}: unknown key {', '.join(shorten(key) for key in unknown)}",
            fix=f"{_nearest(unknown[0], allowed)}known keys are {', '.join(allowed) or '(none)'}",
            code="E_RECIPE",
        )


def make_row(what: str, row: type[Row], settings: Mapping[str, Any]) -> Row:
    """Return the row with these settings; lists become tuples.

    Args:
        what: names the row in messages, such as "network 'unet3d'".

    Raises:
        VolsegError: a key is unknown, missing or has a value of the wrong type or range.
    """
    check_keys(what, settings, keys_of(row))
    text = json.dumps(settings, default=str)  # strict JSON: "1" is no number, a list is a tuple
    try:
        return TypeAdapter(row).validate_json(text, strict=True)
    except ValidationError as error:
        mistakes = [_sentence(mistake) for mistake in error.errors(include_url=False)]
        raise VolsegError(
            f"{what}: {'; '.join(mistakes)}",
            fix=f"keys are {', '.join(keys_of(row))}",
            code="E_RECIPE",
        ) from error


def _sentence(mistake: Any) -> str:
    key = ".".join(str(part) for part in mistake["loc"])
    if mistake["type"] == "missing":
        return f"{key} is missing"
    return f"{key} = {shorten(repr(mistake['input']))}: {lower_first(mistake['msg'])}"


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}? " if near else ""

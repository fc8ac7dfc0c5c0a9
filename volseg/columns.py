"""Table columns: dataclass fields with a unit, a meaning and a source; rows ↔ values by column."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, field, fields
from functools import cache
from typing import Any, TypeVar

Row = TypeVar("Row")


def column(unit: str, meaning: str, default: Any = MISSING, *, source: str = "") -> Any:
    """Make a dataclass field that is a column of a table.

    `source` is where its definition comes from; empty for volseg's own.
    """
    return field(default=default, metadata={"unit": unit, "meaning": meaning, "source": source})


def optional(unit: str, meaning: str, *, source: str = "") -> Any:
    """Make a column whose value may be unknown: None, an empty cell."""
    return column(unit, meaning, None, source=source)


def columns_of(row_type: type) -> list[tuple[str, str, str, str]]:
    """List name, unit, meaning and source of every column of a row type, in table order."""
    return [
        (item.name, item.metadata["unit"], item.metadata["meaning"], item.metadata["source"])
        for item in fields(row_type)
    ]


@cache
def column_names(row_type: type) -> tuple[str, ...]:
    return tuple(item.name for item in fields(row_type))


def row_of(row_type: type[Row], values: Mapping[str, Any]) -> Row:
    """Make a row from column → value; missing columns are unknown, other names are ignored."""
    unknown = _unknown(row_type)
    if None in values.values() or not values.keys() <= unknown.keys():  # rare, and slower
        values = {name: values[name] for name in values if name in unknown}
        values = {name: value for name, value in values.items() if value is not None}
    return row_type(**unknown | dict(values))


@cache
def _unknown(row_type: type) -> dict[str, Any]:
    """Return the value of each column that is unknown: its default, or None."""
    defaults = {item.name: item.default for item in fields(row_type)}  # type: ignore[arg-type]
    return {name: None if value is MISSING else value for name, value in defaults.items()}


def known_values(row: Any) -> dict[str, Any]:
    """Return column → value of a row for JSON, which has no NaN, without unknown values."""
    # `asdict` would copy each value deeply: a noisy mask has tens of thousands of rows.
    return {
        name: value
        for name in column_names(type(row))
        if (value := getattr(row, name)) is not None
        and not (isinstance(value, float) and not math.isfinite(value))
    }


def json_values(row: Any) -> dict[str, Any]:
    """Return column → value of a row for JSON, with None for unknown values."""
    return dict.fromkeys(column_names(type(row))) | known_values(row)

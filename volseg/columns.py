"""A column of a table is a dataclass field with a unit and a meaning."""

from __future__ import annotations

from dataclasses import MISSING, field, fields
from typing import Any


def column(unit: str, meaning: str, default: Any = MISSING) -> Any:
    """A dataclass field that is a column of a table."""
    return field(default=default, metadata={"unit": unit, "meaning": meaning})


def columns_of(row_type: type) -> list[tuple[str, str, str]]:
    """Name, unit and meaning of every column of a row type, in the order of the table."""
    return [(item.name, item.metadata["unit"], item.metadata["meaning"]) for item in fields(row_type)]

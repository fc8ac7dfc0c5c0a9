"""Table columns: dataclass fields with a unit, a meaning and a source."""

from __future__ import annotations

from dataclasses import MISSING, field, fields
from typing import Any


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

"""Dataclass rows → CSV. A column is a field; unknown is an empty cell, never 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from types import NoneType
from typing import Any, BinaryIO, Literal, TypeVar, get_args, get_origin, get_type_hints

from volseg.io.csv_text import write_csv

Row = TypeVar("Row")
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet would run a text that starts so


def table(row_type: type, rows: Iterable[Any]) -> Callable[[BinaryIO], None]:
    """A CSV table, to be written into an open file: the fields of the dataclass `row_type` as columns, a line per row.

    Whatever a cell holds, every reader finds as many rows as there are: see `csv_text`.

    Args:
        rows: instances of `row_type`, or mappings with its field names; taken one after another.
    """
    names = [field.name for field in fields(row_type)]

    def write(file: BinaryIO) -> None:
        write_csv(file, [names])
        write_csv(file, map(cells, rows))

    def cells(row: Any) -> list[str]:
        # Not `asdict`, which copies each value deeply: a noisy mask has ten thousands of rows.
        values = (
            map(row.get, names)
            if isinstance(row, Mapping)
            else (getattr(row, name) for name in names)
        )
        return [
            "" if value is None else cell(value) for value in values
        ]  # of noise that is half of each row

    return write


def typed_row(row_type: type[Row], cells: Mapping[str, str]) -> Row:
    """Inverse of `table`: a row from its cells. Numbers have the table's digits; unknown is None or NaN.

    Raises:
        ValueError: a cell does not hold what its column does.
    """
    hints = get_type_hints(row_type)
    return row_type(**{name: _value(hint, cells.get(name, "")) for name, hint in hints.items()})


def _value(hint: Any, text: str) -> Any:
    """The value of a cell of a column whose type is `hint`."""
    kinds = (str,) if get_origin(hint) is Literal else get_args(hint) or (hint,)
    if not text and (NoneType in kinds or float in kinds):
        return None if NoneType in kinds else math.nan
    if str in kinds:
        return text[1:] if text.startswith("'") and text[1:].startswith(FORMULA_STARTS) else text
    return text == "true" if bool in kinds else kinds[0](text)


def cell(value: Any) -> str:
    """Text of one cell: 4 decimals (6 significant digits below 1), nothing for unknown, true/false, harmless text."""
    if isinstance(value, float):
        if math.isnan(value):
            return ""
        return f"{round(value, 4):.15g}" if abs(value) >= 1 else f"{value + 0.0:.6g}"
    if isinstance(value, str):
        return f"'{value}" if value.startswith(FORMULA_STARTS) else value
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def columns_page(tables: Mapping[str, Sequence[tuple[str, str, str, str]]]) -> str:
    """docs/columns.md: file name → (column, unit, meaning, source) lines."""
    parts = [
        "# Columns",
        "",
        "Written by `make docs` from the code. An empty cell is unknown; 0 is zero. World coordinates are RAS+ millimetres.",
        "Tables are CSV in UTF-8 (RFC 4180): a cell is quoted where it holds a comma, a quote or anything that a reader",
        "takes for the end of a line, and cut after 32 767 characters, the most that a spreadsheet keeps.",
        "",
    ]
    for title, columns in tables.items():
        parts += [f"## {title}", "", "| column | unit | meaning | source |", "|---|---|---|---|"]
        parts += [
            f"| `{name}` | {unit} | {meaning.replace('|', chr(92) + '|')} | {source} |"
            for name, unit, meaning, source in columns
        ]
        parts.append("")
    return "\n".join(parts)

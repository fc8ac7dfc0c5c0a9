"""Dataclass rows → CSV. A column is a field; unknown is an empty cell, never 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from types import NoneType
from typing import Any, BinaryIO, Literal, TypeVar, get_args, get_origin, get_type_hints

from volseg.columns import column_names
from volseg.io.csv_text import write_csv

Row = TypeVar("Row")
# A spreadsheet would evaluate a text that starts with one of these.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def table(row_type: type, rows: Iterable[Any]) -> Callable[[BinaryIO], None]:
    """Return a function that writes a CSV table: a column per field of `row_type`, a line per row.

    No cell content changes the number of rows that a reader sees: see `csv_text`.

    Args:
        rows: instances of `row_type`; consumed one at a time.
    """
    names = column_names(row_type)
    values_of = attrgetter(*names)

    def write(file: BinaryIO) -> None:
        write_csv(file, [names])
        write_csv(file, map(cells, rows))

    def cells(row: Any) -> list[str]:
        # Half of the values of a noisy mask are None, and calling `cell` takes time.
        return ["" if value is None else cell(value) for value in values_of(row)]

    return write


def typed_row(row_type: type[Row], cells: Mapping[str, str]) -> Row:
    """Convert the cells of a `table` back into a row; unknown values are None or NaN.

    Raises:
        ValueError: a cell does not have the type of its column.
    """
    hints = get_type_hints(row_type)
    return row_type(**{name: _value(hint, cells.get(name, "")) for name, hint in hints.items()})


def _value(hint: Any, text: str) -> Any:
    """Parse the cell of a column of type `hint`."""
    kinds = (str,) if get_origin(hint) is Literal else get_args(hint) or (hint,)
    if not text and (NoneType in kinds or float in kinds):
        return None if NoneType in kinds else math.nan
    if str in kinds:
        return text[1:] if text.startswith("'") and text[1:].startswith(FORMULA_STARTS) else text
    return text == "true" if bool in kinds else kinds[0](text)


def cell(value: Any) -> str:
    """Format a cell: 4 decimals (6 significant digits below 1), empty for unknown, true/false.

    A quote before texts that start like a formula keeps spreadsheets from evaluating them.
    """
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
    """Return the text of docs/columns.md from file name → (column, unit, meaning, source) lines."""
    parts = [
        "# Columns",
        "",
        "`make docs` writes this page from the code. An empty cell means unknown, 0 means zero.",
        "World coordinates are RAS+ millimetres. Tables are CSV in UTF-8 (RFC 4180). Cells that",
        "contain a comma, a quote or a line separator are quoted; cells are cut after 32 767",
        "characters, the maximum of spreadsheets.",
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

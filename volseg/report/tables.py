"""Dataclass rows → CSV. A column is a field; unknown is an empty cell, never 0."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from volseg.io.files import write_lines_atomic

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet would run a text that starts so


def write_table(path: Path, row_type: type, rows: Iterable[Any]) -> None:
    """One line per row, the fields of the dataclass `row_type` as columns; written whole or not at all.

    Args:
        rows: instances of `row_type`, or mappings with its field names.
    """
    names = [field.name for field in fields(row_type)]

    def lines() -> Iterator[str]:
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")  # it quotes what it would end a line by
        writer.writerow(names)
        yield text.getvalue().removesuffix("\n")
        for row in rows:
            text.seek(0)
            text.truncate()
            values = map(row.get, names) if isinstance(row, Mapping) else (getattr(row, name) for name in names)
            writer.writerow(["" if value is None else cell(value) for value in values])
            yield text.getvalue().removesuffix("\n")

    write_lines_atomic(path, lines())


def cell(value: Any) -> str:
    """Text of one cell: 4 decimals (6 significant digits below 1), nothing for unknown, true/false, harmless text."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        rounded = round(value, 4) if abs(value) >= 1 else float(f"{value:.6g}")
        return f"{rounded + 0.0:.15g}"
    if isinstance(value, str):
        return f"'{value}" if value.startswith(FORMULA_STARTS) else value
    return str(value)


def columns_page(tables: Mapping[str, Sequence[tuple[str, str, str, str]]]) -> str:
    """docs/columns.md: file name → (column, unit, meaning, source) lines."""
    parts = [
        "# Columns",
        "",
        "Written by `make docs` from the code. An empty cell is unknown; 0 is zero. World coordinates are RAS+ millimetres.",
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

"""Rows of cells ↔ CSV text that every reader splits into the same rows."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from volseg.inputs import open_regular

MAX_CELL = 32_767  # characters that a spreadsheet keeps; Python's csv module reads up to 131 072

# Line ends of any reader: the csv module, `str.splitlines`, pandas, R, text editors.
LINE_BREAKS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
_SPECIAL = re.compile(f'[",{LINE_BREAKS}]')
_NOT_ALONE = re.compile(f'["{LINE_BREAKS}]')


def csv_line(cells: Sequence[str]) -> str:
    """Return one row with a line feed; cells that a reader would split are quoted.

    A cell of more than 32 767 characters is cut and ends in an ellipsis, because csv and
    spreadsheets refuse longer ones.

    >>> csv_line(["a", "b\\rc", 'd"e', ""])
    'a,"b\\rc","d""e",\\n'
    """
    line = ",".join(cells)
    if len(line) > MAX_CELL or _NOT_ALONE.search(line):
        line = ",".join(map(_quoted, cells))
    elif line.count(",") != len(cells) - 1:  # noise has 100 000 such rows: no pattern per cell
        line = ",".join(f'"{cell}"' if "," in cell else cell for cell in cells)
    return f"{line}\n" if line else '""\n'  # readers skip an empty line


def write_csv(file: BinaryIO, rows: Iterable[Sequence[str]]) -> None:
    """Write rows as UTF-8; a lone surrogate, as in a non-UTF-8 file name, becomes \\udcff."""
    for row in rows:
        file.write(csv_line(row).encode("utf-8", "backslashreplace"))


def csv_rows(
    text: str, *, delimiter: str = ",", strict: bool = False
) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of the last line, cells) of each row; lines end in \\n, \\r or \\r\\n only.

    Raises:
        csv.Error: a misplaced quote, if strict; a cell of more than 131 072 characters.
    """
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=strict)
    for cells in reader:
        yield reader.line_num, cells


def stream_rows(path: Path) -> Iterator[list[str]]:
    """Yield the cells of each row of a file, which may be larger than memory; no empty lines.

    Raises:
        OSError: the file cannot be read, or is not a regular file.
        ValueError: not UTF-8 or not CSV.
    """
    with io.TextIOWrapper(open_regular(path), "utf-8-sig", newline="") as file:
        try:
            yield from filter(None, csv.reader(file))
        except csv.Error as error:
            raise ValueError(f"not CSV: {error}") from error


def iterate_csv(path: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of a table by the column names of its first row; missing cells are empty.

    Raises:
        OSError, ValueError: as `stream_rows`, during the iteration.
    """
    rows = stream_rows(path)
    names = next(rows, [])
    for cells in rows:
        yield dict(zip(names, cells + [""] * (len(names) - len(cells))))


def _quoted(cell: str) -> str:
    if len(cell) > MAX_CELL:
        cell = cell[: MAX_CELL - 1] + "…"
    return '"{}"'.format(cell.replace('"', '""')) if _SPECIAL.search(cell) else cell

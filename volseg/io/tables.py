"""Tables that people type: CSV with any separator, and heads by their usual names."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from volseg.errors import VolsegError
from volseg.inputs import MAX_TEXT_BYTES, NotAFileError, read_bytes
from volseg.io.csv_text import csv_rows

SEPARATORS = ",;\t"
SIMILARITY = 0.8  # of a head and a known one that may be meant

# Column → other heads for it, in lower case with `_` between words
Synonyms = Mapping[str, Sequence[str]]
PATIENT = ("patient_id", "patientid", "pid", "participant", "participant_id", "patient_name")


@dataclass(frozen=True, slots=True)
class Table:
    """The cells of a table as text.

    Args:
        columns: heads; a head that stands for a known column has its name.
        lines: line number and cells of each row.
        remarks: which heads were read as other columns, and which look like a misspelt one.
    """

    path: Path
    columns: Sequence[str]
    lines: Sequence[tuple[int, list[str]]]
    remarks: Sequence[str] = field(default=())


def read_table(path: Path, synonyms: Synonyms, *, prefix: str | None = None) -> Table:
    """Read a table whose known columns may have other usual heads.

    Cells may be separated by commas, semicolons or tabs. A byte order mark, a first line `sep=;`
    and columns without head and cells are allowed.

    Args:
        prefix: of further known heads, such as `image_` for channels.

    Raises:
        VolsegError: the file is no such table, or two heads stand for one column.
    """
    text = _text_of(path)
    stated = re.match(r"sep=(.)\r?\n", text)
    body = text[stated.end() :] if stated else text
    first = re.split(r"[\r\n]", body, maxsplit=1)[0]
    delimiter = stated[1] if stated else max(SEPARATORS, key=first.count)
    lines = _lines(body, delimiter, path, skipped=1 if stated else 0)
    if not lines:
        raise VolsegError(f"{path}: is empty", fix="give it a header line and a row per scan")
    heads, rows = _without_empty_columns(lines[0][1], lines[1:])
    if "" in heads:
        raise VolsegError(
            f"{path}: column {heads.index('') + 1} has cells but no name",
            fix="name it in the first line, or delete it",
        )
    columns, remarks = _named(heads, synonyms, path, prefix)
    repeated = sorted(name for name, n in Counter(columns).items() if n > 1)
    if repeated:
        names = ", ".join(map(repr, repeated))
        raise VolsegError(
            f"{path}: has columns {names} twice", fix="give every column its own name"
        )
    return Table(path, columns, rows, remarks)


def read_description(path: Path) -> bytes:
    """Return the bytes of a cases.csv or dataset.json."""
    try:
        return read_bytes(path, max_bytes=MAX_TEXT_BYTES)
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise VolsegError(f"{path}: {error}", fix="give a cases.csv or dataset.json") from error


def unreadable(path: Path, error: OSError) -> VolsegError:
    """Return the user's error for a file or folder of a data set that cannot be read."""
    if isinstance(error, NotAFileError):
        return VolsegError(
            f"{path}: {error.strerror}", fix="give the path of a file", code="E_NOTFILE"
        )
    return VolsegError(
        f"{path}: cannot be read ({error.strerror})", fix="check its permissions", code="E_PERM"
    )


def _text_of(path: Path) -> str:
    try:
        return read_description(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise VolsegError(
            f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})",
            fix="save it as “CSV UTF-8”",
        ) from error


def _lines(text: str, delimiter: str, path: Path, *, skipped: int) -> list[tuple[int, list[str]]]:
    """Return line number and stripped cells of each line that is not empty."""
    lines: list[tuple[int, list[str]]] = []
    number = 0
    try:
        for number, cells in csv_rows(text, delimiter=delimiter, strict=True):
            lines.append((number + skipped, [cell.strip() for cell in cells]))
    except csv.Error as error:
        line = number + 1 + skipped
        raise VolsegError(
            f"{path}: line {line} is not valid CSV ({error})", fix="check its quotes"
        ) from error
    return [(number, cells) for number, cells in lines if any(cells)]


def _without_empty_columns(
    heads: Sequence[str], rows: Sequence[tuple[int, list[str]]]
) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Drop trailing columns without a head where no row has a cell in them."""
    n = len(heads)
    while n and not heads[n - 1] and not any(any(cells[n - 1 :]) for _, cells in rows):
        n -= 1
    return list(heads[:n]), [
        (number, cells[:n] if not any(cells[n:]) else cells) for number, cells in rows
    ]


def _named(
    heads: Sequence[str], synonyms: Synonyms, path: Path, prefix: str | None
) -> tuple[list[str], list[str]]:
    """Return the column of each head, and remarks on the heads."""
    plain = [_plain(head) for head in heads]
    columns, remarks = list(heads), list[str]()
    for column, others in synonyms.items():
        if column in heads:
            continue
        places = [place for place, head in enumerate(plain) if head in (column, *others)]
        if len(places) > 1:
            names = " and ".join(repr(heads[place]) for place in places)
            raise VolsegError(
                f"{path}: columns {names} may both be the {column}",
                fix=f"name the right one {column!r}",
            )
        for place in places:
            columns[place] = column
            if plain[place] != column:
                remarks.append(f"N_HEAD: {path}: column {heads[place]!r} is read as {column!r}")
    missing = [column for column in synonyms if column not in columns]
    for head, column in zip(plain, columns, strict=True):
        is_known = column in synonyms or (prefix is not None and head.startswith(prefix))
        near = [] if is_known else _meant(head, missing, synonyms)
        if near:
            text = f"W_COLUMN: {path}: column {column!r} is not used; did you mean {near[0]!r}?"
            remarks.append(text)
    return columns, remarks


def _meant(head: str, missing: Sequence[str], synonyms: Synonyms) -> list[str]:
    """Return the columns that the table lacks and whose heads resemble this one."""
    return [
        column
        for column in missing
        if get_close_matches(head, (column, *synonyms[column]), n=1, cutoff=SIMILARITY)
    ]


def _plain(head: str) -> str:
    """Return a head in lower case with `_` between its words.

    >>> _plain("Patient ID"), _plain("PatientID"), _plain("patient-id")
    ('patient_id', 'patient_id', 'patient_id')
    """
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", head)
    return re.sub(r"[\W_]+", "_", words).strip("_").casefold()

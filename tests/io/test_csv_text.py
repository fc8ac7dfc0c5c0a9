from __future__ import annotations

import csv
import io
import os
import random
import re
from pathlib import Path

import pandas
import pytest

import volseg
from volseg.inputs import NotAFileError
from volseg.io.csv_text import (
    LINE_BREAKS,
    MAX_CELL,
    csv_line,
    csv_rows,
    iterate_csv,
    write_csv,
)

HOSTILE = (
    "a\rb",
    "\r",
    "a\nb",
    "\r\n",
    "\n\r",
    *(f"a{line_break}b" for line_break in LINE_BREAKS),
    *(f"{line_break}" for line_break in LINE_BREAKS),
    'say "a, b"',
    '"',
    '""',
    '"\r"',
    "a,b",
    ",",
    ";",
    "\t",
    " ",
    "\\",
    "'",
    'a\\"b',
    "NA",
    "#",
    "\ufeff",
    "a\x00b",
    "\xa0",
    "é → 肝",
    "",
)


def csv_bytes(rows):
    file = io.BytesIO()
    write_csv(file, rows)
    return file.getvalue()


def by_csv(content):
    return list(csv.reader(io.StringIO(content.decode(), newline="")))


def by_csv_of_a_text_file(content):
    """Read as a file opened without newline="", where \\r becomes \\n."""
    return list(csv.reader(io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")))


def by_csv_of_split_lines(content):
    return list(csv.reader(content.decode().splitlines()))


def by_csv_of_kept_lines(content):
    return list(csv.reader(content.decode().splitlines(keepends=True)))


def by_pandas(content):
    table = pandas.read_csv(io.BytesIO(content), header=None, dtype=str, keep_default_na=False)
    return table.to_numpy().tolist()


READERS = [by_csv, by_csv_of_a_text_file, by_csv_of_split_lines, by_csv_of_kept_lines, by_pandas]


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_reads_the_rows_and_columns_that_were_written(reader):
    rng = random.Random(0)
    rows = [[text, "x", text] for text in HOSTILE]
    rows += [[rng.choice(HOSTILE) + rng.choice(HOSTILE) for _ in range(3)] for _ in range(2000)]
    parsed = reader(csv_bytes(rows))
    assert len(parsed) == len(rows)
    assert {len(row) for row in parsed} == {3}
    if reader in (by_csv, by_csv_of_kept_lines, by_pandas):
        assert parsed == rows


def test_rows_of_any_characters_round_trip():
    rng = random.Random(1)
    special = [*LINE_BREAKS, "\ud800", "\udfff", "\U0001f600", '"', ","]
    characters = [chr(n) for n in range(0x300)] + special * 9
    for _ in range(500):
        width = rng.randint(1, 4)
        rows = [
            ["".join(rng.choices(characters, k=rng.randint(0, 12))) for _ in range(width)]
            for _ in range(rng.randint(1, 5))
        ]
        cells = [cells for _, cells in csv_rows(csv_bytes(rows).decode())]
        assert cells == [
            [text.encode("utf-8", "backslashreplace").decode() for text in row] for row in rows
        ]


def test_a_row_of_one_empty_cell_is_a_row():
    assert by_csv(csv_bytes([[""], ["a"], [""]])) == [[""], ["a"], [""]]


def test_a_cell_too_long_for_readers_is_cut():
    long = "x" * 200_000
    (row,) = by_csv(csv_bytes([[long, "a"]]))
    assert row == ["x" * (MAX_CELL - 1) + "…", "a"]
    (row,) = by_csv(csv_bytes([['"\r' * 100_000, "a"]]))
    assert len(row[0]) == MAX_CELL


def test_a_name_that_is_not_utf_8_is_written_as_an_escape():
    assert csv_bytes([["a\udcffb", "c"]]) == b"a\\udcffb,c\n"


def test_plain_cells_are_not_quoted():
    assert csv_line(["a", "1.5", "", "x y; z", "'=1"]) == "a,1.5,,x y; z,'=1\n"


def test_a_table_is_read_by_its_column_names(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b'\xef\xbb\xbfname,size\r"a\rb",1\r\n\nc\n"d\xe2\x80\xa8e",2,3\n')
    assert list(iterate_csv(path)) == [
        {"name": "a\rb", "size": "1"},
        {"name": "c", "size": ""},
        {"name": "d\u2028e", "size": "2"},
    ]
    path.write_bytes(b"")
    assert list(iterate_csv(path)) == []
    for content in (b"a\n\xff\n", b"a\n" + b"x" * 200_000):
        path.write_bytes(content)
        with pytest.raises(ValueError):
            list(iterate_csv(path))


def test_a_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "cases.csv")
    with pytest.raises(NotAFileError, match="is a pipe"):
        list(iterate_csv(tmp_path / "cases.csv"))


def test_no_other_file_of_the_package_reads_or_writes_csv():
    """So that a fix in csv_text is a fix everywhere; pandas only reads for the user."""
    uses = re.compile(r"csv\.(reader|writer|DictReader|DictWriter)|to_csv|pandas\.")
    package = Path(volseg.__file__).parent
    files = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if uses.search(path.read_text(encoding="utf-8"))
    }
    assert files == {"io/csv_text.py", "store/tables.py"}

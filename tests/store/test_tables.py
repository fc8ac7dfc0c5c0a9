import csv
from dataclasses import dataclass

import pytest

from volseg.store.tables import cell, table


@dataclass(frozen=True)
class Row:
    name: str
    size: float | None
    cut: bool = False


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (float("nan"), ""),
        (0.0, "0"),
        (-0.0, "0"),
        (0, "0"),
        (1062450.0, "1062450"),
        (33.05909123, "33.0591"),
        (0.000123456789, "0.000123457"),
        (-1.5e-7, "-1.5e-07"),
        (True, "true"),
        ("=cmd|calc", "'=cmd|calc"),
        ("-12", "'-12"),
        ("liver, left", "liver, left"),
    ],
)
def test_cells(value, text):
    assert cell(value) == text


def write_table(path, row_type, rows):
    with path.open("wb") as file:
        table(row_type, rows)(file)


def test_a_table_reads_back_as_it_was_with_unknown_as_empty_cells(tmp_path):
    write_table(tmp_path / "t.csv", Row, [Row("a,b", 1.5), {"name": "c\nd", "size": None, "cut": True}])
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["name", "size", "cut"], ["a,b", "1.5", "false"], ["c\nd", "", "true"]]


def test_a_table_without_rows_still_has_its_header(tmp_path):
    write_table(tmp_path / "t.csv", Row, [])
    assert (tmp_path / "t.csv").read_text() == "name,size,cut\n"

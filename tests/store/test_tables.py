import ast
import csv
import importlib
import io
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import pytest

import volseg
from volseg.evaluation.detection import DetectionRow
from volseg.evaluation.overlap import OverlapRow
from volseg.evaluation.validation import ValidationRow
from volseg.io.csv_text import read_csv
from volseg.measurement.changes import LesionChange
from volseg.measurement.response import PatientResponse
from volseg.measurement.rows import CaseRow, LesionMeasurement
from volseg.store.tables import cell, table, typed_row
from volseg.training.loop import Epoch


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
    write_table(tmp_path / "t.csv", Row, [Row("a,b", 1.5), Row("c\nd", None, True)])
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [
            ["name", "size", "cut"],
            ["a,b", "1.5", "false"],
            ["c\nd", "", "true"],
        ]


def test_a_table_without_rows_still_has_its_header(tmp_path):
    write_table(tmp_path / "t.csv", Row, [])
    assert (tmp_path / "t.csv").read_text() == "name,size,cut\n"


@dataclass(frozen=True)
class Typed:
    name: str
    side: Literal["left", "right"]
    size: float
    n: int
    cut: bool
    share: float | None = None
    count: int | None = None
    patient: str | None = None


@pytest.mark.parametrize(
    "row",
    [
        Typed("a\rb", "left", 1.5, 7, True),
        Typed("-=x", "right", -0.25, 0, False, 0.125, -3, "'q"),
        Typed("", "left", 1e-7, 1, True, 0.0, 0, "=1"),
    ],
    ids=repr,
)
def test_a_row_comes_back_from_its_cells(row, tmp_path):
    write_table(tmp_path / "t.csv", Typed, [row])
    (cells,) = read_csv(tmp_path / "t.csv")
    assert typed_row(Typed, cells) == row


def test_an_empty_cell_of_a_number_is_unknown_and_of_a_count_an_error():
    cells = {"name": "a", "side": "left", "size": "", "n": "1", "cut": "false"}
    assert math.isnan(typed_row(Typed, cells).size)
    with pytest.raises(ValueError):
        typed_row(Typed, cells | {"n": ""})


def row_types():
    """Yield every row type that the package writes: in a call of `table`, or in `row_types`."""
    for path in sorted(Path(volseg.__file__).parent.rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        imports = {
            alias.name: node.module
            for node in nodes
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        for node in nodes:
            types = ()
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == "table"
            ):
                types = node.args[:1]
            elif isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Tuple):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                types = node.value.elts if "row_types" in map(ast.unparse, targets) else ()
            for name in (node.id for node in types if isinstance(node, ast.Name)):
                yield getattr(importlib.import_module(imports[name]), name)


@pytest.mark.parametrize("row_type", dict.fromkeys(row_types()))
def test_a_table_has_the_written_number_of_rows_whatever_the_cells_hold(row_type, tmp_path):
    names = [field.name for field in fields(row_type)]
    texts = [
        "a\rb",
        "\r",
        "a\x0bb",
        "\x0c",
        "a\x1cb\x1db\x1e",
        "a\x85b",
        "a\u2028b\u2029",
        '"\r\n,',
        "\udcff",
        "a",
    ]
    rows = [
        row_type(**{name: texts[(n + shift) % len(texts)] for n, name in enumerate(names)})
        for shift in range(10)
    ]
    write_table(tmp_path / "t.csv", row_type, rows)
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    text = (tmp_path / "t.csv").read_text(encoding="utf-8")  # \r becomes \n
    for lines in (io.StringIO(text), text.splitlines()):
        parsed = list(csv.reader(lines))
        assert len(parsed) == 1 + len(rows)
        assert {len(cells) for cells in parsed} == {len(names)}
    (first, *_) = read_csv(tmp_path / "t.csv")
    assert first[names[0]] == "a\rb"


def test_all_documented_tables_are_tested():
    types = set(row_types())
    assert {
        LesionMeasurement,
        CaseRow,
        LesionChange,
        PatientResponse,
        OverlapRow,
        DetectionRow,
    } < types
    assert {ValidationRow, Epoch} < types

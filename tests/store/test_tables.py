import ast
import csv
import importlib
import io
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import pandas
import pytest

import volseg
from volseg.columns import known_values
from volseg.comparison.changes import LesionChange
from volseg.comparison.response import PatientResponse
from volseg.errors import VolsegError
from volseg.evaluation.detection import DetectionRow
from volseg.evaluation.overlap import OverlapRow
from volseg.evaluation.validation import ValidationRow
from volseg.io.csv_text import iterate_csv
from volseg.measurement.rows import CaseRow, LesionMeasurement
from volseg.store.tables import TABLES, cell, read_table, table, typed_row
from volseg.training.state import Epoch


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
    (cells,) = iterate_csv(tmp_path / "t.csv")
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
            names = [node.id for node in types if isinstance(node, ast.Name)]
            for name in filter(imports.__contains__, names):  # others are parameters
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
    (first, *_) = iterate_csv(tmp_path / "t.csv")
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


def cases_table(folder, *lines):
    path = folder / "cases.csv"
    path.write_text("\n".join(["case_id,status,n_lesions,total_volume_ml", *lines]) + "\n")
    return path


def test_a_data_frame_has_typed_columns_ids_as_text_and_empty_cells_as_missing_values(tmp_path):
    rows = [
        CaseRow(case_id="007", status="done", n_lesions=3, total_volume_ml=1 / 3),
        CaseRow(case_id="NA", status="failed", reason="=1+1"),
    ]
    write_table(tmp_path / "cases.csv", CaseRow, rows)
    frame = read_table(tmp_path / "cases.csv")
    assert frame["case_id"].tolist() == ["007", "NA"]
    assert frame["reason"].tolist()[1] == "=1+1"  # without the quote that spreadsheets need
    assert (frame["n_lesions"].dtype, frame["total_volume_ml"].dtype) == ("Int64", "float64")
    assert frame.loc[0, ["n_lesions", "total_volume_ml"]].tolist() == [3, 0.333333]
    assert frame.loc[1, ["n_lesions", "total_volume_ml", "image"]].isna().all()


@pytest.mark.parametrize("name", ["lesions.csv", "cases.csv", "response.csv", "detections.csv"])
def test_a_table_without_rows_is_an_empty_data_frame_with_its_columns(name, tmp_path):
    write_table(tmp_path / name, TABLES[name], [])
    frame = read_table(tmp_path / name)
    assert len(frame) == 0
    assert list(frame.columns) == [field.name for field in fields(TABLES[name])]


def test_every_row_comes_back_from_a_data_frame_as_it_was(tmp_path):
    row = CaseRow(case_id="a\rb", status="done", n_lesions=2**40, total_volume_ml=0.1, burden=1e-7)
    write_table(tmp_path / "cases.csv", CaseRow, [row])
    (cells,) = read_table(tmp_path / "cases.csv").to_dict("records")
    assert {name: value for name, value in cells.items() if not pandas.isna(value)} == {
        name: value for name, value in known_values(row).items() if value != ""
    }


@pytest.mark.parametrize(
    "line", ["a,done,much,1", "a,done,1,much", "a,done,1,2,3", 'a,"done', "a,done,1.5,2", "a\xff"]
)
def test_a_table_that_was_damaged_is_refused_in_one_line(line, tmp_path):
    path = cases_table(tmp_path)
    path.write_bytes(path.read_bytes() + line.encode("latin-1") + b"\n")
    with pytest.raises(VolsegError, match="is not a valid table") as refusal:
        read_table(path)
    assert "\n" not in refusal.value.problem


def test_only_tables_of_volseg_of_a_usual_width_are_read(tmp_path):
    with pytest.raises(VolsegError, match="is not a table of volseg"):
        read_table(tmp_path / "other.csv")
    with pytest.raises(VolsegError, match="cannot be read"):
        read_table(tmp_path / "cases.csv")
    (tmp_path / "cases.csv").write_text("x," * 100_000 + "case_id\n")
    with pytest.raises(VolsegError, match="over 1000 columns"):
        read_table(tmp_path / "cases.csv")
    assert read_table(cases_table(tmp_path, "a,done,1,2")).loc[0, "case_id"] == "a"

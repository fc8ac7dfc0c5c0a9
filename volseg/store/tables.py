"""Dataclass rows ↔ CSV. A column is a field; unknown is an empty cell, never 0."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from operator import attrgetter
from pathlib import Path
from types import NoneType
from typing import (
    TYPE_CHECKING,
    Any,
    BinaryIO,
    Literal,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

from volseg.columns import column_names
from volseg.comparison.changes import LesionChange
from volseg.comparison.response import PatientResponse
from volseg.errors import VolsegError, given_path
from volseg.evaluation.class_intervals import MetricRow
from volseg.evaluation.class_rows import (
    BASELINES,
    CLASSES,
    PROBABILITY,
    VALUES,
    BaselineRow,
    ClassRow,
    JudgedRow,
    ValueRow,
    class_cells,
    class_columns,
    class_names_of,
)
from volseg.evaluation.detection import DetectionRow
from volseg.evaluation.overlap import OverlapRow
from volseg.evaluation.saliency_rows import (
    EXPLAIN,
    RANDOMISATION,
    SALIENCY,
    ExplainRow,
    RandomisationRow,
    SaliencyRow,
)
from volseg.evaluation.validation import ValidationRow
from volseg.inputs import open_regular
from volseg.io.csv_text import iterate_csv, stream_rows, write_csv
from volseg.measurement.confidence import probabilities_in
from volseg.measurement.review import LesionReview
from volseg.measurement.rows import CaseRow, LesionMeasurement
from volseg.quality.rows import QualityRow

if TYPE_CHECKING:
    from pandas import DataFrame

Row = TypeVar("Row")
TABLES: dict[str, type] = {
    "lesions.csv": LesionMeasurement,
    "cases.csv": CaseRow,
    "comparison.csv": LesionChange,
    "response.csv": PatientResponse,
    "evaluation.csv": OverlapRow,
    "detections.csv": DetectionRow,
    "validation.csv": ValidationRow,
    "review.csv": LesionReview,
    "quality.csv": QualityRow,
    CLASSES: ClassRow,
    VALUES: ValueRow,
    BASELINES: BaselineRow,
    "metrics.csv": MetricRow,
    EXPLAIN: ExplainRow,
    RANDOMISATION: RandomisationRow,
    SALIENCY: SaliencyRow,
}
# Rows that a table has instead if its header has all their columns.
VARIANTS: dict[str, type] = {"evaluation.csv": JudgedRow}
MAX_COLUMNS = 1000  # pandas takes minutes for a million
# A spreadsheet would evaluate a text that starts with one of these.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
_QUOTED_FORMULA = r"\A'(?=[=+\-@\t\r])"
_COLUMN_TYPES = {bool: "boolean", float: "float64", int: "Int64"}


def table(
    row_type: type,
    rows: Iterable[Any],
    headings: Mapping[str, str | None] | None = None,
    *,
    classes: Sequence[str] = (),
) -> Callable[[BinaryIO], None]:
    """Return a function that writes a CSV table: a column per field of `row_type`, a line per row.

    No cell content changes the number of rows that a reader sees: see `csv_text`.

    Args:
        rows: instances of `row_type`; consumed one at a time.
        headings: field → heading in place of its name; None leaves the column out.
        classes: of lesions; each gets a column `probability_<class>` at the end.
    """
    given = headings or {}
    shown = {name: given.get(name, name) for name in column_names(row_type)}
    columns = {name: heading for name, heading in shown.items() if heading is not None}
    values_of = attrgetter(*columns)

    def write(file: BinaryIO) -> None:
        write_csv(file, [[*columns.values(), *(PROBABILITY + name for name in classes)]])
        write_csv(file, map(cells, rows))

    def cells(row: Any) -> list[str]:
        # Half of the values of a noisy mask are None, and calling `cell` takes time.
        values = ["" if value is None else cell(value) for value in values_of(row)]
        if classes:
            of_class = probabilities_in(row.class_probabilities)
            values += [cell(of_class.get(name)) for name in classes]
        return values

    return write


def class_table(names: Sequence[str], rows: Iterable[ClassRow]) -> Callable[[BinaryIO], None]:
    """Return a function that writes classes.csv, with a column of probabilities per class.

    Args:
        names: the classes, in the order of the model.
        rows: consumed one at a time.
    """

    def write(file: BinaryIO) -> None:
        write_csv(file, [class_columns(names)])
        write_csv(file, ([cell(value) for value in class_cells(row, names)] for row in rows))

    return write


def read_class_rows(path: Path) -> tuple[list[str], list[ClassRow]]:
    """Read classes.csv: the names of the classes, and a row per case.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such a table, or a cell is not valid.
    """
    columns = next(stream_rows(path), [])
    _check_columns(columns, "case_id", "class_name")
    names, rows = class_names_of(columns), []
    for cells in iterate_csv(path):
        values = {name: cells.get(PROBABILITY + name, "") for name in names}
        probabilities = {name: float(text) for name, text in values.items() if text}
        row = typed_row(ClassRow, cells)
        rows.append(replace(row, probabilities=probabilities or None))
    return names, rows


def read_value_rows(path: Path) -> list[ValueRow]:
    """Read values.csv: a row per case.

    Raises:
        OSError, ValueError: as `read_class_rows`.
    """
    _check_columns(next(stream_rows(path), []), "case_id", "value")
    return [typed_row(ValueRow, cells) for cells in iterate_csv(path)]


def _check_columns(columns: Sequence[str], *needed: str) -> None:
    """Refuse a table that lacks columns; its rows would be blank, or none.

    Raises:
        ValueError: it lacks one.
    """
    for name in needed:
        if name not in columns:
            raise ValueError(f"has no column {name!r}")


def read_baseline_rows(path: Path) -> list[BaselineRow]:
    """Read baselines.csv: a row per case, baseline and class.

    Raises:
        OSError, ValueError: as `read_class_rows`.
    """
    return [typed_row(BaselineRow, cells) for cells in iterate_csv(path)]


def typed_row(row_type: type[Row], cells: Mapping[str, str]) -> Row:
    """Convert the cells of a `table` back into a row; unknown values are None or NaN.

    Raises:
        ValueError: a cell does not have the type of its column.
    """
    hints = _hints(row_type)
    return row_type(**{name: _value(hint, cells.get(name, "")) for name, hint in hints.items()})


@cache
def _hints(row_type: type) -> dict[str, Any]:
    return get_type_hints(row_type)


def _value(hint: Any, text: str) -> Any:
    """Parse the cell of a column of type `hint`."""
    kinds = (str,) if get_origin(hint) is Literal else get_args(hint) or (hint,)
    if not text and (NoneType in kinds or float in kinds):
        return None if NoneType in kinds else math.nan
    if str in kinds:
        return text[1:] if text.startswith("'") and text[1:].startswith(FORMULA_STARTS) else text
    return text == "true" if bool in kinds else kinds[0](text)


def read_table(path: Path | str) -> DataFrame:
    """Read a table that volseg wrote, such as lesions.csv, with typed columns.

    Numbers are float64 or Int64, true and false are boolean. Everything else is text, so the id
    `007` stays `007` and `NA` stays `NA`. Columns that volseg does not know are text. An empty
    cell is a missing value (NaN, or NA in Int64 and boolean columns).

    Raises:
        VolsegError: the file is not one of the tables of docs/columns.md, cannot be read, or has a
            cell or line that is not valid.

    Example:
        >>> import volseg
        >>> scan, mask = (f"sample_data/{kind}/phantom_15.nii.gz" for kind in ("images", "labels"))
        >>> measured = volseg.measure(image=scan, mask=mask, out="measured")
        >>> volseg.read_table("measured/cases.csv")["case_id"].tolist()
        ['phantom_15']
    """
    path = given_path(path)
    row_type = TABLES.get(path.name)
    if row_type is None:
        raise VolsegError(
            f"{path}: is not a table of volseg; these are {', '.join(TABLES)}",
            fix="give one of them in an output folder",
            code="E_DATASET",
        )
    try:
        return _typed_frame(path, row_type)
    except OSError as error:
        raise VolsegError(
            f"{path}: cannot be read ({error.strerror})", fix="check the path", code="E_DATASET"
        ) from error
    except (ValueError, TypeError, OverflowError) as error:
        raise VolsegError(
            f"{path}: is not a valid table ({' '.join(str(error).split())})",
            fix="repeat the command that wrote it",
            code="E_DATASET",
        ) from error


def frame_of(row_type: type, rows: Iterable[Any], *, classes: Sequence[str] = ()) -> DataFrame:
    """Return rows as `read_table` reads them from a file, with the same digits and types.

    Args:
        classes: as in `table`.
    """
    file = io.BytesIO()
    table(row_type, rows, classes=classes)(file)
    file.seek(0)
    names = [*column_names(row_type), *(PROBABILITY + name for name in classes)]
    return _parsed_frame(file, names, row_type)


def _typed_frame(path: Path, row_type: type) -> DataFrame:
    names = next(stream_rows(path), [])
    variant = VARIANTS.get(path.name)
    if variant is not None and set(column_names(variant)) <= set(names):
        row_type = variant
    with open_regular(path) as file:
        return _parsed_frame(file, names, row_type)


def _parsed_frame(file: BinaryIO, names: Sequence[str], row_type: type) -> DataFrame:
    """Read a CSV table with these columns."""
    import pandas  # takes half a second; no command needs it

    hints = get_type_hints(row_type)
    if len(names) > MAX_COLUMNS or len(set(names)) < len(names):
        raise ValueError(f"over {MAX_COLUMNS} columns, or one of them twice")
    if row_type in (ClassRow, LesionMeasurement):
        hints |= {name: float for name in names if name.startswith(PROBABILITY)}
    types = {name: _column_type(hints.get(name, str)) for name in names}
    floats = {name: kind for name, kind in types.items() if kind == "float64"}
    frame = pandas.read_csv(
        file,
        # pandas itself reads some decimals with another last digit than Python.
        dtype=types | dict.fromkeys(floats, str),  # type: ignore[arg-type]
        keep_default_na=False,
        na_values=[""],
        encoding="utf-8-sig",
    ).astype(floats)
    if not isinstance(frame.index, pandas.RangeIndex):
        raise ValueError("a line has more cells than there are columns")
    for name in (name for name in names if types[name] is str):
        frame[name] = frame[name].str.replace(_QUOTED_FORMULA, "", regex=True)
    return frame


def _column_type(hint: Any) -> Any:
    """Return the pandas type of a column: nullable, except for float, which has NaN."""
    kinds = (str,) if get_origin(hint) is Literal else get_args(hint) or (hint,)
    return next((name for kind, name in _COLUMN_TYPES.items() if kind in kinds), str)


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

"""The record of a finished case or patient: one frozen type, written as JSON and read back.

Rows of lesions, of which a noisy mask has 100 000, are in a file of their own, one JSON object per
line, and are read one at a time. Both files may come from a stranger.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from heapq import nlargest
from pathlib import Path
from types import NoneType
from typing import (
    Any,
    BinaryIO,
    ClassVar,
    Generic,
    Literal,
    Protocol,
    Self,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

from volseg.columns import column_names, json_values, known_values, row_of
from volseg.errors import ScanError, VolsegError
from volseg.inputs import open_regular, parse_json, read_json
from volseg.io.cases import is_valid_id
from volseg.io.csv_text import iterate_csv
from volseg.io.files import RECORDS, json_text, sha256_of
from volseg.measurement.rows import CaseRow, LesionMeasurement
from volseg.postprocessing.lesions import MANY
from volseg.recipe import Measure
from volseg.store.outputs import confined


class ItemRow(Protocol):
    """A row of cases.csv or of response.csv."""

    @property
    def status(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def warnings(self) -> str: ...


Item = TypeVar("Item", bound=ItemRow)
Lesions = TypeVar("Lesions", bound=Iterable[Any], covariant=True)  # rows of a case or patient

MAX_ROW_BYTES = 2**20  # per line of a stranger's file; volseg's rows take about a thousandth
MASKS, LESION_IDS, PROBABILITIES = "masks", "lesion_ids", "probabilities"  # folders
STALE = "W_STALE"
_VOLUME_ML = re.compile(rb'"volume_ml": ([0-9]{1,18}(?:\.[0-9]{1,30})?(?:e[+-]?[0-9]{1,3})?)\b')
_N_VOXELS = re.compile(rb'"n_voxels": ([0-9]{1,18})\b')


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Record(Generic[Item, Lesions]):
    """An item that was finished, or that failed: a case of `infer` or `measure`, or a patient.

    Args:
        lesions: its rows; those of a record that was read come from the file on each iteration.
        key: hash of the input, model and options; empty if it never was finished.
        inputs: SHA-256 of each input file.
        files: path in the folder → SHA-256.
        failed: row of a later run that failed with another input.
        remark: warning about a later run that failed with the same input.
    """

    row_name: ClassVar[str]  # of the field, and of the key in JSON, that holds the item's row
    name_column: ClassVar[str]
    row_types: ClassVar[tuple[type, type]]  # of the item and of its lesions
    tables: ClassVar[tuple[str, str]]  # with these rows
    required: ClassVar[tuple[str, ...]] = ()  # columns without which a lesion is no lesion

    lesions: Lesions
    key: str = ""
    inputs: Sequence[str] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    failed: Item | None = None
    remark: str = ""

    @property
    def row(self) -> Item:
        return getattr(self, self.row_name)

    @property
    def name(self) -> str:
        return getattr(self.row, self.name_column)

    @property
    def is_done(self) -> bool:
        return self.row.status == "done"

    def shown(self, *, is_pending: bool = False) -> Item:
        """Return the item's row as tables and pages show it.

        Args:
            is_pending: the current run ended before it redid this item.
        """
        if self.failed is not None:
            return self.failed
        remark = self.remark
        if is_pending and not remark:
            remark = f"{STALE}: the last run was interrupted; these numbers are from an earlier one"
        return with_warning(self.row, remark)

    def as_json(self) -> dict[str, Any]:
        content = {"key": self.key, "inputs": list(self.inputs)}
        content |= {self.row_name: json_values(self.row)} | self._provenance()
        content["files"] = dict(self.files)
        if self.failed is not None:
            content["failed"] = json_values(self.failed)
        if self.remark:
            content["remark"] = self.remark
        return content

    def _provenance(self) -> dict[str, Any]:
        return {}

    @classmethod
    def read(cls, folder: Path, name: str) -> Self:
        """Read and check the record of an item; its lesions are read later.

        Raises:
            OSError: it cannot be read.
            ValueError: it is damaged.
        """
        content = read_json(folder / record_name(name))
        try:
            item = _item_of(cls, content[cls.row_name], name)
            failed = _item_of(cls, content["failed"], name) if "failed" in content else None
            record = cls(
                lesions=StoredRows(folder, name, cls),  # type: ignore[arg-type]
                key=str(content.get("key", "")),
                inputs=tuple(map(str, content.get("inputs", ()))),
                files=_digests(folder, content["files"]),
                failed=failed,
                remark=_text(content.get("remark", "")),
                **{cls.row_name: item},
                **cls._read_provenance(folder, content),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"its content is not valid ({error!r})") from error
        if record.is_done and rows_name(name) not in record.files:
            raise ValueError("it does not list its rows")
        return record

    @classmethod
    def _read_provenance(cls, folder: Path, content: Mapping[str, Any]) -> dict[str, Any]:
        return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What is needed to measure a case again or to rebuild its page; None is unknown.

    Args:
        scan, sha256: absolute path and hash of the scan.
        unit, unit_doubt: of its intensities, and why that is in doubt.
        model_box: the description of the model, as JSON.
        remarks: warnings of the model about the scan.
        measure, label_names: settings of the model.
    """

    scan: Path | None = None
    sha256: str | None = None
    unit: str | None = None
    model_box: str | None = None
    unit_doubt: str | None = None
    remarks: Sequence[str] | None = None
    measure: Measure | None = None
    label_names: Mapping[int, str] | None = None

    def as_json(self) -> dict[str, Any]:
        content = {name: getattr(self, name) for name in _SOURCE}
        if self.scan is not None:
            content["scan"] = str(self.scan)
        if self.measure is not None:
            content["measure"] = self.measure.model_dump(mode="json")
        if self.label_names is not None:
            names = {str(value): name for value, name in self.label_names.items()}
            content["label_names"] = names
        return {name: value for name, value in content.items() if value is not None}

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Source:
        """Read it from JSON; a value that is not valid is unknown."""
        values: dict[str, Any] = {}
        for name, parse in _SOURCE.items():
            try:
                values[name] = parse(content[name])
            except (KeyError, ValueError, TypeError, AttributeError):
                continue
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CaseRecord(Record[CaseRow, Lesions]):
    """A case of a results folder.

    Args:
        corrected: the measured masks that were edited by hand, path → SHA-256.
    """

    row_name = "case"
    name_column = "case_id"
    row_types = (CaseRow, LesionMeasurement)
    tables = ("cases.csv", "lesions.csv")
    required = ("lesion_id", "label", "n_voxels", "volume_ml")

    case: CaseRow
    source: Source = Source()
    corrected: Mapping[str, str] = field(default_factory=dict)

    @property
    def masks(self) -> dict[str, str]:
        """The measured masks: path → SHA-256."""
        masks = {**self.files, **self.corrected}
        return {path: digest for path, digest in masks.items() if path.startswith(f"{MASKS}/")}

    def _provenance(self) -> dict[str, Any]:
        corrected = {"corrected": dict(self.corrected)} if self.corrected else {}
        return {"source": self.source.as_json()} | corrected

    @classmethod
    def _read_provenance(cls, folder: Path, content: Mapping[str, Any]) -> dict[str, Any]:
        source = content.get("source", {})
        if not isinstance(source, dict):
            raise TypeError(f"source is a {type(source).__name__}")
        corrected = _digests(folder, content.get("corrected", {}))
        return {"source": Source.of(source), "corrected": corrected}


@dataclass(frozen=True, slots=True)
class StoredRows(Iterable[Any]):
    """The rows that `write_rows` wrote for an item; a missing column is unknown.

    Iterating and `largest` raise ScanError (`E_RECORD`) if the file is missing or not valid.
    """

    folder: Path
    name: str
    record_type: type[Record[Any, Any]]

    def __iter__(self) -> Iterator[Any]:
        return map(self.parse, self._lines())

    def largest(self, most: int) -> list[Any]:
        """Return at most `most` rows of the largest lesions, in the order of the file."""
        return [self.parse(line) for _, line in sorted(self.largest_lines(most))]

    def largest_lines(self, most: int) -> list[tuple[int, bytes]]:
        """Return index and line of the largest lesions, the largest first."""
        # Lines are ranked unparsed: of noise only a few of 100 000 are needed.
        lines = enumerate(self._lines())
        return nlargest(most, lines, key=lambda indexed: _number(_N_VOXELS, indexed[1]))

    def parse(self, line: bytes) -> Any:
        """Return the row of a line."""
        name_column, (_, row_type) = self.record_type.name_column, self.record_type.row_types
        try:
            row = parse_json(line)
            if not isinstance(row, dict) or not _fits(row, row_type):
                raise ValueError("a line is not a valid row")
            if row.get(name_column) != self.name:
                raise ValueError(f"a row is not of {self.name!r}")
            if missing := [name for name in self.record_type.required if row.get(name) is None]:
                raise ValueError(f"it lacks {', '.join(missing)}")
        except ValueError as error:
            raise self._damaged(error) from error
        return row_of(row_type, row)

    def _lines(self) -> Iterator[bytes]:
        try:
            with open_regular(self.folder / rows_name(self.name)) as file:
                while line := file.readline(MAX_ROW_BYTES):
                    yield line
        except OSError as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> ScanError:
        return ScanError(
            f"{self.folder / rows_name(self.name)}: not a valid file of rows ({error})",
            fix=f"delete {self.folder / record_name(self.name)} and repeat the command that "
            "wrote it",
            code="E_RECORD",
        )


def volume_ml_of(line: bytes) -> float:
    """Extract volume_ml from the line of a lesion, which may come from a stranger."""
    return _number(_VOLUME_ML, line)


def write_rows(file: BinaryIO, rows: Iterable[Any]) -> None:
    """Write a JSON object per line, without unknown values, which are half of a row of noise."""
    for row in rows:
        file.write(json_text(known_values(row), indent=None).encode("utf-8", "replace"))


def with_warning(row: Item, warning: str) -> Item:
    """Add a warning to an item's row."""
    if not warning:
        return row
    warnings = "; ".join(filter(None, (row.warnings, warning)))
    return replace(row, warnings=warnings)  # type: ignore[type-var]


# ---- the records of another folder, which this run does not write


def case_ids(results: Path) -> list[str]:
    """Return the ids of the cases with a record, and of those pending in cases.csv.

    Raises:
        VolsegError: `results` is not a results folder.
    """
    if not (results / RECORDS).is_dir():
        raise VolsegError(
            f"{results}: holds no results",
            fix="give a folder that `volseg infer` or `volseg measure` wrote",
            code="E_DATASET",
        )
    ids = {path.stem for path in (results / RECORDS).glob("*.json")}
    try:
        rows = iterate_csv(results / "cases.csv")
        ids |= {row["case_id"] for row in rows if is_valid_id(row["case_id"])}
    except (OSError, ValueError, KeyError):
        pass  # the table is derived from the records and may be missing
    return sorted(ids)


def record_files(results: Path, case_id: str) -> tuple[Path, Path]:
    """Return the paths of a case's record and of its rows."""
    return results / record_name(case_id), results / rows_name(case_id)


def read_record(results: Path, case_id: str) -> CaseRecord[Sequence[LesionMeasurement]]:
    """Read the record of a case, done or failed, with its lesions.

    Of a mask with so many lesions that it looks like noise, none is read.

    Raises:
        ScanError: the record is missing or damaged.
    """
    path, rows = record_files(results, case_id)
    if not path.is_file():
        raise ScanError(
            f"{results}: case {case_id!r} has not been processed yet",
            fix="repeat the command that wrote the folder",
            code="E_RECORD",
        )
    try:
        record = CaseRecord[StoredRows].read(results, case_id)
        case = record.shown()
        lesions: list[LesionMeasurement] = []
        if case.status == "done" and (case.n_lesions or 0) <= MANY:
            if sha256_of(rows) != record.files[rows_name(case_id)]:
                raise ValueError("its rows were changed since it was written")
            for lesion in record.lesions:
                lesions.append(lesion)
                if len(lesions) > MANY:
                    raise ValueError(f"it has over {MANY} rows but {case.n_lesions} lesions")
    except (OSError, ValueError, RecursionError) as error:
        raise ScanError(
            f"{path}: the record of case {case_id!r} is damaged ({type(error).__name__}: {error})",
            fix="repeat the command that wrote the folder",
            code="E_RECORD",
        ) from error
    return replace(record, case=case, lesions=lesions)  # type: ignore[return-value]


def file_of(results: Path, case_id: str, files: Mapping[str, str], folder: str) -> Path:
    """Return the file of a case in `folder`, such as lesion_ids, unchanged since it was measured.

    Args:
        files: from its record: path in the results folder → SHA-256.

    Raises:
        ScanError: the file is missing or has changed.
    """
    path = path_of(results, case_id, files, folder)
    if sha256_of(path) != files[path.relative_to(results).as_posix()]:
        raise ScanError(
            f"{path}: was changed since the case was measured",
            fix="repeat the command that wrote the folder",
            code="E_RECORD",
        )
    return path


def path_of(results: Path, case_id: str, files: Mapping[str, str], folder: str) -> Path:
    """Return the file of a case in `folder` like `file_of`, without checking its hash.

    Raises:
        ScanError: the file is missing.
    """
    names = [name for name in files if name.startswith(f"{folder}/")]
    if not names or not (results / names[0]).is_file():
        raise ScanError(
            f"{results}: case {case_id!r} has no file in {folder}/",
            fix="repeat the command that wrote the folder",
            code="E_RECORD",
        )
    return results / names[0]


def record_name(name: str) -> str:
    """Return the path, relative to the folder, of an item's record."""
    return f"{RECORDS}/{name}.json"


def rows_name(name: str) -> str:
    """Return the path, relative to the folder, of the file with an item's rows."""
    return f"{RECORDS}/{name}.rows.jsonl"


# ---- parts of a record, checked


def _item_of(record_type: type[Record[Any, Any]], values: Mapping[str, Any], name: str) -> Any:
    row_type = record_type.row_types[0]
    if values[record_type.name_column] != name or not _fits(values, row_type):
        raise ValueError("its row is not valid")
    if not isinstance(values["status"], str):
        raise ValueError("its row has no status")
    return row_of(row_type, values)


def _digests(folder: Path, files: Mapping[str, Any]) -> dict[str, str]:
    if not all(isinstance(digest, str) for digest in files.values()):
        raise TypeError("a SHA-256 is not a text")
    if any(confined(folder, name) is None for name in files):
        raise ValueError("a file lies outside the folder")
    return dict(files)


def _fits(row: Mapping[str, Any], row_type: type) -> bool:
    """Check the types of a row's values; columns that `row_type` does not have may hold any."""
    # A set difference, because a loop is slow for noise with 100 000 rows.
    unfit = set(zip(row, map(type, row.values()))) - _kinds(row_type)
    return not any(name in column_names(row_type) for name, _ in unfit)


@cache
def _kinds(row_type: type) -> frozenset[tuple[str, type]]:
    """Return the valid (column, type in JSON) pairs; null is unknown, a float may be an int."""

    def kinds_of(hint: Any) -> tuple[type, ...]:
        if get_origin(hint) is Literal:
            return (str,)
        parts = get_args(hint) or (hint,)
        return (*parts, NoneType, int) if float in parts else (*parts, NoneType)

    return frozenset(
        (name, kind) for name, hint in get_type_hints(row_type).items() for kind in kinds_of(hint)
    )


def _number(pattern: re.Pattern[bytes], line: bytes) -> float:
    match = pattern.search(line)
    return float(match[1]) if match else 0.0


def _text(content: Any) -> str:
    if not isinstance(content, str):
        raise TypeError(f"{content!r} is not a text")
    return content


def _texts(content: Any) -> tuple[str, ...]:
    if not isinstance(content, list):
        raise TypeError(f"{content!r} is not a list of texts")
    return tuple(map(_text, content))


_SOURCE: dict[str, Callable[[Any], Any]] = {
    "scan": lambda content: Path(_text(content)),
    "sha256": _text,
    "unit": _text,
    "model_box": _text,
    "unit_doubt": _text,
    "remarks": _texts,
    "measure": Measure.model_validate,
    "label_names": lambda names: {int(value): _text(name) for value, name in names.items()},
}

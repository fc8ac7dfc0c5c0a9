"""What a results folder holds, read back from the record of each case."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from volseg.errors import ScanError, VolsegError
from volseg.io.cases import ID_PATTERN
from volseg.io.csv_text import read_csv
from volseg.io.files import sha256_of
from volseg.measure.rows import CaseRow, LesionMeasurement
from volseg.postprocess.lesions import MANY
from volseg.store.outputs import RECORDS
from volseg.store.results import masks_of, read_json_record, read_rows, rows_name, shown_row

Row = TypeVar("Row", CaseRow, LesionMeasurement)


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseRecord:
    """A case of a results folder.

    Args:
        lesions: by number; none of a mask of so many that it looks like noise. files: path in the folder → SHA-256.
        masks: the same of those that the numbers were taken from.
        scan, scan_sha256: where it was, as an absolute path, and what was in it; None in folders that do not say.
    """

    case: CaseRow
    lesions: Sequence[LesionMeasurement]
    files: Mapping[str, str]
    masks: Mapping[str, str]
    scan: Path | None
    scan_sha256: str | None


def case_ids(results: Path) -> list[str]:
    """The cases of a results folder: those with a record, and those that its table names and no run reached.

    Raises:
        VolsegError: it is no results folder.
    """
    if not (results / RECORDS).is_dir():
        raise VolsegError(
            f"{results}: holds no results",
            fix="give the folder that `volseg infer` or `volseg measure` wrote",
            code="E_DATASET",
        )
    found = {path.stem for path in (results / RECORDS).glob("*.json")}
    try:
        rows = read_csv(results / "cases.csv")
        found |= {row["case_id"] for row in rows if re.fullmatch(ID_PATTERN, row["case_id"])}
    except (OSError, ValueError, KeyError):
        pass  # the records are what counts; the table is made from them
    return sorted(found)


def record_files(results: Path, case_id: str) -> tuple[Path, Path]:
    """The record of a case and the file of its rows."""
    return record_path(results, case_id), results / rows_name(case_id)


def record_path(results: Path, case_id: str) -> Path:
    return results / RECORDS / f"{case_id}.json"


def read_record(results: Path, case_id: str) -> CaseRecord:
    """The record of a case, done or failed.

    Raises:
        ScanError: there is none, or it is damaged.
    """
    path = record_path(results, case_id)
    if not path.is_file():
        raise ScanError(
            f"{results}: case {case_id!r} has not been done yet",
            fix="run the command that made the folder again",
            code="E_RECORD",
        )
    try:
        content = read_json_record(path)
        if content is None:
            raise ValueError("it is not as volseg writes it")
        source = content["source"]
        case = _row(CaseRow, shown_row(content))
        n_read = 0 if case.status != "done" or (case.n_lesions or 0) > MANY else MANY + 1
        rows = rows_name(case_id)
        if n_read and sha256_of(results / rows) != content["files"].get(rows):
            raise ValueError("its rows were changed since it was written")
        lesions = [
            _row(LesionMeasurement, lesion)
            for lesion in islice(read_rows(results, case_id), n_read)
        ]
        if len(lesions) > MANY:
            raise ValueError(f"it has over {MANY} rows, and {case.n_lesions} lesions")
        return CaseRecord(
            case=case,
            lesions=lesions,
            files=content["files"],
            masks=masks_of(content),
            scan=Path(source["scan"]) if source.get("scan") else None,
            scan_sha256=source.get("sha256"),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ScanError(
            f"{path}: the record of case {case_id!r} is damaged ({type(error).__name__}: {error})",
            fix="run the command that made the folder again",
            code="E_RECORD",
        ) from error


def file_of(results: Path, case_id: str, files: Mapping[str, str], folder: str) -> Path:
    """The file of a case in `folder`, such as lesion_ids, as it was when its numbers were taken.

    Args:
        files: of its record: path in the results folder → SHA-256.

    Raises:
        ScanError: there is none, or it is another one by now.
    """
    path = path_of(results, case_id, files, folder)
    if sha256_of(path) != files[path.relative_to(results).as_posix()]:
        raise ScanError(
            f"{path}: was changed since the case was measured",
            fix="run the command that made the folder again",
            code="E_RECORD",
        )
    return path


def path_of(results: Path, case_id: str, files: Mapping[str, str], folder: str) -> Path:
    """The same, whatever is in it by now.

    Raises:
        ScanError: there is none.
    """
    names = [name for name in files if name.startswith(f"{folder}/")]
    if not names or not (results / names[0]).is_file():
        raise ScanError(
            f"{results}: case {case_id!r} has no file in {folder}/",
            fix="run the command that made the folder again",
            code="E_RECORD",
        )
    return results / names[0]


def _row(kind: type[Row], values: Mapping[str, Any]) -> Row:
    """A row from its record: a column that the record does not have is unknown.

    Raises:
        ValueError: what every row has is missing.
    """
    text = ("case_id", "status") if kind is CaseRow else ()
    numbers = () if kind is CaseRow else ("lesion_id", "label", "n_voxels", "volume_ml")
    wrong = [name for name in text if not isinstance(values.get(name), str)]
    wrong += [name for name in numbers if not isinstance(values.get(name), int | float)]
    if wrong:
        raise ValueError(f"it lacks {', '.join(wrong)}")
    texts = {"reason", "image", "model", "warnings", "notes"}
    return kind(
        **{
            item.name: values.get(item.name, "" if item.name in texts else None)
            for item in fields(kind)
        }
    )

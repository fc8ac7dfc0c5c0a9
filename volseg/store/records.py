"""Read a results folder back from the record of each case."""

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
from volseg.measurement.rows import CaseRow, LesionMeasurement
from volseg.postprocessing.lesions import MANY
from volseg.store.outputs import RECORDS
from volseg.store.results import masks_of, read_json_record, read_rows, rows_name, shown_row

Row = TypeVar("Row", CaseRow, LesionMeasurement)


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseRecord:
    """A case of a results folder.

    Args:
        lesions: by lesion id; empty if the mask has so many that it looks like noise.
        files: path in the folder → SHA-256.
        masks: the same for the measured masks.
        scan, scan_sha256: absolute path and hash of the scan; None if the record has none.
    """

    case: CaseRow
    lesions: Sequence[LesionMeasurement]
    files: Mapping[str, str]
    masks: Mapping[str, str]
    scan: Path | None
    scan_sha256: str | None


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
        rows = read_csv(results / "cases.csv")
        ids |= {row["case_id"] for row in rows if re.fullmatch(ID_PATTERN, row["case_id"])}
    except (OSError, ValueError, KeyError):
        pass  # the table is derived from the records and may be missing
    return sorted(ids)


def record_files(results: Path, case_id: str) -> tuple[Path, Path]:
    """Return the paths of a case's record and of its rows."""
    return record_path(results, case_id), results / rows_name(case_id)


def record_path(results: Path, case_id: str) -> Path:
    return results / RECORDS / f"{case_id}.json"


def read_record(results: Path, case_id: str) -> CaseRecord:
    """Read the record of a case, done or failed.

    Raises:
        ScanError: the record is missing or damaged.
    """
    path = record_path(results, case_id)
    if not path.is_file():
        raise ScanError(
            f"{results}: case {case_id!r} has not been processed yet",
            fix="repeat the command that wrote the folder",
            code="E_RECORD",
        )
    try:
        content = read_json_record(path)
        if content is None:
            raise ValueError("its content is not valid")
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
            raise ValueError(f"it has over {MANY} rows but {case.n_lesions} lesions")
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
            fix="repeat the command that wrote the folder",
            code="E_RECORD",
        ) from error


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


def _row(kind: type[Row], values: Mapping[str, Any]) -> Row:
    """Make a row from the values of a record; columns missing there are unknown.

    Raises:
        ValueError: a required column is missing.
    """
    required, of_type = ("lesion_id", "label", "n_voxels", "volume_ml"), int | float
    if kind is CaseRow:
        required, of_type = ("case_id", "status"), str
    missing = [name for name in required if not isinstance(values.get(name), of_type)]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    texts = {"reason", "image", "model", "warnings", "notes"}
    unknown = {field.name: "" if field.name in texts else None for field in fields(kind)}
    return kind(**{name: values.get(name, value) for name, value in unknown.items()})

"""The folder of a comparison: a record per patient as the mark that it is complete, and the tables made from the records."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from volseg.io.files import sha256_of, write_json_atomic
from volseg.measure.response import LesionChange, PatientResponse
from volseg.report.results import RECORDS, held
from volseg.report.tables import write_table


@dataclass(frozen=True, slots=True, kw_only=True)
class PatientRecord:
    """The rows of a patient, as column → value."""

    response: Mapping[str, Any]
    lesions: Sequence[Mapping[str, Any]]


class ComparisonFolder:
    """A folder of comparison.csv, response.csv and figures, held by one run at a time. Use it with `with`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records = path / RECORDS
        self._held = held(path, self._records)

    def __enter__(self) -> ComparisonFolder:
        self._held.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.__exit__(kind, error, trace)

    def is_complete(self, patient: str, key: str) -> bool:
        """Whether the patient was compared with this key and the files are still as they were written."""
        content = self._read(patient)
        if content is None or content.get("key") != key or content["response"]["status"] != "done":
            return False
        return all(
            (self.path / name).is_file() and sha256_of(self.path / name) == digest
            for name, digest in content["files"].items()
        )

    def commit(
        self,
        response: PatientResponse,
        *,
        key: str = "",
        lesions: Sequence[LesionChange] = (),
        files: Sequence[Path] = (),
    ) -> None:
        """Record a patient. `files` are already written; other files of an earlier call go."""
        content = {
            "key": key,
            "response": _plain(response),
            "lesions": [_plain(lesion) for lesion in lesions],
            "files": {file.relative_to(self.path).as_posix(): sha256_of(file) for file in files},
        }
        earlier = self._read(response.patient) or {"files": {}}
        write_json_atomic(self._records / f"{response.patient}.json", content, indent=None)
        for name in earlier["files"].keys() - content["files"].keys():
            (self.path / name).unlink(missing_ok=True)

    def record(self, patient: str) -> PatientRecord | None:
        """What was committed of a patient."""
        content = self._read(patient)
        return None if content is None else PatientRecord(response=content["response"], lesions=content["lesions"])

    def write_tables(self, patients: Sequence[str], pending: Sequence[PatientResponse] = ()) -> None:
        """comparison.csv and response.csv of these patients, in this order; `pending` ones have no record of this call."""
        waiting = {row.patient: _plain(row) for row in pending}
        records = {
            name: record for name in patients if name not in waiting and (record := self.record(name)) is not None
        }
        rows = {name: record.response for name, record in records.items()} | waiting
        lesions = [lesion for name in patients if name in records for lesion in records[name].lesions]
        write_table(self.path / "comparison.csv", LesionChange, lesions)
        write_table(self.path / "response.csv", PatientResponse, [rows[name] for name in patients if name in rows])

    def write_run(self, description: Mapping[str, Any]) -> None:
        """run.json: what was compared, with what options."""
        write_json_atomic(self.path / "run.json", dict(description))

    def _read(self, patient: str) -> dict[str, Any] | None:
        try:
            return json.loads((self._records / f"{patient}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None


def _plain(row: LesionChange | PatientResponse) -> dict[str, Any]:
    """Fields of a row for JSON, where unknown is null."""
    values = {item.name: getattr(row, item.name) for item in fields(row)}
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }

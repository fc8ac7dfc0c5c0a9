"""The folder of a comparison: a record per patient as the mark that it is complete, and the tables made from the records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from volseg.io.files import write_bytes_atomic
from volseg.measure.changes import LesionChange
from volseg.measure.response import PatientResponse
from volseg.report.html import comparison_html
from volseg.report.results import RecordFolder, plain
from volseg.report.tables import write_table


@dataclass(frozen=True, slots=True, kw_only=True)
class PatientRecord:
    """The rows of a patient, as column → value."""

    response: Mapping[str, Any]
    lesions: Sequence[Mapping[str, Any]]


class ComparisonFolder(RecordFolder):
    """The folder of `compare`: comparison.csv, response.csv, figures and report.html, with a record per patient."""

    row = "response"

    def commit(
        self,
        response: PatientResponse,
        *,
        key: str = "",
        lesions: Sequence[LesionChange] = (),
        files: Sequence[Path] = (),
    ) -> None:
        """Record a patient. `files` are already written; other files of an earlier call go."""
        content = {"key": key, "response": plain(response), "lesions": [plain(lesion) for lesion in lesions]}
        self._write(response.patient, content, files)

    def record(self, patient: str) -> PatientRecord | None:
        """What was committed of a patient."""
        content = self._read(patient)
        return None if content is None else PatientRecord(response=content["response"], lesions=content["lesions"])

    def write_tables(
        self, patients: Sequence[str], pending: Sequence[PatientResponse] = (), *, about: Mapping[str, Any]
    ) -> None:
        """comparison.csv, response.csv and report.html of these patients, in this order; `pending` ones have no record of this call.

        Args:
            about: of the run: `command`, `volseg`, `started`.
        """
        waiting = {row.patient: plain(row) for row in pending}
        records = {
            name: record for name in patients if name not in waiting and (record := self.record(name)) is not None
        }
        found = {name: record.response for name, record in records.items()} | waiting
        rows = [found[name] for name in patients if name in found]
        lesions = [lesion for name in patients if name in records for lesion in records[name].lesions]
        write_table(self.path / "comparison.csv", LesionChange, lesions)
        write_table(self.path / "response.csv", PatientResponse, rows)
        write_bytes_atomic(self.path / "report.html", comparison_html(about, rows, lesions).encode("utf-8"))

"""The folder of a comparison: a record per patient as the mark that it is complete, and the tables made from the records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from volseg.measure.changes import LesionChange
from volseg.measure.response import PatientResponse
from volseg.store.outputs import Commit
from volseg.store.results import RecordFolder, plain, shown_row
from volseg.store.tables import table


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonRows:
    """The rows of a comparison, as column → value."""

    patients: Sequence[Mapping[str, Any]]
    lesions: Sequence[Mapping[str, Any]]


class ComparisonFolder(RecordFolder):
    """The folder of `compare`: comparison.csv, response.csv, figures and report.html, with a record per patient."""

    row = "response"
    row_types = (PatientResponse, LesionChange)
    name_column = "patient"

    def commit(
        self,
        response: PatientResponse,
        commit: Commit,
        *,
        key: str,
        inputs: Sequence[str],
        lesions: Iterable[LesionChange] = (),
    ) -> None:
        """Record a patient, whose figure, if there is one, is in the commit; other files of an earlier call go.

        Args:
            inputs: SHA-256 of each record and scan that was compared.
        """
        self._finish(
            response.patient, commit, {"key": key, "inputs": list(inputs), "response": plain(response)}, lesions
        )

    def write_tables(self, patients: Sequence[str], pending: Sequence[PatientResponse] = ()) -> ComparisonRows:
        """comparison.csv and response.csv of these patients, in this order.

        Args:
            pending: rows of patients who were not reached; one with an earlier result keeps its rows.
        """
        rows = {row.patient: plain(row) for row in pending}
        for name in patients:
            record = self.record(name)
            if record is not None and (name not in rows or record[self.row]["status"] == "done"):
                rows[name] = shown_row(record, self.row, is_pending=name in rows)
        shown = [rows[name] for name in patients if name in rows]
        lesions = [lesion for row in shown if row["status"] == "done" for lesion in self.rows_of(row["patient"])]
        with self.staged() as commit:
            commit.write("comparison.csv", table(LesionChange, lesions))
            commit.write("response.csv", table(PatientResponse, shown))
            commit.finish()
        return ComparisonRows(patients=shown, lesions=lesions)

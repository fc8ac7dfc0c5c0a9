"""The folder of a comparison: a record per patient, and tables made from the records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from volseg.comparison.changes import LesionChange
from volseg.comparison.response import PatientResponse
from volseg.store.outputs import Commit
from volseg.store.results import RecordFolder, plain


class ComparisonFolder(RecordFolder):
    """The folder of `compare`: comparison.csv, response.csv, figures, report.html and records."""

    row = "response"
    row_types = (PatientResponse, LesionChange)
    tables = ("response.csv", "comparison.csv")
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
        """Record a patient and delete the files of an earlier call that are not in the commit.

        Args:
            commit: holds the patient's figure, if any.
            inputs: SHA-256 of each record and scan that was compared.
        """
        content = {"key": key, "inputs": list(inputs), "response": plain(response)}
        self._finish(response.patient, commit, content, lesions)

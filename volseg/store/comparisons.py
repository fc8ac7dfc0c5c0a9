"""The folder of a comparison: a record per patient as the mark that it is complete, and the tables made from the records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from volseg.measure.changes import LesionChange
from volseg.measure.response import PatientResponse
from volseg.store.outputs import Commit
from volseg.store.results import RecordFolder, plain


class ComparisonFolder(RecordFolder):
    """The folder of `compare`: comparison.csv, response.csv, figures and report.html, with a record per patient."""

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
        """Record a patient, whose figure, if there is one, is in the commit; other files of an earlier call go.

        Args:
            inputs: SHA-256 of each record and scan that was compared.
        """
        self._finish(
            response.patient,
            commit,
            {"key": key, "inputs": list(inputs), "response": plain(response)},
            lesions,
        )

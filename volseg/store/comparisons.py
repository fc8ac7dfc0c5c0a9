"""The folder of a comparison: a record per patient, and tables made from the records."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from volseg.comparison.changes import LesionChange
from volseg.comparison.response import PatientResponse
from volseg.store.records import Lesions, Record
from volseg.store.results import RecordFolder


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PatientRecord(Record[PatientResponse, Lesions]):
    """A patient of a comparison; the inputs are the records and scans that were compared."""

    row_name = "response"
    name_column = "patient"
    row_types = (PatientResponse, LesionChange)
    tables = ("response.csv", "comparison.csv")

    response: PatientResponse


class ComparisonFolder(RecordFolder[PatientRecord[Iterable[LesionChange]], PatientResponse]):
    """The folder of `compare`: comparison.csv, response.csv, figures, report.html and records."""

    record_type = PatientRecord

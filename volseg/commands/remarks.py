"""Warnings about single scans and patients, as a command announces them."""

from __future__ import annotations

from volseg.comparison.response import PatientResponse
from volseg.measurement.rows import CaseRow
from volseg.measurement.units import UNIT, warnings_in

ORGAN = "W_ORGAN"  # the organ is missing, or all that there is


def remarks_on_scan(case: CaseRow) -> list[str]:
    """Return the warnings of a scan."""
    return [remark(code, case.case_id, text) for code, text in warnings_in(case.warnings)]


def remark(code: str, name: str, text: str) -> str:
    """Return a warning about the scan or patient of this name."""
    return f"{code}: {name}: {text}"


def remarks_on_patient(patient: PatientResponse) -> list[str]:
    """Return the warnings of a patient, but those on the unit, which `compare` joins."""
    texts = warnings_in(patient.warnings)
    return [remark(code, patient.patient, text) for code, text in texts if code != UNIT]

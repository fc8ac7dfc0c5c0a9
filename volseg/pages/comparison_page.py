"""The page report.html of a comparison: patients, and their lesions at both time points."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from volseg.comparison.changes import LesionChange
from volseg.comparison.response import PatientResponse
from volseg.pages.page import CONTENT_BYTES, json_size
from volseg.pages.page_tables import CHANGE_COLUMNS, RESPONSE_COLUMNS, fitting_table
from volseg.pages.run_page import failures, render_run_page, unprocessed
from volseg.words import format_count

MAX_CHANGE_ROWS = 5000  # lesions on the page, which is built in memory


def comparison_html(
    about: Mapping[str, Any],
    patients: Sequence[Mapping[str, Any]],
    lesions: Iterable[Mapping[str, Any]],
    *,
    most: int = MAX_CHANGE_ROWS,
) -> str:
    """Return the page of a comparison of two time points: failures, patients and lesions.

    Args:
        about: the run: `command`, `volseg`, `started`.
        patients, lesions: rows of response.csv and of comparison.csv.
        most: number of lesion rows on the page; the remaining ones are left out.
    """
    changes = list(islice(lesions, most + 1))
    remarks = unprocessed(patients, "patient")
    if len(changes) > most:
        remarks.insert(0, f"Showing the first {most} lesion rows; comparison.csv has them all.")
    responses = Counter(
        row.get("response") or "not classified" for row in patients if row.get("status") == "done"
    )
    failed = failures(patients, "patient")
    left = CONTENT_BYTES - json_size(failed)
    table = fitting_table(
        "patients",
        "Patients",
        PatientResponse,
        patients,
        shown=RESPONSE_COLUMNS,
        max_bytes=left // 2,
        file="response.csv",
    )
    has_several = any(
        ";" in str(row.get(name)) for row in patients for name in ("baseline_case", "followup_case")
    )
    scan_columns = ("baseline_case", "followup_case") if has_several else ()
    change_table = fitting_table(
        "changes",
        "Lesions at both time points",
        LesionChange,
        changes[:most],
        shown=("patient", *scan_columns, *CHANGE_COLUMNS[1:]),
        max_bytes=left - json_size(table.content),
        file="comparison.csv",
    )
    return render_run_page(
        f"volseg compare: {format_count(len(patients), 'patient')}",
        about,
        failed=failed,
        n_cases=len(patients),
        noun="patients",
        files="response.csv and comparison.csv",
        remarks=remarks,
        facts=[
            ("patients", str(len(patients))),
            *((name, str(count)) for name, count in sorted(responses.items())),
            ("new lesions", str(sum(row.get("n_new") or 0 for row in patients))),
            ("lesions gone", str(sum(row.get("n_gone") or 0 for row in patients))),
        ],
        tables=[table, change_table],
    )

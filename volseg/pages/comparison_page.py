"""The page report.html of a comparison: patients, and their lesions at both time points."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice

from volseg.comparison.changes import LesionChange
from volseg.comparison.response import PatientResponse
from volseg.pages.about import About
from volseg.pages.page import CONTENT_BYTES, json_size
from volseg.pages.page_tables import CHANGES, PATIENTS, fitting_table
from volseg.pages.run_page import RunPage, failures, unprocessed
from volseg.words import format_count

MAX_CHANGE_ROWS = 5000  # lesions on the page, which is built in memory


def comparison_html(
    about: About,
    patients: Sequence[PatientResponse],
    lesions: Iterable[LesionChange],
    *,
    most: int = MAX_CHANGE_ROWS,
) -> str:
    """Return the page of a comparison of two time points: failures, patients and lesions.

    Args:
        most: number of lesion rows on the page; the remaining ones are left out.
    """
    changes = list(islice(lesions, most + 1))
    remarks = unprocessed(patients, "patient")
    if len(changes) > most:
        remarks.insert(0, f"Showing the first {most} lesion rows; comparison.csv has them all.")
    responses = Counter(
        row.response or "not classified" for row in patients if row.status == "done"
    )
    failed = failures(patients, "patient")
    left = CONTENT_BYTES - json_size(failed)
    table = fitting_table(PATIENTS, patients, max_bytes=left // 2)
    has_several = any(
        ";" in (case or "") for row in patients for case in (row.baseline_case, row.followup_case)
    )
    layout = CHANGES
    if has_several:
        shown = ("patient", "baseline_case", "followup_case", *CHANGES.shown[1:])
        layout = replace(CHANGES, shown=shown)
    change_table = fitting_table(layout, changes[:most], max_bytes=left - json_size(table.content))
    return RunPage(
        title=f"volseg compare: {format_count(len(patients), 'patient')}",
        made_with=about.made_with,
        failed=failed,
        n_cases=len(patients),
        noun="patients",
        files="response.csv and comparison.csv",
        remarks=remarks,
        facts=[
            ("patients", str(len(patients))),
            *((name, str(count)) for name, count in sorted(responses.items())),
            ("new lesions", str(sum(row.n_new or 0 for row in patients))),
            ("lesions gone", str(sum(row.n_gone or 0 for row in patients))),
        ],
        tables=[table, change_table],
    ).html()

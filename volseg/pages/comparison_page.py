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
from volseg.pages.page_tables import CHANGES, PATIENTS, Layout, fitting_table
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
    failed = failures(patients, "patient")
    left = CONTENT_BYTES - json_size(failed)
    table = fitting_table(PATIENTS, patients, max_bytes=left // 2)
    left -= json_size(table.content)
    return RunPage(
        title=f"volseg compare: {format_count(len(patients), 'patient')}",
        made_with=about.made_with,
        failed=failed,
        n_cases=len(patients),
        noun="patients",
        files="response.csv and comparison.csv",
        remarks=remarks,
        facts=_facts(patients),
        tables=[table, fitting_table(_change_layout(patients), changes[:most], max_bytes=left)],
    ).html()


def _facts(patients: Sequence[PatientResponse]) -> list[tuple[str, str]]:
    """Return the numbers of patients, of each response, and of lesions that are new or gone."""
    responses = Counter(
        row.response or "not classified" for row in patients if row.status == "done"
    )
    return [
        ("patients", str(len(patients))),
        *((name, str(count)) for name, count in sorted(responses.items())),
        ("new lesions", str(sum(row.n_new or 0 for row in patients))),
        ("lesions gone", str(sum(row.n_gone or 0 for row in patients))),
    ]


def _change_layout(patients: Sequence[PatientResponse]) -> Layout:
    """Return the layout of the lesions, with their cases if a patient has several at one time."""
    cases = (case for row in patients for case in (row.baseline_case, row.followup_case))
    if not any(";" in (case or "") for case in cases):
        return CHANGES
    patient, *others = CHANGES.shown
    return replace(CHANGES, shown=(patient, "baseline_case", "followup_case", *others))

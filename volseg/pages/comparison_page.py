"""The page report.html of a comparison: patients, and their lesions at both time points."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from urllib.parse import quote

from volseg.comparison.changes import LesionChange
from volseg.comparison.response import PatientResponse
from volseg.pages.about import About
from volseg.pages.page import CONTENT_BYTES, json_size
from volseg.pages.page_tables import CHANGES, PATIENTS, Layout, fitting_table
from volseg.pages.run_page import Plot, RunPage, count_fact, failures, unprocessed
from volseg.pages.spaghetti import Line, spaghetti_svg
from volseg.words import format_count

MAX_LINES = 500  # lesions in the plot
PLOT_NOTE = "A line is a patient or a lesion, from baseline to follow-up."
MAX_CHANGE_ROWS = 5000  # lesions on the page, which is built in memory


def comparison_html(
    about: About,
    patients: Sequence[PatientResponse],
    lesions: Iterable[LesionChange],
    *,
    pages: Collection[str] = (),
    most: int = MAX_CHANGE_ROWS,
) -> str:
    """Return the page of a comparison of two time points: failures, patients and lesions.

    Args:
        pages: patients who have a page of their own.
        most: number of lesion rows on the page; the remaining ones are left out.
    """
    changes = list(islice(lesions, most + 1))
    remarks = unprocessed(patients, "patient")
    if len(changes) > most:
        remarks.insert(0, f"Showing the first {most} lesion rows; comparison.csv has them all.")
    failed = failures(patients, "patient")
    plots = list(_plots(patients, changes[:most], pages))
    left = CONTENT_BYTES - json_size(failed) - sum(len(plot.svg.encode()) for plot in plots)
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
        sentence=_sentence(patients),
        facts=_facts(patients),
        plots=plots,
        plot_note=f"{PLOT_NOTE} Select a line to open the patient." if plots else "",
        pages=sorted(pages),
        tables=[table, fitting_table(_change_layout(patients), changes[:most], max_bytes=left)],
    ).html()


def _sentence(patients: Sequence[PatientResponse]) -> str:
    """Say in one sentence who was compared and what was found."""
    done = [row for row in patients if row.status == "done"]
    responses = Counter(row.response or "no response" for row in done)
    counted = ", ".join(f"{count} {name}" for name, count in sorted(responses.items()))
    n_new, n_gone = (sum(getattr(row, name) or 0 for row in done) for name in ("n_new", "n_gone"))
    n = f"{len(done)} of {format_count(len(patients), 'patient')}"
    lesions = f"{format_count(n_new, 'new lesion')}, {format_count(n_gone, 'lesion')} gone"
    n_doubted = sum(bool(row.warnings) for row in done)
    sure = f"{n_doubted} of them with warnings" if n_doubted else "none of them with a warning"
    return f"volseg compared {n}, {sure}: {counted or 'no response'}; {lesions}."


def _plots(
    patients: Sequence[PatientResponse], changes: Sequence[LesionChange], pages: Collection[str]
) -> Iterator[Plot]:
    """Yield a line per patient (sum of diameters) and per lesion (volume)."""

    def page(patient: str) -> str:
        return f"viewer/{quote(patient, safe='')}.html" if patient in pages else ""

    sums = [
        Line(before, after, f"{row.patient}: {before:.4g} to {after:.4g} mm", page(row.patient))
        for row in patients
        if (before := row.baseline_sum_mm) is not None
        and (after := row.followup_sum_mm) is not None
    ]
    volumes = []
    for row in changes[:MAX_LINES]:
        before, after = row.baseline_volume_ml, row.followup_volume_ml
        if before is not None and after is not None and row.status != "crumb":
            numbers = f"{row.baseline_lesion_id or 'none'} → {row.followup_lesion_id or 'none'}"
            name = f"{row.patient}, lesion {numbers}: {before:.4g} to {after:.4g} mL"
            volumes.append(Line(before, after, name, page(row.patient)))
    for lines, title, unit, noun in (
        (sums, "Sum of diameters", "mm", "patient"),
        (volumes, "Volume of each lesion", "mL", "lesion"),
    ):
        svg = spaghetti_svg(lines, title=title, unit=unit, noun=noun)
        if svg is not None:
            yield Plot(svg)


def _facts(patients: Sequence[PatientResponse]) -> list[tuple[str, str]]:
    """Return the numbers of patients, of each response, and of lesions that are new or gone."""
    responses = Counter(
        row.response or "not classified" for row in patients if row.status == "done"
    )
    n_new = sum(row.n_new or 0 for row in patients)
    n_gone = sum(row.n_gone or 0 for row in patients)
    return [
        count_fact(len(patients), "patient"),
        *((name, str(count)) for name, count in sorted(responses.items())),
        count_fact(n_new, "new lesion"),
        count_fact(n_gone, "lesion", "gone"),
    ]


def _change_layout(patients: Sequence[PatientResponse]) -> Layout:
    """Return the layout of the lesions, with their cases if a patient has several at one time."""
    cases = (case for row in patients for case in (row.baseline_case, row.followup_case))
    if not any(";" in (case or "") for case in cases):
        return CHANGES
    patient, *others = CHANGES.shown
    return replace(CHANGES, shown=(patient, "baseline_case", "followup_case", *others))

"""`volseg compare`: match the lesions of two time points and judge the response of each patient."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from volseg.columns import json_values
from volseg.commands.batch import damaged_warnings, run_description, without_damaged
from volseg.commands.jobs import Tally
from volseg.commands.patient_comparison import PatientComparison, page_name
from volseg.commands.patients import Patient, TimePoints, read_pairs, same_ids
from volseg.commands.remarks import remarks_on_patient
from volseg.commands.time_points import TimePoint
from volseg.comparison.response import PatientResponse
from volseg.errors import VolsegError
from volseg.execution.local import run
from volseg.execution.memory import Budget, Peak
from volseg.inputs import shorten
from volseg.measurement.units import UNIT, warnings_in
from volseg.options import CompareOptions, command
from volseg.pages.about import About
from volseg.pages.comparison_page import comparison_html
from volseg.reports import CompareReport
from volseg.store.comparisons import ComparisonFolder
from volseg.store.reviews import read_reviews
from volseg.words import format_count

STAGE = "Comparing"
OUTPUTS = ("comparison.csv", "response.csv", "report.html", "run.json")
# Settings that run.json repeats.
RESULT_SETTINGS = ("registration", "max_distance_mm", "lymph_nodes", "figures", "pages")
RESULT_SETTINGS += ("baseline_scans", "followup_scans", "baseline", "followup", "pairs")
RESULT_SETTINGS += ("baseline_review", "followup_review")


@command(CompareOptions)
def compare(options: CompareOptions) -> CompareReport:
    """Compare the lesions of each patient at two time points: comparison.csv and response.csv.

    Raises:
        VolsegError: the request is wrong. A patient who cannot be compared becomes a failed row
            instead, and a patient without a pair of scans an `unpaired` row.

    Example:
        >>> import volseg
        >>> scan, mask = (f"sample_data/{kind}/phantom_15.nii.gz" for kind in ("images", "labels"))
        >>> first = volseg.measure(image=scan, mask=mask, out="baseline")
        >>> second = volseg.measure(image=scan, mask=mask, out="followup")
        >>> result = volseg.compare("baseline", "followup", out="change")
        >>> result.responses["response"].tolist()
        ['SD']
    """
    started = time.monotonic()
    times = (
        TimePoint(
            "baseline",
            options.baseline,
            options.baseline_scans,
            read_reviews(options.baseline_review),
        ),
        TimePoint(
            "follow-up",
            options.followup,
            options.followup_scans,
            read_reviews(options.followup_review),
        ),
    )
    folders = [folder for point in times for folder in (point.results, point.scans) if folder]
    _check_folders(times, options.out)
    budget = Budget(
        options.max_ram,
        options.announce,
        what="comparing these scans",
        otherwise="crop the scans and masks to the region that matters and measure them again",
    )
    nodes = options.lymph_nodes
    if nodes is None:
        nodes = [label for time_point in times for label in time_point.measured_nodes()]
    settings = replace(options, lymph_nodes=tuple(sorted(set(nodes))))
    patients = same_ids(times) if options.pairs is None else read_pairs(options.pairs, times)
    files = (options.pairs, options.baseline_review, options.followup_review)
    inputs = [*folders, *(path for path in files if path is not None)]
    with ComparisonFolder(options.out, "compare", inputs=inputs) as results:
        report = _compare_patients(patients, times, settings, results, budget)
        report = replace(report, not_listed=_not_listed(patients, times))
        left_out = {"unpaired": report.unpaired, "not_listed": report.not_listed}
        described = {name: _plain(getattr(settings, name)) for name in RESULT_SETTINGS}
        results.write_run(
            {"command": "compare"} | run_description(options, described, report, started) | left_out
        )
    return report


def _check_folders(times: TimePoints, out: Path) -> None:
    for time_point in times:
        if time_point.scans is not None and not time_point.scans.is_dir():
            raise VolsegError(
                f"{time_point.scans}: is not a folder",
                fix="give the folder of the scans",
                code="E_USAGE",
            )
    if out.resolve() in {time_point.results.resolve() for time_point in times}:
        raise VolsegError(
            f"{out}: holds the results to compare",
            fix="give another folder to --out",
            code="E_EXISTS",
        )


def _not_listed(patients: Sequence[Patient], times: TimePoints) -> dict[str, list[str]]:
    """Return the cases of each time point that belong to no patient."""
    listed = zip(*(cases for patient in patients for cases in patient.scans), strict=True)
    return {
        name: sorted(set(time_point.case_ids) - set(cases))
        for name, time_point, cases in zip(("baseline", "followup"), times, listed, strict=True)
    }


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


# ---- the loop


def _compare_patients(
    patients: Sequence[Patient],
    times: TimePoints,
    settings: CompareOptions,
    results: ComparisonFolder,
    budget: Budget,
) -> CompareReport:
    jobs, refusals = _comparisons(patients, times, settings)
    kept, todo = _split(jobs, results)
    pictures = [job.picture for job in todo] if settings.figures else []
    pictures += [job.page for job in todo if job.has_page]
    results.check_overwrites([*OUTPUTS, *pictures])
    for name in kept:
        results.clear_failure(name)
    unpaired = _commit_unpaired(patients, times, results)
    refusals |= budget.refused(_peaks(todo, budget.process))
    settings.progress(STAGE, 0.0, f"{len(todo)} of {len(patients)} to do")
    tally = Tally(results, STAGE, settings)
    try:
        tally.run(todo, refusals)
    finally:
        reached = {*unpaired, *kept, *tally.done, *tally.failed}
        unreached = [patient for patient in patients if patient.name not in reached]
        rows = _write_tables(results, unreached)
    kept, failed = without_damaged(kept, tally.failed, rows, "patient")
    row_of = {row.patient: row for row in rows}
    of_patients = [row_of.pop(patient.name) for patient in patients]
    warnings = [*_warnings(of_patients), *damaged_warnings(rows, "patient")]
    return CompareReport(
        out=results.path,
        done=tally.done,
        kept=kept,
        failed=failed,
        warnings=[*warnings, *_stale_warnings(list(row_of))],
        patients=[json_values(row) for row in of_patients],
        unpaired=unpaired,
    )


def _split(
    jobs: Sequence[PatientComparison], results: ComparisonFolder
) -> tuple[list[str], list[PatientComparison]]:
    """Return the names of the patients that are complete, and the comparisons to do."""
    is_complete = {job.name: results.is_complete(job.name, job.key) for job in jobs}
    kept = [name for name in is_complete if is_complete[name]]
    return kept, [job for job in jobs if not is_complete[job.name]]


def _commit_unpaired(
    patients: Sequence[Patient], times: TimePoints, results: ComparisonFolder
) -> dict[str, str]:
    """Write a row for each patient without a pair of scans; return the reasons."""
    unpaired = {}
    for patient in patients:
        if not patient.is_paired:
            unpaired[patient.name] = reason = patient.why_unpaired(times)
            results.commit_failure(patient.row("unpaired", reason), ())
    return unpaired


def _comparisons(
    patients: Sequence[Patient], times: TimePoints, settings: CompareOptions
) -> tuple[list[PatientComparison], dict[str, VolsegError]]:
    """Return a comparison for each patient with a pair, and the errors of hashing their files."""
    paired = [patient for patient in patients if patient.is_paired]
    outcomes = list(run(lambda patient: input_digests(patient, times), paired))
    jobs = [
        PatientComparison(outcome.item, times, settings, outcome.value or ())
        for outcome in outcomes
    ]
    return jobs, {outcome.item.name: outcome.error for outcome in outcomes if outcome.error}


def input_digests(patient: Patient, times: TimePoints) -> tuple[str, ...]:
    """Return the SHA-256 of all files on which the rows of a patient depend."""
    return tuple(
        digest
        for cases in patient.scans
        for time_point, case in zip(times, cases, strict=True)
        if case is not None
        for digest in time_point.digests(case)
    )


def _peaks(jobs: Sequence[PatientComparison], process: int) -> dict[str, Peak]:
    """Return the peak memory of comparing each patient, from headers.

    Patients with unreadable headers are left out; comparing them raises the error.
    """
    outcomes = run(lambda job: job.peak(process), jobs)
    return {outcome.item.name: outcome.value for outcome in outcomes if outcome.value is not None}


def _write_tables(results: ComparisonFolder, unreached: Sequence[Patient]) -> list[PatientResponse]:
    """Write the tables and the page of all patients of the folder; return their rows."""
    pending = [patient.row("pending", "not reached yet") for patient in unreached]
    rows = results.write_tables(pending)
    lesions = results.lesion_rows(rows, set())
    pages = [row.patient for row in rows if (results.path / page_name(row.patient)).is_file()]
    page = comparison_html(About.now("compare"), rows, lesions, pages=pages)
    results.write("report.html", page)
    return rows


def _warnings(rows: Sequence[PatientResponse]) -> Iterator[str]:
    """Yield the warnings of each patient, and one about all units in doubt."""
    for row in rows:
        yield from remarks_on_patient(row)
    n_in_doubt = sum(any(code == UNIT for code, _ in warnings_in(row.warnings)) for row in rows)
    if n_in_doubt:
        yield (
            f"{UNIT}: no intensity is compared for {format_count(n_in_doubt, 'patient')}, as the "
            "unit was in doubt when the scans were measured: state it with `volseg measure "
            "--unit`, or in the recipe of the model, and compare again"
        )


def _stale_warnings(others: Sequence[str]) -> Iterator[str]:
    if others:
        names = ", ".join([*map(shorten, others[:3]), *(["…"] if len(others) > 3 else [])])
        yield (
            f"W_STALE: the tables also hold {format_count(len(others), 'patient')} of earlier runs "
            f"({names}); give another --out for tables without them"
        )

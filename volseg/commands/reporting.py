"""`volseg report`: rebuild the pages of a results folder."""

from __future__ import annotations

from pathlib import Path

from volseg.commands.batch import damaged_warnings
from volseg.commands.pages import REPORT, has_page, read_run, remake_page, write_report
from volseg.errors import VolsegError
from volseg.io.csv_text import iterate_csv
from volseg.measurement.rows import CaseRow
from volseg.options import ReportOptions, command
from volseg.pages.about import About
from volseg.pages.run_page import Notes
from volseg.reports import PagesReport
from volseg.store.outputs import SAME_KIND, folder_content
from volseg.store.results import EDITED, THUMBNAILS, VIEWERS, ResultsFolder
from volseg.store.reviews import REVIEW, Reviews, read_reviews
from volseg.words import format_count


@command(ReportOptions)
def report(options: ReportOptions) -> PagesReport:
    """Rebuild report.html and the viewer page of every scan, or report on single scans.

    A scan that was moved or deleted keeps its earlier page, and report.html says so.
    The tables do not change.

    Raises:
        VolsegError: `results` is not a results folder, or has no such scan.

    Example:
        >>> import volseg
        >>> scan, mask = (f"sample_data/{kind}/phantom_15.nii.gz" for kind in ("images", "labels"))
        >>> measured = volseg.measure(image=scan, mask=mask, out="measured", pages=False)
        >>> volseg.report("measured").done
        ['phantom_15']
    """
    content = folder_content(options.results)
    kinds = ("infer", "measure", "infer-images")
    if options.scan and content in [SAME_KIND[kind] for kind in kinds]:
        from volseg.commands.case_reporting import report_cases  # torch takes seconds to import

        return report_cases(options)
    _refuse_ignored(options)
    if content == SAME_KIND["infer-images"]:
        from volseg.commands.class_reporting import report_images  # torch takes seconds to import

        return report_images(options)
    if content not in (SAME_KIND["infer"], SAME_KIND["measure"]):
        raise VolsegError(
            f"{options.results}: is not a results folder",
            fix="give the --out folder of volseg infer or volseg measure",
            code="E_USAGE",
        )
    return _report_scans(options)


def _refuse_ignored(options: ReportOptions) -> None:
    """Refuse options that are for reports of single scans alone."""
    for flag, is_given in (("--facts", options.facts), ("--format md", options.format != "html")):
        if is_given:
            raise VolsegError(
                f"{flag} is for reports of single scans, and no --scan is given",
                fix=f"add --scan CASE, or leave {flag} out",
                code="E_USAGE",
            )


def _report_scans(options: ReportOptions) -> PagesReport:
    out, progress = options.results, options.progress
    reviews = _reviews(options)
    remade, kept, edited = [], {}, []
    with ResultsFolder(out, None) as folder:
        rows = folder.checked_rows(_pending(out))
        done = [row.case_id for row in rows if row.status == "done"]
        pages = (
            page for name in done for page in (f"{VIEWERS}/{name}.html", f"{THUMBNAILS}/{name}.jpg")
        )
        folder.check_overwrites([REPORT, *pages])
        progress("Pages", 0.0, format_count(len(done), "scan"))
        for count, name in enumerate(done, start=1):
            record = folder.record(name)
            assert record is not None
            reason = remake_page(folder, record)
            if folder.is_edited(record):
                edited.append(f"{EDITED}: {name}: {folder.edited_text}")
            if not reason:
                remade.append(name)
            elif has_page(folder, name):
                kept[name] = f"{reason}; the earlier page stays"
            else:
                kept[name] = f"{reason}, so it has no page"
            progress("Pages", count / len(done), name)
        remarks = [
            f"The page of {name} could not be rebuilt: {reason}." for name, reason in kept.items()
        ]
        notes = Notes(remarks=remarks, reviews=reviews)
        write_report(folder, About.of(read_run(out)), rows, notes=notes)
    warnings = [*edited, *remarks, *damaged_warnings(rows)]
    return PagesReport(
        out=out, done=remade, kept=list(kept), warnings=warnings, page=str(out / REPORT)
    )


def _reviews(options: ReportOptions) -> Reviews:
    """Read the review that the options name, or else that in the results folder, if any."""
    path = options.results / REVIEW
    return read_reviews(options.review or (path if path.is_file() else None))


def _pending(out: Path) -> list[CaseRow]:
    """Return the pending rows of cases.csv."""
    try:
        return [
            CaseRow(case_id=row["case_id"], status="pending", image=row.get("image") or "")
            for row in iterate_csv(out / "cases.csv")
            if row.get("status") == "pending" and row.get("case_id")
        ]
    except (OSError, ValueError):
        return []

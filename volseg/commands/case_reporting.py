"""`volseg report --scan`: a report of each scan or image, every number with the cell it is from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import quote

from volseg.commands.image_facts import ImageReports
from volseg.commands.scan_facts import ScanReports
from volseg.errors import VolsegError
from volseg.manuscript.case_report import CaseReport, words
from volseg.options import ReportOptions
from volseg.pages.case_page import case_html, case_markdown
from volseg.reports import PagesReport
from volseg.store.outputs import SAME_KIND, OutputFolder, folder_content
from volseg.store.results import ResultsFolder
from volseg.words import format_list

REPORTS, PICTURES = "reports", "pictures"
CHANGED = "was changed since volseg wrote it; the report has its present numbers"
MAX_NAMED = 5


def report_cases(options: ReportOptions) -> PagesReport:
    """Write a report of each scan or image that `options.scan` names.

    Raises:
        VolsegError: none has that name, a table is damaged, or a folder of facts does not belong
            to the results.
    """
    out, suffix = options.results, options.format
    with _folder(out) as folder:
        reports = _reports(options, folder)
        names = list(_selected(options.scan, reports.names))
        folder.check_overwrites(f"{REPORTS}/{name}.{suffix}" for name in names)
        changed = [f"{out / name} {CHANGED}" for name in reports.tables if not folder.is_own(name)]
        for count, name in enumerate(names, start=1):
            report = reports.report(name)
            remarks = (words(f"{Path(text.split(' ')[0]).name} {CHANGED}.") for text in changed)
            report = replace(report, made_with=(*report.made_with, *remarks))
            _write(folder, name, report, suffix)
            options.progress("Reports", count / len(names), name)
    page = out / REPORTS / (f"{names[0]}.{suffix}" if len(names) == 1 else "")
    warnings = [*reports.remarks, *changed]
    return PagesReport(out=out, done=names, warnings=warnings, page=str(page), cases=True)


def _folder(out: Path) -> OutputFolder:
    is_of_images = folder_content(out) == SAME_KIND["infer-images"]
    return OutputFolder(out, "infer-images") if is_of_images else ResultsFolder(out, None)


def _reports(options: ReportOptions, folder: OutputFolder) -> ScanReports | ImageReports:
    if isinstance(folder, ResultsFolder):
        return ScanReports(options, folder)
    return ImageReports(options)


def _selected(patterns: Iterable[str], names: Sequence[str]) -> Iterator[str]:
    """Yield the names that are or fit a pattern, each once.

    Raises:
        VolsegError: a pattern fits none.
    """
    selected = dict[str, None]()
    for pattern in patterns:
        fitting = [pattern] if pattern in names else [n for n in names if fnmatchcase(n, pattern)]
        if not fitting:
            listed = format_list(list(names), MAX_NAMED) or "none"
            raise VolsegError(
                f"--scan {pattern}: the results have no such case; they have {listed}",
                fix="give a case_id of the table, or '*' for all",
                code="E_USAGE",
            )
        selected |= dict.fromkeys(fitting)
    yield from selected


def _write(folder: OutputFolder, name: str, report: CaseReport, suffix: str) -> None:
    """Write a report, and beside a Markdown file its pictures; entirely or not at all."""
    with folder.staged() as commit:
        if suffix == "html":
            commit.write(f"{REPORTS}/{name}.html", case_html(report))
        else:
            for picture in report.pictures:
                commit.write(f"{REPORTS}/{PICTURES}/{name}/{picture.name}", picture.data)
            text = case_markdown(report, f"{PICTURES}/{quote(name)}")
            commit.write(f"{REPORTS}/{name}.md", text)
        commit.finish()

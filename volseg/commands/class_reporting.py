"""The page of a results folder of classes or numbers: its pictures, and `volseg report` for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from volseg.commands.image_sources import ImageSource, find_inputs, source_of
from volseg.errors import VolsegError
from volseg.evaluation.class_rows import CLASSES, VALUES, ClassRow, ValueRow
from volseg.image_bundle import load_image_bundle
from volseg.inputs import read_json
from volseg.io.image_cases import ImageCase
from volseg.options import ReportOptions
from volseg.pages.about import About
from volseg.pages.class_page import class_page, most_doubtful, thumbnail
from volseg.reports import PagesReport
from volseg.store.outputs import OutputFolder
from volseg.store.tables import read_class_rows, read_value_rows

RUN, PAGE = "run.json", "report.html"
Row = ClassRow | ValueRow


def report_images(options: ReportOptions) -> PagesReport:
    """Rebuild report.html from the table, run.json and the images that run.json names.

    Without them the page of before stays: it has pictures, which a new one would lack.

    Raises:
        VolsegError: `results` was not written by volseg, or takes a review, which is of lesions.
    """
    out = options.results
    if options.review is not None:
        raise VolsegError(
            f"{options.review}: a review is of lesions, and {out} holds images",
            fix="leave --review out",
            code="E_USAGE",
        )
    run = run_of_images(out)
    tables = (out / CLASSES, out / VALUES)
    rows = read_class_table(next((path for path in tables if path.is_file()), tables[0]))
    names = [row.case_id for row in rows if row.status == "done"]
    with OutputFolder(out, "infer-images", inputs=[]) as outputs:
        outputs.check_overwrites([PAGE])
        options.progress("Pages", 0.0, str(out / PAGE))
        pictures, reason = _pictures(run, rows)
        is_kept = not pictures and bool(names) and (out / PAGE).exists()
        remarks = [f"The page has no pictures: {reason}."] if reason else []
        if not is_kept:
            page = class_page(
                About.of(run),
                rows,
                target=run["target"],
                coverage=run["coverage"],
                pictures=pictures,
                remarks=remarks,
            )
            outputs.write(PAGE, page.html().encode())
    if is_kept:
        remarks = [f"The earlier page stays: {reason}."]
    return PagesReport(
        out=out,
        done=[] if is_kept else [PAGE],
        kept=[PAGE] if is_kept else [],
        warnings=remarks,
        page=str(out / PAGE),
    )


def run_of_images(out: Path) -> dict[str, Any]:
    """Read run.json, which says what was predicted and at which coverage.

    Raises:
        VolsegError: it is missing or damaged.
    """
    try:
        run = read_json(out / RUN)
        if not isinstance(run["target"], str) or not isinstance(run["coverage"], float | None):
            raise ValueError("target or coverage is missing")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VolsegError(
            f"{out / RUN}: cannot be read ({error})",
            fix="run the same `volseg infer` again",
            code="E_ROW",
        ) from error
    return run


def read_class_table(path: Path) -> list[Row]:
    """Read a table classes.csv or values.csv.

    Raises:
        VolsegError: it cannot be read.
    """
    try:
        if path.name == VALUES:
            return [*read_value_rows(path)]
        return [*read_class_rows(path)[1]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise VolsegError(
            f"{path}: cannot be read ({error})",
            fix="run the same `volseg infer` again",
            code="E_ROW",
        ) from error


def doubtful_pictures(
    rows: Sequence[Row], cases: Iterable[ImageCase], source: ImageSource
) -> dict[str, bytes]:
    """Return case id → JPEG of the images that are most doubtful, as far as they can be read."""
    doubtful, pictures = set(most_doubtful(rows)), dict[str, bytes]()
    for case in cases:  # in the order of files
        if case.id in doubtful:
            with suppress(VolsegError):  # it may have been deleted since
                pictures[case.id] = thumbnail(source.picture(case).array)
    return pictures


def _pictures(run: dict[str, Any], rows: Sequence[Row]) -> tuple[dict[str, bytes], str]:
    """Return the pictures, and why there are none."""
    try:
        scans = [Path(text) for text in run["settings"]["scans"]]
        model = Path(run["settings"]["model"])
    except (KeyError, TypeError):
        return {}, f"{RUN} does not name images and model"
    try:
        recipe = load_image_bundle(model).recipe
        cases = find_inputs(recipe, scans)
        pictures = doubtful_pictures(rows, cases, source_of(recipe))
    except VolsegError as error:
        return {}, error.problem
    return pictures, "" if pictures else "the images that run.json names are gone"

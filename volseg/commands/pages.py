"""Write the pages of a results folder: a viewer page per scan, and report.html for all of them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from volseg import __version__
from volseg.columns import json_values
from volseg.errors import ScanError
from volseg.execution.memory import LIBRARIES, Budget
from volseg.inputs import open_regular, read_json
from volseg.io.formats import is_there
from volseg.io.series import like_scan
from volseg.io.volumes import read_header, read_mask, read_volume
from volseg.measurement.memory import LISTED, plan_page, plan_report
from volseg.measurement.rows import CaseRow, LesionMeasurement
from volseg.pages.about import About
from volseg.pages.model_box import ModelBox, read_model_box
from volseg.postprocessing.lesions import MANY
from volseg.store.records import LESION_IDS, CaseRecord, Source, file_of, rows_name
from volseg.store.results import THUMBNAILS, VIEWERS, ResultsFolder
from volseg.volume import BoundingBox, Volume
from volseg.words import format_list, format_thousands

if TYPE_CHECKING:  # this import loads jinja2
    from volseg.pages.run_page import Notes

REPORT = "report.html"
HEAD_BYTES = 4096  # at the start of report.html, which contain its content digest
MAX_NAMED = 5  # scans listed in one remark
MAX_LESION_IDS = 2**32  # in a file of lesion ids: no limit


def page_files(
    case: CaseRow,
    lesions: Sequence[LesionMeasurement],
    scan: Volume,
    ids: np.ndarray,
    *,
    unit: str,
    box: ModelBox | None = None,
) -> dict[str, str | bytes]:
    """Return the viewer page of a scan and its picture for report.html, by path in the folder.

    Args:
        ids: (I, J, K) lesion ids on the scan's grid.
        unit: intensity unit of the scan.
        box: description of the model, if one was used.
    """
    from volseg.pages.marks import lesion_points
    from volseg.pages.montage import montage_jpeg
    from volseg.pages.preview import make_preview
    from volseg.pages.viewer_page import MAX_VIEWER_ROWS, image_budget, viewer_html

    lesions = lesions[:MAX_VIEWER_ROWS]  # a noisy mask has tens of thousands
    preview = make_preview(scan, ids, unit=unit, max_bytes=image_budget(lesions))
    largest = max(lesions, key=lambda lesion: lesion.n_voxels, default=None)
    point_mm, extent_mm = None, 0.0
    if largest is not None:
        point_mm = lesion_points(preview.ids, [largest]).get(largest.lesion_id)
        extent_mm = _extent_mm(preview.ids, largest.lesion_id)
    montage = montage_jpeg(scan, ids, window=preview.window, point_mm=point_mm, extent_mm=extent_mm)
    page = viewer_html(case, lesions, preview, montage, unit=unit, box=box)
    return {
        f"{VIEWERS}/{case.case_id}.html": page,
        f"{THUMBNAILS}/{case.case_id}.jpg": montage,
    }


def _extent_mm(ids: Volume, number: int) -> float:
    """Return the longest edge of the bounding box of a lesion, along the axes of the grid."""
    box = BoundingBox.around(ids.array == number)
    return 0.0 if box is None else float((np.array(box.shape) * ids.geometry.spacing_mm).max())


def source_of(path: Path, scan: Volume, unit: str, box: ModelBox | None = None) -> Source:
    """Return what a record needs to rebuild the page: scan path, its SHA-256, unit and model."""
    text = None if box is None else box.model_dump_json()
    return Source(scan=path.absolute(), sha256=scan.sha256, unit=unit, model_box=text)


def page_budget(
    max_ram: int | None, announce: Callable[[str], None], *, has_run: bool = False
) -> Budget:
    """Return the memory budget for rebuilt pages and report.html.

    Args:
        max_ram: bytes; None for no limit.
        has_run: a case was processed already, so the libraries are loaded.
    """
    libraries, otherwise = 0 if has_run else LIBRARIES, "skip the pages with --no-report"
    return Budget(
        max_ram, announce, what="making this page", otherwise=otherwise, libraries=libraries
    )


def remake_page(
    results: ResultsFolder, record: CaseRecord[Any], *, budget: Budget | None = None
) -> str:
    """Rebuild the page of a complete case from its scan and its lesion ids.

    Args:
        budget: main-memory budget; a page that may not fit is not made.

    Returns:
        The reason if that fails, and the earlier page is kept; "" on success.
    """
    source, name = record.source, record.name
    path, unit = source.scan, source.unit
    if path is None or source.sha256 is None or unit is None:
        return "its record does not name the scan"
    if not is_there(path):
        return f"its scan {path.name} was moved or deleted"
    try:
        ids_path = like_scan(file_of(results.path, name, record.files, LESION_IDS), path)
        if budget is not None:
            _check_budget(budget, name, path, ids_path)
        scan = read_volume(path, is_finite=False)
        if scan.sha256 != source.sha256:
            return f"its scan {path.name} has changed since"
        ids = read_mask(ids_path, max_labels=MAX_LESION_IDS)
        lesions = results.rows_of(name).largest(MANY)
    except ScanError as error:
        return str(error)
    difference = scan.geometry.difference(ids.geometry)
    if difference:
        return f"its lesion ids are not on the grid of its scan: {difference}"
    box = read_model_box(source.model_box)
    with results.staged() as commit:
        case = results.shown(record)
        commit.write_all(page_files(case, lesions, scan, ids.array, unit=unit, box=box))
        results.add_files(record, commit)
    return ""


def _check_budget(budget: Budget, name: str, scan: Path, ids: Path) -> None:
    """Announce the peak memory of rebuilding a page.

    Raises:
        ScanError: it may exceed the budget, or a file cannot be read.
    """
    header, ids_type = read_header(scan), read_header(ids).dtype
    voxels = math.prod(header.geometry.shape)
    peak = plan_page(voxels, header.dtype.itemsize, ids_type.itemsize, process=budget.process)
    if (refusal := budget.refusal(peak)) is not None:
        raise refusal
    budget.announce(peak, f"the page of {name}")


def has_page(results: ResultsFolder, case_id: str) -> bool:
    return (results.path / VIEWERS / f"{case_id}.html").is_file()


def write_report(
    results: ResultsFolder,
    about: About,
    cases: Sequence[CaseRow],
    *,
    notes: Notes | None = None,
    budget: Budget | None = None,
    most: int = LISTED,
) -> list[str]:
    """Write report.html for all cases of a folder, unless it is there with the same content.

    Args:
        notes: remarks, and the verdicts of a reader.
        budget: main-memory budget; a page that may not fit lists no lesions.
        most: number of lesions on the page, the largest of all scans; fewer from a noisy mask.

    Returns:
        Warnings about what the page lacks because of the budget.
    """
    from volseg.pages.run_page import Notes, run_page

    notes = notes or Notes()
    refusal = budget and budget.refusal(plan_report(len(cases), process=budget.process))
    missing = [] if refusal is None else [f"W_PAGE: {REPORT} lists no lesions: {refusal}"]
    done = [case for case in cases if case.status == "done"]
    lesions, left_out = _listed_lesions(results, done, 0 if missing else most)
    notes = replace(notes, remarks=[*notes.remarks, *missing, *left_out])
    boxes, hashes = _models_and_rows(results, about)
    names = [case.case_id for case in done]
    pages = [name for name in names if has_page(results, name)]
    pictures = _Pictures(results.path / THUMBNAILS, names)
    digest = _digest(
        [__version__, pages, list(pictures), notes.review_sha256],
        map(json_values, cases),
        notes.remarks,
        hashes,
        (box.model_dump_json() for box in boxes),
    )
    if _made_from(results.path / REPORT) != digest:
        about = replace(about, boxes=tuple(boxes))
        page = run_page(about, cases, lesions, montages=pictures, pages=pages, notes=notes)
        results.write(REPORT, replace(page, digest=digest).html())
    return missing


def _models_and_rows(
    results: ResultsFolder, about: About
) -> tuple[list[ModelBox], list[list[str | None]]]:
    """Return a box for each model, and for each case its name and the SHA-256 of its rows."""
    texts, hashes = {}, []
    for name, record in results.records():
        if record is not None:
            texts[record.source.model_box] = None
            hashes.append([name, record.files.get(rows_name(name))])
    boxes = [*about.boxes, *filter(None, map(read_model_box, texts))]
    return list({box.name: box for box in boxes}.values()), hashes  # without duplicates


def _listed_lesions(
    results: ResultsFolder, done: Sequence[CaseRow], most: int
) -> tuple[list[LesionMeasurement], list[str]]:
    """Return the largest lesions of the scans, and remarks about those that are left out."""
    from volseg.pages.viewer_page import MAX_VIEWER_ROWS

    limits = {case.case_id: MAX_VIEWER_ROWS if _is_noisy(case) else MANY for case in done}
    lesions, n_lesions = results.listed_rows(limits, most) if most else ([], 0)
    remarks, noisy = [], [case.case_id for case in done if _is_noisy(case)]
    if noisy:
        names = format_list(noisy, MAX_NAMED, "scan")
        listed = f"The {MAX_VIEWER_ROWS} largest lesions of {names}"
        remarks.append(f"{listed} are listed; lesions.csv has them all.")
    if len(lesions) < n_lesions:
        n_listed, n_all = format_thousands(len(lesions)), format_thousands(n_lesions)
        largest = f"{n_listed} largest of {n_all} lesions"
        remarks.append(f"The {largest} are listed and plotted; lesions.csv has them all.")
    return lesions, remarks


def _is_noisy(case: CaseRow) -> bool:
    """Return whether a case has so many lesions that its mask looks like noise."""
    return (case.n_lesions or 0) > MANY


class _Pictures(Mapping[str, bytes]):
    """Pictures of the cases that have one, each read on access."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self._paths = {name: path for name in names if (path := folder / f"{name}.jpg").is_file()}

    def __getitem__(self, name: str) -> bytes:
        return self._paths[name].read_bytes()

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def _digest(*parts: Iterable[Any]) -> str:
    """Return the SHA-256 of the content of a page, without joining it into one text."""
    digest = hashlib.sha256()
    for part in parts:
        for item in part:
            digest.update(json.dumps(item, sort_keys=True).encode() + b"\n")
        digest.update(b"\n")
    return digest.hexdigest()


def read_run(out: Path) -> dict[str, Any]:
    """Read run.json; return {} if an interrupted run left none."""
    try:
        run = read_json(out / "run.json")
    except (OSError, ValueError):
        return {}
    return run if isinstance(run, dict) else {}


def _made_from(path: Path) -> str | None:
    try:
        with open_regular(path) as file:
            head = file.read(HEAD_BYTES).decode("utf-8", "replace")
    except OSError:
        return None
    _, _, tail = head.partition('<meta name="volseg-content" content="')
    return tail.partition('"')[0] or None

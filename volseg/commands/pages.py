"""Write the pages of a results folder: a viewer page per scan, and report.html for all of them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from volseg import __version__
from volseg.errors import ScanError
from volseg.execution.memory import LIBRARIES, Budget
from volseg.inputs import open_regular, read_json
from volseg.io.volumes import read_header, read_mask, read_volume
from volseg.measurement.memory import LISTED, plan_page, plan_report
from volseg.measurement.rows import CaseRow, LesionMeasurement
from volseg.pages.model_box import ModelBox, read_model_box
from volseg.postprocessing.lesions import MANY
from volseg.store.outputs import Commit
from volseg.store.records import file_of
from volseg.store.results import THUMBNAILS, VIEWERS, ResultsFolder, plain, rows_name
from volseg.volume import BoundingBox, Volume
from volseg.words import format_thousands

REPORT = "report.html"
HEAD_BYTES = 4096  # at the start of report.html, which contain its content digest
MOST_NAMED = 5  # scans listed in one remark
MAX_LESION_IDS = 2**32  # in a file of lesion ids: no limit


def write_page(
    case: CaseRow | Mapping[str, Any],
    lesions: Sequence[LesionMeasurement] | Sequence[Mapping[str, Any]],
    scan: Volume,
    ids: np.ndarray,
    *,
    unit: str,
    commit: Commit,
    box: ModelBox | None = None,
) -> None:
    """Write the viewer page of a scan and its picture for report.html.

    Args:
        ids: (I, J, K) lesion ids on the scan's grid.
        unit: intensity unit of the scan.
        box: description of the model, if one was used.
    """
    from volseg.pages.marks import lesion_points
    from volseg.pages.montage import montage_jpeg
    from volseg.pages.preview import make_preview
    from volseg.pages.viewer_page import MAX_VIEWER_ROWS, image_budget, viewer_html

    row = plain(case) if isinstance(case, CaseRow) else case
    # A noisy mask has tens of thousands of lesions.
    rows = [_plain(lesion) for lesion in lesions[:MAX_VIEWER_ROWS]]
    preview = make_preview(scan, ids, unit=unit, max_bytes=image_budget(rows))
    largest = max(rows, key=lambda lesion: lesion.get("n_voxels") or 0, default=None)
    point_mm, extent_mm = None, 0.0
    if largest is not None:
        point_mm = lesion_points(preview.ids, [largest]).get(largest["lesion_id"])
        extent_mm = _extent_mm(preview.ids, largest["lesion_id"])
    montage = montage_jpeg(scan, ids, window=preview.window, point_mm=point_mm, extent_mm=extent_mm)
    page = viewer_html(row, rows, preview, montage, unit=unit, box=box)
    commit.write(f"{VIEWERS}/{row['case_id']}.html", page)
    commit.write(f"{THUMBNAILS}/{row['case_id']}.jpg", montage)


def _plain(lesion: LesionMeasurement | Mapping[str, Any]) -> Mapping[str, Any]:
    return plain(lesion) if isinstance(lesion, LesionMeasurement) else lesion


def _extent_mm(ids: Volume, number: int) -> float:
    """Return the longest edge of the bounding box of a lesion, along the axes of the grid."""
    box = BoundingBox.around(ids.array == number)
    return 0.0 if box is None else float((np.array(box.shape) * ids.geometry.spacing_mm).max())


def source_of(path: Path, scan: Volume, unit: str, box: ModelBox | None = None) -> dict[str, Any]:
    """Return what a record needs to rebuild the page: scan path, its SHA-256, unit and model."""
    model = {} if box is None else {"model_box": box.model_dump_json()}
    return {"scan": str(path.absolute()), "sha256": scan.sha256, "unit": unit} | model


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
    results: ResultsFolder, case_id: str, record: Mapping[str, Any], *, budget: Budget | None = None
) -> str:
    """Rebuild the page of a complete case from its scan and its lesion ids.

    Args:
        budget: main-memory budget; a page that may not fit is not made.

    Returns:
        The reason if that fails, and the earlier page is kept; "" on success.
    """
    source = record["source"]
    if not all(isinstance(source.get(name), str) for name in ("scan", "sha256", "unit")):
        return "its record does not name the scan"
    path = Path(source["scan"])
    if not path.exists():
        return f"its scan {path.name} was moved or deleted"
    try:
        ids_path = file_of(results.path, case_id, record["files"], "lesion_ids")
        if budget is not None:
            header, ids_type = read_header(path), read_header(ids_path).dtype
            voxels = math.prod(header.geometry.shape)
            peak = plan_page(
                voxels, header.dtype.itemsize, ids_type.itemsize, process=budget.process
            )
            if (refusal := budget.refusal(peak)) is not None:
                return str(refusal)
            budget.announce(peak, f"the page of {case_id}")
        scan = read_volume(path, is_finite=False)
        if scan.sha256 != source["sha256"]:
            return f"its scan {path.name} has changed since"
        ids = read_mask(ids_path, max_labels=MAX_LESION_IDS)
        rows = results.largest_rows(case_id, MANY)
    except ScanError as error:
        return str(error)
    difference = scan.geometry.difference(ids.geometry)
    if difference:
        return f"its lesion ids are not on the grid of its scan: {difference}"
    box = read_model_box(source.get("model_box"))
    with results.staged() as commit:
        row = results.shown(record)
        write_page(row, rows, scan, ids.array, unit=source["unit"], commit=commit, box=box)
        results.add_files(case_id, commit)
    return ""


def has_page(results: ResultsFolder, case_id: str) -> bool:
    return (results.path / VIEWERS / f"{case_id}.html").is_file()


def write_report(
    results: ResultsFolder,
    about: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    remarks: Sequence[str] = (),
    *,
    force: bool = False,
    budget: Budget | None = None,
    most: int = LISTED,
) -> list[str]:
    """Write report.html for all cases of a folder.

    Args:
        about: description of the run: `command`, `volseg`, `model`, `started`.
        rows: rows of cases.csv.
        force: write the page even if the present one has the same content.
        budget: main-memory budget; a page that may not fit lists no lesions.
        most: number of lesions on the page, the largest of all scans; fewer from a noisy mask.

    Returns:
        Warnings about what the page lacks because of the budget.
    """
    from volseg.pages.run_page import report_html
    from volseg.pages.viewer_page import MAX_VIEWER_ROWS

    refusal = budget and budget.refusal(plan_report(len(rows), process=budget.process))
    missing = [] if refusal is None else [f"W_PAGE: {REPORT} lists no lesions: {refusal}"]
    done = [row for row in rows if row["status"] == "done"]
    noisy = [row["case_id"] for row in done if _is_noisy(row)]
    limits = {row["case_id"]: MAX_VIEWER_ROWS if _is_noisy(row) else MANY for row in done}
    lesions, n_lesions = ([], 0) if refusal is not None else results.listed_rows(limits, most)
    remarks = [*remarks, *missing]
    if noisy:
        listed = f"The {MAX_VIEWER_ROWS} largest lesions of {', '.join(noisy[:MOST_NAMED])}"
        more = f" and {len(noisy) - MOST_NAMED} more scans" if len(noisy) > MOST_NAMED else ""
        remarks = [*remarks, f"{listed}{more} are listed; lesions.csv has them all."]
    if len(lesions) < n_lesions:
        largest = (
            f"{format_thousands(len(lesions))} largest of {format_thousands(n_lesions)} lesions"
        )
        remarks = [*remarks, f"The {largest} are listed and plotted; lesions.csv has them all."]
    contents, hashes = {_as_text(about.get("model_box")): None}, []
    for name, record in results.records():
        if record is not None:
            contents[_as_text((record.get("source") or {}).get("model_box"))] = None
            hashes.append([name, record["files"].get(rows_name(name))])
    boxes = _boxes(contents)
    digest = _digest([__version__], rows, remarks, hashes, (box.model_dump_json() for box in boxes))
    if not force and _made_from(results.path / REPORT) == digest:
        return missing
    names = [row["case_id"] for row in done]
    page = report_html(
        about,
        rows,
        lesions,
        montages=_Pictures(results.path / THUMBNAILS, names),
        pages=[name for name in names if has_page(results, name)],
        boxes=boxes,
        remarks=remarks,
        digest=digest,
    )
    results.write(REPORT, page)
    return missing


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


def _is_noisy(case: Mapping[str, Any]) -> bool:
    """Return whether a case has so many lesions that its mask looks like noise.

    The row may come from an untrusted file.
    """
    n_lesions = case.get("n_lesions")
    return isinstance(n_lesions, int | float) and n_lesions > MANY


def _digest(*parts: Iterable[Any]) -> str:
    """Return the SHA-256 of the content of a page, without joining it into one text."""
    digest = hashlib.sha256()
    for part in parts:
        for item in part:
            digest.update(json.dumps(item, sort_keys=True).encode() + b"\n")
        digest.update(b"\n")
    return digest.hexdigest()


def read_about(out: Path) -> dict[str, Any]:
    """Read run.json; return {} if an interrupted run left none."""
    try:
        about = read_json(out / "run.json")
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def _boxes(contents: Iterable[str]) -> list[ModelBox]:
    """Return the model boxes of this run and of earlier cases, without duplicates."""
    boxes = [read_model_box(content) for content in contents if content]
    return list({box.name: box for box in boxes if box is not None}.values())


def _as_text(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content) if content else ""


def _made_from(path: Path) -> str | None:
    try:
        with open_regular(path) as file:
            head = file.read(HEAD_BYTES).decode("utf-8", "replace")
    except OSError:
        return None
    _, _, tail = head.partition('<meta name="volseg-content" content="')
    return tail.partition('"')[0] or None

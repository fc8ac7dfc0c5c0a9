"""Writing the pages of a results folder: one per scan while it is in memory, and report.html over all of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from volseg import __version__
from volseg.errors import ScanError
from volseg.io.files import make_folder, sha256_of, write_bytes_atomic
from volseg.io.nifti import read_mask, read_volume
from volseg.measure.rows import CaseRow, LesionMeasurement
from volseg.report.records import file_of
from volseg.report.results import THUMBNAILS, VIEWERS, ResultsFolder, plain
from volseg.volume import BoundingBox, Volume

HEAD_BYTES = 4096  # of report.html, in which it says what it was made from
ANY_NUMBER = 2**32  # of lesions in a file of lesion ids


def write_page(
    case: CaseRow | Mapping[str, Any],
    lesions: Sequence[LesionMeasurement] | Sequence[Mapping[str, Any]],
    scan: Volume,
    ids: np.ndarray,
    *,
    unit: str,
    out: Path,
) -> list[Path]:
    """The viewer page of a scan and its picture for report.html: the two files that were written.

    Args:
        ids: (I, J, K) lesion ids on the scan's grid. unit: of its intensities.
    """
    from volseg.report.html import MAX_VIEWER_ROWS, image_budget, viewer_html
    from volseg.report.preview import lesion_points, make_preview, montage_jpeg

    row = plain(case) if isinstance(case, CaseRow) else case
    rows = [_plain(lesion) for lesion in lesions[:MAX_VIEWER_ROWS]]  # of a noisy mask there are ten thousands
    preview = make_preview(scan, ids, unit=unit, max_bytes=image_budget(rows))
    largest = max(rows, key=lambda lesion: lesion.get("n_voxels") or 0, default=None)
    point_mm = None if largest is None else lesion_points(preview, [largest]).get(largest["lesion_id"])
    montage = montage_jpeg(
        scan,
        ids,
        window=preview.window,
        point_mm=point_mm,
        extent_mm=0.0 if largest is None else _extent_mm(preview.ids, largest["lesion_id"]),
    )
    page = out / VIEWERS / f"{row['case_id']}.html"
    picture = out / THUMBNAILS / f"{row['case_id']}.jpg"
    make_folder(picture.parent)
    write_bytes_atomic(page, viewer_html(row, rows, preview, montage, unit=unit))
    write_bytes_atomic(picture, montage)
    return [page, picture]


def _plain(lesion: LesionMeasurement | Mapping[str, Any]) -> Mapping[str, Any]:
    return plain(lesion) if isinstance(lesion, LesionMeasurement) else lesion


def _extent_mm(ids: Volume, number: int) -> float:
    """Longest edge of the box of a lesion, along the axes of the grid."""
    box = BoundingBox.around(ids.array == number)
    return 0.0 if box is None else float((np.array(box.shape) * ids.geometry.spacing_mm).max())


def source_of(path: Path, unit: str) -> dict[str, str]:
    """What a record keeps so that the page can be made again: the scan, what is in it, and the unit of its intensities."""
    return {"scan": str(path.absolute()), "sha256": scan_digest(path), "unit": unit}


def scan_digest(path: Path) -> str:
    return "+".join(sha256_of(file) for file in files_of(path))


def files_of(path: Path) -> list[Path]:
    """The files behind the name of a scan: a `.hdr` has its voxels in an `.img`."""
    stem, _, suffix = path.name.rpartition(".hdr")
    partner = path.with_name(f"{stem}.img{suffix}") if stem else path
    return [file for file in dict.fromkeys((path, partner)) if file.is_file()]


def remake_page(results: ResultsFolder, case_id: str, record: Mapping[str, Any]) -> str:
    """Make the page of a complete case again from its scan and its lesion ids.

    Returns:
        Why that cannot be done; then the earlier page stays. Empty where it was.
    """
    source = record.get("source") or {}
    if "scan" not in source:
        return "its record, of an older version, does not say where the scan is"
    path = Path(source["scan"])
    if not files_of(path):
        return f"its scan {path.name} is no longer where it was"
    if scan_digest(path) != source["sha256"]:
        return f"its scan {path.name} has been changed since"
    try:
        found = file_of(results.path, case_id, record["files"], "lesion_ids")
        scan, ids = read_volume(path, is_finite=False), read_mask(found, max_labels=ANY_NUMBER)
    except ScanError as error:
        return str(error)
    difference = scan.geometry.difference(ids.geometry)
    if difference:
        return f"its lesion ids are not on the grid of its scan: {difference}"
    files = write_page(record["case"], record["lesions"], scan, ids.array, unit=source["unit"], out=results.path)
    results.add_files(case_id, files)
    return ""


def has_page(results: ResultsFolder, case_id: str) -> bool:
    return (results.path / VIEWERS / f"{case_id}.html").is_file()


def write_report(
    results: ResultsFolder,
    about: Mapping[str, Any],
    pending: Sequence[Mapping[str, Any]] = (),
    remarks: Sequence[str] = (),
    *,
    is_anew: bool = False,
) -> Path:
    """report.html of all that the folder holds.

    Args:
        about: of the run: `command`, `volseg`, `model`, `started`.
        pending: rows of cases that were not reached and have no record.
        is_anew: write it even if one is there that was made from the same.
    """
    from volseg.report.html import report_html

    path = results.path / "report.html"
    records = results.records()
    content = [__version__, list(pending), list(remarks), records]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    if not is_anew and _made_from(path) == digest:
        return path
    rows = {row["case_id"]: row for row in pending}
    rows |= {name: record["case"] for name, record in records.items() if name not in rows}
    done = [name for name, row in rows.items() if row["status"] == "done"]
    pictures = {name: results.path / THUMBNAILS / f"{name}.jpg" for name in done}
    page = report_html(
        about,
        [rows[name] for name in sorted(rows)],
        [lesion for name in sorted(done) for lesion in records[name]["lesions"]],
        montages={name: picture.read_bytes() for name, picture in pictures.items() if picture.is_file()},
        pages=[name for name in done if has_page(results, name)],
        remarks=remarks,
        digest=digest,
    )
    write_bytes_atomic(path, page)
    return path


def _made_from(path: Path) -> str | None:
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES).decode("utf-8", "replace")
    except OSError:
        return None
    _, _, rest = head.partition('<meta name="volseg-content" content="')
    return rest.partition('"')[0] or None

"""The facts and pictures of the report of a scan, from the tables and files of its results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from heapq import nlargest
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from volseg.columns import json_values
from volseg.commands.fact_files import FILES, RUN, add_model, check_model, read_documents
from volseg.comparison.changes import LesionChange
from volseg.comparison.response import PatientResponse
from volseg.errors import ScanError, VolsegError
from volseg.io.csv_text import iterate_csv
from volseg.io.formats import is_there
from volseg.io.series import like_scan
from volseg.io.volumes import read_mask, read_volume
from volseg.manuscript.case_report import CaseReport, Picture, row_document, statement
from volseg.manuscript.facts import Document, Part
from volseg.manuscript.of_scans import MOST_LESIONS, LesionFacts, ScanFacts, scan_report
from volseg.measurement.rows import CaseRow, LesionMeasurement
from volseg.options import ReportOptions
from volseg.pages.marks import lesion_points
from volseg.pages.montage import montage_jpeg
from volseg.pages.preview import picture_window
from volseg.store.records import LESION_IDS, CaseRecord, file_of
from volseg.store.results import THUMBNAILS, ResultsFolder
from volseg.store.reviews import REVIEW, Reviews, read_reviews
from volseg.store.tables import typed_row
from volseg.volume import BoundingBox, Volume
from volseg.words import lesion_noun

CASES, LESIONS = "cases.csv", "lesions.csv"
COMPARISON, RESPONSE = "comparison.csv", "response.csv"
MOST_PICTURES = 3  # lesions
PIXELS = 240  # of the edge of a plane
MAX_LESION_IDS = 2**32  # in a file of lesion ids: no limit
Row = TypeVar("Row")


class ScanReports:
    """The reports of the scans of a results folder."""

    tables = (CASES, LESIONS)

    def __init__(self, options: ReportOptions, folder: ResultsFolder) -> None:
        self._folder, out = folder, options.results
        self._cases = {row.case_id: row for row in read_rows(out / CASES, CaseRow)}
        self.names = sorted(self._cases)
        compared = [path for path in options.facts if (path / COMPARISON).is_file()]
        others = [path for path in options.facts if path not in compared]
        self._documents, self.remarks = run_documents(out, others)
        self._changes = [
            row for path in compared for row in read_rows(path / COMPARISON, LesionChange)
        ]
        self._responses = [
            row for path in compared for row in read_rows(path / RESPONSE, PatientResponse)
        ]
        self._reviews = _reviews(options)

    def report(self, name: str) -> CaseReport:
        """Return the report of a scan with its pictures."""
        case, lesions = self._cases[name], self._largest(name)
        scan = ScanFacts(
            facts=self._facts(case),
            lesions=[self._lesion_facts(lesion) for lesion in lesions],
            noun=lesion_noun(lesion.connectivity for lesion in lesions),
            gone=[
                row_document(
                    COMPARISON,
                    str(row.baseline_case),
                    json_values(row),
                    f"lesion {row.baseline_lesion_id}, gone",
                )
                for row in self._changes
                if row.followup_case == name and row.status == "gone"
            ],
        )
        report = scan_report(scan)
        if case.status != "done":
            return replace(report, no_pictures="There is no picture of a scan without a result.")
        pictures, reason = _pictures(self._folder, name, lesions)
        return replace(report, pictures=tuple(pictures), no_pictures=reason)

    def _facts(self, case: CaseRow) -> dict[str, Document]:
        """Return the facts of a scan; those of another model are left out."""
        content = {name: value for name, value in json_values(case).items() if name != "image"}
        facts = {**self._documents, "scan": row_document(CASES, case.case_id, content)}
        for row in self._responses:
            if case.case_id in (row.followup_case or "").split(";"):
                facts["response"] = Document(f"{RESPONSE}, {case.case_id}", json_values(row))
        return of_model(facts, case.model)

    def _lesion_facts(self, lesion: LesionMeasurement) -> LesionFacts:
        name, number = lesion.case_id, lesion.lesion_id
        review = self._reviews.of_case.get(name, {}).get(number)
        is_current = review is not None and review.n_voxels in (None, lesion.n_voxels)
        change = next(
            (
                row
                for row in self._changes
                if (row.followup_case, row.followup_lesion_id) == (name, number)
            ),
            None,
        )
        which = f"lesion {number}"
        return LesionFacts(
            row=row_document(LESIONS, name, json_values(lesion), which),
            review=row_document(REVIEW, name, json_values(review), which) if is_current else None,
            change=row_document(COMPARISON, name, json_values(change), which) if change else None,
        )

    def _largest(self, name: str) -> list[LesionMeasurement]:
        """Return the largest lesions of a scan in the order of the table.

        Raises:
            VolsegError: the table has not as many as cases.csv says.
        """
        n = 0

        def lesions() -> Iterator[LesionMeasurement]:
            nonlocal n
            for row in read_rows(self._folder.path / LESIONS, LesionMeasurement, case_id=name):
                n += 1
                yield row

        largest = nlargest(MOST_LESIONS, lesions(), key=lambda lesion: lesion.n_voxels)
        stated = self._cases[name].n_lesions
        if stated is not None and stated != n:
            table = self._folder.path / LESIONS
            raise VolsegError(
                f"{table}: has {n} lesions of {name}, and {CASES} says {stated}",
                fix="run the same `volseg infer` or `volseg measure` again",
                code="E_ROW",
            )
        return sorted(largest, key=lambda lesion: lesion.lesion_id)


def read_rows(path: Path, row_type: type[Row], case_id: str | None = None) -> Iterator[Row]:
    """Yield the rows of a table, or those of one case.

    Raises:
        VolsegError: it cannot be read, or a cell is not valid.
    """
    try:
        for cells in iterate_csv(path):
            if case_id is None or cells.get("case_id") == case_id:
                yield typed_row(row_type, cells)
    except (OSError, ValueError, TypeError) as error:
        raise VolsegError(
            f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})",
            fix="run the command that wrote it again",
            code="E_ROW",
        ) from error


def run_documents(out: Path, folders: Sequence[Path]) -> tuple[dict[str, Document], list[str]]:
    """Return the facts on run, model and evaluation, and what is missing.

    Raises:
        VolsegError: a folder holds no facts, or does not belong to the results.
    """
    has_run = (out / FILES[RUN]).is_file()  # an interrupted run leaves none
    documents = read_documents([*([out] if has_run else []), *folders])
    hint = "" if "model" in documents else add_model(documents)
    check_model(documents)
    return documents, [hint] if hint else []


def of_model(facts: dict[str, Document], model: str) -> dict[str, Document]:
    """Leave out what is known of another model than that of a case."""
    digest = facts["files"].content["model.json"] if "files" in facts else ""
    if "model" in facts and model.partition("@")[2] != digest[:12]:
        facts = {alias: document for alias, document in facts.items() if alias != "model"}
    run = facts.get("run")
    box = None if run is None else run.content.get("model_box")
    if run is not None and isinstance(box, Mapping) and box.get("name") != model:
        content = {name: value for name, value in run.content.items() if name != "model_box"}
        facts["run"] = Document(run.name, content)
    return facts


def _reviews(options: ReportOptions) -> Reviews:
    """Read the review that the options name, or else that in the results folder, if any."""
    path = options.results / REVIEW
    return read_reviews(options.review or (path if path.is_file() else None))


# ---- pictures


def _pictures(
    folder: ResultsFolder, name: str, lesions: Sequence[LesionMeasurement]
) -> tuple[list[Picture], str]:
    """Return a picture per large lesion, or of the whole scan; else why there is none."""
    record = folder.record(name)
    if record is None:
        return [], "There is no picture: the record of the scan is damaged."
    try:
        scan, ids = _scan_and_ids(folder, record)
    except ScanError:
        return _stored_picture(folder, record)
    window = picture_window(scan, ids.array, unit=record.source.unit or "")
    return [*_drawn(scan, ids, lesions, window)], ""


def _scan_and_ids(folder: ResultsFolder, record: CaseRecord[Any]) -> tuple[Volume, Volume]:
    """Read the scan and its lesion ids.

    Raises:
        ScanError: one is gone, or not as it was.
    """
    path = record.source.scan
    if path is None or not is_there(path):
        raise ScanError("the scan is gone", fix="put it back", code="E_MISSING")
    ids_path = like_scan(file_of(folder.path, record.name, record.files, LESION_IDS), path)
    scan, ids = read_volume(path, is_finite=False), read_mask(ids_path, max_labels=MAX_LESION_IDS)
    if scan.sha256 != record.source.sha256 or scan.geometry.difference(ids.geometry):
        raise ScanError("the scan has changed", fix="put it back", code="E_CHANGED")
    return scan, ids


def _drawn(
    scan: Volume, ids: Volume, lesions: Sequence[LesionMeasurement], window: tuple[float, float]
) -> Iterator[Picture]:
    """Yield the picture of each of the largest lesions, or of the scan without any."""
    shown = sorted(lesions, key=lambda lesion: -lesion.n_voxels)[:MOST_PICTURES]
    canonical = ids.canonical()
    points = lesion_points(canonical, shown)
    planes = "axial, coronal and sagittal slice"
    for lesion in shown:
        number = lesion.lesion_id
        box = BoundingBox.around(canonical.array == number)
        extent = (
            0.0
            if box is None
            else float(np.max(np.array(box.shape) * canonical.geometry.spacing_mm))
        )
        data = montage_jpeg(
            scan,
            ids.array,
            window=window,
            point_mm=points.get(number),
            extent_mm=extent,
            pixels=PIXELS,
        )
        key = f"{LESIONS}, {lesion.case_id}, lesion {number}: lesion_id"
        caption = statement(
            Part("Lesion "), Part(str(number), (key,)), Part(f": {planes} through it, outlined.")
        )
        yield Picture(f"{number}.jpg", data, caption, f"Lesion {number} outlined in an {planes}")
    if not shown:
        data = montage_jpeg(
            scan, ids.array, window=window, point_mm=None, extent_mm=0.0, pixels=PIXELS
        )
        caption = statement(Part(f"The scan: {planes} through its middle."))
        yield Picture("scan.jpg", data, caption, f"The scan in an {planes}")


def _stored_picture(folder: ResultsFolder, record: CaseRecord[Any]) -> tuple[list[Picture], str]:
    """Return the picture that was made when the scan was there."""
    name = f"{THUMBNAILS}/{record.name}.jpg"
    if name not in record.files or not folder.is_own(name):
        return [], "There is no picture: the scan is not where it was, and none was made before."
    caption = statement(Part("The largest lesion in three planes, as the results have it."))
    data = (folder.path / name).read_bytes()
    return [Picture("scan.jpg", data, caption, "The largest lesion in three planes")], ""

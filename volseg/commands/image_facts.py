"""The facts and pictures of the report of an image, from the table of its results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from volseg.columns import json_values
from volseg.commands.class_reporting import read_class_table, run_of_images
from volseg.commands.image_sources import find_inputs, source_of
from volseg.commands.scan_facts import of_model, run_documents
from volseg.errors import VolsegError
from volseg.evaluation.class_rows import CLASSES, PROBABILITY, VALUES, ClassRow, ValueRow
from volseg.image_bundle import load_image_bundle
from volseg.io.csv_text import iterate_csv
from volseg.io.image_cases import ImageCase
from volseg.manuscript.case_report import CaseReport, Picture, row_document, statement
from volseg.manuscript.facts import Part
from volseg.manuscript.of_images import image_report, map_caption
from volseg.options import ReportOptions
from volseg.pages.class_page import thumbnail

HEIGHT = 300  # of the picture, in pixels
EXPLAIN = "explain.csv"  # of a folder with maps of what speaks for a class
RELIABLE = {"true": True, "false": False}  # cell → whether the method passed its checks


class ImageReports:
    """The reports of the images of a results folder."""

    def __init__(self, options: ReportOptions) -> None:
        out = options.results
        self._out, self._run = out, run_of_images(out)
        table = next((name for name in (CLASSES, VALUES) if (out / name).is_file()), CLASSES)
        self.tables = (table,)
        self._rows = {row.case_id: row for row in read_class_table(out / table)}
        self.names = sorted(self._rows)
        self._explained = [path for path in options.facts if (path / EXPLAIN).is_file()]
        others = [path for path in options.facts if path not in self._explained]
        self._documents, self.remarks = run_documents(out, others)
        self._images = _Images(self._run)

    def report(self, name: str) -> CaseReport:
        """Return the report of an image with its picture."""
        row = self._rows[name]
        content = json_values(row)
        del content["patient"]  # a table may name them
        if isinstance(row, ClassRow):
            del content["probabilities"]
            content |= {f"{PROBABILITY}{key}": p for key, p in (row.probabilities or {}).items()}
        image = row_document(self.tables[0], name, content)
        facts = of_model({**self._documents, "image": image}, row.model or "")
        report = image_report(facts)
        if row.status != "done":
            return replace(report, no_pictures="There is no picture of an image without a result.")
        pictures = [*self._images.pictures(name), *self._maps(row)]
        reason = "" if pictures else self._images.problem
        return replace(report, pictures=tuple(pictures), no_pictures=reason)

    def _maps(self, row: ClassRow | ValueRow) -> Iterator[Picture]:
        """Yield the maps of what speaks for the class of an image."""
        for folder in self._explained:
            for cells in _rows_of(folder / EXPLAIN, row.case_id, row.model or ""):
                method = cells["method"]
                path = folder / "maps" / f"{row.case_id}_{method}.png"
                if not method.isalpha() or not path.is_file():
                    continue
                content: dict[str, Any] = {
                    "is_reliable": RELIABLE.get(cells.get("is_reliable", "")),
                    **{name: cells.get(name) for name in ("method", "class_name", "doubt")},
                }
                facts = {"map": row_document(EXPLAIN, row.case_id, content, method)}
                alt = f"Map of what speaks for the class, by {method}"
                yield Picture(f"{method}.png", path.read_bytes(), map_caption(facts), alt)


def _rows_of(table: Path, case_id: str, model: str) -> Iterator[dict[str, str]]:
    """Yield the maps of an image by its model that show anything, as cells of explain.csv.

    Raises:
        VolsegError: the table cannot be read.
    """
    try:
        for cells in iterate_csv(table):
            is_done = cells["status"] == "done" and cells["is_empty"] != "true"
            if is_done and (cells["case_id"], cells["model"]) == (case_id, model):
                yield cells
    except (OSError, ValueError, KeyError) as error:
        raise VolsegError(
            f"{table}: cannot be read ({getattr(error, 'strerror', None) or error})",
            fix="run the same `volseg explain` again",
            code="E_ROW",
        ) from error


class _Images:
    """The images that run.json names, read when a report shows one."""

    def __init__(self, run: dict[str, Any]) -> None:
        self._cases, self.problem = (
            dict[str, ImageCase](),
            "There is no picture: the image is gone or cannot be read.",
        )
        try:
            scans = [Path(text) for text in run["settings"]["scans"]]
            recipe = load_image_bundle(Path(run["settings"]["model"])).recipe
            cases = find_inputs(recipe, scans)
        except (KeyError, TypeError, VolsegError):
            self.problem = "There is no picture: the images or the model are not where they were."
            return
        self._cases, self._source = {case.id: case for case in cases}, source_of(recipe)

    def pictures(self, name: str) -> list[Picture]:
        """Return the picture of an image; none if it cannot be read."""
        if name not in self._cases:
            return []
        try:
            data = thumbnail(self._source.picture(self._cases[name]).array, HEIGHT)
        except VolsegError:
            return []
        caption = statement(Part("The image, from its darkest to its brightest intensity."))
        return [Picture("image.jpg", data, caption, "The image")]

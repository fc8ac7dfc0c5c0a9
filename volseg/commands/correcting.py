"""`volseg measure` for a folder of `infer`: measure the masks that were corrected by hand."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from volseg.commands.batch import (
    CaseFiles,
    MeasuredCase,
    damaged_warnings,
    run_description,
    without_damaged,
    write_case,
)
from volseg.commands.dicom_results import DicomResults
from volseg.commands.jobs import Tally
from volseg.commands.mask_measurement import MaskSettings, measure_mask, refused_masks
from volseg.commands.pages import page_budget, read_run, write_report
from volseg.commands.placing import place_mask
from volseg.commands.remarks import remarks_on_scan
from volseg.errors import ScanError, VolsegError
from volseg.io.cases import Case
from volseg.io.series import like_scan
from volseg.io.volumes import read_mask
from volseg.measurement.rows import CaseRow
from volseg.options import MeasureOptions
from volseg.pages.about import About
from volseg.pages.model_box import read_model_box
from volseg.recipe import Measure, parse_unit
from volseg.reports import CasesReport
from volseg.store.outputs import SAME_KIND, Commit, folder_content
from volseg.store.records import LESION_IDS, PROBABILITIES, CaseRecord
from volseg.store.results import ResultsFolder, State

STAGE = "Measuring"


def measure_corrected(results: Path, options: MeasureOptions) -> CasesReport:
    """Measure the masks in a folder of `infer` that were changed by hand since they were measured.

    Later runs of `infer` do not replace a corrected mask.

    Raises:
        VolsegError: `results` is not a folder of `infer`.
    """
    started = time.monotonic()
    if folder_content(results) != SAME_KIND["infer"]:
        raise VolsegError(
            f"{results}: is not a results folder of infer",
            fix="give the --out folder of `volseg infer`, or --image and --mask",
            code="E_USAGE",
        )
    with ResultsFolder(results, "infer") as folder:
        about = read_run(results)
        report = _measure_again(folder, About.of(about), options)
        measured = run_description(options, {"figures": options.figures}, report, started)
        folder.write_run(about | {"measured_again": {"command": "measure"} | measured})
    return report


def _measure_again(folder: ResultsFolder, about: About, options: MeasureOptions) -> CasesReport:
    """Measure the corrected masks, and write the tables and report.html of the whole folder."""
    files, rows = CaseFiles((LESION_IDS,), options.figures, options.pages), folder.item_rows()
    masks = list(_corrected_masks(folder, rows, files))
    outputs = [path for mask in masks for path in files.names(mask.name)]
    folder.check_overwrites([*files.shared, *outputs])
    tally, warnings = Tally(folder, STAGE, options), []
    options.progress(STAGE, 0.0, f"{len(masks)} of {len(rows)} masks were changed by hand")
    try:
        cases, limit = _measurable(masks), options.max_ram
        tally.run(masks, refused_masks(cases, len(rows), limit, options.announce))
    finally:
        rows = folder.write_tables()
        if files.pages:
            budget = page_budget(options.max_ram, options.announce, has_run=bool(tally.done))
            warnings = write_report(folder, about, rows, budget=budget)
    corrected = {mask.name for mask in masks}
    complete = [row.case_id for row in rows if row.status == "done"]
    unchanged = [name for name in complete if name not in corrected]
    kept, failed = without_damaged(unchanged, tally.failed, rows)
    return CasesReport(
        out=folder.path,
        done=tally.done,
        kept=kept,
        failed=failed,
        warnings=[*tally.warnings, *warnings, *damaged_warnings(rows)],
        objects="components",
        pages=files.pages,
    )


def _corrected_masks(
    folder: ResultsFolder, rows: Sequence[CaseRow], files: CaseFiles
) -> Iterator[_CorrectedMask]:
    for row in rows:
        record = folder.record(row.case_id)
        if record is not None and folder.state_of(row.case_id, None) is State.EDITED:
            yield _CorrectedMask(folder.path, record, files)


def _measurable(masks: Sequence[_CorrectedMask]) -> Iterator[tuple[Case, Measure]]:
    """Yield the cases with a usable record; measuring reports the others."""
    for mask in masks:
        with contextlib.suppress(ScanError):
            case, settings = mask.case_and_settings()
            yield case, settings.measure


@dataclass(frozen=True, slots=True)
class _CorrectedMask:
    """A mask that was corrected by hand; its `record` is from before the correction."""

    results: Path
    record: CaseRecord[Any]
    files: CaseFiles

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def inputs(self) -> Sequence[str]:
        return self.record.inputs

    @property
    def _path(self) -> str:
        """Path of the mask in the folder."""
        return next(iter(self.record.masks))

    def failed_row(self, reason: str) -> CaseRow:
        """Return the row that says that the numbers are out of date."""
        return CaseRow(case_id=self.name, status="failed", reason=reason)

    def run(self, folder: ResultsFolder) -> list[str]:
        """Measure the mask, write its files and its record, and return its warnings.

        Raises:
            ScanError: the scan has changed since the mask was made, or the mask cannot be measured.
        """
        case, settings = self.case_and_settings()
        record, measured = self.record, measure_mask(case, settings)
        if measured.sha256[0] != record.source.sha256:
            raise ScanError(
                f"{case.images['image']}: has changed since the mask was made from it",
                fix="restore that scan, or measure the mask with --image, --mask and another --out",
                code="E_CHANGED",
            )
        model = record.case.model
        by_hand = (
            f"W_CORRECTED: the mask of {model} was corrected by hand, "
            "so there is no confidence and no class"
        )
        if any(name.startswith(f"{PROBABILITIES}/") for name in record.files):
            by_hand += f"; {PROBABILITIES}/ holds those of the model, from before the correction"
        dicom = DicomResults.again(record.files, self.results, model, settings)
        with folder.staged() as commit:
            notes = self._write_dicom(dicom, case, measured, commit) if dicom.folders else []
            measured = replace(measured, model=model, remarks=[*measured.remarks, by_hand, *notes])
            box = read_model_box(record.source.model_box)
            case_row = write_case(measured, self.files, commit, box)
            corrected = {self._path: measured.sha256[-1]}
            new = replace(record, case=case_row, lesions=measured.lesions, corrected=corrected)
            folder.commit(replace(new, failed=None, remark=""), commit, keep=PROBABILITIES)
        return remarks_on_scan(case_row)

    def _write_dicom(
        self, dicom: DicomResults, case: Case, measured: MeasuredCase, commit: Commit
    ) -> list[str]:
        """Write the DICOM files again from the corrected mask; return notes on them."""
        assert case.reference is not None
        scan = measured.lesions.scan.image
        names = {"mask_name": str(case.reference), "grid_name": str(case.images["image"])}
        mask = place_mask(read_mask(case.reference), scan.geometry, **names).mask
        return dicom.write(case.images["image"], mask, measured.lesions, commit)

    def case_and_settings(self) -> tuple[Case, MaskSettings]:
        """Return the mask with its scan, and how it is measured.

        Raises:
            ScanError: its record does not say how.
        """
        source = self.record.source
        needed = ("scan", "label_names", "unit", "remarks", "measure")
        missing = [item for item in needed if getattr(source, item) is None]
        try:
            if missing or source.scan is None or source.measure is None:
                raise ValueError(f"no valid {', '.join(missing)}")
            settings = MaskSettings(
                objects="components",
                label_names=source.label_names or {},
                intensity_unit=parse_unit(source.unit or ""),
                stated_by="the model",
                unit_doubt=source.unit_doubt or "",
                remarks=tuple(source.remarks or ()),
                measure=source.measure,
            )
        except ValueError as error:
            raise ScanError(
                f"{self.results}: the record of case {self.name!r} lacks measurement settings "
                f"({error})",
                fix="measure the mask with --image, --mask and another --out",
                code="E_RECORD",
            ) from error
        mask = like_scan(self.results / self._path, source.scan)
        return Case(self.name, {"image": source.scan}, reference=mask), settings

"""The comparison of one patient: files in, the rows of the patient and a picture out."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from volseg import __version__
from volseg.commands.batch import input_key
from volseg.commands.patients import Cases, Patient, TimePoints
from volseg.commands.remarks import remarks_on_patient
from volseg.commands.time_points import CaseAtTime
from volseg.comparison.changes import LesionChange, lesion_changes
from volseg.comparison.groups import ScanPair, centroids_mm
from volseg.comparison.label_names import agreed_names, names_in
from volseg.comparison.pairs import pair_scans, pairing_bytes, unpaired_scan
from volseg.comparison.placement import (
    Placement,
    place_by_headers,
    trusted_placement,
    worst_columns,
)
from volseg.comparison.response import PatientResponse, judge_response
from volseg.errors import ScanError
from volseg.execution.memory import Peak
from volseg.io.header import ScanHeader
from volseg.io.volumes import read_header
from volseg.measurement.sections import axial_normal
from volseg.options import CompareOptions
from volseg.pages.change_page import page_bytes
from volseg.preprocessing.register import register, registering_bytes
from volseg.store.comparisons import ComparisonFolder, PatientRecord
from volseg.store.outputs import Commit
from volseg.store.records import LESION_IDS, path_of, read_record
from volseg.store.results import VIEWERS

PICTURE_BYTES = 22  # per voxel of a drawn scan, including scaling
GRID_RATIO = 1.5  # of voxel sizes; above it, sizes of small lesions differ by the grid alone


@dataclass(frozen=True)
class PatientComparison:
    """A patient to compare.

    Args:
        inputs: SHA-256 of the patient's files at the start of the comparison.
    """

    patient: Patient
    times: TimePoints
    options: CompareOptions
    inputs: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.patient.name

    @property
    def picture(self) -> str:
        """Name of the picture's file."""
        return f"figures/{self.name}.png"

    @property
    def page(self) -> str:
        """Name of the file of the page."""
        return page_name(self.name)

    @property
    def has_page(self) -> bool:
        return self.options.pages and self.options.registration

    @property
    def key(self) -> str:
        """Hash of everything on which the rows of the patient depend."""
        names = ("registration", "max_distance_mm", "figures", "pages", "lymph_nodes")
        options = {name: getattr(self.options, name) for name in names}
        options |= {"patient": self.name, "scans": self.patient.scans}
        options |= {"rejected": rejected} if (rejected := self._rejected) else {}
        return input_key(options, self.inputs)

    @property
    def _rejected(self) -> list[list[Any]]:
        """The time, the case and the numbers of the lesions that a reader rejected."""
        return [
            [time_point.name, case, rejected]
            for cases in self.patient.scans
            for time_point, case in zip(self.times, cases, strict=True)
            if case is not None and (rejected := time_point.reviews.rejected(case))
        ]

    @cached_property
    def names(self) -> dict[int, str]:
        """Label names on which all scans of the patient that name the label agree."""
        return agreed_names(
            read_record(time_point.results, case).lesions
            for cases in self.patient.scans
            for time_point, case in zip(self.times, cases, strict=True)
            if case is not None
        )

    def peak(self, process: int) -> Peak:
        """Return the peak memory, from headers; `process`: bytes before the first patient.

        Raises:
            ScanError: the files cannot be read.
        """
        peaks = [self._peak_of(cases, process) for cases in self.patient.scans]
        return max(peaks, key=lambda peak: peak.total)

    def _peak_of(self, cases: Cases, process: int) -> Peak:
        """Return the peak memory of comparing two scans, or of handling one without a partner."""
        masks, scans, n_lesions = [], [], []
        for time_point, case in zip(self.times, cases, strict=True):
            if case is None:
                continue
            record = time_point.record(case)
            n_lesions.append(len(record.lesions))
            mask = read_header(path_of(time_point.results, case, record.files, LESION_IDS))
            # Without the rejected lesions, the others are numbered again in a copy.
            masks += [mask] * (2 if time_point.reviews.rejected(case) else 1)
            path = time_point.scan_path(record) if self._needs_scans else None
            scans += [] if path is None else [read_header(path)]
        work = {"lesions": pairing_bytes([mask.geometry.shape for mask in masks], n_lesions)}
        work |= self._work_on(scans) if len(scans) == 2 else {}
        largest = max(work, key=lambda name: work[name])
        # Reading a mask copies it.
        mask_bytes = sum(mask.mask_bytes for mask in masks) + max(mask.n_bytes for mask in masks)
        parts = {"process": process, "scans": _scan_bytes(scans), "masks": mask_bytes}
        return Peak(parts | {largest: work[largest]})

    def _work_on(self, scans: Sequence[ScanHeader]) -> dict[str, int]:
        """Return the bytes that each step takes that needs both scans."""
        n_before, n_after = (math.prod(scan.geometry.shape) for scan in scans)
        work = {}
        if self.options.registration:
            work["registration"] = registering_bytes(scans[0].geometry, scans[1].geometry)
        if self.options.figures:
            work["figure"] = PICTURE_BYTES * n_after
        if self.has_page:
            work["page"] = page_bytes(n_before, n_after)
        return work

    @property
    def _needs_scans(self) -> bool:
        return self.options.registration or self.options.figures

    def failed_row(self, reason: str) -> PatientResponse:
        """Return the row of the patient if the comparison failed."""
        return self.patient.row("failed", reason)

    def run(self, results: ComparisonFolder) -> list[str]:
        """Compare the patient, write the rows and the picture, and return the warnings.

        Raises:
            ScanError: the patient cannot be compared.
        """
        started = time.monotonic()
        compared = [self._compare(cases) for cases in self.patient.scans]
        pairs = [scans.pair for scans in compared]
        response = judge_response(pairs, patient=self.name, lymph_nodes=self._nodes)
        warnings = [
            text if len(pairs) == 1 else _of_scan(text, scans.pair)
            for scans in compared
            for text in scans.warnings
        ]
        response = replace(
            response,
            **worst_columns([scans.columns for scans in compared]),
            warnings="; ".join(filter(None, [*warnings, response.warnings])),
            seconds=round(time.monotonic() - started, 2),
            volseg_version=__version__,
        )
        with results.staged() as commit:
            self._write_pictures(compared, commit)
            rows = self._changes(pairs)
            record = PatientRecord(
                response=response, lesions=rows, key=self.key, inputs=self.inputs
            )
            results.commit(record, commit)
        return remarks_on_patient(response)

    def _write_pictures(self, compared: Sequence[_Compared], commit: Commit) -> None:
        """Write the picture of all pairs of scans, and the page of the first."""
        if pictures := [scans.picture for scans in compared if scans.picture]:
            from volseg.pages.comparison_figures import stack_pngs

            commit.write(self.picture, stack_pngs(pictures))
        if page := next((scans.page for scans in compared if scans.page), ""):
            commit.write(self.page, page)

    @property
    def _nodes(self) -> tuple[str, ...]:
        return self.options.lymph_nodes or ()

    def _changes(self, pairs: Sequence[ScanPair]) -> list[LesionChange]:
        return lesion_changes(pairs, patient=self.name, lymph_nodes=self._nodes)

    def _compare(self, cases: Cases) -> _Compared:
        """Compare a pair of scans, or handle a scan without a partner."""
        before, after = self._read(cases)
        if before is None or after is None:
            return _without_partner(before, after)
        placed = self._place(before, after)
        pair = pair_scans(
            before.measured,
            after.measured,
            transform=placed.transform,
            doubt=placed.doubt,
            max_distance_mm=self.options.max_distance_mm,
        )
        warnings = [*placed.warnings, *_differences(before, after), *_unit_warnings(before, after)]
        warnings += _rejections(before, after)
        if self._needs_scans:
            warnings += [side.change for side in (before, after) if side.change]
        try:
            picture = self._picture(before, after, placed, pair)
        except ScanError as error:
            if self.options.registration:
                raise
            picture = None
            warnings.append(f"W_FIGURE: no picture: {error.problem}")
        has_lesions = bool(before.lesions or after.lesions)  # without any, no scan is needed
        page = self._page(before, after, placed, pair) if self.has_page and has_lesions else ""
        return _Compared(pair, placed.columns, warnings, picture, page)

    def _read(self, cases: Cases) -> tuple[CaseAtTime | None, CaseAtTime | None]:
        """Read both cases; a label without a name has that of the other time, else of any scan."""
        before, after = (
            None if case is None else time_point.read(case, self.inputs)
            for time_point, case in zip(self.times, cases, strict=True)
        )
        names = dict(self.names)
        for side in (before, after):
            names |= {} if side is None else names_in(side.lesions)
        return before and before.with_names(names), after and after.with_names(names)

    def _place(self, before: CaseAtTime, after: CaseAtTime) -> Placement:
        if not before.lesions and not after.lesions:
            return Placement()
        if not self.options.registration:
            return place_by_headers(before.ids.geometry, after.ids.geometry)
        if before.is_same_scan(after):
            return Placement(columns={"registration": "identical"})
        registration = register(before.scan, after.scan)
        back = registration.transform.inverse()
        points_mm = [centroids_mm(before.lesions), back.apply(centroids_mm(after.lesions))]
        normal = axial_normal(before.ids.geometry)
        return trusted_placement(registration, np.concatenate(points_mm), normal=normal)

    def _picture(
        self, before: CaseAtTime, after: CaseAtTime, placed: Placement, pair: ScanPair
    ) -> bytes | None:
        if not self.options.figures:
            return None
        from volseg.pages.comparison_figures import change_png

        title = self.name
        if len(self.patient.scans) > 1:
            title += f", {pair.baseline.case} → {pair.followup.case}"
        scans, ids = (before.scan, after.scan), (before.ids.array, after.ids.array)
        return change_png(scans, ids, placed.transform, self._changes([pair]), title=title)

    def _page(
        self, before: CaseAtTime, after: CaseAtTime, placed: Placement, pair: ScanPair
    ) -> str:
        from volseg.pages.change_page import TwoScans, change_page_html

        units = {lesion.intensity_unit for side in (before, after) for lesion in side.lesions}
        is_doubted = before.unit_doubt or after.unit_doubt
        two = TwoScans(
            names=(before.record.case.case_id, after.record.case.case_id),
            scans=(before.scan, after.scan),
            ids=(before.ids.array, after.ids.array),
            transform=placed.transform,
            unit=(units.pop() or "") if len(units) == 1 and not is_doubted else "",
        )
        return change_page_html(two, self._changes([pair]), patient=self.name)


@dataclass(frozen=True, slots=True, eq=False)
class _Compared:
    """Comparison of two scans: pair, registration `columns`, warnings, PNG `picture` and page."""

    pair: ScanPair
    columns: Mapping[str, Any]
    warnings: Sequence[str]
    picture: bytes | None = None
    page: str = ""


def _without_partner(before: CaseAtTime | None, after: CaseAtTime | None) -> _Compared:
    """Return the comparison of a scan of one time with no other."""
    pair = unpaired_scan(before and before.measured, after and after.measured)
    other = "follow-up" if after is None else "baseline"
    warning = f"W_UNPAIRED: there is no {other} scan of what it shows"
    warnings = [warning, *_unit_warnings(before, after), *_rejections(before, after)]
    return _Compared(pair, {}, warnings)


def _rejections(*sides: CaseAtTime | None) -> list[str]:
    """Return a warning for each side of which a reader rejected lesions."""
    return [side.rejection for side in sides if side is not None and side.rejection]


def page_name(patient: str) -> str:
    return f"{VIEWERS}/{patient}.html"


def _scan_bytes(scans: Sequence[ScanHeader]) -> int:
    """Return the bytes of scans in memory, and of the copy of one whose NaN are filled."""
    with_nan = [scan for scan in scans if scan.dtype.kind == "f"]
    copies = (scan.n_bytes + math.prod(scan.geometry.shape) for scan in with_nan)
    return sum(scan.n_bytes for scan in scans) + max(copies, default=0)


def _of_scan(warning: str, pair: ScanPair) -> str:
    """Add the scan to a warning."""
    code, sentence = warning.split(": ", 1)
    return f"{code}: {pair.followup.case or pair.baseline.case}: {sentence}"


def _unit_warnings(*sides: CaseAtTime | None) -> list[str]:
    return [
        f"W_UNIT: the unit at {side.time.name} was in doubt when it was measured "
        f"({side.unit_doubt}), so no intensity is compared"
        for side in sides
        if side is not None and side.unit_doubt
    ]


def _differences(before: CaseAtTime, after: CaseAtTime) -> list[str]:
    """Return warnings about differences in model and grid, which are no change of the patient."""
    warnings = []
    models = [side.record.case.model or "no model" for side in (before, after)]
    if models[0] != models[1]:
        warnings.append(
            f"W_MODEL: the masks come from different sources ({models[0]}; {models[1]}), which "
            "alone can cause a difference"
        )
    sizes = [sorted(side.ids.geometry.spacing_mm) for side in (before, after)]
    if any(max(a, b) > GRID_RATIO * min(a, b) for a, b in zip(*sizes, strict=True)):
        texts = [" × ".join(f"{mm:.2g}" for mm in size) for size in sizes]
        warnings.append(
            f"W_GRID: voxels of {texts[0]} mm and {texts[1]} mm: "
            "small lesions differ in size by that alone"
        )
    return warnings

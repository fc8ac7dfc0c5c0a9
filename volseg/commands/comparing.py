"""`volseg compare`: match the lesions of two time points and judge the response of each patient."""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from volseg import __version__
from volseg.columns import json_values
from volseg.commands.batch import (
    check_pair,
    damaged_warnings,
    digest_of,
    failure_reason,
    input_key,
    run_description,
    without_damaged,
)
from volseg.commands.patients import Patient, read_pairs, same_ids
from volseg.errors import ScanError, VolsegError
from volseg.execution.local import run
from volseg.execution.memory import Budget, Peak
from volseg.inputs import read_json, shorten
from volseg.io.files import sha256_of
from volseg.io.nifti import read_mask, read_volume
from volseg.io.nifti_header import NiftiHeader, read_header
from volseg.measurement.changes import ScanPair, centroids_mm, lesion_changes
from volseg.measurement.pairs import MeasuredScan, pair_scans, pairing_bytes, unpaired_scan
from volseg.measurement.response import PatientResponse, judge_response
from volseg.measurement.rows import LesionMeasurement
from volseg.measurement.sections import axial_normal
from volseg.measurement.specks import SPECKS
from volseg.measurement.units import unit_doubt_in
from volseg.options import CompareOptions, command
from volseg.pages.about import About
from volseg.pages.comparison_page import comparison_html
from volseg.postprocessing.lesions import MANY
from volseg.preprocessing.align import covered
from volseg.preprocessing.register import (
    Registration,
    register,
    registering_bytes,
    transform_points,
)
from volseg.reports import CompareReport
from volseg.store.comparisons import ComparisonFolder, PatientRecord
from volseg.store.records import (
    LESION_IDS,
    CaseRecord,
    case_ids,
    file_of,
    path_of,
    read_record,
    record_files,
)
from volseg.volume import Geometry, Volume

STAGE, TIMES = "Comparing", ("baseline", "follow-up")
PICTURE_BYTES = 22  # per voxel of a drawn scan, including scaling
# Usual limits for a patient on the table; larger values may be right, but need a check by eye.
MAX_MOVED_MM, MAX_TURNED_DEG = 50.0, 20.0
MAX_ERROR_MM = 3.0  # between registration in one direction and the other
MAX_TILT_ERROR_DEG = 5.0  # of the axial plane: long axes may be 16 % off (docs/benchmarks.md)
SAME_PLACE_MM = 2.0  # registration that moves less agrees with the headers
# Options that run.json repeats.
RESULT_SETTINGS = (
    "registration",
    "max_distance_mm",
    "lymph_nodes",
    "figures",
    "baseline_scans",
    "followup_scans",
)
GRID_RATIO = 1.5  # of voxel sizes; above it, sizes of small lesions differ by the grid alone


@command(CompareOptions)
def compare(options: CompareOptions) -> CompareReport:
    """Compare the lesions of each patient at two time points: comparison.csv and response.csv.

    Raises:
        VolsegError: the request is wrong. A patient who cannot be compared becomes a failed row
            instead, and a patient without a pair of scans an `unpaired` row.
    """
    started = time.monotonic()
    for folder in _scan_folders(options):
        if folder is not None and not folder.is_dir():
            raise VolsegError(
                f"{folder}: is not a folder", fix="give the folder of the scans", code="E_USAGE"
            )
    budget = Budget(
        options.max_ram,
        options.announce,
        what="comparing these scans",
        otherwise="crop the scans and masks to the region that matters and measure them again",
    )
    folders, out, pairs = (options.baseline, options.followup), options.out, options.pairs
    nodes = options.lymph_nodes
    nodes = _measured_nodes(folders) if nodes is None else nodes
    settings = replace(options, lymph_nodes=tuple(sorted(set(nodes))))
    ids = (case_ids(folders[0]), case_ids(folders[1]))
    if out.resolve() in {folder.resolve() for folder in folders}:
        raise VolsegError(
            f"{out}: holds the results to compare",
            fix="give another folder to --out",
            code="E_EXISTS",
        )
    patients = same_ids(folders, ids) if pairs is None else read_pairs(pairs, folders, ids)
    names = (*RESULT_SETTINGS, "baseline", "followup", "pairs")
    described = {name: _plain(getattr(settings, name)) for name in names}
    not_listed = {
        time_: sorted(
            {*ids[side]} - {scans[side] for patient in patients for scans in patient.scans}
        )
        for side, time_ in enumerate(("baseline", "followup"))
    }
    used = [path for path in (*folders, *_scan_folders(options), pairs) if path is not None]
    with ComparisonFolder(out, "compare", inputs=used) as results:
        report = _run_patients(patients, folders, settings, results, budget)
        report = replace(report, not_listed=not_listed)
        left_out = {"unpaired": report.unpaired, "not_listed": not_listed}
        results.write_run(
            {"command": "compare"} | run_description(options, described, report, started) | left_out
        )
    return report


def _scan_folders(options: CompareOptions) -> tuple[Path | None, Path | None]:
    return options.baseline_scans, options.followup_scans


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _measured_nodes(folders: tuple[Path, Path]) -> Iterator[str]:
    """Yield the labels measured as lymph nodes, according to the run.json of either folder."""
    for folder in folders:
        try:
            content = read_json(folder / "run.json")
            settings = content.get("measure") or content["options"].get("measure") or {}
            yield from map(str, settings.get("lymph_nodes") or ())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # an interrupted run has none; W_NODE warns of labels that sound like nodes


# ---- the loop


_Folders = tuple[Path, Path]  # baseline, follow-up


def _run_patients(
    patients: Sequence[Patient],
    folders: _Folders,
    settings: CompareOptions,
    results: ComparisonFolder,
    budget: Budget,
) -> CompareReport:
    unpaired = {
        patient.name: PatientResponse(
            **patient.cells, status="unpaired", reason=patient.why_unpaired(folders)
        )
        for patient in patients
        if not patient.is_paired
    }
    inputs: dict[str, tuple[str, ...]] = {}
    refusals: dict[str, VolsegError] = {}
    keys: dict[str, str] = {}
    paired = [patient for patient in patients if patient.is_paired]
    for outcome in run(lambda patient: _inputs(patient, folders, settings), paired):
        name = outcome.item.name
        inputs[name] = outcome.value or ()
        keys[name] = _key(outcome.item, inputs[name], settings)
        refusals |= {} if outcome.error is None else {name: outcome.error}
    kept = [name for name in keys if results.is_complete(name, keys[name])]
    to_compare = keys.keys() - kept
    todo = [patient for patient in patients if patient.name in to_compare]
    pictures = [f"figures/{patient.name}.png" for patient in todo] if settings.figures else []
    results.refuse_foreign(["comparison.csv", "response.csv", "report.html", "run.json", *pictures])
    for row in unpaired.values():
        results.commit_failure(row, ())
    for name in kept:
        results.clear_failure(name)

    refusals |= budget.refused(_peaks(todo, folders, settings, budget.process))

    def task(patient: Patient) -> None:
        name = patient.name
        if name in refusals:
            raise refusals[name]
        _compare_patient(patient, folders, settings, results, keys[name], inputs[name])

    done, failed, progress = [], {}, settings.progress
    progress(STAGE, 0.0, f"{len(todo)} of {len(patients)} to do")
    try:
        for count, outcome in enumerate(run(task, todo), start=1):
            patient = outcome.item
            if outcome.error is None:
                done.append(patient.name)
            else:
                failed[patient.name] = failure_reason(results, patient.name, outcome.error)
                row = PatientResponse(**patient.cells, status="failed", reason=failed[patient.name])
                results.commit_failure(row, inputs[patient.name])
            progress(STAGE, count / len(todo), patient.name)
    finally:
        reached = {*unpaired, *kept, *done, *failed}
        pending = [
            PatientResponse(**patient.cells, status="pending", reason="not reached yet")
            for patient in patients
            if patient.name not in reached
        ]
        all_rows = results.write_tables(pending)
        lesions = results.lesion_rows(all_rows, set())
        results.write("report.html", comparison_html(About.now("compare"), all_rows, lesions))
    kept, failed = without_damaged(kept, failed, all_rows, "patient")
    row_of = {row.patient: row for row in all_rows}
    rows = [row_of[patient.name] for patient in patients]
    warnings = [f"{row.patient}: {row.warnings}" for row in rows if row.warnings]
    warnings += damaged_warnings(all_rows, "patient")
    if others := sorted(row_of.keys() - {patient.name for patient in patients}):
        names = ", ".join([*map(shorten, others[:3]), *(["…"] if len(others) > 3 else [])])
        warnings.append(
            f"W_STALE: the tables also hold {len(others)} patients of earlier runs ({names}); "
            "give another --out for tables without them"
        )
    return CompareReport(
        out=results.path,
        done=done,
        kept=kept,
        failed=failed,
        warnings=warnings,
        patients=[json_values(row) for row in rows],
        unpaired={name: row.reason for name, row in unpaired.items()},
    )


def _peaks(
    patients: Sequence[Patient], folders: _Folders, settings: CompareOptions, process: int
) -> dict[str, Peak]:
    """Return the peak memory of comparing each patient, from headers.

    Patients with unreadable headers are left out; comparing them raises the error.
    """

    def largest(patient: Patient) -> Peak:
        peaks = [_peak(pair, folders, settings, process) for pair in patient.scans]
        return max(peaks, key=lambda peak: peak.total)

    outcomes = run(largest, patients)
    return {outcome.item.name: outcome.value for outcome in outcomes if outcome.value is not None}


def _peak(
    cases: tuple[str | None, str | None], folders: _Folders, settings: CompareOptions, process: int
) -> Peak:
    """Return the peak memory of comparing two scans, or of handling a scan without a partner.

    Raises:
        ScanError: the files cannot be read.
    """
    masks, scans, n_lesions = [], [], []
    for time_, case, folder, scan_folder in zip(
        TIMES, cases, folders, _scan_folders(settings), strict=True
    ):
        if case is None:
            continue
        record = _read_usable(time_, folder, case)
        n_lesions.append(len(record.lesions))
        masks.append(read_header(path_of(folder, case, record.files, LESION_IDS)))
        needs_scan = settings.registration or settings.figures
        path = _scan_path(record, scan_folder) if needs_scan else None
        scans += [] if path is None else [read_header(path)]
    work = {"lesions": pairing_bytes([mask.geometry.shape for mask in masks], n_lesions)}
    if len(scans) == 2 and settings.registration:
        work["registration"] = registering_bytes(scans[0].geometry, scans[1].geometry)
    if len(scans) == 2 and settings.figures:
        work["figure"] = PICTURE_BYTES * math.prod(scans[1].geometry.shape)
    largest = max(work, key=lambda name: work[name])
    # Filling NaN copies a scan, reading copies a mask.
    scan_bytes = sum(scan.n_bytes for scan in scans) + max(map(_filled_bytes, scans), default=0)
    mask_bytes = sum(mask.mask_bytes for mask in masks) + max(mask.n_bytes for mask in masks)
    return Peak(
        {"process": process, "scans": scan_bytes, "masks": mask_bytes, largest: work[largest]}
    )


def _filled_bytes(scan: NiftiHeader) -> int:
    return scan.n_bytes + math.prod(scan.geometry.shape) if scan.dtype.kind == "f" else 0


def _inputs(patient: Patient, folders: _Folders, settings: CompareOptions) -> tuple[str, ...]:
    """Return the SHA-256 of all files on which the rows of a patient depend."""
    digests: list[str] = []
    for pair in patient.scans:
        for case, folder, scans in zip(pair, folders, _scan_folders(settings), strict=True):
            if case is None:
                continue
            digests += [_file_digest(path) for path in record_files(folder, case)]
            try:
                record = read_record(folder, case)
                digests += [_file_digest(folder / mask) for mask in record.masks]
                path = _scan_path(record, scans)
                digests.append("none" if path is None else digest_of(path))
            except ScanError as error:
                digests.append(str(error))  # raised again when the patient is compared
    return tuple(digests)


def _file_digest(path: Path) -> str:
    return sha256_of(path) if path.is_file() else str(path)


def _key(patient: Patient, inputs: Sequence[str], settings: CompareOptions) -> str:
    """Return a hash of everything on which the rows of a patient depend."""
    options = {"registration": settings.registration, "max_distance_mm": settings.max_distance_mm}
    options |= {"figures": settings.figures, "lymph_nodes": settings.lymph_nodes}
    return input_key(options | {"patient": patient.name, "scans": patient.scans}, inputs)


# ---- one patient


@dataclass(frozen=True, eq=False)
class _Side:
    """A time point of a patient: measurements, and the scan, which is read on first access.

    Args:
        inputs: SHA-256 of the patient's files at the start of the comparison.
    """

    time: str
    folder: Path
    record: CaseRecord
    ids: Volume
    scans: Path | None
    inputs: Sequence[str]

    @property
    def lesions(self) -> Sequence[LesionMeasurement]:
        return self.record.lesions

    @property
    def unit_doubt(self) -> str:
        return unit_doubt_in(self.record.case.warnings)

    @property
    def measured(self) -> MeasuredScan:
        return MeasuredScan(self.record.case.case_id, self.ids, self.lesions)

    @property
    def path(self) -> Path:
        """Path of the scan file.

        Raises:
            ScanError: the file was not found.
        """
        path = _scan_path(self.record, self.scans)
        if path is None:
            name = self.record.source.scan or self.record.case.image or "its scan"
            option = f"--{self.time.replace('-', '')}-scans"
            raise ScanError(
                f"the {self.time} scan of case {self.record.case.case_id!r} was not found: {name}",
                fix=f"give its folder to {option}, or --no-registration if both scans have the "
                "same world coordinates",
                code="E_MISSING",
            )
        return path

    @cached_property
    def scan(self) -> Volume:
        scan = read_volume(self.path, is_finite=False)  # as in measuring
        _check_unchanged(self.path, scan.sha256 or digest_of(self.path), self.inputs)
        lesions = f"the lesions of case {self.record.case.case_id!r}"
        check_pair(scan, self.ids, str(self.path), lesions)
        finite = np.isfinite(scan.array) if scan.array.dtype.kind == "f" else np.ones(1, bool)
        if finite.all():
            return scan
        # For registration, fill NaN with the lowest intensity.
        return replace(scan, array=np.where(finite, scan.array, scan.array[finite].min(initial=0)))

    @cached_property
    def digest(self) -> str:
        return self.scan.sha256 or digest_of(self.path)

    @property
    def change(self) -> str:
        """Warning if the scan file differs from the one measured; empty without a file."""
        sha256 = self.record.source.sha256
        if sha256 is None or _scan_path(self.record, self.scans) is None or sha256 == self.digest:
            return ""
        return (
            f"W_SCAN: the {self.time} scan {self.path.name} is not the file that was measured, "
            "or was rewritten since"
        )


def _compare_patient(
    patient: Patient,
    folders: _Folders,
    settings: CompareOptions,
    results: ComparisonFolder,
    key: str,
    inputs: Sequence[str],
) -> None:
    started = time.monotonic()
    names = _shared_names(patient, folders)
    compared = [
        _compare_scans(cases, folders, settings, patient, names, inputs) for cases in patient.scans
    ]
    pairs = [scans.pair for scans in compared]
    rows = lesion_changes(pairs, patient=patient.name, lymph_nodes=settings.lymph_nodes or ())
    response = judge_response(pairs, patient=patient.name, lymph_nodes=settings.lymph_nodes or ())
    warnings = [_of_scan(text, scans.pair, pairs) for scans in compared for text in scans.warnings]
    warnings += [response.warnings] if response.warnings else []
    response = replace(
        response,
        **_worst([scans.columns for scans in compared]),
        warnings="; ".join(warnings),
        seconds=round(time.monotonic() - started, 2),
        volseg_version=__version__,
    )
    with results.staged() as commit:
        if pictures := [scans.picture for scans in compared if scans.picture]:
            from volseg.pages.comparison_figures import stack_pngs

            commit.write(f"figures/{patient.name}.png", stack_pngs(pictures))
        record = PatientRecord(response=response, lesions=rows, key=key, inputs=inputs)
        results.commit(record, commit)


@dataclass(frozen=True, slots=True, eq=False)
class _Compared:
    """Comparison of two scans: their pair, registration `columns`, warnings and PNG `picture`."""

    pair: ScanPair
    columns: Mapping[str, Any]
    warnings: Sequence[str]
    picture: bytes | None = None


def _compare_scans(
    cases: tuple[str | None, str | None],
    folders: _Folders,
    settings: CompareOptions,
    patient: Patient,
    names: Mapping[int, str],
    inputs: Sequence[str],
) -> _Compared:
    """Compare one pair of scans; `names` supplies label names missing from both scans."""
    sides = (
        None if case is None else _read_side(time_, folder, case, scans, inputs)
        for time_, folder, case, scans in zip(
            TIMES, folders, cases, _scan_folders(settings), strict=True
        )
    )
    before, after = _named_alike(*sides, names=names)
    doubts = (before.unit_doubt if before else "", after.unit_doubt if after else "")
    in_doubt = [
        f"W_UNIT: the unit at {time_} is in doubt ({doubt}), so no intensity is compared"
        for time_, doubt in zip(TIMES, doubts, strict=True)
        if doubt
    ]
    if before is None or after is None:
        return _alone(before, after, doubts, in_doubt)
    placed = _place(before, after, settings)
    pair = pair_scans(
        before.measured,
        after.measured,
        moved=placed.transform,
        doubt=placed.doubt,
        max_distance_mm=settings.max_distance_mm,
    )
    pair = replace(pair, unit_doubts=doubts)
    warnings = [*placed.warnings, *_differences(before, after), *in_doubt]
    if settings.registration or settings.figures:
        warnings += [side.change for side in (before, after) if side.change]
    picture = None
    if settings.figures:
        from volseg.pages.comparison_figures import change_png

        title = patient.name
        if len(patient.scans) > 1:
            title += f", {cases[0]} → {cases[1]}"
        rows = lesion_changes([pair], patient=patient.name, lymph_nodes=settings.lymph_nodes or ())
        try:
            ids = (before.ids.array, after.ids.array)
            picture = change_png(
                (before.scan, after.scan), ids, placed.transform, rows, title=title
            )
        except ScanError as error:
            if settings.registration:
                raise
            warnings.append(f"W_FIGURE: no picture: {error.problem}")
    return _Compared(pair, placed.columns, warnings, picture)


def _alone(
    before: _Side | None, after: _Side | None, unit_doubts: tuple[str, str], warnings: Sequence[str]
) -> _Compared:
    """Handle a region scanned at one time only: all its lesions lie outside the other scan."""
    pair = unpaired_scan(before and before.measured, after and after.measured)
    pair = replace(pair, unit_doubts=unit_doubts)
    other = "follow-up" if after is None else "baseline"
    warning = f"W_UNPAIRED: there is no {other} scan of what it shows"
    return _Compared(pair, {}, [warning, *warnings])


def _of_scan(text: str, pair: ScanPair, pairs: Sequence[ScanPair]) -> str:
    """Add the scan to a warning if there are several pairs."""
    if len(pairs) == 1:
        return text
    code, sentence = text.split(": ", 1)
    return f"{code}: {pair.followup_case or pair.baseline_case}: {sentence}"


_WORST = {
    "moved_mm": max,
    "turned_deg": max,
    "registration_error_mm": max,
    "similarity_before": min,
    "similarity_after": min,
}


def _worst(columns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the worst registration columns of several pairs; None where a value is unknown."""
    if len(columns) == 1:
        return dict(columns[0])
    placed = [cells for cells in columns if cells]
    if not placed:
        return {}
    registrations = ";".join(cells.get("registration", "") for cells in columns)
    result: dict[str, Any] = {"registration": registrations}
    for name, worst in _WORST.items():
        values = [cells[name] for cells in placed if name in cells]
        result[name] = worst(values) if values and None not in values else None
    return result


def _check_unchanged(path: Path, digest: str, inputs: Sequence[str]) -> None:
    """Check that a file did not change since the comparison began.

    Raises:
        ScanError: its digest is not among `inputs`.
    """
    if digest not in inputs:
        raise ScanError(
            f"{path}: was replaced while it was being compared", fix="run again", code="E_CHANGED"
        )


def _read_side(
    time_: str, folder: Path, case: str, scans: Path | None, inputs: Sequence[str]
) -> _Side:
    for path in record_files(folder, case):
        _check_unchanged(path, _file_digest(path), inputs)
    record = _read_usable(time_, folder, case)
    _check_measured(folder, record)
    lesions = sorted(record.lesions, key=lambda lesion: lesion.lesion_id)
    path = file_of(folder, case, record.files, LESION_IDS)
    ids = read_mask(path, max_labels=len(lesions) + 1000)
    if [lesion.lesion_id for lesion in lesions] != list(range(1, int(ids.array.max()) + 1)):
        raise ScanError(
            f"{path}: has {ids.array.max()} lesions, but the record of case {case!r} has "
            f"{len(lesions)}",
            fix="rerun the command that made the folder",
            code="E_RECORD",
        )
    return _Side(time_, folder, replace(record, lesions=lesions), ids, scans, inputs)


def _check_measured(folder: Path, record: CaseRecord) -> None:
    """Check that the mask of a case was not corrected by hand since it was measured.

    Raises:
        ScanError: it was (`E_EDITED`).
    """
    for name, digest in record.masks.items():
        if (folder / name).is_file() and sha256_of(folder / name) != digest:
            raise ScanError(
                f"{folder / name}: was changed by hand after it was measured",
                fix=f"run `volseg measure {folder}` first",
                code="E_EDITED",
            )


def _read_usable(time_: str, folder: Path, case: str) -> CaseRecord:
    """Read the record of a measured case.

    Raises:
        ScanError: the case was not measured, or its mask looks like noise.
    """
    record = read_record(folder, case)
    if record.case.status != "done":
        reason = record.case.reason or "no reason given"
        raise ScanError(
            f"the {time_} case {case!r} is {record.case.status}: {reason}",
            fix="repair it and rerun the command that made the folder",
            code="E_RECORD",
        )
    n_lesions = record.case.n_lesions or 0
    if n_lesions > MANY or f"{SPECKS}: " in (record.case.warnings or ""):
        raise ScanError(
            f"the {time_} case {case!r} has {n_lesions:,} lesions: its mask looks like noise",
            fix="correct the mask and measure it again; noise has no response",
            code="E_SPECKS",
        )
    return record


def _shared_names(patient: Patient, folders: _Folders) -> dict[int, str]:
    """Return label names on which all scans of the patient that name the label agree."""
    names: dict[int, set[str]] = defaultdict(set)
    for cases in patient.scans:
        for case, folder in zip(cases, folders, strict=True):
            if case is not None:
                for label, name in _names(read_record(folder, case).lesions).items():
                    names[label].add(name)
    return {label: options.pop() for label, options in names.items() if len(options) == 1}


def _names(lesions: Sequence[LesionMeasurement]) -> dict[int, str]:
    named = ((lesion.label, lesion.label_name) for lesion in lesions)
    return {label: name for label, name in named if name and name != f"label_{label}"}


def _named_alike(
    before: _Side | None, after: _Side | None, *, names: Mapping[int, str]
) -> tuple[_Side | None, _Side | None]:
    """Name unnamed labels as at the other time point, else as in `names` of the patient's scans."""
    all_names = dict(names)
    for side in (before, after):
        all_names |= {} if side is None else _names(side.lesions)
    return before and _renamed(before, all_names), after and _renamed(after, all_names)


def _renamed(side: _Side, names: Mapping[int, str]) -> _Side:
    lesions = [_named(lesion, names) for lesion in side.lesions]
    return replace(side, record=replace(side.record, lesions=lesions))


def _named(lesion: LesionMeasurement, names: Mapping[int, str]) -> LesionMeasurement:
    if lesion.label_name not in (None, f"label_{lesion.label}"):
        return lesion
    return replace(lesion, label_name=names.get(lesion.label, lesion.label_name))


def _scan_path(record: CaseRecord, scans: Path | None) -> Path | None:
    """Find the file of a scan by name in the folder, else at the recorded path; None if in neither.

    Raises:
        ScanError: the folder has several files of this name.
    """
    name = Path(record.case.image or "").name  # an untrusted record may name a path
    if scans is not None and name:
        paths = [scans / name]
        if not os.path.isfile(paths[0]):
            paths = sorted(
                Path(folder, name) for folder, _, files in os.walk(scans) if name in files
            )
        if len(paths) > 1:
            raise ScanError(
                f"{scans}: has {len(paths)} files {name!r}, such as {paths[0]} and {paths[1]}",
                fix="give the folder of the right one",
                code="E_MISSING",
            )
        if paths:
            return paths[0]
    path = record.source.scan
    return path if path is not None and os.path.isfile(path) else None


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Transform between the two scans, with its columns and warnings.

    Args:
        transform: (4, 4) in RAS mm, from the earlier to the later scan.
        doubt: why lesions matched by it cannot be trusted; empty if they can.
    """

    transform: np.ndarray
    columns: Mapping[str, Any]
    warnings: Sequence[str] = ()
    doubt: str = ""


def _place(before: _Side, after: _Side, settings: CompareOptions) -> Placement:
    if not before.lesions and not after.lesions:
        return Placement(np.eye(4), {})
    if not settings.registration:
        return _place_by_headers(before.ids.geometry, after.ids.geometry)
    if _are_identical(before, after):
        return Placement(np.eye(4), {"registration": "identical"})
    registration = register(before.scan, after.scan)
    back = np.linalg.inv(registration.moved)
    points_mm = [centroids_mm(before.lesions), transform_points(back, centroids_mm(after.lesions))]
    normal = axial_normal(before.ids.geometry)
    return trusted_placement(registration, np.concatenate(points_mm), normal=normal)


def _place_by_headers(before: Geometry, after: Geometry) -> Placement:
    identity, columns = np.eye(4), {"registration": "none"}
    if covered(before, after, identity) or covered(after, before, identity):
        return Placement(identity, columns)
    doubt = "the two scans nowhere overlap in world coordinates"
    warnings = [f"W_APART: {doubt}, so no lesion could be matched"]
    return Placement(identity, columns, warnings, f"{doubt}: compare without --no-registration")


def trusted_placement(
    registration: Registration, points_mm: np.ndarray, *, normal: np.ndarray | None = None
) -> Placement:
    """Judge a registration at the lesions; return the identity if it did not improve similarity.

    Args:
        points_mm: (N, 3) lesion centroids in the earlier scan, RAS mm, N ≥ 1.
        normal: (3,) normal of the earlier scan's axial slices, in which diameters are measured;
            None for the S axis.
    """
    shift_mm = float(registration.shift_mm(points_mm).max())
    disagreement_mm = registration.disagreement_mm(points_mm)
    error_mm = None if disagreement_mm is None else float(disagreement_mm.max())
    similarity = {
        "similarity_before": registration.similarity_before,
        "similarity_after": registration.similarity_after,
    }
    warnings, doubt = [], ""
    if not registration.is_better:
        if shift_mm > SAME_PLACE_MM:
            doubt = "the scans are nowhere more alike than where their headers place them"
            warnings.append(f"W_REGISTRATION: {doubt}, so world coordinates were taken as they are")
        columns = {"registration": "none", "moved_mm": 0.0, "turned_deg": 0.0} | similarity
        return Placement(np.eye(4), columns, warnings, _no_response(doubt))
    rotation_deg = registration.turned_deg
    if shift_mm > MAX_MOVED_MM or rotation_deg > MAX_TURNED_DEG:
        warnings.append(
            f"W_MOVED: registration moved a lesion by {shift_mm:.0f} mm and turned the scan by "
            f"{rotation_deg:.0f}°, over {MAX_MOVED_MM:.0f} mm or {MAX_TURNED_DEG:.0f}°: "
            "look at the picture"
        )
    if error_mm is None:
        doubt = "registration worked in one direction only"
    elif error_mm > MAX_ERROR_MM:
        doubt = f"registration is uncertain by {error_mm:.1f} mm"
    if doubt:
        warnings.append(f"W_REGISTRATION: {doubt}, so lesions may have been matched wrongly")
    normal = np.array([0.0, 0.0, 1.0]) if normal is None else normal
    tilt_deg = registration.plane_disagreement_deg(normal)
    if not doubt and tilt_deg is not None and tilt_deg > MAX_TILT_ERROR_DEG:
        doubt = f"registration is uncertain by {tilt_deg:.0f}° about the axial plane"
        warnings.append(
            f"W_REGISTRATION: {doubt}, so diameters may have been taken in another plane"
        )
    columns = {"registration": "rigid", "moved_mm": shift_mm, "turned_deg": rotation_deg}
    columns |= {"registration_error_mm": error_mm} | similarity
    return Placement(registration.moved, columns, warnings, _no_response(doubt))


def _no_response(doubt: str) -> str:
    if not doubt:
        return ""
    return (
        f"{doubt}: look at the picture (--figures), and if world coordinates can be trusted, "
        "compare with --no-registration"
    )


def _are_identical(before: _Side, after: _Side) -> bool:
    """Return whether both results are of the same scan, even if its files differ in packing."""
    if before.path.resolve() == after.path.resolve() or before.digest == after.digest:
        return True
    first, second = before.scan, after.scan
    return (
        first.geometry.matches(second.geometry)
        and (first.slope, first.intercept) == (second.slope, second.intercept)
        and np.array_equal(first.array, second.array)
    )


def _differences(before: _Side, after: _Side) -> list[str]:
    """Return warnings about differences in model and grid, which are no change of the patient."""
    warnings = []
    models = (before.record.case.model or "none", after.record.case.model or "none")
    if models[0] != models[1]:
        warnings.append(
            f"W_MODEL: the masks are of different origin ({models[0]}; {models[1]}), "
            "which is a difference too"
        )
    sizes = [sorted(side.ids.geometry.spacing_mm) for side in (before, after)]
    if any(max(a, b) > GRID_RATIO * min(a, b) for a, b in zip(*sizes, strict=True)):
        texts = [" × ".join(f"{mm:.2g}" for mm in size) for size in sizes]
        warnings.append(
            f"W_GRID: voxels of {texts[0]} mm and {texts[1]} mm: "
            "small lesions differ in size by that alone"
        )
    return warnings

"""`volseg compare`: the results of two time points → what became of every lesion, and the response of every patient."""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from volseg import __version__
from volseg.errors import ScanError, VolsegError
from volseg.execute.local import run
from volseg.execute.memory import Budget, Peak
from volseg.inputs import read_json, shortened
from volseg.io.files import sha256_of
from volseg.io.nifti import NiftiHeader, read_header, read_mask, read_volume
from volseg.measure.changes import ScanPair, centroids_mm, lesion_changes
from volseg.measure.matching import MAX_DISTANCE_MM
from volseg.measure.pairs import MeasuredScan, lone_scan, pair_scans, pairing_bytes
from volseg.measure.response import PatientResponse, judge_response
from volseg.measure.rows import LesionMeasurement
from volseg.measure.sections import axial_normal
from volseg.measure.specks import SPECKS
from volseg.measure.units import doubt_of
from volseg.postprocess.lesions import MANY
from volseg.preprocess.align import covered
from volseg.preprocess.register import Registration, register, registering_bytes, transformed
from volseg.report.html import comparison_html
from volseg.store.comparisons import ComparisonFolder
from volseg.store.records import CaseRecord, case_ids, file_of, path_of, read_record, record_files
from volseg.store.results import LESION_IDS
from volseg.volume import Geometry, Volume
from volseg.workflows.batch import (
    Progress,
    RunReport,
    about_run,
    amount_of,
    check_pair,
    damaged_warnings,
    digest_of,
    failure_reason,
    input_key,
    run_description,
    silent,
    without_damaged,
)
from volseg.workflows.patients import Patient, read_pairs, same_ids

STAGE, TIMES = "Comparing", ("baseline", "follow-up")
PICTURE_BYTES = 22  # per voxel of a scan that is drawn, if it is scaled
MAX_MOVED_MM, MAX_TURNED_DEG = (
    50.0,
    20.0,
)  # of a patient on the table; more may be right, but is worth a look
MAX_ERROR_MM = 3.0  # between registration one way and the other
MAX_TILT_ERROR_DEG = (
    5.0  # of the axial plane: a long axis may then be 16 % off (docs/benchmarks.md)
)
SAME_PLACE_MM = 2.0  # no better place was found, and what was found is where the headers say
GRID_RATIO = 1.5  # of voxel sizes, from which small lesions differ in size by that alone


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareSettings:
    """What a comparison is made with.

    Args:
        lymph_nodes: labels, by name or value, that count by their short axis.
        registration: find out how the patient lies in the later scan; else world coordinates are taken as they are.
        baseline_scans, followup_scans: folders in which the scans are looked for by their file names; None: where the results say.
    """

    registration: bool = True
    max_distance_mm: float = MAX_DISTANCE_MM
    lymph_nodes: tuple[str, ...] = ()
    figures: bool = False
    baseline_scans: Path | None = None
    followup_scans: Path | None = None

    @property
    def scans(self) -> tuple[Path | None, Path | None]:
        """The folders of the scans of both times."""
        return self.baseline_scans, self.followup_scans

    def __post_init__(self) -> None:
        if not 0 <= self.max_distance_mm < math.inf:
            raise VolsegError(
                f"a largest distance of {self.max_distance_mm} mm is none",
                fix="give 0 or more",
                code="E_USAGE",
            )
        for folder in (self.baseline_scans, self.followup_scans):
            if folder is not None and not folder.is_dir():
                raise VolsegError(
                    f"{folder}: is no folder", fix="give the folder of the scans", code="E_USAGE"
                )


def compare(
    baseline: Path | str,
    followup: Path | str,
    *,
    out: Path | str,
    pairs: Path | str | None = None,
    baseline_scans: Path | str | None = None,
    followup_scans: Path | str | None = None,
    registration: bool = True,
    max_distance_mm: float = MAX_DISTANCE_MM,
    lymph_nodes: Sequence[str] | None = None,
    figures: bool = False,
    max_ram: str | int | None = None,
    progress: Progress = silent,
    announce: Callable[[str], None] = lambda text: None,
) -> RunReport:
    """Compare the lesions of each patient at two time points: comparison.csv and response.csv.

    Args:
        baseline, followup: results folders of `infer` or `measure`.
        pairs: a CSV with columns patient, baseline and followup, which hold case ids; a patient with several scans at a time has a line for
            each. None: cases with the same id in both are one patient.
        max_distance_mm: between the centroids of two lesions that do not overlap and are still taken for one.
        lymph_nodes: labels, by name or value; None: those that the two folders were measured with.
        max_ram: budget of main memory, such as `4G` or a number of bytes; None for none. A patient who may not fit within it is a
            failed row that says what would do.
        announce: told what the largest patient takes at most.

    Raises:
        VolsegError: the request is wrong. A patient who cannot be compared is a failed row instead; a scan without partner is a row too.
    """
    started = time.monotonic()
    budget = Budget(
        amount_of(max_ram, "--max-ram"),
        announce,
        what="comparing these scans",
        otherwise="cut the scans and their masks to the region that matters and measure them again",
    )
    folders, out = (Path(baseline), Path(followup)), Path(out)
    settings = CompareSettings(
        registration=registration,
        max_distance_mm=max_distance_mm,
        lymph_nodes=tuple(
            sorted(set(_measured_nodes(folders) if lymph_nodes is None else lymph_nodes))
        ),
        figures=figures,
        baseline_scans=None if baseline_scans is None else Path(baseline_scans),
        followup_scans=None if followup_scans is None else Path(followup_scans),
    )
    known = (case_ids(folders[0]), case_ids(folders[1]))
    if out.resolve() in {folder.resolve() for folder in folders}:
        raise VolsegError(
            f"{out}: holds the results to compare",
            fix="give another folder to --out",
            code="E_EXISTS",
        )
    patients = (
        same_ids(folders, known) if pairs is None else read_pairs(Path(pairs), folders, known)
    )
    options = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in asdict(settings).items()
    }
    options |= {
        "baseline": str(folders[0]),
        "followup": str(folders[1]),
        "pairs": None if pairs is None else str(pairs),
    }
    not_listed = {
        time_: sorted(set(ids) - {scans[side] for patient in patients for scans in patient.scans})
        for side, (time_, ids) in enumerate(zip(("baseline", "followup"), known, strict=True))
    }
    used = [path for path in (*folders, *settings.scans) if path is not None]
    with ComparisonFolder(
        out, "compare", inputs=used if pairs is None else [*used, Path(pairs)]
    ) as results:
        report = _run_patients(patients, folders, settings, results, progress, budget)
        report = replace(report, details={**report.details, "not_listed": not_listed})
        rest = {name: report.details[name] for name in ("unpaired", "not_listed")}
        results.write_run(run_description("compare", options, report, started) | rest)
    return report


def _measured_nodes(folders: tuple[Path, Path]) -> Iterator[str]:
    """The labels that either folder's run.json says were measured as lymph nodes."""
    for folder in folders:
        try:
            content = read_json(folder / "run.json")
            settings = content.get("measure") or content["options"].get("measure") or {}
            yield from map(str, settings.get("lymph_nodes") or ())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # an interrupted run has none; a label that sounds like nodes is then warned of


# ---- the loop


_Folders = tuple[Path, Path]  # of the baseline and of the follow-up


def _run_patients(
    patients: Sequence[Patient],
    folders: _Folders,
    settings: CompareSettings,
    results: ComparisonFolder,
    progress: Progress,
    budget: Budget,
) -> RunReport:
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
    for outcome in run(
        lambda patient: _inputs(patient, folders, settings),
        [each for each in patients if each.is_paired],
    ):
        name = outcome.item.name
        inputs[name] = outcome.value or ()
        keys[name] = _key(outcome.item, inputs[name], settings)
        refusals |= {} if outcome.error is None else {name: outcome.error}
    kept = [name for name in keys if results.is_complete(name, keys[name])]
    to_compare = keys.keys() - kept
    todo = [patient for patient in patients if patient.name in to_compare]
    pictures = [f"figures/{patient.name}.png" for patient in todo] if settings.figures else []
    results.refuse_foreign(["comparison.csv", "response.csv", "report.html", "run.json", *pictures])
    for name, row in unpaired.items():
        results.commit_failure(name, row, ())
    for name in kept:
        results.settle(name)

    refusals |= budget.refused(_peaks(todo, folders, settings, budget.process))

    def task(patient: Patient) -> None:
        name = patient.name
        if name in refusals:
            raise refusals[name]
        _compare_patient(patient, folders, settings, results, keys[name], inputs[name])

    done, failed = [], {}
    progress(STAGE, 0.0, f"{len(todo)} of {len(patients)} to do")
    try:
        for count, outcome in enumerate(run(task, todo), start=1):
            patient = outcome.item
            if outcome.error is None:
                done.append(patient.name)
            else:
                failed[patient.name] = failure_reason(results, patient.name, outcome.error)
                row = PatientResponse(**patient.cells, status="failed", reason=failed[patient.name])
                results.commit_failure(patient.name, row, inputs[patient.name])
            progress(STAGE, count / len(todo), patient.name)
    finally:
        reached = {*unpaired, *kept, *done, *failed}
        waiting = [patient for patient in patients if patient.name not in reached]
        shown = results.write_tables(
            [
                PatientResponse(**patient.cells, status="pending", reason="not reached yet")
                for patient in waiting
            ]
        )
        lesions = results.lesion_rows(shown, set())
        results.write("report.html", comparison_html(about_run("compare", ""), shown, lesions))
    kept, failed = without_damaged(kept, failed, shown, "patient")
    row_of = {row["patient"]: row for row in shown}
    rows = [row_of[patient.name] for patient in patients]
    warnings = [f"{row['patient']}: {row['warnings']}" for row in rows if row["warnings"]]
    warnings += damaged_warnings(shown, "patient")
    if others := sorted(row_of.keys() - {patient.name for patient in patients}):
        named = ", ".join(shortened(name) for name in others[:3]) + (
            ", …" if len(others) > 3 else ""
        )
        warnings.append(
            f"W_STALE: the tables also hold {len(others)} patients of earlier runs ({named}); "
            "for tables without them give another --out"
        )
    details: dict[str, Any] = {"patients": rows, "warnings": warnings}
    details["unpaired"] = {name: row.reason for name, row in unpaired.items()}
    return RunReport(out=results.path, done=done, kept=kept, failed=failed, details=details)


def _peaks(
    patients: Sequence[Patient], folders: _Folders, settings: CompareSettings, process: int
) -> dict[str, Peak]:
    """What comparing the scans of each patient takes at most, from their headers; comparing the others says what is wrong."""

    def largest(patient: Patient) -> Peak:
        peaks = [_peak(pair, folders, settings, process) for pair in patient.scans]
        return max(peaks, key=lambda peak: peak.total)

    outcomes = run(largest, patients)
    return {outcome.item.name: outcome.value for outcome in outcomes if outcome.value is not None}


def _peak(
    cases: tuple[str | None, str | None], folders: _Folders, settings: CompareSettings, process: int
) -> Peak:
    """What comparing two scans takes at most; or a scan that has none of the other time.

    Raises:
        ScanError: the files cannot be read.
    """
    masks, scans, n_lesions = [], [], []
    for time_, case, folder, places in zip(TIMES, cases, folders, settings.scans, strict=True):
        if case is None:
            continue
        record = _read_usable(time_, folder, case)
        n_lesions.append(len(record.lesions))
        masks.append(read_header(path_of(folder, case, record.files, LESION_IDS)))
        path = _scan_path(record, places) if settings.registration or settings.figures else None
        scans += [] if path is None else [read_header(path)]
    work = {"lesions": pairing_bytes([mask.geometry.shape for mask in masks], n_lesions)}
    if len(scans) == 2 and settings.registration:
        work["registration"] = registering_bytes(scans[0].geometry, scans[1].geometry)
    if len(scans) == 2 and settings.figures:
        work["figure"] = PICTURE_BYTES * math.prod(scans[1].geometry.shape)
    largest = max(work, key=lambda name: work[name])
    return Peak(
        {
            "process": process,
            # A scan with NaN is there twice while they are filled, a mask while it is read.
            "scans": sum(scan.n_bytes for scan in scans)
            + max((_filled_bytes(scan) for scan in scans), default=0),
            "masks": sum(mask.mask_bytes for mask in masks) + max(mask.n_bytes for mask in masks),
            largest: work[largest],
        }
    )


def _filled_bytes(scan: NiftiHeader) -> int:
    return scan.n_bytes + math.prod(scan.geometry.shape) if scan.dtype.kind == "f" else 0


def _inputs(patient: Patient, folders: _Folders, settings: CompareSettings) -> tuple[str, ...]:
    """SHA-256 of all files that the rows of a patient depend on."""
    digests: list[str] = []
    for pair in patient.scans:
        for case, folder, scans in zip(pair, folders, settings.scans, strict=True):
            if case is None:
                continue
            digests += [_file_digest(path) for path in record_files(folder, case)]
            try:
                record = read_record(folder, case)
                digests += [_file_digest(folder / mask) for mask in record.masks]
                path = _scan_path(record, scans)
                digests.append("none" if path is None else digest_of(path))
            except ScanError as error:
                digests.append(str(error))  # told when the patient is compared
    return tuple(digests)


def _file_digest(path: Path) -> str:
    return sha256_of(path) if path.is_file() else str(path)


def _key(patient: Patient, inputs: Sequence[str], settings: CompareSettings) -> str:
    """Changes with anything that the rows of a patient depend on."""
    options = {"registration": settings.registration, "max_distance_mm": settings.max_distance_mm}
    options |= {"figures": settings.figures, "lymph_nodes": settings.lymph_nodes}
    return input_key(options | {"patient": patient.name, "scans": patient.scans}, inputs)


# ---- one patient


@dataclass(frozen=True, eq=False)
class _Side:
    """A time point of a patient: what was measured, and the scan, which is read once it is needed.

    Args:
        inputs: SHA-256 of the patient's files when the comparison began.
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
        return doubt_of(self.record.case.warnings)

    @property
    def measured(self) -> MeasuredScan:
        return MeasuredScan(self.record.case.case_id, self.ids, self.lesions)

    @property
    def path(self) -> Path:
        """The file of the scan.

        Raises:
            ScanError: it is not known where it is.
        """
        path = _scan_path(self.record, self.scans)
        if path is None:
            wanted = self.record.scan or self.record.case.image or "its scan"
            raise ScanError(
                f"the {self.time} scan of case {self.record.case.case_id!r} was not found: {wanted}",
                fix=f"give the folder it is in with --{self.time.replace('-', '')}-scans, or --no-registration "
                "if both scans have the same world coordinates",
                code="E_MISSING",
            )
        return path

    @cached_property
    def scan(self) -> Volume:
        scan = read_volume(self.path, is_finite=False)  # as it was measured
        _check_unchanged(self.path, scan.sha256 or digest_of(self.path), self.inputs)
        check_pair(
            scan, self.ids, str(self.path), f"the lesions of case {self.record.case.case_id!r}"
        )
        known = np.isfinite(scan.array) if scan.array.dtype.kind == "f" else np.ones(1, bool)
        # To register, what is not known is the darkest there is.
        if known.all():
            return scan
        return replace(scan, array=np.where(known, scan.array, scan.array[known].min(initial=0)))

    @cached_property
    def digest(self) -> str:
        return self.scan.sha256 or digest_of(self.path)

    @property
    def change(self) -> str:
        """A warning if the file of the scan is not the one that was measured, or not packed as it was; empty without a file."""
        known = self.record.scan_sha256
        if known is None or _scan_path(self.record, self.scans) is None or known == self.digest:
            return ""
        return f"W_SCAN: the {self.time} scan {self.path.name} is not the file that was measured, or was written anew since"


def _compare_patient(
    patient: Patient,
    folders: _Folders,
    settings: CompareSettings,
    results: ComparisonFolder,
    key: str,
    inputs: Sequence[str],
) -> None:
    started = time.monotonic()
    names = _shared_names(patient, folders)
    compared = [
        _compare_scans(cases, folders, settings, patient, names, inputs) for cases in patient.scans
    ]
    pairs = [each.pair for each in compared]
    rows = lesion_changes(pairs, patient=patient.name, lymph_nodes=settings.lymph_nodes)
    response = judge_response(pairs, patient=patient.name, lymph_nodes=settings.lymph_nodes)
    warnings = [_of_scan(text, each.pair, pairs) for each in compared for text in each.warnings]
    response = replace(
        response,
        **_worst([each.columns for each in compared]),
        warnings="; ".join([*warnings, *([response.warnings] if response.warnings else [])]),
        seconds=round(time.monotonic() - started, 2),
        volseg_version=__version__,
    )
    with results.staged() as commit:
        if pictures := [scans.picture for scans in compared if scans.picture]:
            from volseg.report.comparison_figures import stacked

            commit.write(f"figures/{patient.name}.png", stacked(pictures))
        results.commit(response, commit, key=key, inputs=inputs, lesions=rows)


@dataclass(frozen=True, slots=True, eq=False)
class _Compared:
    """What is kept of two scans. `columns`: how they lie; `picture`: PNG."""

    pair: ScanPair
    columns: Mapping[str, Any]
    warnings: Sequence[str]
    picture: bytes | None = None


def _compare_scans(
    cases: tuple[str | None, str | None],
    folders: _Folders,
    settings: CompareSettings,
    patient: Patient,
    names: Mapping[int, str],
    inputs: Sequence[str],
) -> _Compared:
    """One line of a patient. `names`: what a label is called that has no name in either scan."""
    read = (
        None if case is None else _read_side(time_, folder, case, scans, inputs)
        for time_, folder, case, scans in zip(TIMES, folders, cases, settings.scans, strict=True)
    )
    before, after = _named_alike(*read, names=names)
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
        moved=placed.moved,
        doubt=placed.doubt,
        max_distance_mm=settings.max_distance_mm,
    )
    pair = replace(pair, unit_doubts=doubts)
    warnings = [*placed.warnings, *_differences(before, after), *in_doubt]
    if settings.registration or settings.figures:
        warnings += [side.change for side in (before, after) if side.change]
    picture = None
    if settings.figures:
        from volseg.report.comparison_figures import change_png

        title = (
            patient.name if len(patient.scans) == 1 else f"{patient.name}, {cases[0]} → {cases[1]}"
        )
        rows = lesion_changes([pair], patient=patient.name, lymph_nodes=settings.lymph_nodes)
        try:
            ids = (before.ids.array, after.ids.array)
            picture = change_png((before.scan, after.scan), ids, placed.moved, rows, title=title)
        except ScanError as error:
            if settings.registration:
                raise
            warnings.append(f"W_FIGURE: no picture: {error.problem}")
    return _Compared(pair, placed.columns, warnings, picture)


def _alone(
    before: _Side | None, after: _Side | None, unit_doubts: tuple[str, str], warnings: Sequence[str]
) -> _Compared:
    """A scan of a region that was not scanned at the other time: all its lesions lie outside what was."""
    pair = lone_scan(before and before.measured, after and after.measured)
    other = "follow-up" if after is None else "baseline"
    pair = replace(pair, unit_doubts=unit_doubts)
    return _Compared(
        pair, {}, [f"W_UNPAIRED: there is no {other} scan of what it shows", *warnings]
    )


def _of_scan(text: str, pair: ScanPair, pairs: Sequence[ScanPair]) -> str:
    """A warning, with the scan it is about where there are several."""
    if len(pairs) == 1:
        return text
    code, rest = text.split(": ", 1)
    return f"{code}: {pair.followup_case or pair.baseline_case}: {rest}"


_WORST = {
    "moved_mm": max,
    "turned_deg": max,
    "registration_error_mm": max,
    "similarity_before": min,
    "similarity_after": min,
}


def _worst(columns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How the scans of a patient lie: where several were placed, what is worst among them; None where one is unknown."""
    if len(columns) == 1:
        return dict(columns[0])
    placed = [each for each in columns if each]
    if not placed:
        return {}
    found: dict[str, Any] = {
        "registration": ";".join(each.get("registration", "") for each in columns)
    }
    for name, worst in _WORST.items():
        values = [each[name] for each in placed if name in each]
        found[name] = worst(values) if values and None not in values else None
    return found


def _check_unchanged(path: Path, digest: str, inputs: Sequence[str]) -> None:
    """That a file is as it was when the comparison began, by whose hash its rows will be known."""
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
            f"{path}: holds {ids.array.max()} lesions, the record of case {case!r} {len(lesions)}",
            fix="run the command that made the folder again",
            code="E_RECORD",
        )
    return _Side(time_, folder, replace(record, lesions=lesions), ids, scans, inputs)


def _check_measured(folder: Path, record: CaseRecord) -> None:
    """That the numbers of a case are those of its mask, which may have been corrected by hand."""
    for name, digest in record.masks.items():
        if (folder / name).is_file() and sha256_of(folder / name) != digest:
            raise ScanError(
                f"{folder / name}: was changed by hand after it was measured",
                fix=f"run `volseg measure {folder}` first",
                code="E_EDITED",
            )


def _read_usable(time_: str, folder: Path, case: str) -> CaseRecord:
    """The record of a case that was measured.

    Raises:
        ScanError: it was not, or its mask is noise.
    """
    record = read_record(folder, case)
    if record.case.status != "done":
        raise ScanError(
            f"the {time_} case {case!r} is {record.case.status}: {record.case.reason or 'no reason is given'}",
            fix="repair it and run the command that made the folder again",
            code="E_RECORD",
        )
    if (record.case.n_lesions or 0) > MANY or f"{SPECKS}: " in (record.case.warnings or ""):
        raise ScanError(
            f"the {time_} case {case!r} has {record.case.n_lesions or 0:,} lesions: its mask looks like noise",
            fix="correct the mask and measure it again; noise has no response",
            code="E_SPECKS",
        )
    return record


def _shared_names(patient: Patient, folders: _Folders) -> dict[int, str]:
    """What the scans of a patient call a label, where those that have a name for it agree."""
    names: dict[int, set[str]] = defaultdict(set)
    for cases in patient.scans:
        for case, folder in zip(cases, folders, strict=True):
            if case is not None:
                for label, name in _names(read_record(folder, case).lesions).items():
                    names[label].add(name)
    return {label: found.pop() for label, found in names.items() if len(found) == 1}


def _names(lesions: Sequence[LesionMeasurement]) -> dict[int, str]:
    named = ((lesion.label, lesion.label_name) for lesion in lesions)
    return {label: name for label, name in named if name and name != f"label_{label}"}


def _named_alike(
    before: _Side | None, after: _Side | None, *, names: Mapping[int, str]
) -> tuple[_Side | None, _Side | None]:
    """A label that has no name at one time, because nobody gave `measure` one, has that of the other time, or else of another scan."""
    known = dict(names)
    for side in (before, after):
        known |= {} if side is None else _names(side.lesions)
    before, after = (
        side
        and replace(
            side,
            record=replace(side.record, lesions=[_named(lesion, known) for lesion in side.lesions]),
        )
        for side in (before, after)
    )
    return before, after


def _named(lesion: LesionMeasurement, names: Mapping[int, str]) -> LesionMeasurement:
    is_nameless = lesion.label_name in (None, f"label_{lesion.label}")
    return (
        replace(lesion, label_name=names.get(lesion.label, lesion.label_name))
        if is_nameless
        else lesion
    )


def _scan_path(record: CaseRecord, scans: Path | None) -> Path | None:
    """The file of a scan: the one of its name in the folder, else where the record says; None where it is in neither.

    Raises:
        ScanError: the folder has several of this name.
    """
    name = Path(record.case.image or "").name  # a record of a stranger may name a path
    if scans is not None and name:
        paths = [scans / name]
        if not os.path.isfile(paths[0]):
            paths = sorted(
                Path(folder, name) for folder, _, files in os.walk(scans) if name in files
            )
        if len(paths) > 1:
            raise ScanError(
                f"{scans}: has {len(paths)} files {name!r}, such as {paths[0]} and {paths[1]}",
                fix="give the folder that holds the right one",
                code="E_MISSING",
            )
        if paths:
            return paths[0]
    return record.scan if record.scan is not None and os.path.isfile(record.scan) else None


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """How the patient lies in the later scan: (4, 4) RAS mm, and what the row says about it.

    `doubt` is why lesions matched by it cannot be trusted; empty if they can.
    """

    moved: np.ndarray
    columns: Mapping[str, Any]
    warnings: Sequence[str] = ()
    doubt: str = ""


def _place(before: _Side, after: _Side, settings: CompareSettings) -> Placement:
    if not before.lesions and not after.lesions:
        return Placement(np.eye(4), {})  # nothing is to be placed
    if not settings.registration:
        return _as_headers_say(before.ids.geometry, after.ids.geometry)
    if _are_identical(before, after):
        return Placement(np.eye(4), {"registration": "identical"})
    found = register(before.scan, after.scan)
    back = np.linalg.inv(found.moved)
    return as_far_as_trusted(
        found,
        np.concatenate(
            [centroids_mm(before.lesions), transformed(back, centroids_mm(after.lesions))]
        ),
        normal=axial_normal(before.ids.geometry),
    )


def _as_headers_say(before: Geometry, after: Geometry) -> Placement:
    here, columns = np.eye(4), {"registration": "none"}
    if covered(before, after, here) or covered(after, before, here):
        return Placement(here, columns)
    doubt = "the two scans nowhere overlap in world coordinates"
    warnings = [f"W_APART: {doubt}, so no lesion could be matched"]
    return Placement(here, columns, warnings, f"{doubt}: compare without --no-registration")


def as_far_as_trusted(
    found: Registration, points_mm: np.ndarray, *, normal: np.ndarray | None = None
) -> Placement:
    """What a registration says about the points (N, 3) of the earlier scan, N ≥ 1; where it made nothing better, nothing is moved.

    `normal`: (3,) of the axial slices of the earlier scan, in which diameters are taken; None: the S axis.
    """
    shift_mm = float(found.shift_mm(points_mm).max())
    apart_mm = found.disagreement_mm(points_mm)
    error_mm = None if apart_mm is None else float(apart_mm.max())
    similarity = {
        "similarity_before": found.similarity_before,
        "similarity_after": found.similarity_after,
    }
    warnings, doubt = [], ""
    if not found.is_better:
        if shift_mm > SAME_PLACE_MM:
            doubt = "the scans are nowhere more alike than where their headers place them"
            warnings.append(f"W_REGISTRATION: {doubt}, so world coordinates were taken as they are")
        columns = {"registration": "none", "moved_mm": 0.0, "turned_deg": 0.0} | similarity
        return Placement(np.eye(4), columns, warnings, _no_response(doubt))
    if shift_mm > MAX_MOVED_MM or found.turned_deg > MAX_TURNED_DEG:
        warnings.append(
            f"W_MOVED: registration moved a lesion by {shift_mm:.0f} mm and turned the scan by {found.turned_deg:.0f}°, "
            f"over {MAX_MOVED_MM:.0f} mm or {MAX_TURNED_DEG:.0f}°: look at the picture"
        )
    if error_mm is None or error_mm > MAX_ERROR_MM:
        what = (
            "worked in one direction only"
            if error_mm is None
            else f"is uncertain by {error_mm:.1f} mm"
        )
        doubt = f"registration {what}"
        warnings.append(f"W_REGISTRATION: {doubt}, so lesions may have been matched wrongly")
    tilt_deg = found.plane_disagreement_deg(np.array([0.0, 0.0, 1.0]) if normal is None else normal)
    if not doubt and tilt_deg is not None and tilt_deg > MAX_TILT_ERROR_DEG:
        doubt = f"registration is uncertain by {tilt_deg:.0f}° about the axial plane"
        warnings.append(
            f"W_REGISTRATION: {doubt}, so diameters may have been taken in another plane"
        )
    columns = {"registration": "rigid", "moved_mm": shift_mm, "turned_deg": found.turned_deg}
    columns |= {"registration_error_mm": error_mm} | similarity
    return Placement(found.moved, columns, warnings, _no_response(doubt))


def _no_response(doubt: str) -> str:
    if not doubt:
        return ""
    return f"{doubt}: look at the picture (--figures), and if world coordinates can be trusted, compare with --no-registration"


def _are_identical(before: _Side, after: _Side) -> bool:
    """Whether both results are of one scan; its files may differ in how they are packed."""
    if before.path.resolve() == after.path.resolve() or before.digest == after.digest:
        return True
    one, other = before.scan, after.scan
    return (
        one.geometry.matches(other.geometry)
        and (one.slope, one.intercept) == (other.slope, other.intercept)
        and np.array_equal(one.array, other.array)
    )


def _differences(before: _Side, after: _Side) -> list[str]:
    """What differs between the two results and not between the two days."""
    found = []
    models = (before.record.case.model or "none", after.record.case.model or "none")
    if models[0] != models[1]:
        found.append(
            f"W_MODEL: the masks are of different origin ({models[0]}; {models[1]}), which is a difference too"
        )
    sizes = [sorted(side.ids.geometry.spacing_mm) for side in (before, after)]
    if any(max(a, b) > GRID_RATIO * min(a, b) for a, b in zip(*sizes, strict=True)):
        texts = [" × ".join(f"{mm:.2g}" for mm in size) for size in sizes]
        found.append(
            f"W_GRID: voxels of {texts[0]} mm and {texts[1]} mm: small lesions differ in size by that alone"
        )
    return found

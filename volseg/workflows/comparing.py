"""`volseg compare`: the results of two time points → what became of every lesion, and the response of every patient."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from volseg import __version__
from volseg.errors import ScanError, VolsegError
from volseg.execute.local import run
from volseg.io.cases import ID_PATTERN, read_table
from volseg.io.files import make_folder, write_bytes_atomic
from volseg.io.nifti import read_mask, read_volume
from volseg.measure.lesions import LesionMeasurement
from volseg.measure.matching import MAX_DISTANCE_MM, match_lesions
from volseg.measure.response import LesionChange, PatientResponse, judge_response, label_of, lesion_changes
from volseg.preprocess.register import Registration, register, transformed
from volseg.report.comparisons import ComparisonFolder
from volseg.report.records import CaseRecord, case_ids, file_of, read_record, record_path
from volseg.volume import Volume
from volseg.workflows.batch import (
    Progress,
    RunReport,
    about_run,
    check_pair,
    input_key,
    reason_of,
    run_description,
    silent,
)
from volseg.workflows.pages import scan_digest

STAGE = "Comparing"
MAX_MOVED_MM, MAX_TURNED_DEG = 50.0, 20.0  # of a patient on the table; more may be right, but is worth a look
MAX_ERROR_MM = 3.0  # between registration one way and the other
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

    def __post_init__(self) -> None:
        if not 0 <= self.max_distance_mm < math.inf:
            raise VolsegError(
                f"a largest distance of {self.max_distance_mm} mm is none", fix="give 0 or more", code="E_USAGE"
            )
        for folder in (self.baseline_scans, self.followup_scans):
            if folder is not None and not folder.is_dir():
                raise VolsegError(f"{folder}: is no folder", fix="give the folder of the scans", code="E_USAGE")


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
    progress: Progress = silent,
) -> RunReport:
    """Compare the lesions of each patient at two time points: comparison.csv and response.csv.

    Args:
        baseline, followup: results folders of `infer` or `measure`.
        pairs: a CSV with columns patient, baseline and followup, which hold case ids; None: cases with the same id in both are one patient.
        max_distance_mm: between the centroids of two lesions that do not overlap and are still taken for one.
        lymph_nodes: labels, by name or value; None: those that the two folders were measured with.

    Raises:
        VolsegError: the request is wrong. A patient who cannot be compared is a failed row instead; a scan without partner is a row too.
    """
    started = time.monotonic()
    folders, out = (Path(baseline), Path(followup)), Path(out)
    settings = CompareSettings(
        registration=registration,
        max_distance_mm=max_distance_mm,
        lymph_nodes=tuple(sorted(set(_measured_nodes(folders) if lymph_nodes is None else lymph_nodes))),
        figures=figures,
        baseline_scans=None if baseline_scans is None else Path(baseline_scans),
        followup_scans=None if followup_scans is None else Path(followup_scans),
    )
    known = (case_ids(folders[0]), case_ids(folders[1]))
    if out.resolve() in {folder.resolve() for folder in folders}:
        raise VolsegError(f"{out}: holds the results to compare", fix="give another folder to --out", code="E_USAGE")
    listed = _same_ids(folders, known) if pairs is None else _read_pairs(Path(pairs), folders, known)
    options = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()}
    options |= {
        "baseline": str(folders[0]),
        "followup": str(folders[1]),
        "pairs": None if pairs is None else str(pairs),
    }
    not_listed = {
        time_: sorted(set(ids) - {each[side] for each in listed})
        for side, (time_, ids) in enumerate(zip(("baseline", "followup"), known, strict=True), start=1)
    }
    with ComparisonFolder(out) as results:
        report = _run_pairs([_Pair(*each, folders) for each in listed], settings, results, progress)
        report = replace(report, details={**report.details, "not_listed": not_listed})
        rest = {name: report.details[name] for name in ("unpaired", "not_listed")}
        results.write_run(run_description("compare", options, report, started) | rest)
    return report


def _measured_nodes(folders: tuple[Path, Path]) -> Iterator[str]:
    """The labels that either folder's run.json says were measured as lymph nodes."""
    for folder in folders:
        try:
            content = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            settings = content.get("measure") or content["options"].get("measure") or {}
            yield from map(str, settings.get("lymph_nodes") or ())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # an interrupted run has none; a label that sounds like nodes is then warned of


# ---- pairs


@dataclass(frozen=True, slots=True)
class _Pair:
    """A patient and the ids of the two cases, None where there is none."""

    patient: str
    baseline: str | None
    followup: str | None
    folders: tuple[Path, Path]

    @property
    def names(self) -> dict[str, Any]:
        return {"patient": self.patient, "baseline_case": self.baseline or "", "followup_case": self.followup or ""}


_Listed = tuple[str, str | None, str | None]


def _same_ids(folders: tuple[Path, Path], known: tuple[Sequence[str], Sequence[str]]) -> list[_Listed]:
    here, there = set(known[0]), set(known[1])
    if not here & there:
        raise VolsegError(
            f"no case of {folders[1]} has the name of one in {folders[0]}, such as {next(iter(known[0]), 'none')!r}",
            fix="say which belong together in a CSV with columns patient, baseline and followup, and give it with --pairs",
            code="E_DATASET",
        )
    return [(name, name if name in here else None, name if name in there else None) for name in sorted(here | there)]


def _read_pairs(path: Path, folders: tuple[Path, Path], known: tuple[Sequence[str], Sequence[str]]) -> list[_Listed]:
    """The pairs that a table names; an empty cell is a scan without a partner.

    Raises:
        VolsegError: one error with every mistake of the table.
    """
    columns, lines = read_table(path)
    wanted = ("patient", "baseline", "followup")
    missing = [name for name in wanted if name not in columns]
    if missing:
        raise VolsegError(
            f"{path}: has no column {', '.join(map(repr, missing))}",
            fix="give it the columns patient, baseline and followup, which hold case ids",
            code="E_DATASET",
        )
    mistakes, listed, seen = [], [], set()
    for number, cells in lines:
        if len(cells) != len(columns):
            mistakes.append(f"line {number} has {len(cells)} cells under {len(columns)} columns")
            continue
        row = dict(zip(columns, cells, strict=True))
        patient, before, after = (row[name] for name in wanted)
        if not re.fullmatch(ID_PATTERN, patient):
            mistakes.append(f"line {number}: patient {patient!r} is no safe file name")
        elif patient.casefold() in seen:
            mistakes.append(
                f"line {number}: patient {patient!r} is there twice; give each pair a name of its own: each is judged by itself"
            )
        seen.add(patient.casefold())
        for case, folder, ids in ((before, folders[0], known[0]), (after, folders[1], known[1])):
            if case and case not in ids:
                mistakes.append(f"line {number}: {folder} has no case {case!r}")
        if not before and not after:
            mistakes.append(f"line {number}: names no case")
        listed.append((patient, before or None, after or None))
    if not any(before and after for _, before, after in listed) and not mistakes:
        mistakes.append("no line has a baseline and a followup")
    if mistakes:
        raise VolsegError(
            f"{path}: {'; '.join(mistakes[:10])}", fix="correct the table; nothing was done yet", code="E_DATASET"
        )
    return listed


# ---- the loop


def _run_pairs(
    pairs: Sequence[_Pair], settings: CompareSettings, results: ComparisonFolder, progress: Progress
) -> RunReport:
    unpaired = {pair.patient: _partnerless(pair) for pair in pairs if pair.baseline is None or pair.followup is None}
    for row in unpaired.values():
        results.commit(row)
    keys = {pair.patient: _key(pair, settings) for pair in pairs if pair.patient not in unpaired}
    kept = [name for name in keys if results.is_complete(name, keys[name])]
    todo = [pair for pair in pairs if pair.patient in keys and pair.patient not in kept]
    done, failed = [], {}
    progress(STAGE, 0.0, f"{len(todo)} of {len(pairs)} to do")
    try:
        for count, outcome in enumerate(
            run(lambda pair: _compare_pair(pair, settings, results, keys[pair.patient]), todo), start=1
        ):
            pair = outcome.item
            if outcome.error is None:
                done.append(pair.patient)
            else:
                failed[pair.patient] = reason_of(outcome.error)
                results.commit(PatientResponse(**pair.names, status="failed", reason=failed[pair.patient]))
            progress(STAGE, count / len(todo), pair.patient)
    finally:
        reached = {*unpaired, *kept, *done, *failed}
        waiting = [pair for pair in pairs if pair.patient not in reached]
        results.write_tables(
            [pair.patient for pair in pairs],
            pending=[PatientResponse(**pair.names, status="pending", reason="not reached yet") for pair in waiting],
            about=about_run("compare", ""),
        )
    rows = [dict(record.response) for pair in pairs if (record := results.record(pair.patient)) is not None]
    warnings = [f"{row['patient']}: {row['warnings']}" for row in rows if row["warnings"]]
    details: dict[str, Any] = {"patients": rows, "warnings": warnings}
    details["unpaired"] = {name: row.reason for name, row in unpaired.items()}
    return RunReport(out=results.path, done=done, kept=kept, failed=failed, details=details)


def _partnerless(pair: _Pair) -> PatientResponse:
    here, there = ("follow-up", pair.folders[0]) if pair.baseline is None else ("baseline", pair.folders[1])
    return PatientResponse(
        patient=pair.patient,
        baseline_case=pair.baseline,
        followup_case=pair.followup,
        status="unpaired",
        reason=f"only a {here} scan: {there} has no case for it; if it has another name there, give --pairs",
    )


def _key(pair: _Pair, settings: CompareSettings) -> str:
    """Changes with anything that the rows of a patient depend on."""
    options = {"registration": settings.registration, "max_distance_mm": settings.max_distance_mm}
    options |= {"figures": settings.figures, "lymph_nodes": settings.lymph_nodes, "names": pair.names}
    inputs: list[Path | str | None] = []
    for folder, case, scans in _sides(pair, settings):
        inputs.append(record_path(folder, case))
        try:
            inputs.append(_scan_path(read_record(folder, case), scans))
        except ScanError as error:
            inputs.append(str(error))  # told when the patient is compared
    return input_key(json.dumps(options, sort_keys=True), *inputs)


def _sides(pair: _Pair, settings: CompareSettings) -> list[tuple[Path, str, Path | None]]:
    """Folder, case and folder of scans of each time."""
    assert pair.baseline is not None and pair.followup is not None
    return [
        (pair.folders[0], pair.baseline, settings.baseline_scans),
        (pair.folders[1], pair.followup, settings.followup_scans),
    ]


# ---- one patient


@dataclass(frozen=True, eq=False)
class _Side:
    """A time point of a patient: what was measured, and the scan, which is read once it is needed."""

    time: str
    folder: Path
    record: CaseRecord
    ids: Volume
    scans: Path | None

    @property
    def lesions(self) -> Sequence[LesionMeasurement]:
        return self.record.lesions

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
        check_pair(scan, self.ids, str(self.path), f"the lesions of case {self.record.case.case_id!r}")
        known = np.isfinite(scan.array) if scan.array.dtype.kind == "f" else np.ones(1, bool)
        # To register, what is not known is the darkest there is.
        return scan if known.all() else scan.with_array(np.where(known, scan.array, scan.array[known].min(initial=0)))

    @cached_property
    def digest(self) -> str:
        return scan_digest(self.path)

    @property
    def change(self) -> str:
        """A warning if the file of the scan is not the one that was measured, or not packed as it was; empty without a file."""
        known = self.record.scan_sha256
        if known is None or _scan_path(self.record, self.scans) is None or known == self.digest:
            return ""
        return f"W_SCAN: the {self.time} scan {self.path.name} is not the file that was measured, or was written anew since"

    @property
    def centroids_mm(self) -> np.ndarray:
        """(N, 3) RAS mm."""
        rows = [(lesion.centroid_r_mm, lesion.centroid_a_mm, lesion.centroid_s_mm) for lesion in self.lesions]
        return np.array(rows, dtype=float).reshape(-1, 3)


def _compare_pair(pair: _Pair, settings: CompareSettings, results: ComparisonFolder, key: str) -> None:
    started = time.monotonic()
    before, after = (
        _read_side(time_, *side) for time_, side in zip(("baseline", "follow-up"), _sides(pair, settings), strict=True)
    )
    before, after = _named_alike(before, after)
    placed = _place(before, after, settings)
    matches = match_lesions(
        before.ids,
        after.ids,
        baseline_labels=[label_of(lesion) for lesion in before.lesions],
        followup_labels=[label_of(lesion) for lesion in after.lesions],
        moved=placed.moved,
        max_distance_mm=settings.max_distance_mm,
    )
    rule: dict[str, Any] = pair.names | {"lymph_nodes": settings.lymph_nodes}
    rows = lesion_changes(matches, before.lesions, after.lesions, **rule)
    response = judge_response(matches, before.lesions, after.lesions, doubt=placed.doubt, **rule)
    warnings = [*placed.warnings, *_differences(before, after), *([response.warnings] if response.warnings else [])]
    if settings.registration or settings.figures:
        warnings += [side.change for side in (before, after) if side.change]
    files = []
    if settings.figures:
        try:
            files.append(_write_figure(pair.patient, before, after, placed.moved, rows, results.path))
        except ScanError as error:
            if settings.registration:
                raise
            warnings.append(f"W_FIGURE: no picture: {error.problem}")
    response = replace(
        response,
        **placed.columns,
        warnings="; ".join(warnings),
        seconds=round(time.monotonic() - started, 2),
        volseg_version=__version__,
    )
    results.commit(response, key=key, lesions=rows, files=files)


def _read_side(time_: str, folder: Path, case: str, scans: Path | None) -> _Side:
    record = read_record(folder, case)
    if record.case.status != "done":
        raise ScanError(
            f"the {time_} case {case!r} is {record.case.status}: {record.case.reason or 'no reason is given'}",
            fix="repair it and run the command that made the folder again",
            code="E_RECORD",
        )
    lesions = sorted(record.lesions, key=lambda lesion: lesion.lesion_id)
    path = file_of(folder, case, record.files, "lesion_ids")
    ids = read_mask(path, max_labels=len(lesions) + 1000)
    if [lesion.lesion_id for lesion in lesions] != list(range(1, int(ids.array.max()) + 1)):
        raise ScanError(
            f"{path}: holds {ids.array.max()} lesions, the record of case {case!r} {len(lesions)}",
            fix="run the command that made the folder again",
            code="E_RECORD",
        )
    return _Side(time_, folder, replace(record, lesions=lesions), ids, scans)


def _named_alike(*sides: _Side) -> tuple[_Side, _Side]:
    """A label that has no name at one time, because nobody gave `measure` one, has that of the other time."""
    names = {
        lesion.label: lesion.label_name
        for side in sides
        for lesion in side.lesions
        if lesion.label_name not in (None, f"label_{lesion.label}")
    }
    before, after = (
        replace(side, record=replace(side.record, lesions=[_named(lesion, names) for lesion in side.lesions]))
        for side in sides
    )
    return before, after


def _named(lesion: LesionMeasurement, names: Mapping[int, str | None]) -> LesionMeasurement:
    is_nameless = lesion.label_name in (None, f"label_{lesion.label}")
    return replace(lesion, label_name=names.get(lesion.label, lesion.label_name)) if is_nameless else lesion


def _scan_path(record: CaseRecord, scans: Path | None) -> Path | None:
    """The file of a scan: the one of its name in the folder, else where the record says; None where it is in neither.

    Raises:
        ScanError: the folder has several of this name.
    """
    name = record.case.image
    if scans is not None and name:
        found = [scans / name] if (scans / name).is_file() else sorted(scans.rglob(name))
        if len(found) > 1:
            raise ScanError(
                f"{scans}: has {len(found)} files {name!r}, such as {found[0]} and {found[1]}",
                fix="give the folder that holds the right one",
                code="E_MISSING",
            )
        if found:
            return found[0]
    return record.scan if record.scan is not None and record.scan.is_file() else None


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
        return Placement(np.eye(4), {"registration": "none"})
    if _are_identical(before, after):
        return Placement(np.eye(4), {"registration": "identical"})
    found = register(before.scan, after.scan)
    back = np.linalg.inv(found.moved)
    return as_far_as_trusted(found, np.concatenate([before.centroids_mm, transformed(back, after.centroids_mm)]))


def as_far_as_trusted(found: Registration, points_mm: np.ndarray) -> Placement:
    """What a registration says about the points (N, 3) of the earlier scan, N ≥ 1; where it made nothing better, nothing is moved."""
    shift_mm = float(found.shift_mm(points_mm).max())
    apart_mm = found.disagreement_mm(points_mm)
    error_mm = None if apart_mm is None else float(apart_mm.max())
    similarity = {"similarity_before": found.similarity_before, "similarity_after": found.similarity_after}
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
        what = "worked in one direction only" if error_mm is None else f"is uncertain by {error_mm:.1f} mm"
        doubt = f"registration {what}"
        warnings.append(f"W_REGISTRATION: {doubt}, so lesions may have been matched wrongly")
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
        found.append(f"W_GRID: voxels of {texts[0]} mm and {texts[1]} mm: small lesions differ in size by that alone")
    return found


def _write_figure(
    patient: str, before: _Side, after: _Side, moved: np.ndarray, rows: Sequence[LesionChange], out: Path
) -> Path:
    from volseg.report.comparison_figures import change_png

    picture = change_png((before.scan, after.scan), (before.ids.array, after.ids.array), moved, rows, title=patient)
    path = out / "figures" / f"{patient}.png"
    make_folder(path.parent)
    write_bytes_atomic(path, picture)
    return path

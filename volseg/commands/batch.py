"""Loop over cases: a failed case becomes a row, and a second call skips what is complete."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from volseg import __version__
from volseg.commands.pages import page_budget, remake_page, write_report
from volseg.commands.remarks import remarks_on_scans
from volseg.errors import ScanError, UnexpectedError, VolsegError
from volseg.execution.local import Outcome
from volseg.io.cases import Case
from volseg.io.formats import RESULT_SUFFIX
from volseg.io.volumes import read_header, scan_digest, write_volume
from volseg.measurement.rows import CaseRow, LesionMeasurement
from volseg.measurement.saturation import intensity_warnings
from volseg.measurement.specks import MeasuredLesions
from volseg.measurement.summary import summarise
from volseg.measurement.units import Unit
from volseg.options import Announce, Options, Progress, ignore_text
from volseg.recipe import Measure
from volseg.reports import CasesReport, RunReport
from volseg.store.outputs import Commit, OutputFolder, trace_name
from volseg.store.results import EDITED, MASKS, THUMBNAILS, VIEWERS, ResultsFolder, State
from volseg.volume import Volume, slabs_of

FIGURES = "figures"


@dataclass(frozen=True, slots=True)
class CaseFiles:
    """Files that a run writes per case; `folders` are those of its masks."""

    folders: Sequence[str]
    figures: bool
    pages: bool

    def names(self, case_id: str) -> list[str]:
        """List the files of a case, relative to the output folder."""
        return [
            *(f"{folder}/{case_id}{RESULT_SUFFIX}" for folder in self.folders),
            *((f"{FIGURES}/{case_id}.png",) if self.figures else ()),
            *self.page_names(case_id),
        ]

    def page_names(self, case_id: str) -> list[str]:
        return [f"{VIEWERS}/{case_id}.html", f"{THUMBNAILS}/{case_id}.jpg"] if self.pages else []

    @property
    def shared(self) -> list[str]:
        """Files that cover all cases."""
        return ["lesions.csv", "cases.csv", "run.json", *(("report.html",) if self.pages else ())]


class Inputs:
    """SHA-256 of the files of each case, as they were read or else when first requested.

    Reading a file also hashes it; a file is hashed separately only to check an earlier result.

    Args:
        of_masks: also include the masks of the cases.
    """

    def __init__(self, *, of_masks: bool) -> None:
        self._of_masks = of_masks
        self._digests: dict[str, tuple[str, ...]] = {}

    def of(self, case: Case) -> tuple[str, ...]:
        if case.id not in self._digests:
            paths = case_files(case) if self._of_masks else case.images.values()
            self._digests[case.id] = tuple(map(digest_of, paths))
        return self._digests[case.id]

    def were_read(self, case: Case, digests: Iterable[str]) -> None:
        """Store the digests of the files read for a case: its images and its mask, if any."""
        self._digests[case.id] = tuple(digests)


def run_cases(
    cases: Sequence[Case],
    run: Callable[[Sequence[Case]], Iterator[Outcome[Case, None]]],
    key_of: Callable[[Case], str],
    results: ResultsFolder,
    *,
    inputs: Inputs,
    files: CaseFiles,
    stage: str,
    progress: Progress,
    model_name: str = "",
    objects: str = "components",
    about: Mapping[str, Any] | None = None,
    max_ram: int | None = None,
    announce: Announce = ignore_text,
) -> CasesReport:
    """Run every incomplete case; a failure becomes a row, an interruption leaves pending rows.

    Args:
        key_of: hash of the model, options and inputs of a case; called only for recorded cases.
        about: description of the run for report.html. None: write neither report.html nor missing
            pages of complete cases.
        max_ram: memory limit in bytes for report.html and missing pages; None for no limit.

    Raises:
        VolsegError: a file not written by volseg would be overwritten (`E_EXISTS`); no case is run.
    """
    states = {
        case.id: results.state_of(case.id, key_of(case), inputs.of(case))
        if results.has_record(case.id)
        else State.MISSING
        for case in cases
    }
    todo = [case for case in cases if states[case.id] is State.MISSING]
    kept = [case.id for case in cases if states[case.id] in (State.COMPLETE, State.EDITED)]
    done: list[str] = []
    failed: dict[str, str] = {}
    remarks: list[str] = []
    outputs = [*files.shared, *(name for case in todo for name in files.names(case.id))]
    if about is not None:
        outputs += [name for case_id in kept for name in files.page_names(case_id)]
    results.refuse_foreign(outputs)

    def fail(case: Case, error: VolsegError) -> None:
        failed[case.id] = failure_reason(results, case.id, error)
        image = _scan_of(case).name
        row = CaseRow(
            case_id=case.id, status="failed", reason=failed[case.id], image=image, model=model_name
        )
        results.commit_failure(case.id, row, inputs.of(case))

    for case in cases:
        if states[case.id] is State.OTHER_INPUT:
            fail(case, _corrected_for_another_scan(case, results))
        elif states[case.id] is not State.MISSING:
            if states[case.id] is State.EDITED:
                remarks.append(f"{EDITED}: {case.id}: {results.edited_text}")
            results.keep(case.id, _scan_of(case))
    progress(stage, 0.0, f"{len(todo)} of {len(cases)} to do")
    outcomes = run(todo)
    try:
        for count, outcome in enumerate(outcomes, start=1):
            case = outcome.item
            if outcome.error is None:
                done.append(case.id)
            else:
                fail(case, outcome.error)
            progress(stage, count / len(todo), case.id)
        if about is not None:
            remarks += _add_pages(results, kept, max_ram, announce)
    finally:
        if isinstance(outcomes, Generator):
            outcomes.close()  # waits for writes in progress
        reached = {*done, *kept, *failed}
        # A case may have been written while the run was stopping, without an outcome.
        pending = [
            CaseRow(case_id=case.id, status="pending", image=_scan_of(case).name, model=model_name)
            for case in todo
            if case.id not in reached
            and not (results.has_record(case.id) and results.is_complete(case.id, key_of(case)))
        ]
        rows = results.write_tables(pending=pending)
        if about is not None:
            remarks += write_report(
                results, about, rows, budget=page_budget(max_ram, announce, has_run=bool(done))
            )
    kept, failed = without_damaged(kept, failed, rows)
    remarks += damaged_warnings(rows)
    return CasesReport(
        out=results.path,
        done=done,
        kept=kept,
        failed=failed,
        warnings=remarks + remarks_on_scans(rows, [case.id for case in cases]),
        objects=objects,
        pages=about is not None,
    )


def without_damaged(
    kept: Sequence[str],
    failed: Mapping[str, str],
    rows: Iterable[Mapping[str, Any]],
    name_column: str = "case_id",
) -> tuple[list[str], dict[str, str]]:
    """Move kept items with a damaged record to the failed ones; return both.

    Args:
        rows: rows of all items, as returned by `write_tables`.
    """
    reasons = {row[name_column]: row["reason"] for row in rows if row["status"] == "unknown"}
    damaged = {name: reasons[name] for name in kept if name in reasons}
    return [name for name in kept if name not in damaged], {**failed, **damaged}


def damaged_warnings(rows: Iterable[Mapping[str, Any]], name_column: str = "case_id") -> list[str]:
    """Return a warning for each item whose record is damaged."""
    return [
        f"W_RECORD: {row[name_column]}: {row['reason']}"
        for row in rows
        if row["status"] == "unknown"
    ]


def _scan_of(case: Case) -> Path:
    """Return the first image of a case, which names the case in tables."""
    return next(iter(case.images.values()))


def _corrected_for_another_scan(case: Case, results: ResultsFolder) -> ScanError:
    return ScanError(
        f"{_scan_of(case)}: differs from the scan whose mask in {results.path / MASKS} "
        "was corrected by hand",
        fix="restore that scan, give another --out folder, or move the corrected mask away",
        code="E_CHANGED",
    )


def _add_pages(
    results: ResultsFolder,
    kept: Sequence[str],
    max_ram: int | None,
    announce: Announce,
) -> list[str]:
    """Write missing viewer pages of complete cases; return a warning for each that fails."""
    reasons, budget = {}, None
    for name in kept:
        record = results.record(name)
        if record is not None and not results.has_pages(record):
            budget = budget or page_budget(max_ram, announce)
            reasons[name] = remake_page(results, name, record, budget=budget)
    return [f"W_PAGE: {name} has no page: {reason}" for name, reason in reasons.items() if reason]


def done_row(
    case: Case,
    scan: Volume,
    measured: MeasuredLesions,
    *,
    path: Path,
    unit: Unit,
    model: str,
    seconds: float,
    settings: Measure,
    organ_voxels: int | None,
    remarks: Sequence[str] = (),
) -> CaseRow:
    """Return the row of a measured scan, with its warnings.

    Args:
        unit: intensity unit of the scan.
        organ_voxels: voxels of the organ label, lesions excluded; None if no label is an organ.
        remarks: warnings about unit and similarity to the training scans, as `W_CODE: sentence`.
    """
    lesions, specks = measured.largest, measured.specks
    scan_warnings = (*read_header(path).warnings, *intensity_warnings(scan))
    warnings = [*remarks, *(f"{warning.code}: {warning.text}" for warning in scan_warnings)]
    if scan.array.dtype.kind == "f" and not all(
        np.isfinite(scan.array[part]).all() for part in slabs_of(scan.array)
    ):
        warnings.append(
            "W_NAN: some voxels are not finite; lesions that hold one have no intensities"
        )
    if specks is not None:
        warnings.insert(0, specks.warning)
    if organ_voxels == 0:
        warnings.append(
            f"W_ORGAN: no voxel is {settings.organ}, so its volume and the burden are unknown"
        )
    if settings.calcium and (
        specks is not None or any(lesion.agatston_score is None for lesion in lesions)
    ):
        warnings.append("W_CALCIUM: a lesion has no score, its notes say why, so the scan has none")
    elif settings.calcium and not unit.is_hu:
        problem = unit.doubt or f"not in {unit.name}"
        warnings.append(f"W_CALCIUM: calcium is scored in HU, {problem}")
    if measured.touches_border:
        warnings.append(
            "W_BORDER: a lesion touches the border of the scan, so its volume is a lower bound"
        )
    return replace(
        summarise(measured),
        image=path.name,
        model=model,
        seconds=round(seconds, 2),
        warnings="; ".join(warnings),
    )


def write_mask(mask: Volume, commit: Commit, folder: str, case_id: str, *, like: Path) -> None:
    """Write a mask on the grid of the scan `like`.

    Raises:
        ScanError: the scan file was replaced since it was read.
    """
    try:
        write_volume(mask, commit.path(f"{folder}/{case_id}{RESULT_SUFFIX}"), like=like)
    except ValueError as error:
        raise ScanError(
            f"{like}: was replaced by a scan on another grid while it was being used",
            fix="run again",
            code="E_CHANGED",
        ) from error


def write_figure(
    scan: Volume,
    ids: Volume,
    lesions: Sequence[LesionMeasurement],
    case_id: str,
    commit: Commit,
    *,
    unit: Unit,
) -> None:
    from volseg.pages.figures import overlay_png

    picture = overlay_png(scan, ids.array, lesions, title=case_id, is_doubted=bool(unit.doubt))
    commit.write(f"{FIGURES}/{case_id}.png", picture)


def input_key(options: Mapping[str, Any], digests: Iterable[str]) -> str:
    """Return a hash of options and input digests; equal keys mean equal results."""
    parts = [__version__, json.dumps(dict(options), sort_keys=True), *digests]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def case_files(case: Case) -> list[Path]:
    """Return the images of a case and its mask, if any."""
    return [*case.images.values(), *(() if case.reference is None else (case.reference,))]


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a scan, or its path if it cannot be read."""
    try:
        return scan_digest(path)
    except ScanError:
        return str(path)


def run_header(command: str, model: str) -> dict[str, str]:
    """Return what run.json and report.html say about a run before it starts."""
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="minutes")
    return {"command": command, "volseg": __version__, "model": model, "started": now}


def run_description(
    settings: Options, options: Mapping[str, Any], report: RunReport, started: float
) -> dict[str, Any]:
    """Return the content of run.json.

    Args:
        settings: as the caller stated them. options: what they amount to with this model and data.
    """
    return {
        "volseg": __version__,
        "libraries": {
            name: metadata.version(name) for name in ("torch", "monai", "numpy", "nibabel")
        },
        "settings": settings.stated(),
        "options": dict(options),
        "done": list(report.done),
        "kept": list(report.kept),
        "failed": dict(report.failed),
        "seconds": round(time.monotonic() - started, 2),
    }


def reason_of(error: VolsegError) -> str:
    return f"{error.code}: {error}"


def failure_reason(outputs: OutputFolder, name: str, error: VolsegError) -> str:
    """Return why an item failed; for a bug, also write its traceback and name that file."""
    if not isinstance(error, UnexpectedError):
        return reason_of(error)
    outputs.write(trace_name(name), error.trace)
    trace = outputs.path / trace_name(name)
    return f"{error.code}: {error.problem}; to fix: report it with {trace}"


def check_pair(image: Volume, mask: Volume, image_name: str, mask_name: str) -> None:
    difference = image.geometry.difference(mask.geometry)
    if difference:
        overlap = mask.geometry.fraction_inside(image.geometry)
        raise ScanError(
            f"{mask_name}: is not on the grid of its scan {image_name}: {difference}; "
            f"{overlap:.0%} of it lies within the scan",
            fix="give the mask drawn on this scan, or correct one of the affines",
            code="E_PAIR",
        )

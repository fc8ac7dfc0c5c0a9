"""Looping over cases: what every workflow needs to make a failure a row and a second call cheap."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from volseg import __version__
from volseg.errors import ScanError, VolsegError
from volseg.execute.cpu import parse_bytes
from volseg.execute.local import Outcome
from volseg.io.cases import Case
from volseg.io.files import make_folder, sha256_of, write_bytes_atomic
from volseg.io.nifti import intensity_warnings, read_header, write_volume
from volseg.measure.lesions import summarise
from volseg.measure.rows import CaseRow, LesionMeasurement
from volseg.measure.specks import MeasuredLesions
from volseg.recipe import Measure
from volseg.report.results import ResultsFolder, plain
from volseg.volume import Volume, slabs_of
from volseg.workflows.pages import files_of, remake_page, write_report

# What is being done, the share of it that is done in [0, 1], a detail. Stages may take turns; with 0 a stage begins, or begins anew.
Progress = Callable[[str, float, str], None]

SUCCESS, SOME_FAILED, NONE_SUCCEEDED = 0, 3, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """What a workflow did. `details` holds its own results, such as metrics."""

    out: Path
    done: Sequence[str] = ()
    kept: Sequence[str] = ()  # complete from an earlier call
    failed: Mapping[str, str] = field(default_factory=dict)  # case → code and reason
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0 all done, 3 some cases failed, 4 none succeeded."""
        if not self.failed:
            return SUCCESS
        return SOME_FAILED if self.done or self.kept else NONE_SUCCEEDED


def silent(stage: str, share: float, detail: str) -> None:
    """The progress callback of those who do not look."""


def run_cases(
    cases: Sequence[Case],
    run: Callable[[Sequence[Case]], Iterator[Outcome[Case, None]]],
    key_of: Callable[[Case], str],
    results: ResultsFolder,
    model_name: str,
    stage: str,
    progress: Progress,
    objects: str = "components",
    about: Mapping[str, Any] | None = None,
) -> RunReport:
    """Run every case that is not complete; a failure is a row, an interruption leaves pending rows.

    Args:
        about: what report.html is to say of the run; None: it is not made, nor are pages that complete cases lack.
    """
    done, kept, failed, todo = [], [], {}, []
    for case in cases:
        if results.is_complete(case.id, key_of(case)):
            kept.append(case.id)
            results.is_at(case.id, next(iter(case.images.values())))
        else:
            todo.append(case)
    progress(stage, 0.0, f"{len(todo)} of {len(cases)} to do")
    outcomes, remarks = run(todo), []
    try:
        for count, outcome in enumerate(outcomes, start=1):
            case = outcome.item
            if outcome.error is None:
                done.append(case.id)
            else:
                failed[case.id] = reason_of(outcome.error)
                image = next(iter(case.images.values())).name
                results.commit(
                    CaseRow(case_id=case.id, status="failed", reason=failed[case.id], image=image, model=model_name)
                )
            progress(stage, count / len(todo), case.id)
        if about is not None:
            remarks = _add_pages(results, kept)
    finally:
        if isinstance(outcomes, Generator):
            outcomes.close()  # waits for what is being written
        reached = {*done, *kept, *failed}
        # What was written while the run was being stopped is done, though nobody was told.
        waiting = [case for case in cases if case.id not in reached and not results.is_complete(case.id, key_of(case))]
        pending = [
            CaseRow(case_id=case.id, status="pending", image=next(iter(case.images.values())).name, model=model_name)
            for case in waiting
        ]
        results.write_tables(pending=pending)
        if about is not None:
            write_report(results, about, [plain(row) for row in pending])
    return RunReport(
        out=results.path,
        done=done,
        kept=kept,
        failed=failed,
        details={
            "objects": objects,
            "pages": about is not None,
            "warnings": [*results.case_warnings([*done, *kept], "W_SPECKS"), *remarks],
        },
    )


def _add_pages(results: ResultsFolder, kept: Sequence[str]) -> list[str]:
    """Make the viewer pages that complete cases lack, and say why one cannot be made."""
    records = results.records() if kept else {}
    reasons = {name: remake_page(results, name, records[name]) for name in kept if not results.has_pages(records[name])}
    return [f"W_PAGE: {name} has no page: {reason}" for name, reason in reasons.items() if reason]


def done_row(
    case: Case,
    scan: Volume,
    measured: MeasuredLesions,
    *,
    path: Path,
    unit: str,
    model: str,
    seconds: float,
    settings: Measure,
    organ_voxels: int | None,
) -> CaseRow:
    """The row of a scan that was measured, with all that is odd about it.

    Args:
        unit: of its intensities.
        organ_voxels: of the organ's own label; None where no label is the organ.
    """
    lesions, specks = measured.largest, measured.specks
    oddities = (*read_header(path).warnings, *intensity_warnings(scan, is_ct=unit == "HU"))
    warnings = [f"{warning.code}: {warning.text}" for warning in oddities]
    if scan.array.dtype.kind == "f" and not all(np.isfinite(scan.array[part]).all() for part in slabs_of(scan.array)):
        warnings.append("W_NAN: some voxels are not finite; lesions that hold one have no intensities")
    if specks is not None:
        warnings.insert(0, specks.warning)
    if organ_voxels == 0:
        warnings.append(f"W_ORGAN: no voxel is {settings.organ}, so its volume and the burden are unknown")
    if settings.calcium and (specks is not None or any(lesion.agatston_score is None for lesion in lesions)):
        warnings.append("W_CALCIUM: a lesion has no score, its notes say why, so the scan has none")
    elif settings.calcium and unit != "HU":
        warnings.append(f"W_CALCIUM: calcium is scored in HU, not in {unit}")
    if measured.touches_border:
        warnings.append("W_BORDER: a lesion touches the border of the scan, so its volume is a lower bound")
    return CaseRow(
        case_id=case.id,
        status="done",
        **summarise(
            lesions,
            settings,
            unit=unit,
            organ_voxels_ml=None if organ_voxels is None else organ_voxels * scan.geometry.voxel_volume_mm3 / 1000,
            n_specks=len(specks or ()),
            specks_ml=0.0 if specks is None else specks.volume_ml,
            may_be_measurable=specks is not None and specks.may_be_measurable,
        ),
        image=path.name,
        model=model,
        seconds=round(seconds, 2),
        warnings="; ".join(warnings),
    )


@contextmanager
def all_or_none() -> Iterator[list[Path]]:
    """The files of a case, to be filled while they are written: if one cannot be made, none stays."""
    files: list[Path] = []
    try:
        yield files
    except BaseException:
        for file in files:
            file.unlink(missing_ok=True)
        raise


def write_mask(mask: Volume, path: Path, *, like: Path) -> Path:
    make_folder(path.parent)
    write_volume(mask, path, like=like)
    return path


def write_figure(scan: Volume, ids: Volume, lesions: Sequence[LesionMeasurement], case_id: str, out: Path) -> Path:
    from volseg.report.figures import overlay_png

    path = out / "figures" / f"{case_id}.png"
    make_folder(path.parent)
    write_bytes_atomic(path, overlay_png(scan, ids.array, lesions, title=case_id))
    return path


def case_key(options: Mapping[str, Any], case: Case) -> str:
    return input_key(json.dumps(dict(options), sort_keys=True), *case.images.values(), case.reference)


def input_key(settings: str, *inputs: Path | str | None) -> str:
    """Hash of the settings, of texts and of the content of files; a file that cannot be read counts by its name."""
    parts = [__version__, settings]
    for value in inputs:
        files = files_of(value) if isinstance(value, Path) else ()
        try:
            parts += [sha256_of(file) for file in files] or [str(value)]
        except OSError:
            parts.append(str(value))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def about_run(command: str, model: str) -> dict[str, str]:
    """What run.json and report.html say of a run before it begins."""
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="minutes")
    return {"command": command, "volseg": __version__, "model": model, "started": now}


def run_description(command: str, options: Mapping[str, Any], report: RunReport, started: float) -> dict[str, Any]:
    return {
        "command": command,
        "volseg": __version__,
        "libraries": {name: metadata.version(name) for name in ("torch", "monai", "numpy", "nibabel")},
        "options": dict(options),
        "done": list(report.done),
        "kept": list(report.kept),
        "failed": dict(report.failed),
        "seconds": round(time.monotonic() - started, 2),
    }


def reason_of(error: VolsegError) -> str:
    return f"{error.code}: {error}"


def check_pair(image: Volume, mask: Volume, image_name: str, mask_name: str) -> None:
    difference = image.geometry.difference(mask.geometry)
    if difference:
        shared = image.geometry.share_of(mask.geometry)
        raise ScanError(
            f"{mask_name}: is not on the grid of its scan {image_name}: {difference}; {shared:.0%} of it lies within the scan",
            fix="give the mask that was drawn on this scan, or correct the affine of one of them",
            code="E_PAIR",
        )


def amount_of(amount: str | int | None, option: str) -> int | None:
    """Bytes, from a number of them or text such as 4G.

    Raises:
        VolsegError: it is no amount of memory.
    """
    try:
        return None if amount is None else parse_bytes(str(amount))
    except ValueError as error:
        raise VolsegError(
            f"{option} {amount} is no amount of memory", fix="say it as 4G or 500M", code="E_USAGE"
        ) from error

"""Loop over cases: a failed case becomes a row, and a second call skips what is complete."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np

from volseg import __version__
from volseg.commands.pages import page_budget, page_files, remake_page, write_report
from volseg.commands.remarks import ORGAN, remark, remarks_on_scan
from volseg.errors import ScanError, UnexpectedError, VolsegError
from volseg.execution.local import Outcome
from volseg.execution.memory import Budget
from volseg.io.cases import Case
from volseg.io.dicom import is_pet
from volseg.io.formats import RESULT_SUFFIX, is_dicom_scan, table_name, without_places
from volseg.io.header import ScanWarning
from volseg.io.series import IN_SUV, TILT, split_marks, with_mark
from volseg.io.volumes import mask_digest, read_header, scan_digest, volume_of, write_volume
from volseg.measurement.rows import CaseRow
from volseg.measurement.saturation import intensity_warnings
from volseg.measurement.specks import MeasuredLesions
from volseg.measurement.summary import summarise
from volseg.options import InferOptions, MeasureOptions, Options
from volseg.pages.about import About
from volseg.pages.model_box import ModelBox
from volseg.quality.compare import run_warnings
from volseg.recipe import SUV, AnyRecipe, Data, asks_for_suv
from volseg.reports import CasesReport, RunReport
from volseg.store.outputs import Commit, OutputFolder, trace_name
from volseg.store.records import LESION_IDS, MASKS, ItemRow
from volseg.store.results import EDITED, THUMBNAILS, VIEWERS, ResultsFolder, State
from volseg.volume import Volume, slabs_of

FIGURES = "figures"
# --tilt: what becomes of stacks that are not at right angles to their slices
REFUSE, RESAMPLE = "refuse", "resample"


@dataclass(frozen=True, slots=True)
class CaseFiles:
    """Files that a run writes per case.

    Args:
        folders: of its masks.
        mask_suffix: of the files in `masks/`; those in the other folders are NIfTI.
        dicom_folders: of files in DICOM.
    """

    folders: Sequence[str]
    figures: bool
    pages: bool
    mask_suffix: str = RESULT_SUFFIX
    dicom_folders: Sequence[str] = ()

    def names(self, case_id: str) -> list[str]:
        """List the files of a case, relative to the output folder."""
        return [
            *(self.mask_name(folder, case_id) for folder in self.folders),
            *(f"{folder}/{case_id}.dcm" for folder in self.dicom_folders),
            *((f"{FIGURES}/{case_id}.png",) if self.figures else ()),
            *self.page_names(case_id),
        ]

    def mask_name(self, folder: str, case_id: str) -> str:
        return f"{folder}/{case_id}{self.mask_suffix if folder == MASKS else RESULT_SUFFIX}"

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
            digests = [digest_of(path) for path in case.images.values()]
            if self._of_masks and case.reference is not None:
                digests.append(mask_digest_of(case.reference, _scan_of(case)))
            self._digests[case.id] = tuple(digests)
        return self._digests[case.id]

    def were_read(self, case: Case, digests: Iterable[str]) -> None:
        """Store the digests of the files read for a case: its images and its mask, if any."""
        self._digests[case.id] = tuple(digests)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A call of `infer` or `measure` over cases.

    Args:
        key_of: hash of the model, options and inputs of a case.
        stage: name of the work in progress reports.
    """

    results: ResultsFolder
    options: InferOptions | MeasureOptions
    inputs: Inputs
    key_of: Callable[[Case], str]
    files: CaseFiles
    stage: str
    about: About
    objects: str = "components"

    def page_budget(self, *, has_run: bool = False) -> Budget:
        return page_budget(self.options.max_ram, self.options.announce, has_run=has_run)


def run_cases(
    cases: Sequence[Case],
    run: Callable[[Sequence[Case]], Iterator[Outcome[Case, None]]],
    batch: Batch,
) -> CasesReport:
    """Run every incomplete case; a failure becomes a row, an interruption leaves pending rows.

    Raises:
        VolsegError: a file not written by volseg would be overwritten (`E_EXISTS`); no case is run.
    """
    tally, progress = _Tally(batch), batch.options.progress
    todo = tally.skip_complete(cases)
    progress(batch.stage, 0.0, f"{len(todo)} of {len(cases)} to do")
    outcomes = run(todo)
    try:
        for count, outcome in enumerate(outcomes, start=1):
            tally.add(outcome)
            progress(batch.stage, count / len(todo), outcome.item.id)
        if batch.files.pages:
            tally.add_missing_pages()
    finally:
        if isinstance(outcomes, Generator):
            outcomes.close()  # waits for writes in progress
        rows = tally.write_tables(todo)
    kept, failed = without_damaged(tally.kept, tally.failed, rows)
    names = {case.id for case in cases}
    of_scans = [text for row in rows if row.case_id in names for text in remarks_on_scan(row)]
    return CasesReport(
        out=batch.results.path,
        done=tally.done,
        kept=kept,
        failed=failed,
        warnings=[*tally.remarks, *damaged_warnings(rows), *of_scans],
        objects=batch.objects,
        pages=batch.files.pages,
    )


class _Tally:
    """Which cases of a batch are done, kept or failed so far."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self.done: list[str] = []
        self.kept: list[str] = []
        self.failed: dict[str, str] = {}
        self.remarks: list[str] = []

    def skip_complete(self, cases: Sequence[Case]) -> list[Case]:
        """Keep what is complete, and return the cases to do."""
        results, files = self._batch.results, self._batch.files
        states = {case.id: self._state_of(case) for case in cases}

        def cases_in(*kinds: State) -> list[Case]:
            return [case for case in cases if states[case.id] in kinds]

        todo, edited = cases_in(State.MISSING), cases_in(State.EDITED)
        kept = cases_in(State.COMPLETE, State.EDITED)
        outputs = [*files.shared, *chain(*(files.names(case.id) for case in todo))]
        outputs += chain(*(files.page_names(case.id) for case in kept))
        results.check_overwrites(outputs)
        self.kept = [case.id for case in kept]
        self._remark(*(remark(EDITED, case.id, results.edited_text) for case in edited))
        for case in kept:
            results.keep(case.id, _scan_of(case))
        for case in cases_in(State.OTHER_INPUT):
            self._fail(case, _corrected_for_another_scan(case, results))
        return todo

    def _state_of(self, case: Case) -> State:
        results, inputs = self._batch.results, self._batch.inputs
        if not results.has_record(case.id):  # hashing its files would be in vain
            return State.MISSING
        return results.state_of(case.id, self._batch.key_of(case), inputs.of(case))

    def add(self, outcome: Outcome[Case, None]) -> None:
        if outcome.error is not None:
            self._fail(outcome.item, outcome.error)
            return
        self.done.append(outcome.item.id)
        if (record := self._batch.results.record(outcome.item.id)) is not None:
            self._batch.options.warn(*remarks_on_scan(record.case))

    def _remark(self, *warnings: str) -> None:
        self.remarks += warnings
        self._batch.options.warn(*warnings)

    def _fail(self, case: Case, error: VolsegError) -> None:
        self.failed[case.id] = failure_reason(self._batch.results, case.id, error)
        self._batch.options.report_failure(case.id, self.failed[case.id])
        reason = _reason_for_tables(case, self.failed[case.id])
        row = self._unmeasured(case, "failed", reason=reason)
        self._batch.results.commit_failure(row, self._batch.inputs.of(case))

    def _unmeasured(
        self, case: Case, status: Literal["failed", "pending"], reason: str = ""
    ) -> CaseRow:
        return CaseRow(
            case_id=case.id,
            status=status,
            reason=reason,
            image=table_name(_scan_of(case)),
            model=self._batch.about.model,
        )

    def add_missing_pages(self) -> None:
        """Write missing viewer pages of complete cases, with a remark for each that fails."""
        budget, results = None, self._batch.results
        for name in self.kept:
            record = results.record(name)
            if record is not None and not results.has_pages(record):
                budget = budget or self._batch.page_budget()
                if reason := remake_page(results, record, budget=budget):
                    self._remark(remark("W_PAGE", name, f"no page: {reason}"))

    def write_tables(self, todo: Sequence[Case]) -> list[CaseRow]:
        """Write the tables, with rows for pending cases, and report.html."""
        results, reached = self._batch.results, {*self.done, *self.kept, *self.failed}
        # A case may have been written while the run was stopping, without an outcome.
        pending = [
            self._unmeasured(case, "pending")
            for case in todo
            if case.id not in reached
            and not (
                results.has_record(case.id)
                and results.is_complete(case.id, self._batch.key_of(case))
            )
        ]
        rows = results.write_tables(pending)
        if self._batch.files.pages:
            budget = self._batch.page_budget(has_run=bool(self.done))
            self.remarks += write_report(results, self._batch.about, rows, budget=budget)
        return rows


def without_damaged(
    kept: Sequence[str],
    failed: Mapping[str, str],
    rows: Iterable[ItemRow],
    name_column: str = "case_id",
) -> tuple[list[str], dict[str, str]]:
    """Move kept items with a damaged record to the failed ones; return both.

    Args:
        rows: rows of all items, as returned by `write_tables`.
    """
    reasons = {getattr(row, name_column): row.reason for row in rows if row.status == "unknown"}
    damaged = {name: reasons[name] for name in kept if name in reasons}
    return [name for name in kept if name not in damaged], {**failed, **damaged}


def damaged_warnings(rows: Iterable[ItemRow], name_column: str = "case_id") -> list[str]:
    """Return a warning for each item whose record is damaged."""
    return [
        remark("W_RECORD", getattr(row, name_column), row.reason)
        for row in rows
        if row.status == "unknown"
    ]


def _scan_of(case: Case) -> Path:
    """Return the first image of a case, which names the case in tables."""
    return next(iter(case.images.values()))


def _reason_for_tables(case: Case, reason: str) -> str:
    """Return a reason without the paths of DICOM files, which may name the patient."""
    if not any(map(is_dicom_scan, case.images.values())):
        return reason
    names = {path: table_name(path) for path in case.images.values()}
    if case.reference is not None:
        names[case.reference] = "its mask"
    return without_places(reason, names)


def _corrected_for_another_scan(case: Case, results: ResultsFolder) -> ScanError:
    return ScanError(
        f"{_scan_of(case)}: differs from the scan whose mask in {results.path / MASKS} "
        "was corrected by hand",
        fix="restore that scan, give another --out folder, or move the corrected mask away",
        code="E_CHANGED",
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeasuredCase:
    """The measured lesions of a case, which `write_case` writes.

    Args:
        path: the scan file whose grid the ids have; None if the scan is in memory.
        seconds: time taken so far.
        sha256: of the files that were read.
        model: name and hash; empty for a mask from elsewhere.
        remarks: warnings about unit and similarity to the training scans, as `W_CODE: sentence`.
        n_dropped, slices_skipped: as in cases.csv.
    """

    path: Path | None
    lesions: MeasuredLesions
    seconds: float
    sha256: tuple[str, ...]
    model: str = ""
    remarks: Sequence[str] = ()
    n_dropped: int | None = None
    slices_skipped: str | None = None


def write_case(
    measured: MeasuredCase, files: CaseFiles, commit: Commit, box: ModelBox | None = None
) -> CaseRow:
    """Write the lesion ids, picture and page of a case, and return its row."""
    assert measured.path is not None
    started = time.monotonic()
    scan, largest = measured.lesions.scan, measured.lesions.largest
    image, ids, unit = scan.image, scan.lesions.ids, scan.unit
    name = files.mask_name(LESION_IDS, scan.case_id)
    write_mask(image.with_array(ids), commit, name, like=measured.path)
    if files.figures:
        from volseg.pages.figures import overlay_png
        from volseg.pages.preview import picture_window

        window = picture_window(image, ids, unit=unit.name)
        title, is_doubted = scan.case_id, bool(unit.doubt)
        picture = overlay_png(
            image, ids, largest, title=title, window=window, is_doubted=is_doubted
        )
        commit.write(f"{FIGURES}/{scan.case_id}.png", picture)
    row = done_row(measured, read_header(measured.path).warnings)
    if files.pages:
        commit.write_all(page_files(row, largest, image, ids, unit=unit.name, box=box))
    return replace(row, seconds=round(measured.seconds + time.monotonic() - started, 2))


def done_row(measured: MeasuredCase, oddities: Iterable[ScanWarning]) -> CaseRow:
    """Return the row of a measured scan, with its warnings.

    Args:
        oddities: of its header.
    """
    return replace(
        summarise(measured.lesions),
        image=table_name(measured.path) if measured.path else "",
        model=measured.model,
        seconds=round(measured.seconds, 2),
        warnings="; ".join(_warnings(measured, oddities)),
        n_dropped=measured.n_dropped,
        slices_skipped=measured.slices_skipped,
    )


def _warnings(measured: MeasuredCase, oddities: Iterable[ScanWarning]) -> Iterator[str]:
    scan, specks = measured.lesions.scan, measured.lesions.specks
    image = scan.image
    if specks is not None:
        yield specks.warning
    yield from measured.remarks
    for warning in (*oddities, *intensity_warnings(image)):
        yield f"{warning.code}: {warning.text}"
    yield from run_warnings(image, is_hu=scan.unit.is_hu)
    if image.array.dtype.kind == "f" and not all(
        np.isfinite(image.array[part]).all() for part in slabs_of(image.array)
    ):
        yield "W_NAN: some voxels are not finite; lesions that hold one have no intensities"
    if scan.organ_voxels == 0:
        organ = scan.settings.organ
        yield f"{ORGAN}: no voxel is {organ}, so its volume and the burden are unknown"
    if scan.settings.calcium:
        yield from _calcium_warnings(measured.lesions)
    if measured.lesions.touches_border:
        yield "W_BORDER: a lesion touches the border of the scan, so its volume is a lower bound"


def _calcium_warnings(lesions: MeasuredLesions) -> Iterator[str]:
    unit = lesions.scan.unit
    is_unscored = any(lesion.agatston_score is None for lesion in lesions.largest)
    if lesions.specks is not None or is_unscored:
        yield "W_CALCIUM: a lesion has no score, its notes say why, so the scan has none"
    elif not unit.is_hu:
        yield f"W_CALCIUM: calcium is scored in HU, {unit.doubt or f'not in {unit.name}'}"


def write_mask(
    mask: Volume,
    commit: Commit,
    name: str,
    *,
    like: Path,
    label_names: Mapping[int, str] | None = None,
) -> None:
    """Write a mask on the grid of the scan `like`.

    Args:
        name: of its file in the output folder, which decides the format.
        label_names: label → name, stored where the format has names.

    Raises:
        ScanError: the scan file was replaced since it was read.
    """
    try:
        write_volume(mask, commit.path(name), like=like, label_names=label_names)
    except ValueError as error:
        raise ScanError(
            f"{like}: was replaced by a scan on another grid while it was being used",
            fix="run again",
            code="E_CHANGED",
        ) from error


def input_key(options: Mapping[str, Any], digests: Iterable[str]) -> str:
    """Return a hash of options and input digests; equal keys mean equal results."""
    parts = [__version__, json.dumps(dict(options), sort_keys=True), *digests]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def case_files(case: Case) -> list[Path]:
    """Return the images of a case and its mask, if any."""
    return [*case.images.values(), *(() if case.reference is None else (case.reference,))]


def as_read(case: Case, options: InferOptions | MeasureOptions, data: Data | None = None) -> Case:
    """Return the case with paths that say how its files are read: volume, tilt and unit.

    Args:
        data: of the recipe, if any, which may state the unit too.
    """
    (case,) = of_tilt([of_volume(case, options.volume)], options.tilt)
    if asks_for_suv(options.intensity_unit):
        is_one = len(case.images) == 1  # which must be PET; beside others only PET is converted
        images = {
            name: with_mark(path, IN_SUV) if is_one or is_pet(path) else path
            for name, path in case.images.items()
        }
        return replace(case, images=images)
    return case if options.intensity_unit or data is None else of_unit(case, data)


def of_unit(case: Case, data: Data) -> Case:
    """Return the case with paths of PET that are read in the unit of the recipe."""
    images = {name: path_in_unit(path, data) for name, path in case.images.items()}
    return replace(case, images=images)


def path_in_unit(path: Path, data: Data) -> Path:
    """Return the path of a scan; of a PET in DICOM one that is read in SUV, if the recipe is so."""
    return with_mark(path, IN_SUV) if data.intensity_unit == SUV and is_pet(path) else path


def of_tilt(cases: Sequence[Case], tilt: str) -> list[Case]:
    """Return cases with paths that accept a tilted stack, if `tilt` is to resample it."""
    return list(map(_although_tilted, cases)) if tilt == RESAMPLE else list(cases)


def _although_tilted(case: Case) -> Case:
    images = {name: with_mark(path, TILT) for name, path in case.images.items()}
    mask = None if case.reference is None else with_mark(case.reference, TILT)
    return replace(case, images=images, reference=mask)


def of_volume(case: Case, number: int | None) -> Case:
    """Return the case with this volume of each of its files that hold several."""
    if number is None:
        return case
    images = {name: volume_of(path, number) for name, path in case.images.items()}
    mask = None if case.reference is None else volume_of(case.reference, number)
    return replace(case, images=images, reference=mask)


def input_paths(*inputs: Path | str | AnyRecipe | None) -> list[Path]:
    """Return the inputs that are existing files or folders."""
    paths = [split_marks(Path(value))[0] for value in inputs if isinstance(value, Path | str)]
    return [path for path in paths if path.exists()]


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a scan, or its path if it cannot be read."""
    try:
        return scan_digest(path)
    except ScanError:
        return str(path)


def mask_digest_of(path: Path, scan: Path | None) -> str:
    """Return the SHA-256 of a mask, or its path if it cannot be read.

    Args:
        scan: on which it is drawn, if known.
    """
    try:
        return mask_digest(path, scan)
    except ScanError:
        return str(path)


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


def failure_reason(outputs: OutputFolder | None, name: str, error: VolsegError) -> str:
    """Return why an item failed; for a bug, also write its traceback and name that file."""
    if outputs is None or not isinstance(error, UnexpectedError):
        return reason_of(error)
    outputs.write(trace_name(name), error.trace)
    trace = outputs.path / trace_name(name)
    return f"{error.code}: {error.problem}; to fix: report it with {trace}"

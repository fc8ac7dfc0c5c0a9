"""`volseg measure`: measure the lesions of given masks, without a model."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

from volseg.commands.batch import (
    Batch,
    CaseFiles,
    Inputs,
    MeasuredCase,
    case_files,
    check_pair,
    damaged_warnings,
    failure_reason,
    input_key,
    run_cases,
    run_description,
    without_damaged,
    write_case,
)
from volseg.commands.pages import page_budget, read_run, source_of, write_report
from volseg.commands.remarks import ORGAN
from volseg.errors import ScanError, VolsegError
from volseg.execution.local import run
from volseg.execution.memory import Budget, Peak
from volseg.inputs import label_value, shorten
from volseg.io.cases import Case
from volseg.io.formats import RESULT_SUFFIX
from volseg.io.label_names import read_label_names
from volseg.io.label_table import read_label_table
from volseg.io.layouts import find_cases, find_scans
from volseg.io.volumes import MAX_LABELS, read_header, read_mask, read_volume
from volseg.measurement.memory import plan_measuring
from volseg.measurement.rows import CaseRow
from volseg.measurement.scan import SegmentedScan
from volseg.measurement.specks import measure_largest
from volseg.measurement.units import Unit, judge_unit
from volseg.options import MeasureOptions, command
from volseg.pages.about import About
from volseg.pages.model_box import read_model_box
from volseg.postprocessing.lesions import CONNECTIVITY, Objects, label_lesions, remove_organ
from volseg.recipe import Measure, as_recipe, parse_unit
from volseg.reports import CasesReport
from volseg.store.outputs import SAME_KIND, folder_content
from volseg.store.records import LESION_IDS, MASKS, CaseRecord
from volseg.store.results import ResultsFolder, State
from volseg.volume import Volume
from volseg.words import format_count

STAGE, DEFAULT_OUT = "Measuring", "volseg_results"
MOST_OBJECTS = 2**20  # values of a mask whose values are the objects


@command(MeasureOptions)
def measure(options: MeasureOptions) -> CasesReport:
    """Measure masks on their scans, or masks of `infer` that were corrected by hand.

    Raises:
        VolsegError: the request is wrong. A pair that cannot be used becomes a failed row instead.
    """
    started = time.monotonic()
    if options.results is not None:
        _refuse_other_settings(options)
        return measure_corrected(options.results, options)
    if options.objects not in get_args(Objects):
        raise VolsegError(
            f"objects {options.objects!r} is unknown",
            fix="use components or labels",
            code="E_USAGE",
        )
    pairs, unused = _pairs(options)
    settings = _settings_of(options)
    key_options, digests = settings.key_options(figures=options.figures), Inputs(of_masks=True)
    out = options.out or Path(DEFAULT_OUT)
    with ResultsFolder(out, "measure", inputs=_used_files(options, pairs)) as folder:
        batch = Batch(
            results=folder,
            options=options,
            inputs=digests,
            key_of=lambda case: input_key(key_options, digests.of(case)),
            files=_files_of(options),
            stage=STAGE,
            about=About.now("measure"),
            objects=options.objects,
        )
        n_cases = folder.count_items(case.id for case in pairs)
        measured_pairs = ((case, settings.settings) for case in pairs)
        refusals = _refused(measured_pairs, n_cases, options)

        def task(case: Case) -> None:
            if case.id in refusals:
                raise refusals[case.id]
            _measure_and_write(case, settings, batch)

        report = run_cases(pairs, lambda todo: run(task, todo), batch)
        if unused:
            n_masks = len(unused) + len(pairs)
            remark = (
                f"W_MASK: {len(unused)} of {n_masks} masks have no scan and were skipped, "
                f"such as {unused[0]!r}"
            )
            report = replace(report, warnings=[*report.warnings, remark])
        folder.write_run(
            run_description(options, key_options, report, started)
            | batch.about.as_json()
            | {"masks_without_scan": unused}
            | {"connectivity": CONNECTIVITY if settings.objects == "components" else None}
        )
    return report


def _used_files(options: MeasureOptions, pairs: Sequence[Case]) -> list[Path]:
    sources = (options.image, options.mask, options.cases)
    used = [path for path in sources if path is not None]
    used += [path for case in pairs for path in case_files(case)]
    if isinstance(options.recipe, Path | str) and Path(options.recipe).is_file():
        used.append(Path(options.recipe))
    return used


def _measure_and_write(case: Case, settings: _Options, batch: Batch) -> None:
    measured = _measure_case(case, settings)
    scan = measured.lesions.scan
    batch.inputs.were_read(case, measured.sha256)
    with batch.results.staged() as commit:
        record = CaseRecord(
            case=write_case(measured, batch.files, commit),
            lesions=measured.lesions,
            key=batch.key_of(case),
            inputs=batch.inputs.of(case),
            source=source_of(measured.path, scan.image, scan.unit.name),
        )
        batch.results.commit(record, commit)


def _refuse_other_settings(options: MeasureOptions) -> None:
    """Refuse settings that corrected masks take from their model.

    Raises:
        VolsegError: one of them is given.
    """
    allowed = {"results", "figures", "pages", "max_ram"}
    if options.stated().keys() - allowed:
        raise VolsegError(
            f"{options.results}: corrected masks are measured there with the model's settings",
            fix="give the results folder alone, or --image and --mask with another --out",
            code="E_USAGE",
        )


def _settings_of(options: MeasureOptions) -> _Options:
    """Combine the recipe, if any, with the options, which override it."""
    recipe = None if options.recipe is None else as_recipe(options.recipe)
    unit, recipe_unit = _unit_of(options.intensity_unit), None
    if recipe is not None and not recipe.data.unit_guessed:
        recipe_unit = recipe.data.intensity_unit
    names = options.label_names
    if isinstance(names, Path | str):
        names = read_label_names(Path(names))
    arguments = {
        "organ": options.organ,
        "lymph_nodes": options.lymph_nodes,
        "calcium": options.calcium,
    }
    changes = {name: value for name, value in arguments.items() if value not in (None, (), False)}
    return _Options(
        objects=cast(Objects, options.objects),
        label_names=dict(names or (recipe.data.label_names if recipe else {})),
        intensity_unit=unit or recipe_unit,
        stated_by="--unit" if unit else "the recipe",
        settings=(recipe.measure if recipe else Measure()).model_copy(update=changes),
    )


def measure_corrected(results: Path, options: MeasureOptions) -> CasesReport:
    """Measure the masks in a folder of `infer` that were changed by hand since they were measured.

    Later runs of `infer` do not replace a corrected mask.

    Raises:
        VolsegError: `results` is not a folder of `infer`.
    """
    started = time.monotonic()
    files, progress = _files_of(options), options.progress
    if folder_content(results) != SAME_KIND["infer"]:
        raise VolsegError(
            f"{results}: is not a results folder of infer",
            fix="give the --out folder of `volseg infer`, or --image and --mask",
            code="E_USAGE",
        )
    with ResultsFolder(results, "infer") as folder:
        rows = folder.item_rows()
        edited = [row.case_id for row in rows if folder.state_of(row.case_id, None) is State.EDITED]
        folder.refuse_foreign(
            [*files.shared, *(path for name in edited for path in files.names(name))]
        )
        progress(STAGE, 0.0, f"{len(edited)} of {len(rows)} masks were changed by hand")
        reasons: dict[str, str] = {}  # why a case failed; empty if it was measured
        try:
            for name, reason in _measure_again(folder, edited, len(rows), options):
                reasons[name] = reason
                progress(STAGE, len(reasons) / len(edited), name)
        finally:
            rows = folder.write_tables()
            about, missing = read_run(results), []
            if files.pages:
                has_run = "" in reasons.values()
                budget = page_budget(options.max_ram, options.announce, has_run=has_run)
                missing = write_report(folder, About.of(about), rows, budget=budget)
        done = [name for name in reasons if not reasons[name]]
        measured_ids, edited_ids = frozenset(done), frozenset(edited)
        complete = [row.case_id for row in rows if row.status == "done"]
        kept, failed = without_damaged(
            [name for name in complete if name not in edited_ids],
            {name: reason for name, reason in reasons.items() if reason},
            rows,
        )
        warnings = [f"{row.case_id}: {row.warnings}" for row in rows if row.case_id in measured_ids]
        report = CasesReport(
            out=results,
            done=done,
            kept=kept,
            failed=failed,
            warnings=[*warnings, *missing, *damaged_warnings(rows)],
            objects="components",
            pages=files.pages,
        )
        measured = {"command": "measure"} | run_description(
            options, {"figures": files.figures}, report, started
        )
        folder.write_run(about | {"measured_again": measured})
    return report


def _measure_again(
    folder: ResultsFolder, names: Sequence[str], n_cases: int, options: MeasureOptions
) -> Iterator[tuple[str, str]]:
    """Measure the corrected masks; yield the name of each, and why it failed or an empty text."""
    refusals = _refused(_corrected_cases(folder, names), n_cases, options)

    def task(name: str) -> None:
        if name in refusals:
            raise refusals[name]
        _measure_corrected_case(folder, name, _files_of(options))

    for outcome in run(task, names):
        name, reason = outcome.item, ""
        if outcome.error is not None:
            reason = failure_reason(folder, name, outcome.error)
            _keep_failed(folder, name, reason)
        yield name, reason


def _keep_failed(folder: ResultsFolder, name: str, reason: str) -> None:
    """Record that a corrected mask could not be measured, so its numbers are out of date."""
    record = folder.record(name)
    assert record is not None
    row = CaseRow(case_id=name, status="failed", reason=reason)
    folder.commit_failure(row, record.inputs)


def _corrected_cases(folder: ResultsFolder, names: Sequence[str]) -> Iterator[tuple[Case, Measure]]:
    """Yield the corrected cases with a usable record; measuring reports the others."""
    for name in names:
        with contextlib.suppress(ScanError):
            record = folder.record(name)
            assert record is not None
            case, options = _corrected_case(folder, record)
            yield case, options.settings


def _unit_of(text: str | None) -> str:
    """Return the unit given by --unit, or "" if it states none."""
    try:
        return parse_unit(text or "")
    except ValueError as error:
        raise VolsegError(
            f"--unit {error}", fix="--unit HU, SUV, a.u. or another unit", code="E_USAGE"
        ) from error


def _corrected_case(folder: ResultsFolder, record: CaseRecord[Any]) -> tuple[Case, _Options]:
    """Return a corrected mask with its scan, and how it is measured.

    Raises:
        ScanError: its record does not say how.
    """
    source, name = record.source, record.name
    needed = ("scan", "label_names", "unit", "remarks", "measure")
    missing = [item for item in needed if getattr(source, item) is None]
    try:
        if missing or source.scan is None or source.measure is None:
            raise ValueError(f"no valid {', '.join(missing)}")
        options = _Options(
            objects="components",
            label_names=source.label_names or {},
            intensity_unit=parse_unit(source.unit or ""),
            stated_by="the model",
            unit_doubt=source.unit_doubt or "",
            remarks=tuple(source.remarks or ()),
            settings=source.measure,
        )
    except ValueError as error:
        raise ScanError(
            f"{folder.path}: the record of case {name!r} lacks measurement settings ({error})",
            fix="measure the mask with --image, --mask and another --out",
            code="E_RECORD",
        ) from error
    mask = folder.path / MASKS / f"{name}{RESULT_SUFFIX}"
    return Case(name, {"image": source.scan}, reference=mask), options


def _measure_corrected_case(folder: ResultsFolder, name: str, files: CaseFiles) -> None:
    record = folder.record(name)
    assert record is not None
    case, options = _corrected_case(folder, record)
    measured = _measure_case(case, options)
    if measured.sha256[0] != record.source.sha256:
        raise ScanError(
            f"{case.images['image']}: has changed since the mask was made from it",
            fix="restore that scan, or measure the mask with --image, --mask and another --out",
            code="E_CHANGED",
        )
    model = record.case.model
    remark = (
        f"W_CORRECTED: the mask of {model} was corrected by hand, "
        "so there is no confidence and no class"
    )
    measured = replace(measured, model=model, remarks=[*measured.remarks, remark])
    with folder.staged() as commit:
        case_row = write_case(measured, files, commit, read_model_box(record.source.model_box))
        corrected = {f"{MASKS}/{name}{RESULT_SUFFIX}": measured.sha256[-1]}
        new = replace(record, case=case_row, lesions=measured.lesions, corrected=corrected)
        folder.commit(replace(new, failed=None, remark=""), commit)


def _files_of(options: MeasureOptions) -> CaseFiles:
    return CaseFiles((LESION_IDS,), options.figures, options.pages)


def _refused(
    cases: Iterable[tuple[Case, Measure]], n_cases: int, options: MeasureOptions
) -> dict[str, ScanError]:
    """Return errors of the cases that may exceed the memory budget; announce the peak of the rest.

    Args:
        cases: cases with their settings.
        n_cases: number of cases in the folder.
    """
    budget = Budget(
        options.max_ram,
        options.announce,
        what="measuring this mask",
        otherwise="cut scan and mask to the region that matters",
    )
    plans: dict[str, Peak] = {}
    for case, settings in cases:
        assert case.reference is not None
        with contextlib.suppress(VolsegError):  # reading it raises the error later
            scan, mask = read_header(case.images["image"]), read_header(case.reference)
            plans[case.id] = plan_measuring(
                math.prod(scan.geometry.shape),
                scan.dtype.itemsize,
                mask.dtype.itemsize,
                settings,
                process=budget.process,
                n_cases=n_cases,
            )
    return budget.refused(plans)


def _pairs(options: MeasureOptions) -> tuple[list[Case], list[str]]:
    """Return scans with their masks, and the names of masks without a scan."""
    image, mask = options.image, options.mask
    if options.cases is not None and image is None and mask is None:
        return _pairs_of_table(options.cases), []
    if image is None or mask is None or options.cases is not None:
        raise VolsegError(
            "measure needs a scan and its mask, two folders of them, or a table of cases",
            fix="give --image and --mask, or --cases",
            code="E_USAGE",
        )
    if image.is_dir() != mask.is_dir():
        raise VolsegError(
            f"{image} and {mask}: one is a folder, the other is not",
            fix="give two files or two folders",
            code="E_USAGE",
        )
    scans = find_scans([image], ("image",))
    if image.is_dir():
        return _pairs_of_folders(scans, mask)
    if len(scans) > 1:
        raise VolsegError(
            f"{image}: lists {len(scans)} scans, but {mask} is one mask",
            fix=f"give --cases {image}, with the mask of each scan in its `label` column",
            code="E_USAGE",
        )
    return [replace(scans[0], reference=mask)], []


def _pairs_of_table(table: Path) -> list[Case]:
    pairs = find_cases(table, ("image",))
    maskless = [case.id for case in pairs if case.reference is None]
    if maskless:
        cases = f"{format_count(len(maskless), 'case')} without a mask"
        raise VolsegError(
            f"{table}: {cases}, first {maskless[0]!r}",
            fix="fill the `label` column",
            code="E_DATASET",
        )
    return pairs


def _pairs_of_folders(scans: Sequence[Case], folder: Path) -> tuple[list[Case], list[str]]:
    masks = {case.id: next(iter(case.images.values())) for case in find_scans([folder], ("image",))}
    maskless = [case.id for case in scans if case.id not in masks]
    if maskless:
        n = f"{len(maskless)} of {format_count(len(scans), 'scan')}"
        raise VolsegError(
            f"{folder}: has no mask for {n}, first {maskless[0]!r}",
            fix="give each mask the name of its scan, or give --cases with a table of pairs",
            code="E_DATASET",
        )
    unused = sorted(masks.keys() - {case.id for case in scans})
    return [replace(case, reference=masks[case.id]) for case in scans], unused


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    """Options that apply to every case."""

    objects: Objects
    label_names: Mapping[int, str]
    intensity_unit: str | None
    stated_by: str  # `--unit`, the recipe or the model
    unit_doubt: str = ""  # recorded by `infer`
    remarks: tuple[str, ...] = ()  # on similarity to the model's training scans
    settings: Measure

    def key_options(self, *, figures: bool) -> dict[str, Any]:
        """Return the settings on which a case's files depend, as JSON."""
        names = {str(value): name for value, name in self.label_names.items()}
        options = {"objects": self.objects, "label_names": names}
        options |= {"intensity_unit": self.intensity_unit, "figures": figures}
        return options | {"measure": self.settings.model_dump(mode="json")}


@dataclass(frozen=True, slots=True)
class _Names(Mapping[int, str]):
    """Names of all mask values; a value without a stated name is called `label_<value>`."""

    stated: Mapping[int, str]

    def __getitem__(self, value: int) -> str:
        name = self.stated.get(value)
        return f"label_{value}" if name is None else name

    def __iter__(self) -> Iterator[int]:
        return iter(self.stated)

    def __len__(self) -> int:
        return len(self.stated)

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int)


def _measure_case(case: Case, options: _Options) -> MeasuredCase:
    started = time.monotonic()
    path = case.images["image"]
    assert case.reference is not None
    scan = read_volume(path, is_finite=False)
    mask = read_mask(
        case.reference, max_labels=MAX_LABELS if options.objects == "components" else MOST_OBJECTS
    )
    check_pair(scan, mask, str(path), str(case.reference))
    unit = judge_unit(scan, options.intensity_unit, by=options.stated_by)
    if options.unit_doubt:
        unit = replace(unit, doubt=options.unit_doubt)
    segmented = _segmented(case, scan, mask, unit, options)
    remarks = list(options.remarks)
    if unit.doubt and not any(unit.doubt in text for text in remarks):
        remarks.insert(0, f"W_UNIT: {unit.doubt}")
    if segmented.organ_voxels and not segmented.lesions.labels:
        organ = options.settings.organ
        remarks.append(f"{ORGAN}: no label but the organ, {organ}, so no lesion was measured")
    return MeasuredCase(
        path=path,
        lesions=measure_largest(segmented),
        seconds=time.monotonic() - started,
        sha256=(scan.sha256, mask.sha256),
        remarks=remarks,
    )


def _segmented(
    case: Case, scan: Volume, mask: Volume, unit: Unit, options: _Options
) -> SegmentedScan:
    """Return what is measured: the lesions without the organ, and their names."""
    assert case.reference is not None
    names = _Names(options.label_names or read_label_table(case.reference))
    array, organ_voxels, settings = mask.array, None, options.settings
    if settings.organ is not None:
        array, organ_voxels = remove_organ(array, _value_of(settings.organ, names, case.reference))
    node_values = {_value_of(label, names, case.reference) for label in settings.lymph_nodes}
    lesions = label_lesions(array, scan.geometry, objects=options.objects)
    values = [value for value in dict.fromkeys(lesions.labels) if value in node_values]
    nodes = tuple(names[value] for value in values)
    return SegmentedScan(
        case_id=case.id,
        image=scan,
        lesions=lesions,
        unit=unit,
        label_names=names,
        settings=settings.model_copy(update={"lymph_nodes": nodes}),
        organ_voxels=organ_voxels,
    )


def _value_of(label: str, names: Mapping[int, str], path: Path) -> int:
    """Return the value of a label given as a name, `label_7` or `7`; never the background."""
    values = [value for value, name in names.items() if name == label]
    values = values or [label_value(label.removeprefix("label_")) or 0]
    if len(values) == 1 and values[0] > 0:
        return values[0]
    text = f"label {shorten(label)!r}"
    problem = f"has no {text}; it names {', '.join(names.values()) or 'none'}"
    if len(values) > 1:
        problem = f"{text} is the name of {len(values)} values"
    raise VolsegError(
        f"{path}: {problem}",
        fix="give the label's value, 1 or more, or name the values with --label-names",
        code="E_LABELS",
    )

"""`volseg measure`: any masks on their scans → a row per lesion, without a model."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast, get_args

from volseg.errors import ScanError, VolsegError
from volseg.execute.local import run
from volseg.execute.memory import Budget, Peak
from volseg.inputs import MAX_LABEL, MAX_NAME, label_value, read_json, shortened
from volseg.io.cases import Case, find_cases, find_scans, read_table
from volseg.io.nifti import MAX_LABELS, read_header, read_label_table, read_mask, read_volume
from volseg.measure.memory import plan_measuring
from volseg.measure.rows import CaseRow
from volseg.measure.specks import MeasuredLesions, measure_largest
from volseg.measure.units import Unit, judge_unit
from volseg.postprocess.lesions import CONNECTIVITY, Objects, label_lesions, without_organ
from volseg.recipe import Measure, load_recipe, unit_named
from volseg.report.model_box import ModelBox, read_model_box
from volseg.store.outputs import SAME_KIND, Commit, folder_content
from volseg.store.results import LESION_IDS, MASKS, ResultsFolder, State
from volseg.volume import Volume
from volseg.workflows.batch import (
    CaseFiles,
    Inputs,
    Progress,
    RunReport,
    about_run,
    amount_of,
    check_pair,
    damaged_warnings,
    done_row,
    failure_reason,
    files_of_case,
    input_key,
    run_cases,
    run_description,
    silent,
    without_damaged,
    write_figure,
    write_mask,
)
from volseg.workflows.pages import page_budget, read_about, source_of, write_page, write_report

STAGE = "Measuring"
MOST_OBJECTS = 2**20  # values of a mask in which each is an object


def measure(
    results: Path | str | None = None,
    *,
    image: Path | str | None = None,
    mask: Path | str | None = None,
    cases: Path | str | None = None,
    out: Path | str | None = None,
    objects: str = "components",
    label_names: Mapping[int, str] | None = None,
    intensity_unit: str | None = None,
    recipe: Path | str | None = None,
    organ: str | None = None,
    lymph_nodes: Sequence[str] = (),
    calcium: bool = False,
    figures: bool = False,
    pages: bool = True,
    max_ram: str | int | None = None,
    progress: Progress = silent,
    announce: Callable[[str], None] = lambda text: None,
) -> RunReport:
    """Measure any masks on their scans, without a model: one pair, two folders with equal file names, or a table of cases.

    Or measure again what was corrected by hand in the results of `infer`.

    Args:
        results: the folder of `infer`, whose masks that were changed since are measured with the settings of its model;
            nothing but figures, pages and the memory budget may be given beside it.
        out: None for `volseg_results`.
        objects: `components`, each connected part is a lesion; `labels`, each value of the mask is one.
        label_names: value → name; None for those that the mask's own file holds. A value without one is `label_<value>`.
        intensity_unit: of the scans; None: guessed, HU where the scan looks like CT in HU, else a.u. There is no density, mass or
            calcium score without a unit that is stated, and that the intensities do not contradict.
        recipe: whose label names, unit and `[measure]` section hold; what else is given goes before it.
        organ, lymph_nodes: labels, by name or value, that are an organ with lesions in it, and lymph nodes.
        calcium: score calcium, too.
        pages: also write report.html, and a page per scan to look at its lesions.
        max_ram: budget of main memory, such as `4G` or a number of bytes; None for none. A pair that may not fit within it is a
            failed row that says what would do.

    Raises:
        VolsegError: the request is wrong. A pair that cannot be used is a failed row instead.
    """
    started = time.monotonic()
    budget = amount_of(max_ram, "--max-ram")
    if results is not None:
        others = (image, mask, cases, out, label_names, intensity_unit, recipe, organ, *lymph_nodes)
        if any(value is not None for value in others) or calcium or objects != "components":
            raise VolsegError(
                f"{results}: its corrected masks are measured with the model's settings, into the same folder",
                fix="give the results folder alone, or --image and --mask with another --out",
                code="E_USAGE",
            )
        return measure_corrected(
            Path(results),
            figures=figures,
            pages=pages,
            max_ram=budget,
            progress=progress,
            announce=announce,
        )
    if objects not in get_args(Objects):
        raise VolsegError(
            f"objects {objects!r} is unknown", fix="use components or labels", code="E_USAGE"
        )
    found, unused = _pairs(image, mask, cases)
    read = None if recipe is None else load_recipe(recipe)
    stated = _unit_of(intensity_unit)
    of_recipe = read.data.intensity_unit if read and not read.data.unit_guessed else None
    asked = {"organ": organ, "lymph_nodes": tuple(lymph_nodes), "calcium": calcium}
    wanted = _Wanted(
        objects=cast(Objects, objects),
        label_names=dict(label_names or (read.data.label_names if read else {})),
        intensity_unit=stated or of_recipe,
        stated_by="--unit" if stated else "the recipe",
        settings=(read.measure if read else Measure()).model_copy(
            update={name: value for name, value in asked.items() if value not in (None, (), False)}
        ),
        figures=figures,
        pages=pages,
    )
    options = {
        "objects": objects,
        "label_names": {str(k): v for k, v in wanted.label_names.items()},
    }
    options |= {"intensity_unit": wanted.intensity_unit, "figures": figures}
    options |= {"measure": wanted.settings.model_dump(mode="json")}
    about = about_run("measure", "")
    given = [Path(path) for path in (image, mask, cases) if path is not None]
    used = [*given, *(path for case in found for path in files_of_case(case))]
    if recipe is not None and Path(recipe).is_file():
        used.append(Path(recipe))
    digests = Inputs(of_masks=True)

    def key_of(case: Case) -> str:
        return input_key(options, digests.of(case))

    with ResultsFolder(Path(out or "volseg_results"), "measure", inputs=used) as folder:
        n_cases = folder.n_with(case.id for case in found)
        refusals = _refused(((case, wanted.settings) for case in found), n_cases, budget, announce)

        def task(case: Case) -> None:
            if case.id in refusals:
                raise refusals[case.id]
            measured = _measure_case(case, wanted)
            digests.were_read(case, measured.sha256)
            with folder.staged() as commit:
                row = _write_case(case, measured, wanted, commit)
                folder.commit(
                    row,
                    commit,
                    key=key_of(case),
                    inputs=digests.of(case),
                    lesions=measured.lesions,
                    source=source_of(case.images["image"], measured.scan, measured.unit.name),
                )

        report = run_cases(
            found,
            lambda todo: run(task, todo),
            key_of,
            folder,
            inputs=digests,
            files=CaseFiles((LESION_IDS,), figures, pages),
            stage=STAGE,
            progress=progress,
            objects=objects,
            about=about if pages else None,
            max_ram=budget,
            announce=announce,
        )
        if unused:
            remark = f"W_MASK: no scan for {len(unused)} of {len(unused) + len(found)} masks, such as {unused[0]!r}: left out"
            report = replace(
                report,
                details={**report.details, "warnings": [*report.details["warnings"], remark]},
            )
        folder.write_run(
            run_description("measure", options, report, started)
            | about
            | {"masks_without_scan": unused}
            | {"connectivity": CONNECTIVITY if objects == "components" else None}
        )
    return report


def measure_corrected(
    results: Path,
    *,
    figures: bool,
    pages: bool,
    max_ram: int | None,
    progress: Progress,
    announce: Callable[[str], None],
) -> RunReport:
    """Measure the masks in a folder of `infer` that were changed by hand since they were measured.

    A corrected mask is the user's from then on: no later run of `infer` replaces it.

    Args:
        max_ram: bytes; a mask that may not fit within it fails.

    Raises:
        VolsegError: it is no folder of `infer`.
    """
    started = time.monotonic()
    if folder_content(results) != SAME_KIND["infer"]:
        raise VolsegError(
            f"{results}: holds no results of infer",
            fix="give the --out folder of `volseg infer`, or --image and --mask",
            code="E_USAGE",
        )
    done, kept, failed = [], [], {}
    with ResultsFolder(results, "infer") as folder:
        rows = folder.item_rows()
        edited = [
            row["case_id"] for row in rows if folder.state_of(row["case_id"], None) is State.EDITED
        ]
        edited_ids = frozenset(edited)
        kept = [
            row["case_id"]
            for row in rows
            if row["status"] == "done" and row["case_id"] not in edited_ids
        ]
        files = CaseFiles((LESION_IDS,), figures, pages)
        folder.refuse_foreign(
            [*files.shared, *(path for name in edited for path in files.names(name))]
        )
        progress(STAGE, 0.0, f"{len(edited)} of {len(rows)} masks were changed by hand")
        refusals = _refused(_corrected_cases(folder, edited), len(rows), max_ram, announce)

        def task(name: str) -> None:
            if name in refusals:
                raise refusals[name]
            _measure_corrected_case(folder, name, figures=figures, pages=pages)

        outcomes = run(task, edited)
        try:
            for count, outcome in enumerate(outcomes, start=1):
                name = outcome.item
                if outcome.error is None:
                    done.append(name)
                else:
                    failed[name] = failure_reason(folder, name, outcome.error)
                    _keep_failed(folder, name, failed[name])
                progress(STAGE, count / len(edited), name)
        finally:
            rows = folder.write_tables()
            about, missing = read_about(results), []
            if pages:
                missing = write_report(
                    folder, about, rows, budget=page_budget(max_ram, announce, has_run=bool(done))
                )
        measured_ids = frozenset(done)
        kept, failed = without_damaged(kept, failed, rows)
        warnings = [
            f"{row['case_id']}: {row['warnings']}" for row in rows if row["case_id"] in measured_ids
        ]
        warnings += [*missing, *damaged_warnings(rows)]
        report = RunReport(
            out=results,
            done=done,
            kept=kept,
            failed=failed,
            details={"objects": "components", "pages": pages, "warnings": warnings},
        )
        measured = run_description("measure", {"figures": figures}, report, started)
        folder.write_run(dict(about) | {"measured_again": measured})
    return report


def _keep_failed(folder: ResultsFolder, name: str, reason: str) -> None:
    """Say of a corrected mask that could not be measured that the numbers are older than it."""
    record = folder.record(name)
    assert record is not None
    row = CaseRow(case_id=name, status="failed", reason=reason)
    folder.commit_failure(name, row, record.get("inputs", ()))


def _corrected_cases(folder: ResultsFolder, names: Sequence[str]) -> Iterator[tuple[Case, Measure]]:
    """The corrected cases of which the record says how they are measured; measuring the others says what is wrong."""
    for name in names:
        with contextlib.suppress(ScanError):
            case, wanted = _corrected_case(folder, name, figures=False, pages=False)
            yield case, wanted.settings


def _unit_of(text: str | None) -> str:
    """What was given to --unit; empty where it says nothing."""
    try:
        return unit_named(text or "")
    except ValueError as error:
        raise VolsegError(
            f"--unit {error}", fix="--unit HU, SUV, a.u. or another unit", code="E_USAGE"
        ) from error


def _corrected_case(
    folder: ResultsFolder, name: str, *, figures: bool, pages: bool
) -> tuple[Case, _Wanted]:
    """A corrected mask on its scan, and how it is measured.

    Raises:
        ScanError: its record does not say it.
    """
    record = folder.record(name)
    assert record is not None
    source = record["source"]
    try:
        case = Case(
            name, {"image": Path(source["scan"])}, reference=folder.path / MASKS / f"{name}.nii.gz"
        )
        wanted = _Wanted(
            objects="components",
            label_names={int(value): str(text) for value, text in source["label_names"].items()},
            intensity_unit=unit_named(str(source["unit"])),
            stated_by="the model",
            unit_doubt=str(source.get("unit_doubt", "")),
            remarks=_texts(source["remarks"]),
            box=read_model_box(source.get("model_box")),
            settings=Measure.model_validate(source["measure"]),
            figures=figures,
            pages=pages,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ScanError(
            f"{folder.path}: the record of case {name!r} does not say how it was measured ({error!r})",
            fix="measure the mask with --image, --mask and another --out",
            code="E_RECORD",
        ) from error
    return case, wanted


def _texts(content: object) -> tuple[str, ...]:
    if not isinstance(content, list) or not all(isinstance(text, str) for text in content):
        raise TypeError(f"{shortened(repr(content))} is no list of texts")
    return tuple(content)


def _measure_corrected_case(
    folder: ResultsFolder, name: str, *, figures: bool, pages: bool
) -> None:
    record = folder.record(name)
    assert record is not None
    source = record["source"]
    case, wanted = _corrected_case(folder, name, figures=figures, pages=pages)
    measured = _measure_case(case, wanted)
    if measured.scan.sha256 != source.get("sha256"):
        raise ScanError(
            f"{case.images['image']}: is no longer the scan that the mask was made from",
            fix="put that scan back, or measure the mask with --image, --mask and another --out",
            code="E_CHANGED",
        )
    model = record["case"].get("model") or ""
    remark = f"W_CORRECTED: the mask of {model} was corrected by hand, so there is no confidence and no class"
    with folder.staged() as commit:
        row = _write_case(case, measured, wanted, commit, model=model, remark=remark)
        folder.commit(
            row,
            commit,
            key=str(record.get("key", "")),
            inputs=record.get("inputs", ()),
            lesions=measured.lesions,
            source=source,
            corrected={f"{MASKS}/{name}.nii.gz": measured.sha256[-1]},
        )


def _refused(
    cases: Iterable[tuple[Case, Measure]],
    n_cases: int,
    max_ram: int | None,
    announce: Callable[[str], None],
) -> dict[str, ScanError]:
    """The cases that may take more memory than the budget, and why; announces what the largest of the others takes.

    Args:
        cases: each with how it is measured.
        n_cases: of the folder.
        max_ram: bytes; None for no budget.
    """
    budget = Budget(
        max_ram,
        announce,
        what="measuring this mask",
        otherwise="cut scan and mask to the region that matters",
    )
    plans: dict[str, Peak] = {}
    for case, settings in cases:
        assert case.reference is not None
        with contextlib.suppress(VolsegError):  # reading it will say why
            scan, mask = read_header(case.images["image"]), read_header(case.reference)
            plans[case.id] = plan_measuring(
                math.prod(scan.geometry.shape),
                scan.dtype.itemsize,
                mask.dtype.itemsize,
                process=budget.process,
                n_cases=n_cases,
                has_organ=settings.organ is not None,
                calcium=settings.calcium,
            )
    return budget.refused(plans)


def _pairs(
    image: Path | str | None, mask: Path | str | None, cases: Path | str | None
) -> tuple[list[Case], list[str]]:
    if cases is not None and image is None and mask is None:
        found = find_cases(Path(cases), ("image",))
        without = [case.id for case in found if case.reference is None]
        if without:
            raise VolsegError(
                f"{cases}: {len(without)} cases have no mask, first {without[0]!r}",
                fix="fill the `label` column",
                code="E_DATASET",
            )
        return found, []
    if image is None or mask is None or cases is not None:
        raise VolsegError(
            "measure needs a scan and its mask, two folders of them, or a table of cases",
            fix="give --image and --mask, or --cases",
            code="E_USAGE",
        )
    image, mask = Path(image), Path(mask)
    if image.is_dir() != mask.is_dir():
        raise VolsegError(
            f"{image} and {mask}: one is a folder, the other is not",
            fix="give two files or two folders",
            code="E_USAGE",
        )
    scans = find_scans([image], ("image",))
    if not image.is_dir():
        if len(scans) > 1:
            raise VolsegError(
                f"{image}: lists {len(scans)} scans, but {mask} is one mask",
                fix=f"give --cases {image}, with the mask of each scan in its `label` column",
                code="E_USAGE",
            )
        return [replace(scans[0], reference=mask)], []
    masks = {case.id: next(iter(case.images.values())) for case in find_scans([mask], ("image",))}
    alone = [case.id for case in scans if case.id not in masks]
    if alone:
        raise VolsegError(
            f"{mask}: has no mask for {len(alone)} of {len(scans)} scans, first {alone[0]!r}",
            fix="name each mask as its scan, or give --cases with a table of pairs",
            code="E_DATASET",
        )
    return [replace(case, reference=masks[case.id]) for case in scans], sorted(
        masks.keys() - {case.id for case in scans}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """How every case is measured."""

    objects: Objects
    label_names: Mapping[int, str]
    intensity_unit: str | None
    stated_by: str  # `--unit`, the recipe or the model
    unit_doubt: str = ""  # that the model's results had already
    remarks: tuple[str, ...] = ()  # on how the scan resembles the model's training scans
    box: ModelBox | None = None  # of the model
    settings: Measure
    figures: bool
    pages: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Measured:
    """What was measured of a case. `sha256`: of the scan and of the mask that were read."""

    scan: Volume
    ids: Volume
    lesions: MeasuredLesions
    unit: Unit
    settings: Measure
    organ_voxels: int | None
    sha256: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class _Names(Mapping[int, str]):
    """The names of all values of a mask; one that is not among the `stated` is `label_<value>`, and is kept nowhere."""

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


def _measure_case(case: Case, wanted: _Wanted) -> _Measured:
    started = time.monotonic()
    path = case.images["image"]
    assert case.reference is not None
    scan = read_volume(path, is_finite=False)
    mask = read_mask(
        case.reference, max_labels=MAX_LABELS if wanted.objects == "components" else MOST_OBJECTS
    )
    check_pair(scan, mask, str(path), str(case.reference))
    unit = judge_unit(scan, wanted.intensity_unit, by=wanted.stated_by)
    if wanted.unit_doubt:
        unit = replace(unit, doubt=wanted.unit_doubt)
    names = _Names(wanted.label_names or read_label_table(case.reference))
    array, organ_voxels, settings = mask.array, None, wanted.settings
    if settings.organ is not None:
        array, organ_voxels = without_organ(array, _value_of(settings.organ, names, case.reference))
    nodes_wanted = {_value_of(label, names, case.reference) for label in settings.lymph_nodes}
    lesions = label_lesions(array, scan.geometry, objects=wanted.objects)
    nodes = tuple(
        names[value] for value in dict.fromkeys(filter(nodes_wanted.__contains__, lesions.labels))
    )
    settings = settings.model_copy(update={"lymph_nodes": nodes})
    measured = measure_largest(
        scan,
        lesions.ids,
        lesions.labels,
        case_id=case.id,
        label_names=names,
        intensity_unit=unit.name,
        unit_doubt=unit.doubt,
        settings=settings,
        connectivity=CONNECTIVITY if wanted.objects == "components" else None,
    )
    return _Measured(
        scan=scan,
        ids=scan.with_array(lesions.ids),
        lesions=measured,
        unit=unit,
        settings=settings,
        organ_voxels=organ_voxels,
        sha256=(scan.sha256, mask.sha256),
        seconds=time.monotonic() - started,
    )


def _write_case(
    case: Case,
    measured: _Measured,
    wanted: _Wanted,
    commit: Commit,
    *,
    model: str = "",
    remark: str = "",
) -> CaseRow:
    """Write the files of a case; returns its row. `remark`: a further warning."""
    started = time.monotonic()
    path, scan, ids = case.images["image"], measured.scan, measured.ids
    largest = measured.lesions.largest
    write_mask(ids, commit, LESION_IDS, case.id, like=path)
    if wanted.figures:
        write_figure(scan, ids, largest, case.id, commit, unit=measured.unit)
    remarks = [*wanted.remarks, *((remark,) if remark else ())]
    if measured.unit.doubt and not any(measured.unit.doubt in text for text in remarks):
        remarks.insert(0, f"W_UNIT: {measured.unit.doubt}")
    row = done_row(
        case,
        scan,
        measured.lesions,
        path=path,
        unit=measured.unit,
        model=model,
        seconds=measured.seconds,
        settings=measured.settings,
        organ_voxels=measured.organ_voxels,
        remarks=remarks,
    )
    if wanted.pages:
        write_page(
            row, largest, scan, ids.array, unit=measured.unit.name, commit=commit, box=wanted.box
        )
    return replace(row, seconds=round(measured.seconds + time.monotonic() - started, 2))


def _value_of(label: str, names: Mapping[int, str], path: Path) -> int:
    """The value of a label given by its name, or as `label_7` or `7`; never the background."""
    values = [value for value, name in names.items() if name == label]
    values = values or [label_value(label.removeprefix("label_")) or 0]
    if len(values) == 1 and values[0] > 0:
        return values[0]
    shown = f"label {shortened(label)!r}"
    named = ", ".join(names.values()) or "none"
    problem = (
        f"{shown} is the name of {len(values)} values"
        if len(values) > 1
        else f"has no {shown}; named are {named}"
    )
    raise VolsegError(
        f"{path}: {problem}",
        fix="give the label's value, 1 or more, or name the values with --label-names",
        code="E_LABELS",
    )


def read_label_names(path: Path | str) -> dict[int, str]:
    """Value → name from a JSON object (either way round) or a CSV with columns `label` and `name`."""
    path = Path(path)
    names: dict[int, str] = {}
    try:
        if path.suffix.lower() == ".json":
            pairs = [
                (one, other) if one.isdecimal() else (other, one)
                for one, other in read_json(path).items()
            ]
        else:
            path.stat()  # a file that is not there is said so below
            columns, lines = read_table(path)
            label, name = columns.index("label"), columns.index("name")
            pairs = [(cells[label], cells[name]) for _, cells in lines]
        for stated, name in pairs:
            value = _label_value(stated)
            if value is None or not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
                shown = " = ".join(
                    shortened(json.dumps(part, ensure_ascii=False)) for part in (stated, name)
                )
                raise ValueError(
                    f"{shown}: a value is a whole number, a name has 1 to {MAX_NAME} characters"
                )
            if names.get(value, name) != name:
                raise ValueError(f"{value} is both {names[value]!r} and {name!r}")
            names[value] = name
        return names
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise VolsegError(
            f"{path}: not a list of label names ({error.strerror if isinstance(error, OSError) else error})",
            fix='give JSON such as {"1": "spleen"}, or a CSV with columns label and name',
            code="E_LABELS",
        ) from error


def _label_value(stated: object) -> int | None:
    """The value of a mask that JSON or a cell states; None where it states none."""
    if isinstance(stated, str):
        return label_value(stated)
    if isinstance(stated, bool) or not isinstance(stated, (int, float)):
        return None
    return int(stated) if 0 <= stated <= MAX_LABEL and stated == int(stated) else None  # 1.0 is 1

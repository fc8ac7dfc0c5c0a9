"""`volseg measure`: any masks on their scans → a row per lesion, without a model."""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast, get_args

import numpy as np

from volseg.errors import ScanError, VolsegError
from volseg.execute.cpu import give_back_large_blocks
from volseg.execute.local import run
from volseg.io.cases import Case, find_cases, find_scans
from volseg.io.nifti import MAX_LABELS, read_header, read_label_table, read_mask, read_volume
from volseg.measure.memory import MeasurePlan, plan_measuring
from volseg.measure.specks import measure_largest
from volseg.postprocess.lesions import CONNECTIVITY, Objects, label_lesions, without_organ
from volseg.recipe import Measure, load_recipe
from volseg.report.results import ResultsFolder
from volseg.volume import Volume
from volseg.workflows.batch import (
    Progress,
    RunReport,
    about_run,
    all_or_none,
    amount_of,
    case_key,
    check_pair,
    done_row,
    run_cases,
    run_description,
    silent,
    write_figure,
    write_mask,
)
from volseg.workflows.pages import source_of, write_page

CT_BELOW, CT_SHARE = -200.0, 0.01  # HU, and the share of voxels under it from which a scan is taken for CT
KNOWN_UNITS = {"hu": "HU", "suv": "SUV"}  # by which much is decided, however they are written
GUESSES = {  # in a warning
    "HU": "over 1 % of the voxels are under -200, so it was taken for HU: give --unit if it is none",
    "a.u.": "it does not look like HU, so there is no mass and no density: give --unit HU if it is a CT",
}
MOST_OBJECTS = 2**20  # values of a mask in which each is an object


def measure(
    *,
    image: Path | str | None = None,
    mask: Path | str | None = None,
    cases: Path | str | None = None,
    out: Path | str = "volseg_results",
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

    Args:
        objects: `components`, each connected part is a lesion; `labels`, each value of the mask is one.
        label_names: value → name; None for those that the mask's own file holds. A value without one is `label_<value>`.
        intensity_unit: of the scans; None: HU where the scan looks like CT in HU, else a.u.
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
    if objects not in get_args(Objects):
        raise VolsegError(f"objects {objects!r} is unknown", fix="use components or labels", code="E_USAGE")
    found, unused = _pairs(image, mask, cases)
    read = None if recipe is None else load_recipe(recipe)
    asked = {"organ": organ, "lymph_nodes": tuple(lymph_nodes), "calcium": calcium}
    wanted = _Wanted(
        objects=cast(Objects, objects),
        label_names=dict(label_names or (read.data.label_names if read else {})),
        intensity_unit=intensity_unit or (read.data.intensity_unit if read else None),
        settings=(read.measure if read else Measure()).model_copy(update={k: v for k, v in asked.items() if v}),
        figures=figures,
        pages=pages,
    )
    options = {"objects": objects, "label_names": {str(k): v for k, v in wanted.label_names.items()}}
    options |= {"intensity_unit": wanted.intensity_unit, "figures": figures}
    options |= {"measure": wanted.settings.model_dump(mode="json")}
    about = about_run("measure", "")
    with ResultsFolder(Path(out)) as results:
        refusals = _refused(found, wanted, budget, announce)

        def task(case: Case) -> None:
            if case.id in refusals:
                raise refusals[case.id]
            _measure_case(case, results, case_key(options, case), wanted)

        report = run_cases(
            found,
            lambda todo: run(task, todo),
            lambda case: case_key(options, case),
            results,
            "",
            "Measuring",
            progress,
            objects,
            about if pages else None,
        )
        if unused:
            remark = f"W_MASK: no scan for {len(unused)} of {len(unused) + len(found)} masks, such as {unused[0]!r}: left out"
            report = replace(report, details={**report.details, "warnings": [*report.details["warnings"], remark]})
        results.write_run(
            run_description("measure", options, report, started)
            | about
            | {"masks_without_scan": unused}
            | {"connectivity": CONNECTIVITY if objects == "components" else None}
        )
    return report


def _refused(
    cases: Sequence[Case], wanted: _Wanted, max_ram: int | None, announce: Callable[[str], None]
) -> dict[str, ScanError]:
    """The cases that may take more memory than the budget, and why; announces what the largest of the others takes."""
    give_back_large_blocks()
    refusals: dict[str, ScanError] = {}
    plans: dict[str, MeasurePlan] = {}
    for case in cases:
        assert case.reference is not None
        try:
            scan, mask = read_header(case.images["image"]), read_header(case.reference)
        except VolsegError:
            continue  # reading it will say why
        try:
            plans[case.id] = plan_measuring(
                math.prod(scan.geometry.shape),
                scan.dtype.itemsize,
                mask.dtype.itemsize,
                has_organ=wanted.settings.organ is not None,
                calcium=wanted.settings.calcium,
                max_ram=max_ram,
            )
        except ScanError as error:
            refusals[case.id] = error
    if plans:
        largest = max(plans, key=lambda name: plans[name].total)
        announce(f"memory: at most {plans[largest]}, for {largest}")
    return refusals


def _pairs(image: Path | str | None, mask: Path | str | None, cases: Path | str | None) -> tuple[list[Case], list[str]]:
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
    settings: Measure
    figures: bool
    pages: bool


def _measure_case(case: Case, results: ResultsFolder, key: str, wanted: _Wanted) -> None:
    started = time.monotonic()
    path = case.images["image"]
    assert case.reference is not None
    scan = read_volume(path, is_finite=False)
    mask = read_mask(case.reference, max_labels=MAX_LABELS if wanted.objects == "components" else MOST_OBJECTS)
    check_pair(scan, mask, str(path), str(case.reference))
    stated = wanted.intensity_unit
    unit = _guess_unit(scan) if stated is None else KNOWN_UNITS.get(stated.lower(), stated)
    guess = "" if stated is not None else f"W_UNIT: nobody said the unit; {GUESSES[unit]}"
    names = wanted.label_names or read_label_table(case.reference)
    array, organ_voxels, settings = mask.array, None, wanted.settings
    if settings.organ is not None:
        array, organ_voxels = without_organ(array, _value_of(settings.organ, names, case.reference))
    nodes_wanted = {_value_of(label, names, case.reference) for label in settings.lymph_nodes}
    lesions = label_lesions(array, scan.geometry, objects=wanted.objects)
    names = {value: names.get(value, f"label_{value}") for value in dict.fromkeys(lesions.labels)}
    nodes = tuple(name for value, name in names.items() if value in nodes_wanted)
    settings = settings.model_copy(update={"lymph_nodes": nodes})
    measured = measure_largest(
        scan,
        lesions.ids,
        lesions.labels,
        case_id=case.id,
        label_names=names,
        intensity_unit=unit,
        settings=settings,
        connectivity=CONNECTIVITY if wanted.objects == "components" else None,
    )
    rows = measured.largest
    ids = scan.with_array(lesions.ids)
    with all_or_none() as files:
        files.append(write_mask(ids, results.path / "lesion_ids" / f"{case.id}.nii.gz", like=path))
        if wanted.figures:
            files.append(write_figure(scan, ids, rows, case.id, results.path))
        row = done_row(
            case,
            scan,
            measured,
            path=path,
            unit=unit,
            model="",
            seconds=time.monotonic() - started,
            settings=settings,
            organ_voxels=organ_voxels,
        )
        if guess:
            row = replace(row, warnings="; ".join(filter(None, (row.warnings, guess))))
        if wanted.pages:
            files += write_page(row, rows, scan, lesions.ids, unit=unit, out=results.path)
    row = replace(row, seconds=round(time.monotonic() - started, 2))
    results.commit(row, key=key, lesions=measured, files=files, source=source_of(path, unit))


def _guess_unit(scan: Volume) -> str:
    """HU for a scan with a hundredth of its voxels under −200, as air and lung are on a CT and nothing is on MRI or PET.

    Less than that may be what interpolation made of an edge.
    """
    some = scan.intensities(scan.array[::2, ::2, ::2])
    return "HU" if np.count_nonzero(some[np.isfinite(some)] < CT_BELOW) >= CT_SHARE * some.size else "a.u."


def _value_of(label: str, names: Mapping[int, str], path: Path) -> int:
    """The value of a label given by its name, or as `label_7` or `7`."""
    by_name = {name: value for value, name in names.items()}
    number = label.removeprefix("label_")
    if label in by_name or number.isdecimal():
        return by_name[label] if label in by_name else int(number)
    raise VolsegError(
        f"{path}: has no label {label!r}; named are {', '.join(by_name) or 'none'}",
        fix="give the label's value, or name the values with --label-names",
        code="E_LABELS",
    )


def read_label_names(path: Path | str) -> dict[int, str]:
    """Value → name from a JSON object (either way round) or a CSV with columns `label` and `name`."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            pairs = json.loads(text).items()
            return dict((int(k), str(v)) if str(k).isdecimal() else (int(v), str(k)) for k, v in pairs)
        return {int(row["label"]): row["name"] for row in csv.DictReader(text.splitlines())}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise VolsegError(
            f"{path}: not a list of label names ({error})",
            fix='give JSON such as {"1": "spleen"}, or a CSV with columns label and name',
            code="E_LABELS",
        ) from error

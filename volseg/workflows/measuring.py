"""`volseg measure`: any masks on their scans → a row per lesion, without a model."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast, get_args

from volseg.errors import VolsegError
from volseg.execute.local import run
from volseg.io.cases import Case, find_cases, find_scans
from volseg.io.nifti import MAX_LABELS, read_label_table, read_mask, read_volume
from volseg.measure.lesions import measure_lesions
from volseg.measure.units import judge_unit
from volseg.postprocess.lesions import CONNECTIVITY, Objects, label_lesions, without_organ
from volseg.recipe import Measure, load_recipe
from volseg.report.results import ResultsFolder
from volseg.workflows.batch import (
    Progress,
    RunReport,
    about_run,
    all_or_none,
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
    progress: Progress = silent,
) -> RunReport:
    """Measure any masks on their scans, without a model: one pair, two folders with equal file names, or a table of cases.

    Args:
        objects: `components`, each connected part is a lesion; `labels`, each value of the mask is one.
        label_names: value → name; None for those that the mask's own file holds. A value without one is `label_<value>`.
        intensity_unit: of the scans; None: guessed, HU where the scan looks like CT in HU, else a.u. There is no density, mass or
            calcium score without a unit that is stated, and that the intensities do not contradict.
        recipe: whose label names, unit and `[measure]` section hold; what else is given goes before it.
        organ, lymph_nodes: labels, by name or value, that are an organ with lesions in it, and lymph nodes.
        calcium: score calcium, too.
        pages: also write report.html, and a page per scan to look at its lesions.

    Raises:
        VolsegError: the request is wrong. A pair that cannot be used is a failed row instead.
    """
    started = time.monotonic()
    if objects not in get_args(Objects):
        raise VolsegError(f"objects {objects!r} is unknown", fix="use components or labels", code="E_USAGE")
    found, unused = _pairs(image, mask, cases)
    read = None if recipe is None else load_recipe(recipe)
    asked = {"organ": organ, "lymph_nodes": tuple(lymph_nodes), "calcium": calcium}
    wanted = _Wanted(
        objects=cast(Objects, objects),
        label_names=dict(label_names or (read.data.label_names if read else {})),
        intensity_unit=intensity_unit or (read.data.intensity_unit if read and not read.data.unit_guessed else None),
        stated_by="--unit" if intensity_unit else "the recipe",
        settings=(read.measure if read else Measure()).model_copy(update={k: v for k, v in asked.items() if v}),
        figures=figures,
        pages=pages,
    )
    options = {"objects": objects, "label_names": {str(k): v for k, v in wanted.label_names.items()}}
    options |= {"intensity_unit": wanted.intensity_unit, "figures": figures}
    options |= {"measure": wanted.settings.model_dump(mode="json")}
    about = about_run("measure", "")
    with ResultsFolder(Path(out)) as results:

        def task(case: Case) -> None:
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
    stated_by: str  # `--unit` or the recipe
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
    unit = judge_unit(scan, wanted.intensity_unit, by=wanted.stated_by)
    names = wanted.label_names or read_label_table(case.reference)
    array, organ_voxels, settings = mask.array, None, wanted.settings
    if settings.organ is not None:
        array, organ_voxels = without_organ(array, _value_of(settings.organ, names, case.reference))
    nodes_wanted = {_value_of(label, names, case.reference) for label in settings.lymph_nodes}
    lesions = label_lesions(array, scan.geometry, objects=wanted.objects)
    names = {value: names.get(value, f"label_{value}") for value in lesions.labels}
    nodes = tuple(name for value, name in names.items() if value in nodes_wanted)
    settings = settings.model_copy(update={"lymph_nodes": nodes})
    rows = measure_lesions(
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
    ids = scan.with_array(lesions.ids)
    with all_or_none() as files:
        files.append(write_mask(ids, results.path / "lesion_ids" / f"{case.id}.nii.gz", like=path))
        if wanted.figures:
            files.append(write_figure(scan, ids, rows, case.id, results.path))
        row = done_row(
            case,
            scan,
            rows,
            path=path,
            unit=unit,
            model="",
            seconds=time.monotonic() - started,
            settings=settings,
            organ_voxels=organ_voxels,
            remarks=(f"W_UNIT: {unit.doubt}",) if unit.doubt else (),
        )
        if wanted.pages:
            files += write_page(row, rows, scan, lesions.ids, unit=unit.name, out=results.path)
    row = replace(row, seconds=round(time.monotonic() - started, 2))
    results.commit(row, key=key, lesions=rows, files=files, source=source_of(path, unit.name))


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

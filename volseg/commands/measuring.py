"""`volseg measure`: measure the lesions of given masks, without a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import cast

from volseg.commands.batch import (
    Batch,
    CaseFiles,
    Inputs,
    as_read,
    case_files,
    input_key,
    input_paths,
    run_cases,
    run_description,
    write_case,
)
from volseg.commands.correcting import STAGE, measure_corrected
from volseg.commands.mask_measurement import MaskSettings, measure_mask, refused_masks
from volseg.commands.pages import source_of
from volseg.errors import VolsegError
from volseg.execution.local import run
from volseg.io.cases import ONE_CHANNEL, Case, listed
from volseg.io.dicom_masks import mask_files
from volseg.io.label_names import read_label_names
from volseg.io.layouts import find_cases, find_scans, of_spacing, spacing_remarks
from volseg.io.matching import pair_names
from volseg.io.series import split_series, split_spacing
from volseg.io.stacks import is_stack
from volseg.options import MaskOptions, MeasureOptions, command
from volseg.pages.about import About
from volseg.postprocessing.lesions import CONNECTIVITY, Objects
from volseg.recipe import SUV, Measure, Recipe, as_recipe, asks_for_suv, parse_unit
from volseg.reports import CasesReport
from volseg.store.records import LESION_IDS, CaseRecord
from volseg.store.results import ResultsFolder
from volseg.words import format_count

DEFAULT_OUT = "volseg_results"
Remark = Callable[[str], None]  # takes each choice that was made in reading the files


@command(MeasureOptions)
def measure(options: MeasureOptions) -> CasesReport:
    """Measure masks on their scans, or masks of `infer` that were corrected by hand.

    Raises:
        VolsegError: the request is wrong. A pair that cannot be used becomes a failed row instead.

    Example:
        >>> import volseg
        >>> result = volseg.measure(
        ...     image="sample_data/images/phantom_15.nii.gz",
        ...     mask="sample_data/labels/phantom_15.nii.gz",
        ...     intensity_unit="HU",
        ...     out="measured",
        ... )
        >>> len(result.lesions) == int(result.cases["n_lesions"].sum())
        True
    """
    if options.results is not None:
        _refuse_other_settings(options)
        return measure_corrected(options.results, options)
    started = time.monotonic()
    remarks: list[str] = []
    pairs, unused = _pairs(options, remarks.append)
    pairs = [of_spacing(case, options.spacing) for case in pairs]
    remarks += spacing_remarks(pairs, options.spacing)
    options.warn(*remarks)
    settings = settings_of_masks(options)
    key_options, digests = settings.key_options(figures=options.figures), Inputs(of_masks=True)
    out = options.out or Path(DEFAULT_OUT)
    stated = (options.image, options.mask, options.cases, options.recipe)
    inputs = input_paths(*stated, *chain(*map(case_files, pairs)))
    data = None if options.recipe is None else as_recipe(options.recipe).data
    pairs = [as_read(case, options, data) for case in pairs]
    with ResultsFolder(out, "measure", inputs=inputs) as folder:
        batch = Batch(
            results=folder,
            options=options,
            inputs=digests,
            key_of=lambda case: input_key(key_options, digests.of(case)),
            files=CaseFiles((LESION_IDS,), options.figures, options.pages),
            stage=STAGE,
            about=About.now("measure"),
            objects=options.objects,
        )
        report = _measure_pairs(pairs, settings, batch)
        warnings = [*remarks, *report.warnings, *_unused_warning(unused, len(pairs))]
        report = replace(report, warnings=warnings)
        folder.write_run(
            run_description(options, key_options, report, started)
            | batch.about.as_json()
            | {"masks_without_scan": unused}
            | {"connectivity": CONNECTIVITY if settings.objects == "components" else None}
        )
    return report


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


def _pairs(options: MeasureOptions, remark: Remark) -> tuple[list[Case], list[str]]:
    """Return scans with their masks, and the names of masks without a scan."""
    image, mask = options.image, options.mask
    if options.cases is not None and image is None and mask is None:
        return _pairs_of_dataset(options.cases, options.channel, remark), []
    if image is None or mask is None or options.cases is not None:
        raise VolsegError(
            "measure needs a scan and its mask, two folders of them, or a table of cases",
            fix="give --image and --mask, or --cases",
            code="E_USAGE",
        )
    if image.is_dir() and image.resolve() == mask.resolve():
        return _pairs_of_dataset(image, options.channel, remark), []
    requested = (options.channel or ONE_CHANNEL,)
    series, spacing = options.series, options.spacing
    listed_scans = find_scans([image], requested, series=series, spacing=spacing, remark=remark)
    scans = _measured_channel(listed_scans)
    is_folder = _is_folder_of_masks(mask, is_stacked=spacing is not None)
    _refuse_half_folder(image, mask, scans, is_folder=is_folder)
    if is_folder:
        return _pairs_of_folders(scans, mask)
    if len(scans) > 1:
        raise VolsegError(
            f"{image}: lists {len(scans)} scans, but {mask} is one mask",
            fix=f"give --cases {image}, with the mask of each scan in its `label` column",
            code="E_USAGE",
        )
    return [replace(scans[0], reference=mask)], []


def _is_folder_of_masks(mask: Path, *, is_stacked: bool) -> bool:
    """Check whether a path is a folder of masks, rather than of the files of one.

    Args:
        is_stacked: pictures in a folder are one mask.
    """
    return mask.is_dir() and not (is_stacked and is_stack(mask)) and not mask_files(mask)


def _refuse_half_folder(image: Path, mask: Path, scans: Sequence[Case], *, is_folder: bool) -> None:
    """Refuse a folder of scans with one mask, or the reverse; a series or stack is one scan.

    Args:
        is_folder: True if the mask is a folder of masks.
    """
    paths = [scan.images[ONE_CHANNEL] for scan in scans]
    is_series = any(split_series(path)[1] or split_spacing(path)[1] for path in paths)
    if image.is_dir() != is_folder and not is_series:
        raise VolsegError(
            f"{image} and {mask}: one is a folder, the other is not",
            fix="give two files or two folders",
            code="E_USAGE",
        )


def _measured_channel(cases: Sequence[Case]) -> list[Case]:
    """Return cases of one channel under the name that measuring gives it."""
    return [replace(case, images={ONE_CHANNEL: next(iter(case.images.values()))}) for case in cases]


def _pairs_of_dataset(dataset: Path, channel: str | None, remark: Remark) -> list[Case]:
    """Return the cases of a dataset that have a mask; a remark counts the others."""
    cases = find_cases(dataset, None if channel is None else (channel,), remark=remark)
    names = dict.fromkeys(name for case in cases for name in case.images)
    if len(names) > 1:
        raise VolsegError(
            f"{dataset}: has several channels: {listed(names)}",
            fix="give the one on which the masks are measured, such as "
            f"--channel {next(iter(names))}",
            code="E_USAGE",
        )
    pairs = [case for case in cases if case.reference is not None]
    if not pairs:
        raise VolsegError(
            f"{dataset}: none of its {format_count(len(cases), 'case')} has a mask",
            fix="fill the `label` column, or give --image and --mask",
            code="E_DATASET",
        )
    return _measured_channel(pairs)


def _pairs_of_folders(scans: Sequence[Case], folder: Path) -> tuple[list[Case], list[str]]:
    masks = {case.id: case.images["image"] for case in find_scans([folder], ("image",))}
    mask_of = pair_names([case.id for case in scans], masks)
    maskless = [case.id for case in scans if case.id not in mask_of]
    if maskless:
        n = f"{len(maskless)} of {format_count(len(scans), 'scan')}"
        raise VolsegError(
            f"{folder}: has no mask for {n}, first {maskless[0]!r}",
            fix="give each mask the name of its scan, or give --cases with a table of pairs",
            code="E_DATASET",
        )
    unused = sorted(masks.keys() - mask_of.values())
    return [replace(case, reference=masks[mask_of[case.id]]) for case in scans], unused


def _unused_warning(unused: Sequence[str], n_pairs: int) -> list[str]:
    """Return a warning if masks have no scan."""
    if not unused:
        return []
    of_all = f"{len(unused)} of {format_count(len(unused) + n_pairs, 'mask')}"
    skipped = "has no scan and was skipped" if len(unused) == 1 else "have no scan and were skipped"
    return [f"W_MASK: {of_all} {skipped}, such as {unused[0]!r}"]


def settings_of_masks(options: MaskOptions) -> MaskSettings:
    """Combine the recipe, if any, with the options, which override it."""
    recipe = None if options.recipe is None else as_recipe(options.recipe)
    unit = _unit_of(options.intensity_unit)
    names = None if options.label_names is None else read_label_names(options.label_names)
    arguments = {
        "organ": options.organ,
        "lymph_nodes": options.lymph_nodes,
        "calcium": options.calcium,
        "mtv_threshold_suv": options.mtv_threshold or None,
    }
    changes = {name: value for name, value in arguments.items() if value not in (None, (), False)}
    return MaskSettings(
        objects=cast(Objects, options.objects),
        label_names=dict(names or (recipe.data.label_names if recipe else {})),
        intensity_unit=unit or (recipe and _unit_of_recipe(recipe)),
        stated_by="--unit" if unit else "the recipe",
        measure=(recipe.measure if recipe else Measure()).model_copy(update=changes),
        threshold=options.threshold,
    )


def _unit_of(text: str | None) -> str:
    """Return the unit given by --unit, or "" if it states none."""
    if asks_for_suv(text):
        return SUV
    try:
        return parse_unit(text or "")
    except ValueError as error:
        raise VolsegError(
            f"--unit {error}", fix="--unit HU, SUV, SUVbw, a.u. or another unit", code="E_USAGE"
        ) from error


def _unit_of_recipe(recipe: Recipe) -> str | None:
    """Return the unit that a recipe states; None if the plan guessed it."""
    return None if recipe.data.unit_guessed else recipe.data.intensity_unit


def _measure_pairs(pairs: Sequence[Case], settings: MaskSettings, batch: Batch) -> CasesReport:
    """Measure the pairs that are not complete, each in turn."""
    n_cases = batch.results.count_items(case.id for case in pairs)
    measured_pairs = ((case, settings.measure) for case in pairs)
    options = batch.options
    refusals = refused_masks(measured_pairs, n_cases, options.max_ram, options.announce)

    def task(case: Case) -> None:
        if case.id in refusals:
            raise refusals[case.id]
        _measure_and_write(case, settings, batch)

    return run_cases(pairs, lambda todo: run(task, todo), batch)


def _measure_and_write(case: Case, settings: MaskSettings, batch: Batch) -> None:
    measured = measure_mask(case, settings)
    scan = measured.lesions.scan
    batch.inputs.were_read(case, measured.sha256)
    with batch.results.staged() as commit:
        record = CaseRecord(
            case=write_case(measured, batch.files, commit),
            lesions=measured.lesions,
            key=batch.key_of(case),
            inputs=batch.inputs.of(case),
            source=source_of(case.images[ONE_CHANNEL], scan.image, scan.unit.name),
        )
        batch.results.commit(record, commit)

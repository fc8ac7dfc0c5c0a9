"""`volseg preprocess`: scans and masks → a prepared folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from volseg.errors import ScanError, VolsegError
from volseg.execute.local import run
from volseg.inputs import read_json
from volseg.io.cases import Case, survey_cases
from volseg.io.files import json_text
from volseg.io.nifti import read_mask, read_volume
from volseg.io.prepared import (
    IGNORED,
    PreparedCase,
    is_prepared,
    prepared_files,
    write_prepared_case,
)
from volseg.measure.rows import CaseRow
from volseg.measure.units import judge_unit
from volseg.postprocess.lesions import label_lesions
from volseg.preprocess.align import completed, on_one_grid
from volseg.recipe import Recipe, load_recipe
from volseg.store.outputs import OutputFolder, trace_name
from volseg.store.tables import table
from volseg.train.samples import sample_voxels
from volseg.volume import Volume
from volseg.workflows.batch import (
    Inputs,
    Progress,
    RunReport,
    check_pair,
    failure_reason,
    files_of_case,
    input_key,
    reason_of,
    silent,
)

if TYPE_CHECKING:  # torch takes seconds to import; only a workflow that needs it pays
    from volseg.plan import CaseFingerprint, DatasetFingerprint, Plan
    from volseg.sizing import Budget

PREPARED_FILE = "prepared.json"
MASKS, HASHING, LOOKING, PREPARING = (
    "Looking at the masks",
    "Reading the files",
    "Looking at the dataset",
    "Preparing",
)
SPLITS = ("train", "val", "test")
MOST_SHOWN = 10  # mistakes of a dataset written out in one message


def preprocess(
    dataset: Path | str,
    *,
    out: Path | str,
    recipe: Path | str | Recipe | None = None,
    seed: int = 0,
    plan: Plan | None = None,
    budget: Budget | None = None,
    refuse: bool = False,
    progress: Progress = silent,
) -> RunReport:
    """Scans and masks → a prepared folder: memory-mapped arrays, a JSON per case, fingerprint and plan.

    Cases of the test split are left alone. A second call prepares only what is missing or has changed.
    It replaces case by case, and `prepared.json` at the end: interrupted before its first case it has
    changed nothing, and `load_prepared` refuses a folder that it left with cases of both calls.

    Args:
        recipe: None leaves everything to the plan, as `train` does without one.
        plan: in place of the one that follows from this dataset, such as that of a model that exists already.
        budget: of the training, where the plan chooses the size of the network and of its patches.
        refuse: a case that cannot be used is an error, before any is prepared, and not a row.

    Raises:
        VolsegError: the dataset or recipe is wrong, or no case could be read.
    """
    from volseg.plan import DatasetFingerprint, Plan
    from volseg.workflows.planning import recipe_for

    chosen, out = recipe_for(dataset, recipe, progress), Path(out)
    cases = training_cases(Path(dataset), chosen, seed, progress)
    inputs = [Path(dataset), *(path for case in cases for path in files_of_case(case))]
    if isinstance(recipe, Path | str) and Path(recipe).is_file():
        inputs.append(Path(recipe))
    with OutputFolder(out, "preprocess", inputs=inputs) as outputs:
        outputs.refuse_foreign([PREPARED_FILE, "cases.csv"])
        digests = _hashed(cases, progress)
        facts, failed = _facts(
            Path(dataset), cases, digests, chosen, outputs, seed, plan, budget, progress
        )
        facts |= {"is_planned": plan is None, "is_auto": recipe is None}
        if failed and refuse:
            refuse_dataset(Path(dataset), failed)
        used = Plan.model_validate(facts["plan"])
        usable = [case for case in cases if case.id not in failed]
        keys = {case.id: case_key(inputs_of(case, digests), chosen, used, seed) for case in usable}
        kept, missing = [], []
        for case in usable:
            (kept if is_prepared(out / "cases", case.id, keys[case.id]) else missing).append(case)
        n_labels = len(chosen.data.labels)
        outputs.refuse_foreign(
            name for case in missing for name in prepared_files(case.id, n_labels)
        )
        outcomes = run(
            lambda case: prepare_case(case, chosen, used, outputs, keys[case.id], seed, digests),
            missing,
        )
        done = []
        for count, outcome in enumerate(outcomes, start=1):
            progress(PREPARING, count / len(missing), outcome.item.id)
            if outcome.error is None:
                done.append(outcome.item.id)
            else:
                failed[outcome.item.id] = failure_reason(outputs, outcome.item.id, outcome.error)
        listed = {case.id: case.split for case in usable if case.id not in failed}
        fingerprint = DatasetFingerprint.model_validate(facts["fingerprint"])
        warnings = warnings_of(fingerprint, chosen)
        facts |= {"failed": failed, "cases": listed, "keys": {name: keys[name] for name in listed}}
        if not listed and read_header(out).get("cases"):
            warnings = [
                *warnings,
                f"W_STALE: no case could be prepared, so {PREPARED_FILE} stays as it was",
            ]
        else:
            with outputs.staged() as commit:
                commit.write(PREPARED_FILE, json_text(facts | {"warnings": warnings}))
                commit.write("cases.csv", table(CaseRow, _preparation_rows(cases, failed)))
                commit.finish(last=PREPARED_FILE)
    details = {"fingerprint": _summary(fingerprint, used), "warnings": warnings}
    return RunReport(
        out=out, done=done, kept=[case.id for case in kept], failed=failed, details=details
    )


def _facts(
    dataset: Path,
    cases: Sequence[Case],
    digests: Inputs,
    recipe: Recipe,
    outputs: OutputFolder,
    seed: int,
    plan: Plan | None,
    budget: Budget | None,
    progress: Progress,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Recipe, fingerprint and plan for `prepared.json`, and the cases that cannot be used with the reason of each.

    The fingerprint that an earlier call made of the same files is taken from its `prepared.json`.
    """
    from volseg.plan import DEFAULT_BUDGET, DatasetFingerprint, check_budget, make_plan

    parts = {"data": recipe.data.model_dump(mode="json"), "seed": seed}
    key = input_key(parts, [digest for case in cases for digest in inputs_of(case, digests)])
    failed: dict[str, str] = {}
    earlier = read_header(outputs.path)
    try:
        if earlier["key"] != key or earlier["failed"]:
            raise ValueError("made of other files")
        fingerprint = DatasetFingerprint.model_validate(earlier["fingerprint"])
    except (
        ValueError,
        KeyError,
        TypeError,
    ):  # not there yet, or from an interrupted call: looked at again
        fingerprint, failed = _fingerprint(dataset, cases, recipe, seed, progress, outputs)
    plan = (
        make_plan(fingerprint, recipe, budget or DEFAULT_BUDGET)
        if plan is None
        else plan.overruled_by(recipe)
    )
    if budget is not None and budget.is_stated:
        check_budget(plan, recipe, budget)
    found = {"recipe": recipe, "fingerprint": fingerprint, "plan": plan}
    facts = {"key": key} | {name: model.model_dump(mode="json") for name, model in found.items()}
    if not failed and not earlier.get("cases"):  # for the call after this one, if it is interrupted
        outputs.write(PREPARED_FILE, json_text(facts | {"failed": {}, "cases": {}, "keys": {}}))
    return facts, failed


def read_header(prepared: Path) -> Mapping[str, Any]:
    """`prepared.json`; nothing where it is not there or damaged."""
    try:
        content = read_json(prepared / PREPARED_FILE)
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError):
        return {}


def fingerprint_of(
    dataset: Path | str, recipe: Recipe, seed: int, progress: Progress
) -> tuple[DatasetFingerprint, dict[str, str]]:
    """The fingerprint of a dataset's training split, and the cases that cannot be used, with the reason."""
    return _fingerprint(
        Path(dataset), training_cases(Path(dataset), recipe, seed, progress), recipe, seed, progress
    )


def refuse_dataset(
    dataset: Path, failed: Mapping[str, str], mistakes: Sequence[str] = ()
) -> NoReturn:
    """One error for all that is wrong: the cases that cannot be used, with the reason, and the mistakes of the dataset as a whole."""
    listed = [*mistakes, *(f"{case}: {reason}" for case, reason in failed.items())]
    shown = "; ".join(
        f"({number}) {text}" for number, text in enumerate(listed[:MOST_SHOWN], start=1)
    )
    more = f"; and {len(listed) - MOST_SHOWN} more" if len(listed) > MOST_SHOWN else ""
    what = (
        f"{len(failed)} of its cases cannot be used"
        if not mistakes
        else f"{len(listed)} mistake{'s' * (len(listed) > 1)}"
    )
    raise VolsegError(
        f"{dataset}: {what}: {shown}{more}",
        fix="mend these files or take them out of the dataset; `volseg check` lists them all",
        code="E_DATASET",
    )


def warnings_of(fingerprint: DatasetFingerprint, recipe: Recipe) -> list[str]:
    """What is odd about the training cases, though they can be trained on."""
    from volseg.mismatch import says_its_unit  # loads torch

    found = []
    if fingerprint.empty_masks:
        names = ", ".join(fingerprint.empty_masks[:5]) + (
            " …" if len(fingerprint.empty_masks) > 5 else ""
        )
        n = len(fingerprint.empty_masks)
        found.append(
            f"W_EMPTY: {n} of {fingerprint.n_cases} training masks hold no labelled voxel: {names}"
        )
    absent = [
        name
        for value, name in recipe.data.label_names.items()
        if value not in fingerprint.label_voxels
    ]
    if absent:
        found.append(
            f"W_LABELS: no training mask holds {', '.join(absent)}, which cannot be learnt"
        )
    if fingerprint.doubted_units:
        case, reason = next(iter(fingerprint.doubted_units.items()))
        effect = (
            "refuses such scans"
            if says_its_unit(recipe, fingerprint)
            else "gives no number in that unit"
        )
        found.append(
            f"W_UNIT: {len(fingerprint.doubted_units)} of {fingerprint.n_cases} training scans contradict the unit of the "
            f"recipe, and a model {effect}, first {case}: {reason}; correct data.intensity_unit or the scans"
        )
    return found


def _rng_of(case: Case, seed: int) -> np.random.Generator:
    """Of its own for each case, whatever the others are."""
    digest = hashlib.sha256(case.id.encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:4], "big")])


def inputs_of(case: Case, digests: Inputs) -> list[str]:
    """All on which a prepared case depends besides the recipe: an edited table counts as much as an edited scan."""
    facts = json.dumps([case.id, case.split, case.patient, case.classes], sort_keys=True)
    return [*digests.of(case), facts]


def case_key(inputs: Sequence[str], recipe: Recipe, plan: Plan, seed: int) -> str:
    """What a prepared case was made from.

    Of the plan only what a prepared array depends on: another batch or network is no reason to prepare again.

    Args:
        inputs: of the case, from `inputs_of`.
    """
    settings = plan.model_dump(mode="json", include={"spacing_mm", "windows"}) | {"seed": seed}
    return input_key(settings | {"recipe": preparation_of(recipe)}, inputs)


def _hashed(cases: Sequence[Case], progress: Progress) -> Inputs:
    digests = Inputs(of_masks=True)
    for count, case in enumerate(cases, start=1):
        digests.of(case)
        progress(HASHING, count / len(cases), case.id)
    return digests


def training_cases(dataset: Path, recipe: Recipe, seed: int, progress: Progress) -> list[Case]:
    """Cases with a mask outside the test split, each with a split. One without takes that of its patient, if he has one.

    Raises:
        VolsegError: the dataset has mistakes; then its files are looked at as well, and all that is wrong is named at once.
    """
    cases, mistakes = survey_cases(
        dataset, recipe.data.channels, may_miss=recipe.data.missing == "empty"
    )
    unknown = sorted({case.split for case in cases if case.split} - set(SPLITS))
    mistakes += [
        f"split {name!r} is unknown: use {', '.join(SPLITS)} or leave it empty" for name in unknown
    ]
    if mistakes:
        looked = run(
            lambda case: read_training_case(case, recipe),
            [case for case in cases if case.reference is not None],
        )
        failed = {}
        for count, outcome in enumerate(looked, start=1):
            progress(LOOKING, count / len(cases), outcome.item.id)
            if outcome.error is not None:
                failed[outcome.item.id] = reason_of(outcome.error)
        refuse_dataset(dataset, failed, mistakes)
    sides = {case.patient: case.split for case in cases if case.patient and case.split}
    placed = [replace(case, split=case.split or sides.get(case.patient or "")) for case in cases]
    labelled = [case for case in placed if case.reference is not None and case.split != "test"]
    if not labelled:
        raise VolsegError(
            f"{dataset}: none of its {len(cases)} cases has a mask to train on and is outside the test split",
            fix="add a `label` column or a labels/ folder with the names of the images, and check the `split` column",
            code="E_DATASET",
        )
    return _assign_splits(labelled, recipe.train.validation_fraction, seed)


def _assign_splits(cases: Sequence[Case], validation_fraction: float, seed: int) -> list[Case]:
    """Cases with a split each: the dataset's own, or a share of the patients drawn with the seed."""
    if any(case.split == "val" for case in cases):
        return [case if case.split else replace(case, split="train") for case in cases]
    patients = sorted({case.patient or case.id for case in cases})
    if len(patients) < 2:
        raise VolsegError(
            f"training needs at least two patients, one of them for validation; found {len(patients)}",
            fix="add cases, or a `split` column with train and val",
            code="E_DATASET",
        )
    n = min(len(patients) - 1, max(1, round(len(patients) * validation_fraction)))
    drawn = set(np.random.default_rng(seed).permutation(patients)[:n].tolist())
    return [
        replace(case, split="val" if (case.patient or case.id) in drawn else "train")
        for case in cases
    ]


def _fingerprint(
    dataset: Path,
    cases: Sequence[Case],
    recipe: Recipe,
    seed: int,
    progress: Progress,
    outputs: OutputFolder | None = None,
) -> tuple[DatasetFingerprint, dict[str, str]]:
    """The fingerprint of the training split, and the cases of either split which cannot be used, with the reason.

    `outputs`: the folder for tracebacks; None where nothing is written.
    """
    from volseg.plan import combine_fingerprints

    found, failed, empty, doubted = [], {}, [], {}
    for count, outcome in enumerate(run(lambda case: look_at(case, recipe, seed), cases), start=1):
        progress(LOOKING, count / len(cases), outcome.item.id)
        if outcome.error is not None:
            name, error = outcome.item.id, outcome.error
            failed[name] = (
                reason_of(error) if outputs is None else failure_reason(outputs, name, error)
            )
        elif outcome.item.split == "train" and outcome.value is not None:
            found.append(outcome.value)
            if not outcome.value.label_voxels:
                empty.append(outcome.item.id)
            if outcome.value.unit_doubt:
                doubted[outcome.item.id] = outcome.value.unit_doubt
    if not found and failed:
        refuse_dataset(dataset, failed)
    if not found:
        raise VolsegError(
            f"{dataset}: no case is left to train on: all {len(cases)} are for validation",
            fix="give some of them the split `train`",
            code="E_DATASET",
        )
    return combine_fingerprints(found).model_copy(
        update={"empty_masks": tuple(empty), "doubted_units": doubted}
    ), failed


def look_at(case: Case, recipe: Recipe, seed: int) -> CaseFingerprint:
    """The fingerprint of one case.

    Raises:
        ScanError: as `read_training_case`.
    """
    from volseg.plan import fingerprint_case

    images, reference = read_training_case(case, recipe)
    doubt = judge_unit(
        images[recipe.data.channels[0]], recipe.data.intensity_unit, by="the recipe"
    ).doubt
    fingerprint = fingerprint_case(images, _known(reference, recipe), _rng_of(case, seed))
    return fingerprint.model_copy(update={"unit_doubt": doubt})


def read_training_case(
    case: Case, recipe: Recipe, digests: Sequence[str] | None = None
) -> tuple[dict[str, Volume], Volume]:
    """Images of the channels that it has and the mask, checked against each other and the recipe.

    Args:
        digests: SHA-256 of its files, if they have to be those.

    Raises:
        ScanError: naming everything that is wrong with the case.
    """
    images = {
        name: read_volume(case.images[name]) for name in recipe.data.channels if name in case.images
    }
    assert case.reference is not None
    reference = read_mask(case.reference)
    if digests is not None and not {
        volume.sha256 for volume in (*images.values(), reference)
    } <= set(digests):
        raise ScanError(
            f"case {case.id!r}: a file was replaced while the dataset was being prepared",
            fix="run again",
            code="E_CHANGED",
        )
    if recipe.data.grids == "first":
        images = on_one_grid(images, align=recipe.data.align == "rigid")
    problems: list[VolsegError] = []
    for name, image in images.items():
        try:
            check_pair(image, reference, str(case.images[name]), str(case.reference))
        except VolsegError as error:
            if len(images) > 1 and recipe.data.grids == "same":
                others = 'make data.grids = "first" in the recipe if the channels have grids of their own'
                error = ScanError(error.problem, fix=f"{error.fix}; {others}", code=error.code)
            problems.append(error)
    named = {0, recipe.data.ignore, *recipe.data.labels.values()}
    unknown = sorted(set(np.unique(reference.array).tolist()) - named)
    if unknown:
        problems.append(
            ScanError(
                f"{case.reference}: holds values {unknown[:5]}, which the recipe does not name; it names {recipe.data.labels}",
                fix="name every value under [data] labels in the recipe, or correct the mask",
                code="E_LABELS",
            )
        )
    if problems:
        first = problems[0]
        joined = "; ".join(problem.problem for problem in problems)
        raise ScanError(
            joined, fix="; ".join(dict.fromkeys(each.fix for each in problems)), code=first.code
        )
    return images, reference


def _known(reference: Volume, recipe: Recipe) -> Volume:
    """The mask with background where it says that nobody knows."""
    if recipe.data.ignore is None:
        return reference
    return reference.with_array(np.where(reference.array == recipe.data.ignore, 0, reference.array))


def preparation_of(recipe: Recipe) -> dict[str, Any]:
    """The parts of a recipe on which prepared arrays depend."""
    content = recipe.model_dump(mode="json", include={"data", "preprocess", "classify"})
    if content["classify"]:
        kept = ("column", "classes", "field_of_view_mm", "pixels", "low", "high")
        content["classify"] = {key: content["classify"][key] for key in kept}
    return content


def prepare_case(
    case: Case,
    recipe: Recipe,
    plan: Plan,
    outputs: OutputFolder,
    key: str,
    seed: int,
    digests: Inputs,
) -> None:
    """Put the arrays of one case into a prepared folder."""
    prepared = _prepared(case, recipe, plan, key, seed, digests.of(case))
    names = prepared_files(case.id, len(recipe.data.labels))
    with outputs.staged() as commit:
        write_prepared_case(commit.path(names[0]).parent, prepared)
        commit.finish(last=names[0], removed=[*names, trace_name(case.id)])


def _prepared(
    case: Case, recipe: Recipe, plan: Plan, key: str, seed: int, digests: Sequence[str]
) -> PreparedCase:
    """The arrays of a case and what its record says. `digests`: SHA-256 of its files, of which `key` was made."""
    from volseg.infer.classify import lesion_slices
    from volseg.preprocess.prepare import prepare, prepare_mask

    images, reference = read_training_case(case, recipe, digests)
    channels = recipe.data.channels
    absent = [name for name in channels if name not in images]
    prepared = prepare(
        completed(images, channels), plan.prepare_settings(recipe.preprocess, channels, absent)
    )
    values = prepare_mask(reference.array, prepared.trail)
    mask = np.zeros(values.shape, np.uint8)
    for index, value in enumerate(recipe.data.label_names, start=1):
        mask[values == value] = index
    if recipe.data.ignore is not None:
        mask[values == recipe.data.ignore] = IGNORED
    rng = _rng_of(case, seed)
    foreground = {
        index: sample_voxels(mask == index, rng) for index in range(1, len(recipe.data.labels) + 1)
    }
    slices, class_name = None, None
    if recipe.classify is not None:
        class_name = _class_of(case, recipe)
        largest = label_lesions(_known(reference, recipe).array, reference.geometry).ids == 1
        if class_name is not None and largest.any():
            slices = lesion_slices(images[recipe.data.channels[0]], largest, recipe.classify)
    record = {
        "key": key,
        "split": case.split,
        "patient": case.patient or case.id,
        "class": class_name,
        "shape": list(mask.shape),
    }
    return PreparedCase(case.id, prepared.array, mask, foreground, slices, record)


def _class_of(case: Case, recipe: Recipe) -> str | None:
    """The class whose range holds the case's value; None where the value is missing or in no range."""
    assert recipe.classify is not None
    column = recipe.classify.column
    if column not in case.classes:
        raise VolsegError(
            f"case {case.id!r} has no column {column!r}, which [classify] asks for; it has {sorted(case.classes)}",
            fix=f"add the column {column!r} to cases.csv, or remove [classify] from the recipe",
            code="E_DATASET",
        )
    try:
        value = float(case.classes[column])
    except ValueError:
        return None
    ranges = recipe.classify.classes.items()
    return next((name for name, (lowest, highest) in ranges if lowest <= value <= highest), None)


def _preparation_rows(cases: Sequence[Case], failed: Mapping[str, str]) -> list[CaseRow]:
    return [
        CaseRow(
            case_id=case.id,
            status="failed" if case.id in failed else "done",
            reason=failed.get(case.id, ""),
            image=next(iter(case.images.values())).name,
        )
        for case in cases
    ]


def _summary(fingerprint: DatasetFingerprint, plan: Plan) -> dict[str, Any]:
    """The fingerprint in a few numbers, for people and for --json."""
    return {
        "n_cases": fingerprint.n_cases,
        "median_spacing_mm": np.median(fingerprint.spacings_mm, axis=0).round(4).tolist(),
        "median_shape": np.median(fingerprint.shapes, axis=0).astype(int).tolist(),
        "label_voxels": dict(fingerprint.label_voxels),
        "foreground": {
            name: statistics.model_dump() for name, statistics in fingerprint.foreground.items()
        },
        "resampled_to_mm": list(plan.spacing_mm),
    }


def as_recipe(recipe: Path | str | Recipe) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)

"""`volseg preprocess`: scans and masks → a prepared folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from volseg.commands.batch import (
    Inputs,
    case_files,
    check_pair,
    failure_reason,
    input_key,
    reason_of,
)
from volseg.errors import ScanError, VolsegError
from volseg.execution.local import run
from volseg.inputs import read_json
from volseg.io.cases import Case
from volseg.io.files import json_text
from volseg.io.layouts import survey_cases
from volseg.io.prepared import (
    IGNORED,
    PreparedCase,
    is_prepared,
    prepared_files,
    write_prepared_case,
)
from volseg.io.volumes import read_mask, read_volume
from volseg.measurement.rows import CaseRow
from volseg.measurement.units import judge_unit
from volseg.options import PreprocessOptions, Progress, command
from volseg.postprocessing.lesions import label_lesions
from volseg.preprocessing.channels import completed, to_first_grid
from volseg.recipe import Recipe
from volseg.reports import PreprocessReport
from volseg.store.outputs import OutputFolder, trace_name
from volseg.store.tables import table
from volseg.training.samples import sample_voxels
from volseg.volume import Volume

if TYPE_CHECKING:  # torch takes seconds to import; only a command that needs it pays
    from volseg.planning.close import Closed
    from volseg.planning.fingerprint import CaseFingerprint, DatasetFingerprint
    from volseg.sizing import Budget

PREPARED_FILE = "prepared.json"
MASKS, HASHING = "Reading the masks", "Hashing the files"
ANALYSING, PREPARING = "Analysing the dataset", "Preparing"
SPLITS = ("train", "val", "test")
MOST_SHOWN = 10  # mistakes of a dataset listed in one message


@command(PreprocessOptions)
def preprocess(options: PreprocessOptions) -> PreprocessReport:
    """Prepare scans and masks: memory-mapped arrays, a JSON per case, fingerprint and plan.

    Raises:
        VolsegError: the dataset or recipe is wrong, or no case could be read.
    """
    from volseg.commands.planning import budget_of

    return prepare_dataset(options, budget=budget_of(options.device, options.memory))


def prepare_dataset(
    options: PreprocessOptions,
    *,
    earlier: Closed | None = None,
    budget: Budget | None = None,
    refuse: bool = False,
) -> PreprocessReport:
    """Prepare the training and validation cases of a dataset.

    A second call prepares only what is missing or has changed. It replaces case by case, and
    `prepared.json` at the end: interrupted before its first case it has changed nothing, and
    `load_prepared` refuses a folder with cases of both calls.

    Args:
        earlier: the plan of an interrupted call, which is kept.
        budget: of the training, for the size of the network and patches if the plan chooses it.
        refuse: raise an error for an unusable case before any is prepared, instead of listing it.

    Raises:
        VolsegError: the dataset or recipe is wrong, or no case could be read.
    """
    from volseg.commands.planning import recipe_for
    from volseg.planning.close import Closed
    from volseg.planning.fingerprint import DatasetFingerprint

    dataset, out, seed, progress = options.dataset, options.out, options.seed, options.progress
    recipe = recipe_for(dataset, options.recipe, progress)
    cases = training_cases(dataset, recipe, seed, progress)
    inputs = [dataset, *(path for case in cases for path in case_files(case))]
    if isinstance(options.recipe, Path | str) and Path(options.recipe).is_file():
        inputs.append(Path(options.recipe))
    with OutputFolder(out, "preprocess", inputs=inputs) as outputs:
        outputs.check_overwrites([PREPARED_FILE, "cases.csv"])
        digests = _hash_files(cases, progress)
        key = _fingerprint_key(cases, digests, recipe, seed)
        analysed, failed = _known_fingerprint(out, key), dict[str, str]()
        if analysed is None:
            analysed, failed = _fingerprint(dataset, cases, recipe, seed, progress, outputs)
        facts: dict[str, Any] = {
            "key": key,
            "plan": _plan(recipe, analysed, earlier, budget).as_json(),
            "recipe": recipe.model_dump(mode="json"),
            "fingerprint": analysed.model_dump(mode="json"),
        }
        # Lets the next call reuse the fingerprint if this one is interrupted.
        if not failed and not read_header(out).get("cases"):
            unprepared = {"failed": {}, "cases": {}, "keys": {}}
            outputs.write(PREPARED_FILE, json_text(facts | unprepared))
        facts["is_auto"] = options.recipe is None
        if failed and refuse:
            refuse_dataset(dataset, failed)
        planned = Closed.from_json(facts["plan"]).recipe
        usable = [case for case in cases if case.id not in failed]
        keys = {case.id: case_key(case_inputs(case, digests), planned, seed) for case in usable}
        kept, missing = [], []
        for case in usable:
            (kept if is_prepared(out / "cases", case.id, keys[case.id]) else missing).append(case)
        n_labels = len(recipe.data.labels)
        outputs.check_overwrites(
            name for case in missing for name in prepared_files(case.id, n_labels)
        )
        outcomes = run(
            lambda case: prepare_case(case, planned, outputs, keys[case.id], seed, digests),
            missing,
        )
        done = []
        for count, outcome in enumerate(outcomes, start=1):
            progress(PREPARING, count / len(missing), outcome.item.id)
            if outcome.error is None:
                done.append(outcome.item.id)
            else:
                failed[outcome.item.id] = failure_reason(outputs, outcome.item.id, outcome.error)
        splits = {case.id: case.split for case in usable if case.id not in failed}
        fingerprint = DatasetFingerprint.model_validate(facts["fingerprint"])
        warnings = warnings_of(fingerprint, recipe)
        facts |= {"failed": failed, "cases": splits, "keys": {name: keys[name] for name in splits}}
        if not splits and read_header(out).get("cases"):
            stale = f"W_STALE: no case could be prepared, so {PREPARED_FILE} was not changed"
            warnings = [*warnings, stale]
        else:
            with outputs.staged() as commit:
                commit.write(PREPARED_FILE, json_text(facts | {"warnings": warnings}))
                commit.write("cases.csv", table(CaseRow, _preparation_rows(cases, failed)))
                commit.finish(last=PREPARED_FILE)
    return PreprocessReport(
        out=out,
        done=done,
        kept=[case.id for case in kept],
        failed=failed,
        warnings=warnings,
        fingerprint=_summary(fingerprint, planned),
    )


def _fingerprint_key(cases: Sequence[Case], digests: Inputs, recipe: Recipe, seed: int) -> str:
    """Return the key of what decides a dataset's fingerprint."""
    parts = {"data": recipe.data.model_dump(mode="json"), "seed": seed}
    return input_key(parts, [digest for case in cases for digest in case_inputs(case, digests)])


def _known_fingerprint(prepared: Path, key: str) -> DatasetFingerprint | None:
    """Return the fingerprint of an earlier call on the same files, if all could be used."""
    from volseg.planning.fingerprint import DatasetFingerprint

    earlier = read_header(prepared)
    try:
        if earlier["key"] != key or earlier["failed"]:
            return None
        return DatasetFingerprint.model_validate(earlier["fingerprint"])
    except (ValueError, KeyError, TypeError):  # damaged
        return None


def _plan(
    recipe: Recipe, fingerprint: DatasetFingerprint, earlier: Closed | None, budget: Budget | None
) -> Closed:
    """Close the recipe, with the values of an earlier plan if there is one."""
    from volseg.planning.close import DEFAULT_BUDGET, check_budget, close, fill

    if earlier is None:
        plan = close(recipe, fingerprint, budget or DEFAULT_BUDGET)
    else:
        plan = fill(recipe, earlier)
    if budget is not None and budget.is_stated:
        check_budget(plan.recipe, budget)
    return plan


def read_header(prepared: Path) -> Mapping[str, Any]:
    """Read `prepared.json`; return an empty mapping if it is missing or damaged."""
    try:
        content = read_json(prepared / PREPARED_FILE)
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError):
        return {}


def fingerprint_of(
    dataset: Path | str, recipe: Recipe, seed: int, progress: Progress
) -> tuple[DatasetFingerprint, dict[str, str]]:
    """Return the fingerprint of a dataset's training split, and why cases cannot be used."""
    cases = training_cases(Path(dataset), recipe, seed, progress)
    return _fingerprint(Path(dataset), cases, recipe, seed, progress)


def refuse_dataset(
    dataset: Path, failed: Mapping[str, str], mistakes: Sequence[str] = ()
) -> NoReturn:
    """Raise one error that lists the unusable cases and the mistakes of the dataset as a whole."""
    problems = [*mistakes, *(f"{case}: {reason}" for case, reason in failed.items())]
    n = len(problems)
    numbered = enumerate(problems[:MOST_SHOWN], start=1)
    shown = "; ".join(f"({number}) {problem}" for number, problem in numbered)
    more = f"; and {n - MOST_SHOWN} more" if n > MOST_SHOWN else ""
    summary = f"{len(failed)} of its cases cannot be used"
    if mistakes:
        summary = f"{n} mistake{'s' * (n > 1)}"
    raise VolsegError(
        f"{dataset}: {summary}: {shown}{more}",
        fix="correct these files or remove them from the dataset; `volseg check` lists all of them",
        code="E_DATASET",
    )


def warnings_of(fingerprint: DatasetFingerprint, recipe: Recipe) -> list[str]:
    """Return warnings about training cases that are unusual but usable."""
    from volseg.mismatch import has_trusted_unit  # loads torch

    warnings, n_cases = [], fingerprint.n_cases
    if empty := fingerprint.empty_masks:
        names = ", ".join(empty[:5]) + (" …" if len(empty) > 5 else "")
        warnings.append(
            f"W_EMPTY: {len(empty)} of {n_cases} training masks hold no labelled voxel: {names}"
        )
    labels = recipe.data.label_names.items()
    absent = [name for value, name in labels if value not in fingerprint.label_voxels]
    if absent:
        names = ", ".join(absent)
        warnings.append(f"W_LABELS: no training mask holds {names}, which cannot be learnt")
    if doubted := fingerprint.doubted_units:
        case, reason = next(iter(doubted.items()))
        refuses = has_trusted_unit(recipe, fingerprint)
        effect = "refuses such scans" if refuses else "reports no values in that unit"
        warnings.append(
            f"W_UNIT: {len(doubted)} of {n_cases} training scans contradict the unit of the recipe "
            f"(first {case}: {reason}), so a model {effect}; correct data.intensity_unit or the "
            "scans"
        )
    return warnings


def _rng_of(case: Case, seed: int) -> np.random.Generator:
    """Return a generator that depends on the seed and the case's id alone."""
    digest = hashlib.sha256(case.id.encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:4], "big")])


def case_inputs(case: Case, digests: Inputs) -> list[str]:
    """Return everything besides the recipe that a prepared case depends on: files and table row."""
    facts = json.dumps([case.id, case.split, case.patient, case.classes], sort_keys=True)
    return [*digests.of(case), facts]


def case_key(inputs: Sequence[str], recipe: Recipe, seed: int) -> str:
    """Return the hash of everything that a prepared case depends on.

    Args:
        inputs: from `case_inputs`.
        recipe: closed; another batch or network changes no array.
    """
    return input_key({"seed": seed, "recipe": preparation_settings(recipe)}, inputs)


def _hash_files(cases: Sequence[Case], progress: Progress) -> Inputs:
    digests = Inputs(of_masks=True)
    for count, case in enumerate(cases, start=1):
        digests.of(case)
        progress(HASHING, count / len(cases), case.id)
    return digests


def training_cases(dataset: Path, recipe: Recipe, seed: int, progress: Progress) -> list[Case]:
    """Return the cases with a mask outside the test split, each with a split.

    A case without a split gets its patient's, if the patient has one.

    Raises:
        VolsegError: the dataset has mistakes; the error lists them and all unusable files.
    """
    allow_missing = recipe.data.missing == "empty"
    cases, mistakes = survey_cases(dataset, recipe.data.channels, allow_missing=allow_missing)
    unknown = sorted({case.split for case in cases if case.split} - set(SPLITS))
    mistakes += [
        f"split {name!r} is unknown: use {', '.join(SPLITS)} or leave it empty" for name in unknown
    ]
    if mistakes:
        with_mask = [case for case in cases if case.reference is not None]
        outcomes = run(lambda case: read_training_case(case, recipe), with_mask)
        failed = {}
        for count, outcome in enumerate(outcomes, start=1):
            progress(ANALYSING, count / len(cases), outcome.item.id)
            if outcome.error is not None:
                failed[outcome.item.id] = reason_of(outcome.error)
        refuse_dataset(dataset, failed, mistakes)
    split_of = {case.patient: case.split for case in cases if case.patient and case.split}
    cases = [replace(case, split=case.split or split_of.get(case.patient or "")) for case in cases]
    labelled = [case for case in cases if case.reference is not None and case.split != "test"]
    if not labelled:
        raise VolsegError(
            f"{dataset}: none of its {len(cases)} cases has a mask and is outside the test split",
            fix="add a `label` column or a labels/ folder with the names of the images, and check "
            "the `split` column",
            code="E_DATASET",
        )
    return _assign_splits(labelled, recipe.train.validation_fraction, seed)


def _assign_splits(cases: Sequence[Case], validation_fraction: float, seed: int) -> list[Case]:
    """Give each case a split: the dataset's, or a random fraction of the patients validates."""
    if any(case.split == "val" for case in cases):
        return [case if case.split else replace(case, split="train") for case in cases]
    patients = sorted({case.patient or case.id for case in cases})
    if len(patients) < 2:
        raise VolsegError(
            f"training needs at least two patients, one for validation; found {len(patients)}",
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
    """Return the fingerprint of the training split, and why cases of either split are unusable.

    `outputs`: the folder for tracebacks; None to write none.
    """
    from volseg.planning.fingerprint import combine_fingerprints

    fingerprints, failed, empty, doubted = [], {}, [], {}
    for count, outcome in enumerate(run(lambda case: look_at(case, recipe, seed), cases), start=1):
        name, error, fingerprint = outcome.item.id, outcome.error, outcome.value
        progress(ANALYSING, count / len(cases), name)
        if error is not None:
            failed[name] = (
                reason_of(error) if outputs is None else failure_reason(outputs, name, error)
            )
        elif outcome.item.split == "train" and fingerprint is not None:
            fingerprints.append(fingerprint)
            if not fingerprint.label_voxels:
                empty.append(name)
            if fingerprint.unit_doubt:
                doubted[name] = fingerprint.unit_doubt
    if not fingerprints and failed:
        refuse_dataset(dataset, failed)
    if not fingerprints:
        raise VolsegError(
            f"{dataset}: no case is left to train on: all {len(cases)} are for validation",
            fix="give some of them the split `train`",
            code="E_DATASET",
        )
    facts = {"empty_masks": tuple(empty), "doubted_units": doubted}
    return combine_fingerprints(fingerprints).model_copy(update=facts), failed


def look_at(case: Case, recipe: Recipe, seed: int) -> CaseFingerprint:
    """Return the fingerprint of one case.

    Raises:
        ScanError: as `read_training_case`.
    """
    from volseg.planning.fingerprint import fingerprint_case

    images, reference = read_training_case(case, recipe)
    first = images[recipe.data.channels[0]]
    doubt = judge_unit(first, recipe.data.intensity_unit, by="the recipe").doubt
    fingerprint = fingerprint_case(images, _without_ignored(reference, recipe), _rng_of(case, seed))
    return fingerprint.model_copy(update={"unit_doubt": doubt})


def read_training_case(
    case: Case, recipe: Recipe, digests: Sequence[str] | None = None
) -> tuple[dict[str, Volume], Volume]:
    """Read the available channels and the mask; check them against each other and the recipe.

    Args:
        digests: expected SHA-256 of the files; None skips this check.

    Raises:
        ScanError: the case has problems; the error lists all of them.
    """
    available = [name for name in recipe.data.channels if name in case.images]
    images = {name: read_volume(case.images[name]) for name in available}
    assert case.reference is not None
    reference = read_mask(case.reference)
    hashes = {volume.sha256 for volume in (*images.values(), reference)}
    if digests is not None and not hashes <= set(digests):
        raise ScanError(
            f"case {case.id!r}: a file changed while the dataset was being prepared",
            fix="run the command again",
            code="E_CHANGED",
        )
    if recipe.data.grids == "first":
        images = to_first_grid(images, align=recipe.data.align == "rigid")
    problems: list[VolsegError] = []
    for name, image in images.items():
        try:
            check_pair(image, reference, str(case.images[name]), str(case.reference))
        except VolsegError as error:
            if len(images) > 1 and recipe.data.grids == "same":
                fix = f'{error.fix}; set data.grids = "first" if the channels have different grids'
                error = ScanError(error.problem, fix=fix, code=error.code)
            problems.append(error)
    named = {0, recipe.data.ignore, *recipe.data.labels.values()}
    unknown = sorted(set(np.unique(reference.array).tolist()) - named)
    if unknown:
        problems.append(
            ScanError(
                f"{case.reference}: holds values {unknown[:5]}, which the recipe does not name; "
                f"it names {recipe.data.labels}",
                fix="name every value under [data] labels in the recipe, or correct the mask",
                code="E_LABELS",
            )
        )
    if problems:
        text = "; ".join(problem.problem for problem in problems)
        fix = "; ".join(dict.fromkeys(problem.fix for problem in problems))
        raise ScanError(text, fix=fix, code=problems[0].code)
    return images, reference


def _without_ignored(reference: Volume, recipe: Recipe) -> Volume:
    """Return the mask with unannotated voxels as background."""
    if recipe.data.ignore is None:
        return reference
    return reference.with_array(np.where(reference.array == recipe.data.ignore, 0, reference.array))


def preparation_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the parts of a recipe that prepared arrays depend on."""
    content = recipe.model_dump(mode="json", include={"data", "preprocess", "classify"})
    if content["classify"]:
        kept = ("column", "classes", "field_of_view_mm", "pixels", "low", "high")
        content["classify"] = {key: content["classify"][key] for key in kept}
    return content


def prepare_case(
    case: Case,
    recipe: Recipe,
    outputs: OutputFolder,
    key: str,
    seed: int,
    digests: Inputs,
) -> None:
    """Write the arrays of one case to a prepared folder; the recipe is closed."""
    prepared = _prepare(case, recipe, key, seed, digests.of(case))
    names = prepared_files(case.id, len(recipe.data.labels))
    with outputs.staged() as commit:
        write_prepared_case(commit.path(names[0]).parent, prepared)
        commit.finish(last=names[0], removed=[*names, trace_name(case.id)])


def _prepare(
    case: Case, recipe: Recipe, key: str, seed: int, digests: Sequence[str]
) -> PreparedCase:
    """Make the arrays and the record of a case.

    `digests`: SHA-256 of its files, which `key` depends on.
    """
    from volseg.inference.classify import lesion_slices
    from volseg.preprocessing.prepare import prepare, prepare_mask

    images, reference = read_training_case(case, recipe, digests)
    channels = recipe.data.channels
    absent = [name for name in channels if name not in images]
    prepared = prepare(completed(images, channels), recipe.preprocess, absent)
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
        lesions = label_lesions(_without_ignored(reference, recipe).array, reference.geometry)
        largest = lesions.ids == 1
        if class_name is not None and largest.any():
            slices = lesion_slices(images[channels[0]], largest, recipe.classify)
    record = {
        "key": key,
        "split": case.split,
        "patient": case.patient or case.id,
        "class": class_name,
        "shape": list(mask.shape),
    }
    return PreparedCase(case.id, prepared.array, mask, foreground, slices, record)


def _class_of(case: Case, recipe: Recipe) -> str | None:
    """Return the class whose range holds the case's value; None if it is missing or in no range."""
    assert recipe.classify is not None
    column = recipe.classify.column
    if column not in case.classes:
        raise VolsegError(
            f"case {case.id!r} has no column {column!r}, which [classify] needs; it has "
            f"{sorted(case.classes)}",
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


def _summary(fingerprint: DatasetFingerprint, recipe: Recipe) -> dict[str, Any]:
    """Summarise the fingerprint, for people and for --json."""
    return {
        "n_cases": fingerprint.n_cases,
        "median_spacing_mm": np.median(fingerprint.spacings_mm, axis=0).round(4).tolist(),
        "median_shape": np.median(fingerprint.shapes, axis=0).astype(int).tolist(),
        "label_voxels": dict(fingerprint.label_voxels),
        "foreground": {
            name: statistics.model_dump() for name, statistics in fingerprint.foreground.items()
        },
        "resampled_to_mm": list(recipe.spacing_mm),
    }

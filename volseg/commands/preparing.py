"""`volseg preprocess`: scans and masks → a prepared folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from volseg.commands.automatic_recipe import recipe_for
from volseg.commands.batch import Inputs, case_files, failure_reason, input_key, input_paths
from volseg.commands.image_planning import preprocess_images
from volseg.commands.image_recipes import OF_IMAGES, is_of_images
from volseg.commands.planning import budget_of
from volseg.commands.training_cases import (
    TrainingSet,
    class_of,
    read_training_case,
    refuse_dataset,
    warnings_of,
    without_ignored,
)
from volseg.execution.local import run
from volseg.inputs import read_json
from volseg.io.cases import Case
from volseg.io.files import json_text
from volseg.io.formats import table_name
from volseg.io.prepared import (
    IGNORED,
    PreparedCase,
    is_prepared,
    prepared_files,
    write_prepared_case,
)
from volseg.measurement.rows import CaseRow
from volseg.options import PreprocessOptions, Progress, command
from volseg.options.shared import failure_line
from volseg.postprocessing.lesions import label_lesions
from volseg.preprocessing.channels import completed
from volseg.recipe import Recipe
from volseg.reports import PreprocessReport
from volseg.store.outputs import OutputFolder, trace_name
from volseg.store.tables import table
from volseg.training.samples import sample_voxels
from volseg.volume import Volume

if TYPE_CHECKING:  # torch takes seconds to import; only a command that needs it pays
    from volseg.planning.close import Closed
    from volseg.planning.fingerprint import DatasetFingerprint
    from volseg.sizing import Budget

PREPARED_FILE = "prepared.json"
HASHING, PREPARING = "Hashing the files", "Preparing"


@command(PreprocessOptions)
def preprocess(options: PreprocessOptions) -> PreprocessReport:
    """Prepare scans and masks: memory-mapped arrays, a JSON per case, fingerprint and plan.

    Raises:
        VolsegError: the dataset or recipe is wrong, or no case could be read.

    Example:
        >>> import volseg
        >>> result = volseg.preprocess("sample_data", recipe="smoke", out="prepared")
        >>> len(result.done)
        20
    """
    if is_of_images(options.dataset, options.recipe, options.target):
        return preprocess_images(options)
    options.refuse_stated(("target",), OF_IMAGES)
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
    data = _training_set(options)
    recipe = data.recipe
    cases = data.cases(survey := data.survey())
    inputs = input_paths(options.dataset, options.recipe, *chain(*map(case_files, cases)))
    with OutputFolder(options.out, "preprocess", inputs=inputs) as outputs:
        outputs.check_overwrites([PREPARED_FILE, "cases.csv"])
        digests = _hash_files(cases, options.progress)
        key = _fingerprint_key(cases, digests, data)
        stored = _stored_fingerprint(options.out, key)
        fingerprint, failed = (stored, {}) if stored else data.fingerprint(cases, outputs)
        if failed and refuse:
            refuse_dataset(options.dataset, failed)
        warnings = [*survey.remarks, *warnings_of(fingerprint, recipe)]
        options.warn(*warnings)
        planned = _plan(recipe, fingerprint, earlier, budget)
        facts = {
            "key": key,
            "plan": planned.as_json(),
            "recipe": recipe.model_dump(mode="json"),
            "fingerprint": fingerprint.model_dump(mode="json"),
            "is_auto": options.recipe is None,
        }
        _keep_fingerprint(outputs, facts, failed)
        work = Preparation(data, planned.recipe, outputs, digests)
        done, kept = work.run([case for case in cases if case.id not in failed], failed)
        warnings += _finish(work, facts, cases, failed, warnings)
    return PreprocessReport(
        out=options.out,
        done=done,
        kept=kept,
        failed=failed,
        warnings=warnings,
        fingerprint=_summary(fingerprint, planned.recipe),
    )


def _training_set(options: PreprocessOptions) -> TrainingSet:
    recipe = recipe_for(options.dataset, options.recipe, options.progress, options.tilt)
    stated = (options.dataset, recipe, options.seed, options.tilt)
    return TrainingSet(*stated, options.progress, options.announce)


@dataclass(frozen=True, slots=True)
class Preparation:
    """Cases of a dataset on their way to a prepared folder.

    Args:
        recipe: closed.
        digests: of the files of the cases.
    """

    data: TrainingSet
    recipe: Recipe
    outputs: OutputFolder
    digests: Inputs

    def run(self, cases: Sequence[Case], failed: dict[str, str]) -> tuple[list[str], list[str]]:
        """Prepare what is missing; return the ids of prepared and kept cases, and add to `failed`.

        Raises:
            VolsegError: a file not written by volseg would be overwritten (`E_EXISTS`).
        """
        kept: list[Case] = []
        missing: list[Case] = []
        for case in cases:
            is_kept = is_prepared(self.outputs.path / "cases", case.id, self.key_of(case))
            (kept if is_kept else missing).append(case)
        self.outputs.check_overwrites(name for case in missing for name in self._files(case))
        done = []
        for count, outcome in enumerate(run(self.prepare, missing), start=1):
            name = outcome.item.id
            self.data.progress(PREPARING, count / len(missing), name)
            if outcome.error is None:
                done.append(name)
            else:
                failed[name] = failure_reason(self.outputs, name, outcome.error)
                self.data.announce(failure_line(name, failed[name]))
        return done, [case.id for case in kept]

    def key_of(self, case: Case) -> str:
        """Return the hash of everything that a prepared case depends on.

        Another batch or network changes no array, so the key does not depend on them.
        """
        settings = preparation_settings(self.recipe)
        inputs = _case_inputs(case, self.digests)
        return input_key({"seed": self.data.seed, "recipe": settings}, inputs)

    def prepare(self, case: Case) -> None:
        """Write the arrays of one case."""
        prepared, names = self._arrays(case), self._files(case)
        with self.outputs.staged() as commit:
            write_prepared_case(commit.path(names[0]).parent, prepared)
            commit.finish(last=names[0], removed=[*names, trace_name(case.id)])

    def _files(self, case: Case) -> list[str]:
        return prepared_files(case.id, len(self.recipe.data.labels))

    def _arrays(self, case: Case) -> PreparedCase:
        """Make the arrays and the record of a case."""
        from volseg.preprocessing.prepare import prepare, prepare_mask

        data = self.recipe.data
        read = read_training_case(case, self.recipe, self.digests.of(case))
        images, reference = read.images, read.reference
        absent = [name for name in data.channels if name not in images]
        prepared = prepare(completed(images, data.channels), self.recipe.preprocess, absent)
        values = prepare_mask(reference.array, prepared.trail)
        mask = np.zeros(values.shape, np.uint8)
        for index, value in enumerate(data.label_names, start=1):
            mask[values == value] = index
        if data.ignore is not None:
            mask[values == data.ignore] = IGNORED
        rng, n_labels = self.data.rng_of(case), len(data.labels)
        foreground = {index: sample_voxels(mask == index, rng) for index in range(1, n_labels + 1)}
        class_name, slices = self._lesion(case, images[data.channels[0]], reference)
        record = {
            "key": self.key_of(case),
            "split": case.split,
            "patient": case.patient or case.id,
            "class": class_name,
            "shape": list(mask.shape),
        }
        return PreparedCase(case.id, prepared.array, mask, foreground, slices, record)

    def _lesion(
        self, case: Case, image: Volume, reference: Volume
    ) -> tuple[str | None, np.ndarray | None]:
        """Return the class of the largest lesion and its slices; None where there is none."""
        from volseg.inference.classify import lesion_slices

        if self.recipe.classify is None:
            return None, None
        class_name = class_of(case, self.recipe)
        mask = without_ignored(reference, self.recipe)
        largest = label_lesions(mask.array, mask.geometry).ids == 1
        if class_name is None or not largest.any():
            return class_name, None
        return class_name, lesion_slices(image, largest, self.recipe.classify)


def _hash_files(cases: Sequence[Case], progress: Progress) -> Inputs:
    digests = Inputs(of_masks=True)
    for count, case in enumerate(cases, start=1):
        digests.of(case)
        progress(HASHING, count / len(cases), case.id)
    return digests


def _case_inputs(case: Case, digests: Inputs) -> list[str]:
    """Return everything besides the recipe that a prepared case depends on: files and table row."""
    facts = json.dumps([case.id, case.split, case.patient, case.classes], sort_keys=True)
    return [*digests.of(case), facts]


def _fingerprint_key(cases: Sequence[Case], digests: Inputs, data: TrainingSet) -> str:
    """Return the key of what decides a dataset's fingerprint."""
    parts = {"data": data.recipe.data.model_dump(mode="json"), "seed": data.seed}
    return input_key(parts, [digest for case in cases for digest in _case_inputs(case, digests)])


def _stored_fingerprint(prepared: Path, key: str) -> DatasetFingerprint | None:
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


def _keep_fingerprint(
    outputs: OutputFolder, facts: dict[str, Any], failed: Mapping[str, str]
) -> None:
    """Write a first header, so that an interruption does not cost the analysis of the dataset."""
    if not failed and not read_header(outputs.path).get("cases"):
        unprepared = {"failed": {}, "cases": {}, "keys": {}}
        outputs.write(PREPARED_FILE, json_text(facts | unprepared))


def _finish(
    work: Preparation,
    facts: Mapping[str, Any],
    cases: Sequence[Case],
    failed: Mapping[str, str],
    warnings: Sequence[str],
) -> list[str]:
    """Write `prepared.json` and `cases.csv`; return a warning if there is nothing to write."""
    prepared = [case for case in cases if case.id not in failed]
    if not prepared and read_header(work.outputs.path).get("cases"):
        return [f"W_STALE: no case could be prepared, so {PREPARED_FILE} was not changed"]
    header = {
        **facts,
        "failed": failed,
        "cases": {case.id: case.split for case in prepared},
        "keys": {case.id: work.key_of(case) for case in prepared},
        "warnings": warnings,
    }
    with work.outputs.staged() as commit:
        commit.write(PREPARED_FILE, json_text(header))
        commit.write("cases.csv", table(CaseRow, [_row(case, failed) for case in cases]))
        commit.finish(last=PREPARED_FILE)
    return []


def _row(case: Case, failed: Mapping[str, str]) -> CaseRow:
    return CaseRow(
        case_id=case.id,
        status="failed" if case.id in failed else "done",
        reason=failed.get(case.id, ""),
        image=table_name(next(iter(case.images.values()))),
    )


def preparation_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the parts of a recipe that prepared arrays depend on."""
    content = recipe.model_dump(mode="json", include={"data", "preprocess", "classify"})
    if content["classify"]:
        kept = ("column", "classes", "field_of_view_mm", "pixels", "low", "high")
        content["classify"] = {key: content["classify"][key] for key in kept}
    return content


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

"""The training and validation cases of a dataset: find, check and analyse them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from volseg.commands.batch import REFUSE, failure_reason, of_tilt, of_unit, reason_of
from volseg.commands.label_values import renamed, values_in
from volseg.commands.placing import channel_notes, place_mask
from volseg.errors import ScanError, VolsegError
from volseg.execution.local import run
from volseg.inputs import shorten
from volseg.io.cases import Case, Survey, dataset_error, listed
from volseg.io.header import TILTED
from volseg.io.label_table import read_region_names
from volseg.io.layouts import survey_cases
from volseg.io.volumes import mask_notes, read_mask, read_volume
from volseg.measurement.units import judge_unit
from volseg.options import Announce, Progress, ignore_progress, ignore_text
from volseg.options.shared import failure_line
from volseg.preprocessing.channels import on_one_grid
from volseg.preprocessing.lattice import difference
from volseg.preprocessing.tilt import Straight
from volseg.recipe import Recipe
from volseg.store.outputs import OutputFolder
from volseg.volume import Volume
from volseg.words import format_count

if TYPE_CHECKING:  # torch takes seconds to import; only a command that needs it pays
    from volseg.planning.fingerprint import CaseFingerprint, DatasetFingerprint

ANALYSING = "Analysing the dataset"


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """A dataset as a recipe reads it.

    Args:
        recipe: may leave values open.
        seed: of the drawn split and of sampled voxels.
        tilt: what becomes of tilted stacks: refuse or resample.
    """

    dataset: Path
    recipe: Recipe
    seed: int = 0
    tilt: str = REFUSE
    progress: Progress = field(default=ignore_progress, compare=False)
    announce: Announce = field(default=ignore_text, compare=False)

    def survey(self) -> Survey:
        """Return the usable cases of the dataset, with mistakes and remarks."""
        data = self.recipe.data
        allow_missing = data.missing == "empty"
        survey = survey_cases(self.dataset, data.channels, allow_missing=allow_missing)
        cases, mistakes = survey.cases, survey.mistakes + self._class_mistakes(survey.cases)
        cases = [of_unit(case, data) for case in of_tilt(cases, self.tilt)]
        return replace(survey, cases=cases, mistakes=mistakes)

    def _class_mistakes(self, cases: Sequence[Case]) -> list[str]:
        """Return the mistake if no case with a mask has the column of the classes."""
        labelled = labelled_cases(cases)
        if self.recipe.classify is None or not labelled:
            return []
        column, columns = self.recipe.classify.column, labelled[0].classes
        if column in columns:
            return []
        return [
            f"there is no column {column!r}, which [classify] of the recipe needs; the others are "
            f"{listed(columns) or 'none'}"
        ]

    def cases(self, survey: Survey | None = None) -> list[Case]:
        """Return the cases with a mask outside the test split, each with a split.

        A case without a split gets its patient's, if the patient has one.

        Raises:
            VolsegError: the dataset has mistakes; the error lists them and all unusable files.
        """
        survey = survey or self.survey()
        cases = survey.cases
        if survey.mistakes:
            refuse_dataset(self.dataset, self._unusable(cases), survey.mistakes)
        labelled = labelled_cases(_with_split_of_patient(cases))
        if not labelled:
            raise VolsegError(
                f"{self.dataset}: none of its {format_count(len(cases), 'case')} has a mask and "
                "is outside the test split",
                fix="add a `label` column or a labels/ folder with the names of the images, and "
                "check the `split` column",
                code="E_DATASET",
            )
        return assign_splits(labelled, self.recipe.train.validation_fraction, self.seed)

    def _unusable(self, cases: Sequence[Case]) -> dict[str, str]:
        """Return why cases with a mask cannot be used."""
        with_mask = [case for case in cases if case.reference is not None]
        failed = {}
        outcomes = run(lambda case: read_training_case(case, self.recipe), with_mask)
        for count, outcome in enumerate(outcomes, start=1):
            self.progress(ANALYSING, count / len(cases), outcome.item.id)
            if outcome.error is not None:
                failed[outcome.item.id] = reason_of(outcome.error)
        return failed

    def rng_of(self, case: Case) -> np.random.Generator:
        """Return a generator that depends on the seed and the case's id alone."""
        digest = hashlib.sha256(case.id.encode()).digest()
        return np.random.default_rng([self.seed, int.from_bytes(digest[:4], "big")])

    def analyse(self, case: Case) -> CaseFingerprint:
        """Return the fingerprint of one case.

        Raises:
            ScanError: as `read_training_case`.
        """
        from volseg.planning.fingerprint import fingerprint_case

        read, data = read_training_case(case, self.recipe), self.recipe.data
        first = read.images[data.channels[0]]
        doubt = judge_unit(first, data.intensity_unit, by="the recipe").doubt
        mask = without_ignored(read.reference, self.recipe)
        fingerprint = fingerprint_case(read.images, mask, self.rng_of(case))
        return fingerprint.model_copy(update={"unit_doubt": doubt, "grid_notes": read.notes})

    def fingerprint(
        self, cases: Sequence[Case], outputs: OutputFolder | None = None
    ) -> tuple[DatasetFingerprint, dict[str, str]]:
        """Return the fingerprint of the training split, and why cases of either split fail.

        Args:
            outputs: the folder for tracebacks; None to write none.
        """
        from volseg.planning.fingerprint import combine_fingerprints

        fingerprints: dict[str, CaseFingerprint] = {}
        validation: dict[str, CaseFingerprint] = {}
        failed: dict[str, str] = {}
        for count, outcome in enumerate(run(self.analyse, cases), start=1):
            case, error, fingerprint = outcome.item, outcome.error, outcome.value
            self.progress(ANALYSING, count / len(cases), case.id)
            if error is not None:
                failed[case.id] = failure_reason(outputs, case.id, error)
                self.announce(failure_line(case.id, failed[case.id]))
            elif fingerprint is not None:
                (fingerprints if case.split == "train" else validation)[case.id] = fingerprint
        if not fingerprints and failed:
            refuse_dataset(self.dataset, failed)
        if not fingerprints:
            raise VolsegError(
                f"{self.dataset}: no case is left to train on: all {len(cases)} are for validation",
                fix="give some of them the split `train`",
                code="E_DATASET",
            )
        combined = combine_fingerprints(list(fingerprints.values()))
        return combined.model_copy(update=_remarkable(fingerprints, validation)), failed


def _remarkable(
    training: Mapping[str, CaseFingerprint], validation: Mapping[str, CaseFingerprint]
) -> dict[str, Any]:
    """Return the fields of a dataset's fingerprint that name single cases."""
    items = {**training, **validation}.items()
    doubts = {name: facts.unit_doubt for name, facts in training.items() if facts.unit_doubt}
    return {
        "empty_masks": tuple(name for name, facts in items if not facts.label_voxels),
        "doubted_units": doubts,
        "grid_notes": {name: facts.grid_notes for name, facts in items if facts.grid_notes},
    }


def labelled_cases(cases: Sequence[Case]) -> list[Case]:
    """Return the cases with a mask outside the test split."""
    return [case for case in cases if case.reference is not None and case.split != "test"]


def _with_split_of_patient(cases: Sequence[Case]) -> list[Case]:
    split_of = {case.patient: case.split for case in cases if case.patient and case.split}
    return [replace(case, split=case.split or split_of.get(case.patient or "")) for case in cases]


def assign_splits(cases: Sequence[Case], validation_fraction: float, seed: int) -> list[Case]:
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


def refuse_dataset(
    dataset: Path, failed: Mapping[str, str], mistakes: Sequence[str] = ()
) -> NoReturn:
    """Raise one error that lists the unusable cases and the mistakes of the dataset as a whole."""
    problems = [*mistakes, *(f"{case}: {reason}" for case, reason in failed.items())]
    summary = "" if mistakes else f"{len(failed)} of its cases cannot be used"
    raise dataset_error(problems, str(dataset), summary)


@dataclass(frozen=True, slots=True, eq=False)
class TrainingCase:
    """A case as training reads it.

    Args:
        images: the available channels.
        reference: the mask, on the grid of the first channel.
        notes: what was done to bring them onto one grid, as `W_CODE: sentence`.
    """

    images: Mapping[str, Volume]
    reference: Volume
    notes: tuple[str, ...] = ()


def read_training_case(
    case: Case, recipe: Recipe, digests: Sequence[str] | None = None
) -> TrainingCase:
    """Read the available channels and the mask; check them against each other and the recipe.

    Args:
        digests: expected SHA-256 of the files; None skips this check.

    Raises:
        ScanError: the case has problems; the error lists all of them.
    """
    data = recipe.data
    assert case.reference is not None
    images = {name: read_volume(case.images[name]) for name in data.channels if name in case.images}
    first_path = next(iter(case.images.values()))
    reference = _by_name(read_mask(case.reference, like=first_path), case, recipe)
    hashes = {volume.sha256 for volume in (*images.values(), reference)}
    if digests is not None and not hashes <= set(digests):
        raise ScanError(
            f"case {case.id!r}: a file changed while the dataset was being prepared",
            fix="run the command again",
            code="E_CHANGED",
        )
    notes = [*mask_notes(case.reference, first_path), *channel_notes(images)]
    images = on_one_grid(images, recipe)
    problems = [*_channel_problems(case, images, recipe)]
    first_name, first = next(iter(images.items()))
    names = {"mask_name": str(case.reference), "grid_name": str(case.images[first_name])}
    try:
        placed = place_mask(reference, first.geometry, **names)
        reference, notes = placed.mask, [*placed.notes, *notes]
    except ScanError as error:
        problems.append(error)
    problems += _label_problems(case, reference, recipe)
    problems += _class_problems(case, recipe)
    _refuse(problems)
    if reference.geometry.is_tilted:
        straight = Straight.of(reference.geometry)
        images = {name: straight.scan(image) for name, image in images.items()}
        text = f"{TILTED}: slices were moved within their planes, as their stack is tilted"
        reference, notes = straight.mask(reference), [text, *notes]
    return TrainingCase(images, reference, tuple(notes))


def _refuse(problems: Sequence[VolsegError]) -> None:
    """Raise one error that lists all problems, if there are any."""
    if problems:
        text = "; ".join(problem.problem for problem in problems)
        fix = "; ".join(dict.fromkeys(problem.fix for problem in problems))
        raise ScanError(text, fix=fix, code=problems[0].code)


def _by_name(reference: Volume, case: Case, recipe: Recipe) -> Volume:
    """Return a mask whose regions have the values that the recipe gives to their names.

    A mask without names, or with none of the recipe's, keeps its values.

    Raises:
        ScanError: the recipe has some of its names, but not all (`E_LABELS`).
    """
    assert case.reference is not None
    names = read_region_names(case.reference, next(iter(case.images.values())))
    names = {value: names[value] for value in sorted(values_in(reference) & names.keys())}
    labels = recipe.data.labels
    if not names.keys() or not labels.keys() & set(names.values()):
        return reference
    if unknown := [name for name in names.values() if name not in labels]:
        raise ScanError(
            f"{case.reference}: holds regions {listed(unknown)}, which the recipe does not name; "
            f"it names {listed(labels)}",
            fix=f"take those that it names, such as {case.reference.name}#{next(iter(labels))}",
            code="E_LABELS",
        )
    return renamed(reference, {value: labels[name] for value, name in names.items()})


def _channel_problems(
    case: Case, images: Mapping[str, Volume], recipe: Recipe
) -> Iterator[VolsegError]:
    """Yield why channels are not on the grid of the first."""
    (_, first), *others = images.items()
    for name, image in others:
        if first.geometry.matches(image.geometry):
            continue
        problem, _ = difference(image.geometry, first.geometry)
        yield ScanError(
            f"{case.images[name]}: channel {name!r} is not on the grid of the first: {problem}",
            fix='set data.grids = "first" if the channels have different grids',
            code="E_PAIR",
        )


def _label_problems(case: Case, reference: Volume, recipe: Recipe) -> Iterator[VolsegError]:
    """Yield an error if the mask holds values that the recipe does not name."""
    labels = recipe.data.labels
    named = {0, recipe.data.ignore, *labels.values()}
    if unknown := sorted(set(np.unique(reference.array).tolist()) - named):
        yield ScanError(
            f"{case.reference}: holds values {unknown[:5]}, which the recipe does not name; "
            f"it names {labels}",
            fix="name every value under [data] labels in the recipe, or correct the mask",
            code="E_LABELS",
        )


def _class_problems(case: Case, recipe: Recipe) -> Iterator[VolsegError]:
    # A column that is missing from all cases is reported when they are prepared.
    if recipe.classify is not None and recipe.classify.column in case.classes:
        try:
            class_of(case, recipe)
        except VolsegError as error:
            yield error


def without_ignored(reference: Volume, recipe: Recipe) -> Volume:
    """Return the mask with unannotated voxels as background."""
    if recipe.data.ignore is None:
        return reference
    return reference.with_array(np.where(reference.array == recipe.data.ignore, 0, reference.array))


def warnings_of(fingerprint: DatasetFingerprint, recipe: Recipe) -> list[str]:
    """Return warnings about training cases that are unusual but usable."""
    from volseg.mismatch import has_trusted_unit  # loads torch

    warnings, n_cases = [], fingerprint.n_cases
    if empty := fingerprint.empty_masks:
        names = ", ".join(empty[:5]) + (" …" if len(empty) > 5 else "")
        hold = "mask holds" if len(empty) == 1 else "masks hold"
        warnings.append(f"W_EMPTY: {len(empty)} {hold} no labelled voxel: {names}")
    labels = recipe.data.label_names.items()
    if absent := [name for value, name in labels if value not in fingerprint.label_voxels]:
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
    return warnings + _grid_warnings(fingerprint)


def _grid_warnings(fingerprint: DatasetFingerprint) -> list[str]:
    """Return a warning per kind of mask or channel that was brought onto the grid of its scan."""
    cases_of: dict[str, dict[str, str]] = {}
    for case, notes in fingerprint.grid_notes.items():
        for note in notes:
            code, _, text = note.partition(": ")
            cases_of.setdefault(code, {}).setdefault(case, text)
    return [
        f"{code}: {format_count(len(cases), 'case')}, such as {case}: {text}"
        for code, cases in cases_of.items()
        for case, text in [next(iter(cases.items()))]
    ]


def class_of(case: Case, recipe: Recipe) -> str | None:
    """Return the class whose range holds the case's value; None if it is empty or in no range.

    Raises:
        VolsegError: the table lacks the column, or the cell is no number.
    """
    assert recipe.classify is not None
    column = recipe.classify.column
    if column not in case.classes:
        raise VolsegError(
            f"case {case.id!r} has no column {column!r}, which [classify] needs; it has "
            f"{sorted(case.classes)}",
            fix=f"add the column {column!r} to cases.csv, or remove [classify] from the recipe",
            code="E_DATASET",
        )
    text = case.classes[column]
    if not text:
        return None
    try:
        value = float(text)
    except ValueError as error:
        raise VolsegError(
            f"case {case.id!r}: column {column!r} holds {shorten(text)!r}, which is no number",
            fix="write numbers with a decimal point, or leave the cell empty",
            code="E_DATASET",
        ) from error
    ranges = recipe.classify.classes.items()
    return next((name for name, (lowest, highest) in ranges if lowest <= value <= highest), None)

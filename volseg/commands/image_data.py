"""The images of a dataset, as a recipe of a classifier reads them: targets, splits, arrays."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from volseg.commands.batch import reason_of
from volseg.commands.image_recipes import (
    automatic_image_recipe,
    only_target,
    refuse_other_target,
    student_recipe,
    unlabelled_recipe,
)
from volseg.commands.image_sources import ImageSource, case_key, source_of, survey_lesions
from volseg.commands.image_splits import (
    assign_image_splits,
    class_warnings,
    group_cases,
    leak_warnings,
    training_cases,
)
from volseg.commands.image_start import Start, seen_by
from volseg.commands.loaded_images import listing_digest
from volseg.commands.scan_sources import scan_survey, stack_scans
from volseg.errors import ScanError, VolsegError, named
from volseg.evaluation.duplicates import ImagePrint, print_of
from volseg.io.cases import dataset_error
from volseg.io.files import sha256_of
from volseg.io.image_cases import ImageCase, ImageSurvey, survey_images
from volseg.io.prepared_images import (
    ImageSet,
    PreparedImage,
    read_prepared_images,
    write_prepared_images,
)
from volseg.io.targets import TargetCells, Value, count_classes
from volseg.options import Announce, Progress, ignore_progress, ignore_text
from volseg.options.shared import failure_line
from volseg.recipe import ClassifyRecipe
from volseg.recipe.classification import LESION, NUMBER, SCAN
from volseg.recipe.section import AUTO, closed
from volseg.words import format_count, format_list

if TYPE_CHECKING:  # torch takes seconds to import; only a command that needs it pays
    from volseg.inference.slices import SliceEncoder
    from volseg.planning.images import ClosedImages, ImageFingerprint

READING, PREPARING = "Reading the images", "Preparing the images"
SAMPLE = 1000  # images whose size the fingerprint holds
INTENSITIES = 500  # pixels of an image from which percentiles are computed
OF_DATASET = ("E_TARGET", "E_DATASET")  # codes of errors about what a dataset holds


@dataclass(frozen=True, slots=True)
class ImageDataset:
    """A dataset as a recipe of a classifier reads it.

    Args:
        recipe: None for one that leaves everything to the plan.
        target: column, where the recipe does not name it.
        seed: of the drawn split.
        start: weights that training starts from. teacher: recipe of the model to learn from.
    """

    dataset: Path
    recipe: ClassifyRecipe | None = None
    target: str | None = None
    seed: int = 0
    start: Start | None = None
    teacher: ClassifyRecipe | None = None
    progress: Progress = field(default=ignore_progress, compare=False)
    announce: Announce = field(default=ignore_text, compare=False)

    def _target(self) -> str | None:
        """Return the target that is asked for, by a recipe or a teacher; None if by neither."""
        if self.recipe is not None:
            refuse_other_target(self.target, self.recipe)
            return self.recipe.data.target
        if self.teacher is None:
            return self.target
        refuse_other_target(self.target, self.teacher, "leave out --target, or give a recipe")
        return self.teacher.data.target

    def survey(self) -> tuple[ImageSurvey, ClassifyRecipe]:
        """Return the images, and the recipe with its target.

        Raises:
            VolsegError: the dataset has mistakes, or does not say what its target is.
        """
        target = self._target()
        if self.recipe is not None and self.recipe.data.input == LESION:
            cases, remarks = survey_lesions(self.dataset, self.recipe.data.target, self._report)
            return ImageSurvey(cases, [], [], remarks), self.recipe
        if target is None:
            target = only_target(self.dataset, survey_images(self.dataset))
        survey = survey_images(self.dataset, target=target)
        if survey.mistakes:
            self._refuse(survey.mistakes)
        recipe = self.recipe
        if recipe is not None and recipe.data.input == SCAN:
            return scan_survey(survey, self.dataset, target), recipe
        if recipe is None:
            recipe = automatic_image_recipe(self.dataset, target)
            recipe = recipe if self.start is None else self.start.fitted_to(recipe)
            if self.teacher is not None:
                recipe = student_recipe(recipe, self.teacher)
        return survey, recipe

    def _report(self, name: str, reason: str) -> None:
        self.announce(failure_line(name, reason))

    def _refuse(self, mistakes: Sequence[str]) -> None:
        raise dataset_error(mistakes, str(self.dataset))

    def plan(self, *, labelled: bool = True) -> PlannedImages:
        """Return the images with their targets and splits, and the closed recipe.

        Args:
            labelled: False takes images without a target too; then all have the target 0.

        Raises:
            VolsegError: as `survey`, or a target is not what the recipe says.
        """
        with self._named():
            return self._plan_labelled() if labelled else self._plan_unlabelled()

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Name the dataset in errors about its cells and images."""
        try:
            yield
        except VolsegError as error:
            if error.code not in OF_DATASET or error.problem.startswith(str(self.dataset)):
                raise
            problem = f"{self.dataset}: {error.problem}"
            raise VolsegError(problem, fix=error.fix, code=error.code) from error

    def _plan_labelled(self) -> PlannedImages:
        survey, recipe = self.survey()
        name = recipe.data.target
        used = [case for case in survey.cases if case.split != "test"]
        if not used:
            self._refuse(["every image is of the test split, which training never reads"])
        blank = [case.id for case in used if not case.cells.get(name, "").strip()]
        remarks = list(survey.remarks)
        if blank:
            remarks.append(
                f"W_NO_TARGET: {format_count(len(blank), 'image')} without a value of {name!r} "
                f"left out: {format_list(blank, 5)}"
            )
        cells = TargetCells(name, {case.id: case.cells.get(name, "") for case in used})
        recipe = recipe.model_copy(update={"data": cells.describe(recipe.data)})
        values, mistakes = cells.values(recipe.data)
        if mistakes:
            self._refuse(mistakes)
        cases = [case for case in used if values[case.id] is not None]
        planned = self._planned(cases, recipe, values, remarks)
        one_sided = class_warnings(planned.cases, values, planned.splits, recipe.data)
        return replace(planned, remarks=[*planned.remarks, *one_sided])

    def _plan_unlabelled(self) -> PlannedImages:
        assert self.recipe is not None
        survey = survey_images(self.dataset)
        if survey.mistakes:
            self._refuse(survey.mistakes)
        cases = [case for case in survey.cases if case.split != "test"]
        remarks = [text for text in survey.remarks if not text.startswith("N_FOLDERS")]
        data = unlabelled_recipe(self.dataset).data
        recipe = self.recipe.model_copy(update={"data": data, "sequence": None})
        return self._planned(cases, recipe, {case.id: 0 for case in cases}, remarks)

    def _planned(
        self,
        cases: Sequence[ImageCase],
        recipe: ClassifyRecipe,
        values: Mapping[str, Value],
        remarks: list[str],
    ) -> PlannedImages:
        """Read the images, split them, and close the recipe."""
        from volseg.planning.images import close_images

        images, failed = self._measure(cases, recipe)
        cases = [case for case in cases if case.id in images]
        if failed:
            remarks.append(
                f"W_LEFT_OUT: images that cannot be used, and are left out: "
                f"{format_list(list(failed), 5)}"
            )
        groups = group_cases(cases, [images[case.id].print for case in cases])
        fraction = recipe.train.validation_fraction
        splits = assign_image_splits(cases, groups, values, fraction, self.seed)
        remarks += leak_warnings(groups, splits)
        fingerprint = _fingerprint(cases, images, values, splits, recipe)
        closed = close_images(
            recipe,
            fingerprint,
            seen=seen_by(self.start),
        )
        return PlannedImages(
            closed=closed,
            fingerprint=fingerprint,
            cases=cases,
            values=values,
            groups=groups,
            splits=splits,
            failed=failed,
            remarks=remarks,
        )

    def _measure(
        self, cases: Sequence[ImageCase], recipe: ClassifyRecipe
    ) -> tuple[dict[str, _Facts], dict[str, str]]:
        """Read every image once; return facts by id, and why images cannot be read."""
        facts, failed, source = dict[str, _Facts](), dict[str, str](), source_of(recipe)
        for count, case in enumerate(cases, start=1):
            try:
                facts[case.id] = _facts(source, case, recipe)
            except ScanError as error:
                failed[case.id] = reason_of(error)
                self.announce(failure_line(case.id, failed[case.id]))
            self.progress(READING, count / len(cases), case.id)
        if not facts:
            self._refuse([f"{name}: {reason}" for name, reason in failed.items()])
        return facts, failed

    def prepare(
        self, planned: PlannedImages, folder: Path, encoder: SliceEncoder | None = None
    ) -> ImageSet:
        """Write the network inputs of all images into a folder; return them, memory-mapped.

        Args:
            encoder: embeds the slices of scans.
        """
        recipe = planned.closed.recipe
        source = source_of(recipe, None if encoder is None else encoder.embed)
        shape = recipe.input_shape
        if encoder is not None:
            shape = (max(len(case.slices) for case in planned.cases), encoder.n_features + 1)
        digest_of = cache(sha256_of)

        def pairs() -> Iterator[tuple[np.ndarray, PreparedImage]]:
            for count, case in enumerate(planned.cases, start=1):
                image = source.network_input(case, recipe.images)
                if encoder is not None:
                    (image,) = stack_scans([image], shape[0])
                names = () if recipe.fusion is None else recipe.fusion.measurements
                measured = source.measurements(case, names).tolist()
                measurements = {
                    name: value if math.isfinite(value) else None
                    for name, value in zip(names, measured, strict=True)
                }
                yield image, planned.prepared(case, case_key(case, digest_of), measurements)
                self.progress(PREPARING, count / len(planned.cases), case.id)

        header = {
            "recipe": recipe.model_dump(mode="json"),
            "reasons": [line.model_dump() for line in planned.closed.reasons],
            "fingerprint": planned.fingerprint.model_dump(mode="json"),
            "failed": planned.failed,
            "warnings": planned.remarks,
            "listing": listing_digest(self.dataset, recipe),
            "encoder": "" if encoder is None else encoder.digest,
        }
        write_prepared_images(folder, shape, pairs(), header)
        return read_prepared_images(folder)[0]


@dataclass(frozen=True, slots=True)
class _Facts:
    """Shape (C, H, W) of an image, what tells whether it is a duplicate, and some intensities.

    Args:
        white: the intensity that is white, if the file says so.
    """

    shape: tuple[int, ...]
    white: float | None
    print: ImagePrint
    intensities: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedImages:
    """Images with everything that is known of them before their pixels are converted.

    Args:
        values: case id → target. groups: case id → those that stay in one fold share it.
        splits: case id → train or val.
        failed: case id → why it cannot be used.
    """

    closed: ClosedImages
    fingerprint: ImageFingerprint
    cases: Sequence[ImageCase]
    values: Mapping[str, Value]
    groups: Mapping[str, str]
    splits: Mapping[str, str]
    failed: Mapping[str, str]
    remarks: Sequence[str]

    def prepared(
        self, case: ImageCase, key: str, measurements: Mapping[str, float | None]
    ) -> PreparedImage:
        return PreparedImage(
            id=case.id,
            patient=case.patient or case.id,
            group=self.groups[case.id],
            split=self.splits[case.id],
            target=self.values[case.id],
            sha256=key,
            cells=dict(case.cells),
            measurements=dict(measurements),
        )


def _facts(source: ImageSource, case: ImageCase, recipe: ClassifyRecipe) -> _Facts:
    """Read an image, or all slices of a scan.

    Raises:
        ScanError: one cannot be read, or not be normalised.
    """
    pixels = []
    for one in case.slices or [case]:
        image = source.picture(one)
        if recipe.images.normalise != AUTO:
            with named(one.path, ScanError):
                closed(recipe.images.normalise).check(image.largest)
        pixels.append(image.array.ravel()[:: max(1, image.array.size // INTENSITIES)].copy())
    image = source.picture(case)
    prints = print_of(image.array, image.largest)
    return _Facts(image.array.shape, image.largest, prints, np.concatenate(pixels))


def _fingerprint(
    cases: Sequence[ImageCase],
    facts: Mapping[str, _Facts],
    values: Mapping[str, Value],
    splits: Mapping[str, str],
    recipe: ClassifyRecipe,
) -> ImageFingerprint:
    from volseg.planning.images import ImageFingerprint

    training = training_cases(cases, splits)
    targets = [values[case.id] for case in training]
    sizes = [facts[case.id].shape[1:] for case in training[:: -(-len(training) // SAMPLE)]]
    pixels = np.concatenate([facts[case.id].intensities for case in training])
    low, high = np.percentile(pixels, (0.5, 99.5)).tolist()
    whites = {facts[case.id].white for case in training}
    statistics: dict[str, Any] = {"counts": count_classes(targets, recipe.data)}
    if recipe.data.kind == NUMBER:
        numbers = np.array(targets, float)
        statistics = {"mean": float(numbers.mean()), "sd": float(max(numbers.std(), 1e-9))}
    return ImageFingerprint(
        n_images=len(training),
        n_patients=len({case.patient or case.id for case in training}),
        n_validation=len(cases) - len(training),
        sizes=tuple((int(height), int(width)) for height, width in sizes),
        channels=max(facts[case.id].shape[0] for case in training),
        kind=str(recipe.data.kind),
        low=low,
        high=high if high > low else low + 1,
        white=whites.pop() if len(whites) == 1 else None,
        **statistics,
    )

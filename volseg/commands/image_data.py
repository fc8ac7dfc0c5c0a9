"""The images of a dataset, as a recipe of a classifier reads them: targets, splits, arrays."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from volseg.commands.batch import reason_of
from volseg.commands.image_sources import LESION, source_of, survey_lesions
from volseg.commands.image_start import Start
from volseg.commands.seen_images import image_key
from volseg.errors import ScanError, VolsegError, named
from volseg.evaluation.duplicates import ImagePrint, groups_of, print_of
from volseg.io.cases import dataset_error
from volseg.io.files import json_text, sha256_of
from volseg.io.image_cases import ImageCase, ImageSurvey, looks_like_images, survey_images
from volseg.io.layouts import survey_cases
from volseg.io.prepared_images import (
    CASES_FILE,
    ImageSet,
    PreparedImage,
    has_prepared_images,
    read_prepared_images,
    write_prepared_images,
)
from volseg.io.targets import TargetCells, Value, count_classes
from volseg.options import Announce, Progress, ignore_progress, ignore_text
from volseg.options.shared import failure_line
from volseg.recipe import AnyRecipe, ClassifyRecipe, as_any_recipe, parse_image_recipe
from volseg.recipe.classification import NUMBER, Target
from volseg.recipe.images import ZScoreImage
from volseg.recipe.section import AUTO, closed
from volseg.words import format_count, format_list

if TYPE_CHECKING:  # torch takes seconds to import; only a command that needs it pays
    from volseg.planning.close import Reason
    from volseg.planning.images import ClosedImages, ImageFingerprint, SeenImages

READING, PREPARING = "Reading the images", "Preparing the images"
SAMPLE = 1000  # images whose size the fingerprint holds
INTENSITIES = 500  # pixels of an image from which percentiles are computed
DEFAULT_NETWORK = "cnn_small"
OF_IMAGES = "only for models that classify images, but this one segments"  # refuses an option
OF_DATASET = ("E_TARGET", "E_DATASET")  # codes of errors about what a dataset holds


def is_of_images(
    dataset: Path, recipe: Path | str | AnyRecipe | None, target: str | None = None
) -> bool:
    """Tell whether a request is about classifying images, rather than segmenting scans."""
    if recipe is not None:
        return isinstance(as_any_recipe(recipe), ClassifyRecipe)
    return target is not None or has_prepared_images(dataset) or looks_like_images(dataset)


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

    def survey(self) -> tuple[ImageSurvey, ClassifyRecipe]:
        """Return the images, and the recipe with its target.

        Raises:
            VolsegError: the dataset has mistakes, or does not say what its target is.
        """
        if self.recipe is not None:
            refuse_other_target(self.target, self.recipe)
        target = self.target if self.recipe is None else self.recipe.data.target
        if self.recipe is None and self.teacher is not None:
            refuse_other_target(target, self.teacher, "leave out --target, or give a recipe")
            target = self.teacher.data.target
        if self.recipe is not None and self.recipe.data.input == LESION:
            cases, remarks = survey_lesions(self.dataset, self.recipe.data.target, self._report)
            return ImageSurvey(cases, [], [], remarks), self.recipe
        if target is None:
            target = _only_target(self.dataset, survey_images(self.dataset))
        survey = survey_images(self.dataset, target=target)
        if survey.mistakes:
            self._refuse(survey.mistakes)
        recipe = self.recipe
        if recipe is None:
            recipe = automatic_image_recipe(self.dataset, target)
            recipe = recipe if self.start is None else self.start.fitted_to(recipe)
            if self.teacher is not None:
                parts = {"data": self.teacher.data, "images": self.teacher.images}
                recipe = recipe.model_copy(update=parts)
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
        one_sided = _one_sided(planned.cases, values, planned.splits, recipe.data)
        return replace(planned, remarks=[*planned.remarks, *one_sided])

    def _plan_unlabelled(self) -> PlannedImages:
        assert self.recipe is not None
        survey = survey_images(self.dataset)
        if survey.mistakes:
            self._refuse(survey.mistakes)
        cases = [case for case in survey.cases if case.split != "test"]
        remarks = [text for text in survey.remarks if not text.startswith("N_FOLDERS")]
        recipe = self.recipe.model_copy(update={"data": unlabelled_recipe(self.dataset).data})
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
        groups = _groups(cases, [images[case.id].print for case in cases])
        fraction = recipe.train.validation_fraction
        splits = assign_image_splits(cases, groups, values, fraction, self.seed)
        remarks += _leaks(groups, splits)
        fingerprint = _fingerprint(cases, images, values, splits, recipe)
        closed = close_images(
            recipe,
            fingerprint,
            seen=None if self.start is None else self.start.seen,
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
                image = source.picture(case)
                if recipe.images.normalise != AUTO:
                    with named(case.path, ScanError):
                        closed(recipe.images.normalise).check(image.largest)
                prints = print_of(image.array, image.largest)
                pixels = image.array.ravel()[:: max(1, image.array.size // INTENSITIES)]
                facts[case.id] = _Facts(image.array.shape, image.largest, prints, pixels.copy())
            except ScanError as error:
                failed[case.id] = reason_of(error)
                self.announce(failure_line(case.id, failed[case.id]))
            self.progress(READING, count / len(cases), case.id)
        if not facts:
            self._refuse([f"{name}: {reason}" for name, reason in failed.items()])
        return facts, failed

    def prepare(self, planned: PlannedImages, folder: Path) -> ImageSet:
        """Write the network inputs of all images into a folder; return them, memory-mapped."""
        recipe = planned.closed.recipe
        source = source_of(recipe)
        digests: dict[Path, str] = {}

        def pairs() -> Iterator[tuple[np.ndarray, PreparedImage]]:
            for count, case in enumerate(planned.cases, start=1):
                image = source.network_input(case, recipe.images)
                if case.path not in digests:
                    digests[case.path] = sha256_of(case.path)
                yield image, planned.prepared(case, digests[case.path])
                self.progress(PREPARING, count / len(planned.cases), case.id)

        header = {
            "recipe": recipe.model_dump(mode="json"),
            "reasons": [line.model_dump() for line in planned.closed.reasons],
            "fingerprint": planned.fingerprint.model_dump(mode="json"),
            "failed": planned.failed,
            "warnings": planned.remarks,
            "listing": listing_digest(self.dataset, recipe),
        }
        write_prepared_images(folder, recipe.input_shape, pairs(), header)
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

    def prepared(self, case: ImageCase, digest: str) -> PreparedImage:
        return PreparedImage(
            id=case.id,
            patient=case.patient or case.id,
            group=self.groups[case.id],
            split=self.splits[case.id],
            target=self.values[case.id],
            sha256=image_key(digest, case.index),
            cells=dict(case.cells),
        )


@dataclass(frozen=True, slots=True)
class LoadedImages:
    """Prepared images, the dataset they come from and the closed recipe they were made for."""

    images: ImageSet
    recipe: ClassifyRecipe
    reasons: tuple[Reason, ...]
    fingerprint: ImageFingerprint
    warnings: Sequence[str]
    listing: str = ""  # `listing_digest` of the dataset

    def with_training_of(
        self, recipe: ClassifyRecipe, folder: Path, *, seen: SeenImages | None
    ) -> LoadedImages:
        """Return the images with the network and training settings of another recipe, closed.

        Args:
            seen: by the weights that the network starts from; None for random weights.

        Raises:
            VolsegError: they were prepared for another target or input.
        """
        from volseg.planning.images import close_images

        stored = self.recipe.data
        images = recipe.images
        is_open = [name for name in ("normalise", "pixels") if getattr(images, name) == AUTO]
        prepared = {name: getattr(self.recipe.images, name) for name in is_open}
        images = images.model_copy(update=prepared)
        stated = recipe.model_copy(update={"data": stored, "images": images})
        closed = close_images(stated, self.fingerprint, seen=seen)
        stated_data = {key: v for key, v in recipe.data.model_dump().items() if v != AUTO}
        is_other = stored.model_dump() | stated_data != stored.model_dump()
        if is_other or closed.recipe.images != self.recipe.images:
            raise VolsegError(
                f"{folder}: was prepared for recipe {self.recipe.name!r} with other [data] or "
                "[images] settings",
                fix="run `volseg preprocess` with this recipe first, or give the dataset itself",
                code="E_PREPARED",
            )
        return replace(self, recipe=closed.recipe, reasons=closed.reasons)


def refuse_other_target(
    target: str | None,
    recipe: ClassifyRecipe,
    fix: str = "leave out --target, or change data.target in the recipe",
) -> None:
    """Refuse a requested target that is not that of the recipe."""
    if target not in (None, recipe.data.target):
        raise VolsegError(
            f"--target {target}: {recipe.name!r} has the target {recipe.data.target!r}",
            fix=fix,
            code="E_USAGE",
        )


def load_images(folder: Path) -> LoadedImages:
    """Load a folder of prepared images.

    Raises:
        VolsegError: it is not one.
    """
    from volseg.planning.close import Reason
    from volseg.planning.images import ImageFingerprint

    images, content = read_prepared_images(folder)
    try:
        return LoadedImages(
            images,
            parse_image_recipe(content["recipe"], where=str(folder / CASES_FILE)),
            tuple(map(Reason.model_validate, content["reasons"])),
            ImageFingerprint.model_validate(content["fingerprint"]),
            list(map(str, content["warnings"])),
            str(content.get("listing", "")),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise VolsegError(
            f"{folder}: not a folder of prepared images ({error})",
            fix="run `volseg preprocess` again",
            code="E_PREPARED",
        ) from error


def listing_digest(dataset: Path, recipe: ClassifyRecipe) -> str:
    """Return a hash of the files of a dataset, their sizes and what it states of each.

    Raises:
        VolsegError: the dataset cannot be listed.
    """
    lines: list[tuple[object, ...]] = []
    if recipe.data.input == LESION:
        for case in survey_cases(dataset, None).cases:
            files = [*case.images.values(), case.reference]
            lines.append((case.id, *map(_size, files), case.split, case.patient, case.classes))
    else:
        for image in survey_images(dataset).cases:
            files = (image.path, image.mask)
            place = (image.id, image.index, *map(_size, files))
            lines.append((*place, image.split, image.patient, dict(image.cells)))
    return hashlib.sha256(json_text(lines).encode(errors="surrogateescape")).hexdigest()


def _size(path: Path | None) -> int | None:
    try:
        return None if path is None else path.stat().st_size
    except OSError:
        return None


def automatic_image_recipe(dataset: Path, target: str) -> ClassifyRecipe:
    """Return a recipe that leaves everything to the plan."""
    name = re.sub(r"[^a-z0-9]+", "_", dataset.absolute().name.casefold()).strip("_")[:50]
    content: dict[str, Any] = {
        "task": "classify",
        "name": name or "images",
        "description": f"Predicts {target!r} from images; the plan derives all settings "
        "from the data.",
        "intended_use": f"Predicting {target!r} from images like the training images.",
        "limits": "Not tested on images from elsewhere.",
        "data_source": f"The dataset named {dataset.absolute().name!r}; it was trained without a "
        "recipe, so nothing else is known of its origin.",
        "data": {"target": target},
        "network": {"name": DEFAULT_NETWORK, "features": AUTO},
    }
    return ClassifyRecipe.model_validate(content)


def unlabelled_recipe(dataset: Path) -> ClassifyRecipe:
    """Return a recipe for images without labels, whose intensities are standardised."""
    recipe = automatic_image_recipe(dataset, "image")
    data = Target(target="image", kind="classes", classes=("image", "other"), mean=0, sd=1)
    images = recipe.images.model_copy(update={"normalise": ZScoreImage()})
    train = recipe.train.model_copy(update={"monitor": "log_loss", "balance": "none"})
    return recipe.model_copy(update={"data": data, "images": images, "train": train})


def _only_target(dataset: Path, survey: ImageSurvey) -> str:
    """Return the one column that can be the target."""
    if survey.mistakes and not survey.cases:
        raise dataset_error(survey.mistakes, str(dataset))
    if survey.likely_target is not None:
        return survey.likely_target
    names = [column.name for column in survey.target_columns]
    if not names:
        raise VolsegError(
            f"{dataset}: says nothing of its images that could be learned: no class or number "
            "with at least two different values",
            fix="put the images of each class into a folder of its own, or give a table with a "
            "column of classes or numbers",
            code="E_TARGET",
        )
    raise VolsegError(
        f"{dataset}: which column to predict is not stated; those that could be are "
        f"{format_list(names, 10)}",
        fix="name it: --target COLUMN, or data.target in a recipe",
        code="E_TARGET",
    )


def _groups(cases: Sequence[ImageCase], prints: Sequence[ImagePrint]) -> dict[str, str]:
    """Return case id → group: images of one patient, and near duplicates, share it."""
    numbers = groups_of(prints, [case.patient for case in cases])
    names: dict[int, str] = {}
    return {
        case.id: names.setdefault(number, case.patient or case.id)
        for case, number in zip(cases, numbers, strict=True)
    }


def _leaks(groups: Mapping[str, str], splits: Mapping[str, str]) -> list[str]:
    """Return a warning if near duplicates lie in both training and validation."""
    splits_of: dict[str, set[str]] = {}
    for name, group in groups.items():
        splits_of.setdefault(group, set()).add(splits[name])
    leaks = [group for group, both in splits_of.items() if len(both) > 1]
    if not leaks:
        return []
    return [
        f"W_DUPLICATES: {len(leaks)} groups of near duplicates or patients lie in both training "
        f"and validation, so validation flatters the model: {format_list(leaks, 3)}; "
        "`volseg check` lists them"
    ]


def _one_sided(
    cases: Sequence[ImageCase],
    values: Mapping[str, Value],
    splits: Mapping[str, str],
    data: Target,
) -> list[str]:
    """Return a warning for each class that training or validation lacks."""
    if data.kind == NUMBER:
        return []
    remarks = []
    for split, effect in (
        ("train", "so the model cannot learn it"),
        ("val", "so nothing says how well the model knows it"),
    ):
        counts = count_classes([values[c.id] for c in cases if splits[c.id] == split], data)
        absent = [name for name, n in counts.items() if not n]
        if absent:
            title = {"train": "training", "val": "validation"}[split]
            remarks.append(
                f"W_CLASS_SPLIT: no {title} image is of {format_list(absent, 5)}, {effect}"
            )
    return remarks


def assign_image_splits(
    cases: Sequence[ImageCase],
    groups: Mapping[str, str],
    values: Mapping[str, Value],
    fraction: float,
    seed: int,
) -> dict[str, str]:
    """Return case id → train or val: the dataset's, or drawn by group and class.

    Without a validation split in the dataset, groups are drawn so that each class has about this
    fraction of its groups in validation; of few groups at least one.
    """
    if any(case.split == "val" for case in cases):
        return {case.id: case.split or "train" for case in cases}
    n_groups = max(2, len(set(groups.values())))
    held_out = fold_of_groups(groups, values, min(n_groups, max(2, round(1 / fraction))), seed)
    return {name: "val" if fold == 0 else "train" for name, fold in held_out.items()}


def fold_of_groups(
    groups: Mapping[str, str], values: Mapping[str, Value], folds: int, seed: int
) -> dict[str, int]:
    """Return case id → fold; the cases of a group share it, and classes are spread evenly.

    Groups are dealt like cards, each class in an order drawn with the seed, from the most frequent
    class to the rarest. A group counts as of the rarest class in it, so that each fold has its
    share of that. Of numbers, groups are ordered by their largest.
    """
    members: dict[str, list[str]] = {}
    for name, group in groups.items():
        members.setdefault(group, []).append(name)
    if len(members) < folds:
        raise VolsegError(
            f"{len(members)} patients or groups of near duplicates cannot be divided into "
            f"{folds} parts",
            fix="add images of other patients, or ask for fewer folds or a larger "
            "train.validation_fraction",
            code="E_DATASET",
        )
    names = sorted(members)
    order = np.random.default_rng(seed).permutation(len(names))
    shuffled = [names[index] for index in order]
    n_images = Counter(value for value in values.values() if isinstance(value, int))
    rarity = {value: place for place, (value, _) in enumerate(n_images.most_common())}

    def rank(group: str) -> float:
        return max(_rank(values[name], rarity) for name in members[group])

    ranked = sorted(shuffled, key=rank)
    return {name: place % folds for place, group in enumerate(ranked) for name in members[group]}


def _rank(value: Value, rarity: Mapping[int, int]) -> float:
    """Return a number by which like targets are neighbours."""
    if isinstance(value, tuple):
        return float(sum(2.0**index for index in value))
    return float(rarity[value]) if isinstance(value, int) else float(value or 0)


def _fingerprint(
    cases: Sequence[ImageCase],
    facts: Mapping[str, _Facts],
    values: Mapping[str, Value],
    splits: Mapping[str, str],
    recipe: ClassifyRecipe,
) -> ImageFingerprint:
    from volseg.planning.images import ImageFingerprint

    training = _training_cases(cases, splits)
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


def _training_cases(cases: Sequence[ImageCase], splits: Mapping[str, str]) -> list[ImageCase]:
    """Return the training cases; refuse a dataset without any, or without validation cases."""
    training = [case for case in cases if splits[case.id] == "train"]
    if not training or len(training) == len(cases):
        n = len(cases) - len(training)
        raise VolsegError(
            f"{len(training)} training and {n} validation images are too few",
            fix="add images; training and validation need at least one each",
            code="E_DATASET",
        )
    return training

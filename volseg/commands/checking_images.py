"""`volseg check` of a data set of 2D images."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from volseg.commands.problems import Problem, problem_at, problem_of
from volseg.errors import VolsegError
from volseg.evaluation.duplicates import ImagePrint, groups_of_pairs, near_duplicates, print_of
from volseg.image import Image2D
from volseg.io.image_cases import ImageCase, ImageSurvey, survey_images
from volseg.io.images import ImageReader
from volseg.io.target_cells import plain_name
from volseg.recipe.classification import CLASSES, LABELS, split_names
from volseg.words import format_count, format_list, format_sizes

MAX_NAMES = 5  # sizes named in one finding
MAX_LISTED = 20  # findings of a kind that are listed one by one


@dataclass(frozen=True, slots=True, eq=False)
class ReadImage:
    """An image of a data set, and what is kept of its pixels."""

    case: ImageCase
    image: ImagePrint
    size: tuple[int, int]
    is_colour: bool

    @classmethod
    def of(cls, case: ImageCase, image: Image2D) -> ReadImage:
        """Return what is kept of an image; a colour file whose channels are equal is grey."""
        array = image.array
        is_colour = len(array) > 1 and bool((array != array[:1]).any())
        size = (array.shape[1], array.shape[2])
        return cls(case, print_of(array, image.largest), size, is_colour)


def check_images(dataset: Path, target: str | None = None) -> Iterator[Problem]:
    """Yield every problem of a data set of images; each of them is read once.

    Args:
        target: column to learn; None: the one that the data set suggests, if it does.

    Raises:
        VolsegError: the data set cannot be listed at all.
    """
    survey = survey_images(dataset, target=target)
    target = target or survey.likely_target
    if target is not None:
        survey = survey_images(dataset, target=target)
    where = str(dataset)
    for mistake in survey.mistakes:
        yield problem_at(where, "E_DATASET", mistake, "correct the dataset")
    for remark in survey.remarks:
        code, _, text = remark.partition(": ")
        yield problem_at(where, code, text)
    yield from _unlabelled(survey, where)
    images: list[ReadImage] = []
    reader = ImageReader()
    for case in survey.cases:
        try:
            images.append(ReadImage.of(case, reader.read(case.path, case.index)))
        except VolsegError as error:
            yield problem_of(case.id, error)
    yield from _class_problems(survey, target, where)
    yield from _looks(images, where)
    yield from _duplicates(images, _classes_of(survey, target), where)


def _unlabelled(survey: ImageSurvey, where: str) -> Iterator[Problem]:
    """Yield the empty cells of the target, if there are many of them as one."""
    texts = survey.unlabelled
    if len(texts) > MAX_LISTED:
        texts = [f"{texts[0]}, and {len(texts) - 1} more of {len(survey.cases)} images have none"]
    for text in texts:
        yield problem_at(where, "W_NO_TARGET", text, "fill it in; training leaves out the image")


def _kind_of(survey: ImageSurvey, target: str | None) -> str | None:
    return next((column.kind for column in survey.target_columns if column.name == target), None)


def _classes_of(survey: ImageSurvey, target: str | None) -> str | None:
    """Return the target if it is one of classes or labels, in which duplicates should agree."""
    return target if _kind_of(survey, target) in (CLASSES, LABELS) else None


def _class_problems(survey: ImageSurvey, target: str | None, where: str) -> Iterator[Problem]:
    """Yield the classes that only one of several splits holds."""
    name = _classes_of(survey, target)
    if name is None:
        return
    several = _kind_of(survey, name) == LABELS
    splits, shown = defaultdict[str, set[str]](set), dict[str, str]()
    for case in survey.cases:
        cell = case.cells.get(name, "")
        for part in split_names(cell) if several else [cell]:
            value = plain_name(part)
            if case.split is not None and value:
                splits[value].add(case.split)
                shown.setdefault(value, part)
    everywhere = sorted(set().union(*splits.values()))
    for value, places in sorted(splits.items()):
        if len(places) == 1 < len(everywhere):
            text = f"class {shown[value]!r} of {name!r} is in split {next(iter(places))!r} only"
            fix = f"put images of it into each of {', '.join(everywhere)}"
            yield problem_at(where, "W_CLASS_SPLIT", text, fix)


def _looks(images: Sequence[ReadImage], where: str) -> Iterator[Problem]:
    """Yield blank images, and that images differ in size or colour."""
    blank = [image.case for image in images if image.image.is_blank]
    for case in blank if len(blank) <= MAX_LISTED else ():
        text = f"{case.path}: shows nothing: all pixels are nearly equal"
        yield problem_at(case.id, "W_BLANK", text, "leave it out, or export it again")
    if len(blank) > MAX_LISTED:
        text = f"{len(blank)} of {len(images)} images show nothing: all pixels are nearly equal"
        text += f": {format_list([case.id for case in blank], MAX_NAMES)}"
        yield problem_at(where, "W_BLANK", text, "leave them out, or export them again")
    sizes = Counter(image.size for image in images)
    if len(sizes) > 1:
        shown = [f"{format_sizes(size)} ({n})" for size, n in sizes.most_common(MAX_NAMES)]
        others = f" and {len(sizes) - MAX_NAMES} more" if len(sizes) > MAX_NAMES else ""
        text = f"images have {len(sizes)} sizes (height × width): {', '.join(shown)}{others}"
        text += "; they are resized to one; check that the size does not give the class away"
        yield problem_at(where, "N_SIZES", text)
    n_colour = sum(image.is_colour for image in images)
    if 0 < n_colour < len(images):
        colour = next(image.case.id for image in images if image.is_colour)
        text = f"{n_colour} of {len(images)} images are in colour, such as {colour!r}"
        fix = "set images.channels = 1 unless colour means something"
        yield problem_at(where, "W_CHANNELS", text, fix)


# ---- duplicates


def _duplicates(images: Sequence[ReadImage], classes: str | None, where: str) -> Iterator[Problem]:
    """Yield the groups of duplicates that lie in two splits or classes, and how many others."""
    pairs = list(near_duplicates([image.image for image in images]))
    numbers = groups_of_pairs(pairs, len(images))
    groups: dict[int, list[tuple[ReadImage, ReadImage]]] = defaultdict(list)
    for first, second in pairs:
        groups[numbers[first]].append((images[first], images[second]))
    members = Counter(numbers)
    for number, alike in groups.items():
        yield from _group_problems(alike, members[number], classes)
    if groups:
        n = sum(members[number] for number in groups)
        text = (
            f"{format_count(len(groups), 'group')} of equal or nearly equal images hold {n} of "
            f"{format_count(len(images), 'image')}; folds keep a group together, and your own "
            "splits should too"
        )
        yield problem_at(where, "N_SIMILAR", text)


def _group_problems(
    alike: Sequence[tuple[ReadImage, ReadImage]], n: int, classes: str | None
) -> Iterator[Problem]:
    leak = next((pair for pair in alike if _is_leak(*pair)), None)
    if leak is not None:
        first, second = leak
        names = f"{_named(first, first.case.split)} and {_named(second, second.case.split)}"
        text = f"{names} {_how(leak)}{_more(n)}"
        fix = "put them into one split, or leave out one: results on it would be too good"
        yield problem_at(first.case.id, "W_LEAK", text, fix)
    if classes is None:
        return
    conflict = next((pair for pair in alike if _is_conflict(*pair, classes)), None)
    if conflict is not None:
        names = " and ".join(_named(image, image.case.cells[classes]) for image in conflict)
        text = f"{names} {_how(conflict)} but differ in {classes!r}{_more(n)}"
        fix = "correct the class of one, or leave out both"
        yield problem_at(conflict[0].case.id, "W_DUPLICATE", text, fix)


def _named(image: ReadImage, word: str | None) -> str:
    return f"{image.case.id!r} ({word})"


def _how(pair: tuple[ReadImage, ReadImage]) -> str:
    first, second = pair
    is_same = first.image.sha256 == second.image.sha256
    return "have the same pixels" if is_same else "are nearly equal"


def _more(n: int) -> str:
    return f"; {n} such images in all" if n > 2 else ""


def _is_leak(first: ReadImage, second: ReadImage) -> bool:
    """Tell whether two images are in different splits; a patient in two is a mistake of its own."""
    splits = {first.case.split, second.case.split} - {None}
    return len(splits) == 2 and not _is_one_patient(first, second)


def _is_conflict(first: ReadImage, second: ReadImage, classes: str) -> bool:
    """Tell whether two images differ in class; neighbouring slices of a patient may."""
    values = {plain_name(image.case.cells.get(classes, "")) for image in (first, second)} - {""}
    is_same = first.image.sha256 == second.image.sha256
    return len(values) == 2 and (is_same or not _is_one_patient(first, second))


def _is_one_patient(first: ReadImage, second: ReadImage) -> bool:
    return first.case.patient is not None and first.case.patient == second.case.patient

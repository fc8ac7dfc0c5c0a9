"""Which images train and which validate: by patient, near duplicate and class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from volseg.errors import VolsegError
from volseg.evaluation.duplicates import ImagePrint, groups_of
from volseg.io.image_cases import ImageCase
from volseg.io.targets import Value, count_classes
from volseg.recipe.classification import NUMBER, Target
from volseg.words import format_list


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


def group_cases(cases: Sequence[ImageCase], prints: Sequence[ImagePrint]) -> dict[str, str]:
    """Return case id → group: images of one patient, and near duplicates, share it."""
    numbers = groups_of(prints, [case.patient for case in cases])
    names: dict[int, str] = {}
    return {
        case.id: names.setdefault(number, case.patient or case.id)
        for case, number in zip(cases, numbers, strict=True)
    }


def leak_warnings(groups: Mapping[str, str], splits: Mapping[str, str]) -> list[str]:
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


def class_warnings(
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


def training_cases(cases: Sequence[ImageCase], splits: Mapping[str, str]) -> list[ImageCase]:
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

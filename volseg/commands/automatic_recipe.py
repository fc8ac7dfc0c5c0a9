"""A recipe that leaves everything to the plan, derived from a dataset."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from volseg.commands.batch import REFUSE, of_tilt, reason_of
from volseg.commands.training_cases import labelled_cases, refuse_dataset
from volseg.errors import VolsegError
from volseg.execution.local import run
from volseg.io.cases import Case
from volseg.io.dataset_json import IGNORE, stated_labels, stated_modalities, stated_regions
from volseg.io.label_table import read_region_names
from volseg.io.layouts import survey_cases
from volseg.io.volumes import read_mask, read_volume
from volseg.measurement.units import looks_like_ct
from volseg.options import Progress, ignore_progress
from volseg.recipe import AUTO, PLANNED_LAYERS, AnyRecipe, Recipe, as_recipe, parse_recipe
from volseg.words import format_count

MASKS = "Reading the masks"
CT_SCANS = 5  # read to tell whether a channel is CT
SIDES = {
    "R": ("left", "right"),
    "A": ("anterior", "posterior"),
    "S": ("superior", "inferior", "upper", "lower"),
}


def recipe_for(
    dataset: Path | str,
    recipe: Path | str | AnyRecipe | None,
    progress: Progress = ignore_progress,
    tilt: str = REFUSE,
) -> Recipe:
    """Return the given recipe, or else one that leaves everything to the plan.

    Args:
        tilt: what becomes of tilted stacks: refuse or resample.

    Raises:
        VolsegError: the dataset has no usable case. Other mistakes are reported, all at once, when
            it is prepared.
    """
    if recipe is not None:
        return as_recipe(recipe)
    survey = survey_cases(Path(dataset))
    if not survey.cases:
        refuse_dataset(Path(dataset), {}, survey.mistakes)
    return auto_recipe(Path(dataset), of_tilt(survey.cases, tilt), progress)


def auto_recipe(
    dataset: Path, cases: Sequence[Case], progress: Progress = ignore_progress
) -> Recipe:
    """Make a recipe that leaves everything to the plan.

    Labels are the values in the masks, with the names that the dataset states. Scans count as CT if
    the dataset says so or if they look like CT, in which case the unit HU is a guess; otherwise
    intensities are normalised per scan.
    """
    labels, ignore = _labels(dataset, cases, progress)
    regions, order = stated_regions(dataset)
    names_of_channels = dict.fromkeys(name for case in cases for name in case.images)
    channels = [_Channel(name, dataset, cases) for name in names_of_channels]
    methods = {channel.name: channel.normalisation() for channel in channels}
    first = channels[0]
    is_ct = methods[first.name] == "window"
    sought, modality = ", ".join(labels), "CT" if is_ct else "MR or other"
    content = {
        "name": _slug(dataset),
        "description": f"Segments {sought} in {modality} scans; "
        "the plan derives all settings from the data.",
        "intended_use": f"{sought} in {modality} scans like the training scans.",
        "limits": "Not tested on scans from elsewhere.",
        "data_source": f"The dataset in a folder named {_folder(dataset).name!r}; it was trained "
        "without a recipe, so nothing else is known of its origin.",
        "data": {
            "channels": list(methods),
            "labels": labels,
            "ignore": ignore,
            "regions": regions or None,
            "regions_class_order": order or None,
            "intensity_unit": "HU" if is_ct else "a.u.",
            "unit_guessed": is_ct and not first.is_stated_ct,
            "grids": "first" if len(channels) > 1 else "same",
        },
        "preprocess": {
            "crop": "nonzero",
            **_normalise(methods, default=methods[first.name]),
        },
        "network": {"name": "unet3d"} | dict.fromkeys(PLANNED_LAYERS, AUTO),
        "train": dict.fromkeys(("patch_shape", "batch_size", "foreground_fraction"), AUTO)
        | {"epochs": 300, "patience": 100, "augment": {"flip_axes": _flip_axes(labels)}},
    }
    return parse_recipe(content, where=f"the recipe for {dataset}")


def _flip_axes(labels: Iterable[str]) -> list[str]:
    """Return the axes along which no label names a side, which mirroring would swap."""
    names = " ".join(labels).casefold()
    return [axis for axis, words in SIDES.items() if not any(word in names for word in words)]


def _normalise(methods: Mapping[str, str], default: str) -> dict[str, Any]:
    others = {name: {"method": one} for name, one in methods.items() if one != default}
    return {"normalise": {"method": default}, "normalise_channels": others}


def _labels(
    dataset: Path, cases: Sequence[Case], progress: Progress
) -> tuple[dict[str, int], int | None]:
    """Return name → value of every label in the masks, and the value of voxels to ignore, if any.

    Masks that cannot be read are skipped, as preparing reports them, unless none can be read.
    """
    masks = labelled_cases(cases)
    if not masks:
        raise VolsegError(
            f"{dataset}: none of its {format_count(len(cases), 'case')} has a mask to train on",
            fix="add a `label` column or a labels/ folder with the names of the images",
            code="E_DATASET",
        )
    values_of, failed = _values_of(masks, progress)
    named = stated_labels(dataset)
    ignore = named.pop(IGNORE, None)
    stated = {value: name for name, value in named.items()}
    failed |= {
        case: f"E_LABELS: {problem}"
        for case, values in values_of.items()
        if (problem := unnamed_values(values, dataset))
    }
    if len(failed) == len(masks) or failed.keys() & values_of.keys():
        refuse_dataset(dataset, failed)
    labels = _named(values_of.values(), stated, ignore)
    if not labels:
        raise VolsegError(
            f"{dataset}: no mask holds a labelled voxel", fix="check the masks", code="E_LABELS"
        )
    return labels, ignore


def _named(
    masks: Collection[Mapping[int, str]], stated: Mapping[int, str], ignore: int | None
) -> dict[str, int]:
    """Return name → value of the labels in all masks.

    Args:
        masks: value → name in each mask; the name is empty if the file states none.
        stated: value → name in the dataset, which comes first.
    """
    pairs = {
        (value, stated.get(value) or name or f"label_{value}")
        for names in masks
        for value, name in names.items()
        if value not in (0, ignore)
    }
    labels = {name: value for value, name in sorted(pairs)}
    if len(pairs) == len(labels) == len(set(labels.values())):
        return labels
    # Files number their regions differently; training brings them to these values by name.
    return {name: number for number, name in enumerate(sorted(labels), start=1)}


def unnamed_values(values: Collection[int], dataset: Path) -> str:
    """Describe the values of a mask that `dataset.json` does not name; "" if there are none.

    A dataset that names no labels may hold any.
    """
    named = stated_labels(dataset)
    ignore = named.pop(IGNORE, None)
    if not named:
        return ""
    in_regions = set[int]().union(*stated_regions(dataset)[0].values())
    unnamed = sorted(set(values) - {0, ignore, *named.values(), *in_regions})
    if not unnamed:
        return ""
    return (
        f"its mask holds values {unnamed[:5]}, which dataset.json does not name; it names "
        f"{sorted(named.values())}"
    )


def _values_of(
    cases: Sequence[Case], progress: Progress
) -> tuple[dict[str, dict[int, str]], dict[str, str]]:
    """Return case → values in its mask with their names, and why other masks cannot be read."""
    values: dict[str, dict[int, str]] = {}
    failed: dict[str, str] = {}
    for count, outcome in enumerate(run(_mask_values, cases), start=1):
        progress(MASKS, count / len(cases), outcome.item.id)
        if outcome.error is None:
            values[outcome.item.id] = outcome.value or {}
        else:
            failed[outcome.item.id] = reason_of(outcome.error)
    return values, failed


def _mask_values(case: Case) -> dict[int, str]:
    assert case.reference is not None
    scan = next(iter(case.images.values()))
    values = np.unique(read_mask(case.reference, like=scan).array).tolist()
    names = read_region_names(case.reference, scan)
    return {value: names.get(value, "") for value in values}


@dataclass(frozen=True, slots=True)
class _Channel:
    """A channel of a dataset, and what is known of its modality."""

    name: str
    dataset: Path
    cases: Sequence[Case]

    def normalisation(self) -> str:
        """Return the method: a window for CT, else a z-score."""
        if self.is_stated_ct:
            return "window"
        return "zscore" if self._modalities() or not self._looks_like_ct() else "window"

    @property
    def is_stated_ct(self) -> bool:
        words = (name.casefold().replace("_", " ") for name in (self.name, *self._modalities()))
        return any(re.search(r"\bct\b", name) for name in words)

    def _modalities(self) -> set[str]:
        """Return the modality in dataset.json and in the column `modality`, if that is unique."""
        column = {case.classes.get("modality", "") for case in self.cases}
        stated = stated_modalities(self.dataset).get(self.name, "")
        return {stated, *(column if len(column) == 1 else ())} - {""}

    def _looks_like_ct(self) -> bool:
        """Tell whether the scans that can be read, of a sample, all look like CT."""
        are_ct_like = []
        scans = [case.images[self.name] for case in self.cases if self.name in case.images]
        for path in scans[:: max(1, len(scans) // CT_SCANS)][:CT_SCANS]:
            with suppress(VolsegError):  # preparing reports scans that cannot be read
                are_ct_like.append(looks_like_ct(read_volume(path)))
        return bool(are_ct_like) and all(are_ct_like)


def _slug(dataset: Path) -> str:
    slug = re.sub(r"[^a-z0-9]+", "_", _folder(dataset).name.casefold()).strip("_")
    return slug or "auto"


def _folder(dataset: Path) -> Path:
    return (dataset.parent if dataset.suffix == ".csv" else dataset).resolve()

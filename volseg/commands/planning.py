"""`volseg plan`: what training would do with a dataset, and why; and a recipe if none is given."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from volseg.commands.batch import reason_of
from volseg.commands.preparing import MASKS, fingerprint_of, refuse_dataset, warnings_of
from volseg.errors import VolsegError
from volseg.execution.cpu import physical_cores, total_memory
from volseg.execution.local import run
from volseg.io.cases import Case
from volseg.io.dataset_json import IGNORE, stated_labels, stated_modalities, stated_regions
from volseg.io.files import make_folder, refuse_unsealed, write_sealed
from volseg.io.layouts import survey_cases
from volseg.io.volumes import read_mask, read_volume
from volseg.measurement.units import looks_like_ct
from volseg.options import PlanOptions, Progress, command, ignore_progress
from volseg.recipe import Recipe, as_recipe, parse_recipe
from volseg.reports import PlanReport
from volseg.sizing import Budget

if TYPE_CHECKING:  # torch takes seconds to import; only a command that needs it pays
    from volseg.planning.close import Closed
    from volseg.planning.fingerprint import DatasetFingerprint

N_FOLDS = 5
# Fraction of the memory that training may take without a stated budget
HOST_FRACTION = 0.5
GPU_FRACTION = 0.85
# Floating-point operations per second of a step, to estimate the steps in a time budget
CPU_CORE_SPEED = 8e10
GPU_SPEED = 3e13
CT_SCANS = 5  # read to tell whether a channel is CT
SIDES = {
    "R": ("left", "right"),
    "A": ("anterior", "posterior"),
    "S": ("superior", "inferior", "upper", "lower"),
}


@command(PlanOptions)
def plan(options: PlanOptions) -> PlanReport:
    """Plan a training: spacing, intensities, network and patches, with a reason for each.

    Raises:
        VolsegError: cases cannot be used (the error lists all of them), or nothing fits the budget.
    """
    from volseg.planning.close import check_budget
    from volseg.training.check import check_recipe

    dataset, out, seconds = options.dataset, options.out, options.time_budget_seconds
    if out is not None:
        if out.suffix != ".toml":
            problem = f"{out}: a plan is a recipe, which is a TOML file"
            raise VolsegError(problem, fix="give a name that ends in .toml", code="E_USAGE")
        refuse_unsealed(out)
        make_folder(out.parent)
    recipe = recipe_for(dataset, options.recipe, options.progress)
    check_recipe(recipe)
    n = number_of_folds(dataset, recipe, options.folds, is_auto=options.recipe is None)
    fingerprint, failed = fingerprint_of(dataset, recipe, options.seed, options.progress)
    if failed:
        refuse_dataset(dataset, failed)
    budget = budget_of(options.device, options.memory, seconds)
    may_drop_folds = options.folds is None and seconds is not None  # as `train` does
    planned, n = _plan_of_folds(fingerprint, recipe, budget, n, 1 if may_drop_folds else n)
    if budget.is_stated:
        check_budget(planned.recipe, budget)
    check_recipe(planned.recipe)
    if out is not None:
        write_sealed(out, _plan_text(planned, out, dataset, n))
    return PlanReport(
        out=dataset if out is None else out,
        done=[recipe.name],
        warnings=warnings_of(fingerprint, recipe),
        recipe=planned.recipe.model_dump(mode="json"),
        reasons=[line.model_dump() for line in planned.reasons],
        cases=fingerprint.n_cases,
        folds=n,
        plan_file="" if out is None else str(out),
    )


def _plan_text(plan: Closed, path: Path, dataset: Path, folds: int) -> str:
    """Return the plan as a recipe, with the reason of each decision above it."""
    from volseg.recipe.write import recipe_text

    comments: dict[str, list[str]] = {}
    for line in plan.reasons:
        comments.setdefault(line.key, []).append(f"{line.setting} {line.value}: {line.reason}")
    many = f" --folds {folds}" if folds > 1 else ""
    command = shlex.join(["volseg", "train", str(dataset), "--recipe", str(path)])
    heading = [f"{command}{many} --out MODEL", "", "You may edit this plan; comments give reasons."]
    return recipe_text(plan.recipe, heading, comments)


def _plan_of_folds(
    fingerprint: DatasetFingerprint, recipe: Recipe, budget: Budget, folds: int, fewest: int
) -> tuple[Closed, int]:
    """Return the plan with the most folds that the budget allows, and their number."""
    from volseg.planning.close import close

    for n in range(folds, fewest, -1):
        per_fold = budget if budget.flops is None else replace(budget, flops=budget.flops / n)
        with suppress(VolsegError):
            return close(recipe, fingerprint, per_fold), n
    per_fold = budget if budget.flops is None else replace(budget, flops=budget.flops / fewest)
    return close(recipe, fingerprint, per_fold), fewest


def budget_of(
    device: str = "auto",
    memory: int | None = None,
    seconds: float | None = None,
    *,
    processes: int = 1,
    half: bool = True,
) -> Budget:
    """Return the memory and arithmetic of each process of a training.

    Without a stated memory, the budget is a fraction of the device's.

    Args:
        processes: on this machine; they share its main memory and cores, but each has its own GPU.
        half: whether a GPU uses 16-bit activations.
    """
    import torch

    from volseg.inference.choose import choose_device

    on_gpu = choose_device(device).type == "cuda"
    available = memory
    if available is None:
        total = torch.cuda.get_device_properties(0).total_memory if on_gpu else total_memory()
        available = int(total * (GPU_FRACTION if on_gpu else HOST_FRACTION))
    speed = GPU_SPEED if on_gpu else CPU_CORE_SPEED * physical_cores() / processes
    return Budget(
        memory=available if on_gpu else available // processes,
        flops=None if seconds is None else seconds * speed,
        half=on_gpu and half,
        is_stated=memory is not None,
    )


def recipe_for(
    dataset: Path | str, recipe: Path | str | Recipe | None, progress: Progress = ignore_progress
) -> Recipe:
    """Return the given recipe, or else one that leaves everything to the plan.

    Raises:
        VolsegError: the dataset has no usable case. Other mistakes are reported, all at once, when
            it is prepared.
    """
    if recipe is not None:
        return as_recipe(recipe)
    cases, mistakes = survey_cases(Path(dataset))
    if not cases:
        refuse_dataset(Path(dataset), {}, mistakes)
    return auto_recipe(Path(dataset), cases, progress)


def number_of_folds(dataset: Path, recipe: Recipe, folds: int | None, *, is_auto: bool) -> int:
    """Return how many networks to train.

    This is `folds` if given; else 1 with a recipe, and without one `N_FOLDS` or the number of
    patients if that is smaller.
    """
    if not is_auto or folds == 1:
        return folds or 1
    cases, _ = survey_cases(dataset, recipe.data.channels)
    usable = [case for case in cases if case.reference is not None and case.split != "test"]
    patients = len({case.patient or case.id for case in usable})
    return max(1, min(N_FOLDS, patients)) if folds is None else folds


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
    channels = list(cases[0].images)
    normalisations = {name: _normalise(name, dataset, cases) for name in channels}
    first = normalisations[channels[0]]
    is_ct = first["method"] == "window"
    is_guess = is_ct and not _is_stated_ct(channels[0], dataset, cases)
    names = " ".join(labels).casefold()
    # Mirroring would swap labels that name a side.
    flips = [axis for axis, words in SIDES.items() if not any(word in names for word in words)]
    kind = "CT" if is_ct else "MR or other"
    content = {
        "name": _slug(dataset),
        "description": f"Segments {', '.join(labels)} in {kind} scans; everything that is not in "
        "the data follows from the plan.",
        "data": {
            "channels": channels,
            "labels": labels,
            "ignore": ignore,
            "regions": regions or None,
            "regions_class_order": order or None,
            "intensity_unit": "HU" if is_ct else "a.u.",
            "unit_guessed": is_guess,
            "grids": "first" if len(channels) > 1 else "same",
        },
        "preprocess": {
            "spacing_mm": "auto",
            "crop": "nonzero",
            "normalise": first,
            "normalise_channels": {
                name: method for name, method in normalisations.items() if method != first
            },
        },
        "network": {"name": "unet3d", "features": "auto", "strides": "auto", "kernels": "auto"},
        "train": {
            "patch_shape": "auto",
            "batch_size": "auto",
            "foreground_fraction": "auto",
            "epochs": 300,
            "patience": 100,
            "augment": {"flip_axes": flips},
        },
        "infer": {"overlap": 0.5},
    }
    return parse_recipe(content, where=f"the recipe for {dataset}")


def _labels(
    dataset: Path, cases: Sequence[Case], progress: Progress
) -> tuple[dict[str, int], int | None]:
    """Return name → value of every label in the masks, and the value of voxels to ignore, if any.

    Masks that cannot be read are skipped, as preparing reports them, unless none can be read.
    """
    masks = [case for case in cases if case.reference is not None and case.split != "test"]
    if not masks:
        raise VolsegError(
            f"{dataset}: none of its {len(cases)} cases has a mask to train on",
            fix="add a `label` column or a labels/ folder with the names of the images",
            code="E_DATASET",
        )
    values_of: dict[str, set[int]] = {}
    failed: dict[str, str] = {}

    def read_values(case: Case) -> set[int]:
        assert case.reference is not None
        return set(np.unique(read_mask(case.reference).array).tolist())

    for count, outcome in enumerate(run(read_values, masks), start=1):
        progress(MASKS, count / len(masks), outcome.item.id)
        if outcome.error is None:
            values_of[outcome.item.id] = outcome.value or set()
        else:
            failed[outcome.item.id] = reason_of(outcome.error)
    named = stated_labels(dataset)
    ignore = named.pop(IGNORE, None)
    stated = {value: name for name, value in named.items()}
    in_regions = set[int]().union(*stated_regions(dataset)[0].values())
    if stated:
        for case, values in values_of.items():
            if unnamed := sorted(values - {0, ignore, *stated, *in_regions}):
                failed[case] = (
                    f"E_LABELS: its mask holds values {unnamed[:5]}, which dataset.json does not "
                    f"name; it names {sorted(stated)}"
                )
    if len(failed) == len(masks) or any(case in values_of for case in failed):
        refuse_dataset(dataset, failed)
    values = set[int]().union(*values_of.values())
    labels = {stated.get(value, f"label_{value}"): value for value in sorted(values - {0, ignore})}
    if not labels:
        raise VolsegError(
            f"{dataset}: no mask holds a labelled voxel", fix="check the masks", code="E_LABELS"
        )
    return labels, ignore


def _normalise(channel: str, dataset: Path, cases: Sequence[Case]) -> dict[str, Any]:
    if _is_stated_ct(channel, dataset, cases):
        return {"method": "window"}
    if _stated_modality(channel, dataset, cases):
        return {"method": "zscore"}
    are_ct_like = []
    for case in list(cases)[:: max(1, len(cases) // CT_SCANS)][:CT_SCANS]:
        with suppress(VolsegError):  # preparing reports scans that cannot be read
            volume = read_volume(case.images[channel])
            are_ct_like.append(looks_like_ct(volume))
    return {"method": "window"} if are_ct_like and all(are_ct_like) else {"method": "zscore"}


def _is_stated_ct(channel: str, dataset: Path, cases: Sequence[Case]) -> bool:
    names = (channel, *_stated_modality(channel, dataset, cases))
    return any(re.search(r"\bct\b", name.casefold().replace("_", " ")) for name in names)


def _stated_modality(channel: str, dataset: Path, cases: Sequence[Case]) -> list[str]:
    """Return the modality in dataset.json and in the column `modality`, if the latter is unique."""
    column = {case.classes.get("modality", "") for case in cases}
    stated = {stated_modalities(dataset).get(channel, ""), *(column if len(column) == 1 else ())}
    return sorted(stated - {""})


def _slug(dataset: Path) -> str:
    folder = dataset.parent if dataset.suffix == ".csv" else dataset
    slug = re.sub(r"[^a-z0-9]+", "_", folder.resolve().name.casefold()).strip("_")
    return slug or "auto"

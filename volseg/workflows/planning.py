"""`volseg plan`: what training would do with a dataset, and why; and the recipe for those who have none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from volseg.errors import VolsegError
from volseg.execute.cpu import physical_cores, total_memory
from volseg.execute.local import run
from volseg.io.cases import (
    IGNORE,
    Case,
    stated_labels,
    stated_modalities,
    stated_regions,
    survey_cases,
)
from volseg.io.files import make_folder, read_sealed, refuse_unsealed, write_sealed
from volseg.io.nifti import read_mask, read_volume
from volseg.measure.units import looks_like_ct
from volseg.recipe import Recipe, listed, mistakes_of, parse_recipe
from volseg.sizing import Budget
from volseg.workflows.batch import Progress, RunReport, amount_of, reason_of, silent
from volseg.workflows.preparing import MASKS, as_recipe, fingerprint_of, refuse_dataset, warnings_of

if TYPE_CHECKING:  # torch takes seconds to import; only a workflow that needs it pays
    from volseg.plan import DatasetFingerprint, Plan

N_FOLDS = 5
HOST_SHARE = 0.5  # of main memory that training may take where no budget is given
GPU_SHARE = 0.85  # of a GPU's
# Floating-point operations per second that a step reaches, for reckoning how many steps fit into a time budget.
CPU_CORE_SPEED = 8e10
GPU_SPEED = 3e13
SCANS_LOOKED_AT = 5
SIDES = {
    "R": ("left", "right"),
    "A": ("anterior", "posterior"),
    "S": ("superior", "inferior", "upper", "lower"),
}


def plan(
    dataset: Path | str,
    *,
    recipe: Path | str | Recipe | None = None,
    memory: int | str | None = None,
    time_budget_seconds: float | None = None,
    folds: int | None = None,
    device: str = "auto",
    seed: int = 0,
    out: Path | str | None = None,
    progress: Progress = silent,
) -> RunReport:
    """What training would do: spacing, intensities, network, patches, with a reason for each.

    Args:
        recipe: whose values stay as they are; None plans everything.
        memory: bytes that training may take, or text such as `8G`, of the GPU or of the host; None: a share of what the device has.
        time_budget_seconds, folds: as for `train`, which shares the time out to the networks of the folds.
        out: a JSON file for the plan, which `train` takes, edited or not.

    Raises:
        VolsegError: a case cannot be used (all of them are named), or nothing fits the budget.
    """
    from volseg.plan import check_budget

    if out is not None:
        refuse_unsealed(Path(out))
        make_folder(Path(out).parent)
    budget_of(device, memory)  # a misspelt amount should not be found out after all scans were read
    chosen = recipe_for(dataset, recipe, progress)
    n = folds_of(Path(dataset), chosen, folds, is_auto=recipe is None)
    fingerprint, failed = fingerprint_of(dataset, chosen, seed, progress)
    if failed:
        refuse_dataset(Path(dataset), failed)
    budget = budget_of(device, memory, time_budget_seconds)
    may_drop_folds = folds is None and time_budget_seconds is not None  # as `train` does
    found, n = _plan_of_folds(fingerprint, chosen, budget, n, 1 if may_drop_folds else n)
    if budget.is_stated:
        check_budget(found, chosen, budget)
    if out is not None:
        write_sealed(Path(out), found.model_dump(mode="json"))
    details = {
        "recipe": chosen.model_dump(mode="json"),
        "plan": found.model_dump(mode="json"),
        "cases": fingerprint.n_cases,
        "folds": n,
        "warnings": warnings_of(fingerprint, chosen),
    }
    return RunReport(
        out=Path(dataset) if out is None else Path(out), done=[chosen.name], details=details
    )


def _plan_of_folds(
    fingerprint: DatasetFingerprint, recipe: Recipe, budget: Budget, folds: int, fewest: int
) -> tuple[Plan, int]:
    """The plan of the most folds of which each has its share of the arithmetic, and their number."""
    from volseg.plan import make_plan

    for n in range(folds, fewest, -1):
        share = budget if budget.flops is None else replace(budget, flops=budget.flops / n)
        with suppress(VolsegError):
            return make_plan(fingerprint, recipe, share), n
    share = budget if budget.flops is None else replace(budget, flops=budget.flops / fewest)
    return make_plan(fingerprint, recipe, share), fewest


def read_plan(path: Path | str) -> Plan:
    """A plan that `volseg plan --out` wrote.

    Raises:
        VolsegError: it is not there or not a plan; all mistakes are named.
    """
    from pydantic import ValidationError

    from volseg.plan import Plan

    try:
        return Plan.model_validate(read_sealed(Path(path)))
    except OSError as error:
        raise VolsegError(
            f"{path}: cannot be read ({error.strerror})", fix="check the path", code="E_PLAN"
        ) from error
    except ValueError as error:
        reason = (
            listed(mistakes_of(error, Plan)) if isinstance(error, ValidationError) else str(error)
        )
        raise VolsegError(
            f"{path}: not a plan: {reason}",
            fix="correct it, or write it anew with `volseg plan DATASET --out PLAN.json`",
            code="E_PLAN",
        ) from error


def budget_of(
    device: str = "auto",
    memory: int | str | None = None,
    seconds: float | None = None,
    *,
    processes: int = 1,
    half: bool = True,
) -> Budget:
    """What each process of a training may take; without a stated memory, a share of what the device has.

    Args:
        processes: on this machine. They share the main memory and the cores of a CPU; of GPUs each has its own.
        half: activations of two bytes, where a GPU is used.

    Raises:
        VolsegError: the memory is no amount of memory.
    """
    import torch

    from volseg.infer.backends import choose_device

    on_gpu = choose_device(device).type == "cuda"
    found = amount_of(memory, "--vram")
    if found is None:
        has = torch.cuda.get_device_properties(0).total_memory if on_gpu else total_memory()
        found = int(has * (GPU_SHARE if on_gpu else HOST_SHARE))
    speed = GPU_SPEED if on_gpu else CPU_CORE_SPEED * physical_cores() / processes
    return Budget(
        memory=found if on_gpu else found // processes,
        flops=None if seconds is None else seconds * speed,
        half=on_gpu and half,
        is_stated=memory is not None,
    )


def recipe_for(
    dataset: Path | str, recipe: Path | str | Recipe | None, progress: Progress = silent
) -> Recipe:
    """The recipe that is given, or else one in which all is left to the plan.

    Mistakes of the dataset are left to who prepares it, who names all of them at once, but for one without a usable case.
    """
    if recipe is not None:
        return as_recipe(recipe)
    cases, mistakes = survey_cases(Path(dataset))
    if not cases:
        refuse_dataset(Path(dataset), {}, mistakes)
    return auto_recipe(Path(dataset), cases, progress)


def folds_of(dataset: Path, recipe: Recipe, folds: int | None, *, is_auto: bool) -> int:
    """How many networks are trained: as many as are asked for, and without a recipe `N_FOLDS`, or one per patient where they are fewer."""
    if not is_auto or folds == 1:
        return folds or 1
    cases, _ = survey_cases(dataset, recipe.data.channels)
    patients = len(
        {
            case.patient or case.id
            for case in cases
            if case.reference is not None and case.split != "test"
        }
    )
    return max(1, min(N_FOLDS, patients)) if folds is None else folds


def auto_recipe(dataset: Path, cases: Sequence[Case], progress: Progress = silent) -> Recipe:
    """A recipe in which everything is left to the plan.

    Labels are the values of the masks, with the names that the dataset states. Scans are taken for CT where the dataset says so or where
    they look like it, and then HU is a guess; else intensities are normalised per scan.
    """
    labels, ignore = _labels(dataset, cases, progress)
    regions, order = stated_regions(dataset)
    channels = list(cases[0].images)
    forms = {name: _normalise(name, dataset, cases) for name in channels}
    first = forms[channels[0]]
    is_ct = first["method"] == "window"
    is_guess = is_ct and not _is_stated_ct(channels[0], dataset, cases)
    names = [name.casefold() for name in labels]
    flips = [
        axis
        for axis, words in SIDES.items()
        if not any(word in name for word in words for name in names)
    ]
    kind = "CT" if is_ct else "MR or other"
    content = {
        "name": _slug(dataset),
        "description": f"Segments {', '.join(labels)} in {kind} scans; everything that is not in the data follows from the plan.",
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
            "normalise_channels": {name: form for name, form in forms.items() if form != first},
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
    """Name → value of every label in the masks of the cases, and the value of voxels that are to be ignored, if there is one.

    Masks that cannot be read are left to who prepares them, unless none can be.
    """
    masks = [case for case in cases if case.reference is not None and case.split != "test"]
    if not masks:
        raise VolsegError(
            f"{dataset}: none of its {len(cases)} cases has a mask to train on",
            fix="add a `label` column or a labels/ folder with the names of the images",
            code="E_DATASET",
        )
    found: dict[str, set[int]] = {}
    failed: dict[str, str] = {}

    def look(case: Case) -> set[int]:
        assert case.reference is not None
        return set(np.unique(read_mask(case.reference).array).tolist())

    for count, outcome in enumerate(run(look, masks), start=1):
        progress(MASKS, count / len(masks), outcome.item.id)
        if outcome.error is None:
            found[outcome.item.id] = outcome.value or set()
        else:
            failed[outcome.item.id] = reason_of(outcome.error)
    named = stated_labels(dataset)
    ignore = named.pop(IGNORE, None)
    stated = {value: name for name, value in named.items()}
    known = {
        0,
        ignore,
        *stated,
        *(value for values in stated_regions(dataset)[0].values() for value in values),
    }
    if stated:
        strange = {case: sorted(values - known) for case, values in found.items()}
        failed |= {
            case: f"E_LABELS: its mask holds values {values[:5]}, which dataset.json does not name; it names {sorted(stated)}"
            for case, values in strange.items()
            if values
        }
    if len(failed) == len(masks) or any(case in found for case in failed):
        refuse_dataset(dataset, failed)
    values = set[int]().union(*found.values())
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
    for case in list(cases)[:: max(1, len(cases) // SCANS_LOOKED_AT)][:SCANS_LOOKED_AT]:
        with suppress(VolsegError):  # a scan that cannot be read is left to who prepares it
            volume = read_volume(case.images[channel])
            are_ct_like.append(looks_like_ct(volume))
    return {"method": "window"} if are_ct_like and all(are_ct_like) else {"method": "zscore"}


def _is_stated_ct(channel: str, dataset: Path, cases: Sequence[Case]) -> bool:
    names = (channel, *_stated_modality(channel, dataset, cases))
    return any(re.search(r"\bct\b", name.casefold().replace("_", " ")) for name in names)


def _stated_modality(channel: str, dataset: Path, cases: Sequence[Case]) -> list[str]:
    """What dataset.json and the column `modality` say that the channel is, where they say one thing of all cases."""
    column = {case.classes.get("modality", "") for case in cases}
    stated = {stated_modalities(dataset).get(channel, ""), *(column if len(column) == 1 else ())}
    return sorted(stated - {""})


def _slug(dataset: Path) -> str:
    folder = dataset.parent if dataset.suffix == ".csv" else dataset
    slug = re.sub(r"[^a-z0-9]+", "_", folder.resolve().name.casefold()).strip("_")
    return slug or "auto"

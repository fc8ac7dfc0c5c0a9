"""`volseg plan`: what training would do with a dataset, and why; and a recipe if none is given."""

from __future__ import annotations

import shlex
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from volseg.commands.automatic_recipe import recipe_for
from volseg.commands.image_planning import plan_images
from volseg.commands.image_recipes import OF_IMAGES, is_of_images
from volseg.commands.training_cases import (
    TrainingSet,
    labelled_cases,
    refuse_dataset,
    warnings_of,
)
from volseg.errors import VolsegError
from volseg.execution.cpu import physical_cores, total_memory
from volseg.io.files import make_folder, refuse_unsealed, write_sealed
from volseg.io.layouts import survey_cases
from volseg.options import PlanOptions, command
from volseg.recipe import Recipe
from volseg.reports import PlanReport
from volseg.sizing import Budget

if TYPE_CHECKING:  # torch takes seconds to import; only a command that needs it pays
    from volseg.planning.close import Closed
    from volseg.planning.fingerprint import DatasetFingerprint
    from volseg.planning.images import ClosedImages

N_FOLDS = 5
# Fraction of the memory that training may take without a stated budget
HOST_FRACTION = 0.5
GPU_FRACTION = 0.85
# Floating-point operations per second of a step, to estimate the steps in a time budget
CPU_CORE_SPEED = 8e10
GPU_SPEED = 3e13


@command(PlanOptions)
def plan(options: PlanOptions) -> PlanReport:
    """Plan a training: spacing, intensities, network and patches, with a reason for each.

    Raises:
        VolsegError: cases cannot be used (the error lists all of them), or nothing fits the budget.

    Example:
        >>> import volseg
        >>> result = volseg.plan("sample_data", recipe="smoke")
        >>> result.cases, result.recipe["preprocess"]["spacing_mm"]
        (18, [1.2, 1.2, 1.6])
    """
    from volseg.inference.choose import choose_device
    from volseg.planning.close import check_budget
    from volseg.training.check import check_recipe

    dataset, out, seconds = options.dataset, options.out, options.time_budget_seconds
    if out is not None and out.suffix != ".toml":
        problem = f"{out}: a plan is a recipe, which is a TOML file"
        raise VolsegError(problem, fix="give a name that ends in .toml", code="E_USAGE")
    if is_of_images(dataset, options.recipe, options.target):
        return plan_images(options)
    options.refuse_stated(("target",), OF_IMAGES)
    if out is not None:
        refuse_unsealed(out)
        make_folder(out.parent)
    choose_device(options.device)  # before anything is read
    recipe = recipe_for(dataset, options.recipe, options.progress, options.tilt)
    check_recipe(recipe)
    n = number_of_folds(dataset, recipe, options.folds, is_auto=options.recipe is None)
    data = TrainingSet(dataset, recipe, options.seed, options.tilt, options.progress)
    fingerprint, failed = data.fingerprint(data.cases(survey := data.survey()))
    if failed:
        refuse_dataset(dataset, failed)
    budget = budget_of(options.device, options.memory, seconds)
    may_drop_folds = options.folds is None and seconds is not None  # as `train` does
    planned, n = _plan_of_folds(fingerprint, recipe, budget, n, 1 if may_drop_folds else n)
    if budget.is_stated:
        check_budget(planned.recipe, budget)
    check_recipe(planned.recipe)
    if out is not None:
        write_sealed(out, plan_text(planned, out, dataset, n))
    return PlanReport(
        out=dataset if out is None else out,
        done=[recipe.name],
        warnings=[*survey.remarks, *warnings_of(fingerprint, recipe)],
        recipe=planned.recipe.model_dump(mode="json"),
        reasons=[line.model_dump() for line in planned.reasons],
        cases=fingerprint.n_cases,
        folds=n,
        plan_file="" if out is None else str(out),
    )


def plan_text(plan: Closed | ClosedImages, path: Path, dataset: Path, folds: int) -> str:
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


def number_of_folds(dataset: Path, recipe: Recipe, folds: int | None, *, is_auto: bool) -> int:
    """Return how many networks to train.

    This is `folds` if given; else 1 with a recipe, and without one `N_FOLDS` or the number of
    patients if that is smaller.
    """
    if not is_auto or folds == 1:
        return folds or 1
    cases = survey_cases(dataset, recipe.data.channels).cases
    patients = len({case.patient or case.id for case in labelled_cases(cases)})
    return max(1, min(N_FOLDS, patients)) if folds is None else folds

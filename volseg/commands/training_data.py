"""The data of a training: a dataset that is prepared in its work folder, or a prepared folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from volseg.bundle import ModelBundle
from volseg.commands.earlier import cached_recipe, earlier_plan
from volseg.commands.forecast import Forecast
from volseg.commands.planning import N_FOLDS, number_of_folds
from volseg.commands.prepared import load_prepared, prepared_warnings
from volseg.commands.preparing import PREPARED_FILE, prepare_dataset, read_header
from volseg.commands.time_plan import TimePlan
from volseg.commands.training_cases import refuse_dataset
from volseg.errors import VolsegError
from volseg.io.prepared import PreparedCase
from volseg.options import PreprocessOptions
from volseg.planning.close import Closed
from volseg.planning.fingerprint import DatasetFingerprint
from volseg.recipe import Recipe, as_recipe, parse_recipe
from volseg.training.check import check_recipe


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainingData:
    """The prepared data of a training.

    Args:
        stated: the recipe as stated, which may leave values open that its `plan` has.
        folds: number of networks to train if there is enough time.
        forecast: None if this call did not prepare the data or has no time budget.
    """

    folder: Path
    stated: Recipe
    plan: Closed
    fingerprint: DatasetFingerprint
    cases: Sequence[PreparedCase]
    folds: int
    forecast: Forecast | None


def training_data(times: TimePlan, model: ModelBundle | None) -> TrainingData:
    """Prepare the dataset, or take a prepared folder; `model` provides the initial weights."""
    call, options = times.call, times.call.options
    recipe = None if options.recipe is None else as_recipe(options.recipe)
    if not (options.dataset / PREPARED_FILE).is_file():
        return _prepared(times, recipe, model)
    is_auto = recipe is None and bool(read_header(options.dataset).get("is_auto"))
    folds = options.folds or (N_FOLDS if is_auto and options.fold is None else 1)
    call.warn(*prepared_warnings(options.dataset))
    return _loaded(options.dataset, recipe, folds)


def _prepared(times: TimePlan, recipe: Recipe | None, model: ModelBundle | None) -> TrainingData:
    """Prepare the dataset in the work folder."""
    call, options = times.call, times.call.options
    outlook = times.foresee(recipe)
    progress = call.progress if outlook is None else outlook.guarded(call.progress)
    if recipe is None:
        recipe = cached_recipe(options.dataset, call.work, progress, options.tilt)
    if model is not None and recipe.leaves_size_open:
        recipe = _with_size_of(model, recipe, options.init)
    check_recipe(recipe)
    is_auto, folds = options.recipe is None, 1
    if options.fold is None:
        folds = number_of_folds(options.dataset, recipe, options.folds, is_auto=is_auto)
    # A resumed run keeps its plan, even if the free memory has changed.
    earlier = earlier_plan(call.prepared) if options.resume else None
    settings = PreprocessOptions(
        options.dataset,
        recipe=recipe,
        out=call.prepared,
        seed=options.seed,
        tilt=options.tilt,
        progress=progress,
    )
    report = prepare_dataset(settings, earlier=earlier, budget=call.budget(), refuse=True)
    if report.failed:
        refuse_dataset(options.dataset, report.failed)
    call.warn(*report.warnings)
    return _loaded(call.prepared, recipe, folds, None if outlook is None else outlook.forecast)


def _loaded(
    folder: Path, recipe: Recipe | None, folds: int, forecast: Forecast | None = None
) -> TrainingData:
    """Load a prepared folder; `recipe` in place of the folder's, None for the folder's."""
    plan, fingerprint, cases = load_prepared(folder, recipe)
    if recipe is None:
        recipe = parse_recipe(read_header(folder)["recipe"], where=str(folder))
    return TrainingData(
        folder=folder,
        stated=recipe,
        plan=plan,
        fingerprint=fingerprint,
        cases=cases,
        folds=folds,
        forecast=forecast,
    )


def _with_size_of(model: ModelBundle, recipe: Recipe, folder: Path | None) -> Recipe:
    """Return an open recipe with network and patches of the model, from `folder`, to start from."""
    if model.recipe.preprocess.axes != "canonical":
        raise VolsegError(
            f"{folder}: its network takes scans in the axis order of files",
            fix="give a --recipe with its [network], strides and kernels along R, A, S, "
            "and your own [preprocess]",
            code="E_CKPT",
        )
    patches = model.recipe.train.model_dump(include={"patch_shape", "batch_size"})
    train = recipe.train.model_copy(update=patches)
    return recipe.model_copy(update={"network": model.recipe.network, "train": train})

"""`volseg train`: train a model on a dataset or a prepared folder."""

from __future__ import annotations

import math
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from volseg.commands.earlier import (
    FITTED_FILE,
    RECIPE_FILE,
    Fitted,
    cached_recipe,
    earlier_plan,
    read_fitted,
    write_fitted,
)
from volseg.commands.fitting import (
    Fit,
    Folds,
    TooShortError,
    best_plan,
    fit_to_time,
    refuse_time,
    suggested,
)
from volseg.commands.forecast import Forecast, Guard, Source, make_forecast
from volseg.commands.importing import MODEL_FILE
from volseg.commands.planning import N_FOLDS, budget_of, number_of_folds
from volseg.commands.prepared import Split, load_prepared, prepared_warnings, split_cases
from volseg.commands.preparing import (
    PREPARED_FILE,
    prepare_dataset,
    read_header,
)
from volseg.commands.training_cases import refuse_dataset
from volseg.commands.training_pictures import preview_png, worst_cases_png
from volseg.errors import VolsegError
from volseg.evaluation.validation import ValidationRow, mean_dice, summary
from volseg.execution.cpu import idle_cores, keep_freed_memory, physical_cores
from volseg.execution.threads import Threads
from volseg.execution.time_budget import TimeBudget
from volseg.io.files import TEMPORARY_PREFIX, make_folder
from volseg.io.prepared import PreparedCase
from volseg.options import PreprocessOptions, Progress, TrainOptions, command
from volseg.pages.model_box import POOR_DICE
from volseg.pages.scalars import Scalars
from volseg.recipe import Classify, Recipe, Train, as_recipe, parse_recipe
from volseg.reports import TrainReport
from volseg.sizing import LEAST_STEPS, Budget
from volseg.store.outputs import OutputFolder, delete_written
from volseg.store.tables import table
from volseg.words import duration, format_sizes

if TYPE_CHECKING:  # torch takes seconds to import; only a command that needs it pays
    import torch

    from volseg.bundle import ModelBundle
    from volseg.planning.close import Closed
    from volseg.planning.fingerprint import DatasetFingerprint
    from volseg.training.loop import Trained, Watch
    from volseg.training.objective import Weights
    from volseg.training.ranks import Team
    from volseg.training.run import Job
    from volseg.training.schedule import RunSettings
    from volseg.training.state import Epoch

MAX_FOLDS = 20
HISTORY_ROI, VALIDATION = "history_roi.csv", "validation.csv"
PREVIEW, CURVES, WORST = "preview.png", "curves.png", "validation.png"
PICTURES = (VALIDATION, PREVIEW, CURVES, WORST)
PREPARED_FOLDER = "prepared"  # inside the work folder
WORK_FOLDER = ".training"  # inside a model folder while it is being trained
ROI_FOLDER = "roi"  # inside the work folder: cases and checkpoints of the coarse first pass
# Time reserved for export and pictures: this fraction of the budget up to these seconds, but at
# least `FINISHING_LEAST` seconds for the pictures and each network, within `FINISHING_MOST`.
FINISHING_FRACTION, FINISHING_SECONDS = 0.03, 60.0
FINISHING_LEAST, FINISHING_MOST = 3.0, 0.1
STEPS_FRACTION = 0.7  # of a network's time spent in steps; validation takes the remainder
# More than one case is timed if preparing exceeds this fraction of the budget.
PREPARING_FRACTION = 0.5
# A budget that is too short is refused by then, if the first case can be timed so soon.
ANSWER_SECONDS = 18.0
# Preparing first is suggested if it takes at least this fraction of the time still needed.
PREPARE_FIRST_FRACTION = 0.2
# Once the data are prepared, training starts even if only this fraction of the steps fits.
LATE_FRACTION = 0.5
STARTING_SECONDS = 20.0  # to load Python and its packages from a slow disk, in suggested budgets
FINE_TUNING_STEPS = 20  # that a network initialised from a trained one needs at least
TICK_SECONDS = 5.0  # without a report, after which the next step or tile is reported


@command(TrainOptions)
def train(options: TrainOptions) -> TrainReport:
    """Train a model on a dataset or a prepared folder.

    A time budget covers reading, preparing, planning, first pass, all folds, classifier,
    validation, pictures and export. If it is too short for networks that can learn, there are fewer
    folds, then a smaller network, then an error.

    Raises:
        VolsegError: cases cannot be used (the error lists all of them), the recipe does not fit the
            prepared folder, or the time budget is too short; then the error suggests one, and the
            prepared data are kept.
    """
    started = time.monotonic() - options.spent_seconds
    time_budget = TimeBudget(seconds=options.time_budget_seconds, started=started)
    keep_freed_memory()
    from volseg.inference.choose import choose_device
    from volseg.training.loop import serve
    from volseg.training.ranks import team_of

    if options.fold is not None and (options.folds or 1) > 1:
        problem = "--fold and --folds exclude each other"
        raise VolsegError(problem, fix="give one of them", code="E_USAGE")
    device = choose_device(options.device)
    with team_of(device, options.devices, serve, options.precision) as team:
        if team.rank > 0:  # under torchrun and SLURM every rank calls this function
            serve(team)
            return TrainReport(out=options.out, rank=team.rank)
        with (
            closing(Scalars(options.out / "tensorboard")) as scalars,
            _threads(team, time_budget) as threads,
        ):
            inputs = _input_paths(options.dataset, options.recipe, options.init)
            return _Training(
                options=options,
                time=time_budget,
                steady=_Steady(options.progress),
                team=team,
                scalars=scalars,
                outputs=OutputFolder(options.out, "train", inputs=inputs),
                threads=threads,
            ).run()


def _input_paths(*inputs: Path | str | Recipe | None) -> list[Path]:
    """Return the inputs that are existing files or folders."""
    paths = [Path(value) for value in inputs if isinstance(value, Path | str)]
    return [path for path in paths if path.exists()]


@contextmanager
def _threads(team: Team, time_budget: TimeBudget) -> Iterator[Threads | None]:
    """Yield a search for the fastest number of threads, if results need not be reproducible."""
    import torch

    if time_budget.seconds is None or team.size > 1 or team.fabric.device.type != "cpu":
        yield None
        return
    original = torch.get_num_threads()
    most = min(original, physical_cores())
    try:
        yield Threads(most, torch.set_num_threads, first=min(most, idle_cores()))
    finally:
        torch.set_num_threads(original)


class _Steady:
    """A progress callback whose `tick` reports only after `TICK_SECONDS` without a report."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._last = progress, time.monotonic()

    def show(self, stage: str, done: float, detail: str) -> None:
        self._last = time.monotonic()
        self._progress(stage, done, detail)

    def tick(self, stage: str, done: float, detail: str) -> None:
        if time.monotonic() - self._last >= TICK_SECONDS:
            self.show(stage, done, detail)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """The prepared data of a training.

    Args:
        recipe: in place of the folder's; None for the folder's.
        folds: number of networks to train.
        warnings: about the data.
        forecast: None if this call did not prepare the data or has no time budget.
    """

    folder: Path
    recipe: Recipe | None
    folds: int
    warnings: Sequence[str]
    forecast: Forecast | None = None

    def stated(self) -> Recipe:
        """Return the recipe as stated, which may leave values open."""
        if self.recipe is not None:
            return self.recipe
        return parse_recipe(read_header(self.folder)["recipe"], where=str(self.folder))


@dataclass(frozen=True, slots=True, eq=False)
class _Result:
    """What was trained: weights and metrics of the bundle, and networks by number of split."""

    weights: Mapping[str, Weights]
    metrics: Mapping[str, Any]
    trained: Mapping[int, Trained]
    rows: Sequence[ValidationRow]
    is_interrupted: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Training:
    """A call of `train`, in the process that leads it."""

    options: TrainOptions
    time: TimeBudget
    steady: _Steady
    team: Team
    scalars: Scalars
    outputs: OutputFolder
    threads: Threads | None
    warnings: list[str] = field(default_factory=list)

    @property
    def work(self) -> Path:
        return self.options.out / WORK_FOLDER

    def progress(self, stage: str, done: float, detail: str) -> None:
        self.steady.show(stage, done, detail)

    def run(self) -> TrainReport:
        from volseg.bundle import load_bundle
        from volseg.planning.close import check_budget
        from volseg.training.check import check_recipe

        if self.options.recipe is not None:
            check_recipe(as_recipe(self.options.recipe))  # before any folder is made
        with self.outputs:
            self._open()
            model = None if self.options.init is None else load_bundle(self.options.init)
            data = self._prepare(model)
            self._warn(*data.warnings)
            plan, fingerprint, cases = load_prepared(data.folder, data.recipe)
            if self.options.memory is not None:
                check_budget(plan.recipe, self._budget())
            check_recipe(plan.recipe)
            folds, closed = self._fit(data, plan, fingerprint, cases)
            splits = self._splits(cases, folds)
            if self.options.preview:
                return self._preview(splits[0][0], closed.recipe)
            self._check_folds(len(splits))
            result = self._train(splits, closed.recipe, {} if model is None else model.weights)
            bundle = self._write_model(result, closed, fingerprint)
            self._draw(result, splits, closed.recipe)
            if not result.is_interrupted:
                delete_written(self.work / PREPARED_FOLDER)
                delete_written(self.work, _is_intermediate)
        return TrainReport(
            out=self.options.out,
            done=[closed.recipe.name],
            warnings=self.warnings,
            metrics=dict(bundle.metrics),
            sha256=bundle.sha256,
            interrupted=result.is_interrupted,
        )

    def _open(self) -> None:
        """Check that `out` can take the model, and open the work folder."""
        from volseg.bundle import ROI, bundle_files, segmentation_name

        self._check_unfinished()
        names = (segmentation_name(index) for index in range(MAX_FOLDS))
        histories = [HISTORY_ROI, *(_history_name(number) for number in range(MAX_FOLDS))]
        self.outputs.check_overwrites(
            [*bundle_files([*names, ROI, "classifier"]), *histories, *PICTURES]
        )
        self.outputs.work_folder(WORK_FOLDER)
        if not self.options.resume:
            (self.work / FITTED_FILE).unlink(missing_ok=True)
        self.progress("Starting", 0.0, str(self.options.dataset))

    def _splits(self, cases: Sequence[PreparedCase], folds: int) -> list[Split]:
        seed = self.options.seed
        if folds > 1:
            return [split_cases(cases, number, seed, folds) for number in range(folds)]
        return [split_cases(cases, self.options.fold, seed)]

    def _preview(self, training: Sequence[PreparedCase], recipe: Recipe) -> TrainReport:
        self.outputs.write(PREVIEW, preview_png(training, recipe, self.options.seed))
        return TrainReport(
            out=self.options.out,
            done=[recipe.name],
            warnings=self.warnings,
            preview=str(self.options.out / PREVIEW),
        )

    def _train(
        self, splits: Sequence[Split], recipe: Recipe, initial: Mapping[str, Weights]
    ) -> _Result:
        """Train first pass, networks and classifier."""
        from volseg.bundle import ROI, segmentation_name
        from volseg.training.schedule import Stop

        weights: dict[str, Weights] = {}
        roi_metrics: dict[str, Any] = {}
        earlier = 0.0
        if recipe.roi is not None:  # first: it is quick, and bad data fail here too
            first_pass, earlier = self._first_pass(splits[0], recipe, initial.get(ROI, {}))
            weights[ROI] = first_pass.weights
            roi_metrics = {f"roi_{name}": value for name, value in first_pass.metrics.items()}
        trained, stopped = self._networks(splits, recipe, initial.get("segmentation", {}), earlier)
        rows = []
        for index, (number, network) in enumerate(trained.items()):
            weights[segmentation_name(index)] = network.weights
            rows += [replace(row, fold=number) for row in network.validation]
        metrics = _metrics_of(trained, stopped, summary(rows)) | roi_metrics
        self._warn_of_results(trained, rows)
        if self.warnings:
            metrics["warnings"] = "; ".join(self.warnings)
        metrics["training_cases"] = len(
            {case.id for number in trained for case in splits[number][0]}
        )
        is_interrupted = Stop.INTERRUPTED in stopped.values()
        if recipe.classify is not None and not is_interrupted:
            left = self.time.left(self._finishing(len(splits)))
            try:
                classifier, class_metrics = self._classifier(splits[0], recipe.classify, left)
            except KeyboardInterrupt:
                classifier, class_metrics = None, {"stopped": Stop.INTERRUPTED.value}
                is_interrupted = True
            metrics |= class_metrics
            if classifier is not None:
                weights["classifier"] = classifier
        return _Result(weights, metrics, trained, rows, is_interrupted)

    def _write_model(
        self, result: _Result, closed: Closed, fingerprint: DatasetFingerprint
    ) -> ModelBundle:
        """Write the model with its exported networks; return it as read back."""
        from volseg.bundle import ModelBundle, load_bundle, save_bundle
        from volseg.inference.export import export_bundle

        bundle = ModelBundle(
            recipe=closed.recipe,
            fingerprint=fingerprint,
            weights=result.weights,
            metrics=result.metrics,
            reasons=closed.reasons,
        )
        with self.outputs.staged() as commit:
            save_bundle(bundle, commit.folder)
            if result.rows:
                commit.write(VALIDATION, table(ValidationRow, result.rows))
            commit.finish(last=MODEL_FILE)
        bundle = load_bundle(self.options.out)
        with self.outputs.staged() as commit:
            export_bundle(bundle, commit.folder, before=self._time_for("Exporting"))
            commit.finish()
        return bundle

    def _draw(self, result: _Result, splits: Sequence[Split], recipe: Recipe) -> None:
        """Draw pictures; they come last, so that a failure in them loses no results."""
        from volseg.pages.training_figures import curves_png

        has_time, device = self._time_for("Drawing"), self.team.fabric.device
        if has_time(CURVES):
            curves = [network.history for network in result.trained.values()]
            self.outputs.write(CURVES, curves_png(curves))
        worst = worst_cases_png(
            result.rows, result.trained, splits, recipe, device, before=has_time
        )
        if worst:
            self.outputs.write(WORST, worst)

    def _prepare(self, model: ModelBundle | None) -> _Prepared:
        """Prepare the dataset, or take a prepared folder; `model` provides the initial weights."""
        from volseg.training.check import check_recipe

        if (self.options.dataset / PREPARED_FILE).is_file():
            return self._take_prepared()
        prepared = self.work / PREPARED_FOLDER
        stated = None if self.options.recipe is None else as_recipe(self.options.recipe)
        forecast, progress = self._foresee(stated, prepared), self.progress
        if forecast is not None:
            progress = self._guard(forecast, stated, prepared)
        recipe = (
            cached_recipe(self.options.dataset, self.work, progress) if stated is None else stated
        )
        if model is not None and recipe.leaves_size_open:
            recipe = self._with_size_of(model, recipe)
        check_recipe(recipe)
        folds = 1
        if self.options.fold is None:
            folds = number_of_folds(
                self.options.dataset,
                recipe,
                self.options.folds,
                is_auto=self.options.recipe is None,
            )
        # A resumed run keeps its plan, even if the free memory has changed.
        earlier = earlier_plan(prepared) if self.options.resume else None
        settings = PreprocessOptions(
            self.options.dataset,
            recipe=recipe,
            out=prepared,
            seed=self.options.seed,
            progress=progress,
        )
        report = prepare_dataset(settings, earlier=earlier, budget=self._budget(), refuse=True)
        if report.failed:
            refuse_dataset(self.options.dataset, report.failed)
        return _Prepared(prepared, recipe, folds, report.warnings, forecast)

    def _take_prepared(self) -> _Prepared:
        options = self.options
        recipe = None if options.recipe is None else as_recipe(options.recipe)
        is_auto = recipe is None and bool(read_header(options.dataset).get("is_auto"))
        folds = options.folds or (N_FOLDS if is_auto and options.fold is None else 1)
        return _Prepared(options.dataset, recipe, folds, prepared_warnings(options.dataset))

    def _with_size_of(self, model: ModelBundle, recipe: Recipe) -> Recipe:
        """Return an open recipe with network and patches of the model to start from."""
        if model.recipe.preprocess.axes != "canonical":
            raise VolsegError(
                f"{self.options.init}: its network takes scans in the axis order of files",
                fix="give a --recipe with its [network], strides and kernels along R, A, S, "
                "and your own [preprocess]",
                code="E_CKPT",
            )
        patches = model.recipe.train.model_dump(include={"patch_shape", "batch_size"})
        train = recipe.train.model_copy(update=patches)
        return recipe.model_copy(update={"network": model.recipe.network, "train": train})

    def _budget(self) -> Budget:
        """Return the memory budget; time is budgeted once the speed of a step is known."""
        half = self.team.precision != "32-true"
        return budget_of(
            self.options.device, self.options.memory, processes=self.team.size, half=half
        )

    def _foresee(self, recipe: Recipe | None, prepared: Path) -> Forecast | None:
        """Forecast the time needed from the first case.

        Returns:
            None without a time budget, or for a resumed run.

        Raises:
            VolsegError: the time budget is too short.
        """
        if self.time.seconds is None or self.options.preview or read_fitted(self.work) is not None:
            return None
        forecast = make_forecast(
            Source(
                dataset=self.options.dataset,
                recipe=recipe,
                prepared=prepared,
                budget=replace(self._budget(), is_least=True),
                seed=self.options.seed,
            ),
            self.team,
            enough=PREPARING_FRACTION * self.time.seconds,
            threads=self.threads,
            until=self.time.started + ANSWER_SECONDS,
            progress=self.progress,
        )
        if forecast is not None:
            least = self._least_seconds(forecast.step, recipe)
            if self.time.spent() + forecast.preparing + least > self.time.seconds:
                self._refuse(forecast.preparing, forecast, recipe, prepared)
        return forecast

    def _guard(self, forecast: Forecast, recipe: Recipe | None, prepared: Path) -> Progress:
        least = LATE_FRACTION * self._least_seconds(forecast.step, recipe)
        return Guard(
            self.progress,
            forecast,
            self.time.ends,
            least,
            lambda ahead: self._refuse(ahead, forecast, recipe, prepared),
        ).show

    def _finishing(self, networks: int) -> float:
        """Return the seconds of the time budget reserved for export and pictures."""
        seconds = self.time.seconds or 0.0
        usual = min(FINISHING_FRACTION * seconds, FINISHING_SECONDS)
        return max(usual, min(FINISHING_LEAST * (1 + networks), FINISHING_MOST * seconds))

    @property
    def _least_steps(self) -> int:
        """Steps that each network needs: fewer for fine-tuning or with few epochs."""
        least = LEAST_STEPS if self.options.init is None else FINE_TUNING_STEPS
        return (
            least if self.options.epochs is None else min(least, self.options.epochs)
        )  # an epoch has ≥ 1 step

    def _least_seconds(self, step: float, recipe: Recipe | None) -> float:
        """Return the seconds from the first step to the end without which no network can learn."""
        networks = self.options.folds or 1
        steps = networks * self._least_steps * step
        return self._finishing(networks) + steps / _steps_fraction(recipe)

    def _refuse(
        self, ahead: float, forecast: Forecast, recipe: Recipe | None, prepared: Path
    ) -> NoReturn:
        """Raise an error: the time is too short for `ahead` seconds of preparing plus training."""
        assert self.time.seconds is not None
        least, steps = self._least_seconds(forecast.step, recipe), self._least_steps
        remedy = ""
        if ahead >= PREPARE_FIRST_FRACTION * (ahead + least):
            is_path = isinstance(self.options.recipe, str | Path)
            option = f" --recipe {shlex.quote(str(self.options.recipe))}" if is_path else ""
            absolute = self.options.out.resolve()  # as `.` and `..` have no name
            folder = absolute.parent / f"{absolute.name or 'model'}_prepared"
            source, apart, out = (
                shlex.quote(str(p)) for p in (self.options.dataset, folder, self.options.out)
            )
            shorter = suggested(STARTING_SECONDS + least)
            remedy = (
                f"; or prepare the data first: volseg preprocess {source}{option} --out {apart}, "
                f"and then volseg train {apart} --out {out} --time-budget {shorter}"
            )
        is_smallest = recipe is None or recipe.leaves_size_open
        network = "the smallest network that can learn" if is_smallest else "the recipe's network"
        refuse_time(
            self.time.seconds,
            self.time.spent() + ahead + least,
            f"reading and preparing {forecast.n_cases} cases takes about {duration(ahead)} more, "
            f"and {steps} steps of {network} with validation take about {duration(least)}",
            remedy=remedy,
            kept=f"; {self._kept(prepared)}",
        )

    def _fit(
        self,
        data: _Prepared,
        plan: Closed,
        fingerprint: DatasetFingerprint,
        cases: Sequence[PreparedCase],
    ) -> tuple[int, Closed]:
        """Return how many networks fit the time, and their plan.

        Raises:
            VolsegError: the time is too short for one network to learn.
        """
        from volseg.planning.close import fill

        fitted, folds = read_fitted(self.work), data.folds
        if fitted is not None:  # a resumed run
            return self.options.folds or fitted.folds, fill(data.stated(), fitted.plan)
        if self.options.folds is None and folds > 1:
            folds = min(folds, len({case.record["patient"] for case in cases}))
        if self.time.seconds is None or self.options.preview:
            return folds, plan
        fit = self._fit_time(data, folds, plan, fingerprint, cases)
        write_fitted(self.work, Fitted(fit.folds, fit.plan))
        return fit.folds, fit.plan

    def _fit_time(
        self,
        data: _Prepared,
        folds: int,
        plan: Closed,
        fingerprint: DatasetFingerprint,
        cases: Sequence[PreparedCase],
    ) -> Fit:
        """Fit number and size of the networks to the time left."""
        from volseg.planning.close import close

        stated = data.stated()
        seconds = (self.time.left(self._finishing(folds)) or 0.0) * _steps_fraction(stated)
        self.progress("Planning", 0.0, f"{duration(self.time.left() or 0.0)} left")
        least = None
        if stated.leaves_size_open:
            least = close(stated, fingerprint, replace(self._budget(), is_least=True))
            speed = None if data.forecast is None else data.forecast.flops
            speed = speed or _operations(least) / self._time_step(cases, least)
            plan = best_plan(
                lambda n: close(stated, fingerprint, replace(self._budget(), flops=n)),
                least,
                speed * seconds,
                folds,
                lambda candidate, n: n / _operations(candidate),
            )
        is_late = data.forecast is not None and self.time.spent() > ANSWER_SECONDS
        networks = Folds(
            n=folds,
            may_drop=self.options.folds is None,
            least_steps=self._least_steps,
            enough=LATE_FRACTION if is_late else 1.0,
        )
        try:
            fit = fit_to_time(
                plan,
                seconds,
                networks,
                time_step=partial(self._time_step, cases),
                smaller=None if least is None else lambda: least,
            )
        except TooShortError as error:
            needed = error.needed / _steps_fraction(stated) + self._finishing(folds)
            self._refuse_training(needed, data.folder)
        self._announce(fit, seconds)
        return fit

    def _time_step(self, cases: Sequence[PreparedCase], candidate: Closed) -> float:
        from volseg.training.segmentation import SegmentationObjective
        from volseg.training.speed import seconds_per_step

        return seconds_per_step(
            SegmentationObjective(cases, (), candidate.recipe),
            self.team,
            seed=self.options.seed,
            threads=self.threads,
            tick=lambda doing: self.steady.tick("Planning", 0.5, doing),
        )

    def _refuse_training(self, needed: float, prepared: Path) -> NoReturn:
        """Raise an error: the time left is too short for the training itself."""
        assert self.time.seconds is not None
        is_internal = prepared != self.options.dataset  # prepared by `train`, in its work folder
        stated = self.options.folds or 1
        refuse_time(
            self.time.seconds,
            needed + STARTING_SECONDS,
            f"{self._least_steps} steps for each network with validation take about "
            f"{duration(needed)}",
            remedy=f", or --folds 1 instead of {stated}" if stated > 1 else "",
            kept=f"; {self._kept(prepared)}" if is_internal else "",
        )

    def _announce(self, fit: Fit, seconds: float) -> None:
        for reason in fit.reasons:
            self.options.announce(f"time budget: {reason}")
        steps = seconds / fit.folds / fit.seconds_per_step
        patch = format_sizes(fit.plan.recipe.patch_shape)
        networks = "1 network" if fit.folds == 1 else f"{fit.folds} networks"
        self.options.announce(
            f"training {networks} with patches of {patch} voxels, about {steps:.0f} steps each"
        )

    def _kept(self, prepared: Path) -> str:
        return f"the prepared data are kept in {prepared} for the next call with this --out"

    def _warn(self, *warnings: str) -> None:
        for warning in warnings:
            self.warnings.append(warning)
            self.options.announce(f"warning: {warning}")

    def _warn_of_results(
        self, trained: Mapping[int, Trained], rows: Sequence[ValidationRow]
    ) -> None:
        networks, needed = trained.values(), self._least_steps
        steps = min(int(network.metrics["steps"]) for network in networks)
        if self.time.seconds is not None and steps < needed:
            self._warn(
                f"W_FEW_STEPS: a network was trained for only {steps} steps and needs at least "
                f"{needed}: give a longer --time-budget"
            )
        missed = sum(int(network.metrics.get("not_validated", 0)) for network in networks)
        if missed:
            self._warn(f"W_NOT_VALIDATED: the time budget was too short to validate {missed} cases")
        if rows and (score := mean_dice(rows)) < POOR_DICE:
            self._warn(
                f"W_DICE: the mean validation Dice is {score:.3f}: train longer, or on more cases"
            )

    def _time_for(self, stage: str) -> Callable[[str], bool]:
        """Return a callback that reports the next item, and returns False without time for it."""
        began: list[float] = []

        def has_time(name: str) -> bool:
            now = time.monotonic()
            durations = [later - earlier for earlier, later in pairwise([*began, now])]
            if now + max(durations, default=0.0) > self.time.ends:
                self.options.announce(f"time budget: no time was left for {name}")
                return False
            began.append(now)
            self.progress(stage, 1 - 1 / len(began), name)
            return True

        return has_time

    def _first_pass(
        self, split: Split, recipe: Recipe, initial: Mapping[str, torch.Tensor]
    ) -> tuple[Trained, float]:
        """Train the first pass; also return its seconds of training in a resumed earlier call."""
        from volseg.training.roi import train_roi
        from volseg.training.schedule import Stop

        assert recipe.roi is not None
        left, began, stage = self.time.left(), time.monotonic(), "Training the first pass"
        seconds = None if left is None else left * recipe.roi.time_fraction
        settings = self._settings(recipe.roi.train, seconds, freeze=())
        job = self._job(split, recipe, settings, self.work / ROI_FOLDER, initial)
        first_pass = train_roi(job, self.team, self._watch(stage, HISTORY_ROI))
        if first_pass.stop is Stop.INTERRUPTED:
            raise KeyboardInterrupt
        return first_pass, _earlier(first_pass, began)

    def _networks(
        self,
        splits: Sequence[Split],
        recipe: Recipe,
        initial: Mapping[str, torch.Tensor],
        earlier: float,
    ) -> tuple[dict[int, Trained], dict[int, str]]:
        """Train on each split; also return why trainings ended early, by the number of the split.

        A training that fails does not lose those that are done.

        Args:
            earlier: seconds of training spent in an earlier call that this one resumes.
        """
        from volseg.training.loop import DIVERGED, DIVERGED_FIX, train_network
        from volseg.training.schedule import Stop

        reserved, n = self._finishing(len(splits)), len(splits)
        if recipe.classify is not None:
            reserved += (self.time.left() or 0.0) * recipe.classify.time_fraction
        trained: dict[int, Trained] = {}
        stopped: dict[int, str] = {}
        for number, split in enumerate(splits):
            left, began = self.time.left(reserved + earlier), time.monotonic()
            waiting = self._affordable(n - number, left, trained)
            if waiting == 0:
                stopped[number] = "no time was left"
                self.options.announce(f"time budget: no time was left for fold {number + 1} of {n}")
                break
            make_folder(folder := _fold_folder(self.work, number, n))
            settings = self._settings(recipe.train, None if left is None else left / waiting)
            job = self._job(split, recipe, settings, folder, initial)
            stage = f"Training fold {number + 1} of {n}" if n > 1 else "Training"
            detail = f"{len(split[0])} training and {len(split[1])} validation cases"
            try:
                self.progress(stage, 0.0, detail)
                network = train_network(job, self.team, self._watch(stage, _history_name(number)))
            except KeyboardInterrupt:
                if not trained:
                    raise
                stopped[number] = Stop.INTERRUPTED.value
                break
            except VolsegError as error:
                if error.code != DIVERGED or n == 1:
                    raise
                stopped[number] = error.problem
                continue
            if network.stopped:
                stopped[number] = network.stopped
            is_interrupted = network.stop is Stop.INTERRUPTED
            # Among others, a half-trained network would get a full vote in the ensemble.
            if not (is_interrupted and trained):
                trained[number] = network
                earlier += _earlier(network, began)
            if is_interrupted:
                break
        if not trained:
            raise VolsegError(
                f"no network could be trained: {next(iter(stopped.values()))}",
                fix=DIVERGED_FIX,
                code=DIVERGED,
            )
        return trained, stopped

    def _classifier(
        self, split: Split, settings: Classify, seconds: float | None
    ) -> tuple[Mapping[str, torch.Tensor] | None, dict[str, Any]]:
        """Train the classifier; return None and the reason if a class has no training case."""
        from volseg.training.classify import has_class, train_classifier

        present = {case.record["class"] for case in split[0] if has_class(case)}
        missing = [name for name in settings.classes if name not in present]
        if missing:
            reason = f"not trained: no training case of class {', '.join(missing)}"
            return None, {"classifier": reason}
        stage = "Training the classifier"
        return train_classifier(
            split,
            settings,
            device=self.team.fabric.device,
            seed=self.options.seed,
            seconds=seconds,
            report=lambda epoch, done: self.progress(stage, done, f"epoch {epoch}"),
        )

    def _settings(
        self, train: Train, seconds: float | None, freeze: tuple[str, ...] | None = None
    ) -> RunSettings:
        from volseg.training.schedule import RunSettings

        return RunSettings(
            seed=self.options.seed,
            epochs=self.options.epochs or (train.epochs if seconds is None else None),
            patience=self.options.patience or train.patience,
            seconds=seconds,
            freeze=self.options.freeze if freeze is None else freeze,
        )

    def _report(self, stage: str, name: str, history: Sequence[Epoch], done: float) -> None:
        from volseg.training.state import Epoch

        self.outputs.write(name, table(Epoch, history))
        epoch = history[-1]
        values = {key: value for key, value in asdict(epoch).items() if value is not None}
        self.scalars.add(name.removesuffix(".csv"), epoch.step, values)
        scores = [line.validation_dice for line in history if line.validation_dice is not None]
        dice = f"validation Dice {scores[-1]:.3f}, " if scores else ""
        self.progress(
            stage,
            done,
            f"epoch {epoch.epoch}, loss {epoch.loss:.3f}, {dice}"
            f"{epoch.steps_per_second:.3g} steps/s, waiting {epoch.waiting_share:.0%}",
        )

    def _watch(self, stage: str, history: str) -> Watch:
        from volseg.training.loop import Watch

        return Watch(
            report=partial(self._report, stage, history),
            tick=lambda doing, done: self.steady.tick(stage, done, doing),
            threads=self.threads,
        )

    def _job(
        self,
        split: Split,
        recipe: Recipe,
        settings: RunSettings,
        folder: Path,
        initial: Mapping[str, torch.Tensor],
    ) -> Job:
        from volseg.training.run import Job
        from volseg.training.segmentation import SegmentationObjective

        return Job(
            objective=SegmentationObjective(*split, recipe),
            settings=settings,
            checkpoints=folder,
            initial=initial,
            resume=self.options.resume,
        )

    def _affordable(self, waiting: int, left: float | None, trained: Mapping[int, Trained]) -> int:
        """Return how many waiting networks get enough steps at the pace of the trained ones."""
        if left is None or not trained:
            return waiting
        pace = min(
            int(network.metrics["steps"]) / max(1e-3, float(network.metrics["training_seconds"]))
            for network in trained.values()
        )
        n = math.floor(left * STEPS_FRACTION * pace / (LATE_FRACTION * self._least_steps))
        return min(waiting, n)

    def _check_folds(self, n: int) -> None:
        """Check that the run to resume was started with the same number of networks."""
        folders = {_fold_folder(self.work, number, n) for number in range(n)}
        folders.add(self.work / ROI_FOLDER)
        if any(path.parent not in folders for path in self.work.glob("**/last.safetensors")):
            raise VolsegError(
                f"{self.options.out}: holds a run with another number of folds",
                fix="resume with the same --folds, or delete the folder",
                code="E_EXISTS",
            )

    def _check_unfinished(self) -> None:
        """Check that `out` holds no finished model, and no interrupted run unless it is resumed."""
        unfinished = any(path.is_file() for path in self.work.glob("**/last.safetensors"))
        if unfinished and not self.options.resume:
            raise VolsegError(
                f"{self.options.out}: holds an interrupted training run",
                fix="add --resume to continue, or give another --out to start over",
                code="E_EXISTS",
            )
        if (self.options.out / "model.json").exists() and not unfinished:
            raise VolsegError(
                f"{self.options.out}: holds a finished model",
                fix="give another --out, or delete it first",
                code="E_EXISTS",
            )


def _steps_fraction(recipe: Recipe | None) -> float:
    """Return the fraction of the training time spent in steps of the fine networks."""
    if recipe is None:
        return STEPS_FRACTION
    others = [part.time_fraction for part in (recipe.roi, recipe.classify) if part is not None]
    return STEPS_FRACTION * (1 - sum(others))


def _operations(candidate: Closed) -> float:
    """Return the floating-point operations of a training step."""
    from volseg.planning.close import size_of

    recipe, size = candidate.recipe, size_of(candidate.recipe)
    assert size is not None, "a network chosen by the plan has a size"
    flops = size.step_flops(len(recipe.data.channels), recipe.data.n_outputs)
    return flops * recipe.train.accumulate


def _is_intermediate(name: str) -> bool:
    """Tell whether a file in the work folder serves only to resume, or is a temporary of one."""
    names = ("last.safetensors", "best.safetensors", FITTED_FILE, RECIPE_FILE)
    resumed = "|".join(map(re.escape, names))
    temporary = rf"{re.escape(TEMPORARY_PREFIX)}[0-9a-f]{{16}}"
    coarse = rf"{ROI_FOLDER}/cases/[^/]+/(case\.json|(image|mask|foreground_\d+)\.npy)"
    return re.fullmatch(rf"([^/]+/)?({resumed}|{temporary})|{coarse}", name) is not None


def _history_name(number: int) -> str:
    return f"history{'' if number == 0 else f'_{number}'}.csv"


def _fold_folder(work: Path, number: int, n: int) -> Path:
    """Return the folder for the checkpoints of one of `n` networks."""
    return work if n == 1 else work / f"fold_{number}"


def _earlier(trained: Trained, began: float) -> float:
    """Return the seconds of a training before this call, which began it at that time."""
    return max(0.0, trained.metrics["training_seconds"] - (time.monotonic() - began))


def _metrics_of(
    trained: Mapping[int, Trained], stopped: Mapping[int, str], validated: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the metrics of one network, or the cross-validation metrics of several.

    In cross-validation each case is predicted by the network that was not trained on it.
    """
    first = next(iter(trained.values())).metrics
    if len(trained) == 1 and not stopped.keys() - trained.keys():
        return dict(first)
    steps = sum(network.metrics["steps"] for network in trained.values())
    metrics: dict[str, Any] = {"networks": len(trained), "steps": steps}
    if "began_at_random" in first:
        metrics["began_at_random"] = first["began_at_random"]
    metrics |= validated
    if stopped:
        reasons = [f"fold {number}: {reason}" for number, reason in stopped.items()]
        metrics["stopped"] = "; ".join(reasons)
    return metrics

"""`volseg train`: a dataset or a prepared folder → a model folder."""

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

from volseg.errors import VolsegError
from volseg.evaluate.validation import ValidationRow, mean_dice, summary
from volseg.execute.cpu import idle_cores, keep_freed_memory, physical_cores
from volseg.execute.threads import Threads
from volseg.execute.time_budget import TimeBudget
from volseg.io.files import TEMPORARY_PREFIX, make_folder
from volseg.io.prepared import PreparedCase
from volseg.postprocess.steps import make_steps
from volseg.recipe import Recipe, Train, parse_recipe
from volseg.report.model_box import POOR_DICE
from volseg.report.scalars import Scalars
from volseg.sizing import LEAST_STEPS, Budget
from volseg.store.outputs import OutputFolder, delete_written
from volseg.store.tables import table
from volseg.words import duration
from volseg.workflows.batch import Progress, RunReport, silent
from volseg.workflows.earlier import (
    FITTED_FILE,
    RECIPE_FILE,
    Fitted,
    earlier_plan,
    read_fitted,
    recipe_once,
    write_fitted,
)
from volseg.workflows.fitting import TooShortError, best_plan, fit_to_time, refuse_time, suggested
from volseg.workflows.forecast import Forecast, Guard, forecast_of
from volseg.workflows.importing import MODEL_FILE
from volseg.workflows.planning import N_FOLDS, budget_of, folds_of, read_plan
from volseg.workflows.prepared import Split, load_prepared, prepared_warnings, split_cases
from volseg.workflows.preparing import (
    PREPARED_FILE,
    as_recipe,
    preprocess,
    read_header,
    refuse_dataset,
)
from volseg.workflows.training_pictures import preview_png, worst_cases_png

if TYPE_CHECKING:  # torch takes seconds to import; only a workflow that needs it pays
    import torch

    from volseg.bundle import ModelBundle
    from volseg.plan import DatasetFingerprint, Plan
    from volseg.train.loop import Epoch, RunSettings, Tick, Trained
    from volseg.train.ranks import Team

MAX_FOLDS = 20
HISTORY_ROI, VALIDATION = "history_roi.csv", "validation.csv"
PREVIEW, CURVES, WORST = "preview.png", "curves.png", "validation.png"
PICTURES = (VALIDATION, PREVIEW, CURVES, WORST)
PREPARED_FOLDER = "prepared"  # inside the work folder
WORK_FOLDER = ".training"  # inside a model folder while it is being trained
FINISHING_SHARE, FINISHING_SECONDS = (
    0.03,
    60.0,
)  # of a time budget that pictures and the export are left, at most
FINISHING_LEAST, FINISHING_MOST = (
    3.0,
    0.1,
)  # seconds for pictures and for each network; share of a short time budget
STEPS_SHARE = 0.7  # of the time of a network that goes into steps; the rest is for validation
PREPARING_SHARE = 0.5  # of a time budget in which the data are prepared without a second look at how long that takes
ANSWER_SECONDS = 18.0  # by which a time budget that is too short is refused, if the first case can be timed by then
APART_SHARE = 0.2  # of what is ahead that preparing takes, from which to prepare first is a remedy
LATE_SHARE = 0.5  # of the steps that a network needs, with which training still begins once the data are prepared
STARTING_SECONDS = (
    20.0  # that Python and its packages take to load on a slow disk, in a time that is suggested
)
FINE_TUNING_STEPS = 20  # that a network needs at least which starts from a trained one
TICK_SECONDS = 5.0  # without a word, after which the next step or tile is reported
ROI_FOLDER = "roi"  # inside that one: cases and checkpoints of the coarse first pass


def train(
    dataset: Path | str,
    *,
    out: Path | str,
    recipe: Path | str | Recipe | None = None,
    plan: Path | str | None = None,
    time_budget_seconds: float | None = None,
    spent_seconds: float = 0.0,
    memory: int | str | None = None,
    epochs: int | None = None,
    patience: int | None = None,
    resume: bool = False,
    init: Path | str | None = None,
    freeze: Sequence[str] = (),
    fold: int | None = None,
    folds: int | None = None,
    devices: int = 1,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    preview: bool = False,
    progress: Progress = silent,
    announce: Callable[[str], None] = lambda text: None,
) -> RunReport:
    """A dataset or a prepared folder → a model folder.

    Args:
        recipe: None leaves everything to the plan and cross-validates; a prepared folder brings its own, whose training settings another one
            may replace.
        plan: a JSON file of `volseg plan`, edited or not, in place of the one that follows from the dataset.
        time_budget_seconds: of the whole call: reading, preparing, planning, first pass, every fold, classifier, validation, pictures, export.
            Where it does not hold a network that can learn, there are fewer folds, then a smaller network; then it is refused.
        spent_seconds: of the time budget before this call, such as starting Python.
        memory: bytes that training may take, or text such as `8G`, where the plan chooses the size of the network and of its patches.
        epochs, patience: in place of the recipe's, and of those of its first pass; with a time budget the recipe's number of epochs does not count.
        resume: go on from the last epoch of an interrupted run in `out`.
        init: a model folder whose weights to start from, where their names and shapes agree.
        freeze: patterns of the names of layers that stay as they are.
        fold: 0 to 4: validate on this fifth of the patients and train on the others, whatever the dataset's train and val.
        folds: train so many networks, each validated on its own share of the patients; the model is their ensemble.
        devices: processes that share each batch, with a device each; under torchrun or SLURM their number of ranks counts.
        precision: fp32; half, for convolutions in two bytes; or auto, which is half where the device is faster so.
        preview: only prepare the data and write `preview.png`, augmented patches with their masks.
        announce: told before the first step what is odd about the data, what the time budget changes, and what it left no time for.

    Raises:
        VolsegError: a case cannot be used (all of them are named), the recipe does not fit the prepared folder, or the time budget is too short;
            then it says what would do, and what was prepared is kept.
    """
    time_budget = TimeBudget(seconds=time_budget_seconds, started=time.monotonic() - spent_seconds)
    keep_freed_memory()
    from volseg.infer.backends import choose_device
    from volseg.train.loop import serve
    from volseg.train.ranks import team_of

    if fold is not None and (folds or 1) > 1:
        raise VolsegError(
            "--fold and --folds exclude each other", fix="give one of them", code="E_USAGE"
        )
    with team_of(choose_device(device), devices, serve, precision) as team:
        if team.rank > 0:  # under torchrun or SLURM every rank is a call of its own
            serve(team)
            return RunReport(out=Path(out), details={"rank": team.rank})
        with (
            closing(Scalars(Path(out) / "tensorboard")) as scalars,
            _threads(team, time_budget) as threads,
        ):
            return _Training(
                dataset=Path(dataset),
                out=Path(out),
                recipe=recipe,
                plan=plan,
                time=time_budget,
                memory=memory,
                epochs=epochs,
                patience=patience,
                resume=resume,
                init=None if init is None else Path(init),
                freeze=tuple(freeze),
                fold=fold,
                folds=folds,
                seed=seed,
                device=device,
                preview=preview,
                steady=_Steady(progress),
                announce=announce,
                team=team,
                scalars=scalars,
                outputs=OutputFolder(
                    Path(out), "train", inputs=_input_paths(dataset, recipe, plan, init)
                ),
                threads=threads,
            ).run()


def _input_paths(*inputs: Path | str | Recipe | None) -> list[Path]:
    """Those inputs of a training that are files or folders."""
    paths = [Path(value) for value in inputs if isinstance(value, Path | str)]
    return [path for path in paths if path.exists()]


@contextmanager
def _threads(team: Team, time_budget: TimeBudget) -> Iterator[Threads | None]:
    """Looks for the fastest number of threads, where no result has to be the same bit for bit; undone in the end."""
    import torch

    if time_budget.seconds is None or team.size > 1 or team.fabric.device.type != "cpu":
        yield None
        return
    before = torch.get_num_threads()
    most = min(before, physical_cores())
    try:
        yield Threads(most, torch.set_num_threads, first=min(most, idle_cores()))
    finally:
        torch.set_num_threads(before)


class _Steady:
    """A progress callback that can also be told of small things, and passes them on where little was heard of late."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._last = progress, time.monotonic()

    def show(self, stage: str, share: float, detail: str) -> None:
        self._last = time.monotonic()
        self._progress(stage, share, detail)

    def tick(self, stage: str, share: float, detail: str) -> None:
        if time.monotonic() - self._last >= TICK_SECONDS:
            self.show(stage, share, detail)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What is trained on.

    Args:
        recipe, plan: where they are not the folder's own.
        folds: networks that are to be trained.
        warnings: what is odd about the data.
        forecast: None where this call did not prepare the data, or has no time budget.
    """

    folder: Path
    recipe: Recipe | None
    plan: Plan | None
    folds: int
    warnings: Sequence[str]
    forecast: Forecast | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Training:
    """One call of `train`, in the process that leads it."""

    dataset: Path
    out: Path
    recipe: Path | str | Recipe | None
    plan: Path | str | None
    time: TimeBudget
    memory: int | str | None
    epochs: int | None
    patience: int | None
    resume: bool
    init: Path | None
    freeze: tuple[str, ...]
    fold: int | None
    folds: int | None
    seed: int
    device: str
    preview: bool
    steady: _Steady
    announce: Callable[[str], None]
    team: Team
    scalars: Scalars
    outputs: OutputFolder
    threads: Threads | None
    warnings: list[str] = field(default_factory=list)

    @property
    def work(self) -> Path:
        return self.out / WORK_FOLDER

    def progress(self, stage: str, share: float, detail: str) -> None:
        self.steady.show(stage, share, detail)

    def run(self) -> RunReport:
        from volseg.bundle import (
            ROI,
            ModelBundle,
            bundle_files,
            load_bundle,
            save_bundle,
            segmentation_name,
        )
        from volseg.infer.backends import export_bundle
        from volseg.models import check_networks
        from volseg.plan import check_budget
        from volseg.train.loop import INTERRUPTED

        if self.recipe is not None:
            as_recipe(self.recipe)  # a misspelt name leaves no folder
        if self.plan is not None:
            read_plan(self.plan)
        with self.outputs:
            self._check_unfinished()
            names = (segmentation_name(index) for index in range(MAX_FOLDS))
            histories = [HISTORY_ROI, *(_history_name(number) for number in range(MAX_FOLDS))]
            self.outputs.refuse_foreign(
                [*bundle_files([*names, ROI, "classifier"]), *histories, *PICTURES]
            )
            self.outputs.work_folder(WORK_FOLDER)
            if not self.resume:
                (self.work / FITTED_FILE).unlink(missing_ok=True)
            self.progress("Starting", 0.0, str(self.dataset))
            model = None if self.init is None else load_bundle(self.init)
            data = self._prepare(model)
            self._warn(*data.warnings)
            chosen, used, fingerprint, cases = load_prepared(data.folder, data.recipe, data.plan)
            if self.memory is not None:
                check_budget(used, chosen, self._budget())
            make_steps(chosen.postprocess)
            check_networks(chosen)
            folds, plan = self._fit(data, chosen, used, fingerprint, cases)
            if plan is not None:
                chosen, used, fingerprint, cases = load_prepared(data.folder, data.recipe, plan)
            splits = (
                [split_cases(cases, number, self.seed, folds) for number in range(folds)]
                if folds > 1
                else []
            )
            splits = splits or [split_cases(cases, self.fold, self.seed)]
            if self.preview:
                self.outputs.write(PREVIEW, preview_png(splits[0][0], chosen, used, self.seed))
                details = {"preview": str(self.out / PREVIEW), "warnings": self.warnings}
                return RunReport(out=self.out, done=[chosen.name], details=details)
            self._check_folds(len(splits))
            initial = {} if model is None else model.weights
            weights: dict[str, Mapping[str, Any]] = {}
            metrics: dict[str, Any] = {}
            earlier = 0.0
            if (
                chosen.roi is not None
            ):  # first: it is soon done, and what is wrong with the data shows here as well
                first_pass, earlier = self._first_pass(
                    splits[0], chosen, used, initial.get(ROI, {})
                )
                weights[ROI] = first_pass.weights
                metrics = {f"roi_{name}": value for name, value in first_pass.metrics.items()}
            trained, stopped = self._networks(
                splits, chosen, used, initial.get("segmentation", {}), earlier
            )
            for index, found in enumerate(trained.values()):
                weights[segmentation_name(index)] = found.weights
            rows = [
                replace(row, fold=number)
                for number, found in trained.items()
                for row in found.validation
            ]
            metrics = _metrics_of(trained, stopped, summary(rows)) | metrics
            self._judge(trained, rows)
            if self.warnings:
                metrics["warnings"] = "; ".join(self.warnings)
            metrics["training_cases"] = len(
                {case.id for number in trained for case in splits[number][0]}
            )
            interrupted = INTERRUPTED in stopped.values()
            if chosen.classify is not None and not interrupted:
                left = self.time.left(self._finishing(len(splits)))
                try:
                    classifier, found_metrics = _train_classifier(
                        *splits[0], chosen, self.team.fabric.device, self.seed, left, self.progress
                    )
                except KeyboardInterrupt:
                    classifier, found_metrics = None, {"stopped": INTERRUPTED}
                    interrupted = True
                metrics |= found_metrics
                if classifier is not None:
                    weights["classifier"] = classifier
            made = ModelBundle(
                recipe=chosen, plan=used, fingerprint=fingerprint, weights=weights, metrics=metrics
            )
            with self.outputs.staged() as commit:
                save_bundle(made, commit.folder)
                if rows:
                    commit.write(VALIDATION, table(ValidationRow, rows))
                commit.finish(last=MODEL_FILE)
            bundle = load_bundle(self.out)
            with self.outputs.staged() as commit:
                export_bundle(bundle, commit.folder, before=self._time_for("Exporting"))
                commit.finish()
            from volseg.report.training_figures import curves_png

            # Pictures come last: nothing that was computed is to be lost over them.
            has_time = self._time_for("Drawing")
            if has_time(CURVES):
                self.outputs.write(
                    CURVES, curves_png([network.history for network in trained.values()])
                )
            device = self.team.fabric.device
            if worst := worst_cases_png(
                rows, trained, splits, chosen, used, device, before=has_time
            ):
                self.outputs.write(WORST, worst)
            if not interrupted:
                delete_written(self.work / PREPARED_FOLDER)
                delete_written(self.work, _is_intermediate)
        details = {
            "metrics": dict(bundle.metrics),
            "sha256": bundle.sha256,
            "interrupted": interrupted,
        }
        return RunReport(
            out=self.out, done=[chosen.name], details=details | {"warnings": self.warnings}
        )

    def _prepare(self, model: ModelBundle | None) -> _Prepared:
        """What is trained on; `model` is the one whose weights to start from."""
        from volseg.models import check_networks

        plan = None if self.plan is None else read_plan(self.plan)
        if (self.dataset / PREPARED_FILE).is_file():
            recipe = None if self.recipe is None else as_recipe(self.recipe)
            is_auto = (
                recipe is None and plan is None and bool(read_header(self.dataset).get("is_auto"))
            )
            folds = N_FOLDS if is_auto and self.fold is None else 1
            return _Prepared(
                self.dataset, recipe, plan, self.folds or folds, prepared_warnings(self.dataset)
            )
        prepared = self.work / PREPARED_FOLDER
        stated = None if self.recipe is None else as_recipe(self.recipe)
        forecast, progress = self._foresee(stated, plan, prepared), self.progress
        if forecast is not None:
            progress = self._guard(forecast, stated, prepared)
        recipe = recipe_once(self.dataset, self.work, progress) if stated is None else stated
        if (
            model is not None and recipe.is_open and plan is None
        ):  # the network and patches of the model to start from
            if model.recipe.preprocess.axes != "canonical":
                raise VolsegError(
                    f"{self.init}: its network was made for scans in the axis order of their files",
                    fix="give a --recipe with its [network], strides and kernels along R, A, S, and [preprocess] as you want it",
                    code="E_CKPT",
                )
            train = recipe.train.model_copy(
                update={"patch_shape": model.plan.patch_shape, "batch_size": model.plan.batch_size}
            )
            recipe = recipe.model_copy(update={"network": model.recipe.network, "train": train})
        make_steps(
            recipe.postprocess
        )  # a misspelt step should not be found out after an hour of preparation
        if not recipe.is_open:
            check_networks(recipe)
        folds = (
            1
            if self.fold is not None
            else folds_of(self.dataset, recipe, self.folds, is_auto=self.recipe is None)
        )
        if (
            self.resume and plan is None
        ):  # what was begun with is what is gone on with, whatever memory is there today
            plan = earlier_plan(prepared)
        report = preprocess(
            self.dataset,
            recipe=recipe,
            out=prepared,
            seed=self.seed,
            plan=plan,
            budget=self._budget(),
            refuse=True,
            progress=progress,
        )
        if report.failed:
            refuse_dataset(self.dataset, report.failed)
        return _Prepared(prepared, recipe, None, folds, report.details["warnings"], forecast)

    def _budget(self) -> Budget:
        """Of memory; the time is looked at when the speed of a step is known."""
        return budget_of(
            self.device,
            self.memory,
            processes=self.team.size,
            half=self.team.precision != "32-true",
        )

    def _foresee(self, recipe: Recipe | None, plan: Plan | None, prepared: Path) -> Forecast | None:
        """What the time budget has to hold, seen on the first case; None without a budget, or for a run that goes on.

        Raises:
            VolsegError: the budget does not hold it.
        """
        if self.time.seconds is None or self.preview or read_fitted(self.work) is not None:
            return None
        forecast = forecast_of(
            self.dataset,
            recipe,
            plan,
            prepared,
            replace(self._budget(), is_least=True),
            PREPARING_SHARE * self.time.seconds,
            team=self.team,
            threads=self.threads,
            until=self.time.started + ANSWER_SECONDS,
            seed=self.seed,
            progress=self.progress,
        )
        if forecast is not None:
            least = self._least_seconds(forecast.step, recipe)
            if self.time.spent() + forecast.preparing + least > self.time.seconds:
                self._refuse(forecast.preparing, forecast, recipe, prepared)
        return forecast

    def _guard(self, forecast: Forecast, recipe: Recipe | None, prepared: Path) -> Progress:
        least = LATE_SHARE * self._least_seconds(forecast.step, recipe)
        return Guard(
            self.progress,
            forecast,
            self.time.ends,
            least,
            lambda ahead: self._refuse(ahead, forecast, recipe, prepared),
        ).show

    def _finishing(self, networks: int) -> float:
        """Seconds of the time budget that are left for export and pictures."""
        seconds = self.time.seconds or 0.0
        usual = min(FINISHING_SHARE * seconds, FINISHING_SECONDS)
        return max(usual, min(FINISHING_LEAST * (1 + networks), FINISHING_MOST * seconds))

    @property
    def _least_steps(self) -> int:
        """Steps that each network is to have, unless its epochs end before or it only goes on learning."""
        least = LEAST_STEPS if self.init is None else FINE_TUNING_STEPS
        return (
            least if self.epochs is None else min(least, self.epochs)
        )  # an epoch has a step or more

    def _least_seconds(self, step: float, recipe: Recipe | None) -> float:
        """Seconds without which no network can learn, from the first step to the end of the call."""
        networks = self.folds or 1
        return self._finishing(networks) + networks * self._least_steps * step / _steps_share(
            recipe
        )

    def _refuse(
        self, ahead: float, forecast: Forecast, recipe: Recipe | None, prepared: Path
    ) -> NoReturn:
        """Say that the time does not hold the seconds that are ahead before training, and training itself."""
        assert self.time.seconds is not None
        least = self._least_seconds(forecast.step, recipe)
        option = (
            f" --recipe {shlex.quote(str(self.recipe))}"
            if isinstance(self.recipe, str | Path)
            else ""
        )
        whole = self.out.resolve()  # `.` and `..` have no name of their own
        apart = whole.parent / f"{whole.name or 'model'}_prepared"
        shorter = suggested(STARTING_SECONDS + least)
        remedy = (
            f"; or prepare the data first: volseg preprocess {shlex.quote(str(self.dataset))}{option} --out "
            f"{shlex.quote(str(apart))}, and then volseg train {shlex.quote(str(apart))} --out "
            f"{shlex.quote(str(self.out))} --time-budget {shorter}"
        )
        if ahead < APART_SHARE * (ahead + least):
            remedy = ""
        network = (
            "the smallest network that can learn"
            if recipe is None or recipe.is_open
            else "the recipe's network"
        )
        refuse_time(
            self.time.seconds,
            self.time.spent() + ahead + least,
            f"reading and preparing its {forecast.n_cases} cases takes about {duration(ahead)} more, and "
            f"{self._least_steps} steps of {network}, with validation, about {duration(least)}",
            remedy=remedy,
            kept=f"; {self._kept(prepared)}",
        )

    def _fit(
        self,
        data: _Prepared,
        recipe: Recipe,
        plan: Plan,
        fingerprint: DatasetFingerprint,
        cases: Sequence[PreparedCase],
    ) -> tuple[int, Plan | None]:
        """How many networks the time holds, and their plan where it is another.

        Raises:
            VolsegError: it does not hold one that can learn.
        """
        from volseg.plan import make_plan, size_of
        from volseg.train.speed import seconds_per_step

        fitted, folds = read_fitted(self.work), data.folds
        if fitted is not None:  # a run that goes on
            return self.folds or fitted.folds, fitted.plan
        if self.folds is None and folds > 1:
            folds = min(folds, len({case.record["patient"] for case in cases}))
        if self.time.seconds is None or self.preview:
            return folds, None

        header = read_header(data.folder)
        stated = data.recipe or parse_recipe(header["recipe"], where=str(data.folder))
        is_own = (
            data.folder != self.dataset
        )  # prepared by this call, or by one that this one goes on with
        is_open = (
            stated.is_open and self.plan is None and (is_own or header.get("is_planned", True))
        )
        seconds = (self.time.left(self._finishing(folds)) or 0.0) * _steps_share(recipe)

        def time_step(candidate: Plan) -> float:
            return seconds_per_step(
                cases,
                candidate.complete(stated),
                candidate,
                team=self.team,
                seed=self.seed,
                threads=self.threads,
                tick=lambda doing: self.steady.tick("Planning", 0.5, doing),
            )

        def operations(candidate: Plan) -> float:
            size = size_of(candidate, stated)
            assert size is not None, "a network that is left to the plan is modelled"
            return (
                size.step_flops(len(stated.data.channels), stated.data.n_outputs)
                * stated.train.accumulate
            )

        self.progress("Planning", 0.0, f"{duration(self.time.left() or 0.0)} left")
        least = None
        if is_open:
            least = make_plan(fingerprint, stated, replace(self._budget(), is_least=True))
            speed = None if data.forecast is None else data.forecast.flops
            flops = (speed or operations(least) / time_step(least)) * seconds
            plan = best_plan(
                lambda each: make_plan(fingerprint, stated, replace(self._budget(), flops=each)),
                least,
                flops,
                folds,
                lambda candidate, each: each / operations(candidate),
            )
        is_late = data.forecast is not None and self.time.spent() > ANSWER_SECONDS
        try:
            fit = fit_to_time(
                plan,
                seconds,
                folds=folds,
                may_drop_folds=self.folds is None,
                time_step=time_step,
                smaller=None if least is None else lambda: least,
                least_steps=self._least_steps,
                enough=LATE_SHARE if is_late else 1.0,
            )
        except TooShortError as error:
            needed = error.needed / _steps_share(recipe) + self._finishing(folds)
            again = f"; {self._kept(data.folder)}" if is_own else ""
            fewer = f", or --folds 1 instead of {self.folds}" if (self.folds or 1) > 1 else ""
            what = f"{self._least_steps} steps for each network, with validation, take about {duration(needed)}"
            refuse_time(
                self.time.seconds, STARTING_SECONDS + needed, what, remedy=fewer, kept=again
            )
        for reason in fit.reasons:
            self.announce(f"time budget: {reason}")
        steps = seconds / fit.folds / fit.seconds_per_step
        patch = " × ".join(map(str, fit.plan.patch_shape))
        networks = "1 network" if fit.folds == 1 else f"{fit.folds} networks"
        self.announce(
            f"training {networks} with patches of {patch} voxels, about {steps:.0f} steps each"
        )
        write_fitted(self.work, Fitted(fit.folds, fit.plan))
        return fit.folds, fit.plan

    def _kept(self, prepared: Path) -> str:
        return f"the prepared data are kept in {prepared}, and the next call with this --out uses what fits its plan"

    def _warn(self, *warnings: str) -> None:
        for warning in warnings:
            self.warnings.append(warning)
            self.announce(f"warning: {warning}")

    def _judge(self, trained: Mapping[int, Trained], rows: Sequence[ValidationRow]) -> None:
        """Say what is wrong with the networks."""
        steps = [int(network.metrics["steps"]) for network in trained.values()]
        if self.time.seconds is not None and min(steps) < self._least_steps:
            self._warn(
                f"W_FEW_STEPS: a network was trained for only {min(steps)} steps; under {self._least_steps} it learns "
                "next to nothing: give a longer --time-budget"
            )
        missed = sum(int(network.metrics.get("not_validated", 0)) for network in trained.values())
        if missed:
            self._warn(
                f"W_NOT_VALIDATED: the time budget left no time to validate on {missed} cases"
            )
        if rows and (score := mean_dice(rows)) < POOR_DICE:
            self._warn(
                f"W_DICE: the mean validation Dice is {score:.3f}: train longer, or on more cases"
            )

    def _time_for(self, stage: str) -> Callable[[str], bool]:
        """A callback that reports the next thing to do, and says no where the time does not hold it."""
        began: list[float] = []

        def has_time(name: str) -> bool:
            now = time.monotonic()
            longest = max(
                (later - earlier for earlier, later in pairwise([*began, now])), default=0.0
            )
            if now + longest > self.time.ends:
                self.announce(f"time budget: no time was left for {name}")
                return False
            began.append(now)
            self.progress(stage, 1 - 1 / len(began), name)
            return True

        return has_time

    def _first_pass(
        self, split: Split, recipe: Recipe, plan: Plan, initial: Mapping[str, torch.Tensor]
    ) -> tuple[Trained, float]:
        """What was trained, and the seconds of it in a call which this one resumes."""
        from volseg.train.loop import INTERRUPTED
        from volseg.train.roi import train_roi

        assert recipe.roi is not None
        left, began = self.time.left(), time.monotonic()
        first_pass = train_roi(
            *split,
            recipe,
            plan,
            self._settings(
                recipe.roi.train,
                None if left is None else left * recipe.roi.time_fraction,
                freeze=(),
            ),
            team=self.team,
            folder=self.work / ROI_FOLDER,
            resume=self.resume,
            initial=initial,
            report=partial(self._report, "Training the first pass", HISTORY_ROI),
            tick=self._tick("Training the first pass"),
            threads=self.threads,
        )
        if first_pass.stopped == INTERRUPTED:
            raise KeyboardInterrupt
        return first_pass, _earlier(first_pass, began)

    def _networks(
        self,
        splits: Sequence[Split],
        recipe: Recipe,
        plan: Plan,
        initial: Mapping[str, torch.Tensor],
        earlier: float,
    ) -> tuple[dict[int, Trained], dict[int, str]]:
        """What was trained on each split, and why a training ended before its time. What is done is not lost over what is not.

        Args:
            earlier: seconds of the budget that were spent in a call which this one resumes.
        """
        from volseg.train.loop import DIVERGED, DIVERGED_FIX, INTERRUPTED, train_segmentation

        for_classifier = (
            0.0
            if recipe.classify is None
            else (self.time.left() or 0.0) * recipe.classify.time_fraction
        )
        for_the_end = self._finishing(len(splits))
        trained: dict[int, Trained] = {}
        stopped: dict[int, str] = {}
        for number, (training, validation) in enumerate(splits):
            left, began = self.time.left(for_classifier + for_the_end + earlier), time.monotonic()
            several, waiting = (
                len(splits) > 1,
                self._affordable(len(splits) - number, left, trained),
            )
            if waiting == 0:
                stopped[number] = "no time was left"
                self.announce(
                    f"time budget: no time was left for fold {number + 1} of {len(splits)}"
                )
                break
            stage = f"Training fold {number + 1} of {len(splits)}" if several else "Training"
            make_folder(folder := _fold_folder(self.work, number, len(splits)))
            try:
                self.progress(
                    stage, 0.0, f"{len(training)} cases, {len(validation)} to validate on"
                )
                found = train_segmentation(
                    training,
                    validation,
                    recipe,
                    plan,
                    self._settings(recipe.train, None if left is None else left / waiting),
                    team=self.team,
                    checkpoints=folder,
                    resume=self.resume,
                    initial=initial,
                    report=partial(
                        self._report,
                        stage,
                        _history_name(number),
                    ),
                    tick=self._tick(stage),
                    threads=self.threads,
                )
            except KeyboardInterrupt:
                if not trained:
                    raise
                stopped[number] = INTERRUPTED
                break
            except VolsegError as error:
                if error.code != DIVERGED or not several:
                    raise
                stopped[number] = error.problem
                continue
            if found.stopped:
                stopped[number] = found.stopped
            if found.stopped == INTERRUPTED and trained:
                break  # half a network would have a whole vote
            trained[number] = found
            earlier += _earlier(found, began)
            if found.stopped == INTERRUPTED:
                break
        if not trained:
            raise VolsegError(
                f"no network could be trained: {next(iter(stopped.values()))}",
                fix=DIVERGED_FIX,
                code=DIVERGED,
            )
        return trained, stopped

    def _settings(
        self, train: Train, seconds: float | None, freeze: tuple[str, ...] | None = None
    ) -> RunSettings:
        from volseg.train.loop import RunSettings

        return RunSettings(
            seed=self.seed,
            epochs=self.epochs or (train.epochs if seconds is None else None),
            patience=self.patience or train.patience,
            seconds=seconds,
            freeze=self.freeze if freeze is None else freeze,
        )

    def _report(self, stage: str, name: str, history: Sequence[Epoch], done: float) -> None:
        from volseg.train.loop import Epoch

        self.outputs.write(name, table(Epoch, history))
        epoch = history[-1]
        values = {key: value for key, value in asdict(epoch).items() if value is not None}
        self.scalars.add(name.removesuffix(".csv"), epoch.step, values)
        looks = [each.validation_dice for each in history if each.validation_dice is not None]
        seen = f"validation Dice {looks[-1]:.3f}, " if looks else ""
        self.progress(
            stage,
            done,
            f"epoch {epoch.epoch}, loss {epoch.loss:.3f}, {seen}"
            f"{epoch.steps_per_second:.3g} steps/s, waiting {epoch.waiting_share:.0%}",
        )

    def _tick(self, stage: str) -> Tick:
        return lambda doing, done: self.steady.tick(stage, done, doing)

    def _affordable(self, waiting: int, left: float | None, trained: Mapping[int, Trained]) -> int:
        """How many of the networks that wait have the steps that they need, at the pace of those that are trained."""
        if left is None or not trained:
            return waiting
        pace = min(
            int(network.metrics["steps"]) / max(1e-3, float(network.metrics["training_seconds"]))
            for network in trained.values()
        )
        return min(
            waiting, math.floor(left * STEPS_SHARE * pace / (LATE_SHARE * self._least_steps))
        )

    def _check_folds(self, n: int) -> None:
        """That a run to go on with was begun with as many networks."""
        expected = {
            self.work / ROI_FOLDER,
            *(_fold_folder(self.work, number, n) for number in range(n)),
        }
        if any(path.parent not in expected for path in self.work.glob("**/last.safetensors")):
            raise VolsegError(
                f"{self.out}: holds a run that was begun with another number of folds",
                fix="resume with the --folds that it was begun with, or delete the folder",
                code="E_EXISTS",
            )

    def _check_unfinished(self) -> None:
        """That nothing is lost: Ctrl-C leaves a model and the run that made it, which can go on."""
        unfinished = any(path.is_file() for path in self.work.glob("**/last.safetensors"))
        if unfinished and not self.resume:
            raise VolsegError(
                f"{self.out}: holds an interrupted training run",
                fix="add --resume to go on, or give another --out to start over",
                code="E_EXISTS",
            )
        if (self.out / "model.json").exists() and not unfinished:
            raise VolsegError(
                f"{self.out}: holds a finished model",
                fix="give another --out, or delete it first",
                code="E_EXISTS",
            )


def _steps_share(recipe: Recipe | None) -> float:
    """The share of the time from the first step on that goes into steps of the networks of the fine pass."""
    if recipe is None:
        return STEPS_SHARE
    others = [part.time_fraction for part in (recipe.roi, recipe.classify) if part is not None]
    return STEPS_SHARE * (1 - sum(others))


def _is_intermediate(name: str) -> bool:
    """Whether a file in the work folder is a checkpoint, a coarse case or a note for who resumes, or left of one."""
    notes = "|".join(
        map(re.escape, ("last.safetensors", "best.safetensors", FITTED_FILE, RECIPE_FILE))
    )
    temporary = rf"{re.escape(TEMPORARY_PREFIX)}[0-9a-f]{{16}}"
    coarse = rf"{ROI_FOLDER}/cases/[^/]+/(case\.json|(image|mask|foreground_\d+)\.npy)"
    return re.fullmatch(rf"([^/]+/)?({notes}|{temporary})|{coarse}", name) is not None


def _history_name(number: int) -> str:
    return f"history{'' if number == 0 else f'_{number}'}.csv"


def _fold_folder(work: Path, number: int, n: int) -> Path:
    """Where the checkpoints of one of `n` networks are."""
    return work if n == 1 else work / f"fold_{number}"


def _earlier(trained: Trained, began: float) -> float:
    """Seconds of a training that were not in this call, in which it began at that time."""
    return max(0.0, trained.metrics["training_seconds"] - (time.monotonic() - began))


def _metrics_of(
    trained: Mapping[int, Trained], stopped: Mapping[int, str], validated: Mapping[str, Any]
) -> dict[str, Any]:
    """Of one network as they are; of several those of cross-validation, each case by the network that never saw it."""
    if len(trained) == 1 and not stopped.keys() - trained.keys():
        return dict(next(iter(trained.values())).metrics)
    steps = sum(found.metrics["steps"] for found in trained.values())
    reasons = (
        {"stopped": "; ".join(f"fold {number}: {why}" for number, why in stopped.items())}
        if stopped
        else {}
    )
    first = next(iter(trained.values())).metrics
    at_random = {key: first[key] for key in ("began_at_random",) if key in first}
    return {"networks": len(trained), "steps": steps} | at_random | dict(validated) | reasons


def _train_classifier(
    training: Sequence[PreparedCase],
    validation: Sequence[PreparedCase],
    recipe: Recipe,
    device: Any,
    seed: int,
    seconds: float | None,
    progress: Progress,
) -> tuple[Mapping[str, Any] | None, dict[str, Any]]:
    from volseg.train.classify import has_class, train_classifier

    assert recipe.classify is not None
    known = {case.record["class"] for case in training if has_class(case)}
    missing = [name for name in recipe.classify.classes if name not in known]
    if missing:
        return None, {"classifier": f"not trained: no training case of class {', '.join(missing)}"}
    return train_classifier(
        training,
        validation,
        recipe.classify,
        device=device,
        seed=seed,
        seconds=seconds,
        report=lambda epoch, done: progress("Training the classifier", done, f"epoch {epoch}"),
    )

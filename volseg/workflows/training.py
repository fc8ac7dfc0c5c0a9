"""`volseg train`: a dataset or a prepared folder → a model folder."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from volseg.errors import VolsegError
from volseg.evaluate.validation import ValidationRow, summary
from volseg.execute.cpu import keep_freed_memory
from volseg.inputs import read_json
from volseg.io.files import TEMPORARY_PREFIX, make_folder
from volseg.io.prepared import PreparedCase
from volseg.postprocess.steps import make_steps
from volseg.recipe import Recipe, Train
from volseg.report.scalars import Scalars
from volseg.store.outputs import OutputFolder, delete_written
from volseg.store.tables import table
from volseg.workflows.batch import Progress, RunReport, silent
from volseg.workflows.importing import MODEL_FILE
from volseg.workflows.planning import budget_of, folds_of, read_plan, recipe_for
from volseg.workflows.prepared import Split, load_prepared, prepared_warnings, split_cases
from volseg.workflows.preparing import PREPARED_FILE, as_recipe, preprocess, refuse_dataset
from volseg.workflows.training_pictures import preview_png, worst_cases_png

if TYPE_CHECKING:  # torch takes seconds to import; only a workflow that needs it pays
    import torch

    from volseg.bundle import ModelBundle
    from volseg.plan import Plan
    from volseg.sizing import Budget
    from volseg.train.loop import Epoch, RunSettings, Trained
    from volseg.train.ranks import Team

MAX_FOLDS = 20
HISTORY_ROI, VALIDATION = "history_roi.csv", "validation.csv"
PREVIEW, CURVES, WORST = "preview.png", "curves.png", "validation.png"
PICTURES = (VALIDATION, PREVIEW, CURVES, WORST)
PREPARED_FOLDER = "prepared"  # inside the work folder
WORK_FOLDER = ".training"  # inside a model folder while it is being trained
FINISHING_SHARE, FINISHING_SECONDS = 0.03, 60.0  # of a time budget that pictures and the export are left, at most
STEPS_SHARE = 0.75  # of a time budget that goes into steps, from which the network's size follows
ROI_FOLDER = "roi"  # inside that one: cases and checkpoints of the coarse first pass


def train(
    dataset: Path | str,
    *,
    out: Path | str,
    recipe: Path | str | Recipe | None = None,
    plan: Path | str | None = None,
    time_budget_seconds: float | None = None,
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
        time_budget_seconds: of the whole call, preparation, first pass and classifier included.
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
        announce: told before the first step what is odd about the data.

    Raises:
        VolsegError: a case cannot be used (all of them are named), or the recipe does not fit the prepared folder.
    """
    keep_freed_memory()
    from volseg.infer.backends import choose_device
    from volseg.train.loop import serve
    from volseg.train.ranks import team_of

    if fold is not None and (folds or 1) > 1:
        raise VolsegError("--fold and --folds exclude each other", fix="give one of them", code="E_USAGE")
    with team_of(choose_device(device), devices, serve, precision) as team:
        if team.rank > 0:  # under torchrun or SLURM every rank is a call of its own
            serve(team)
            return RunReport(out=Path(out), details={"rank": team.rank})
        with closing(Scalars(Path(out) / "tensorboard")) as scalars:
            return _Training(
                dataset=Path(dataset),
                out=Path(out),
                recipe=recipe,
                plan=plan,
                seconds=time_budget_seconds,
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
                progress=progress,
                announce=announce,
                team=team,
                scalars=scalars,
                outputs=OutputFolder(Path(out), "train", inputs=_input_paths(dataset, recipe, plan, init)),
            ).run()


def _input_paths(*inputs: Path | str | Recipe | None) -> list[Path]:
    """Those inputs of a training that are files or folders."""
    paths = [Path(value) for value in inputs if isinstance(value, Path | str)]
    return [path for path in paths if path.exists()]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Training:
    """One call of `train`, in the process that leads it."""

    dataset: Path
    out: Path
    recipe: Path | str | Recipe | None
    plan: Path | str | None
    seconds: float | None
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
    progress: Progress
    announce: Callable[[str], None]
    team: Team
    scalars: Scalars
    outputs: OutputFolder
    started: float = field(default_factory=time.monotonic)

    @property
    def work(self) -> Path:
        return self.out / WORK_FOLDER

    def run(self) -> RunReport:
        from volseg.bundle import ROI, ModelBundle, bundle_files, load_bundle, save_bundle, segmentation_name
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
            self.outputs.refuse_foreign([*bundle_files([*names, ROI, "classifier"]), *histories, *PICTURES])
            self.outputs.work_folder(WORK_FOLDER)
            model = None if self.init is None else load_bundle(self.init)
            prepared, recipe, plan, folds, warnings = self._prepare(model)
            for warning in warnings:
                self.announce(f"warning: {warning}")
            chosen, used, fingerprint, cases = load_prepared(prepared, recipe, plan)
            if self.memory is not None:
                check_budget(used, chosen, self._budget())
            make_steps(chosen.postprocess)
            check_networks(chosen)
            splits = [split_cases(cases, number, self.seed, folds) for number in range(folds)] if folds > 1 else []
            splits = splits or [split_cases(cases, self.fold, self.seed)]
            if self.preview:
                self.outputs.write(PREVIEW, preview_png(splits[0][0], chosen, used, self.seed))
                details = {"preview": str(self.out / PREVIEW), "warnings": warnings}
                return RunReport(out=self.out, done=[chosen.name], details=details)
            self._check_time_left()
            self._check_folds(len(splits))
            initial = {} if model is None else model.weights
            weights: dict[str, Mapping[str, Any]] = {}
            metrics: dict[str, Any] = {}
            earlier = 0.0
            if chosen.roi is not None:  # first: it is soon done, and what is wrong with the data shows here as well
                first_pass, earlier = self._first_pass(splits[0], chosen, used, initial.get(ROI, {}))
                weights[ROI] = first_pass.weights
                metrics = {f"roi_{name}": value for name, value in first_pass.metrics.items()}
            trained, stopped = self._networks(splits, chosen, used, initial.get("segmentation", {}), earlier)
            for index, found in enumerate(trained.values()):
                weights[segmentation_name(index)] = found.weights
            rows = [replace(row, fold=number) for number, found in trained.items() for row in found.validation]
            metrics = _metrics_of(trained, stopped, summary(rows)) | metrics
            metrics["training_cases"] = len({case.id for number in trained for case in splits[number][0]})
            interrupted = INTERRUPTED in stopped.values()
            if chosen.classify is not None and not interrupted:
                try:
                    classifier, found_metrics = _train_classifier(
                        *splits[0], chosen, self.team.fabric.device, self.seed, self._left(), self.progress
                    )
                except KeyboardInterrupt:
                    classifier, found_metrics = None, {"stopped": INTERRUPTED}
                    interrupted = True
                metrics |= found_metrics
                if classifier is not None:
                    weights["classifier"] = classifier
            made = ModelBundle(recipe=chosen, plan=used, fingerprint=fingerprint, weights=weights, metrics=metrics)
            with self.outputs.staged() as commit:
                save_bundle(made, commit.folder)
                if rows:
                    commit.write(VALIDATION, table(ValidationRow, rows))
                commit.finish(last=MODEL_FILE)
            bundle = load_bundle(self.out)
            with self.outputs.staged() as commit:
                export_bundle(bundle, commit.folder)
                commit.finish()
            from volseg.report.training_figures import curves_png

            # Pictures come last: nothing that was computed is to be lost over them.
            self.outputs.write(CURVES, curves_png([network.history for network in trained.values()]))
            if rows:
                worst = worst_cases_png(rows, trained, splits, chosen, used, self.team.fabric.device)
                self.outputs.write(WORST, worst)
            if not interrupted:
                delete_written(self.work / PREPARED_FOLDER)
                delete_written(self.work, _is_checkpoint)
        details = {"metrics": dict(bundle.metrics), "sha256": bundle.sha256, "interrupted": interrupted}
        return RunReport(out=self.out, done=[chosen.name], details=details | {"warnings": warnings})

    def _prepare(self, model: ModelBundle | None) -> tuple[Path, Recipe | None, Plan | None, int, list[str]]:
        """The prepared folder, the recipe and plan for it where they are not its own, how many networks, and what is odd about the data.

        Args:
            model: whose weights to start from.
        """
        from volseg.models import check_networks

        plan = None if self.plan is None else read_plan(self.plan)
        if (self.dataset / PREPARED_FILE).is_file():
            recipe = None if self.recipe is None else as_recipe(self.recipe)
            return self.dataset, recipe, plan, self.folds or 1, prepared_warnings(self.dataset)
        prepared = self.work / PREPARED_FOLDER
        recipe = recipe_for(self.dataset, self.recipe, self.progress)
        if model is not None and recipe.is_open and plan is None:  # the network and patches of the model to start from
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
        make_steps(recipe.postprocess)  # a misspelt step should not be found out after an hour of preparation
        if not recipe.is_open:
            check_networks(recipe)
        folds = 1 if self.fold is not None else folds_of(self.dataset, recipe, self.folds, is_auto=self.recipe is None)
        if self.resume and plan is None:  # what was begun with is what is gone on with, whatever memory is there today
            plan = _earlier_plan(prepared)
        report = preprocess(
            self.dataset,
            recipe=recipe,
            out=prepared,
            seed=self.seed,
            plan=plan,
            budget=self._budget(folds),
            refuse=True,
            progress=self.progress,
        )
        if report.failed:
            refuse_dataset(self.dataset, report.failed)
        return prepared, recipe, None, folds, list(report.details["warnings"])

    def _budget(self, folds: int = 1) -> Budget:
        return budget_of(
            self.device,
            self.memory,
            None if self.seconds is None else STEPS_SHARE * self.seconds / folds,
            processes=self.team.size,
            half=self.team.precision != "32-true",
        )

    def _first_pass(
        self, split: Split, recipe: Recipe, plan: Plan, initial: Mapping[str, torch.Tensor]
    ) -> tuple[Trained, float]:
        """What was trained, and the seconds of it in a call which this one resumes."""
        from volseg.train.loop import INTERRUPTED
        from volseg.train.roi import train_roi

        assert recipe.roi is not None
        left, began = self._left(), time.monotonic()
        first_pass = train_roi(
            *split,
            recipe,
            plan,
            self._settings(recipe.roi.train, None if left is None else left * recipe.roi.time_share, freeze=()),
            team=self.team,
            folder=self.work / ROI_FOLDER,
            resume=self.resume,
            initial=initial,
            report=partial(self._report, "Training the first pass", HISTORY_ROI),
        )
        if first_pass.stopped == INTERRUPTED:
            raise KeyboardInterrupt
        return first_pass, _earlier(first_pass, began)

    def _networks(
        self, splits: Sequence[Split], recipe: Recipe, plan: Plan, initial: Mapping[str, torch.Tensor], earlier: float
    ) -> tuple[dict[int, Trained], dict[int, str]]:
        """What was trained on each split, and why a training ended before its time. What is done is not lost over what is not.

        Args:
            earlier: seconds of the budget that were spent in a call which this one resumes.
        """
        from volseg.train.loop import DIVERGED, DIVERGED_FIX, INTERRUPTED, train_segmentation

        for_classifier = 0.0 if recipe.classify is None else (self._left() or 0.0) * recipe.classify.time_share
        for_the_end = min(FINISHING_SHARE * (self.seconds or 0.0), FINISHING_SECONDS)
        trained: dict[int, Trained] = {}
        stopped: dict[int, str] = {}
        for number, (training, validation) in enumerate(splits):
            left, began = self._left(for_classifier + for_the_end + earlier), time.monotonic()
            several = len(splits) > 1
            make_folder(folder := _fold_folder(self.work, number, len(splits)))
            try:
                found = train_segmentation(
                    training,
                    validation,
                    recipe,
                    plan,
                    self._settings(recipe.train, None if left is None else left / (len(splits) - number)),
                    team=self.team,
                    checkpoints=folder,
                    resume=self.resume,
                    initial=initial,
                    report=partial(
                        self._report,
                        f"Training fold {number + 1} of {len(splits)}" if several else "Training",
                        _history_name(number),
                    ),
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
                f"no network could be trained: {next(iter(stopped.values()))}", fix=DIVERGED_FIX, code=DIVERGED
            )
        return trained, stopped

    def _settings(self, train: Train, seconds: float | None, freeze: tuple[str, ...] | None = None) -> RunSettings:
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

    def _left(self, kept: float = 0.0) -> float | None:
        """Seconds of the budget, less what is kept for later; None without a budget."""
        if self.seconds is None:
            return None
        return max(1.0, self.seconds - (time.monotonic() - self.started) - kept)

    def _check_time_left(self) -> None:
        if self.seconds is not None and time.monotonic() - self.started >= self.seconds:
            raise VolsegError(
                f"preparing the data took longer than the time budget of {self.seconds:.0f} s",
                fix="run `volseg preprocess` first and train from the prepared folder, or give more time",
                code="E_BUDGET",
            )

    def _check_folds(self, n: int) -> None:
        """That a run to go on with was begun with as many networks."""
        expected = {self.work / ROI_FOLDER, *(_fold_folder(self.work, number, n) for number in range(n))}
        if any(path.parent not in expected for path in self.work.glob("**/last.safetensors")):
            raise VolsegError(
                f"{self.out}: holds a run that was begun with another number of folds",
                fix="resume with the --folds that it was begun with, or delete the folder",
                code="E_EXISTS",
            )

    def _check_unfinished(self) -> None:
        unfinished = any(path.is_file() for path in self.work.glob("**/last.safetensors"))
        if (self.out / "model.json").exists() and not (self.resume and unfinished):
            raise VolsegError(
                f"{self.out}: holds a finished model", fix="give another --out, or delete it first", code="E_EXISTS"
            )
        if unfinished and not self.resume:
            raise VolsegError(
                f"{self.out}: holds an interrupted training run",
                fix="add --resume to go on, or delete the folder",
                code="E_EXISTS",
            )


def _earlier_plan(prepared: Path) -> Plan | None:
    """The plan with which an interrupted run prepared its data; None where it did not come so far."""
    from volseg.plan import Plan

    try:
        return Plan.model_validate(read_json(prepared / PREPARED_FILE)["plan"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_checkpoint(name: str) -> bool:
    """Whether a file in the work folder is a checkpoint, or what a killed process left of one."""
    return (
        re.fullmatch(rf"(.*/)?((last|best)\.safetensors|{re.escape(TEMPORARY_PREFIX)}[0-9a-f]{{16}})", name) is not None
    )


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
    reasons = {"stopped": "; ".join(f"fold {number}: {why}" for number, why in stopped.items())} if stopped else {}
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

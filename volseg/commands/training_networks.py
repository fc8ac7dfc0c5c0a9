"""Train what a recipe asks for: a first pass, a network per split, a classifier."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from volseg.bundle import ROI, SEGMENTATION, segmentation_name
from volseg.commands.prepared import Split
from volseg.commands.time_plan import TimePlan
from volseg.commands.training_call import HISTORY_ROI, ROI_FOLDER, history_name
from volseg.errors import VolsegError, without_notes
from volseg.evaluation.validation import ValidationRow, mean_dice, summary
from volseg.io.files import make_folder
from volseg.pages.model_box import POOR_DICE
from volseg.recipe import Classify, Recipe, Roi, Train
from volseg.store.tables import table
from volseg.training.classify import has_class, train_classifier
from volseg.training.loop import DIVERGED, DIVERGED_FIX, Trained, Watch, train_network
from volseg.training.objective import Weights
from volseg.training.roi import train_roi
from volseg.training.run import Job
from volseg.training.schedule import RunSettings, Stop
from volseg.training.segmentation import SCORE, SegmentationObjective
from volseg.training.state import Epoch
from volseg.words import format_count

NO_TIME = "no time was left"


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """What was trained: weights and metrics of the bundle, and networks by number of split."""

    weights: Mapping[str, Weights]
    metrics: Mapping[str, Any]
    trained: Mapping[int, Trained]
    rows: Sequence[ValidationRow]
    is_interrupted: bool


class NetworkTraining:
    """The trainings of a call of `train`, one after another.

    Args:
        initial: weights to start from, by name in the bundle.
    """

    def __init__(
        self,
        times: TimePlan,
        splits: Sequence[Split],
        recipe: Recipe,
        initial: Mapping[str, Weights],
    ) -> None:
        self._call, self._times = times.call, times
        self._splits, self._recipe, self._initial = splits, recipe, initial
        self._weights: dict[str, Weights] = {}
        self._is_interrupted = False
        self._earlier = 0.0  # seconds of training in an earlier call that this one resumes
        self._trained: dict[int, Trained] = {}  # by number of the split
        self._stopped: dict[int, str] = {}  # why trainings ended early, by number of the split

    def run(self) -> Result:
        """Train first pass, networks and classifier.

        Raises:
            KeyboardInterrupt: before any network was trained.
            VolsegError: no network could be trained.
        """
        # First: it is quick, and bad data fail here too.
        roi_metrics = {} if self._recipe.roi is None else self._first_pass(self._recipe.roi)
        self._train_networks()
        rows = []
        for index, (number, network) in enumerate(self._trained.items()):
            self._weights[segmentation_name(index)] = network.weights
            rows += [replace(row, fold=number) for row in network.validation]
        self._warn_of(rows)
        metrics = self._metrics(summary(rows)) | roi_metrics
        if warnings := without_notes(self._call.warnings):
            metrics["warnings"] = "; ".join(warnings)
        training = (case for number in self._trained for case in self._splits[number][0])
        metrics["training_cases"] = len({case.id for case in training})
        if self._recipe.classify is not None and not self._is_interrupted:
            metrics |= self._classifier(self._recipe.classify)
        return Result(self._weights, metrics, self._trained, rows, self._is_interrupted)

    def _first_pass(self, roi: Roi) -> dict[str, Any]:
        """Train the first pass; return its metrics."""
        left, began = self._call.time.left(), time.monotonic()
        seconds = None if left is None else left * roi.time_fraction
        settings = self._settings(roi.train, seconds, freeze=())
        job = self._job(0, settings, self._call.work / ROI_FOLDER, ROI)
        watch = self._watch("Training the first pass", HISTORY_ROI)
        first_pass = train_roi(job, self._call.team, watch)
        if first_pass.stop is Stop.INTERRUPTED:
            raise KeyboardInterrupt
        self._earlier += _earlier(first_pass, began)
        self._weights[ROI] = first_pass.weights
        return {f"roi_{name}": value for name, value in first_pass.metrics.items()}

    def _train_networks(self) -> None:
        """Train on each split. A training that fails does not lose those that are done."""
        reserved = self._times.reserved(len(self._splits), self._recipe)
        for number in range(len(self._splits)):
            self._train_split(number, self._call.time.left(reserved + self._earlier))
            if self._is_interrupted or self._stopped.get(number) == NO_TIME:
                break
        if not self._trained:
            raise VolsegError(
                f"no network could be trained: {next(iter(self._stopped.values()))}",
                fix=DIVERGED_FIX,
                code=DIVERGED,
            )

    def _train_split(self, number: int, left: float | None) -> None:
        """Train on one split, with its share of the seconds left; note why that ends early."""
        n, began = len(self._splits), time.monotonic()
        waiting = self._times.affordable(n - number, left, self._trained.values())
        if waiting == 0:
            self._stopped[number] = NO_TIME
            self._call.options.announce(f"time budget: {NO_TIME} for fold {number + 1} of {n}")
            return
        try:
            network = self._network(number, None if left is None else left / waiting)
        except KeyboardInterrupt:
            if not self._trained:
                raise
            self._is_interrupted, self._stopped[number] = True, Stop.INTERRUPTED.value
            return
        except VolsegError as error:
            if error.code != DIVERGED or n == 1:
                raise
            self._stopped[number] = error.problem
            return
        if network.stopped:
            self._stopped[number] = network.stopped
        self._is_interrupted = network.stop is Stop.INTERRUPTED
        # Among others, a half-trained network would get a full vote in the ensemble.
        if not (self._is_interrupted and self._trained):
            self._trained[number] = network
            self._earlier += _earlier(network, began)

    def _network(self, number: int, seconds: float | None) -> Trained:
        n, (training, validation) = len(self._splits), self._splits[number]
        make_folder(folder := self._call.checkpoints(number, n))
        settings = self._settings(self._recipe.train, seconds, self._call.options.freeze)
        job = self._job(number, settings, folder, SEGMENTATION)
        stage = f"Training fold {number + 1} of {n}" if n > 1 else "Training"
        detail = f"{len(training)} training and {len(validation)} validation cases"
        self._call.progress(stage, 0.0, detail)
        return train_network(job, self._call.team, self._watch(stage, history_name(number)))

    def _classifier(self, settings: Classify) -> dict[str, Any]:
        """Train the classifier; return its metrics, or why there is none."""
        left = self._call.time.left(self._times.finishing(len(self._splits)))
        present = {case.record["class"] for case in self._splits[0][0] if has_class(case)}
        missing = [name for name in settings.classes if name not in present]
        if missing:
            return {"classifier": f"not trained: no training case of class {', '.join(missing)}"}
        stage = "Training the classifier"
        try:
            self._weights["classifier"], metrics = train_classifier(
                self._splits[0],
                settings,
                device=self._call.team.fabric.device,
                seed=self._call.options.seed,
                seconds=left,
                report=lambda epoch, done: self._call.progress(stage, done, f"epoch {epoch}"),
            )
        except KeyboardInterrupt:
            self._is_interrupted = True
            return {"stopped": Stop.INTERRUPTED.value}
        return metrics

    def _settings(
        self, train: Train, seconds: float | None, freeze: tuple[str, ...]
    ) -> RunSettings:
        options = self._call.options
        return RunSettings(
            seed=options.seed,
            epochs=options.epochs or (train.epochs if seconds is None else None),
            patience=options.patience or train.patience,
            seconds=seconds,
            freeze=freeze,
        )

    def _job(self, number: int, settings: RunSettings, checkpoints: Path, name: str) -> Job:
        """Return the training on a split, from the initial weights of this name."""
        return Job(
            objective=SegmentationObjective(*self._splits[number], self._recipe),
            settings=settings,
            checkpoints=checkpoints,
            initial=self._initial.get(name, {}),
            resume=self._call.options.resume,
        )

    def _watch(self, stage: str, history: str) -> Watch:
        return Watch(
            report=partial(self._report, stage, history),
            tick=lambda doing, done: self._call.progress.tick(stage, done, doing),
            threads=self._call.threads,
        )

    def _report(self, stage: str, name: str, history: Sequence[Epoch], done: float) -> None:
        headings = {"validation_score": SCORE, "validation_loss": None}
        self._call.outputs.write(name, table(Epoch, history, headings))
        epoch = history[-1]
        values = {key: value for key, value in asdict(epoch).items() if value is not None}
        self._call.scalars.add(name.removesuffix(".csv"), epoch.step, values)
        scores = [line.validation_score for line in history if line.validation_score is not None]
        dice = f"validation Dice {scores[-1]:.3f}, " if scores else ""
        self._call.progress(
            stage,
            done,
            f"epoch {epoch.epoch}, loss {epoch.loss:.3f}, {dice}"
            f"{epoch.steps_per_second:.3g} steps/s, waiting {epoch.waiting_share:.0%}",
        )

    def _warn_of(self, rows: Sequence[ValidationRow]) -> None:
        """Warn of too few steps, of cases that were not validated, and of a low Dice."""
        networks, needed, warn = self._trained.values(), self._times.least_steps, self._call.warn
        steps = min(int(network.metrics["steps"]) for network in networks)
        if self._call.time.seconds is not None and steps < needed:
            warn(
                f"W_FEW_STEPS: a network was trained for only {steps} steps and needs at least "
                f"{needed}: give a longer --time-budget"
            )
        missed = sum(int(network.metrics.get("not_validated", 0)) for network in networks)
        if missed:
            cases = format_count(missed, "case")
            warn(f"W_NOT_VALIDATED: the time budget was too short to validate {cases}")
        if rows and (score := mean_dice(rows)) < POOR_DICE:
            warn(f"W_DICE: the mean validation Dice is {score:.3f}: train longer, or on more cases")

    def _metrics(self, validated: Mapping[str, Any]) -> dict[str, Any]:
        """Return the metrics of one network, or the cross-validation metrics of several.

        In cross-validation each case is predicted by the network that was not trained on it.
        """
        trained, stopped = self._trained, self._stopped
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


def _earlier(trained: Trained, began: float) -> float:
    """Return the seconds of a training before this call, which began it at that time."""
    return max(0.0, trained.metrics["training_seconds"] - (time.monotonic() - began))

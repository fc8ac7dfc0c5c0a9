"""The steps of a call of `train`: data, plan, training, model, pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from volseg.bundle import (
    ROI,
    ModelBundle,
    bundle_files,
    load_bundle,
    save_bundle,
    segmentation_name,
)
from volseg.commands.attaching import check_classifiers, copy_classifiers, with_classifiers
from volseg.commands.earlier import FITTED_FILE, RECIPE_FILE
from volseg.commands.importing import MODEL_FILE
from volseg.commands.prepared import Split, split_cases
from volseg.commands.time_plan import TimePlan
from volseg.commands.training_call import (
    HISTORY_ROI,
    ROI_FOLDER,
    WORK_FOLDER,
    Call,
    history_name,
    refuse_finished,
)
from volseg.commands.training_data import training_data
from volseg.commands.training_networks import NetworkTraining, Result
from volseg.commands.training_pictures import preview_png, worst_cases_png
from volseg.errors import VolsegError
from volseg.evaluation.validation import ValidationRow
from volseg.inference.export import export_bundle, half_precision_hint
from volseg.io.files import TEMPORARY_PREFIX
from volseg.io.prepared import PreparedCase
from volseg.options.training import MAX_FOLDS
from volseg.pages.training_figures import curves_png
from volseg.planning.close import Closed, check_budget
from volseg.planning.fingerprint import DatasetFingerprint
from volseg.recipe import Recipe, as_recipe
from volseg.reports import TrainReport
from volseg.store.outputs import delete_written
from volseg.store.tables import table
from volseg.training.check import check_recipe
from volseg.training.run import BEST, LAST

VALIDATION = "validation.csv"
PREVIEW, CURVES, WORST = "preview.png", "curves.png", "validation.png"
RESULTS = (VALIDATION, PREVIEW, CURVES, WORST)


def run_training(call: Call) -> TrainReport:
    """Train the model of a call of `train`, and write it."""
    return _Training(call, TimePlan(call)).run()


@dataclass(frozen=True, slots=True, eq=False)
class _Training:
    call: Call
    times: TimePlan

    def run(self) -> TrainReport:
        call, options = self.call, self.call.options
        if options.recipe is not None:
            check_recipe(as_recipe(options.recipe))  # before any folder is made
        with call.outputs:
            self._open()
            model = None if options.init is None else load_bundle(options.init)
            data = training_data(self.times, model)
            if options.memory is not None:
                check_budget(data.plan.recipe, call.budget())
            check_recipe(data.plan.recipe)
            check_classifiers(data.plan.recipe.classifiers)
            fitted = self.times.fit(data)
            closed, splits = fitted.plan, self._splits(data.cases, fitted.folds)
            if options.preview:
                return self._preview(splits[0][0], closed.recipe)
            self._check_folds(len(splits))
            initial = {} if model is None else model.weights
            result = NetworkTraining(self.times, splits, closed.recipe, initial).run()
            bundle = self._write_model(result, closed, data.fingerprint)
            self._draw(result, splits, closed.recipe)
            if not result.is_interrupted:
                delete_written(call.prepared)
                delete_written(call.work, _is_intermediate)
        return TrainReport(
            out=options.out,
            done=[closed.recipe.name],
            warnings=call.warnings,
            metrics=dict(bundle.metrics),
            sha256=bundle.sha256,
            interrupted=result.is_interrupted,
            hint=half_precision_hint(options.out),
        )

    def _open(self) -> None:
        """Check that `out` can take the model, and open the work folder."""
        self._check_unfinished()
        names = (segmentation_name(index) for index in range(MAX_FOLDS))
        histories = [HISTORY_ROI, *(history_name(number) for number in range(MAX_FOLDS))]
        self.call.outputs.check_overwrites(
            [*bundle_files([*names, ROI, "classifier"]), *histories, *RESULTS]
        )
        self.call.outputs.work_folder(WORK_FOLDER)
        if not self.call.options.resume:
            (self.call.work / FITTED_FILE).unlink(missing_ok=True)
        self.call.progress("Starting", 0.0, str(self.call.options.dataset))

    def _splits(self, cases: Sequence[PreparedCase], folds: int) -> list[Split]:
        seed = self.call.options.seed
        if folds > 1:
            return [split_cases(cases, number, seed, folds) for number in range(folds)]
        return [split_cases(cases, self.call.options.fold, seed)]

    def _preview(self, training: Sequence[PreparedCase], recipe: Recipe) -> TrainReport:
        self.call.outputs.write(PREVIEW, preview_png(training, recipe, self.call.options.seed))
        return TrainReport(
            out=self.call.options.out,
            done=[recipe.name],
            warnings=self.call.warnings,
            preview=str(self.call.options.out / PREVIEW),
        )

    def _write_model(
        self, result: Result, closed: Closed, fingerprint: DatasetFingerprint
    ) -> ModelBundle:
        """Write the model with its exported networks; return it as read back."""
        recipe = closed.recipe.model_copy(update={"classifiers": ()})
        bundle = ModelBundle(
            recipe=recipe,
            fingerprint=fingerprint,
            weights=result.weights,
            metrics=result.metrics,
            reasons=closed.reasons,
        )
        bundle, folders = with_classifiers(bundle, closed.recipe.classifiers)
        with self.call.outputs.staged() as commit:
            copy_classifiers(folders, commit)
            save_bundle(bundle, commit.folder)
            if result.rows:
                commit.write(VALIDATION, table(ValidationRow, result.rows))
            commit.finish(last=MODEL_FILE)
        bundle = load_bundle(self.call.options.out)
        with self.call.outputs.staged() as commit:
            export_bundle(bundle, commit.folder, before=self.times.has_time_for("Exporting"))
            commit.finish()
        return bundle

    def _draw(self, result: Result, splits: Sequence[Split], recipe: Recipe) -> None:
        """Draw pictures; they come last, so that a failure in them loses no results."""
        has_time, device = self.times.has_time_for("Drawing"), self.call.team.fabric.device
        if has_time(CURVES):
            curves = [network.history for network in result.trained.values()]
            self.call.outputs.write(CURVES, curves_png(curves))
        worst = worst_cases_png(result, splits, recipe, device, before=has_time)
        if worst:
            self.call.outputs.write(WORST, worst)

    @property
    def _checkpoints(self) -> list[Path]:
        """The checkpoints of an interrupted run."""
        return [path for path in self.call.work.glob(f"**/{LAST}") if path.is_file()]

    def _check_folds(self, n: int) -> None:
        """Check that the run to resume was started with the same number of networks."""
        folders = {self.call.checkpoints(number, n) for number in range(n)}
        folders.add(self.call.work / ROI_FOLDER)
        if any(path.parent not in folders for path in self._checkpoints):
            raise VolsegError(
                f"{self.call.options.out}: holds a run with another number of folds",
                fix="resume with the same --folds, or delete the folder",
                code="E_EXISTS",
            )

    def _check_unfinished(self) -> None:
        """Check that `out` holds no finished model, and no interrupted run unless it is resumed."""
        unfinished = self._checkpoints
        if unfinished and not self.call.options.resume:
            raise VolsegError(
                f"{self.call.options.out}: holds an interrupted training run",
                fix="add --resume to continue, or give another --out to start over",
                code="E_EXISTS",
            )
        if not unfinished:
            refuse_finished(self.call.options.out)


def _is_intermediate(name: str) -> bool:
    """Tell whether a file in the work folder serves only to resume, or is a temporary of one."""
    names = (LAST, BEST, FITTED_FILE, RECIPE_FILE)
    resumed = "|".join(map(re.escape, names))
    temporary = rf"{re.escape(TEMPORARY_PREFIX)}[0-9a-f]{{16}}"
    coarse = rf"{ROI_FOLDER}/cases/[^/]+/(case\.json|(image|mask|foreground_\d+)\.npy)"
    return re.fullmatch(rf"([^/]+/)?({resumed}|{temporary})|{coarse}", name) is not None

"""`volseg train`: a dataset or a prepared folder → a model folder."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from volseg.errors import VolsegError
from volseg.execute.cpu import keep_freed_memory
from volseg.io.prepared import PreparedCase, read_prepared_case
from volseg.postprocess.steps import make_steps
from volseg.recipe import Recipe, parse_recipe
from volseg.report.results import held
from volseg.report.tables import write_table
from volseg.workflows.batch import Progress, RunReport, silent
from volseg.workflows.preparing import PREPARED_FILE, as_recipe, preparation_of, preprocess

if TYPE_CHECKING:  # torch takes seconds to import; only a workflow that needs it pays
    from volseg.plan import DatasetFingerprint, Plan

N_FOLDS = 5
WORK_FOLDER = ".training"  # inside a model folder while it is being trained
ROI_FOLDER = "roi"  # inside that one: cases and checkpoints of the coarse first pass


def train(
    dataset: Path | str,
    *,
    out: Path | str,
    recipe: Path | str | Recipe | None = None,
    time_budget_seconds: float | None = None,
    epochs: int | None = None,
    patience: int | None = None,
    resume: bool = False,
    init: Path | str | None = None,
    fold: int | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: Progress = silent,
) -> RunReport:
    """A dataset or a prepared folder → a model folder.

    Args:
        recipe: needed for a dataset; a prepared folder brings its own, whose training settings another one may replace.
        time_budget_seconds: of the whole call, preparation, first pass and classifier included.
        epochs, patience: in place of the recipe's, and of those of its first pass.
        resume: go on from the last epoch of an interrupted run in `out`.
        init: a model folder whose weights to start from, where their names and shapes agree.
        fold: 0 to 4: validate on this fifth of the patients and train on the others, whatever the dataset's train and val.

    Raises:
        VolsegError: a case cannot be used (all of them are named), or the recipe does not fit the prepared folder.
    """
    started = time.monotonic()
    keep_freed_memory()
    from volseg.bundle import ROI, ModelBundle, load_bundle, save_bundle
    from volseg.infer.backends import choose_device, export_bundle
    from volseg.models import check_networks
    from volseg.train.loop import Epoch, RunSettings, train_segmentation
    from volseg.train.roi import train_roi

    dataset, out = Path(dataset), Path(out)
    work = out / WORK_FOLDER
    with held(out, work):
        _check_unfinished(out, work, resume)
        prepared = dataset if (dataset / PREPARED_FILE).is_file() else work / "prepared"
        if prepared is not dataset:
            if recipe is None:
                raise VolsegError(
                    "a dataset needs a recipe", fix="add --recipe, such as --recipe smoke", code="E_USAGE"
                )
            report = preprocess(dataset, recipe=recipe, out=prepared, seed=seed, progress=progress)
            if report.failed:
                refuse_dataset(dataset, report.failed)
        chosen, plan, fingerprint, cases = load_prepared(prepared, recipe)
        make_steps(chosen.postprocess)  # a misspelt step should not be found out after an hour of training
        check_networks(chosen)
        training, validation = split_cases(cases, fold, seed)
        left = None if time_budget_seconds is None else time_budget_seconds - (time.monotonic() - started)
        if left is not None and left <= 0:
            raise VolsegError(
                f"preparing the data took longer than the time budget of {time_budget_seconds:.0f} s",
                fix="run `volseg preprocess` first and train from the prepared folder, or give more time",
                code="E_BUDGET",
            )

        def seconds_left(kept: float = 0.0) -> float | None:
            """Of the budget, less what is kept for later."""
            if time_budget_seconds is None:
                return None
            return max(1.0, time_budget_seconds - (time.monotonic() - started) - kept)

        for_classifier = 0.0 if left is None or chosen.classify is None else left * chosen.classify.time_share
        settings = RunSettings(
            device=choose_device(device),
            seed=seed,
            epochs=epochs or chosen.train.epochs,
            patience=patience or chosen.train.patience,
        )
        initial = {} if init is None else load_bundle(Path(init)).weights
        weights: dict[str, Mapping[str, Any]] = {}
        metrics: dict[str, Any] = {}

        def show(stage: str, epoch: Epoch, done: float) -> None:
            progress(
                stage,
                done,
                f"epoch {epoch.epoch}, loss {epoch.loss:.3f}, validation Dice {epoch.validation_dice:.3f}",
            )

        if chosen.roi is not None:  # first: it is soon done, and what is wrong with the data shows here as well
            first_pass = train_roi(
                training,
                validation,
                chosen,
                plan,
                replace(
                    settings,
                    epochs=epochs or chosen.roi.train.epochs,
                    patience=patience or chosen.roi.train.patience,
                    seconds=None if left is None else left * chosen.roi.time_share,
                ),
                folder=work / ROI_FOLDER,
                resume=resume,
                initial=initial.get(ROI, {}),
                report=partial(show, "Training the first pass"),
            )
            weights[ROI] = first_pass.weights
            metrics = {f"roi_{name}": value for name, value in first_pass.metrics.items()}
            write_table(out / "history_roi.csv", Epoch, first_pass.history)
        trained = train_segmentation(
            training,
            validation,
            chosen,
            plan,
            replace(settings, seconds=seconds_left(for_classifier)),
            checkpoints=work,
            resume=resume,
            initial=initial.get("segmentation", {}),
            report=partial(show, "Training"),
        )
        weights["segmentation"] = trained.weights
        metrics = dict(trained.metrics) | metrics
        if chosen.classify is not None:
            classifier, found = _train_classifier(
                training, validation, chosen, settings.device, seed, seconds_left(), progress
            )
            metrics |= found
            if classifier is not None:
                weights["classifier"] = classifier
        write_table(out / "history.csv", Epoch, trained.history)
        bundle = save_bundle(
            ModelBundle(recipe=chosen, plan=plan, fingerprint=fingerprint, weights=weights, metrics=metrics), out
        )
        export_bundle(bundle, out)
    shutil.rmtree(work, ignore_errors=True)
    return RunReport(out=out, done=[chosen.name], details={"metrics": dict(bundle.metrics), "sha256": bundle.sha256})


def _check_unfinished(out: Path, work: Path, resume: bool) -> None:
    if (out / "model.json").exists():
        raise VolsegError(
            f"{out}: holds a finished model", fix="give another --out, or delete it first", code="E_EXISTS"
        )
    if any((folder / "last.safetensors").exists() for folder in (work, work / ROI_FOLDER)) and not resume:
        raise VolsegError(
            f"{out}: holds an interrupted training run",
            fix="add --resume to go on, or delete the folder",
            code="E_EXISTS",
        )


def split_cases(
    cases: Sequence[PreparedCase], fold: int | None, seed: int
) -> tuple[list[PreparedCase], list[PreparedCase]]:
    """Training and validation cases: the prepared split, or a fifth of the patients drawn with the seed."""
    if fold is None:
        sides = [[case for case in cases if case.record["split"] == side] for side in ("train", "val")]
    else:
        if not 0 <= fold < N_FOLDS:
            raise VolsegError(f"fold {fold} does not exist", fix=f"give 0 to {N_FOLDS - 1}", code="E_USAGE")
        patients = np.random.default_rng(seed).permutation(sorted({case.record["patient"] for case in cases}))
        held_out = set(patients[fold::N_FOLDS].tolist())
        sides = [[case for case in cases if (case.record["patient"] in held_out) == out] for out in (False, True)]
    if not all(sides):
        raise VolsegError(
            f"{len(sides[0])} cases to train on and {len(sides[1])} to validate on are too few",
            fix="add cases; training and validation need at least one each",
            code="E_DATASET",
        )
    return sides[0], sides[1]


def refuse_dataset(dataset: Path, failed: Mapping[str, str]) -> None:
    first = "; ".join(f"{case}: {reason}" for case, reason in list(failed.items())[:5])
    more = f"; and {len(failed) - 5} more" if len(failed) > 5 else ""
    raise VolsegError(
        f"{dataset}: {len(failed)} of its cases cannot be used: {first}{more}",
        fix="mend these files or take them out of the dataset; `volseg check` lists them all",
        code="E_DATASET",
    )


def load_prepared(
    folder: Path, recipe: Path | str | Recipe | None
) -> tuple[Recipe, Plan, DatasetFingerprint, list[PreparedCase]]:
    from volseg.plan import DatasetFingerprint, Plan

    try:
        header = json.loads((folder / PREPARED_FILE).read_text(encoding="utf-8"))
        own = parse_recipe(header["recipe"], where=str(folder / PREPARED_FILE))
        plan, fingerprint = (
            Plan.model_validate(header["plan"]),
            DatasetFingerprint.model_validate(header["fingerprint"]),
        )
    except (OSError, ValueError, KeyError) as error:
        raise VolsegError(
            f"{folder}: not a prepared folder ({error})", fix="run `volseg preprocess` again", code="E_PREPARED"
        ) from error
    chosen = own if recipe is None else as_recipe(recipe)
    if preparation_of(chosen) != preparation_of(own):
        raise VolsegError(
            f"{folder}: was prepared for recipe {own.name!r} with other [data], [preprocess] or [classify] settings",
            fix="run `volseg preprocess` with this recipe first",
            code="E_PREPARED",
        )
    stated = {name: getattr(chosen.train, name) for name in ("patch_shape", "batch_size")}
    plan = plan.model_copy(update={name: value for name, value in stated.items() if value != "auto"})
    chosen = plan.complete(chosen)
    cases = [read_prepared_case(folder / "cases", case_id) for case_id in header["cases"]]
    return chosen, plan, fingerprint, cases


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

"""`volseg train`: a dataset or a prepared folder → a model folder."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from volseg.errors import VolsegError
from volseg.evaluate.validation import ValidationRow, summary
from volseg.execute.cpu import keep_freed_memory
from volseg.io.files import make_folder, write_bytes_atomic
from volseg.io.prepared import PreparedCase, read_prepared_case
from volseg.postprocess.steps import make_steps
from volseg.recipe import Recipe, parse_recipe
from volseg.report.figures import comparison_png, curves_png, patches_png
from volseg.report.results import held
from volseg.report.tables import write_table
from volseg.workflows.batch import Progress, RunReport, silent
from volseg.workflows.planning import auto_recipe_of, budget_of, read_plan
from volseg.workflows.preparing import PREPARED_FILE, as_recipe, preparation_of, preprocess, refuse_dataset

if TYPE_CHECKING:  # torch takes seconds to import; only a workflow that needs it pays
    import torch

    from volseg.plan import DatasetFingerprint, Plan
    from volseg.train.loop import Trained

N_FOLDS = 5
PREVIEWED = 12  # patches in the picture of --preview
WORST = 6  # validation cases in validation.png
INTERRUPTED = "interrupted"
WORK_FOLDER = ".training"  # inside a model folder while it is being trained
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
    preview: bool = False,
    progress: Progress = silent,
) -> RunReport:
    """A dataset or a prepared folder → a model folder.

    Args:
        recipe: None leaves everything to the plan and cross-validates; a prepared folder brings its own, whose training settings another one
            may replace.
        plan: a JSON file of `volseg plan`, edited or not, in place of the one that follows from the dataset.
        time_budget_seconds: of the whole call, preparation, first pass and classifier included.
        memory: bytes that training may take, or text such as `8G`, where the plan chooses the size of the network and of its patches.
        epochs, patience: in place of the recipe's, and of those of its first pass.
        resume: go on from the last epoch of an interrupted run in `out`.
        init: a model folder whose weights to start from, where their names and shapes agree.
        freeze: patterns of the names of layers that stay as they are.
        fold: 0 to 4: validate on this fifth of the patients and train on the others, whatever the dataset's train and val.
        folds: train so many networks, each validated on its own share of the patients; the model is their ensemble.
        devices: processes that share each batch, with a device each.
        preview: only prepare the data and write `preview.png`, augmented patches with their masks.

    Raises:
        VolsegError: a case cannot be used (all of them are named), or the recipe does not fit the prepared folder.
    """
    started = time.monotonic()
    keep_freed_memory()
    from volseg.bundle import ROI, ModelBundle, load_bundle, save_bundle, segmentation_name
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
            wanted = auto_recipe_of(dataset, progress) if recipe is None else as_recipe(recipe)
            folds = folds or (N_FOLDS if recipe is None and fold is None else 1)
            report = preprocess(
                dataset,
                recipe=wanted,
                out=prepared,
                seed=seed,
                plan=None if plan is None else read_plan(plan),
                budget=budget_of(device, memory, None if time_budget_seconds is None else time_budget_seconds / folds),
                progress=progress,
            )
            if report.failed:
                refuse_dataset(dataset, report.failed)
            recipe = wanted
        chosen, used, fingerprint, cases = load_prepared(prepared, recipe, None if plan is None else read_plan(plan))
        make_steps(chosen.postprocess)  # a misspelt step should not be found out after an hour of training
        check_networks(chosen)
        folds = folds or 1
        if fold is not None and folds > 1:
            raise VolsegError("--fold and --folds exclude each other", fix="give one of them", code="E_USAGE")
        splits = [split_cases(cases, number, seed, folds) for number in range(folds)] if folds > 1 else []
        splits = splits or [split_cases(cases, fold, seed)]
        if preview:
            write_bytes_atomic(out / "preview.png", _preview(splits[0][0], chosen, used, seed))
            return RunReport(out=out, done=[chosen.name], details={"preview": str(out / "preview.png")})
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
            devices=devices,
            freeze=tuple(freeze),
        )
        initial = {} if init is None else load_bundle(Path(init)).weights
        weights: dict[str, Mapping[str, Any]] = {}
        metrics: dict[str, Any] = {}

        def show(stage: str, epoch: Epoch, done: float) -> None:
            progress(
                stage,
                done,
                f"epoch {epoch.epoch}, loss {epoch.loss:.3f}, validation Dice {epoch.validation_dice:.3f}, "
                f"{epoch.steps_per_second:.3g} steps/s, waiting {epoch.waiting_share:.0%}",
            )

        if chosen.roi is not None:  # first: it is soon done, and what is wrong with the data shows here as well
            first_pass = train_roi(
                *splits[0],
                chosen,
                used,
                replace(
                    settings,
                    epochs=epochs or chosen.roi.train.epochs,
                    patience=patience or chosen.roi.train.patience,
                    seconds=None if left is None else left * chosen.roi.time_share,
                    freeze=(),
                ),
                folder=work / ROI_FOLDER,
                resume=resume,
                initial=initial.get(ROI, {}),
                report=partial(show, "Training the first pass"),
            )
            weights[ROI] = first_pass.weights
            metrics = {f"roi_{name}": value for name, value in first_pass.metrics.items()}
            write_table(out / "history_roi.csv", Epoch, first_pass.history)
        trained: list[Trained] = []
        for number, (training, validation) in enumerate(splits):
            seconds = seconds_left(for_classifier)
            stage = "Training" if len(splits) == 1 else f"Training fold {number + 1} of {len(splits)}"
            found = train_segmentation(
                training,
                validation,
                chosen,
                used,
                replace(settings, seconds=None if seconds is None else seconds / (len(splits) - number)),
                checkpoints=_fold_folder(work, number, len(splits)),
                resume=resume,
                initial=initial.get("segmentation", {}),
                report=partial(show, stage),
            )
            trained.append(found)
            weights[segmentation_name(number)] = found.weights
            if found.stopped == INTERRUPTED:
                break
        rows = [replace(row, fold=number) for number, each in enumerate(trained) for row in each.validation]
        metrics = _metrics_of(trained, summary(rows, seed)) | metrics
        interrupted = trained[-1].stopped == INTERRUPTED
        if chosen.classify is not None and not interrupted:
            classifier, found_metrics = _train_classifier(
                *splits[0], chosen, settings.device, seed, seconds_left(), progress
            )
            metrics |= found_metrics
            if classifier is not None:
                weights["classifier"] = classifier
        histories = [each.history for each in trained]
        for number, history in enumerate(histories):
            write_table(out / f"history{'' if number == 0 else f'_{number}'}.csv", Epoch, history)
        write_bytes_atomic(out / "curves.png", curves_png(histories))
        if rows:
            write_table(out / "validation.csv", ValidationRow, rows)
            write_bytes_atomic(
                out / "validation.png", _worst_cases(rows, trained, splits, chosen, used, settings.device)
            )
        bundle = save_bundle(
            ModelBundle(recipe=chosen, plan=used, fingerprint=fingerprint, weights=weights, metrics=metrics), out
        )
        export_bundle(bundle, out)
    if not interrupted:
        shutil.rmtree(work, ignore_errors=True)
    details = {"metrics": dict(bundle.metrics), "sha256": bundle.sha256, "interrupted": interrupted}
    return RunReport(out=out, done=[chosen.name], details=details)


def _fold_folder(work: Path, number: int, n: int) -> Path:
    """Where the checkpoints of one of `n` networks are."""
    if n == 1:
        return work
    folder = work / f"fold_{number}"
    make_folder(folder)
    return folder


def _metrics_of(trained: Sequence[Trained], validated: Mapping[str, Any]) -> dict[str, Any]:
    """Of one network as they are; of several those of cross-validation, each case by the network that never saw it."""
    if len(trained) == 1:
        return dict(trained[0].metrics)
    found: dict[str, Any] = {"networks": len(trained), "steps": sum(each.metrics["steps"] for each in trained)}
    stopped = [each.stopped for each in trained if each.stopped]
    return found | dict(validated) | ({"stopped": "; ".join(stopped)} if stopped else {})


def _preview(training: Sequence[PreparedCase], recipe: Recipe, plan: Plan, seed: int) -> bytes:
    """The first batches of the training as the network will see them."""
    import torch

    from volseg.train.batches import Batches

    images, masks = [], []
    with Batches(training, recipe, plan, seed=seed, device=torch.device("cpu")) as batches:
        for step in range(-(-PREVIEWED // plan.batch_size)):
            for batch_images, batch_masks in batches.at(step):
                images += list(batch_images.numpy())
                masks += list(batch_masks.numpy())
    return patches_png(images[:PREVIEWED], masks[:PREVIEWED], plan.spacing_mm)


def _worst_cases(
    rows: Sequence[ValidationRow],
    trained: Sequence[Trained],
    splits: Sequence[tuple[Sequence[PreparedCase], Sequence[PreparedCase]]],
    recipe: Recipe,
    plan: Plan,
    device: torch.device,
) -> bytes:
    """A picture of the validation cases with the lowest mean Dice: reference and prediction outlined."""
    from volseg.models import build_segmentation, set_weights
    from volseg.train.validate import predicted_classes

    scores: dict[tuple[int, str], list[float]] = {}
    for row in rows:
        scores.setdefault((row.fold, row.case_id), []).append(1.0 if math.isnan(row.dice) else row.dice)
    worst = sorted(scores, key=lambda key: sum(scores[key]) / len(scores[key]))[:WORST]
    pictures = []
    for number, case_id in worst:
        case = next(case for case in splits[number][1] if case.id == case_id)
        network = set_weights(build_segmentation(recipe), trained[number].weights)
        found = predicted_classes(network, case, recipe, plan, device, overlap=recipe.infer.overlap)
        score = sum(scores[number, case_id]) / len(scores[number, case_id])
        pictures.append((f"{case_id}: Dice {score:.3f}", np.asarray(case.image[0]), np.asarray(case.mask), found))
    return comparison_png(pictures, plan.spacing_mm)


def _check_unfinished(out: Path, work: Path, resume: bool) -> None:
    unfinished = any(path.is_file() for path in work.glob("**/last.safetensors"))
    if (out / "model.json").exists() and not (resume and unfinished):
        raise VolsegError(
            f"{out}: holds a finished model", fix="give another --out, or delete it first", code="E_EXISTS"
        )
    if unfinished and not resume:
        raise VolsegError(
            f"{out}: holds an interrupted training run",
            fix="add --resume to go on, or delete the folder",
            code="E_EXISTS",
        )


def split_cases(
    cases: Sequence[PreparedCase], fold: int | None, seed: int, folds: int = N_FOLDS
) -> tuple[list[PreparedCase], list[PreparedCase]]:
    """Training and validation cases: the prepared split, or one of `folds` shares of the patients drawn with the seed."""
    if fold is None:
        sides = [[case for case in cases if case.record["split"] == side] for side in ("train", "val")]
    else:
        if not 0 <= fold < folds:
            raise VolsegError(f"fold {fold} does not exist", fix=f"give 0 to {folds - 1}", code="E_USAGE")
        patients = np.random.default_rng(seed).permutation(sorted({case.record["patient"] for case in cases}))
        held_out = set(patients[fold::folds].tolist())
        sides = [[case for case in cases if (case.record["patient"] in held_out) == out] for out in (False, True)]
    if not all(sides):
        raise VolsegError(
            f"{len(sides[0])} cases to train on and {len(sides[1])} to validate on are too few",
            fix="add cases; training and validation need at least one each",
            code="E_DATASET",
        )
    return sides[0], sides[1]


def load_prepared(
    folder: Path, recipe: Path | str | Recipe | None, changed: Plan | None = None
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
    if changed is not None:
        if (changed.spacing_mm, changed.windows) != (plan.spacing_mm, plan.windows):
            raise VolsegError(
                f"{folder}: was prepared with another spacing or other windows than those of the plan",
                fix="run `volseg preprocess` with this plan first, or train from the dataset",
                code="E_PLAN",
            )
        plan = changed
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

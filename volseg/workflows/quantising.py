"""`volseg quantise`: a model and the dataset that it was trained on → the same network in int8, and what that costs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from volseg.errors import VolsegError
from volseg.evaluate.overlap import dice
from volseg.execute.cpu import keep_freed_memory
from volseg.io.prepared import IGNORED, PreparedCase
from volseg.store.outputs import OutputFolder, delete_written
from volseg.workflows.batch import Progress, RunReport, silent
from volseg.workflows.prepared import load_prepared, split_cases
from volseg.workflows.preparing import PREPARED_FILE, preprocess, refuse_dataset

if TYPE_CHECKING:  # torch takes seconds to import; only a workflow that needs it pays
    from volseg.bundle import ModelBundle
    from volseg.infer.backends import Backend

WORK_FOLDER = ".quantising"  # inside the model folder while it is being quantised
PATCHES_PER_CASE = 2  # one on a label, one anywhere
TIMED_RUNS = 10


def quantise(
    model: Path | str,
    dataset: Path | str,
    *,
    cases: int = 30,
    seed: int = 0,
    progress: Progress = silent,
) -> RunReport:
    """Put an int8 copy of the segmentation network, or of each of an ensemble, into a model folder, with its validation Dice beside that of fp32.

    Half precision is measured in passing where the chip has it, for it may be as fast and cost less. Inference takes the int8 copy only where it is asked for. `model.json` stays as it is, and so does the hash of the model.

    Args:
        dataset: the one that the model was trained on, or the folder that `preprocess` made of it. Its training cases are
            looked at to find the ranges of the layers, its validation cases to find what int8 costs.
        cases: training cases to look at, at most.
        seed: of training: it decides which patients validate where the dataset does not.

    Raises:
        VolsegError: the dataset does not fit the model, or OpenVINO cannot take the network.
        EnvironmentProblem: openvino or nncf is not installed.
    """
    keep_freed_memory()
    from volseg.bundle import EXPORTED, load_bundle
    from volseg.infer.backends import convert, import_openvino, usual_batch_shape, write_exported
    from volseg.infer.quantise import import_nncf, in_each_precision
    from volseg.infer.quantise import quantise as quantise_network

    import_openvino()
    import_nncf()
    model, dataset = Path(model), Path(dataset)
    bundle = load_bundle(model)
    if bundle.recipe.data.regions_class_order is not None:
        raise VolsegError(
            f"{model}: its labels are regions, of which prepared cases know nothing, so what int8 costs cannot be measured",
            fix="use --precision fp32 or fp16",
            code="E_PRECISION",
        )
    work = model / WORK_FOLDER
    with OutputFolder(model, "quantise", inputs=[dataset]) as outputs:
        exported = [
            f"{EXPORTED}/{name}.int8.{end}"
            for name in bundle.members
            for end in ("xml", "bin", "json")
        ]
        outputs.refuse_foreign(exported)
        outputs.work_folder(WORK_FOLDER)
        training, validation = _prepared_cases(bundle, dataset, work / "prepared", seed, progress)
        shape = usual_batch_shape(bundle)
        looked_at = [
            training[round(index)]
            for index in np.linspace(0, len(training) - 1, min(cases, len(training)))
        ]
        progress("Quantising", 0.0, f"looking at {len(looked_at)} training cases")
        patches = _calibration_patches(looked_at, bundle, seed)
        networks = [
            quantise_network(convert(bundle.member(name), shape), patches)
            for name in bundle.members
        ]
        backends = in_each_precision(bundle, networks)
        scores: dict[str, list[list[float]]] = {name: [] for name in backends}
        for count, case in enumerate(validation, start=1):
            for name, backend in backends.items():
                scores[name].append(_case_dice(backend, case, bundle))
                backend.release()  # the others have networks of their own in memory
            progress("Validating", count / len(validation), case.id)
        found = {
            "calibration": {"cases": len(looked_at), "patches": len(patches), "seed": seed},
            "validation": {"cases": len(validation), "dice": _mean_dice(scores, bundle)},
            "seconds_per_patch": _seconds_per_patch(backends, patches[0]),
            "versions": {name: metadata.version(name) for name in ("openvino", "nncf")},
        }
        with outputs.staged() as commit:
            for name, network in zip(bundle.members, networks, strict=True):
                write_exported(
                    network, commit.folder, f"{name}.int8", {"model_sha256": bundle.sha256} | found
                )
            commit.finish()
        delete_written(work / "prepared")
        delete_written(work)
    return RunReport(out=model, done=[bundle.recipe.name], details=found)


def _prepared_cases(
    bundle: ModelBundle, dataset: Path, work: Path, seed: int, progress: Progress
) -> tuple[list[PreparedCase], list[PreparedCase]]:
    """Training and validation cases, prepared as the model's training prepared them."""
    if (dataset / PREPARED_FILE).is_file():
        prepared = dataset
    else:
        prepared = work
        report = preprocess(
            dataset,
            recipe=bundle.recipe,
            out=prepared,
            seed=seed,
            plan=bundle.plan,
            progress=progress,
        )
        if report.failed:
            refuse_dataset(dataset, report.failed)
    _, plan, _, cases = load_prepared(prepared, bundle.recipe)
    if (plan.spacing_mm, plan.windows) != (bundle.plan.spacing_mm, bundle.plan.windows):
        raise VolsegError(
            f"{dataset}: was prepared with another spacing or intensity window than model {bundle.recipe.name!r} was trained with",
            fix="give the dataset itself instead of a prepared folder",
            code="E_PREPARED",
        )
    try:
        return split_cases(cases, None, seed)
    except VolsegError as error:
        raise VolsegError(
            f"{dataset}: has too few cases to quantise with: at least one to train on and one to validate on are needed",
            fix="give the dataset that the model was trained on",
            code=error.code,
        ) from error


def _calibration_patches(
    cases: Sequence[PreparedCase], bundle: ModelBundle, seed: int
) -> list[np.ndarray]:
    """(1, channels, R, A, S) float32 each, cut as for training but not augmented."""
    from volseg.train.samples import sample_batch

    patches = []
    for number, case in enumerate(cases):
        images, _ = sample_batch(
            [case],
            bundle.plan.patch_shape,
            n=PATCHES_PER_CASE,
            foreground_fraction=1 / PATCHES_PER_CASE,
            seed=seed,
            step=number,
        )
        patches += list(images[:, None])
    return patches


def _case_dice(backend: Backend, case: PreparedCase, bundle: ModelBundle) -> list[float]:
    """Dice per label on the prepared grid; NaN for a label that neither mask has."""
    from volseg.infer.stream import Tiling, predict_logits

    case.check()
    infer = bundle.recipe.infer
    tiling = Tiling(
        patch_shape=bundle.plan.patch_shape, overlap=infer.overlap, batch_size=infer.batch_size
    )
    logits = predict_logits(
        np.asarray(case.image), backend, tiling, n_classes=1 + len(bundle.recipe.data.labels)
    )
    predicted = logits.argmax(axis=0)
    predicted[case.mask == IGNORED] = 0
    return [dice(case.mask, predicted, index) for index in range(1, len(logits))]


def _mean_dice(
    scores: Mapping[str, list[list[float]]], bundle: ModelBundle
) -> dict[str, dict[str, float | None]]:
    """Label → precision → mean over the validation cases that have the label or were given it by every precision; None without any."""
    arrays = {name: np.array(values) for name, values in scores.items()}
    known = ~np.any([np.isnan(values) for values in arrays.values()], axis=0)
    found = {}
    for index, label in enumerate(bundle.recipe.data.label_names.values()):
        chosen = known[:, index]
        found[label] = {
            name: round(float(values[chosen, index].mean()), 4) if chosen.any() else None
            for name, values in arrays.items()
        }
    return found


def _seconds_per_patch(backends: Mapping[str, Backend], patch: np.ndarray) -> dict[str, float]:
    """Median of alternating runs."""
    seconds: dict[str, list[float]] = {name: [] for name in backends}
    for _ in range(TIMED_RUNS):
        for name, backend in backends.items():
            started = time.perf_counter()
            backend.logits(patch)
            seconds[name].append(time.perf_counter() - started)
    return {name: round(float(np.median(values)), 5) for name, values in seconds.items()}

"""`volseg quantise`: add an int8 copy of the networks to a model, and measure what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from volseg.commands.prepared import load_prepared, split_cases
from volseg.commands.preparing import PREPARED_FILE, prepare_dataset
from volseg.commands.training_cases import refuse_dataset
from volseg.errors import VolsegError
from volseg.evaluation.overlap import dice
from volseg.execution.cpu import keep_freed_memory
from volseg.io.prepared import IGNORED, PreparedCase
from volseg.options import PreprocessOptions, Progress, QuantiseOptions, command
from volseg.reports import QuantiseReport
from volseg.store.outputs import OutputFolder, delete_written
from volseg.words import format_count

if TYPE_CHECKING:  # torch takes seconds to import; only a command that needs it pays
    from volseg.bundle import ModelBundle
    from volseg.inference.backend import Backend

WORK_FOLDER = ".quantising"  # inside the model folder while it is being quantised
PATCHES_PER_CASE = 2  # one on a label, one anywhere
MOST_CASES = 30  # that calibrate, unless another number is requested


@command(QuantiseOptions)
def quantise(options: QuantiseOptions) -> QuantiseReport:
    """Add int8 copies of the networks to a model folder; compare Dice or AUC with fp32.

    Half precision is measured too where the processor supports it, as it may be as fast and more
    accurate. Inference uses int8 only on request. `model.json` and the model's hash do not change.

    The training cases calibrate the ranges of the layers; the validation cases show what int8
    costs.

    Raises:
        VolsegError: the dataset does not fit the model, or OpenVINO does not support the network.
        EnvironmentProblem: openvino or nncf is not installed.

    Example:
        >>> import volseg
        >>> result = volseg.quantise("model", "dataset", cases=2)
        >>> sorted(result.seconds)
        ['fp32', 'int8']
    """
    keep_freed_memory()
    from volseg.bundle import exported_files, load_bundle
    from volseg.image_bundle import is_image_model
    from volseg.inference.export import batch_shape_of, convert
    from volseg.inference.openvino_backend import import_openvino
    from volseg.inference.quantise import (
        backends_by_precision,
        import_nncf,
        library_versions,
        quantise_network,
    )
    from volseg.training.validator import spread

    import_openvino()
    import_nncf()
    if is_image_model(options.model):
        from volseg.commands.image_quantising import quantise_images

        return quantise_images(options)
    model, dataset, seed = options.model, options.dataset, options.seed
    bundle = load_bundle(model)
    _refuse_regions(bundle, model)
    work = model / WORK_FOLDER
    with OutputFolder(model, "quantise", inputs=[dataset]) as outputs:
        outputs.check_overwrites(exported_files(bundle.segmentation_names, "int8"))
        outputs.work_folder(WORK_FOLDER)
        training, validation = _prepared_cases(bundle, work / "prepared", options)
        calibration = spread(training, options.cases or MOST_CASES)
        n = len(calibration)
        options.progress("Quantising", 0.0, f"calibrating on {format_count(n, 'training case')}")
        patches = _calibration_patches(calibration, bundle, seed)
        shape, names = batch_shape_of(bundle), bundle.segmentation_names
        models = (convert(bundle.segmentation_network(name), shape) for name in names)
        networks = [quantise_network(model, patches) for model in models]
        backends = backends_by_precision(bundle, networks)
        scores = _validation_dice(backends, validation, bundle, options.progress)
        facts = {
            "calibration": {"cases": n, "patches": len(patches), "seed": seed},
            "validation": {"cases": len(validation), "dice": _mean_dice(scores, bundle)},
            "seconds": _seconds_per_patch(backends, patches[0]),
            "versions": library_versions(),
        }
        record = {"model_sha256": bundle.sha256} | facts
        write_int8(outputs, dict(zip(names, networks, strict=True)), record)
        delete_written(work / "prepared")
        delete_written(work)
    return QuantiseReport(out=model, done=[bundle.recipe.name], **facts)


def write_int8(
    outputs: OutputFolder, networks: Mapping[str, Any], facts: Mapping[str, Any]
) -> None:
    """Write int8 networks (OpenVINO's), by name, and what is known of them into a model folder."""
    from volseg.inference.export import write_exported

    with outputs.staged() as commit:
        for name, network in networks.items():
            write_exported(network, commit.folder, f"{name}.int8", facts)
        commit.finish()


def _refuse_regions(bundle: ModelBundle, model: Path) -> None:
    if bundle.recipe.data.regions_class_order is not None:
        raise VolsegError(
            f"{model}: its labels are overlapping regions, for which int8 is not supported",
            fix="use --precision fp32 or fp16",
            code="E_PRECISION",
        )


def _prepared_cases(
    bundle: ModelBundle, work: Path, options: QuantiseOptions
) -> tuple[list[PreparedCase], list[PreparedCase]]:
    """Return training and validation cases, prepared as in the training of the model."""
    dataset, seed = options.dataset, options.seed
    if (dataset / PREPARED_FILE).is_file():
        prepared = dataset
    else:
        prepared = work
        settings = PreprocessOptions(
            dataset, recipe=bundle.recipe, out=prepared, seed=seed, progress=options.progress
        )
        report = prepare_dataset(settings)
        if report.failed:
            refuse_dataset(dataset, report.failed)
    _, _, cases = load_prepared(prepared, bundle.recipe)
    try:
        return split_cases(cases, None, seed)
    except VolsegError as error:
        raise VolsegError(
            f"{dataset}: quantising needs at least one training and one validation case",
            fix="give the dataset that the model was trained on",
            code=error.code,
        ) from error


def _calibration_patches(
    cases: Sequence[PreparedCase], bundle: ModelBundle, seed: int
) -> list[np.ndarray]:
    """Cut patches of (1, channels, R, A, S) float32 as in training, without augmentation."""
    from volseg.training.samples import Sampling, sample_batch

    patches = []
    sampling = Sampling(
        patch_shape=bundle.recipe.patch_shape,
        n=PATCHES_PER_CASE,
        foreground_fraction=1 / PATCHES_PER_CASE,
        seed=seed,
    )
    for number, case in enumerate(cases):
        images, _ = sample_batch([case], sampling, step=number)
        patches += list(images[:, None])
    return patches


def _validation_dice(
    backends: Mapping[str, Backend],
    cases: Sequence[PreparedCase],
    bundle: ModelBundle,
    progress: Progress,
) -> dict[str, list[list[float]]]:
    """Return precision → Dice of each case and label."""
    scores: dict[str, list[list[float]]] = {name: [] for name in backends}
    for count, case in enumerate(cases, start=1):
        for name, backend in backends.items():
            scores[name].append(_case_dice(backend, case, bundle))
            backend.release()  # only one network at a time keeps its memory
        progress("Validating", count / len(cases), case.id)
    return scores


def _case_dice(backend: Backend, case: PreparedCase, bundle: ModelBundle) -> list[float]:
    """Return the Dice of each label on the prepared grid; NaN if neither mask has the label."""
    from volseg.inference.stream import Tiling, predict_logits

    case.check()
    tiling = replace(Tiling.of(bundle.recipe), tta_axes=(), margin=0)
    n_classes = bundle.recipe.data.n_outputs
    logits = predict_logits(np.asarray(case.image), backend, tiling, n_classes=n_classes)
    predicted = logits.argmax(axis=0)
    predicted[case.mask == IGNORED] = 0
    return [dice(case.mask, predicted, index) for index in range(1, len(logits))]


def _mean_dice(
    scores: Mapping[str, list[list[float]]], bundle: ModelBundle
) -> dict[str, dict[str, float | None]]:
    """Return label → precision → mean Dice over the cases where every precision has a Dice.

    None for a label without such a case.
    """
    arrays = {name: np.array(values) for name, values in scores.items()}
    has_dice = ~np.any([np.isnan(values) for values in arrays.values()], axis=0)
    means = {}
    for index, label in enumerate(bundle.recipe.data.label_names.values()):
        cases = has_dice[:, index]
        means[label] = {
            name: round(float(values[cases, index].mean()), 4) if cases.any() else None
            for name, values in arrays.items()
        }
    return means


def _seconds_per_patch(backends: Mapping[str, Backend], patch: np.ndarray) -> dict[str, float]:
    """Return the median seconds of each backend over alternating runs."""
    from volseg.inference.quantise import median_seconds

    seconds = median_seconds(
        {name: partial(backend.logits, patch) for name, backend in backends.items()}
    )
    return {name: round(value, 5) for name, value in seconds.items()}

"""`volseg quantise` for a classifier of images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from volseg.bundle import exported_files
from volseg.commands.image_data import ImageDataset
from volseg.commands.loaded_images import LoadedImages, load_images
from volseg.commands.quantising import WORK_FOLDER, write_int8
from volseg.errors import VolsegError
from volseg.evaluation.classes import SCORES
from volseg.image_bundle import ImageBundle, load_image_bundle
from volseg.inference.image_predictor import (
    ImagePredictor,
    convert_embedding,
    embedding_shape,
    openvino_predictor,
)
from volseg.inference.images import judged_predictions
from volseg.inference.quantise import (
    by_precision,
    library_versions,
    median_seconds,
    quantise_network,
)
from volseg.io.files import make_folder
from volseg.io.prepared_images import CASES_FILE, PIXELS_FILE, ImageSet, has_prepared_images
from volseg.options import QuantiseOptions
from volseg.planning.images import ImageFingerprint
from volseg.recipe import ClassifyRecipe
from volseg.recipe.classification import NUMBER, SCAN
from volseg.reports import QuantiseReport
from volseg.store.outputs import OutputFolder, delete_written
from volseg.training.images import known_targets
from volseg.training.validator import spread
from volseg.words import format_count

MOST_IMAGES = 300  # that calibrate, unless another number is requested
MOST_TIMED = 8  # images in a batch that is timed: a batch of large ones takes many seconds
CHANGE = "largest_change"  # of a probability, or of a number in its own unit


def quantise_images(options: QuantiseOptions) -> QuantiseReport:
    """Add int8 copies of the networks of a classifier to its folder; compare scores with fp32.

    The head stays in fp32. The training images calibrate, the validation images judge; those of an
    ensemble are the validation images of a training without folds, so most of its networks have
    seen them.

    Raises:
        VolsegError: the dataset is not that of the model, or OpenVINO does not support the network.
    """
    model, dataset = options.model, options.dataset
    bundle = load_image_bundle(model)
    if bundle.recipe.data.input == SCAN:
        raise VolsegError(
            f"{model}: a model of scans cannot be quantised yet",
            fix="use --precision fp32, or fp16 on a GPU",
            code="E_PRECISION",
        )
    work = model / WORK_FOLDER
    with OutputFolder(model, "quantise", inputs=[dataset]) as outputs:
        outputs.check_overwrites(exported_files(bundle.network_names, "int8"))
        outputs.work_folder(WORK_FOLDER)
        images = _Images.of(bundle, work / "prepared", options)
        n = len(images.training)
        options.progress("Quantising", 0.0, f"calibrating on {format_count(n, 'training image')}")
        inputs = _network_inputs(images.training, bundle.recipe)
        fp32 = {
            name: convert_embedding(bundle, bundle.network(name)) for name in bundle.network_names
        }
        int8 = {name: quantise_network(network.clone(), inputs) for name, network in fp32.items()}
        predictors = by_precision(
            lambda precision: openvino_predictor(
                bundle, int8 if precision == "int8" else fp32, precision, MOST_TIMED
            )
        )
        facts: dict[str, Any] = {
            "calibration": {"images": n, "seed": options.seed},
            "validation": {
                "images": len(images.validation),
                "scores": _scores(predictors, images.validation, bundle, options),
            },
            "seconds": _seconds_per_image(predictors, images.validation),
            "versions": library_versions(),
        }
        write_int8(outputs, int8, {"model_sha256": bundle.sha256} | facts)
        delete_written(work / "prepared", lambda name: name in (PIXELS_FILE, CASES_FILE))
        delete_written(work)
    return QuantiseReport(out=model, done=[bundle.recipe.name], **facts)


@dataclass(frozen=True, slots=True, eq=False)
class _Images:
    """The images that calibrate, and those that show what int8 costs."""

    training: ImageSet
    validation: ImageSet

    @classmethod
    def of(cls, bundle: ImageBundle, work: Path, options: QuantiseOptions) -> _Images:
        """Load prepared images, or prepare those of the dataset that are needed.

        Raises:
            VolsegError: they are not those that the model was trained on.
        """
        most, folder = options.cases or MOST_IMAGES, options.dataset
        if not has_prepared_images(folder):
            dataset = ImageDataset(
                folder, bundle.recipe, seed=options.seed, progress=options.progress
            )
            planned = dataset.plan()
            _check_dataset(planned.closed.recipe, planned.fingerprint, bundle, options)
            of_split = {
                split: [case for case in planned.cases if planned.splits[case.id] == split]
                for split in ("train", "val")
            }
            cases = [*spread(of_split["train"], most), *of_split["val"]]
            make_folder(work)
            dataset.prepare(replace(planned, cases=cases), folder := work)
        data: LoadedImages = load_images(folder)
        _check_dataset(data.recipe, data.fingerprint, bundle, options)
        training = [n for n, case in enumerate(data.images.cases) if case.split == "train"]
        return cls(data.images.take(spread(training, most)), data.images.of_split("val"))


def _check_dataset(
    recipe: ClassifyRecipe,
    fingerprint: ImageFingerprint,
    bundle: ImageBundle,
    options: QuantiseOptions,
) -> None:
    """Refuse images that are not those of training, which would calibrate and judge wrongly."""
    if recipe.data != bundle.recipe.data or recipe.images != bundle.recipe.images:
        raise VolsegError(
            f"{options.dataset}: was prepared for other [data] or [images] settings than those of "
            f"{options.model}",
            fix="give the dataset itself, or prepare it with the recipe of the model",
            code="E_PREPARED",
        )
    if fingerprint != bundle.fingerprint:
        mine, its = fingerprint.n_images, bundle.fingerprint.n_images
        raise VolsegError(
            f"{options.dataset}: its training images ({mine}) are not those of {options.model} "
            f"({its}) with seed {options.seed}",
            fix="give the dataset that the model was trained on, and the --seed of its training",
            code="E_DATASET",
        )


def _network_inputs(images: ImageSet, recipe: ClassifyRecipe) -> list[np.ndarray]:
    """Return (1, channels, H, W) of each image or plane."""
    shape = (1, *embedding_shape(recipe)[1:])
    return [plane for image in images.pixels for plane in image.reshape(-1, *shape)]


def _scores(
    predictors: Mapping[str, ImagePredictor],
    images: ImageSet,
    bundle: ImageBundle,
    options: QuantiseOptions,
) -> dict[str, dict[str, float | None]]:
    """Return score → precision → value: what training monitored, and how much int8 changes."""
    recipe, judgement = bundle.recipe, bundle.judgement
    monitor = str(recipe.train.monitor)
    scores: dict[str, dict[str, float | None]] = {monitor: {}, CHANGE: {}}
    fusion = judgement.fusion
    measured = None if fusion is None else images.measurements(fusion.names)
    truth, exact = known_targets(images, recipe), np.zeros(0)
    for count, (name, predictor) in enumerate(predictors.items(), start=1):
        predicted = predictor.predict(images.pixels)
        predictor.release()  # only one network at a time keeps its memory
        values = judged_predictions(predicted.outputs, recipe.data, judgement, measured)
        exact = values if name == "fp32" else exact
        scores[monitor][name] = _score(monitor, values, truth, recipe)
        scores[CHANGE][name] = round(float(np.abs(values - exact).max()), 6)
        options.progress("Validating", count / len(predictors), name)
    return scores


def _score(
    name: str, values: np.ndarray, truth: np.ndarray, recipe: ClassifyRecipe
) -> float | None:
    values = values[:, 0] if recipe.data.kind == NUMBER else values
    score = SCORES[name](values, truth > 0 if truth.ndim == 2 else truth)
    return None if score is None else round(score, 6)


def _seconds_per_image(
    predictors: Mapping[str, ImagePredictor], images: ImageSet
) -> dict[str, float]:
    """Return the median seconds of each precision over alternating runs of a batch."""
    batch = images.pixels[np.arange(MOST_TIMED) % len(images)]
    seconds = median_seconds(
        {name: partial(predictor.predict, batch) for name, predictor in predictors.items()}
    )
    return {name: round(value / len(batch), 7) for name, value in seconds.items()}

"""A trained classifier as a folder: weights, recipe, judgement, a reference image, and a card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from volseg.bundle import (
    BEST_OF_RUN,
    DESCRIPTION,
    FORMAT_VERSION,
    UNSTATED,
    NetworkName,
    Sha256,
    StoredWeights,
    current_versions,
    read_description,
    reading_model,
    write_weights,
)
from volseg.errors import VolsegError
from volseg.evaluation.conformal import ConformalRule, OutlierModel
from volseg.evaluation.fusion import Fusion
from volseg.evaluation.operating import OperatingPoint
from volseg.io.files import make_folder, write_bytes_atomic, write_json_atomic
from volseg.networks import build_images, build_slices, copy_weights
from volseg.networks.image_network import ImageNetwork
from volseg.planning.close import Reason
from volseg.planning.images import ImageFingerprint
from volseg.recipe import ClassifyRecipe, Text, parse_image_recipe
from volseg.recipe.classification import LABELS, NUMBER, SCAN
from volseg.words import format_count, format_list

CLASSIFIER = "classifier"  # weights of the network; those of an ensemble are numbered
ENCODER = "slices"  # weights of the network that embeds the slices of scans, which is not trained
ARRAYS = "judgement"  # arrays of the judgement and the reference, beside the weights
SENSITIVITY_TO_KEEP = 0.99  # of the operating point from which a gate or a filter keeps
REFERENCE_TOLERANCE = 1e-3  # of a probability, or of a number in standard deviations


@dataclass(frozen=True, slots=True)
class Judgement:
    """What validation images say of the network's outputs.

    Args:
        temperature: divides the logits of classes.
        points: thresholds chosen on validation images.
        sets: which classes or labels a prediction leaves open; None for numbers.
        half_width: of the interval around a number; None for classes.
        coverage: of sets and intervals.
        outliers: which images are unlike those of training; None if there were too few.
        fusion: with measurements of the lesion, applied to the outputs before the temperature.
    """

    temperature: float = 1.0
    points: tuple[OperatingPoint, ...] = ()
    sets: ConformalRule | None = None
    half_width: float | None = None
    coverage: float = 0.9
    outliers: OutlierModel | None = None
    fusion: Fusion | None = None

    @property
    def stated_coverage(self) -> float | None:
        """Coverage of the sets or intervals; None if there were too few images for them."""
        has_none = self.sets is None and self.half_width is None
        return None if has_none else self.coverage


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """A validation image as network input, and the model's outputs for it.

    Args:
        image: (C, H, W), (planes, C, H, W) of a lesion, or (S, features + 1) of a scan.
    """

    case_id: str
    image: np.ndarray
    outputs: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class ImageBundle:
    """A trained classifier: all that inference needs besides the image.

    Args:
        recipe: closed: it holds no "auto".
        weights: `classifier`, `classifier_1`, … → tensors; several are an ensemble. Of scans,
            `slices` is the network that embeds their slices.
        metrics: results of training and validation.
    """

    recipe: ClassifyRecipe
    fingerprint: ImageFingerprint
    weights: Mapping[str, Mapping[str, torch.Tensor]]
    judgement: Judgement = Judgement()
    reference: Reference | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    reasons: tuple[Reason, ...] = ()
    sha256: str = ""

    @property
    def name(self) -> str:
        """Name of the recipe and start of the hash, for tables."""
        return f"{self.recipe.name}@{self.sha256[:12]}"

    @property
    def network_names(self) -> tuple[str, ...]:
        return tuple(name for name in self.weights if name not in (ARRAYS, ENCODER))

    def networks(self) -> tuple[ImageNetwork, ...]:
        """Return the networks with their trained weights; the outputs of several are averaged."""
        return tuple(map(self.network, self.network_names))

    def network(self, name: str) -> ImageNetwork:
        """Return one network with its trained weights; `name` is one of `network_names`."""
        network = build_images(self.recipe)
        copy_weights(network, self.weights[name])
        return network.eval()

    def slice_network(self) -> ImageNetwork:
        """Return the network that embeds the slices of scans."""
        network = build_slices(self.recipe)
        copy_weights(network, self.weights[ENCODER])
        return network.eval()


def classifier_name(index: int) -> str:
    """Return the name in `weights` of a network of the ensemble."""
    return CLASSIFIER if index == 0 else f"{CLASSIFIER}_{index}"


def save_image_bundle(bundle: ImageBundle, folder: Path) -> ImageBundle:
    """Write a bundle and return it with its hash; `model.json`, written last, makes it a model."""
    make_folder(folder)
    judgement = bundle.judgement
    arrays = {} if judgement.outliers is None else dict(judgement.outliers.arrays())
    if judgement.fusion is not None:
        arrays |= judgement.fusion.arrays()
    if bundle.reference is not None:
        arrays["reference.image"] = bundle.reference.image
        arrays["reference.outputs"] = bundle.reference.outputs
    weights = dict(bundle.weights)
    if arrays:
        weights[ARRAYS] = {name: torch.from_numpy(np.array(a)) for name, a in arrays.items()}
    hashes = write_weights(folder, weights)
    write_bytes_atomic(folder / "card.md", image_model_card(bundle).encode())
    sets = judgement.sets
    description = {
        "format_version": FORMAT_VERSION,
        "recipe": bundle.recipe.model_dump(mode="json"),
        "reasons": [line.model_dump() for line in bundle.reasons],
        "fingerprint": bundle.fingerprint.model_dump(mode="json"),
        "judgement": {
            "temperature": judgement.temperature,
            "points": list(map(asdict, judgement.points)),
            # A limit of 1 or more always leaves the class open.
            "set_limits": None if sets is None else [min(limit, 1.0) for limit in sets.quantile],
            "half_width": judgement.half_width,
            "coverage": judgement.coverage,
        },
        "reference": None if bundle.reference is None else bundle.reference.case_id,
        "metrics": dict(bundle.metrics),
        "versions": current_versions(),
        "weights_sha256": hashes,
    }
    write_json_atomic(folder / DESCRIPTION, description)
    return load_image_bundle(folder)


def load_image_bundle(folder: Path) -> ImageBundle:
    """Read and verify a bundle.

    Raises:
        VolsegError: not a bundle of a classifier, made by a newer volseg, or changed.
    """
    with reading_model(folder, _Description):
        content, digest = read_description(folder)
        if content["recipe"].get("task") != "classify":
            raise VolsegError(
                f"{folder}: is a model that segments scans, and one that classifies is needed",
                fix="give a model trained on images and classes",
                code="E_TASK",
            )
        description = _Description.model_validate(content)
        recipe = parse_image_recipe(description.recipe, where=str(folder / DESCRIPTION))
        if recipe.open_keys:
            raise ValueError(f"the recipe of a trained model leaves {recipe.open_keys} open")
        weights = StoredWeights(folder, description.weights_sha256)
        if recipe.data.input == SCAN and ENCODER not in weights:
            raise ValueError("a model of scans lacks the network that embeds their slices")
        arrays: Mapping[str, np.ndarray] = {}
        if ARRAYS in weights:
            arrays = {name: tensor.numpy() for name, tensor in weights[ARRAYS].items()}
        return ImageBundle(
            recipe=recipe,
            fingerprint=description.fingerprint,
            weights=weights,
            judgement=_judgement(description, arrays, recipe),
            reference=_reference(description.reference, arrays),
            metrics=description.metrics,
            versions=description.versions,
            reasons=description.reasons,
            sha256=digest,
        )


def is_image_model(folder: Path) -> bool:
    """Tell whether a folder holds the model of a classifier, of any version."""
    try:
        content, _ = read_description(folder)
    except (OSError, ValueError, VolsegError):
        return False
    return content["recipe"].get("task") == "classify"


def _judgement(
    description: _Description, arrays: Mapping[str, np.ndarray], recipe: ClassifyRecipe
) -> Judgement:
    has_labels = recipe.data.kind == LABELS
    stored = description.judgement
    sets = stored.set_limits
    return Judgement(
        temperature=stored.temperature,
        points=tuple(map(OperatingPoint.of_json, stored.points)),
        sets=None if sets is None else ConformalRule(sets, stored.coverage, has_labels),
        half_width=stored.half_width,
        coverage=stored.coverage,
        outliers=OutlierModel.of_arrays(arrays) if "outlier.centres" in arrays else None,
        fusion=None
        if recipe.fusion is None
        else Fusion.of_arrays(recipe.fusion.measurements, arrays),
    )


def _reference(case_id: str | None, arrays: Mapping[str, np.ndarray]) -> Reference | None:
    if case_id is None or "reference.image" not in arrays:
        return None
    return Reference(case_id, arrays["reference.image"], arrays["reference.outputs"])


class _Judgement(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    temperature: Annotated[float, Field(gt=0)]
    points: tuple[dict[str, Any], ...]
    set_limits: tuple[float, ...] | None
    half_width: float | None
    coverage: Annotated[float, Field(gt=0, lt=1)]


class _Description(BaseModel):
    """The content of model.json."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)
    format_version: Literal[2]
    recipe: dict[str, Any]
    reasons: tuple[Reason, ...] = ()
    fingerprint: ImageFingerprint
    judgement: _Judgement
    reference: str | None
    metrics: dict[str, Any]
    versions: dict[str, Text]
    weights_sha256: Annotated[dict[NetworkName, Sha256], Field(min_length=1, max_length=1000)]


def image_model_card(bundle: ImageBundle) -> str:
    """Return Markdown for people: intended use, limits, data, metrics and settings of a model."""
    recipe = bundle.recipe
    sections = {
        "Intended use": [recipe.intended_use or UNSTATED],
        "Limits": [recipe.limits or UNSTATED, "Not a medical device; for research only."],
        "Data": [recipe.data_source or UNSTATED, _training_data(bundle)],
        "Metrics": [_bullets(f"{name}: {_shown(value)}" for name, value in bundle.metrics.items())],
        "How sure it is": [_bullets(_judged(bundle))],
        "How it was made": [
            f"Network {recipe.network.name}, images of {recipe.images.pixels}² pixels, batch "
            f"{recipe.train.batch_size}; the whole recipe is in model.json."
        ],
    }
    sections["Metrics"].append(BEST_OF_RUN)
    if bundle.reasons:
        rows = [f"| {line.setting} | {line.value} | {line.reason} |" for line in bundle.reasons]
        table = ["| setting | value | why |", "|---|---|---|", *rows]
        sections["How it was made"].append("\n".join(table))
    paragraphs = [f"# {recipe.name}", recipe.description]
    for heading, texts in sections.items():
        paragraphs += [f"## {heading}", *texts]
    return "\n\n".join(paragraphs) + "\n"


def _training_data(bundle: ImageBundle) -> str:
    facts, data = bundle.fingerprint, bundle.recipe.data
    text = f"{format_count(facts.n_images, 'training image')} of "
    text += format_count(facts.n_patients, "patient")
    if data.kind == NUMBER:
        return f"{text}; {data.target}: mean {facts.mean:.4g}, standard deviation {facts.sd:.4g}."
    counts = format_list([f"{name} {n}" for name, n in facts.counts.items()], 20)
    return f"{text}; {data.target}: {counts}."


def _judged(bundle: ImageBundle) -> Iterator[str]:
    judgement = bundle.judgement
    if judgement.half_width is not None:
        yield (
            f"interval of {judgement.coverage:.0%} coverage on validation images: "
            f"± {judgement.half_width:.4g}"
        )
    if judgement.sets is not None:
        yield f"sets of classes with {judgement.coverage:.0%} coverage on validation images"
    if judgement.fusion is not None:
        names = ("image", *judgement.fusion.names)
        weights = zip(names, judgement.fusion.weights.tolist(), strict=True)
        shown = ", ".join(f"{name} {weight:+.3g}" for name, weight in weights)
        yield f"fusion with measurements; weights of the standardised inputs: {shown}"
    if judgement.temperature != 1:
        yield f"temperature of the logits: {judgement.temperature:.4g}"
    for point in judgement.points:
        yield (
            f"{point.class_name} from {point.threshold:.4g} ({point.name}): sensitivity "
            f"{point.sensitivity:.3f}, specificity {point.specificity:.3f} on validation images"
        )
    if judgement.outliers is not None:
        yield "images unlike those of training are marked `out_of_distribution`"


def _bullets(lines: Any) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

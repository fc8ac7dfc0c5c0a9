"""Close a recipe of a classifier: a value, with its reason, in place of each "auto"."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from volseg.planning.close import Reason
from volseg.recipe.classification import CLASSES, LABELS, NUMBER, SCAN, ClassifyRecipe
from volseg.recipe.images import PercentileImage, ScaleImage, UnitNormaliser, WindowImage
from volseg.recipe.section import AUTO
from volseg.words import format_list

LEAST_PIXELS, MOST_PIXELS = 16, 224
LESION_PIXELS = 64
PIXEL_STEP = 16  # of edges above 32 pixels
ENLARGED_PIXELS = 56  # public weights saw larger images, and their networks halve them 5 times
USUAL_BATCH, LEAST_BATCHES = 32, 8  # images; batches per epoch below which batches get smaller
USUAL_STEPS = 3000  # of a training from random weights
SCAN_STEPS, SCAN_RATE = 600, 1e-3  # of a network of embedded slices
FINE_TUNING_STEPS = 1000
LEAST_EPOCHS, MOST_EPOCHS = 15, 200
LEARNING_RATE, FINE_TUNING_RATE = 2e-3, 3e-4
BELOW_FAT_HU = -150.0  # darker intensities are of air or lung in CT, and of nothing elsewhere
IMBALANCED = 1.5  # images of the most frequent class per one of the rarest


class ImageFingerprint(BaseModel):
    """What the images of a dataset are, as far as planning needs it.

    Args:
        sizes: (height, width) of the training images, up to 1000 of them. channels: most of any.
        kind: of the target. counts: class or label → training images, in the order of the outputs.
        mean, sd: of a number.
        low, high: 0.5 and 99.5 percentile of the intensities of the training images.
        white: the intensity that is white in all of them; None if one does not say, or they differ.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    n_images: int
    n_patients: int
    n_validation: int
    sizes: tuple[tuple[int, int], ...]
    channels: int
    kind: str
    counts: dict[str, int] = {}
    mean: float | None = None
    sd: float | None = None
    low: float
    high: float
    white: float | None = None

    @property
    def median_edge(self) -> int:
        """Median of the longer edges, in pixels."""
        return int(np.median([max(size) for size in self.sizes]))

    @property
    def imbalance(self) -> float:
        """Images of the most frequent class per image of the rarest."""
        counts = [max(1, n) for n in self.counts.values()] or [1]
        return max(counts) / min(counts)


@dataclass(frozen=True, slots=True)
class SeenImages:
    """What is known of the images from which given weights were trained.

    Args:
        scaling: their mean and standard deviation. pixels: their edge as network input.
    """

    scaling: UnitNormaliser | None = None
    pixels: int | None = None


@dataclass(frozen=True, slots=True)
class ClosedImages:
    """A recipe without "auto", and the reason of each of its decisions."""

    recipe: ClassifyRecipe
    reasons: tuple[Reason, ...] = ()


def close_images(
    recipe: ClassifyRecipe,
    fingerprint: ImageFingerprint,
    *,
    seen: SeenImages | None = None,
) -> ClosedImages:
    """Return the recipe with a value, derived from the fingerprint, in place of each "auto".

    Args:
        seen: by the weights that the network starts from; None for random weights.
    """
    decisions = _decisions(recipe, fingerprint, seen)
    decisions["images.normalise"] = _normalise(fingerprint, seen.scaling if seen else None)
    content = recipe.model_dump()
    reasons = []
    for key in recipe.open_keys:
        value, reason = decisions[key]
        *sections, name = key.split(".")
        section = content
        for part in sections:
            section = section[part]
        section[name] = value
        if reason:  # else the setting does not apply to this target
            reasons.append(Reason(key=key, setting=key, value=_shown(value), reason=reason))
    return ClosedImages(ClassifyRecipe.model_validate(content), tuple(reasons))


def _decisions(
    recipe: ClassifyRecipe, facts: ImageFingerprint, seen: SeenImages | None
) -> dict[str, tuple[Any, str]]:
    batch, why_batch = _batch(facts)
    if recipe.train.batch_size != AUTO:
        batch = recipe.train.batch_size
    steps = math.ceil(facts.n_images / batch)
    epochs, why_epochs = _epochs(steps, _start_of(recipe, seen))
    pixels = _pixels(facts, recipe.data.input, seen)
    decisions: dict[str, tuple[Any, str]] = {
        "images.pixels": pixels,
        "images.channels": _channels(facts),
        "train.batch_size": (batch, why_batch),
        "train.steps_per_epoch": (steps, f"each of {facts.n_images} training images once"),
        "train.epochs": (epochs, why_epochs),
        "train.learning_rate": _learning_rate(_start_of(recipe, seen)),
        "train.balance": _balance(facts),
        "train.monitor": _monitor(facts),
        "train.loss.name": _loss(facts),
    }
    if recipe.network.settings.get("features") == AUTO:
        from volseg.networks.cnn_small import features_for

        edge = pixels[0] if recipe.images.pixels == AUTO else recipe.images.pixels
        reason = f"as many blocks as images of {edge}² pixels allow"
        decisions["network.features"] = (features_for(edge), reason)
    decisions["images.normalise.low"] = (facts.low, "0.5 percentile of the training images")
    decisions["images.normalise.high"] = (facts.high, "99.5 percentile of the training images")
    return decisions | _target(facts)


def _normalise(
    facts: ImageFingerprint, trained_on: UnitNormaliser | None
) -> tuple[dict[str, Any], str]:
    """Return how intensities are normalised: the same way for all images where they compare."""
    # A file of 16 bits that uses a small part of them does not mean their largest value by white.
    is_white = facts.white is not None and (facts.white <= 255 or facts.high >= facts.white / 4)
    method: UnitNormaliser
    if is_white:
        method, reason = ScaleImage(), f"every file states its white level, {facts.white:g}"
    elif facts.low < BELOW_FAT_HU:
        method = WindowImage(low=facts.low, high=facts.high)
        reason = "HU, from the 0.5 to the 99.5 percentile of the training images"
    else:
        method, reason = PercentileImage(), "the white level of the files is not known"
    if trained_on is not None:
        method = method.model_copy(update={"mean": trained_on.mean, "sd": trained_on.sd})
        reason += "; then mean and standard deviation as in the training of the weights"
    return method.model_dump(), reason


def _target(facts: ImageFingerprint) -> dict[str, tuple[Any, str]]:
    counts = format_list([f"{name} {n}" for name, n in facts.counts.items()], 10)
    decisions: dict[str, tuple[Any, str]] = {"data.kind": (facts.kind, _why_kind(facts))}
    if facts.kind == NUMBER:
        decisions["data.classes"] = ((), "")
        decisions["data.mean"] = (facts.mean, "of the training images")
        decisions["data.sd"] = (facts.sd, "of the training images")
    else:
        decisions["data.classes"] = (tuple(facts.counts), f"training images: {counts}")
        decisions["data.mean"] = (0.0, "")
        decisions["data.sd"] = (1.0, "")
    return decisions


def _why_kind(facts: ImageFingerprint) -> str:
    if facts.kind == NUMBER:
        return "numbers, not classes: fractions, or too many distinct values"
    if facts.kind == LABELS:
        return "several values per image, separated by |"
    return "one of a few values per image"


def _pixels(
    facts: ImageFingerprint, kind_of_input: str, seen: SeenImages | None
) -> tuple[int, str]:
    if seen and seen.pixels:
        return seen.pixels, "as in the training of the weights"
    if kind_of_input == "lesion":
        return LESION_PIXELS, "usual for the field of view of a lesion"
    edge = facts.median_edge
    if seen and edge < ENLARGED_PIXELS:
        reason = f"the images have {edge} and are enlarged: trained weights mostly saw larger ones"
        return ENLARGED_PIXELS, reason
    if edge <= 2 * PIXEL_STEP:
        return max(edge, LEAST_PIXELS), f"median longer edge of the images: {edge}"
    rounded = min(MOST_PIXELS, math.ceil(edge / PIXEL_STEP) * PIXEL_STEP)
    reason = f"median longer edge of the images ({edge}), up to {MOST_PIXELS}"
    return rounded, reason


def _channels(facts: ImageFingerprint) -> tuple[int, str]:
    if facts.channels > 1:
        return 3, "some images are in colour"
    return 1, "all images are grey"


def _batch(facts: ImageFingerprint) -> tuple[int, str]:
    batch = USUAL_BATCH
    while batch > 4 and facts.n_images / batch < LEAST_BATCHES:
        batch //= 2
    if batch == USUAL_BATCH:
        return batch, "usual"
    return (
        batch,
        f"gives {LEAST_BATCHES} or more batches per epoch of {facts.n_images} images",
    )


class _Start(Enum):
    """What training starts from: how many steps it takes, in words, and the learning rate."""

    RANDOM = (
        USUAL_STEPS,
        "from random weights",
        LEARNING_RATE,
        "usual for AdamW from random weights",
    )
    TRAINED = (
        FINE_TUNING_STEPS,
        "to fine-tune",
        FINE_TUNING_RATE,
        "small, because the network starts from trained weights",
    )
    EMBEDDED = (SCAN_STEPS, "on embedded slices", SCAN_RATE, "usual for AdamW on embedded slices")


def _start_of(recipe: ClassifyRecipe, seen: SeenImages | None) -> _Start:
    if recipe.data.input == SCAN:
        return _Start.EMBEDDED
    return _Start.RANDOM if seen is None else _Start.TRAINED


def _epochs(steps: int, start: _Start) -> tuple[int, str]:
    total, how, _, _ = start.value
    epochs = min(MOST_EPOCHS, max(LEAST_EPOCHS, round(total / steps)))
    bounds = f"but at least {LEAST_EPOCHS} and at most {MOST_EPOCHS} epochs"
    return epochs, f"about {total} steps {how}, {bounds}"


def _learning_rate(start: _Start) -> tuple[float, str]:
    return start.value[2:]


def _balance(facts: ImageFingerprint) -> tuple[str, str]:
    if facts.kind != CLASSES:
        return "none", "only mutually exclusive classes are balanced"
    ratio = f"{facts.imbalance:.1f} images of the most frequent class per one of the rarest"
    return ("weights" if facts.imbalance > IMBALANCED else "none"), ratio


def _monitor(facts: ImageFingerprint) -> tuple[str, str]:
    if facts.kind == NUMBER:
        return "mae", "mean absolute error, in the unit of the number"
    return "auc", "independent of threshold and class frequency"


def _loss(facts: ImageFingerprint) -> tuple[str, str]:
    if facts.kind == NUMBER:
        return "huber", "less sensitive to outliers than the squared error"
    if facts.kind == LABELS:
        return "binary_cross_entropy", "each label is predicted on its own"
    return "cross_entropy", "one class per image"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping) and "method" in value:
        return str(value["method"])
    if isinstance(value, Mapping | Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)

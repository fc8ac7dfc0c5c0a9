"""What model.json says of a model: its purpose, network, training and validation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from volseg.manuscript.facts import (
    Facts,
    Path,
    Sentence,
    Topic,
    clause,
    literal,
    sentence,
    value_at,
)
from volseg.manuscript.formats import show_score
from volseg.manuscript.of_data import (
    CASES,
    CLASSIFIES,
    FOLDS,
    IMPORTED,
    NUMBERS,
    PREPROCESSING,
    SEGMENTS,
)

MAX_LABELS = 8  # with a score in the text; of more, those with the lowest
DICE = "validation_dice_"
ABBREVIATIONS = {name: name.upper() for name in ("auc", "ece", "f1", "mae", "mse", "r2")}
# metrics of a classifier that are no scores on validation images
NO_SCORES = frozenset({"validation_images", "validation_ece_without_temperature"})


def sentences_of_model(facts: Facts) -> Iterator[Sentence]:
    """Yield the sentences on a model, whether their facts are known or not, in order."""
    yield from PURPOSE
    yield from CASES
    yield from PREPROCESSING
    yield from ARCHITECTURE
    yield from FITTING
    metrics = value_at(facts, ("model", "metrics"))
    if not isinstance(metrics, Mapping):
        return
    yield from _dice(metrics)
    yield sentence(
        clause(
            "These cases selected the weights, so they flatter the model",
            IMPORTED,
            needs=("metrics.best_epoch", "metrics.validation_cases"),
        ),
        items=(32,),
        topic=Topic.VALIDATION,
    )
    is_segmentation = value_at(facts, ("model", "recipe", "task")) == "segment"
    yield from _scores(metrics, segments=is_segmentation)


# ---- what a model is for: in the checklist alone

PURPOSE: tuple[Sentence, ...] = (
    sentence(clause("Deep learning: a network that segments scans", when=SEGMENTS), items=(1,)),
    sentence(
        clause(
            "Deep learning: a network that classifies images",
            when=CLASSIFIES | {"recipe.data.kind": "classes"},
        ),
        items=(1,),
    ),
    sentence(
        clause(
            "Deep learning: a network that labels images",
            when=CLASSIFIES | {"recipe.data.kind": "labels"},
        ),
        items=(1,),
    ),
    sentence(
        clause(
            "Deep learning: a network that predicts a number from images", when=CLASSIFIES | NUMBERS
        ),
        items=(1,),
    ),
    sentence("Intended use of the model: {recipe.intended_use}", items=(3,)),
    sentence("The model: {recipe.description}", items=(6,)),
    sentence("Limits of the model: {recipe.limits}", items=(40,)),
)

# ---- network and training

ARCHITECTURE: tuple[Sentence, ...] = (
    sentence(
        "The network is a convolutional neural network of the type {recipe.network.name}",
        " ({recipe.network:settings})",
        items=(22,),
        topic=Topic.TRAINING,
    ),
    sentence(
        "Channels of its input: {recipe.data.channels:list}", items=(22,), topic=Topic.TRAINING
    ),
    *(
        sentence(
            clause(
                "Channels of its input: {recipe.images.channels:number}",
                when={"recipe.data.input": kind},
            ),
            items=(22,),
            topic=Topic.TRAINING,
        )
        for kind in ("image", "slice", "scan")
    ),
    sentence(
        clause(
            "It embedded each slice and was not trained; a network of the type "
            "{recipe.sequence.name} was trained on all embedded slices of each scan",
            when={"recipe.data.input": "scan"},
        ),
        items=(22,),
        topic=Topic.TRAINING,
    ),
    sentence(
        clause(
            "A second network of the type {recipe.classify.network.name} scores each lesion by "
            "{recipe.classify.column} ({recipe.classify.classes:list}) from slices of "
            "{recipe.classify.field_of_view_mm:number} mm",
            "metrics.classifier",
        ),
        "; it was trained on {metrics.classifier_training_lesions:count} lesions",
        " and validated on {metrics.classifier_validation_lesions:count}",
        items=(22,),
        topic=Topic.TRAINING,
    ),
    sentence("Post-processing: {recipe.postprocess:steps}", items=(22,), topic=Topic.INFERENCE),
    sentence("The model was imported: {model.origin:pairs}", items=(24, 42), topic=Topic.TRAINING),
    sentence(
        "The network began with the weights of another model, except for "
        "{metrics.began_at_random}, which began at random",
        items=(24,),
        topic=Topic.TRAINING,
    ),
)

FITTING: tuple[Sentence, ...] = (
    sentence(
        clause("Training took {metrics.steps:count} steps", IMPORTED),
        clause(" in {history.epoch:count} epochs", FOLDS),
        " with batches of {train.batch_size:number}",
        clause(" patches of {train.patch_shape:sizes} voxels"),
        items=(25,),
        topic=Topic.TRAINING,
    ),
    sentence(
        clause(
            "Of the patches, {train.foreground_fraction:percent} were centred on a labelled voxel",
            IMPORTED,
        ),
        items=(10, 25),
        topic=Topic.TRAINING,
    ),
    sentence(
        clause(
            "The optimiser was {train.optimizer} with a learning rate of "
            "{train.learning_rate:number}",
            IMPORTED,
        ),
        " ({train.schedule} schedule)",
        ", weight decay {train.weight_decay:positive}",
        ", gradients clipped to a norm of {train.max_grad_norm:number}",
        ", gradients accumulated over {train.accumulate:several} batches",
        ", weights averaged exponentially with a decay of {train.ema_decay:positive}",
        items=(25,),
        topic=Topic.TRAINING,
    ),
    sentence(
        clause("The loss was {train.loss.overlap}", IMPORTED),
        " plus {train.loss.voxel}",
        items=(25,),
        topic=Topic.TRAINING,
    ),
    sentence("The loss was {train.loss.name}", items=(25,), topic=Topic.TRAINING),
    sentence(
        clause("Classes were balanced by weights in the loss", when={"train.balance": "weights"}),
        items=(25,),
        topic=Topic.TRAINING,
    ),
    sentence(
        clause("Classes were balanced by sampling", when={"train.balance": "sampling"}),
        items=(25,),
        topic=Topic.TRAINING,
    ),
    sentence(
        clause("Augmentation with its probabilities: {train.augment:augmentation}", IMPORTED),
        items=(25,),
        topic=Topic.TRAINING,
    ),
    sentence(
        clause("Training ended early: {metrics.stopped}", IMPORTED),
        items=(25,),
        topic=Topic.TRAINING,
    ),
    sentence(
        "Probabilities were calibrated by a temperature of {metrics.temperature:number}",
        items=(25,),
        topic=Topic.TRAINING,
    ),
    sentence(
        clause(
            "The weights are those after epoch {metrics.best_epoch:count}, which were best on "
            "the validation cases",
            IMPORTED,
        ),
        " by {train.monitor}",
        items=(26,),
        topic=Topic.TRAINING,
    ),
    sentence(
        clause(
            "Of each of {metrics.networks:count} folds the weights that were best on its "
            "validation cases were kept",
            IMPORTED,
        ),
        items=(26,),
        topic=Topic.TRAINING,
    ),
    sentence("The model is {model.weights_sha256:networks}", items=(27,), topic=Topic.TRAINING),
    sentence(
        clause(
            "It was trained with volseg {model.versions.volseg} and PyTorch {model.versions.torch}",
            IMPORTED,
        ),
        items=(23,),
        topic=Topic.TRAINING,
    ),
    sentence(
        clause(
            "It was imported with volseg {model.versions.volseg} and PyTorch "
            "{model.versions.torch}",
            needs=(IMPORTED,),
        ),
        items=(23,),
        topic=Topic.TRAINING,
    ),
    sentence(
        "Operating points chosen on validation images: {model.judgement.points:points}",
        items=(28,),
        topic=Topic.VALIDATION,
    ),
    sentence(
        "Intervals around predictions are ± {model.judgement.half_width:number}, with "
        "{model.judgement.coverage:percent} coverage on validation images",
        items=(29,),
        topic=Topic.VALIDATION,
    ),
    sentence(
        clause(
            "Confidence sets have {model.judgement.coverage:percent} coverage on validation images",
            needs=("model.judgement.set_limits",),
        ),
        items=(29,),
        topic=Topic.VALIDATION,
    ),
)


# ---- validation


def _dice(metrics: Mapping[str, Any]) -> Iterator[Sentence]:
    """Yield the validation Dice of each label, or of those with the lowest."""
    values = {name: value for name, value in metrics.items() if name.startswith(DICE)}
    names = [name for name, value in values.items() if show_score(value)]
    if len(names) > MAX_LABELS:
        names.sort(key=lambda name: values[name])
    for name in names[:MAX_LABELS]:
        value, ends, reason = (
            ("model", "metrics", key) for key in (name, f"{name}_95", f"no_{name}_95")
        )
        label = literal(name.removeprefix(DICE))
        yield sentence(
            clause(f"Mean Dice of {label} on the validation cases: {{value:score}}", value=value),
            clause(" (95 % interval {ends:interval})", ends=ends),
            clause(" (no interval: {reason})", reason=reason),
            items=(32, 28, 37),
            topic=Topic.VALIDATION,
        )
    with_interval = [name for name in names if f"{name}_95" in values]
    jackknife = "The 95 % intervals of the validation Dice come from a jackknife over patients"
    for name in with_interval[:1]:
        needs = (("model", "metrics", f"{name}_95"),)
        yield sentence(clause(jackknife, needs=needs), items=(29,), topic=Topic.VALIDATION)


def _scores(metrics: Mapping[str, Any], *, segments: bool) -> Iterator[Sentence]:
    """Yield the scores of classes or numbers in validation, and those of simple models."""
    what = "Classes of lesions in validation" if segments else "On the validation images"
    for prefix, heading, items in (
        ("validation_", what, (32, 28, 37)),
        ("baseline_", "Simple models on the same images", (28,)),
        ("nnunet_validation_dice_", "Foreground Dice that nnU-Net reported", (32, 28, 37)),
    ):
        names = [
            name
            for name, value in metrics.items()
            if name.startswith(prefix) and isinstance(value, float)
            if not name.startswith(DICE) and name not in NO_SCORES
        ]
        parts = [_score(name, prefix) for name in names]
        if parts:
            first = clause(f"{heading}: {parts[0][0]}", value=parts[0][1])
            more = (clause(f", {text}", value=path) for text, path in parts[1:])
            yield sentence(first, *more, items=items, topic=Topic.VALIDATION)


def _words(score: str) -> str:
    """Return the name of a score for readers."""
    words = (ABBREVIATIONS.get(word, word) for word in score.split("_"))
    return literal(" ".join(words))


def _score(name: str, prefix: str) -> tuple[str, Path]:
    """Return the template of a score, and its path."""
    return f"{_words(name.removeprefix(prefix))} {{value:score}}", ("model", "metrics", name)

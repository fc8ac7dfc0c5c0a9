"""What run.json says of results, and summary.json of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from volseg.manuscript.facts import (
    Clause,
    Facts,
    Path,
    Sentence,
    Topic,
    clause,
    literal,
    sentence,
    value_at,
)

MAX_ENTRIES = 8  # labels or classes with metrics in the text; of more labels, the lowest Dice
INFERS, MEASURES = {"run.command": "infer"}, {"run.command": "measure"}
IMAGES = INFERS | {"run.task": "classify"}
DIGEST: Path = ("files", "model.json")  # its SHA-256
# Columns of lesions.csv whose definitions the text cites.
DEFINED = (
    "volume_mm3",
    "intensity_mean",
    "long_axis_mm",
    "short_axis_mm",
    "max3d_diameter_mm",
    "surface_area_mm2",
    "sphericity",
)
OF_LABELS = (  # metric in summary.json → its name and unit
    ("dice", "Dice", ""),
    ("iou", "IoU", ""),
    ("hd95_mm", "HD95", " mm"),
    ("mean_surface_distance_mm", "mean surface distance", " mm"),
    ("volume_error_percent", "volume error", " %"),
)
OF_LESIONS = (
    ("sensitivity", "sensitivity"),
    ("precision", "precision"),
    ("f1", "F1"),
    ("false_positives_per_scan", "false positives per scan"),
)
OF_CLASSES = (("sensitivity", "sensitivity"), ("specificity", "specificity"), ("auc", "AUC"))
OF_TABLES = (  # average and metric in summary.json → its name
    ("macro", "auc", "AUC"),
    ("macro", "average_precision", "average precision"),
    ("overall", "accuracy", "accuracy"),
    ("overall", "balanced_accuracy", "balanced accuracy"),
    ("macro", "f1", "F1"),
    ("overall", "brier", "Brier score"),
    ("overall", "ece", "calibration error"),
    ("overall", "mae", "mean absolute error"),
    ("overall", "rmse", "root mean square error"),
    ("overall", "bias", "bias"),
    ("overall", "r2", "coefficient of determination"),
)


def sentences_of_run(facts: Facts) -> Iterator[Sentence]:
    """Yield the sentences on inference and measurement, in the order of the text."""
    yield from TILING
    yield from _measurement(facts)
    yield from OUTCOME


def sentences_of_evaluation(facts: Facts) -> Iterator[Sentence]:
    """Yield the sentences on an evaluation, in the order of the text."""
    yield from COMPARED
    labels = value_at(facts, ("evaluation", "labels"))
    if isinstance(labels, Mapping):
        yield from _of_masks(labels)
    metrics = value_at(facts, ("evaluation", "metrics"))
    if isinstance(metrics, Mapping):
        yield from _of_tables(facts)
    yield from ERRORS


SUBJECT: tuple[Sentence, ...] = (
    sentence(
        clause(
            "Scans were segmented with volseg {run.volseg} and its model {run.model}",
            "run.task",
            when=INFERS,
        ),
        items=(43,),
        topic=Topic.DATA,
    ),
    sentence(
        clause(
            "Images were classified with volseg {run.volseg} and its model {run.model}",
            when=IMAGES | {"run.data.kind": "classes"},
        ),
        items=(43,),
        topic=Topic.DATA,
    ),
    sentence(
        clause(
            "Images were labelled with volseg {run.volseg} and its model {run.model}",
            when=IMAGES | {"run.data.kind": "labels"},
        ),
        items=(43,),
        topic=Topic.DATA,
    ),
    sentence(
        clause(
            "The number {run.target} was predicted from images with volseg {run.volseg} and "
            "its model {run.model}",
            when=IMAGES | {"run.data.kind": "number"},
        ),
        items=(43,),
        topic=Topic.DATA,
    ),
    sentence(
        clause("Lesions in existing masks were measured with volseg {run.volseg}", when=MEASURES),
        items=(43,),
        topic=Topic.DATA,
    ),
    sentence(clause("The model is {recipe.name}", "run.command"), items=(43,), topic=Topic.DATA),
    sentence(
        clause("The SHA-256 of its description is {digest}", digest=DIGEST),
        items=(43,),
        topic=Topic.DATA,
    ),
    sentence(
        clause("The SHA-256 of its description is {run.options.model_sha256}", "model.recipe"),
        items=(43,),
        topic=Topic.DATA,
    ),
    sentence(
        clause(
            "The model was trained on {run.model_box.training_cases:count} scans", "model.recipe"
        ),
        " and validated on {run.model_box.validation_cases:count} others",
        items=(19,),
        topic=Topic.DATA,
    ),
    sentence(
        clause("Intended use of the model: {run.model_box.intended_use}", "model.recipe"),
        items=(3,),
    ),
    sentence(clause("Limits of the model: {run.model_box.limits}", "model.recipe"), items=(40,)),
    sentence(
        "Each scan was compared with the training scans: {run.model_box.checks:sentences}",
        items=(8,),
    ),
)

TILING: tuple[Sentence, ...] = (
    sentence("Libraries of the run: {run.libraries:pairs}", items=(23,), topic=Topic.INFERENCE),
    sentence(
        "The network ran with {run.options.backend} in {run.options.precision}",
        items=(23,),
        topic=Topic.INFERENCE,
    ),
    sentence(
        "Inference ran on tiles that overlap by {run.settings.overlap:percent}",
        items=(22,),
        topic=Topic.INFERENCE,
    ),
    sentence(
        clause(
            "Inference ran on tiles that overlap by {recipe.infer.overlap:percent}",
            "run.settings.overlap",
            needs=("run.command",),
        ),
        items=(22,),
        topic=Topic.INFERENCE,
    ),
    sentence(
        clause(
            "Inference takes tiles that overlap by {recipe.infer.overlap:percent}, unless a run "
            "states another overlap",
            "run.command",
        ),
        items=(22,),
        topic=Topic.INFERENCE,
    ),
    sentence(
        clause("No test-time augmentation was used", when={"run.settings.tta": False}),
        items=(27,),
        topic=Topic.INFERENCE,
    ),
    sentence(
        clause(
            "Outputs were averaged over copies flipped along {recipe.infer.tta_axes:list}",
            "run.settings.tta",
            needs=("run.command",),
        ),
        items=(27,),
        topic=Topic.INFERENCE,
    ),
    sentence(
        clause(
            "Inference averages outputs over copies flipped along {recipe.infer.tta_axes:list}, "
            "unless a run turns that off",
            "run.command",
        ),
        items=(27,),
        topic=Topic.INFERENCE,
    ),
    sentence(
        clause("Scans were resampled linearly", when={"run.settings.fast": True}),
        items=(9,),
        topic=Topic.INFERENCE,
    ),
)

OUTCOME: tuple[Sentence, ...] = (
    sentence(
        "Scans that the last run completed: {run.done+run.kept:count}",
        clause("; none failed", when={"run.failed": {}}),
        "; {run.failed:some} could not be used, and their rows give the reason",
        items=(35, 12),
        topic=Topic.INFERENCE,
    ),
    sentence("The table holds {run.images:count} images", items=(35,), topic=Topic.INFERENCE),
    sentence(
        "The whole recipe is in model.json; the SHA-256 of its content is {run.recipe_sha256}",
        items=(42,),
    ),
    sentence(
        clause(
            "The whole recipe and the reasons for its settings are in {recipe.name}/model.json",
            "run.recipe_sha256",
        ),
        items=(42,),
    ),
)

COMPARED: tuple[Sentence, ...] = (
    sentence(
        "The predictions of {evaluation.n_cases:count} cases of {evaluation.n_patients:count} "
        "patients were compared with the reference",
        items=(35,),
        topic=Topic.EVALUATION,
    ),
    sentence(
        "Cases that could not be evaluated: "
        "{evaluation.failed+evaluation.not_predicted+evaluation.not_in_reference:count}",
        items=(35,),
        topic=Topic.EVALUATION,
    ),
    sentence("Patients of the evaluation: {evaluation.patients}", items=(20,)),
    sentence(
        "Warnings of the evaluation: {evaluation.warnings:sentences}",
        items=(40,),
        topic=Topic.EVALUATION,
    ),
    sentence(
        clause(
            "The 95 % intervals of means come from a jackknife over patients, and from the "
            "binomial distribution (Clopper and Pearson) where all patients are at one end of the "
            "range",
            needs=("evaluation.mean_dice_95",),
        ),
        items=(29,),
        topic=Topic.EVALUATION,
    ),
    sentence(
        clause("Means have no interval: {evaluation.no_mean_dice_95}"),
        items=(29,),
        topic=Topic.EVALUATION,
    ),
)

ERRORS: tuple[Sentence, ...] = (
    sentence(
        "Subgroups were evaluated by {evaluation.settings.by:list}",
        items=(30,),
        topic=Topic.EVALUATION,
    ),
    sentence(
        "Of {evaluation.out_of_distribution.n:count} images, "
        "{evaluation.out_of_distribution.n_flagged:count} were marked as unlike the training "
        "images",
        items=(30,),
        topic=Topic.EVALUATION,
    ),
    sentence("In validation, {metrics.doubtful_labels:count} classes looked wrong", items=(39,)),
)


# ---- measurement


def _measurement(facts: Facts) -> Iterator[Sentence]:
    """Yield what was measured and how, for results on scans."""
    neighbours = (
        "Lesions are connected components of a label ({run.connectivity:number} neighbours)"
    )
    structures = "Each value of a mask was measured as one structure"
    yield sentence(neighbours, items=(42,), topic=Topic.INFERENCE)
    by_label = clause(structures, when={"run.options.objects": "labels"})
    yield sentence(by_label, items=(42,), topic=Topic.INFERENCE)
    if value_at(facts, ("run", "command")) and value_at(facts, ("run", "task")) is None:
        yield _definitions()
    for settings in ("run.measure", "run.options.measure"):
        yield from _measure_settings(settings)


def _definitions() -> Sentence:
    """Return the sentence that cites the sources of the main columns."""
    start = "Measured on the grid and the intensities of the scan, with definitions from: "
    parts = [
        clause(f"{start if name == DEFINED[0] else ', '}{name} ({{source}})", source=_source(name))
        for name in DEFINED
    ]
    return Sentence(clauses=tuple(parts), items=(42,), topic=Topic.INFERENCE)


def _source(column: str) -> Path:
    return ("columns", "lesions.csv", column, "source")


def _measure_settings(settings: str) -> Iterator[Sentence]:
    """Yield what the settings of the measurement say, under the key that has them."""
    diameters = (
        "The sum of diameters takes at most {@.max_targets:number} lesions, "
        "{@.max_targets_per_label:number} per label"
    )
    nodes = "Lymph nodes, measured along their short axis: {@.lymph_nodes:list}"
    burden = "The burden is the fraction of {@.organ} that is lesion"
    for text in (diameters, nodes, burden):
        yield sentence(text.replace("@", settings), items=(42,), topic=Topic.INFERENCE)
    calcium = "Calcium was scored from {@.calcium_threshold_hu:number} HU"
    scored = clause(calcium.replace("@", settings), when={f"{settings}.calcium": True})
    yield sentence(scored, items=(42,), topic=Topic.INFERENCE)


# ---- evaluation


def _of_masks(labels: Mapping[str, Any]) -> Iterator[Sentence]:
    """Yield the results for each label, or for the labels with the lowest Dice."""
    values = [value for value, entry in labels.items() if isinstance(entry, Mapping)]
    if len(values) > MAX_ENTRIES:
        values.sort(key=lambda value: _number(labels[value].get("mean_dice")))
    if len(values) > 1:
        mean, ends = ("evaluation", "mean_dice"), ("evaluation", "mean_dice_95")
        parts = _with_interval("The mean Dice over labels was", mean, ends)
        yield Sentence(clauses=parts, items=(37, 28), topic=Topic.EVALUATION)
    for value in values[:MAX_ENTRIES]:
        root: Path = ("evaluation", "labels", value)
        yield from (_metrics_of(root), _agreement_of(root), _detection_of(root), _errors_of(root))
    least = clause("A lesion counts as detected from an IoU of {evaluation.min_iou:positive}")
    shared = clause(
        "A lesion counts as detected if one voxel is shared", when={"evaluation.min_iou": 0}
    )
    for rule in (least, shared):
        yield Sentence(clauses=(rule,), items=(38, 28), topic=Topic.EVALUATION)


def _number(value: Any) -> float:
    """Return a Dice by which labels are ordered; unknown ones come last."""
    return float(value) if isinstance(value, int | float) else 2.0


def _with_interval(
    text: str, value: Path, ends: Path, *, unit: str = "", **paths: Path
) -> tuple[Clause, Clause]:
    """Return the clauses of a value, after some text, and of its interval, if it has one."""
    return (
        Clause(text=f"{text} {{value:score}}{unit}", paths={"value": value, **paths}),
        clause(f" (95 % interval {{ends:interval}}{unit})", ends=ends),
    )


def _metrics_of(root: Path) -> Sentence:
    """Return the means of a label's metrics."""
    parts: list[Clause] = []
    for metric, title, unit in OF_LABELS:
        at, text = (
            (*root, "metrics", metric),
            f"; {title}" if parts else f"Label {{name}}: mean {title}",
        )
        name = {} if parts else {"name": (*root, "name")}
        parts += _with_interval(text, (*at, "mean"), (*at, "mean_95"), unit=unit, **name)
    return Sentence(clauses=tuple(parts), items=(37, 28), topic=Topic.EVALUATION)


def _agreement_of(root: Path) -> Sentence:
    """Return the agreement of a label's volumes."""
    at, name = (*root, "volume_agreement_ml"), (*root, "name")
    bias = _with_interval(
        "Label {name}: bias of the volume", (*at, "bias"), (*at, "bias_95"), unit=" mL", name=name
    )
    limits = "; limits of agreement {low:score} to {high:score} mL"
    ends = clause(limits, low=(*at, "lower_limit"), high=(*at, "upper_limit"))
    return Sentence(clauses=(*bias, ends), items=(37, 28), topic=Topic.EVALUATION)


def _detection_of(root: Path) -> Sentence:
    """Return how many lesions of a label were detected."""
    at = (*root, "detection")
    counts = {"name": (*root, "name"), "n": (*at, "n_reference"), "m": (*at, "n_matched")}
    parts = [
        Clause(text="Label {name}: {m:count} of {n:count} lesions were detected", paths=counts)
    ]
    for metric, title in OF_LESIONS:
        parts += _with_interval(f"; {title}", (*at, metric, "mean"), (*at, metric, "mean_95"))
    return Sentence(clauses=tuple(parts), items=(38, 28), topic=Topic.EVALUATION)


def _errors_of(root: Path) -> Sentence:
    """Return in how many cases only one of the two masks has a label."""
    text = (
        "Label {name}: {missed:count} cases have it in the reference alone, {false:count} in the "
        "prediction alone"
    )
    paths = {"name": (*root, "name"), "missed": (*root, "n_missed"), "false": (*root, "n_false")}
    return sentence(Clause(text=text, paths=paths), items=(39,), topic=Topic.EVALUATION)


def _of_tables(facts: Facts) -> Iterator[Sentence]:
    """Yield the metrics of predicted classes or numbers."""
    resampled = "The 95 % intervals come from a bootstrap over patients"
    for average, metric, title in OF_TABLES:
        at = ("evaluation", "metrics", average, metric)
        if resampled and value_at(facts, (*at, "value_95")):
            needs = (".".join((*at, "value_95")),)
            yield sentence(clause(resampled, needs=needs), items=(29,), topic=Topic.EVALUATION)
            resampled = ""
        parts = _with_interval(f"The {title} was", (*at, "value"), (*at, "value_95"))
        yield Sentence(clauses=parts, items=(37, 28), topic=Topic.EVALUATION)
    classes = value_at(facts, ("evaluation", "metrics_by_class"))
    for name in list(classes)[:MAX_ENTRIES] if isinstance(classes, Mapping) else ():
        yield _class_of(name)


def _class_of(name: str) -> Sentence:
    """Return the metrics of a class."""
    root, parts = ("evaluation", "metrics_by_class", name), list[Clause]()
    for metric, title in OF_CLASSES:
        text = f"; {title}" if parts else f"Class {literal(name)}: {title}"
        at = (*root, metric)
        parts += _with_interval(text, (*at, "value"), (*at, "value_95"))
    return Sentence(clauses=tuple(parts), items=(38, 28), topic=Topic.EVALUATION)

"""What a report says of one classified image, or of a number predicted from one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from volseg.manuscript.case_report import (
    CaseReport,
    Cell,
    FactTable,
    Line,
    Section,
    cell_of,
    joined,
    lines_of,
    made_with,
    purpose,
    statement,
    table_of,
    title_of,
    words,
)
from volseg.manuscript.facts import (
    Clause,
    Facts,
    Part,
    Path,
    Sentence,
    Statement,
    clause,
    key_of,
    sentence,
    state,
    value_at,
)
from volseg.manuscript.formats import clean
from volseg.manuscript.of_scans import without_paths

MOST_CLASSES, MOST_POINTS = 20, 12  # listed; the most probable classes of more
UNUSUAL: Path = ("image", "out_of_distribution")


def image_report(facts: Facts) -> CaseReport:
    """Return the text of the report of an image.

    Args:
        facts: `image` is its row of classes.csv or values.csv, with a column per class; `run`,
            `model` and `evaluation` if known.
    """
    model = purpose(facts, "image")
    evaluated = [*state(facts, EVALUATED)]
    if evaluated:
        model = replace(model, lines=(*model.lines, Line(joined(evaluated), "Evaluation")))
    about = [model]
    is_done = value_at(facts, ("image", "status")) == "done"
    if is_done:
        about.append(Section("Compared with the training data", tuple(_comparison(facts))))
    return CaseReport(
        title=title_of(facts, "image", "image"),
        made_with=made_with(facts, "image"),
        findings=_found(facts) if is_done else Section("Findings", tuple(_failure(facts))),
        about=tuple(section for section in about if section.lines),
    )


def _measured(title: str, average: str, metric: str) -> Sentence:
    """Return a metric of an evaluation, with its interval."""
    at = ("evaluation", "metrics", average, metric)
    return sentence(
        clause(f"{title}: {{value:score}}", value=(*at, "value")),
        clause(" (95 % interval {ends:interval})", ends=(*at, "value_95")),
    )


EVALUATED = (
    sentence("Evaluated on {evaluation.n_cases:count} images"),
    _measured("AUC", "macro", "auc"),
    _measured("Balanced accuracy", "overall", "balanced_accuracy"),
    _measured("Mean absolute error", "overall", "mae"),
)


def _failure(facts: Facts) -> Iterator[Line]:
    key = key_of(facts, ("image", "status"))
    yield words("This image has no result, so nothing can be said about it.", key)
    reason = without_paths(clean(str(value_at(facts, ("image", "error")) or "")))
    if reason:
        yield Line(statement(Part(reason, (key_of(facts, ("image", "error")),))), "Reason")


def _found(facts: Facts) -> Section:
    lines = [*lines_of(facts, PREDICTED)]
    if not lines:
        lines.append(words("No label was predicted.", key_of(facts, ("image", "class_name"))))
    lines += _certainty(facts)
    return Section("Findings", tuple(lines), _table(facts), tuple(_points(facts)))


COVERED = " (coverage {run.coverage:percent} on validation images)"
PREDICTED = (
    sentence(
        "{run.target}: {image.class_name:names}",
        ", probability {image.class_probability:score}",
    ),
    sentence(
        "{run.target}: {image.value:short}",
        f", between {{image.value_low:short}} and {{image.value_high:short}}{COVERED}",
    ),
)
CONFIDENCE_SET = sentence(f"Classes that remain possible: {{image.confidence_set:names}}{COVERED}")
NO_LABEL_LEFT = sentence(f"No label remains possible{COVERED}")


def _certainty(facts: Facts) -> Iterator[Line]:
    """Yield the confidence set and whether the image is unlike those of training."""
    if "value" not in facts["image"].content:
        sets = [*lines_of(facts, [CONFIDENCE_SET])] or [*lines_of(facts, [NO_LABEL_LEFT])]
        yield from sets or [words("The model states no confidence set for this image.")]
    unusual, key = value_at(facts, UNUSUAL), key_of(facts, UNUSUAL)
    if unusual is None:
        yield words("Whether the image is like those of training is not known.", key)
    elif unusual:
        yield words("The image is unlike those of training: do not rely on this prediction.", key)
    else:
        yield words("The image does not stand out from those of training.", key)


def _table(facts: Facts) -> FactTable | None:
    """Return the probability of each class, the most probable first."""
    content = facts["image"].content
    names = [name for name in content if name.startswith(PROBABILITY) and content[name] is not None]
    names.sort(key=lambda name: -content[name])
    names = names[:MOST_CLASSES]
    counts = value_at(facts, ("model", "fingerprint", "counts"))
    classes = [name.removeprefix(PROBABILITY) for name in names]
    keys = [(key_of(facts, ("image", name)),) for name in names]
    columns: list[tuple[str, list[Cell]]] = [
        ("Class", [(Part(clean(name), key),) for name, key in zip(classes, keys, strict=True)]),
        ("Probability", [cell_of(facts, "{p:score}", p=("image", name)) for name in names]),
    ]
    if isinstance(counts, Mapping):
        at: Path = ("model", "fingerprint", "counts")
        trained = [cell_of(facts, "{n:count}", n=(*at, name)) for name in classes]
        columns.append(("Training images", trained))
    return table_of(columns)


PROBABILITY = "probability_"


def _points(facts: Facts) -> Iterator[Line]:
    """Yield, for each operating point, on which side of it the image lies."""
    points = value_at(facts, ("run", "operating_points"))
    for index, point in enumerate(points[:MOST_POINTS] if isinstance(points, list) else ()):
        if isinstance(point, Mapping):
            yield from lines_of(facts, _point(facts, str(index), point))


def _point(facts: Facts, index: str, point: Mapping[str, Any]) -> Iterator[Sentence]:
    at: Path = ("run", "operating_points", index)
    probability: Path = ("image", f"{PROBABILITY}{point.get('class_name')}")
    value, threshold = value_at(facts, probability), point.get("threshold")
    if not isinstance(value, float) or not isinstance(threshold, int | float):
        return
    side = "positive" if value >= threshold else "negative"
    text = (
        f"{side.capitalize()} for {{name}} at the operating point {{point}}: "
        "{probability:score} against a threshold of {threshold:score}"
    )
    measured = "; sensitivity {sensitivity:score}, specificity {specificity:score} in validation"
    paths: dict[str, Path] = {
        "name": (*at, "class_name"),
        "point": (*at, "name"),
        "probability": probability,
        **{name: (*at, name) for name in ("threshold", "sensitivity", "specificity")},
    }
    yield sentence(Clause(text=text, paths=paths), Clause(text=measured, paths=paths))


def map_caption(facts: Facts) -> Statement:
    """Return what a map of evidence shows, and whether its method can be relied on.

    Args:
        facts: `map` is its row of explain.csv.
    """
    reliable: Path = ("map", "is_reliable")
    verdict = "checked" if value_at(facts, reliable) else "not checked"
    if value_at(facts, reliable) is False:
        verdict = "UNRELIABLE with this model"
    return joined(
        state(
            facts,
            [
                sentence(
                    "What speaks for {map.class_name:names}, by the method {map.method}",
                    clause(f", {verdict}", needs=("map.method",)),
                    ": {map.doubt}",
                )
            ],
        )
    )


def _comparison(facts: Facts) -> Iterator[Line]:
    """Yield how the image compares with those of training, as far as the bundle says."""
    seen, case_id = value_at(facts, ("run", "training_images")), facts["image"].content["case_id"]
    if isinstance(seen, list) and case_id in seen:
        key = key_of(facts, ("run", "training_images"))
        yield words("The model was trained on this very image.", key)
    if value_at(facts, ("model", "fingerprint", "mean")):
        yield from lines_of(facts, [NUMBERS])


NUMBERS = sentence(
    "In training the number had a mean of {fingerprint.mean:short}",
    " and a standard deviation of {fingerprint.sd:short}",
)

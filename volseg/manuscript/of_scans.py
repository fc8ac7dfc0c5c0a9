"""What a report says of one segmented scan: its lesions, the model, and the training scans."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from volseg.manuscript.case_report import (
    UNKNOWN,
    CaseReport,
    Cell,
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
    Document,
    Facts,
    Part,
    Path,
    Sentence,
    clause,
    key_of,
    sentence,
    state,
    value_at,
)
from volseg.manuscript.formats import clean
from volseg.measurement.review import REJECTED
from volseg.measurement.units import UNLIKE, unit_doubt_in, warnings_in
from volseg.recipe import ARBITRARY, HU, SUV

MOST_LESIONS = 20  # listed; the largest of more
LOW_CONFIDENCE = 0.85  # mean probability of a lesion's voxels
# What a warning may hold that a report must not: paths, alone or in a command.
COMMAND = re.compile(r"; run `[^`]*`[^;]*|`[^`]*`")
PATH = re.compile(r"(?<![\w.])(?:[A-Za-z]:)?[\\/][^\s;,()]*[\\/]([^\s;,()\\/]*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class LesionFacts:
    """What is known of one lesion beside its row.

    Args:
        row: of lesions.csv. review: of review.csv. change: of comparison.csv.
    """

    row: Document
    review: Document | None = None
    change: Document | None = None

    def within(self, facts: Facts) -> dict[str, Document]:
        """Return the facts of the scan and of this lesion."""
        beside = {"review": self.review, "change": self.change}
        stated = {alias: document for alias, document in beside.items() if document is not None}
        return {**facts, "lesion": self.row, **stated}


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanFacts:
    """The facts of a scan.

    Args:
        facts: `scan` is its row of cases.csv; `run`, `model`, `evaluation`, `response` if known.
        lesions: the largest, in their order. noun: what a row of lesions.csv is.
        gone: rows of comparison.csv of lesions that only the earlier scan has.
    """

    facts: Facts
    lesions: Sequence[LesionFacts]
    noun: str = "lesion"
    gone: Sequence[Document] = field(default=())


def scan_report(scan: ScanFacts) -> CaseReport:
    """Return the text of the report of a scan."""
    facts = scan.facts
    about = [_warnings(facts), _change(scan), _model(facts)]
    if value_at(facts, ("scan", "status")) == "done" and value_at(facts, MODEL):
        about.append(_comparison(scan))
    return CaseReport(
        title=title_of(facts, "scan", "scan"),
        made_with=made_with(facts, "scan"),
        findings=_found(scan),
        about=tuple(section for section in about if section.lines),
    )


def _model(facts: Facts) -> Section:
    """Return what the model is for, and what an evaluation said of it."""
    section = purpose(facts, "scan")
    if not value_at(facts, MODEL):
        return section
    # Beside an empty mask the findings tell the sensitivity.
    sensitivities = _sensitivities(facts) if value_at(facts, ("scan", "n_lesions")) else ()
    evaluated = [*state(facts, (*EVALUATED, *sensitivities))]
    lines = [Line(joined(evaluated), "Evaluation")] if evaluated else []
    return replace(section, lines=(*section.lines, *lines))


MODEL: Path = ("scan", "model")
EVALUATED = (
    sentence(
        "Mean Dice on {evaluation.n_cases:count} scans: {evaluation.mean_dice:score}",
        " (95 % interval {evaluation.mean_dice_95:interval})",
    ),
    sentence(
        clause(
            "An evaluation of masks does not record their model; it is taken to be this one",
            "evaluation.model",
            needs=("evaluation.n_cases",),
        )
    ),
)


# ---- what was found


def _found(scan: ScanFacts) -> Section:
    facts, title = scan.facts, "Findings"
    if value_at(facts, ("scan", "status")) != "done":
        return Section(title, tuple(_failure(facts)))
    n = value_at(facts, ("scan", "n_lesions"))
    if not n:
        return Section(title, tuple(_nothing(scan)))
    rows = [lesion.within(facts) for lesion in scan.lesions]
    table = table_of(_columns(rows))
    lines = tuple(lines_of(facts, _totals(scan.noun, n)))
    remarks = (*_left_out(scan, n), *_remarks(rows, scan.noun), *_without_sets(rows))
    return Section(title, lines, table, remarks)


def _failure(facts: Facts) -> Iterator[Line]:
    key = key_of(facts, ("scan", "status"))
    yield words("This scan has no result, so nothing can be said about it.", key)
    reason = without_paths(str(value_at(facts, ("scan", "reason")) or ""))
    if reason:
        yield Line(statement(Part(clean(reason), (key_of(facts, ("scan", "reason")),))), "Reason")


def _totals(noun: str, n: int) -> Iterator[Sentence]:
    """Yield the sentences on all lesions of the scan."""
    nouns, verb = (noun, "was") if n == 1 else (f"{noun}s", "were")
    yield sentence(
        f"{{scan.n_lesions:count}} {nouns} {verb} found",
        ", {scan.total_volume_ml:short} mL" + (" in total" if n > 1 else ""),
    )
    yield sentence(
        clause("No lesion is measurable by RECIST 1.1", when={"scan.n_measurable": 0}),
    )
    yield sentence(
        "Measurable by RECIST 1.1: {scan.n_measurable:some}",
        "; sum of diameters {scan.sum_long_axis_mm:short} mm",
    )
    yield sentence(
        f"The {noun}s fill {{scan.burden:percent}} of the organ",
        ", which has {scan.organ_volume_ml:short} mL",
    )
    yield sentence("Agatston score: {scan.agatston_score:short}")


def _left_out(scan: ScanFacts, n: int) -> tuple[Line, ...]:
    if n <= len(scan.lesions):
        return ()
    text = f"Listed are the {len(scan.lesions)} largest; lesions.csv has them all."
    return (words(text, key_of(scan.facts, ("scan", "n_lesions"))),)


def _without_sets(rows: Sequence[Facts]) -> Iterator[Line]:
    """Yield that the classes have no confidence sets, as the classifier of lesions has none."""
    classes = [key_of(facts, CLASS) for facts in rows if value_at(facts, CLASS)]
    if classes:
        yield words("The model states no confidence sets for these classes.", *classes[:1])


CLASS: Path = ("lesion", "class_name")


def _nothing(scan: ScanFacts) -> Iterator[Line]:
    """Yield that nothing was found, and how much that says."""
    facts, noun = scan.facts, scan.noun
    yield words(
        f"Nothing was found: the mask of this scan holds no {noun}.",
        key_of(facts, ("scan", "n_lesions")),
    )
    if not value_at(facts, MODEL):
        return
    measured = [*state(facts, _sensitivities(facts))]
    if measured:
        yield Line(joined(measured))
        yield words("So a scan without a finding is no proof that there is none.")
    else:
        yield words(
            f"How many {noun}s the model misses is not known here, so this is no proof that there "
            "is none."
        )


def _sensitivities(facts: Facts) -> Iterator[Sentence]:
    """Yield how many lesions of each label the model found in an evaluation."""
    labels = value_at(facts, ("evaluation", "labels"))
    for value in labels if isinstance(labels, Mapping) else ():
        root: Path = ("evaluation", "labels", value)
        at = (*root, "detection")
        yield sentence(
            clause(
                "In the evaluation {m:count} of {n:some} lesions of label {name} were found",
                m=(*at, "n_matched"),
                n=(*at, "n_reference"),
                name=(*root, "name"),
            ),
            clause(
                " (sensitivity {mean:score}, 95 % interval {ends:interval})",
                mean=(*at, "sensitivity", "mean"),
                ends=(*at, "sensitivity", "mean_95"),
            ),
        )


# ---- the table of lesions


def _columns(rows: Sequence[Facts]) -> Iterator[tuple[str, list[Cell]]]:
    """Yield the heading of each column of the table of lesions, and its cells."""
    for heading, template, *more in COLUMNS:
        yield heading, [cell_of(facts, template, *more) for facts in rows]
        if heading == VOLUME:
            is_ct = all(value_at(facts, UNIT) == HU for facts in rows)
            name = "Density" if is_ct else "Intensity"
            yield f"{name}, mean ± SD", [*map(_density, rows)]


VOLUME = "Volume, mL"
COLUMNS = (
    ("No.", "{lesion.lesion_id:number}"),
    ("Label", "{lesion.label_name}"),
    ("Long × short axis, mm", "{lesion.long_axis_mm:short}", " × {lesion.short_axis_mm:short}"),
    ("Largest 3D diameter, mm", "{lesion.max3d_diameter_mm:short}"),
    (VOLUME, "{lesion.volume_ml:short}"),
    ("SUVpeak", "{lesion.suv_peak:short}"),
    ("Class", "{lesion.class_name}"),
    ("Probability", "{lesion.class_probability:score}"),
    ("Mask confidence", "{lesion.confidence_mean:score}"),
    (
        "Change",
        "{change.status}",
        ", {change.change_volume_percent:signed} % volume",
        ", {change.change_long_axis_mm:signed} mm long axis",
    ),
)


def _density(facts: Facts) -> Cell:
    """Return mean and standard deviation of the intensities, with their unit and any doubt."""
    cell = cell_of(
        facts,
        "{lesion.intensity_mean:short}",
        " ± {lesion.intensity_sd:short}",
        " {lesion.intensity_unit}",
    )
    is_doubted = unit_doubt_in(str(value_at(facts, ("scan", "warnings")) or ""))
    if cell == UNKNOWN or not is_doubted or value_at(facts, UNIT) == ARBITRARY:
        return cell
    return (*cell, Part(" (in doubt)", (key_of(facts, ("scan", "warnings")),)))


UNIT: Path = ("lesion", "intensity_unit")


def _remarks(rows: Sequence[Facts], noun: str) -> Iterator[Line]:
    """Yield what to know about lesions, once for all of which it is true."""
    groups: dict[str, list[tuple[Facts, Part]]] = {}
    for facts in rows:
        for part in _remarks_of(facts, noun):
            groups.setdefault(part.text, []).append((facts, part))
    for text, group in groups.items():
        keys = dict.fromkeys(key for _, part in group for key in part.keys)
        numbers = [cell_of(facts, "{lesion.lesion_id:number}") for facts, _ in group]
        name = noun.capitalize() if len(group) == 1 else f"{noun.capitalize()}s"
        parts = [Part(f"{name} "), *numbers[0]]
        for number in numbers[1:]:
            parts += [Part(", "), *number]
        yield Line(statement(*parts, Part(": "), Part(text, tuple(keys)), Part(".")))


def _remarks_of(facts: Facts, noun: str) -> Iterator[Part]:
    """Yield what to know about a lesion: doubts, a reader's verdict, what is unknown and why."""
    if value_at(facts, ("lesion", "touches_border")):
        text = "cut by the edge of the scan, so the sizes are lower bounds"
        yield Part(text, (key_of(facts, ("lesion", "touches_border")),))
    confidence = value_at(facts, ("lesion", "confidence_mean"))
    if isinstance(confidence, float) and confidence < LOW_CONFIDENCE:
        text = f"low mask confidence (below {LOW_CONFIDENCE})"
        yield Part(text, (key_of(facts, ("lesion", "confidence_mean")),))
    if value_at(facts, ("review", "verdict")) == REJECTED:
        yield Part(f"rejected by a reader as {noun}", (key_of(facts, ("review", "verdict")),))
    notes = str(value_at(facts, ("lesion", "notes")) or "")
    for note in filter(_is_of_report, notes.split("; ")):
        yield Part(without_paths(clean(note)), (key_of(facts, ("lesion", "notes")),))


def _is_of_report(note: str) -> bool:
    """Return whether a note of lesions.csv is about a quantity that the report shows."""
    head, _, text = note.partition(": ")
    return bool(note) and not (text and set(head.split(", ")) <= NOT_SHOWN)


NOT_SHOWN = {
    *("density", "mass", "volume_expected_ml"),
    *("intensity_skewness and kurtosis", "intensity_mean_eroded1"),
}


# ---- warnings, change, comparison with training


def _warnings(facts: Facts) -> Section:
    """Return the warnings of the scan, each with its code."""
    text = value_at(facts, ("scan", "warnings"))
    key = key_of(facts, ("scan", "warnings"))
    lines = [
        Line(statement(Part(without_paths(clean(warning)), (key,))), code)
        for code, warning in warnings_in(text if isinstance(text, str) else "")
    ]
    return Section("Warnings", tuple(lines))


def without_paths(text: str) -> str:
    """Return a text without commands, and with the name of a file in place of its path.

    >>> without_paths("the mask was edited; run `volseg measure /home/x/r` to measure it")
    'the mask was edited'
    >>> without_paths("/home/x/scan.nii: too large (2 mm/px)")
    'scan.nii: too large (2 mm/px)'
    """
    return PATH.sub(r"\1", COMMAND.sub("", text))


def _change(scan: ScanFacts) -> Section:
    """Return the response of the patient, and the lesions that are gone."""
    lines = [*lines_of(scan.facts, RESPONSE)]
    for number, row in enumerate(scan.gone[:MOST_LESIONS], start=1):
        lines += lines_of({f"gone{number}": row}, [_gone(f"gone{number}")])
    return Section("Change since the earlier scan", tuple(lines))


RESPONSE = (
    sentence("Earlier scan: {response.baseline_case}"),
    sentence("Response: {response.response}", ", by the rule: {response.response_rule}"),
    sentence(
        clause("No response is stated: {response.response_rule}", "response.response"),
    ),
    sentence(
        "Sum of diameters: {response.baseline_sum_mm:short} mm before, "
        "{response.followup_sum_mm:short} mm now",
        " ({response.change_sum_percent:signed} %)",
    ),
    sentence(
        "Volume of all lesions: {response.baseline_volume_ml:short} mL before, "
        "{response.followup_volume_ml:short} mL now",
        " ({response.change_volume_percent:signed} %)",
    ),
)


def _gone(alias: str) -> Sentence:
    text = "Lesion {number:number} of {case} is gone; it had {volume:short} mL"
    return sentence(
        clause(
            text,
            number=(alias, "baseline_lesion_id"),
            case=(alias, "baseline_case"),
            volume=(alias, "baseline_volume_ml"),
        )
    )


def _comparison(scan: ScanFacts) -> Section:
    """Return how the scan compares with the training scans; only what the bundle says of them."""
    facts = scan.facts
    lines = [_similarity(facts)]
    if scan.lesions:
        first = scan.lesions[0].within(facts)
        lines += lines_of(first, SIZES)
        channels = value_at(facts, ("model", "fingerprint", "foreground"))
        for channel in list(channels)[:1] if isinstance(channels, Mapping) else ():
            lines += lines_of(first, _intensities(channel))
    return Section("Compared with the training data", tuple(lines))


def _similarity(facts: Facts) -> Line:
    warnings = str(value_at(facts, ("scan", "warnings")) or "")
    key = key_of(facts, ("scan", "warnings"))
    codes = [code for code, _ in warnings_in(warnings) if code in UNLIKE]
    if codes:
        text = f"This scan does not resemble the training scans: {', '.join(codes)}."
        return words(text, key)
    return words("The checks of volseg found no difference from the training scans.", key)


SIZES = (
    sentence(
        "Voxels: {lesion.spacing_r_mm:short} × {lesion.spacing_a_mm:short} × "
        "{lesion.spacing_s_mm:short} mm along R, A, S",
        "; in training {fingerprint.spacings_mm:spans} mm",
    ),
    sentence(
        "Lesion {lesion.lesion_id:number} extends over "
        "{lesion.bbox_min_r_mm+lesion.bbox_max_r_mm:extent} × "
        "{lesion.bbox_min_a_mm+lesion.bbox_max_a_mm:extent} × "
        "{lesion.bbox_min_s_mm+lesion.bbox_max_s_mm:extent} mm along R, A, S; the median of the "
        "lesions of training is {fingerprint.lesion_extent_mm.0:short} × "
        "{fingerprint.lesion_extent_mm.1:short} × {fingerprint.lesion_extent_mm.2:short} mm",
    ),
)


def _intensities(channel: str) -> Iterator[Sentence]:
    """Yield how dense the largest lesion is beside the labelled voxels of training."""
    root: Path = ("model", "fingerprint", "foreground", channel)
    text = (
        "Mean of lesion {lesion.lesion_id:number}: {lesion.intensity_mean:short} "
        "{lesion.intensity_unit}; the labelled voxels of training have a median of {median:short} "
        "(0.5 to 99.5 percentile: {low:short} to {high:short})"
    )
    paths = {"median": (*root, "median"), "low": (*root, "p00_5"), "high": (*root, "p99_5")}
    for unit in (HU, SUV):  # in other units the scans have no common scale
        same = {"lesion.intensity_unit": unit, "recipe.data.intensity_unit": unit}
        yield sentence(clause(text, when=same, **paths))

"""What stands at the top of report.html: one sentence on the run, and the warnings that matter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from volseg.errors import is_note
from volseg.measurement.rows import CaseRow, LesionMeasurement
from volseg.measurement.units import UNIT, UNLIKE, warnings_in
from volseg.pages.about import About
from volseg.pages.model_box import ModelBox, Similarity
from volseg.quality.rows import QualityRow
from volseg.words import format_count, format_list, format_number, lesion_noun

# Warnings that put the numbers in doubt come first, in this order; then the others.
GRAVE = (
    "W_SPECKS",
    "W_STALE",
    "W_EDITED",
    *UNLIKE,
    UNIT,
    "W_NAN",
    "W_SLICE_JUMP",
    "W_EQUAL_SLICES",
)
MAX_KINDS, MAX_SCANS = 8, 5
VERBS = {"infer": "segmented", "measure": "measured the masks of"}


@dataclass(frozen=True, slots=True)
class WarningKind:
    """A warning code, the scans that have it, and the sentence of the first of them."""

    code: str
    cases: Sequence[str]
    sentence: str

    @property
    def scans(self) -> str:
        return f"{format_count(len(self.cases), 'scan')}: {format_list(self.cases, MAX_SCANS)}"


@dataclass(frozen=True, slots=True)
class Warnings:
    """The gravest kinds of warnings of the scans, and how many other kinds there are."""

    kinds: Sequence[WarningKind] = ()
    n_more: int = 0


def noun_of_lesions(lesions: Iterable[LesionMeasurement]) -> str:
    """Return what the rows are: lesions, or with `--objects labels` structures."""
    return lesion_noun(lesion.connectivity for lesion in lesions)


def run_sentence(
    about: About,
    cases: Sequence[CaseRow],
    *,
    n_lesions: int,
    total_ml: float,
    boxes: Sequence[tuple[ModelBox, Similarity]] = (),
    noun: str = "lesion",
) -> str:
    """Say in one sentence what was run, on what, what it found, and how sure that is."""
    n_done = sum(case.status == "done" for case in cases)
    n_with = sum(bool(case.n_lesions) for case in cases if case.status == "done")
    of_all = f" of {len(cases)}" if n_done < len(cases) else ""
    n_scans = f"{n_done}{of_all} scan{'s' * ((len(cases) if of_all else n_done) != 1)}"
    model = f" with {about.model}" if about.model else ""
    result = f"no {noun}"
    if n_lesions:
        result = f"{format_count(n_lesions, noun)} in {format_count(n_with, 'scan')}"
        result += f", {format_number(total_ml)} mL in total" if total_ml else ""
    verb = VERBS.get(about.command, "has the results of")
    return f"volseg {verb} {n_scans}{model} and found {result}; {_certainty(boxes)}."


def _certainty(boxes: Sequence[tuple[ModelBox, Similarity]]) -> str:
    if not boxes:
        return "no model of volseg made the masks, so their accuracy is not known here"
    texts = []
    for box, similarity in boxes:
        whose = f" of {box.name}" if len(boxes) > 1 else ""
        dice = box.dice_text.partition(":")[0] if not box.dice else box.dice_text
        texts.append(f"validation Dice{whose}: {dice}; {similarity.text.rstrip('.')}")
    return "; ".join(texts)


def warning_kinds(cases: Sequence[CaseRow | QualityRow]) -> Warnings:
    """Return the warnings of the scans by code, the gravest first.

    Notes, which need no action, stay in the table. Scans that failed are left out: the page lists
    them with their reason.
    """
    scans: dict[str, dict[str, str]] = defaultdict(dict)
    for case in cases:
        if case.status == "done" and case.warnings:
            for code, sentence in warnings_in(case.warnings):
                if not is_note(code):
                    scans[code].setdefault(case.case_id, sentence)
    rank = {code: n for n, code in enumerate(GRAVE)}
    codes = sorted(scans, key=lambda code: (rank.get(code, len(rank)), -len(scans[code])))
    kinds = [
        WarningKind(code, list(scans[code]), next(iter(scans[code].values()))) for code in codes
    ]
    return Warnings(kinds[:MAX_KINDS], max(0, len(kinds) - MAX_KINDS))

"""What a reader must decide, or should check, before trusting the response of a patient."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from volseg.comparison.groups import PatientLesions
from volseg.comparison.label_names import label_of
from volseg.comparison.newness import Newness, Twins
from volseg.comparison.targets import is_lymph_node
from volseg.measurement.recist import MEASURABLE_MM
from volseg.measurement.rows import LesionMeasurement

MAX_NAMED = 5  # crumbs listed in a warning


def open_questions(lesions: PatientLesions, newness: Newness) -> str:
    """Return what a reader must decide before any response but progression; else empty."""
    questions = {
        "lymph node {} was normal at baseline and no longer is: decide whether that is new "
        "disease": lesions.names(newness.grown_nodes),
        "lesion {} is new or had another label at baseline: decide which": (
            lesions.names(newness.relabelled)
        ),
        "lesion {} is new, or another scan of the patient shows it too: decide which": (
            lesions.names(newness.perhaps_new)
        ),
        "piece {} beside a lesion is new: decide whether it is new disease or a part of that "
        "lesion": lesions.names(newness.pieces, with_sizes=True),
    }
    return "; ".join(text.format(names) for text, names in questions.items() if names)


def warnings_of(
    lesions: PatientLesions, newness: Newness, twins: Mapping[str, Sequence[Twins]]
) -> list[str]:
    """Return the warnings of a patient, as `W_CODE: sentence`; `twins`: by time."""
    return [
        *_node_warnings(lesions),
        *_new_warnings(lesions, newness.new),
        *_label_warnings(lesions),
        *_merged_warnings(lesions),
        *_outside_warnings(lesions),
        *_border_warnings(lesions),
        *_twin_warnings(lesions, twins),
        *_crumb_warnings(lesions),
    ]


def _node_warnings(lesions: PatientLesions) -> Iterator[str]:
    labels = {
        label_of(lesion)
        for lesion in (*lesions.baseline, *lesions.followup)
        if not is_lymph_node(lesion, lesions.lymph_nodes)
    }
    nodes = sorted(
        label for label in labels if re.search(r"lymph|(?<![a-z])nodes?(?![a-z])", label.lower())
    )
    if nodes:
        listed = ", ".join(nodes)
        yield f"W_NODE: {listed} sounds like lymph nodes: pass --lymph-node to use short axes"


def _new_warnings(lesions: PatientLesions, new: Sequence[LesionMeasurement]) -> Iterator[str]:
    sizes = [lesions.diameter_mm(lesion) for lesion in new]
    if sizes and all(size is not None and size < MEASURABLE_MM for size in sizes):
        yield "W_NEW: all new lesions are under 10 mm; check them, RECIST wants unequivocal ones"


def _label_warnings(lesions: PatientLesions) -> Iterator[str]:
    if any(group.is_relabelled for group in lesions.groups):
        yield "W_LABEL: a lesion overlaps one of another label; it counts as gone, and not as new"


def _merged_warnings(lesions: PatientLesions) -> Iterator[str]:
    for group in lesions.target_groups:
        joined = [lesion for lesion in group.before if not lesions.is_target(lesion)]
        if joined:
            merged = f"a target merged with lesions {lesions.names(joined)}, which are not targets"
            yield f"W_MERGED: {merged}; the whole counts as target"


def _outside_warnings(lesions: PatientLesions) -> Iterator[str]:
    outside = [group for group in lesions.groups if group.status == "outside"]
    if outside:
        counts = "; those of the follow-up count as new (RECIST 1.1, section 4.3.5)"
        is_counted = any(not group.pair.is_doubtful for group in outside)
        outside_of = "lesions lie outside the field of view of the other scan"
        yield f"W_OUTSIDE: {outside_of}{counts if is_counted else ''}"


def _border_warnings(lesions: PatientLesions) -> Iterator[str]:
    if any(lesion.touches_border for lesion in (*lesions.baseline, *lesions.followup)):
        yield "W_BORDER: a lesion touches the border of its scan, so its size is a lower bound"


def _twin_warnings(lesions: PatientLesions, twins: Mapping[str, Sequence[Twins]]) -> Iterator[str]:
    for time, pairs in twins.items():
        if pairs:
            listed = ", ".join(" and ".join(map(lesions.name_of, pair)) for pair in pairs)
            yield (
                f"W_TWICE: at {time} {listed} lie at the same place. If two scans show the same "
                "lesion, it counts twice: remove it from the masks of one scan, at both times"
            )


def _crumb_warnings(lesions: PatientLesions) -> Iterator[str]:
    for time, crumbs in (
        ("baseline", [crumb for group in lesions.groups for crumb in group.crumbs_before]),
        ("follow-up", [crumb for group in lesions.groups for crumb in group.crumbs_after]),
    ):
        if not crumbs:
            continue
        names = lesions.names(crumbs[:MAX_NAMED], with_sizes=True)
        more = f" and {len(crumbs) - MAX_NAMED} more" if len(crumbs) > MAX_NAMED else ""
        yield f"W_CRUMB: {names}{more} at {time}: small pieces beside a lesion, counted with it"

"""Follow-up lesions that are new disease, or that may be: a reader must decide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.spatial import KDTree

from volseg.comparison.groups import LesionGroup, PatientLesions, centroids_mm
from volseg.comparison.label_names import label_of
from volseg.comparison.overlap import MIN_FRACTION
from volseg.measurement.recist import MEASURABLE_MM
from volseg.measurement.rows import LesionMeasurement

ONE_PLACE_MM = 10.0  # nearer lesions in two scans of the same time may be one lesion

Lesions = Sequence[LesionMeasurement]
Twins = tuple[LesionMeasurement, LesionMeasurement]


@dataclass(frozen=True, slots=True)
class Newness:
    """Lesions of the follow-up that were not there, or not as disease, at baseline.

    Args:
        new: certainly new, which is progression. Also those outside the baseline's field of view
            (RECIST 1.1, section 4.3.5); not lymph nodes of normal size.
        perhaps_new: the same, but another scan of the patient may show them.
        relabelled: new, or with another label at baseline.
        grown_nodes: lymph nodes that were normal at baseline.
        pieces: crumbs as long as a measurable lesion, beside an old lesion, where nothing was.
    """

    new: Lesions
    perhaps_new: Lesions
    relabelled: Lesions
    grown_nodes: Lesions
    pieces: Lesions


def newness_of(lesions: PatientLesions, twins: Sequence[Twins]) -> Newness:
    """Return what is new; `twins`: lesions that two scans of the follow-up may show."""
    new, perhaps_new, relabelled = [], [], []
    for group in lesions.groups:
        if group.before:
            continue
        disease = [lesion for lesion in group.after if not lesions.is_normal(lesion)]
        if group.is_relabelled:
            relabelled += disease
        elif not group.pair.is_doubtful:
            may_be_seen = _may_be_seen(group, lesions.groups, twins)
            (perhaps_new if may_be_seen else new).extend(disease)
    grown = [x for group in lesions.groups if group.is_grown_node for x in group.after]
    return Newness(new, perhaps_new, relabelled, grown, _new_pieces(lesions))


def twins_of(lesions: PatientLesions) -> dict[str, list[Twins]]:
    """Return lesions that two scans of the same time may show, by time."""
    return {
        "baseline": _twins_in([pair.baseline.lesions for pair in lesions.pairs]),
        "follow-up": _twins_in([pair.followup.lesions for pair in lesions.pairs]),
    }


def _twins_in(scans: Sequence[Lesions]) -> list[Twins]:
    """Return pairs of lesions in scans of the same time that may be one: same label, near."""
    twins = []
    for scan, other_scan in combinations(scans, 2):
        for label in dict.fromkeys(map(label_of, scan)):
            lesions = [lesion for lesion in scan if label_of(lesion) == label]
            others = [lesion for lesion in other_scan if label_of(lesion) == label]
            if others:
                tree = KDTree(centroids_mm(others))
                mm, nearest = map(np.asarray, tree.query(centroids_mm(lesions)))
                near = np.flatnonzero(mm <= ONE_PLACE_MM).tolist()
                twins += [(lesions[n], others[int(nearest[n])]) for n in near]
    return twins


def _may_be_seen(group: LesionGroup, groups: Sequence[LesionGroup], twins: Sequence[Twins]) -> bool:
    """Check whether a lesion seen at follow-up only may be one that another scan shows."""
    if any(lesion is twin for pair in twins for twin in pair for lesion in group.after):
        return True
    labels = {label_of(lesion) for lesion in group.after}
    return group.status == "outside" and any(
        other.status == "outside" and label_of(lesion) in labels
        for other in groups
        if other.pair is not group.pair
        for lesion in other.before
    )


def _new_pieces(lesions: PatientLesions) -> list[LesionMeasurement]:
    pieces = []
    for group in lesions.groups:
        overlap_mm3 = {match.followup: match.overlap_mm3 or 0.0 for match in group.crumb_matches}
        for crumb in group.crumbs_after if group.before else ():
            size_mm = lesions.diameter_mm(crumb) or 0.0
            is_new = overlap_mm3[crumb.lesion_id] < MIN_FRACTION * crumb.volume_mm3
            if is_new and size_mm >= MEASURABLE_MM:
                pieces.append(crumb)
    return pieces

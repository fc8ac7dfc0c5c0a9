"""Which follow-up lesions are new disease, and which a reader must decide."""

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

Twins = tuple[LesionMeasurement, LesionMeasurement]


def twins_in(scans: Sequence[Sequence[LesionMeasurement]]) -> list[Twins]:
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


@dataclass(frozen=True, slots=True)
class NewLesions:
    """Follow-up lesions without a baseline lesion; lymph nodes of normal size are none.

    Args:
        certain: they are progression. perhaps: another scan of the patient may show them.
    """

    certain: Sequence[LesionMeasurement]
    perhaps: Sequence[LesionMeasurement]

    @classmethod
    def of(cls, lesions: PatientLesions, twins: Sequence[Twins]) -> NewLesions:
        """Return the new lesions.

        A lesion outside the baseline's field of view counts as new too (section 4.3.5). One that
        had another label may have been there before.

        Args:
            twins: of the follow-up.
        """
        only_later = [
            group
            for group in lesions.groups
            if group.status in ("new", "outside")
            and not group.is_relabelled
            and not group.pair.is_doubtful
        ]
        certain, perhaps = [], []
        for group in only_later:
            kind = perhaps if _may_be_seen(group, lesions.groups, twins) else certain
            kind += [lesion for lesion in group.after if not lesions.is_normal(lesion)]
        return cls(certain, perhaps)


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


def new_pieces(lesions: PatientLesions) -> list[LesionMeasurement]:
    """Return crumbs as long as a measurable lesion, beside an old lesion, where nothing was."""
    pieces = []
    for group in lesions.groups:
        if not group.before:
            continue
        overlap_mm3 = {
            match.followup: match.overlap_mm3 or 0.0
            for match in group.matches
            if match.status == "crumb"
        }
        for crumb in group.crumbs_after:
            size_mm = lesions.diameter_mm(crumb)
            is_new = overlap_mm3[crumb.lesion_id] < MIN_FRACTION * crumb.volume_mm3
            if is_new and size_mm is not None and size_mm >= MEASURABLE_MM:
                pieces.append(crumb)
    return pieces

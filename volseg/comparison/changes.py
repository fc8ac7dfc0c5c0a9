"""Matched and measured lesions of two time points → what changed, row by row."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from volseg.columns import column
from volseg.comparison.matching import Match
from volseg.comparison.targets import RECIST, choose_targets, is_normal, label_of, none_if_nan
from volseg.measurement.rows import LesionMeasurement
from volseg.recipe import ARBITRARY


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScanPair:
    """Two scans of the same region of a patient, one per time point, with their matched lesions.

    Args:
        baseline_case, followup_case: None where the region was scanned at the other time only.
        baseline, followup: lesions of the two scans by ascending number, crumbs included in their
            sizes.
        matches: of all lesions; `outside` if there is no scan at the other time.
        doubt: why the matches cannot be trusted; empty if they can.
        baseline_crumbs, followup_crumbs: crumbs of these lesions, not counted as lesions.
        tilt_deg: angle between the axial slices of the two scans in the patient; None where the
            scans are not registered.
        is_remeasured: follow-up diameters were measured again, in the baseline's axial planes.
        unit_doubts: why the unit at baseline, and at follow-up, is in doubt; empty if it is not.
    """

    baseline_case: str | None
    followup_case: str | None
    baseline: Sequence[LesionMeasurement]
    followup: Sequence[LesionMeasurement]
    matches: Sequence[Match]
    doubt: str = ""
    baseline_crumbs: Sequence[LesionMeasurement] = ()
    followup_crumbs: Sequence[LesionMeasurement] = ()
    tilt_deg: float | None = None
    is_remeasured: bool = False
    unit_doubts: tuple[str, str] = ("", "")


@dataclass(frozen=True, slots=True, eq=False)
class LesionGroup:
    """The lesions of one row, or lesions that merged or split together.

    Args:
        number: from 1 over all scans of a patient.
        crumbs_before, crumbs_after: counted with the lesions `before` and `after`, but not in them.
    """

    number: int
    pair: ScanPair
    matches: Sequence[Match]
    before: Sequence[LesionMeasurement]
    after: Sequence[LesionMeasurement]
    lymph_nodes: Collection[str]
    crumbs_before: Sequence[LesionMeasurement] = ()
    crumbs_after: Sequence[LesionMeasurement] = ()

    @property
    def status(self) -> str:
        return next(match.status for match in self.matches if match.status != "crumb")

    @property
    def is_relabelled(self) -> bool:
        """True if one of its lesions overlaps a lesion with another label in the other scan."""
        return any(match.relabelled for match in self.matches)

    @property
    def was_normal(self) -> bool:
        return all(is_normal(lesion, self.lymph_nodes) for lesion in self.before)

    @property
    def is_normal(self) -> bool:
        return all(is_normal(lesion, self.lymph_nodes) for lesion in self.after)

    @property
    def is_gone(self) -> bool:
        """True if nothing is left of it, or only lymph nodes of normal size."""
        return self.status == "gone" or (bool(self.after) and self.is_normal)


def groups_of(pairs: Sequence[ScanPair], lymph_nodes: Collection[str]) -> list[LesionGroup]:
    """Return the lesions of a patient, each in exactly one group."""
    groups: list[LesionGroup] = []
    for pair in pairs:
        before, after = _by_number(pair)
        members: dict[int, list[Match]] = defaultdict(list)
        for match in pair.matches:
            members[match.group].append(match)
        for matches in members.values():
            lesions = [match for match in matches if match.status != "crumb"]
            crumbs = [match for match in matches if match.status == "crumb"]
            ids_before = dict.fromkeys(match.baseline for match in lesions)
            ids_after = dict.fromkeys(match.followup for match in lesions)
            groups.append(
                LesionGroup(
                    len(groups) + 1,
                    pair,
                    matches,
                    [before[n] for n in ids_before if n is not None],
                    [after[n] for n in ids_after if n is not None],
                    lymph_nodes,
                    [before[match.baseline] for match in crumbs if match.baseline is not None],
                    [after[match.followup] for match in crumbs if match.followup is not None],
                )
            )
    return groups


def _by_number(pair: ScanPair) -> tuple[dict[int, LesionMeasurement], dict[int, LesionMeasurement]]:
    """Return the lesions and crumbs of each time point by number."""
    before = {lesion.lesion_id: lesion for lesion in (*pair.baseline, *pair.baseline_crumbs)}
    return before, {lesion.lesion_id: lesion for lesion in (*pair.followup, *pair.followup_crumbs)}


def lesions_of(
    pairs: Sequence[ScanPair],
) -> tuple[list[LesionMeasurement], list[LesionMeasurement]]:
    """Return all lesions of the baseline and of the follow-up, without crumbs."""
    baseline = [lesion for pair in pairs for lesion in pair.baseline]
    return baseline, [lesion for pair in pairs for lesion in pair.followup]


def centroids_mm(lesions: Sequence[LesionMeasurement]) -> np.ndarray:
    """Return the centroids (N, 3) in RAS mm."""
    rows = [(row.centroid_r_mm, row.centroid_a_mm, row.centroid_s_mm) for row in lesions]
    return np.array(rows, dtype=float).reshape(-1, 3)


def difference(before: float | None, after: float | None) -> tuple[float | None, float | None]:
    """Return `after` − `before`, and the same in percent of `before`; None where unknown."""
    if before is None or after is None:
        return None, None
    return after - before, 100 * (after - before) / before if before > 0 else None


# ---- rows


@dataclass(frozen=True, slots=True, kw_only=True)
class LesionChange:
    """A row of comparison.csv: a pair of lesions, or a lesion seen at one time point only.

    None is written as an empty cell; `notes` says why.
    """

    patient: str = column("", "name of the patient, as in response.csv")
    baseline_case: str | None = column(
        "", "baseline scan; empty if this region was not scanned then"
    )
    followup_case: str | None = column(
        "", "follow-up scan; empty if this region was not scanned then"
    )
    status: str = column(
        "",
        "matched: one lesion at both times; merged: one of several that became one; "
        "split: one that became several; regrouped: several that became several others; new; gone; "
        "outside: outside the field of view of the other scan; "
        "crumb: a small piece beside a lesion of its scan, counted with it",
    )
    group: int = column(
        "",
        "number shared by lesions that merged or split together, and by a lesion and its crumbs; "
        "unique for every other row",
    )
    label_name: str | None = column("", "name of the label, or its value if it has no name")
    baseline_lesion_id: int | None = column(
        "", "number of the lesion in the baseline scan; empty if it is not there"
    )
    followup_lesion_id: int | None = column(
        "", "number of the lesion in the follow-up scan; empty if it is not there"
    )
    is_target: bool | None = column(
        "",
        "true for a target lesion, chosen at baseline; empty if targets could not be chosen",
        None,
        source=RECIST,
    )
    matched_by: str | None = column(
        "", "overlap, or distance (of the centroids); empty for a lesion without a partner", None
    )
    dice: float | None = column(
        "0 to 1", "Dice coefficient of the two lesions after registration", None
    )
    distance_mm: float | None = column(
        "mm", "distance between their centroids after registration", None
    )
    baseline_volume_ml: float | None = column(
        "mL", "volume at baseline, crumbs included; 0 for a new lesion", None
    )
    followup_volume_ml: float | None = column(
        "mL", "volume at follow-up, crumbs included; 0 for a lesion that is gone", None
    )
    change_volume_ml: float | None = column(
        "mL",
        "follow-up minus baseline; for merged or split lesions the change of their sum, "
        "in the first row of the group",
        None,
    )
    change_volume_percent: float | None = column(
        "%", "change_volume_ml in percent of the baseline volume", None
    )
    baseline_long_axis_mm: float | None = column(
        "mm", "long axis at baseline, crumbs included; 0 for a new lesion", None
    )
    followup_long_axis_mm: float | None = column(
        "mm",
        "long axis at follow-up, crumbs included, in the axial planes of the baseline scan; "
        "0 for a lesion that is gone",
        None,
    )
    change_long_axis_mm: float | None = column(
        "mm",
        "follow-up minus baseline; for merged or split lesions the change of their sum, "
        "in the first row of the group",
        None,
        source=RECIST,
    )
    change_long_axis_percent: float | None = column(
        "%", "change_long_axis_mm in percent of the baseline long axis", None
    )
    baseline_short_axis_mm: float | None = column(
        "mm", "short axis at baseline, crumbs included; 0 for a new lesion", None
    )
    followup_short_axis_mm: float | None = column(
        "mm",
        "short axis at follow-up, measured like the long axis; 0 for a lesion that is gone",
        None,
    )
    baseline_intensity_mean: float | None = column(
        "intensity_unit", "mean intensity at baseline", None
    )
    followup_intensity_mean: float | None = column(
        "intensity_unit", "mean intensity at follow-up", None
    )
    change_intensity_mean: float | None = column(
        "intensity_unit",
        "follow-up minus baseline; for merged or split lesions the change of the mean over all "
        "their voxels, in the first row of the group; empty in a.u., which has no common scale "
        "between scans, and if the unit is in doubt",
        None,
    )
    intensity_unit: str | None = column(
        "",
        "unit of the intensities; empty if it is in doubt or differs between the two times",
        None,
    )
    baseline_centroid_r_mm: float | None = column(
        "mm", "centroid in the baseline scan, towards the patient's right", None
    )
    baseline_centroid_a_mm: float | None = column("mm", "the same, towards anterior", None)
    baseline_centroid_s_mm: float | None = column("mm", "the same, towards superior", None)
    followup_centroid_r_mm: float | None = column(
        "mm", "centroid in the follow-up scan, in the coordinates of that scan", None
    )
    followup_centroid_a_mm: float | None = column("mm", "the same, towards anterior", None)
    followup_centroid_s_mm: float | None = column("mm", "the same, towards superior", None)
    notes: str = column("", "what is unknown and why, and what to check; empty if nothing", "")


def lesion_changes(
    pairs: Sequence[ScanPair], *, patient: str, lymph_nodes: Collection[str] = ()
) -> list[LesionChange]:
    """Return a row per match of all scan pairs of a patient, in their order.

    Args:
        lymph_nodes: labels of lymph nodes, by name or value.
    """
    targets = choose_targets(lesions_of(pairs)[0], lymph_nodes)
    groups = groups_of(pairs, lymph_nodes)
    rows = []
    for pair in pairs:
        before, after = _by_number(pair)
        of_pair = {group.matches[0].group: group for group in groups if group.pair is pair}
        for match in pair.matches:
            b = None if match.baseline is None else before[match.baseline]
            f = None if match.followup is None else after[match.followup]
            group = of_pair[match.group]
            is_crumb = match.status == "crumb"
            changes, notes = _changes(group) if match.is_first else ({}, [_referral(group)])
            if is_crumb:
                notes = [_crumb_note(match, before if match.followup is None else after)]
            doubts = _unit_doubts(pair, b, f)
            units = {lesion.intensity_unit for lesion in (b, f) if lesion is not None}
            sizes = {}
            if not is_crumb:
                sizes = _columns_of("baseline", b, is_absent=match.status == "new")
                sizes |= _columns_of("followup", f, is_absent=match.status == "gone")
            rows.append(
                LesionChange(
                    patient=patient,
                    baseline_case=pair.baseline_case,
                    followup_case=pair.followup_case,
                    status=match.status,
                    group=group.number,
                    label_name=next(label_of(lesion) for lesion in (b, f) if lesion is not None),
                    baseline_lesion_id=match.baseline,
                    followup_lesion_id=match.followup,
                    is_target=None if targets is None else any(target is b for target in targets),
                    matched_by=match.how,
                    dice=match.dice,
                    distance_mm=match.distance_mm,
                    **sizes,
                    **changes,
                    intensity_unit=units.pop() if len(units) == 1 and not doubts else None,
                    notes="; ".join([*notes, *doubts, *_notes(match, b, f, pair)]),
                )
            )
    return rows


def _columns_of(time: str, lesion: LesionMeasurement | None, *, is_absent: bool) -> dict[str, Any]:
    """Return the columns of one time point: sizes of 0 if the lesion is absent, None if unknown."""
    if lesion is None:
        zero = 0.0 if is_absent else None
        return {f"{time}_{name}": zero for name in ("volume_ml", "long_axis_mm", "short_axis_mm")}
    return {
        f"{time}_volume_ml": lesion.volume_ml,
        f"{time}_long_axis_mm": none_if_nan(lesion.long_axis_mm),
        f"{time}_short_axis_mm": none_if_nan(lesion.short_axis_mm),
        f"{time}_intensity_mean": none_if_nan(lesion.intensity_mean),
        f"{time}_centroid_r_mm": lesion.centroid_r_mm,
        f"{time}_centroid_a_mm": lesion.centroid_a_mm,
        f"{time}_centroid_s_mm": lesion.centroid_s_mm,
    }


def _changes(group: LesionGroup) -> tuple[dict[str, Any], list[str]]:
    """Return the change columns of a group, and notes on the empty ones."""
    if group.status == "outside":
        return {}, ["change: outside the field of view of the other scan, or no other scan"]
    volume = difference(_total(group.before, "volume_ml"), _total(group.after, "volume_ml"))
    axis = difference(_total(group.before, "long_axis_mm"), _total(group.after, "long_axis_mm"))
    intensity, note = _intensity_change(group)
    notes = [note] if note else []
    if axis[0] is None:
        notes.insert(0, "long axis: not measured")
    if group.status == "new":
        notes.insert(0, "percent: undefined, as there was nothing at baseline")
    return {
        "change_volume_ml": volume[0],
        "change_volume_percent": volume[1],
        "change_long_axis_mm": axis[0],
        "change_long_axis_percent": axis[1],
        "change_intensity_mean": intensity,
    }, notes


def _intensity_change(group: LesionGroup) -> tuple[float | None, str]:
    if not group.before or not group.after:
        return None, "intensity: no change for a lesion seen at one time only"
    if any(group.pair.unit_doubts):
        return None, ""  # the rows say so
    units = {lesion.intensity_unit for lesion in (*group.before, *group.after)}
    if len(units) > 1:
        return None, "intensity: the unit differs between the two times"
    if units == {ARBITRARY}:
        return None, f"intensity: no change, since {ARBITRARY} has no common scale between scans"
    before, after = _mean_intensity(group.before), _mean_intensity(group.after)
    if before is None or after is None:
        return None, "intensity: not measured"
    return after - before, ""


def _unit_doubts(
    pair: ScanPair, b: LesionMeasurement | None, f: LesionMeasurement | None
) -> list[str]:
    """Return notes on why a row has no unit: the doubts about the scans of its lesions."""
    doubts = zip(("baseline", "follow-up"), (b, f), pair.unit_doubts, strict=True)
    return [
        f"intensity: its unit at {time} is in doubt ({doubt})"
        for time, lesion, doubt in doubts
        if lesion is not None and doubt
    ]


def _mean_intensity(lesions: Sequence[LesionMeasurement]) -> float | None:
    """Return the mean over the voxels of all lesions; None if one is unknown."""
    means = [none_if_nan(lesion.intensity_mean) for lesion in lesions]
    weights = [lesion.n_voxels for lesion in lesions]
    if None in means:
        return None
    total = sum(mean * weight for mean, weight in zip(means, weights) if mean is not None)
    return total / sum(weights)


def _total(lesions: Sequence[LesionMeasurement], name: str) -> float | None:
    values = [none_if_nan(getattr(lesion, name)) for lesion in lesions]
    return None if None in values else float(sum(value for value in values if value is not None))


def _crumb_note(match: Match, lesions: Mapping[int, LesionMeasurement]) -> str:
    time, number = (
        ("baseline", match.baseline) if match.followup is None else ("follow-up", match.followup)
    )
    assert number is not None
    volume_ml = lesions[number].volume_ml
    return f"crumb: {volume_ml:.3g} mL beside lesion {match.whole} at {time}, counted with it"


def _referral(group: LesionGroup) -> str:
    first = next(match for match in group.matches if match.is_first)
    ids = f"lesion {first.baseline} at baseline and {first.followup} at follow-up"
    return f"change: in the row of {ids}, of the same group"


def _notes(
    match: Match, b: LesionMeasurement | None, f: LesionMeasurement | None, pair: ScanPair
) -> list[str]:
    notes = []
    if pair.is_remeasured and f is not None and match.status != "crumb":
        notes.append(
            "diameters at follow-up: in the axial planes of the baseline, "
            f"{pair.tilt_deg:.1f}° from its own slices"
        )
    if match.how == "distance":
        notes.append("no overlap: matched by the distance between centroids")
    if match.relabelled:
        time = "baseline" if b is None else "follow-up"
        ids = ", ".join(map(str, match.relabelled))
        notes.append(f"overlaps lesion {ids} at {time}, which has another label")
    for time, lesion in (("baseline", b), ("follow-up", f)):
        if lesion is not None and lesion.touches_border:
            notes.append(f"touches the border of the scan at {time}: its size is a lower bound")
    return notes

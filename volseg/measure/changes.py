"""Lesions that were matched and measured at two times → what changed, row by row."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from volseg.columns import column
from volseg.measure.matching import Match
from volseg.measure.rows import LesionMeasurement
from volseg.measure.targets import RECIST, choose_targets, is_normal, known, label_of
from volseg.recipe import ARBITRARY


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScanPair:
    """A scan of each time that show the same region of a patient, and which of their lesions are the same.

    Args:
        baseline_case, followup_case: None where the region was scanned at the other time only.
        baseline, followup: the lesions of the two scans, each in the order of their numbers. What their crumbs add is in them.
        matches: of all of them; without a scan at the other time they are `outside`.
        doubt: why the matches cannot be trusted; empty if they can.
        baseline_crumbs, followup_crumbs: crumbs of these lesions, which are no lesions by themselves.
        tilt_deg: angle between the axial slices of the two scans in the patient; None where the scans were not placed.
        unit_doubts: why the unit of the baseline, and of the follow-up, is in doubt; empty if it is not.
        is_retaken: whether the diameters of the follow-up were taken again, in the axial planes of the baseline.
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
    is_retaken: bool = False
    unit_doubts: tuple[str, str] = ("", "")


@dataclass(frozen=True, slots=True, eq=False)
class LesionGroup:
    """The lesions of one row, or those that merged or split together. `number`: from 1 over all scans of a patient.

    `crumbs_before`, `crumbs_after` are counted with the lesions `before` and `after`, and are not among them.
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
        """Whether a lesion of it overlaps one of another label, in the other scan."""
        return any(match.relabelled for match in self.matches)

    @property
    def was_normal(self) -> bool:
        return all(is_normal(lesion, self.lymph_nodes) for lesion in self.before)

    @property
    def is_normal(self) -> bool:
        return all(is_normal(lesion, self.lymph_nodes) for lesion in self.after)

    @property
    def is_gone(self) -> bool:
        """Whether nothing is left of it; a lymph node may be there, if it is of normal size."""
        return self.status == "gone" or (bool(self.after) and self.is_normal)


def groups_of(pairs: Sequence[ScanPair], lymph_nodes: Collection[str]) -> list[LesionGroup]:
    """Every lesion of a patient in one group."""
    groups: list[LesionGroup] = []
    for pair in pairs:
        before, after = _by_number(pair)
        members: dict[int, list[Match]] = defaultdict(list)
        for match in pair.matches:
            members[match.group].append(match)
        for matches in members.values():
            lesions = [match for match in matches if match.status != "crumb"]
            crumbs = [match for match in matches if match.status == "crumb"]
            groups.append(
                LesionGroup(
                    len(groups) + 1,
                    pair,
                    matches,
                    [
                        before[n]
                        for n in dict.fromkeys(match.baseline for match in lesions)
                        if n is not None
                    ],
                    [
                        after[n]
                        for n in dict.fromkeys(match.followup for match in lesions)
                        if n is not None
                    ],
                    lymph_nodes,
                    [before[match.baseline] for match in crumbs if match.baseline is not None],
                    [after[match.followup] for match in crumbs if match.followup is not None],
                )
            )
    return groups


def _by_number(pair: ScanPair) -> tuple[dict[int, LesionMeasurement], dict[int, LesionMeasurement]]:
    """The lesions and crumbs of each time by their numbers."""
    before = {lesion.lesion_id: lesion for lesion in (*pair.baseline, *pair.baseline_crumbs)}
    return before, {lesion.lesion_id: lesion for lesion in (*pair.followup, *pair.followup_crumbs)}


def lesions_of(
    pairs: Sequence[ScanPair],
) -> tuple[list[LesionMeasurement], list[LesionMeasurement]]:
    """All lesions of the baseline and of the follow-up, without crumbs."""
    baseline = [lesion for pair in pairs for lesion in pair.baseline]
    return baseline, [lesion for pair in pairs for lesion in pair.followup]


def centroids_mm(lesions: Sequence[LesionMeasurement]) -> np.ndarray:
    """(N, 3) RAS mm."""
    rows = [(each.centroid_r_mm, each.centroid_a_mm, each.centroid_s_mm) for each in lesions]
    return np.array(rows, dtype=float).reshape(-1, 3)


def difference(before: float | None, after: float | None) -> tuple[float | None, float | None]:
    """`after` less `before`, and in percent of `before`; None where unknown."""
    if before is None or after is None:
        return None, None
    return after - before, 100 * (after - before) / before if before > 0 else None


# ---- rows


@dataclass(frozen=True, slots=True, kw_only=True)
class LesionChange:
    """A row of comparison.csv: a pair of lesions, or a lesion that is there at one time only. None is an empty cell; `notes` says why."""

    patient: str = column("", "name of the patient: a row of response.csv")
    baseline_case: str | None = column(
        "", "the earlier scan; empty if there is none of this region"
    )
    followup_case: str | None = column("", "the later scan; empty if there is none of this region")
    status: str = column(
        "",
        "matched: one lesion at both times; merged: one of several that are one later; split: one of several that were one; "
        "regrouped: several were several others; new; gone; outside: where the other scan does not reach; "
        "crumb: a small piece beside a lesion of its scan, counted with it",
    )
    group: int = column(
        "",
        "rows that merged or split together, and a lesion and its crumbs, share it; every other row has its own",
    )
    label_name: str | None = column("", "name of the label, or its value where it has no name")
    baseline_lesion_id: int | None = column(
        "", "number of the lesion in the earlier scan; empty if it is not there"
    )
    followup_lesion_id: int | None = column(
        "", "number of the lesion in the later scan; empty if it is not there"
    )
    is_target: bool | None = column(
        "",
        "a target lesion, chosen at baseline; empty where targets could not be chosen",
        None,
        source=RECIST,
    )
    matched_by: str | None = column(
        "", "overlap, or distance: of centroids; empty for a lesion without a partner", None
    )
    dice: float | None = column(
        "0 to 1", "Dice coefficient of the two lesions after registration", None
    )
    distance_mm: float | None = column("mm", "distance of their centroids after registration", None)
    baseline_volume_ml: float | None = column(
        "mL", "volume of the earlier lesion and its crumbs; 0 of a new one", None
    )
    followup_volume_ml: float | None = column(
        "mL", "volume of the later lesion and its crumbs; 0 of one that is gone", None
    )
    change_volume_ml: float | None = column(
        "mL",
        "later less earlier; of merged or split lesions the sum of all of them, in the first row of the group",
        None,
    )
    change_volume_percent: float | None = column(
        "%", "that change in percent of the earlier volume", None
    )
    baseline_long_axis_mm: float | None = column(
        "mm", "long axis of the earlier lesion with its crumbs; 0 of a new one", None
    )
    followup_long_axis_mm: float | None = column(
        "mm",
        "long axis of the later lesion with its crumbs, in the axial planes of the earlier scan; 0 of one that is gone",
        None,
    )
    change_long_axis_mm: float | None = column(
        "mm",
        "later less earlier; of split lesions their sum, in the first row of the group",
        None,
        source=RECIST,
    )
    change_long_axis_percent: float | None = column(
        "%", "that change in percent of the earlier long axis", None
    )
    baseline_short_axis_mm: float | None = column(
        "mm", "short axis of the earlier lesion, likewise; 0 of a new one", None
    )
    followup_short_axis_mm: float | None = column(
        "mm", "short axis of the later lesion, likewise; 0 of one that is gone", None
    )
    baseline_intensity_mean: float | None = column(
        "intensity_unit", "mean intensity of the earlier lesion", None
    )
    followup_intensity_mean: float | None = column(
        "intensity_unit", "mean intensity of the later lesion", None
    )
    change_intensity_mean: float | None = column(
        "intensity_unit",
        "later less earlier; of merged or split lesions of the means over their voxels, in the first row of the group; "
        "empty in a.u., which no two scans share, and in a unit in doubt",
        None,
    )
    intensity_unit: str | None = column(
        "",
        "unit of the intensities; empty where it is in doubt or not the same at both times",
        None,
    )
    baseline_centroid_r_mm: float | None = column(
        "mm", "centroid in the earlier scan, towards the patient's right", None
    )
    baseline_centroid_a_mm: float | None = column("mm", "the same, towards anterior", None)
    baseline_centroid_s_mm: float | None = column("mm", "the same, towards superior", None)
    followup_centroid_r_mm: float | None = column(
        "mm", "centroid in the later scan, in the coordinates of that scan", None
    )
    followup_centroid_a_mm: float | None = column("mm", "the same, towards anterior", None)
    followup_centroid_s_mm: float | None = column("mm", "the same, towards superior", None)
    notes: str = column("", "what is not known and why, and what to look at; empty if nothing", "")


def lesion_changes(
    pairs: Sequence[ScanPair], *, patient: str, lymph_nodes: Collection[str] = ()
) -> list[LesionChange]:
    """A row per match of the scans of a patient, in their order. `lymph_nodes` are labels, by name or value."""
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
                    **(
                        {}
                        if is_crumb
                        else _columns_of("baseline", b, is_absent=match.status == "new")
                    ),
                    **(
                        {}
                        if is_crumb
                        else _columns_of("followup", f, is_absent=match.status == "gone")
                    ),
                    **changes,
                    intensity_unit=units.pop() if len(units) == 1 and not doubts else None,
                    notes="; ".join([*notes, *doubts, *_notes(match, b, f, pair)]),
                )
            )
    return rows


def _columns_of(time: str, lesion: LesionMeasurement | None, *, is_absent: bool) -> dict[str, Any]:
    """The columns of one time; zeros for a lesion that is not there then, empty ones where that is not known."""
    if lesion is None:
        zero = 0.0 if is_absent else None
        return {f"{time}_{name}": zero for name in ("volume_ml", "long_axis_mm", "short_axis_mm")}
    return {
        f"{time}_volume_ml": lesion.volume_ml,
        f"{time}_long_axis_mm": known(lesion.long_axis_mm),
        f"{time}_short_axis_mm": known(lesion.short_axis_mm),
        f"{time}_intensity_mean": known(lesion.intensity_mean),
        f"{time}_centroid_r_mm": lesion.centroid_r_mm,
        f"{time}_centroid_a_mm": lesion.centroid_a_mm,
        f"{time}_centroid_s_mm": lesion.centroid_s_mm,
    }


def _changes(group: LesionGroup) -> tuple[dict[str, Any], list[str]]:
    """The columns of change of a group, and why some of them are empty."""
    if group.status == "outside":
        return {}, ["change: the other scan does not reach there, or there is none"]
    volume = difference(_total(group.before, "volume_ml"), _total(group.after, "volume_ml"))
    axis = difference(_total(group.before, "long_axis_mm"), _total(group.after, "long_axis_mm"))
    intensity, note = _intensity_change(group)
    notes = [note] if note else []
    if axis[0] is None:
        notes.insert(0, "long axis: not measured")
    if group.status == "new":
        notes.insert(0, "percent: there was nothing at baseline")
    return {
        "change_volume_ml": volume[0],
        "change_volume_percent": volume[1],
        "change_long_axis_mm": axis[0],
        "change_long_axis_percent": axis[1],
        "change_intensity_mean": intensity,
    }, notes


def _intensity_change(group: LesionGroup) -> tuple[float | None, str]:
    if not group.before or not group.after:
        return None, "intensity: a lesion at one time only has no change"
    if any(group.pair.unit_doubts):
        return None, ""  # the rows say so
    units = {lesion.intensity_unit for lesion in (*group.before, *group.after)}
    if len(units) > 1:
        return None, "intensity: the unit is not the same at both times"
    if units == {ARBITRARY}:
        return None, f"intensity: no two scans share the scale of {ARBITRARY}, so no change of it"
    before, after = _mean_intensity(group.before), _mean_intensity(group.after)
    return (
        (None, "intensity: not measured")
        if before is None or after is None
        else (after - before, "")
    )


def _unit_doubts(
    pair: ScanPair, b: LesionMeasurement | None, f: LesionMeasurement | None
) -> list[str]:
    """Why a row has no unit, from what is in doubt about the scans that its lesions lie in."""
    return [
        f"intensity: its unit at {time} is in doubt ({doubt})"
        for time, lesion, doubt in zip(
            ("baseline", "follow-up"), (b, f), pair.unit_doubts, strict=True
        )
        if lesion is not None and doubt
    ]


def _mean_intensity(lesions: Sequence[LesionMeasurement]) -> float | None:
    """Over the voxels of all of them."""
    means = [known(lesion.intensity_mean) for lesion in lesions]
    weights = [lesion.n_voxels for lesion in lesions]
    if None in means:
        return None
    return sum(mean * weight for mean, weight in zip(means, weights) if mean is not None) / sum(
        weights
    )


def _total(lesions: Sequence[LesionMeasurement], name: str) -> float | None:
    values = [known(getattr(lesion, name)) for lesion in lesions]
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
    return f"change: in the row of lesion {first.baseline} at baseline and {first.followup} at follow-up, with which it belongs"


def _notes(
    match: Match, b: LesionMeasurement | None, f: LesionMeasurement | None, pair: ScanPair
) -> list[str]:
    notes = []
    if pair.is_retaken and f is not None and match.status != "crumb":
        notes.append(
            f"diameters at follow-up: in the axial planes of the baseline, {pair.tilt_deg:.1f}° from its own slices"
        )
    if match.how == "distance":
        notes.append("no overlap: matched by the distance of the centroids")
    if match.relabelled:
        time = "baseline" if b is None else "follow-up"
        notes.append(
            f"overlaps lesion {', '.join(map(str, match.relabelled))} at {time}, which has another label"
        )
    for time, lesion in (("baseline", b), ("follow-up", f)):
        if lesion is not None and lesion.touches_border:
            notes.append(f"touches the border of the scan at {time}: its size is a lower bound")
    return notes

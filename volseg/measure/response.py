"""Matched lesions of two scans and their measurements → what changed, and the response of the patient by RECIST 1.1."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from volseg.columns import column
from volseg.measure import recist
from volseg.measure.lesions import LesionMeasurement
from volseg.measure.matching import Match

NORMAL_NODE_MM = 10.0  # a lymph node with a shorter short axis is normal
ROUNDING = 1e-9  # 12 mm are 20 % more than 10 mm, whatever the last bit says

RECIST = "RECIST 1.1, Eur J Cancer 45:228 (2009)"


@dataclass(frozen=True, slots=True, kw_only=True)
class LesionChange:
    """A row of comparison.csv: a pair of lesions, or a lesion that is there at one time only. None is an empty cell; `notes` says why."""

    patient: str = column("", "name of the patient: a row of response.csv")
    baseline_case: str = column("", "the earlier scan")
    followup_case: str = column("", "the later scan")
    status: str = column(
        "",
        "matched: one lesion at both times; merged: one of several that are one later; split: one of several that were one; "
        "regrouped: several were several others; new; gone; outside: where the other scan does not reach",
    )
    group: int = column("", "rows that merged or split together share it; every other row has its own")
    label_name: str | None = column("", "name of the label, or its value where it has no name")
    baseline_lesion_id: int | None = column("", "number of the lesion in the earlier scan; empty if it is not there")
    followup_lesion_id: int | None = column("", "number of the lesion in the later scan; empty if it is not there")
    is_target: bool | None = column(
        "", "a target lesion, chosen at baseline; empty where targets could not be chosen", None, source=RECIST
    )
    matched_by: str | None = column(
        "", "overlap, or distance: of centroids; empty for a lesion without a partner", None
    )
    dice: float | None = column("0 to 1", "Dice coefficient of the two lesions after registration", None)
    distance_mm: float | None = column("mm", "distance of their centroids after registration", None)
    baseline_volume_ml: float | None = column("mL", "volume of the earlier lesion; 0 of a new one", None)
    followup_volume_ml: float | None = column("mL", "volume of the later lesion; 0 of one that is gone", None)
    change_volume_ml: float | None = column(
        "mL",
        "later less earlier; of merged or split lesions the sum of all of them, in the first row of the group",
        None,
    )
    change_volume_percent: float | None = column("%", "that change in percent of the earlier volume", None)
    baseline_long_axis_mm: float | None = column("mm", "long axis of the earlier lesion; 0 of a new one", None)
    followup_long_axis_mm: float | None = column("mm", "long axis of the later lesion; 0 of one that is gone", None)
    change_long_axis_mm: float | None = column(
        "mm", "later less earlier; of split lesions their sum, in the first row of the group", None, source=RECIST
    )
    change_long_axis_percent: float | None = column("%", "that change in percent of the earlier long axis", None)
    baseline_short_axis_mm: float | None = column("mm", "short axis of the earlier lesion; 0 of a new one", None)
    followup_short_axis_mm: float | None = column("mm", "short axis of the later lesion; 0 of one that is gone", None)
    baseline_intensity_mean: float | None = column("intensity_unit", "mean intensity of the earlier lesion", None)
    followup_intensity_mean: float | None = column("intensity_unit", "mean intensity of the later lesion", None)
    change_intensity_mean: float | None = column(
        "intensity_unit",
        "later less earlier; of merged or split lesions of the means over their voxels, in the first row of the group",
        None,
    )
    intensity_unit: str | None = column(
        "", "unit of the intensities; empty where it is not the same at both times", None
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


@dataclass(frozen=True, slots=True, kw_only=True)
class PatientResponse:
    """A row of response.csv. A patient who could not be compared is a row too; None is unknown and is written as an empty cell."""

    patient: str = column("", "name of the patient")
    baseline_case: str | None = column("", "the earlier scan; empty if there is none", None)
    followup_case: str | None = column("", "the later scan; empty if there is none", None)
    status: Literal["done", "failed", "unpaired", "pending"] = column(
        "", "done; failed; unpaired: a scan without a partner; pending: not reached yet"
    )
    reason: str = column("", "why it was not compared and what to do; empty if it was", "")
    response: str | None = column(
        "",
        "CR, PR, SD, PD; Non-CR/Non-PD without target lesions; NE: not evaluable; empty if what it needs was not measured",
        None,
        source=RECIST,
    )
    response_rule: str = column("", "the rule that decided, with its numbers", "", source=RECIST)
    target_response: str | None = column(
        "", "CR, PR, SD, PD or NE of the targets; empty without targets", None, source=RECIST
    )
    non_target_response: str | None = column(
        "",
        "CR, Non-CR/Non-PD or NE of the other lesions; empty without any. Their unequivocal progression is for a reader to say",
        None,
        source=RECIST,
    )
    targets: str | None = column(
        "",
        "numbers of the target lesions at baseline, such as 1;3: the five largest measurable ones, two per label at most",
        None,
        source=RECIST,
    )
    baseline_sum_mm: float | None = column(
        "mm", "sum of diameters of the targets at baseline: long axes, of lymph nodes short axes", None, source=RECIST
    )
    nadir_sum_mm: float | None = column(
        "mm", "smallest sum before the follow-up; with two time points that of the baseline", None, source=RECIST
    )
    followup_sum_mm: float | None = column(
        "mm",
        "sum of diameters of the targets at follow-up: 0 of one that is gone, all pieces of one that split, the whole once of those that merged",
        None,
        source=RECIST,
    )
    change_sum_mm: float | None = column("mm", "followup_sum_mm less baseline_sum_mm", None, source=RECIST)
    change_sum_percent: float | None = column("%", "that change in percent of baseline_sum_mm", None, source=RECIST)
    volume_response: str | None = column(
        "",
        "as response, from the volumes of the targets: PR from −65.7 %, PD from +72.8 %, which RECIST's limits are for balls",
        None,
        source="cube of RECIST's limits; Therasse, J Natl Cancer Inst 92:205 (2000), appendix",
    )
    baseline_target_volume_ml: float | None = column("mL", "volume of the targets at baseline", None)
    followup_target_volume_ml: float | None = column("mL", "volume of the targets at follow-up", None)
    change_target_volume_percent: float | None = column("%", "change of it in percent of the baseline", None)
    baseline_volume_ml: float | None = column("mL", "volume of all lesions at baseline", None)
    followup_volume_ml: float | None = column("mL", "volume of all lesions at follow-up", None)
    change_volume_ml: float | None = column(
        "mL", "followup_volume_ml less baseline_volume_ml; empty if lesions lie outside the other scan", None
    )
    change_volume_percent: float | None = column("%", "that change in percent of the baseline", None)
    n_baseline: int | None = column("", "lesions at baseline", None)
    n_followup: int | None = column("", "lesions at follow-up", None)
    n_matched: int | None = column("", "lesions that are one at both times", None)
    n_new: int | None = column("", "lesions that are there at follow-up only", None)
    n_gone: int | None = column("", "lesions that were there at baseline only", None)
    n_merged: int | None = column("", "lesions of the baseline that merged with another", None)
    n_split: int | None = column("", "lesions of the baseline that split into several", None)
    n_regrouped: int | None = column("", "lesions of the baseline that are in several, each with others", None)
    n_outside: int | None = column("", "lesions of either time where the other scan does not reach", None)
    registration: str | None = column(
        "", "rigid; identical: the two scans are the same; none: world coordinates as they are", None
    )
    moved_mm: float | None = column("mm", "largest distance that registration moved the centroid of a lesion", None)
    turned_deg: float | None = column("°", "angle of the rotation", None)
    registration_error_mm: float | None = column(
        "mm", "largest distance at a lesion between registration of the scans one way and the other", None
    )
    similarity_before: float | None = column(
        "nats",
        "mutual information of the scans where their headers place them; empty if they do not overlap there",
        None,
    )
    similarity_after: float | None = column("nats", "mutual information of the scans after registration", None)
    warnings: str = column("", "what to know before trusting the row; empty if nothing", "")
    seconds: float | None = column("s", "time taken for this patient", None)
    volseg_version: str | None = column("", "version that compared", None)


def label_of(lesion: LesionMeasurement) -> str:
    """What two lesions must share to be the same: the name of their label, or its value where it has none."""
    return lesion.label_name or str(lesion.label)


def is_lymph_node(lesion: LesionMeasurement, lymph_nodes: Collection[str]) -> bool:
    """Whether its label is one of those, by name or value."""
    return not {label_of(lesion), str(lesion.label), f"label_{lesion.label}"}.isdisjoint(lymph_nodes)


def diameter_mm(lesion: LesionMeasurement, lymph_nodes: Collection[str] = ()) -> float | None:
    """The diameter that counts: the short axis of a lymph node, else the long axis; None if unknown."""
    return _known(lesion.short_axis_mm if is_lymph_node(lesion, lymph_nodes) else lesion.long_axis_mm)


def choose_targets(lesions: Sequence[LesionMeasurement], lymph_nodes: Collection[str] = ()) -> list[int] | None:
    """Numbers of the target lesions: the five largest measurable ones by diameter, two per label at most.

    Returns:
        None where there are lesions, and of none of them is known whether it is measurable.

    Source: RECIST 1.1, section 3.2; a label is an organ.
    """
    if lesions and all(lesion.recist_measurable is None for lesion in lesions):
        return None
    measured = [
        (size, lesion)
        for lesion in sorted(lesions, key=lambda lesion: lesion.lesion_id)
        if _is_measurable(lesion, lymph_nodes) and (size := diameter_mm(lesion, lymph_nodes))
    ]
    chosen = recist.choose_targets([size for size, _ in measured], [label_of(lesion) for _, lesion in measured])
    return sorted(measured[at][1].lesion_id for at in chosen)


def _is_measurable(lesion: LesionMeasurement, lymph_nodes: Collection[str]) -> bool:
    """As it was measured, unless its label was not known as lymph nodes then and is now, or the other way round."""
    long_mm, short_mm = _known(lesion.long_axis_mm), _known(lesion.short_axis_mm)
    spacing_mm = [_known(value) for value in (lesion.spacing_r_mm, lesion.spacing_a_mm, lesion.spacing_s_mm)]
    slice_mm = max((each for each in spacing_mm if each is not None), default=None)
    is_node = is_lymph_node(lesion, lymph_nodes)
    if is_node or (long_mm is not None and slice_mm is not None):
        return recist.is_measurable(long_mm or 0.0, short_mm or 0.0, slice_mm or 0.0, is_node=is_node)
    return bool(lesion.recist_measurable)


def lesion_changes(
    matches: Sequence[Match],
    baseline: Sequence[LesionMeasurement],
    followup: Sequence[LesionMeasurement],
    *,
    patient: str,
    baseline_case: str,
    followup_case: str,
    lymph_nodes: Collection[str] = (),
) -> list[LesionChange]:
    """A row per match, in their order. `lymph_nodes` are labels, by name or value."""
    before, after = ({lesion.lesion_id: lesion for lesion in lesions} for lesions in (baseline, followup))
    targets = choose_targets(baseline, lymph_nodes)
    groups = {group.number: group for group in _groups(matches, baseline, followup, lymph_nodes)}
    rows = []
    for match in matches:
        b = None if match.baseline is None else before[match.baseline]
        f = None if match.followup is None else after[match.followup]
        changes, notes = _changes(groups[match.group]) if match.is_first else ({}, [_referral(match, matches)])
        units = {lesion.intensity_unit for lesion in (b, f) if lesion is not None}
        rows.append(
            LesionChange(
                patient=patient,
                baseline_case=baseline_case,
                followup_case=followup_case,
                status=match.status,
                group=match.group,
                label_name=next(label_of(lesion) for lesion in (b, f) if lesion is not None),
                baseline_lesion_id=match.baseline,
                followup_lesion_id=match.followup,
                is_target=None if targets is None else match.baseline in targets,
                matched_by=match.how,
                dice=match.dice,
                distance_mm=match.distance_mm,
                **_columns_of("baseline", b, is_absent=match.status == "new"),
                **_columns_of("followup", f, is_absent=match.status == "gone"),
                **changes,
                intensity_unit=units.pop() if len(units) == 1 else None,
                notes="; ".join([*notes, *_notes(match, b, f)]),
            )
        )
    return rows


def judge_response(
    matches: Sequence[Match],
    baseline: Sequence[LesionMeasurement],
    followup: Sequence[LesionMeasurement],
    *,
    patient: str,
    baseline_case: str,
    followup_case: str,
    lymph_nodes: Collection[str] = (),
    doubt: str = "",
) -> PatientResponse:
    """The row of a patient: response by RECIST 1.1 with the rule that decided, sums, volumes and counts.

    With two time points the baseline is the nadir. Unequivocal progression of non-target lesions is a reader's judgement and is not made here.

    Args:
        lymph_nodes: labels, by name or value, whose lesions count by their short axis and are normal under 10 mm.
        doubt: why the matches cannot be trusted; then there is no response, for that is the reason. Empty if they can.

    Source: RECIST 1.1, sections 4.3 and 4.4, tables 1 and 2.
    """
    targets = choose_targets(baseline, lymph_nodes)
    groups = _groups(matches, baseline, followup, lymph_nodes)
    of_targets = [group for group in groups if any(lesion.lesion_id in (targets or ()) for lesion in group.before)]
    others = [group for group in groups if group.before and group not in of_targets and not group.was_normal]
    relabelled = {match.group for match in matches if match.relabelled}
    # Where the baseline does not reach counts as new too (section 4.3.5); under another label it may have been there before.
    new = [
        lesion
        for group in groups
        if group.status in ("new", "outside") and group.number not in relabelled
        for lesion in group.after
        if not _is_normal(lesion, lymph_nodes)
    ]
    verdict = _Verdict(new, _unclear(groups, relabelled, lymph_nodes), doubt if baseline and followup else "")
    chosen = [lesion for lesion in baseline if lesion.lesion_id in (targets or ())]
    sums = _Sums.of(chosen, of_targets, lambda lesion: diameter_mm(lesion, lymph_nodes)) if chosen else None
    volumes = _Sums.of(chosen, of_targets, lambda lesion: _known(lesion.volume_ml)) if chosen else None
    is_gone = all(group.is_gone for group in of_targets)
    target = None if sums is None else _target_response(sums, SIZE, is_gone=is_gone)
    non_target = _non_target_response(others)
    response, rule = verdict.of(target, non_target, sums, targets_are_known=targets is not None)
    by_volume = None if volumes is None else _target_response(volumes, VOLUME, is_gone=is_gone)
    volume_response, _ = verdict.of(by_volume, non_target, None, targets_are_known=targets is not None)
    n_outside = sum(group.status == "outside" for group in groups)
    total_before, total_after = (sum(lesion.volume_ml for lesion in lesions) for lesions in (baseline, followup))
    change_ml, change_percent = (None, None) if n_outside else _change(total_before, total_after)
    return PatientResponse(
        patient=patient,
        baseline_case=baseline_case,
        followup_case=followup_case,
        status="done",
        response=response,
        response_rule=rule,
        target_response=target,
        non_target_response=None if targets is None else non_target,
        targets=";".join(map(str, targets)) if targets else None,
        baseline_sum_mm=sums and sums.before,
        nadir_sum_mm=sums and sums.before,
        followup_sum_mm=sums and sums.after,
        change_sum_mm=sums and sums.change[0],
        change_sum_percent=sums and sums.change[1],
        volume_response=volume_response,
        baseline_target_volume_ml=volumes and volumes.before,
        followup_target_volume_ml=volumes and volumes.after,
        change_target_volume_percent=volumes and volumes.change[1],
        baseline_volume_ml=total_before,
        followup_volume_ml=total_after,
        change_volume_ml=change_ml,
        change_volume_percent=change_percent,
        n_baseline=len(baseline),
        n_followup=len(followup),
        n_matched=sum(group.status == "matched" for group in groups),
        n_new=sum(group.status == "new" for group in groups),
        n_gone=sum(group.status == "gone" for group in groups),
        n_merged=sum(len(group.before) for group in groups if group.status == "merged"),
        n_split=sum(len(group.before) for group in groups if group.status == "split"),
        n_regrouped=sum(len(group.before) for group in groups if group.status == "regrouped"),
        n_outside=n_outside,
        warnings="; ".join(_warnings(matches, of_targets, chosen, new, baseline, followup, lymph_nodes)),
    )


# ---- groups: the lesions of one row, or those that merged or split together


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    number: int
    status: str
    before: Sequence[LesionMeasurement]
    after: Sequence[LesionMeasurement]
    lymph_nodes: Collection[str]

    @property
    def was_normal(self) -> bool:
        return all(_is_normal(lesion, self.lymph_nodes) for lesion in self.before)

    @property
    def is_normal(self) -> bool:
        return all(_is_normal(lesion, self.lymph_nodes) for lesion in self.after)

    @property
    def is_gone(self) -> bool:
        """Whether nothing is left of it; a lymph node may be there, if it is of normal size."""
        return self.status == "gone" or (bool(self.after) and self.is_normal)


def _groups(
    matches: Sequence[Match],
    baseline: Sequence[LesionMeasurement],
    followup: Sequence[LesionMeasurement],
    lymph_nodes: Collection[str],
) -> list[_Group]:
    before, after = ({lesion.lesion_id: lesion for lesion in lesions} for lesions in (baseline, followup))
    members: dict[int, list[Match]] = defaultdict(list)
    for match in matches:
        members[match.group].append(match)
    return [
        _Group(
            number,
            group[0].status,
            [before[n] for n in dict.fromkeys(match.baseline for match in group) if n is not None],
            [after[n] for n in dict.fromkeys(match.followup for match in group) if n is not None],
            lymph_nodes,
        )
        for number, group in members.items()
    ]


def _is_normal(lesion: LesionMeasurement, lymph_nodes: Collection[str]) -> bool:
    """A lymph node too small to be of disease; one whose size is unknown is taken for disease."""
    size = diameter_mm(lesion, lymph_nodes)
    return is_lymph_node(lesion, lymph_nodes) and size is not None and size < NORMAL_NODE_MM


# ---- RECIST


@dataclass(frozen=True, slots=True)
class _Limits:
    """Changes of a sum, as shares of it, from which there is response or progression, and the least rise."""

    partial: float
    progression: float
    least_rise: float


SIZE = _Limits(-0.30, 0.20, 5.0)  # mm
VOLUME = _Limits(0.7**3 - 1, 1.2**3 - 1, 0.0)  # of balls whose diameters change so


@dataclass(frozen=True, slots=True)
class _Sums:
    """Sum over the targets at both times.

    Args:
        after: None where one of them is not known, or is cut off by the border of its scan.
        least: of those that are known, and of the parts that are seen.
        is_least_before: whether one of them is cut off at baseline, so that the sum is a lower bound.
    """

    before: float
    after: float | None
    least: float
    is_least_before: bool

    @classmethod
    def of(
        cls,
        targets: Sequence[LesionMeasurement],
        groups: Sequence[_Group],
        size: Callable[[LesionMeasurement], float | None],
    ) -> _Sums:
        after = [size(lesion) for group in groups for lesion in group.after]
        least = sum(value for value in after if value is not None)
        is_cut = any(lesion.touches_border for group in groups for lesion in group.after)
        is_known = None not in after and not is_cut and not any(group.status == "outside" for group in groups)
        return cls(
            sum(size(lesion) or 0.0 for lesion in targets),
            least if is_known else None,
            least,
            any(lesion.touches_border for lesion in targets),
        )

    @property
    def change(self) -> tuple[float | None, float | None]:
        return (None, None) if self.is_least_before else _change(self.before, self.after)


def _target_response(sums: _Sums, limits: _Limits, *, is_gone: bool) -> str:
    if is_gone:
        return "CR"
    rise = sums.least - sums.before
    has_grown = rise >= limits.progression * sums.before - ROUNDING and rise >= limits.least_rise - ROUNDING
    if has_grown and not sums.is_least_before:
        return "PD"  # whatever the targets that are not known have become
    if sums.after is None:
        return "NE"
    if rise <= limits.partial * sums.before + ROUNDING:
        return "PR"  # the more so if there was more at baseline than was seen
    return "NE" if sums.is_least_before else "SD"


def _non_target_response(groups: Sequence[_Group]) -> str | None:
    if not groups:
        return None
    if any(not group.is_gone and group.status != "outside" for group in groups):
        return "Non-CR/Non-PD"
    return "NE" if any(group.status == "outside" for group in groups) else "CR"


def _unclear(groups: Sequence[_Group], relabelled: Collection[int], lymph_nodes: Collection[str]) -> str:
    """What keeps anything but progression from being said; empty if nothing does."""
    found = []
    grown = [group for group in groups if group.before and group.was_normal and group.after and not group.is_normal]
    if grown:
        listed = ", ".join(str(lesion.lesion_id) for group in grown for lesion in group.after)
        found.append(f"lymph node {listed} was normal at baseline and is not any more: say whether that is new disease")
    named = [lesion for group in groups if group.number in relabelled and not group.before for lesion in group.after]
    if named := [str(lesion.lesion_id) for lesion in named if not _is_normal(lesion, lymph_nodes)]:
        found.append(f"lesion {', '.join(named)} is new or had another label at baseline: say which")
    return "; ".join(found)


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What the overall response depends on besides targets and other lesions.

    Args:
        new: lesions that count as new.
        unclear: what keeps anything but progression from being said. doubt: what keeps everything from being said.
    """

    new: Sequence[LesionMeasurement]
    unclear: str
    doubt: str

    def of(
        self, target: str | None, non_target: str | None, sums: _Sums | None, *, targets_are_known: bool
    ) -> tuple[str | None, str]:
        """Response and the rule that decided. `non_target` is of all lesions where the targets are not known."""
        if self.doubt:
            return None, self.doubt
        if self.new:
            listed = ", ".join(f"{lesion.lesion_id} ({_size_text(lesion)})" for lesion in self.new)
            return "PD", f"PD: new lesion{'s' * (len(self.new) > 1)} {listed}"
        found, rule = _overall(target, non_target, sums, targets_are_known=targets_are_known)
        return (None, self.unclear) if self.unclear and found != "PD" else (found, rule)


def _overall(
    target: str | None, non_target: str | None, sums: _Sums | None, *, targets_are_known: bool
) -> tuple[str | None, str]:
    """Of a patient without new lesions."""
    if target is None and non_target is None:
        return "NE", "NE: no lesion of disease at baseline and no new one, so nothing can respond"
    if {target, non_target} <= {"CR", None}:
        return "CR", "CR: all lesions of the baseline are gone, and no lesion is new"
    if not targets_are_known:
        return None, "diameters were not measured, so there are no targets to judge by: measure both scans again"
    if target is None:
        return non_target, f"{non_target}: no target lesion, since none was measurable at baseline; {_REST[non_target]}"
    if target == "CR":
        return "PR", f"PR: all targets are gone; {_REST[non_target]}"
    return target, f"{target}: {_sum_text(sums)}; {_WHY[target]}"


_REST = {
    None: "there are no other lesions",
    "CR": "the other lesions are gone",
    "Non-CR/Non-PD": "other lesions are still there",
    "NE": "other lesions lie where the follow-up does not reach",
}
_WHY = {
    "PD": "PD from +20 % and +5 mm over the nadir, which is the baseline, as there are two time points",
    "PR": "PR from −30 %",
    "SD": "neither −30 % (PR) nor +20 % and +5 mm (PD) over the nadir, which is the baseline, as there are two time points",
    "NE": "a target lies where the follow-up does not reach, is cut off by the border of a scan, or has no diameter there",
}


def _sum_text(sums: _Sums | None) -> str:
    if sums is None:
        return ""
    if sums.after is None:
        return f"sum of target diameters {_before_text(sums)} → at least {sums.least:.1f} mm"
    text = f"sum of target diameters {_before_text(sums)} → {sums.after:.1f} mm"
    change, percent = sums.change
    if change is not None and percent is not None:
        text += f": {change:+.1f} mm, {percent:+.1f} %"
    return text.replace("-", "−")


def _before_text(sums: _Sums) -> str:
    return f"{'at least ' if sums.is_least_before else ''}{sums.before:.1f} mm"


def _size_text(lesion: LesionMeasurement) -> str:
    size = diameter_mm(lesion)
    return f"{lesion.volume_ml:.3g} mL" + ("" if size is None else f", {size:.1f} mm")


def _warnings(
    matches: Sequence[Match],
    of_targets: Sequence[_Group],
    targets: Sequence[LesionMeasurement],
    new: Sequence[LesionMeasurement],
    baseline: Sequence[LesionMeasurement],
    followup: Sequence[LesionMeasurement],
    lymph_nodes: Collection[str],
) -> list[str]:
    found = []
    names = {label_of(lesion) for lesion in (*baseline, *followup) if not is_lymph_node(lesion, lymph_nodes)}
    nodes = sorted(name for name in names if re.search(r"lymph|(?<![a-z])nodes?(?![a-z])", name.lower()))
    if nodes:
        found.append(f"W_NODE: {', '.join(nodes)} sounds like lymph nodes, but was not said to be: long axes are taken")
    sizes = [diameter_mm(lesion, lymph_nodes) for lesion in new]
    if new and not any(size is None or size >= recist.MEASURABLE_MM for size in sizes):
        found.append("W_NEW: every new lesion is under 10 mm; RECIST asks that a new lesion be unequivocal: look at it")
    if any(match.relabelled for match in matches):
        found.append("W_LABEL: a lesion overlaps one of another label; it counts as gone, and not as new")
    for group in of_targets:
        joined = [lesion.lesion_id for lesion in group.before if lesion not in targets]
        if joined:
            listed = ", ".join(map(str, joined))
            found.append(
                f"W_MERGED: a target merged with lesions {listed}, which are no targets; the whole counts as target"
            )
    if any(match.status == "outside" for match in matches):
        found.append(
            "W_OUTSIDE: lesions lie where the other scan does not reach; those of the follow-up count as new (RECIST 1.1, section 4.3.5)"
        )
    if any(lesion.touches_border for lesion in (*baseline, *followup)):
        found.append("W_BORDER: a lesion touches the border of its scan, so its size is a lower bound")
    return found


# ---- rows of lesions


def _columns_of(time: str, lesion: LesionMeasurement | None, *, is_absent: bool) -> dict[str, Any]:
    """The columns of one time; zeros for a lesion that is not there then, empty ones where that is not known."""
    if lesion is None:
        zero = 0.0 if is_absent else None
        return {f"{time}_{name}": zero for name in ("volume_ml", "long_axis_mm", "short_axis_mm")}
    return {
        f"{time}_volume_ml": lesion.volume_ml,
        f"{time}_long_axis_mm": _known(lesion.long_axis_mm),
        f"{time}_short_axis_mm": _known(lesion.short_axis_mm),
        f"{time}_intensity_mean": _known(lesion.intensity_mean),
        f"{time}_centroid_r_mm": lesion.centroid_r_mm,
        f"{time}_centroid_a_mm": lesion.centroid_a_mm,
        f"{time}_centroid_s_mm": lesion.centroid_s_mm,
    }


def _changes(group: _Group) -> tuple[dict[str, Any], list[str]]:
    """The columns of change of a group, and why some of them are empty."""
    if group.status == "outside":
        return {}, ["change: the other scan does not reach there"]
    volume = _change(_total(group.before, "volume_ml"), _total(group.after, "volume_ml"))
    axis = _change(_total(group.before, "long_axis_mm"), _total(group.after, "long_axis_mm"))
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


def _intensity_change(group: _Group) -> tuple[float | None, str]:
    if not group.before or not group.after:
        return None, "intensity: a lesion at one time only has no change"
    if len({lesion.intensity_unit for lesion in (*group.before, *group.after)}) > 1:
        return None, "intensity: the unit is not the same at both times"
    before, after = _mean_intensity(group.before), _mean_intensity(group.after)
    return (None, "intensity: not measured") if before is None or after is None else (after - before, "")


def _mean_intensity(lesions: Sequence[LesionMeasurement]) -> float | None:
    """Over the voxels of all of them."""
    means = [_known(lesion.intensity_mean) for lesion in lesions]
    weights = [lesion.n_voxels for lesion in lesions]
    if None in means:
        return None
    return sum(mean * weight for mean, weight in zip(means, weights) if mean is not None) / sum(weights)


def _total(lesions: Sequence[LesionMeasurement], name: str) -> float | None:
    values = [_known(getattr(lesion, name)) for lesion in lesions]
    return None if None in values else float(sum(value for value in values if value is not None))


def _referral(match: Match, matches: Sequence[Match]) -> str:
    first = next(other for other in matches if other.group == match.group and other.is_first)
    return f"change: in the row of lesion {first.baseline} at baseline and {first.followup} at follow-up, with which it belongs"


def _notes(match: Match, b: LesionMeasurement | None, f: LesionMeasurement | None) -> list[str]:
    notes = []
    if match.how == "distance":
        notes.append("no overlap: matched by the distance of the centroids")
    if match.relabelled:
        time = "baseline" if b is None else "follow-up"
        notes.append(f"overlaps lesion {', '.join(map(str, match.relabelled))} at {time}, which has another label")
    for time, lesion in (("baseline", b), ("follow-up", f)):
        if lesion is not None and lesion.touches_border:
            notes.append(f"touches the border of the scan at {time}: its size is a lower bound")
    return notes


def _change(before: float | None, after: float | None) -> tuple[float | None, float | None]:
    """Difference, and in percent of `before`; None where unknown."""
    if before is None or after is None:
        return None, None
    return after - before, 100 * (after - before) / before if before > 0 else None


def _known(value: float | None) -> float | None:
    """None for NaN too."""
    return None if value is None or math.isnan(value) else value

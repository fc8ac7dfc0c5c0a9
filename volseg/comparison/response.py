"""Changes in the lesions of a patient → response by RECIST 1.1, with the rule that decided."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

import numpy as np
from scipy.spatial import KDTree

from volseg.columns import column
from volseg.comparison.changes import (
    LesionGroup,
    ScanPair,
    centroids_mm,
    difference,
    groups_of,
    lesions_of,
)
from volseg.comparison.matching import MIN_FRACTION
from volseg.comparison.targets import (
    RECIST,
    choose_targets,
    diameter_mm,
    is_lymph_node,
    is_normal,
    label_of,
    none_if_nan,
)
from volseg.measurement import recist
from volseg.measurement.rows import LesionMeasurement

ROUNDING = 1e-9  # so that 12 mm are 20 % more than 10 mm in floating point
MOST_NAMED = 5  # crumbs listed in a warning
ONE_PLACE_MM = 10.0  # nearer lesions in two scans of the same time may be one lesion


@dataclass(frozen=True, slots=True, kw_only=True)
class PatientResponse:
    """A row of response.csv, also for a patient who could not be compared.

    None means unknown and is written as an empty cell.
    """

    patient: str = column("", "name of the patient")
    baseline_case: str | None = column(
        "",
        "baseline scan (several are joined with ;), empty if there is none",
        None,
    )
    followup_case: str | None = column(
        "",
        "follow-up scan (several are joined with ;), empty if there is none",
        None,
    )
    status: Literal["done", "failed", "unpaired", "pending", "unknown"] = column(
        "",
        "done; failed; unpaired: no scan has a partner; pending: not reached yet; "
        "unknown: the patient's record is damaged",
    )
    reason: str = column("", "why the patient was not compared and what to do; empty if done", "")
    response: str | None = column(
        "",
        "CR, PR, SD, PD; Non-CR/Non-PD without target lesions; NE: not evaluable; empty if the "
        "necessary sizes were not measured, if diameters and volumes disagree, or if a reader must "
        "decide",
        None,
        source=RECIST,
    )
    response_rule: str = column("", "rule that decided, with its numbers", "", source=RECIST)
    target_response: str | None = column(
        "", "CR, PR, SD, PD or NE of the targets; empty without targets", None, source=RECIST
    )
    non_target_response: str | None = column(
        "",
        "CR, Non-CR/Non-PD or NE of the other lesions; empty if there are none. A reader must "
        "judge their unequivocal progression",
        None,
        source=RECIST,
    )
    targets: str | None = column(
        "",
        "numbers of the target lesions at baseline, such as 1;3, or chest:1;abdomen:3 for several "
        "scans: the five largest measurable lesions, at most two per label",
        None,
        source=RECIST,
    )
    baseline_sum_mm: float | None = column(
        "mm",
        "sum of diameters of the targets at baseline: long axes, or short axes of lymph nodes",
        None,
        source=RECIST,
    )
    nadir_sum_mm: float | None = column(
        "mm",
        "smallest sum before the follow-up; with two time points, the baseline sum",
        None,
        source=RECIST,
    )
    followup_sum_mm: float | None = column(
        "mm",
        "sum of diameters of the targets at follow-up: 0 for a target that is gone, all parts of "
        "one that split, and one diameter for targets that merged",
        None,
        source=RECIST,
    )
    change_sum_mm: float | None = column(
        "mm", "followup_sum_mm − baseline_sum_mm", None, source=RECIST
    )
    change_sum_percent: float | None = column(
        "%", "change_sum_mm in percent of baseline_sum_mm", None, source=RECIST
    )
    volume_response: str | None = column(
        "",
        "response from the volumes of the targets: PR from −65.7 %, PD from +72.8 %, equal to "
        "RECIST's limits for balls",
        None,
        source="cube of RECIST's limits; Therasse, J Natl Cancer Inst 92:205 (2000), appendix",
    )
    baseline_target_volume_ml: float | None = column(
        "mL", "volume of the targets at baseline", None
    )
    followup_target_volume_ml: float | None = column(
        "mL", "volume of the targets at follow-up", None
    )
    change_target_volume_percent: float | None = column(
        "%", "change of the target volume in percent of the baseline", None
    )
    baseline_volume_ml: float | None = column("mL", "volume of all lesions at baseline", None)
    followup_volume_ml: float | None = column("mL", "volume of all lesions at follow-up", None)
    change_volume_ml: float | None = column(
        "mL",
        "followup_volume_ml − baseline_volume_ml; empty if lesions lie outside the other scan",
        None,
    )
    change_volume_percent: float | None = column(
        "%", "change_volume_ml in percent of the baseline", None
    )
    n_baseline: int | None = column("", "number of lesions at baseline", None)
    n_followup: int | None = column("", "number of lesions at follow-up", None)
    n_matched: int | None = column("", "lesions matched one to one", None)
    n_new: int | None = column("", "lesions seen at follow-up only", None)
    n_gone: int | None = column("", "lesions seen at baseline only", None)
    n_merged: int | None = column("", "baseline lesions that merged with another", None)
    n_split: int | None = column("", "baseline lesions that split into several", None)
    n_regrouped: int | None = column("", "baseline lesions that both merged and split", None)
    n_outside: int | None = column(
        "", "lesions of either time outside the field of view of the other scan", None
    )
    n_crumbs: int | None = column(
        "",
        "small pieces beside a lesion at either time: counted with it, not in the numbers above",
        None,
    )
    registration: str | None = column(
        "",
        "rigid; identical: the two scans are the same; none: world coordinates are used as they "
        "are; those of several pairs are joined with ;",
        None,
    )
    moved_mm: float | None = column(
        "mm", "largest displacement of a lesion centroid by the registration", None
    )
    turned_deg: float | None = column(
        "°", "rotation angle of the registration; of several pairs, the largest", None
    )
    tilt_deg: float | None = column(
        "°",
        "angle between the axial slices of the two scans in the patient; of several pairs, the "
        "largest; from 2° on, follow-up diameters are measured in the axial planes of the baseline",
        None,
    )
    registration_error_mm: float | None = column(
        "mm",
        "largest distance at a lesion between forward and backward registration",
        None,
    )
    similarity_before: float | None = column(
        "nats",
        "mutual information of the scans before registration; of several pairs, the smallest; "
        "empty if they do not overlap",
        None,
    )
    similarity_after: float | None = column(
        "nats",
        "mutual information of the scans after registration; of several pairs, the smallest",
        None,
    )
    warnings: str = column("", "what to know before trusting the row; empty if nothing", "")
    seconds: float | None = column("s", "time taken for this patient", None)
    volseg_version: str | None = column("", "volseg version that compared the patient", None)


def judge_response(
    pairs: Sequence[ScanPair], *, patient: str, lymph_nodes: Collection[str] = ()
) -> PatientResponse:
    """Return the row of a patient: response by RECIST 1.1 and its rule, sums, volumes and counts.

    Targets are chosen, summed and judged over all scans of the patient. With two time points, the
    baseline is the nadir. Unequivocal progression of non-target lesions is left to a reader. Unless
    a lesion is new, the response is empty if the matches of a pair cannot be trusted, or if the
    diameters and volumes of the targets disagree.

    Args:
        lymph_nodes: labels of lymph nodes, by name or value; these are measured by their short
            axis and are normal below 10 mm.

    Source: RECIST 1.1, sections 4.3 and 4.4, tables 1 and 2.
    """
    name_of = _numbered if len(pairs) == 1 else _numbered_in_its_scan
    baseline, followup = lesions_of(pairs)
    targets = choose_targets(baseline, lymph_nodes)
    target_lesions = targets or []
    target_ids = {id(lesion) for lesion in target_lesions}
    groups = groups_of(pairs, lymph_nodes)
    of_targets = [
        group for group in groups if any(id(lesion) in target_ids for lesion in group.before)
    ]
    others = [
        group
        for group in groups
        if group.before and group not in of_targets and not group.was_normal
    ]
    doubtful = [pair for pair in pairs if _is_doubtful(pair)]
    twins = [_twins([pair.baseline for pair in pairs]), _twins([pair.followup for pair in pairs])]
    # A lesion outside the baseline's field of view counts as new too (section 4.3.5). One that had
    # another label may have been there before.
    only_later = [
        group
        for group in groups
        if group.status in ("new", "outside")
        and not group.is_relabelled
        and group.pair not in doubtful
    ]
    uncertain = {id(group) for group in only_later if _may_be_seen(group, groups, twins[1])}
    new, perhaps_new = (
        [
            lesion
            for group in only_later
            if (id(group) in uncertain) is is_uncertain
            for lesion in group.after
            if not is_normal(lesion, lymph_nodes)
        ]
        for is_uncertain in (False, True)
    )
    new_pieces = _new_pieces(groups, lymph_nodes)
    verdict = _Verdict(
        [f"{name_of(lesion)} ({_size_text(lesion)})" for lesion in new],
        _unclear(groups, perhaps_new, new_pieces, lymph_nodes, name_of),
        "; ".join(
            pair.doubt if len(pairs) == 1 else f"{pair.followup_case}: {pair.doubt}"
            for pair in doubtful
        ),
    )
    sums = _Sums.of(target_lesions, of_targets, lambda lesion: diameter_mm(lesion, lymph_nodes))
    volumes = _Sums.of(target_lesions, of_targets, lambda lesion: none_if_nan(lesion.volume_ml))
    is_gone = all(group.is_gone for group in of_targets)
    target = None if sums is None else _target_response(sums, SIZE, is_gone=is_gone)
    non_target = _non_target_response(others)
    by_volume = None if volumes is None else _target_response(volumes, VOLUME, is_gone=is_gone)
    sizes = {id(lesion): diameter_mm(lesion, lymph_nodes) or 0.0 for lesion in target_lesions}
    contradiction, difference_of_sums = _disagreement(
        sums, volumes, of_targets, sizes, is_gone=is_gone
    )
    response, rule = verdict.of(target, non_target, sums, targets_are_known=targets is not None)
    if contradiction and not verdict.is_decided:
        response, rule = None, contradiction
    volume_response, _ = verdict.of(
        by_volume, non_target, None, targets_are_known=targets is not None
    )
    n_outside = sum(group.status == "outside" for group in groups)
    total_before, total_after = (
        sum(lesion.volume_ml for lesion in lesions) for lesions in (baseline, followup)
    )
    change_ml, change_percent = (None, None) if n_outside else difference(total_before, total_after)
    return PatientResponse(
        patient=patient,
        baseline_case=";".join(pair.baseline_case or "" for pair in pairs),
        followup_case=";".join(pair.followup_case or "" for pair in pairs),
        status="done",
        response=response,
        response_rule=rule,
        target_response=target,
        non_target_response=None if targets is None else non_target,
        targets=";".join(map(name_of, target_lesions)) or None,
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
        n_crumbs=sum(len(group.crumbs_before) + len(group.crumbs_after) for group in groups),
        tilt_deg=max((pair.tilt_deg for pair in pairs if pair.tilt_deg is not None), default=None),
        warnings="; ".join(
            [
                *_warnings(groups, of_targets, target_ids, new, twins, lymph_nodes, name_of),
                *_crumb_warnings(groups, name_of),
                *([f"W_DISAGREE: {contradiction}"] if contradiction else []),
                *([f"W_VOLUME: {difference_of_sums}"] if difference_of_sums else []),
            ]
        ),
    )


def _is_doubtful(pair: ScanPair) -> bool:
    """Check whether lesions may be matched wrongly; without lesions in one scan, none are."""
    return bool(pair.doubt and pair.baseline and pair.followup)


_Name = Callable[[LesionMeasurement], str]
_Sizes = Mapping[int, float]  # id() of a target → its diameter at baseline in mm


def _numbered(lesion: LesionMeasurement) -> str:
    return str(lesion.lesion_id)


def _numbered_in_its_scan(lesion: LesionMeasurement) -> str:
    return f"{lesion.case_id}:{lesion.lesion_id}"


# ---- RECIST


@dataclass(frozen=True, slots=True)
class _Limits:
    """Limits of partial response and progression, as fractions of the sum, and the least rise."""

    partial: float
    progression: float
    least_rise: float


SIZE = _Limits(-0.30, 0.20, 5.0)  # mm
VOLUME = _Limits(0.7**3 - 1, 1.2**3 - 1, 0.0)  # the same for the volumes of balls


@dataclass(frozen=True, slots=True)
class _Sums:
    """Sum over the targets at both times.

    Args:
        after: None if a target is unknown, or cut off by the border of its scan.
        least: sum over the known and visible parts, a lower bound.
        is_least_before: a target is cut off at baseline, so `before` is a lower bound.
    """

    before: float
    after: float | None
    least: float
    is_least_before: bool

    @classmethod
    def of(
        cls,
        targets: Sequence[LesionMeasurement],
        groups: Sequence[LesionGroup],
        size: Callable[[LesionMeasurement], float | None],
    ) -> _Sums | None:
        """Return the sums; None if there are no targets."""
        if not targets:
            return None
        after = [size(lesion) for group in groups for lesion in group.after]
        least = sum(value for value in after if value is not None)
        is_cut = any(lesion.touches_border for group in groups for lesion in group.after)
        is_known = (
            None not in after
            and not is_cut
            and not any(group.status == "outside" for group in groups)
        )
        return cls(
            sum(size(lesion) or 0.0 for lesion in targets),
            least if is_known else None,
            least,
            any(lesion.touches_border for lesion in targets),
        )

    @property
    def change(self) -> tuple[float | None, float | None]:
        return (None, None) if self.is_least_before else difference(self.before, self.after)


def _target_response(sums: _Sums, limits: _Limits, *, is_gone: bool) -> str:
    if is_gone:
        return "CR"
    rise = sums.least - sums.before
    has_grown = (
        rise >= limits.progression * sums.before - ROUNDING and rise >= limits.least_rise - ROUNDING
    )
    if has_grown and not sums.is_least_before:
        return "PD"  # whatever the size of the unknown targets
    if sums.after is None:
        return "NE"
    if rise <= limits.partial * sums.before + ROUNDING:
        return "PR"  # even more so if a target was cut off at baseline
    return "NE" if sums.is_least_before else "SD"


def _disagreement(
    sums: _Sums | None,
    volumes: _Sums | None,
    of_targets: Sequence[LesionGroup],
    sizes: _Sizes,
    *,
    is_gone: bool,
) -> tuple[str, str]:
    """Return why diameters and volumes contradict each other; else why their classes differ.

    If a lesion keeps its shape, its diameter grows by the cube root of its volume ratio. So the
    volumes imply a sum of diameters; if that gives another response, one of the two is wrong, or
    the lesions changed their shape. The sum of volumes may give another response even without a
    contradiction, as large lesions weigh more in it.
    """
    if sums is None or volumes is None:
        return "", ""
    by_size = _target_response(sums, SIZE, is_gone=is_gone)
    by_volume = _target_response(volumes, VOLUME, is_gone=is_gone)
    if "NE" in (by_size, by_volume):
        return "", ""
    implied_mm = _implied_mm(of_targets, sizes)
    implied = _target_response(
        replace(sums, after=implied_mm, least=implied_mm), SIZE, is_gone=is_gone
    )
    (_, size_percent), (_, volume_percent) = sums.change, volumes.change
    by_diameters = f"{by_size} by their diameters{_percent_text(size_percent)}"
    if implied != by_size:
        return (
            f"the targets are {by_diameters} and {implied} by their volumes"
            f"{_percent_text(volume_percent)}, which imply a sum of diameters of "
            f"{implied_mm:.1f} mm: check both masks to see which is right"
        ), ""
    without_rise = _target_response(sums, replace(SIZE, least_rise=0.0), is_gone=is_gone)
    if by_volume in (by_size, without_rise):
        return "", ""  # the least rise of 5 mm has no equivalent for volumes
    return "", (
        f"the sum of volumes alone would be {by_volume}{_percent_text(volume_percent)}, "
        f"the targets are {by_diameters}: large targets weigh more in a sum of volumes"
    )


def _implied_mm(of_targets: Sequence[LesionGroup], sizes: _Sizes) -> float:
    """Return the sum of diameters at follow-up if every target had kept its shape."""
    total_mm = 0.0
    for group in of_targets:
        before_ml, after_ml = (
            sum(lesion.volume_ml for lesion in lesions) for lesions in (group.before, group.after)
        )
        before_mm = sum(sizes.get(id(lesion), 0.0) for lesion in group.before)
        total_mm += before_mm * (after_ml / before_ml) ** (1 / 3) if before_ml else 0.0
    return total_mm


def _percent_text(percent: float | None) -> str:
    return "" if percent is None else f" ({percent:+.1f} %)".replace("-", "−")


def _non_target_response(groups: Sequence[LesionGroup]) -> str | None:
    if not groups:
        return None
    if any(group.status == "outside" for group in groups):
        return "NE"  # not all of them were seen
    return "CR" if all(group.is_gone for group in groups) else "Non-CR/Non-PD"


def _may_be_seen(
    group: LesionGroup, groups: Sequence[LesionGroup], twins: Sequence[_Twins]
) -> bool:
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


def _new_pieces(
    groups: Sequence[LesionGroup], lymph_nodes: Collection[str]
) -> list[LesionMeasurement]:
    """Return crumbs as long as a measurable lesion, beside an old lesion, where nothing was."""
    pieces = []
    for group in groups:
        shared_mm3 = {
            match.followup: match.overlap_mm3 or 0.0
            for match in group.matches
            if match.status == "crumb"
        }
        for crumb in group.crumbs_after if group.before else ():
            size_mm = diameter_mm(crumb, lymph_nodes)
            is_new = shared_mm3[crumb.lesion_id] < MIN_FRACTION * crumb.volume_mm3
            if is_new and size_mm is not None and size_mm >= recist.MEASURABLE_MM:
                pieces.append(crumb)
    return pieces


def _crumb_warnings(groups: Sequence[LesionGroup], name_of: _Name) -> Iterator[str]:
    for time, crumbs in (
        ("baseline", [crumb for group in groups for crumb in group.crumbs_before]),
        ("follow-up", [crumb for group in groups for crumb in group.crumbs_after]),
    ):
        if not crumbs:
            continue
        names = ", ".join(
            f"{name_of(crumb)} ({_size_text(crumb)})" for crumb in crumbs[:MOST_NAMED]
        )
        more = f" and {len(crumbs) - MOST_NAMED} more" if len(crumbs) > MOST_NAMED else ""
        yield f"W_CRUMB: {names}{more} at {time}: small pieces beside a lesion, counted with it"


def _unclear(
    groups: Sequence[LesionGroup],
    perhaps_new: Sequence[LesionMeasurement],
    new_pieces: Sequence[LesionMeasurement],
    lymph_nodes: Collection[str],
    name_of: _Name,
) -> str:
    """Return what a reader must decide before any response but progression; else empty."""
    questions = []
    grown = [
        lesion
        for group in groups
        if group.before and group.was_normal and group.after and not group.is_normal
        for lesion in group.after
    ]
    if grown:
        listed = ", ".join(map(name_of, grown))
        questions.append(
            f"lymph node {listed} was normal at baseline and no longer is: decide whether that is "
            "new disease"
        )
    relabelled = [
        lesion
        for group in groups
        if group.is_relabelled and not group.before
        for lesion in group.after
        if not is_normal(lesion, lymph_nodes)
    ]
    if relabelled:
        listed = ", ".join(map(name_of, relabelled))
        questions.append(f"lesion {listed} is new or had another label at baseline: decide which")
    if perhaps_new:
        listed = ", ".join(map(name_of, perhaps_new))
        questions.append(
            f"lesion {listed} is new, or another scan of the patient shows it too: decide which"
        )
    if new_pieces:
        listed = ", ".join(f"{name_of(lesion)} ({_size_text(lesion)})" for lesion in new_pieces)
        questions.append(
            f"piece {listed} beside a lesion is new: decide whether it is new disease or a part of "
            "that lesion"
        )
    return "; ".join(questions)


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What the overall response depends on besides target and non-target lesions.

    Args:
        new: lesions that count as new, with their sizes.
        unclear: why there is no response except progression.
        doubt: why there is no response at all.
    """

    new: Sequence[str]
    unclear: str
    doubt: str

    @property
    def is_decided(self) -> bool:
        """True if the response does not depend on the targets."""
        return bool(self.new or self.doubt)

    def of(
        self,
        target: str | None,
        non_target: str | None,
        sums: _Sums | None,
        *,
        targets_are_known: bool,
    ) -> tuple[str | None, str]:
        """Return response and rule; `non_target` covers all lesions if the targets are unknown."""
        if self.new:
            return "PD", f"PD: new lesion{'s' * (len(self.new) > 1)} {', '.join(self.new)}"
        if self.doubt:
            return None, self.doubt
        response, rule = _overall(target, non_target, sums, targets_are_known=targets_are_known)
        return (None, self.unclear) if self.unclear and response != "PD" else (response, rule)


def _overall(
    target: str | None, non_target: str | None, sums: _Sums | None, *, targets_are_known: bool
) -> tuple[str | None, str]:
    """Return response and rule of a patient without new lesions."""
    if target is None and non_target is None:
        return "NE", "NE: no disease at baseline and no new lesion, so nothing can respond"
    if {target, non_target} <= {"CR", None}:
        return "CR", "CR: all baseline lesions are gone, and no lesion is new"
    if not targets_are_known:
        return (
            None,
            "diameters were not measured, so no targets can be chosen: measure both scans again",
        )
    if target is None:
        others = NON_TARGET_TEXTS[non_target]
        return non_target, f"{non_target}: no target, as no lesion was measurable; {others}"
    if target == "CR":
        return "PR", f"PR: all targets are gone; {NON_TARGET_TEXTS[non_target]}"
    return target, f"{target}: {_sum_text(sums)}; {TARGET_TEXTS[target]}"


NON_TARGET_TEXTS = {
    None: "there are no other lesions",
    "CR": "the other lesions are gone",
    "Non-CR/Non-PD": "other lesions are still there",
    "NE": "other lesions lie outside the field of view of the follow-up",
}
NADIR = "the nadir, which is the baseline, as there are two time points"
TARGET_TEXTS = {
    "PD": f"PD from +20 % and +5 mm over {NADIR}",
    "PR": "PR from −30 %",
    "SD": f"neither −30 % (PR) nor +20 % and +5 mm (PD) over {NADIR}",
    "NE": (
        "a target lies outside the field of view of the follow-up, is cut off by the border of a "
        "scan, or has no diameter"
    ),
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
    groups: Sequence[LesionGroup],
    of_targets: Sequence[LesionGroup],
    target_ids: Collection[int],
    new: Sequence[LesionMeasurement],
    twins: Sequence[Sequence[_Twins]],
    lymph_nodes: Collection[str],
    name_of: _Name,
) -> Iterator[str]:
    lesions = [lesion for group in groups for lesion in (*group.before, *group.after)]
    names = {label_of(lesion) for lesion in lesions if not is_lymph_node(lesion, lymph_nodes)}
    nodes = sorted(
        name for name in names if re.search(r"lymph|(?<![a-z])nodes?(?![a-z])", name.lower())
    )
    if nodes:
        listed = ", ".join(nodes)
        yield f"W_NODE: {listed} sounds like lymph nodes: pass --lymph-node to use short axes"
    sizes = [diameter_mm(lesion, lymph_nodes) for lesion in new]
    if new and not any(size is None or size >= recist.MEASURABLE_MM for size in sizes):
        yield "W_NEW: all new lesions are under 10 mm; check them, RECIST wants unequivocal ones"
    if any(group.is_relabelled for group in groups):
        yield "W_LABEL: a lesion overlaps one of another label; it counts as gone, and not as new"
    for group in of_targets:
        joined = [name_of(lesion) for lesion in group.before if id(lesion) not in target_ids]
        if joined:
            merged = f"a target merged with lesions {', '.join(joined)}, which are not targets"
            yield f"W_MERGED: {merged}; the whole counts as target"
    if outside := [group for group in groups if group.status == "outside"]:
        counts = "; those of the follow-up count as new (RECIST 1.1, section 4.3.5)"
        is_counted = any(not _is_doubtful(group.pair) for group in outside)
        outside_of = "lesions lie outside the field of view of the other scan"
        yield f"W_OUTSIDE: {outside_of}{counts if is_counted else ''}"
    if any(lesion.touches_border for lesion in lesions):
        yield "W_BORDER: a lesion touches the border of its scan, so its size is a lower bound"
    for time, twins_then in zip(("baseline", "follow-up"), twins, strict=True):
        if twins_then:
            listed = ", ".join(f"{name_of(a)} and {name_of(b)}" for a, b in twins_then)
            yield (
                f"W_TWICE: at {time} {listed} lie at the same place. If two scans show the same "
                "lesion, it counts twice: remove it from the masks of one scan, at both times"
            )


_Twins = tuple[LesionMeasurement, LesionMeasurement]


def _twins(scans: Sequence[Sequence[LesionMeasurement]]) -> list[_Twins]:
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

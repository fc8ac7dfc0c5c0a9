"""Changes in the lesions of a patient → response by RECIST 1.1, with the rule that decided."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from volseg.columns import column, optional
from volseg.comparison.changes import difference
from volseg.comparison.groups import PatientLesions, ScanLesions, ScanPair
from volseg.comparison.newness import newness_of, twins_of
from volseg.comparison.questions import open_questions, warnings_of
from volseg.comparison.rules import (
    SIZE,
    VOLUME,
    Evidence,
    Sums,
    disagreement,
    non_target_response,
    overall_response,
    target_response,
)
from volseg.comparison.targets import RECIST, none_if_nan


@dataclass(frozen=True, slots=True, kw_only=True)
class PatientResponse:
    """A row of response.csv, also for a patient who could not be compared.

    None means unknown and is written as an empty cell.
    """

    patient: str = column("", "name of the patient")
    baseline_case: str | None = optional(
        "", "baseline scan (several are joined with ;), empty if there is none"
    )
    followup_case: str | None = optional(
        "", "follow-up scan (several are joined with ;), empty if there is none"
    )
    status: Literal["done", "failed", "unpaired", "pending", "unknown"] = column(
        "",
        "done; failed; unpaired: no scan has a partner; pending: not reached yet; "
        "unknown: the patient's record is damaged",
    )
    reason: str = column("", "why the patient was not compared and what to do; empty if done", "")
    response: str | None = optional(
        "",
        "CR, PR, SD, PD; Non-CR/Non-PD without target lesions; NE: not evaluable; empty if the "
        "necessary sizes were not measured, if diameters and volumes disagree, or if a reader must "
        "decide",
        source=RECIST,
    )
    response_rule: str = column("", "rule that decided, with its numbers", "", source=RECIST)
    target_response: str | None = optional(
        "", "CR, PR, SD, PD or NE of the targets; empty without targets", source=RECIST
    )
    non_target_response: str | None = optional(
        "",
        "CR, Non-CR/Non-PD or NE of the other lesions; empty if there are none. A reader must "
        "judge their unequivocal progression",
        source=RECIST,
    )
    targets: str | None = optional(
        "",
        "numbers of the target lesions at baseline, such as 1;3, or chest:1;abdomen:3 for several "
        "scans: the five largest measurable lesions, at most two per label",
        source=RECIST,
    )
    baseline_sum_mm: float | None = optional(
        "mm",
        "sum of diameters of the targets at baseline: long axes, or short axes of lymph nodes",
        source=RECIST,
    )
    nadir_sum_mm: float | None = optional(
        "mm",
        "smallest sum before the follow-up; with two time points, the baseline sum",
        source=RECIST,
    )
    followup_sum_mm: float | None = optional(
        "mm",
        "sum of diameters of the targets at follow-up: 0 for a target that is gone, all parts of "
        "one that split, and one diameter for targets that merged",
        source=RECIST,
    )
    change_sum_mm: float | None = optional("mm", "followup_sum_mm − baseline_sum_mm", source=RECIST)
    change_sum_percent: float | None = optional(
        "%", "change_sum_mm in percent of baseline_sum_mm", source=RECIST
    )
    volume_response: str | None = optional(
        "",
        "response from the volumes of the targets: PR from −65.7 %, PD from +72.8 %, equal to "
        "RECIST's limits for balls",
        source="cube of RECIST's limits; Therasse, J Natl Cancer Inst 92:205 (2000), appendix",
    )
    baseline_target_volume_ml: float | None = optional("mL", "volume of the targets at baseline")
    followup_target_volume_ml: float | None = optional("mL", "volume of the targets at follow-up")
    change_target_volume_percent: float | None = optional(
        "%", "change of the target volume in percent of the baseline"
    )
    baseline_volume_ml: float | None = optional("mL", "volume of all lesions at baseline")
    followup_volume_ml: float | None = optional("mL", "volume of all lesions at follow-up")
    change_volume_ml: float | None = optional(
        "mL", "followup_volume_ml − baseline_volume_ml; empty if lesions lie outside the other scan"
    )
    change_volume_percent: float | None = optional(
        "%", "change_volume_ml in percent of the baseline"
    )
    n_baseline: int | None = optional("", "number of lesions at baseline")
    n_followup: int | None = optional("", "number of lesions at follow-up")
    n_matched: int | None = optional("", "lesions matched one to one")
    n_new: int | None = optional("", "lesions seen at follow-up only")
    n_gone: int | None = optional("", "lesions seen at baseline only")
    n_merged: int | None = optional("", "baseline lesions that merged with another")
    n_split: int | None = optional("", "baseline lesions that split into several")
    n_regrouped: int | None = optional("", "baseline lesions that both merged and split")
    n_outside: int | None = optional(
        "", "lesions of either time outside the field of view of the other scan"
    )
    n_crumbs: int | None = optional(
        "", "small pieces beside a lesion at either time: counted with it, not in the numbers above"
    )
    registration: str | None = optional(
        "",
        "rigid; identical: the two scans are the same; none: world coordinates are used as they "
        "are; those of several pairs are joined with ;",
    )
    moved_mm: float | None = optional(
        "mm", "largest displacement of a lesion centroid by the registration"
    )
    turned_deg: float | None = optional(
        "°", "rotation angle of the registration; of several pairs, the largest"
    )
    tilt_deg: float | None = optional(
        "°",
        "angle between the axial slices of the two scans in the patient; of several pairs, the "
        "largest; from 2° on, follow-up diameters are measured in the axial planes of the baseline",
    )
    registration_error_mm: float | None = optional(
        "mm", "largest distance at a lesion between forward and backward registration"
    )
    similarity_before: float | None = optional(
        "nats",
        "mutual information of the scans before registration; of several pairs, the smallest; "
        "empty if they do not overlap",
    )
    similarity_after: float | None = optional(
        "nats", "mutual information of the scans after registration; of several pairs, the smallest"
    )
    warnings: str = column("", "what to know before trusting the row; empty if nothing", "")
    seconds: float | None = optional("s", "time taken for this patient")
    volseg_version: str | None = optional("", "volseg version that compared the patient")


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
    """
    lesions = PatientLesions(pairs, lymph_nodes)
    twins = twins_of(lesions)
    newness = newness_of(lesions, twins["follow-up"])
    sums = Sums.of(lesions, lesions.diameter_mm)
    volumes = Sums.of(lesions, lambda lesion: none_if_nan(lesion.volume_ml))
    contradiction, remarks = disagreement(lesions, sums, volumes)
    evidence = Evidence(
        new=[lesions.name_of(lesion, with_size=True) for lesion in newness.new],
        doubt=_doubts(pairs),
        contradiction=contradiction,
        question=open_questions(lesions, newness),
        targets_are_known=lesions.targets is not None,
        target=target_response(sums, SIZE),
        non_target=non_target_response(lesions.non_target_groups),
        sums=sums,
    )
    response, rule = overall_response(evidence)
    by_volume = replace(evidence, contradiction="", target=target_response(volumes, VOLUME))
    return PatientResponse(
        patient=patient,
        baseline_case=_cases(pair.baseline for pair in pairs),
        followup_case=_cases(pair.followup for pair in pairs),
        status="done",
        response=response,
        response_rule=rule,
        target_response=evidence.target,
        non_target_response=evidence.non_target if evidence.targets_are_known else None,
        targets=";".join(map(lesions.name_of, lesions.targets or ())) or None,
        **_target_columns(sums, volumes),
        volume_response=overall_response(by_volume)[0],
        **_volumes(lesions),
        **_counts(lesions),
        tilt_deg=_largest_tilt_deg(pairs),
        warnings="; ".join([*warnings_of(lesions, newness, twins), *remarks]),
    )


def _cases(scans: Iterable[ScanLesions]) -> str:
    return ";".join(scan.case or "" for scan in scans)


def _largest_tilt_deg(pairs: Sequence[ScanPair]) -> float | None:
    return max((pair.tilt_deg for pair in pairs if pair.tilt_deg is not None), default=None)


def _doubts(pairs: Sequence[ScanPair]) -> str:
    """Return why lesions may have been matched wrongly, naming the scan if there are several."""
    return "; ".join(
        pair.doubt if len(pairs) == 1 else f"{pair.followup.case}: {pair.doubt}"
        for pair in pairs
        if pair.is_doubtful
    )


def _target_columns(sums: Sums | None, volumes: Sums | None) -> dict[str, Any]:
    if sums is None or volumes is None:
        return {}
    change_mm, change_percent = sums.change
    return {
        "baseline_sum_mm": sums.before,
        "nadir_sum_mm": sums.before,
        "followup_sum_mm": sums.after,
        "change_sum_mm": change_mm,
        "change_sum_percent": change_percent,
        "baseline_target_volume_ml": volumes.before,
        "followup_target_volume_ml": volumes.after,
        "change_target_volume_percent": volumes.change[1],
    }


def _volumes(lesions: PatientLesions) -> dict[str, float | None]:
    """Return the volume of all lesions; no change if some lie outside the other scan."""
    before_ml = sum(lesion.volume_ml for lesion in lesions.baseline)
    after_ml = sum(lesion.volume_ml for lesion in lesions.followup)
    is_outside = any(group.status == "outside" for group in lesions.groups)
    change_ml, percent = (None, None) if is_outside else difference(before_ml, after_ml)
    return {
        "baseline_volume_ml": before_ml,
        "followup_volume_ml": after_ml,
        "change_volume_ml": change_ml,
        "change_volume_percent": percent,
    }


def _counts(lesions: PatientLesions) -> dict[str, Any]:
    """Count lesions: pairs and lesions seen once by group, joined ones at baseline."""
    groups = lesions.groups
    counts = {
        f"n_{status}": sum(group.status == status for group in groups)
        for status in ("matched", "new", "gone", "outside")
    }
    counts |= {
        f"n_{status}": sum(len(group.before) for group in groups if group.status == status)
        for status in ("merged", "split", "regrouped")
    }
    n_crumbs = sum(len(group.crumbs_before) + len(group.crumbs_after) for group in groups)
    n_lesions = {"n_baseline": len(lesions.baseline), "n_followup": len(lesions.followup)}
    return n_lesions | counts | {"n_crumbs": n_crumbs}

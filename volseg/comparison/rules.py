"""Response by RECIST 1.1 from the sums of the targets, the other lesions and what is new.

Source: RECIST 1.1, Eur J Cancer 45:228 (2009), sections 4.3 and 4.4, tables 1 and 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from volseg.comparison.changes import difference
from volseg.comparison.groups import LesionGroup, PatientLesions
from volseg.measurement.rows import LesionMeasurement

ROUNDING = 1e-9  # so that 12 mm are 20 % more than 10 mm in floating point


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of partial response and progression, as fractions of the sum, and the least rise."""

    partial: float
    progression: float
    least_rise: float


SIZE = Limits(-0.30, 0.20, 5.0)  # mm
VOLUME = Limits(0.7**3 - 1, 1.2**3 - 1, 0.0)  # the same for the volumes of balls


@dataclass(frozen=True, slots=True)
class Sums:
    """Sum over the targets at both times.

    Args:
        after: None if a target is unknown, or cut off by the border of its scan.
        least: sum over the known and visible parts, a lower bound.
        is_least_before: a target is cut off at baseline, so `before` is a lower bound.
        is_gone: nothing is left of the targets, or only lymph nodes of normal size.
    """

    before: float
    after: float | None
    least: float
    is_least_before: bool
    is_gone: bool

    @classmethod
    def of(
        cls, lesions: PatientLesions, size: Callable[[LesionMeasurement], float | None]
    ) -> Sums | None:
        """Return the sums of this size; None if there are no targets."""
        targets, groups = lesions.targets, lesions.target_groups
        if not targets:
            return None
        after = [lesion for group in groups for lesion in group.after]
        sizes = [size(lesion) for lesion in after]
        least = sum(filter(None, sizes))
        is_unknown = None in sizes or _is_cut(after) or _is_any_outside(groups)
        return cls(
            before=sum(size(lesion) or 0.0 for lesion in targets),
            after=None if is_unknown else least,
            least=least,
            is_least_before=_is_cut(targets),
            is_gone=all(group.is_gone for group in groups),
        )

    @property
    def change(self) -> tuple[float | None, float | None]:
        """Absolute change, and the same in percent of `before`."""
        return (None, None) if self.is_least_before else difference(self.before, self.after)

    def __str__(self) -> str:
        before = f"{'at least ' if self.is_least_before else ''}{self.before:.1f} mm"
        if self.after is None:
            return f"sum of target diameters {before} → at least {self.least:.1f} mm"
        text = f"sum of target diameters {before} → {self.after:.1f} mm"
        change, percent = self.change
        if change is not None and percent is not None:
            text += f": {change:+.1f} mm, {percent:+.1f} %"
        return text.replace("-", "−")


def _is_cut(lesions: Sequence[LesionMeasurement]) -> bool:
    return any(lesion.touches_border for lesion in lesions)


def _is_any_outside(groups: Sequence[LesionGroup]) -> bool:
    return any(group.status == "outside" for group in groups)


def target_response(sums: Sums | None, limits: Limits) -> str | None:
    """Return CR, PR, SD or PD of the targets, NE if their sums leave it open; None without any."""
    if sums is None:
        return None
    if sums.is_gone:
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


def non_target_response(groups: Sequence[LesionGroup]) -> str | None:
    """Return the response of the non-target lesions; None without any."""
    if not groups:
        return None
    if _is_any_outside(groups):
        return "NE"  # not all of them were seen
    return "CR" if all(group.is_gone for group in groups) else "Non-CR/Non-PD"


def disagreement(
    lesions: PatientLesions, sums: Sums | None, volumes: Sums | None
) -> tuple[str, list[str]]:
    """Return why diameters and volumes contradict each other, and a warning if they disagree.

    If a lesion keeps its shape, its diameter grows by the cube root of its volume ratio. So the
    volumes imply a sum of diameters; if that gives another response, one of the two is wrong, or
    the lesions changed their shape. The sum of volumes may give another response even without a
    contradiction, as large lesions weigh more in it.
    """
    by_size, by_volume = target_response(sums, SIZE), target_response(volumes, VOLUME)
    if sums is None or volumes is None or "NE" in (by_size, by_volume):
        return "", []
    implied_mm = _implied_mm(lesions)
    implied = target_response(replace(sums, after=implied_mm, least=implied_mm), SIZE)
    by_diameters = f"{by_size} by their diameters{_percent_text(sums)}"
    if implied != by_size:
        contradiction = (
            f"the targets are {by_diameters} and {implied} by their volumes"
            f"{_percent_text(volumes)}, which imply a sum of diameters of "
            f"{implied_mm:.1f} mm: check both masks to see which is right"
        )
        return contradiction, [f"W_DISAGREE: {contradiction}"]
    # The least rise of 5 mm has no equivalent for volumes.
    if by_volume in (by_size, target_response(sums, replace(SIZE, least_rise=0.0))):
        return "", []
    return "", [
        f"W_VOLUME: the sum of volumes alone would be {by_volume}{_percent_text(volumes)}, "
        f"the targets are {by_diameters}: large targets weigh more in a sum of volumes"
    ]


def _implied_mm(lesions: PatientLesions) -> float:
    """Return the sum of diameters at follow-up if every target had kept its shape."""
    total_mm = 0.0
    for group in lesions.target_groups:
        before_ml, after_ml = (
            sum(lesion.volume_ml for lesion in of_time) for of_time in (group.before, group.after)
        )
        targets = filter(lesions.is_target, group.before)
        before_mm = sum(lesions.diameter_mm(target) or 0.0 for target in targets)
        total_mm += before_mm * (after_ml / before_ml) ** (1 / 3) if before_ml else 0.0
    return total_mm


def _percent_text(sums: Sums) -> str:
    _, percent = sums.change
    return "" if percent is None else f" ({percent:+.1f} %)".replace("-", "−")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What the overall response depends on.

    Args:
        new: names of the new lesions, with their sizes.
        doubt: why lesions may have been matched wrongly; empty if they were not.
        contradiction: why diameters and volumes contradict each other; empty if they do not.
        question: what a reader must decide before any response but progression; or empty.
        targets_are_known: false if diameters are missing to choose targets; `non_target` then
            covers all lesions.
        target, non_target: responses of the targets and of the other lesions; None without any.
        sums: of the diameters of the targets, for the reason.
    """

    new: Sequence[str]
    doubt: str
    contradiction: str
    question: str
    targets_are_known: bool
    target: str | None
    non_target: str | None
    sums: Sums | None


def overall_response(evidence: Evidence) -> tuple[str | None, str]:
    """Return the response of a patient and the rule that decided: the first that applies."""
    if evidence.new:
        return "PD", f"PD: new lesion{'s' * (len(evidence.new) > 1)} {', '.join(evidence.new)}"
    if evidence.doubt:
        return None, evidence.doubt
    if evidence.contradiction:
        return None, evidence.contradiction
    if evidence.question and evidence.target != "PD":
        return None, evidence.question
    return _without_new_lesions(evidence)


def _without_new_lesions(evidence: Evidence) -> tuple[str | None, str]:
    target, non_target = evidence.target, evidence.non_target
    if target is None and non_target is None:
        return "NE", "NE: no disease at baseline and no new lesion, so nothing can respond"
    if {target, non_target} <= {"CR", None}:
        return "CR", "CR: all baseline lesions are gone, and no lesion is new"
    if not evidence.targets_are_known:
        return None, (
            "diameters were not measured, so no targets can be chosen: measure both scans again"
        )
    others = NON_TARGET_TEXTS[non_target]
    if target is None:
        return non_target, f"{non_target}: no target, as no lesion was measurable; {others}"
    if target == "CR":
        return "PR", f"PR: all targets are gone; {others}"
    return target, f"{target}: {evidence.sums}; {TARGET_TEXTS[target]}"


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

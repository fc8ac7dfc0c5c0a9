"""Matched lesions of a patient at two times, in groups: those of one row, or joined by a change."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from volseg.comparison.matching import Match
from volseg.comparison.targets import choose_targets, diameter_mm, is_normal
from volseg.measurement.rows import LesionMeasurement


@dataclass(frozen=True, eq=False)
class ScanLesions:
    """The lesions of a scan.

    Args:
        case: None where the region was scanned at the other time only.
        lesions: by ascending number, crumbs included in their sizes.
        crumbs: crumbs of these lesions, not counted as lesions.
        unit_doubt: why the unit of the intensities is in doubt; empty if it is not.
    """

    case: str | None = None
    lesions: Sequence[LesionMeasurement] = ()
    crumbs: Sequence[LesionMeasurement] = ()
    unit_doubt: str = ""

    @cached_property
    def by_number(self) -> Mapping[int | None, LesionMeasurement]:
        """The lesions and crumbs by number."""
        return {lesion.lesion_id: lesion for lesion in (*self.lesions, *self.crumbs)}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScanPair:
    """Two scans of the same region of a patient, one per time point, with their matched lesions.

    Args:
        matches: of all lesions; `outside` if there is no scan at the other time.
        doubt: why the matches cannot be trusted; empty if they can.
        tilt_deg: angle between the axial slices of the two scans in the patient; None where the
            scans are not registered.
        is_remeasured: follow-up diameters were measured again, in the baseline's axial planes.
    """

    baseline: ScanLesions
    followup: ScanLesions
    matches: Sequence[Match]
    doubt: str = ""
    tilt_deg: float | None = None
    is_remeasured: bool = False

    @property
    def is_doubtful(self) -> bool:
        """True if lesions may be matched wrongly; without lesions in one scan, none are."""
        return bool(self.doubt and self.baseline.lesions and self.followup.lesions)


@dataclass(frozen=True, eq=False)
class LesionGroup:
    """The lesions of one row, or lesions that merged or split together.

    Args:
        number: from 1 over all scans of a patient.
    """

    number: int
    pair: ScanPair
    matches: Sequence[Match]
    lymph_nodes: Collection[str]

    @property
    def first(self) -> Match:
        """The match whose row describes the group."""
        return next(match for match in self.matches if match.is_first)

    @property
    def status(self) -> str:
        return self.first.status

    @property
    def crumb_matches(self) -> list[Match]:
        return [match for match in self.matches if match.status == "crumb"]

    @property
    def _lesion_matches(self) -> list[Match]:
        return [match for match in self.matches if match.status != "crumb"]

    @cached_property
    def before(self) -> list[LesionMeasurement]:
        return _lesions(self.pair.baseline, (match.baseline for match in self._lesion_matches))

    @cached_property
    def after(self) -> list[LesionMeasurement]:
        return _lesions(self.pair.followup, (match.followup for match in self._lesion_matches))

    @property
    def crumbs_before(self) -> list[LesionMeasurement]:
        """Crumbs counted with `before`, but not in it."""
        return _lesions(self.pair.baseline, (match.baseline for match in self.crumb_matches))

    @property
    def crumbs_after(self) -> list[LesionMeasurement]:
        return _lesions(self.pair.followup, (match.followup for match in self.crumb_matches))

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
    def is_grown_node(self) -> bool:
        """True for lymph nodes that were normal, and no longer are."""
        return bool(self.before) and self.was_normal and not self.is_normal

    @property
    def is_gone(self) -> bool:
        """True if nothing is left of it, or only lymph nodes of normal size."""
        return self.status == "gone" or (bool(self.after) and self.is_normal)


def _lesions(scan: ScanLesions, numbers: Iterable[int | None]) -> list[LesionMeasurement]:
    """Return the lesions with these numbers, without repetition."""
    return [scan.by_number[n] for n in dict.fromkeys(numbers) if n is not None]


@dataclass(frozen=True, eq=False)
class PatientLesions:
    """All lesions of a patient at both times, as RECIST 1.1 sees them.

    Args:
        lymph_nodes: labels of lymph nodes, by name or value; these are measured by their short
            axis and are normal below 10 mm.
    """

    pairs: Sequence[ScanPair]
    lymph_nodes: Collection[str] = ()

    @cached_property
    def baseline(self) -> list[LesionMeasurement]:
        """All lesions of the baseline, without crumbs."""
        return [lesion for pair in self.pairs for lesion in pair.baseline.lesions]

    @cached_property
    def followup(self) -> list[LesionMeasurement]:
        return [lesion for pair in self.pairs for lesion in pair.followup.lesions]

    @cached_property
    def groups(self) -> list[LesionGroup]:
        """All lesions, each in exactly one group, in the order of the matches."""
        members: dict[tuple[int, int], list[Match]] = defaultdict(list)
        for n, pair in enumerate(self.pairs):
            for match in pair.matches:
                members[n, match.group].append(match)
        return [
            LesionGroup(number, self.pairs[n], matches, self.lymph_nodes)
            for number, ((n, _), matches) in enumerate(members.items(), start=1)
        ]

    @cached_property
    def targets(self) -> list[LesionMeasurement] | None:
        """The target lesions at baseline; None if diameters are missing to choose them."""
        return choose_targets(self.baseline, self.lymph_nodes)

    def is_target(self, lesion: LesionMeasurement) -> bool:
        return any(lesion is target for target in self.targets or ())

    @cached_property
    def target_groups(self) -> list[LesionGroup]:
        """The groups with a target."""
        return [group for group in self.groups if any(map(self.is_target, group.before))]

    @cached_property
    def non_target_groups(self) -> list[LesionGroup]:
        """The other groups that were disease at baseline."""
        others = [group for group in self.groups if group not in self.target_groups]
        return [group for group in others if group.before and not group.was_normal]

    def is_normal(self, lesion: LesionMeasurement) -> bool:
        return is_normal(lesion, self.lymph_nodes)

    def diameter_mm(self, lesion: LesionMeasurement) -> float | None:
        """Return the short axis of a lymph node, else the long axis; None if unknown."""
        return diameter_mm(lesion, self.lymph_nodes)

    def name_of(self, lesion: LesionMeasurement, *, with_size: bool = False) -> str:
        """Return the number of a lesion, with its scan if there are several, and its size."""
        scan = f"{lesion.case_id}:" if len(self.pairs) > 1 else ""
        size = f" ({_size_text(lesion)})" if with_size else ""
        return f"{scan}{lesion.lesion_id}{size}"

    def names(self, lesions: Sequence[LesionMeasurement], *, with_sizes: bool = False) -> str:
        return ", ".join(self.name_of(lesion, with_size=with_sizes) for lesion in lesions)


def _size_text(lesion: LesionMeasurement) -> str:
    size = diameter_mm(lesion)
    return f"{lesion.volume_ml:.3g} mL" + ("" if size is None else f", {size:.1f} mm")


def centroids_mm(lesions: Sequence[LesionMeasurement]) -> np.ndarray:
    """Return the centroids (N, 3) in RAS mm."""
    rows = [(row.centroid_r_mm, row.centroid_a_mm, row.centroid_s_mm) for row in lesions]
    return np.array(rows, dtype=float).reshape(-1, 3)

"""Scans of a dataset compared with each other: their duplicates, and the flags of all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from volseg.evaluation.duplicates import near_duplicates
from volseg.quality.flags import FLAGS, Flag
from volseg.quality.rows import QualityRow
from volseg.quality.scan import CT, ScanFacts, judge_scan
from volseg.volume import Volume


@dataclass(frozen=True, slots=True)
class Raised:
    """A flag that a scan got, with a sentence."""

    flag: Flag
    text: str

    def __str__(self) -> str:
        return f"{self.flag.code}: {self.text}; to fix: {self.flag.fix}"


def compare_scans(scans: Sequence[ScanFacts]) -> list[tuple[QualityRow, list[Raised]]]:
    """Return the row of each scan of a dataset with its flags, and these; both in the given order.

    Args:
        scans: with prints, by which duplicates are found.
    """
    scans = _with_duplicates(scans)
    raised: list[list[Raised]] = [[] for _ in scans]
    for flag in FLAGS:
        for number, text in flag.check(scans).items():
            raised[number].append(Raised(flag, text))
    return [(_flagged(scan.row, flags), flags) for scan, flags in zip(scans, raised, strict=True)]


def run_warnings(scan: Volume, *, is_hu: bool) -> Iterator[str]:
    """Yield the warnings of a scan that is measured, as `W_CODE: sentence; what to do`.

    Args:
        is_hu: its unit is HU, stated and not contradicted.
    """
    facts = judge_scan(scan, modality=CT if is_hu else "", has_noise=False)
    for flag in FLAGS:
        if flag.in_runs:
            for text in flag.check([facts]).values():
                yield f"{flag.code}: {text}; {flag.fix}"


def _flagged(row: QualityRow, raised: Sequence[Raised]) -> QualityRow:
    codes = " ".join(item.flag.code for item in raised)
    return replace(row, flags=codes, warnings="; ".join(map(str, raised)))


def _with_duplicates(scans: Sequence[ScanFacts]) -> list[ScanFacts]:
    """Return the scans with the first other scan that is the same, or nearly.

    Channels of one case and scans of one patient may be similar, but not the same.
    """
    same, similar = dict[int, int](), dict[int, int]()
    for i, j in _equal_pairs(scans):
        same.setdefault(i, j)
        same.setdefault(j, i)
    for i, j in _similar_pairs(scans):
        similar.setdefault(i, j)
        similar.setdefault(j, i)
    return [
        replace(
            scan,
            row=replace(
                scan.row,
                same_as=scans[same[n]].row.name if n in same else "",
                similar_to=scans[similar[n]].row.name if n in similar and n not in same else "",
            ),
        )
        for n, scan in enumerate(scans)
    ]


def _equal_pairs(scans: Sequence[ScanFacts]) -> Iterator[tuple[int, int]]:
    """Yield the first scan of each group of equal ones with each of the others."""
    groups: dict[str, list[int]] = defaultdict(list)
    for number, scan in enumerate(scans):
        if scan.print is not None:
            groups[scan.print.sha256].append(number)
    for first, *others in groups.values():
        yield from ((first, other) for other in others)


def _similar_pairs(scans: Sequence[ScanFacts]) -> Iterator[tuple[int, int]]:
    numbers = [number for number, scan in enumerate(scans) if scan.print is not None]
    for i, j in near_duplicates([scan.print for scan in scans if scan.print is not None]):
        first, second = numbers[i], numbers[j]
        if not _are_related(scans[first], scans[second]):
            yield first, second


def _are_related(first: ScanFacts, second: ScanFacts) -> bool:
    is_patient = first.patient is not None and first.patient == second.patient
    return is_patient or first.row.case_id == second.row.case_id

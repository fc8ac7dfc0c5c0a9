"""Match the scans of each patient in two results folders, by case id or by a table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from volseg.commands.time_points import TimePoint
from volseg.comparison.response import PatientResponse
from volseg.errors import VolsegError
from volseg.io.cases import is_valid_id
from volseg.io.tables import PATIENT, read_table
from volseg.words import format_count

HEADS = {
    "patient": (*PATIENT, "subject", "subject_id"),
    "baseline": ("before", "first", "baseline_case", "baseline_scan"),
    "followup": ("follow_up", "after", "second", "followup_case", "followup_scan"),
}
COLUMNS = tuple(HEADS)

TimePoints = tuple[TimePoint, TimePoint]  # baseline, follow-up
Cases = tuple[str | None, str | None]  # case at baseline and at follow-up; None if missing


@dataclass(frozen=True, slots=True)
class Patient:
    """A patient, and for each scanned region the ids of the cases of both times."""

    name: str
    scans: tuple[Cases, ...]

    @property
    def is_paired(self) -> bool:
        """True if any region was scanned at both times."""
        return any(baseline and followup for baseline, followup in self.scans)

    def row(self, status: Literal["failed", "unpaired", "pending"], reason: str) -> PatientResponse:
        """Return the row of a patient who was not compared."""
        baseline, followup = (
            ";".join(case or "" for case in cases) if any(cases) else None
            for cases in zip(*self.scans, strict=True)
        )
        return PatientResponse(
            patient=self.name,
            baseline_case=baseline,
            followup_case=followup,
            status=status,
            reason=reason,
        )

    def why_unpaired(self, times: TimePoints) -> str:
        """Return why there is nothing to compare."""
        has_baseline, has_followup = (any(cases) for cases in zip(*self.scans, strict=True))
        if has_baseline and has_followup:
            return "no line of the table has both a baseline and a follow-up scan of this patient"
        one, other = times if has_baseline else times[::-1]
        return (
            f"only a {one.name} scan: {other.results} has no case of this name; "
            "give --pairs if it has another"
        )


def same_ids(times: TimePoints) -> list[Patient]:
    """Take cases with the same id in both folders as one patient.

    Raises:
        VolsegError: the folders have no id in common.
    """
    baseline, followup = times
    before, after = set(baseline.case_ids), set(followup.case_ids)
    if not before & after:
        raise VolsegError(
            f"no case of {followup.results} has the name of one in {baseline.results}, "
            f"such as {next(iter(baseline.case_ids), 'none')!r}",
            fix="give --pairs a CSV of pairs with columns patient, baseline and followup",
            code="E_DATASET",
        )
    return [
        Patient(name, ((name if name in before else None, name if name in after else None),))
        for name in sorted(before | after)
    ]


def read_pairs(path: Path, times: TimePoints) -> list[Patient]:
    """Read patients from a table with a line per pair of scans; an empty cell is a missing scan.

    Raises:
        VolsegError: one error with every mistake of the table.
    """
    table = read_table(path, HEADS)
    columns = table.columns
    _check_columns(path, columns)
    checker = _LineChecker(times)
    scans: dict[str, list[Cases]] = defaultdict(list)
    for number, cells in table.lines:
        if len(cells) != len(columns):
            text = f"line {number} has {format_count(len(cells), 'cell')} under "
            text += format_count(len(columns), "column")
            checker.mistakes.append(text)
            continue
        row = dict(zip(columns, cells, strict=True))
        name, before, after = (row[column] for column in COLUMNS)
        checker.add(number, name, (before, after))
        scans[name].append((before or None, after or None))
    patients = [Patient(name, tuple(pairs)) for name, pairs in scans.items()]
    mistakes = checker.mistakes
    if not mistakes and not any(patient.is_paired for patient in patients):
        mistakes = ["no line has a baseline and a followup"]
    if mistakes:
        raise VolsegError(
            f"{path}: {'; '.join(mistakes[:10])}",
            fix="correct the table; nothing was done yet",
            code="E_DATASET",
        )
    return patients


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    missing = [name for name in COLUMNS if name not in columns]
    if missing:
        raise VolsegError(
            f"{path}: has no column {', '.join(map(repr, missing))}",
            fix="give it the columns patient, baseline and followup, which hold case ids",
            code="E_DATASET",
        )


class _LineChecker:
    """Checks each line of a table against the lines before it, and collects the mistakes."""

    def __init__(self, times: TimePoints) -> None:
        self.mistakes: list[str] = []
        self._times = [(time, frozenset(time.case_ids)) for time in times]
        self._spellings: dict[str, str] = {}  # lower-case name → its first spelling
        # (patient, case) at baseline and at follow-up
        self._cases: tuple[set[tuple[str, str]], set[tuple[str, str]]] = (set(), set())

    def add(self, line: int, name: str, cases: tuple[str, str]) -> None:
        """Add a line with the cases of both times."""
        mistakes = [*self._mistakes_in_name(name)]
        for side, case in enumerate(cases):
            if case:
                mistakes += self._mistakes_in_case(name, side, case)
        if not any(cases):
            mistakes.append("names no case")
        for side, case in enumerate(cases):
            self._cases[side].add((name, case))
        self.mistakes += [f"line {line}: {text}" for text in mistakes]

    def _mistakes_in_name(self, name: str) -> Iterator[str]:
        if not is_valid_id(name):
            yield f"patient {name!r} is not a valid file name: use letters, digits, . _ -"
        spelling = self._spellings.setdefault(name.casefold(), name)
        if spelling != name:
            yield (
                f"patient {name!r} and {spelling!r} differ in upper and lower case only: rename one"
            )

    def _mistakes_in_case(self, name: str, side: int, case: str) -> Iterator[str]:
        time, case_ids = self._times[side]
        if case not in case_ids:
            yield f"{time.results} has no case {case!r}"
        if (name, case) in self._cases[side]:
            yield (
                f"patient {name!r} has the {COLUMNS[1 + side]} {case!r} twice; "
                "two scans against one cannot be compared"
            )
        if (name, case) in self._cases[1 - side]:
            yield (
                f"{case!r} is a baseline on one line of {name!r} and a follow-up on another: "
                "give each pair of times its own patient name"
            )

"""Match the scans of each patient in two results folders, by case id or by a table."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from volseg.errors import VolsegError
from volseg.io.cases import ID_PATTERN, read_table

COLUMNS = ("patient", "baseline", "followup")


@dataclass(frozen=True, slots=True)
class Patient:
    """A patient and the ids of the cases of both times.

    Args:
        scans: for each scanned region, the case at baseline and at follow-up; None if missing.
    """

    name: str
    scans: tuple[tuple[str | None, str | None], ...]

    @property
    def is_paired(self) -> bool:
        """True if any region was scanned at both times."""
        return any(baseline and followup for baseline, followup in self.scans)

    @property
    def cells(self) -> Mapping[str, Any]:
        """Cells of response.csv that name the patient and the cases."""
        baseline, followup = (
            ";".join(case or "" for case in cases) if any(cases) else None
            for cases in zip(*self.scans, strict=True)
        )
        return {"patient": self.name, "baseline_case": baseline, "followup_case": followup}

    def why_unpaired(self, folders: tuple[Path, Path]) -> str:
        """Return why there is nothing to compare."""
        has_baseline, has_followup = (any(cases) for cases in zip(*self.scans, strict=True))
        if has_baseline and has_followup:
            return "no line of the table has both a baseline and a follow-up scan of this patient"
        time, other = ("baseline", folders[1]) if has_baseline else ("follow-up", folders[0])
        return (
            f"only a {time} scan: {other} has no case of this name; give --pairs if it has another"
        )


def same_ids(
    folders: tuple[Path, Path], case_ids: tuple[Sequence[str], Sequence[str]]
) -> list[Patient]:
    """Take cases with the same id in both folders as one patient.

    Args:
        case_ids: ids of the cases in each folder.

    Raises:
        VolsegError: the folders have no id in common.
    """
    before, after = set(case_ids[0]), set(case_ids[1])
    if not before & after:
        raise VolsegError(
            f"no case of {folders[1]} has the name of one in {folders[0]}, "
            f"such as {next(iter(case_ids[0]), 'none')!r}",
            fix="give --pairs a CSV of pairs with columns patient, baseline and followup",
            code="E_DATASET",
        )
    return [
        Patient(name, ((name if name in before else None, name if name in after else None),))
        for name in sorted(before | after)
    ]


def read_pairs(
    path: Path, folders: tuple[Path, Path], case_ids: tuple[Sequence[str], Sequence[str]]
) -> list[Patient]:
    """Read patients from a table with a line per pair of scans; an empty cell is a missing scan.

    Raises:
        VolsegError: one error with every mistake of the table.
    """
    columns, lines = read_table(path)
    missing = [name for name in COLUMNS if name not in columns]
    if missing:
        raise VolsegError(
            f"{path}: has no column {', '.join(map(repr, missing))}",
            fix="give it the columns patient, baseline and followup, which hold case ids",
            code="E_DATASET",
        )
    mistakes: list[str] = []
    checker = _LineChecker(folders, (frozenset(case_ids[0]), frozenset(case_ids[1])))
    scans: dict[str, list[tuple[str | None, str | None]]] = defaultdict(list)
    for number, cells in lines:
        if len(cells) != len(columns):
            mistakes.append(f"line {number} has {len(cells)} cells under {len(columns)} columns")
            continue
        row = dict(zip(columns, cells, strict=True))
        name, before, after = (row[column] for column in COLUMNS)
        mistakes += [f"line {number}: {text}" for text in checker.add(name, (before, after))]
        scans[name].append((before or None, after or None))
    patients = [Patient(name, tuple(pairs)) for name, pairs in scans.items()]
    if not mistakes and not any(patient.is_paired for patient in patients):
        mistakes.append("no line has a baseline and a followup")
    if mistakes:
        raise VolsegError(
            f"{path}: {'; '.join(mistakes[:10])}",
            fix="correct the table; nothing was done yet",
            code="E_DATASET",
        )
    return patients


class _LineChecker:
    """Checks each line of a table against the lines before it."""

    def __init__(
        self, folders: tuple[Path, Path], case_ids: tuple[Collection[str], Collection[str]]
    ) -> None:
        self._folders, self._case_ids = folders, case_ids
        self._spellings: dict[str, str] = {}  # lower-case name → its first spelling
        # (patient, case) at baseline and at follow-up
        self._cases: tuple[set[tuple[str, str]], set[tuple[str, str]]] = (set(), set())

    def add(self, name: str, cases: tuple[str, str]) -> list[str]:
        """Add a line with the cases of both times; return its mistakes."""
        mistakes = []
        if not re.fullmatch(ID_PATTERN, name):
            mistakes.append(
                f"patient {name!r} is not a valid file name: use letters, digits, . _ -"
            )
        spelling = self._spellings.setdefault(name.casefold(), name)
        if spelling != name:
            mistakes.append(
                f"patient {name!r} and {spelling!r} differ in upper and lower case only: rename one"
            )
        for side, time in enumerate(("baseline", "followup")):
            case = cases[side]
            if case and case not in self._case_ids[side]:
                mistakes.append(f"{self._folders[side]} has no case {case!r}")
            if case and (name, case) in self._cases[side]:
                mistakes.append(
                    f"patient {name!r} has the {time} {case!r} twice; "
                    "two scans against one cannot be compared"
                )
            if case and (name, case) in self._cases[1 - side]:
                mistakes.append(
                    f"{case!r} is a baseline on one line of {name!r} and a follow-up on another: "
                    "give each pair of times its own patient name"
                )
        if not any(cases):
            mistakes.append("names no case")
        for side, case in enumerate(cases):
            self._cases[side].add((name, case))
        return mistakes

"""Which scans of two results folders show the same patient: by their ids, or as a table says."""

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
        scans: per region that was scanned, the case at baseline and the one at follow-up; None where there is none.
    """

    name: str
    scans: tuple[tuple[str | None, str | None], ...]

    @property
    def is_paired(self) -> bool:
        """Whether any region was scanned at both times."""
        return any(baseline and followup for baseline, followup in self.scans)

    @property
    def cells(self) -> Mapping[str, Any]:
        """What a row of response.csv calls the patient and the scans."""
        baseline, followup = (
            ";".join(case or "" for case in cases) if any(cases) else None
            for cases in zip(*self.scans, strict=True)
        )
        return {"patient": self.name, "baseline_case": baseline, "followup_case": followup}

    def why_unpaired(self, folders: tuple[Path, Path]) -> str:
        """Why there is nothing to compare."""
        has_baseline, has_followup = (any(cases) for cases in zip(*self.scans, strict=True))
        if has_baseline and has_followup:
            return "no line of the table has both a baseline and a follow-up scan of this patient"
        here, there = ("baseline", folders[1]) if has_baseline else ("follow-up", folders[0])
        return f"only a {here} scan: {there} has no case for it; if it has another name there, give --pairs"


def same_ids(
    folders: tuple[Path, Path], known: tuple[Sequence[str], Sequence[str]]
) -> list[Patient]:
    """Cases with one id in both folders are one patient; `known` are the ids in each.

    Raises:
        VolsegError: no id is in both.
    """
    here, there = set(known[0]), set(known[1])
    if not here & there:
        raise VolsegError(
            f"no case of {folders[1]} has the name of one in {folders[0]}, such as {next(iter(known[0]), 'none')!r}",
            fix="say which belong together in a CSV with columns patient, baseline and followup, and give it with --pairs",
            code="E_DATASET",
        )
    return [
        Patient(name, ((name if name in here else None, name if name in there else None),))
        for name in sorted(here | there)
    ]


def read_pairs(
    path: Path, folders: tuple[Path, Path], known: tuple[Sequence[str], Sequence[str]]
) -> list[Patient]:
    """The patients that a table names, a line per pair of scans; an empty cell is a scan without a partner.

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
    seen = _Seen(folders, (frozenset(known[0]), frozenset(known[1])))
    scans: dict[str, list[tuple[str | None, str | None]]] = defaultdict(list)
    for number, cells in lines:
        if len(cells) != len(columns):
            mistakes.append(f"line {number} has {len(cells)} cells under {len(columns)} columns")
            continue
        row = dict(zip(columns, cells, strict=True))
        name, before, after = (row[column] for column in COLUMNS)
        mistakes += [f"line {number}: {text}" for text in seen.add(name, (before, after))]
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


class _Seen:
    """The lines of a table so far, by what each further line is checked against."""

    def __init__(
        self, folders: tuple[Path, Path], known: tuple[Collection[str], Collection[str]]
    ) -> None:
        self._folders, self._known = folders, known
        self._spellings: dict[str, str] = {}  # name in lower case → how the first line writes it
        self._cases: tuple[set[tuple[str, str]], set[tuple[str, str]]] = (
            set(),
            set(),
        )  # of each time: (patient, case)

    def add(self, name: str, cases: tuple[str, str]) -> list[str]:
        """Add a line of a patient, with the cases of both times; returns what is wrong with it."""
        mistakes = []
        if not re.fullmatch(ID_PATTERN, name):
            mistakes.append(f"patient {name!r} is no safe file name")
        other = self._spellings.setdefault(name.casefold(), name)
        if other != name:
            mistakes.append(
                f"patient {name!r} and {other!r} differ in upper and lower case only: write one of them otherwise"
            )
        for side, time in enumerate(("baseline", "followup")):
            case = cases[side]
            if case and case not in self._known[side]:
                mistakes.append(f"{self._folders[side]} has no case {case!r}")
            if case and (name, case) in self._cases[side]:
                mistakes.append(
                    f"patient {name!r} has the {time} {case!r} twice; two scans against one cannot be compared"
                )
            if case and (name, case) in self._cases[1 - side]:
                mistakes.append(
                    f"{case!r} is a baseline on one line of {name!r} and a follow-up on another: give each two times a name of their own"
                )
        if not any(cases):
            mistakes.append("names no case")
        for side, case in enumerate(cases):
            self._cases[side].add((name, case))
        return mistakes

"""Warnings about single scans for the terminal: noise, unit, training data, organ, grid."""

from __future__ import annotations

from collections.abc import Iterable

from volseg.measurement.rows import CaseRow
from volseg.measurement.specks import SPECKS
from volseg.measurement.units import CODES, warnings_in
from volseg.preprocessing.lattice import AXES, EXTENT
from volseg.words import format_count

MAX_SCANS = 5  # listed per code
ORGAN = "W_ORGAN"  # the organ is missing, or all that there is
CODES_OF_SCANS = (SPECKS, *CODES, ORGAN, AXES, EXTENT)


def remarks_on_scans(cases: Iterable[CaseRow], case_ids: Iterable[str]) -> list[str]:
    """Collect `W_CODE: case: sentence` for these scans; list at most `MAX_SCANS` per code."""
    case_ids = frozenset(case_ids)
    lines_by_code: dict[str, list[str]] = {code: [] for code in CODES_OF_SCANS}
    for case in cases:
        for code, text in warnings_in(case.warnings) if case.case_id in case_ids else ():
            if code in lines_by_code:
                lines_by_code[code].append(f"{code}: {case.case_id}: {text}")
    return [line for code, lines in lines_by_code.items() for line in _shortened(code, lines)]


def _shortened(code: str, lines: list[str]) -> list[str]:
    more = len(lines) - MAX_SCANS
    if more <= 0:
        return lines
    others = format_count(more, "more scan")
    return [*lines[:MAX_SCANS], f"{code}: {others}; cases.csv names them"]

"""Warnings of single scans that belong on the terminal too, not only into cases.csv: a doubted unit, a scan unlike those of training."""

from __future__ import annotations

import csv
import re
from collections.abc import Collection
from pathlib import Path

from volseg.mismatch import CODES

MOST_SCANS = 5  # named per code


def remarks_on_scans(table: Path, case_ids: Collection[str]) -> list[str]:
    """A line for each of these scans with such a warning, as `W_CODE: case: sentence`; of many scans with one code the first.

    Args:
        table: cases.csv, as it was just written.
    """
    found: dict[str, list[str]] = {code: [] for code in CODES}
    with table.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["case_id"] not in case_ids:
                continue
            for warning in re.split(r"; (?=W_[A-Z]+: )", row["warnings"]):
                code, _, text = warning.partition(": ")
                if code in found:
                    found[code].append(f"{code}: {row['case_id']}: {text}")
    return [line for code, lines in found.items() for line in _shortened(code, lines)]


def _shortened(code: str, lines: list[str]) -> list[str]:
    more = len(lines) - MOST_SCANS
    if more <= 0:
        return lines
    return [*lines[:MOST_SCANS], f"{code}: {more} more scans; cases.csv names them"]

"""Demo: train on the phantoms, segment unseen ones and compare the lesions with the truth.

Run by `make demo`. Prints a table of true and measured volumes and densities, and where the results
are.
"""

from __future__ import annotations

import csv
import math
import sys
import time
from argparse import ArgumentParser
from pathlib import Path

from rich.console import Console
from rich.table import Table

import volseg

FOLDER = Path(__file__).parent
# Smaller lesions are in the table, but need not be found.
MIN_RADIUS_MM = 5.0
VOLUME_TOLERANCE_PERCENT, DENSITY_TOLERANCE_HU, MATCH_MM = 5.0, 2.0, 4.0


def main() -> int:
    """Return 0 if every lesion of ≥ 5 mm radius is found and within the tolerances, else 1."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("demo_results"), help="folder for model and results"
    )
    out: Path = parser.parse_args().out
    console = Console(width=110)
    test = [row for row in _read(FOLDER / "cases.csv") if row["split"] == "test"]
    started = time.monotonic()
    if not (out / "model" / "model.json").exists():
        console.print(
            f"training on the phantoms of {FOLDER.name}/ (train and val): 3 to 14 min on two "
            "cores, depending on the processor, longer on a busy machine …"
        )
        volseg.train(
            FOLDER,
            recipe="smoke",
            out=out / "model",
            resume=True,
            progress=lambda stage, fraction, detail: (
                console.print(f"  {stage} {fraction:4.0%} {detail}", highlight=False)
                if stage == "Training"
                else None
            ),
        )
    scans = [FOLDER / row["image"] for row in test]
    report = volseg.infer(scans, model=out / "model", out=out, figures=True)
    console.print(f"training and inference took {time.monotonic() - started:.0f} s")
    lesions = _read(out / "lesions.csv")
    truth = _read(FOLDER / "truth.csv")
    table, misses = _compare(test, truth, lesions)
    console.print(table)
    console.print(f"lesions: {out / 'lesions.csv'}")
    for row in test:
        console.print(f"overlay: {out / 'figures' / (row['subject'] + '.png')}")
    target = (
        f"every lesion of ≥ {MIN_RADIUS_MM:g} mm radius found, volume within "
        f"{VOLUME_TOLERANCE_PERCENT:g} %, density within {DENSITY_TOLERANCE_HU:g} HU"
    )
    console.print(f"{target}: {'met' if misses == 0 else f'missed by {misses}'}")
    return 0 if misses == 0 and report.exit_code == 0 else 1


def _compare(
    cases: list[dict[str, str]], truth: list[dict[str, str]], lesions: list[dict[str, str]]
) -> tuple[Table, int]:
    """Return the table and the number of large lesions that are missing or out of tolerance."""
    headings = "case,radius mm,true mm³,measured mm³,error %,true HU,measured HU,error HU,"
    table = Table(*headings.split(","))
    misses = 0
    for case in cases:
        unmatched = [row for row in lesions if row["case_id"] == case["subject"]]
        for lesion in (row for row in truth if row["subject"] == case["subject"]):
            match = next((row for row in unmatched if _distance_mm(row, lesion) < MATCH_MM), None)
            is_large = float(lesion["radius_mm"]) >= MIN_RADIUS_MM
            cut = "cut by the border" if lesion["touches_border"] == "True" else ""
            start = [case["subject"], lesion["radius_mm"], f"{float(lesion['volume_mm3']):.0f}"]
            if match is None:
                misses += is_large
                table.add_row(*start, "not found", "", lesion["hu"], "", "", cut)
                continue
            unmatched.remove(match)
            volume_mm3, density = float(match["volume_mm3"]), float(match["intensity_mean"])
            error = 100 * (volume_mm3 / float(lesion["volume_mm3"]) - 1)
            density_error = density - float(lesion["hu"])
            is_accurate = abs(error) <= VOLUME_TOLERANCE_PERCENT
            is_accurate &= abs(density_error) <= DENSITY_TOLERANCE_HU
            misses += is_large and not is_accurate
            mark = "" if is_accurate or not is_large else "out of tolerance"
            remark = ", ".join(filter(None, (cut, mark)))
            values = [f"{volume_mm3:.0f}", f"{error:+.1f}", lesion["hu"], f"{density:.1f}"]
            table.add_row(*start, *values, f"{density_error:+.1f}", remark)
        for row in unmatched:
            values = [row["volume_mm3"], "", "", row["intensity_mean"], ""]
            table.add_row(case["subject"], "none", "0", *values, "false positive")
        if not unmatched and not any(row["subject"] == case["subject"] for row in truth):
            values = ["none", "0", "0", "", "", "", ""]
            table.add_row(case["subject"], *values, "no lesion, none found")
    return table, misses


def _distance_mm(row: dict[str, str], lesion: dict[str, str]) -> float:
    names = [f"centroid_{axis}_mm" for axis in "ras"]
    return math.dist([float(row[name]) for name in names], [float(lesion[name]) for name in names])


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    sys.exit(main())

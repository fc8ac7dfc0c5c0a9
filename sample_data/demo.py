"""The demo: train on the phantoms, segment those it never saw, compare the lesions found with the truth.

Run by `make demo`. Prints a table of true against measured volumes and densities, and where the results are.
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
SURELY_FOUND_RADIUS_MM = 5.0  # smaller ones are in the table, but nothing is promised of them
VOLUME_TOLERANCE_PERCENT, DENSITY_TOLERANCE_HU, MATCH_MM = 5.0, 2.0, 4.0


def main() -> int:
    """0 if every lesion of at least 5 mm radius was found and measured within the tolerances, else 1."""
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
            f"training on the phantoms of {FOLDER.name}/ (train and val): about 3 min on two cores, longer on a busy machine …"
        )
        volseg.train(
            FOLDER,
            recipe="smoke",
            out=out / "model",
            resume=True,
            progress=lambda stage, share, detail: (
                console.print(f"  {stage} {share:4.0%} {detail}", highlight=False)
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
    promise = f"every lesion of ≥ {SURELY_FOUND_RADIUS_MM:g} mm radius found, volume within {VOLUME_TOLERANCE_PERCENT:g} %, density within {DENSITY_TOLERANCE_HU:g} HU"
    console.print(f"{promise}: {'holds' if misses == 0 else f'{misses} do not hold'}")
    return 0 if misses == 0 and report.exit_code == 0 else 1


def _compare(
    cases: list[dict[str, str]], truth: list[dict[str, str]], lesions: list[dict[str, str]]
) -> tuple[Table, int]:
    """The table, and how many of the lesions that must be found are missing or out of tolerance."""
    table = Table(
        "case",
        "radius mm",
        "true mm³",
        "measured mm³",
        "error %",
        "true HU",
        "measured HU",
        "error HU",
        "",
    )
    misses = 0
    for case in cases:
        found = [row for row in lesions if row["case_id"] == case["subject"]]
        for lesion in (row for row in truth if row["subject"] == case["subject"]):
            match = next((row for row in found if _distance_mm(row, lesion) < MATCH_MM), None)
            promised = float(lesion["radius_mm"]) >= SURELY_FOUND_RADIUS_MM
            cut = "cut by the border" if lesion["touches_border"] == "True" else ""
            start = [case["subject"], lesion["radius_mm"], f"{float(lesion['volume_mm3']):.0f}"]
            if match is None:
                misses += promised
                table.add_row(*start, "not found", "", lesion["hu"], "", "", cut)
                continue
            found.remove(match)
            error = 100 * (float(match["volume_mm3"]) / float(lesion["volume_mm3"]) - 1)
            density_error = float(match["intensity_mean"]) - float(lesion["hu"])
            within = (
                abs(error) <= VOLUME_TOLERANCE_PERCENT
                and abs(density_error) <= DENSITY_TOLERANCE_HU
            )
            misses += promised and not within
            mark = "" if within or not promised else "out of tolerance"
            measured = f"{float(match['intensity_mean']):.1f}"
            remark = ", ".join(filter(None, (cut, mark)))
            table.add_row(
                *start,
                f"{float(match['volume_mm3']):.0f}",
                f"{error:+.1f}",
                lesion["hu"],
                measured,
                f"{density_error:+.1f}",
                remark,
            )
        for row in found:
            table.add_row(
                case["subject"],
                "none",
                "0",
                row["volume_mm3"],
                "",
                "",
                row["intensity_mean"],
                "",
                "false alarm",
            )
        if not found and not any(row["subject"] == case["subject"] for row in truth):
            table.add_row(
                case["subject"], "none", "0", "0", "", "", "", "", "no lesion, none found"
            )
    return table, misses


def _distance_mm(row: dict[str, str], lesion: dict[str, str]) -> float:
    return math.dist(
        *([float(values[f"centroid_{axis}_mm"]) for axis in "ras"] for values in (row, lesion))
    )


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    sys.exit(main())

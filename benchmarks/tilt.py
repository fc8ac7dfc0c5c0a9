"""What a tilt of the patient between two scans does to diameters, and what `volseg compare` makes of it.

    python benchmarks/tilt.py MSD_HIPPOCAMPUS LIDC_NODULES STS_SARCOMA/cases_t1.csv [--cases 20] [--angles 0 3 5 8 14 20]

Every scan is compared with itself, turned about the patient's R axis and sampled anew on a grid of the same shape: the scan
linearly, the mask to the nearest voxel. Nothing has changed, so every difference is an error. `own slices` is the difference of
the long axes that `volseg measure` gives, each in the axial slices of its own scan. The other columns are those of `volseg compare`:
`planes known` where the grid is tilted and the patient is where he was (--no-registration), `registered` where the patient turned.
Errors in percent: mean of the absolute value over all lesions of at least 10 mm, and the largest. The last columns count patients.
"""

from __future__ import annotations

import argparse
import csv
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

import volseg
from volseg.io.nifti import read_mask, read_volume, write_volume
from volseg.preprocess.align import index_matrix
from volseg.volume import Geometry, Volume

AXES = ("long", "short")
LEAST_MM = 10.0


@dataclass(frozen=True)
class Case:
    name: str
    image: Path
    mask: Path


def cases_of(dataset: Path, n: int) -> list[Case]:
    """`n` cases of a dataset, evenly spread over its table."""
    table = dataset / "cases.csv" if dataset.is_dir() else dataset
    with table.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["label"]]
    picked = [rows[at] for at in np.linspace(0, len(rows) - 1, min(n, len(rows))).astype(int)]
    return [
        Case(row["subject"], table.parent / row["image"], table.parent / row["label"])
        for row in picked
    ]


def turned(volume: Volume, turn: np.ndarray, order: int) -> np.ndarray:
    """The scan of the patient after a turn (4, 4), on the grid of the scan before."""
    matrix = index_matrix(volume.geometry, volume.geometry, np.linalg.inv(turn))
    values = volume.intensities(volume.array).astype(np.float32)
    return ndimage.affine_transform(
        values,
        matrix[:3, :3],
        matrix[:3, 3],
        order=order,
        mode="constant" if order == 0 else "nearest",
        cval=0,
    )


def turn_about(geometry: Geometry, angle_deg: float) -> np.ndarray:
    """(4, 4) a turn about the R axis through the middle of the grid."""
    middle = geometry.to_world_mm((np.array([geometry.shape]) - 1) / 2)[0]
    c, s = math.cos(math.radians(angle_deg)), math.sin(math.radians(angle_deg))
    turn = np.eye(4)
    turn[:3, :3] = [[1, 0, 0], [0, c, -s], [0, s, c]]
    turn[:3, 3] = middle - turn[:3, :3] @ middle
    return turn


def measure(folder: Path, scans: dict[str, tuple[Volume, Volume]]) -> Path:
    """Results of `volseg measure`."""
    (folder / "in").mkdir(parents=True)
    lines = [["subject", "image", "label"]]
    for name, (scan, mask) in scans.items():
        write_volume(scan, folder / "in" / f"{name}.nii.gz")
        write_volume(mask, folder / "in" / f"{name}_mask.nii.gz")
        lines.append([name, f"{name}.nii.gz", f"{name}_mask.nii.gz"])
    with (folder / "in" / "cases.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)
    volseg.measure(cases=folder / "in" / "cases.csv", out=folder / "results")
    return folder / "results"


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def summary(errors: list[float]) -> str:
    if not errors:
        return "–"
    return f"{np.mean(np.abs(errors)):.1f} / {max(errors, key=abs):+.1f}".replace("-", "−")


def compared(
    baseline: Path, followup: Path, out: Path, *, registration: bool
) -> tuple[dict[str, list[float]], str, str]:
    """Errors in percent of both axes as `compare` gives them, in each scan's own slices, and the responses."""
    volseg.compare(baseline, followup, out=out, registration=registration)
    errors: dict[str, list[float]] = {
        f"{what}_{axis}": [] for what in ("own", "plane") for axis in AXES
    }
    measured = {
        (row["case_id"], row["lesion_id"]): row for row in rows_of(followup / "lesions.csv")
    }
    for row in rows_of(out / "comparison.csv"):
        if row["status"] != "matched":
            continue
        lesion = measured[row["patient"], row["followup_lesion_id"]]
        for axis in AXES:
            before = float(row[f"baseline_{axis}_axis_mm"])
            if before >= LEAST_MM:
                errors[f"plane_{axis}"].append(
                    100 * (float(row[f"followup_{axis}_axis_mm"]) / before - 1)
                )
                errors[f"own_{axis}"].append(100 * (float(lesion[f"{axis}_axis_mm"]) / before - 1))
    patients = [row for row in rows_of(out / "response.csv") if row["status"] == "done"]
    given = [row["response"] for row in patients]
    wrong = sum(answer in ("PR", "PD", "CR") for answer in given)
    angles = [float(row["tilt_deg"]) for row in patients if row["tilt_deg"]]
    counts = f"{wrong} / {given.count('')} / {len(given)}"
    return errors, counts, f"{np.median(angles):.1f}" if angles else "–"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "datasets", type=Path, nargs="+", help="folders with cases.csv, or such tables"
    )
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--angles", type=float, nargs="+", default=[0, 3, 5, 8, 14, 20])
    parser.add_argument("--no-registration", action="store_true", help="tilted grids only")
    arguments = parser.parse_args()
    print(
        "| data | tilt | axis | lesions | own slices, % | planes known, % | registered, % | tilt seen | wrong / withheld / all: known | registered |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for dataset in arguments.datasets:
        pairs = {
            case.name: (read_volume(case.image), read_mask(case.mask))
            for case in cases_of(dataset, arguments.cases)
        }
        for angle in arguments.angles:
            with tempfile.TemporaryDirectory() as temporary:
                tell(
                    Path(temporary),
                    dataset.name if dataset.is_dir() else dataset.parent.name,
                    pairs,
                    angle,
                    arguments,
                )


def tell(
    folder: Path,
    name: str,
    pairs: dict[str, tuple[Volume, Volume]],
    angle: float,
    arguments: argparse.Namespace,
) -> None:
    """One angle of one dataset: a row for each axis."""
    tilted, moved = {}, {}
    for case, (scan, mask) in pairs.items():
        turn = turn_about(scan.geometry, angle)
        scan_values, mask_values = turned(scan, turn, 1), turned(mask, turn, 0).astype(np.uint8)
        back = Geometry(scan.geometry.shape, np.linalg.inv(turn) @ scan.geometry.affine)
        tilted[case] = Volume(scan_values, back), Volume(mask_values, back)
        moved[case] = Volume(scan_values, scan.geometry), Volume(mask_values, scan.geometry)
    before = measure(folder / "before", pairs)
    known, known_counts, _ = compared(
        before, measure(folder / "tilted", tilted), folder / "known", registration=False
    )
    registered, counts, seen = {f"plane_{axis}": [] for axis in AXES}, "–", "–"
    if not arguments.no_registration:
        registered, counts, seen = compared(
            before, measure(folder / "moved", moved), folder / "registered", registration=True
        )
    for axis in AXES:
        cells = [
            name,
            f"{angle:g}°",
            axis,
            len(known[f"plane_{axis}"]),
            summary(known[f"own_{axis}"]),
        ]
        cells += [
            summary(known[f"plane_{axis}"]),
            summary(registered[f"plane_{axis}"]),
            seen,
            known_counts,
            counts,
        ]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()

"""Measure how a tilt of the patient between two scans affects diameters and `volseg compare`.

    python benchmarks/tilt.py MSD_HIPPOCAMPUS LIDC_NODULES STS_SARCOMA/cases_t1.csv [--cases 20]
        [--angles 0 3 5 8 14 20]

Every scan is compared with itself, rotated about the patient's R axis and resampled on a grid of
the same shape: the scan linearly, the mask to the nearest voxel. Nothing has changed, so every
difference is an error. `own slices` compares the axes that `volseg measure` gives, each in the
axial slices of its own scan. The other columns come from `volseg compare`: for `planes known` the
grid is tilted and the patient is not (--no-registration); for `registered` the patient is tilted.
Errors are in percent: mean absolute value over all lesions of at least 10 mm, and the largest. The
last columns count patients.
"""

from __future__ import annotations

import csv
import math
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

import volseg
from volseg.io.volumes import read_mask, read_volume, write_volume
from volseg.volume import Geometry, Rigid, Volume

AXES = ("long", "short")
MIN_AXIS_MM = 10.0


@dataclass(frozen=True)
class Case:
    name: str
    image: Path
    mask: Path


def cases_of(dataset: Path, n: int) -> list[Case]:
    """Return `n` cases of a dataset, evenly spread over its table."""
    table = dataset / "cases.csv" if dataset.is_dir() else dataset
    with table.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["label"]]
    indices = np.linspace(0, len(rows) - 1, min(n, len(rows))).astype(int)
    return [
        Case(row["subject"], table.parent / row["image"], table.parent / row["label"])
        for row in (rows[index] for index in indices)
    ]


def rotate(volume: Volume, rotation: Rigid, order: int) -> np.ndarray:
    """Resample the patient after a rotation, on the grid of the scan before it."""
    matrix = volume.geometry.index_matrix(volume.geometry, rotation.inverse())
    values = volume.intensities(volume.array).astype(np.float32)
    mode = "constant" if order == 0 else "nearest"
    return ndimage.affine_transform(
        values, matrix[:3, :3], matrix[:3, 3], order=order, mode=mode, cval=0
    )


def rotation_about_r(geometry: Geometry, angle_deg: float) -> Rigid:
    """Return the rotation about the R axis through the centre of the grid."""
    c, s = math.cos(math.radians(angle_deg)), math.sin(math.radians(angle_deg))
    rotation = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    return Rigid.about(geometry.centre_mm, rotation, np.zeros(3))


def measure(folder: Path, scans: dict[str, tuple[Volume, Volume]]) -> Path:
    """Run `volseg measure` on scans with their masks and return its results folder."""
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


def compare(
    baseline: Path, followup: Path, out: Path, *, registration: bool
) -> tuple[dict[str, list[float]], str, str]:
    """Return errors of both axes in percent, counts of responses and the median tilt.

    `plane_…` are the errors in the planes of `volseg compare`, `own_…` in each scan's own slices.
    """
    volseg.compare(baseline, followup, out=out, registration=registration)
    names = [f"{planes}_{axis}" for planes in ("own", "plane") for axis in AXES]
    errors: dict[str, list[float]] = {name: [] for name in names}
    lesions = rows_of(followup / "lesions.csv")
    measured = {(row["case_id"], row["lesion_id"]): row for row in lesions}
    for row in rows_of(out / "comparison.csv"):
        if row["status"] != "matched":
            continue
        lesion = measured[row["patient"], row["followup_lesion_id"]]
        for axis in AXES:
            before = float(row[f"baseline_{axis}_axis_mm"])
            if before >= MIN_AXIS_MM:
                after = float(row[f"followup_{axis}_axis_mm"])
                errors[f"plane_{axis}"].append(100 * (after / before - 1))
                errors[f"own_{axis}"].append(100 * (float(lesion[f"{axis}_axis_mm"]) / before - 1))
    patients = [row for row in rows_of(out / "response.csv") if row["status"] == "done"]
    responses = [row["response"] for row in patients]
    wrong = sum(response in ("PR", "PD", "CR") for response in responses)
    angles = [float(row["tilt_deg"]) for row in patients if row["tilt_deg"]]
    counts = f"{wrong} / {responses.count('')} / {len(responses)}"
    return errors, counts, f"{np.median(angles):.1f}" if angles else "–"


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "datasets", type=Path, nargs="+", help="folders with a cases.csv, or tables like it"
    )
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--angles", type=float, nargs="+", default=[0, 3, 5, 8, 14, 20])
    parser.add_argument("--no-registration", action="store_true", help="tilted grids only")
    arguments = parser.parse_args()
    print(
        "| data | tilt | axis | lesions | own slices, % | planes known, % | registered, % "
        "| tilt seen | wrong / withheld / all: known | registered |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for dataset in arguments.datasets:
        pairs = {
            case.name: (read_volume(case.image), read_mask(case.mask))
            for case in cases_of(dataset, arguments.cases)
        }
        name = dataset.name if dataset.is_dir() else dataset.parent.name
        for angle in arguments.angles:
            with tempfile.TemporaryDirectory() as temporary:
                print_rows(Path(temporary), name, pairs, angle, not arguments.no_registration)


def print_rows(
    folder: Path,
    name: str,
    pairs: dict[str, tuple[Volume, Volume]],
    angle: float,
    registration: bool,
) -> None:
    """Print a row per axis, for one angle of one dataset."""
    tilted_grids, tilted_patients = {}, {}
    for case, (scan, mask) in pairs.items():
        grid, rotation = scan.geometry, rotation_about_r(scan.geometry, angle)
        values, labels = rotate(scan, rotation, 1), rotate(mask, rotation, 0).astype(np.uint8)
        tilted = Geometry(grid.shape, np.linalg.inv(rotation) @ grid.affine)
        tilted_grids[case] = Volume(values, tilted), Volume(labels, tilted)
        tilted_patients[case] = Volume(values, grid), Volume(labels, grid)
    before = measure(folder / "before", pairs)
    after = measure(folder / "tilted", tilted_grids)
    errors, counts, _ = compare(before, after, folder / "known", registration=False)
    registered, registered_counts, seen = {f"plane_{axis}": [] for axis in AXES}, "–", "–"
    if registration:
        after = measure(folder / "moved", tilted_patients)
        results = compare(before, after, folder / "registered", registration=True)
        registered, registered_counts, seen = results
    for axis in AXES:
        plane = errors[f"plane_{axis}"]
        cells = [name, f"{angle:g}°", axis, len(plane), summary(errors[f"own_{axis}"])]
        cells += [summary(plane), summary(registered[f"plane_{axis}"])]
        cells += [seen, counts, registered_counts]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()

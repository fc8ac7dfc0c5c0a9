"""Check `volseg measure` on one scan in all 48 axis orders, and against TotalSegmentator.

    python benchmarks/references.py NIFTI_ZOO TOTALSEG_EXAMPLE_CT

NIFTI_ZOO holds orientations48/, the files of one volume; each mask is where the scan is above 90.
TOTALSEG_EXAMPLE_CT holds cases.csv, label_names.csv and example_ct_sm_fast_statistics.json, the
statistics that TotalSegmentator wrote for the mask example_ct_sm_fast. All values are read from
lesions.csv, so differences have its precision.
"""

from __future__ import annotations

import csv
import json
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from pathlib import Path

import numpy as np

import volseg
from volseg.io.volumes import read_volume, write_volume

THRESHOLD = 90
SUBJECT = "example_ct_sm_fast"


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("nifti_zoo", type=Path)
    parser.add_argument("totalseg_example_ct", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        orders = measure_orders(arguments.nifti_zoo / "orientations48", Path(temporary) / "orders")
        labels = measure_labels(arguments.totalseg_example_ct, Path(temporary) / "labels")
    print("| files | lesions in each | distinct rows in all | largest centroid difference, mm |")
    print("|---|---|---|---|")
    print(orders)
    print()
    print(
        "| labels | of which present | largest difference of volume, mm³ "
        "| largest difference of mean intensity, HU |"
    )
    print("|---|---|---|---|")
    print(labels)


def measure_orders(folder: Path, work: Path) -> str:
    """Return the row of the table about axis orders.

    Rows are compared without case and centroid; centroids are compared between all pairs of files.
    """
    work.mkdir()
    scans = sorted(folder.glob("*.nii.gz"))
    lines = [["subject", "image", "label"]]
    for path in scans:
        scan = read_volume(path)
        mask = scan.with_array((scan.intensities() > THRESHOLD).astype(np.uint8))
        write_volume(mask, work / path.name, like=path)
        lines.append([path.name.split(".")[0], str(path.resolve()), path.name])
    with (work / "cases.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)
    report = volseg.measure(cases=work / "cases.csv", out=work / "out")
    assert not report.failed, report.failed
    lesions, distinct = defaultdict(list), set()
    centroids = defaultdict(list)
    for row in read_rows(work / "out" / "lesions.csv"):
        lesions[row.pop("case_id")].append(row)
        centroid_mm = [float(row.pop(f"centroid_{axis}_mm")) for axis in "ras"]
        centroids[row["lesion_id"]].append(centroid_mm)
        distinct.add(tuple(row.values()))
    assert len(lesions) == len(scans), "a file has no lesion at all"
    counts = sorted({len(rows) for rows in lesions.values()})
    clouds = [np.array(points) for points in centroids.values()]
    largest = max(np.linalg.norm(cloud[:, None] - cloud, axis=-1).max() for cloud in clouds)
    n_lesions = counts[0] if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"| {len(scans)} | {n_lesions} | {len(distinct)} | {largest:.2g} |"


def measure_labels(folder: Path, work: Path) -> str:
    """Return the row of the table about labels.

    A label without a voxel has the volume 0 and no intensity to compare.
    """
    names = {
        int(row["label"]): row["name"]
        for row in read_rows(folder / "label_names.csv")
        if row["map"] == "total"
    }
    case = next(row for row in read_rows(folder / "cases.csv") if row["subject"] == SUBJECT)
    image, mask = folder / case["image"], folder / case["label"]
    report = volseg.measure(image=image, mask=mask, out=work, objects="labels", label_names=names)
    assert not report.failed, report.failed
    rows = {row["label_name"]: row for row in read_rows(work / "lesions.csv")}
    expected = json.loads((folder / f"{SUBJECT}_statistics.json").read_text())
    assert set(rows) <= set(expected) == set(names.values())
    volumes = [
        abs((float(rows[name]["volume_mm3"]) if name in rows else 0.0) - statistics["volume"])
        for name, statistics in expected.items()
    ]
    intensities = [
        abs(float(row["intensity_mean"]) - expected[name]["intensity"])
        for name, row in rows.items()
    ]
    return f"| {len(expected)} | {len(rows)} | {max(volumes):.2g} | {max(intensities):.2g} |"


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()

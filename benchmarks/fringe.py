"""Test `volseg compare` on unchanged lesions from which missing voxels cut off a fringe.

    python benchmarks/fringe.py LIDC_NODULES MSD_HIPPOCAMPUS STS_SARCOMA/cases_t1.csv [--cases 20]

Every mask is compared with itself minus one plane of voxels, which leaves a fringe of one or two
voxels at the last slice of the mask. The cut runs along one of the three axes or along all of them,
at follow-up, at baseline, or at both times. Pieces are the lesions that `volseg measure` numbered;
crumbs are the pieces counted with the lesion next to them. Nothing else has changed, so every
response except SD (Non-CR/Non-PD without targets) is an error.
"""

from __future__ import annotations

import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
from tilt import cases_of, measure, rows_of

import volseg
from volseg.io.volumes import read_mask, read_volume
from volseg.volume import Volume

CUTS = {"first axis": (0,), "second": (1,), "third": (2,), "all three": (0, 1, 2)}


def cut(mask: Volume, axes: tuple[int, ...], depth: int) -> Volume:
    """Return the mask without the plane `depth` voxels below its last slice along each axis."""
    array = mask.array.copy()
    for axis in axes:
        slices = np.flatnonzero((mask.array > 0).any(axis=tuple({0, 1, 2} - {axis})))
        array[(slice(None),) * axis + (max(slices[0], slices[-1] - depth),)] = 0
    return mask.with_array(array)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "datasets", type=Path, nargs="+", help="folders with a cases.csv, or tables like it"
    )
    parser.add_argument("--cases", type=int, default=20)
    arguments = parser.parse_args()
    print(
        "| data | fringe | cut at | comparisons | pieces | crumbs | PD or PR | withheld "
        "| change of the sum: mean, largest |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for dataset in arguments.datasets:
        pairs = {
            case.name: (read_volume(case.image), read_mask(case.mask))
            for case in cases_of(dataset, arguments.cases)
        }
        name = dataset.name if dataset.is_dir() else dataset.parent.name
        with tempfile.TemporaryDirectory() as temporary:
            for depth in (1, 2):
                print_rows(name, depth, pairs, Path(temporary) / str(depth))


def print_rows(
    name: str, depth: int, pairs: dict[str, tuple[Volume, Volume]], folder: Path
) -> None:
    """Print a row per time of the cut, for one dataset and one thickness of the fringe."""
    whole = measure(folder / "whole", pairs)
    rows: dict[str, list[dict[str, str]]] = {"follow-up": [], "baseline": [], "both": []}
    for text, axes in CUTS.items():
        cuts = {case: (scan, cut(mask, axes, depth)) for case, (scan, mask) in pairs.items()}
        changed = measure(folder / text, cuts)
        orders = (whole, changed), (changed, whole), (changed, changed)
        for time, folders in zip(rows, orders, strict=True):
            out = folder / text / time
            volseg.compare(*folders, out=out, registration=False)
            rows[time] += rows_of(out / "response.csv")
    for time, patients in rows.items():
        crumbs = sum(int(row["n_crumbs"]) for row in patients)
        lesions = sum(int(row["n_baseline"]) + int(row["n_followup"]) for row in patients)
        changes = [
            float(row["change_sum_percent"]) for row in patients if row["change_sum_percent"]
        ]
        wrong = sum(row["response"] in ("PD", "PR", "CR") for row in patients)
        withheld = sum(row["response"] == "" for row in patients)
        percent = f"{np.mean(np.abs(changes)):.1f} %, {max(changes, key=abs):+.1f} %"
        cells = [name, f"{depth} voxels", time, len(patients), lesions + crumbs, crumbs]
        cells += [wrong, withheld, percent.replace("-", "−")]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()

"""What `volseg compare` makes of lesions whose fringe is cut off by missing voxels, and which have not changed otherwise.

    python benchmarks/fringe.py LIDC_NODULES MSD_HIPPOCAMPUS STS_SARCOMA/cases_t1.csv [--cases 20]

Every mask is compared with itself less planes of voxels: one plane that leaves a fringe of one or two voxels at the last slice of
the mask, along one of the three axes or along all of them; the cut is made at follow-up, at baseline, or at both times. Pieces are
the lesions that `volseg measure` numbered, crumbs those that were counted with the lesion beside them. Nothing has grown or shrunk
but by what is missing, so every response but SD (without targets Non-CR/Non-PD) is an error.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from tilt import cases_of, measure, rows_of

import volseg
from volseg.io.nifti import read_mask, read_volume
from volseg.volume import Volume

CUTS = {"first axis": (0,), "second": (1,), "third": (2,), "all three": (0, 1, 2)}


def cut(mask: Volume, axes: tuple[int, ...], depth: int) -> Volume:
    """The mask without a plane of voxels `depth` voxels below the last slice that it has, along each of the axes."""
    array = mask.array.copy()
    for axis in axes:
        held = np.flatnonzero((mask.array > 0).any(axis=tuple({0, 1, 2} - {axis})))
        array[(slice(None),) * axis + (max(held[0], held[-1] - depth),)] = 0
    return mask.with_array(array)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "datasets", type=Path, nargs="+", help="folders with cases.csv, or such tables"
    )
    parser.add_argument("--cases", type=int, default=20)
    arguments = parser.parse_args()
    print(
        "| data | fringe | cut at | comparisons | pieces | crumbs | PD or PR | withheld | change of the sum: mean, largest |"
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
                tell(name, depth, pairs, Path(temporary) / str(depth))


def tell(name: str, depth: int, pairs: dict[str, tuple[Volume, Volume]], folder: Path) -> None:
    """One dataset with fringes of one thickness: a row for each time at which it is cut."""
    whole = measure(folder / "whole", pairs)
    rows: dict[str, list[dict[str, str]]] = {"follow-up": [], "baseline": [], "both": []}
    for text, axes in CUTS.items():
        changed = measure(
            folder / text,
            {case: (scan, cut(mask, axes, depth)) for case, (scan, mask) in pairs.items()},
        )
        for time, times in zip(
            rows, ((whole, changed), (changed, whole), (changed, changed)), strict=True
        ):
            out = folder / text / time
            volseg.compare(*times, out=out, registration=False)
            rows[time] += rows_of(out / "response.csv")
    for time, patients in rows.items():
        crumbs = sum(int(row["n_crumbs"]) for row in patients)
        lesions = sum(int(row["n_baseline"]) + int(row["n_followup"]) for row in patients)
        changes = [
            float(row["change_sum_percent"]) for row in patients if row["change_sum_percent"]
        ]
        wrong = sum(row["response"] in ("PD", "PR", "CR") for row in patients)
        withheld = sum(row["response"] == "" for row in patients)
        percent = f"{np.mean(np.abs(changes)):.1f} %, {max(changes, key=abs):+.1f} %".replace(
            "-", "−"
        )
        cells = [
            name,
            f"{depth} voxels",
            time,
            len(patients),
            lesions + crumbs,
            crumbs,
            wrong,
            withheld,
            percent,
        ]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()

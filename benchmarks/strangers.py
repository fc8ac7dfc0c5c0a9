"""Train, infer and judge in the layouts of strangers, with commands alone and nothing edited.

    python benchmarks/strangers.py --out FOLDER [--time-budget 60s]

The phantoms of sample_data are written in six layouts: channels as in BraTS, suffixes as in
challenges on multiple sclerosis, BIDS with derivatives, a folder per patient, nnU-Net with a list
of cases, and a table as Excel writes it on Windows. Further channels are the scan with noise.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from volseg.io.volumes import read_mask, read_volume, write_volume
from volseg.volume import Volume

PHANTOMS = Path(__file__).parents[1] / "sample_data"
NOISE_HU = 20.0
Places = Callable[[Path, int], tuple[list[Path], Path]]  # folder, number → scans, mask


def brats(folder: Path, n: int) -> tuple[list[Path], Path]:
    case = folder / f"BraTS_{n:03}"
    scans = [case / f"{case.name}_{name}.nii.gz" for name in ("flair", "t1", "t1ce", "t2")]
    return scans, case / f"{case.name}_seg.nii.gz"


def suffixes(folder: Path, n: int) -> tuple[list[Path], Path]:
    names = [f"patient{n:02}_{name}.nii.gz" for name in ("T1W", "FLAIR", "consensus_gt")]
    *scans, mask = (folder / f"patient{n:02}" / name for name in names)
    return scans, mask


def bids(folder: Path, n: int) -> tuple[list[Path], Path]:
    place = Path(f"sub-{n:02}") / "ses-1" / "anat"
    start = f"sub-{n:02}_ses-1"
    mask = folder / "derivatives" / "manual" / place / f"{start}_label-lesion_mask.nii.gz"
    return [folder / place / f"{start}_T1w.nii.gz"], mask


def patients(folder: Path, n: int) -> tuple[list[Path], Path]:
    return [folder / f"Patient {n}" / "CT.nii.gz"], folder / f"Patient {n}" / "tumour.nii.gz"


def nnunet(folder: Path, n: int) -> tuple[list[Path], Path]:
    return (
        [folder / "imagesTr" / f"lesion_{n:03}_0000.nii.gz"],
        folder / "labelsTr" / f"lesion_{n:03}.nii.gz",
    )


def windows(folder: Path, n: int) -> tuple[list[Path], Path]:
    return [folder / "scans" / f"Scan {n}.nii.gz"], folder / "masks" / f"Mask {n}.nii.gz"


def describe_nnunet(folder: Path, numbers: Sequence[int]) -> None:
    files = [[path.relative_to(folder) for path in flat(nnunet(folder, n))] for n in numbers]
    content = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "lesion": 1},
        "numTraining": len(numbers),
        "file_ending": ".nii.gz",
        "dataset": {
            f"lesion_{n:03}": {"images": [str(image)], "label": str(label)}
            for n, (image, label) in zip(numbers, files, strict=True)
        },
    }
    (folder / "dataset.json").write_text(json.dumps(content))


def describe_windows(folder: Path, numbers: Sequence[int]) -> None:
    lines = ["sep=;", "Patient ID;Image;Mask"]
    for n in numbers:
        image, mask = (str(path.relative_to(folder)) for path in flat(windows(folder, n)))
        lines.append(f"P{n};{image};{mask}".replace("/", "\\"))
    (folder / "cases.csv").write_bytes("".join(f"{line}\r\n" for line in lines).encode("utf-8-sig"))


LAYOUTS: dict[str, tuple[Places, Callable[[Path, Sequence[int]], None] | None]] = {
    "BraTS-like channels": (brats, None),
    "MS-like suffixes": (suffixes, None),
    "BIDS with derivatives": (bids, None),
    "a folder per patient": (patients, None),
    "nnU-Net with a list": (nnunet, describe_nnunet),
    "Windows CSV": (windows, describe_windows),
}


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--time-budget", default="60s")
    arguments = parser.parse_args()
    print("| layout | train | infer | evaluate | Dice of unseen phantoms | training, s |")
    print("|---|---|---|---|---|---|")
    for name, (places, describe) in LAYOUTS.items():
        folder = arguments.out / places.__name__
        for split in ("train", "test"):
            write(folder / split, places, describe, split)
        model, results, judged = (folder / part for part in ("model", "results", "evaluation"))
        started = time.monotonic()
        train = ["train", folder / "train", "--out", model, "--time-budget", arguments.time_budget]
        codes = [run(folder, *train)]
        seconds = time.monotonic() - started
        codes.append(run(folder, "infer", folder / "test", "--model", model, "--out", results))
        given = ["--reference", folder / "test", "--predicted", results, "--out", judged]
        codes.append(run(folder, "evaluate", *given))
        dice = pd.read_csv(judged / "evaluation.csv")["dice"].mean() if codes[-1] == 0 else np.nan
        print(
            f"| {name} | {' | '.join(map(str, codes))} | {dice:.3f} | {seconds:.0f} |", flush=True
        )


def write(folder: Path, places: Places, describe: Callable | None, split: str) -> None:
    """Write the phantoms for training, or those for testing, in a layout."""
    with (PHANTOMS / "cases.csv").open(newline="", encoding="utf-8") as file:
        rows = [
            row for row in csv.DictReader(file) if (row["split"] == "test") == (split == "test")
        ]
    for n, row in enumerate(rows, start=1):
        scan, mask = read_volume(PHANTOMS / row["image"]), read_mask(PHANTOMS / row["label"])
        scans, mask_path = places(folder, n)
        for path in (*scans, mask_path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_volume(mask, mask_path)
        for number, path in enumerate(scans):
            write_volume(noisy(scan, seed=number) if number else scan, path)
    if describe is not None:
        describe(folder, range(1, len(rows) + 1))


def noisy(scan: Volume, seed: int) -> Volume:
    noise = np.random.default_rng(seed).normal(0, NOISE_HU, scan.array.shape)
    return scan.with_array(np.asfortranarray((scan.intensities() + noise).astype(np.int16)))


def flat(places: tuple[list[Path], Path]) -> list[Path]:
    return [*places[0], places[1]]


def run(folder: Path, *arguments: object) -> int:
    """Run a command of volseg; its output goes to a file beside its results."""
    command = [sys.executable, "-m", "volseg", *map(str, arguments)]
    with (folder / f"{arguments[0]}.log").open("w") as log:
        return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode


if __name__ == "__main__":
    main()

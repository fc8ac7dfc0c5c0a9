"""Train one dataset without a recipe in three layouts: Decathlon, nnU-Net raw, two folders.

    python benchmarks/layouts.py DATASET --out FOLDER [--time-budget 5m] [--folds 2]

DATASET has a cases.csv with one channel; its train and val cases are copied. Each layout is trained
by the plain command, with only a time budget and the number of folds.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--time-budget", default="5m")
    parser.add_argument("--folds", default="2")
    arguments = parser.parse_args()
    with (arguments.dataset / "cases.csv").open(newline="", encoding="utf-8") as file:
        cases = [row for row in csv.DictReader(file) if row["split"] != "test"]
    print("| layout | exit code | networks | Dice in cross-validation |")
    print("|---|---|---|---|")
    for name, write in (
        ("Decathlon", decathlon),
        ("nnU-Net raw", nnunet),
        ("images/ and labels/", plain),
    ):
        folder = arguments.out / write.__name__
        model = arguments.out / f"{write.__name__}_model"
        if not (model / "model.json").exists():
            write(arguments.dataset, cases, folder)
            command = [sys.executable, "-m", "volseg", "train", str(folder), "--out", str(model)]
            command += ["--resume", "--time-budget", arguments.time_budget]
            command += ["--folds", arguments.folds]
            code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
        else:
            code = 0
        metrics = json.loads((model / "model.json").read_text())["metrics"]
        dice = {
            key.removeprefix("validation_dice_"): value
            for key, value in metrics.items()
            if key.startswith("validation_dice")
        }
        shown = ", ".join(
            f"{key} {value:.3f}" for key, value in dice.items() if isinstance(value, float)
        )
        print(f"| {name} | {code} | {metrics.get('networks', 1)} | {shown} |")


def decathlon(dataset: Path, cases: list[dict[str, str]], folder: Path) -> None:
    copy_cases(dataset, cases, folder, "imagesTr", "labelsTr")
    names = [f"{case['subject']}.nii.gz" for case in cases]
    training = [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names]
    description = {
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "Anterior", "2": "Posterior"},
        "training": training,
        "test": [],
    }
    (folder / "dataset.json").write_text(json.dumps(description))


def nnunet(dataset: Path, cases: list[dict[str, str]], folder: Path) -> None:
    copy_cases(dataset, cases, folder, "imagesTr", "labelsTr", suffix="_0000")
    description = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "Anterior": 1, "Posterior": 2},
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description))


def plain(dataset: Path, cases: list[dict[str, str]], folder: Path) -> None:
    copy_cases(dataset, cases, folder, "images", "labels")


def copy_cases(
    dataset: Path,
    cases: list[dict[str, str]],
    folder: Path,
    images: str,
    labels: str,
    suffix: str = "",
) -> None:
    for sub in (images, labels):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    for case in cases:
        shutil.copy(dataset / case["image"], folder / images / f"{case['subject']}{suffix}.nii.gz")
        shutil.copy(dataset / case["label"], folder / labels / f"{case['subject']}.nii.gz")


if __name__ == "__main__":
    main()

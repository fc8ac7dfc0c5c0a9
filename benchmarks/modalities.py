"""Segment soft-tissue sarcomas from T1 alone and from T1 with PET: five folds by patient each.

    python benchmarks/modalities.py STS_SARCOMA --out FOLDER [--time-budget 20m]

STS_SARCOMA holds `cases_t1.csv` and `cases_pet.csv`, whose scans lie on different grids; PET is
resampled to the grid of T1 in world space. Patients of the test split are left out. The two models
differ only in their channels: recipe `sarcoma_mri`, same time, same folds.
"""

from __future__ import annotations

import csv
import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np

import volseg
from volseg.evaluation.intervals import mean_interval
from volseg.recipe import load_recipe, parse_recipe

CHANNELS = {"T1": ["t1"], "T1 + PET": ["t1", "pet"]}


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--time-budget", default="20m")
    parser.add_argument("--folds", type=int, default=5)
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    n = write_cases(arguments.dataset.resolve(), out / "cases.csv")
    seconds = float(arguments.time_budget.removesuffix("m")) * 60
    dice = {}
    for name, channels in CHANNELS.items():
        model = out / "_".join(channels)
        if not (model / "model.json").exists():
            content = load_recipe("sarcoma_mri").model_dump(mode="json")
            content["data"] |= {"channels": channels, "grids": "first"}
            recipe = parse_recipe(content, where=name)
            options = {"folds": arguments.folds, "time_budget_seconds": seconds}
            volseg.train(out, recipe=recipe, out=model, **options)
        with (model / "validation.csv").open(newline="", encoding="utf-8") as file:
            dice[name] = {row["patient"]: float(row["dice"]) for row in csv.DictReader(file)}
        metrics = json.loads((model / "model.json").read_text())["metrics"]
        print(f"{name}: {metrics}")
    print("| channels | patients | mean Dice | 95 % interval | median |")
    print("|---|---|---|---|---|")
    for name, scores in dice.items():
        values = np.array(list(scores.values()))
        interval = mean_interval(values.tolist(), list(scores), bounds=(0.0, 1.0))
        bounds = f"{interval.low:.3f} to {interval.high:.3f}"
        print(f"| {name} | {n} | {values.mean():.3f} | {bounds} | {np.median(values):.3f} |")
    first, second = dice.values()
    gain = np.array([second[patient] - first[patient] for patient in first])
    interval = mean_interval(gain.tolist(), list(first), bounds=(-1.0, 1.0))
    print(
        f"paired difference per patient {gain.mean():+.3f} ({interval.low:+.3f} to "
        f"{interval.high:+.3f}); better for {(gain > 0).sum()} of {n}"
    )


def write_cases(dataset: Path, path: Path) -> int:
    """Write a row per patient with both scans outside the test split; return their number.

    The mask is the one on T1.
    """
    rows = {}
    for name in ("t1", "pet"):
        with (dataset / f"cases_{name}.csv").open(newline="", encoding="utf-8") as file:
            rows[name] = {row["patient"]: row for row in csv.DictReader(file)}
    t1_rows = {patient: row for patient, row in rows["t1"].items() if row["split"] != "test"}
    both = [patient for patient in t1_rows if patient in rows["pet"]]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["subject", "patient", "image_t1", "image_pet", "label"])
        for patient in both:
            t1, pet = t1_rows[patient], rows["pet"][patient]
            paths = [dataset / path for path in (t1["image"], pet["image"], t1["label"])]
            writer.writerow([patient, patient, *paths])
    return len(both)


if __name__ == "__main__":
    main()

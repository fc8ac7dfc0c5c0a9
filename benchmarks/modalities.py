"""Segment soft-tissue sarcomas from T1 alone and from T1 with PET: five folds by patient each.

    python benchmarks/modalities.py STS_SARCOMA --out FOLDER [--time-budget 20m]

STS_SARCOMA holds `cases_t1.csv` and `cases_pet.csv`, each modality on a grid of its own. PET is brought to the grid of T1 in world space. The
patients of the test split are left out. The two differ in their channels alone: recipe `sarcoma_mri`, the same time, the same folds.
"""

from __future__ import annotations

import csv
import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np

import volseg
from volseg.evaluate.intervals import mean_interval
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
            volseg.train(
                out, recipe=recipe, out=model, folds=arguments.folds, time_budget_seconds=seconds
            )
        with (model / "validation.csv").open(newline="", encoding="utf-8") as file:
            dice[name] = {row["patient"]: float(row["dice"]) for row in csv.DictReader(file)}
        metrics = json.loads((model / "model.json").read_text())["metrics"]
        print(f"{name}: {metrics}")
    print("| channels | patients | mean Dice | 95 % interval | median |")
    print("|---|---|---|---|---|")
    for name, scores in dice.items():
        values = np.array(list(scores.values()))
        interval = mean_interval(values.tolist(), list(scores), bounds=(0.0, 1.0))
        print(
            f"| {name} | {n} | {values.mean():.3f} | {interval.low:.3f} to {interval.high:.3f} | {np.median(values):.3f} |"
        )
    first, second = dice.values()
    gain = np.array([second[patient] - first[patient] for patient in first])
    interval = mean_interval(gain.tolist(), list(first), bounds=(-1.0, 1.0))
    print(
        f"paired difference per patient {gain.mean():+.3f} ({interval.low:+.3f} to {interval.high:+.3f}); better for {(gain > 0).sum()} of {n}"
    )


def write_cases(dataset: Path, path: Path) -> int:
    """A row per patient outside the test split who has both; the mask is that on T1. Returns how many."""
    rows = {}
    for name in ("t1", "pet"):
        with (dataset / f"cases_{name}.csv").open(newline="", encoding="utf-8") as file:
            rows[name] = {row["patient"]: row for row in csv.DictReader(file)}
    both = [
        patient
        for patient in rows["t1"]
        if patient in rows["pet"] and rows["t1"][patient]["split"] != "test"
    ]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["subject", "patient", "image_t1", "image_pet", "label"])
        for patient in both:
            t1, pet = rows["t1"][patient], rows["pet"][patient]
            writer.writerow(
                [
                    patient,
                    patient,
                    dataset / t1["image"],
                    dataset / pet["image"],
                    dataset / t1["label"],
                ]
            )
    return len(both)


if __name__ == "__main__":
    main()

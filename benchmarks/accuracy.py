"""Train a recipe for a time budget and measure it on the test split, which training never reads.

    python benchmarks/accuracy.py DATASET RECIPE --out FOLDER [--time-budget 20m]
        [--rating malignancy --size diameter_mm]

Prints Dice per label over the test cases. With --rating it also prints the AUC of the classifier's
score, for cases rated at least 4 against at most 2, and the AUC of the column --size alone. A
second call reuses the trained model.
"""

from __future__ import annotations

import csv
import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import volseg
from volseg.evaluation.roc import auc
from volseg.io.cases import Case
from volseg.io.layouts import find_cases


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("recipe")
    parser.add_argument("--time-budget", default="20m")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rating", help="column with the rating of each case, 1 to 5")
    parser.add_argument("--size", help="column with a size, whose AUC is printed for comparison")
    arguments = parser.parse_args()
    model = arguments.out / "model"
    if not (model / "model.json").exists():
        seconds = float(arguments.time_budget.removesuffix("m")) * 60
        volseg.train(
            arguments.dataset,
            recipe=arguments.recipe,
            out=model,
            time_budget_seconds=seconds,
            seed=arguments.seed,
            resume=True,
        )
    test = [case for case in find_cases(arguments.dataset, None) if case.split == "test"]
    results = arguments.out / "results"
    report = volseg.infer(
        [path for case in test for path in case.images.values()], model=model, out=results
    )
    evaluation = volseg.evaluate(
        reference=arguments.dataset, predicted=results, out=arguments.out / "evaluation"
    )
    metrics = json.loads((model / "model.json").read_text())["metrics"]
    print(f"{arguments.recipe}: {metrics}")
    print("| label | test cases | mean Dice | median Dice | median volume error, % |")
    print("|---|---|---|---|---|")
    for label, scores in evaluation.summary["labels"].items():
        print(
            f"| {label} | {scores['n']} | {scores['mean_dice']:.4f} | {scores['median_dice']:.4f} "
            f"| {scores['median_volume_error_percent']:+.1f} |"
        )
    n_failed = len(report.failed) + len(evaluation.failed)
    print(f"mean over labels {evaluation.summary['mean_dice']:.4f}; failed {n_failed}")
    if arguments.rating:
        print_auc(test, results, arguments.rating, arguments.size)


def print_auc(test: Sequence[Case], results: Path, rating: str, size: str | None) -> None:
    """Print the AUC of the largest lesion's score per case; a case without lesions scores 0."""
    with (results / "lesions.csv").open(newline="", encoding="utf-8") as file:
        largest = {row["case_id"]: row for row in csv.DictReader(file) if row["lesion_id"] == "1"}
    rated = [case for case in test if not 2 < float(case.classes[rating]) < 4]
    positive = np.array([float(case.classes[rating]) >= 4 for case in rated])
    scores = np.array([_score(largest.get(case.id)) for case in rated])
    counts = f"{positive.sum()} rated ≥ 4, {(~positive).sum()} rated ≤ 2"
    print(f"AUC of the score: {auc(scores, positive):.4f} ({counts})")
    if size:
        sizes = np.array([float(case.classes[size]) for case in rated])
        print(f"AUC of {size} alone: {auc(sizes, positive):.4f}")


def _score(row: dict[str, str] | None) -> float:
    """Return the probability of the last class, the positive one."""
    return 0.0 if row is None else float(row["class_probabilities"].split(";")[-1].split("=")[1])


if __name__ == "__main__":
    main()

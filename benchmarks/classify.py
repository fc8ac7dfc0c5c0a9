"""Train the classifier of PneumoniaMNIST from scratch and judge it on the official test split.

    python benchmarks/classify.py PNEUMONIAMNIST.npz --out FOLDER [--time-budget 20m] [--seeds 3]
    python benchmarks/classify.py PNEUMONIAMNIST.npz --out FOLDER --folds 5
    python benchmarks/classify.py PNEUMONIAMNIST.npz --out FOLDER --init VGG16.safetensors

The recipe is the shipped `xray_pneumonia`; with --init, the plan that volseg makes for these
weights. Each model is trained on the training split, and whatever it chooses (epoch, temperature,
operating point) it chooses on the validation split. The test split is read once, at the end. ACC at
the validation point uses the threshold that was most accurate on the validation split.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import numpy as np

import volseg
from volseg.evaluation.calibration import calibration_error
from volseg.evaluation.classes import SCORES
from volseg.image_bundle import load_image_bundle
from volseg.io.image_cases import survey_images
from volseg.io.images import ImageReader
from volseg.preprocessing.images import to_input
from volseg.training.baselines import load_baselines

POINT = "accuracy"  # operating point on the validation split


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--time-budget", default="20m")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folds", type=int, default=1)
    parser.add_argument("--init", type=Path)
    arguments = parser.parse_args()
    models = {seed: trained(arguments, seed) for seed in range(arguments.seeds)}
    cases = [case for case in survey_images(arguments.dataset).cases if case.split == "test"]
    targets = np.array([int(case.cells["label"]) for case in cases])
    rows = [judged(model, cases, targets, arguments) for model in models.values()]
    print("| | mean | range over seeds |")
    print("|---|---|---|")
    for name in rows[0]:
        values = [row[name] for row in rows]
        print(f"| {name} | {np.mean(values):.4f} | {min(values):.4f} to {max(values):.4f} |")
    report_baselines(models[0], cases, targets)


def trained(arguments: Any, seed: int) -> Path:
    """Train with one seed, unless that was done before; return the model."""
    out = arguments.out / f"model_{seed}"
    if not (out / "model.json").exists():
        volseg.train(
            arguments.dataset,
            recipe=None if arguments.init else "xray_pneumonia",
            init=arguments.init,
            out=out,
            seed=seed,
            folds=arguments.folds if arguments.folds > 1 else None,
            time_budget_seconds=arguments.time_budget,
            resume=out.exists(),
        )
    return out


def judged(model: Path, cases: Any, targets: np.ndarray, arguments: Any) -> dict[str, float]:
    results = arguments.out / f"results_{model.name}"
    volseg.infer(arguments.dataset, model=model, out=results, pages=False)
    table = volseg.read_table(results / "classes.csv").set_index("case_id")
    positive = table.loc[[case.id for case in cases], "probability_1"].to_numpy(float)
    probabilities = np.column_stack([1 - positive, positive])
    bundle = load_image_bundle(model)
    (point,) = (point for point in bundle.judgement.points if point.name == POINT)
    called = positive >= point.threshold
    inside = table.loc[[case.id for case in cases], "confidence_set"].str.split("|")
    covered = [str(target) in names for target, names in zip(targets, inside, strict=True)]
    metrics = json.loads((model / "model.json").read_text(encoding="utf-8"))["metrics"]
    return {
        "AUC": SCORES["auc"](probabilities, targets) or np.nan,
        "ACC at 0.5": SCORES["accuracy"](probabilities, targets) or np.nan,
        "ACC at the validation point": float((called == targets).mean()),
        "ECE": calibration_error(probabilities, targets),
        "log loss": SCORES["log_loss"](probabilities, targets) or np.nan,
        "coverage of the 90 % sets": float(np.mean(covered)),
        "AUC on validation": metrics["validation_auc"],
    }


def report_baselines(model: Path, cases: Any, targets: np.ndarray) -> None:
    """Print the AUC of the baselines that were trained with a model."""
    recipe, reader = load_image_bundle(model).recipe, ImageReader()
    images = np.stack(
        [to_input(reader.read(case.path, case.index), recipe.images) for case in cases]
    )
    print("\n| baseline | AUC | ACC at 0.5 |")
    print("|---|---|---|")
    for baseline in load_baselines(model):
        if baseline.reason:
            print(f"| {baseline.name} | {baseline.reason} | |")
            continue
        predicted = baseline.predict(images)
        auc, accuracy = (SCORES[name](predicted, targets) for name in ("auc", "accuracy"))
        print(f"| {baseline.name} | {auc:.4f} | {accuracy:.4f} |")


if __name__ == "__main__":
    main()

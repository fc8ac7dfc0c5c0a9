"""Change one setting of a classifier's training at a time, and judge it on validation images.

    python benchmarks/ablation.py busi_ultrasound --target class --positive malignant
        --recipe pipelines/breast_ultrasound.toml --init WEIGHTS --out FOLDER [--pixels 96]
        [--epochs 6] [--seeds 0 1 2] [--variants focal mixup]

Fold 0 of `cross_validate.py`, which is a test fold there, is left out. Of the other four, each seed
draws its own fifth for validation. The scores are of these validation images, pooled over the
seeds' runs by their mean; "difference" is the mean over the seeds of the variant minus the recipe.
A run that was done before is not done again.
"""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from cross_validate import chosen_cases, folds_of, write_cases

import volseg
from volseg.evaluation.classes import SCORES
from volseg.recipe import ClassifyRecipe, as_any_recipe

VARIANTS: dict[str, dict[str, Any]] = {
    "the recipe": {},
    "focal": {"train": {"loss": {"focal_gamma": 2.0}}},
    "smoothing": {"train": {"loss": {"label_smoothing": 0.1}}},
    "mixup": {"train": {"augment": {"mixup": 0.2}}},
    "cut-out": {"train": {"augment": {"cutout_probability": 0.5}}},
    "no dropout": {"network": {"dropout": 0.0}},
    "more dropout": {"network": {"dropout": 0.5}},
    "no L2": {"train": {"weight_decay": 0.0}},
    "more L2": {"train": {"weight_decay": 0.1}},
    "not balanced": {"train": {"balance": "none"}},
    "balanced sampling": {"train": {"balance": "sampling"}},
    "no augmentation": {
        "train": {
            "augment": {
                "flip_axes": (),
                "spatial_probability": 0.0,
                "brightness_probability": 0.0,
                "contrast_probability": 0.0,
                "noise_probability": 0.0,
            }
        }
    },
}


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--target", required=True)
    parser.add_argument("--positive", required=True)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--init", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pixels", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.set_defaults(where=None)
    arguments = parser.parse_args()
    cases = chosen_cases(arguments)
    usable = folds_of(cases, arguments) != 0
    write_cases(arguments.out / "data", cases, usable, arguments.target)
    scores = {
        name: [judged(name, seed, arguments) for seed in arguments.seeds]
        for name in dict.fromkeys(["the recipe", *arguments.variants])
    }
    print("| | AUC | range over seeds | difference | log loss | difference |")
    print("|---|---|---|---|---|---|")
    usual = np.array(scores["the recipe"])
    for name, rows in scores.items():
        (area, loss), (more, worse) = np.mean(rows, axis=0), np.mean(rows - usual, axis=0)
        areas = [row[0] for row in rows]
        print(
            f"| {name} | {area:.4f} | {min(areas):.4f} to {max(areas):.4f} | {more:+.4f} "
            f"| {loss:.4f} | {worse:+.4f} |"
        )


def judged(name: str, seed: int, arguments: Any) -> tuple[float, float]:
    """Return AUC and log loss, at temperature 1, of the validation images of one run."""
    out = arguments.out / f"{name.replace(' ', '_')}_{seed}"
    usual = {"images": {"pixels": arguments.pixels}, "train": {"baselines": False}}
    content = as_any_recipe(arguments.recipe).model_dump()
    recipe = ClassifyRecipe.model_validate(merged(merged(content, usual), VARIANTS[name]))
    if not (out / "model.json").exists():
        volseg.train(
            arguments.out / "data",
            recipe=recipe,
            init=arguments.init,
            out=out,
            seed=seed,
            epochs=arguments.epochs,
            resume=out.exists(),
        )
    table = pd.read_csv(out / "validation.csv", dtype={"target": str})
    positive = table[f"probability_{arguments.positive}"].to_numpy(float)
    probabilities = np.column_stack([1 - positive, positive])
    targets = (table["target"] == arguments.positive).to_numpy(int)
    area, loss = (SCORES[score](probabilities, targets) for score in ("auc", "log_loss"))
    print(f"{name}, seed {seed}: AUC {area:.4f}, log loss {loss:.4f}", flush=True)
    return area or np.nan, loss or np.nan


def merged(content: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings with some of them changed."""
    result = dict(content)
    for key, value in changes.items():
        is_nested = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if is_nested else value
    return result


if __name__ == "__main__":
    main()

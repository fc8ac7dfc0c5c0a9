"""How good is a classifier with few labels: from scratch, pretrained here, or from ImageNet?

    python benchmarks/label_efficiency.py busi_ultrasound --target class --positive malignant
        --recipe pipelines/breast_ultrasound.toml --init WEIGHTS --out FOLDER [--pixels 96]
        [--steps 100] [--folds 0 1 2] [--fractions 0.05 0.1 0.25 0.5 1]

One fold of `cross_validate.py` is for testing; of the others, 5 to 100 % of the patients (or groups
of near duplicates) keep their label, each smaller part within the next larger. Every training has
the same number of steps and the same network: with random weights, after `volseg pretrain` on all
images of the other folds without their labels, and from the weights of --init. Prints the AUC on
the test fold, and draws it to `label_efficiency.png`. A run that was done before is not repeated.
"""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import numpy as np
from ablation import merged
from cross_validate import chosen_cases, fold_scores, folds_of, groups_of_cases, write_cases

import volseg
from volseg.io.image_cases import ImageCase
from volseg.recipe import ClassifyRecipe, as_any_recipe

STARTS = ("random weights", "pretrained here", "ImageNet")
EPOCHS = 8  # of the same number of steps each


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--target", required=True)
    parser.add_argument("--positive", required=True)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--init", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pixels", type=int, default=96)
    parser.add_argument("--steps", type=int, default=104)
    parser.add_argument("--pretraining-epochs", type=int, default=10)
    parser.add_argument("--folds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.05, 0.1, 0.25, 0.5, 1.0])
    parser.set_defaults(where=None)
    arguments = parser.parse_args()
    cases = chosen_cases(arguments)
    groups, folds = groups_of_cases(cases), folds_of(cases, arguments)
    areas = np.array(
        [
            [
                [
                    area(cases, groups, folds == fold, fraction, start, fold, arguments)
                    for fraction in arguments.fractions
                ]
                for start in STARTS
            ]
            for fold in arguments.folds
        ]
    )
    print("| labels | " + " | ".join(STARTS) + " |")
    print("|---|" + "---|" * len(STARTS))
    for place, fraction in enumerate(arguments.fractions):
        cells = [
            f"{column.mean():.3f} ({column.min():.3f} to {column.max():.3f})"
            for column in areas[:, :, place].T
        ]
        print(f"| {fraction:.0%} | " + " | ".join(cells) + " |")
    draw(areas, arguments)


def area(
    cases: list[ImageCase],
    groups: np.ndarray,
    is_test: np.ndarray,
    fraction: float,
    start: str,
    fold: int,
    arguments: Any,
) -> float:
    """Return the AUC of one training on the images of a fold."""
    folder = arguments.out / f"fold_{fold}"
    out = folder / f"{start.replace(' ', '_')}_{fraction:g}"
    write_cases(folder / "test", cases, is_test, arguments.target)
    write_cases(folder / "all", cases, ~is_test, arguments.target)
    labelled = ~is_test & kept(cases, groups, ~is_test, fraction, fold, arguments)
    write_cases(out / "data", cases, labelled, arguments.target)
    recipe = recipe_of(arguments)
    init = None
    if start == "pretrained here":
        init = folder / "pretrained"
        if not (init / "pretrained.json").exists():
            volseg.pretrain(
                folder / "all", recipe=recipe, out=init, epochs=arguments.pretraining_epochs
            )
    elif start == "ImageNet":
        init = arguments.init
    if not (out / "model" / "model.json").exists():
        volseg.train(
            out / "data",
            recipe=recipe,
            init=init,
            out=out / "model",
            seed=fold,
            resume=(out / "model").exists(),
        )
    volseg.infer(folder / "test", model=out / "model", out=out / "results", pages=False)
    table = volseg.read_table(out / "results" / "classes.csv")
    score = fold_scores(cases, is_test, table, arguments)["AUC, pooled"]
    print(f"fold {fold}, {start}, {fraction:.0%}: AUC {score:.4f}", flush=True)
    return score


def kept(
    cases: list[ImageCase],
    groups: np.ndarray,
    usable: np.ndarray,
    fraction: float,
    seed: int,
    arguments: Any,
) -> np.ndarray:
    """Return the images (n,) whose label is kept: of each class the same part of the groups."""
    rng = np.random.default_rng(seed)
    positive = np.array([case.cells[arguments.target] == arguments.positive for case in cases])
    result = np.zeros(len(cases), bool)
    seen = np.zeros(0, groups.dtype)
    for is_of_class in (positive & usable, ~positive & usable):
        names = np.setdiff1d(groups[is_of_class], seen)
        seen = np.union1d(seen, names)
        order = rng.permutation(names)
        result |= np.isin(groups, order[: max(4, round(fraction * len(order)))])
    return result & usable


def recipe_of(arguments: Any) -> ClassifyRecipe:
    content = as_any_recipe(arguments.recipe).model_dump()
    train = {
        "baselines": False,
        "epochs": EPOCHS,
        "steps_per_epoch": max(1, arguments.steps // EPOCHS),
    }
    return ClassifyRecipe.model_validate(
        merged(content, {"images": {"pixels": arguments.pixels}, "train": train})
    )


def draw(areas: np.ndarray, arguments: Any) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.add_subplot()
    percent = [100 * fraction for fraction in arguments.fractions]
    for number, start in enumerate(STARTS):
        lines = areas[:, number]
        axes.plot(percent, lines.mean(axis=0), marker="o", label=start)
        axes.fill_between(percent, lines.min(axis=0), lines.max(axis=0), alpha=0.15)
    axes.set(xscale="log", xlabel="labelled images, %", ylabel="AUC on the test fold")
    axes.set_xticks(percent, [f"{value:g}" for value in percent])
    axes.legend()
    figure.savefig(arguments.out / "label_efficiency.png", dpi=150)


if __name__ == "__main__":
    main()

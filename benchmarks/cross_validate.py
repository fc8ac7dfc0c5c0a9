"""Cross-validate a classifier or regression: every image is judged by a model that never saw it.

    python benchmarks/cross_validate.py busi_ultrasound --target class --positive malignant
        --out FOLDER [--init WEIGHTS] [--recipe RECIPE] [--time-budget 4m] [--seeds 3]
    python benchmarks/cross_validate.py ct_ich_slices --target hemorrhage --positive 1 --out FOLDER
    python benchmarks/cross_validate.py oasis1_midslices --target age --mean-of-patient --out FOLDER

Five folds keep the images of a patient, and near duplicates, together. For each fold `volseg train`
sees the other four, of which it holds out a part itself to choose the epoch, the temperature and
the confidence sets; then `volseg infer` predicts the fold. The scores are of the pooled predictions
of all folds. A fold that was done before is not done again.
"""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import volseg
from volseg.commands.image_splits import fold_of_groups
from volseg.evaluation.calibration import calibration_error
from volseg.evaluation.classes import SCORES
from volseg.evaluation.duplicates import groups_of, print_of
from volseg.io.image_cases import ImageCase, survey_images
from volseg.io.images import ImageReader

FOLDS = 5
FOLD_SEED = 0  # the folds are the same for all seeds and models


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--target", required=True)
    parser.add_argument("--positive", help="class against the rest; without it, a regression")
    parser.add_argument("--where", help="COLUMN=VALUE of the images to use, such as plane=axial")
    parser.add_argument(
        "--mean-of-patient",
        action="store_true",
        help="judge the mean of the numbers predicted from all images of a patient",
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path)
    parser.add_argument("--recipe")
    parser.add_argument("--time-budget")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    cases = chosen_cases(arguments)
    folds = folds_of(cases, arguments)
    scores = [judged(cases, folds, seed, arguments) for seed in arguments.seeds]
    print("| | mean | range over seeds |")
    print("|---|---|---|")
    for name in scores[0]:
        values = [row[name] for row in scores]
        print(f"| {name} | {np.mean(values):.4f} | {min(values):.4f} to {max(values):.4f} |")


def chosen_cases(arguments: Any) -> list[ImageCase]:
    column, _, value = (arguments.where or "").partition("=")
    survey = survey_images(arguments.dataset, target=arguments.target)
    return [
        case
        for case in survey.cases
        if case.cells[arguments.target] and (not column or case.cells[column] == value)
    ]


def groups_of_cases(cases: list[ImageCase]) -> np.ndarray:
    """Return the group (n,) of each image: of one patient, or near duplicates."""
    reader = ImageReader()
    prints = [print_of(reader.read(case.path, case.index).array, 255.0) for case in cases]
    return np.array(groups_of(prints, [case.patient for case in cases]))


def folds_of(cases: list[ImageCase], arguments: Any) -> np.ndarray:
    """Return the fold (n,) of each image."""
    numbers = groups_of_cases(cases)
    groups = {case.id: str(number) for case, number in zip(cases, numbers, strict=True)}
    cells = [case.cells[arguments.target] for case in cases]
    values: Any = {
        case.id: int(cell == arguments.positive) if arguments.positive else float(cell)
        for case, cell in zip(cases, cells, strict=True)
    }
    folds = fold_of_groups(groups, values, FOLDS, FOLD_SEED)
    return np.array([folds[case.id] for case in cases])


def judged(
    cases: list[ImageCase], folds: np.ndarray, seed: int, arguments: Any
) -> dict[str, float]:
    tables = [predicted(cases, folds, fold, seed, arguments) for fold in range(FOLDS)]
    scores = fold_scores(cases, np.ones(len(cases), bool), pd.concat(tables), arguments)
    if arguments.positive:
        areas = [
            fold_scores(cases, folds == fold, tables[fold], arguments)["AUC, pooled"]
            for fold in range(FOLDS)
        ]
        scores["AUC, mean of folds"] = float(np.mean(areas))
    return scores


def fold_scores(
    cases: list[ImageCase], is_in: np.ndarray, table: pd.DataFrame, arguments: Any
) -> dict[str, float]:
    """Return the scores of the predictions of some of the images."""
    cases = [case for case, inside in zip(cases, is_in, strict=True) if inside]
    table = table.set_index("case_id").loc[[case.id for case in cases]]
    truths = np.array([case.cells[arguments.target] for case in cases])
    if not arguments.positive:
        numbers, values = truths.astype(float), table["value"].to_numpy(float)
        inside = (table["value_low"] <= numbers) & (numbers <= table["value_high"])
        if arguments.mean_of_patient:
            patients = [case.patient or case.id for case in cases]
            means = pd.DataFrame({"true": numbers, "value": values}).groupby(patients).mean()
            numbers, values = means["true"].to_numpy(), means["value"].to_numpy()
        errors, variance = values - numbers, float(np.var(numbers))
        return {
            "MAE": float(np.abs(errors).mean()),
            "R²": 1 - float(np.square(errors).mean()) / variance,
            "MAE of the mean": float(np.abs(numbers - numbers.mean()).mean()),
            "coverage of the 90 % intervals": float(inside.mean()),
        }
    positive = table[f"probability_{arguments.positive}"].to_numpy(float)
    probabilities = np.column_stack([1 - positive, positive])
    targets = (truths == arguments.positive).astype(int)
    inside = [truth in names.split("|") for truth, names in zip(truths, table["confidence_set"])]
    return {
        "AUC, pooled": SCORES["auc"](probabilities, targets) or np.nan,
        "ACC": SCORES["accuracy"](probabilities, targets) or np.nan,
        "ECE": calibration_error(probabilities, targets),
        "log loss": SCORES["log_loss"](probabilities, targets) or np.nan,
        "coverage of the 90 % sets": float(np.mean(inside)),
    }


def write_cases(folder: Path, cases: list[ImageCase], is_in: np.ndarray, target: str) -> None:
    """Write a cases.csv of some of the images."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "subject": case.id,
            "image": str(case.path.resolve()),
            "patient": case.patient or case.id,
            target: case.cells[target],
        }
        for case, inside in zip(cases, is_in, strict=True)
        if inside
    ]
    pd.DataFrame(rows).to_csv(folder / "cases.csv", index=False)


def predicted(
    cases: list[ImageCase], folds: np.ndarray, fold: int, seed: int, arguments: Any
) -> pd.DataFrame:
    """Train without a fold, and return the predictions of its images."""
    folder = arguments.out / f"seed_{seed}_fold_{fold}"
    model, results = folder / "model", folder / "results"
    for name, is_in in (("train", folds != fold), ("test", folds == fold)):
        write_cases(folder / name, cases, is_in, arguments.target)
    if not (model / "model.json").exists():
        volseg.train(
            folder / "train",
            recipe=arguments.recipe,
            target=None if arguments.recipe else arguments.target,
            init=arguments.init,
            out=model,
            seed=seed,
            epochs=arguments.epochs,
            time_budget_seconds=arguments.time_budget,
            resume=model.exists(),
        )
    volseg.infer(folder / "test", model=model, out=results, pages=False)
    name = "classes.csv" if arguments.positive else "values.csv"
    return volseg.read_table(results / name)


if __name__ == "__main__":
    main()

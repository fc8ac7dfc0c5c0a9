"""Malignancy of lung nodules from the image, from measurements, and from both (fusion).

    python benchmarks/lidc_fusion.py LIDC_NODULES --out FOLDER

Nodules that radiologists rated 4 or 5 against those rated 1 or 2, in five folds by patient, so that
every nodule is judged by a model that never saw its patient. Each model is trained by `volseg
train` with [fusion] and three folds of its own, whose held-out outputs fit the fusion; its three
networks are averaged. `measurements` is the same logistic regression without the image, fitted on
all nodules of the other folds. `across folds` fuses the image scores of the five models by a
regression that is fitted on the other folds: what the image adds, were the fusion fitted on scores
like those that it is used for. Intervals resample patients. A fold that was done before is not done
again.
"""

from __future__ import annotations

import csv
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np

import volseg
from volseg.commands.image_sources import LesionSource, survey_lesions
from volseg.commands.image_splits import fold_of_groups
from volseg.evaluation.fusion import cross_fused, fit_fusion
from volseg.evaluation.roc import auc
from volseg.image_bundle import load_image_bundle
from volseg.inference.choose import choose_backend
from volseg.inference.image_predictor import load_predictor
from volseg.io.image_cases import ImageCase

FOLDS, RESAMPLED = 5, 2000
LOW, HIGH = (1, 2), (4, 5)
SMALL_MM = (6.0, 12.0)
MEASUREMENTS = (
    *("equiv_sphere_diameter_mm", "max3d_diameter_mm", "long_axis_mm", "short_axis_mm"),
    *("sphericity", "elongation", "flatness"),
    *("intensity_mean", "intensity_sd", "intensity_p10", "intensity_p90", "intensity_skewness"),
)
RECIPE = f"""
task = "classify"
name = "lung_nodule_malignancy"
description = "Tells lung nodules that radiologists suspect of malignancy from those they do not."

[data]
input = "lesion"
target = "malignancy"
kind = "classes"
classes = {{ low = {list(LOW)}, high = {list(HIGH)} }}

[images]
pixels = 40
field_of_view_mm = 40.0
planes = ["axial"]
neighbours = 1

[images.normalise]
method = "window"
low = -1000.0
high = 400.0

[network]
name = "cnn_small"
features = [8, 16, 32]

[train]
batch_size = 32
epochs = 30
patience = 12
baselines = false

[train.augment]
flip_axes = ["horizontal", "vertical"]
mask_jitter_mm = 0.7

[infer]
tta_axes = ["horizontal", "vertical"]

[fusion]
measurements = {list(MEASUREMENTS)}
"""


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    cases, diameters = nodules(arguments.dataset)
    positive = np.array([int(case.cells["malignancy"]) in HIGH for case in cases])
    groups = {case.id: case.patient or case.id for case in cases}
    values = {case.id: int(is_high) for case, is_high in zip(cases, positive, strict=True)}
    fold_of = fold_of_groups(groups, values, FOLDS, seed=0)
    folds = np.array([fold_of[case.id] for case in cases])
    source = LesionSource()
    measured = np.stack([source.measurements(case, MEASUREMENTS) for case in cases])
    scores = {name: np.zeros(len(cases)) for name in ("image", "measurements", "fusion")}
    for fold in range(FOLDS):
        model = trained(cases, folds != fold, fold, arguments.out)
        held = np.flatnonzero(folds == fold)
        image, fused = judged(model, [cases[n] for n in held], measured[held])
        scores["image"][held], scores["fusion"][held] = image, fused
        scores["measurements"][held] = by_measurements(measured, positive, folds != fold)[held]
    image = np.stack([-scores["image"] / 2, scores["image"] / 2], axis=1)
    across = cross_fused(image, measured, positive, folds, l2=1.0)
    scores["across folds"] = across[:, 1] - across[:, 0]
    report(scores, positive, np.array(list(groups.values())), np.array(diameters))


def nodules(dataset: Path) -> tuple[list[ImageCase], list[float]]:
    """Return the largest lesion of each nodule with a rating on either side, and its diameter."""
    lesions, _ = survey_lesions(dataset / "cases.csv", "malignancy", print)
    rated = [
        case
        for case in lesions
        if case.index == 1 and int(case.cells["malignancy"]) in (*LOW, *HIGH)
    ]
    return rated, [float(case.cells["diameter_mm"]) for case in rated]


def trained(cases: list[ImageCase], selected: np.ndarray, fold: int, out: Path) -> Path:
    """Train on the selected nodules, unless that was done before; return the model."""
    model, table, recipe = out / f"model_{fold}", out / f"fold_{fold}.csv", out / "recipe.toml"
    recipe.write_text(RECIPE, encoding="utf-8")
    if (model / "model.json").exists():
        return model
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["subject", "patient", "image", "label", "malignancy"])
        for case, is_chosen in zip(cases, selected, strict=True):
            if is_chosen:
                paths = case.path.resolve(), case.mask.resolve() if case.mask else ""
                writer.writerow([case.where, case.patient, *paths, case.cells["malignancy"]])
    volseg.train(table, recipe=recipe, out=model, folds=3, resume=model.exists())
    return model


def judged(
    model: Path, cases: list[ImageCase], measured: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return (n,) the score of the image, and of image and measurements, both as logits."""
    bundle, source = load_image_bundle(model), LesionSource()
    predictor = load_predictor(bundle, choose_backend("torch", "cpu", "fp32"))
    images = np.stack([source.network_input(case, bundle.recipe.images) for case in cases])
    outputs = predictor.predict(images).outputs
    assert bundle.judgement.fusion is not None
    fused = bundle.judgement.fusion(outputs, measured)
    return outputs[:, 1] - outputs[:, 0], fused[:, 1] - fused[:, 0]


def by_measurements(measured: np.ndarray, positive: np.ndarray, selected: np.ndarray) -> np.ndarray:
    """Return (n,) logits of the regression without an image, fitted on the selected nodules."""
    nothing = np.zeros((len(measured), 2))
    fusion = fit_fusion(
        nothing[selected], measured[selected], positive[selected], MEASUREMENTS, l2=1.0
    )
    fused = fusion(nothing, measured)
    return fused[:, 1] - fused[:, 0]


def report(
    scores: dict[str, np.ndarray],
    positive: np.ndarray,
    patients: np.ndarray,
    diameters: np.ndarray,
) -> None:
    is_small = (diameters >= SMALL_MM[0]) & (diameters <= SMALL_MM[1])
    print(f"| nodules | n (high) | {' | '.join(scores)} | fusion - measurements |")
    print("|---|---|---|---|---|---|---|")
    for name, selected in (("all", np.ones(len(positive), bool)), ("6 to 12 mm", is_small)):
        cells = [f"{selected.sum()} ({positive[selected].sum()})"]
        for kind in scores:
            cells.append(f"{auc(scores[kind][selected], positive[selected]):.3f}")
        low, high, difference = difference_of(scores, positive, patients, selected)
        print(f"| {name} | {' | '.join(cells)} | {difference:+.3f} ({low:+.3f} to {high:+.3f}) |")


def difference_of(
    scores: dict[str, np.ndarray], positive: np.ndarray, patients: np.ndarray, selected: np.ndarray
) -> tuple[float, float, float]:
    """Return the 95 % interval and the value of AUC of fusion less that of measurements."""
    index = np.flatnonzero(selected)
    members: dict[str, list[int]] = {}
    for n in index.tolist():
        members.setdefault(str(patients[n]), []).append(n)
    names, rng = sorted(members), np.random.default_rng(0)

    def difference(rows: np.ndarray) -> float:
        first, second = (auc(scores[k][rows], positive[rows]) for k in ("fusion", "measurements"))
        return first - second

    drawn = []
    for _ in range(RESAMPLED):
        rows = np.concatenate([members[name] for name in rng.choice(names, len(names))])
        drawn.append(difference(rows))
    low, high = np.nanpercentile(drawn, (2.5, 97.5)).tolist()
    return low, high, difference(index)


if __name__ == "__main__":
    main()

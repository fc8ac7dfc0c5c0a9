"""A gate and a filter on real scans: what they skip, what they drop, and what that costs.

    python benchmarks/segmentation_roles.py LGG_MRI_FLAIR --out FOLDER

Trains a small network to segment glioma in FLAIR, on the training patients, and one on each two
thirds of them, which predicts the other third. The lesions predicted so, matched or false, and
those predicted in the validation patients, train the filter (five folds, whose held-out
probabilities choose its threshold); slices with and without tumour train the gate. The test
patients are segmented once each: as it is, with the filter, with the gate, and with both. Beside
the filter stands the usual remedy: lesions below a volume are dropped, the largest volume that
keeps 99 % of the true lesions on which the filter was trained. A step that was done before is not
done again.
"""

from __future__ import annotations

import csv
import json
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

import volseg
from volseg.bundle import load_bundle
from volseg.io.volumes import read_mask, read_volume
from volseg.segmentation import load_model, segment_case

FOLDS = 3
FINAL = FOLDS  # number of the network that is trained on all training patients
SEGMENTATION = """
task = "segment"
name = "glioma_flair"
description = "Segments lower-grade glioma in FLAIR MR volumes of 96² pixels."

[data]
channels = ["flair"]
intensity_unit = "a.u."
labels = { tumour = 1 }

[preprocess]
spacing_mm = [2.0, 2.0, 1.0]
crop = "none"

[preprocess.normalise]
method = "zscore"

[network]
name = "unet3d"
features = [12, 24, 48]
strides = [[1, 1, 1], [2, 2, 1], [2, 2, 2]]

[train]
patch_shape = [48, 48, 8]
batch_size = 2
steps_per_epoch = 25
epochs = 18
patience = 200
learning_rate = 3e-3
foreground_fraction = 0.5
validation_cases = 4

[train.augment]
rotation_degrees = [5, 5, 20]
scaling = [0.85, 1.2]

[infer]
overlap = 0.5
"""
GATE = """
task = "classify"
name = "glioma_gate"
description = "Tells axial FLAIR slices with glioma from those without."

[data]
input = "slice"
target = "label"
kind = "classes"
classes = ["without label", "with label"]

[images]
pixels = 48

[images.normalise]
method = "percentile"

[network]
name = "cnn_small"
features = [8, 16, 32, 32]

[train]
batch_size = 32
epochs = 14
baselines = false
"""
FILTER = """
task = "classify"
name = "glioma_filter"
description = "Tells predicted glioma from false predictions in FLAIR."

[data]
input = "lesion"
target = "status"
kind = "classes"
classes = ["false", "matched"]

[images]
pixels = 40
field_of_view_mm = 64.0

[images.normalise]
method = "percentile"

[network]
name = "cnn_small"
features = [8, 16, 32]

[train]
batch_size = 16
epochs = 30
baselines = false

[train.augment]
mask_jitter_mm = 2.0
"""
SLICES_OF = ("none", "filter", "gate", "gate and filter")


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    work = arguments.out
    work.mkdir(parents=True, exist_ok=True)
    write_tables(arguments.dataset, work)
    for number in (FINAL, *range(FOLDS)):
        trained(work, f"seg{number}", SEGMENTATION, work / f"fold{number}.csv")
        inferred(work, f"held{number}.csv", f"seg{number}", f"res{number}")
    trained(work, "gate", GATE, work / f"fold{FINAL}.csv")
    if not (work / "candidates").exists():
        results = [work / f"res{number}" for number in range(FINAL + 1)]
        report = volseg.candidates(work / f"fold{FINAL}.csv", results, out=work / "candidates")
        print(report.outcome)
    trained(work, "filter", FILTER, with_one_split(work), folds=5)
    for name, roles in {
        "with_filter": {"filter": work / "filter"},
        "with_gate": {"gate": work / "gate"},
        "with_both": {"gate": work / "gate", "filter": work / "filter"},
    }.items():
        if not (work / name).exists():
            print(volseg.attach(work / f"seg{FINAL}", **roles, out=work / name).roles)
    cross_validate(work)
    judge(work)


# ---- training


def write_tables(dataset: Path, work: Path) -> None:
    """Write the tables of each network's training, and of the scans that it is to predict."""
    with (dataset / "cases.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    of = {
        split: [row for row in rows if row["split"] == split] for split in ("train", "val", "test")
    }
    patients = sorted({row["patient"] for row in of["train"]})
    np.random.default_rng(0).shuffle(patients)
    fold = {patient: number % FOLDS for number, patient in enumerate(patients)}
    validation = [(row, "val") for row in of["val"]]
    for number in range(FOLDS):
        inside = [row for row in of["train"] if fold[row["patient"]] != number]
        held = [row for row in of["train"] if fold[row["patient"]] == number]
        write_table(dataset, work / f"fold{number}.csv", [*pairs(inside, "train"), *validation])
        write_table(dataset, work / f"held{number}.csv", pairs(held, ""))
    write_table(dataset, work / f"fold{FINAL}.csv", [*pairs(of["train"], "train"), *validation])
    write_table(dataset, work / f"held{FINAL}.csv", pairs(of["val"], ""))
    write_table(dataset, work / "test.csv", pairs(of["test"], ""))


def pairs(rows: Iterable[dict[str, str]], split: str) -> list[tuple[dict[str, str], str]]:
    return [(row, split) for row in rows]


def write_table(dataset: Path, path: Path, rows: Sequence[tuple[dict[str, str], str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["subject", "patient", "image", "label", "split"])
        for row, split in rows:
            paths = (dataset.resolve() / row[name] for name in ("image", "label"))
            writer.writerow([row["subject"], row["patient"], *paths, split])


def trained(work: Path, name: str, recipe: str, dataset: Path, *, folds: int | None = None) -> None:
    if (work / name / "model.json").exists():
        return
    path = work / f"{name}.toml"
    path.write_text(recipe, encoding="utf-8")
    volseg.train(dataset, recipe=path, out=work / name, folds=folds, resume=(work / name).exists())


def inferred(work: Path, table: str, model: str, results: str) -> None:
    if not (work / results / "report.html").exists():
        volseg.infer(work / table, model=work / model, out=work / results)


def with_one_split(work: Path) -> Path:
    """Return the dataset of candidates without its splits, as folds make their own."""
    table = pd.read_csv(work / "candidates" / "cases.csv", dtype=str)
    path = work / "candidates" / "folds.csv"
    table.drop(columns="split").to_csv(path, index=False)
    return path


# ---- judging


def cross_validate(work: Path) -> None:
    """Print what filter and volume drop of the lesions predicted in training and validation scans.

    The probability of each is of the fold that it was held out of, and the threshold of a fold is
    the one that keeps 99 % of the true lesions of the others.
    """
    table = pd.read_csv(work / "filter" / "validation.csv", keep_default_na=False)
    true, folds = (table["target"] == "matched").to_numpy(), table["fold"].to_numpy()
    masks = work / "candidates" / "labels"
    names = table["case_id"].str.replace("_1$", "", regex=True)
    voxels = [read_mask(masks / f"{name}.nii.gz").array.sum() for name in names]
    scores = {"filter": table["probability_matched"].to_numpy(float), "volume": np.array(voxels)}
    print(f"\n{len(table)} lesions predicted in {table['patient'].nunique()} patients")
    print("| by | true lesions lost | false lesions left |")
    print("|---|---|---|")
    for name, score in scores.items():
        kept = np.zeros(len(table), bool)
        for fold in np.unique(folds):
            others = np.sort(score[true & (folds != fold)])
            kept[folds == fold] = score[folds == fold] >= others[int(0.01 * len(others))]
        lost, left = int((true & ~kept).sum()), int((~true & kept).sum())
        print(
            f"| {name} | {lost} of {true.sum()} ({lost / true.sum():.1%}) | "
            f"{left} of {(~true).sum()} ({left / (~true).sum():.0%}) |"
        )


def judge(work: Path) -> None:
    models = dict(
        zip(SLICES_OF, (f"seg{FINAL}", "with_filter", "with_gate", "with_both"), strict=True)
    )
    print("\n| | true lesions found | false lesions per scan | mean Dice | slices skipped | ")
    print("|---|---|---|---|---|")
    for name, model in models.items():
        results, evaluation = work / f"test_{model}", work / f"evaluation_{model}"
        if not evaluation.exists():
            volseg.infer(work / "test.csv", model=work / model, out=results, pages=False)
            volseg.evaluate(reference=work / "test.csv", predicted=results, out=evaluation)
        print(f"| {name} | {' | '.join(scores(results, evaluation))} |")
    print(f"| smallest volume | {' | '.join(scores_of_volume(work))} |")
    print()
    speed(work)


def scores(results: Path, evaluation: Path, least_ml: float = 0.0) -> list[str]:
    detections = pd.read_csv(evaluation / "detections.csv", keep_default_na=False)
    cases = pd.read_csv(results / "cases.csv")
    predicted = detections[detections["side"] == "predicted"]
    predicted = predicted[predicted["volume_ml"] >= least_ml]
    n_true = int((detections["side"] == "reference").sum())
    n_matched = int((predicted["status"] == "matched").sum())
    false = int((predicted["status"] == "false").sum())
    dice = pd.read_csv(evaluation / "evaluation.csv")["dice"].mean()
    text = [f"{n_matched} of {n_true}", f"{false / len(cases):.2f} ({false} in {len(cases)})"]
    return [*text, "" if least_ml else f"{dice:.3f}", skipped_text(evaluation)]


def scores_of_volume(work: Path) -> list[str]:
    """Return the scores of dropping lesions by volume alone, at the filter's sensitivity."""
    table = pd.read_csv(work / "candidates" / "cases.csv")
    ml = [
        read_mask(work / "candidates" / name).array.sum() / 1000.0 for name in table["label"]
    ]  # voxels of 1 mm³, nominally
    true = np.sort(np.array(ml)[table["status"] == "matched"])
    least = float(true[int(0.01 * len(true))])
    return scores(work / f"test_seg{FINAL}", work / f"evaluation_seg{FINAL}", least_ml=least)


def skipped_text(evaluation: Path) -> str:
    """Return how many slices were skipped, and how many of those with tumour were kept."""
    gate = json.loads((evaluation / "summary.json").read_text(encoding="utf-8")).get("gate")
    if gate is None:
        return ""
    share = f"{gate['skipped']} of {gate['slices']} ({gate['skipped'] / gate['slices']:.0%})"
    kept = f"{gate['with_label_kept']} of {gate['with_label']}"
    return f"{share}, sensitivity {gate['sensitivity']:.3f} ({kept})"


def speed(work: Path) -> None:
    """Print the time of all test scans without and with the gate, in one process, alternating."""
    folders = [work / f"seg{FINAL}", work / "with_gate"]
    models = [load_model(load_bundle(folder), "cpu", folder=folder) for folder in folders]
    with (work / "test.csv").open(newline="", encoding="utf-8") as file:
        scans = [read_volume(Path(row["image"])) for row in csv.DictReader(file)]
    seconds = np.zeros((2, 3))
    tiles = [0, 0]
    for repeat in range(seconds.shape[1]):
        for index, model in enumerate(models):
            started = time.process_time()
            results = [segment_case({"flair": scan}, model, case_id="a") for scan in scans]
            seconds[index, repeat] = time.process_time() - started
            gates = [result.gate for result in results if result.gate is not None]
            tiles = [sum(g.n_tiles_skipped for g in gates), sum(g.n_tiles for g in gates)]
    without, with_gate = np.median(seconds, axis=1)
    print(
        f"{len(scans)} scans: {without:.1f} s of processor time without the gate, "
        f"{with_gate:.1f} s with it ({with_gate / without - 1:+.0%}); "
        f"{tiles[0]} of {tiles[1]} tiles skipped"
    )


if __name__ == "__main__":
    main()

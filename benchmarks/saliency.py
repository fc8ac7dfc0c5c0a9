"""Do the maps of a slice classifier point at the tumour, which may lie anywhere in the slice?

    python benchmarks/saliency.py LGG_MRI_FLAIR --out FOLDER [--time-budget 15m] [--split test]
        [--slices 5] [--checked 10] [--method gradcam,gradients] [--settings]

A network learns from the masks of the training patients whether a FLAIR slice holds tumour (96²
pixels, `--time-budget` of training), unless FOLDER/model is there. Then `volseg explain` maps the
class "with label" in tumour slices of the patients of the split, at most --slices of each at equal
distances. The table has the average precision of the map's pixels (AUPRC) and the pointing game,
with 95 % intervals over patients, beside a Gaussian in the middle of the slice and its intensity,
and the mean SSIM with ever more random layers. Settings of the methods were chosen on the
validation patients: `--split val --settings` prints what other settings give there.
"""

from __future__ import annotations

import csv
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
import torch

import volseg
from volseg.evaluation.roc import auc
from volseg.evaluation.saliency import average_precision, evidence, pointing
from volseg.evaluation.saliency_rows import SaliencyRow
from volseg.image import Image2D
from volseg.image_bundle import load_image_bundle
from volseg.inference.explain import GradCam, IntegratedGradients, Method, Score
from volseg.io.images import ImageReader
from volseg.options.declare import seconds
from volseg.pages.explain_page import score_text
from volseg.preprocessing.images import to_input
from volseg.recipe import ClassifyRecipe

RECIPE = {
    "task": "classify",
    "name": "lgg_slices",
    "description": "Tumour in a FLAIR slice.",
    "data": {"input": "slice", "target": "label"},
    "images": {"pixels": 96},
    "network": {"name": "cnn2d"},
    "train": {"baselines": False},
}
TUMOUR = "with label"
SETTINGS: dict[str, Method] = {
    "Grad-CAM, maps of 6 × 6 pixels": GradCam(only_last=True),
    "Grad-CAM, 12 × 12": GradCam(only_last=True, least_pixels=12),
    "Grad-CAM, 24 × 24": GradCam(only_last=True, least_pixels=24),
    "Grad-CAM, 48 × 48": GradCam(only_last=True, least_pixels=48),
    "Grad-CAM, mean of these": GradCam(),
    "integrated gradients": IntegratedGradients(smoothing=0),
    "integrated gradients, spread by 1/48 of the edge": IntegratedGradients(smoothing=1 / 48),
    "integrated gradients, spread by 1/24": IntegratedGradients(),
}


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--time-budget", default="15m")
    parser.add_argument("--split", default="test")
    parser.add_argument("--slices", type=int, default=5)
    parser.add_argument("--checked", type=int, default=10)
    parser.add_argument("--method")
    parser.add_argument("--settings", action="store_true")
    arguments = parser.parse_args()
    out, split = arguments.out, arguments.split
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "model" / "model.json").exists():
        recipe = ClassifyRecipe.model_validate(RECIPE)
        budget = seconds(arguments.time_budget)
        volseg.train(
            arguments.dataset, recipe=recipe, out=out / "model", time_budget_seconds=budget
        )
    slices = write_tables(arguments.dataset.absolute(), out, split, arguments.slices)
    if arguments.settings:
        print_settings(out, split)
        return
    print_judgement(out, split)
    report = volseg.explain(
        out / f"{split}_tumour.csv",
        model=out / "model",
        out=out / f"{split}_maps",
        class_name=TUMOUR,
        method=arguments.method,
        most=slices,
        checked=arguments.checked,
    )
    print_scores(report)
    print_layers(report)


def write_tables(dataset: Path, out: Path, split: str, most: int) -> int:
    """Write a table of all slices of a split, and one of tumour slices; return how many these are.

    At most `most` tumour slices of a patient are in the second.
    """
    with (dataset / "cases.csv").open(newline="", encoding="utf-8") as file:
        cases = [row for row in csv.DictReader(file) if row["split"] == split]
    lines, tumour = [], []
    for case in cases:
        mask = volseg.read_mask(dataset / case["label"]).canonical().array
        has_tumour = mask.any(axis=(0, 1))
        names = [str(dataset / case[column]) for column in ("image", "label")]
        of_case = [[case["subject"], *names, case["patient"], k] for k in range(len(has_tumour))]
        lines += of_case
        inside = np.flatnonzero(has_tumour)
        n = min(most, len(inside))
        shown = ((np.arange(n) + 0.5) * len(inside) / n).astype(int)  # in the middle of n parts
        tumour += [of_case[k] for k in inside[shown]]
    for name, rows in (("all", lines), ("tumour", tumour)):
        with (out / f"{split}_{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["subject", "image", "label", "patient", "slice"])
            writer.writerows(rows)
    return len(tumour)


def print_settings(out: Path, split: str) -> None:
    """Print the mean scores of Grad-CAM and integrated gradients with several settings."""
    bundle = load_image_bundle(out / "model")
    score = Score(bundle.networks(), bundle.recipe.data, bundle.recipe.data.names.index(TUMOUR))
    with (out / f"{split}_tumour.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    images, masks = ImageReader(), ImageReader()
    pairs = []
    for row in rows:
        image, mask = (
            reader.read(Path(row[name]), int(row["slice"])).array
            for reader, name in ((images, "image"), (masks, "label"))
        )
        pixels = to_input(Image2D(image, 255.0), bundle.recipe.images)
        pairs.append((torch.from_numpy(pixels), mask[0] > 0))
    print(f"| {len(rows)} slices | AUPRC | pointing |\n|---|---|---|")
    for name, method in SETTINGS.items():
        maps = [(method(score, image, 0), mask) for image, mask in pairs]
        auprc = np.mean([average_precision(saliency, mask) for saliency, mask in maps])
        points = np.mean([pointing(evidence(saliency), mask) for saliency, mask in maps])
        print(f"| {name} | {auprc:.3f} | {points:.3f} |", flush=True)


def print_judgement(out: Path, split: str) -> None:
    """Print the AUC of the classifier over all slices of the split."""
    report = volseg.infer(
        out / f"{split}_all.csv", model=out / "model", out=out / f"{split}_classes"
    )
    with (out / f"{split}_all.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    masks = {path: volseg.read_mask(path).canonical().array for path in {r["label"] for r in rows}}
    truth = {
        f"{row['subject']}_s{int(row['slice']):03d}": masks[row["label"]][
            ..., int(row["slice"])
        ].any()
        for row in rows
    }
    frame = report.classes
    positive = np.array([truth[name] for name in frame["case_id"]])
    scores = frame[f"probability_{TUMOUR}"].to_numpy(float)
    patients = len({row["patient"] for row in rows})
    print(f"{split}: {len(frame)} slices of {patients} patients, {positive.sum()} with tumour")
    print(f"AUC of the classifier: {auc(scores, positive):.3f}\n")


def print_scores(report: volseg.commands.RunReport) -> None:
    """Print a row per method and per simple map."""
    frame = report.saliency
    n, patients = int(frame["n"].max()), int(frame["n_patients"].max())
    columns = [(metric, other) for metric in ("auprc", "pointing")
               for other in ("", "centre", "intensity")]  # fmt: skip
    heads = [f"{metric} − {other}" if other else metric for metric, other in columns]
    print(f"| {n} slices, {patients} patients | " + " | ".join(heads) + " | checks |")
    print("|---" * (len(columns) + 2) + "|")
    rows = {(row.method, row.metric, "" if isinstance(row.against, float) else row.against): row
            for row in frame.fillna({"against": ""}).itertuples()}  # fmt: skip
    for method in dict.fromkeys(frame["method"]):
        cells = []
        for metric, other in columns:
            row = rows.get((method, metric, other))
            cells.append("" if row is None else _text(row))
        doubt = report.verdicts.get(method)
        verdict = "" if method not in report.verdicts else doubt or "passed"
        print(f"| {method} | " + " | ".join([*cells, verdict]) + " |")
    print()


def _text(row: object) -> str:
    values = {name: getattr(row, name) for name in ("value", "low", "high")}
    return score_text(SaliencyRow(method="", metric="", **values))


def print_layers(report: volseg.commands.RunReport) -> None:
    """Print the mean SSIM of each method with ever more random layers."""
    frame = report.randomisation
    layers = list(dict.fromkeys(frame["layer"]))
    print("| mean SSIM, random back to | " + " | ".join(layers) + " | other seeds | centre |")
    print("|---" * (len(layers) + 3) + "|")
    maps = report.explained
    for method, rows in frame.groupby("method", sort=False):
        means = rows.groupby("layer")["ssim"].mean()
        of_method = maps[maps["method"] == method]
        cells = [f"{means[layer]:.2f}" for layer in layers]
        cells += [f"{of_method[name].mean():.2f}" for name in ("ssim_seeds", "ssim_centre")]
        print(f"| {method} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()

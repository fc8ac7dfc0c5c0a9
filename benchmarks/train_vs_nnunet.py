"""Train volseg and nnU-Net v2 on the same cases for the same time, and compare their test Dice.

    python benchmarks/train_vs_nnunet.py DATASET RECIPE --peer PEER/bin/python --out FOLDER
        [--time-budget 20m]

DATASET has a cases.csv with a split and one channel. Both train on `train`, choose on `val` and are
evaluated on `test` by the same code. They train one after the other. nnU-Net's planning and
preprocessing are not counted; volseg's time includes everything. nnU-Net uses its own trainer,
network, loss and augmentation. Its polynomial learning rate falls to 0 within the time, and its
pseudo-validation is off, to leave more time for steps. It predicts with its defaults (50 % overlap,
test-time augmentation).
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import volseg
from volseg.recipe import load_recipe

NAME = "Dataset801_benchmark"

PEER = """
import json, os, sys, time
from pathlib import Path
folder, seconds, name = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
for part in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
    os.environ[part] = str(folder / part)
os.environ["nnUNet_n_proc_DA"] = "2"
import numpy as np, torch
from nnunetv2.experiment_planning.plan_and_preprocess_api import (
    extract_fingerprints, plan_experiments, preprocess)
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

def main():
    prepared = folder / "nnUNet_preprocessed" / name
    extract_fingerprints([801], num_processes=2, check_dataset_integrity=True)
    plan_experiments([801])
    preprocess([801], configurations=["3d_fullres"], num_processes=[2])
    (prepared / "splits_final.json").write_text((folder / "splits_final.json").read_text())
    plans = json.loads((prepared / "nnUNetPlans.json").read_text())
    plans["continue_training"] = False  # nnU-Net's own command sets this too
    dataset = json.loads((folder / "nnUNet_raw" / name / "dataset.json").read_text())
    trainer = nnUNetTrainer(plans, "3d_fullres", 0, dataset, torch.device("cpu"))
    trainer.disable_checkpointing = False
    started = time.time()
    trainer.on_train_start()
    steps = 0
    trainer.network.train()
    while time.time() - started < seconds:
        left = 1 - (time.time() - started) / seconds
        for group in trainer.optimizer.param_groups:
            group["lr"] = trainer.initial_lr * left ** 0.9
        trainer.train_step(next(trainer.dataloader_train))
        steps += 1
    spent = time.time() - started
    trainer.save_checkpoint(os.path.join(trainer.output_folder, "checkpoint_final.pth"))
    for loader in (trainer.dataloader_train, trainer.dataloader_val):
        if hasattr(loader, "_finish"):
            loader._finish()
    configuration = plans["configurations"]["3d_fullres"]
    facts = {"steps": steps, "seconds": spent, "patch": configuration["patch_size"],
             "batch": configuration["batch_size"]}
    predictor = nnUNetPredictor(
        device=torch.device("cpu"), perform_everything_on_device=False, verbose=False)
    predictor.initialize_from_trained_model_folder(
        trainer.output_folder_base, (0,), "checkpoint_final.pth")
    predictor.predict_from_files(
        str(folder / "test"), str(folder / "predicted"), num_processes_preprocessing=1,
        num_processes_segmentation_export=1)
    (folder / "facts.json").write_text(json.dumps(facts))

if __name__ == "__main__":
    main()
"""


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("recipe")
    parser.add_argument("--peer", required=True, help="Python of an environment with nnunetv2")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--time-budget", default="20m")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    seconds = float(arguments.time_budget.removesuffix("m")) * 60
    out: Path = arguments.out
    with (arguments.dataset / "cases.csv").open(newline="", encoding="utf-8") as file:
        cases = list(csv.DictReader(file))
    labels = load_recipe(arguments.recipe).data.labels
    peer = make_peer_folder(arguments.dataset, cases, labels, out.resolve() / "nnunet")
    if not (out / "model" / "model.json").exists():
        started = time.monotonic()
        options = {"time_budget_seconds": seconds, "seed": arguments.seed}
        volseg.train(arguments.dataset, recipe=arguments.recipe, out=out / "model", **options)
        print(f"volseg: {time.monotonic() - started:.0f} s for everything")
    volseg.infer(sorted((peer / "scans").iterdir()), model=out / "model", out=out / "results")
    if not (peer / "facts.json").exists():
        (peer / "run.py").write_text(PEER)
        command = [arguments.peer, str(peer / "run.py"), str(peer), str(seconds), NAME]
        with (peer / "log.txt").open("w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    masks = {"volseg": out / "results", "nnU-Net v2": peer / "predicted"}
    reports = {
        name: volseg.evaluate(
            reference=peer / "truth", predicted=predicted, out=predicted.parent / "evaluation"
        )
        for name, predicted in masks.items()
    }
    facts = json.loads((peer / "facts.json").read_text())
    metrics = json.loads((out / "model" / "model.json").read_text())["metrics"]
    names = list(reports["volseg"].summary["labels"])
    headings = " | ".join(f"Dice {name}" for name in names)
    print(f"| {arguments.time_budget} on the same machine | steps | {headings} | mean |")
    print("|---|---|" + "---|" * (len(names) + 1))
    for side, report in reports.items():
        scores = [report.summary["labels"][name]["mean_dice"] for name in names]
        scores.append(report.summary["mean_dice"])
        steps = metrics["steps"] if side == "volseg" else facts["steps"]
        print(f"| {side} | {steps} | " + " | ".join(f"{score:.4f}" for score in scores) + " |")
    step_seconds = facts["seconds"] / facts["steps"]
    print(f"nnU-Net: patch {facts['patch']}, batch {facts['batch']}, {step_seconds:.1f} s per step")


def make_peer_folder(
    dataset: Path, cases: list[dict[str, str]], labels: dict[str, int], folder: Path
) -> Path:
    """Copy the cases to nnU-Net's raw folder and the test cases beside it; write the split."""
    if (folder / "splits_final.json").exists():
        return folder
    raw = folder / "nnUNet_raw" / NAME
    images, masks = raw / "imagesTr", raw / "labelsTr"
    for path in (images, masks, folder / "test", folder / "truth", folder / "scans"):
        path.mkdir(parents=True, exist_ok=True)
    for case in cases:
        name, is_test = case["subject"], case["split"] == "test"
        image, label = dataset / case["image"], dataset / case["label"]
        shutil.copy(image, (folder / "test" if is_test else images) / f"{name}_0000.nii.gz")
        shutil.copy(label, (folder / "truth" if is_test else masks) / f"{name}.nii.gz")
        if is_test:
            shutil.copy(image, folder / "scans" / f"{name}.nii.gz")
    sides = {
        side: [case["subject"] for case in cases if case["split"] == side]
        for side in ("train", "val")
    }
    description = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0} | labels,
        "numTraining": sum(map(len, sides.values())),
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(description))
    (folder / "splits_final.json").write_text(json.dumps([sides]))
    return folder


if __name__ == "__main__":
    main()

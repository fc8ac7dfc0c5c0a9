"""Train volseg and nnU-Net v2 on the same cases for the same time, and compare their test Dice.

    python benchmarks/train_vs_nnunet.py DATASET RECIPE --peer PEER/bin/python --out FOLDER [--time-budget 20m]

DATASET has a cases.csv with a split and one channel. Both train on `train`, choose on `val` and are measured on `test` by the same code. nnU-Net plans and
preprocesses by itself, which is not counted; its own trainer, network, loss and augmentation then run with its polynomial learning rate,
which falls from step to step so that it ends with the time, and without its pseudo-validation, which would take steps away. volseg's time
counts everything. nnU-Net predicts with its defaults (half-overlapping tiles, mirroring). One trains after the other, alone on the machine.
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
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

def main():
    prepared = folder / "nnUNet_preprocessed" / name
    extract_fingerprints([801], num_processes=2, check_dataset_integrity=True)
    plan_experiments([801])
    preprocess([801], configurations=["3d_fullres"], num_processes=[2])
    (prepared / "splits_final.json").write_text((folder / "splits_final.json").read_text())
    plans = json.loads((prepared / "nnUNetPlans.json").read_text())
    plans["continue_training"] = False  # as nnU-Net's own front end says it
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
    facts = {"steps": steps, "seconds": spent, "patch": configuration["patch_size"], "batch": configuration["batch_size"]}
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, verbose=False)
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, (0,), "checkpoint_final.pth")
    predictor.predict_from_files(str(folder / "test"), str(folder / "predicted"), num_processes_preprocessing=1,
                                 num_processes_segmentation_export=1)
    (folder / "facts.json").write_text(json.dumps(facts))

if __name__ == "__main__":
    main()
"""


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("recipe")
    parser.add_argument("--peer", required=True, help="python of an environment with nnunetv2")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--time-budget", default="20m")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    seconds = float(arguments.time_budget.removesuffix("m")) * 60
    out: Path = arguments.out
    with (arguments.dataset / "cases.csv").open(newline="", encoding="utf-8") as file:
        cases = list(csv.DictReader(file))
    peer = peer_folder(
        arguments.dataset,
        cases,
        load_recipe(arguments.recipe).data.labels,
        out.resolve() / "nnunet",
    )
    if not (out / "model" / "model.json").exists():
        started = time.monotonic()
        volseg.train(
            arguments.dataset,
            recipe=arguments.recipe,
            out=out / "model",
            time_budget_seconds=seconds,
            seed=arguments.seed,
        )
        print(f"volseg: {time.monotonic() - started:.0f} s for everything")
    volseg.infer(sorted((peer / "scans").iterdir()), model=out / "model", out=out / "results")
    if not (peer / "facts.json").exists():
        (peer / "run.py").write_text(PEER)
        subprocess.run(
            [arguments.peer, str(peer / "run.py"), str(peer), str(seconds), NAME],
            check=True,
            stdout=(peer / "log.txt").open("w"),
            stderr=subprocess.STDOUT,
        )
    found = {
        "volseg": volseg.evaluate(
            reference=peer / "truth", predicted=out / "results", out=out / "evaluation"
        ),
        "nnU-Net v2": volseg.evaluate(
            reference=peer / "truth", predicted=peer / "predicted", out=peer / "evaluation"
        ),
    }
    facts = json.loads((peer / "facts.json").read_text())
    metrics = json.loads((out / "model" / "model.json").read_text())["metrics"]
    labels = list(found["volseg"].details["labels"])
    print(
        f"| {arguments.time_budget} on the same machine | steps | "
        + " | ".join(f"Dice {name}" for name in labels)
        + " | mean |"
    )
    print("|---|---|" + "---|" * (len(labels) + 1))
    for name, report in found.items():
        scores = [report.details["labels"][label]["mean_dice"] for label in labels]
        steps = metrics["steps"] if name == "volseg" else facts["steps"]
        print(
            f"| {name} | {steps} | "
            + " | ".join(f"{score:.4f}" for score in scores)
            + f" | {report.details['mean_dice']:.4f} |"
        )
    print(
        f"nnU-Net: patch {facts['patch']}, batch {facts['batch']}, {facts['seconds'] / facts['steps']:.1f} s per step"
    )


def peer_folder(
    dataset: Path, cases: list[dict[str, str]], labels: dict[str, int], folder: Path
) -> Path:
    """nnU-Net's raw folder, its split, and the test scans with their truth, all by copying."""
    if (folder / "splits_final.json").exists():
        return folder
    raw = folder / "nnUNet_raw" / NAME
    for part in (
        raw / "imagesTr",
        raw / "labelsTr",
        folder / "test",
        folder / "truth",
        folder / "scans",
    ):
        part.mkdir(parents=True, exist_ok=True)
    for case in cases:
        name, is_test = case["subject"], case["split"] == "test"
        image, label = dataset / case["image"], dataset / case["label"]
        shutil.copy(
            image, (folder / "test" if is_test else raw / "imagesTr") / f"{name}_0000.nii.gz"
        )
        shutil.copy(label, (folder / "truth" if is_test else raw / "labelsTr") / f"{name}.nii.gz")
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

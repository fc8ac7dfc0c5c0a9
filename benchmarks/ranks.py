"""Two processes that share each batch against one process with the doubled batch: their losses, epoch by epoch.

    python benchmarks/ranks.py [--epochs 5]

The phantoms of sample_data/ and the recipe `smoke` in float32, on the CPU, over gloo. A third run is a control: one process with the doubled batch again, but on one
thread, so that sums are rounded otherwise and nothing else differs.
"""

from __future__ import annotations

import csv
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch

import volseg
from volseg.execute.cpu import physical_cores
from volseg.recipe import load_recipe

DATASET = Path(__file__).parent.parent / "sample_data"
TARGET = 1e-4
RUNS = (
    ("one", 1, physical_cores()),
    ("two", 2, physical_cores()),
    ("control", 1, 1),
)  # name, processes, threads


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    arguments = parser.parse_args()
    recipe = load_recipe("smoke")
    small = recipe.train.model_copy(update={"patch_shape": (32, 32, 32), "steps_per_epoch": 20})
    losses = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, devices, threads in RUNS:
            torch.set_num_threads(threads)
            train = small.model_copy(update={"batch_size": 4 // devices})
            volseg.train(
                DATASET,
                recipe=recipe.model_copy(update={"train": train}),
                out=Path(folder) / name,
                epochs=arguments.epochs,
                devices=devices,
                device="cpu",
                precision="fp32",
            )
            with (Path(folder) / name / "history.csv").open(newline="", encoding="utf-8") as file:
                losses[name] = [float(row["loss"]) for row in csv.DictReader(file)]
    print(
        "| epoch | loss, 1 process with batch 4 | 2 processes with batch 2 | difference | control: 1 process, 1 thread | difference |"
    )
    print("|---|---|---|---|---|---|")
    for number, (one, two, control) in enumerate(zip(*losses.values(), strict=True), start=1):
        print(
            f"| {number} | {one:.6f} | {two:.6f} | {abs(one - two):.1e} | {control:.6f} | {abs(one - control):.1e} |"
        )
    sys.exit(
        max(abs(one - two) for one, two in zip(losses["one"], losses["two"], strict=True)) > TARGET
    )


if __name__ == "__main__":
    main()

"""Compare the losses of two processes that share each batch with those of one process.

    python benchmarks/ranks.py [--epochs 5]

Trains on the phantoms of sample_data/ with the recipe `smoke` in float32, on the CPU, over gloo.
The single process has twice the batch size. A third run is a control: the single process again, on
one thread, so that only the rounding of sums differs.
"""

from __future__ import annotations

import csv
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch

import volseg
from volseg.execution.cpu import physical_cores
from volseg.recipe import load_recipe

DATASET = Path(__file__).parent.parent / "sample_data"
TARGET = 1e-4
# name, processes, threads
RUNS = (("one", 1, physical_cores()), ("two", 2, physical_cores()), ("control", 1, 1))


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
            options = {"device": "cpu", "devices": devices, "precision": "fp32"}
            changed = recipe.model_copy(update={"train": train})
            out = Path(folder) / name
            volseg.train(DATASET, recipe=changed, out=out, epochs=arguments.epochs, **options)
            with (out / "history.csv").open(newline="", encoding="utf-8") as file:
                losses[name] = [float(row["loss"]) for row in csv.DictReader(file)]
    print(
        "| epoch | loss, 1 process with batch 4 | 2 processes with batch 2 | difference "
        "| control: 1 process, 1 thread | difference |"
    )
    print("|---|---|---|---|---|---|")
    for epoch, (single, double, control) in enumerate(zip(*losses.values(), strict=True), start=1):
        print(
            f"| {epoch} | {single:.6f} | {double:.6f} | {abs(single - double):.1e} "
            f"| {control:.6f} | {abs(single - control):.1e} |"
        )
    pairs = zip(losses["one"], losses["two"], strict=True)
    sys.exit(max(abs(single - double) for single, double in pairs) > TARGET)


if __name__ == "__main__":
    main()

"""Time a step of the training loop against a bare forward, backward and optimizer step.

    python benchmarks/training_step.py PREPARED [--recipe R] [--steps 40] [--device cpu|cuda]

PREPARED is a folder made by `volseg preprocess`. The bare side repeats one batch from memory. Both
sides alternate, ten steps each.
"""

from __future__ import annotations

import statistics
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch

from volseg.commands.prepared import load_prepared, split_cases
from volseg.execution.cpu import keep_freed_memory
from volseg.training.loop import serve
from volseg.training.ranks import team_of
from volseg.training.run import Job, Run
from volseg.training.schedule import RunSettings
from volseg.training.segmentation import SegmentationObjective

ROUND = 10


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--recipe")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    keep_freed_memory()
    plan, _, cases = load_prepared(arguments.prepared, arguments.recipe)
    training, _ = split_cases(cases, None, 0)
    settings = RunSettings(epochs=10, patience=10)
    objective = SegmentationObjective(training, (), plan.recipe)
    job = Job(objective=objective, settings=settings, checkpoints=Path("none"))
    loop, bare = [], []
    with team_of(torch.device(arguments.device), 1, serve) as team:
        run = Run(job, team, identity="timed")
        run.network.train()
        with run.batches:
            images, masks = run.batches.at(10**6)[0]
            for _ in range(3):
                run.step(0.1)
            for _ in range(max(1, arguments.steps // ROUND)):
                started = time.perf_counter()
                for _ in range(ROUND):
                    run.step(0.1)
                wait(arguments.device)
                loop.append((time.perf_counter() - started) / ROUND)
                started = time.perf_counter()
                for _ in range(ROUND):
                    run.optimizer.zero_grad(set_to_none=True)
                    team.fabric.backward(run.loss(run.network(images), masks))
                    run.optimizer.step()
                wait(arguments.device)
                bare.append((time.perf_counter() - started) / ROUND)
            waiting = run.batches.waited / sum(loop) / ROUND
    print("| a step of | s (median) | ratio | target |")
    print("|---|---|---|---|")
    ratio = statistics.median(loop) / statistics.median(bare)
    print(f"| bare network, loss and optimizer | {statistics.median(bare):.4f} | 1.00 | |")
    print(
        "| the loop, with sampling, augmentation and averaging "
        f"| {statistics.median(loop):.4f} | {ratio:.3f} | ≤ 1.10 |"
    )
    print(f"waiting for patches: {waiting:.1%} of the loop's time")


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

"""Check that `volseg train --time-budget` keeps its budget, for several datasets and budgets.

    python benchmarks/time_budget.py DATASET... --out FOLDER [--budgets 60s 3m 20m]

Trains without a recipe. Prints the wall time of the whole command, its ratio to the budget, the
number of networks, steps per network and mean validation Dice, or why the run was refused; and the
longest time without output. Exit code 1 if a run takes longer than 1.1 × budget + 20 s, is refused
after more than 30 s, or is silent for more than 30 s.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import threading
import time
from argparse import ArgumentParser
from pathlib import Path
from queue import Queue

import numpy as np

UNITS = {"s": 1, "m": 60, "h": 3600}


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("datasets", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budgets", nargs="+", default=["60s", "3m", "20m"])
    arguments = parser.parse_args()
    print(
        "| dataset | budget | wall s | ratio | networks | steps per network | mean Dice "
        "| longest silence s | |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    is_kept = True
    for dataset in arguments.datasets:
        for budget in arguments.budgets:
            is_kept &= check_run(dataset, budget, arguments.out / f"{dataset.stem}_{budget}")
    sys.exit(0 if is_kept else 1)


def check_run(dataset: Path, budget: str, out: Path) -> bool:
    """Print the row of one run and return whether it kept its budget."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "volseg", "train", str(dataset), "--out", str(out)]
    command += ["--time-budget", budget]
    started = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    )
    lines: Queue[tuple[float, str]] = Queue()
    assert process.stdout is not None
    reader = threading.Thread(
        target=lambda: [lines.put((time.monotonic(), line)) for line in process.stdout]
    )
    reader.start()
    code = process.wait()
    wall = time.monotonic() - started
    reader.join()
    output = list(lines.queue)
    silence = float(np.diff([started, *(moment for moment, _ in output), started + wall]).max())
    seconds = float(budget[:-1]) * UNITS[budget[-1]]
    cells = [dataset.stem, budget, f"{wall:.0f}", f"{wall / seconds:.2f}"]
    if code == 0:
        row, is_kept = [*results(out), f"{silence:.0f}", ""], wall <= 1.1 * seconds + 20
    else:
        text = "".join(line for _, line in output if line.startswith("error")).strip()
        row, is_kept = ["", "", "", f"{silence:.0f}", f"refused: {text}"], code == 2 and wall <= 30
    print("| " + " | ".join(cells + row) + " |", flush=True)
    return is_kept and silence <= 30


def results(model: Path) -> list[str]:
    """Return the number of networks, steps of each and mean Dice of a model folder."""
    metrics = json.loads((model / "model.json").read_text(encoding="utf-8"))["metrics"]
    networks = metrics.get("networks", 1)
    dice = []
    if (model / "validation.csv").is_file():
        with (model / "validation.csv").open(newline="", encoding="utf-8") as file:
            dice = [float(row["dice"]) for row in csv.DictReader(file) if row["dice"]]
    mean_dice = f"{np.mean(dice):.3f}" if dice else "not validated"
    return [str(networks), f"{metrics['steps'] / networks:.0f}", mean_dice]


if __name__ == "__main__":
    main()

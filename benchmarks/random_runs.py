"""Run random commands over random user files, end them at random, and check that nothing is lost.

    python benchmarks/random_runs.py --runs 500

Each run is drawn from its number (see tests/random_runs.py), so a fault can be reproduced with
--first N --runs 1. Prints a row per command and every fault.
"""

import sys
import tempfile
import time
from argparse import ArgumentParser
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import conftest
import nnunet_folder
import random_runs


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    started, n_faults = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        template = random_runs.make_world(folder, conftest.write_dataset, nnunet_folder.write_model)
        for seed in range(options.first, options.first + options.runs):
            run, faults, code = random_runs.check_run(seed, template)
            row = counts[run.command]
            row["runs"] += 1
            row["finished"] += code in (0, 3, 4)
            row["refused"] += code == 2
            row["disk full"] += code == 5
            row["ended by a signal"] += code < 0 or code in (130, 143)
            row["with a fault"] += bool(faults)
            n_faults += bool(faults)
            for fault in faults:
                where = f"seed {seed}: {run.command}, {run.place}, {run.end}"
                print(f"{where}, exit {code}: {fault}", flush=True)
    columns = ("runs", "finished", "refused", "disk full", "ended by a signal", "with a fault")
    print("| command | " + " | ".join(columns) + " |")
    print("|---|" + "---:|" * len(columns))
    for command, row in sorted(counts.items()):
        print(f"| {command} | " + " | ".join(str(row[name]) for name in columns) + " |")
    print(f"{options.runs} runs, {n_faults} with a fault, {time.monotonic() - started:.0f} s")
    sys.exit(1 if n_faults else 0)


if __name__ == "__main__":
    main()

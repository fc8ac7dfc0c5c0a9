"""Kill a training run at random, resume it, and compare its weights with an uninterrupted run's.

    python benchmarks/resume.py [--kills 3] [--epochs 6]

Trains on the phantoms of sample_data/ with the recipe `smoke` on the CPU. Each run is ended by
SIGKILL after a random fraction of the time of the uninterrupted run. Weights must be equal bit for
bit.
"""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

DATASET = Path(__file__).parent.parent / "sample_data"


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    arguments = parser.parse_args()
    drawn = random.Random(1)
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder) / "whole", Path(folder) / "broken"
        started = time.monotonic()
        subprocess.run(command(whole, arguments.epochs), check=True, stdout=subprocess.DEVNULL)
        length = time.monotonic() - started
        print(f"unbroken: {length:.0f} s")
        # At most half of the full time, so that each kill hits a running process.
        for number in range(arguments.kills):
            process = subprocess.Popen(command(broken, arguments.epochs), stdout=subprocess.DEVNULL)
            wait = drawn.uniform(0.1, 0.5) * length
            try:
                process.wait(wait)
                print(f"kill {number + 1}: the run had ended before")
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            history = broken / "history.csv"
            epochs = len(history.read_text().splitlines()) - 1 if history.exists() else 0
            done = f"{epochs} of {arguments.epochs} epochs done"
            print(f"kill {number + 1}: after {wait:.0f} s, {done}")
        if not (broken / "model.json").exists():
            subprocess.run(command(broken, arguments.epochs), check=True, stdout=subprocess.DEVNULL)
        digests = [
            hashlib.sha256((model / "segmentation.safetensors").read_bytes()).hexdigest()
            for model in (whole, broken)
        ]
    result = "identical" if digests[0] == digests[1] else "DIFFERENT"
    print(f"weights: {digests[0][:16]} and {digests[1][:16]}: {result}")
    sys.exit(digests[0] != digests[1])


def command(out: Path, epochs: int) -> list[str]:
    options = ["--recipe", "smoke", "--epochs", str(epochs), "--device", "cpu", "--resume"]
    return [sys.executable, "-m", "volseg", "train", str(DATASET), "--out", str(out), *options]


if __name__ == "__main__":
    main()

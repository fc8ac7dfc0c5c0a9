"""Kill a training run at random points, resume it each time, and compare its weights with those of an unbroken run, bit for bit.

    python benchmarks/resume.py [--kills 3] [--epochs 6]

The phantoms of sample_data/ and the recipe `smoke`, on the CPU. Each run is killed by SIGKILL after a time drawn from the length of the unbroken one.
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
        # In the first half of what is left, so that each kill finds the run at work.
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
            print(
                f"kill {number + 1}: after {wait:.0f} s, {epochs} of {arguments.epochs} epochs done"
            )
        if not (broken / "model.json").exists():
            subprocess.run(command(broken, arguments.epochs), check=True, stdout=subprocess.DEVNULL)
        digests = [
            hashlib.sha256((each / "segmentation.safetensors").read_bytes()).hexdigest()
            for each in (whole, broken)
        ]
    print(
        f"weights: {digests[0][:16]} and {digests[1][:16]}: {'identical' if digests[0] == digests[1] else 'DIFFERENT'}"
    )
    sys.exit(digests[0] != digests[1])


def command(out: Path, epochs: int) -> list[str]:
    options = [
        "--recipe",
        "smoke",
        "--out",
        str(out),
        "--epochs",
        str(epochs),
        "--device",
        "cpu",
        "--resume",
    ]
    return [sys.executable, "-m", "volseg", "train", str(DATASET), *options]


if __name__ == "__main__":
    main()

"""Measure what inference costs on top of its network: `volseg infer` against bare forward passes.

    python benchmarks/engine.py SCAN MODEL [MODEL …] [--backend openvino] [--repeats 5]

Without test-time augmentation. For each model: one run in this process, which counts the seconds in
the network; bare forward passes of one patch by the same backend; and `volseg infer` from file to
file in a separate process. Prints the tiles, the seconds in the network, and the wall time of both
runs over tiles × bare forward. "beside the network" is all other work of the first run: preparing,
blending, restoring, labelling, measuring.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import replace
from pathlib import Path

import numpy as np

from volseg.bundle import load_bundle
from volseg.execution.cpu import release_large_blocks
from volseg.inference.backend import Backend
from volseg.io.volumes import read_volume
from volseg.segmentation import load_model, segment_case


class Timed:
    """Backend that counts the seconds spent in it."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.identity = backend.identity
        self.release = backend.release
        self.head = backend.head
        self.seconds = 0.0
        self.runs = 0

    def logits(self, batch: np.ndarray) -> np.ndarray:
        started = time.perf_counter()
        logits = self._backend.logits(batch)
        self.seconds += time.perf_counter() - started
        self.runs += len(batch)
        return logits


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("scan", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--backend", default="openvino")
    parser.add_argument(
        "--repeats", type=int, default=5, help="bare forward passes; their median is used"
    )
    arguments = parser.parse_args()
    release_large_blocks()
    print(
        "| outputs | tiles | tiles × bare forward, s | in the network, s | in process, s | ratio "
        "| `volseg infer`, s | ratio | beside the network ÷ network |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for folder in arguments.models:
        print(measure(arguments.scan, folder, arguments.backend, arguments.repeats), flush=True)


def measure(scan: Path, folder: Path, backend: str, repeats: int) -> str:
    """Return the table row of one model."""
    bundle = load_bundle(folder)
    infer = bundle.recipe.infer.model_copy(update={"tta_axes": ()})
    bundle = replace(bundle, recipe=bundle.recipe.model_copy(update={"infer": infer}))
    model = load_model(bundle, "cpu", backend=backend, folder=folder)
    volume = read_volume(scan)
    timed = Timed(model.segmentation)
    started = time.perf_counter()
    segment_case(
        {bundle.recipe.data.channels[0]: volume}, replace(model, segmentation=timed), case_id="scan"
    )
    wall = time.perf_counter() - started
    shape = (1, 1, *bundle.recipe.patch_shape)
    patch = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    seconds = []
    for _ in range(1 + repeats):
        started = time.perf_counter()
        model.segmentation.logits(patch)
        seconds.append(time.perf_counter() - started)
    bare = timed.runs * float(np.median(seconds[1:]))
    model.segmentation.release()
    with tempfile.TemporaryDirectory() as temporary:
        started = time.perf_counter()
        options = ["--model", str(folder), "--out", f"{temporary}/out", "--backend", backend]
        command = [sys.executable, "-m", "volseg", "infer", str(scan), *options, "--no-tta"]
        subprocess.run(command, check=True, capture_output=True)
        process = time.perf_counter() - started
    return (
        f"| {bundle.recipe.data.n_outputs} | {timed.runs} | {bare:.1f} | {timed.seconds:.1f} "
        f"| {wall:.1f} | {wall / bare:.3f} | {process:.1f} | {process / bare:.3f} "
        f"| {(wall - timed.seconds) / timed.seconds:.3f} |"
    )


if __name__ == "__main__":
    main()

"""Run `volseg measure`, `evaluate` and `infer` on noise: announced and real memory, and time.

    python benchmarks/noise.py [--shapes 256,256,256] [--shares 0.01,0.05,0.2] [--labels 1,117]
        [--commands measure,evaluate] [--infer 25]

In each mask a fraction of the voxels (--shares) is filled at random with random labels; the scan is
int16 noise. `evaluate` compares the mask with a second one of the same kind. `--infer` adds a run
with an untrained model of this many classes at the scan's spacing (0: no such run), on a slightly
smoothed scan. Each run is a separate process; its peak resident memory is the kernel's own record.
Seconds are those of the whole command, also per 100 000 lesions.
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import tempfile
import time
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import nibabel
import numpy as np

SPACING_MM = (0.8, 0.8, 1.5)
HEADING = (
    "| command | voxels | mask | lesions | announced, GB | peak, GB | wall, s | CPU, s "
    "| CPU s per 1e5 lesions | lesions.csv, MB |"
)


def main() -> None:
    numbers = lambda kind: lambda text: [kind(part) for part in text.split(",")]  # noqa: E731
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="256,256,256", help="separated by spaces")
    parser.add_argument("--shares", type=numbers(float), default=[0.01, 0.05, 0.2])
    parser.add_argument("--labels", type=numbers(int), default=[1, 117])
    parser.add_argument("--commands", type=numbers(str), default=["measure", "evaluate"])
    parser.add_argument("--infer", type=int, default=25)
    parser.add_argument("--make", nargs=4, help=SUPPRESS)
    options = parser.parse_args()
    if options.make:
        shape, filled, n_labels, folder = options.make
        make(Path(folder), tuple(map(int, shape.split(","))), float(filled), int(n_labels))
        return
    print(HEADING + "\n" + "|---" * 10 + "|")
    for shape in options.shapes.split():
        for filled, n_labels in product(options.shares, options.labels):
            with DataFolder(shape, filled, n_labels) as folder:
                scan, truth, guess = (f"{folder}/{name}" for name in ("scan.nii", "truth", "guess"))
                inputs = {
                    "measure": ["--image", scan, "--mask", f"{truth}/mask.nii"],
                    "evaluate": ["--reference", truth, "--predicted", guess],
                }
                mask = f"{filled:.0%}, {n_labels} labels"
                for command in options.commands:
                    measure(folder, shape, mask, [command, *inputs[command]])
        if options.infer:
            with DataFolder(shape, 0, options.infer) as folder:
                command = ["infer", f"{folder}/scan.nii", "--model", f"{folder}/model"]
                measure(folder, shape, f"untrained, {options.infer} classes", command)


class DataFolder(tempfile.TemporaryDirectory):
    """Temporary folder with a scan and two masks, or with a scan and a model if `filled` is 0."""

    def __init__(self, shape: str, filled: float, n_labels: int) -> None:
        super().__init__()
        # In a separate process, so that its memory is not counted.
        command = [sys.executable, __file__, "--make", shape, str(filled), str(n_labels), self.name]
        subprocess.run(command, check=True)


def measure(folder: str, shape: str, mask: str, command: list[str]) -> None:
    """Run a command and print its table row."""
    out = Path(folder) / command[0]
    full = [sys.executable, "-m", "volseg", *command, "--out", str(out)]
    started = time.perf_counter()
    with open(f"{folder}/log", "wb") as log:
        child = subprocess.Popen(full, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - started
    text = Path(folder, "log").read_text()
    announced = re.findall(r"at most ([0-9.]+) GB", text)
    cpu = usage.ru_utime + usage.ru_stime
    cells = [command[0], shape.replace(",", " × "), mask]
    costs = [max(announced, key=float, default=""), f"{usage.ru_maxrss / 2**20:.2f}"]
    costs += [f"{wall:.0f}", f"{cpu:.0f}"]
    if child.returncode:
        cells += [text.strip().splitlines()[-1]]
    elif command[0] == "evaluate":
        cells += ["", *costs, "", ""]
    else:
        n = int(next(rows(out / "cases.csv"))["n_lesions"])
        size_mb = (out / "lesions.csv").stat().st_size / 1e6
        cells += [f"{n:,}", *costs, f"{cpu / n * 1e5:.1f}", f"{size_mb:.0f}"]
    print("| " + " | ".join(cells) + " |", flush=True)


def rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        yield from csv.DictReader(file)


def make(folder: Path, shape: tuple[int, ...], filled: float, n_labels: int) -> None:
    """Write what `DataFolder` holds."""
    rng = np.random.default_rng(0)
    affine = np.diag([-SPACING_MM[0], -SPACING_MM[1], SPACING_MM[2], 1])
    scan = np.empty(shape, np.int16, order="F")
    for k in range(shape[2]):
        scan[:, :, k] = rng.normal(30, 100, shape[:2])
    if not filled:
        from scipy.ndimage import gaussian_filter

        smooth = gaussian_filter(scan.astype(np.float32), 1.5) * 8 - 300
        scan = np.asfortranarray(smooth).astype(np.int16, order="F")
    nibabel.save(nibabel.Nifti1Image(scan, affine), folder / "scan.nii")
    if not filled:
        make_model(folder / "model", n_labels)
        return
    for side in ("truth", "guess"):
        mask = np.zeros(shape, np.uint8, order="F")
        for k in range(shape[2]):
            labels = rng.integers(1, n_labels + 1, shape[:2])
            mask[:, :, k] = labels * (rng.random(shape[:2]) < filled)
        (folder / side).mkdir()
        nibabel.save(nibabel.Nifti1Image(mask, affine), folder / side / "mask.nii")


def make_model(folder: Path, n_classes: int) -> None:
    import tomllib

    import torch
    from memory import RECIPE

    from volseg.bundle import ModelBundle, save_bundle
    from volseg.inference.export import export_bundle
    from volseg.networks import build_segmentation, unique_tensors
    from volseg.planning.fingerprint import DatasetFingerprint
    from volseg.recipe import parse_recipe

    torch.manual_seed(0)
    labels = ", ".join(f"class_{n} = {n}" for n in range(1, n_classes))
    text = RECIPE.format(labels=labels, patch=96, spacing=", ".join(map(str, SPACING_MM)))
    recipe = parse_recipe(tomllib.loads(text), where="noise")
    weights = unique_tensors(build_segmentation(recipe))
    fingerprint = DatasetFingerprint(
        n_cases=1, spacings_mm=(), shapes=(), label_voxels={}, foreground={}
    )
    bundle = ModelBundle(recipe=recipe, fingerprint=fingerprint, weights={"segmentation": weights})
    export_bundle(save_bundle(bundle, folder), folder)


if __name__ == "__main__":
    main()

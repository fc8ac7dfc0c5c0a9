"""Masks that are noise, through `volseg measure`, `evaluate` and `infer`: what was announced and what it took.

    python benchmarks/noise.py [--shapes 256,256,256] [--shares 0.01,0.05,0.2] [--labels 1,117] [--commands measure,evaluate] [--infer 25]

Each mask has this share of its voxels filled at random with labels drawn at random; the scan is noise in int16. `evaluate` compares the mask
with another one of the same kind. `--infer` adds a model
of so many classes with random weights at the scan's own spacing (0: none), and smooths the scan a little, as a real one is. Each run is a process of its own; peak is the highest
resident memory that the kernel counted for it. Seconds are of the whole command, per 100 000 lesions beside it.
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
from pathlib import Path

import nibabel
import numpy as np

SPACING_MM = (0.8, 0.8, 1.5)
HEAD = (
    "command",
    "voxels",
    "mask",
    "lesions",
    "announced, GB",
    "peak, GB",
    "wall, s",
    "CPU, s",
    "CPU s per 1e5 lesions",
    "lesions.csv, MB",
)


def main() -> None:
    numbers = lambda kind: lambda text: [kind(part) for part in text.split(",")]  # noqa: E731
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="256,256,256", help="several with a space between")
    parser.add_argument("--shares", type=numbers(float), default=[0.01, 0.05, 0.2])
    parser.add_argument("--labels", type=numbers(int), default=[1, 117])
    parser.add_argument("--commands", type=numbers(str), default=["measure", "evaluate"])
    parser.add_argument("--infer", type=int, default=25)
    parser.add_argument("--make", nargs=4, help=SUPPRESS)
    options = parser.parse_args()
    if options.make:
        shape, share, n_labels, folder = options.make
        make(Path(folder), tuple(map(int, shape.split(","))), float(share), int(n_labels))
        return
    print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|")
    for shape in options.shapes.split():
        for share in options.shares:
            for n_labels in options.labels:
                with temporary(shape, share, n_labels) as folder:
                    pairs = {
                        "measure": [
                            "--image",
                            f"{folder}/scan.nii",
                            "--mask",
                            f"{folder}/truth/mask.nii",
                        ],
                        "evaluate": [
                            "--reference",
                            f"{folder}/truth",
                            "--predicted",
                            f"{folder}/guess",
                        ],
                    }
                    for command in options.commands:
                        measure(
                            folder,
                            shape,
                            f"{share:.0%}, {n_labels} labels",
                            [command, *pairs[command]],
                        )
        if options.infer:
            with temporary(shape, 0, options.infer) as folder:
                command = ["infer", f"{folder}/scan.nii", "--model", f"{folder}/model"]
                measure(folder, shape, f"untrained, {options.infer} classes", command)


class temporary(tempfile.TemporaryDirectory):  # noqa: N801
    """A folder with a scan and its mask, or with a scan and a model where nothing of the mask is filled."""

    def __init__(self, shape: str, share: float, n_labels: int) -> None:
        super().__init__()
        # In a process of its own, whose memory is not the measured one's.
        made = [sys.executable, __file__, "--make", shape, str(share), str(n_labels), self.name]
        subprocess.run(made, check=True)


def measure(folder: str, shape: str, mask: str, command: list[str]) -> None:
    """Run a command and print its line."""
    out = Path(folder) / command[0]
    started = time.perf_counter()
    with open(f"{folder}/log", "wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "volseg", *command, "--out", str(out)],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - started
    text = Path(folder, "log").read_text()
    announced = re.findall(r"at most ([0-9.]+) GB", text)
    cpu = usage.ru_utime + usage.ru_stime
    cells = [command[0], shape.replace(",", " × "), mask]
    taken = [
        max(announced, key=float, default=""),
        f"{usage.ru_maxrss / 2**20:.2f}",
        f"{wall:.0f}",
        f"{cpu:.0f}",
    ]
    if child.returncode:
        cells += [text.strip().splitlines()[-1]]
    elif command[0] == "evaluate":
        cells += ["", *taken, "", ""]
    else:
        n = int(next(rows(out / "cases.csv"))["n_lesions"])
        size = (out / "lesions.csv").stat().st_size / 1e6
        cells += [f"{n:,}", *taken, f"{cpu / n * 1e5:.1f}", f"{size:.0f}"]
    print("| " + " | ".join(cells) + " |", flush=True)


def rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        yield from csv.DictReader(file)


def make(folder: Path, shape: tuple[int, ...], share: float, n_labels: int) -> None:
    rng = np.random.default_rng(0)
    affine = np.diag([-SPACING_MM[0], -SPACING_MM[1], SPACING_MM[2], 1])
    scan = np.empty(shape, np.int16, order="F")
    for k in range(shape[2]):
        scan[:, :, k] = rng.normal(30, 100, shape[:2])
    if not share:
        from scipy.ndimage import gaussian_filter

        scan = np.asfortranarray(gaussian_filter(scan.astype(np.float32), 1.5) * 8 - 300).astype(
            np.int16, order="F"
        )
    nibabel.save(nibabel.Nifti1Image(scan, affine), folder / "scan.nii")
    if not share:
        make_model(folder / "model", n_labels)
        return
    for side in ("truth", "guess"):
        mask = np.zeros(shape, np.uint8, order="F")
        for k in range(shape[2]):
            mask[:, :, k] = rng.integers(1, n_labels + 1, shape[:2]) * (
                rng.random(shape[:2]) < share
            )
        (folder / side).mkdir()
        nibabel.save(nibabel.Nifti1Image(mask, affine), folder / side / "mask.nii")


def make_model(folder: Path, n_classes: int) -> None:
    import tomllib

    import torch
    from memory import RECIPE

    from volseg.bundle import ModelBundle, save_bundle
    from volseg.infer.backends import export_bundle
    from volseg.models import build_segmentation, weights_of
    from volseg.plan import DatasetFingerprint, Plan
    from volseg.recipe import parse_recipe

    torch.manual_seed(0)
    labels = ", ".join(f"class_{n} = {n}" for n in range(1, n_classes))
    recipe = parse_recipe(
        tomllib.loads(
            RECIPE.format(labels=labels, patch=96, spacing=", ".join(map(str, SPACING_MM)))
        ),
        where="noise",
    )
    weights = weights_of(build_segmentation(recipe))
    fingerprint = DatasetFingerprint(
        n_cases=1, spacings_mm=(), shapes=(), label_voxels={}, foreground={}
    )
    windows = {"ct": recipe.preprocess.normalise}
    plan = Plan(spacing_mm=SPACING_MM, patch_shape=(96, 96, 96), batch_size=1, windows=windows)
    bundle = ModelBundle(
        recipe=recipe, plan=plan, fingerprint=fingerprint, weights={"segmentation": weights}
    )
    export_bundle(save_bundle(bundle, folder), folder)


if __name__ == "__main__":
    main()

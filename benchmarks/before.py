"""Compare what volseg costs in this tree with what it cost in another, such as an earlier commit.

    git worktree add ../before COMMIT
    python benchmarks/before.py ../before [--repeats 5] [--only infer,measure]

The trees take turns, each run a fresh process from file to file: `preprocess` of two CTs of
512 × 512 × 150 voxels with masks, `infer` of a part of 64 × 64 × 30 with the model that ships,
`measure` of 200 lesions in the whole. Prints the medians of this tree, and the median of the ratios
to the other tree.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from measure import make_scan

HERE = Path(__file__).resolve().parents[1]
SLICES, LESIONS, PART = 150, 200, (64, 64, 30)
UNITS = {"wall": "s", "cpu": "s", "peak": "MB"}


@dataclass(frozen=True, slots=True)
class Run:
    """Cost of one process: wall and CPU in seconds, peak resident memory in MB."""

    wall: float
    cpu: float
    peak: float


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="tree to compare with")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", help="names of commands, separated by commas")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        commands = make_commands(Path(name))
        names = options.only.split(",") if options.only else list(commands)
        print("| command | wall | ÷ before | CPU | ÷ before | peak memory | ÷ before |")
        print("|---|---|---|---|---|---|---|")
        for command in names:
            pairs = [
                (
                    run_once(HERE, commands[command], Path(name)),
                    run_once(options.before.resolve(), commands[command], Path(name)),
                )
                for _ in range(options.repeats)
            ]
            print(f"| `{command}` | {' | '.join(cells(pairs))} |", flush=True)


def make_commands(folder: Path) -> dict[str, list[str]]:
    """Write the data; return the arguments of each command."""
    one = folder / "one"
    one.mkdir()
    make_scan(one, SLICES, LESIONS)
    mask = nibabel.load(one / "mask.nii")
    is_lesion = (np.asanyarray(mask.dataobj) > 0).astype(np.uint8)
    nibabel.save(nibabel.Nifti1Image(is_lesion, mask.affine), one / "lesions.nii")
    whole = nibabel.load(one / "scan.nii")
    part = np.asanyarray(whole.dataobj)[tuple(map(slice, PART))]
    nibabel.save(nibabel.Nifti1Image(part, whole.affine), one / "part.nii")
    data = folder / "data"
    for kind, source in (("images", "scan.nii"), ("labels", "lesions.nii")):
        (data / kind).mkdir(parents=True)
        for case in ("a", "b"):
            (data / kind / f"{case}.nii").symlink_to(one / source)
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE)
    scan, labels, small = (str(one / f"{name}.nii") for name in ("scan", "mask", "part"))
    return {
        "preprocess": ["preprocess", str(data), "--recipe", str(recipe)],
        "infer": ["infer", small, "--backend", "openvino"],
        "infer-torch": ["infer", small, "--backend", "torch"],
        "measure": ["measure", "--image", scan, "--mask", labels, "--objects", "labels"],
    }


RECIPE = """
name = "before"
description = "Two scans."
[data]
channels = ["ct"]
intensity_unit = "HU"
labels = { lesion = 1 }
[preprocess]
spacing_mm = [1.5, 1.5, 1.5]
normalise = { method = "window", low = -1000.0, high = 1000.0 }
[network]
name = "unet3d"
[train]
patch_shape = [64, 64, 64]
"""


def run_once(tree: Path, command: list[str], folder: Path) -> Run:
    """Run a command of the package in a tree."""
    out, log = folder / "out", folder / "log"
    shutil.rmtree(out, ignore_errors=True)
    arguments = [sys.executable, "-m", "volseg", *command, "--out", str(out)]
    started = time.perf_counter()
    with log.open("wb") as file:
        environment = os.environ | {"PYTHONPATH": str(tree)}
        child = subprocess.Popen(
            arguments, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=folder
        )
        _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - started
    if status:
        raise SystemExit(f"{tree}: {' '.join(command)} failed:\n{log.read_text()[-2000:]}")
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def cells(pairs: list[tuple[Run, Run]]) -> list[str]:
    """Return the median of each cost, and of its ratio to before."""
    texts = []
    for name, unit in UNITS.items():
        values = [(getattr(now, name), getattr(before, name)) for now, before in pairs]
        median = statistics.median(now for now, _ in values)
        ratio = statistics.median(now / before for now, before in values)
        texts += [f"{median:.{1 if unit == 's' else 0}f} {unit}", f"{ratio:.3f}"]
    return texts


if __name__ == "__main__":
    main()

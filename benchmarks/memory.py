"""Measure the peak memory of `volseg infer` against the numbers of slices and classes.

    python benchmarks/memory.py [--slices 100,200,400,800] [--classes 2,25,117]
        [--backend openvino] [--patch 64] [--plane 512] [--lead 100] [--probabilities]

The scans are noisy bodies of 512 × 512 × slices voxels of 0.8 × 0.8 × 1.5 mm. The model is a small
U-Net with random weights at 1.5 mm whose background always wins, so that no lesion is measured.
With --probabilities, `volseg infer --probabilities` runs; with --lead 4 the background has a
probability of about 0.98, so that those of the labels are written in every voxel.
Each run is a separate process. Prints the peak resident memory, the same minus the scan's bytes,
and the peak predicted from the header.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from argparse import SUPPRESS, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from infer_vs_nnunet import make_scan, run

SPACING_MM = (0.8, 0.8, 1.5)
RECIPE = """
name = "memory"
description = "Random weights."
[data]
channels = ["ct"]
intensity_unit = "HU"
labels = {{ {labels} }}
[preprocess]
spacing_mm = [{spacing}]
crop = "none"
[preprocess.normalise]
method = "window"
low = -1000
high = 1000
mean = 0
sd = 300
[network]
name = "unet3d"
features = [16, 32, 64]
strides = [[1, 1, 1], [2, 2, 2], [2, 2, 2]]
[train]
patch_shape = [{patch}, {patch}, {patch}]
[infer]
overlap = 0.25
"""


def make_model(folder: Path, n_classes: int, patch: int, lead: float) -> None:
    """Save a model whose background leads by about `lead` in its logits."""
    from volseg.bundle import ModelBundle, save_bundle
    from volseg.inference.export import export_bundle
    from volseg.networks import build_segmentation, unique_tensors
    from volseg.planning.fingerprint import DatasetFingerprint
    from volseg.recipe import parse_recipe

    labels = ", ".join(f"class_{n} = {n}" for n in range(1, n_classes))
    text = RECIPE.format(labels=labels, patch=patch, spacing="1.5, 1.5, 1.5")
    recipe = parse_recipe(tomllib.loads(text), where="memory")
    network = build_segmentation(recipe)
    weights = unique_tensors(network)
    head = next(name for name in reversed(weights) if weights[name].shape == (n_classes,))
    weights[head][0] += lead
    fingerprint = DatasetFingerprint(
        n_cases=1, spacings_mm=(), shapes=(), label_voxels={}, foreground={}
    )
    bundle = ModelBundle(recipe=recipe, fingerprint=fingerprint, weights={"segmentation": weights})
    export_bundle(save_bundle(bundle, folder), folder)


def main() -> None:
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=numbers, default=[100, 200, 400, 800])
    parser.add_argument("--classes", type=numbers, default=[2, 25, 117])
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--patch", type=int, default=64)
    parser.add_argument("--plane", type=int, default=512)
    parser.add_argument("--lead", type=float, default=100.0)
    parser.add_argument("--probabilities", action="store_true")
    parser.add_argument("--make", nargs=2, help=SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        kind, path = arguments.make
        if kind == "scan":
            plane = arguments.plane
            make_scan(Path(path), (plane, plane, arguments.slices[0]), SPACING_MM)
        else:
            make_model(Path(path), arguments.classes[0], arguments.patch, arguments.lead)
        return
    print("| slices | classes | wall, s | peak, MB | minus the scan, MB | predicted peak, MB |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        slices, classes = arguments.slices, arguments.classes
        rows = [(n, classes[0]) for n in slices] + [(slices[0], n) for n in classes[1:]]
        for n_slices, n_classes in rows:
            measure(folder, n_slices, n_classes, arguments)


def measure(folder: Path, n_slices: int, n_classes: int, arguments: Namespace) -> None:
    scan, model = folder / f"scan_{n_slices}.nii.gz", folder / f"model_{n_classes}"
    common = [f"--slices={n_slices}", f"--classes={n_classes}", f"--patch={arguments.patch}"]
    common += [f"--plane={arguments.plane}", f"--lead={arguments.lead}"]
    for kind, path in (("scan", scan), ("model", model)):
        if not path.exists():  # in a separate process, so that its memory is not counted
            command = [sys.executable, __file__, *common, "--make", kind, str(path)]
            subprocess.run(command, check=True)
    log, out = folder / "log", folder / f"out_{n_slices}_{n_classes}"
    command = [sys.executable, "-m", "volseg", "infer", str(scan), "--model", str(model)]
    more = ["--backend", arguments.backend, *["--probabilities"] * arguments.probabilities]
    cost = run([*command, "--out", str(out), *more], log)
    text = log.read_text()
    if cost.failed:
        raise SystemExit(text)
    announced = re.search(r"at most ([0-9.]+) GB", text)
    predicted = float(announced.group(1)) * 1024 if announced else float("nan")
    scan_mb = arguments.plane**2 * n_slices * 2 / 2**20
    print(
        f"| {n_slices} | {n_classes} | {cost.wall:.1f} | {cost.largest:.0f} "
        f"| {cost.largest - scan_mb:.0f} | {predicted:.0f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()

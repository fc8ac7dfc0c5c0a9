"""Preprocess a 512 × 512 × 300 CT with its mask to 1.5 mm: volseg and nnU-Net's preprocessor.

    python benchmarks/preprocess.py --peer PEER/bin/python

PEER is an environment with nnunetv2 2.8.1. The sides alternate, each in a fresh process, from
.nii.gz files to arrays in memory: image resampled and normalised, mask resampled, foreground voxels
sampled. Wall time excludes imports; memory is the peak of the process.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np

SHAPE, SPACING_MM = (512, 512, 300), (0.8, 0.8, 1.5)
SIDES = ("volseg linear", "volseg cubic", "nnU-Net default", "nnU-Net resample_torch")

VOLSEG = """
import json, resource, sys, time
import numpy as np
from volseg.execution.cpu import keep_freed_memory
keep_freed_memory()
from volseg.io.nifti import read_mask, read_volume
from volseg.preprocessing.prepare import prepare, prepare_mask
from volseg.preprocessing.resample import resample, resampled_shape
from volseg.recipe import Preprocess, Window
from volseg.training.samples import sample_voxels
interpolation, image, mask = sys.argv[1:]
started = time.perf_counter()
scan, reference = read_volume(image), read_mask(mask)
spacing_mm, window = (1.5, 1.5, 1.5), Window(low=-100, high=300, mean=60, sd=60)
settings = Preprocess(spacing_mm=spacing_mm, normalise=window,
                      interpolation=interpolation, body_above=-500.0)
prepared = prepare({"ct": scan}, settings)
labels = prepare_mask(reference.array, prepared.trail)
sample_voxels(labels == 1, np.random.default_rng(0))
wall = time.perf_counter() - started
rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
started = time.perf_counter()
resample(scan.array, resampled_shape(scan.geometry, spacing_mm), interpolation)
print(json.dumps({"wall": wall, "rss": rss, "resample": time.perf_counter() - started,
                  "shape": prepared.array.shape[1:]}))
"""

PEER = """
import json, resource, sys, time
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
kind, image, mask = sys.argv[1:]
function = "resample_data_or_seg_to_shape" if kind == "default" else "resample_torch_fornnunet"
def kwargs(is_seg):
    if kind == "default":
        order = 1 if is_seg else 3
        return {"is_seg": is_seg, "order": order, "order_z": 0, "force_separate_z": None}
    return {"is_seg": is_seg, "force_separate_z": False, "memefficient_seg_resampling": False}
statistics = {"mean": 60.0, "std": 60.0, "percentile_00_5": -100.0, "percentile_99_5": 300.0}
plans = {
    "dataset_name": "Dataset001_bench", "plans_name": "bench", "image_reader_writer": "SimpleITKIO",
    "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2],
    "label_manager": "LabelManager",
    "foreground_intensity_properties_per_channel": {"0": statistics},
    "configurations": {"3d_fullres": {
        "architecture": {"network_class_name": "", "arch_kwargs": {}, "_kw_requires_import": []},
        "spacing": [1.5, 1.5, 1.5], "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False], "resampling_fn_data": function, "resampling_fn_seg": function,
        "resampling_fn_data_kwargs": kwargs(False), "resampling_fn_seg_kwargs": kwargs(True),
    }},
}
manager = PlansManager(plans)
labels = {"background": 0, "organ": 1, "lesion": 2}
dataset = {"labels": labels, "channel_names": {"0": "CT"}, "file_ending": ".nii.gz"}
started = time.perf_counter()
configuration = manager.get_configuration("3d_fullres")
preprocessor = DefaultPreprocessor(verbose=False)
data, seg, _ = preprocessor.run_case([image], mask, manager, configuration, dataset)
wall = time.perf_counter() - started
rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"wall": wall, "rss": rss, "shape": data.shape[1:]}))
"""


def make_scan(folder: Path) -> None:
    """Write `ct.nii.gz`, a noisy body in air with an organ and a lesion, and `mask.nii.gz`."""
    from volseg.io.nifti import write_volume
    from volseg.volume import Geometry, Volume

    rng = np.random.default_rng(0)
    r, a, s = (np.linspace(-1, 1, n, dtype=np.float32) for n in SHAPE)
    r, a = r[:, None, None], a[None, :, None]
    body = (r / 0.75) ** 2 + (a / 0.5) ** 2 + 0 * s
    organ = ((r - 0.25) / 0.3) ** 2 + (a / 0.3) ** 2 + (s / 0.4) ** 2
    lesion = ((r - 0.3) / 0.06) ** 2 + (a / 0.06) ** 2 + (s / 0.08) ** 2
    array = np.where(body < 1, 40, -1000) + np.where(organ < 1, 60, 0)
    array = array + np.where(lesion < 1, -50, 0) + rng.integers(-30, 31, SHAPE)
    geometry = Geometry(SHAPE, np.diag([*SPACING_MM, 1.0]))
    mask = (organ < 1).astype(np.uint8) + (lesion < 1)
    write_volume(Volume(np.asfortranarray(array.astype(np.int16)), geometry), folder / "ct.nii.gz")
    write_volume(Volume(np.asfortranarray(mask.astype(np.uint8)), geometry), folder / "mask.nii.gz")


def run_side(side: str, peer: str | None, paths: tuple[Path, Path]) -> dict:
    tool, kind = side.split(" ")
    python, code = (sys.executable, VOLSEG) if tool == "volseg" else (peer, PEER)
    command = [python, "-c", code, kind, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peer", help="Python of an environment with nnunetv2; without it only volseg runs"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--make-scan", type=Path, help=SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make_scan:
        make_scan(arguments.make_scan)
        return
    sides = [side for side in SIDES if side.startswith("volseg") or arguments.peer]
    with tempfile.TemporaryDirectory() as folder:
        # In a separate process: a child's peak memory on Linux starts from that of its parent.
        subprocess.run([sys.executable, __file__, "--make-scan", folder], check=True)
        paths = Path(folder) / "ct.nii.gz", Path(folder) / "mask.nii.gz"
        runs: dict[str, list[dict]] = {side: [] for side in sides}
        for _ in range(arguments.repeats):
            for side in sides:
                runs[side].append(run_side(side, arguments.peer, paths))
    base = sides[-1 if len(sides) == 2 else 2]
    base_wall, base_rss = (median(runs[base], name) for name in ("wall", "rss"))
    print(
        "| preprocessing, CT and mask, file to arrays | wall, s (median; range) | ratio "
        "| peak RSS, MB | ratio | resampling alone, s |"
    )
    print("|---|---|---|---|---|---|")
    for side in sides:
        walls = [run["wall"] for run in runs[side]]
        wall, rss = median(runs[side], "wall"), median(runs[side], "rss")
        has_resample = "resample" in runs[side][0]
        alone = f"{median(runs[side], 'resample'):.2f}" if has_resample else ""
        shape = " × ".join(map(str, runs[side][0]["shape"]))
        print(
            f"| {side} → {shape} | {wall:.2f} ({min(walls):.2f}–{max(walls):.2f}) "
            f"| {wall / base_wall:.3f} | {rss:.0f} | {rss / base_rss:.2f} | {alone} |"
        )


def median(runs: list[dict], name: str) -> float:
    return statistics.median(run[name] for run in runs)


if __name__ == "__main__":
    main()

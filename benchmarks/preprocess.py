"""Preprocessing a 512 × 512 × 300 int16 CT with its mask to 1.5 mm: volseg beside nnU-Net's DefaultPreprocessor.

    python benchmarks/preprocess.py --peer PEER_ENVIRONMENT/bin/python

The peer's environment holds nnunetv2 2.8.1. Each side runs in a fresh process, in turn, from .nii.gz files to arrays in memory
(image resampled and normalised, mask resampled, foreground voxels sampled); wall time without imports, peak memory of the process.
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
from volseg.execute.cpu import keep_freed_memory
keep_freed_memory()
from volseg.io.nifti import read_mask, read_volume
from volseg.preprocess.normalise import Window
from volseg.preprocess.prepare import PrepareSettings, prepare, prepare_mask
from volseg.preprocess.resample import resample, resampled_shape
from volseg.train.samples import sample_voxels
interpolation, image, mask = sys.argv[1:]
started = time.perf_counter()
scan, reference = read_volume(image), read_mask(mask)
window = Window(low=-100, high=300, mean=60, sd=60)
settings = PrepareSettings(spacing_mm=(1.5, 1.5, 1.5), normalisers=(window,), interpolation=interpolation, body_above=-500.0)
prepared = prepare({"ct": scan}, settings)
labels = prepare_mask(reference.array, prepared.trail)
sample_voxels(labels == 1, np.random.default_rng(0))
wall = time.perf_counter() - started
rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
started = time.perf_counter()
resample(scan.array, resampled_shape(scan.geometry, (1.5, 1.5, 1.5)), interpolation)
print(json.dumps({"wall": wall, "rss": rss, "resample": time.perf_counter() - started, "shape": prepared.array.shape[1:]}))
"""

PEER = """
import json, resource, sys, time
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
kind, image, mask = sys.argv[1:]
function = "resample_data_or_seg_to_shape" if kind == "default" else "resample_torch_fornnunet"
def kwargs(is_seg):
    if kind == "default":
        return {"is_seg": is_seg, "order": 1 if is_seg else 3, "order_z": 0, "force_separate_z": None}
    return {"is_seg": is_seg, "force_separate_z": False, "memefficient_seg_resampling": False}
plans = {
    "dataset_name": "Dataset001_bench", "plans_name": "bench", "image_reader_writer": "SimpleITKIO",
    "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2], "label_manager": "LabelManager",
    "foreground_intensity_properties_per_channel": {"0": {"mean": 60.0, "std": 60.0, "percentile_00_5": -100.0, "percentile_99_5": 300.0}},
    "configurations": {"3d_fullres": {
        "architecture": {"network_class_name": "", "arch_kwargs": {}, "_kw_requires_import": []},
        "spacing": [1.5, 1.5, 1.5], "normalization_schemes": ["CTNormalization"], "use_mask_for_norm": [False],
        "resampling_fn_data": function, "resampling_fn_seg": function,
        "resampling_fn_data_kwargs": kwargs(False), "resampling_fn_seg_kwargs": kwargs(True),
    }},
}
manager = PlansManager(plans)
dataset = {"labels": {"background": 0, "organ": 1, "lesion": 2}, "channel_names": {"0": "CT"}, "file_ending": ".nii.gz"}
started = time.perf_counter()
data, seg, _ = DefaultPreprocessor(verbose=False).run_case([image], mask, manager, manager.get_configuration("3d_fullres"), dataset)
wall = time.perf_counter() - started
rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"wall": wall, "rss": rss, "shape": data.shape[1:]}))
"""


def make_scan(folder: Path) -> None:
    """A body in air with an organ and a lesion, noisy, as `ct.nii.gz`, and the mask of both as `mask.nii.gz`."""
    from volseg.io.nifti import write_volume
    from volseg.volume import Geometry, Volume

    rng = np.random.default_rng(0)
    r, a, s = (np.linspace(-1, 1, n, dtype=np.float32) for n in SHAPE)
    radius = (r[:, None, None] / 0.75) ** 2 + (a[None, :, None] / 0.5) ** 2 + 0 * s
    organ = ((r[:, None, None] - 0.25) / 0.3) ** 2 + (a[None, :, None] / 0.3) ** 2 + (s / 0.4) ** 2
    lesion = (
        ((r[:, None, None] - 0.3) / 0.06) ** 2 + (a[None, :, None] / 0.06) ** 2 + (s / 0.08) ** 2
    )
    array = (
        np.where(radius < 1, 40, -1000) + np.where(organ < 1, 60, 0) + np.where(lesion < 1, -50, 0)
    )
    array = array + rng.integers(-30, 31, SHAPE)
    geometry = Geometry(SHAPE, np.diag([*SPACING_MM, 1.0]))
    mask = (organ < 1).astype(np.uint8) + (lesion < 1)
    write_volume(Volume(np.asfortranarray(array.astype(np.int16)), geometry), folder / "ct.nii.gz")
    write_volume(Volume(np.asfortranarray(mask.astype(np.uint8)), geometry), folder / "mask.nii.gz")


def run_side(side: str, peer: str | None, paths: tuple[Path, Path]) -> dict:
    tool, kind = side.split(" ")
    python, code = (sys.executable, VOLSEG) if tool == "volseg" else (peer, PEER)
    done = subprocess.run(
        [python, "-c", code, kind, *map(str, paths)], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peer", help="python of an environment with nnunetv2; without it volseg alone is run"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--make-scan", type=Path, help=SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make_scan:
        make_scan(arguments.make_scan)
        return
    sides = [side for side in SIDES if side.startswith("volseg") or arguments.peer]
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own: a child's peak memory on Linux starts from that of its parent.
        subprocess.run([sys.executable, __file__, "--make-scan", folder], check=True)
        paths = Path(folder) / "ct.nii.gz", Path(folder) / "mask.nii.gz"
        found: dict[str, list[dict]] = {side: [] for side in sides}
        for _ in range(arguments.repeats):
            for side in sides:
                found[side].append(run_side(side, arguments.peer, paths))
    base = statistics.median(run["wall"] for run in found[sides[-1 if len(sides) == 2 else 2]])
    base_rss = statistics.median(run["rss"] for run in found[sides[-1 if len(sides) == 2 else 2]])
    print(
        "| preprocessing, CT and mask, file to arrays | wall, s (median; range) | ratio | peak RSS, MB | ratio | resampling alone, s |"
    )
    print("|---|---|---|---|---|---|")
    for side, runs in found.items():
        walls = [run["wall"] for run in runs]
        wall, rss = statistics.median(walls), statistics.median(run["rss"] for run in runs)
        alone = (
            f"{statistics.median(run['resample'] for run in runs):.2f}"
            if "resample" in runs[0]
            else ""
        )
        print(
            f"| {side} → {' × '.join(map(str, runs[0]['shape']))} | {wall:.2f} ({min(walls):.2f}–{max(walls):.2f}) | {wall / base:.3f} "
            f"| {rss:.0f} | {rss / base_rss:.2f} | {alone} |"
        )


if __name__ == "__main__":
    main()

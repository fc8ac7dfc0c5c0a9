"""Resample logits to labels on the scan's grid: volseg against nnU-Net's two exports.

    python benchmarks/export.py --peer PEER/bin/python [--classes 2,5,25] [--logits smooth]

Logits of 300 × 273 × 273 voxels of 1.5 mm become labels of 300 × 512 × 512 voxels, without files.
`sharp` logits resemble a trained network's: balls of 7 to 45 mm radius on background, where the
lead of the winning logit reaches 16 within four voxels of the border, plus noise of 1. `smooth`
logits are random and seldom have a clear winner, as if the network had hardly been trained. nnU-Net
runs its resampling function (default or resample_torch) and an argmax; volseg runs `MaskRestorer`
on slabs of 64 planes, which also returns a confidence. Each run is a separate process. Memory is
the peak on top of the logits. It includes the labels and volseg's confidence: 79 MB each if
everything is foreground.
"""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter

LOGITS = """
import json, sys, time
import numpy as np
{before}
import torch
n, logits = int(sys.argv[1]), sys.argv[2]
low = torch.from_numpy(np.random.default_rng(0).normal(0, 3, (n, 12, 11, 11)).astype(np.float32))
def planes(count):
    if logits == "smooth":
        size = (count, 273, 273)
        return torch.nn.functional.interpolate(low[None], size=size, mode="trilinear")[0]
    random = np.random.default_rng(0)
    torch.manual_seed(0)
    axes = [torch.arange(m, dtype=torch.float32) for m in (300, 273, 273)]
    values = torch.randn((n, count, 273, 273))
    values[0] += 8
    for channel in values[1:]:
        squares = [(p - random.uniform(0, len(p))) ** 2 for p in axes]
        distance = (squares[0][:count, None, None] + squares[1][:, None] + squares[2]).sqrt_()
        depth = distance.neg_().add_(random.uniform(5, 30))
        channel += (4 * depth).clamp_(-8, 8)
        values[0] -= (8 * depth).clamp_(0, 16)
    return values
def megabytes(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) / 1024
def begin():
    open("/proc/self/clear_refs", "w").write("5")  # resets VmHWM
    return megabytes("VmRSS"), time.perf_counter()
"""

VOLSEG = (
    LOGITS
    + """
from volseg.preprocessing.prepare import Trail
from volseg.preprocessing.restore import MaskRestorer
from volseg.volume import AxisOrder, BoundingBox, Geometry
geometry = Geometry((512, 512, 300), np.diag([0.8, 0.8, 1.5, 1.0]))
trail = Trail(geometry, AxisOrder.of(geometry), BoundingBox.whole(geometry.shape), (273, 273, 300))
whole = planes(300)
slabs = [whole[:, n : n + 64].permute(0, 2, 3, 1).contiguous() for n in range(0, 300, 64)]
del whole
trim_freed_memory()
before, started = begin()
restorer = MaskRestorer(trail, list(range(1, n)), axis=2)
for slab in slabs:
    restorer.add(slab)
mask, confidence = restorer.result()
print(json.dumps({{"wall": time.perf_counter() - started, "memory": megabytes("VmHWM") - before}}))
"""
)

PEER = (
    LOGITS
    + """
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet
kind = sys.argv[3]
logits = planes(300)
before, started = begin()
grids = (300, 512, 512), (1.5, 1.5, 1.5), (1.5, 0.8, 0.8)
if kind == "default":
    options = {{"order": 1, "order_z": 0, "force_separate_z": None}}
    resampled = resample_data_or_seg_to_shape(logits, *grids, is_seg=False, **options)
else:
    options = {{"force_separate_z": False, "memefficient_seg_resampling": False}}
    resampled = resample_torch_fornnunet(logits, *grids, is_seg=False, **options)
labels = np.argmax(resampled, 0) if isinstance(resampled, np.ndarray) else resampled.argmax(0)
print(json.dumps({{"wall": time.perf_counter() - started, "memory": megabytes("VmHWM") - before}}))
"""
)


BEFORE = """
from volseg.execution.cpu import trim_freed_memory, keep_freed_memory
keep_freed_memory()
"""


def run(python: str, code: str, *arguments: str) -> dict[str, float] | None:
    done = subprocess.run([python, "-c", code, *arguments], capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peer", help="Python of an environment with nnunetv2; without it only volseg runs"
    )
    parser.add_argument("--classes", default="2,5,25")
    parser.add_argument(
        "--default-up-to",
        type=int,
        default=25,
        help="skip nnU-Net's default export for more classes than this",
    )
    parser.add_argument("--logits", default="sharp", choices=["sharp", "smooth"])
    arguments = parser.parse_args()
    kind = arguments.logits
    ours = VOLSEG.format(before=BEFORE)
    peer = PEER.format(before="")
    print("| classes | | wall, s | ratio of volseg to it | memory beyond the logits, MB |")
    print("|---|---|---|---|---|")
    for n in arguments.classes.split(","):
        sides = {"volseg": run(sys.executable, ours, n, kind)}
        if arguments.peer:
            sides["nnU-Net resample_torch"] = run(arguments.peer, peer, n, kind, "torch")
            if int(n) <= arguments.default_up_to:
                sides["nnU-Net default"] = run(arguments.peer, peer, n, kind, "default")
        base = sides["volseg"]
        assert base is not None, "volseg failed"
        for name, side in sides.items():
            text = "failed"
            if side is not None:
                ratio = base["wall"] / side["wall"]
                text = f"{side['wall']:.2f} | {ratio:.3f} | {side['memory']:.0f}"
            print(f"| {n} | {name} | {text} |", flush=True)


if __name__ == "__main__":
    main()

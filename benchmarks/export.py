"""Logits on the network's grid → labels on the scan's: volseg beside nnU-Net's default export and its resample_torch.

    python benchmarks/export.py --peer PEER_ENVIRONMENT/bin/python [--classes 2,5,25] [--logits smooth]

Logits of 300 × 273 × 273 voxels of 1.5 mm become labels of 300 × 512 × 512 voxels. `sharp` logits are like those of a trained network: balls of
7 to 45 mm radius on background, in which one logit is 16 over the others within four voxels of the border, and noise of 1; `smooth` ones are random, seldom with a clear winner, as if the
network had hardly been trained. nnU-Net's side is its resampling function and the largest class, without files; volseg's is `MaskRestorer`, given the same logits in slabs of 64
planes, which also writes a confidence. Each run is a process of its own; memory is the peak beyond what was held before, where the logits are. It includes the labels, and volseg's the confidence too: 79 MB each where they are foreground everywhere.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

LOGITS = """
import json, sys, time
import numpy as np
{before}
import torch
n, logits = int(sys.argv[1]), sys.argv[2]
low = torch.from_numpy(np.random.default_rng(0).normal(0, 3, (n, 12, 11, 11)).astype(np.float32))
def planes(count):
    if logits == "smooth":
        return torch.nn.functional.interpolate(low[None], size=(count, 273, 273), mode="trilinear")[0]
    random = np.random.default_rng(0)
    torch.manual_seed(0)
    places = [torch.arange(m, dtype=torch.float32) for m in (300, 273, 273)]
    found = torch.randn((n, count, 273, 273))
    found[0] += 8
    for one in found[1:]:
        squares = [(p - random.uniform(0, len(p))) ** 2 for p in places]
        distance = (squares[0][:count, None, None] + squares[1][:, None] + squares[2]).sqrt_()
        depth = distance.neg_().add_(random.uniform(5, 30))
        one += (4 * depth).clamp_(-8, 8)
        found[0] -= (8 * depth).clamp_(0, 16)
    return found
def held(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) / 1024
def measured():
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
    return held("VmRSS"), time.perf_counter()
"""

VOLSEG = (
    LOGITS
    + """
from volseg.preprocess.crop import AxisOrder
from volseg.preprocess.prepare import Trail
from volseg.preprocess.restore import MaskRestorer
from volseg.volume import BoundingBox, Geometry
geometry = Geometry((512, 512, 300), np.diag([0.8, 0.8, 1.5, 1.0]))
trail = Trail(geometry, AxisOrder.of(geometry), BoundingBox.whole(geometry.shape), (273, 273, 300))
whole = planes(300)
slabs = [whole[:, start : start + 64].permute(0, 2, 3, 1).contiguous() for start in range(0, 300, 64)]
del whole
give_back_freed_memory()
before, started = measured()
restorer = MaskRestorer(trail, list(range(1, n)), axis=2)
for slab in slabs:
    restorer.add(slab)
mask, confidence = restorer.result()
print(json.dumps({{"wall": time.perf_counter() - started, "memory": held("VmHWM") - before}}))
"""
)

PEER = (
    LOGITS
    + """
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet
kind = sys.argv[3]
logits = planes(300)
before, started = measured()
if kind == "default":
    found = resample_data_or_seg_to_shape(logits, (300, 512, 512), (1.5, 1.5, 1.5), (1.5, 0.8, 0.8), is_seg=False, order=1, order_z=0, force_separate_z=None)
else:
    found = resample_torch_fornnunet(logits, (300, 512, 512), (1.5, 1.5, 1.5), (1.5, 0.8, 0.8), is_seg=False, force_separate_z=False, memefficient_seg_resampling=False)
labels = np.argmax(found, 0) if isinstance(found, np.ndarray) else found.argmax(0)
print(json.dumps({{"wall": time.perf_counter() - started, "memory": held("VmHWM") - before}}))
"""
)


BEFORE = """
from volseg.execute.cpu import give_back_freed_memory, keep_freed_memory
keep_freed_memory()
"""


def run(python: str, code: str, *arguments: str) -> dict[str, float] | None:
    done = subprocess.run([python, "-c", code, *arguments], capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--peer", help="python of an environment with nnunetv2; without it volseg alone is run"
    )
    parser.add_argument("--classes", default="2,5,25")
    parser.add_argument(
        "--default-up-to",
        type=int,
        default=25,
        help="more classes are not given to nnU-Net's default export",
    )
    parser.add_argument("--logits", default="sharp", choices=["sharp", "smooth"])
    arguments = parser.parse_args()
    kind = arguments.logits
    own = VOLSEG.format(before=BEFORE)
    peer = PEER.format(before="")
    print("| classes | | wall, s | ratio of volseg to it | memory beyond the logits, MB |")
    print("|---|---|---|---|---|")
    for n in arguments.classes.split(","):
        found = {"volseg": run(sys.executable, own, n, kind)}
        if arguments.peer:
            found["nnU-Net resample_torch"] = run(arguments.peer, peer, n, kind, "torch")
            if int(n) <= arguments.default_up_to:
                found["nnU-Net default"] = run(arguments.peer, peer, n, kind, "default")
        ours = found["volseg"]
        assert ours is not None, "volseg failed"
        for name, one in found.items():
            text = (
                "failed"
                if one is None
                else f"{one['wall']:.2f} | {ours['wall'] / one['wall']:.3f} | {one['memory']:.0f}"
            )
            print(f"| {n} | {name} | {text} |", flush=True)


if __name__ == "__main__":
    main()

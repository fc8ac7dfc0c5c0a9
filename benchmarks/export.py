"""Logits on the network's grid → labels on the scan's: volseg beside nnU-Net's default export and its resample_torch.

    python benchmarks/export.py --peer PEER_ENVIRONMENT/bin/python [--classes 2,5,25]

Smooth random logits of 300 × 273 × 273 voxels of 1.5 mm become labels of 300 × 512 × 512 voxels. nnU-Net's side is its resampling function and
the largest class, without files; volseg's is `MaskRestorer`, given slabs of 64 planes, which also writes a confidence. Each run is a process of its own;
memory is the peak beyond the logits' own bytes, of which volseg is given no more than a slab.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

LOGITS = """
import json, resource, sys, time
import numpy as np
{before}
import torch
n = int(sys.argv[1])
low = torch.from_numpy(np.random.default_rng(0).normal(0, 3, (n, 12, 11, 11)).astype(np.float32))
def planes(count):
    return torch.nn.functional.interpolate(low[None], size=(count, 273, 273), mode="trilinear")[0]
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
"""

VOLSEG = (
    LOGITS
    + """
from volseg.preprocess.crop import AxisOrder
from volseg.preprocess.prepare import MaskRestorer, Trail
from volseg.volume import BoundingBox, Geometry
geometry = Geometry((512, 512, 300), np.diag([0.8, 0.8, 1.5, 1.0]))
trail = Trail(geometry, AxisOrder.of(geometry), BoundingBox.whole(geometry.shape), (273, 273, 300))
slab = np.ascontiguousarray(planes(64).numpy().transpose(0, 2, 3, 1))
before, started = peak(), time.perf_counter()
restorer = MaskRestorer(trail, list(range(1, n)), axis=2)
for start in range(0, 300, 64):
    restorer.add(slab[..., : min(64, 300 - start)])
mask, confidence = restorer.result()
print(json.dumps({{"wall": time.perf_counter() - started, "memory": peak() - before}}))
"""
)

PEER = (
    LOGITS
    + """
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet
kind = sys.argv[2]
logits = planes(300)
before, started = peak(), time.perf_counter()
if kind == "default":
    found = resample_data_or_seg_to_shape(logits, (300, 512, 512), (1.5, 1.5, 1.5), (1.5, 0.8, 0.8), is_seg=False, order=1, order_z=0, force_separate_z=None)
else:
    found = resample_torch_fornnunet(logits, (300, 512, 512), (1.5, 1.5, 1.5), (1.5, 0.8, 0.8), is_seg=False, force_separate_z=False, memefficient_seg_resampling=False)
labels = np.argmax(found, 0) if isinstance(found, np.ndarray) else found.argmax(0)
print(json.dumps({{"wall": time.perf_counter() - started, "memory": peak() - before}}))
"""
)


def run(python: str, code: str, *arguments: str) -> dict[str, float] | None:
    done = subprocess.run([python, "-c", code, *arguments], capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="python of an environment with nnunetv2; without it volseg alone is run")
    parser.add_argument("--classes", default="2,5,25")
    parser.add_argument(
        "--default-up-to", type=int, default=5, help="more classes are not given to nnU-Net's default export"
    )
    arguments = parser.parse_args()
    own = VOLSEG.format(before="from volseg.execute.cpu import keep_freed_memory\nkeep_freed_memory()")
    peer = PEER.format(before="")
    print("| classes | | wall, s | ratio of volseg to it | memory beyond the logits, MB |")
    print("|---|---|---|---|---|")
    for n in arguments.classes.split(","):
        found = {"volseg": run(sys.executable, own, n)}
        if arguments.peer:
            found["nnU-Net resample_torch"] = run(arguments.peer, peer, n, "torch")
            if int(n) <= arguments.default_up_to:
                found["nnU-Net default"] = run(arguments.peer, peer, n, "default")
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

"""Time the augmentation of one sample on one core: volseg, batchgeneratorsv2 and MONAI.

    python benchmarks/augmentation.py --peer PEER/bin/python [--patch 96] [--samples 40]

PEER is an environment with nnunetv2, which installs batchgeneratorsv2. Each side cuts samples of
the same patch shape from an enlarged patch in memory and applies rotation and scaling, noise, blur,
brightness, contrast, simulated low resolution, gamma and flips, each with nnU-Net's default
probability. Prints seconds per sample, the median of three alternating rounds.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter

PROBABILITIES = {
    "spatial": 0.2,
    "noise": 0.1,
    "blur": 0.2,
    "brightness": 0.15,
    "contrast": 0.15,
    "low_resolution": 0.25,
    "gamma": 0.3,
}

VOLSEG = """
import sys, time
import torch
torch.set_num_threads(1)
from volseg.recipe import Augment
from volseg.training.augment import augment, enlarged_shape
patch, samples = int(sys.argv[1]), int(sys.argv[2])
probabilities = {f"{name}_probability": value for name, value in %r.items()}
settings = Augment(rotation_degrees=(30, 30, 30), scaling=(0.7, 1.4), **probabilities)
shape = (patch,) * 3
source = enlarged_shape(shape, settings)
image, mask = torch.randn(1, 1, *source), torch.randint(0, 3, (1, *source), dtype=torch.uint8)
started = time.perf_counter()
options = {"patch_shape": shape, "spacing_mm": (1.0, 1.0, 1.0)}
for index in range(samples):
    augment(image, mask, settings, **options, seeds=[(0, index)])
print((time.perf_counter() - started) / samples)
"""

MONAI = """
import sys, time, math
import numpy as np, torch
torch.set_num_threads(1)
from monai.transforms import (Compose, RandAdjustContrastd, RandAffined, RandFlipd,
                              RandGaussianNoised, RandGaussianSmoothd, RandScaleIntensityd,
                              RandSimulateLowResolutiond)
patch, samples = int(sys.argv[1]), int(sys.argv[2])
p = %r
source = (patch + 2 * math.ceil(patch / 8),) * 3
both, angle, sigma = ["image", "mask"], math.radians(30), (0.5, 1)
transform = Compose([
    RandAffined(both, prob=p["spatial"], spatial_size=(patch,) * 3, rotate_range=(angle,) * 3,
                scale_range=((-0.3, 0.4),) * 3, mode=("bilinear", "nearest"), padding_mode="zeros"),
    RandGaussianNoised("image", prob=p["noise"], std=0.1),
    RandGaussianSmoothd("image", prob=p["blur"], sigma_x=sigma, sigma_y=sigma, sigma_z=sigma),
    RandScaleIntensityd("image", factors=0.25, prob=p["brightness"]),
    RandAdjustContrastd("image", prob=p["contrast"], gamma=(0.75, 1.25)),
    RandSimulateLowResolutiond("image", prob=p["low_resolution"], zoom_range=(0.5, 1.0)),
    RandAdjustContrastd("image", prob=p["gamma"], gamma=(0.7, 1.5)),
    *[RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in range(3)],
]).set_random_state(0)
image, mask = torch.randn(1, *source), torch.randint(0, 3, (1, *source)).float()
started = time.perf_counter()
for _ in range(samples):
    transform({"image": image, "mask": mask})
print((time.perf_counter() - started) / samples)
"""

PEER = """
import sys, time, math
import numpy as np, torch
torch.set_num_threads(1)
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
patch, samples = int(sys.argv[1]), int(sys.argv[2])
angles = (-math.pi / 6, math.pi / 6)
transform = nnUNetTrainer.get_training_transforms((patch,) * 3, angles, None, (0, 1, 2), False)
source = (patch + 2 * math.ceil(patch / 8),) * 3
image, mask = torch.randn(1, *source), torch.randint(0, 3, (1, *source), dtype=torch.int16)
torch.manual_seed(0); np.random.seed(0)
started = time.perf_counter()
for _ in range(samples):
    transform(image=image.clone(), segmentation=mask.clone())
print((time.perf_counter() - started) / samples)
"""


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="python of an environment with nnunetv2")
    parser.add_argument("--patch", type=int, default=96)
    parser.add_argument("--samples", type=int, default=40)
    arguments = parser.parse_args()
    sides = {
        "volseg": (sys.executable, VOLSEG % (PROBABILITIES,)),
        "batchgeneratorsv2 (nnU-Net's default)": (arguments.peer, PEER),
        "MONAI dictionary transforms": (sys.executable, MONAI % (PROBABILITIES,)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(3):
        for name, (python, code) in sides.items():
            command = [python, "-c", code, str(arguments.patch), str(arguments.samples)]
            printed = subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True)
            seconds[name].append(float(printed.split()[-1]))
    base = statistics.median(seconds["volseg"])
    print(f"| one sample of {arguments.patch}³ | s | × volseg |")
    print("|---|---|---|")
    for name, rounds in seconds.items():
        median = statistics.median(rounds)
        print(f"| {name} | {median:.4f} | {median / base:.2f} |")


if __name__ == "__main__":
    main()

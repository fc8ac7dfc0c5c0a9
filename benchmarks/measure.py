"""Time all measures of 200 lesions in a 512 × 512 × 300 CT: volseg, pyradiomics and SimpleITK.

    python benchmarks/measure.py --peer PEER/bin/python [--slices 300] [--lesions 200]
        [--peer-lesions 8]

PEER is an environment with pyradiomics 3.0.1 and SimpleITK. Each side is a separate process that
reads the same uncompressed files. Wall time excludes imports; memory is the peak on top of what the
process holds after them. pyradiomics works lesion by lesion: its time is extrapolated from the
first few lesions.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import nibabel
import numpy as np

COMMON = """
import json, resource, sys, time
folder, n_lesions = sys.argv[1], int(sys.argv[2])
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
"""

VOLSEG = (
    COMMON
    + """
from volseg.io.volumes import read_mask, read_volume
from volseg.measurement.lesions import measure_lesions
from volseg.measurement.scan import SegmentedScan
from volseg.measurement.shape import _cubes
from volseg.measurement.units import Unit
from volseg.postprocessing.lesions import label_lesions
import scipy.spatial, skimage.measure
before, started = peak(), time.perf_counter()
scan, mask = read_volume(folder + "/scan.nii"), read_mask(folder + "/mask.nii")
lesions = label_lesions(mask.array, scan.geometry, objects="labels")
options = {"case_id": "scan", "label_names": {}, "unit": Unit(name="HU")}
measured = measure_lesions(SegmentedScan(image=scan, lesions=lesions, **options))
rows = [[r.label, r.volume_mm3, r.intensity_mean, r.surface_area_mm2, r.max3d_diameter_mm]
        for r in measured]
print(json.dumps({"seconds": time.perf_counter() - started, "mb": peak() - before, "rows": rows}))
"""
)

PYRADIOMICS = (
    COMMON
    + """
import logging
import SimpleITK as sitk
from radiomics import featureextractor
logging.getLogger("radiomics").setLevel(logging.ERROR)
before, started = peak(), time.perf_counter()
scan, mask = sitk.ReadImage(folder + "/scan.nii"), sitk.ReadImage(folder + "/mask.nii")
extractor = featureextractor.RadiomicsFeatureExtractor(additionalInfo=False)
extractor.disableAllFeatures()
extractor.enableFeatureClassByName("shape")
extractor.enableFeatureClassByName("firstorder")
read, rows = time.perf_counter() - started, []
names = "shape_VoxelVolume", "firstorder_Mean", "shape_SurfaceArea", "shape_Maximum3DDiameter"
started = time.perf_counter()
for label in range(1, n_lesions + 1):
    features = extractor.execute(scan, mask, label=label)
    rows.append([label, *(float(features["original_" + name]) for name in names)])
seconds = time.perf_counter() - started
print(json.dumps({"read": read, "seconds": seconds, "mb": peak() - before, "rows": rows}))
"""
)

SIMPLEITK = (
    COMMON
    + """
import SimpleITK as sitk
before, started = peak(), time.perf_counter()
scan, mask = sitk.ReadImage(folder + "/scan.nii"), sitk.ReadImage(folder + "/mask.nii")
shape = sitk.LabelShapeStatisticsImageFilter()
shape.ComputeFeretDiameterOn()
shape.ComputePerimeterOn()
shape.Execute(mask)
intensity = sitk.LabelIntensityStatisticsImageFilter()
intensity.Execute(mask, scan)
getters = (shape.GetPhysicalSize, intensity.GetMean, shape.GetPerimeter, shape.GetFeretDiameter)
rows = [[n, *(get(n) for get in getters)] for n in shape.GetLabels()]
print(json.dumps({"seconds": time.perf_counter() - started, "mb": peak() - before, "rows": rows}))
"""
)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="Python with pyradiomics and SimpleITK")
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--lesions", type=int, default=200)
    parser.add_argument(
        "--peer-lesions", type=int, default=8, help="number of them that pyradiomics measures"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_scan(Path(folder), options.slices, options.lesions)
        sides = {
            "volseg": run(sys.executable, VOLSEG, folder, options.lesions),
            "pyradiomics": run(options.peer, PYRADIOMICS, folder, options.peer_lesions),
            "SimpleITK": run(options.peer, SIMPLEITK, folder, options.lesions),
        }
    peer = sides["pyradiomics"]
    peer["seconds"] = peer["read"] + peer["seconds"] / options.peer_lesions * options.lesions
    ours = sides["volseg"]
    print("| | wall | × volseg | memory | volseg ÷ it | volume | mean | area | max. diameter |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, side in sides.items():
        ratio, memory_ratio = side["seconds"] / ours["seconds"], ours["mb"] / side["mb"]
        print(
            f"| {name} | {side['seconds']:.1f} s | {ratio:.1f} | {side['mb']:.0f} MB "
            f"| {memory_ratio:.2f} | {' | '.join(differences(ours['rows'], side['rows']))} |"
        )


def run(python: str, script: str, folder: str, n_lesions: int) -> dict:
    command = [python, "-c", script, folder, str(n_lesions)]
    return json.loads(subprocess.check_output(command, text=True).splitlines()[-1])


def differences(ours: list[list[float]], theirs: list[list[float]]) -> list[str]:
    """Return the largest relative difference of each measure over the lesions that both have."""
    by_label = {row[0]: row[1:] for row in ours}
    pairs = np.array([(by_label[row[0]], row[1:]) for row in theirs])
    return [f"{value:.1e}" for value in np.abs(pairs[:, 0] / pairs[:, 1] - 1).max(axis=0)]


def make_scan(folder: Path, n_slices: int, n_lesions: int) -> None:
    """Write noisy soft tissue with bumpy ellipsoids (semi-axes 4 to 15 mm), and their mask."""
    rng = np.random.default_rng(0)
    shape, spacing = (512, 512, n_slices), np.array([0.8, 0.8, 1.5])
    mask = np.zeros(shape, np.uint16, order="F")
    scan = np.empty(shape, np.int16, order="F")
    for k in range(n_slices):
        scan[:, :, k] = rng.normal(30, 15, shape[:2])
    cells = [(i, j, k) for i in range(9) for j in range(9) for k in range(max(1, n_slices // 43))]
    for label, cell in enumerate(rng.permutation(cells)[:n_lesions], start=1):
        half_mm = rng.uniform(4, 15, 3)
        centre = (np.array(cell) + 0.5) * [56, 56, 43]
        reach = np.ceil(half_mm * 1.2 / spacing).astype(int)
        low, high = (centre - reach).astype(int), (centre + reach).astype(int) + 1
        low, high = np.maximum(low, 0), np.minimum(high, shape)
        axes = [np.arange(a, b) for a, b in zip(low, high, strict=True)]
        mm = [
            (axis - c) * s / h for axis, c, s, h in zip(axes, centre, spacing, half_mm, strict=True)
        ]
        x, y, z = np.meshgrid(*mm, indexing="ij")
        bumps = 1 + 0.12 * np.sin(5 * x + label) * np.cos(4 * y) * np.cos(3 * z)
        inside = x**2 + y**2 + z**2 <= bumps
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        mask[box][inside] = label
        scan[box][inside] += np.int16(rng.integers(20, 200))
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1])
    for name, array in (("scan", scan), ("mask", mask)):
        nibabel.save(nibabel.Nifti1Image(array, affine), folder / f"{name}.nii")


if __name__ == "__main__":
    main()

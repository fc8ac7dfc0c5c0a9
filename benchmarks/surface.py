"""Compare surface metrics of two masks: volseg, MONAI, scipy and DeepMind's surface-distance.

    python benchmarks/surface.py [--edge 256] [--rounds 2] [--peer PEER/bin/python]

First table: HD95 and normalised surface Dice (NSD) at 1 and 2 mm, of a seeded blobby organ in 256³
voxels of 1 mm against a perturbed copy (`near`) and against that copy shifted by 12 voxels (`far`).
MONAI's HausdorffDistanceMetric and SurfaceDiceMetric compute the distances again for each metric
and tolerance. `scipy` is the code one writes by hand: binary_erosion, then distance_transform_edt
of the whole array or of the box around both masks. Every run is a separate process and the sides
alternate. Wall is the best round; memory is the peak on top of the two boolean masks (MONAI:
tensors).

Second table: the same values by surface-distance (`surface-distance-based-measures`, Nikolov et
al., J Med Internet Res 23:e26151, 2021) in the environment PEER. There the surface consists of
elements weighted by area.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import warnings
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

SIDES = ("volseg", "MONAI", "scipy, in the box", "scipy, whole array")
TOLERANCES_MM = (1.0, 2.0)


def organ(edge: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a blobby organ, a perturbed copy and that copy shifted: (edge, edge, edge) bool."""
    from scipy.ndimage import gaussian_filter, zoom

    random = np.random.default_rng(0)
    centred = np.arange(edge, dtype=np.float32) - edge / 2
    distance = np.sqrt(sum(centred[index] ** 2 for index in _open_axes()))
    bumps = []
    for width in (3, 2):
        coarse = gaussian_filter(random.normal(size=(edge // 4,) * 3), width)
        bumps.append(zoom(coarse / coarse.std(), 4, order=1).astype(np.float32))
    reference = distance + edge / 32 * bumps[0] < edge * 0.31
    predicted = distance + edge / 32 * bumps[0] + edge / 100 * bumps[1] < edge * 0.31
    return reference, predicted, np.roll(predicted, 12, axis=0)


def _open_axes() -> list[tuple]:
    return [tuple(slice(None) if n == axis else None for n in range(3)) for axis in range(3)]


def by_volseg(reference: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    from volseg.evaluation.surface import surface_distances
    from volseg.volume import Geometry

    distances = surface_distances(reference, predicted, Geometry(reference.shape, np.eye(4)))[1]
    return {"hd95": distances.hd95_mm} | {f"nsd{t:g}": distances.nsd(t) for t in TOLERANCES_MM}


def by_monai(reference, predicted) -> dict[str, float]:
    from monai.metrics import HausdorffDistanceMetric, SurfaceDiceMetric

    hausdorff = HausdorffDistanceMetric(include_background=True, percentile=95)
    spacing = (1.0, 1.0, 1.0)
    values = {"hd95": float(hausdorff(predicted, reference, spacing=spacing))}
    for tolerance_mm in TOLERANCES_MM:
        metric = SurfaceDiceMetric([tolerance_mm], include_background=True)
        values[f"nsd{tolerance_mm:g}"] = float(metric(predicted, reference, spacing=spacing))
    return values


def by_scipy(reference: np.ndarray, predicted: np.ndarray, *, whole: bool) -> dict[str, float]:
    from scipy.ndimage import binary_erosion, distance_transform_edt, find_objects

    if not whole:
        box = find_objects((reference | predicted).astype(np.uint8))[0]
        reference, predicted = (np.pad(mask[box], 1) for mask in (reference, predicted))
    borders = [mask & ~binary_erosion(mask) for mask in (reference, predicted)]
    from_reference = distance_transform_edt(~borders[1])[borders[0]]
    from_predicted = distance_transform_edt(~borders[0])[borders[1]]
    both = np.concatenate([from_reference, from_predicted])
    hd95 = max(np.percentile(from_reference, 95), np.percentile(from_predicted, 95))
    return {"hd95": float(hd95)} | {f"nsd{t:g}": float((both <= t).mean()) for t in TOLERANCES_MM}


def run_side(side: str, path: str) -> None:
    """Print time, peak memory and values of one side; runs in a separate process."""
    with np.load(path) as stored:
        reference, predicted = stored["reference"], stored["predicted"]
    measure: Callable[..., dict[str, float]]
    masks = (reference, predicted)
    if side == "MONAI":
        import torch

        # MONAI passes an argument that torch deprecates.
        warnings.simplefilter("ignore", FutureWarning)
        measure, masks = by_monai, tuple(torch.from_numpy(mask)[None, None] for mask in masks)
        small = tuple(mask[..., 90:140, 90:140, 90:140] for mask in masks)
    else:
        scipy = partial(by_scipy, whole=side.endswith("array"))
        measure = by_volseg if side == "volseg" else scipy
        small = tuple(mask[90:140, 90:140, 20:140] for mask in masks)
    measure(*small)  # so that imports are not counted
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before, started = _megabytes("VmRSS"), time.perf_counter()
    values = measure(*masks)
    wall = time.perf_counter() - started
    print(json.dumps({"wall": wall, "memory": _megabytes("VmHWM") - before, **values}))


def _megabytes(key: str) -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith(key)).split()[1]) / 1024


def print_speed(edge: int, rounds: int) -> None:
    reference, near, far = organ(edge)
    print(
        f"| masks of {edge}³ | | wall, s | × volseg | memory, MB | HD95 mm | NSD 1 mm | NSD 2 mm |"
    )
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, predicted in (("near", near), ("far", far)):
            path = Path(folder) / f"{name}.npz"
            np.savez(path, reference=reference, predicted=predicted)
            # The whole array takes equally long wherever the masks lie.
            sides = SIDES if name == "near" else SIDES[:-1]
            runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
            for _ in range(rounds):
                for side in sides:
                    command = [sys.executable, __file__, "--side", side, str(path)]
                    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                    runs[side].append(json.loads(done.stdout.splitlines()[-1]))
            ours = min(run["wall"] for run in runs["volseg"])
            for side in sides:
                wall = min(run["wall"] for run in runs[side])
                memory = max(run["memory"] for run in runs[side])
                keys = ("hd95", "nsd1", "nsd2")
                values = " | ".join(f"{runs[side][0][key]:.6f}" for key in keys)
                cells = f"{wall:.3f} | {wall / ours:.1f} | {memory:.0f} | {values}"
                print(f"| {name} | {side} | {cells} |", flush=True)


# ---- surface elements, as DeepMind's surface-distance defines them

SURFACE_DISTANCE = """
import json, sys, time
import numpy as np
import surface_distance as sd
content = np.load(sys.argv[1])
started = time.perf_counter()
masks = content["reference"], content["predicted"]
distances = sd.compute_surface_distances(*masks, content["spacing"].tolist())
from_gt, from_pred = distances["distances_gt_to_pred"], distances["distances_pred_to_gt"]
gt_mm2, pred_mm2 = distances["surfel_areas_gt"], distances["surfel_areas_pred"]
values = [
    sd.compute_robust_hausdorff(distances, 95),
    ((from_gt * gt_mm2).sum() + (from_pred * pred_mm2).sum()) / (gt_mm2.sum() + pred_mm2.sum()),
    sd.compute_surface_dice_at_tolerance(distances, 1),
    sd.compute_surface_dice_at_tolerance(distances, 2),
]
print(json.dumps([float(value) for value in values] + [time.perf_counter() - started]))
"""


def by_elements(
    peer: str, reference: np.ndarray, predicted: np.ndarray, spacing_mm: tuple[float, float, float]
) -> list[float]:
    """Return HD95, mean distance, NSD at 1 and 2 mm by surface-distance, and its seconds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "masks.npz"
        np.savez(path, reference=reference, predicted=predicted, spacing=spacing_mm)
        command = [peer, "-c", SURFACE_DISTANCE, str(path)]
        return json.loads(subprocess.check_output(command, text=True))


def print_definitions(edge: int, peer: str) -> None:
    from volseg.evaluation.surface import surface_distances
    from volseg.volume import Geometry

    index = np.indices((40, 40, 24)).reshape(3, -1).T
    spacing_mm = (0.7, 0.7, 2.5)

    def ball(radius_mm: float, offset_mm: float) -> np.ndarray:
        from_centre = (index - (20, 20, 12)) * spacing_mm - (offset_mm, 0, 0)
        return (np.linalg.norm(from_centre, axis=1) <= radius_mm).reshape(40, 40, 24)

    reference, near, _ = organ(edge)
    moved = "ball of 10 mm, 0.7 × 0.7 × 2.5 mm, moved by 1.4 mm"
    cases = (
        (f"organ of {edge}³, 1 mm, perturbed", reference, near, (1.0, 1.0, 1.0)),
        (moved, ball(10, 0), ball(10, 1.4), spacing_mm),
        ("ball of 4 mm, the same grid, predicted with 5 mm", ball(4, 0), ball(5, 0), spacing_mm),
    )
    print("\n| masks | definition | HD95 mm | mean mm | NSD 1 mm | NSD 2 mm | s |")
    print("|---|---|---|---|---|---|---|")
    for name, truth, predicted, spacing in cases:
        geometry = Geometry(truth.shape, np.diag([*spacing, 1.0]))
        started = time.perf_counter()
        ours = surface_distances(truth, predicted, geometry)[1]
        by_border = (ours.hd95_mm, ours.mean_mm, ours.nsd(1), ours.nsd(2))
        rows = {
            "border voxels (volseg)": (*by_border, time.perf_counter() - started),
            "surface elements": by_elements(peer, truth, predicted, spacing),
        }
        for definition, values in rows.items():
            cells = " | ".join(f"{value:.4f}" for value in values)
            print(f"| {name} | {definition} | {cells} |", flush=True)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--edge", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peer", help="Python with surface-distance, for the second table")
    parser.add_argument("--side", nargs=2, help=SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        run_side(*arguments.side)
        return
    print_speed(arguments.edge, arguments.rounds)
    if arguments.peer:
        print_definitions(arguments.edge, arguments.peer)


if __name__ == "__main__":
    main()

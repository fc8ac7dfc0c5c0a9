"""Surface metrics of two masks: volseg, MONAI and scipy's distance transform; and border voxels beside surface elements.

    python benchmarks/surface.py [--edge 256] [--rounds 2] [--peer PEER/bin/python]

First table: HD95 and the normalised surface Dice (NSD) at 1 and 2 mm of a seeded blobby organ in an array of 256³ voxels of 1 mm and of a perturbed
copy (`near`), and of that copy 12 voxels off (`far`). MONAI's HausdorffDistanceMetric and SurfaceDiceMetric measure the distances anew for
each metric and tolerance; `scipy` is what one writes by hand: binary_erosion, then distance_transform_edt of the whole array, or of the box
round both masks. Every run is a process of its own, the sides in turn; wall is the best of the rounds, memory the peak beyond the two masks, which are held
as booleans (MONAI: as tensors).

Second table: the same numbers by DeepMind's surface-distance (`surface-distance-based-measures`, Nikolov et al., J Med Internet Res 23:e26151,
2021) in an environment of its own: there the surface is made of elements, weighted by their area.
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
from pathlib import Path

import numpy as np

SIDES = ("volseg", "MONAI", "scipy, in the box", "scipy, whole array")
TOLERANCES_MM = (1.0, 2.0)


def organ(edge: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A blobby organ, a perturbed copy and one that is displaced: (edge, edge, edge) bool."""
    from scipy.ndimage import gaussian_filter, zoom

    random = np.random.default_rng(0)
    distance = np.sqrt(
        sum((np.arange(edge, dtype=np.float32) - edge / 2)[axis] ** 2 for axis in _open_axes())
    )
    bumps = []
    for width in (3, 2):
        coarse = gaussian_filter(random.normal(size=(edge // 4,) * 3), width)
        bumps.append(zoom(coarse / coarse.std(), 4, order=1).astype(np.float32))
    reference = distance + edge / 32 * bumps[0] < edge * 0.31
    predicted = distance + edge / 32 * bumps[0] + edge / 100 * bumps[1] < edge * 0.31
    return reference, predicted, np.roll(predicted, 12, axis=0)


def _open_axes() -> list[tuple]:
    return [tuple(slice(None) if axis == own else None for axis in range(3)) for own in range(3)]


def by_volseg(reference: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    from volseg.evaluate.surface import surface_distances
    from volseg.volume import Geometry

    found = surface_distances(reference, predicted, Geometry(reference.shape, np.eye(4)))[1]
    return {"hd95": found.hd95_mm} | {f"nsd{t:g}": found.nsd(t) for t in TOLERANCES_MM}


def by_monai(reference, predicted) -> dict[str, float]:
    from monai.metrics import HausdorffDistanceMetric, SurfaceDiceMetric

    hausdorff = HausdorffDistanceMetric(include_background=True, percentile=95)
    found = {"hd95": float(hausdorff(predicted, reference, spacing=(1.0, 1.0, 1.0)))}
    for tolerance_mm in TOLERANCES_MM:
        metric = SurfaceDiceMetric([tolerance_mm], include_background=True)
        found[f"nsd{tolerance_mm:g}"] = float(metric(predicted, reference, spacing=(1.0, 1.0, 1.0)))
    return found


def by_scipy(reference: np.ndarray, predicted: np.ndarray, *, whole: bool) -> dict[str, float]:
    from scipy.ndimage import binary_erosion, distance_transform_edt, find_objects

    if not whole:
        box = find_objects((reference | predicted).astype(np.uint8))[0]
        reference, predicted = (np.pad(mask[box], 1) for mask in (reference, predicted))
    one, other = reference & ~binary_erosion(reference), predicted & ~binary_erosion(predicted)
    there = distance_transform_edt(~other)[one]
    back = distance_transform_edt(~one)[other]
    both = np.concatenate([there, back])
    return {"hd95": float(max(np.percentile(there, 95), np.percentile(back, 95)))} | {
        f"nsd{t:g}": float((both <= t).mean()) for t in TOLERANCES_MM
    }


def run_side(side: str, path: str) -> None:
    """In a process of its own: time, peak memory and values of one side."""
    with np.load(path) as stored:
        reference, predicted = stored["reference"], stored["predicted"]
    measure: Callable[..., dict[str, float]]
    masks = (reference, predicted)
    if side == "MONAI":
        import torch

        warnings.simplefilter("ignore", FutureWarning)  # of an argument that MONAI gives itself
        measure, masks = by_monai, tuple(torch.from_numpy(mask)[None, None] for mask in masks)
        small = tuple(mask[..., 90:140, 90:140, 90:140] for mask in masks)
    else:
        measure = (
            by_volseg
            if side == "volseg"
            else lambda *pair: by_scipy(*pair, whole=side.endswith("array"))
        )
        small = tuple(mask[90:140, 90:140, 20:140] for mask in masks)
    measure(*small)  # imports
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, started = _held("VmRSS"), time.perf_counter()
    values = measure(*masks)
    print(
        json.dumps(
            {"wall": time.perf_counter() - started, "memory": _held("VmHWM") - before, **values}
        )
    )


def _held(key: str) -> float:
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
            sides = (
                SIDES if name == "near" else SIDES[:-1]
            )  # the whole array takes as long wherever the masks lie in it
            found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
            for _ in range(rounds):
                for side in sides:
                    command = [sys.executable, __file__, "--side", side, str(path)]
                    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                    found[side].append(json.loads(done.stdout.splitlines()[-1]))
            ours = min(one["wall"] for one in found["volseg"])
            for side, each in found.items():
                wall, memory = min(one["wall"] for one in each), max(one["memory"] for one in each)
                values = " | ".join(f"{each[0][key]:.6f}" for key in ("hd95", "nsd1", "nsd2"))
                print(
                    f"| {name} | {side} | {wall:.3f} | {wall / ours:.1f} | {memory:.0f} | {values} |",
                    flush=True,
                )


# ---- surface elements, as DeepMind's surface-distance defines them

SURFACE_DISTANCE = """
import json, sys, time
import numpy as np
import surface_distance as sd
content = np.load(sys.argv[1])
started = time.perf_counter()
found = sd.compute_surface_distances(content["one"], content["other"], content["spacing"].tolist())
there, back = found["distances_gt_to_pred"], found["distances_pred_to_gt"]
one_mm2, other_mm2 = found["surfel_areas_gt"], found["surfel_areas_pred"]
values = [
    sd.compute_robust_hausdorff(found, 95),
    ((there * one_mm2).sum() + (back * other_mm2).sum()) / (one_mm2.sum() + other_mm2.sum()),
    sd.compute_surface_dice_at_tolerance(found, 1),
    sd.compute_surface_dice_at_tolerance(found, 2),
]
print(json.dumps([float(value) for value in values] + [time.perf_counter() - started]))
"""


def by_elements(
    peer: str, reference: np.ndarray, predicted: np.ndarray, spacing_mm: tuple[float, float, float]
) -> list[float]:
    """HD95, mean distance, NSD at 1 and 2 mm of the package, and its seconds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "masks.npz"
        np.savez(path, one=reference, other=predicted, spacing=spacing_mm)
        return json.loads(
            subprocess.check_output([peer, "-c", SURFACE_DISTANCE, str(path)], text=True)
        )


def print_definitions(edge: int, peer: str) -> None:
    from volseg.evaluate.surface import surface_distances
    from volseg.volume import Geometry

    index = np.indices((40, 40, 24)).reshape(3, -1).T
    spacing_mm = (0.7, 0.7, 2.5)

    def ball(radius_mm: float, offset_mm: float) -> np.ndarray:
        from_centre = (index - (20, 20, 12)) * spacing_mm - (offset_mm, 0, 0)
        return (np.linalg.norm(from_centre, axis=1) <= radius_mm).reshape(40, 40, 24)

    reference, near, _ = organ(edge)
    cases = (
        (f"organ of {edge}³, 1 mm, perturbed", reference, near, (1.0, 1.0, 1.0)),
        (
            "ball of 10 mm, 0.7 × 0.7 × 2.5 mm, moved by 1.4 mm",
            ball(10, 0),
            ball(10, 1.4),
            spacing_mm,
        ),
        ("ball of 4 mm, the same grid, predicted with 5 mm", ball(4, 0), ball(5, 0), spacing_mm),
    )
    print("\n| masks | definition | HD95 mm | mean mm | NSD 1 mm | NSD 2 mm | s |")
    print("|---|---|---|---|---|---|---|")
    for name, one, other, spacing in cases:
        started = time.perf_counter()
        ours = surface_distances(one, other, Geometry(one.shape, np.diag([*spacing, 1.0])))[1]
        mine = (ours.hd95_mm, ours.mean_mm, ours.nsd(1), ours.nsd(2), time.perf_counter() - started)
        rows = {
            "border voxels (volseg)": mine,
            "surface elements": by_elements(peer, one, other, spacing),
        }
        for definition, values in rows.items():
            print(
                f"| {name} | {definition} | "
                + " | ".join(f"{value:.4f}" for value in values)
                + " |",
                flush=True,
            )


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--edge", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--peer", help="Python that has surface-distance; without it no second table"
    )
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

"""Surface metrics of two masks: volseg, MONAI and scipy's distance transform; and border voxels beside surface elements.

    python benchmarks/surface.py [--edge 256] [--rounds 2]

First table: HD95 and the normalised surface Dice (NSD) at 1 and 2 mm of a seeded blobby organ in an array of 256³ voxels of 1 mm and of a perturbed
copy (`near`), and of that copy 12 voxels off (`far`). MONAI's HausdorffDistanceMetric and SurfaceDiceMetric measure the distances anew for
each metric and tolerance; `scipy` is what one writes by hand: binary_erosion, then distance_transform_edt of the whole array, or of the box
round both masks. Every run is a process of its own, the sides in turn; wall is the best of the rounds, memory the peak beyond the two masks, which are held
as booleans (MONAI: as tensors).

Second table: the same numbers by the definition of DeepMind's surface-distance, written here from its description (Nikolov et al., J Med Internet
Res 23:e26151, 2021): the surface is made of elements, one between any eight voxels that are not all alike, at their common corner, weighted by the
area that marching cubes gives it; HD95 is the larger of the two directions' area-weighted 95th percentiles. Before it is used it must give the
numbers that are published with that package for two voxels and for two cubes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

SIDES = ("volseg", "MONAI", "scipy, in the box", "scipy, whole array")
TOLERANCES_MM = (1.0, 2.0)


def organ(edge: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A blobby organ, a perturbed copy and one that is displaced: (edge, edge, edge) bool."""
    from scipy.ndimage import gaussian_filter, zoom

    random = np.random.default_rng(0)
    distance = np.sqrt(sum((np.arange(edge, dtype=np.float32) - edge / 2)[axis] ** 2 for axis in _open_axes()))
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
        measure = by_volseg if side == "volseg" else lambda *pair: by_scipy(*pair, whole=side.endswith("array"))
        small = tuple(mask[90:140, 90:140, 20:140] for mask in masks)
    measure(*small)  # imports
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, started = _held("VmRSS"), time.perf_counter()
    values = measure(*masks)
    print(json.dumps({"wall": time.perf_counter() - started, "memory": _held("VmHWM") - before, **values}))


def _held(key: str) -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith(key)).split()[1]) / 1024


def print_speed(edge: int, rounds: int) -> None:
    reference, near, far = organ(edge)
    print(f"| masks of {edge}³ | | wall, s | × volseg | memory, MB | HD95 mm | NSD 1 mm | NSD 2 mm |")
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
                print(f"| {name} | {side} | {wall:.3f} | {wall / ours:.1f} | {memory:.0f} | {values} |", flush=True)


# ---- surface elements, as DeepMind's surface-distance defines them


def element_areas_mm2(spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """(256,) area of the surface inside the cube between eight voxel centres, for each way to fill them."""
    from skimage.measure import marching_cubes, mesh_surface_area

    areas = np.zeros(256)
    for code in range(1, 255):
        cube = np.array([code >> bit & 1 for bit in range(8)], dtype=np.float32).reshape(2, 2, 2)
        vertices, faces, _, _ = marching_cubes(cube, 0.5, spacing=spacing_mm, method="lorensen")
        areas[code] = mesh_surface_area(vertices, faces)
    return areas


def elements(mask: np.ndarray, spacing_mm: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray]:
    """(N, 3) places in mm and (N,) areas of the surface elements of a mask."""
    padded = np.pad(mask, 1).astype(np.uint8)
    codes = np.zeros(tuple(n - 1 for n in padded.shape), np.uint8)
    for bit in range(8):
        corner = tuple(slice(d, d + n) for d, n in zip((bit >> 2 & 1, bit >> 1 & 1, bit & 1), codes.shape))
        codes |= padded[corner] << np.uint8(bit)
    places = np.argwhere((codes != 0) & (codes != 255))
    return places * np.array(spacing_mm), element_areas_mm2(spacing_mm)[codes[tuple(places.T)]]


def by_elements(
    reference: np.ndarray, predicted: np.ndarray, spacing_mm: tuple[float, float, float]
) -> dict[str, float]:
    from scipy.spatial import KDTree

    (one, one_mm2), (other, other_mm2) = elements(reference, spacing_mm), elements(predicted, spacing_mm)
    there, back = KDTree(other).query(one)[0], KDTree(one).query(other)[0]
    found = {
        "hd95": max(_weighted_percentile(there, one_mm2, 95), _weighted_percentile(back, other_mm2, 95)),
        "there": float((there * one_mm2).sum() / one_mm2.sum()),
        "back": float((back * other_mm2).sum() / other_mm2.sum()),
    }
    found["mean"] = (found["there"] * one_mm2.sum() + found["back"] * other_mm2.sum()) / (
        one_mm2.sum() + other_mm2.sum()
    )
    for tolerance_mm in TOLERANCES_MM:
        within = one_mm2[there <= tolerance_mm].sum() + other_mm2[back <= tolerance_mm].sum()
        found[f"nsd{tolerance_mm:g}"] = float(within / (one_mm2.sum() + other_mm2.sum()))
    return found


def _weighted_percentile(distances: np.ndarray, weights: np.ndarray, percent: float) -> float:
    """The first distance up to which that share of the weight lies."""
    order = np.argsort(distances)
    share = np.cumsum(weights[order]) / weights.sum()
    return float(distances[order][min(np.searchsorted(share, percent / 100), len(order) - 1)])


def check_elements() -> None:
    """The two three-dimensional examples that are published with the package."""
    one, other = np.zeros((2, 128, 128, 128), bool)
    one[50, 60, 70] = other[50, 60, 72] = True
    found = by_elements(one, other, (3, 2, 1))
    assert np.allclose([found["there"], found["back"], found["hd95"], found["nsd1"]], [1.5, 1.5, 2, 0.5], atol=1e-3)
    one, other = np.zeros((2, 100, 100, 100), bool)
    one[:50] = other[:51] = True
    found = by_elements(one, other, (2, 1, 1))
    published = [0.322, 0.339, 2.0, 0.836]
    assert np.allclose([found["there"], found["back"], found["hd95"], found["nsd1"]], published, atol=1e-3)


def print_definitions(edge: int) -> None:
    from volseg.evaluate.surface import surface_distances
    from volseg.volume import Geometry

    check_elements()
    index = np.indices((40, 40, 24)).reshape(3, -1).T
    spacing_mm = (0.7, 0.7, 2.5)

    def ball(radius_mm: float, offset_mm: float) -> np.ndarray:
        from_centre = (index - (20, 20, 12)) * spacing_mm - (offset_mm, 0, 0)
        return (np.linalg.norm(from_centre, axis=1) <= radius_mm).reshape(40, 40, 24)

    reference, near, _ = organ(edge)
    cases = (
        (f"organ of {edge}³, 1 mm, perturbed", reference, near, (1.0, 1.0, 1.0)),
        ("ball of 10 mm, 0.7 × 0.7 × 2.5 mm, moved by 1.4 mm", ball(10, 0), ball(10, 1.4), spacing_mm),
        ("ball of 4 mm, the same grid, predicted with 5 mm", ball(4, 0), ball(5, 0), spacing_mm),
    )
    print("\n| masks | definition | HD95 mm | mean mm | NSD 1 mm | NSD 2 mm |")
    print("|---|---|---|---|---|---|")
    for name, one, other, spacing in cases:
        ours = surface_distances(one, other, Geometry(one.shape, np.diag([*spacing, 1.0])))[1]
        theirs = by_elements(one, other, spacing)
        rows = {
            "border voxels (volseg)": (ours.hd95_mm, ours.mean_mm, ours.nsd(1), ours.nsd(2)),
            "surface elements": tuple(theirs[key] for key in ("hd95", "mean", "nsd1", "nsd2")),
        }
        for definition, values in rows.items():
            print(f"| {name} | {definition} | " + " | ".join(f"{value:.4f}" for value in values) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edge", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        run_side(*arguments.side)
        return
    print_speed(arguments.edge, arguments.rounds)
    print_definitions(arguments.edge)


if __name__ == "__main__":
    main()

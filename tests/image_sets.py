"""Small seeded datasets of images, for tests: discs and squares of random size and place."""

from __future__ import annotations

import csv

import nibabel
import numpy as np
from PIL import Image

SHAPES = ("disc", "square")


def picture(rng, shape, edge=32):
    """Return (edge, edge) uint8 with a bright shape on noise, and its area in pixels."""
    y, x = np.mgrid[:edge, :edge].astype(float)
    radius = rng.uniform(edge * 0.15, edge * 0.3)
    cy, cx = rng.uniform(radius + 1, edge - radius - 1, 2)
    if shape == "disc":
        inside = (y - cy) ** 2 + (x - cx) ** 2 <= radius**2
    else:
        half = radius * np.sqrt(np.pi) / 2  # of equal area
        inside = (abs(y - cy) <= half) & (abs(x - cx) <= half)
    noisy = 60 + 80 * inside + rng.normal(0, 12, (edge, edge))
    return noisy.clip(0, 255).astype(np.uint8), float(inside.sum())


def folder_of_classes(folder, n=24, edge=32, seed=0):
    """Write `n` pictures of each shape into a folder of its name."""
    rng = np.random.default_rng(seed)
    for shape in SHAPES:
        (folder / shape).mkdir(parents=True)
        for number in range(n):
            image = Image.fromarray(picture(rng, shape, edge)[0])
            image.save(folder / shape / f"{shape}_{number:03}.png")
    return folder


def table_of_images(folder, n=48, edge=32, seed=0):
    """Write pictures and a cases.csv with shape, area, labels, patient and split."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(n):
        shape = SHAPES[number % 2]
        pixels, area = picture(rng, shape, edge)
        name = f"images/{number:03}.png"
        Image.fromarray(pixels).save(folder / name)
        large = area > 0.14 * edge**2
        labels = "|".join([shape, *(["large"] if large else [])])
        split = ("train", "train", "val", "test")[number // 2 % 4]
        rows.append([name, f"p{number // 2}", split, shape, f"{area:g}", labels])
    with open(folder / "cases.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "patient", "split", "shape", "area", "labels"])
        writer.writerows(rows)
    return folder


def scans_of_lesions(folder, n=12, seed=0):
    """Write scans of 24 × 26 × 14 voxels with one or two balls, bright or dark, and a cases.csv."""
    rng = np.random.default_rng(seed)
    affine = np.diag([-1.0, -1.0, 2.0, 1.0])
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    rows = []
    grid = np.stack(np.mgrid[:24, :26, :14], axis=-1) * [1.0, 1.0, 2.0]
    for number in range(n):
        kind = ("bright", "dark")[number % 2]
        scan, mask = rng.normal(0, 20, grid.shape[:3]), np.zeros(grid.shape[:3], np.uint8)
        for centre in ([6, 6, 12], [17, 19, 14])[: 1 + number % 3 // 2]:
            inside = np.linalg.norm(grid - centre, axis=-1) <= rng.uniform(3, 5)
            scan[inside] += 150 if kind == "bright" else -150
            mask[inside] = 1
        for name, array in (("images", scan.astype(np.int16)), ("labels", mask)):
            image = nibabel.nifti1.Nifti1Image(array, affine)
            nibabel.nifti1.save(image, folder / name / f"s{number:02}.nii.gz")
        split = ("train", "train", "val", "test")[number // 2 % 4]
        rows.append([f"images/s{number:02}.nii.gz", f"labels/s{number:02}.nii.gz", split, kind])
    with open(folder / "cases.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "label", "split", "kind"])
        writer.writerows(rows)
    return folder


def scans_of_slices(folder, n=24, edge=32, seed=0):
    """Write series of 4 to 9 slices; one slice of every second scan has a bright disc.

    The numbers in `slice` are in another order than the rows, and `disc` is that of each slice.
    """
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(n):
        n_slices, has_disc = int(rng.integers(4, 10)), number % 2
        place = int(rng.integers(n_slices)) if has_disc else -1
        split = ("train", "train", "val", "test")[number // 2 % 4]
        for index in rng.permutation(n_slices).tolist():
            pixels = rng.normal(60, 12, (edge, edge)).clip(0, 255).astype(np.uint8)
            if index == place:
                pixels = picture(rng, "disc", edge)[0]
            name = f"images/s{number:02}_{index}.png"
            Image.fromarray(pixels).save(folder / name)
            finding = "disc" if has_disc else "none"
            rows.append([name, f"s{number:02}", index, split, finding, int(index == place)])
    with open(folder / "cases.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "patient", "slice", "split", "finding", "disc"])
        writer.writerows(rows)
    return folder


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)

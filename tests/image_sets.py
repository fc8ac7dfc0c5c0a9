"""Small seeded datasets of images, for tests: discs and squares of random size and place."""

from __future__ import annotations

import csv

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

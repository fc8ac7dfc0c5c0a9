"""Make the sample images: round and spiculated masses on noise, in a folder per split and class.

    python sample_data/make_images.py FOLDER [--seed N]

A mass is a disc, or a disc of the same mean radius whose edge is drawn out into spikes; position,
radius, contrast and noise vary. The class is known from the drawing. This file does not import
volseg, so that volseg is not tested against itself.
"""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

import numpy as np
from PIL import Image

DEFAULT_SEED = 20261130
CLASSES = ("round", "spiculated")
IMAGES = {"train": 120, "val": 40, "test": 60}  # of each class
EDGE = 40  # pixels
RADIUS = (6.0, 10.0)  # pixels
SPIKES = (7, 11)
SPIKE_LENGTH = (0.25, 0.45)  # of the radius
CONTRAST = (35.0, 70.0)
BACKGROUND, NOISE_SD, MARGIN = 80.0, 14.0, 1.5


def write_images(folder: Path, seed: int = DEFAULT_SEED) -> None:
    """Write FOLDER/<split>/<class>/<class>_<number>.png, 8-bit grey."""
    rng = np.random.default_rng(seed)
    for split, n in IMAGES.items():
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for number in range(n):
                path = folder / split / name / f"{split}_{name}_{number:03}.png"
                Image.fromarray(draw(rng, spiculated=name == "spiculated")).save(path)


def draw(rng: np.random.Generator, *, spiculated: bool) -> np.ndarray:
    """Return (EDGE, EDGE) uint8 with one mass."""
    radius = rng.uniform(*RADIUS)
    reach = radius * (1 + SPIKE_LENGTH[1]) + MARGIN
    across, down = rng.uniform(reach, EDGE - 1 - reach, 2)
    y, x = np.mgrid[:EDGE, :EDGE].astype(float)
    distance, angle = np.hypot(y - down, x - across), np.arctan2(y - down, x - across)
    edge = np.full_like(distance, radius)
    if spiculated:
        spikes, length = rng.integers(*SPIKES, endpoint=True), rng.uniform(*SPIKE_LENGTH)
        edge = radius * (1 + length * np.cos(spikes * angle + rng.uniform(0, 2 * np.pi)))
    inside = np.clip(edge - distance + 0.5, 0, 1)
    image = BACKGROUND + rng.uniform(*CONTRAST) * inside + rng.normal(0, NOISE_SD, inside.shape)
    return image.round().clip(0, 255).astype(np.uint8)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED)
    arguments = parser.parse_args()
    write_images(arguments.folder, arguments.seed)


if __name__ == "__main__":
    main()

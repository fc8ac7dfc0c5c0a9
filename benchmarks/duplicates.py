"""How far copies of an image are from images that only look alike, by three measures.

    python benchmarks/duplicates.py DATASET [DATASET ...]

For each data set of 2D images: the smallest similarity of 150 images to their changed copies, and
the largest of any two images of different patients (without patients: of any two that are not
equal). The thresholds of `volseg/evaluation/duplicates.py` must lie between the two; where they
overlap, as for ultrasound, the data set holds near duplicates of its own. The last columns count
the pairs that a 64-bit difference hash, or volseg, calls near duplicates.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from volseg.evaluation.duplicates import ImagePrint, near_duplicates, print_of
from volseg.io.image_cases import ImageCase, survey_images
from volseg.io.images import ImageReader
from volseg.preprocessing.images import resize, to_channels

N_COPIES = 150
HASH_BITS = 5  # two hashes that differ in no more bits are usually called near duplicates


def jpeg(pixels: np.ndarray) -> np.ndarray:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=50)
    return np.asarray(Image.open(stream))


def halved(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape
    size = (max(8, width // 2), max(8, height // 2))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "JPEG quality 50": jpeg,
    "half size": halved,
    "gamma 1.4": lambda pixels: (255 * (pixels / 255) ** 1.4).astype(np.uint8),
    "darker": lambda pixels: (pixels * 0.8 + 20).astype(np.uint8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("datasets", nargs="+", type=Path)
    for dataset in parser.parse_args().datasets:
        cases, images = read_greys(dataset)
        prints = [print_of(pixels[None], 255.0) for pixels in images]
        print(f"\n{dataset.name}: {len(images)} images")
        print("| copy | thumbnail, 1 % | detail, 1 % | hash bits, 99 % |\n|---|---|---|---|")
        for name, change in CHANGES.items():
            print("| " + " | ".join((name, *copies_row(images, prints, change))) + " |")
        report_others(cases, images, prints)


def read_greys(dataset: Path) -> tuple[list[ImageCase], list[np.ndarray]]:
    """Return the images with their pixels (H, W) uint8."""
    reader, pairs = ImageReader(), []
    for case in survey_images(dataset).cases:
        grey = to_channels(reader.read(case.path, case.index).array, 1)[0]
        pairs.append((case, np.clip(np.rint(grey), 0, 255).astype(np.uint8)))
    return [case for case, _ in pairs], [pixels for _, pixels in pairs]


def hash_of(pixels: np.ndarray) -> np.ndarray:
    """Return the 64 bits of a difference hash: is each pixel of 8 × 9 darker than the next?"""
    small = resize(pixels[None].astype(np.float32), (8, 9))[0]
    return (small[:, 1:] > small[:, :-1]).ravel()


def copies_row(images: list[np.ndarray], prints: list[ImagePrint], change) -> tuple[str, ...]:
    rng = np.random.default_rng(0)
    rows = []
    for number in rng.choice(len(images), min(N_COPIES, len(images)), replace=False):
        copy, original = print_of(change(images[number])[None], 255.0), prints[number]
        if not copy.is_blank and not original.is_blank:
            bits = (hash_of(change(images[number])) != hash_of(images[number])).sum()
            rows.append((*similarity(copy, original), bits))
    thumbnail, detail, bits = np.array(rows).T
    low = (np.quantile(values, 0.01) for values in (thumbnail, detail))
    return *(f"{value:.3f}" for value in low), f"{np.quantile(bits, 0.99):.0f}"


def similarity(first: ImagePrint, second: ImagePrint) -> tuple[float, float]:
    assert first.thumbnail is not None and first.detail is not None
    return float(first.thumbnail @ second.thumbnail), float(first.detail @ second.detail)


def report_others(
    cases: list[ImageCase], images: list[np.ndarray], prints: list[ImagePrint]
) -> None:
    patients = [case.patient or case.id for case in cases]
    hashes = np.stack([hash_of(pixels) for pixels in images]).astype(np.float32)
    different = hashes @ (1 - hashes).T
    different += different.T
    others = np.triu(np.not_equal.outer(np.array(patients), np.array(patients)), 1)
    pairs = list(near_duplicates(prints))
    apart = [(i, j) for i, j in pairs if patients[i] != patients[j]]
    same = sum(prints[i].sha256 == prints[j].sha256 for i, j in apart)
    print(
        f"pairs of different patients: {int(others.sum()):,}; hash within 0 bits "
        f"{int((others & (different == 0)).sum()):,}, within {HASH_BITS} bits "
        f"{int((others & (different <= HASH_BITS)).sum()):,}; volseg {len(apart):,}, of which "
        f"{same:,} have the same pixels"
    )


if __name__ == "__main__":
    main()

"""Simple features of an image for the baselines: pixels, intensities and gradients, with NumPy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

GRID = 16  # rows and columns of the downsampled image
PERCENTILES = np.linspace(0, 100, 21)
CELLS = 4  # rows and columns of the histograms of gradients
PLANES_NDIM = 5  # of images with several planes each
SCANS_NDIM = 3  # of the embedded slices of scans
ORIENTATIONS = 8  # bins of 22.5°; opposite directions count as the same


def image_features(images: np.ndarray, *, pixels_at_once: int = 2**20) -> np.ndarray:
    """Return features of images, of three kinds, each for all channels.

    First the image averaged onto 16 × 16 pixels; then 21 percentiles of its intensities, from the
    minimum to the maximum in steps of 5 %, which hold what a histogram does without a range; then
    histograms of 8 gradient orientations in 4 × 4 cells, weighted by the gradient's length and
    divided by the norm of them all (Dalal & Triggs, CVPR 2005, with one block).

    Of scans it is the mean embedding of the slices.

    Args:
        images: (n, C, H, W), at least 2 × 2 pixels; or scans (n, S, features + 1), whose last
            number is 0 in the padding.
        pixels_at_once: of images that are converted to double precision together.

    Returns:
        (n, 405 C) float64, or (n, features).
    """
    if images.ndim == SCANS_NDIM:
        return _mean_embedding(images)
    parts = list(_chunks(images, max(1, pixels_at_once // int(np.prod(images.shape[1:])))))
    return np.concatenate(parts) if parts else np.empty((0, n_features(images.shape[1])))


def _mean_embedding(scans: np.ndarray) -> np.ndarray:
    """Return (n, features) of scans (n, S, features + 1)."""
    is_slice = scans[..., -1:] > 0
    return np.where(is_slice, scans[..., :-1], 0).sum(1, dtype=np.float64) / is_slice.sum(1)


def first_planes(images: np.ndarray) -> np.ndarray:
    """Return (n, C, H, W): of lesions, (n, planes, C, H, W), the first plane alone."""
    return images[:, 0] if images.ndim == PLANES_NDIM else images


def n_features(channels: int) -> int:
    """Return the number of features of an image with this number of channels."""
    return channels * (GRID**2 + len(PERCENTILES) + CELLS**2 * ORIENTATIONS)


def n_pixels(channels: int) -> int:
    """Return how many of the features, the first ones, are pixels."""
    return channels * GRID**2


def downsampled(images: np.ndarray, size: int) -> np.ndarray:
    """Return the mean (…, size, size) of images (…, H, W) over equal boxes, cut where they end."""
    rows, columns = (_averaging(n, size) for n in images.shape[-2:])
    return rows @ images @ columns.T


def _chunks(images: np.ndarray, chunk: int) -> Iterator[np.ndarray]:
    for start in range(0, len(images), chunk):
        part = images[start : start + chunk].astype(np.float64)
        n = len(part)
        flat = part.reshape(*part.shape[:2], -1)
        percentiles = np.moveaxis(np.percentile(flat, PERCENTILES, axis=2), 0, 2)
        groups = (downsampled(part, GRID), percentiles, _gradient_histograms(part))
        yield np.concatenate([group.reshape(n, -1) for group in groups], axis=1)


def _averaging(n: int, size: int) -> np.ndarray:
    """Return the matrix (size, n) that averages n pixels over `size` equal boxes."""
    edges = np.arange(size + 1) * n / size
    pixels = np.arange(n)
    low, high = edges[:-1, None], edges[1:, None]
    covered = np.minimum(high, pixels + 1) - np.maximum(low, pixels)
    return np.clip(covered, 0, None) * size / n


def _gradient_histograms(images: np.ndarray) -> np.ndarray:
    """Return (n, C, ORIENTATIONS, CELLS, CELLS), of norm 1 over the last three axes or zero."""
    down, right = np.gradient(images, axis=(2, 3))
    length = np.hypot(down, right)
    bins = np.floor(np.arctan2(down, right) % np.pi / np.pi * ORIENTATIONS).astype(int)
    bins %= ORIENTATIONS
    weights = np.stack([length * (bins == b) for b in range(ORIENTATIONS)], axis=2)
    cells = downsampled(weights, CELLS)
    norm = np.sqrt((cells**2).sum(axis=(2, 3, 4), keepdims=True))
    return np.divide(cells, norm, out=np.zeros_like(cells), where=norm > 0)

"""Run a network over a volume in overlapping tiles and blend their logits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, combinations

import numpy as np

from volseg.infer.backends import Backend
from volseg.infer.tiles import gaussian_window, tile_boxes


def predict_logits(
    array: np.ndarray,
    backend: Backend,
    *,
    patch_shape: tuple[int, int, int],
    overlap: float,
    mirror_axes: Sequence[int] = (),
    batch_size: int = 1,
    margin: int = 0,
) -> np.ndarray:
    """Gaussian-weighted mean of the logits of overlapping tiles.

    Args:
        array: (channels, R, A, S) float32; an axis shorter than the patch is padded with 0 around its centre.
        overlap: smallest fraction of a patch shared with its neighbour, in [0, 1).
        mirror_axes: axes among 0, 1, 2 over whose mirrored copies the logits are averaged.
        margin: voxels by which the scan is continued beyond each face with its mirror image. The outermost voxels of a
            patch are those a network sees worst, and at a face of the scan no neighbouring patch makes up for it.

    Returns:
        (classes, R, A, S) float32.
    """
    if margin:
        wider = np.pad(array, [(0, 0), *[(margin, margin)] * 3], mode="symmetric")
        logits = predict_logits(
            wider,
            backend,
            patch_shape=patch_shape,
            overlap=overlap,
            mirror_axes=mirror_axes,
            batch_size=batch_size,
        )
        return logits[(slice(None), *(slice(margin, margin + n) for n in array.shape[1:]))]
    shape = array.shape[1:]
    before = [max(0, p - n) // 2 for n, p in zip(shape, patch_shape, strict=True)]
    after = [max(0, p - n) - b for n, p, b in zip(shape, patch_shape, before, strict=True)]
    padded = np.pad(array, [(0, 0), *zip(before, after, strict=True)]) if any(before) or any(after) else array
    blended = _blend_tiles(padded, backend, patch_shape, overlap, mirror_axes, batch_size)
    return blended[(slice(None), *(slice(b, b + n) for b, n in zip(before, shape, strict=True)))]


def _blend_tiles(
    array: np.ndarray,
    backend: Backend,
    patch_shape: tuple[int, int, int],
    overlap: float,
    mirror_axes: Sequence[int],
    batch_size: int,
) -> np.ndarray:
    r, a, s = array.shape[1:]
    boxes = tile_boxes((r, a, s), patch_shape, overlap)
    window = gaussian_window(patch_shape)
    weight = np.zeros((r, a, s), np.float32)
    total: np.ndarray | None = None
    for start in range(0, len(boxes), batch_size):
        chosen = boxes[start : start + batch_size]
        batch = np.stack([array[(slice(None), *box)] for box in chosen])
        logits = _mirrored_mean(batch, backend, mirror_axes)
        if total is None:
            total = np.zeros((logits.shape[1], r, a, s), np.float32)
        for box, tile in zip(chosen, logits, strict=True):
            total[(slice(None), *box)] += tile * window
            weight[box] += window
    assert total is not None
    total /= weight
    return total


def _mirrored_mean(batch: np.ndarray, backend: Backend, mirror_axes: Sequence[int]) -> np.ndarray:
    """Mean of the logits over all combinations of mirrored axes, each mirrored back."""
    flips = list(
        chain.from_iterable(combinations([axis + 2 for axis in mirror_axes], n) for n in range(len(mirror_axes) + 1))
    )
    total = backend.logits(batch)
    for axes in flips[1:]:
        total = total + np.flip(backend.logits(np.ascontiguousarray(np.flip(batch, axes))), axes)
    return total / len(flips) if len(flips) > 1 else total

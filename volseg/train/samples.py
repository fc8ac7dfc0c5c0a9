"""Training patches: where they lie and how they are cut."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from volseg.io.prepared import PreparedCase

FOREGROUND_PER_LABEL = 4000  # voxels kept per case and label on which patches are centred


def sample_batch(
    cases: Sequence[PreparedCase],
    patch_shape: tuple[int, int, int],
    *,
    n: int,
    foreground_fraction: float,
    seed: int,
    step: int = 0,
    only: Sequence[int] | None = None,
    cut_shape: tuple[int, int, int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`n` random patches: images (n, channels, *cut_shape) float32 and masks (n, *cut_shape) uint8.

    The first of them hold a voxel of a label, each label of a case being equally likely; the others lie anywhere. How many the first are
    differs from step to step, so that of all patches until then they are `foreground_fraction`, even with one patch a step. Outside the scan images and masks are 0.

    Args:
        only: indices of the patches of the batch that are wanted: each depends on the seed, the step and its index alone.
        cut_shape: what is cut round each patch, for a change of its geometry; None for the patch alone. The patch is placed, not the cut, which
            may well lie outside the scan: else the network would never see the scan's border.

    Raises:
        VolsegError: a mask holds a class of no label.
    """
    n_foreground = _whole((step + 1) * n * foreground_fraction) - _whole(
        step * n * foreground_fraction
    )
    chosen = [
        _place(
            cases,
            patch_shape,
            on_foreground=index < n_foreground,
            rng=np.random.default_rng([seed, step, index]),
        )
        for index in (range(n) if only is None else only)
    ]
    cut = cut_shape or patch_shape
    around = [
        (case, tuple(x - (c - p) // 2 for x, c, p in zip(start, cut, patch_shape, strict=True)))
        for case, start in chosen
    ]
    images = np.stack([cut_patch(case.image, start, cut) for case, start in around])
    masks = np.stack([cut_patch(case.mask[None], start, cut)[0] for case, start in around])
    for (case, _), mask in zip(around, masks, strict=True):
        case.check_classes(mask)
    return images, masks


def _whole(number: float) -> int:
    return math.floor(number + 1e-6)  # 3 × (1/3) is 1


def cut_patch(
    array: np.ndarray, start: Sequence[int], patch_shape: tuple[int, int, int]
) -> np.ndarray:
    """(C, *patch_shape) from (C, R, A, S) at `start`, which may lie outside; 0 where there is no scan."""
    inside = [
        slice(max(0, a), max(0, min(n, a + p)))
        for a, p, n in zip(start, patch_shape, array.shape[1:], strict=True)
    ]
    patch = np.zeros((array.shape[0], *patch_shape), array.dtype)
    target = [slice(part.start - a, part.stop - a) for part, a in zip(inside, start, strict=True)]
    patch[(slice(None), *target)] = array[(slice(None), *inside)]
    return patch


def sample_voxels(inside: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(n, 3) int16 voxels of a mask, at most `FOREGROUND_PER_LABEL` of them."""
    flat = np.flatnonzero(inside)
    if flat.size > FOREGROUND_PER_LABEL:
        flat = rng.choice(flat, FOREGROUND_PER_LABEL, replace=False)
    return np.stack(np.unravel_index(flat, inside.shape), axis=1).astype(np.int16)


def _place(
    cases: Sequence[PreparedCase],
    patch_shape: tuple[int, int, int],
    *,
    on_foreground: bool,
    rng: np.random.Generator,
) -> tuple[PreparedCase, tuple[int, int, int]]:
    case = cases[int(rng.integers(len(cases)))]
    shape = case.mask.shape
    labelled = [voxels for voxels in case.foreground.values() if len(voxels)]
    if on_foreground and labelled:
        voxels = labelled[int(rng.integers(len(labelled)))]
        centre = voxels[int(rng.integers(len(voxels)))]
        # Anywhere in the patch but its rim, so that the network sees lesions off centre too.
        start = [
            int(c) - int(rng.integers(p // 4, p - p // 4))
            for c, p in zip(centre, patch_shape, strict=True)
        ]
    else:
        start = [
            int(rng.integers(min(0, n - p), max(0, n - p) + 1))
            for n, p in zip(shape, patch_shape, strict=True)
        ]
    r, a, s = (_keep_near(x, n, p) for x, n, p in zip(start, shape, patch_shape, strict=True))
    return case, (r, a, s)


def _keep_near(start: int, n: int, patch: int) -> int:
    """Inside the scan where the patch fits; centred, as at inference, where the scan is shorter than the patch."""
    return int(np.clip(start, 0, n - patch)) if n >= patch else -((patch - n) // 2)

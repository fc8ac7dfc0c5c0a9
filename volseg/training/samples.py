"""Place and cut training patches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from volseg.io.prepared import PreparedCase

FOREGROUND_PER_LABEL = 4000  # voxels stored per case and label as centres of patches


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the patches of a batch are placed and cut.

    Args:
        n: patches per batch.
        foreground_fraction: of the patches, over many steps, centred on a labelled voxel.
        cut_shape: shape to cut around each patch, as room for spatial augmentation; None for the
            patch alone. Only the patch has to lie in the scan, not the cut: otherwise the network
            would never see the scan's border.
    """

    patch_shape: tuple[int, int, int]
    n: int
    foreground_fraction: float
    seed: int
    cut_shape: tuple[int, int, int] | None = None


def sample_batch(
    cases: Sequence[PreparedCase],
    sampling: Sampling,
    *,
    step: int = 0,
    only: Sequence[int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Cut patches: images (n, channels, *cut_shape) float32, masks (n, *cut_shape) uint8.

    The first patches of a batch hold a labelled voxel, each label of a case being equally likely;
    the others lie anywhere. The number of the first varies from step to step, so that over all
    steps it is the `foreground_fraction`, even with one patch per step. Images and masks
    are 0 outside the scan.

    Args:
        only: indices of the patches to return; each depends on seed, step and index alone.

    Raises:
        VolsegError: a mask holds a class that is not a label of the recipe.
    """
    n, patch_shape = sampling.n, sampling.patch_shape
    n_before, n_after = (_floor(k * n * sampling.foreground_fraction) for k in (step, step + 1))
    n_foreground = n_after - n_before
    placed = [
        _place(
            cases,
            patch_shape,
            on_foreground=index < n_foreground,
            rng=np.random.default_rng([sampling.seed, step, index]),
        )
        for index in (range(n) if only is None else only)
    ]
    cut = sampling.cut_shape or patch_shape
    cuts = [
        (case, tuple(x - (c - p) // 2 for x, c, p in zip(start, cut, patch_shape, strict=True)))
        for case, start in placed
    ]
    images = np.stack([cut_patch(case.image, start, cut) for case, start in cuts])
    masks = np.stack([cut_patch(case.mask[None], start, cut)[0] for case, start in cuts])
    for (case, _), mask in zip(cuts, masks, strict=True):
        case.check_classes(mask)
    return images, masks


def _floor(number: float) -> int:
    return math.floor(number + 1e-6)  # rounding errors must not make 3 × (1/3) less than 1


def cut_patch(
    array: np.ndarray, start: Sequence[int], patch_shape: tuple[int, int, int]
) -> np.ndarray:
    """Cut (C, *patch_shape) from (C, R, A, S) at `start`; 0 outside the scan."""
    inside = [
        slice(max(0, a), max(0, min(n, a + p)))
        for a, p, n in zip(start, patch_shape, array.shape[1:], strict=True)
    ]
    patch = np.zeros((array.shape[0], *patch_shape), array.dtype)
    target = [slice(part.start - a, part.stop - a) for part, a in zip(inside, start, strict=True)]
    patch[(slice(None), *target)] = array[(slice(None), *inside)]
    return patch


def sample_voxels(inside: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return at most `FOREGROUND_PER_LABEL` voxels of a mask: (n, 3) int16."""
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
        # The voxel lies in the inner half of the patch, so the network sees off-centre lesions too.
        start = [
            int(c) - int(rng.integers(p // 4, p - p // 4))
            for c, p in zip(centre, patch_shape, strict=True)
        ]
    else:
        start = [
            int(rng.integers(min(0, n - p), max(0, n - p) + 1))
            for n, p in zip(shape, patch_shape, strict=True)
        ]
    r, a, s = (_fit_start(x, n, p) for x, n, p in zip(start, shape, patch_shape, strict=True))
    return case, (r, a, s)


def _fit_start(start: int, n: int, patch: int) -> int:
    """Move a patch into the scan; centre it, as in inference, if the scan is smaller than it."""
    return int(np.clip(start, 0, n - patch)) if n >= patch else -((patch - n) // 2)

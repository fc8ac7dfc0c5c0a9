"""How good maps of evidence are: similarity of two maps, scores against a mask, simple maps."""

from __future__ import annotations

from typing import Any

import numpy as np

from volseg.evaluation.ranking import Ranking, weighted_average_precision

WINDOW = 7  # pixels along the edge in which two maps are compared, as Wang et al. (uniform window)
CENTRE_SD = 0.25  # of the Gaussian in the middle, as a fraction of each edge
SMALLEST = 1e-9  # evidence below it is rounding


def evidence(saliency: np.ndarray) -> np.ndarray:
    """Return what a map (H, W) shows: evidence for the class, 0 to 1; all 0 if there is none."""
    positive = np.maximum(saliency, 0).astype(np.float64)
    highest = positive.max(initial=0.0)
    return positive / highest if highest > SMALLEST else np.zeros_like(positive)


def map_similarity(one: np.ndarray, other: np.ndarray) -> float | None:
    """Return the structural similarity (SSIM) of two maps (H, W), -1 to 1; None if both are empty.

    Each pixel counts as much as both maps show there: flat zeros are alike in any two maps, and
    would make those of small objects look equal.

    Source: Wang et al., IEEE Trans Image Process 13:600 (2004), with a uniform window.
    """
    from skimage.metrics import structural_similarity

    one, other = evidence(one), evidence(other)
    weights = one + other
    if not weights.any():
        return None
    window = min(WINDOW, *(n - 1 + n % 2 for n in one.shape))
    result: Any = structural_similarity(one, other, win_size=window, data_range=1.0, full=True)
    return float((result[1] * weights).sum() / weights.sum())


def average_precision(saliency: np.ndarray, mask: np.ndarray) -> float | None:
    """Return the area under the precision-recall curve (AUPRC) of the pixels of a map.

    Args:
        saliency: (H, W) evidence; more is more likely to be in the mask.
        mask: (H, W) bool.

    Returns:
        None for a mask without pixels, or with all of them. The fraction of pixels in the mask is
        what a map without information reaches.
    """
    if not mask.any() or mask.all():
        return None
    ranking = Ranking.of(saliency.ravel())
    weights = np.ones((1, mask.size))
    return float(weighted_average_precision(ranking, mask.ravel(), weights)[0])


def pointing(saliency: np.ndarray, mask: np.ndarray) -> float | None:
    """Return whether the highest pixel of a map is in the mask, 0 or 1 (pointing game).

    Several highest pixels, as in a superpixel, give the fraction of them in the mask; an empty map
    points nowhere, which is the fraction of all pixels. None for a mask without pixels.

    Source: Zhang et al., Int J Comput Vis 126:1084 (2018), without a margin around the object.
    """
    if not mask.any():
        return None
    return float(mask[saliency == saliency.max()].mean())


def centre_map(shape: tuple[int, int]) -> np.ndarray:
    """Return a Gaussian in the middle of (H, W): what a map shows that knows nothing."""
    profiles = []
    for n in shape:
        offset = (np.arange(n) - (n - 1) / 2) / (CENTRE_SD * n)
        profiles.append(np.exp(-(offset**2) / 2))
    return np.outer(*profiles)


def intensity_map(image: np.ndarray) -> np.ndarray:
    """Return the brightness (H, W) of an image (C, H, W), 0 at its darkest."""
    grey = image.mean(axis=0, dtype=np.float64)
    return grey - grey.min()


# Simple maps beside which every method stands: name → map (H, W) of an image (C, H, W).
SIMPLE_MAPS = {
    "centre": lambda image: centre_map(image.shape[1:]),
    "intensity": intensity_map,
}

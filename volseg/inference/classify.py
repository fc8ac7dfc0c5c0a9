"""2D slices through a lesion, and its class probabilities from a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import ndimage

from volseg.inference.backend import Backend
from volseg.preprocessing.lesion_images import LesionView, cut_lesion
from volseg.recipe import Classify
from volseg.volume import BoundingBox, Volume


def lesion_slices(image: Volume, inside: np.ndarray, settings: Classify) -> np.ndarray:
    """Return three orthogonal slices through a lesion's centroid, at a fixed physical size.

    Args:
        image: the scan, original intensities on its own grid.
        inside: bool (I, J, K), the voxels of one lesion, at least one.

    Returns:
        (3, 2, pixels, pixels) float32 for the axial, coronal and sagittal slice: intensities
        windowed to [0, 1] (pixels outside the scan repeat its edge), and the fraction of each pixel
        covered by the lesion (0 outside the scan).
    """
    intensities, covered = cut_lesion(image, inside, _view(settings))
    windowed = np.clip((intensities - settings.low) / (settings.high - settings.low), 0, 1)
    return np.stack([windowed[:, 0], covered], axis=1).astype(np.float32)


def _view(settings: Classify) -> LesionView:
    return LesionView(field_of_view_mm=settings.field_of_view_mm, pixels=settings.pixels)


def classify_lesions(
    image: Volume, ids: np.ndarray, backend: Backend, settings: Classify, *, most: int = 0
) -> list[Mapping[str, float]]:
    """Return class name → probability for each lesion 1, 2, … of `ids`.

    It is the softmax of the logits averaged over the slices.

    Args:
        most: classify only this many lesions, the first; 0: all.
    """
    names = list(settings.classes)
    probabilities = []
    boxes = ndimage.find_objects(ids, max_label=min(most, int(ids.max())))
    for lesion, box in enumerate(boxes, start=1):
        near = _view(settings).box(BoundingBox.of(box), image.geometry)
        inside = ids[near.slices] == lesion
        logits = _mean_logits(image.crop(near), inside, backend, settings)
        probabilities.append(dict(zip(names, _softmax(logits).tolist(), strict=True)))
    return probabilities


def _mean_logits(
    image: Volume, inside: np.ndarray, backend: Backend, settings: Classify
) -> np.ndarray:
    """Return the mean logits over the slices and their mirrored copies (TTA)."""
    slices = lesion_slices(image, inside, settings)
    flips: Sequence[np.ndarray] = (
        slices,
        slices[..., ::-1],
        slices[..., ::-1, :],
        slices[..., ::-1, ::-1],
    )
    return backend.logits(np.ascontiguousarray(np.concatenate(flips))).mean(axis=0)


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponents = np.exp((logits - logits.max()).astype(np.float64))
    return exponents / exponents.sum()

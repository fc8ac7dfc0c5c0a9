"""2D slices through a lesion, and its class probabilities from a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import ndimage

from volseg.inference.backend import Backend
from volseg.preprocessing.planes import PLANES
from volseg.recipe import Classify
from volseg.volume import BoundingBox, Geometry, Volume


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
    mask = image.with_array(inside).canonical().array
    image = image.canonical()
    geometry = image.geometry
    centre = np.argwhere(mask).mean(axis=0)
    offsets_mm = (np.arange(settings.pixels) + 0.5) / settings.pixels * settings.field_of_view_mm
    offsets_mm = offsets_mm - settings.field_of_view_mm / 2
    size = (settings.pixels, settings.pixels)
    slices = np.empty((len(PLANES), 2, *size), np.float32)
    lesion = mask.astype(np.float32)
    for number, plane in enumerate(PLANES):
        points = np.broadcast_to(centre[:, None, None], (3, *size)).copy()
        for position, axis in enumerate((plane.across, plane.up)):
            offsets = offsets_mm / geometry.spacing_mm[axis]
            points[axis] += offsets[:, None] if position == 0 else offsets[None, :]
        sampled = ndimage.map_coordinates(image.array, points, np.float32, order=1, mode="nearest")
        values = image.intensities(sampled)
        slices[number, 0] = np.clip((values - settings.low) / (settings.high - settings.low), 0, 1)
        slices[number, 1] = ndimage.map_coordinates(
            lesion, points, np.float32, order=1, mode="constant"
        )
    return slices


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
        near = _neighbourhood(box, image.geometry, settings.field_of_view_mm)
        inside = ids[near.slices] == lesion
        logits = _mean_logits(image.crop(near), inside, backend, settings)
        probabilities.append(dict(zip(names, _softmax(logits).tolist(), strict=True)))
    return probabilities


def _neighbourhood(
    box: tuple[slice, ...], geometry: Geometry, field_of_view_mm: float
) -> BoundingBox:
    """Return the lesion's box, extended by all that a slice through its centroid can show."""
    margin = [int(np.ceil(field_of_view_mm / 2 / mm)) + 1 for mm in geometry.spacing_mm]
    return BoundingBox.of(box).widened(margin, geometry.shape)


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

"""2D slices through a lesion, and the class that a network reads from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import ndimage

from volseg.infer.backends import Backend
from volseg.preprocess.crop import AxisOrder, canonical_geometry, to_canonical
from volseg.recipe import Classify
from volseg.volume import BoundingBox, Volume

PLANES = (
    (0, 1),
    (0, 2),
    (1, 2),
)  # axial, coronal, sagittal: the canonical axes that span each slice


def lesion_slices(image: Volume, inside: np.ndarray, settings: Classify) -> np.ndarray:
    """Three orthogonal slices through a lesion's centroid, at a fixed physical size.

    Args:
        image: the scan, original intensities on its own grid.
        inside: bool (I, J, K), the voxels of one lesion, at least one.

    Returns:
        (3, 2, pixels, pixels) float32 for the axial, coronal and sagittal slice: intensities windowed to [0, 1] (voxels
        outside the scan repeat its edge) and the lesion's share of each pixel in [0, 1] (0 outside the scan).
    """
    order = AxisOrder.of(image.geometry)
    geometry = canonical_geometry(image.geometry, order)
    stored, mask = to_canonical(image.array, order), to_canonical(inside, order)
    centre = np.argwhere(mask).mean(axis=0)
    offsets_mm = (np.arange(settings.pixels) + 0.5) / settings.pixels * settings.field_of_view_mm
    offsets_mm = offsets_mm - settings.field_of_view_mm / 2
    slices = np.empty((len(PLANES), 2, settings.pixels, settings.pixels), np.float32)
    share = mask.astype(np.float32)
    for number, plane in enumerate(PLANES):
        points = np.broadcast_to(
            centre[:, None, None], (3, settings.pixels, settings.pixels)
        ).copy()
        for position, axis in enumerate(plane):
            along = offsets_mm / geometry.spacing_mm[axis]
            points[axis] += along[:, None] if position == 0 else along[None, :]
        values = image.intensities(
            ndimage.map_coordinates(stored, points, np.float32, order=1, mode="nearest")
        )
        slices[number, 0] = np.clip((values - settings.low) / (settings.high - settings.low), 0, 1)
        slices[number, 1] = ndimage.map_coordinates(
            share, points, np.float32, order=1, mode="constant"
        )
    return slices


def classify_lesions(
    image: Volume, ids: np.ndarray, backend: Backend, settings: Classify, *, most: int = 0
) -> list[Mapping[str, float]]:
    """Class name → probability for each of the lesions 1, 2, … of `ids`: softmax of the logits averaged over the slices.

    Args:
        most: of the lesions, the first; 0: all.
    """
    names = list(settings.classes)
    found = []
    for lesion, box in enumerate(
        ndimage.find_objects(ids, max_label=min(most, int(ids.max()))), start=1
    ):
        near = _neighbourhood(box, image, settings.field_of_view_mm)
        part = Volume(
            image.array[near.slices], image.geometry.crop(near), image.slope, image.intercept
        )
        logits = _mean_logits(part, ids[near.slices] == lesion, backend, settings)
        found.append(dict(zip(names, _softmax(logits).tolist(), strict=True)))
    return found


def _neighbourhood(box: tuple[slice, ...], image: Volume, field_of_view_mm: float) -> BoundingBox:
    """The lesion's box and all that a slice through its centroid can show; the rest of the scan need not be touched."""
    margin = [
        int(np.ceil(field_of_view_mm / 2 / spacing)) + 1 for spacing in image.geometry.spacing_mm
    ]
    start = [max(0, part.start - m) for part, m in zip(box, margin, strict=True)]
    stop = [
        min(n, part.stop + m) for part, m, n in zip(box, margin, image.geometry.shape, strict=True)
    ]
    return BoundingBox((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))


def _mean_logits(
    image: Volume, inside: np.ndarray, backend: Backend, settings: Classify
) -> np.ndarray:
    """Averaged over the slices and their mirrored copies: a lesion is as malignant seen from the other side."""
    slices = lesion_slices(image, inside, settings)
    views: Sequence[np.ndarray] = (
        slices,
        slices[..., ::-1],
        slices[..., ::-1, :],
        slices[..., ::-1, ::-1],
    )
    return backend.logits(np.ascontiguousarray(np.concatenate(views))).mean(axis=0)


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponents = np.exp((logits - logits.max()).astype(np.float64))
    return exponents / exponents.sum()

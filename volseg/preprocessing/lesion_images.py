"""2D images through a lesion, at a fixed physical size: the input of a classifier of lesions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from volseg.image import largest_of
from volseg.preprocessing.planes import PLANES, Plane
from volseg.recipe.images import Images
from volseg.recipe.section import closed
from volseg.volume import BoundingBox, Geometry, Volume


@dataclass(frozen=True, slots=True, kw_only=True)
class LesionView:
    """Which slices are cut through a lesion, square and centred on its centroid.

    Args:
        field_of_view_mm: edge of a slice.
        pixels: along an edge.
        neighbours: parallel slices on either side, `neighbour_mm` from one to the next.
    """

    field_of_view_mm: float
    pixels: int
    planes: Sequence[Plane] = PLANES
    neighbours: int = 0
    neighbour_mm: float = 0.0

    @classmethod
    def of(cls, settings: Images) -> LesionView:
        """Return the view that a recipe states."""
        return cls(
            field_of_view_mm=settings.field_of_view_mm,
            pixels=closed(settings.pixels),
            planes=[plane for plane in PLANES if plane.name in settings.planes],
            neighbours=settings.neighbours,
            neighbour_mm=settings.neighbour_mm,
        )

    def box(self, lesion: BoundingBox, geometry: Geometry) -> BoundingBox:
        """Return the lesion's box, extended by all that the slices can show."""
        reach_mm = max(self.field_of_view_mm / 2, self.neighbours * self.neighbour_mm)
        margin = [int(np.ceil(reach_mm / mm)) + 1 for mm in geometry.spacing_mm]
        return lesion.widened(margin, geometry.shape)


def lesion_input(image: Volume, inside: np.ndarray, settings: Images) -> np.ndarray:
    """Return the network's input of one lesion, an image per plane.

    Args:
        image: the scan, original intensities on its own grid.
        inside: bool (I, J, K), the voxels of the lesion, at least one.
        settings: closed, without "auto".

    Returns:
        (planes, C, pixels, pixels) float32. The channels are the slices from the feet, the back or
        the left on, all planes normalised together; last, with `mask_channel`, the fraction of
        each pixel of the middle slice that is lesion.

    Raises:
        VolsegError: `normalise` needs to know what white is, and the scan does not say.
    """
    intensities, covered = cut_lesion(image, inside, LesionView.of(settings))
    normaliser = closed(settings.normalise)
    scaled = normaliser.fit(intensities, white_of(image))(intensities)
    channels = np.stack([normaliser.standardise(plane) for plane in scaled])
    if not settings.mask_channel:
        return channels
    return np.concatenate([channels, covered[:, None]], axis=1)


def white_of(scan: Volume) -> float | None:
    """Return the intensity that is white; None if the scan does not say, as for HU."""
    return None if scan.is_scaled else largest_of(scan.array.dtype)


def cut_lesion(
    image: Volume, inside: np.ndarray, view: LesionView
) -> tuple[np.ndarray, np.ndarray]:
    """Cut slices through a lesion's centroid, linearly interpolated.

    Args:
        image: the scan, original intensities on its own grid.
        inside: bool (I, J, K), the voxels of the lesion, at least one.

    Returns:
        Intensities (planes, slices, pixels, pixels) float32, where pixels outside the scan repeat
        its edge; the fraction of each pixel of the middle slices that the lesion covers (planes,
        pixels, pixels) float32, 0 outside the scan.
    """
    mask = image.with_array(inside).canonical().array
    image = image.canonical()
    spacing_mm = image.geometry.spacing_mm
    centre = np.argwhere(mask).mean(axis=0)
    lesion = mask.astype(np.float32)
    intensities, covered = [], []
    for plane in view.planes:
        points = _points(centre, plane, spacing_mm, view)
        sampled = ndimage.map_coordinates(image.array, points, np.float32, order=1, mode="nearest")
        intensities.append(image.intensities(sampled))
        middle = points[:, view.neighbours]
        covered.append(ndimage.map_coordinates(lesion, middle, np.float32, order=1))
    return np.stack(intensities).astype(np.float32), np.stack(covered)


def _points(
    centre: np.ndarray, plane: Plane, spacing_mm: Sequence[float], view: LesionView
) -> np.ndarray:
    """Return the indices (3, slices, pixels across, pixels up) of the pixels of parallel slices."""
    pixels = view.pixels
    edge_mm = (np.arange(pixels) + 0.5) / pixels * view.field_of_view_mm - view.field_of_view_mm / 2
    steps_mm = np.arange(-view.neighbours, view.neighbours + 1) * view.neighbour_mm
    shape = (3, len(steps_mm), pixels, pixels)
    points = np.broadcast_to(centre[:, None, None, None], shape).copy()
    points[plane.across] += (edge_mm / spacing_mm[plane.across])[None, :, None]
    points[plane.up] += (edge_mm / spacing_mm[plane.up])[None, None, :]
    points[plane.through] += (steps_mm / spacing_mm[plane.through])[:, None, None]
    return points

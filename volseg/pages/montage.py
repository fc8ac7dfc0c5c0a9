"""A small picture of a scan: three planes through a lesion side by side, as JPEG."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from volseg.pages.marks import LETTER_COLOUR, Point, lesion_colour
from volseg.pages.preview import grey_bytes
from volseg.pages.windows import Window
from volseg.preprocessing.planes import PLANES, Plane
from volseg.volume import Geometry, Volume

# Field of view: the minimum, and the multiple of the lesion's extent.
MIN_FIELD_MM, FIELD_EXTENTS = 50.0, 2.2
SCALE_BARS_MM = (1, 2, 5, 10, 20, 50, 100, 200)


@dataclass(frozen=True, slots=True, eq=False)
class _Field:
    """A square field of view of a grid along R, A and S, in `pixels` of each plane."""

    grid: Geometry
    centre: np.ndarray  # (3,) index
    size_mm: float
    pixels: int

    @classmethod
    def around(
        cls, grid: Geometry, point_mm: Point | None, extent_mm: float, pixels: int
    ) -> _Field:
        largest_mm = float((np.array(grid.shape) * grid.spacing_mm).max())
        if point_mm is None:
            return cls(grid, (np.array(grid.shape) - 1) / 2, largest_mm, pixels)
        size_mm = min(largest_mm, max(MIN_FIELD_MM, FIELD_EXTENTS * extent_mm))
        return cls(grid, grid.to_index(np.array([point_mm]))[0], size_mm, pixels)

    def along(self, axis: int) -> np.ndarray:
        """Return the index (fractional) of each pixel; it decreases to the right and downwards."""
        offsets_mm = ((self.pixels - 1) / 2 - np.arange(self.pixels)) * self.size_mm / self.pixels
        return self.centre[axis] + offsets_mm / self.grid.spacing_mm[axis]

    def slice_of(self, plane: Plane, array: np.ndarray) -> np.ndarray:
        last = self.grid.shape[plane.through] - 1
        return plane.slice_of(array, int(np.clip(round(self.centre[plane.through]), 0, last)))

    def outside(self, plane: Plane) -> np.ndarray:
        """Return which pixels (row, column) lie outside the scan."""
        return self._is_beyond(plane.up)[:, None] | self._is_beyond(plane.across)

    def _is_beyond(self, axis: int) -> np.ndarray:
        along = self.along(axis)
        return (along < -0.5) | (along > self.grid.shape[axis] - 0.5)


def montage_jpeg(
    scan: Volume,
    ids: np.ndarray,
    *,
    window: Window,
    point_mm: Point | None,
    extent_mm: float,
    pixels: int = 256,
) -> bytes:
    """Draw axial, coronal and sagittal slices through a point side by side, as JPEG.

    Lesions are outlined and each slice has a scale bar. Radiological convention: the patient's
    right and front are on the left.

    Args:
        ids: (I, J, K) lesion ids on the scan's grid.
        point_mm: RAS mm; None shows the whole scan through its middle.
        extent_mm: size of the lesion; the field of view is 2.2 times that, at least 50 mm.
        pixels: edge length of each of the three pictures.
    """
    ids = scan.with_array(ids).canonical().array
    scan = scan.canonical()
    field = _Field.around(scan.geometry, point_mm, extent_mm, pixels)
    canvas = Image.new("RGB", (len(PLANES) * pixels, pixels))
    for place, plane in enumerate(PLANES):
        picture = _plane_picture(scan, ids, plane, field, window)
        canvas.paste(Image.fromarray(picture), (place * pixels, 0))
        _label(ImageDraw.Draw(canvas), place * pixels, plane, field)
    return _jpeg(canvas, 88)


def _plane_picture(
    scan: Volume, ids: np.ndarray, plane: Plane, field: _Field, window: Window
) -> np.ndarray:
    """Return a plane in grey, with outlined lesions: (pixels, pixels, 3) uint8."""
    points = np.meshgrid(field.along(plane.across), field.along(plane.up), indexing="ij")
    stored = field.slice_of(plane, scan.array).astype(np.float32)
    values = np.asarray(scan.intensities(stored), np.float32)
    grey = ndimage.map_coordinates(values, points, order=1, mode="nearest").T
    grey[field.outside(plane)] = window[0]
    numbers = field.slice_of(plane, ids)
    numbers = ndimage.map_coordinates(numbers, points, order=0, mode="constant", cval=0).T
    scaled = grey_bytes((grey - window[0]) / (window[1] - window[0]) * 255)
    picture = np.repeat(scaled[:, :, None], 3, axis=2)
    edge = _edges(numbers)
    for number in np.unique(numbers[edge]):
        picture[edge & (numbers == number)] = lesion_colour(int(number))
    return picture


def _edges(numbers: np.ndarray) -> np.ndarray:
    """Return which pixels of (H, W) lesion ids are lesion and have a neighbour with another id."""
    padded = np.pad(numbers, 1)
    inner = (slice(1, -1), slice(1, -1))
    different = [
        np.roll(padded, shift, axis)[inner] != numbers for axis in (0, 1) for shift in (-1, 1)
    ]
    return (numbers > 0) & np.logical_or.reduce(different)


def _label(draw: ImageDraw.ImageDraw, start: int, plane: Plane, field: _Field) -> None:
    """Draw the orientation letters, the scale bar and the border of the plane at column `start`."""
    pixels = field.pixels
    # Large enough to be legible in the smaller copies of report.html.
    font = ImageFont.load_default(max(10, pixels // 11))
    style: dict[str, Any] = {"font": font, "stroke_width": 1, "stroke_fill": "black"}
    left, right = plane.letters
    draw.text((start + 4, pixels // 2), left, fill=LETTER_COLOUR, anchor="lm", **style)
    draw.text((start + pixels - 5, pixels // 2), right, fill=LETTER_COLOUR, anchor="rm", **style)
    third_mm = field.size_mm / 3
    bar_mm = max([bar for bar in SCALE_BARS_MM if bar <= third_mm], default=third_mm)
    length = bar_mm / field.size_mm * pixels
    top = pixels - 8 - max(2, pixels // 50)
    bar = (start + 8, top, start + 8 + length, pixels - 8)
    draw.rectangle(bar, fill="white", outline="black")
    draw.text((start + 8, top - 3), f"{bar_mm:g} mm", fill="white", anchor="ls", **style)
    if start:
        draw.line((start, 0, start, pixels), fill="#444")


def smaller_jpeg(montage: bytes, pixels: int) -> bytes:
    """Shrink a montage so that each of its pictures has `pixels` along its edge."""
    with Image.open(io.BytesIO(montage)) as picture:
        height = min(pixels, picture.height)
        size = (round(picture.width * height / picture.height), height)
        return _jpeg(picture.resize(size, Image.Resampling.LANCZOS), 75)


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    try:
        picture.save(buffer, format="JPEG", quality=quality, subsampling=0, optimize=True)
    except OSError:  # noise needs more than Pillow's buffer for optimised files
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()

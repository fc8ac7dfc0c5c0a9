"""A 2D image → the square float32 input of a classifier."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy import sparse

from volseg.image import Image2D
from volseg.recipe.images import Images
from volseg.recipe.section import closed

LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601, as JPEG and Pillow


def to_input(image: Image2D, settings: Images) -> np.ndarray:
    """Return the network's input of an image: channels, size, then normalisation.

    Args:
        settings: closed, without "auto".

    Returns:
        (C, pixels, pixels) float32. Margins have the darkest intensity of the image, and do not
        count in its normalisation.

    Raises:
        VolsegError: `normalise` needs to know what white is, and the file does not say.
    """
    n_channels, normaliser = closed(settings.channels), closed(settings.normalise)
    # Grey is repeated at the end: three equal channels need not be resized.
    array = to_channels(image.array, min(len(image.array), n_channels))
    fitted = fit_square(array, closed(settings.pixels), settings.fit)
    scaled = to_channels(normaliser.fit(fitted, image.largest)(fitted), n_channels)
    return with_margins(normaliser.standardise(scaled), closed(settings.pixels))


def to_channels(array: np.ndarray, n_channels: int) -> np.ndarray:
    """Return (n_channels, H, W) float32 of (1 or 3, H, W): grey repeated, colour to luminance."""
    array = array.astype(np.float32, copy=False)
    if len(array) == n_channels:
        return array
    if n_channels == 1:
        return np.tensordot(np.array(LUMINANCE, np.float32), array, axes=1)[None]
    return np.repeat(array, n_channels, axis=0)


def fit_square(array: np.ndarray, pixels: int, fit: str) -> np.ndarray:
    """Return (C, H, W) at the size that it has within a square of `pixels`.

    Args:
        fit: `pad` shrinks or enlarges until the longer side fits; `crop` takes the square in the
            middle; `stretch` changes the aspect.
    """
    low, high = array.min(axis=(1, 2), keepdims=True), array.max(axis=(1, 2), keepdims=True)
    if fit == "crop":
        array = _middle_square(array)
    height, width = array.shape[1:]
    shape = fitted_shape((height, width), pixels, fit)
    # Rounding would leave noise in a constant image, and a z-score would enlarge it.
    return np.clip(resize(array, shape), low, high)


def with_margins(array: np.ndarray, pixels: int) -> np.ndarray:
    """Return (C, pixels, pixels) with (C, H, W) in the middle; margins are each channel's lowest.

    With differences of an even number of pixels the margins are equal, as `fit_square` makes them.
    """
    height, width = array.shape[1:]
    if height == width == pixels:
        return array
    lowest = array.min(axis=(1, 2), keepdims=True)
    square = np.broadcast_to(lowest, (len(array), pixels, pixels)).copy()
    top, left = (pixels - height) // 2, (pixels - width) // 2
    square[:, top : top + height, left : left + width] = array
    return square


def to_pixels(saliency: np.ndarray, shape: tuple[int, int], fit: str) -> np.ndarray:
    """Return a map of the network's input on the pixels of its image; undoes size and margins.

    Args:
        saliency: (pixels, pixels) float32, such as evidence for a class.
        shape: (H, W) of the image.
        fit: as in `fit_square`.

    Returns:
        (H, W) float32; 0 where `crop` cut pixels off, which the network never saw.
    """
    inner = fitted_shape(shape, len(saliency), fit)
    top, left = ((len(saliency) - n) // 2 for n in inner)
    content = saliency[None, top : top + inner[0], left : left + inner[1]]
    if fit != "crop":
        return resize(content, shape)[0]
    full = np.zeros((1, *shape), np.float32)
    square = _middle_square(full)  # a view
    square[:] = resize(content, square.shape[1:])
    return full[0]


def fitted_shape(shape: tuple[int, int], pixels: int, fit: str) -> tuple[int, int]:
    """Return the size (H, W) that an image of (H, W) has within a square of `pixels`."""
    if fit != "pad":
        return (pixels, pixels)
    height, width = shape
    scale = pixels / max(height, width)
    return (_even_rest(height * scale, pixels), _even_rest(width * scale, pixels))


def _even_rest(size: float, pixels: int) -> int:
    """Return the whole number nearest to a size that leaves equal margins on both sides."""
    margin = round((pixels - size) / 2)
    return pixels - 2 * min(margin, (pixels - 1) // 2)


def _middle_square(array: np.ndarray) -> np.ndarray:
    """Return the middle of (C, H, W), square within one pixel, with equal parts cut off."""
    height, width = array.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return array[:, top : height - top, left : width - left]


# ---- size


def resize(array: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Resize (C, H, W) float32: area averages along an axis that shrinks, else linear.

    Areas keep the mean, and see every pixel of the image; linear interpolation alone would skip
    some, which turns fine structure into noise (aliasing).
    """
    for axis, n_out in enumerate(shape, start=1):
        n_in = array.shape[axis]
        if n_in != n_out:
            rows = np.moveaxis(array, axis, 0)
            resized = axis_weights(n_in, n_out) @ rows.reshape(n_in, -1)
            array = np.moveaxis(resized.reshape(n_out, *rows.shape[1:]), 0, axis)
    return np.ascontiguousarray(array)


@lru_cache(maxsize=64)
def axis_weights(n_in: int, n_out: int) -> sparse.csr_array:
    """Return (n_out, n_in) float32: the weight of each pixel of a line in each resized one."""
    if n_out < n_in:
        # Cut the line at the edges of both grids; every piece lies in one pixel of either.
        cuts = np.unique(np.concatenate([np.arange(n_in), np.arange(n_out + 1) * n_in / n_out]))
        middles = (cuts[1:] + cuts[:-1]) / 2
        rows = np.minimum((middles * n_out / n_in).astype(int), n_out - 1)
        columns = np.minimum(middles.astype(int), n_in - 1)
        weights = np.diff(cuts) * n_out / n_in
    else:
        centres = np.clip((np.arange(n_out) + 0.5) * n_in / n_out - 0.5, 0, n_in - 1)
        before = centres.astype(int)
        after = np.minimum(before + 1, n_in - 1)
        rows = np.tile(np.arange(n_out), 2)
        columns = np.concatenate([before, after])
        weights = np.concatenate([before + 1 - centres, centres - before])
    entries = (weights.astype(np.float32), (rows, columns))
    return sparse.csr_array(sparse.coo_array(entries, shape=(n_out, n_in)))

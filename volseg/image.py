"""A 2D image, wherever it came from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class Image2D:
    """An image as a reader sees it: the first row is its top, the first column its left.

    Args:
        array: (C, H, W), 1 or 3 channels, in the stored dtype; float32 if the file scales it.
        largest: what white is, such as 255 or 65535; None if the file does not say, as for HU.
        spacing_mm: of pixel centres, downwards and across; None if unknown.
    """

    array: np.ndarray
    largest: float | None
    spacing_mm: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.array.ndim != 3 or self.array.shape[0] not in (1, 3) or not self.array.size:
            raise ValueError(f"an image has shape (1 or 3, H, W), got {self.array.shape}")


def largest_of(dtype: np.dtype) -> float | None:
    """Return what white is in an unsigned dtype; None in others, which have no such convention.

    >>> largest_of(np.dtype("uint16")), largest_of(np.dtype("int16"))
    (65535.0, None)
    """
    return float(np.iinfo(dtype).max) if dtype.kind == "u" and dtype.itemsize <= 2 else None

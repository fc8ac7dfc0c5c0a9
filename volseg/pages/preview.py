"""Shrink a scan until it fits into a page: windowed to 8 bits, cropped and downsampled."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from isal import igzip
from scipy import ndimage

from volseg.io.volumes import volume_bytes
from volseg.pages.blocks import Blocks, Factors, Slices, block_ids, block_means, count_ids
from volseg.pages.windows import CT_RANGE_HU, REACH_MM, SOFT_TISSUE_HU, Window, scan_window
from volseg.preprocessing.crop import body_threshold
from volseg.volume import BoundingBox, Geometry, Volume, slowest_axis

MAX_SPACING_MM = 2.0  # coarsest spacing before more of the scan is cropped
CONTEXT_MM, LITTLE_CONTEXT_MM = 50.0, 15.0  # around the lesions; if space is short
BODY_ABOVE_HU, BODY_MARGIN_MM = -500.0, 5.0
MAX_VOXELS = 12_000_000  # per preview: what a browser without a GPU can still draw
# Lesions: their colours are one row of a texture, and 8192 pixels is WebGL 2's limit in practice.
MAX_DRAWN = 8191
WINDOW_LESIONS = 5  # the largest, which the window shows
# Fraction of the window's width stored on either side, so that the reader can change the window.
BEYOND_WINDOW = 0.25
SAMPLE_SLABS = 8  # for estimates
MIN_VOXELS = 4  # along each axis, if the scan has as many


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Preview:
    """A downsampled scan and its lesions on a common grid whose axes point to R, A and S.

    Args:
        image: uint8 block means; slope and intercept convert them to intensities.
        ids: lesion ids, uint8 or uint16.
        packed_image, packed_ids: both as the bytes of a `.nii.gz`.
        window: (low, high) intensities shown as black and white.
        part: the shown part of the scan, in words.
        factors: size in voxels of a block along R, A and S.
        stored_range: (low, high) intensities that the levels 0 and 255 stand for.
        not_drawn: how many lesions have no voxel in `ids`: too small, or not of the 8191 largest.
    """

    image: Volume
    ids: Volume
    packed_image: bytes
    packed_ids: bytes
    window: Window
    stored_range: Window
    part: str
    factors: Factors
    not_drawn: int


def make_preview(scan: Volume, ids: np.ndarray, *, unit: str, max_bytes: int) -> Preview:
    """Return the largest and finest preview of a scan whose compressed bytes fit.

    The first of these that fits is used:
    1. the body and 50 mm around the lesions, at full resolution;
    2. 50 mm around the lesions, at full resolution or downsampled up to 2 mm;
    3. 15 mm around the lesions, likewise;
    4. 15 mm around the lesions, downsampled further.
    Without lesions, 2 to 4 show the body. Downsampling averages blocks of whole voxels, so axes
    with larger spacings keep theirs. All 48 axis orders give the same preview.

    Args:
        ids: (I, J, K) lesion ids on the scan's grid; 0 elsewhere.
        unit: of the intensities, such as `HU`.
        max_bytes: limit for image and ids together, compressed.

    Memory: slabs of the scan beside the preview; the scan is not copied.
    """
    source = _Source.of(scan, ids, unit)
    best = None
    for part, blocks in _candidates(source):
        if blocks.size > MAX_VOXELS or source.predicted_bytes(blocks) > max_bytes * 1.1:
            continue
        best = None  # frees its memory before the next one is made
        best = source.preview(part, blocks)
        if len(best.packed_image) + len(best.packed_ids) <= max_bytes:
            break
    assert best is not None, "a candidate of a few blocks always fits"
    return best


def picture_window(scan: Volume, ids: np.ndarray, *, unit: str) -> Window:
    """Return the window of all pictures of a scan: that of its preview.

    Args:
        ids: (I, J, K) lesion ids on the scan's grid. unit: of the intensities.
    """
    return _Source.of(scan, ids, unit).window


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Source:
    """Views of a scan and its lesions along R, A and S, without a copy."""

    scan: Volume
    ids: np.ndarray
    lesions: BoundingBox | None
    body: BoundingBox
    window: Window
    stored_range: Window  # intensities that become 0 and 255

    @classmethod
    def of(cls, scan: Volume, ids: np.ndarray, unit: str) -> _Source:
        ids = scan.with_array(ids).canonical().array
        scan = scan.canonical()
        grid, lesions, body = scan.geometry, BoundingBox.around(ids), _body(scan, unit)
        boxes = []
        if lesions is not None:
            body = body.hull(_widened(lesions, grid, CONTEXT_MM))
            part = ids[lesions.slices]
            for slices in ndimage.find_objects(part, max_label=WINDOW_LESIONS):
                if slices is not None:
                    box = BoundingBox.of(slices).shifted(lesions.start)
                    boxes.append(_widened(box, grid, REACH_MM))
        window = scan_window(scan, ids, boxes, body, unit=unit)
        beyond = (window[1] - window[0]) * BEYOND_WINDOW
        low, high = window[0] - beyond, window[1] + beyond
        if unit == "HU":
            low, high = min(low, SOFT_TISSUE_HU[0]), max(high, SOFT_TISSUE_HU[1])
            low, high = max(low, CT_RANGE_HU[0]), min(high, CT_RANGE_HU[1])
        return cls(
            scan=scan, ids=ids, lesions=lesions, body=body, window=window, stored_range=(low, high)
        )

    def predicted_bytes(self, blocks: Blocks) -> float:
        """Estimate the compressed size from a few slabs."""
        slow = slowest_axis(self.scan.array)
        n = blocks.shape[slow]
        indices = np.unique(np.linspace(0, n - 1, min(n, SAMPLE_SLABS)).astype(int))
        size = 0
        for index in indices.tolist():
            part = list(blocks.box.slices)
            part[slow] = blocks.along(slow, index)
            grey = self._grey((part[0], part[1], part[2]), blocks.factors)
            size += len(igzip.compress(grey.tobytes("F"), 3))
        return size * n / len(indices)

    def preview(self, part: str, blocks: Blocks) -> Preview:
        array = np.empty(blocks.shape, np.uint8, order="F")
        for scan_part, at in blocks.slabs(self.scan.array):
            array[at] = self._grey(scan_part, blocks.factors)
        n_ids = 0 if self.lesions is None else int(self.ids[self.lesions.slices].max())
        drawn = min(n_ids, MAX_DRAWN)
        ids = block_ids(self.ids, blocks, drawn)
        low, high = self.stored_range
        slope = np.float32((high - low) / 255)  # a NIfTI header stores float32
        geometry = blocks.geometry(self.scan.geometry)
        image = Volume(array, geometry, float(slope), float(np.float32(low)))
        lesions = Volume(ids, geometry)
        return Preview(
            image=image,
            ids=lesions,
            packed_image=volume_bytes(image),
            packed_ids=volume_bytes(lesions),
            window=self.window,
            stored_range=self.stored_range,
            part=part,
            factors=blocks.factors,
            not_drawn=n_ids - int(np.count_nonzero(count_ids(ids, drawn)[1:])),
        )

    def _grey(self, part: Slices, factors: Factors) -> np.ndarray:
        low, high = self.stored_range
        means = block_means(self.scan.array[part], factors)
        values = means * self.scan.slope + self.scan.intercept
        return grey_bytes((values - low) * (255 / (high - low)))


def grey_bytes(values: np.ndarray) -> np.ndarray:
    """Round and clip values to uint8, in place of NaN 0 (black); may change the values."""
    return np.rint(np.clip(np.nan_to_num(values, copy=False, nan=0.0), 0, 255)).astype(np.uint8)


def _body(scan: Volume, unit: str) -> BoundingBox:
    """Return the box of the body and a margin; the whole scan if it shows no body."""
    threshold = BODY_ABOVE_HU
    if unit != "HU":
        threshold = body_threshold(scan.array, scan.slope, scan.intercept)
    body = BoundingBox.where(
        lambda part: scan.intensities(scan.array[part]) > threshold, scan.array
    )
    if body is None:
        return BoundingBox.whole(scan.geometry.shape)
    return _widened(body, scan.geometry, BODY_MARGIN_MM)


def _candidates(source: _Source) -> Iterator[tuple[str, Blocks]]:
    """Yield (part in words, blocks) of previews to try, the best first."""
    grid = source.scan.geometry
    full: Factors = (1, 1, 1)
    is_whole = source.body.shape == grid.shape
    parts = [("the whole scan" if is_whole else "the body", source.body)]
    yield parts[0][0], Blocks(source.body, full)
    if source.lesions is not None:
        parts = [
            (f"the lesions and {mm:g} mm around them", _widened(source.lesions, grid, mm))
            for mm in (CONTEXT_MM, LITTLE_CONTEXT_MM)
        ]
    steps = {
        spacing * n
        for spacing in grid.spacing_mm
        for n in range(1, math.floor(MAX_SPACING_MM / spacing) + 1)
    }
    for name, box in parts:
        fine = {_factors(grid.spacing_mm, step, box) for step in steps}
        for factors in sorted({full, *fine}, key=math.prod):
            yield name, Blocks(box, factors)
    name, box = parts[-1]
    coarsest_mm = MAX_SPACING_MM
    while True:
        coarsest_mm *= 1.25
        blocks = Blocks(box, _factors(grid.spacing_mm, coarsest_mm, box))
        yield name, blocks
        if max(blocks.shape) <= 2 * MIN_VOXELS:
            return


def _factors(spacing_mm: Sequence[float], max_mm: float, box: BoundingBox) -> Factors:
    """Return the largest factors with block spacings ≤ `max_mm` and ≥ 4 blocks along each axis."""
    r, a, s = (
        max(1, min(math.floor(max_mm / spacing + 1e-6), n // MIN_VOXELS))
        for spacing, n in zip(spacing_mm, box.shape)
    )
    return r, a, s


def _widened(box: BoundingBox, grid: Geometry, margin_mm: float) -> BoundingBox:
    margin = [math.ceil(margin_mm / spacing) for spacing in grid.spacing_mm]
    return box.widened(margin, grid.shape)

"""Shrink a scan until it fits into a page: windowed to 8 bits, cropped and downsampled."""

from __future__ import annotations

import colorsys
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from isal import igzip
from scipy import ndimage

from volseg.inputs import parse_json
from volseg.io.nifti import volume_bytes
from volseg.measurement.rows import LesionMeasurement
from volseg.preprocessing.crop import (
    AxisOrder,
    body_threshold,
    box_where,
    canonical_geometry,
    to_canonical,
)
from volseg.volume import BoundingBox, Geometry, Volume

Factors = tuple[int, int, int]  # size in voxels of a downsampling block along R, A and S
Colour = tuple[int, int, int]  # red, green, blue from 0 to 255

MAX_SPACING_MM = 2.0  # coarsest spacing before more of the scan is cropped
CONTEXT_MM, LITTLE_CONTEXT_MM = 50.0, 15.0  # around the lesions; if space is short
BODY_ABOVE_HU, BODY_MARGIN_MM = -500.0, 5.0
AIR_HU = -950.0  # below the HU of lung, above those of the air around a patient
MAX_VOXELS = 12_000_000  # per preview: what a browser without a GPU can still draw
# Lesions: their colours are one row of a texture, and 8192 pixels is WebGL 2's limit in practice.
MAX_DRAWN = 8191
WINDOW_REACH_MM, WINDOW_LESIONS = 15.0, 5
MIN_WINDOW_HU, CT_RANGE_HU = 200.0, (-1024.0, 3071.0)
# Fraction of the window's width stored on either side, so that the reader can change the window.
BEYOND_WINDOW = 0.25
SAMPLE_SLABS, SAMPLE_VOXELS = 8, 1_000_000  # for estimates
PIECE_VOXELS = 1_000_000  # processed together; bounds the temporary arrays
MIN_VOXELS = 4  # along each axis, if the scan has as many
# Axes across, up and through the plane; letters at the left and right.
MONTAGE_PLANES = ((0, 1, 2, "R", "L"), (0, 2, 1, "R", "L"), (1, 2, 0, "A", "P"))
# Field of view of the montage: the minimum, and the multiple of the lesion's extent.
MIN_FIELD_MM, FIELD_EXTENTS = 50.0, 2.2
SCALE_BARS_MM = (1, 2, 5, 10, 20, 50, 100, 200)


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
        not_drawn: how many lesions have no voxel in `ids`: too small, or not of the 8191 largest.
    """

    image: Volume
    ids: Volume
    packed_image: bytes
    packed_ids: bytes
    window: tuple[float, float]
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
    for part, box, factors in _candidates(source):
        if math.prod(_blocks(box, factors)) > MAX_VOXELS:
            continue
        if source.predicted_bytes(box, factors) > max_bytes * 1.1:
            continue
        best = None  # frees its memory before the next one is made
        best = source.preview(part, box, factors)
        if len(best.packed_image) + len(best.packed_ids) <= max_bytes:
            break
    assert best is not None, "a candidate of a few blocks always fits"
    return best


def lesion_points(
    preview: Preview, lesions: Sequence[LesionMeasurement]
) -> dict[int, tuple[float, float, float]]:
    """Return a point in RAS mm for each drawn lesion, by lesion id.

    The point is a voxel of the lesion in the slice of its long axis, nearest to the axis' middle.
    Without a long axis it is the voxel nearest to the centroid.
    """
    point_mm = {}
    boxes = ndimage.find_objects(preview.ids.array)
    for lesion in lesions:
        number = lesion.lesion_id
        box = boxes[number - 1] if number <= len(boxes) else None
        if box is None:
            continue
        ends = [point_of(lesion.long_axis_p0_ras), point_of(lesion.long_axis_p1_ras)]
        if math.prod(part.stop - part.start for part in box) > PIECE_VOXELS:
            box = _one_slice(preview, number, box, ends)
        voxels = np.argwhere(preview.ids.array[box] == number) + [part.start for part in box]
        centroid = [getattr(lesion, f"centroid_{axis}_mm") for axis in "ras"]
        if ends[0] is not None and ends[1] is not None:
            aim = (np.array(ends[0]) + ends[1]) / 2
            depth = round(float(preview.ids.geometry.to_index(aim[None])[0, 2]))
            in_slice = voxels[voxels[:, 2] == depth]
            voxels = in_slice if len(in_slice) else voxels
        elif None not in centroid:
            aim = np.array(centroid, float)
        else:
            aim = preview.ids.geometry.to_world_mm(voxels).mean(axis=0)
        points = preview.ids.geometry.to_world_mm(voxels)
        r, a, s = points[np.argmin(((points - aim) ** 2).sum(axis=1))].tolist()
        point_mm[number] = (r, a, s)
    return point_mm


def _one_slice(
    preview: Preview,
    number: int,
    box: tuple[slice, ...],
    ends: Sequence[tuple[float, float, float] | None],
) -> tuple[slice, ...]:
    """Return the slice of a large lesion's box that is nearest to its long axis."""
    start, stop = box[2].start, box[2].stop
    aim = (start + stop) // 2
    if ends[0] is not None and ends[1] is not None:
        middle = (np.array(ends[0]) + ends[1]) / 2
        aim = round(float(preview.ids.geometry.to_index(middle[None])[0, 2]))
    slices = sorted(range(start, stop), key=lambda k: abs(k - aim))
    k = next(k for k in slices if (preview.ids.array[(*box[:2], k)] == number).any())
    return (*box[:2], slice(k, k + 1))


def point_of(text: str | None) -> tuple[float, float, float] | None:
    """Parse `[R, A, S]` in mm, as the tables write a point; return None if it is invalid."""
    try:
        r, a, s = (float(part) for part in parse_json(text or ""))
    except (TypeError, ValueError):
        return None
    return (r, a, s) if all(map(math.isfinite, (r, a, s))) else None


def lesion_colour(number: int) -> Colour:
    """Return a colour; hues in steps of the golden angle make neighbouring numbers differ."""
    red, green, blue = colorsys.hsv_to_rgb(
        (0.04 + (number - 1) * 0.381966) % 1, 0.85 if number % 2 else 0.6, 1.0
    )
    return round(red * 255), round(green * 255), round(blue * 255)


def montage_jpeg(
    scan: Volume,
    ids: np.ndarray,
    *,
    window: tuple[float, float],
    point_mm: tuple[float, float, float] | None,
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
    from PIL import Image, ImageDraw, ImageFont

    order = AxisOrder.of(scan.geometry)
    geometry = canonical_geometry(scan.geometry, order)
    stored, numbers = to_canonical(scan.array, order), to_canonical(ids, order)
    extents_mm = np.array(geometry.shape) * geometry.spacing_mm
    if point_mm is None:
        centre, field_mm = (np.array(geometry.shape) - 1) / 2, float(extents_mm.max())
    else:
        centre = geometry.to_index(np.array([point_mm]))[0]
        field_mm = min(float(extents_mm.max()), max(MIN_FIELD_MM, FIELD_EXTENTS * extent_mm))
    bar_mm = max([bar for bar in SCALE_BARS_MM if bar <= field_mm / 3], default=field_mm / 3)
    canvas = Image.new("RGB", (3 * pixels, pixels))
    draw = ImageDraw.Draw(canvas)
    # Large enough to be legible in the smaller copies of report.html.
    font = ImageFont.load_default(max(10, pixels // 11))
    # Indices decrease to the right and downwards.
    offsets_mm = ((pixels - 1) / 2 - np.arange(pixels)) * field_mm / pixels
    style = {"font": font, "stroke_width": 1, "stroke_fill": "black"}
    for place, (across, up, through, left, right) in enumerate(MONTAGE_PLANES):
        depth = int(np.clip(round(centre[through]), 0, geometry.shape[through] - 1))
        rows = centre[up] + offsets_mm / geometry.spacing_mm[up]
        columns = centre[across] + offsets_mm / geometry.spacing_mm[across]
        points = np.meshgrid(columns, rows, indexing="ij")
        values = scan.intensities(_slice(stored, through, depth).astype(np.float32))
        values = np.asarray(values, np.float32)
        grey = ndimage.map_coordinates(values, points, order=1, mode="nearest").T
        outside = (rows < -0.5) | (rows > geometry.shape[up] - 0.5)
        grey[outside] = window[0]
        grey[:, (columns < -0.5) | (columns > geometry.shape[across] - 0.5)] = window[0]
        lesions = _slice(numbers, through, depth)
        lesions = ndimage.map_coordinates(lesions, points, order=0, mode="constant", cval=0).T
        scaled = _bytes_of((grey - window[0]) / (window[1] - window[0]) * 255)
        picture = np.repeat(scaled[:, :, None], 3, axis=2)
        edge = _edges(lesions)
        for number in np.unique(lesions[edge]):
            picture[edge & (lesions == number)] = lesion_colour(int(number))
        start, width = place * pixels, pixels - 1
        canvas.paste(Image.fromarray(picture), (start, 0))
        draw.text((start + 4, pixels // 2), left, fill="#ffd24d", anchor="lm", **style)
        draw.text((start + width - 4, pixels // 2), right, fill="#ffd24d", anchor="rm", **style)
        length = bar_mm / field_mm * pixels
        top = pixels - 8 - max(2, pixels // 50)
        bar = (start + 8, top, start + 8 + length, pixels - 8)
        draw.rectangle(bar, fill="white", outline="black")
        draw.text((start + 8, top - 3), f"{bar_mm:g} mm", fill="white", anchor="ls", **style)
        if place:
            draw.line((start, 0, start, pixels), fill="#444")
    return _jpeg(canvas, 88)


def smaller_jpeg(montage: bytes, pixels: int, quality: int = 75) -> bytes:
    """Shrink a montage so that each of its pictures has `pixels` along its edge."""
    from PIL import Image

    with Image.open(io.BytesIO(montage)) as picture:
        height = min(pixels, picture.height)
        size = (round(picture.width * height / picture.height), height)
        return _jpeg(picture.resize(size, Image.Resampling.LANCZOS), quality)


# ---- the shown part


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Source:
    """Views of a scan and its lesions along R, A and S, without a copy."""

    scan: Volume
    image: np.ndarray  # stored values
    numbers: np.ndarray
    geometry: Geometry
    n_ids: int
    lesions: BoundingBox | None
    body: BoundingBox
    window: tuple[float, float]
    stored_range: tuple[float, float]  # intensities that become 0 and 255

    @classmethod
    def of(cls, scan: Volume, ids: np.ndarray, unit: str) -> _Source:
        order = AxisOrder.of(scan.geometry)
        image, numbers = to_canonical(scan.array, order), to_canonical(ids, order)
        geometry = canonical_geometry(scan.geometry, order)
        lesions = BoundingBox.around(numbers)
        threshold = BODY_ABOVE_HU
        if unit != "HU":
            threshold = body_threshold(image, scan.slope, scan.intercept)
        body = box_where(lambda part: scan.intensities(image[part]) > threshold, image)
        if body is None:
            body = BoundingBox.whole(geometry.shape)
        else:
            body = _widened(body, geometry, BODY_MARGIN_MM)
        if lesions is not None:
            body = _hull(body, _widened(lesions, geometry, CONTEXT_MM))
        window = _window(scan, image, numbers, geometry, body, lesions, unit)
        beyond = (window[1] - window[0]) * BEYOND_WINDOW
        low, high = window[0] - beyond, window[1] + beyond
        if unit == "HU":
            low, high = max(low, CT_RANGE_HU[0]), min(high, CT_RANGE_HU[1])
        n_ids = 0 if lesions is None else int(numbers[lesions.slices].max())
        return cls(
            scan=scan,
            image=image,
            numbers=numbers,
            geometry=geometry,
            n_ids=n_ids,
            lesions=lesions,
            body=body,
            window=window,
            stored_range=(low, high),
        )

    def predicted_bytes(self, box: BoundingBox, factors: Factors) -> float:
        """Estimate the compressed size from a few slabs."""
        shape = _blocks(box, factors)
        slow = _slow_axis(self.image)
        n = shape[slow]
        indices = np.unique(np.linspace(0, n - 1, min(n, SAMPLE_SLABS)).astype(int))
        size = 0
        for index in indices:
            part = [slice(a, b) for a, b in zip(box.start, box.stop)]
            first = box.start[slow] + int(index) * factors[slow]
            part[slow] = slice(first, min(first + factors[slow], box.stop[slow]))
            size += len(igzip.compress(self._grey(tuple(part), factors).tobytes("F"), 3))
        return size * n / len(indices)

    def preview(self, part: str, box: BoundingBox, factors: Factors) -> Preview:
        shape = _blocks(box, factors)
        drawn = min(self.n_ids, MAX_DRAWN)
        image = np.empty(shape, np.uint8, order="F")
        ids = np.zeros(shape, np.uint8 if drawn <= np.iinfo(np.uint8).max else np.uint16, order="F")
        present = np.zeros(drawn + 1, np.int64)  # voxels of each lesion in the scan
        for scan_part, blocks in _slabs(box, factors, _slow_axis(self.image)):
            image[blocks] = self._grey(scan_part, factors)
            if drawn:
                numbers = self.numbers[scan_part]
                if self.n_ids > MAX_DRAWN:
                    numbers = np.where(numbers > MAX_DRAWN, 0, numbers)
                present += _counts(numbers, drawn)
                ids[blocks] = _majority(numbers, factors)
        if math.prod(factors) > 1 and drawn:
            self._keep_small(ids, box, factors, present)
        not_drawn = self.n_ids - np.count_nonzero(_counts(ids, drawn)[1:])
        low, high = self.stored_range
        geometry = _block_geometry(self.geometry, box, factors)
        slope = np.float32((high - low) / 255)  # a NIfTI header stores float32
        shown = Volume(image, geometry, float(slope), float(np.float32(low)))
        lesions = Volume(ids, geometry)
        return Preview(
            image=shown,
            ids=lesions,
            packed_image=volume_bytes(shown),
            packed_ids=volume_bytes(lesions),
            window=self.window,
            part=part,
            factors=factors,
            not_drawn=int(not_drawn),
        )

    def _grey(self, part: tuple[slice, ...], factors: Factors) -> np.ndarray:
        low, high = self.stored_range
        values = _block_means(self.image[part], factors) * self.scan.slope + self.scan.intercept
        return _bytes_of((values - low) * (255 / (high - low)))

    def _keep_small(
        self, ids: np.ndarray, box: BoundingBox, factors: Factors, present: np.ndarray
    ) -> None:
        """Redraw lesions that lost over half of their volume in all free blocks that they touch.

        A lesion that touches no free block gets the block in which it has most voxels.
        """
        drawn = _counts(ids, len(present) - 1) * math.prod(factors)
        lost = [n for n in range(1, len(present)) if drawn[n] * 2 < present[n]]
        if not lost:
            return
        for group in _together(lost, present):
            if present[group].sum() > PIECE_VOXELS:
                self._keep_sparse(ids, box, factors, group[0])
                continue
            for number, blocks, counts in self._touched(box, factors, group):
                free = ids[blocks] == 0
                ids[tuple(along[free] for along in blocks)] = number
                if not free.any() and not (ids[blocks] == number).any():
                    most = int(np.argmax(counts))
                    ids[tuple(int(along[most]) for along in blocks)] = number

    def _touched(
        self, box: BoundingBox, factors: Factors, lesions: Sequence[int]
    ) -> Iterator[tuple[int, tuple[np.ndarray, ...], np.ndarray]]:
        """Yield each lesion, the blocks that it touches and its voxels in each, in one pass."""
        shape = _blocks(box, factors)
        is_listed = np.zeros(lesions[-1] + 2, bool)  # the last entry stands for all larger numbers
        is_listed[list(lesions)] = True
        keys = []
        for scan_part, blocks in _slabs(box, factors, _slow_axis(self.image)):
            numbers = self.numbers[scan_part]
            voxels = np.nonzero(is_listed.take(numbers, mode="clip"))
            places = [
                index // factor + part.start for index, factor, part in zip(voxels, factors, blocks)
            ]
            flat = np.ravel_multi_index(places, shape)
            keys.append(numbers[voxels].astype(np.int64) * math.prod(shape) + flat)
        touched, counts = np.unique(np.concatenate(keys), return_counts=True)
        numbers, flat = np.divmod(touched, math.prod(shape))
        for number, part in zip(lesions, _runs(numbers, lesions)):
            yield number, np.unravel_index(flat[part], shape), counts[part]

    def _keep_sparse(
        self, ids: np.ndarray, box: BoundingBox, factors: Factors, number: int
    ) -> None:
        """Redraw one lesion of many voxels like `_keep_small`, a slab of the scan at a time."""
        best, most = None, 0
        for scan_part, blocks in _slabs(box, factors, _slow_axis(self.image)):
            fraction = _block_means(self.numbers[scan_part] == number, factors)
            touched = fraction > 0
            drawn = ids[blocks]  # a view
            drawn[touched & (drawn == 0)] = number
            if fraction.max(initial=0) > most:
                most = float(fraction.max())
                block = np.unravel_index(int(fraction.argmax()), fraction.shape)
                best = tuple(int(index) + part.start for index, part in zip(block, blocks))
        if best is not None and not (ids == number).any():
            ids[best] = number


def _candidates(source: _Source) -> Iterator[tuple[str, BoundingBox, Factors]]:
    """Yield (part in words, box, factors) of previews to try, the best first."""
    spacing_mm = source.geometry.spacing_mm
    full: Factors = (1, 1, 1)
    is_whole = source.body.shape == source.geometry.shape
    body = ("the whole scan" if is_whole else "the body", source.body)
    yield *body, full
    parts = [body]
    if source.lesions is not None:
        parts = [
            (
                f"the lesions and {mm:g} mm around them",
                _widened(source.lesions, source.geometry, mm),
            )
            for mm in (CONTEXT_MM, LITTLE_CONTEXT_MM)
        ]
    steps = {
        spacing * n
        for spacing in spacing_mm
        for n in range(1, math.floor(MAX_SPACING_MM / spacing) + 1)
    }
    for name, box in parts:
        fine = {_factors(spacing_mm, step, box) for step in steps}
        yield from ((name, box, factors) for factors in sorted({full, *fine}, key=math.prod))
    name, box = parts[-1]
    coarsest_mm = MAX_SPACING_MM
    while True:
        coarsest_mm *= 1.25
        factors = _factors(spacing_mm, coarsest_mm, box)
        yield name, box, factors
        if max(_blocks(box, factors)) <= 2 * MIN_VOXELS:
            return


def _factors(spacing_mm: Sequence[float], max_mm: float, box: BoundingBox) -> Factors:
    """Return the largest factors with block spacings ≤ `max_mm` and ≥ 4 blocks along each axis."""
    r, a, s = (
        max(1, min(math.floor(max_mm / spacing + 1e-6), n // MIN_VOXELS))
        for spacing, n in zip(spacing_mm, box.shape)
    )
    return r, a, s


def _widened(box: BoundingBox, geometry: Geometry, margin_mm: float) -> BoundingBox:
    """Widen the box on all sides, to at least two voxels, within the grid."""
    start, stop = [], []
    for axis in range(3):
        margin = math.ceil(margin_mm / geometry.spacing_mm[axis])
        start.append(max(0, min(box.start[axis] - margin, geometry.shape[axis] - 2)))
        stop.append(min(geometry.shape[axis], max(box.stop[axis] + margin, start[-1] + 2)))
    return BoundingBox((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))


def _hull(a: BoundingBox, b: BoundingBox) -> BoundingBox:
    i, j, k = map(min, a.start, b.start)
    i_stop, j_stop, k_stop = map(max, a.stop, b.stop)
    return BoundingBox((i, j, k), (i_stop, j_stop, k_stop))


def _window(
    scan: Volume,
    image: np.ndarray,
    numbers: np.ndarray,
    geometry: Geometry,
    body: BoundingBox,
    lesions: BoundingBox | None,
    unit: str,
) -> tuple[float, float]:
    """Return the window: it holds 90 % of the voxels of each of the first five lesions.

    CT: it also holds 90 % of the voxels within 15 mm of them, without the air outside the body, and
    is at least 200 HU wide. Other modalities: it also holds 98 % of the body.
    """
    within = _sample(image[body.slices])
    boxes = []
    if lesions is not None:
        for slices in ndimage.find_objects(numbers[lesions.slices], max_label=WINDOW_LESIONS):
            if slices is not None:
                i, j, k = (part.start + n for part, n in zip(slices, lesions.start))
                i_stop, j_stop, k_stop = (part.stop + n for part, n in zip(slices, lesions.start))
                box = BoundingBox((i, j, k), (i_stop, j_stop, k_stop))
                boxes.append(_widened(box, geometry, WINDOW_REACH_MM))
    inside = [_lesion_sample(image[box.slices], numbers[box.slices]) for box in boxes]
    ends = [np.percentile(scan.intensities(values), (5, 95)) for values in inside]
    if unit == "HU":
        samples = [_sample(image[box.slices]) for box in boxes] or [within]
        for sample in samples:
            ends.append(np.percentile(_without_air(scan.intensities(sample)), (5, 95)))
        low, high = float(np.min(ends)), float(np.max(ends))
        margin = 0.3 * (high - low)
        low, high = max(low - margin, CT_RANGE_HU[0]), min(high + margin, CT_RANGE_HU[1])
        missing = max(0.0, MIN_WINDOW_HU - (high - low)) / 2
        return low - missing, high + missing
    ends.append(np.percentile(scan.intensities(within), (1, 99)))
    low, high = float(np.min(ends)), float(np.max(ends))
    if high - low > 1e-6 * max(abs(low), abs(high)):
        return low, high
    ends = np.array([np.fmin.reduce(image, axis=None), np.fmax.reduce(image, axis=None)])
    low, high = np.nan_to_num(scan.intensities(ends).astype(np.float64)).tolist()
    return (low, high) if low < high else (high, low) if high < low else (low - 0.5, low + 0.5)


def _without_air(values: np.ndarray) -> np.ndarray:
    """Drop the air outside the body, unless little else is left; lung stays."""
    kept = values[values > AIR_HU]
    return kept if kept.size * 10 > values.size else values


def _sample(array: np.ndarray) -> np.ndarray:
    """Return about a million evenly spaced voxels, without non-finite ones; a 0 if none is left."""
    step = max(1, math.ceil((array.size / SAMPLE_VOXELS) ** (1 / 3)))
    return _finite(array[tuple(slice(None, None, min(step, max(1, n // 8))) for n in array.shape)])


def _lesion_sample(image: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Return the finite lesion voxels in a box, in large boxes an evenly spaced sample of them."""
    is_large = image.size > 8 * PIECE_VOXELS
    step = max(1, math.floor((image.size / PIECE_VOXELS) ** (1 / 3))) if is_large else 1
    sparse = (slice(None, None, step),) * 3
    values = image[sparse][numbers[sparse] > 0]
    return _finite(values if values.size else image[numbers > 0])


def _finite(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind != "f":
        return values
    finite = values[np.isfinite(values)]
    return finite if finite.size else np.zeros(1, values.dtype)


# ---- blocks of voxels


def _blocks(box: BoundingBox, factors: Factors) -> tuple[int, int, int]:
    r, a, s = (-(-n // factor) for n, factor in zip(box.shape, factors))
    return r, a, s


def _block_geometry(geometry: Geometry, box: BoundingBox, factors: Factors) -> Geometry:
    """Return the grid of the block centres; it counts the last block of an axis as full."""
    affine = geometry.affine.copy()
    affine[:3, :3] *= factors
    first = np.array(box.start) + (np.array(factors) - 1) / 2
    affine[:3, 3] = geometry.to_world_mm(first[None])[0]
    return Geometry(_blocks(box, factors), affine)


def _slow_axis(array: np.ndarray) -> int:
    return int(np.argmax(np.abs(array.strides)))


def _slabs(
    box: BoundingBox, factors: Factors, slow: int
) -> Iterator[tuple[tuple[slice, slice, slice], tuple[slice, slice, slice]]]:
    """Yield slabs of whole blocks: their part of the scan and their blocks."""
    across = math.prod(box.shape) // box.shape[slow]
    n_blocks = max(1, PIECE_VOXELS // (across * factors[slow]))
    for first in range(0, _blocks(box, factors)[slow], n_blocks):
        part, blocks = list(box.slices), [slice(0, n) for n in _blocks(box, factors)]
        start = box.start[slow] + first * factors[slow]
        part[slow] = slice(start, min(box.stop[slow], start + n_blocks * factors[slow]))
        blocks[slow] = slice(first, first + n_blocks)
        yield (part[0], part[1], part[2]), (blocks[0], blocks[1], blocks[2])


def _together(lesions: Sequence[int], present: np.ndarray) -> Iterator[list[int]]:
    """Group lesions up to a number of voxels; a larger lesion is a group of its own."""
    group, size = [], 0
    for number in lesions:
        if group and size + present[number] > PIECE_VOXELS:
            yield group
            group, size = [], 0
        group.append(number)
        size += int(present[number])
    yield group


def _runs(numbers: np.ndarray, keys: Sequence[int]) -> Iterator[slice]:
    """Return the slice that each key occupies in ascending numbers."""
    return map(slice, np.searchsorted(numbers, keys), np.searchsorted(numbers, keys, "right"))


def _block_means(part: np.ndarray, factors: Factors) -> np.ndarray:
    """Average each block in float32; blocks at the end of an axis may be smaller."""
    means = part.astype(np.float32)
    for axis, factor in enumerate(factors):
        if factor > 1:
            counts = np.full(-(-part.shape[axis] // factor), factor, np.float32)
            counts[-1] -= -part.shape[axis] % factor
            shape = [1, 1, 1]
            shape[axis] = -1
            means = _reduced(means, axis, factor, np.add) / counts.reshape(shape)
    return means


def _reduced(array: np.ndarray, axis: int, factor: int, operation: np.ufunc) -> np.ndarray:
    """Reduce each `factor` neighbours along an axis; several times as fast as `reduceat`."""
    before = (slice(None),) * axis
    result = array[(*before, slice(0, None, factor))].copy()
    for offset in range(1, factor):
        part = array[(*before, slice(offset, None, factor))]
        into = result[(*before, slice(0, part.shape[axis]))]
        operation(into, part, out=into)
    return result


def _majority(numbers: np.ndarray, factors: Factors) -> np.ndarray:
    """Return the highest id (= smallest lesion) of each block that is ≥ half lesion, else 0."""
    if math.prod(factors) == 1 or not numbers.any():
        return numbers[tuple(slice(None, None, factor) for factor in factors)]
    filled = _block_means(numbers > 0, factors) >= 0.5
    highest = numbers
    for axis, factor in enumerate(factors):
        highest = _reduced(highest, axis, factor, np.maximum)
    return np.where(filled, highest, 0)


def _counts(numbers: np.ndarray, highest: int) -> np.ndarray:
    """Count each number from 0 to `highest`, in pieces because `bincount` copies to int64."""
    flat = numbers.ravel("K")
    counts = np.zeros(highest + 1, np.int64)
    for start in range(0, flat.size, PIECE_VOXELS):
        counts += np.bincount(flat[start : start + PIECE_VOXELS], minlength=highest + 1)
    return counts


def _slice(array: np.ndarray, axis: int, index: int) -> np.ndarray:
    """Return a slice as a view; `np.take` copies arrays with permuted axes."""
    return array[(slice(None),) * axis + (index,)]


def _bytes_of(values: np.ndarray) -> np.ndarray:
    """Round and clip values to uint8; NaN becomes 0 (black)."""
    return np.rint(np.clip(np.nan_to_num(values, copy=False, nan=0.0), 0, 255)).astype(np.uint8)


def _edges(numbers: np.ndarray) -> np.ndarray:
    """Return which pixels of (H, W) lesion ids are lesion and have a neighbour with another id."""
    padded = np.pad(numbers, 1)
    inner = (slice(1, -1), slice(1, -1))
    different = [
        np.roll(padded, shift, axis)[inner] != numbers for axis in (0, 1) for shift in (-1, 1)
    ]
    return (numbers > 0) & np.logical_or.reduce(different)


def _jpeg(picture, quality: int) -> bytes:
    buffer = io.BytesIO()
    try:
        picture.save(buffer, format="JPEG", quality=quality, subsampling=0, optimize=True)
    except OSError:  # noise needs more than Pillow's buffer for optimised files
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()

"""A scan made small enough for a page: windowed to 8 bits, cropped and made coarser by a stated rule."""

from __future__ import annotations

import colorsys
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from isal import igzip
from scipy import ndimage

from volseg.inputs import parse_json
from volseg.io.nifti import volume_bytes
from volseg.preprocess.crop import (
    AxisOrder,
    body_threshold,
    box_where,
    canonical_geometry,
    to_canonical,
)
from volseg.volume import BoundingBox, Geometry, Volume

Factors = tuple[int, int, int]  # voxels of the scan along R, A and S that become one
Colour = tuple[int, int, int]  # red, green, blue from 0 to 255

MAX_SPACING_MM = 2.0  # up to which a scan is made coarser before more of it is cut away
CONTEXT_MM, LITTLE_CONTEXT_MM = 50.0, 15.0  # shown round the lesions; where little room is left
BODY_ABOVE_HU, BODY_MARGIN_MM = -500.0, 5.0
AIR_HU = -950.0  # lung is above, the air around a patient below
MAX_VOXELS = 12_000_000  # of a preview: what a browser without a GPU still draws
MAX_DRAWN = 8191  # lesions; a row of colours is a texture, and 8192 pixels are what every WebGL 2 has in practice
WINDOW_REACH_MM, WINDOW_LESIONS = 15.0, 5
MIN_WINDOW_HU, CT_RANGE_HU = 200.0, (-1024.0, 3071.0)
BEYOND_WINDOW = (
    0.25  # of the window's width, stored on either side of it, so that the reader can move it
)
SAMPLE_SLABS, SAMPLE_VOXELS = 8, 1_000_000  # looked at for an estimate
PIECE_VOXELS = 1_000_000  # worked on together: bounds the temporaries
MIN_VOXELS = 4  # along an axis, where the scan has them
MONTAGE_PLANES = (
    (0, 1, 2, "R", "L"),
    (0, 2, 1, "R", "L"),
    (1, 2, 0, "A", "P"),
)  # across, up, through; left and right
MIN_FIELD_MM, FIELD_EXTENTS = (
    50.0,
    2.2,
)  # what a picture of the montage shows: so many times the lesion's extent
SCALE_BARS_MM = (1, 2, 5, 10, 20, 50, 100, 200)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Preview:
    """A scan and its lesions for a page, on one grid whose axes grow to R, A and S.

    Args:
        image: uint8; its scale gives intensities, each the mean of the voxels that became one.
        ids: lesion ids, uint8 or uint16.
        packed_image, packed_ids: both as the bytes of a `.nii.gz`.
        window: (low, high) intensities to be shown from black to white.
        part: which part of the scan it is, in words.
        factors: voxels along R, A and S that became one.
        not_drawn: lesions without a voxel here: too small beside others, or beyond the 8191 largest.
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
    """The most of a scan, as finely as it goes, whose compressed bytes fit.

    Tried in turn: (1) the body and 50 mm round the lesions, in the scan's own resolution; (2) 50 mm round the lesions and (3) 15 mm round them
    in the scan's own resolution, or made coarser up to 2 mm; (4) these 15 mm still coarser. Without lesions (2) to (4) show the body. Coarser
    means the mean of whole blocks of voxels, so axes with larger spacings stay as they are. The same preview comes out for all 48 axis orders.

    Args:
        ids: (I, J, K) lesion ids on the scan's grid; 0 elsewhere.
        unit: of the intensities, such as `HU`.
        max_bytes: for image and ids together, compressed.

    Memory: beside the preview, slabs of the scan; no copy of it is made.
    """
    source = _Source.of(scan, ids, unit)
    best = None
    for part, box, factors in _candidates(source):
        if (
            math.prod(_blocks(box, factors)) > MAX_VOXELS
            or source.predicted_bytes(box, factors) > max_bytes * 1.1
        ):
            continue
        best = None  # before another one is made
        best = source.preview(part, box, factors)
        if len(best.packed_image) + len(best.packed_ids) <= max_bytes:
            break
    assert best is not None, "a candidate of a few blocks always fits"
    return best


def lesion_points(
    preview: Preview, lesions: Sequence[Mapping[str, Any]]
) -> dict[int, tuple[float, float, float]]:
    """Lesion id → RAS mm of one of its voxels in the preview; lesions that are not drawn are left out.

    It lies in the slice of the lesion's long axis, nearest to the middle of that, or nearest to the centroid where there is none.
    """
    found = {}
    boxes = ndimage.find_objects(preview.ids.array)
    for lesion in lesions:
        number = lesion["lesion_id"]
        box = boxes[number - 1] if number <= len(boxes) else None
        if box is None:
            continue
        ends = [point_of(lesion.get(f"long_axis_p{end}_ras")) for end in (0, 1)]
        if math.prod(part.stop - part.start for part in box) > PIECE_VOXELS:
            box = _one_slice(preview, number, box, ends)
        voxels = np.argwhere(preview.ids.array[box] == number) + [part.start for part in box]
        centroid = [lesion.get(f"centroid_{axis}_mm") for axis in "ras"]
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
        found[number] = (r, a, s)
    return found


def _one_slice(
    preview: Preview,
    number: int,
    box: tuple[slice, ...],
    ends: Sequence[tuple[float, float, float] | None],
) -> tuple[slice, ...]:
    """The slice of a large lesion in which its long axis lies, or else the nearest one to it that has a voxel."""
    start, stop = box[2].start, box[2].stop
    aim = (start + stop) // 2
    if ends[0] is not None and ends[1] is not None:
        middle = (np.array(ends[0]) + ends[1]) / 2
        aim = round(float(preview.ids.geometry.to_index(middle[None])[0, 2]))
    slices = sorted(range(start, stop), key=lambda k: abs(k - aim))
    k = next(k for k in slices if (preview.ids.array[(*box[:2], k)] == number).any())
    return (*box[:2], slice(k, k + 1))


def point_of(text: str | None) -> tuple[float, float, float] | None:
    """`[R, A, S]` in mm, as the tables write a point; None for what is no point."""
    try:
        r, a, s = (float(part) for part in parse_json(text or ""))
    except (TypeError, ValueError):
        return None
    return (r, a, s) if all(map(math.isfinite, (r, a, s))) else None


def lesion_colour(number: int) -> Colour:
    """Colours of neighbouring numbers are far apart: hues in steps of the golden angle."""
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
    """JPEG of the axial, coronal and sagittal slice through a point, side by side, lesions outlined, each with a scale bar.

    Radiological convention: the patient's right and front are on the left.

    Args:
        ids: (I, J, K) lesion ids on the scan's grid.
        point_mm: RAS mm; None for the middle of the scan, all of it.
        extent_mm: size of the lesion there; the field shown is 2.2 times that, 50 mm at least.
        pixels: along the edge of each of the three pictures.
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
    font = ImageFont.load_default(
        max(10, pixels // 11)
    )  # to be read in the smaller copies of report.html too
    away_mm = (
        ((pixels - 1) / 2 - np.arange(pixels)) * field_mm / pixels
    )  # indices fall to the right and downwards
    style = {"font": font, "stroke_width": 1, "stroke_fill": "black"}
    for place, (across, up, through, left, right) in enumerate(MONTAGE_PLANES):
        depth = int(np.clip(round(centre[through]), 0, geometry.shape[through] - 1))
        rows = centre[up] + away_mm / geometry.spacing_mm[up]
        columns = centre[across] + away_mm / geometry.spacing_mm[across]
        at = np.meshgrid(columns, rows, indexing="ij")
        values = scan.intensities(_slice(stored, through, depth).astype(np.float32))
        grey = ndimage.map_coordinates(
            np.asarray(values, np.float32), at, order=1, mode="nearest"
        ).T
        outside = (rows < -0.5) | (rows > geometry.shape[up] - 0.5)
        grey[outside] = window[0]
        grey[:, (columns < -0.5) | (columns > geometry.shape[across] - 0.5)] = window[0]
        found = ndimage.map_coordinates(
            _slice(numbers, through, depth), at, order=0, mode="constant", cval=0
        ).T
        scaled = _bytes_of((grey - window[0]) / (window[1] - window[0]) * 255)
        picture = np.repeat(scaled[:, :, None], 3, axis=2)
        edge = _edges(found)
        for number in np.unique(found[edge]):
            picture[edge & (found == number)] = lesion_colour(int(number))
        canvas.paste(Image.fromarray(picture), (place * pixels, 0))
        start, width = place * pixels, pixels - 1
        draw.text((start + 4, pixels // 2), left, fill="#ffd24d", anchor="lm", **style)
        draw.text((start + width - 4, pixels // 2), right, fill="#ffd24d", anchor="rm", **style)
        length = bar_mm / field_mm * pixels
        top = pixels - 8 - max(2, pixels // 50)
        draw.rectangle(
            (start + 8, top, start + 8 + length, pixels - 8), fill="white", outline="black"
        )
        draw.text((start + 8, top - 3), f"{bar_mm:g} mm", fill="white", anchor="ls", **style)
        if place:
            draw.line((start, 0, start, pixels), fill="#444")
    return _jpeg(canvas, 88)


def smaller_jpeg(montage: bytes, pixels: int, quality: int = 75) -> bytes:
    """The montage with `pixels` along the edge of each of its pictures."""
    from PIL import Image

    with Image.open(io.BytesIO(montage)) as picture:
        height = min(pixels, picture.height)
        size = (round(picture.width * height / picture.height), height)
        return _jpeg(picture.resize(size, Image.Resampling.LANCZOS), quality)


# ---- where to look


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Source:
    """A scan and its lesions seen along R, A and S: views, nothing is copied."""

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
        threshold = (
            BODY_ABOVE_HU if unit == "HU" else body_threshold(image, scan.slope, scan.intercept)
        )
        body = box_where(lambda part: scan.intensities(image[part]) > threshold, image)
        body = (
            BoundingBox.whole(geometry.shape)
            if body is None
            else _widened(body, geometry, BODY_MARGIN_MM)
        )
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
        """Compressed size, from a few slabs."""
        shape = _blocks(box, factors)
        slow = _slow_axis(self.image)
        n = shape[slow]
        chosen = np.unique(np.linspace(0, n - 1, min(n, SAMPLE_SLABS)).astype(int))
        size = 0
        for index in chosen:
            part = [slice(a, b) for a, b in zip(box.start, box.stop)]
            first = box.start[slow] + int(index) * factors[slow]
            part[slow] = slice(first, min(first + factors[slow], box.stop[slow]))
            size += len(igzip.compress(self._grey(tuple(part), factors).tobytes("F"), 3))
        return size * n / len(chosen)

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
        slope = np.float32((high - low) / 255)  # as a header stores them
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
        """Draw lesions that would lose more than half of their volume in every free block that they touch, and in one in any case."""
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
        """Find the blocks that each lesion touches, and its voxels in each, in one look at the scan."""
        shape = _blocks(box, factors)
        is_wanted = np.zeros(lesions[-1] + 2, bool)  # the last one stands for all numbers beyond
        is_wanted[list(lesions)] = True
        keys = []
        for scan_part, blocks in _slabs(box, factors, _slow_axis(self.image)):
            numbers = self.numbers[scan_part]
            inside = np.nonzero(is_wanted.take(numbers, mode="clip"))
            places = [
                at // factor + part.start for at, factor, part in zip(inside, factors, blocks)
            ]
            keys.append(
                numbers[inside].astype(np.int64) * math.prod(shape)
                + np.ravel_multi_index(places, shape)
            )
        touched, counts = np.unique(np.concatenate(keys), return_counts=True)
        numbers, flat = np.divmod(touched, math.prod(shape))
        for number, part in zip(lesions, _runs(numbers, lesions)):
            yield number, np.unravel_index(flat[part], shape), counts[part]

    def _keep_sparse(
        self, ids: np.ndarray, box: BoundingBox, factors: Factors, number: int
    ) -> None:
        """As `_keep_small`, of a lesion whose box is large, though it fills little of it: a slab of it at a time."""
        best, most = None, 0
        for scan_part, blocks in _slabs(box, factors, _slow_axis(self.image)):
            share = _block_means(self.numbers[scan_part] == number, factors)
            touched = share > 0
            drawn = ids[blocks]  # a view
            drawn[touched & (drawn == 0)] = number
            if share.max(initial=0) > most:
                most = float(share.max())
                at = np.unravel_index(int(share.argmax()), share.shape)
                best = tuple(int(place) + part.start for place, part in zip(at, blocks))
        if best is not None and not (ids == number).any():
            ids[best] = number


def _candidates(source: _Source) -> Iterator[tuple[str, BoundingBox, Factors]]:
    """What to show and how coarsely, the best first."""
    spacing_mm = source.geometry.spacing_mm
    own: Factors = (1, 1, 1)
    whole = source.body.shape == source.geometry.shape
    yield "the whole scan" if whole else "the body", source.body, own
    if source.lesions is None:
        parts = [("the whole scan" if whole else "the body", source.body)]
    else:
        parts = [
            (
                f"the lesions and {reach:g} mm around them",
                _widened(source.lesions, source.geometry, reach),
            )
            for reach in (CONTEXT_MM, LITTLE_CONTEXT_MM)
        ]
    steps = {
        spacing * n
        for spacing in spacing_mm
        for n in range(1, math.floor(MAX_SPACING_MM / spacing) + 1)
    }
    for name, box in parts:
        fine = {_factors(spacing_mm, step, box) for step in steps}
        yield from ((name, box, factors) for factors in sorted({own, *fine}, key=math.prod))
    name, box = parts[-1]
    coarsest_mm = MAX_SPACING_MM
    while True:
        coarsest_mm *= 1.25
        factors = _factors(spacing_mm, coarsest_mm, box)
        yield name, box, factors
        if max(_blocks(box, factors)) <= 2 * MIN_VOXELS:
            return


def _factors(spacing_mm: Sequence[float], wanted_mm: float, box: BoundingBox) -> Factors:
    """The largest whole numbers of voxels that stay within the wanted spacing, and leave some voxels of the box."""
    r, a, s = (
        max(1, min(math.floor(wanted_mm / spacing + 1e-6), n // MIN_VOXELS))
        for spacing, n in zip(spacing_mm, box.shape)
    )
    return r, a, s


def _widened(box: BoundingBox, geometry: Geometry, margin_mm: float) -> BoundingBox:
    """The box with a margin all round, two voxels wide at least, within the grid."""
    start, stop = [], []
    for axis in range(3):
        margin = math.ceil(margin_mm / geometry.spacing_mm[axis])
        start.append(max(0, min(box.start[axis] - margin, geometry.shape[axis] - 2)))
        stop.append(min(geometry.shape[axis], max(box.stop[axis] + margin, start[-1] + 2)))
    return BoundingBox((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))


def _hull(one: BoundingBox, other: BoundingBox) -> BoundingBox:
    i, j, k = (min(a, b) for a, b in zip(one.start, other.start))
    i_stop, j_stop, k_stop = (max(a, b) for a, b in zip(one.stop, other.stop))
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
    """Black and white: both hold 90 % of the voxels of each of the first five lesions.

    CT: also 90 % of what lies within 15 mm of them, air outside the body left out; 200 HU wide at least. Else: also 98 % of the body.
    """
    within = _sample(image[body.slices])
    boxes = []
    if lesions is not None:
        for found in ndimage.find_objects(numbers[lesions.slices], max_label=WINDOW_LESIONS):
            if found is not None:
                i, j, k = (part.start + start for part, start in zip(found, lesions.start))
                i_stop, j_stop, k_stop = (
                    part.stop + start for part, start in zip(found, lesions.start)
                )
                boxes.append(
                    _widened(
                        BoundingBox((i, j, k), (i_stop, j_stop, k_stop)), geometry, WINDOW_REACH_MM
                    )
                )
    inside = [_lesion_sample(image[box.slices], numbers[box.slices]) for box in boxes]
    ends = [np.percentile(scan.intensities(values), (5, 95)) for values in inside]
    if unit == "HU":
        samples = [_sample(image[box.slices]) for box in boxes] or [within]
        ends += [
            np.percentile(_without_air(scan.intensities(sample)), (5, 95)) for sample in samples
        ]
        low, high = float(np.min(ends)), float(np.max(ends))
        margin = 0.3 * (high - low)
        low, high = max(low - margin, CT_RANGE_HU[0]), min(high + margin, CT_RANGE_HU[1])
        missing = max(0.0, MIN_WINDOW_HU - (high - low)) / 2
        return low - missing, high + missing
    ends.append(np.percentile(scan.intensities(within), (1, 99)))
    low, high = float(np.min(ends)), float(np.max(ends))
    if high - low > 1e-6 * max(abs(low), abs(high)):
        return low, high
    ends = scan.intensities(
        np.array([np.fmin.reduce(image, axis=None), np.fmax.reduce(image, axis=None)])
    )
    low, high = np.nan_to_num(ends.astype(np.float64)).tolist()
    return (low, high) if low < high else (high, low) if high < low else (low - 0.5, low + 0.5)


def _without_air(values: np.ndarray) -> np.ndarray:
    """HU of what is no air outside the body, unless there is little else; lung stays."""
    kept = values[values > AIR_HU]
    return kept if kept.size * 10 > values.size else values


def _sample(array: np.ndarray) -> np.ndarray:
    """About a million finite voxels, evenly spread; one 0 where there are none."""
    step = max(1, math.ceil((array.size / SAMPLE_VOXELS) ** (1 / 3)))
    return _finite(array[tuple(slice(None, None, min(step, max(1, n // 8))) for n in array.shape)])


def _lesion_sample(image: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The finite voxels of lesions in a box; of a large one some million, evenly spread."""
    step = (
        max(1, math.floor((image.size / PIECE_VOXELS) ** (1 / 3)))
        if image.size > 8 * PIECE_VOXELS
        else 1
    )
    sparse = (slice(None, None, step),) * 3
    values = image[sparse][numbers[sparse] > 0]
    return _finite(values if values.size else image[numbers > 0])


def _finite(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind != "f":
        return values
    found = values[np.isfinite(values)]
    return found if found.size else np.zeros(1, values.dtype)


# ---- blocks of voxels


def _blocks(box: BoundingBox, factors: Factors) -> tuple[int, int, int]:
    r, a, s = (-(-n // factor) for n, factor in zip(box.shape, factors))
    return r, a, s


def _block_geometry(geometry: Geometry, box: BoundingBox, factors: Factors) -> Geometry:
    """The grid of the blocks' centres; the last block of an axis counts as full, so that the grid is regular."""
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
    """Parts of the box and the blocks that they become, a slab of whole blocks at a time."""
    across = math.prod(box.shape) // box.shape[slow]
    n_blocks = max(1, PIECE_VOXELS // (across * factors[slow]))
    for first in range(0, _blocks(box, factors)[slow], n_blocks):
        part, blocks = list(box.slices), [slice(0, n) for n in _blocks(box, factors)]
        start = box.start[slow] + first * factors[slow]
        part[slow] = slice(start, min(box.stop[slow], start + n_blocks * factors[slow]))
        blocks[slow] = slice(first, first + n_blocks)
        yield (part[0], part[1], part[2]), (blocks[0], blocks[1], blocks[2])


def _together(lesions: Sequence[int], present: np.ndarray) -> Iterator[list[int]]:
    """Lesions in turn, of few voxels together; one that has more is alone."""
    group, size = [], 0
    for number in lesions:
        if group and size + present[number] > PIECE_VOXELS:
            yield group
            group, size = [], 0
        group.append(number)
        size += int(present[number])
    yield group


def _runs(numbers: np.ndarray, wanted: Sequence[int]) -> Iterator[slice]:
    """Where each of the wanted ones stands in ascending numbers."""
    return map(slice, np.searchsorted(numbers, wanted), np.searchsorted(numbers, wanted, "right"))


def _block_means(part: np.ndarray, factors: Factors) -> np.ndarray:
    """Mean of each block in float32; blocks at the end of an axis may be smaller."""
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
    """`operation` over each `factor` neighbours along an axis; several times as fast as `reduceat`."""
    before = (slice(None),) * axis
    result = array[(*before, slice(0, None, factor))].copy()
    for offset in range(1, factor):
        part = array[(*before, slice(offset, None, factor))]
        into = result[(*before, slice(0, part.shape[axis]))]
        operation(into, part, out=into)
    return result


def _majority(numbers: np.ndarray, factors: Factors) -> np.ndarray:
    """Of each block at least half filled by lesions its highest number, which is the smallest of them; else 0."""
    if math.prod(factors) == 1 or not numbers.any():
        return numbers[tuple(slice(None, None, factor) for factor in factors)]
    filled = _block_means(numbers > 0, factors) >= 0.5
    highest = numbers
    for axis, factor in enumerate(factors):
        highest = _reduced(highest, axis, factor, np.maximum)
    return np.where(filled, highest, 0)


def _counts(numbers: np.ndarray, highest: int) -> np.ndarray:
    """How often each number from 0 to `highest` occurs. A piece at a time: `bincount` makes eight bytes of each."""
    flat = numbers.ravel("K")
    found = np.zeros(highest + 1, np.int64)
    for start in range(0, flat.size, PIECE_VOXELS):
        found += np.bincount(flat[start : start + PIECE_VOXELS], minlength=highest + 1)
    return found


def _slice(array: np.ndarray, axis: int, index: int) -> np.ndarray:
    """A view; `np.take` would first copy an array whose axes are turned."""
    return array[(slice(None),) * axis + (index,)]


def _bytes_of(values: np.ndarray) -> np.ndarray:
    """uint8 of values that are to lie from 0 to 255; unknown ones are black."""
    return np.rint(np.clip(np.nan_to_num(values, copy=False, nan=0.0), 0, 255)).astype(np.uint8)


def _edges(numbers: np.ndarray) -> np.ndarray:
    """(H, W) lesion ids → the pixels of lesions beside a pixel of something else."""
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
    except OSError:  # Pillow keeps a byte per pixel for an optimised file: too few for noise
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()

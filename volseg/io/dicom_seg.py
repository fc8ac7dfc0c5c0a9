"""DICOM segmentations (SEG): segments with names, in frames anywhere on a grid, to labels."""

from __future__ import annotations

import hashlib
import io
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from volseg.io.dicom_frames import (
    MAX_FRAMES,
    Frame,
    PixelFormat,
    Unusable,
    enhanced_frames,
    pixel_format,
    reason_of,
    rest_of,
    text_of,
)
from volseg.io.dicom_object import (
    FIX,
    DicomObject,
    choose_segments,
    items_of,
    names_of,
    overlap_fix,
)
from volseg.io.dicom_pixels import BIG, CODEC_FIX, IMPLICIT, PLUGINS, codec_problem
from volseg.io.dicom_series import TO_RAS
from volseg.io.gzip_stream import COPY_AGAIN, opened_raw, refusal
from volseg.io.header import ReferenceGrid, ScanHeader, ScanWarning, checked_grid, rounded
from volseg.io.series import place_of, split_segments
from volseg.io.text_header import shown
from volseg.volume import SAME_GRID_TOLERANCE_VOXELS, Geometry

SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"
LABELMAP = "1.2.840.10008.5.1.4.1.1.66.7"
CLASSES = (SEGMENTATION, LABELMAP)
BINARY, FRACTIONAL, LABELS = "BINARY", "FRACTIONAL", "LABELMAP"
OFF_GRID = 0.1  # of the distance of slices, from which a frame is not on the grid
SAME_PLACE_MM = 0.01
MAX_SLICES = 100_000
DISTANCES = ("SpacingBetweenSlices", "SliceThickness")
MAX_LISTED = 3  # pairs of segments in a message


@dataclass(frozen=True, slots=True, eq=False)
class Segmentation:
    """A parsed segmentation.

    Args:
        kind: BINARY, FRACTIONAL or LABELMAP.
        names: number of each segment that is taken → its name; the numbers are the labels.
        frames: each with its slice (`places`) and its segment (`segments`; 0 in a label map).
        background: values of a label map that are none of the segments.
    """

    kind: str
    names: dict[int, str]
    frames: Sequence[Frame]
    places: Sequence[int]
    segments: Sequence[int]
    background: tuple[int, ...]


def read_header(file: DicomObject, path: Path, grid: ReferenceGrid | None) -> ScanHeader:
    """Return the header of a segmentation, on the grid of its scan if its frames are slices of it.

    On another grid, or without a scan, it reaches from its first frame to its last.

    Frames that are left out because they are empty are background.

    Raises:
        ScanError: it is no mask in three dimensions, or lacks a segment that the path names.
        Unusable: a frame has no usable place.

    Source: DICOM PS3.3 C.8.20 (segmentation), C.7.6.16 (functional groups)
    """
    data, kind = file.data, _kind_of(file, path)
    (names, notes), frames = _names(data, kind, path), _frames(file)
    affine, places = _grid(frames, data)
    rows, columns = frames[0].pixels.shape
    shape = (columns, rows, max(places) + 1)
    start = None if grid is None else _first_slice(Geometry(shape, affine), grid.geometry)
    if grid is not None and start is not None:
        geometry, places, oddities = grid.geometry, [start + place for place in places], []
    else:
        geometry, oddities = checked_grid(shape, rounded(affine), path, source="DICOM header")
    most = 255 if kind == FRACTIONAL else max(names, default=1)
    return ScanHeader(
        geometry=geometry,
        dtype=np.dtype(np.min_scalar_type(most)),
        slope=1 / float(data.MaximumFractionalValue) if kind == FRACTIONAL else 1.0,
        path=file.path,
        content=Segmentation(
            kind=kind,
            names=names,
            frames=frames,
            places=places,
            segments=_segments(data, len(frames), kind),
            background=(0, *_padding(data)),
        ),
        frame_of_reference=text_of(data, "FrameOfReferenceUID"),
        warnings=(*notes, *oddities),
    )


def _kind_of(file: DicomObject, path: Path) -> str:
    if file.sop_class == LABELMAP:
        return LABELS
    kind = str(file.data.get("SegmentationType", ""))
    if kind not in (BINARY, FRACTIONAL):
        raise refusal(path, "E_LABELS", f"is a segmentation of type {kind or 'unknown'}", FIX)
    return kind


def _names(data: Any, kind: str, path: Path) -> tuple[dict[int, str], list[ScanWarning]]:
    """Return number → name of the segments that the path names, else of all; and notes on them."""
    items = {int(item.SegmentNumber): item for item in items_of(data, "SegmentSequence")}
    names, notes = names_of(data, items, "SegmentLabel")
    names.pop(0, None)  # the background of a label map
    taken = choose_segments(names, split_segments(path)[1], path, "segment")
    if kind == FRACTIONAL and len(taken) > 1:
        fix = f"choose one of them, such as {place_of(path).name}#{min(names)}"
        raise refusal(path, "E_LABELS", f"holds fractions of {len(taken)} segments", fix)
    return {label: names[label] for label in taken}, notes


def _frames(file: DicomObject) -> list[Frame]:
    data = file.data
    n = int(data.get("NumberOfFrames") or 1)
    if not 1 <= n <= MAX_FRAMES or "PerFrameFunctionalGroupsSequence" not in data:
        raise Unusable(f"E_NOGEOM: {n} frames, without a place of each")
    common = {
        "path": file.path,
        "series": text_of(data, "SeriesInstanceUID"),
        "modality": "SEG",
        "description": "",
        "frame_of_reference": text_of(data, "FrameOfReferenceUID"),
        "pixels": pixel_format(data, file.offset, ""),
    }
    if common["pixels"].bits_allocated == 1 and file.syntax == BIG:
        raise Unusable("E_DTYPE: stores single bits in big-endian order")
    frames = list(enhanced_frames(data, n, common))
    first = frames[0]
    for frame in frames:
        is_turned = np.abs(frame.axes - first.axes).max() > 1e-3
        if is_turned or frame.spacing_mm != first.spacing_mm:
            raise Unusable("E_GEOM: its frames differ in orientation or spacing")
    return frames


def _grid(frames: Sequence[Frame], data: Any) -> tuple[np.ndarray, list[int]]:
    """Return the affine (4, 4) to RAS mm, and the slice of each frame, from 0 along the normal."""
    first = frames[0]
    normal = np.cross(first.axes[0], first.axes[1])
    positions = np.array([frame.position_mm for frame in frames])
    along = positions @ normal
    start, last = int(along.argmin()), int(along.argmax())
    distance = _distance(along - along[start], data)
    places = np.rint((along - along[start]) / distance).astype(int)
    if places.max() >= MAX_SLICES:
        raise Unusable(f"E_TOOBIG: its frames span {places.max() + 1:,} slices")
    step = normal * distance
    if places[last] > 0:
        step = (positions[last] - positions[start]) / places[last]
    beside = positions - positions[start] - places[:, None] * step
    if np.abs(beside).max() > OFF_GRID * max(distance, *first.spacing_mm):
        raise Unusable("E_UNEVEN: its frames do not lie above each other")
    affine = np.eye(4)
    affine[:3, 0] = first.axes[0] * first.spacing_mm[1]
    affine[:3, 1] = first.axes[1] * first.spacing_mm[0]
    affine[:3, 2], affine[:3, 3] = step, positions[start]
    affine[:3] *= TO_RAS[:, None]
    return affine, places.tolist()


def _first_slice(geometry: Geometry, scan: Geometry) -> int | None:
    """Return the slice of the scan that is the first one here; None if these are not its slices."""
    if geometry.shape[:2] != scan.shape[:2]:
        return None
    corners = geometry.corners()
    offsets = scan.to_index(geometry.to_world_mm(corners)) - corners
    start = np.rint(offsets[0])
    if start[:2].any() or np.abs(offsets - start).max() >= SAME_GRID_TOLERANCE_VOXELS:
        return None
    first = int(start[2])
    return first if 0 <= first <= scan.shape[2] - geometry.shape[2] else None


def _distance(offsets: np.ndarray, data: Any) -> float:
    """Return the distance of slices in mm, of which each offset (n,) must be a multiple.

    It is that which the header states, or the smallest between two frames: as empty frames are
    left out, most frames may be further apart.
    """
    gaps = np.diff(np.sort(offsets))
    gaps = gaps[gaps > SAME_PLACE_MM]
    distances = [*_stated_distances(data), *([float(gaps.min())] if len(gaps) else [])]
    if not distances:
        raise Unusable("E_NOGEOM: the distance of its slices is unknown")
    distance = next((mm for mm in distances if _is_even(offsets, mm)), None)
    if distance is None:
        raise Unusable(f"E_UNEVEN: its frames are not multiples of {distances[0]:.4g} mm apart")
    return distance


def _is_even(offsets: np.ndarray, distance: float) -> bool:
    steps = offsets / distance
    return bool(np.abs(steps - np.rint(steps)).max() < OFF_GRID)


def _stated_distances(data: Any) -> list[float]:
    measures = [
        item
        for group in items_of(data, "SharedFunctionalGroupsSequence")
        for item in items_of(group, "PixelMeasuresSequence")
    ]
    values = [item.get(name) for name in DISTANCES for item in measures]
    numbers = [float(value) for value in values if value is not None]
    return [mm for mm in numbers if math.isfinite(mm) and mm > 0]


def _segments(data: Any, n: int, kind: str) -> list[int]:
    """Return the number of the segment of each frame, which all frames may share."""
    if kind == LABELS:
        return [0] * n
    shared = items_of(data, "SharedFunctionalGroupsSequence")
    segments = []
    for group in data.PerFrameFunctionalGroupsSequence:
        items = [
            item
            for groups in (group, *shared)
            for item in items_of(groups, "SegmentIdentificationSequence")
        ]
        if not items:
            raise Unusable("E_LABELS: a frame does not say which segment it shows")
        segments.append(int(items[0].ReferencedSegmentNumber))
    return segments


def _padding(data: Any) -> tuple[int, ...]:
    value = data.get("PixelPaddingValue")
    return () if value is None else (int(value),)


def read_voxels(header: ScanHeader, path: Path) -> tuple[np.ndarray, str]:
    """Return the labels (I, J, K), the numbers of the segments, and the SHA-256 of the file.

    Raises:
        ScanError: segments overlap (`E_OVERLAP`), or pixels are missing or damaged.
    """
    seg = header.content
    assert isinstance(seg, Segmentation)
    with opened_raw(header.path) as file:
        content = rest_of(file)
    labels = np.zeros(header.geometry.shape[::-1], header.dtype)
    overlaps: dict[tuple[int, int], None] = {}
    for index, stored in _stored_frames(seg, content, path):
        values = _labels_of(seg, index, stored, header.dtype)
        target = labels[seg.places[index]]
        is_new = values != 0
        both = is_new & (target != 0) & (target != values)
        if both.any() and len(overlaps) < MAX_LISTED:
            pairs = np.unique(np.sort([target[both], values[both]], axis=0), axis=1)
            overlaps |= {(int(one), int(other)): None for one, other in pairs.T[:MAX_LISTED]}
        np.copyto(target, values, where=is_new)
    if overlaps:
        raise overlap_refusal(list(overlaps), seg.names, path)
    return labels.T, hashlib.sha256(content).hexdigest()


def overlap_refusal(pairs: Sequence[tuple[int, int]], names: dict[int, str], path: Path):
    """Return the error for segments or regions that share voxels."""
    texts = [" and ".join(shown(names[label]) for label in pair) for pair in pairs]
    problem = f"holds regions that overlap: {'; '.join(texts[:MAX_LISTED])}"
    return refusal(path, "E_OVERLAP", problem, overlap_fix(path, names, pairs[0]))


def _labels_of(seg: Segmentation, index: int, stored: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return the labels (rows, columns) of a frame; 0 where no segment that is taken is."""
    if seg.kind == LABELS:
        is_taken = np.isin(stored, list(seg.names)) & ~np.isin(stored, seg.background)
        return np.where(is_taken, stored, 0).astype(dtype)
    if seg.segments[index] not in seg.names:
        return np.zeros(stored.shape, dtype)
    if seg.kind == FRACTIONAL:
        return stored.astype(dtype)
    return (stored != 0).astype(dtype) * dtype.type(seg.segments[index])


def _stored_frames(
    seg: Segmentation, content: bytes, path: Path
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the index and the stored (rows, columns) of each frame."""
    pixels = seg.frames[0].pixels
    if problem := codec_problem(pixels.syntax):
        raise refusal(path, "E_CODEC", problem, CODEC_FIX)
    if pixels.bits_allocated > 1 or pixels.syntax in PLUGINS:
        yield from enumerate(_decoded(content, pixels.syntax, len(seg.frames), path))
        return
    n = math.prod(pixels.shape)
    stored = _bits(content, pixels, n * len(seg.frames), path)
    for index in range(len(seg.frames)):  # no gap is left between frames
        first, last = index * n, (index + 1) * n
        bits = np.unpackbits(stored[first // 8 : -(-last // 8)], bitorder="little")
        yield index, bits[first % 8 :][:n].reshape(pixels.shape)


def _bits(content: bytes, pixels: PixelFormat, n: int, path: Path) -> np.ndarray:
    """Return the bytes that hold `n` pixels of one bit."""
    if pixels.offset is None:
        stored = _parsed(content).PixelData
    else:
        stored = content[pixels.offset + (8 if pixels.syntax == IMPLICIT else 12) :]
    n_bytes = -(-n // 8)
    if len(stored) < n_bytes:
        text = f"holds {len(stored):,} of {n_bytes:,} bytes of pixels"
        raise refusal(path, "E_TRUNCATED", text, COPY_AGAIN)
    return np.frombuffer(stored, np.uint8, n_bytes)


def _decoded(content: bytes, syntax: str, n: int, path: Path) -> Iterator[np.ndarray]:
    """Yield frames that are compressed, or of whole bytes, as a stated decoder gives them."""
    from pydicom.pixels import iter_pixels

    plugin, _ = PLUGINS.get(syntax, ("", ""))
    n_decoded = 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for array in iter_pixels(_parsed(content), raw=True, decoding_plugin=plugin):
                n_decoded += 1
                yield array
    except Exception as error:  # decoders raise many types on damaged pixels
        reason = f"cannot be decoded ({reason_of(error)})"
        raise refusal(path, "E_DAMAGED", reason, COPY_AGAIN) from error
    if n_decoded != n:
        raise refusal(path, "E_TRUNCATED", f"holds {n_decoded} of {n} frames", COPY_AGAIN)


def _parsed(content: bytes) -> Any:
    from pydicom import dcmread

    return dcmread(io.BytesIO(content))


def read_names(header: ScanHeader) -> dict[int, str]:
    """Return label → name of the segments that are taken."""
    assert isinstance(header.content, Segmentation)
    return {label: name for label, name in header.content.names.items() if name}

"""Segmentations of 3D Slicer, `.seg.nrrd`: labels with names, in layers; read and encode them."""

from __future__ import annotations

import colorsys
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from volseg.inputs import MAX_NAME, label_value, shorten
from volseg.io.gzip_stream import fill, refusal
from volseg.io.header import (
    ScanHeader,
    SeriesShape,
    checked_grid,
    rounded,
    volume_shape,
)
from volseg.io.nrrd import Axes, Fields, encode_with, parse_fields, read_fields, scan_header
from volseg.io.series import split_volume
from volseg.io.text_header import header_refusal, shown
from volseg.io.voxels import FileContent, opened_voxels
from volseg.io.voxels import read_voxels as read_one_layer
from volseg.volume import Volume

MAX_SEGMENTS = 1000
BLOCK_VALUES = 2**20  # of all layers, merged together
MAX_LISTED = 3  # pairs of segments in a message
HUE_STEP = (math.sqrt(5) - 1) / 2  # neighbouring labels get hues far apart


def read_header(path: Path) -> ScanHeader:
    """Read the header of a segmentation, without voxels.

    Its grid may be a part of that of the scan.

    Raises:
        ScanError: as for NRRD; or two segments have one label (`E_LABELS`), or the segments of
            several layers cannot be told apart (`E_HEADER`).

    Source: https://apidocs.slicer.org/main/classvtkMRMLSegmentationStorageNode.html
    """
    path, _ = split_volume(path)
    fields = read_fields(path)
    axes = fields.axes()
    shape = volume_shape([axes.sizes[axis] for axis in axes.spatial], path).shape
    n_layers = _n_layers(axes, path)
    _segments(fields, n_layers)
    return scan_header(fields, axes, SeriesShape(shape, n_after=n_layers - 1))


def read_voxels(header: ScanHeader, path: Path) -> tuple[np.ndarray, str]:
    """Return the labels (I, J, K) of all layers in one, in native byte order, and the SHA-256.

    Raises:
        ScanError: two segments overlap (`E_OVERLAP`), or as `read_voxels` of other formats.
    """
    n_layers = 1 + header.n_after // header.n_bytes
    if n_layers == 1:
        return read_one_layer(header, path)
    n_voxels = math.prod(header.geometry.shape)
    labels = np.zeros(n_voxels, header.dtype.newbyteorder("="))
    overlaps: set[tuple[tuple[int, int], ...]] = set()
    with opened_voxels(header, path) as voxels:
        step = max(1, BLOCK_VALUES // n_layers)
        for start in range(0, n_voxels, step):
            block = np.empty((min(step, n_voxels - start), n_layers), header.dtype)
            target = block.reshape(-1).view(np.uint8).data
            n_read = fill(voxels.stream, target)
            voxels.n_read += n_read
            if n_read < len(target):
                break
            # At most one layer of a voxel is not 0, or the segments overlap.
            labels[start : start + step] = block.sum(axis=1, dtype=labels.dtype)
            if len(overlaps) < MAX_LISTED:
                overlaps |= _overlaps(block)
    if overlaps:
        raise _overlap_refusal(overlaps, header, path)
    return labels.reshape(header.geometry.shape, order="F"), voxels.sha256


def read_names(header: ScanHeader) -> dict[int, str]:
    """Return label → name of the segments."""
    segments = _segments(parse_fields(header.stored, header.path))
    return {segment.label: segment.name for segment in segments if segment.name}


def encode(volume: Volume, path: Path, like: ScanHeader | None = None) -> FileContent:
    """Return the contents of a file whose segments are named after their labels, `label_1`.

    Raises:
        ScanError: `read_header` would refuse the grid.
        ValueError: the voxels are not labels.
    """
    return encode_named(volume, path, {})


def encode_named(volume: Volume, path: Path, names: Mapping[int, str]) -> FileContent:
    """Return the contents of a file that 3D Slicer opens with these names, and a colour of each.

    Args:
        names: label → name; a label without voxels becomes an empty segment.

    Raises:
        ScanError: `read_header` would refuse the grid.
        ValueError: the voxels are not labels.
    """
    volume_shape(volume.geometry.shape, path)
    checked_grid(volume.geometry.shape, rounded(volume.geometry.affine), path, source="affine")
    labels = volume.array
    if labels.dtype.kind not in "iu" or labels.min() < 0 or volume.is_scaled:
        raise ValueError("a segmentation holds labels, whole numbers from 0 up")
    values = sorted({*np.unique(labels).tolist(), *names} - {0})
    if len(values) > MAX_SEGMENTS:
        raise ValueError(f"{len(values):,} labels; a segmentation holds up to {MAX_SEGMENTS:,}")
    keys = {}
    extent = " ".join(f"0 {n - 1}" for n in labels.shape)
    for number, value in enumerate(values):
        segment = f"Segment{number}"
        red, green, blue = colorsys.hsv_to_rgb(value * HUE_STEP % 1, 0.65, 0.9)
        keys |= {
            f"{segment}_ID": f"Segment_{value}",
            f"{segment}_Name": _one_line(names.get(value) or f"label_{value}"),
            f"{segment}_NameAutoGenerated": "0",
            f"{segment}_Color": f"{red:.6f} {green:.6f} {blue:.6f}",
            f"{segment}_ColorAutoGenerated": "0",
            f"{segment}_Extent": extent,
            f"{segment}_LabelValue": str(value),
            f"{segment}_Layer": "0",
            f"{segment}_Tags": "",
        }
    keys |= {
        "Segmentation_ContainedRepresentationNames": "Binary labelmap|",
        "Segmentation_MasterRepresentation": "Binary labelmap",
        "Segmentation_ReferenceImageExtentOffset": "0 0 0",
    }
    return encode_with(volume, keys)


def _one_line(name: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in name).strip()


# ---- segments


@dataclass(frozen=True, slots=True)
class _Segment:
    """A named label of a layer; its name may be empty."""

    name: str
    label: int
    layer: int


def _segments(fields: Fields, n_layers: int | None = None) -> list[_Segment]:
    """Return the checked segments, each with a label of its own.

    Args:
        n_layers: of the file; None if they were checked before.
    """
    path, keys = fields.path, fields.keys
    numbers = [match[1] for key in keys if (match := re.fullmatch(r"Segment([0-9]{1,6})_ID", key))]
    segments: dict[int, _Segment] = {}
    for number in numbers:
        name = shorten(keys.get(f"Segment{number}_Name") or keys[f"Segment{number}_ID"], MAX_NAME)
        label, layer = (
            label_value(keys.get(f"Segment{number}_{key}", "")) for key in ("LabelValue", "Layer")
        )
        if not label or layer is None:
            problem = f"segment {shown(name)} has no label value and layer, as in files of 2019"
            fix = "open it in a current 3D Slicer and save it again"
            raise refusal(path, "E_LABELS", problem, fix)
        other = segments.setdefault(label, _Segment(name, label, layer))
        if other.layer != layer or other.name != name:
            problem = f"segments {shown(other.name)} and {shown(name)} both have the label {label}"
            raise refusal(path, "E_LABELS", problem, _FIX)
    if n_layers is not None:
        _check_layers(segments.values(), n_layers, path)
    return list(segments.values())


def _check_layers(segments: Iterable[_Segment], n_layers: int, path: Path) -> None:
    layers = {segment.layer for segment in segments}
    if n_layers > 1 and layers != set(range(n_layers)):
        problem = f"states segments of {len(layers)} of its {n_layers} layers"
        raise header_refusal(path, problem)
    if max(layers, default=0) >= n_layers:
        raise header_refusal(path, f"has a segment in layer {max(layers)} of {n_layers}")


def _n_layers(axes: Axes, path: Path) -> int:
    """Return the number of labels of each voxel; refuse several masks, as over time."""
    n_layers = axes.n_before
    n_others = math.prod(axes.sizes) // math.prod(axes.sizes[axis] for axis in axes.spatial)
    if n_others != n_layers or n_layers > MAX_SEGMENTS:
        problem = f"has the sizes {' '.join(map(str, axes.sizes))}, which are not those of layers"
        raise refusal(path, "E_NDIM", problem, "give one 3-D segmentation")
    return n_layers


def _overlaps(block: np.ndarray) -> set[tuple[tuple[int, int], ...]]:
    """Return the sets of (layer, label) that share a voxel of (N, layers)."""
    rows = block[np.count_nonzero(block, axis=1) > 1]
    return {
        tuple((layer, value) for layer, value in enumerate(row) if value)
        for row in np.unique(rows, axis=0)[:MAX_LISTED].tolist()
    }


def _overlap_refusal(overlaps: set, header: ScanHeader, path: Path):
    segments = _segments(parse_fields(header.stored, header.path))
    names = {(segment.layer, segment.label): segment.name for segment in segments}
    groups = [
        " and ".join(
            shown(names.get(part, f"label {part[1]} of layer {part[0]}")) for part in parts
        )
        for parts in sorted(overlaps)
    ]
    problem = f"its segments overlap: {'; '.join(groups[:MAX_LISTED])}"
    return refusal(path, "E_OVERLAP", problem, _FIX)


_FIX = (
    "in 3D Slicer's Segment Editor set Modify other segments to Overwrite all, and save again; or "
    "export each segment"
)

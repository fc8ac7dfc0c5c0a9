"""Grey windows: which intensities a picture shows as black and as white."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from volseg.volume import BoundingBox, Volume

Window = tuple[float, float]  # intensities shown as black and as white
REACH_MM = 15.0  # margin around a lesion whose intensities set the window
MIN_WIDTH_HU, CT_RANGE_HU = 200.0, (-1024.0, 3071.0)
AIR_HU = -950.0  # below the HU of lung, above those of the air around a patient
SOFT_TISSUE_HU = (-160.0, 240.0)  # always among the grey levels of a page
COVERED = 0.9  # part of a preset that the grey levels of a page must cover
SAMPLED = 1_000_000  # voxels, for percentiles
MARGIN = 0.3  # of the width, on either side


@dataclass(frozen=True, slots=True)
class Preset:
    """A window by name: the intensities shown as black and as white."""

    name: str
    low: float
    high: float


PRESETS = {
    "HU": (
        Preset("soft tissue", *SOFT_TISSUE_HU),
        Preset("lung", -1350.0, 150.0),
        Preset("bone", -600.0, 1400.0),
        Preset("liver", -15.0, 135.0),
        Preset("brain", 0.0, 80.0),
        Preset("angiography", 0.0, 600.0),
    ),
    "SUV": (Preset("SUV 0 to 5", 0, 5), Preset("SUV 0 to 10", 0, 10), Preset("SUV 0 to 20", 0, 20)),
}


def presets(unit: str, window: Window, stored_range: Window) -> list[Preset]:
    """Return the windows that a page offers: its own, those of the modality, and the whole range.

    A preset is offered if the grey levels of the page cover nine tenths of it.

    Args:
        stored_range: intensities of the lowest and the highest grey level.
    """
    low, high = stored_range
    lowest = CT_RANGE_HU[0] if unit == "HU" else -math.inf  # below it there is nothing to show
    offered = [Preset("lesions", *window)]
    for preset in PRESETS.get(unit, ()):
        start = max(preset.low, lowest)
        shown = min(high, preset.high) - max(low, start)
        if shown >= COVERED * (preset.high - start):
            offered.append(preset)
    quarter = (window[1] - window[0]) / 4
    offered.append(Preset("more contrast", window[0] + quarter, window[1] - quarter))
    return [*offered, Preset("whole range", low, high)]


def lesion_window(samples: Sequence[np.ndarray]) -> Window:
    """Return the window that holds 90 % of each sample of intensities, and a margin."""
    ends = np.array([np.percentile(values, (5, 95)) for values in samples])
    low, high = float(ends.min()), float(ends.max())
    margin = max(MARGIN * (high - low), 1e-6)
    return low - margin, high + margin


def whole_window(values: np.ndarray) -> Window:
    """Return the window that holds 98 % of the intensities."""
    low, high = np.percentile(values, (1, 99))
    return float(low), float(max(high, low + 1e-6))


def scan_window(
    scan: Volume, ids: np.ndarray, boxes: Sequence[BoundingBox], body: BoundingBox, *, unit: str
) -> Window:
    """Return a window for the whole scan in which the lesions can be seen.

    CT: that of the lesions and of what lies around them, without the air outside the body, at least
    200 HU wide. Other modalities: it holds 98 % of the body and 90 % of the voxels of each lesion.

    Args:
        boxes: of the lesions, with the margin of `REACH_MM`.
    """
    part = scan.intensities(sampled(scan.array[body.slices]))
    lesions = [
        scan.intensities(_lesion_sample(scan.array[box.slices], ids[box.slices])) for box in boxes
    ]
    if unit == "HU":
        around = [scan.intensities(sampled(scan.array[box.slices])) for box in boxes] or [part]
        low, high = lesion_window([*lesions, *map(_without_air, around)])
        low, high = max(low, CT_RANGE_HU[0]), min(high, CT_RANGE_HU[1])
        missing = max(0.0, MIN_WIDTH_HU - (high - low)) / 2
        return low - missing, high + missing
    ends = [np.percentile(values, (5, 95)) for values in lesions]
    ends.append(np.percentile(part, (1, 99)))
    low, high = float(np.min(ends)), float(np.max(ends))
    if high - low > 1e-6 * max(abs(low), abs(high)):
        return low, high
    ends = np.array([np.fmin.reduce(scan.array, axis=None), np.fmax.reduce(scan.array, axis=None)])
    low, high = sorted(np.nan_to_num(scan.intensities(ends).astype(np.float64)).tolist())
    return (low, high) if low < high else (low - 0.5, low + 0.5)


def sampled(array: np.ndarray, most: int = SAMPLED) -> np.ndarray:
    """Return about `most` evenly spaced voxels without non-finite ones; a 0 if none is left."""
    step = max(1, math.ceil((array.size / most) ** (1 / 3)))
    return _finite(array[tuple(slice(None, None, min(step, max(1, n // 8))) for n in array.shape)])


def _lesion_sample(stored: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return the finite lesion voxels in a box, in large boxes an evenly spaced sample of them."""
    is_large = stored.size > 8 * SAMPLED
    step = max(1, math.floor((stored.size / SAMPLED) ** (1 / 3))) if is_large else 1
    sparse = (slice(None, None, step),) * 3
    values = stored[sparse][ids[sparse] > 0]
    return _finite(values if values.size else stored[ids > 0])


def _finite(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind != "f":
        return values
    finite = values[np.isfinite(values)]
    return finite if finite.size else np.zeros(1, values.dtype)


def _without_air(values: np.ndarray) -> np.ndarray:
    """Drop the air outside the body, unless little else is left; lung stays."""
    kept = values[values > AIR_HU]
    return kept if kept.size * 10 > values.size else values

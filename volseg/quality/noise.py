"""Noise of a scan, estimated in its homogeneous parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from volseg.quality.border import background_below
from volseg.quality.slices import slice_axis
from volseg.volume import Volume

EDGE = 7  # voxels of a patch along both axes
MAX_SLICES = 32  # evenly spaced, in which patches are taken
SHORTEST = 0.1  # part of the patches that the shortest interval of deviations holds
MIN_PATCHES = 50
TISSUE_HU = (-150.0, 150.0)  # means of patches in CT; lung and bone have texture of their own
ROUNDING = 1e-6  # of the intensities: smaller deviations come from computing them
WATER_HU = 1000.0  # above air: the signal of a CT counts from air


@dataclass(frozen=True, slots=True)
class Noise:
    """Standard deviation of the noise, and the signal in the same patches; None if unknown."""

    sd: float | None = None
    signal: float | None = None

    @property
    def snr(self) -> float | None:
        """Signal / noise; None without noise."""
        return self.signal / self.sd if self.sd and self.signal is not None else None


def estimate_noise(scan: Volume, *, is_hu: bool) -> Noise:
    """Estimate the standard deviation of the noise within slices.

    A slice is cut into patches of 7 × 7 voxels. The deviation of a patch is that of its voxels from
    a plane through them, with 46 degrees of freedom, so a gradient of intensity does not count. In
    homogeneous tissue it is the noise, elsewhere it is larger: most deviations lie near the noise,
    so it is the mean in the shortest interval that holds a tenth of them. Noise that is
    smooth over more than a patch is missed. The signal is the median of the patches in that
    interval; in HU it counts from air.

    Args:
        is_hu: patches of soft tissue count, else those brighter than the background.

    Source: global noise level, Christianson et al., AJR 205:W93 (2015), with planes removed.
    """
    deviations, means = _patches(scan, is_hu=is_hu)
    if deviations.size < MIN_PATCHES:
        return Noise()
    order = np.argsort(deviations)
    n = max(MIN_PATCHES // 2, round(SHORTEST * order.size))
    ordered = deviations[order]
    start = int(np.argmin(ordered[n - 1 :] - ordered[: order.size - n + 1]))
    part = order[start : start + n]
    signal, sd = float(np.median(means[part])), float(deviations[part].mean())
    if sd < ROUNDING * float(np.abs(means).max()):
        sd = 0.0
    return Noise(sd, signal + WATER_HU if is_hu else abs(signal))


def _patches(scan: Volume, *, is_hu: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the deviation from a plane and the mean of each patch (N,) of tissue."""
    low, high = TISSUE_HU if is_hu else (background_below(scan, is_hu=False), np.inf)
    deviations, means = [np.empty(0)], [np.empty(0)]
    for values in _chosen_slices(scan):
        n, m = values.shape[0] // EDGE, values.shape[1] // EDGE
        cut = values[: n * EDGE, : m * EDGE].reshape(n, EDGE, m, EDGE)
        patches = cut.transpose(0, 2, 1, 3).reshape(n * m, EDGE * EDGE)
        mean = patches.mean(axis=1)
        is_tissue = (mean > low) & (mean < high)
        centred = patches[is_tissue] - mean[is_tissue, None]
        residual = (centred**2).sum(axis=1) - ((centred @ _SLOPES) ** 2).sum(axis=1)
        deviations.append(np.sqrt(np.maximum(residual, 0) / (EDGE * EDGE - 3)))
        means.append(mean[is_tissue])
    return np.concatenate(deviations), np.concatenate(means)


def _slopes() -> np.ndarray:
    """Return an orthonormal basis (49, 2) of the planes of mean 0 on a patch."""
    along = np.arange(EDGE) - (EDGE - 1) / 2
    basis = np.stack([np.repeat(along, EDGE), np.tile(along, EDGE)], axis=1)
    return basis / np.linalg.norm(basis, axis=0)


_SLOPES = _slopes()


def _chosen_slices(scan: Volume) -> Iterator[np.ndarray]:
    """Yield the intensities (…, …) of up to 32 evenly spaced slices."""
    canonical = scan.canonical()
    axis = slice_axis(canonical.geometry)
    n = canonical.array.shape[axis]
    numbers = np.unique(np.linspace(0, n - 1, min(n, MAX_SLICES)).round().astype(int))
    for number in numbers.tolist():
        part = canonical.array[(slice(None),) * axis + (number,)]
        yield np.nan_to_num(canonical.intensities(part).astype(np.float64))

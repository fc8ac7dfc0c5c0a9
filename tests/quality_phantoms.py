"""Seeded scans of made-up patients, sound or with one planted fault."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from volseg.volume import Geometry, Volume

AIR_HU, TISSUE_HU, FAT_HU = -1000.0, 40.0, -100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Patient:
    """How a phantom is made: a body of soft tissue with random organs along a stack of slices."""

    seed: int
    shape: tuple[int, int, int] = (52, 46, 30)
    spacing_mm: tuple[float, float, float] = (4.0, 4.0, 5.0)
    noise: float = 12.0
    centre: tuple[float, float] = (0.5, 0.5)  # of the body, in parts of the grid
    is_ct: bool = True

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.shape, np.diag([*self.spacing_mm, 1.0]))

    def intensities(self) -> np.ndarray:
        """Return (I, J, K) without noise: HU, or the signal of an MR with air at 0."""
        rng = np.random.default_rng(self.seed)
        i, j, k = (np.arange(n) for n in self.shape)
        place = np.stack(np.meshgrid(i, j, k, indexing="ij"), axis=-1) * np.array(self.spacing_mm)
        extent = np.array(self.shape) * np.array(self.spacing_mm)
        middle = extent[:2] * np.array(self.centre)
        height = place[..., 2] / 150
        radii = extent[:2] * np.array(rng.uniform(0.33, 0.4, 2))
        swell = 1 + 0.08 * np.sin(3 * height + rng.uniform(0, 6))
        inside = (((place[..., :2] - middle) / radii) ** 2).sum(-1) < swell
        array = np.where(inside, TISSUE_HU, AIR_HU)
        for _ in range(14):
            organ = rng.uniform(np.r_[middle - radii, 0], np.r_[middle + radii, extent[2]])
            near = ((place - organ) ** 2).sum(-1) < rng.uniform(8, 30) ** 2
            array[near & inside] = rng.choice([FAT_HU, 0.0, 80.0, 120.0, 200.0, -700.0])
        return array if self.is_ct else np.where(inside, 600 + array, 0.0)

    def scan(self) -> Volume:
        """Return the scan with noise, rounded to whole numbers."""
        rng = np.random.default_rng(self.seed + 1000)
        array = self.intensities()
        if self.is_ct:
            noisy = array + rng.normal(0, self.noise, self.shape)
        else:  # the magnitude of a complex signal
            noisy = np.hypot(
                array + rng.normal(0, self.noise, self.shape), rng.normal(0, self.noise, self.shape)
            )
        return Volume(np.rint(noisy).astype(np.int16), self.geometry)


@cache
def dataset(n: int = 10, **how: object) -> tuple[Volume, ...]:
    """Return sound scans of `n` patients; spacing and noise vary a little. Read-only."""
    rng = np.random.default_rng(7)
    return tuple(
        replace(
            Patient(seed=seed, **how),  # type: ignore[arg-type]
            noise=float(rng.uniform(10, 14)),
            spacing_mm=tuple((np.array([4.0, 4.0, 5.0]) * rng.uniform(0.97, 1.03)).tolist()),
        ).scan()
        for seed in range(n)
    )


def with_array(scan: Volume, array: np.ndarray) -> Volume:
    """Return other voxels in the same place; the grid may have another number of slices."""
    return Volume(np.asarray(array), Geometry(array.shape, scan.geometry.affine))

"""Shared test helpers: grids, shapes with a known volume and the axis orders of a scan."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from itertools import permutations, product
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from volseg.registry import make_row
from volseg.volume import Geometry, Volume

DATA = Path(__file__).parents[2] / "shared" / "data"


def real_data(path: str) -> Path:
    """Return a file of the real data next to the checkout; skip the test if it is missing."""
    if not (DATA / path).exists():
        pytest.skip(f"the real data are not on this machine: {DATA / path}")
    return DATA / path


def row_with_examples(row: type) -> object:
    """Make a row of a table, such as a step, with a number for each setting without a default."""
    numbers = {
        field.name: _example_of(get_type_hints(row, include_extras=True)[field.name])
        for field in fields(row)
        if field.default is MISSING and field.default_factory is MISSING
    }
    return make_row(row.__name__, row, numbers)


def _example_of(annotation: object) -> float:
    for number in (5, 5.5, 0.3):
        with suppress(ValidationError):
            TypeAdapter(annotation).validate_python(number, strict=True)
            return number
    raise AssertionError(f"no number is a {annotation}: give the setting a default")


def assert_is_a_row(row: object) -> None:
    """Check that a row of a table is a frozen dataclass whose settings have names."""
    assert isinstance(row, type) and is_dataclass(row), f"{row} is not a dataclass"
    assert row.__dataclass_params__.frozen, f"{row} is not frozen"
    assert all(field.kw_only for field in fields(row)), f"{row} is not kw_only"


def ras(spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Return an affine (4, 4) along the world axes, with an offset."""
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = -10.3, 20.7, 5.1
    return affine


def lps(spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Return the affine of a typical DICOM series: indices grow to the left and posterior."""
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ ras(spacing_mm)


def oblique(
    spacing_mm: tuple[float, float, float], angles: tuple[float, float, float] = (0.3, -0.2, 0.5)
) -> np.ndarray:
    """Return an affine rotated about all three world axes, by angles in radians."""
    affine = ras(spacing_mm)
    for axis, angle in enumerate(angles):
        c, s = math.cos(angle), math.sin(angle)
        rotation = np.roll(np.array([[1, 0, 0], [0, c, -s], [0, s, c]]), (axis, axis), axis=(0, 1))
        affine[:3, :3] = rotation @ affine[:3, :3]
    return affine


def sheared(spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Return the affine of a tilted gantry: voxel volume is not the product of the spacings."""
    affine = ras(spacing_mm)
    affine[1, 2] = 0.4 * spacing_mm[2]
    return affine


GRIDS = {"ras": ras, "lps": lps, "oblique": oblique, "sheared": sheared}


def grid_around(radius_mm: float, affine: np.ndarray, margin: int = 2) -> Geometry:
    """Return the smallest grid with this affine that holds a ball and a margin of voxels."""
    rows = np.linalg.norm(np.linalg.inv(affine[:3, :3]), axis=1)  # index extent of a unit ball
    i, j, k = (2 * (math.ceil(radius_mm * row) + margin) + 1 for row in rows)
    return Geometry((i, j, k), affine)


def centre_mm(geometry: Geometry) -> np.ndarray:
    """Return the middle of the grid, (3,) RAS mm."""
    return geometry.to_world_mm((np.array([geometry.shape]) - 1) / 2)[0]


def ball(radius_mm: float, geometry: Geometry, centre: np.ndarray | None = None) -> np.ndarray:
    """Return a mask (I, J, K) of the voxel centres within `radius_mm` of `centre`.

    `centre` is in RAS mm; default: the middle of the grid.
    """
    index = np.indices(geometry.shape).reshape(3, -1).T
    centre = centre_mm(geometry) if centre is None else centre
    distance_mm = np.linalg.norm(geometry.to_world_mm(index) - centre, axis=1)
    return (distance_mm <= radius_mm).reshape(geometry.shape)


def ball_volume_mm3(radius_mm: float) -> float:
    return 4 / 3 * math.pi * radius_mm**3


def orientations(volume: Volume) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (array, affine) of the 48 ways to store the same voxels, the volume itself first."""
    for axes, flips in product(permutations(range(3)), product((False, True), repeat=3)):
        step = np.zeros((4, 4))
        step[3, 3] = 1
        for axis, (source, flip) in enumerate(zip(axes, flips, strict=True)):
            step[source, axis] = -1 if flip else 1
            step[source, 3] = volume.array.shape[source] - 1 if flip else 0
        slices = tuple(slice(None, None, -1 if flip else 1) for flip in flips)
        array = volume.array.transpose(axes)[slices]
        yield np.asfortranarray(array), volume.geometry.affine @ step


class CountingBackend:
    """A wrapper of a backend that counts its tiles."""

    head = None

    def __init__(self, backend):
        self._backend, self.tiles = backend, 0

    def logits(self, batch: np.ndarray) -> np.ndarray:
        self.tiles += len(batch)
        return self._backend.logits(batch)

    def release(self) -> None:
        self._backend.release()

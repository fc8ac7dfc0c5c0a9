"""The voxel grid and the scan on it, in RAS+ world coordinates (mm), independent of files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from operator import lt, sub

import numpy as np

WORLD_AXES = {"R": 0, "A": 1, "S": 2}  # name of each canonical axis → its index
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # affines of DICOM and ITK → those of NIfTI
SLAB_VOXELS = 4_000_000  # processed together, which limits temporary memory
SAME_GRID_TOLERANCE_VOXELS = 0.1  # smallest corner displacement between different grids
SAMPLED_PER_AXIS = 24  # voxels that estimate how much two grids overlap
MAX_COSINE = 1e-3  # between two axes: above it a grid is tilted, below it is rounding
RIGID_TOLERANCE = 1e-6  # of the cosines between the axes of a rotation


@dataclass(frozen=True, slots=True, eq=False)
class Rigid:
    """A rotation and a translation, from points in RAS mm to points in RAS mm.

    Args:
        matrix: (4, 4) float64.

    Raises:
        ValueError: the matrix is not a rotation and a translation.
    """

    matrix: np.ndarray

    def __post_init__(self) -> None:
        matrix = np.array(self.matrix, dtype=np.float64)
        if matrix.shape != (4, 4) or not np.array_equal(matrix[3], (0, 0, 0, 1)):
            raise ValueError(f"a rigid transform is (4, 4) with last row 0 0 0 1, got\n{matrix}")
        rotation = matrix[:3, :3]
        error = np.abs(rotation.T @ rotation - np.eye(3)).max()
        if not (error <= RIGID_TOLERANCE and np.linalg.det(rotation) > 0):
            raise ValueError(f"a rigid transform neither scales, shears nor mirrors, got\n{matrix}")
        matrix.setflags(write=False)
        object.__setattr__(self, "matrix", matrix)

    @classmethod
    def identity(cls) -> Rigid:
        return cls(np.eye(4))

    @classmethod
    def about(cls, centre_mm: np.ndarray, rotation: np.ndarray, shift_mm: np.ndarray) -> Rigid:
        """Return the (3, 3) rotation about a point (3,), followed by a shift (3,)."""
        matrix = np.eye(4)
        matrix[:3, :3] = rotation
        matrix[:3, 3] = centre_mm + shift_mm - rotation @ centre_mm
        return cls(matrix)

    @property
    def rotation(self) -> np.ndarray:
        """(3, 3); it turns directions."""
        return self.matrix[:3, :3]

    @property
    def angle_deg(self) -> float:
        """Angle of the rotation in degrees, 0 to 180."""
        cosine = (np.trace(self.rotation) - 1) / 2
        return math.degrees(math.acos(min(1.0, max(-1.0, float(cosine)))))

    def apply(self, points_mm: np.ndarray) -> np.ndarray:
        """Transform (N, 3) points."""
        return points_mm @ self.rotation.T + self.matrix[:3, 3]

    def inverse(self) -> Rigid:
        return Rigid(np.linalg.inv(self.matrix))


@dataclass(frozen=True, slots=True, eq=False)
class Geometry:
    """The position of a voxel grid in the patient.

    Args:
        shape: voxels (I, J, K).
        affine: (4, 4) float64, voxel index → RAS mm; index 0 is the centre of the first voxel.

    Raises:
        ValueError: the affine is not a finite, invertible (4, 4) matrix, or an axis has no voxel.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray

    def __post_init__(self) -> None:
        shape = tuple(int(n) for n in self.shape)
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"shape must be three positive numbers of voxels, got {self.shape}")
        affine = np.array(self.affine, dtype=np.float64)
        if affine.shape != (4, 4):
            raise ValueError(f"affine must have shape (4, 4), got {affine.shape}")
        if not np.isfinite(affine).all():
            raise ValueError(f"affine has values that are not finite:\n{affine}")
        if not np.array_equal(affine[3], (0, 0, 0, 1)):
            raise ValueError(f"the last row of affine must be 0 0 0 1, got {affine[3]}")
        # Unit-free: the volume spanned by the normalised axes is 0 if two of them are parallel.
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
        if lengths.min() <= 0 or abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-6:
            raise ValueError(f"affine is singular, so voxels have no volume:\n{affine}")
        affine.setflags(write=False)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "affine", affine)

    @property
    def voxel_steps_mm(self) -> np.ndarray:
        """(3, 3): the step in RAS mm of one voxel along each array axis, in columns."""
        return self.affine[:3, :3]

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance in mm between neighbouring voxel centres along each array axis."""
        i, j, k = np.linalg.norm(self.voxel_steps_mm, axis=0).tolist()
        return i, j, k

    @property
    def directions(self) -> np.ndarray:
        """(3, 3): the unit vector in RAS of each array axis, in columns."""
        return self.voxel_steps_mm / np.array(self.spacing_mm)

    @property
    def largest_cosine(self) -> float:
        """Largest |cosine| between two axes, or 1 less the length of one; 0 at right angles."""
        return float(np.abs(self.directions.T @ self.directions - np.eye(3)).max())

    @property
    def is_tilted(self) -> bool:
        """True if the axes are not at right angles, as those of a CT with a tilted gantry."""
        return self.largest_cosine > MAX_COSINE

    @property
    def slice_distances_mm(self) -> tuple[float, float, float]:
        """Distance in mm between neighbouring planes of voxels: the spacing, if at right angles."""
        if not self.is_tilted:
            return self.spacing_mm
        i, j, k = (1 / np.linalg.norm(np.linalg.inv(self.voxel_steps_mm), axis=1)).tolist()
        return i, j, k

    @property
    def voxel_volume_mm3(self) -> float:
        """|det A₃ₓ₃|: unlike the product of the spacings, exact for sheared grids too."""
        return float(abs(np.linalg.det(self.voxel_steps_mm)))

    @property
    def axis_codes(self) -> str:
        """Anatomical direction of each array axis, e.g. `LPS`."""
        return "".join(
            "RAS"[world] if sign > 0 else "LPI"[world] for world, sign in self._nearest_axes()
        )

    def _nearest_axes(self) -> list[tuple[int, int]]:
        """Return (world axis, sign) of each array axis, maximising the sum of |cosine|."""
        cosines = self.directions
        orders = [order for order in product(range(3), repeat=3) if len(set(order)) == 3]
        best = max(
            orders,
            key=lambda order: sum(abs(cosines[world, axis]) for axis, world in enumerate(order)),
        )
        return [(world, 1 if cosines[world, axis] > 0 else -1) for axis, world in enumerate(best)]

    def to_world_mm(self, indices: np.ndarray) -> np.ndarray:
        """Convert (N, 3) voxel indices to (N, 3) RAS mm."""
        return indices @ self.voxel_steps_mm.T + self.affine[:3, 3]

    def to_index(self, points_mm: np.ndarray) -> np.ndarray:
        """Convert (N, 3) RAS mm to (N, 3) fractional voxel indices; inverts `to_world_mm`."""
        return np.linalg.solve(self.voxel_steps_mm, (points_mm - self.affine[:3, 3]).T).T

    @property
    def centre_mm(self) -> np.ndarray:
        """Middle of the field of view, (3,) RAS mm."""
        return self.to_world_mm((np.array([self.shape]) - 1) / 2)[0]

    def index_matrix(self, other: Geometry, transform: Rigid | None = None) -> np.ndarray:
        """Return (4, 4): index on this grid → index on the other one.

        Args:
            transform: from points of this grid to points of the other; None: the same points.
        """
        transform = transform or Rigid.identity()
        return np.linalg.inv(other.affine) @ transform.matrix @ self.affine

    def corner_offset_voxels(self, other: Geometry) -> float:
        """Return the largest displacement of a corner voxel, in voxels of this grid.

        The grids must have equal shapes.
        """
        corners = self.corners()
        return float(np.abs(self.to_index(other.to_world_mm(corners)) - corners).max())

    def matches(self, other: Geometry) -> bool:
        """Check whether the shapes are equal and every corner lies within 0.1 voxel."""
        return not self.difference(other)

    def difference(self, other: Geometry) -> str:
        """Describe how the other grid differs, for an error message; empty if the two match."""
        offsets = self.to_world_mm(self.corners()) - other.to_world_mm(other.corners())
        mm = float(np.linalg.norm(offsets, axis=1).max())
        if self.shape != other.shape:
            return f"shape {other.shape} instead of {self.shape}, a corner is off by {mm:.3g} mm"
        voxels = self.corner_offset_voxels(other)
        if voxels < SAME_GRID_TOLERANCE_VOXELS:
            return ""
        return f"a corner is off by {voxels:.3g} voxels ({mm:.3g} mm)"

    def fraction_inside(self, other: Geometry, transform: Rigid | None = None) -> float:
        """Estimate the fraction of the voxels of this grid in the other's field of view (0 to 1).

        Args:
            transform: from points of this grid to points of the other; None: the same points.
        """
        steps = [np.linspace(0, n - 1, min(n, SAMPLED_PER_AXIS)) for n in self.shape]
        indices = np.stack(np.meshgrid(*steps, indexing="ij"), axis=-1).reshape(-1, 3)
        matrix = self.index_matrix(other, transform)
        mapped = indices @ matrix[:3, :3].T + matrix[:3, 3]
        inside = (mapped >= -0.5) & (mapped <= np.array(other.shape) - 0.5)
        return float(inside.all(axis=1).mean())

    def corners(self) -> np.ndarray:
        """Return the (8, 3) indices of the corner voxels."""
        return np.array(list(product(*[(0, n - 1) for n in self.shape])), dtype=np.float64)

    def crop(self, box: BoundingBox) -> Geometry:
        """Return the grid of the voxels inside the box, at the same position in the patient."""
        affine = self.affine.copy()
        affine[:3, 3] = self.to_world_mm(np.array([box.start]))[0]
        return Geometry(box.shape, affine)

    def reordered(self, order: AxisOrder) -> Geometry:
        """Return the grid of `order.apply(array)`: other indices, the same points."""
        affine = self.affine.copy()
        affine[:, :3] = self.affine[:, list(order.axes)]
        i, j, k = (self.shape[axis] for axis in order.axes)
        for axis, (n, flip) in enumerate(zip((i, j, k), order.flipped, strict=True)):
            if flip:
                affine[:3, 3] += affine[:3, axis] * (n - 1)
                affine[:3, axis] *= -1
        return Geometry((i, j, k), affine)

    def canonical(self) -> Geometry:
        """Return the grid whose axes are those nearest to R, A and S."""
        return self.reordered(AxisOrder.of(self))


@dataclass(frozen=True, slots=True)
class AxisOrder:
    """An order of array axes: axis n is the stored axis `axes[n]`, reversed where `flipped[n]`."""

    axes: tuple[int, int, int]
    flipped: tuple[bool, bool, bool]

    @classmethod
    def of(cls, geometry: Geometry) -> AxisOrder:
        """Return the canonical order: axis n is the stored one nearest world axis n (R, A, S)."""
        codes = geometry.axis_codes
        axes = [
            next(n for n, code in enumerate(codes) if code in pair) for pair in ("RL", "AP", "SI")
        ]
        flipped = [codes[axis] in "LPI" for axis in axes]
        return cls((axes[0], axes[1], axes[2]), (flipped[0], flipped[1], flipped[2]))

    @classmethod
    def stored(cls) -> AxisOrder:
        """Return the file order, slowest axis first, for networks that ignore orientation."""
        return cls((2, 1, 0), (False, False, False))

    def transposed(self, transpose: tuple[int, int, int]) -> AxisOrder:
        """Return the order whose axis n is axis `transpose[n]` of this one."""
        r, a, s = transpose
        axes, flipped = self.axes, self.flipped
        return AxisOrder((axes[r], axes[a], axes[s]), (flipped[r], flipped[a], flipped[s]))

    def apply(self, array: np.ndarray) -> np.ndarray:
        """Return a view of the stored (I, J, K) in this order; (R, A, S) for a canonical one."""
        array = array.transpose(self.axes)
        return array[tuple(slice(None, None, -1 if flip else None) for flip in self.flipped)]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Volume:
    """A scan or a mask on its grid.

    Args:
        array: (I, J, K), in its stored dtype.
        geometry: its grid; the shapes must agree.
        slope, intercept: intensity = stored value × slope + intercept; `intensities` applies them.
        sha256: hash of the file when it was read (of two files, both hashes joined by `+`); empty
            for a computed volume.
        unit: of the intensities, if the file proves it; empty if it does not.
    """

    array: np.ndarray
    geometry: Geometry
    slope: float = 1.0
    intercept: float = 0.0
    sha256: str = ""
    unit: str = ""

    def __post_init__(self) -> None:
        if self.array.shape != self.geometry.shape:
            raise ValueError(f"array has shape {self.array.shape}, expected {self.geometry.shape}")

    def __repr__(self) -> str:
        shape = " × ".join(map(str, self.array.shape))
        spacing = " × ".join(f"{mm:.4g}" for mm in self.geometry.spacing_mm)
        return (
            f"Volume({shape} voxels, {self.array.dtype}, {spacing} mm, {self.geometry.axis_codes})"
        )

    @property
    def is_scaled(self) -> bool:
        return self.slope != 1.0 or self.intercept != 0.0

    def intensities(self, stored: np.ndarray | None = None) -> np.ndarray:
        """Return intensities of stored values (default: all): float64 if scaled, else as stored."""
        values = self.array if stored is None else stored
        return values * np.float64(self.slope) + self.intercept if self.is_scaled else values

    def with_array(self, array: np.ndarray) -> Volume:
        """Return a volume on the same grid with other, unscaled voxels."""
        return Volume(array, self.geometry)

    def crop(self, box: BoundingBox) -> Volume:
        """Return the part inside the box, as a view."""
        return replace(self, array=self.array[box.slices], geometry=self.geometry.crop(box))

    def canonical(self) -> Volume:
        """Return a view along the axes nearest to R, A and S; equal for all 48 stored orders."""
        order = AxisOrder.of(self.geometry)
        return replace(self, array=order.apply(self.array), geometry=self.geometry.reordered(order))


@dataclass(frozen=True, slots=True)
class BoundingBox:
    """Half-open box of voxels, `start` ≤ index < `stop` on each axis."""

    start: tuple[int, int, int]
    stop: tuple[int, int, int]

    def __post_init__(self) -> None:
        pairs = list(zip(self.start, self.stop))
        if not len(self.start) == len(self.stop) == 3 or any(a < 0 or a >= b for a, b in pairs):
            limits = f"{self.start} to {self.stop}"
            raise ValueError(f"a box needs 0 ≤ start < stop on three axes, got {limits}")

    @classmethod
    def whole(cls, shape: tuple[int, int, int]) -> BoundingBox:
        return cls((0, 0, 0), shape)

    @classmethod
    def of(cls, slices: Sequence[slice]) -> BoundingBox:
        """Return the box of three slices with a start and a stop, as `find_objects` gives them."""
        return cls(_triple(side.start for side in slices), _triple(side.stop for side in slices))

    @classmethod
    def of_voxels(cls, voxels: np.ndarray) -> BoundingBox:
        """Return the smallest box of voxel indices (N, 3), N ≥ 1."""
        return cls(_triple(voxels.min(axis=0)), _triple(voxels.max(axis=0) + 1))

    @classmethod
    def around(cls, mask: np.ndarray) -> BoundingBox | None:
        """Return the smallest box of the non-zero voxels of (I, J, K); None if there is none."""
        return cls.where(lambda part: mask[part], mask)

    @classmethod
    def where(
        cls, test: Callable[[tuple[slice, slice, slice]], np.ndarray], array: np.ndarray
    ) -> BoundingBox | None:
        """Return the smallest box of the voxels of (I, J, K) that pass a test; None if none does.

        Args:
            test: slices of one slab of the array → array of the shape of that slab, 0 if it fails.
        """
        profiles = [np.zeros(n, bool) for n in array.shape]
        for part in slabs_of(array):
            passed = test(part)
            for axis, slab in enumerate(part):
                others = tuple(other for other in range(3) if other != axis)
                profiles[axis][slab] |= passed.any(axis=others)
        if not profiles[0].any():
            return None
        ends = [np.flatnonzero(profile)[[0, -1]] for profile in profiles]
        return cls(_triple(first for first, _ in ends), _triple(last + 1 for _, last in ends))

    def widened(self, margin: Sequence[int], shape: Sequence[int]) -> BoundingBox:
        """Return the box with a margin of voxels on both sides of each axis, within the grid."""
        start = (max(0, a - m) for a, m in zip(self.start, margin, strict=True))
        stop = (min(n, b + m) for b, m, n in zip(self.stop, margin, shape, strict=True))
        return BoundingBox(_triple(start), _triple(stop))

    def shifted(self, by: Sequence[int]) -> BoundingBox:
        """Return the box moved by a number of voxels along each axis."""
        return BoundingBox(_triple(np.add(self.start, by)), _triple(np.add(self.stop, by)))

    def hull(self, other: BoundingBox) -> BoundingBox:
        """Return the smallest box that holds both boxes."""
        start, stop = map(min, self.start, other.start), map(max, self.stop, other.stop)
        return BoundingBox(_triple(start), _triple(stop))

    def intersection(self, other: BoundingBox) -> BoundingBox | None:
        """Return the box of the voxels in both boxes; None if they do not overlap."""
        start = _triple(map(max, self.start, other.start))
        stop = _triple(map(min, self.stop, other.stop))
        return BoundingBox(start, stop) if all(map(lt, start, stop)) else None

    @property
    def shape(self) -> tuple[int, int, int]:
        return _triple(map(sub, self.stop, self.start))

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        i, j, k = map(slice, self.start, self.stop)
        return i, j, k


def _triple(numbers: Iterable[int]) -> tuple[int, int, int]:
    i, j, k = map(int, numbers)
    return i, j, k


def angle_deg(first: np.ndarray, second: np.ndarray) -> float:
    """Return the angle in degrees between two directions (3,), 0 to 180."""
    # With the sine too: near 0 the cosine alone loses half of its digits.
    sine = float(np.linalg.norm(np.cross(first, second)))
    return math.degrees(math.atan2(sine, float(first @ second)))


def slowest_axis(array: np.ndarray) -> int:
    """Return the axis along which neighbours are furthest apart in memory."""
    return int(np.argmax(np.abs(array.strides)))


def slabs_of(array: np.ndarray, voxels: int = SLAB_VOXELS) -> Iterator[tuple[slice, slice, slice]]:
    """Yield slabs of (I, J, K) along the slowest axis in memory, to limit temporary memory."""
    slow = slowest_axis(array)
    step = max(1, voxels * array.shape[slow] // max(1, array.size))
    whole = [slice(0, n) for n in array.shape]
    for start in range(0, array.shape[slow], step):
        slab = slice(start, min(array.shape[slow], start + step))
        i, j, k = (slab if axis == slow else whole[axis] for axis in range(3))
        yield i, j, k

"""Make the sample scans: CT phantoms with lesions of known volume, position and density.

    python sample_data/make_phantoms.py [--out FOLDER] [--seed N]

The scene is drawn in world RAS mm and sampled at the voxel centres of each grid, so every grid sees
an upright body. The truth comes from the analytic ball, or from the ball minus the cap cut off by
the field of view, never from counting voxels. This file does not import volseg, so that volseg is
not tested against itself.
"""

import csv
import gzip
import io
from argparse import ArgumentParser
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import nibabel as nib
import numpy as np

DEFAULT_SEED = 20261121

# The demo requires volumes within 5 % and densities within 2 HU of the truth. Placements and noise
# are redrawn until the perfect mask meets these tighter limits; the network may use the remainder.
MAX_VOXELISATION_ERROR = 0.01  # |voxel count * voxel volume / true visible volume - 1|
MAX_NOISE_BIAS_HU = 1.0  # |mean of the noise over a lesion|

AIR_HU = -1000.0
NOISE_SD_HU = 10.0
HOST_HU = (25.0, 70.0)  # soft tissue in which a lesion may lie
LESION_HU = (110, 190)  # at least four noise SDs above any host, far below bone
LARGE_RADIUS_MM = (5.5, 12.0)
SMALL_RADIUS_MM = (3.0, 4.5)
CUT_RADIUS_MM = (7.0, 11.0)
HOST_MARGIN_MM = 2.0  # host tissue around a lesion
LESION_GAP_MM = 4.0  # more than any voxel diagonal, so lesions stay separate components
BORDER_GAP_MM = 4.0  # more than any spacing, so a whole lesion has no voxel in an outermost slice
FIELD_OF_VIEW_MM = (102.0, 88.0, 70.0)  # along R, A, S
OFF_CENTRE_MM = 25.0  # shift of a field of view that cuts the body's left or right flank
MAX_DRAWS = 20_000

WORLD_AXIS = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseSpec:
    """Specification of one phantom; everything else is drawn from the case's own seed."""

    number: int
    split: str
    axis_codes: str = "LPS"
    spacing_mm: tuple[float, float, float] = (1.4, 1.4, 2.0)
    tilt_deg: float = 0.0  # rotation of the grid about a random axis
    n_large: int = 0
    n_small: int = 0
    cut_by: str = ""  # one lesion per letter, cut by that face of the field of view

    @property
    def subject(self) -> str:
        return f"phantom_{self.number:02d}"


CASES = (
    CaseSpec(number=1, split="train", axis_codes="RAS", n_large=3),
    CaseSpec(number=2, split="train", n_large=3, n_small=1),
    CaseSpec(
        number=3,
        split="train",
        axis_codes="RAS",
        spacing_mm=(1.5, 1.5, 2.0),
        tilt_deg=12,
        n_large=3,
    ),
    CaseSpec(number=4, split="train", axis_codes="PSR", spacing_mm=(1.5, 1.5, 2.2), n_large=3),
    CaseSpec(number=5, split="train", spacing_mm=(1.2, 1.2, 2.5), n_large=3),
    CaseSpec(number=6, split="train", axis_codes="RAS", spacing_mm=(1.4, 1.4, 1.9)),
    CaseSpec(
        number=7, split="train", spacing_mm=(1.4, 1.4, 2.2), tilt_deg=8, n_large=3, cut_by="S"
    ),
    CaseSpec(number=8, split="train", axis_codes="RAS", spacing_mm=(1.6, 1.6, 1.6), n_large=4),
    CaseSpec(
        number=9, split="train", axis_codes="LPI", spacing_mm=(1.3, 1.3, 2.4), n_large=2, n_small=2
    ),
    CaseSpec(
        number=10,
        split="train",
        axis_codes="ARS",
        spacing_mm=(1.5, 1.4, 2.0),
        tilt_deg=18,
        n_large=3,
    ),
    CaseSpec(number=11, split="train", n_large=2, cut_by="L"),
    CaseSpec(number=12, split="train", axis_codes="LSP", spacing_mm=(1.6, 1.6, 1.8), n_large=5),
    CaseSpec(number=21, split="train", axis_codes="RAS", spacing_mm=(1.2, 1.2, 2.5), n_large=5),
    CaseSpec(
        number=22, split="train", spacing_mm=(1.2, 1.2, 2.4), tilt_deg=10, n_large=4, n_small=1
    ),
    CaseSpec(number=23, split="train", axis_codes="PSR", spacing_mm=(1.5, 1.5, 2.3), n_large=4),
    CaseSpec(
        number=24, split="train", spacing_mm=(1.3, 1.3, 2.3), n_large=4, n_small=1, cut_by="S"
    ),
    CaseSpec(
        number=25, split="train", spacing_mm=(1.4, 1.4, 2.2), tilt_deg=9, n_large=3, cut_by="R"
    ),
    CaseSpec(number=26, split="train", axis_codes="RAS", n_large=2, n_small=1, cut_by="L"),
    CaseSpec(number=13, split="val", n_large=3),
    CaseSpec(
        number=14,
        split="val",
        axis_codes="RAS",
        spacing_mm=(1.5, 1.5, 2.2),
        tilt_deg=10,
        n_large=2,
        n_small=1,
    ),
    CaseSpec(number=15, split="test", n_large=4),
    CaseSpec(number=16, split="test", axis_codes="RAS", tilt_deg=15, n_large=3),
    CaseSpec(number=17, split="test", axis_codes="PSR", spacing_mm=(1.5, 1.5, 2.3), n_large=3),
    CaseSpec(number=18, split="test", spacing_mm=(1.2, 1.2, 2.5), n_large=3, cut_by="I"),
    CaseSpec(number=19, split="test", axis_codes="RAS", spacing_mm=(1.5, 1.5, 1.8)),
    CaseSpec(
        number=20,
        split="test",
        spacing_mm=(1.4, 1.4, 2.2),
        tilt_deg=7,
        n_large=2,
        n_small=1,
        cut_by="R",
    ),
)


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Voxel grid: `shape` (I, J, K) and `affine` (4, 4) voxel index → RAS mm.

    The field of view ends at the voxels' outer edges.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray

    @property
    def spacing_mm(self) -> np.ndarray:
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    @property
    def voxel_volume_mm3(self) -> float:
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    def to_world_mm(self, indices: np.ndarray) -> np.ndarray:
        """Map (..., 3) voxel indices to (..., 3) RAS mm."""
        return indices @ self.affine[:3, :3].T + self.affine[:3, 3]

    def to_index(self, points_mm: np.ndarray) -> np.ndarray:
        """Map (..., 3) RAS mm to (..., 3) fractional indices; the inverse of `to_world_mm`."""
        return (points_mm - self.affine[:3, 3]) @ np.linalg.inv(self.affine[:3, :3]).T

    def face_normals(self) -> np.ndarray:
        """Return (6, 3) outward unit normals: I low, I high, J low, J high, K low, K high."""
        inward = np.linalg.inv(self.affine[:3, :3])
        inward = inward / np.linalg.norm(inward, axis=1, keepdims=True)
        return np.stack([-inward, inward], axis=1).reshape(6, 3)

    def face_depths_mm(self, point_mm: np.ndarray) -> np.ndarray:
        """Return (6,) distances of a point to the faces in mm, negative if it lies outside.

        The order is that of `face_normals`.
        """
        index_per_mm = np.linalg.norm(np.linalg.inv(self.affine[:3, :3]), axis=1)
        index = self.to_index(point_mm)
        depths = np.stack([index + 0.5, np.array(self.shape) - 0.5 - index], axis=1)
        return (depths / index_per_mm[:, None]).reshape(6)


@dataclass(frozen=True, slots=True)
class Region:
    """Superellipsoid of one density in RAS mm; an infinite semi-axis makes it a cylinder."""

    hu: float
    centre_mm: tuple[float, float, float]
    semi_axes_mm: tuple[float, float, float]
    exponent: float = 2.0

    def contains(self, points_mm: np.ndarray) -> np.ndarray:
        """Return which of the (..., 3) points in RAS mm lie inside, as (...) bool."""
        offsets = np.abs(points_mm - np.array(self.centre_mm)) / np.array(self.semi_axes_mm)
        return (offsets**self.exponent).sum(axis=-1) <= 1


@dataclass(frozen=True, slots=True)
class Ball:
    """Lesion of one density in world RAS mm."""

    centre_mm: tuple[float, float, float]
    radius_mm: float
    hu: int

    def contains(self, points_mm: np.ndarray) -> np.ndarray:
        """Return which of the (..., 3) points in RAS mm lie inside, as (...) bool."""
        return np.linalg.norm(points_mm - np.array(self.centre_mm), axis=-1) <= self.radius_mm


@dataclass(frozen=True, slots=True)
class LesionTruth:
    """Row of truth.csv; lesion 1 is the largest.

    Volume and centroid are those of the part inside the field of view.
    """

    subject: str
    lesion: int
    radius_mm: float
    centroid_r_mm: float
    centroid_a_mm: float
    centroid_s_mm: float
    volume_mm3: float
    hu: int
    touches_border: bool


@dataclass(frozen=True, slots=True, eq=False)
class Phantom:
    """Scan on `grid`: `image` (I, J, K) int16 HU and `label` (I, J, K) uint8, 1 in lesions."""

    image: np.ndarray
    label: np.ndarray
    grid: Grid
    truth: tuple[LesionTruth, ...]


def main() -> None:
    parser = ArgumentParser(description="Make the sample phantoms and their truth.")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="folder to write to"
    )
    parser.add_argument(
        "--seed", type=int, default=DEFAULT_SEED, help="the committed files use %(default)s"
    )
    arguments = parser.parse_args()
    phantoms = {spec: make_phantom(spec, seed=arguments.seed) for spec in CASES}
    write_dataset(phantoms, arguments.out)
    n_lesions = sum(len(phantom.truth) for phantom in phantoms.values())
    print(f"{len(phantoms)} phantoms, {n_lesions} lesions → {arguments.out}")


def make_phantom(spec: CaseSpec, *, seed: int = DEFAULT_SEED) -> Phantom:
    """Make the phantom of one case, which depends only on `spec` and `seed`.

    Raises:
        RuntimeError: no placement or noise met the limits above within MAX_DRAWS draws.
    """
    seeds = np.random.SeedSequence(seed, spawn_key=(spec.number,)).spawn(4)
    scene_rng, grid_rng, lesion_rng, noise_rng = (np.random.default_rng(child) for child in seeds)
    body_centre_mm = np.round(scene_rng.uniform([-40, -180, -300], [40, -60, 300]), 1)
    regions = draw_anatomy(scene_rng, body_centre_mm)
    grid = draw_grid(spec, grid_rng, body_centre_mm)
    lesions = draw_lesions(spec, lesion_rng, grid, regions)

    points_mm = grid.to_world_mm(np.moveaxis(np.indices(grid.shape), 0, -1))
    insides = [lesion.contains(points_mm) for lesion in lesions]
    density = hu_at(points_mm, regions)
    label = np.zeros(grid.shape, np.uint8)
    for lesion, inside in zip(lesions, insides, strict=True):
        density[inside] = lesion.hu
        label[inside] = 1
    noisy = np.rint(density + draw_noise(noise_rng, grid.shape, insides))
    limits = np.iinfo(np.int16)
    return Phantom(
        image=np.clip(noisy, limits.min, limits.max).astype(np.int16),
        label=label,
        grid=grid,
        truth=tuple(
            lesion_truth(spec.subject, number, ball, grid)
            for number, ball in enumerate(lesions, start=1)
        ),
    )


def hu_at(points_mm: np.ndarray, regions: Iterable[Region]) -> np.ndarray:
    """Map (..., 3) RAS mm to (...) HU without lesions or noise; later regions cover earlier."""
    density = np.full(points_mm.shape[:-1], AIR_HU)
    for region in regions:
        density[region.contains(points_mm)] = region.hu
    return density


def draw_anatomy(rng: np.random.Generator, body_centre_mm: np.ndarray) -> tuple[Region, ...]:
    """Draw an upper abdomen that fills the field of view along S; +R is the patient's right."""
    scale = rng.uniform(0.95, 1.05)
    rim_mm = rng.uniform(4, 6)
    long = float("inf")

    def region(hu, centre_mm, semi_axes_mm, *, shift_mm=1.5, exponent=2.0):
        centre = body_centre_mm + scale * np.array(centre_mm) + rng.uniform(-shift_mm, shift_mm, 3)
        return Region(
            float(rng.uniform(*hu)),
            tuple(centre.tolist()),
            tuple(scale * a for a in semi_axes_mm),
            exponent,
        )

    fat = region((-105, -95), (0, 0, 0), (46, 38, long), shift_mm=0, exponent=2.5)
    muscle = region((36, 44), (0, 0, 0), (46 - rim_mm, 38 - rim_mm, long), shift_mm=0, exponent=2.5)
    liver = region((56, 62), (20, 6, 6), (18, 22, 34))
    left_kidney = region((29, 33), (-21, -14, -22), (8, 9, 18))
    right_kidney = region((29, 33), (20, -19, -28), (8, 8, 16))
    lung = region((-860, -840), (-22, 4, 38), (15, 20, 26))
    gas = region((-900, -880), (-14, 22, -18), (7, 5, 9))
    vertebra = region((420, 480), (0, -17, 0), (9, 8, long), shift_mm=0)
    arch = region((420, 480), (0, -25.5, 0), (8, 6, long), shift_mm=0)
    canal = region((30, 36), (0, -26.5, 0), (3.5, 3, long), shift_mm=0)
    return fat, muscle, liver, left_kidney, right_kidney, lung, gas, arch, vertebra, canal


def draw_grid(spec: CaseSpec, rng: np.random.Generator, body_centre_mm: np.ndarray) -> Grid:
    """Draw a grid around the body with the axis order, spacing and tilt of `spec`."""
    axes, signs = zip(*(WORLD_AXIS[code] for code in spec.axis_codes), strict=True)
    directions = np.zeros((3, 3))
    directions[list(axes), range(3)] = signs
    directions = rotation(rng.normal(size=3), np.deg2rad(spec.tilt_deg)) @ directions
    shape = tuple(
        round(FIELD_OF_VIEW_MM[axis] / s) for axis, s in zip(axes, spec.spacing_mm, strict=True)
    )

    centre_mm = body_centre_mm + rng.uniform(-2, 2, 3)
    for code in set(spec.cut_by) & {"R", "L"}:
        centre_mm[0] -= WORLD_AXIS[code][1] * OFF_CENTRE_MM
    affine = np.eye(4)
    affine[:3, :3] = directions * spec.spacing_mm
    affine[:3, 3] = centre_mm - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    # NIfTI stores the affine in single precision; round it here, so that the truth fits the file.
    return Grid(shape, affine.astype(np.float32).astype(np.float64))


def rotation(axis: np.ndarray, angle: float) -> np.ndarray:
    """Return the (3, 3) rotation by `angle` radians about `axis`. Source: Rodrigues' formula."""
    x, y, z = axis / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def draw_lesions(
    spec: CaseSpec, rng: np.random.Generator, grid: Grid, regions: tuple[Region, ...]
) -> tuple[Ball, ...]:
    """Draw the lesions of a case, in the order of visible volume, the largest first."""
    radii_and_faces = [(CUT_RADIUS_MM, grid_face(code, spec.axis_codes)) for code in spec.cut_by]
    radii_and_faces += [(LARGE_RADIUS_MM, None)] * spec.n_large
    radii_and_faces += [(SMALL_RADIUS_MM, None)] * spec.n_small
    lesions: list[Ball] = []
    for radius_range_mm, face in radii_and_faces:
        lesions.append(
            draw_lesion(rng, grid, regions, lesions, radius_range_mm=radius_range_mm, face=face)
        )
    return tuple(sorted(lesions, key=lambda ball: -visible_part(ball, grid)[0]))


def grid_face(code: str, axis_codes: str) -> int:
    """Return the index in `Grid.face_normals` of the face towards `code` (R, L, A, P, S or I).

    >>> grid_face("S", "LPS"), grid_face("R", "LPS")
    (5, 0)
    """
    world_axes = [WORLD_AXIS[axis_code][0] for axis_code in axis_codes]
    axis = world_axes.index(WORLD_AXIS[code][0])
    return 2 * axis + int(axis_codes[axis] == code)


def draw_lesion(
    rng: np.random.Generator,
    grid: Grid,
    regions: tuple[Region, ...],
    others: Iterable[Ball],
    *,
    radius_range_mm: tuple[float, float],
    face: int | None,
) -> Ball:
    """Draw a lesion in soft tissue away from the others: whole, or cut by `face` only."""
    for _ in range(MAX_DRAWS):
        radius_mm = round(rng.uniform(*radius_range_mm), 2)
        index = rng.uniform(-0.5, np.array(grid.shape) - 0.5)
        if face is not None:
            axis, is_high = divmod(face, 2)
            depth = radius_mm * rng.uniform(-0.2, 0.6) / grid.spacing_mm[axis]
            index[axis] = grid.shape[axis] - 0.5 - depth if is_high else depth - 0.5
        centre_mm = np.round(grid.to_world_mm(index), 2)
        ball = Ball(
            tuple(centre_mm.tolist()), radius_mm, int(rng.integers(*LESION_HU, endpoint=True))
        )
        if (
            is_clear_of_faces(ball, grid, except_face=face)
            and all(surface_gap_mm(ball, other) >= LESION_GAP_MM for other in others)
            and lies_in_host(ball, regions)
            and abs(
                voxel_count(ball, grid) * grid.voxel_volume_mm3 / visible_part(ball, grid)[0] - 1
            )
            <= MAX_VOXELISATION_ERROR
        ):
            return ball
    raise RuntimeError(
        f"no room for a lesion of {radius_range_mm} mm in {MAX_DRAWS} draws: "
        "use fewer or smaller lesions"
    )


def is_clear_of_faces(ball: Ball, grid: Grid, *, except_face: int | None) -> bool:
    depths_mm = grid.face_depths_mm(np.array(ball.centre_mm))
    if except_face is not None:
        depths_mm = np.delete(depths_mm, except_face)
    return bool((depths_mm >= ball.radius_mm + BORDER_GAP_MM).all())


def surface_gap_mm(a: Ball, b: Ball) -> float:
    return float(np.linalg.norm(np.subtract(a.centre_mm, b.centre_mm))) - a.radius_mm - b.radius_mm


def lies_in_host(ball: Ball, regions: Iterable[Region]) -> bool:
    """Check whether soft tissue fills the ball and its margin, at points about 1.5 mm apart."""
    reach_mm = ball.radius_mm + HOST_MARGIN_MM
    steps_mm = np.linspace(-reach_mm, reach_mm, int(2 * reach_mm / 1.5) + 2)
    offsets_mm = np.stack(np.meshgrid(steps_mm, steps_mm, steps_mm), axis=-1).reshape(-1, 3)
    offsets_mm = offsets_mm[np.linalg.norm(offsets_mm, axis=1) <= reach_mm]
    density = hu_at(np.array(ball.centre_mm) + offsets_mm, regions)
    return bool(((density >= HOST_HU[0]) & (density <= HOST_HU[1])).all())


def voxel_count(ball: Ball, grid: Grid) -> int:
    """Count the voxels of the grid whose centre lies in the ball."""
    centre = grid.to_index(np.array(ball.centre_mm))
    reach = ball.radius_mm * np.linalg.norm(np.linalg.inv(grid.affine[:3, :3]), axis=1) + 1
    start = np.clip(np.floor(centre - reach), 0, grid.shape).astype(int)
    stop = np.clip(np.ceil(centre + reach) + 1, 0, grid.shape).astype(int)
    indices = np.moveaxis(np.indices(tuple(stop - start)), 0, -1) + start
    return int(np.count_nonzero(ball.contains(grid.to_world_mm(indices))))


def draw_noise(
    rng: np.random.Generator, shape: tuple[int, ...], insides: list[np.ndarray]
) -> np.ndarray:
    """Draw Gaussian noise in HU that moves no lesion's mean by more than MAX_NOISE_BIAS_HU."""
    for _ in range(MAX_DRAWS):
        noise = rng.normal(0, NOISE_SD_HU, shape)
        if all(abs(noise[inside].mean()) <= MAX_NOISE_BIAS_HU for inside in insides):
            return noise
    raise RuntimeError(
        f"no noise within {MAX_NOISE_BIAS_HU} HU on {len(insides)} lesions after {MAX_DRAWS} draws"
    )


def lesion_truth(subject: str, number: int, ball: Ball, grid: Grid) -> LesionTruth:
    volume_mm3, centroid_mm = visible_part(ball, grid)
    r_mm, a_mm, s_mm = (round(float(x), 3) for x in centroid_mm)
    return LesionTruth(
        subject=subject,
        lesion=number,
        radius_mm=ball.radius_mm,
        centroid_r_mm=r_mm,
        centroid_a_mm=a_mm,
        centroid_s_mm=s_mm,
        volume_mm3=round(volume_mm3, 3),
        hu=ball.hu,
        touches_border=bool((grid.face_depths_mm(np.array(ball.centre_mm)) < ball.radius_mm).any()),
    )


def visible_part(ball: Ball, grid: Grid) -> tuple[float, np.ndarray]:
    """Return volume in mm³ and centroid (3,) in RAS mm of the ball inside the field of view.

    Raises:
        ValueError: more than one face cuts the ball, which the formula does not cover.
    """
    depths_mm = grid.face_depths_mm(np.array(ball.centre_mm))
    cutting = np.flatnonzero(depths_mm < ball.radius_mm)
    if len(cutting) > 1:
        raise ValueError(f"faces {cutting.tolist()} cut {ball}; truth is analytic for one cut only")
    if len(cutting) == 0:
        return 4 / 3 * np.pi * ball.radius_mm**3, np.array(ball.centre_mm)
    volume_mm3, offset_mm = cut_ball(ball.radius_mm, float(depths_mm[cutting[0]]))
    return volume_mm3, np.array(ball.centre_mm) + offset_mm * grid.face_normals()[cutting[0]]


def cut_ball(radius_mm: float, depth_mm: float) -> tuple[float, float]:
    """Return the remainder of a ball of radius r around 0 below the plane x = `depth_mm` = h.

    Args:
        depth_mm: in (-r, r]; negative when the centre itself is cut off.

    Returns:
        Volume in mm³, and the x of its centroid in mm (≤ 0).

    Source: slices of area π(r² - x²): V = π(r + h)²(2r - h)/3, V * centroid = -π(r² - h²)²/4.

    >>> cut_ball(1.0, 0.0)[0] * 3 / (2 * np.pi), cut_ball(1.0, 0.0)[1]
    (1.0, -0.375)
    """
    if not -radius_mm < depth_mm <= radius_mm:
        raise ValueError(f"depth_mm must be in (-{radius_mm}, {radius_mm}], got {depth_mm}")
    volume_mm3 = np.pi * (radius_mm + depth_mm) ** 2 * (2 * radius_mm - depth_mm) / 3
    return float(volume_mm3), float(-np.pi * (radius_mm**2 - depth_mm**2) ** 2 / 4 / volume_mm3)


def write_dataset(phantoms: Mapping[CaseSpec, Phantom], out: Path) -> None:
    """Write images/, labels/, cases.csv and truth.csv into `out`."""
    for folder in ("images", "labels"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    cases = []
    for spec, phantom in phantoms.items():
        name = f"{spec.subject}.nii.gz"
        (out / "images" / name).write_bytes(nifti_gz_bytes(phantom.image, phantom.grid.affine))
        (out / "labels" / name).write_bytes(nifti_gz_bytes(phantom.label, phantom.grid.affine))
        cases.append(
            {
                "subject": spec.subject,
                "patient": f"patient_{spec.number:02d}",
                "image": f"images/{name}",
                "label": f"labels/{name}",
                "split": spec.split,
            }
        )
    write_csv(cases, list(cases[0]), out / "cases.csv")
    truth = [asdict(lesion) for phantom in phantoms.values() for lesion in phantom.truth]
    write_csv(truth, [field.name for field in fields(LesionTruth)], out / "truth.csv")


def write_csv(rows: Iterable[Mapping[str, object]], columns: list[str], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def nifti_gz_bytes(array: np.ndarray, affine: np.ndarray) -> bytes:
    """Return a .nii.gz with `affine` as sform and qform (scanner, mm).

    It holds neither time nor file name, so the same input gives the same bytes.
    """
    image = nib.Nifti1Image(array, affine)
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = b"synthetic phantom, not a patient"
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=buffer, mtime=0) as file:
        file.write(image.to_bytes())
    return buffer.getvalue()


if __name__ == "__main__":
    main()

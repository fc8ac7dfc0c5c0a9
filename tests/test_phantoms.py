"""The sample data agree with their ground truth: formulas, voxels and files."""

import csv
import importlib.util
import math
import sys
from collections import defaultdict
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

SAMPLE_DATA = Path(__file__).parents[1] / "sample_data"


def load_script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up here
    spec.loader.exec_module(module)
    return module


def read_rows(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_truth(path):
    lesions = defaultdict(list)
    for row in read_rows(path):
        lesions[row["subject"]].append(row)
    return lesions


def centroid_mm(row):
    return np.array([float(row[f"centroid_{axis}_mm"]) for axis in "ras"])


phantoms = load_script(SAMPLE_DATA / "make_phantoms.py")
CASES = {row["subject"]: row for row in read_rows(SAMPLE_DATA / "cases.csv")}
TRUTH = read_truth(SAMPLE_DATA / "truth.csv")
every_case = pytest.mark.parametrize("subject", CASES)


def load(subject, column):
    return nib.load(SAMPLE_DATA / CASES[subject][column])


def lesion_masks(subject):
    """Yield (row of truth, mask of that lesion), matched by the nearest centroid."""
    label = load(subject, "label")
    mask = np.asarray(label.dataobj)
    components, n_components = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    assert n_components == len(TRUTH[subject])
    masks = [components == component for component in range(1, n_components + 1)]
    centroids = [voxel_centroid_mm(mask, label.affine) for mask in masks]
    for row in TRUTH[subject]:
        distances = np.linalg.norm(np.array(centroids) - centroid_mm(row), axis=1)
        yield row, masks[int(distances.argmin())]


def voxel_centroid_mm(mask, affine):
    return nib.affines.apply_affine(affine, np.argwhere(mask).mean(axis=0))


@every_case
def test_label_lies_on_the_grid_of_its_image(subject):
    image, label = load(subject, "image"), load(subject, "label")
    assert image.shape == label.shape
    np.testing.assert_array_equal(image.affine, label.affine)
    assert (image.get_data_dtype(), label.get_data_dtype()) == (np.int16, np.uint8)
    assert set(np.unique(np.asarray(label.dataobj))) <= {0, 1}
    for header in (image.header, label.header):
        assert (int(header["sform_code"]), int(header["qform_code"])) == (1, 1)
        assert header.get_xyzt_units()[0] == "mm"
        np.testing.assert_allclose(header.get_qform(), header.get_sform(), atol=1e-3)


@every_case
def test_voxels_agree_with_the_truth(subject):
    image = load(subject, "image")
    density = np.asarray(image.dataobj)
    voxel_volume_mm3 = abs(np.linalg.det(image.affine[:3, :3]))
    for row, mask in lesion_masks(subject):
        assert mask.sum() * voxel_volume_mm3 == pytest.approx(float(row["volume_mm3"]), rel=0.02)
        assert np.linalg.norm(voxel_centroid_mm(mask, image.affine) - centroid_mm(row)) < 0.5
        assert density[mask].mean() == pytest.approx(float(row["hu"]), abs=2)


@every_case
def test_only_a_lesion_which_the_field_of_view_cuts_touches_the_border(subject):
    for row, mask in lesion_masks(subject):
        index = np.argwhere(mask)
        at_border = bool((index == 0).any() or (index == np.array(mask.shape) - 1).any())
        assert at_border == (row["touches_border"] == "True")
        whole_mm3 = 4 / 3 * math.pi * float(row["radius_mm"]) ** 3
        if at_border:
            assert float(row["volume_mm3"]) < 0.95 * whole_mm3
        else:
            assert float(row["volume_mm3"]) == pytest.approx(whole_mm3, abs=1e-3)


@every_case
def test_body_is_upright_on_every_grid(subject):
    """The spine is posterior, the liver side is denser than the lung side, and air is around."""
    image = load(subject, "image")
    density = np.asarray(image.dataobj).astype(float)
    bone_mm = voxel_centroid_mm(density > 300, image.affine)
    soft_mm = voxel_centroid_mm((density > -200) & (density < 300), image.affine)
    assert soft_mm[1] - bone_mm[1] > 10
    assert np.mean(density < -950) > 0.1
    lung_mm = voxel_centroid_mm((density > -920) & (density < -700), image.affine)
    assert bone_mm[0] - lung_mm[0] > 10
    assert lung_mm[2] > bone_mm[2]


@pytest.mark.parametrize("depth_mm", [-7.0, -2.5, 0.0, 3.0, 8.0])
def test_cut_ball_agrees_with_quadrature(depth_mm):
    radius_mm, n_slices = 8.0, 100_000
    thickness_mm = (depth_mm + radius_mm) / n_slices
    x_mm = -radius_mm + (np.arange(n_slices) + 0.5) * thickness_mm
    slices_mm3 = math.pi * (radius_mm**2 - x_mm**2) * thickness_mm
    volume_mm3, centroid = phantoms.cut_ball(radius_mm, depth_mm)
    assert volume_mm3 == pytest.approx(slices_mm3.sum(), rel=1e-6)
    assert centroid == pytest.approx((slices_mm3 * x_mm).sum() / slices_mm3.sum(), abs=1e-6)


def test_the_parts_of_a_cut_ball_add_up_to_the_ball():
    below, above = phantoms.cut_ball(8.0, 3.0), phantoms.cut_ball(8.0, -3.0)
    assert below[0] + above[0] == pytest.approx(4 / 3 * math.pi * 8**3)
    # Both moments point away from the plane.
    assert below[0] * below[1] == pytest.approx(above[0] * above[1])


@pytest.mark.parametrize("depth_mm", [-8.0, 8.1])
def test_cut_ball_refuses_a_plane_which_does_not_meet_the_ball(depth_mm):
    with pytest.raises(ValueError, match="depth_mm must be in"):
        phantoms.cut_ball(8.0, depth_mm)


@pytest.mark.parametrize("face", range(6))
def test_visible_part_agrees_with_points_in_the_field_of_view(face):
    """Compare each face of an oblique, anisotropic, permuted grid with points 0.1 mm apart."""
    affine = np.eye(4)
    axes = np.array([[0, 0, 1], [-1, 0, 0], [0, 1, 0]])  # PSR
    rotation = phantoms.rotation(np.array([1.0, -2.0, 0.5]), 0.3)
    affine[:3, :3] = rotation @ axes @ np.diag([1.2, 1.5, 2.5])
    affine[:3, 3] = 30, -120, 410
    grid = phantoms.Grid((30, 26, 16), affine)
    index = (np.array(grid.shape) - 1) / 2
    axis, is_high = divmod(face, 2)
    depth = 1.7 / grid.spacing_mm[axis]
    index[axis] = grid.shape[axis] - 0.5 - depth if is_high else depth - 0.5
    ball = phantoms.Ball(tuple(grid.to_world_mm(index)), 5.0, 150)
    assert phantoms.lesion_truth("s", 1, ball, grid).touches_border

    steps_mm = np.arange(-4.95, 5, 0.1)
    offsets_mm = np.stack(np.meshgrid(steps_mm, steps_mm, steps_mm), -1).reshape(-1, 3)
    points_mm = np.array(ball.centre_mm) + offsets_mm
    indices = grid.to_index(points_mm)
    is_inside = ((indices >= -0.5) & (indices <= np.array(grid.shape) - 0.5)).all(axis=1)
    is_seen = is_inside & ball.contains(points_mm)
    volume_mm3, centroid = phantoms.visible_part(ball, grid)
    assert volume_mm3 == pytest.approx(np.count_nonzero(is_seen) * 0.1**3, rel=2e-3)
    np.testing.assert_allclose(centroid, points_mm[is_seen].mean(axis=0), atol=0.02)


def test_visible_part_refuses_a_corner():
    ball = phantoms.Ball((0.0, 0.0, 0.0), 5.0, 150)
    with pytest.raises(ValueError, match="one cut only"):
        phantoms.visible_part(ball, phantoms.Grid((20, 20, 20), np.eye(4)))


@pytest.mark.parametrize("number", [4, 6, 20])
def test_committed_files_are_what_the_script_makes(number):
    spec = next(spec for spec in phantoms.CASES if spec.number == number)
    phantom = phantoms.make_phantom(spec)
    for column, array in (("image", phantom.image), ("label", phantom.label)):
        committed = load(spec.subject, column)
        np.testing.assert_array_equal(np.asarray(committed.dataobj), array)
        np.testing.assert_array_equal(committed.affine, phantom.grid.affine)
    volumes = [float(row["volume_mm3"]) for row in TRUTH[spec.subject]]
    assert [lesion.volume_mm3 for lesion in phantom.truth] == volumes


def test_written_files_are_equal_byte_for_byte(tmp_path):
    spec = phantoms.CASES[0]
    for folder in ("a", "b"):
        phantoms.write_dataset({spec: phantoms.make_phantom(spec)}, tmp_path / folder)
    written = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert [path.as_posix() for path in written] == [
        "cases.csv",
        f"images/{spec.subject}.nii.gz",
        f"labels/{spec.subject}.nii.gz",
        "truth.csv",
    ]
    for path in written:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()


def test_another_seed_makes_another_phantom():
    spec = phantoms.CASES[0]
    assert phantoms.make_phantom(spec, seed=1).truth != phantoms.make_phantom(spec, seed=2).truth


def test_an_impossible_phantom_is_refused(monkeypatch):
    monkeypatch.setattr(phantoms, "MAX_DRAWS", 200)
    with pytest.raises(RuntimeError, match="no room for a lesion"):
        phantoms.make_phantom(phantoms.CaseSpec(number=99, split="test", n_large=60))


def test_splits_share_no_patient():
    splits = [row["split"] for row in CASES.values()]
    assert [splits.count(split) for split in ("train", "val", "test")] == [18, 2, 6]
    assert len({row["patient"] for row in CASES.values()}) == len(CASES)
    assert set(TRUTH) <= set(CASES)


@pytest.mark.parametrize("split", ["train", "test"])
def test_split_has_every_difficult_kind(split):
    subjects = [subject for subject, row in CASES.items() if row["split"] == split]
    affines = [load(subject, "image").affine for subject in subjects]
    axis_codes = {"".join(nib.aff2axcodes(affine)) for affine in affines}
    assert {"RAS", "LPS", "PSR"} <= axis_codes
    assert max(nib.affines.obliquity(affine).max() for affine in affines) > math.radians(5)
    spacings_mm = [nib.affines.voxel_sizes(affine) for affine in affines]
    assert max(spacing.max() / spacing.min() for spacing in spacings_mm) > 2
    assert any(row["touches_border"] == "True" for subject in subjects for row in TRUTH[subject])
    assert any(float(row["radius_mm"]) < 5 for subject in subjects for row in TRUTH[subject])
    empty = [subject for subject in subjects if not TRUTH[subject]]
    assert empty
    assert not any(np.asarray(load(subject, "label").dataobj).any() for subject in empty)


def test_sample_data_stay_small():
    sizes = {path: path.stat().st_size for path in SAMPLE_DATA.rglob("*.nii.gz")}
    assert len(sizes) == 2 * len(CASES)
    assert max(sizes.values()) < 260_000
    assert sum(sizes.values()) < 4_500_000

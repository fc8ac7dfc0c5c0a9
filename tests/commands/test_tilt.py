"""`--tilt resample`: tilted stacks are segmented and measured on their own slices."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from dicom_files import NAME, Series, complete, write_series
from laws import DATA, ball, ball_volume_mm3, centre_mm, oblique, ras, real_data
from pydicom import dcmread

import volseg
from volseg.errors import VolsegError
from volseg.io.series import TILT, with_mark
from volseg.io.volumes import read_mask, read_volume, write_volume
from volseg.volume import Geometry, Volume

DEGREES, RADIUS_MM = 18.5, 12.0


def tilted(affine: np.ndarray) -> np.ndarray:
    """Return the affine of a stack tilted about its first axis, as by a gantry."""
    affine = affine.copy()
    along = affine[:3, 1] / np.linalg.norm(affine[:3, 1])
    length = np.linalg.norm(affine[:3, 2])
    affine[:3, 2] += along * length * math.tan(math.radians(DEGREES))
    return affine


# name → affine, voxels
GRIDS = {
    "isotropic": (tilted(ras((1.0, 1.0, 1.0))), (40, 60, 36)),
    "thick slices": (tilted(ras((0.7, 0.7, 3.0))), (50, 70, 16)),
    "oblique, anisotropic": (tilted(oblique((0.8, 1.1, 2.5))), (44, 52, 18)),
}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def phantom(affine: np.ndarray, shape: tuple[int, int, int], radius_mm: float):
    """Return a noisy box of tissue with a bright ball in air, and the mask of the ball."""
    geometry = Geometry(shape, affine)
    rng = np.random.default_rng(1)
    inside = ball(radius_mm, geometry)
    array = np.full(shape, -1000.0)
    array[2:-2, 2:-2, 2:-2] = 20
    array = np.where(inside, 150, array) + rng.normal(0, 10, shape)
    return Volume(np.asfortranarray(array.astype(np.int16)), geometry), inside


def written(
    folder: Path, grid: tuple, radius_mm: float = RADIUS_MM, **how: Any
) -> tuple[Path, Path]:
    """Return a tilted series of a ball, and the mask of the ball on its slices."""
    scan, inside = phantom(*grid, radius_mm)
    series = with_mark(write_series(scan, folder / "study", Series(**how)), TILT)
    stored = read_volume(series)
    order = np.sign(np.sum(stored.geometry.voxel_steps_mm[:, 2] * scan.geometry.affine[:3, 2]))
    mask = inside.astype(np.uint8)[:, :, :: int(order)]
    mask = stored.with_array(np.asfortranarray(mask))
    write_volume(mask, folder / "ball.nii.gz", like=series)
    return folder / "study", folder / "ball.nii.gz"


@pytest.mark.parametrize("name", GRIDS)
def test_a_tilted_ball_has_its_volume_and_diameters_within_a_voxel(name, tmp_path):
    scan, mask = written(tmp_path, GRIDS[name])
    volseg.measure(image=scan, mask=mask, tilt="resample", out=tmp_path / "out")
    (row,) = rows(tmp_path / "out" / "lesions.csv")
    geometry = read_volume(with_mark(scan, TILT)).geometry
    steps = geometry.voxel_steps_mm
    diagonal_mm = float(np.linalg.norm(np.abs(steps).sum(axis=1)))
    in_plane_mm = float(np.linalg.norm(np.abs(steps[:, :2]).sum(axis=1)))
    voxels = int(read_mask(with_mark(mask, TILT)).array.sum())
    assert float(row["volume_mm3"]) == pytest.approx(voxels * abs(np.linalg.det(steps)), rel=1e-6)
    assert float(row["volume_mm3"]) == pytest.approx(ball_volume_mm3(RADIUS_MM), rel=0.025)
    assert float(row["long_axis_mm"]) == pytest.approx(2 * RADIUS_MM, abs=in_plane_mm)
    assert float(row["short_axis_mm"]) == pytest.approx(2 * RADIUS_MM, abs=in_plane_mm)
    assert float(row["max3d_diameter_mm"]) == pytest.approx(2 * RADIUS_MM, abs=diagonal_mm)
    for axis in ("major", "minor", "least"):  # 4 √λ of a ball is 4 r / √5
        expected = 4 * RADIUS_MM / math.sqrt(5)
        assert float(row[f"{axis}_axis_mm"]) == pytest.approx(expected, abs=diagonal_mm / 2)
    centre = centre_mm(geometry)
    place = [float(row[f"centroid_{axis}_mm"]) for axis in "ras"]
    np.testing.assert_allclose(place, centre, atol=diagonal_mm / 2)


@pytest.mark.parametrize("name", GRIDS)
def test_surfaces_of_tilted_balls_are_those_of_right_angled_ones(name, tmp_path):
    affine, shape = GRIDS[name]
    straight = affine.copy()
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    normal /= np.linalg.norm(normal)
    straight[:3, 2] = normal * (normal @ affine[:3, 2])
    measured = []
    for place, grid in (("tilted", affine), ("straight", straight)):
        (tmp_path / place).mkdir()
        scan, mask = written(tmp_path / place, (grid, shape))
        volseg.measure(image=scan, mask=mask, tilt="resample", out=tmp_path / place / "out")
        measured += rows(tmp_path / place / "out" / "lesions.csv")
    one, other = measured
    for column in ("surface_area_mm2", "sphericity", "volume_mesh_mm3"):
        assert float(one[column]) == pytest.approx(float(other[column]), rel=0.05), column


def test_ids_and_masks_lie_on_the_slices_of_the_scan(tmp_path):
    scan, mask = written(tmp_path, GRIDS["oblique, anisotropic"])
    out = tmp_path / "out"
    volseg.measure(image=scan, mask=mask, tilt="resample", out=out, figures=True)
    (path,) = (out / "lesion_ids").glob("*.nii.gz")
    with pytest.raises(VolsegError, match="--tilt resample"):
        read_mask(path)
    ids, geometry = read_mask(with_mark(path, TILT)), read_volume(with_mark(scan, TILT)).geometry
    assert np.array_equal(ids.geometry.affine, geometry.affine) and geometry.is_tilted
    assert np.array_equal(ids.array, read_mask(with_mark(mask, TILT)).array)
    header = nibabel.load(path).header
    assert (int(header["qform_code"]), int(header["sform_code"])) == (0, 1)
    (row,) = rows(out / "cases.csv")
    assert "W_TILT: its axes are 18.50° away" in row["warnings"]
    for file in out.rglob("*"):
        assert not file.is_file() or NAME.encode() not in file.read_bytes(), file


@pytest.mark.parametrize("name", GRIDS)
def test_tilted_masks_are_judged_with_distances_in_their_own_millimetres(name, tmp_path):
    affine, shape = GRIDS[name]
    geometry = Geometry(shape, affine)
    for place, radius_mm in (("truth", RADIUS_MM), ("guess", RADIUS_MM - 2)):
        (tmp_path / place).mkdir()
        mask = Volume(np.asfortranarray(ball(radius_mm, geometry).view(np.uint8)), geometry)
        image = nibabel.Nifti1Image(mask.array, affine)
        nibabel.save(image, tmp_path / place / "ball.nii.gz")
    report = volseg.evaluate(
        reference=tmp_path / "truth", predicted=tmp_path / "guess", out=tmp_path / "out"
    )
    assert report.failed == {}
    (row,) = rows(tmp_path / "out" / "evaluation.csv")
    ratio = (1 - 2 / RADIUS_MM) ** 3
    voxel_mm = float(np.linalg.norm(geometry.voxel_steps_mm, axis=0).max())
    assert float(row["dice"]) == pytest.approx(2 * ratio / (1 + ratio), abs=0.03)
    assert float(row["mean_surface_distance_mm"]) == pytest.approx(2, abs=voxel_mm / 2)
    lesions = rows(tmp_path / "out" / "detections.csv")
    assert {row["side"] for row in lesions} == {"reference", "predicted"}


def test_a_tilted_nifti_gives_what_its_series_gives(tmp_path):
    scan, mask = written(tmp_path, GRIDS["thick slices"])
    series = with_mark(scan, TILT)
    write_volume(read_volume(series), tmp_path / "twin.nii.gz", like=series)
    results = []
    for image, name in ((scan, "a"), (tmp_path / "twin.nii.gz", "b")):
        volseg.measure(image=image, mask=mask, tilt="resample", out=tmp_path / name)
        results.append(rows(tmp_path / name / "lesions.csv")[0] | {"case_id": ""})
    assert results[0] == results[1]


def test_without_the_option_a_tilt_is_refused_and_the_option_is_named(tmp_path):
    scan, mask = written(tmp_path, GRIDS["isotropic"])
    report = volseg.measure(image=scan, mask=mask, out=tmp_path / "out")
    (reason,) = report.failed.values()
    assert reason.startswith("E_TILT") and "--tilt resample" in reason
    series = with_mark(scan, TILT)
    write_volume(read_volume(series), tmp_path / "twin.nii.gz", like=series)
    report = volseg.measure(image=tmp_path / "twin.nii.gz", mask=mask, out=tmp_path / "twin")
    (reason,) = report.failed.values()
    assert reason.startswith("E_SHEAR") and "--tilt resample" in reason


def test_pages_are_made_again_and_right_angled_scans_are_as_before(tmp_path, dataset):
    scan, mask = written(tmp_path, GRIDS["thick slices"])
    out = tmp_path / "out"
    volseg.measure(image=scan, mask=mask, tilt="resample", out=out)
    (page,) = (out / "viewer").glob("*.html")
    first = page.read_bytes()
    page.unlink()
    volseg.report(out)
    assert page.read_bytes() == first
    image, label = (dataset / part / "scan_2.nii.gz" for part in ("images", "labels"))
    lesions = []
    for tilt in ("refuse", "resample"):
        volseg.measure(image=image, mask=label, tilt=tilt, out=tmp_path / tilt)
        lesions.append((tmp_path / tilt / "lesions.csv").read_text())
    assert lesions[0] == lesions[1]


@pytest.fixture(scope="module")
def inferred(model, tmp_path_factory):
    """Segment a tilted series with the model of balls."""
    folder = tmp_path_factory.mktemp("inferred")
    grid = tilted(ras((1.6, 2.0, 2.4))), (30, 32, 22)
    scan, mask = written(folder, grid, 8.0)
    report = volseg.infer(scan, model=model, tilt="resample", out=folder / "out")
    assert report.exit_code == 0
    return folder, scan, mask


def test_a_network_finds_the_ball_on_the_slices_of_the_scan(inferred):
    folder, scan, mask = inferred
    (path,) = (folder / "out" / "masks").glob("*.nii.gz")
    predicted, truth = read_mask(with_mark(path, TILT)), read_mask(with_mark(mask, TILT))
    geometry = read_volume(with_mark(scan, TILT)).geometry
    assert np.array_equal(predicted.geometry.affine, geometry.affine)
    inside, expected = predicted.array > 0, truth.array > 0
    dice = 2 * (inside & expected).sum() / (inside.sum() + expected.sum())
    assert dice > 0.8
    largest = rows(folder / "out" / "lesions.csv")[0]
    assert float(largest["volume_mm3"]) == pytest.approx(ball_volume_mm3(8.0), rel=0.25)
    assert largest["class_name"] or largest["confidence_mean"]


def test_a_tilted_series_gets_a_segmentation_on_its_own_slices(model, tmp_path):
    scan, _ = written(tmp_path, (tilted(ras((1.6, 2.0, 2.4))), (30, 32, 22)), 8.0, edit=complete)
    out = tmp_path / "out"
    report = volseg.infer(
        scan, model=model, tilt="resample", dicom_seg="binary", dicom_sr=True, out=out
    )
    assert report.exit_code == 0
    (path,), (nifti,) = (out / "dicom_seg").iterdir(), (out / "masks").iterdir()
    series = with_mark(scan, TILT)
    segmentation = read_mask(path, like=series)
    geometry = read_volume(series).geometry
    assert np.array_equal(segmentation.array > 0, read_mask(nifti, like=series).array > 0)
    assert segmentation.array.any() and geometry.is_tilted
    positions = {
        tuple(map(float, frame.PlanePositionSequence[0].ImagePositionPatient))
        for frame in dcmread(path).PerFrameFunctionalGroupsSequence
    }
    of_slices = [dcmread(file).ImagePositionPatient for file in Path(scan).iterdir()]
    assert positions and positions <= {tuple(map(float, position)) for position in of_slices}
    (lesions,) = (out / "dicom_lesions").iterdir()
    volume_mm3 = int(read_mask(lesions, like=series).array.astype(bool).sum()) * abs(
        np.linalg.det(geometry.voxel_steps_mm)
    )
    rows_mm3 = sum(float(row["volume_mm3"]) for row in rows(out / "lesions.csv"))
    assert volume_mm3 == pytest.approx(rows_mm3, rel=1e-6)


def test_a_corrected_tilted_mask_is_measured_again(inferred, tmp_path):
    import shutil

    folder, _, mask = inferred
    out = shutil.copytree(folder / "out", tmp_path / "out")
    (path,) = (out / "masks").glob("*.nii.gz")
    truth = read_mask(with_mark(mask, TILT))
    labels = read_mask(with_mark(path, TILT)).array
    value = int(labels[labels > 0][0])
    corrected = truth.with_array(np.asfortranarray(truth.array * np.uint8(value)))
    write_volume(corrected, path, like=with_mark(mask, TILT))
    volseg.measure(out)
    (row,) = rows(out / "lesions.csv")
    assert int(row["n_voxels"]) == int(truth.array.sum())


def test_what_a_tilted_mask_cannot_be_is_refused_before_anything_is_read(model, tmp_path):
    scan, _ = written(tmp_path, GRIDS["isotropic"])
    for given in ({"format": "nrrd"}, {"format": "mha"}, {"probabilities": True}):
        with pytest.raises(VolsegError, match="not possible on tilted slices"):
            volseg.infer(scan, model=model, tilt="resample", out=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_time_points_that_are_tilted_are_not_compared(tmp_path):
    scan, mask = written(tmp_path, GRIDS["isotropic"])
    for name in "ab":
        volseg.measure(image=scan, mask=mask, tilt="resample", out=tmp_path / name)
    report = volseg.compare(tmp_path / "a", tmp_path / "b", out=tmp_path / "c")
    (reason,) = report.failed.values()
    assert reason.startswith("E_TILT") and "tilted scans are not compared" in reason


def test_real_series():
    folder = DATA / "dicom" / "d2n_failing_gantrytilting_001"
    real_data("dicom/d2n_failing_gantrytilting_001")
    scan = read_volume(with_mark(folder, TILT))
    assert scan.geometry.is_tilted and scan.geometry.shape == (512, 512, 3)
    expected_mm = 5 * math.cos(math.radians(14))
    assert scan.geometry.slice_distances_mm[2] == pytest.approx(expected_mm, abs=1e-3)
    gap = real_data("dicom/d2n_failing_sliceincrement_002")
    with pytest.raises(VolsegError) as caught:
        read_volume(with_mark(gap, TILT))
    assert caught.value.code == "E_GAP"  # a missing slice stays an error


def test_run_json_says_how_tilts_were_read(tmp_path):
    scan, mask = written(tmp_path, GRIDS["isotropic"])
    volseg.measure(image=scan, mask=mask, tilt="resample", out=tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]
    assert settings["tilt"] == "resample"


def test_a_dataset_with_tilted_scans_is_prepared_and_planned(tmp_path, tiny_recipe):
    """The prepared arrays are those of a right-angled twin whose slices were moved alike."""
    grids = {"tilted": tilted(ras((1.6, 2.0, 2.4))), "right": ras((1.6, 2.0, 2.4))}
    lines = ["subject,image,label,split,grade"]
    for number, (name, affine) in enumerate(grids.items()):
        scan, inside = phantom(affine, (30, 32, 22), 8.0)
        place = tmp_path / name
        place.mkdir()
        series = with_mark(write_series(scan, place / "study"), TILT)
        stored = read_volume(series)
        mask = stored.with_array(np.asfortranarray(inside.astype(np.uint8) * 3))
        write_volume(mask, place / "mask.nii.gz", like=series)
        lines.append(f"{name},{name}/study,{name}/mask.nii.gz,{'train' if number else 'val'},1")
    (tmp_path / "cases.csv").write_text("\n".join(lines))
    request = {"dataset": tmp_path / "cases.csv", "recipe": tiny_recipe}
    refused = volseg.preprocess(**request, out=tmp_path / "refused")
    assert refused.failed["tilted"].startswith("E_TILT") and refused.done == ["right"]
    report = volseg.preprocess(**request, tilt="resample", out=tmp_path / "prepared")
    assert sorted(report.done) == ["right", "tilted"] and not report.failed
    assert any("W_TILT" in text for text in report.warnings)
    planned = volseg.plan(**request, tilt="resample")
    assert planned.cases == 1

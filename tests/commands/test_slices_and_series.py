"""Scans of a single slice, and files that hold several volumes."""

import csv

import nibabel
import numpy as np
import pytest
from laws import GRIDS, orientations
from scipy import ndimage

import volseg
from volseg.commands.training_cases import read_training_case
from volseg.errors import VolsegError
from volseg.evaluation.surface import surface_distances
from volseg.io.cases import Case
from volseg.io.volumes import read_volume, scan_digest, write_volume
from volseg.measurement.lesions import OF_AXIAL_SLICES, OF_VOLUMES
from volseg.recipe import parse_recipe
from volseg.volume import Geometry, Volume


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def slice_of(grid="lps"):
    """Return one axial slice of 30 × 40 voxels with a disc of 10 mm radius, and its mask."""
    geometry = Geometry((30, 40, 1), GRIDS[grid]((1.0, 0.8, 5.0)))
    index = np.indices(geometry.shape)
    disc = ((index[0] - 14) * 1.0) ** 2 + ((index[1] - 19) * 0.8) ** 2 <= 10.0**2
    noise = np.random.default_rng(0).normal(0, 5, geometry.shape)
    image = Volume((np.where(disc, 50, -100) + noise).astype(np.int16), geometry)
    return image, image.with_array(disc.astype(np.uint8))


@pytest.mark.parametrize("grid", ["lps", pytest.param("ras", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_slice_is_measured_in_its_plane_in_any_axis_order(grid, tmp_path):
    image, mask = slice_of(grid)
    lines = ["subject,image,label"]
    for n, ((scan, affine), (labels, _)) in enumerate(
        zip(orientations(image), orientations(mask), strict=True)
    ):
        geometry = Geometry(scan.shape, affine)
        write_volume(Volume(scan, geometry), tmp_path / f"s{n:02}.nii")
        write_volume(Volume(labels, geometry), tmp_path / f"m{n:02}.nii")
        lines.append(f"o{n:02},s{n:02}.nii,m{n:02}.nii")
    (tmp_path / "cases.csv").write_text("\n".join(lines) + "\n")
    report = volseg.measure(cases=tmp_path / "cases.csv", out=tmp_path / "out")
    assert report.exit_code == 0
    lesions = rows(tmp_path / "out" / "lesions.csv")
    assert len(lesions) == 48
    first = lesions[0] | {"case_id": ""}
    assert all(lesion | {"case_id": ""} == first for lesion in lesions)
    assert float(first["long_axis_mm"]) == pytest.approx(20, abs=1.5)
    assert float(first["intensity_mean"]) == pytest.approx(50, abs=1)
    assert {first[name] for name in (*OF_VOLUMES, "equiv_sphere_diameter_mm")} == {""}
    assert "sphericity" in first["notes"] and "the scan has a single slice" in first["notes"]
    assert first["touches_border"] == "false"  # in its plane
    cases = rows(tmp_path / "out" / "cases.csv")
    assert all("W_SLICE: a single slice" in case["warnings"] for case in cases)
    assert not any("W_BORDER" in case["warnings"] for case in cases)
    assert (tmp_path / "out" / "report.html").exists()


def test_a_sagittal_slice_has_no_axial_diameters(tmp_path):
    geometry = Geometry((1, 30, 40), np.diag([4.0, 1, 1, 1]))
    mask = np.zeros(geometry.shape, np.uint8)
    mask[0, 10:20, 10:30] = 1
    image = Volume((mask * 90 + np.arange(40)).astype(np.int16), geometry)
    write_volume(image, tmp_path / "scan.nii")
    write_volume(image.with_array(mask), tmp_path / "mask.nii")
    volseg.measure(image=tmp_path / "scan.nii", mask=tmp_path / "mask.nii", out=tmp_path / "out")
    (lesion,) = rows(tmp_path / "out" / "lesions.csv")
    assert {lesion[name] for name in (*OF_VOLUMES, *OF_AXIAL_SLICES)} == {""}
    assert "the slice of the scan is not axial" in lesion["notes"]
    (case,) = rows(tmp_path / "out" / "cases.csv")
    assert case["n_measurable"] == ""


def test_surfaces_of_a_slice_are_its_contours():
    _, mask = slice_of()
    truth = mask.array
    guess = np.roll(truth, 3, axis=1)
    for array, affine in orientations(mask):
        other = next(
            moved
            for moved, moved_affine in orientations(mask.with_array(guess))
            if np.array_equal(moved_affine, affine)
        )
        of_label = surface_distances(array, other, Geometry(array.shape, affine))[1]
        edges = [
            plane & ~ndimage.binary_erosion(plane)
            for plane in (truth[..., 0] > 0, guess[..., 0] > 0)
        ]
        away = [ndimage.distance_transform_edt(~edge, sampling=(1.0, 0.8)) for edge in edges]
        expected = [np.sort(away[1][edges[0]]), np.sort(away[0][edges[1]])]
        assert of_label.hd95_mm == pytest.approx(
            max(np.percentile(values, 95) for values in expected), abs=1e-6
        )


def test_training_on_a_slice_needs_patches_of_a_slice(tiny_recipe, tmp_path):
    image, mask = slice_of()
    write_volume(image, tmp_path / "scan.nii")
    write_volume(mask, tmp_path / "mask.nii")
    channel = tiny_recipe.data.channels[0]
    case = Case("a", {channel: tmp_path / "scan.nii"}, reference=tmp_path / "mask.nii")
    data = tiny_recipe.data.model_copy(update={"labels": {"lesion": 1}})
    recipe = tiny_recipe.model_copy(update={"data": data})
    with pytest.raises(VolsegError, match="single slice") as caught:
        read_training_case(case, recipe)
    assert caught.value.code == "E_NDIM"
    flat = recipe.train.model_copy(update={"patch_shape": (16, 16, 1)})
    assert read_training_case(case, recipe.model_copy(update={"train": flat})).images


@pytest.fixture
def series(tmp_path):
    """Write a series of three volumes, each alone too, and a mask of the disc in the second."""
    geometry = Geometry((20, 22, 12), GRIDS["lps"]((1.0, 1.0, 2.0)))
    rng = np.random.default_rng(0)
    volumes = [
        Volume(rng.normal(100 * n, 5, geometry.shape).astype(np.int16), geometry) for n in (1, 2, 3)
    ]
    mask = np.zeros(geometry.shape, np.uint8)
    mask[5:12, 6:13, 4:9] = 1
    for n, volume in enumerate(volumes, start=1):
        write_volume(volume, tmp_path / f"alone{n}.nii")
    write_volume(volumes[0].with_array(mask), tmp_path / "mask.nii")
    stacked = np.stack([volume.array for volume in volumes], axis=-1)
    header = nibabel.load(tmp_path / "alone1.nii").header
    for suffix in (".nii", ".nii.gz"):
        nibabel.save(nibabel.Nifti1Image(stacked, None, header), tmp_path / f"series{suffix}")
    return tmp_path, volumes


@pytest.mark.parametrize("name", ["series.nii", "series.nii.gz"])
def test_each_volume_of_a_series_is_read_bit_for_bit(name, series):
    folder, volumes = series
    for n, volume in enumerate(volumes, start=1):
        stored = read_volume(folder / f"{name}#{n}")
        np.testing.assert_array_equal(stored.array, volume.array)
        assert stored.sha256 == scan_digest(folder / f"{name}#{n}")
    assert len({read_volume(folder / f"{name}#{n}").sha256 for n in (1, 2, 3)}) == 3
    with pytest.raises(VolsegError, match="--volume 1 to 3"):
        read_volume(folder / name)
    with pytest.raises(VolsegError, match="no volume 4"):
        read_volume(folder / f"{name}#4")
    cut = (folder / name).read_bytes()[:-40]
    (folder / name).write_bytes(cut)
    with pytest.raises(VolsegError) as caught:
        read_volume(folder / f"{name}#3")
    assert caught.value.code == "E_TRUNCATED"


def test_measure_takes_a_volume_of_a_series(series):
    folder, _ = series
    given = {"mask": folder / "mask.nii"}
    report = volseg.measure(image=folder / "series.nii.gz", **given, out=folder / "none")
    assert "--volume 1 to 3" in report.failed["series"]
    alone = volseg.measure(image=folder / "alone2.nii", **given, out=folder / "alone")
    out = folder / "chosen"
    second = volseg.measure(image=folder / "series.nii.gz", **given, out=out, volume=2)
    assert (alone.exit_code, second.exit_code) == (0, 0)
    tables = [rows(path / "lesions.csv") for path in (folder / "alone", out)]
    assert [row | {"case_id": ""} for row in tables[0]] == [
        row | {"case_id": ""} for row in tables[1]
    ]
    (case,) = rows(out / "cases.csv")
    assert (case["case_id"], case["image"]) == ("series", "series.nii.gz#2")
    again = volseg.measure(image=folder / "series.nii.gz", **given, out=out, volume=2)
    assert list(again.kept) == ["series"]
    other = volseg.measure(image=folder / "series.nii.gz", **given, out=out, volume=3)
    assert list(other.done) == ["series"]
    assert float(rows(out / "lesions.csv")[0]["intensity_mean"]) == pytest.approx(300, abs=2)
    (out / "viewer" / "series.html").unlink()
    assert list(volseg.report(out).warnings) == []
    assert (out / "viewer" / "series.html").exists()


def test_infer_takes_a_volume_of_a_series(series, model):
    folder, _ = series
    report = volseg.infer(folder / "series.nii.gz", model=model, out=folder / "none")
    assert "--volume 1 to 3" in report.failed["series"]
    settings = {"model": model, "accept_mismatch": True, "pages": False}
    volseg.infer(folder / "series.nii.gz", out=folder / "chosen", volume=2, **settings)
    volseg.infer(folder / "alone2.nii", out=folder / "alone", **settings)
    masks = [
        read_mask_bytes(folder / name)
        for name in ("chosen/masks/series.nii.gz", "alone/masks/alone2.nii.gz")
    ]
    assert masks[0] == masks[1]


def read_mask_bytes(path):
    image = nibabel.load(path)
    return np.asarray(image.dataobj).tobytes(), image.affine.tobytes()


def test_a_slice_needs_a_model_of_slices(model, tmp_path):
    image, _ = slice_of()
    write_volume(image, tmp_path / "scan.nii")
    report = volseg.infer(tmp_path / "scan.nii", model=model, out=tmp_path / "out")
    assert "single slice" in report.failed["scan"] and report.failed["scan"].startswith("E_NDIM")


@pytest.mark.slow
def test_a_network_of_slices_is_trained_on_slices_and_segments_one(tiny_recipe, tmp_path):
    lines = ["subject,image,label,split"]
    for n in range(6):
        image, mask = slice_of("ras" if n % 2 else "lps")
        noise = np.random.default_rng(n).normal(0, 8, image.geometry.shape)
        shifted = np.roll(mask.array, (n - 3, 2 * n - 6), (0, 1))
        image = image.with_array((np.where(shifted, 150, 0) + noise).astype(np.int16))
        write_volume(image, tmp_path / f"s{n}.nii")
        write_volume(image.with_array(shifted.astype(np.uint8)), tmp_path / f"m{n}.nii")
        lines.append(f"c{n},s{n}.nii,m{n}.nii,{'val' if n == 4 else 'test' if n == 5 else 'train'}")
    (tmp_path / "cases.csv").write_text("\n".join(lines) + "\n")
    content = tiny_recipe.model_dump(exclude={"classify"})
    content["data"]["labels"] = {"lesion": 1}
    content["preprocess"] |= {"spacing_mm": [1.0, 1.0, 5.0]}
    content["network"] |= {"strides": [[1, 1, 1], [2, 2, 1], [2, 2, 1]]}
    content["train"] |= {"patch_shape": [16, 16, 1], "epochs": 6}
    content["postprocess"] = []
    recipe = parse_recipe(content, where="slices")
    assert {p["code"] for p in volseg.check(tmp_path / "cases.csv", recipe)} <= {"W_SLICE"}
    model = tmp_path / "model"
    volseg.train(tmp_path / "cases.csv", recipe=recipe, out=model, device="cpu")
    report = volseg.infer(tmp_path / "s5.nii", model=model, out=tmp_path / "out", device="cpu")
    assert report.exit_code == 0, report.failed
    predicted = read_volume(tmp_path / "out" / "masks" / "s5.nii.gz").array > 0
    truth = read_volume(tmp_path / "m5.nii").array > 0
    assert predicted.shape == truth.shape
    assert 2 * (predicted & truth).sum() / (predicted.sum() + truth.sum()) > 0.8


def test_a_table_names_volumes_of_a_series(series):
    folder, _ = series
    (folder / "cases.csv").write_text(
        "image,label\nseries.nii.gz#1,mask.nii\nseries.nii.gz#3,mask.nii\n", encoding="utf-8"
    )
    report = volseg.measure(cases=folder / "cases.csv", out=folder / "out")
    assert list(report.done) == ["series_1", "series_3"]
    means = [float(row["intensity_mean"]) for row in rows(folder / "out" / "lesions.csv")]
    assert means == pytest.approx([100, 300], abs=2)
    assert volseg.check(folder / "cases.csv") == []

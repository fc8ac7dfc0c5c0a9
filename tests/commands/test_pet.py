"""`--unit SUVbw`: PET series in SUV in all results, without a trace of their dates and times."""

from __future__ import annotations

import csv
import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bundles import with_recipe
from dicom_files import NAME, Series, write_series
from pet_headers import pet

import volseg
from volseg.bundle import load_bundle, save_bundle
from volseg.errors import VolsegError
from volseg.io.prepared import read_prepared_case
from volseg.io.volumes import read_volume, write_volume
from volseg.volume import Geometry, Volume

FACTOR = 2.76336681717643e-4  # by hand, see tests/io/test_dicom_suv.py
TIMES = {
    **dict.fromkeys(("SeriesTime", "AcquisitionTime"), "142753.417"),
    "RadiopharmaceuticalStartTime": "132753.417",
}
PLANTED = (
    *(NAME, "Thorax", "19611111", "20111111", "20310203", "2031-02-03"),
    *("142753", "14:27:53", "132753", "13:27:53"),
)
SHAPE, HOT = (20, 18, 16), (slice(6, 13), slice(5, 12), slice(4, 11))


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    """A PET series in Bq/mL with a hot lesion, its mask, and its twin in SUV in NIfTI."""
    folder = tmp_path_factory.mktemp("pet")
    rng = np.random.default_rng(0)
    activity = rng.normal(3600, 200, SHAPE)
    activity[HOT] += 25_000 * np.hanning(9)[1:-1, None, None]
    geometry = Geometry(SHAPE, np.diag([-4.0, -4.0, 3.0, 1.0]))
    stored = Volume(np.asfortranarray(activity.astype(np.int16)), geometry)
    write_series(stored, folder / "study", Series(edit=pet(**TIMES)))
    mask = np.zeros(SHAPE, np.uint8, order="F")
    mask[HOT] = 1
    scan = read_volume(folder / "study")
    write_volume(scan.with_array(mask), folder / "mask.nii.gz")
    suv = (scan.intensities() * FACTOR).astype(np.float32)
    write_volume(scan.with_array(np.asfortranarray(suv)), folder / "twin.nii.gz")
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def texts_of(folder: Path):
    for path in filter(Path.is_file, folder.rglob("*")):
        content = path.read_bytes()
        yield path, gzip.decompress(content) if path.suffix == ".gz" else content


def test_a_series_has_the_rows_of_its_twin_that_is_in_suv(scans, tmp_path):
    mask = scans / "mask.nii.gz"
    volseg.measure(image=scans / "study", mask=mask, intensity_unit="SUVbw", out=tmp_path / "a")
    volseg.measure(image=scans / "twin.nii.gz", mask=mask, intensity_unit="SUV", out=tmp_path / "b")
    (row,), (twin,) = (rows(tmp_path / name / "lesions.csv") for name in "ab")
    assert row["intensity_unit"] == "SUV" and float(row["suv_peak"]) > 4
    for name in ("suv_peak", "mtv41_ml", "mtv_fixed_ml", "tlg_g", "tlg41_g", "tlg_fixed_g"):
        assert float(row[name]) == pytest.approx(float(twin[name]), rel=1e-4), name
    for name in ("intensity_mean", "intensity_max", "volume_ml", "long_axis_mm"):
        assert float(row[name]) == pytest.approx(float(twin[name]), rel=1e-4), name


def test_without_the_option_a_pet_stays_in_its_unit(scans, tmp_path):
    mask = scans / "mask.nii.gz"
    volseg.measure(image=scans / "study", mask=mask, intensity_unit="Bq/mL", out=tmp_path)
    (row,) = rows(tmp_path / "lesions.csv")
    assert row["intensity_unit"] == "Bq/mL" and float(row["intensity_max"]) > 20_000
    assert row["suv_peak"] == row["mtv41_ml"] == row["tlg_g"] == ""
    assert "N_SUV" not in rows(tmp_path / "cases.csv")[0]["warnings"]


def test_the_factor_and_its_rule_are_said_and_no_moment_is(scans, tmp_path):
    mask = scans / "mask.nii.gz"
    report = volseg.measure(
        image=scans / "study", mask=mask, intensity_unit="SUVbw", out=tmp_path / "out", figures=True
    )
    (row,) = rows(tmp_path / "out" / "cases.csv")
    assert "N_SUV: SUVbw is the stored intensity × 0.0002763366817" in row["warnings"]
    assert "reference_s 3600" in row["warnings"] and any("N_SUV" in note for note in report.notes)
    settings = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]
    assert settings["intensity_unit"] == "SUVbw"
    contents = dict(texts_of(tmp_path / "out"))
    assert {path.suffix for path in contents} >= {".csv", ".html", ".png", ".gz", ".json"}
    for path, content in contents.items():
        assert not [word for word in PLANTED if word.encode() in content], path


def test_pages_are_made_again_in_suv_and_a_second_call_keeps_the_case(scans, tmp_path):
    request = {"image": scans / "study", "mask": scans / "mask.nii.gz", "out": tmp_path}
    assert volseg.measure(**request, intensity_unit="SUVbw").done
    (page,) = (tmp_path / "viewer").glob("*.html")
    first = page.read_bytes()
    page.unlink()
    assert volseg.measure(**request, intensity_unit="SUVbw").kept
    assert page.read_bytes() == first
    assert volseg.measure(**request, intensity_unit="Bq/mL").done  # another unit is another result


def test_what_cannot_be_proved_is_a_failed_row(scans, tmp_path):
    write_series(
        read_volume(scans / "study"), tmp_path / "bad", Series(edit=pet(PatientWeight=None))
    )
    report = volseg.measure(
        image=tmp_path / "bad",
        mask=scans / "mask.nii.gz",
        intensity_unit="SUVbw",
        out=tmp_path / "out",
    )
    (reason,) = report.failed.values()
    assert report.exit_code == 4
    assert reason.startswith("E_SUV") and "PatientWeight is missing" in reason


def test_measuring_in_memory_converts_a_path_and_refuses_an_array(scans):
    mask = scans / "mask.nii.gz"
    result = volseg.measure_mask(scans / "study", mask, intensity_unit="SUVbw")
    assert result.lesions["suv_peak"].tolist()[0] > 4
    with pytest.raises(VolsegError) as caught:
        volseg.measure_mask(np.ones((9, 9, 9)), np.ones((9, 9, 9)), intensity_unit="suv bw")
    assert caught.value.code == "E_SUV"


@pytest.fixture(scope="module")
def pet_model(model, tmp_path_factory) -> Path:
    bundle = with_recipe(load_bundle(model), data={"intensity_unit": "SUV"})
    fingerprint = bundle.fingerprint.model_copy(update={"foreground": {}, "n_ct_like": {}})
    folder = tmp_path_factory.mktemp("model") / "pet"
    save_bundle(replace(bundle, fingerprint=fingerprint), folder)
    return folder


@pytest.mark.slow
def test_infer_converts_what_its_model_was_trained_on(scans, pet_model, tmp_path):
    report = volseg.infer(
        scans / "study", model=pet_model, intensity_unit="SUVbw", out=tmp_path / "suv"
    )
    twin = volseg.infer(scans / "twin.nii.gz", model=pet_model, out=tmp_path / "twin")
    assert (report.exit_code, twin.exit_code) == (0, 0)
    one, other = (rows(tmp_path / name / "lesions.csv") for name in ("suv", "twin"))
    assert len(one) == len(other)
    assert all(row["intensity_unit"] == "SUV" for row in one)
    # The model states its unit, so that the option is not needed.
    assert volseg.infer(scans / "study", model=pet_model, out=tmp_path / "plain").exit_code == 0
    assert rows(tmp_path / "plain" / "lesions.csv") == one
    loaded = volseg.load_model(pet_model)
    masks = [loaded(scans / name).mask for name in ("study", "study#SUVbw", "twin.nii.gz")]
    assert all(np.array_equal(mask, masks[0]) for mask in masks)


SUV_RECIPE = """
task = "segment"
name = "pet"
description = "Hot spots."
[data]
channels = ["pet"]
intensity_unit = "SUV"
labels = { tumour = 1 }
[preprocess]
spacing_mm = [4.0, 4.0, 3.0]
[preprocess.normalise]
method = "window"
low = 0.0
high = 10.0
mean = 0.0
sd = 1.0
[network]
name = "unet3d"
features = [4, 8, 8]
strides = [[1, 1, 1], [2, 2, 2], [2, 2, 2]]
[train]
patch_shape = [16, 16, 16]
batch_size = 1
"""


def test_a_recipe_in_suv_is_trained_and_measured_in_suv(scans, tmp_path):
    (tmp_path / "suv.toml").write_text(SUV_RECIPE)
    tables, prepared = {}, {}
    for name, image in (("series", scans / "study"), ("twin", scans / "twin.nii.gz")):
        (tmp_path / name).mkdir()
        table = tmp_path / name / "cases.csv"
        lines = [f"p{number},{image},{scans / 'mask.nii.gz'}" for number in range(2)]
        table.write_text("\n".join(["subject,image_pet,label", *lines]) + "\n")
        report = volseg.preprocess(
            table, recipe=tmp_path / "suv.toml", out=tmp_path / name / "prepared"
        )
        assert report.failed == {}
        prepared[name] = read_prepared_case(tmp_path / name / "prepared" / "cases", "p0").image
        out = tmp_path / name / "measured"
        volseg.measure(cases=table, recipe=tmp_path / "suv.toml", out=out)
        tables[name] = rows(out / "lesions.csv")
    assert prepared["twin"].max() > 5
    np.testing.assert_allclose(prepared["series"], prepared["twin"], rtol=1e-2)  # float16
    assert {row["intensity_unit"] for row in tables["series"]} == {"SUV"}
    for one, twin in zip(tables["series"], tables["twin"], strict=True):
        assert float(one["suv_peak"]) == pytest.approx(float(twin["suv_peak"]), rel=1e-4)
    measured = volseg.measure_mask(
        scans / "study", scans / "mask.nii.gz", recipe=tmp_path / "suv.toml"
    )
    expected = float(tables["twin"][0]["suv_peak"])
    assert float(measured.lesions["suv_peak"].iloc[0]) == pytest.approx(expected, rel=1e-4)


def test_infer_takes_no_other_unit(scans, model, tmp_path):
    with pytest.raises(VolsegError) as caught:
        volseg.infer(scans / "study", model=model, intensity_unit="HU", out=tmp_path)
    assert caught.value.code == "E_USAGE" and "SUVbw" in caught.value.fix


def test_a_model_of_ct_refuses_a_pet_in_suv(scans, model, tmp_path):
    report = volseg.infer(scans / "study", model=model, intensity_unit="SUVbw", out=tmp_path)
    (reason,) = report.failed.values()
    assert reason.startswith("E_MODALITY")

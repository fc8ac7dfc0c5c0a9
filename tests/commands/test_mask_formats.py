"""`infer --format`: masks in another file format, which every other command reads."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest

import volseg
from volseg.io.formats import format_of, is_scan, result_suffix
from volseg.io.label_table import read_label_table
from volseg.io.volumes import read_header, read_mask, write_volume
from volseg.options import COMMANDS
from volseg.options.declare import settings_of
from volseg.store.records import CaseRecord

FORMATS = dict(settings_of(COMMANDS["infer"]))["format"].values
CASE = "scan_0"


def table(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def scan(dataset):
    return dataset / "images" / f"{CASE}.nii.gz"


@pytest.fixture(scope="module")
def results(scan, model, tmp_path_factory):
    """Return the results of a scan with masks in NIfTI."""
    out = tmp_path_factory.mktemp("nifti") / "results"
    assert volseg.infer(scan, model=model, out=out, device="cpu", pages=False).exit_code == 0
    return out


def test_every_format_can_hold_a_mask():
    for name in FORMATS:
        path = Path(f"a{result_suffix(name)}")
        assert is_scan(path) and format_of(path).encode and format_of(path).holds_masks
    assert len(set(map(result_suffix, FORMATS))) == len(FORMATS)


@pytest.mark.parametrize(
    "name",
    [
        name if name == "nrrd" else pytest.param(name, marks=pytest.mark.slow)
        for name in FORMATS
        if name != "nifti"
    ],
)
def test_masks_of_a_format_serve_every_command(name, scan, dataset, model, results, tmp_path):
    out, suffix = tmp_path / "results", result_suffix(name)
    settings = {"model": model, "out": out, "device": "cpu", "pages": False}
    expected = read_mask(results / f"masks/{CASE}.nii.gz")

    volseg.infer(scan, **settings)
    report = volseg.infer(scan, **settings, format=name)  # replaces the mask in NIfTI
    assert report.exit_code == 0 and report.done == [CASE]
    (path,) = (out / "masks").iterdir()
    assert path.name == f"{CASE}{suffix}"
    mask = read_mask(path)
    np.testing.assert_array_equal(mask.array, expected.array)
    assert mask.geometry.matches(read_header(scan).geometry)
    np.testing.assert_array_equal(report.mask(CASE).array, expected.array)
    if format_of(path).read_names is not None:
        names = read_label_table(path)
        assert names and names == read_record_names(out)
    assert (out / f"lesion_ids/{CASE}.nii.gz").is_file()
    lesions = table(out / "lesions.csv")
    assert lesions == table(results / "lesions.csv")

    again = volseg.infer(scan, **settings, format=name)
    assert (again.done, again.kept) == ([], [CASE])

    truth, rows = tmp_path / "truth", {}
    truth.mkdir()
    shutil.copy(dataset / "labels" / f"{CASE}.nii.gz", truth)
    for kind, folder in (("own", out), ("nifti", results)):
        report = volseg.evaluate(
            reference=truth, predicted=folder, out=tmp_path / f"evaluation_{kind}"
        )
        assert report.exit_code == 0
        rows[kind] = table(tmp_path / f"evaluation_{kind}" / "evaluation.csv")
    assert rows["own"] == rows["nifti"] and rows["own"]

    compared = volseg.compare(results, out, out=tmp_path / "compared", pages=False)
    assert compared.exit_code == 0
    assert volseg.report(out).exit_code == 0

    edited = mask.array.copy()
    edited[:] = 0
    edited[2:5, 2:5, 2:5] = expected.array.max()
    write_volume(mask.with_array(edited), path)
    kept = volseg.infer(scan, **settings, format=name)
    assert kept.kept == [CASE] and any("W_EDITED" in text for text in kept.warnings)
    measured = volseg.measure(out, pages=False)
    assert measured.done == [CASE]
    assert [row["n_voxels"] for row in table(out / "lesions.csv")] == ["27"]
    np.testing.assert_array_equal(read_mask(path).array, edited)


def read_record_names(out):
    return dict(CaseRecord.read(out, CASE).source.label_names)

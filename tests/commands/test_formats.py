"""Every command takes scans and masks in every file format of the table."""

import csv

import numpy as np
import pytest

import volseg
from volseg.io.formats import FORMATS
from volseg.io.volumes import read_header, read_mask, read_volume, write_volume

ROWS = [row for row in FORMATS if row.encode]


@pytest.fixture(
    scope="module",
    params=[  # the other tests use NIfTI
        pytest.param(row, id=row.name, marks=[pytest.mark.slow] * (row.name == "NIfTI"))
        for row in ROWS
    ],
)
def folder(request, dataset, tmp_path_factory):
    """Return a folder with images/ and labels/ of three cases in one format that can hold them."""
    path, suffix = tmp_path_factory.mktemp("data"), request.param.suffixes[0]
    parts = (
        ("images", read_volume, suffix if request.param.holds_scans else ".nii.gz"),
        ("labels", read_mask, suffix if request.param.holds_masks else ".nii.gz"),
    )
    for sub, read, ending in parts:
        (path / sub).mkdir()
        for number in range(3):
            volume = read(dataset / sub / f"scan_{number}.nii.gz")
            write_volume(volume, path / sub / f"scan_{number}{ending}")
    return path


def table(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_check_finds_no_problem(folder):
    assert volseg.check(folder) == []
    scan = next((folder / "images").iterdir())
    assert volseg.check(scan) == []
    scan = scan.rename(folder / f"whole{scan.name}")
    damaged = folder / "images" / scan.name.removeprefix("whole")
    damaged.write_bytes(scan.read_bytes()[:-100])
    (problem,) = volseg.check(folder)
    scan.replace(damaged)
    assert problem["code"] in ("E_TRUNCATED", "E_CRC") and problem["fix"]


def test_infer_evaluate_and_measure(folder, model, dataset, tmp_path):
    scans = [folder / "images", *(dataset / f"images/scan_{number}.nii.gz" for number in range(3))]
    for name, inputs in (("results", scans[:1]), ("expected", scans[1:])):
        report = volseg.infer(inputs, model=model, out=tmp_path / name, device="cpu")
        assert report.exit_code == 0
    results = tmp_path / "results"
    for scan in (folder / "images").iterdir():
        mask = results / "masks" / f"{scan.name.split('.')[0]}.nii.gz"
        np.testing.assert_array_equal(
            read_header(mask).geometry.affine, read_header(scan).geometry.affine
        )
    rows, expected = table(results / "lesions.csv"), table(tmp_path / "expected/lesions.csv")
    assert rows and [row["n_voxels"] for row in rows] == [row["n_voxels"] for row in expected]
    assert [row["volume_ml"] for row in rows] == [row["volume_ml"] for row in expected]

    report = volseg.evaluate(reference=folder, predicted=results, out=tmp_path / "evaluation")
    assert report.exit_code == 0
    assert [row["status"] for row in table(tmp_path / "evaluation/evaluation.csv")] == ["done"] * 3

    report = volseg.measure(
        image=folder / "images",
        mask=folder / "labels",
        out=tmp_path / "measured",
        intensity_unit="HU",
    )
    assert report.exit_code == 0
    assert len(table(tmp_path / "measured/lesions.csv")) == 3

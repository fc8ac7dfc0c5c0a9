import csv

import numpy as np
import pytest
from laws import ball, grid_around, oblique

import volseg
from volseg.errors import VolsegError
from volseg.io.nifti import write_volume
from volseg.volume import Volume


def write(path, mask, geometry):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_volume(Volume(mask.astype(np.uint8), geometry), path)


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def folders(tmp_path):
    geometry = grid_around(10, oblique((1, 1.2, 2)))
    whole = ball(9, geometry)
    half = whole.copy()
    half[: geometry.shape[0] // 2] = False
    empty = np.zeros(geometry.shape)
    for name, truth, guess in (("a", whole, whole), ("b", whole, half), ("c", empty, empty), ("d", whole, empty)):
        write(tmp_path / "truth" / f"{name}.nii.gz", truth, geometry)
        write(tmp_path / "guess" / f"{name}.nii.gz", guess, geometry)
    write(tmp_path / "truth" / "only_here.nii.gz", whole, geometry)
    return tmp_path / "truth", tmp_path / "guess", whole, half


def test_dice_and_volume_error_are_those_of_the_masks(folders, tmp_path):
    truth, guess, whole, half = folders
    report = volseg.evaluate(reference=truth, predicted=guess, out=tmp_path / "out")
    table = {row["case_id"]: row for row in rows(tmp_path / "out" / "evaluation.csv")}
    assert table["a"]["dice"] == "1"
    assert float(table["b"]["dice"]) == pytest.approx(2 * half.sum() / (whole.sum() + half.sum()), abs=1e-5)
    assert float(table["b"]["volume_error_percent"]) == pytest.approx(100 * (half.sum() / whole.sum() - 1), abs=1e-3)
    assert table["c"]["dice"] == ""  # both empty: there is nothing to overlap
    assert table["d"]["dice"] == "0"
    assert report.details["not_predicted"] == ["only_here"]
    assert report.details["labels"]["1"]["n"] == 3
    assert report.exit_code == 0


def test_masks_on_different_grids_are_a_failed_row(folders, tmp_path):
    truth, guess, *_ = folders
    geometry = grid_around(12, oblique((1, 1.2, 2)))
    write(guess / "a.nii.gz", np.ones(geometry.shape), geometry)
    report = volseg.evaluate(reference=truth, predicted=guess, out=tmp_path / "out")
    assert report.exit_code == 3
    assert "E_PAIR" in report.failed["a"]


def test_folders_without_a_common_name_are_a_wrong_request(folders, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    geometry = grid_around(5, oblique((1, 1, 1)))
    write(other / "z.nii.gz", np.ones(geometry.shape), geometry)
    with pytest.raises(VolsegError, match="no mask of"):
        volseg.evaluate(reference=folders[0], predicted=other, out=tmp_path / "out")

"""Commands on DICOM series give what they give on the same scans in NIfTI."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from dicom_files import NAME, Series, numbers, oblique_volume, write_series

import volseg
from volseg.io.volumes import read_mask, read_volume, write_volume
from volseg.volume import Volume

UID = re.compile(rb"1\.2\.826\.0\.1\.3680043\.8\.498\.[0-9]{10}")  # as pydicom makes them
IDENTIFYING = (NAME.encode(), b"Thorax", b"19611111", b"20111111")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def tilt(header, index):
    position = [float(value) for value in header.ImagePositionPatient]
    position[1] += 2.0 * index
    header.ImagePositionPatient = numbers(position)


@pytest.fixture(scope="module")
def twins(dataset, tmp_path_factory) -> tuple[Path, Path]:
    """A series and a NIfTI file of the same scan, on the same grid."""
    folder = tmp_path_factory.mktemp("twins")
    scan = read_volume(dataset / "images" / "scan_6.nii.gz")
    stored = Volume(np.rint(scan.array).astype(np.int16), scan.geometry)
    series = write_series(stored, folder / "study" / "ct")
    write_volume(read_volume(series), folder / "twin.nii.gz")
    return series, folder / "twin.nii.gz"


@pytest.fixture(scope="module")
def results(twins, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("infer")
    reports = [
        volseg.infer(scan, model=model, out=out / name, figures=True)
        for scan, name in zip(twins, ("dicom", "nifti"), strict=True)
    ]
    assert [report.exit_code for report in reports] == [0, 0]
    return out


def without_names(row: dict[str, str]) -> dict[str, str]:
    volatile = ("case_id", "image", "seconds", "warnings")
    return {name: cell for name, cell in row.items() if name not in volatile}


def test_a_series_gives_the_masks_and_rows_of_its_nifti_twin(results):
    for table in ("lesions.csv", "cases.csv"):
        one, other = (rows(results / name / table) for name in ("dicom", "nifti"))
        assert one and list(map(without_names, one)) == list(map(without_names, other))
    (name,) = {row["case_id"] for row in rows(results / "dicom" / "cases.csv")}
    for folder in ("masks", "lesion_ids"):
        mask = read_mask(results / "dicom" / folder / f"{name}.nii.gz")
        twin = read_mask(results / "nifti" / folder / "twin.nii.gz")
        assert np.array_equal(mask.array, twin.array) and mask.array.any()
        assert np.array_equal(mask.geometry.affine, twin.geometry.affine)


def test_no_result_holds_a_name_a_date_or_a_uid(results):
    files = [path for path in (results / "dicom").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".csv", ".html", ".png", ".gz", ".json"}
    for path in files:
        content = path.read_bytes()
        if path.suffix == ".gz":
            import gzip

            content = gzip.decompress(content)
        assert not [word for word in IDENTIFYING if word in content], path
        assert not UID.search(content), path


def test_folders_named_after_patients_leave_no_trace_in_tables_and_pages(twins, results, tmp_path):
    folder = shutil.copytree(twins[0], tmp_path / NAME)
    mask = results / "nifti" / "masks" / "twin.nii.gz"
    volseg.measure(image=folder, mask=mask, out=tmp_path / "out")
    (row,) = rows(tmp_path / "out" / "cases.csv")
    assert row["image"] == row["case_id"]
    for path in (tmp_path / "out").rglob("*"):
        if path.suffix in (".csv", ".html"):
            assert NAME not in path.read_text(encoding="utf-8"), path


def test_neither_do_those_of_series_that_fail(twins, tmp_path):
    folder = tmp_path / NAME
    shutil.copytree(twins[0], folder / "cut")
    first, second = sorted((folder / "cut").iterdir())[:2]
    first.rename(first.with_name(f"{NAME} 1.dcm"))
    (folder / "cut" / f"{NAME} 1.dcm").write_bytes(second.read_bytes()[:-9])
    second.unlink()
    shutil.copytree(twins[0], folder / "whole")
    mask = folder / "mask of another scan.nii.gz"
    other = oblique_volume(seed=9)
    write_volume(other.with_array((other.array > 0).astype(np.uint8)), mask)
    for name, code in (("cut", "E_GAP"), ("whole", "E_PAIR")):
        out = tmp_path / name
        report = volseg.measure(image=folder / name, mask=mask, out=out)
        (row,) = rows(out / "cases.csv")
        assert row["reason"].startswith(f"{code}: ")
        assert NAME in next(iter(report.failed.values()))  # the terminal says where it is
        (out / "quality").mkdir()
        volseg.check(folder / name, out=out / "quality")
        for path in out.rglob("*"):
            if path.suffix in (".csv", ".html"):
                assert NAME not in path.read_text(encoding="utf-8"), path


def test_measuring_a_series_equals_measuring_its_twin(twins, results, tmp_path):
    mask = results / "nifti" / "masks" / "twin.nii.gz"
    for scan, name in zip(twins, "ab", strict=True):
        volseg.measure(image=scan, mask=mask, out=tmp_path / name)
    one, other = (rows(tmp_path / name / "lesions.csv") for name in "ab")
    assert one and list(map(without_names, one)) == list(map(without_names, other))


def test_a_series_that_is_refused_is_a_row_and_the_others_are_done(twins, model, tmp_path):
    study = tmp_path / "study"
    shutil.copytree(twins[0], study / "ct")
    scan = read_volume(twins[0])
    write_series(scan, study / "tilted", Series(edit=tilt, seed=5))
    report = volseg.infer(study, model=model, out=tmp_path / "out")
    assert report.exit_code == 3
    status = {row["status"]: row for row in rows(tmp_path / "out" / "cases.csv")}
    assert set(status) == {"done", "failed"}
    assert "tilted by" in status["failed"]["reason"]
    selected = volseg.infer(
        study, model=model, out=tmp_path / "one", series=status["done"]["case_id"]
    )
    assert selected.exit_code == 0
    assert [row["status"] for row in rows(tmp_path / "one" / "cases.csv")] == ["done"]


def test_check_lists_the_series_of_a_study(twins, tmp_path):
    study = tmp_path / "study"
    shutil.copytree(twins[0], study / "ct")
    write_series(read_volume(twins[0]), study / "tilted", Series(edit=tilt, seed=5))
    problems = volseg.check(study)
    listed = [problem["problem"] for problem in problems if problem["code"] == "N_SERIES"]
    assert len(listed) == 2 and all("Thorax" in text and "CT" in text for text in listed)
    assert sum("E_TILT" in text for text in listed) == 1
    assert [problem["code"] for problem in problems if problem["code"][0] == "E"] == ["E_TILT"]


def test_a_table_may_name_the_folder_of_a_series(twins, results, tmp_path):
    mask = results / "nifti" / "masks" / "twin.nii.gz"
    table = tmp_path / "cases.csv"
    table.write_text(f"image,label\n{twins[0]},{mask}\n")
    volseg.measure(cases=table, out=tmp_path / "out")
    (case,) = {row["case_id"] for row in rows(tmp_path / "out" / "lesions.csv")}
    assert case == rows(results / "dicom" / "cases.csv")[0]["case_id"]

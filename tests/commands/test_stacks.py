"""Commands on arrays and pictures give what they give on the same scan in NIfTI."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import volseg
from volseg.errors import VolsegError
from volseg.io.prepared import read_prepared_case
from volseg.io.volumes import read_mask, read_volume, write_volume
from volseg.volume import Geometry, Volume


@pytest.fixture(scope="module")
def twins(dataset, tmp_path_factory):
    """A scan and its mask as NIfTI, arrays and pictures, all with axes to R, A and S."""
    folder = tmp_path_factory.mktemp("stacks")
    scan = read_volume(dataset / "images" / "scan_6.nii.gz")
    mask = read_mask(dataset / "labels" / "scan_6.nii.gz")
    grid = Geometry(scan.array.shape, np.diag([*scan.geometry.spacing_mm, 1]))
    array = np.rint(scan.intensities()).astype(np.int16)
    write_volume(Volume(array, grid), folder / "image.nii.gz")
    write_volume(Volume(mask.array, grid), folder / "mask.nii.gz")
    np.save(folder / "image.npy", array)
    (folder / "mask").mkdir()
    for k in range(array.shape[2]):
        Image.fromarray(mask.array[:, :, k].T).save(folder / "mask" / f"{k}.png")
    return folder, ",".join(map(repr, read_volume(folder / "image.nii.gz").geometry.spacing_mm))


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        volatile = {"case_id", "image", "seconds", "warnings"}
        return [
            {name: cell for name, cell in row.items() if name not in volatile}
            for row in csv.DictReader(file)
        ]


@pytest.mark.slow
def test_infer_gives_the_mask_and_rows_of_the_twin(twins, model, tmp_path):
    folder, spacing = twins
    stack = volseg.infer(folder / "image.npy", model=model, spacing=spacing, out=tmp_path / "a")
    twin = volseg.infer(folder / "image.nii.gz", model=model, out=tmp_path / "b")
    assert stack.exit_code == twin.exit_code == 0
    (note,) = (text for text in stack.notes if text.startswith("N_SPACING"))
    assert "taken for R, A, S" in note
    masks = [read_mask(tmp_path / name / "masks" / "image.nii.gz") for name in "ab"]
    assert np.array_equal(masks[0].array, masks[1].array) and masks[0].array.any()
    assert masks[0].geometry.matches(masks[1].geometry)
    for table in ("lesions.csv", "cases.csv"):
        assert rows(tmp_path / "a" / table) == rows(tmp_path / "b" / table)
    again = volseg.infer(folder / "image.npy", model=model, spacing=spacing, out=tmp_path / "a")
    assert again.kept and not again.done
    other = volseg.infer(folder / "image.npy", model=model, spacing="1,1,9", out=tmp_path / "a")
    assert other.done and not other.kept


def test_measure_takes_a_mask_of_pictures(twins, tmp_path):
    folder, spacing = twins
    paths = {"image": folder / "image.npy", "mask": folder / "mask"}
    volseg.measure(**paths, spacing=spacing, out=tmp_path / "a")
    paths = {name: folder / f"{name}.nii.gz" for name in paths}
    volseg.measure(**paths, out=tmp_path / "b")
    assert rows(tmp_path / "a" / "lesions.csv") == rows(tmp_path / "b" / "lesions.csv") != []


def test_a_table_names_stacks_and_a_spacing_without_any_is_refused(twins, tmp_path):
    folder, spacing = twins
    table = tmp_path / "cases.csv"
    table.write_text(f"subject,image,label\np,{folder / 'image.npy'},{folder / 'mask.nii.gz'}\n")
    report = volseg.measure(cases=table, spacing=spacing, out=tmp_path / "a")
    assert report.done == ["p"]
    with pytest.raises(VolsegError, match="leave out --spacing"):
        volseg.measure(
            image=folder / "image.nii.gz",
            mask=folder / "mask.nii.gz",
            spacing=spacing,
            out=tmp_path / "b",
        )


def test_a_table_states_a_spacing_for_each_path_in_training_and_evaluation(
    twins, tiny_recipe, tmp_path
):
    folder, spacing = twins
    mark = f"#{spacing.replace(',', 'x')}mm"
    rows_of = {
        "stacks": (folder / f"image.npy{mark}", folder / f"mask{mark}"),
        "twins": (folder / "image.nii.gz", folder / "mask.nii.gz"),
    }
    for name, (image, mask) in rows_of.items():
        (tmp_path / name).mkdir()
        lines = [f"p0,{image},{mask},train,5", f"p1,{image},{mask},val,1"]
        table = "\n".join(["subject,image,label,split,grade", *lines])
        (tmp_path / name / "cases.csv").write_text(table + "\n")
        volseg.preprocess(tmp_path / name, recipe=tiny_recipe, out=tmp_path / name / "out")
    prepared = [read_prepared_case(tmp_path / name / "out" / "cases", "p0") for name in rows_of]
    assert np.array_equal(prepared[0].image, prepared[1].image)
    assert np.array_equal(prepared[0].mask, prepared[1].mask) and prepared[0].mask.any()
    (tmp_path / "predicted").mkdir()
    for name in ("p0", "p1"):
        shutil.copy(folder / "mask.nii.gz", tmp_path / "predicted" / f"{name}.nii.gz")
    report = volseg.evaluate(
        reference=tmp_path / "stacks", predicted=tmp_path / "predicted", out=tmp_path / "e"
    )
    assert report.exit_code == 0
    table = pd.read_csv(tmp_path / "e" / "evaluation.csv")
    assert (table.dice == 1).all() and len(table) >= 2


@pytest.mark.parametrize("given", ["1,1", "0,1,1", "1e-320,1,1", "1,1,1e9", "a,b,c", (1, 2)])
def test_a_spacing_is_three_lengths(given, twins, tmp_path):
    with pytest.raises(VolsegError, match=r"--spacing must be three lengths of 0\.01 to 100 mm"):
        volseg.infer(twins[0] / "image.npy", spacing=given, out=tmp_path / "a")


def test_a_mask_without_geometry_takes_the_spacing_beside_a_scan_that_has_its_own(twins, tmp_path):
    folder, spacing = twins
    mask = folder / "mask"
    report = volseg.measure(
        image=folder / "image.nii.gz", mask=mask, spacing=spacing, out=tmp_path / "a"
    )
    assert report.exit_code == 0 and any("1 mask without" in note for note in report.notes)
    twin = volseg.measure(
        image=folder / "image.nii.gz", mask=folder / "mask.nii.gz", out=tmp_path / "b"
    )
    assert twin.exit_code == 0
    assert rows(tmp_path / "a" / "lesions.csv") == rows(tmp_path / "b" / "lesions.csv")


def test_without_a_spacing_the_row_names_the_option(twins, model, tmp_path):
    report = volseg.infer(twins[0] / "image.npy", model=model, out=tmp_path / "a")
    (reason,) = report.failed.values()
    assert reason.startswith("E_NOGEOM: ") and "--spacing I,J,K" in reason

"""Every column of lesions.csv and cases.csv has a value in some scan: none is only promised."""

import csv

import numpy as np
import pytest
from bundles import random_classifier
from laws import ball, centre_mm, oblique

import volseg
from volseg.io.volumes import write_volume
from volseg.volume import Geometry, Volume

LABELS = {"organ": 1, "plaque": 2}


@pytest.fixture(scope="module")
def measured(tiny_recipe, tmp_path_factory):
    """Measure an organ (1) with calcified lesions (2).

    The mask of a second scan has another grid, and a third scan cannot be in HU.
    """
    folder = tmp_path_factory.mktemp("columns")
    geometry = Geometry((48, 44, 24), oblique((0.9, 1.1, 3.0)))
    middle, shift = centre_mm(geometry), geometry.affine[:3, 0] * 10
    organ = ball(20, geometry)
    lesions = ball(7, geometry, middle - shift) | ball(4, geometry, middle + shift)
    noise = np.random.default_rng(0).normal(0, 15, geometry.shape)
    array = np.where(lesions, 300, np.where(organ, 40, -1000)) + noise
    mask = np.where(lesions, 2, organ).astype(np.uint8)
    for part in ("images", "masks"):
        (folder / part).mkdir()
    shifted = Geometry(geometry.shape, np.eye(4))
    for name, grid, offset in (
        ("good", geometry, 0),
        ("shifted", shifted, 0),
        ("positive", geometry, 5000),
    ):
        scan = Volume((array + offset).astype(np.int16), geometry)
        write_volume(scan, folder / "images" / f"{name}.nii.gz")
        write_volume(Volume(mask, grid), folder / "masks" / f"{name}.nii.gz")
    data = tiny_recipe.data.model_copy(update={"labels": LABELS})
    rules = {"organ": "organ", "calcium": True, "calcium_mg_per_ml_hu": 0.8}
    measure = tiny_recipe.measure.model_copy(update=rules)
    recipe = tiny_recipe.model_copy(update={"data": data, "measure": measure, "postprocess": ()})
    volseg.measure(
        image=folder / "images", mask=folder / "masks", out=folder / "out", recipe=recipe
    )
    return folder / "out"


@pytest.fixture(scope="module")
def inferred(dataset, model, tmp_path_factory):
    """Run the tiny model with its classifier on a scan."""
    out = tmp_path_factory.mktemp("inferred") / "out"
    volseg.infer(dataset / "images" / "scan_7.nii.gz", model=model, out=out, device="cpu")
    return out


@pytest.fixture(scope="module")
def gated(dataset, model, tmp_path_factory):
    """Run the tiny model with a gate that skips every slice, and a filter."""
    folder = tmp_path_factory.mktemp("gated")
    random_classifier(folder / "gate", "slice", ["without label", "with label"])
    random_classifier(folder / "filter", "lesion", ["false", "matched"])
    options = {"gate": folder / "gate", "gate_threshold": 1.0, "filter_threshold": 0.0}
    volseg.attach(model, filter=folder / "filter", **options, out=folder / "model")
    scan = dataset / "images" / "scan_7.nii.gz"
    volseg.infer(scan, model=folder / "model", out=folder / "out", device="cpu", pages=False)
    return folder / "out"


@pytest.fixture(scope="module")
def uptake(measured, tmp_path_factory):
    """Measure the organ and its lesions in a scan that is stated to be in SUV."""
    folder = tmp_path_factory.mktemp("uptake")
    scan = volseg.read_volume(measured.parent / "images" / "good.nii.gz")
    suv = ((scan.array + 1000) / 200).astype(np.float32)
    write_volume(scan.with_array(suv), folder / "suv.nii.gz")
    mask = measured.parent / "masks" / "good.nii.gz"
    image, out = folder / "suv.nii.gz", folder / "out"
    volseg.measure(image=image, mask=mask, intensity_unit="SUV", out=out)
    return out


@pytest.mark.parametrize("table", ["lesions.csv", "cases.csv"])
def test_every_column_is_filled_in_some_scan(table, measured, inferred, gated, uptake):
    rows = []
    for folder in (measured, inferred, gated, uptake):
        with (folder / table).open(encoding="utf-8") as file:
            rows += csv.DictReader(file)
    names = {name for row in rows for name in row}
    empty = [name for name in sorted(names) if not any(row.get(name) for row in rows)]
    assert not empty, f"{table}: nothing fills {', '.join(empty)}"

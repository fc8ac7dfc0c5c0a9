"""One place in another axis order or extent is the same place, in every command."""

import csv
import json
import shutil
import tracemalloc
from dataclasses import replace

import nibabel
import numpy as np
import pytest
import torch
from bundles import with_recipe
from laws import ball, grid_around, oblique, orientations
from typer.testing import CliRunner

import volseg
from volseg.bundle import load_bundle, save_bundle
from volseg.cli import app
from volseg.commands.placing import place_mask
from volseg.errors import VolsegError
from volseg.evaluation.memory import plan_reading
from volseg.io.volumes import read_header, read_mask, read_volume, write_volume
from volseg.networks import build_segmentation
from volseg.volume import BoundingBox, Geometry, Volume


def rows(path, *left_out):
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {name: cell for name, cell in row.items() if name not in left_out}
            for row in csv.DictReader(file)
        ]


@pytest.fixture
def scan():
    """Return a scan with two lesions of labels 1 and 2, neither near the border."""
    geometry = grid_around(14, oblique((0.9, 1.1, 2.0)), margin=3)
    i, j, k = geometry.shape
    geometry = Geometry((i + 2, j, k + 1), geometry.affine)
    centre = geometry.to_world_mm((np.array([geometry.shape]) - 1) / 2)[0]
    mask = ball(6, geometry, centre - [6, 0, 1]) + 2 * ball(4, geometry, centre + [8, 1, 0])
    noise = np.random.default_rng(0).normal(0, 20, geometry.shape)
    image = Volume((np.where(mask > 0, 60, -200) + noise).astype(np.int16), geometry)
    return image, image.with_array(mask.astype(np.uint8))


def stored_orders(volume):
    for n, (array, affine) in enumerate(orientations(volume)):
        yield f"o{n:02}", Volume(array, Geometry(array.shape, affine))


def test_all_48_orders_of_a_mask_measure_alike(scan, tmp_path):
    image, mask = scan
    write_volume(image, tmp_path / "scan.nii")
    lines = ["subject,image,label"]
    for name, stored in stored_orders(mask):
        write_volume(stored, tmp_path / f"{name}.nii")
        lines.append(f"{name},scan.nii,{name}.nii")
    (tmp_path / "cases.csv").write_text("\n".join(lines) + "\n")
    report = volseg.measure(cases=tmp_path / "cases.csv", out=tmp_path / "out", pages=False)
    assert report.exit_code == 0
    by_case = {}
    for row in rows(tmp_path / "out" / "lesions.csv"):
        by_case.setdefault(row.pop("case_id"), []).append(row)
    assert len(by_case) == 48
    assert all(lesions == by_case["o00"] for lesions in by_case.values())
    warnings = {row["case_id"]: row["warnings"] for row in rows(tmp_path / "out" / "cases.csv")}
    assert "W_AXES" not in warnings.pop("o00")
    assert all("W_AXES: the mask is stored as " in text for text in warnings.values())
    assert any("W_AXES" in warning for warning in report.warnings)


@pytest.mark.slow
def test_all_48_orders_of_a_prediction_evaluate_alike(scan, tmp_path):
    _, truth = scan
    guess = truth.with_array(np.roll(truth.array, 1, axis=0))
    for name, stored in stored_orders(guess):
        for side, volume in (("truth", truth), ("guess", stored)):
            (tmp_path / side).mkdir(exist_ok=True)
            write_volume(volume, tmp_path / side / f"{name}.nii")
    report = volseg.evaluate(
        reference=tmp_path / "truth", predicted=tmp_path / "guess", out=tmp_path / "out"
    )
    assert report.exit_code == 0 and len(report.done) == 48
    for table, first_notes in (("evaluation.csv", True), ("detections.csv", False)):
        by_case = {}
        for row in rows(tmp_path / "out" / table, "notes"):
            by_case.setdefault(row.pop("case_id"), []).append(row)
        assert len(by_case) == 48
        assert all(of_case == by_case["o00"] for of_case in by_case.values()), first_notes
    notes = {row["case_id"]: row["notes"] for row in rows(tmp_path / "out" / "evaluation.csv")}
    assert "W_AXES" not in notes.pop("o00") and all("W_AXES" in text for text in notes.values())
    assert len([text for text in report.warnings if text.startswith("W_AXES: o")]) == 47


def test_check_plan_and_preprocess_take_masks_and_channels_in_any_order(
    dataset, tiny_recipe, tmp_path
):
    shutil.copytree(dataset, tmp_path / "data")
    paths = sorted((tmp_path / "data" / "labels").iterdir())
    for n, path in enumerate(paths):
        stored = list(stored_orders(read_mask(path)))[(7 * n + 3) % 48][1]
        write_volume(stored, path)
    codes = {problem["code"] for problem in volseg.check(tmp_path / "data")}
    assert codes == {"W_AXES"}
    assert {p["code"] for p in volseg.check(tmp_path / "data", tiny_recipe)} == {"W_AXES"}
    plan = volseg.plan(tmp_path / "data", recipe=tiny_recipe)
    assert any(warning.startswith("W_AXES: ") for warning in plan.warnings)
    prepared = [
        volseg.preprocess(folder, recipe=tiny_recipe, out=tmp_path / name)
        for name, folder in (("reordered", tmp_path / "data"), ("plain", dataset))
    ]
    assert [report.exit_code for report in prepared] == [0, 0]
    assert any(warning.startswith("W_AXES: ") for warning in prepared[0].warnings)
    for path in sorted((tmp_path / "plain" / "cases").glob("**/*.npy")):
        other = tmp_path / "reordered" / path.relative_to(tmp_path / "plain")
        np.testing.assert_array_equal(np.load(other), np.load(path))


def test_channels_of_one_place_in_another_order_are_no_alarm(scan, tmp_path, tiny_recipe):
    image, mask = scan
    lines = ["subject,image_t1,image_t2,label"]
    for n, (name, stored) in enumerate(stored_orders(image)):
        if n % 9 == 0:
            for channel, volume in (("t1", image), ("t2", stored)):
                write_volume(volume, tmp_path / f"{name}_{channel}.nii")
            write_volume(mask, tmp_path / f"{name}_mask.nii")
            lines.append(f"{name},{name}_t1.nii,{name}_t2.nii,{name}_mask.nii")
    (tmp_path / "cases.csv").write_text("\n".join(lines) + "\n")
    data = tiny_recipe.data.model_copy(
        update={"channels": ("t1", "t2"), "labels": {"a": 1, "b": 2}, "grids": "same"}
    )
    recipe = tiny_recipe.model_copy(update={"data": data, "classify": None})
    problems = volseg.check(tmp_path / "cases.csv", recipe)
    assert {problem["code"] for problem in problems} <= {"W_AXES", "W_UNIT"}
    assert len([p for p in problems if p["code"] == "W_AXES"]) == len(lines) - 2


@pytest.fixture(scope="module")
def model_of_two(model, tmp_path_factory):
    """Return an untrained model of two channels: its masks differ if these are exchanged."""
    bundle = with_recipe(load_bundle(model), data={"channels": ("t1", "t2")})
    recipe = bundle.recipe.model_copy(update={"postprocess": (), "classify": None})
    names, facts = ("t1", "t2"), bundle.fingerprint
    facts = facts.model_copy(
        update={
            "foreground": dict.fromkeys(names, facts.foreground["ct"]),
            "n_ct_like": dict.fromkeys(names, facts.n_ct_like["ct"]),
        }
    )
    bundle = replace(bundle, recipe=recipe, fingerprint=facts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = build_segmentation(recipe)
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    bundle = replace(bundle, weights={"segmentation": weights})
    folder = tmp_path_factory.mktemp("of_two") / "model"
    save_bundle(bundle, folder)
    return folder


@pytest.mark.slow
def test_channels_in_mixed_orders_are_segmented_as_in_one_order(scan, model_of_two, tmp_path):
    t1, _ = scan
    t2 = t1.with_array(np.ascontiguousarray(t1.array[::-1, :, ::-1] // 2 + 7))
    write_volume(t1, tmp_path / "t1.nii")
    lines = ["subject,image_t1,image_t2"]
    for n, (name, stored) in enumerate(stored_orders(t2)):
        if n % 5 == 0:
            write_volume(stored, tmp_path / f"{name}.nii")
            lines.append(f"{name},t1.nii,{name}.nii")
    (tmp_path / "cases.csv").write_text("\n".join(lines) + "\n")
    report = volseg.infer(
        tmp_path / "cases.csv",
        model=model_of_two,
        out=tmp_path / "out",
        probabilities=True,
        accept_mismatch=True,
        pages=False,
    )
    assert report.exit_code == 0 and len(report.done) == len(lines) - 1
    masks = {case: report.mask(case) for case in report.done}
    assert 0 < np.count_nonzero(masks["o00"].array) < masks["o00"].array.size
    probabilities = tmp_path / "out" / "probabilities" / "label_3"
    expected = read_volume(probabilities / "o00.nii.gz").array
    for case, predicted in masks.items():
        assert predicted.geometry.matches(t1.geometry)
        np.testing.assert_array_equal(predicted.array, masks["o00"].array)
        # one step of uint8: another memory order rounds differently
        stored = read_volume(probabilities / f"{case}.nii.gz").array
        assert np.abs(stored.astype(int) - expected).max() <= 1
    warnings = {row["case_id"]: row["warnings"] for row in rows(tmp_path / "out" / "cases.csv")}
    assert "W_AXES" not in warnings.pop("o00")
    assert all("W_AXES: channel 't2' is stored as" in text for text in warnings.values())
    exchanged = volseg.segment({"t1": t2, "t2": t1}, model=model_of_two, accept_mismatch=True)
    assert (exchanged.mask != masks["o00"].array).any()


def test_a_mask_that_was_cropped_is_placed_and_one_that_is_larger_is_cut(scan, tmp_path):
    image, mask = scan
    box = BoundingBox.around(mask.array)
    write_volume(image, tmp_path / "scan.nii")
    write_volume(mask, tmp_path / "mask.nii")
    write_volume(mask.crop(box), tmp_path / "cropped.nii")
    part = BoundingBox((2, 2, 2), tuple(n - 2 for n in image.geometry.shape))
    write_volume(image.crop(part), tmp_path / "part.nii")
    tables = {}
    for scan_name, mask_name in (("scan", "mask"), ("scan", "cropped"), ("part", "mask")):
        out = tmp_path / f"{scan_name}_{mask_name}"
        report = volseg.measure(
            image=tmp_path / f"{scan_name}.nii", mask=tmp_path / f"{mask_name}.nii", out=out
        )
        assert report.exit_code == 0
        tables[out.name] = rows(out / "lesions.csv", "case_id", "axis_slice")
        (case,) = rows(out / "cases.csv")
        assert ("W_EXTENT: the mask has " in case["warnings"]) == (out.name != "scan_mask")
    assert tables["scan_cropped"] == tables["scan_mask"] == tables["part_mask"]
    half = BoundingBox((0, 0, 0), (image.geometry.shape[0] // 2, *image.geometry.shape[1:]))
    write_volume(image.crop(half), tmp_path / "half.nii")
    report = volseg.measure(
        image=tmp_path / "half.nii", mask=tmp_path / "mask.nii", out=tmp_path / "half"
    )
    lost = np.count_nonzero(mask.array) - np.count_nonzero(mask.crop(half).array)
    assert f"{lost} labelled voxels of it would be lost" in report.failed["half"]


def test_a_mask_of_another_place_is_refused_with_its_displacement(scan, tmp_path):
    image, mask = scan
    write_volume(image, tmp_path / "scan.nii")
    affine = mask.geometry.affine.copy()
    affine[:3, 3] += 3 * affine[:3, 1]
    moved = Volume(mask.array, Geometry(mask.geometry.shape, affine))
    for n, (name, stored) in enumerate(stored_orders(moved)):
        if n % 11:
            continue
        write_volume(stored, tmp_path / f"{name}.nii")
        out = tmp_path / name
        report = volseg.measure(image=tmp_path / "scan.nii", mask=tmp_path / f"{name}.nii", out=out)
        (reason,) = report.failed.values()
        assert reason.startswith("E_PAIR") and "off by 3 voxels (3.3 mm)" in reason
        assert "would mirror it" in reason or n == 0


def test_a_sform_of_zeros_gives_way_to_a_sound_qform(scan, tmp_path):
    image, mask = scan
    write_volume(image, tmp_path / "scan.nii")
    write_volume(mask, tmp_path / "mask.nii")
    stored = nibabel.load(tmp_path / "scan.nii")
    stored.header.set_sform(np.zeros((4, 4)), code=1)
    raw = stored.header.copy()
    data = (tmp_path / "scan.nii").read_bytes()
    (tmp_path / "zeros.nii").write_bytes(raw.binaryblock + data[348:])
    volume = read_volume(tmp_path / "zeros.nii")
    np.testing.assert_allclose(volume.geometry.affine, image.geometry.affine, atol=1e-4)
    report = volseg.measure(
        image=tmp_path / "zeros.nii", mask=tmp_path / "mask.nii", out=tmp_path / "out"
    )
    assert report.exit_code == 0
    (case,) = rows(tmp_path / "out" / "cases.csv")
    assert "W_QS: the sform is all zeros; the qform is used" in case["warnings"]
    written = nibabel.load(tmp_path / "out" / "lesion_ids" / "zeros.nii.gz")
    np.testing.assert_allclose(written.affine, image.geometry.affine, atol=1e-4)
    raw["qform_code"] = 0
    (tmp_path / "none.nii").write_bytes(raw.binaryblock + data[348:])
    with pytest.raises(VolsegError) as caught:
        read_volume(tmp_path / "none.nii")
    assert caught.value.code == "E_GEOM"


def test_a_map_of_probabilities_is_thresholded(scan, tmp_path):
    image, mask = scan
    lesion = mask.array > 0
    probability = np.where(lesion, 0.75, 0.125).astype(np.float32)
    write_volume(image, tmp_path / "scan.nii")
    write_volume(image.with_array(lesion.astype(np.uint8)), tmp_path / "mask.nii")
    write_volume(image.with_array(probability), tmp_path / "map.nii")
    given = {"image": tmp_path / "scan.nii", "mask": tmp_path / "map.nii"}
    report = volseg.measure(**given, out=tmp_path / "refused")
    assert "--threshold 0.5" in report.failed["scan"]
    volseg.measure(**given, out=tmp_path / "map_out", threshold=0.5)
    volseg.measure(**given | {"mask": tmp_path / "mask.nii"}, out=tmp_path / "mask_out")
    tables = [rows(tmp_path / name / "lesions.csv") for name in ("map_out", "mask_out")]
    assert tables[0] == tables[1] and len(tables[0]) == 2
    for side, name in (("truth", "mask.nii"), ("guess", "map.nii")):
        (tmp_path / side).mkdir()
        shutil.copy(tmp_path / name, tmp_path / side / "a.nii")
    given = {"reference": tmp_path / "truth", "predicted": tmp_path / "guess"}
    report = volseg.evaluate(**given, out=tmp_path / "e")
    assert "--threshold 0.5" in report.failed["a"]
    report = volseg.evaluate(**given, out=tmp_path / "f", threshold=0.5)
    assert report.summary["mean_dice"] == 1


def test_masks_of_0_and_255_are_told_how_to_match(scan, tmp_path):
    _, mask = scan
    for side, value in (("truth", 1), ("guess", 255)):
        (tmp_path / side).mkdir()
        array = np.where(mask.array > 0, value, 0).astype(np.uint8)
        write_volume(mask.with_array(array), tmp_path / side / "a.nii")
    given = {"reference": tmp_path / "truth", "predicted": tmp_path / "guess"}
    report = volseg.evaluate(**given, out=tmp_path / "a")
    (warning,) = [text for text in report.warnings if text.startswith("W_LABELS")]
    assert warning.endswith("--labels 255=1")
    report = volseg.evaluate(**given, out=tmp_path / "b", labels={255: 1})
    assert report.summary["mean_dice"] == 1 and list(report.warnings) == []
    result = CliRunner().invoke(
        app,
        ["evaluate", "--reference", str(given["reference"]), "--predicted"]
        + [str(given["predicted"]), "--labels", "255=1", "--out", str(tmp_path / "c"), "--json"],
    )
    assert result.exit_code == 0
    assert json.loads((tmp_path / "c" / "summary.json").read_text())["mean_dice"] == 1
    with pytest.raises(VolsegError, match="write it as 255=1"):
        volseg.evaluate(**given, out=tmp_path / "d", labels="255:1")


@pytest.mark.slow
def test_values_are_paired_by_what_they_cover_and_swapped_at_once(scan, tmp_path):
    _, mask = scan
    for side, values in (("truth", (0, 3, 4)), ("guess", (0, 8, 7))):
        (tmp_path / side).mkdir()
        array = np.array(values, np.uint8)[mask.array]
        write_volume(mask.with_array(array), tmp_path / side / "a.nii")
    given = {"reference": tmp_path / "truth", "predicted": tmp_path / "guess"}
    report = volseg.evaluate(**given, out=tmp_path / "a")
    (warning,) = [text for text in report.warnings if text.startswith("W_LABELS")]
    assert warning.endswith("give --labels 7=4 --labels 8=3")
    report = volseg.evaluate(**given, out=tmp_path / "b", labels=("7=4", "8=3"))
    assert report.summary["mean_dice"] == 1
    report = volseg.evaluate(
        reference=tmp_path / "truth",
        predicted=tmp_path / "truth",
        out=tmp_path / "c",
        labels=("3=4", "4=3"),
    )
    assert report.summary["mean_dice"] == 0


def test_masks_of_more_than_a_thousand_objects_are_evaluated_as_objects(tmp_path):
    geometry = Geometry((48, 48, 24), np.diag([1, 1, 2, 1]))
    truth = np.zeros(geometry.shape, np.uint16)
    cells = truth[::3, ::3, ::2]
    cells[...] = np.arange(1, cells.size + 1).reshape(cells.shape)
    truth[1::3, ::3, ::2] = cells
    guess = np.where(truth > 0, truth.max() + 1 - truth, 0).astype(np.uint16)  # other numbers
    guess[guess == 5] = 0
    for side, array in (("truth", truth), ("guess", guess)):
        (tmp_path / side).mkdir()
        write_volume(Volume(array, geometry), tmp_path / side / "a.nii")
    given = {"reference": tmp_path / "truth", "predicted": tmp_path / "guess"}
    report = volseg.evaluate(**given, out=tmp_path / "a")
    assert "--objects labels" in report.failed["a"]
    report = volseg.evaluate(**given, out=tmp_path / "b", objects="labels")
    (row,) = rows(tmp_path / "b" / "evaluation.csv")
    n = cells.size
    assert n > 1000
    assert [int(row[f"n_{side}_lesions"]) for side in ("reference", "predicted", "matched")] == [
        n, n - 1, n - 1,
    ]  # fmt: skip
    assert float(row["dice"]) == pytest.approx(2 * (2 * n - 2) / (4 * n - 2), abs=1e-5)
    iou = {line["iou"] for line in rows(tmp_path / "b" / "detections.csv") if line["matched_id"]}
    assert iou == {"1"}


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("stored_as", ["reordered", "cropped", "larger"])
def test_reading_masks_onto_one_grid_takes_at_most_the_planned_memory(dtype, stored_as, tmp_path):
    geometry = Geometry((90, 80, 70), oblique((1, 1, 2)))
    mask = Volume(np.zeros(geometry.shape, np.uint16), geometry)
    mask.array[20:40, 20:40, 20:40] = 300 if dtype != np.uint8 else 3
    box = BoundingBox((10, 10, 10), (60, 60, 60))
    truth = mask.crop(box) if stored_as == "larger" else mask
    guess = mask.crop(box) if stored_as == "cropped" else mask
    array, affine = list(orientations(guess))[29]
    write_volume(Volume(array.astype(dtype), Geometry(array.shape, affine)), tmp_path / "b.nii")
    write_volume(Volume(truth.array.astype(dtype), truth.geometry), tmp_path / "a.nii")
    paths = tmp_path / "a.nii", tmp_path / "b.nii"
    planned = plan_reading([read_header(path) for path in paths], process=0).total
    tracemalloc.start()
    first = read_mask(paths[0])
    second = place_mask(read_mask(paths[1]), first.geometry, mask_name="b", grid_name="a").mask
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(first.array, second.array)
    assert peak <= planned


def test_compare_takes_scans_that_were_stored_in_another_order_since(scan, tmp_path):
    image, mask = scan
    write_volume(image, tmp_path / "scan.nii")
    write_volume(mask, tmp_path / "mask.nii")
    for time in ("before", "after"):
        volseg.measure(image=tmp_path / "scan.nii", mask=tmp_path / "mask.nii", out=tmp_path / time)
    tables = []
    for n in (0, 17):
        folder = tmp_path / f"scans{n}"
        folder.mkdir()
        write_volume(list(stored_orders(image))[n][1], folder / "scan.nii")
        out = tmp_path / f"out{n}"
        given = {"baseline_scans": folder, "followup_scans": tmp_path}
        report = volseg.compare(tmp_path / "before", tmp_path / "after", out=out, **given)
        assert report.exit_code == 0, report.failed
        tables.append(rows(out / "comparison.csv", "notes"))
    assert len(tables[0]) == 2
    for name in ("baseline_volume_ml", "change_volume_ml", "status", "followup_lesion_id"):
        assert [row.get(name) for row in tables[0]] == [row.get(name) for row in tables[1]]

"""The same scan, given in memory in any form, gives the tables and masks of the commands."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pandas
import pytest
import SimpleITK as sitk
import torch
from bundles import with_recipe
from in_memory_forms import FORMS
from laws import ball, ball_volume_mm3, grid_around, lps, oblique, orientations

import volseg
from volseg.commands import LoadedModel
from volseg.errors import VolsegError
from volseg.io.volumes import write_volume
from volseg.networks import build_segmentation
from volseg.segmentation import load_model as load_networks
from volseg.volume import Geometry, Volume

SHIFT_MM = np.array([14.0, 9.0, 8.0])


@pytest.fixture(scope="module")
def pair():
    """Return a scan with two lesions and its mask, on an oblique, anisotropic grid."""
    geometry = grid_around(24, oblique((1.5, 1.9, 3.1)))
    centre = geometry.to_world_mm((np.array([geometry.shape]) - 1) / 2)[0]
    mask = ball(9, geometry, centre - SHIFT_MM) + 2 * ball(5, geometry, centre + SHIFT_MM)
    noise = np.random.default_rng(0).normal(0, 10, geometry.shape)
    image = np.where(mask > 0, 60, -90) + np.where(noise < -15, -700, noise)
    return Volume(image.astype(np.int16), geometry), Volume(mask.astype(np.uint8), geometry)


@pytest.fixture(scope="module")
def of_files(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for volume, name in zip(pair, ("scan", "mask")):
        write_volume(volume, folder / f"{name}.nii.gz")
    return volseg.measure(
        image=folder / "scan.nii.gz",
        mask=folder / "mask.nii.gz",
        intensity_unit="HU",
        out=folder / "out",
        pages=False,
    )


def assert_same(first, second, *ignored, rtol=1e-5):
    """Compare tables: numbers to rtol, also inside a text such as a point; all else exactly."""
    assert list(first.columns) == list(second.columns)
    for name in first.columns.difference([*ignored, "seconds"]):
        for one, other in zip(first[name], second[name], strict=True):
            if pandas.isna(one) or pandas.isna(other):
                assert pandas.isna(one) and pandas.isna(other), name
            elif isinstance(one, str) and one.startswith("["):
                np.testing.assert_allclose(eval(one), eval(other), atol=0.02, err_msg=name)
            elif isinstance(one, str | bool):
                assert one == other, name
            else:
                assert one == pytest.approx(other, rel=rtol, abs=1e-3), name


@pytest.mark.parametrize("form", FORMS)
def test_a_mask_in_memory_measures_as_its_file_in_every_form(pair, of_files, form):
    _, mask = pair
    (image, placed), (labels, _) = (
        FORMS[form](volume.array, volume.geometry.affine) for volume in pair
    )
    result = volseg.measure_mask(
        image, labels, affine=placed.affine, case_id="scan", intensity_unit="HU"
    )
    assert_same(result.lesions, of_files.lesions)
    assert_same(result.cases, of_files.cases, "image")
    np.testing.assert_array_equal(result.mask, mask.array)
    np.testing.assert_array_equal(result.lesion_ids, of_files.lesion_ids("scan").array)
    assert result.lesions["volume_mm3"][0] == pytest.approx(ball_volume_mm3(9), rel=0.05)


@pytest.mark.parametrize("form", FORMS)
def test_all_48_orders_measure_alike_in_the_forms_together(pair, of_files, form):
    volumes = (*pair, of_files.lesion_ids("scan"))
    turned = list(zip(*map(orientations, volumes), strict=True))
    for (array, affine), (labels, _), (expected, _) in turned[
        list(FORMS).index(form) :: len(FORMS)
    ]:
        image, placed = FORMS[form](array, affine)
        mask, _ = FORMS[form](labels, affine)
        result = volseg.measure_mask(image, mask, affine=placed.affine, intensity_unit="HU")
        assert_same(result.lesions, of_files.lesions, "case_id")
        np.testing.assert_array_equal(result.lesion_ids, expected)
        np.testing.assert_allclose(result.affine, affine, atol=1e-5)


def test_paths_and_mixed_forms_measure_alike(pair, of_files, tmp_path):
    scan, mask = pair
    for volume, name in zip(pair, ("scan", "mask")):
        write_volume(volume, tmp_path / f"{name}.nii.gz")
    affine = scan.geometry.affine
    images = [tmp_path / "scan.nii.gz", scan, FORMS["SimpleITK"](scan.array, affine)[0]]
    masks = [str(tmp_path / "mask.nii.gz"), FORMS["MONAI"](mask.array, affine)[0], mask]
    for image in images:
        for labels in masks:
            result = volseg.measure_mask(image, labels, case_id="scan", intensity_unit="HU")
            assert_same(result.lesions, of_files.lesions)
    assert result.cases["image"].isna().all()
    named = volseg.measure_mask(images[0], masks[0])
    assert named.cases["image"].tolist() == ["scan.nii.gz"]


def test_an_empty_mask_in_memory_has_no_lesion_and_keeps_the_columns(pair, of_files):
    scan, mask = pair
    result = volseg.measure_mask(scan, np.zeros_like(mask.array), intensity_unit="HU")
    assert len(result.lesions) == 0
    assert list(result.lesions.columns) == list(of_files.lesions.columns)
    assert result.cases["n_lesions"].tolist() == [0]
    assert "no lesion" in repr(result)
    assert result._repr_html_()


def test_doubling_the_spacing_makes_eight_times_the_volume(pair):
    scan, mask = pair
    volumes = [
        volseg.measure_mask(scan.array, mask.array, spacing_mm=spacing_mm).lesions["volume_mm3"]
        for spacing_mm in ((1, 1.5, 2), (2, 3, 4))
    ]
    np.testing.assert_allclose(volumes[1], 8 * volumes[0])


def test_what_was_not_stated_is_in_the_warnings(pair):
    scan, mask = pair
    result = volseg.measure_mask(scan.array, mask.array, spacing_mm=(1, 1, 2))
    assert {text.partition(":")[0] for text in result.warnings} >= {"W_AXES", "W_UNIT"}
    assert "W_AXES" in repr(result) and "W_AXES" in result.cases["warnings"][0]


def test_names_organ_and_objects_are_those_of_measure(pair):
    scan, mask = pair
    names = {1: "liver", 2: "metastasis"}
    result = volseg.measure_mask(scan, mask, label_names=names, organ="liver")
    assert result.lesions["label_name"].tolist() == ["metastasis"]
    assert result.cases["burden"][0] > 0
    with pytest.raises(VolsegError, match=r"mask \(Volume\): has no label 'spleen'"):
        volseg.measure_mask(scan, mask, label_names=names, organ="spleen")
    labels = volseg.measure_mask(scan, mask, objects="labels")
    assert labels.lesions["lesion_id"].tolist() == [1, 2]


def test_a_mask_on_another_grid_is_refused_with_the_distance(pair):
    scan, mask = pair
    moved = scan.geometry.affine.copy()
    moved[0, 3] += 30
    with pytest.raises(VolsegError, match="30 mm") as caught:
        volseg.measure_mask(scan, Volume(mask.array, Geometry(mask.array.shape, moved)))
    assert caught.value.code == "E_PAIR"


def test_a_grid_for_an_image_that_has_one_is_refused(pair):
    scan, mask = pair
    with pytest.raises(VolsegError, match="has a grid of its own"):
        volseg.measure_mask(scan, mask, spacing_mm=(1, 1, 1))


def test_nothing_is_written(pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    volseg.measure_mask(*pair)
    assert os.listdir(tmp_path) == []


# ---- segment


@pytest.fixture(scope="module")
def loaded(model):
    return volseg.load_model(model, device="cpu")


@pytest.fixture(scope="module")
def inferred(model, dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("inferred")
    scans = [dataset / "images" / f"scan_{number}.nii.gz" for number in (6, 7)]
    return volseg.infer(scans, model=model, out=out, device="cpu", pages=False)


@pytest.mark.parametrize("form", FORMS)
def test_a_scan_in_memory_is_segmented_as_its_file_in_every_form(loaded, dataset, inferred, form):
    scan = volseg.read_volume(dataset / "images" / "scan_7.nii.gz")
    image, placed = FORMS[form](scan.array, scan.geometry.affine)
    result = loaded(image, affine=placed.affine, case_id="scan_7")
    lesions, cases = (
        table[table["case_id"] == "scan_7"].reset_index(drop=True)
        for table in (inferred.lesions, inferred.cases)
    )
    assert len(lesions) > 0
    np.testing.assert_array_equal(result.mask, inferred.mask("scan_7").array)
    np.testing.assert_array_equal(result.lesion_ids, inferred.lesion_ids("scan_7").array)
    assert_same(result.lesions, lesions, rtol=1e-3)
    assert_same(result.cases, cases, "image", rtol=1e-3)
    inside = result.confidence[result.lesion_ids == 1]
    assert inside.mean() == pytest.approx(result.lesions["confidence_mean"][0], abs=0.01)
    assert result.confidence.min() >= 0 and result.confidence.max() <= 1
    assert isinstance(result.like_input(), type(image))
    np.testing.assert_array_equal(
        result.like_input("mask").shape if hasattr(image, "shape") else scan.array.shape,
        image.shape if hasattr(image, "shape") else scan.array.shape,
    )


def test_a_loaded_model_serves_many_scans_and_equals_its_folder(loaded, model, dataset, inferred):
    for number in (6, 7, 6):
        path = dataset / "images" / f"scan_{number}.nii.gz"
        result = loaded(path, case_id=f"scan_{number}")
        expected = inferred.mask(f"scan_{number}").array
        np.testing.assert_array_equal(result.mask, expected)
        assert result.cases["image"].tolist() == [path.name]
    for chosen_model in (loaded, model, str(model)):
        again = volseg.segment(path, model=chosen_model)
        np.testing.assert_array_equal(again.mask, result.mask)
    channel = volseg.segment({"ct": path}, model=loaded)
    np.testing.assert_array_equal(channel.mask, result.mask)
    assert loaded.channels == ("ct",)
    assert dict(loaded.labels) == {3: "lesion"}
    assert "tiny@" in repr(loaded)


@pytest.mark.parametrize("backend", ["torch", pytest.param("openvino", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_loaded_model_serves_several_threads(backend, model, dataset):
    if backend == "openvino":
        pytest.importorskip("openvino")
    loaded = volseg.load_model(model, device="cpu", backend=backend)
    paths = [dataset / "images" / f"scan_{number}.nii.gz" for number in (5, 6, 7, 6)]
    expected = [loaded(path).mask for path in paths]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(3):
            masks = [result.mask for result in threads.map(loaded, paths)]
            for mask, alone in zip(masks, expected, strict=True):
                np.testing.assert_array_equal(mask, alone)


def test_a_loaded_model_is_a_model_for_infer_too(loaded, dataset, inferred, tmp_path):
    scan = dataset / "images" / "scan_7.nii.gz"
    report = volseg.infer(scan, model=loaded, out=tmp_path / "out", pages=False)
    np.testing.assert_array_equal(report.mask("scan_7").array, inferred.mask("scan_7").array)


def test_the_volumes_of_a_result_can_be_written_and_read(loaded, dataset, tmp_path):
    result = loaded(dataset / "images" / "scan_7.nii.gz")
    for name in ("mask", "lesion_ids", "confidence"):
        volseg.write_volume(result.volume(name), tmp_path / f"{name}.nii.gz")
    read = volseg.read_mask(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(read.array, result.mask)
    np.testing.assert_allclose(read.geometry.affine, result.affine, atol=1e-4)
    with pytest.raises(VolsegError, match="'logits' is not one of its arrays"):
        result.volume("logits")


def test_the_channels_of_a_model_are_named(loaded, dataset):
    scan = dataset / "images" / "scan_7.nii.gz"
    with pytest.raises(VolsegError, match=r"takes the channels \['ct'\]") as caught:
        loaded({"t1": scan})
    assert caught.value.code == "E_CHANNELS"


def test_channels_go_by_name_in_any_order_and_any_form(loaded, dataset):
    """An untrained network of two channels: what it segments differs when they are exchanged."""
    bundle = with_recipe(loaded.network.bundle, data={"channels": ("t1", "t2")})
    recipe = bundle.recipe.model_copy(update={"postprocess": (), "classify": None})
    bundle = replace(bundle, recipe=recipe)
    torch.manual_seed(0)
    weights = {"segmentation": build_segmentation(bundle.recipe).state_dict()}
    network = load_networks(replace(bundle, weights=weights), "cpu", backend="torch")
    model = LoadedModel(loaded.folder, network)
    scan = volseg.read_volume(dataset / "images" / "scan_7.nii.gz")
    affine, flipped = scan.geometry.affine, np.ascontiguousarray(scan.array[::-1])
    t1, t2 = FORMS["MONAI"](scan.array, affine)[0], FORMS["SimpleITK"](flipped, affine)[0]
    expected = model({"t1": t1, "t2": t2}).confidence
    np.testing.assert_array_equal(model({"t2": t2, "t1": t1}).confidence, expected)
    mixed = model({"t1": scan.array, "t2": Volume(flipped, scan.geometry)}, affine=affine)
    np.testing.assert_array_equal(mixed.confidence, expected)
    assert (model({"t1": t2, "t2": t1}).confidence != expected).any()
    with pytest.raises(VolsegError, match=r"image is one scan.*give image=\{'t1': \.\.\., 't2'"):
        model(t1)
    with pytest.raises(VolsegError, match=r"lacks channels \['t2'\]"):
        model({"t1": t1})
    with pytest.raises(VolsegError, match="flair"):
        model({"t1": t1, "t2": t2, "flair": t1})


def test_another_modality_is_refused_in_memory_too(loaded):
    rng = np.random.default_rng(0)
    pet = rng.gamma(2, 500, (30, 30, 30))
    with pytest.raises(VolsegError) as caught:
        loaded(pet, affine=lps((2, 2, 2)))
    assert caught.value.code == "E_MODALITY"
    result = loaded(pet, affine=lps((2, 2, 2)), accept_mismatch=True)
    assert result.warnings[0].startswith("W_MODALITY")


def test_progress_is_reported(model, dataset):
    seen = []
    volseg.segment(
        dataset / "images" / "scan_7.nii.gz",
        model=model,
        progress=lambda stage, fraction, detail: seen.append(fraction),
    )
    assert seen[0] == 0 and seen[-1] == 1 and seen == sorted(seen)


WRONG = [
    "volseg.segment(None)",
    "volseg.segment([[1, 2], [3, 4]])",
    "volseg.segment({})",
    "volseg.segment({'ct': 3})",
    "volseg.segment(array, model=3, spacing_mm=(1, 1, 1))",
    "volseg.segment(array, model=array, spacing_mm=(1, 1, 1))",
    "volseg.segment(array, model='no_such_folder', spacing_mm=(1, 1, 1))",
    "volseg.segment(array)",
    "volseg.segment('no_such_file.nii.gz')",
    "volseg.measure_mask(array, None, spacing_mm=(1, 1, 1))",
    "volseg.measure_mask(frame, array)",
    "volseg.measure_mask(array, array, spacing_mm=(1, 1))",
    "volseg.measure_mask(array, array, spacing_mm=(1, 1, 1), objects='blobs')",
    "volseg.measure_mask(array, array, spacing_mm=(1, 1, 1), intensity_unit=3)",
    "volseg.measure_mask(array, array, spacing_mm=(1, 1, 1), calcium='yes')",
    "volseg.measure_mask(array, array, spacing_mm=(1, 1, 1), label_names=['a'])",
    "volseg.measure_mask(array, array, spacing_mm=(1, 1, 1), label_names={'a': 'b'})",
    "volseg.measure_mask(array, array, spacing_mm=(1, 1, 1), label_names={1: 2})",
    "volseg.measure_mask(array, array, spacing_mm=(1, 1, 1), label_names=7)",
    "volseg.measure_mask(array, array, spacing_mm=(1, 1, 1), recipe=7)",
    "volseg.measure_mask(array, array, spacing_mm=(1, 1, 1), organ=array)",
    "volseg.measure_mask(array, array, spacing_mm=(1, 1, 1), case_id=7)",
    "volseg.measure_mask(array, array, spacing_mm=(1, 1, 1), lymph_nodes=array)",
    "volseg.segment(array, spacing_mm=(1, 1, 1), case_id=None)",
    "volseg.segment(array, spacing_mm=(1, 1, 1), accept_mismatch='no')",
    "volseg.segment(array, spacing_mm=(1, 1, 1), progress=3)",
    "volseg.load_model(backend=3)",
    "volseg.load_model(device=None)",
    "volseg.read_volume(array)",
    "volseg.read_mask(itk)",
    "volseg.read_table(frame)",
    "volseg.write_volume(array, 'a.nii.gz')",
    "volseg.check(array)",
    "volseg.cases(array)",
    "volseg.report(array)",
    "volseg.load_model(array)",
    "volseg.load_model('no_such_folder')",
    "volseg.infer(array)",
    "volseg.infer(itk)",
    "volseg.infer({'ct': 'scan.nii.gz'})",
    "volseg.infer(None)",
    "volseg.infer('scan.nii.gz', model=array)",
    "volseg.measure(image=array, mask=array)",
    "volseg.evaluate(reference=array, predicted=array, out='out')",
    "volseg.compare(array, array, out='out')",
    "volseg.train(frame, out='model')",
]


def test_every_wrong_type_is_one_line_before_torch_is_loaded():
    code = "\n".join(
        [
            "import sys, numpy, pandas, SimpleITK, volseg",
            "array = numpy.arange(27.0).reshape(3, 3, 3)",
            "frame = pandas.DataFrame({'image': ['a']})",
            "itk = SimpleITK.GetImageFromArray(array)",
            f"for call in {WRONG!r}:",
            "    try:",
            "        eval(call)",
            "        print('accepted', call)",
            "    except volseg.VolsegError as error:",
            "        if len(str(error)) > 600 or '\\n' in str(error): print(call, error)",
            "    if 'torch' in sys.modules: print('torch', call); break",
        ]
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_label_names_are_read_in_either_direction_and_from_numpy(pair):
    for names in ({1: "liver", 2: "node"}, {"liver": 1, "node": 2}, {"1": "liver", "2": "node"}):
        result = volseg.measure_mask(*pair, label_names=names, organ=1)
        assert result.lesions["label_name"].tolist() == ["node"]
        assert result.cases["burden"][0] > 0
    numpy_keys = {np.uint8(1): "liver", np.int64(2): "node"}
    result = volseg.measure_mask(*pair, label_names=numpy_keys)
    assert result.lesions["label_name"].tolist() == ["liver", "node"]


def test_an_argument_spelled_as_on_the_command_line_is_recognised(pair):
    with pytest.raises(TypeError, match="'unit'; did you mean 'intensity_unit'"):
        volseg.measure_mask(*pair, unit="HU")
    with pytest.raises(TypeError, match="'lymph_node'; did you mean 'lymph_nodes'"):
        volseg.measure_mask(*pair, lymph_node="node")


# ---- results of commands


def test_infer_gives_its_masks_tables_and_paths(inferred, dataset):
    for case in ("scan_6", "scan_7"):
        scan = volseg.read_volume(dataset / "images" / f"{case}.nii.gz")
        mask, ids = inferred.mask(case), inferred.lesion_ids(case)
        np.testing.assert_array_equal(mask.geometry.affine, scan.geometry.affine)
        rows = inferred.lesions[inferred.lesions["case_id"] == case]
        assert sorted(rows["lesion_id"]) == sorted(set(np.unique(ids.array)) - {0})
        counts = dict(zip(*np.unique(ids.array, return_counts=True), strict=True))
        assert all(counts[row.lesion_id] == row.n_voxels for row in rows.itertuples())
        assert inferred.mask_path(case) == inferred.out / "masks" / f"{case}.nii.gz"
        assert inferred.lesion_ids_path(case).is_file()
    assert set(inferred.paths) == {"cases", "lesions", "run"}
    n, volume_ml = len(inferred.lesions), inferred.cases["total_volume_ml"].sum()
    assert repr(inferred).startswith(f"CasesReport: 2 scans: {n} lesions, {volume_ml:.3g} mL")
    assert "<table" in inferred._repr_html_() and "scan_6" in inferred._repr_html_()


def test_a_case_without_a_result_says_why(dataset, model, tmp_path):
    (tmp_path / "broken.nii.gz").write_bytes(b"no scan")
    scans = [tmp_path / "broken.nii.gz", dataset / "images" / "scan_7.nii.gz"]
    report = volseg.infer(scans, model=model, out=tmp_path / "out", pages=False)
    with pytest.raises(VolsegError, match=r"E_NOTNIFTI.*give one of scan_7"):
        report.mask("broken")
    with pytest.raises(VolsegError, match="'scan_9' has no result: it is not in the folder"):
        report.lesion_ids("scan_9")
    with pytest.raises(VolsegError):
        report.mask("../masks/scan_7")
    assert "1 failed" in repr(report) and "failed: broken: E_NOTNIFTI" in repr(report)


def test_measure_has_lesion_ids_but_no_masks(of_files):
    assert of_files.lesion_ids("scan").array.max() == len(of_files.lesions)
    with pytest.raises(VolsegError, match="writes no masks"):
        of_files.mask("scan")


def test_a_mask_corrected_by_hand_is_the_mask(inferred, model, dataset, tmp_path):
    scan = dataset / "images" / "scan_7.nii.gz"
    report = volseg.infer(scan, model=model, out=tmp_path / "out", pages=False)
    mask = report.mask("scan_7")
    erased = mask.with_array(np.zeros_like(mask.array))
    report.mask_path("scan_7").unlink()
    write_volume(erased, tmp_path / "out" / "masks" / "scan_7.nii.gz", like=scan)
    assert not report.mask("scan_7").array.any()
    again = volseg.measure(report.out, pages=False)
    assert not again.mask("scan_7").array.any()
    assert len(again.lesions) == 0


def test_reports_of_evaluate_and_compare_are_readable(inferred, dataset, tmp_path):
    evaluated = volseg.evaluate(
        reference=dataset, predicted=inferred.out, out=tmp_path / "evaluation"
    )
    assert f"mean Dice {evaluated.summary['mean_dice']:.3f}" in repr(evaluated)
    assert "scan_7" in evaluated._repr_html_()
    assert {"evaluation", "detections", "summary"} <= set(evaluated.paths)
    compared = volseg.compare(inferred.out, inferred.out, out=tmp_path / "change")
    assert "2 patients: 2 " in repr(compared)
    assert "scan_7" in compared._repr_html_()
    assert {"response", "comparison"} <= set(compared.paths)


def test_a_moved_folder_still_has_a_repr(pair, tmp_path):
    for volume, name in zip(pair, ("scan", "mask")):
        write_volume(volume, tmp_path / f"{name}.nii")
    report = volseg.measure(
        image=tmp_path / "scan.nii", mask=tmp_path / "mask.nii", out=tmp_path / "a", pages=False
    )
    (tmp_path / "a").rename(tmp_path / "b")
    assert "1 scan" in repr(report)
    assert "1 scan" in report._repr_html_()


def test_a_name_cannot_put_html_into_a_notebook(pair):
    result = volseg.measure_mask(*pair, case_id="<script>", label_names={1: "<b>", 2: "x"})
    assert "<script>" not in result._repr_html_() and "<b>" not in result._repr_html_()


def test_a_simpleitk_user_gets_images_back(pair):
    scan, mask = pair
    image, _ = FORMS["SimpleITK"](scan.array, scan.geometry.affine)
    labels, _ = FORMS["SimpleITK"](mask.array, mask.geometry.affine)
    ids = volseg.measure_mask(image, labels).like_input("lesion_ids")
    filtered = sitk.LabelShapeStatisticsImageFilter()
    filtered.Execute(ids)
    lesions = volseg.measure_mask(image, labels).lesions
    for number, volume_mm3 in zip(lesions["lesion_id"], lesions["volume_mm3"], strict=True):
        assert filtered.GetPhysicalSize(int(number)) == pytest.approx(volume_mm3, rel=1e-6)
        centroid = np.array(filtered.GetCentroid(int(number))) * [-1, -1, 1]
        row = lesions[lesions["lesion_id"] == number].iloc[0]
        ours = [row["centroid_r_mm"], row["centroid_a_mm"], row["centroid_s_mm"]]
        np.testing.assert_allclose(centroid, ours, atol=1e-2)

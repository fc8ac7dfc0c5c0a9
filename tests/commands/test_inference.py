import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from bundles import with_recipe
from laws import CountingBackend

import volseg
from volseg.bundle import load_bundle, save_bundle
from volseg.errors import VolsegError
from volseg.io.volumes import read_header, read_mask, read_volume, write_volume
from volseg.volume import Geometry, Volume


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def with_infer(bundle, **changes):
    """Return the bundle with other settings of `[infer]`."""
    infer = bundle.recipe.infer.model_copy(update=changes)
    return replace(bundle, recipe=bundle.recipe.model_copy(update={"infer": infer}))


@pytest.fixture(scope="module")
def results(dataset, model, tmp_path_factory):
    """Segment the two scans that the model was not trained on."""
    out = tmp_path_factory.mktemp("infer") / "results"
    report = volseg.infer(
        [dataset / "images" / f"scan_{n}.nii.gz" for n in (6, 7)],
        model=model,
        out=out,
        figures=True,
    )
    assert report.exit_code == 0
    return out


def test_masks_come_back_bit_for_bit_on_the_scans_grid_with_the_original_values(results, dataset):
    for name in ("scan_6", "scan_7"):
        scan = read_header(dataset / "images" / f"{name}.nii.gz").geometry
        for folder in ("masks", "lesion_ids"):
            geometry = read_header(results / folder / f"{name}.nii.gz").geometry
            assert geometry.shape == scan.shape
            np.testing.assert_array_equal(geometry.affine, scan.affine)
        mask = read_mask(results / "masks" / f"{name}.nii.gz")
        ids = read_mask(results / "lesion_ids" / f"{name}.nii.gz")
        assert set(np.unique(mask.array)) == {0, 3}
        np.testing.assert_array_equal(mask.array > 0, ids.array > 0)


def test_the_tables_say_what_the_masks_say(results, dataset):
    lesions, cases = rows(results / "lesions.csv"), rows(results / "cases.csv")
    assert [row["status"] for row in cases] == ["done", "done"]
    for case in cases:
        scan = read_volume(dataset / "images" / f"{case['case_id']}.nii.gz")
        ids = read_mask(results / "lesion_ids" / f"{case['case_id']}.nii.gz").array
        of_case = [row for row in lesions if row["case_id"] == case["case_id"]]
        assert len(of_case) == int(case["n_lesions"]) == ids.max()
        assert [int(row["lesion_id"]) for row in of_case] == list(range(1, len(of_case) + 1))
        for row in of_case:
            inside = ids == int(row["lesion_id"])
            assert int(row["n_voxels"]) == inside.sum()
            assert float(row["volume_mm3"]) == pytest.approx(
                inside.sum() * scan.geometry.voxel_volume_mm3, rel=1e-6
            )
            assert float(row["intensity_mean"]) == pytest.approx(
                scan.array[inside].mean(), abs=1e-3
            )
        assert float(case["total_volume_ml"]) == pytest.approx(
            sum(float(row["volume_ml"]) for row in of_case), abs=1e-3
        )
        assert case["model"].startswith("tiny@")
        assert (results / "figures" / f"{case['case_id']}.png").read_bytes().startswith(b"\x89PNG")


def test_the_columns_are_the_contract(results):
    assert list(rows(results / "lesions.csv")[0])[:22] == [
        "case_id", "lesion_id", "label", "label_name", "n_voxels", "volume_mm3", "volume_ml",
        "intensity_mean", "intensity_sd", "intensity_min", "intensity_p10", "intensity_median",
        "intensity_p90", "intensity_max", "intensity_unit", "centroid_r_mm", "centroid_a_mm",
        "centroid_s_mm", "touches_border", "confidence_mean", "class_name", "class_probability",
    ]  # fmt: skip
    assert list(rows(results / "cases.csv")[0])[:8] == [
        "case_id", "status", "reason", "n_lesions", "total_volume_ml", "image", "model", "seconds",
    ]  # fmt: skip
    run = json.loads((results / "run.json").read_text())
    assert run["connectivity"] == 26
    assert run["model"].startswith("tiny@")


def test_a_bad_scan_is_a_row_and_does_not_change_the_others(results, dataset, model, tmp_path):
    scans = tmp_path / "scans"
    scans.mkdir()
    for n in (6, 7):
        shutil.copy(dataset / "images" / f"scan_{n}.nii.gz", scans)
    (scans / "broken.nii.gz").write_bytes((scans / "scan_6.nii.gz").read_bytes()[:3000])
    report = volseg.infer(scans, model=model, out=tmp_path / "out", figures=True)
    assert report.exit_code == 3
    assert list(report.failed) == ["broken"]
    cases = rows(tmp_path / "out" / "cases.csv")
    assert [(row["case_id"], row["status"]) for row in cases] == [
        ("broken", "failed"),
        ("scan_6", "done"),
        ("scan_7", "done"),
    ]
    assert cases[0]["reason"].startswith("E_TRUNCATED")
    assert cases[0]["n_lesions"] == ""
    assert (tmp_path / "out" / "lesions.csv").read_bytes() == (results / "lesions.csv").read_bytes()
    for file in (*(results / "masks").iterdir(), *(results / "figures").iterdir()):
        assert (tmp_path / "out" / file.parent.name / file.name).read_bytes() == file.read_bytes()
    assert not list((tmp_path / "out").rglob("broken.nii.gz"))


def test_only_a_refused_scan_is_exit_code_4_and_leaves_no_mask(dataset, model, tmp_path):
    (tmp_path / "empty.nii.gz").write_bytes(b"")
    report = volseg.infer(tmp_path / "empty.nii.gz", model=model, out=tmp_path / "out")
    assert report.exit_code == 4
    assert report.failed["empty"].startswith("E_EMPTY")
    assert not (tmp_path / "out" / "masks").exists()


def test_interrupted_and_repeated_it_computes_only_what_is_missing(dataset, model, tmp_path):
    out = tmp_path / "out"
    scans = [dataset / "images" / f"scan_{n}.nii.gz" for n in (5, 6, 7)]

    def stop_after_the_first(stage, fraction, detail):
        if stage == "Segmenting" and fraction >= 0.3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        volseg.infer(scans, model=model, out=out, figures=True, progress=stop_after_the_first)
    # The second was segmented while the first was written: that work is kept.
    assert [row["status"] for row in rows(out / "cases.csv")] == ["done", "done", "pending"]
    before = (out / "masks" / "scan_5.nii.gz").stat().st_mtime_ns
    report = volseg.infer(scans, model=model, out=out, figures=True)
    assert (list(report.kept), list(report.done)) == (["scan_5", "scan_6"], ["scan_7"])
    assert (out / "masks" / "scan_5.nii.gz").stat().st_mtime_ns == before
    volseg.infer(scans, model=model, out=tmp_path / "unbroken", figures=True)
    unbroken = (tmp_path / "unbroken" / "lesions.csv").read_bytes()
    assert (out / "lesions.csv").read_bytes() == unbroken
    assert not list(out.rglob(".tmp-*"))


@pytest.mark.slow
def test_another_option_or_a_missing_mask_is_computed_again(dataset, model, tmp_path):
    scan, out = dataset / "images" / "scan_6.nii.gz", tmp_path / "out"
    volseg.infer(scan, model=model, out=out)
    assert list(volseg.infer(scan, model=model, out=out).kept) == ["scan_6"]
    assert list(volseg.infer(scan, model=model, out=out, figures=True).done) == ["scan_6"]
    mask = out / "masks" / "scan_6.nii.gz"
    whole = mask.read_bytes()
    mask.write_bytes(whole[:-4])  # may be the user's edit, so it is not replaced until removed
    assert list(volseg.infer(scan, model=model, out=out, figures=True).kept) == ["scan_6"]
    assert "E_TRUNCATED" in volseg.measure(out).failed["scan_6"]
    mask.unlink()
    assert list(volseg.infer(scan, model=model, out=out, figures=True).done) == ["scan_6"]
    assert mask.read_bytes() == whole


def test_air_alone_has_no_lesion_and_zero_volume(dataset, model, tmp_path):
    scan = read_volume(dataset / "images" / "scan_6.nii.gz")
    noise = np.random.default_rng(0).integers(-1010, -990, scan.array.shape).astype(np.int16)
    write_volume(scan.with_array(np.asfortranarray(noise)), tmp_path / "air.nii.gz")
    report = volseg.infer(tmp_path / "air.nii.gz", model=model, out=tmp_path / "out")
    assert report.exit_code == 0
    (case,) = rows(tmp_path / "out" / "cases.csv")
    assert (case["n_lesions"], case["total_volume_ml"]) == ("0", "0")
    assert rows(tmp_path / "out" / "lesions.csv") == []


@pytest.mark.slow
def test_the_shipped_model_is_used_without_model(tmp_path):
    from laws import real_data

    scan = real_data("lidc_nodules/images/LIDC-IDRI-0001_R_1.nii.gz")
    report = volseg.infer(scan, out=tmp_path / "out", device="cpu")
    assert report.exit_code == 0
    (lesion, *_) = rows(tmp_path / "out" / "lesions.csv")
    assert lesion["label_name"] == "nodule"
    assert lesion["class_name"] in ("benign", "malignant")


@pytest.mark.slow
def test_tiles_are_the_progress_of_a_single_scan_and_a_separate_stage_of_several(
    dataset, model, tmp_path
):
    from volseg.bundle import load_bundle
    from volseg.segmentation import load_model, segment_case

    scans = {name: dataset / "images" / f"{name}.nii.gz" for name in ("scan_6", "scan_7")}
    loaded, totals = load_model(load_bundle(model), "cpu"), {}
    for name, path in scans.items():
        segment_case(
            {"ct": read_volume(path)},
            loaded,
            case_id=name,
            on_tile=lambda done, total, name=name: totals.update({name: total}),
        )

    def details_of(total):
        details = [f"{done} of {total} tiles" for done in range(total)]
        return [*details, f"{total} tiles done, measuring"]

    calls = []

    def progress(*call):
        calls.append(call)

    volseg.infer(scans["scan_6"], model=model, out=tmp_path / "one", progress=progress)
    total = totals["scan_6"]
    tiles = [("Segmenting", done / total, detail) for done, detail in enumerate(details_of(total))]
    assert calls == [("Segmenting", 0.0, "1 of 1 to do"), *tiles, ("Segmenting", 1.0, "scan_6")]

    calls.clear()
    volseg.infer(scans.values(), model=model, out=tmp_path / "two", progress=progress)
    assert [call for call in calls if call[0] == "Tiles"] == [
        ("Tiles", done / total, f"{name}: {detail}")
        for name, total in totals.items()
        for done, detail in enumerate(details_of(total))
    ]
    assert [call for call in calls if call[0] != "Tiles"] == [
        ("Segmenting", 0.0, "2 of 2 to do"),
        ("Segmenting", 0.5, "scan_6"),
        ("Segmenting", 1.0, "scan_7"),
    ]


@pytest.mark.parametrize(
    ("overlap", "tta_axes"),
    [
        pytest.param(0.5, ("R", "S"), marks=pytest.mark.slow),
        pytest.param(0.25, (), marks=pytest.mark.slow),
        (0.0, ("A",)),
        pytest.param(0.0, (), marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_the_announced_cost_of_overlap_and_tta_is_the_true_one(
    overlap, tta_axes, dataset, model, tmp_path
):
    from volseg.bundle import load_bundle, save_bundle
    from volseg.segmentation import load_model, segment_case

    scan = read_volume(dataset / "images" / "scan_6.nii.gz")
    # Without air nothing is cropped, and no tile is empty.
    tissue = scan.with_array(np.asfortranarray(np.maximum(scan.array, -100)))
    write_volume(tissue, tmp_path / "scan.nii.gz")

    def n_tiles(overlap, tta_axes):
        bundle = with_infer(load_bundle(model), overlap=overlap, tta_axes=tta_axes)
        loaded = load_model(bundle, "cpu")
        counting = CountingBackend(loaded.segmentation)
        segment_case({"ct": tissue}, replace(loaded, segmentation=counting), case_id="scan")
        return counting.tiles

    tiles, least = n_tiles(overlap, ()), n_tiles(0.0, ())
    expected = f"tiles: at most {tiles} of 16 × 16 × 16 voxels"
    assert (least < tiles) == (overlap == 0.5)  # a quarter adds no tile on so small a scan
    if least < tiles:
        expected += f"; {least} without overlap (--overlap 0)"
    if tta_axes:
        times = n_tiles(overlap, tta_axes) / tiles
        expected += f"; each is run {times:g} times for test-time augmentation over "
        expected += f"{', '.join(tta_axes)} (--no-tta: once)"
    changed, out, texts = tmp_path / "model", tmp_path / "out", []
    save_bundle(with_infer(load_bundle(model), overlap=overlap, tta_axes=tta_axes), changed)
    volseg.infer(tmp_path / "scan.nii.gz", model=changed, out=out, announce=texts.append)
    assert texts[1] == expected


def test_no_scans_and_no_model_are_wrong_requests(dataset, model, tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(VolsegError, match="no scans found"):
        volseg.infer(tmp_path / "nothing", model=model, out=tmp_path / "out")
    with pytest.raises(VolsegError, match="not a model folder"):
        volseg.infer(dataset / "images", model=dataset, out=tmp_path / "out")
    (tmp_path / "nothing" / "1.png").touch()
    with pytest.raises(VolsegError, match="holds 2D images, but the model segments scans"):
        volseg.infer(tmp_path / "nothing", model=model, out=tmp_path / "out")


def test_a_scan_over_the_budget_is_a_failed_row_and_the_others_are_done(dataset, model, tmp_path):
    large = Volume(
        np.zeros((400, 400, 400), np.uint8, order="F"), Geometry((400, 400, 400), np.eye(4))
    )
    write_volume(large, tmp_path / "large.nii.gz")
    small, texts = dataset / "images" / "scan_6.nii.gz", []
    volseg.infer(small, model=model, out=tmp_path / "alone", announce=texts.append)
    enough = float(texts[0].split("at most ")[1].split(" GB")[0]) + 0.2
    scans, max_ram = [small, tmp_path / "large.nii.gz"], f"{enough:.2f}G"
    report = volseg.infer(scans, model=model, out=tmp_path / "out", max_ram=max_ram)
    assert report.done == ["scan_6"] and report.exit_code == 3
    assert "to fix: give --max-ram" in report.failed["large"]
    assert sorted(path.name for path in (tmp_path / "out" / "masks").iterdir()) == ["scan_6.nii.gz"]


@pytest.mark.slow
def test_a_budget_lowers_the_batch_size_and_the_masks_stay_the_same(dataset, model, tmp_path):
    bundle = load_bundle(model)
    large = with_recipe(bundle, train={"patch_shape": (96, 96, 96)}, infer={"batch_size": 8})
    save_bundle(large, tmp_path / "model")
    scan = dataset / "images" / "scan_6.nii.gz"
    texts, options = {"free": [], "tight": []}, {"model": tmp_path / "model", "max_ram": None}
    for name in texts:
        if name == "tight":  # between the peaks of eight tiles and of one tile
            total = float(texts["free"][0].split("at most ")[1].split(" GB")[0])
            options["max_ram"] = f"{total - 0.3:.2f}G"
        volseg.infer(scan, out=tmp_path / name, announce=texts[name].append, **options)
    announced = "at a time, to stay within the memory budget"
    assert any(announced in text for text in texts["tight"]), texts
    masks = [read_mask(tmp_path / name / "masks" / "scan_6.nii.gz").array for name in texts]
    assert masks[0].any()
    np.testing.assert_array_equal(*masks)


def test_pages_that_complete_cases_lack_keep_to_the_memory_budget(model, dataset, tmp_path):
    scan, out = dataset / "images" / "scan_0.nii.gz", tmp_path / "out"
    volseg.infer(scan, model=model, out=out, pages=False)
    report = volseg.infer(scan, model=model, out=out, max_ram="1M")
    assert list(report.kept) == ["scan_0"]
    assert not (out / "viewer").exists()
    warnings = report.warnings
    (warning,) = [text for text in warnings if text.startswith("W_PAGE: scan_0: no page")]
    assert "give --max-ram" in warning
    volseg.infer(scan, model=model, out=out)
    assert (out / "viewer" / "scan_0.html").is_file()


def test_probabilities_are_written_on_the_scans_grid_and_agree_with_mask_and_confidence(
    results, dataset, model, tmp_path
):
    scan = dataset / "images" / "scan_6.nii.gz"
    out = tmp_path / "out"
    given = {"model": model, "out": out, "pages": False}
    report = volseg.infer(scan, probabilities=True, **given)
    assert report.exit_code == 0
    stored = read_volume(out / "probabilities" / "label_3" / "scan_6.nii.gz")
    assert stored.array.dtype == np.uint8
    np.testing.assert_array_equal(stored.geometry.affine, read_header(scan).geometry.affine)
    probability = stored.intensities().astype(float)
    assert 0 <= probability.min() < probability.max() <= 1
    mask = read_mask(out / "masks" / "scan_6.nii.gz").array
    np.testing.assert_array_equal(mask, read_mask(results / "masks" / "scan_6.nii.gz").array)
    assert (probability[mask == 3] > 0.49).all()
    ids = read_mask(out / "lesion_ids" / "scan_6.nii.gz", max_labels=10_000).array
    for row in rows(out / "lesions.csv")[:3]:
        inside = probability[ids == int(row["lesion_id"])]
        assert inside.mean() == pytest.approx(float(row["confidence_mean"]), abs=0.005)
    assert volseg.infer(scan, probabilities=True, **given).kept == ["scan_6"]
    assert volseg.infer(scan, **given).done == ["scan_6"]  # another request, another result
    assert not (out / "probabilities" / "label_3" / "scan_6.nii.gz").exists()

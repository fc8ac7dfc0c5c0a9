"""`volseg explain`, from a model and files to maps, tables and a page."""

from __future__ import annotations

import csv
import json

import bright_squares
import nibabel
import numpy as np
import pytest
from command_line import run
from laws import lps, oblique, orientations, ras
from PIL import Image

import volseg
from volseg.errors import VolsegError
from volseg.evaluation.saliency_rows import ExplainRow
from volseg.inference.explain import METHODS
from volseg.io.volumes import read_volume, write_volume
from volseg.pages.explain_page import slice_rows
from volseg.volume import Geometry, Volume

CHEAP = "gradcam,gradients"


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "squares"
    bright_squares.save_model(folder)
    return folder


@pytest.fixture(scope="module")
def slice_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "slices"
    bright_squares.save_model(folder, source="slice")
    return folder


@pytest.fixture(scope="module")
def explained(model, tmp_path_factory):
    """Two pictures of another shape than the input, explained by every method."""
    folder = tmp_path_factory.mktemp("explained")
    pictures = bright_squares.write_pictures(
        folder / "in", n=2, shape=(40, 64), corner=(8, 44), dim_corner=(20, 8), edge=10
    )
    (folder / "in" / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    report = volseg.explain(pictures, model=model, out=folder / "out", checked=1)
    return report, folder / "out"


def test_every_image_has_a_map_of_every_method_and_a_failed_one_a_row(explained):
    report, out = explained
    rows = rows_of(out / "explain.csv")
    done = [row for row in rows if row["status"] == "done"]
    assert {(row["case_id"], row["method"]) for row in done} == {
        (f"p{n}", method) for n in range(2) for method in METHODS
    }
    assert all(row["class_name"] == "bright" and float(row["probability"]) > 0.9 for row in done)
    (failed,) = (row for row in rows if row["status"] == "failed")
    assert failed["case_id"] == "damaged" and failed["error"].startswith("E_NOTIMAGE")
    assert report.exit_code == 3 and list(report.failed) == ["damaged"]
    names = {path.name for path in (out / "maps").iterdir()}
    assert names == {f"p{n}_{method}.png" for n in range(2) for method in METHODS}


def test_the_picture_shows_the_evidence_where_the_square_is(explained):
    for method in METHODS:
        picture = np.asarray(Image.open(explained[1] / "maps" / f"p0_{method}.png")).astype(int)
        colour = picture[..., 0] - picture[..., 2]  # orange over grey
        scale = picture.shape[1] / 64
        row, column = np.unravel_index(colour.argmax(), colour.shape)
        assert 8 <= row / scale <= 18 and 44 <= column / scale <= 54, method


def test_the_checks_stand_in_the_tables_and_on_the_page(explained):
    report, out = explained
    layers = rows_of(out / "randomisation.csv")
    assert {(row["method"], row["n_random"], row["layer"]) for row in layers} == {
        (method, n, layer) for method in METHODS for n, layer in (("1", "head"), ("2", "blocks.0"))
    }
    for row in rows_of(out / "explain.csv"):
        if row["status"] == "failed":
            continue
        assert row["is_reliable"] == ("false" if report.verdicts[row["method"]] else "true")
        is_checked = row["case_id"] in {line["case_id"] for line in layers}
        assert bool(row["ssim_seeds"]) == is_checked
        assert row["ssim_centre"] and not row["auprc"]  # no mask
    page = (out / "explain.html").read_text(encoding="utf-8")
    for method, doubt in report.verdicts.items():
        assert doubt is not None and (f"Unreliable: {method}" in page) == bool(doubt)
        assert f'"{method}","{"UNRELIABLE" if doubt else "passed"}"' in page
    assert "E_NOTIMAGE" in page and "Gaussian" in page


def test_a_report_has_its_tables_and_says_what_came_out(explained):
    report, out = explained
    assert len(report.explained) == 2 * len(METHODS) + 1
    assert len(report.randomisation) == 2 * len(METHODS) and not len(report.saliency)
    assert report.goal == out / "explain.html" and "maps of 2 images" in report.headline
    assert json.loads((out / "run.json").read_text())["methods"] == list(METHODS)


def dataset(folder, affine, n=1):
    """Write scans and masks as images/ and labels/."""
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for number in range(n):
        scan, mask = bright_squares.scan(affine, seed=number)
        write_volume(scan, folder / "images" / f"s{number}.nii.gz")
        write_volume(mask, folder / "labels" / f"s{number}.nii.gz")
    return folder


@pytest.mark.parametrize("grid", [ras, lps, oblique], ids=lambda grid: grid.__name__)
def test_maps_of_slices_lie_on_the_grid_of_the_scan_and_on_the_bright_box(
    grid, slice_model, tmp_path
):
    data = dataset(tmp_path / "data", grid((1.0, 1.25, 3.0)))
    volseg.explain(data, model=slice_model, out=tmp_path / "out", method=CHEAP, checked=0)
    stored = nibabel.nifti1.load(data / "images" / "s0.nii.gz")
    inside = np.asarray(nibabel.nifti1.load(data / "labels" / "s0.nii.gz").dataobj) > 0
    for method in CHEAP.split(","):
        image = nibabel.nifti1.load(tmp_path / "out" / "maps" / f"s0_{method}.nii.gz")
        np.testing.assert_array_equal(image.affine, stored.affine)
        saliency = image.get_fdata()
        assert saliency.shape == stored.shape and np.isfinite(saliency).all()
        shares = np.maximum(saliency, 0)
        centre = np.argwhere(inside).mean(axis=0)
        place = (np.indices(shares.shape).reshape(3, -1) * shares.ravel()).sum(1) / shares.sum()
        np.testing.assert_allclose(place, centre, atol=1.0)


def test_the_page_says_which_slices_speak_for_a_class():
    rows = [
        ExplainRow(case_id=f"s_{k}", method=method, scan="s", slice_index=k, class_name="bright",
                   probability=p)
        for method in ("gradcam", "lime")
        for k, p in enumerate((0.1, 0.7, 0.9, 0.2, 0.6))
    ]  # fmt: skip
    (row,) = slice_rows([*rows, ExplainRow(case_id="picture", probability=1.0)])
    assert (row.scan, row.slice_index, row.probability) == ("s", 2, 0.9)
    assert (row.slices, row.n_slices) == ("1-2, 4", 5)


def test_all_orientations_of_a_scan_have_the_same_maps(slice_model, tmp_path):
    scan, _ = bright_squares.scan(oblique((1.0, 1.25, 3.0)))
    for number, (array, affine) in list(enumerate(orientations(scan)))[::17]:
        path = tmp_path / "in" / f"o{number}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        write_volume(Volume(array, Geometry(array.shape, affine)), path)
    out = tmp_path / "out"
    volseg.explain(tmp_path / "in", model=slice_model, out=out, method="gradcam", checked=0)
    maps = [read_volume(path).canonical().array for path in sorted((out / "maps").glob("*.nii.gz"))]
    assert len(maps) == 3
    for other in maps[1:]:
        np.testing.assert_allclose(other, maps[0], atol=1e-5)


def test_maps_are_scored_against_masks_beside_simple_maps(slice_model, tmp_path):
    data = dataset(tmp_path / "data", lps((1.0, 1.25, 3.0)), n=5)
    report = volseg.explain(
        data,
        model=slice_model,
        out=tmp_path / "out",
        method="gradcam",
        checked=0,
        class_name="bright",
    )
    rows = rows_of(tmp_path / "out" / "explain.csv")
    scored = [row for row in rows if row["auprc"]]
    assert len(scored) == 5 * 3  # scans × slices with the box
    assert {row["slice_index"] for row in scored} == {"1", "2", "3"}
    assert "Which slice" in (tmp_path / "out" / "explain.html").read_text(encoding="utf-8")
    for row in scored:
        assert float(row["mask_fraction"]) == pytest.approx(7 * 8 / (30 * 34))
        assert float(row["auprc"]) > float(row["auprc_centre"])
        assert row["is_reliable"] == ""  # not checked, which is not the same as unreliable
    means = {(row["method"], row["metric"], row["against"]): row
             for row in rows_of(tmp_path / "out" / "saliency.csv")}  # fmt: skip
    assert {method for method, *_ in means} == {"gradcam", "centre", "intensity"}
    for method in ("gradcam",):
        score, other, difference = (
            float(means[key]["value"])
            for key in ((method, "auprc", ""), ("centre", "auprc", ""), (method, "auprc", "centre"))
        )
        assert difference == pytest.approx(score - other)
        of_method = [float(row["auprc"]) for row in scored if row["method"] == method]
        assert score == pytest.approx(np.mean(of_method))
        assert means[method, "auprc", ""]["n_patients"] == "5"
    assert set(report.scores) == {"gradcam", "centre", "intensity"}
    # The bright box is what an intensity map shows perfectly, so no method can be above it.
    assert any("intensity" in text for text in report.warnings)
    assert not any("map centre" in text for text in report.warnings)


def test_a_network_that_looks_at_nothing_is_said_to(tmp_path):
    bright_squares.save_model(tmp_path / "m", bright_squares.network(gain=0.0))
    pictures = bright_squares.write_pictures(tmp_path / "in", n=2)
    report = volseg.explain(
        pictures, model=tmp_path / "m", out=tmp_path / "out", method="gradcam", checked=1
    )
    assert all(row["is_empty"] == "true" for row in rows_of(tmp_path / "out" / "explain.csv"))
    assert report.verdicts["gradcam"] == "all maps are empty"
    assert "all maps are empty" in (tmp_path / "out" / "explain.html").read_text()


def test_the_networks_of_an_ensemble_are_compared(tmp_path):
    one, other = bright_squares.network(), bright_squares.network(gain=800.0)
    bright_squares.save_model(tmp_path / "m", one, other)
    pictures = bright_squares.write_pictures(tmp_path / "in", n=1)
    volseg.explain(
        pictures, model=tmp_path / "m", out=tmp_path / "out", method="gradcam", checked=1
    )
    (row,) = rows_of(tmp_path / "out" / "explain.csv")
    assert float(row["ssim_networks"]) == pytest.approx(1, abs=0.01)


def test_a_second_call_replaces_the_maps_of_the_first(model, tmp_path):
    pictures = bright_squares.write_pictures(tmp_path / "in", n=2)
    settings = {"model": model, "out": tmp_path / "out", "checked": 0}
    volseg.explain(pictures, method=CHEAP, **settings)
    volseg.explain(pictures / "p1.png", method="gradcam", **settings)
    assert [path.name for path in (tmp_path / "out" / "maps").iterdir()] == ["p1_gradcam.png"]
    assert len(rows_of(tmp_path / "out" / "explain.csv")) == 1


def test_of_many_images_a_few_at_equal_distances_are_explained(model, tmp_path):
    pictures = bright_squares.write_pictures(tmp_path / "in", n=5)
    report = volseg.explain(
        pictures, model=model, out=tmp_path / "out", method="gradcam", checked=0, most=3
    )
    assert report.done == ["p0", "p2", "p4"] and report.notes[0].startswith("N_MOST")


def test_the_class_can_be_named(model, tmp_path):
    pictures = bright_squares.write_pictures(tmp_path / "in", n=1)
    volseg.explain(
        pictures,
        model=model,
        out=tmp_path / "out",
        method="gradients",
        class_name="plain",
        checked=0,
    )
    (row,) = rows_of(tmp_path / "out" / "explain.csv")
    assert row["class_name"] == "plain" and float(row["probability"]) < 0.1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "gradcam,shap"}, "shap is no method"),
        ({"class_name": "round"}, "no such class"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_is_written(changes, words, model, tmp_path):
    pictures = bright_squares.write_pictures(tmp_path / "in", n=1)
    with pytest.raises(VolsegError, match=words) as refused:
        volseg.explain(pictures, model=model, out=tmp_path / "out", **changes)
    assert refused.value.exit_code == 2 and not (tmp_path / "out").exists()


def test_a_model_that_segments_is_refused(tmp_path):
    from volseg.bundle import shipped_bundle

    pictures = bright_squares.write_pictures(tmp_path / "in", n=1)
    with pytest.raises(VolsegError, match="segments scans"):
        volseg.explain(pictures, model=shipped_bundle(), out=tmp_path / "out")


def test_the_command_prints_the_verdicts_and_the_scores_with_their_baselines(slice_model, tmp_path):
    data = dataset(tmp_path / "data", ras((1.0, 1.0, 2.0)))
    done = run("explain", data, "--model", slice_model, "--out", tmp_path / "out",
               "--method", "gradcam", "--checked", "1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("gradcam: ") and "auprc" in line for line in lines)
    for simple in ("centre", "intensity"):
        assert any(line.startswith(f"{simple}: auprc") for line in lines)
    assert "explain.html" in done.stdout


def test_the_help_names_every_method():
    printed = " ".join(run("explain", "--help").stdout.split())
    assert all(name in printed for name in METHODS)


def test_slices_of_a_table_in_any_order_make_one_file_per_volume(slice_model, tmp_path):
    data = dataset(tmp_path / "data", lps((1.0, 1.25, 3.0)), n=2)
    rows = [("s1", 3), ("s0", 1), ("s1", 0), ("s0", 2)]
    lines = [f"images/{name}.nii.gz,{index}" for name, index in rows]
    (data / "slices.csv").write_text("\n".join(["image,slice", *lines]) + "\n")
    out = tmp_path / "out"
    volseg.explain(data / "slices.csv", model=slice_model, out=out, method="gradcam", checked=0)
    for name in ("s0", "s1"):
        saliency = read_volume(out / "maps" / f"{name}_gradcam.nii.gz", is_finite=False)
        explained = np.isfinite(saliency.canonical().array).all(axis=(0, 1))
        assert set(np.flatnonzero(explained)) == {index for case, index in rows if case == name}


@pytest.mark.parametrize(("kind", "names"), [("labels", ("plain", "bright")), ("number", ())])
def test_labels_and_numbers_are_explained_too(kind, names, tmp_path):
    bright_squares.save_model(tmp_path / "m", kind=kind, names=names)
    pictures = bright_squares.write_pictures(tmp_path / "in", n=1)
    out = tmp_path / "out"
    volseg.explain(pictures, model=tmp_path / "m", out=out, method="gradients", checked=0)
    (row,) = rows_of(out / "explain.csv")
    assert row["class_name"] == ("bright" if names else "square") and row["is_empty"] == "false"
    _, inside = bright_squares.picture()
    value = bright_squares.GAIN * inside.mean() * (bright_squares.BRIGHT - 120) / 255
    expected = 1.0 if kind == "labels" else value
    assert float(row["probability"]) == pytest.approx(expected, rel=1e-3)

"""Classifiers of whole scans, from slices to a model and a row per scan, through the commands."""

from __future__ import annotations

import json
import shutil

import nibabel
import numpy as np
import pytest
import torch
from image_sets import rows_of, scans_of_slices, write_rows
from PIL import Image
from safetensors.torch import save_file

import volseg
from volseg.commands.image_sources import case_key, source_of
from volseg.commands.scan_sources import scans_of, stack_scans
from volseg.errors import VolsegError
from volseg.image_bundle import load_image_bundle
from volseg.inference.images import embed_images
from volseg.inference.openvino_backend import openvino_is_installed
from volseg.io.files import sha256_of
from volseg.io.image_cases import survey_images
from volseg.io.images import ImageReader
from volseg.networks import build_network
from volseg.preprocessing.images import to_input
from volseg.recipe import ClassifyRecipe

TINY = {"name": "cnn_small", "features": (8, 16)}


def recipe(sequence="max", train=None, **sections):
    content = {
        "task": "classify",
        "name": "discs",
        "description": "Scans with a disc.",
        "data": {"input": "scan", "target": "finding"},
        "network": TINY,
        "sequence": {"name": sequence, "dropout": 0.0},
        "train": {"epochs": 4, "patience": 100} | (train or {}),
    }
    return ClassifyRecipe.model_validate(content | sections)


def probabilities(folder):
    return {row["case_id"]: float(row["probability_disc"]) for row in rows_of(folder)}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return scans_of_slices(tmp_path_factory.mktemp("scans") / "data")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of the network of slices: a disc is bright enough for any."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(build_network(in_channels=1, out_channels=2, **TINY).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def model(dataset, weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("model") / "m"
    settings = recipe(train={"epochs": 30, "learning_rate": 1e-2})
    volseg.train(dataset, recipe=settings, init=weights, out=out, seed=1)
    return out


@pytest.fixture(scope="module")
def results(model, dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("results") / "r"
    volseg.infer(dataset, model=model, out=out, pages=False)
    return out


def test_a_finding_in_one_slice_is_learned_and_each_scan_has_a_row(model, dataset, results):
    assert load_image_bundle(model).metrics["validation_auc"] == 1
    listed = {row["patient"]: row for row in rows_of(dataset / "cases.csv")}
    rows = rows_of(results / "classes.csv")
    assert [row["case_id"] for row in rows] == sorted(listed)
    scores = probabilities(results / "classes.csv")
    with_disc, without = (
        [scores[name] for name, row in listed.items() if row["finding"] == finding]
        for finding in ("disc", "none")
    )
    assert min(with_disc) > max(without)
    assert {row["split"] for row in listed.values()} == {"train", "val", "test"}


@pytest.mark.slow
def test_evaluate_judges_scans_by_the_table_of_slices(dataset, results, tmp_path):
    report = volseg.evaluate(reference=dataset, predicted=results, out=tmp_path / "e")
    macro = report.summary["metrics"]["macro"]
    assert macro["auc"]["value"] == 1 and macro["auc"]["n"] == 24
    assert len(rows_of(tmp_path / "e" / "evaluation.csv")) == 24
    assert {"majority", "logistic_regression"} <= set(report.summary["baselines"])


def test_the_network_of_slices_stays_as_it_was_given(model, weights):
    torch.manual_seed(0)
    given = build_network(in_channels=1, out_channels=2, **TINY).state_dict()
    kept = load_image_bundle(model).slice_network().state_dict()
    assert all(
        torch.equal(kept[name], tensor) for name, tensor in given.items() if "head" not in name
    )


def test_a_scan_gives_the_same_alone_and_with_its_rows_in_another_order(
    model, dataset, results, tmp_path
):
    everything = probabilities(results / "classes.csv")
    folder = tmp_path / "one"
    shutil.copytree(dataset, folder)
    rows = [row for row in rows_of(folder / "cases.csv") if row["patient"] == "s07"]
    write_rows(folder / "cases.csv", sorted(rows, key=lambda row: row["slice"]))
    volseg.infer(folder, model=model, out=tmp_path / "r", pages=False)
    alone = probabilities(tmp_path / "r" / "classes.csv")
    assert list(alone) == ["s07"] and alone["s07"] == pytest.approx(everything["s07"], abs=1e-5)


@pytest.mark.skipif(not openvino_is_installed(), reason="OpenVINO is not installed")
@pytest.mark.slow
def test_torch_and_openvino_agree(model, dataset, results, tmp_path):
    volseg.infer(dataset, model=model, out=tmp_path / "r", pages=False, backend="torch")
    torch_says, usual = (
        probabilities(tmp_path / "r" / "classes.csv"),
        probabilities(results / "classes.csv"),
    )
    assert torch_says == pytest.approx(usual, abs=1e-4)


@pytest.mark.slow
def test_only_scans_with_a_changed_slice_are_predicted_again(model, dataset, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(dataset, folder)
    assert len(volseg.infer(folder, model=model, out=tmp_path / "r", pages=False).done) == 24
    last = sorted((folder / "images").glob("s05_*.png"))[-1]
    Image.fromarray(np.full((32, 32), 90, np.uint8)).save(last)
    report = volseg.infer(folder, model=model, out=tmp_path / "r", pages=False)
    assert report.done == ["s05"] and len(report.kept) == 23


def test_a_slice_that_cannot_be_read_fails_its_scan_alone(model, dataset, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(dataset, folder)
    (folder / "images" / "s03_1.png").write_bytes(b"no picture")
    report = volseg.infer(folder, model=model, out=tmp_path / "r", pages=False)
    assert list(report.failed) == ["s03"] and "s03_1.png" in report.failed["s03"]
    assert len(report.done) == 23


@pytest.mark.slow
def test_training_leaves_out_a_scan_of_which_a_slice_cannot_be_read(dataset, weights, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(dataset, folder)
    (folder / "images" / "s00_1.png").write_bytes(b"no picture")
    trained = volseg.train(folder, recipe=recipe(), init=weights, out=tmp_path / "m")
    assert any("W_LEFT_OUT" in text and "s00" in text for text in trained.warnings)


def test_slices_of_a_volume_are_in_its_order_and_series_in_that_of_their_numbers(tmp_path):
    """An embedding of the mean intensity shows which slice stands where."""
    array = np.zeros((16, 16, 5), np.int16)
    array[...] = [10, 20, 30, 40, 50]
    for name, turned, affine in (("a", array, 1.0), ("b", array[:, :, ::-1], -1.0)):
        image = nibabel.nifti1.Nifti1Image(turned, np.diag([1.0, 1.0, affine, 1.0]))
        nibabel.nifti1.save(image, tmp_path / f"{name}.nii.gz")
    mistakes = list[str]()
    scans = scans_of(survey_images(tmp_path).cases, mistakes)
    assert not mistakes and [scan.id for scan in scans] == ["a", "b"]
    settings = recipe(
        images={"pixels": 16, "channels": 1, "normalise": {"method": "scale", "divide_by": 10}}
    )
    source = source_of(settings, lambda images: images.mean(axis=(2, 3)))
    for scan in scans:
        rows = source.network_input(scan, settings.images)
        np.testing.assert_allclose(rows, [[k, 1] for k in (1, 2, 3, 4, 5)], rtol=1e-6)
    assert case_key(scans[0], sha256_of) != case_key(scans[1], sha256_of)


def test_embeddings_are_those_of_the_network_on_each_slice(model, dataset):
    bundle = load_image_bundle(model)
    settings, network = bundle.recipe, bundle.slice_network()
    cpu = torch.device("cpu")
    source = source_of(settings, lambda images: embed_images(network, images, settings.infer, cpu))
    scan = scans_of(survey_images(dataset).cases, [])[0]
    rows = source.network_input(scan, settings.images)
    slices = sorted(scan.slices, key=lambda case: int(case.cells["slice"]))
    for row, case in zip(rows, slices, strict=True):
        image = to_input(ImageReader().read(case.path, None), settings.images)
        with torch.no_grad():
            expected = network.embed(torch.from_numpy(image[None]))[0].numpy()
        np.testing.assert_allclose(row[:-1], expected, rtol=1e-4, atol=1e-5)
    stacked = stack_scans([rows, rows[:2]])
    assert (stacked[1, 2:] == 0).all() and (stacked[1, :2] == rows[:2]).all()


def edited(dataset, folder, edit):
    """Return a copy of the dataset whose rows were edited in place."""
    shutil.copytree(dataset, folder)
    rows = rows_of(folder / "cases.csv")
    edit(rows)
    write_rows(folder / "cases.csv", rows)
    return folder


def blank_number(rows):
    rows[1]["slice"] = ""


def repeated_number(rows):
    rows[1]["slice"] = rows[0]["slice"]


def no_patient(rows):
    for row in rows:
        row["patient"] = ""


def two_findings(rows):
    rows[1]["finding"] = "other"


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (blank_number, "line 3: scan 's00': the cell of 'slice' is no number"),
        (no_patient, "line 2: does not say of which scan it is a slice"),
        (repeated_number, "scan 's00' has two slices of one number in 'slice'"),
        (two_findings, r"scan 's00' differ in 'finding' \(none, other\)"),
    ],
)
def test_scans_that_cannot_be_put_in_order_or_have_two_targets_are_refused(
    edit, problem, dataset, weights, tmp_path
):
    folder = edited(dataset, tmp_path / "data", edit)
    with pytest.raises(VolsegError, match=problem):
        volseg.train(folder, recipe=recipe(), init=weights, out=tmp_path / "m")
    assert not (tmp_path / "m" / "model.json").exists()


def test_requests_that_mean_nothing_for_scans_are_refused(model, dataset, weights, tmp_path):
    with pytest.raises(VolsegError, match="no weights are given"):
        volseg.train(dataset, recipe=recipe(), out=tmp_path / "a")
    with pytest.raises(VolsegError, match="sequence 'lstmm' is unknown"):
        volseg.plan(dataset, recipe=recipe("lstmm"))
    with pytest.raises(VolsegError, match="--preview draws training images"):
        volseg.train(dataset, recipe=recipe(), init=weights, preview=True, out=tmp_path / "b")
    with pytest.raises(VolsegError, match="to `volseg train`, with --init"):
        volseg.preprocess(dataset, recipe=recipe(), out=tmp_path / "c")
    with pytest.raises(VolsegError, match="a model of scans cannot be quantised"):
        volseg.quantise(model, dataset)
    with pytest.raises(VolsegError, match="classifies scans, and only models of images"):
        volseg.explain(dataset, model=model, out=tmp_path / "d")


def test_the_report_of_a_scan_shows_one_of_its_slices(results, tmp_path):
    shutil.copytree(results, tmp_path / "results")
    name = rows_of(results / "classes.csv")[0]["case_id"]
    volseg.report(tmp_path / "results", scan=(name,))
    page = (tmp_path / "results" / "reports" / f"{name}.html").read_text(encoding="utf-8")
    assert name in page and "There is no picture" not in page and "data:image/" in page


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"data": {"target": "finding"}}, '.sequence. is of scans, and input is "image"'),
        ({"train": {"augment": {"mixup": 0.2}}}, "mixup mixes images"),
        ({"infer": {"tta_axes": ("horizontal",)}}, "tta_axes flips images"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(change, problem):
    with pytest.raises(ValueError, match=problem):
        recipe(**change)


def test_a_recipe_of_scans_names_what_makes_a_scan_of_slices():
    content = recipe().model_dump(exclude={"sequence"})
    with pytest.raises(ValueError, match=r'input = "scan" needs a section \[sequence\]'):
        ClassifyRecipe.model_validate(content)


@pytest.mark.slow
def test_a_run_is_not_resumed_with_other_weights_of_the_slices(dataset, weights, tmp_path):
    other = tmp_path / "other.safetensors"
    save_file(build_network(in_channels=1, out_channels=2, **TINY).state_dict(), other)
    out = tmp_path / "m"

    def stop(stage, fraction, detail):
        if stage == "Training" and fraction > 0.3:
            raise KeyboardInterrupt

    volseg.train(dataset, recipe=recipe(), init=weights, out=out, progress=stop)
    with pytest.raises(VolsegError, match="the weights of --init, which embedded the slices"):
        volseg.train(dataset, recipe=recipe(), init=other, out=out, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("sequence", ["mean", "attention", "lstm", "transformer", "tcn"])
def test_every_network_of_sequences_is_trained_and_run(sequence, dataset, weights, tmp_path):
    out = tmp_path / "m"
    report = volseg.train(dataset, recipe=recipe(sequence), init=weights, out=out, folds=2)
    assert report.metrics["networks"] == 2
    volseg.infer(dataset, model=out, out=tmp_path / "r", pages=False)
    assert len(rows_of(tmp_path / "r" / "classes.csv")) == 24
    assert not [problem for problem in volseg.check(out) if problem.code != "W_LABEL"]
    run = json.loads((tmp_path / "r" / "run.json").read_text(encoding="utf-8"))
    assert run["data"]["input"] == "scan"


def test_a_model_without_its_network_of_slices_is_refused(model, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(model, folder)
    content = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    del content["weights_sha256"]["slices"]
    (folder / "model.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(VolsegError, match="lacks the network that embeds their slices"):
        load_image_bundle(folder)


@pytest.mark.slow
def test_scans_can_start_from_a_model_of_their_slices(dataset, tmp_path):
    """Slices are labelled, too: a network that learned their labels embeds them."""
    content = recipe().model_dump(exclude={"sequence"}) | {"data": {"target": "disc"}}
    of_slices = ClassifyRecipe.model_validate(content | {"name": "slices"})
    volseg.train(dataset, recipe=of_slices, out=tmp_path / "slices")
    volseg.train(dataset, recipe=recipe(), init=tmp_path / "slices", out=tmp_path / "scans")
    scans, slices = (load_image_bundle(tmp_path / name) for name in ("scans", "slices"))
    given, kept = slices.network("classifier").state_dict(), scans.slice_network().state_dict()
    names = [name for name in given if not name.startswith("head.")]
    assert names and all(torch.equal(kept[name], given[name]) for name in names)
    volseg.train(dataset, recipe=recipe("mean"), init=tmp_path / "scans", out=tmp_path / "again")
    again = load_image_bundle(tmp_path / "again").slice_network().state_dict()
    assert all(torch.equal(again[name], kept[name]) for name in names)

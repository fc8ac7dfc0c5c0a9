"""Classifiers of images on every backend and precision, and the options that mean nothing there."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from image_sets import scans_of_lesions, table_of_images

import volseg
from volseg.commands.image_data import ImageDataset
from volseg.errors import VolsegError
from volseg.evaluation.conformal import fit_outliers
from volseg.image_bundle import (
    REFERENCE_TOLERANCE,
    ImageBundle,
    Judgement,
    Reference,
    classifier_name,
    load_image_bundle,
    save_image_bundle,
)
from volseg.inference.choose import choose_backend
from volseg.inference.image_predictor import load_predictor
from volseg.inference.images import embed_images, predict_outputs
from volseg.networks import build_images
from volseg.options import COMMANDS
from volseg.options.declare import settings_of
from volseg.recipe import ClassifyRecipe

pytestmark = pytest.mark.skipif(not find_spec("nncf"), reason="nncf is not installed")
CPU = torch.device("cpu")
TINY = {"name": "cnn_small", "features": (8, 16)}
LESIONS = {
    "data": {"input": "lesion", "target": "kind"},
    "images": {
        "pixels": 16,
        "field_of_view_mm": 16,
        "normalise": {"method": "window", "low": -200, "high": 200},
    },
}


def recipe(target, **sections):
    content = {
        "task": "classify",
        "name": "shapes",
        "description": "Shapes.",
        "data": {"target": target},
        "network": TINY,
    }
    return ClassifyRecipe.model_validate(content | sections)


def untrained(folder, dataset, stated, *, n=1):
    """Save a model of random networks that differ in batch norms too, as if trained on a dataset.

    The mean output of its images is 0, so that their classes differ.
    """
    planned = ImageDataset(dataset, stated).plan()
    closed = planned.closed.recipe
    (prepared := folder.with_name("prepared_for_" + folder.name)).mkdir()
    images = ImageDataset(dataset, stated).prepare(planned, prepared)
    training, validation = (images.of_split(split).pixels for split in ("train", "val"))
    weights, rng = {}, np.random.default_rng(0)
    for index in range(n):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(index)
            network = build_images(closed)
        with torch.no_grad():
            for name, tensor in network.state_dict().items():
                if tensor.is_floating_point() and tensor.ndim == 1:
                    change = rng.uniform(0, 0.3, tensor.shape).astype(np.float32)
                    tensor.add_(torch.from_numpy(change))
                elif name == "head.weight":
                    tensor.mul_(20)
                elif tensor.ndim == 4:  # images differ in the deepest layer too
                    tensor.mul_((2 / tensor[0].numel()) ** 0.5 / tensor.std())
            network.head.bias -= torch.from_numpy(
                predict_outputs(network, training, closed.infer, CPU).mean(axis=0)
            )
        weights[classifier_name(index)] = network.state_dict()
    bundle = ImageBundle(closed, planned.fingerprint, weights)
    embedded = [
        embed_images(bundle.networks()[0], some, closed.infer, CPU)
        for some in (training, validation)
    ]
    outliers = fit_outliers(embedded[0], None)
    middle = np.sort(outliers.distances(embedded[1]))[2:4].mean()  # rounding must not decide
    outliers = replace(outliers, threshold=np.array(middle))
    reference = Reference("x", validation[0], by_modules(bundle, validation[:1])[0])
    bundle = ImageBundle(
        closed,
        planned.fingerprint,
        weights,
        Judgement(temperature=1.3, outliers=outliers),
        reference,
    )
    return save_image_bundle(bundle, folder)


def by_modules(bundle, images):
    """Return outputs by the definition: torch modules with their heads, one after another."""
    outputs = [predict_outputs(net, images, bundle.recipe.infer, CPU) for net in bundle.networks()]
    return np.mean(outputs, axis=0)


def table_at(path):
    name = "classes.csv" if (path / "classes.csv").is_file() else "values.csv"
    with (path / name).open(newline="", encoding="utf-8") as file:
        return {row["case_id"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return table_of_images(tmp_path_factory.mktemp("table") / "data")


@pytest.fixture(scope="module")
def model(table, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "m"
    stated = recipe("shape", infer={"tta_axes": ["horizontal"], "batch_size": 5})
    untrained(folder, table, stated)
    return folder


@pytest.fixture(scope="module")
def quantised(model, table, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised") / "m"
    shutil.copytree(model, folder)
    return folder, volseg.quantise(folder, table)


# Images that are halved as often as they can be: a trace of a smaller one would be wrong.
NETWORKS = [
    ({"name": "cnn_small", "features": (4, 4, 4, 4, 4, 4)}, 96),
    ({"name": "vgg", "depth": 11, "widths": (4,) * 8}, 28),
    ({"name": "vgg", "depth": 11, "widths": (4,) * 8}, 48),
    pytest.param({"name": "resnet2d", "depth": 18}, 64, marks=pytest.mark.slow),
    pytest.param({"name": "densenet2d"}, 64, marks=pytest.mark.slow),
    pytest.param({"name": "efficientnet_lite"}, 64, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("network", "pixels"), NETWORKS)
def test_backends_agree_with_the_modules_for_every_network(network, pixels, table, tmp_path):
    stated = recipe("shape", network=network, images={"pixels": pixels})
    bundle = untrained(tmp_path / "m", table, stated)
    images = np.random.default_rng(1).normal(size=(3, *bundle.recipe.input_shape))
    check_agreement(bundle, images.astype(np.float32), tmp_path / "m")


def check_agreement(bundle, images, folder):
    expected = by_modules(bundle, images)
    embedded = embed_images(bundle.networks()[0], images, bundle.recipe.infer, CPU)
    scale = max(1.0, np.abs(expected).max())
    for backend in ("torch", "openvino"):
        choice = choose_backend(backend, "cpu", "fp32")
        predictor = load_predictor(bundle, choice, folder=folder)
        assert predictor.identity["backend"] == backend
        predicted = predictor.predict(images)
        difference = np.abs(predicted.outputs - expected).max()
        assert difference <= REFERENCE_TOLERANCE * scale, backend
        np.testing.assert_allclose(predicted.embeddings, embedded, atol=1e-3, err_msg=backend)


@pytest.mark.parametrize("axes", [(), ("horizontal", "vertical")])
def test_ensembles_planes_and_flips_are_averaged_as_by_the_modules(axes, tmp_path):
    scans = scans_of_lesions(tmp_path / "data", n=8)
    sections = LESIONS | {"infer": {"tta_axes": axes, "batch_size": 2}}
    bundle = untrained(tmp_path / "m", scans, recipe("kind", **sections), n=2)
    images = np.random.default_rng(1).normal(size=(5, *bundle.recipe.input_shape))
    assert images.ndim == 5
    check_agreement(bundle, images.astype(np.float32), tmp_path / "m")


def test_the_reference_image_agrees_on_every_backend_and_a_changed_file_is_found(model, tmp_path):
    assert volseg.check(model) == []
    shutil.copytree(model, tmp_path / "m")
    bundle = load_image_bundle(tmp_path / "m")
    reference = Reference("x", bundle.reference.image, bundle.reference.outputs + 0.1)
    weights = {name: bundle.weights[name] for name in bundle.network_names}
    save_image_bundle(replace(bundle, weights=weights, reference=reference), tmp_path / "m")
    assert [problem["code"] for problem in volseg.check(tmp_path / "m")] == ["E_REFERENCE"]


def test_infer_says_the_same_on_openvino_and_torch_and_repeats_what_was_made_otherwise(
    model, table, tmp_path
):
    out = tmp_path / "r"
    by_torch = volseg.infer(table, model=model, out=out, backend="torch", device="cpu")
    assert by_torch.computed_with == {"backend": "torch", "precision": "fp32"}
    expected = table_at(out)
    report = volseg.infer(table, model=model, out=out, device="cpu")
    assert report.computed_with == {"backend": "openvino", "precision": "fp32"}
    assert len(report.done) == 48 and not report.kept  # made with another backend
    rows = table_at(out)
    for name, row in rows.items():
        one, other = (float(line["probability_disc"]) for line in (row, expected[name]))
        assert one == pytest.approx(other, abs=REFERENCE_TOLERANCE)
        assert row["out_of_distribution"] == expected[name]["out_of_distribution"]
    assert {row["class_name"] for row in rows.values()} == {"disc", "square"}
    assert len(volseg.infer(table, model=model, out=out, device="cpu").kept) == 48
    report = volseg.infer(table, model=model, out=out, device="cpu", tta=False)
    assert len(report.done) == 48
    assert any(
        table_at(out)[name]["probability_disc"] != rows[name]["probability_disc"] for name in rows
    )
    run = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert run["options"]["tta_axes"] == [] and run["options"]["backend"] == "openvino"


def test_int8_leaves_the_model_as_it_is_and_is_used_only_on_request(
    quantised, model, table, tmp_path
):
    folder, report = quantised
    assert (folder / "model.json").read_bytes() == (model / "model.json").read_bytes()
    assert load_image_bundle(folder).sha256 == load_image_bundle(model).sha256
    names = sorted(path.name for path in (folder / "openvino").iterdir())
    assert names == [f"classifier.int8.{suffix}" for suffix in ("bin", "json", "xml")]
    assert not (folder / ".quantising").exists()
    stored = json.loads((folder / "openvino" / "classifier.int8.json").read_text())
    assert stored["validation"] == report.validation
    assert stored["calibration"] == {"images": 24, "seed": 0}
    report = volseg.infer(table, model=folder, out=tmp_path / "r", device="cpu")
    assert report.computed_with == {"backend": "openvino", "precision": "fp32"}
    exact = table_at(tmp_path / "r")
    report = volseg.infer(
        table, model=folder, out=tmp_path / "r", device="cpu", precision="int8", tta=True
    )
    assert report.computed_with["precision"] == "int8" and len(report.done) == 48
    assert len(report.computed_with["network_sha256"]) == 64
    differences = [
        abs(float(row["probability_disc"]) - float(exact[name]["probability_disc"]))
        for name, row in table_at(tmp_path / "r").items()
    ]
    assert 0 < max(differences) < 0.1
    assert len({row["model"] for row in (*exact.values(), *table_at(tmp_path / "r").values())}) == 1


def test_quantise_reports_the_scores_that_the_validation_images_have(quantised, table, tmp_path):
    folder, report = quantised
    with (table / "cases.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "val"]
    names = {Path(row["image"]).stem: row["shape"] for row in rows}
    assert report.validation["images"] == len(rows) == 12
    scores = report.validation["scores"]
    predicted = {}
    for precision in ("fp32", "int8"):
        out = tmp_path / precision
        volseg.infer(table, model=folder, out=out, device="cpu", precision=precision)
        table_of = table_at(out)
        predicted[precision] = np.array(
            [float(table_of[name]["probability_square"]) for name in names]
        )
        squares = np.array([shape == "square" for shape in names.values()])
        pairs = predicted[precision][squares][:, None] - predicted[precision][~squares][None]
        auc = np.mean((pairs > 0) + 0.5 * (pairs == 0))
        assert scores["auc"][precision] == pytest.approx(auc, abs=1e-4)
        unusual = [table_of[name]["out_of_distribution"] for name in names]
        assert set(unusual) == ({"true", "false"} if precision == "fp32" else {""})
    change = np.abs(predicted["int8"] - predicted["fp32"]).max()
    assert scores["largest_change"]["int8"] == pytest.approx(change, abs=1e-4)
    assert scores["largest_change"]["fp32"] == 0
    assert all(seconds > 0 for seconds in report.seconds.values())


def test_a_prepared_folder_gives_the_same_network(quantised, model, table, tmp_path):
    folder, report = quantised
    volseg.preprocess(table, recipe=load_image_bundle(model).recipe, out=tmp_path / "prepared")
    shutil.copytree(model, tmp_path / "m")
    again = volseg.quantise(tmp_path / "m", tmp_path / "prepared")
    assert again.validation == report.validation
    name = "openvino/classifier.int8.bin"
    assert (tmp_path / "m" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.slow
def test_numbers_planes_and_ensembles_are_quantised_too(table, tmp_path):
    untrained(tmp_path / "area", table, recipe("area"), n=2)
    report = volseg.quantise(tmp_path / "area", table, cases=6)
    assert report.calibration["images"] == 6 and set(report.validation["scores"]["mae"]) >= {
        "fp32",
        "int8",
    }
    report = volseg.infer(table, model=tmp_path / "area", out=tmp_path / "r", precision="int8")
    assert report.computed_with["networks"] == "2"
    scans = scans_of_lesions(tmp_path / "data")
    untrained(tmp_path / "m", scans, recipe("kind", **LESIONS))
    report = volseg.quantise(tmp_path / "m", scans)
    report = volseg.infer(scans, model=tmp_path / "m", out=tmp_path / "l", precision="int8")
    assert len(report.done) == 16 and report.computed_with["precision"] == "int8"


def other_images(folder):
    return table_of_images(folder, seed=1)


def fewer_images(folder):
    return table_of_images(folder, n=40)


def other_classes(folder):
    table_of_images(folder)
    text = (folder / "cases.csv").read_text(encoding="utf-8")
    (folder / "cases.csv").write_text(text.replace("square", "triangle"), encoding="utf-8")
    return folder


def no_such_column(folder):
    table_of_images(folder)
    text = (folder / "cases.csv").read_text(encoding="utf-8")
    (folder / "cases.csv").write_text(text.replace(",shape,", ",form,"), encoding="utf-8")
    return folder


def other_size(folder):
    dataset = table_of_images(folder / "table")
    stated = recipe("shape", images={"pixels": 24})
    volseg.preprocess(dataset, recipe=stated, out=folder / "prepared")
    return folder / "prepared"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (other_images, "are not those of"),
        (fewer_images, "are not those of"),
        (other_classes, "'triangle' is not one of the classes disc, square"),
        (no_such_column, "shape"),
        (other_size, r"other \[data\] or \[images\]"),
    ],
)
def test_a_dataset_of_another_model_is_refused(make, message, model, tmp_path):
    shutil.copytree(model, tmp_path / "m")
    with pytest.raises(VolsegError, match=message) as refusal:
        volseg.quantise(tmp_path / "m", make(tmp_path / "data"))
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "m" / "openvino").exists()
    assert not (tmp_path / "m" / ".quantising").exists()


def test_int8_that_was_never_made_or_of_other_weights_is_refused(model, quantised, table, tmp_path):
    with pytest.raises(VolsegError, match="volseg quantise MODEL DATASET"):
        volseg.infer(table, model=model, out=tmp_path / "r", precision="int8")
    untrained(tmp_path / "m", table, recipe("shape", train={"epochs": 2}))
    shutil.copytree(quantised[0] / "openvino", tmp_path / "m" / "openvino")
    with pytest.raises(VolsegError, match="no int8 network made from its weights"):
        volseg.infer(table, model=tmp_path / "m", out=tmp_path / "r", precision="int8")
    with pytest.raises(VolsegError, match="needs the backend openvino"):
        volseg.infer(table, model=model, out=tmp_path / "r", precision="int8", backend="torch")
    assert not (tmp_path / "r").exists()


# Each option of a command: refused with this value for images, or None where it is honoured.
INFER = {
    **dict.fromkeys(("scans", "model", "out", "backend", "precision", "device", "tta", "pages")),
    **{"volume": 1, "max_ram": "4G", "figures": True, "overlap": 0.5, "inside": "body"},
    **{"max_vram": "4G", "fast": True, "probabilities": True, "accept_mismatch": True},
    "format": "nrrd",
    "series": "largest",
    "intensity_unit": "SUVbw",
    "tilt": "resample",
    **{"dicom_seg": "binary", "dicom_sr": True},
    "spacing": (1.0, 1.0, 2.0),
}
TRAIN = {
    **dict.fromkeys(("dataset", "out", "recipe", "epochs", "patience", "resume", "init", "prune")),
    **dict.fromkeys(("teacher", "freeze", "fold", "folds", "precision", "preview", "device")),
    **dict.fromkeys(("seed", "time_budget_seconds")),
    **{
        "memory": "4G",
        "tilt": "resample",
        "devices": 2,
        "target": "area",
    },  # not the recipe's target
}


def test_options_that_a_classifier_cannot_honour_are_refused(model, table, tmp_path):
    assert INFER.keys() == {name for name, _ in settings_of(COMMANDS["infer"])}
    for name, value in INFER.items():
        if value is not None:
            with pytest.raises(VolsegError, match="only for scans, but"):
                volseg.infer(table, model=model, out=tmp_path / "r", **{name: value})
    assert not (tmp_path / "r").exists()
    assert TRAIN.keys() == {name for name, _ in settings_of(COMMANDS["train"])}
    for name in ("memory", "tilt", "target"):
        with pytest.raises(VolsegError, match=r"depend|'shape'"):
            given = {name: TRAIN[name]}
            volseg.train(table, recipe=recipe("shape"), out=tmp_path / "t", **given)
    with pytest.raises(VolsegError, match="time-budget"):
        volseg.plan(table, recipe=recipe("shape"), time_budget_seconds=60)
    assert not (tmp_path / "t" / "model.json").exists()


def test_options_of_classifiers_are_refused_by_what_segments(dataset, model, tmp_path):
    for given in ({"prune": 0.5}, {"teacher": model}, {"target": "grade", "recipe": "smoke"}):
        with pytest.raises(VolsegError, match="only for models that classify images"):
            volseg.train(dataset, out=tmp_path / "m", **given)
    assert not (tmp_path / "m" / "model.json").exists()


def test_prepared_images_are_trained_with_the_settings_of_another_recipe(table, tmp_path):
    volseg.preprocess(table, recipe=recipe("shape"), out=tmp_path / "prepared")
    stated = recipe("shape", train={"epochs": 1, "baselines": False}, network=TINY | {"dropout": 0})
    volseg.train(tmp_path / "prepared", recipe=stated, out=tmp_path / "m")
    trained = load_image_bundle(tmp_path / "m").recipe
    assert trained.train.epochs == 1 and trained.network.settings["dropout"] == 0
    for other, given in (
        (recipe("area"), {}),
        (recipe("shape", images={"pixels": 16}), {}),
        (None, {"target": "area"}),
    ):
        with pytest.raises(VolsegError, match=r"other \[data\] or|has the target 'shape'"):
            volseg.train(tmp_path / "prepared", recipe=other, out=tmp_path / "x", **given)


def test_a_recipe_that_is_pruned_gets_the_smaller_network(table, tmp_path):
    vgg = {"name": "vgg", "depth": 11, "widths": (8,) * 8}
    stated = recipe("shape", network=vgg, train={"epochs": 1, "baselines": False})
    untrained(tmp_path / "vgg", table, stated)
    given = {"init": tmp_path / "vgg", "prune": 0.5}
    volseg.train(table, recipe=stated, out=tmp_path / "m", **given)
    network = load_image_bundle(tmp_path / "m").recipe.network
    assert tuple(network.settings["widths"]) == (4,) * 8
    with pytest.raises(VolsegError, match="leaves a smaller vgg"):
        volseg.train(table, recipe=recipe("shape"), out=tmp_path / "x", **given)

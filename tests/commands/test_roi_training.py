"""A recipe with a coarse first pass, from training to results."""

import csv
import shutil
import tomllib
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY

import volseg
from volseg.bundle import load_bundle, save_bundle
from volseg.errors import VolsegError
from volseg.inference.openvino_backend import openvino_is_installed
from volseg.io.volumes import read_mask
from volseg.recipe import parse_recipe

pytestmark = pytest.mark.slow  # the laws of the pass are those of tests/test_coarse_pass.py

ROI = """
[roi]
spacing_mm = [4.0, 4.0, 4.0]
margin_mm = 6.0
[roi.network]
name = "unet3d"
features = [4, 8, 8]
strides = [[1, 1, 1], [2, 2, 2], [2, 2, 2]]
[roi.train]
patch_shape = [12, 12, 12]
steps_per_epoch = 15
epochs = 4
learning_rate = 1e-2
ema_decay = 0.8
"""


@pytest.fixture(scope="module")
def recipe():
    content = tomllib.loads(TINY + ROI)
    del content["classify"]
    content["train"] |= {"epochs": 3}
    return parse_recipe(content, where="tiny with roi")


@pytest.fixture(scope="module")
def trained(dataset, recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("roi") / "model"
    volseg.train(dataset, recipe=recipe, out=out, device="cpu")
    return out


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_training_makes_both_networks_and_says_what_the_first_pass_costs_and_saves(trained, recipe):
    bundle = load_bundle(trained)
    assert sorted(bundle.weights) == ["roi", "segmentation"]
    assert bundle.recipe.open_keys == []
    for name in ("data", "network", "train", "roi", "infer", "measure"):
        assert getattr(bundle.recipe, name) == getattr(recipe, name)
    assert bundle.coarse_bundle.recipe.spacing_mm == (4.0, 4.0, 4.0)
    assert bundle.coarse_bundle.segmentation_network()(torch.zeros(1, 1, 12, 12, 12)).shape == (
        1,
        2,
        12,
        12,
        12,
    )
    metrics = bundle.metrics
    assert metrics["roi_validation_dice_region"] > 0.6
    assert metrics["roi_validation_labels_inside"] > 0.95
    assert 0.01 < metrics["roi_validation_share_of_scan"] < 0.8
    assert len(rows(trained / "history_roi.csv")) == 4
    assert len(rows(trained / "history.csv")) == 3
    assert "coarse first pass at 4 × 4 × 4 mm" in (trained / "card.md").read_text()
    assert volseg.check(trained) == []
    assert not (trained / ".training").exists()
    if openvino_is_installed():
        assert {path.name for path in (trained / "openvino").iterdir()} >= {
            "roi.fp32.xml",
            "segmentation.fp32.xml",
        }


class Interrupt(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["Training the first pass", "Training"])
def test_a_run_interrupted_in_either_training_resumes_to_the_same_weights(
    stage, dataset, trained, recipe, tmp_path
):
    def stop(now, share, detail):
        if now == stage and detail.startswith("epoch 2"):
            raise Interrupt

    out = tmp_path / "m"
    with pytest.raises(Interrupt):
        volseg.train(dataset, recipe=recipe, out=out, device="cpu", progress=stop)
    with pytest.raises(VolsegError, match="add --resume"):
        volseg.train(dataset, recipe=recipe, out=out, device="cpu")
    seen = []
    volseg.train(
        dataset,
        recipe=recipe,
        out=out,
        device="cpu",
        resume=True,
        progress=lambda *what: seen.append((what[0], what[2])),
    )
    again = [detail.split(",")[0] for now, detail in seen if now == "Training the first pass"]
    assert again == (["epoch 3", "epoch 4"] if stage == "Training the first pass" else [])
    expected, resumed = load_bundle(trained).weights, load_bundle(out).weights
    for name in ("roi", "segmentation"):
        for key, tensor in expected[name].items():
            torch.testing.assert_close(resumed[name][key], tensor, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_infer_runs_the_first_pass_and_where_tiles_are_asked_for_leaves_it_out(
    trained, dataset, tmp_path
):
    scan, out = dataset / "images" / "scan_6.nii.gz", tmp_path / "out"
    truth = read_mask(dataset / "labels" / "scan_6.nii.gz").array > 0
    masks = {}
    for inside in (None, "scan", "body"):
        report = volseg.infer(scan, model=trained, out=out, inside=inside)
        assert list(report.done) == ["scan_6"]  # nothing is kept: each is another key
        masks[inside] = read_mask(out / "masks" / "scan_6.nii.gz").array
        assert list(volseg.infer(scan, model=trained, out=out, inside=inside).kept) == ["scan_6"]
    bundle = load_bundle(trained)
    without = save_bundle(
        replace(
            bundle,
            recipe=bundle.recipe.model_copy(update={"roi": None}),
            weights={"segmentation": bundle.weights["segmentation"]},
        ),
        tmp_path / "without",
    )
    assert without.coarse_bundle is None
    volseg.infer(scan, model=tmp_path / "without", out=tmp_path / "plain")
    plain = read_mask(tmp_path / "plain" / "masks" / "scan_6.nii.gz").array
    np.testing.assert_array_equal(masks["scan"], plain)
    overlap = [
        2 * np.count_nonzero((mask > 0) & truth) / (np.count_nonzero(mask) + truth.sum())
        for mask in masks.values()
    ]
    assert overlap[0] > max(overlap) - 0.1


@pytest.mark.slow
def test_a_time_budget_is_shared_by_both(dataset, recipe, tmp_path):
    long = {"epochs": 10_000, "steps_per_epoch": 100}
    endless = recipe.model_copy(
        update={
            "roi": recipe.roi.model_copy(
                update={"train": recipe.roi.train.model_copy(update=long)}
            ),
            "train": recipe.train.model_copy(update=long),
        }
    )
    volseg.train(
        dataset, recipe=endless, out=tmp_path / "m", epochs=20, time_budget_seconds=20, device="cpu"
    )
    first, second = (rows(tmp_path / "m" / name) for name in ("history_roi.csv", "history.csv"))
    # 3 s for the step that ends it.
    assert float(first[-1]["seconds"]) < recipe.roi.time_fraction * 20 + 3
    assert float(second[-1]["learning_rate"]) < recipe.train.learning_rate / 2


@pytest.mark.slow
def test_a_model_without_a_first_pass_gives_its_weights_to_one_with_it(
    model, dataset, recipe, tmp_path
):
    volseg.train(dataset, recipe=recipe, out=tmp_path / "m", init=model, epochs=1, device="cpu")
    assert load_bundle(tmp_path / "m").coarse_bundle is not None


def test_a_damaged_first_pass_is_found(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "m")
    (tmp_path / "m" / "roi.safetensors").write_bytes(b"no weights")
    with pytest.raises(VolsegError, match="not those that were saved"):
        load_bundle(tmp_path / "m")

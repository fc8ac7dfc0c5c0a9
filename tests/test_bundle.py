import json
import shutil

import numpy as np
import pytest
import torch

from volseg.bundle import load_bundle, model_card, save_bundle, shipped_bundle
from volseg.errors import VolsegError
from volseg.inference.torch_backend import TorchBackend


@pytest.fixture
def copied(model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    return tmp_path / "model"


def test_save_then_load_gives_equal_logits_of_both_networks(model, tmp_path):
    first = load_bundle(model)
    second = save_bundle(first, tmp_path / "copy")
    patch = np.random.default_rng(0).normal(size=(1, 1, 16, 16, 16)).astype(np.float32)
    slices = np.random.default_rng(0).random((3, 2, 16, 16)).astype(np.float32)
    for build, batch in (
        (lambda b: b.segmentation_network(), patch),
        (lambda b: b.classifier_network(), slices),
    ):
        before, after = (
            TorchBackend(build(bundle), torch.device("cpu")).logits(batch)
            for bundle in (first, second)
        )
        np.testing.assert_array_equal(before, after)
        assert np.ptp(before) > 0
    for name in ("recipe", "reasons", "fingerprint"):
        assert getattr(second, name) == getattr(first, name)


def test_a_bundle_holds_no_pickle_and_a_card_with_what_was_measured(model):
    assert sorted(path.name for path in model.iterdir() if path.is_file()) == [
        "card.md",
        "classifier.safetensors",
        "curves.png",
        "history.csv",
        "model.json",
        "segmentation.safetensors",
        "validation.csv",
        "validation.png",
    ]
    bundle = load_bundle(model)
    card = (model / "card.md").read_text()
    assert card == model_card(bundle)
    assert f"validation_dice_lesion: {bundle.metrics['validation_dice_lesion']:.4g}" in card


def test_a_flipped_bit_in_the_weights_is_found(copied):
    path = copied / "segmentation.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(VolsegError, match="not those that were saved") as caught:
        load_bundle(copied)
    assert caught.value.code == "E_CKPT"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda d: d.update(format_version=99), "E_VERSION"),
        (lambda d: d.pop("fingerprint"), "E_CKPT"),
        (lambda d: d["recipe"]["preprocess"].update(spacing_mm="auto"), "E_CKPT"),
        (lambda d: d["recipe"].update(nam="x"), "E_RECIPE"),
    ],
)
def test_a_changed_description_is_refused(copied, change, code):
    path = copied / "model.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))
    with pytest.raises(VolsegError) as caught:
        load_bundle(copied)
    assert caught.value.code == code


@pytest.mark.parametrize("missing", ["model.json", "segmentation.safetensors"])
def test_a_folder_without_a_model_file_is_refused(copied, missing):
    (copied / missing).unlink()
    with pytest.raises(VolsegError, match="not a model folder"):
        load_bundle(copied)


def test_the_shipped_bundle_is_small_says_its_limits_and_loads():
    folder = shipped_bundle()
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 6_000_000
    bundle = load_bundle(folder)
    assert bundle.recipe.name == "lung_nodule_ct"
    assert "whole chest" in (folder / "card.md").read_text()
    assert "CC BY 3.0" in (folder / "card.md").read_text()
    assert bundle.classifier_network() is not None
    preprocess = bundle.recipe.preprocess
    assert (preprocess.axes, preprocess.transpose) == ("canonical", (0, 1, 2))
    assert preprocess.separate_above is None
    assert (preprocess.normalise_first, preprocess.clip_overshoot) == (False, False)
    assert preprocess.normalise_channels == {}
    assert bundle.recipe.data.regions_class_order is None
    assert bundle.origin == {}

import tomllib
from pathlib import Path

import pytest
import torch

from volseg.commands import check
from volseg.errors import VolsegError
from volseg.networks import build_images, build_network, build_slices
from volseg.recipe import load_any_recipe, load_recipe, parse_recipe, shipped_recipes
from volseg.recipe.write import recipe_text

PIPELINES = Path(__file__).parents[1] / "pipelines"
MINIMAL = """
name = "tiny"
description = "test"
[data]
channels = ["ct"]
intensity_unit = "HU"
labels = { lesion = 1 }
[preprocess.normalise]
method = "window"
[network]
name = "unet3d"
[train]
patch_shape = [16, 16, 16]
"""


def test_the_shipped_recipes_are_those_of_the_folder():
    names = sorted(path.stem for path in PIPELINES.glob("*.toml"))
    assert set(names) >= {"smoke", "lung_nodule_ct", "hippocampus_mri", "sarcoma_mri"}
    assert sorted(shipped_recipes()) == names


@pytest.mark.parametrize("path", sorted(PIPELINES.glob("*.toml")), ids=lambda path: path.stem)
def test_a_shipped_recipe_can_be_used_and_starts_with_its_command(path):
    recipe = load_any_recipe(path)
    assert recipe.name == path.stem
    assert path.read_text().startswith("# volseg train ")
    assert f"--recipe {recipe.name} " in path.read_text().splitlines()[0]
    assert check(path) == []
    if recipe.task == "classify":
        images = torch.zeros(2, 1, 28, 28)
        if recipe.sequence is not None:  # two slices are a scan, with a last column of ones
            slices = build_slices(recipe).eval().embed(images)
            images = torch.cat([slices, torch.ones(2, 1)], dim=1).repeat(2, 1, 1)
        assert build_images(recipe)(images).shape == (2, recipe.data.n_outputs)
        return
    network = build_network(
        recipe.network.name, in_channels=1, out_channels=2, **recipe.network.settings
    )
    divisors = [1, 1, 1]
    for stride in recipe.network.settings["strides"]:
        divisors = [a * b for a, b in zip(divisors, stride, strict=True)]
    assert all(n % d == 0 for n, d in zip(recipe.train.patch_shape, divisors, strict=True))
    assert sum(p.numel() for p in network.parameters()) > 1000


def test_every_mistake_is_named_at_once_with_the_known_keys():
    content = tomllib.loads(
        MINIMAL.replace('method = "window"', 'method = "window"\nhihg = 3')
        .replace("[train]", "[train]\nepochs = 0\npath_shape = 1")
        .replace('channels = ["ct"]', "channels = []")
    )
    with pytest.raises(VolsegError) as caught:
        parse_recipe(content, where="r.toml")
    text = str(caught.value)
    assert "\n" not in text
    assert "4 mistakes" in text
    assert "hihg: unknown key; known keys are method, low, high, mean, sd" in text
    assert "path_shape: unknown key; known keys are patch_shape" in text
    assert "train.epochs" in text
    assert "data.channels" in text


def test_numbers_that_do_not_fit_together_are_named_at_once_too():
    content = tomllib.loads(MINIMAL)
    content["measure"] = {"organ": "liver"}
    content["train"]["class_weights"] = [1.0, 2.0, 3.0, 4.0, 5.0]
    content["preprocess"]["normalise_channels"] = {"pet": {"method": "zscore"}}
    with pytest.raises(VolsegError) as caught:
        parse_recipe(content, where="r.toml")
    text = str(caught.value)
    assert "3 mistakes" in text and "\n" not in text
    for part in ("measure names liver", "has 5 numbers for", "normalise_channels names pet"):
        assert part in text
    content = tomllib.loads(MINIMAL)
    content["data"] |= {"labels": {"a": 1, "b": 1, "c": 70000}, "ignore": 1}
    with pytest.raises(VolsegError, match=r"3 mistakes.*share one value.*1 to 65535.*ignore = 1"):
        parse_recipe(content, where="r.toml")


def test_a_mistake_in_the_normalisation_of_one_channel_lists_its_keys():
    content = tomllib.loads(MINIMAL)
    content["preprocess"]["normalise_channels"] = {"ct": {"method": "zscore", "regoin": "scan"}}
    with pytest.raises(VolsegError, match="regoin: unknown key; known keys are method, region"):
        parse_recipe(content, where="r.toml")


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("preprocess", {"transpose": [0, 1, 1]}, "must hold 0, 1 and 2 once each"),
        (
            "preprocess",
            {"normalise": {"method": "zscore", "region": "nonzero"}},
            'needs crop = "nonzero"',
        ),
        (
            "preprocess",
            {"normalise_channels": {"pet": {"method": "scale"}}},
            "names pet, which data.channels lacks",
        ),
        (
            "preprocess",
            {"normalise_channels": {"ct": {"method": "window", "low": 2.0, "high": 1.0}}},
            "is empty",
        ),
        ("data", {"regions_class_order": [2]}, "the value of each label once"),
    ],
)
def test_settings_of_imported_models_have_to_fit_together(section, change, message):
    content = tomllib.loads(MINIMAL)
    content[section] |= change
    with pytest.raises(VolsegError, match=message):
        parse_recipe(content, where="r.toml")


def test_outputs_are_the_labels_and_the_background_or_one_per_region():
    content = tomllib.loads(MINIMAL.replace("{ lesion = 1 }", "{ core = 3, whole = 1, rim = 2 }"))
    assert parse_recipe(content, where="r.toml").data.n_outputs == 4
    content["data"]["regions_class_order"] = [1, 3, 2]
    data = parse_recipe(content, where="r.toml").data
    assert data.n_outputs == 3
    assert data.label_names == {1: "whole", 2: "rim", 3: "core"}


@pytest.mark.parametrize("labels", ["{ a = 0 }", "{ a = 1, b = 1 }", "{}"])
def test_labels_that_cannot_be_told_apart_are_refused(labels):
    with pytest.raises(VolsegError, match=r"data"):
        parse_recipe(tomllib.loads(MINIMAL.replace("{ lesion = 1 }", labels)), where="r.toml")


def test_the_hash_is_that_of_the_content_not_of_the_text():
    first = parse_recipe(tomllib.loads(MINIMAL), where="a")
    second = parse_recipe(tomllib.loads("# a comment\n" + MINIMAL), where="b")
    other = parse_recipe(tomllib.loads(MINIMAL.replace("16, 16, 16", "16, 16, 32")), where="c")
    assert first.sha256 == second.sha256 != other.sha256


def test_an_unknown_name_lists_the_shipped_ones():
    with pytest.raises(VolsegError, match=r"hippocampus_mri, lung_nodule_ct, sarcoma_mri, smoke"):
        load_recipe("lung_nodules")


def test_a_file_that_is_not_toml_is_named_with_its_line(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text("name = \n")
    with pytest.raises(VolsegError, match=r"bad\.toml: not a TOML file .*line 1"):
        load_recipe(path)


ROI = """
[roi]
spacing_mm = [4.0, 4.0, 4.0]
[roi.network]
name = "unet3d"
features = [8, 16, 16]
strides = [[1, 1, 1], [2, 2, 2], [2, 2, 2]]
[roi.train]
patch_shape = [32, 32, 32]
"""


def test_the_recipe_of_the_first_pass_is_that_of_any_label_on_a_coarser_grid():
    content = tomllib.loads(MINIMAL.replace("{ lesion = 1 }", "{ a = 3, b = 1 }") + ROI)
    recipe = parse_recipe(content, where="r.toml")
    coarse = recipe.coarse
    assert recipe.roi.margin_mm == 20.0
    assert (coarse.roi, coarse.classify, coarse.postprocess) == (None, None, ())
    assert (coarse.data.n_outputs, coarse.data.channels) == (2, recipe.data.channels)
    assert coarse.preprocess.spacing_mm == (4.0, 4.0, 4.0)
    assert coarse.preprocess.normalise == recipe.preprocess.normalise
    assert coarse.train == recipe.roi.train
    assert parse_recipe(coarse.model_dump(), where="coarse") == coarse
    assert parse_recipe(recipe.model_dump(mode="json"), where="again").sha256 == recipe.sha256
    assert parse_recipe(tomllib.loads(MINIMAL), where="without").coarse is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"margin_mm": -1}, "roi.margin_mm"),
        ({"spacing_mm": [4, 0, 4]}, "roi.spacing_mm.1"),
        (
            {"margn_mm": 3},
            "roi.margn_mm: unknown key; known keys are spacing_mm, margin_mm, network, train, "
            "time_fraction",
        ),
        ({"train": {}}, "roi.train.patch_shape"),
        (
            {"train": {"patch_shape": [32, 32, 32], "class_weights": [1, 1, 1]}},
            "3 numbers, but the first pass has 2 classes",
        ),
        ({"spacing_mm": [1.0, 1.0, 1.0]}, "must be coarser than preprocess.spacing_mm"),
        ({"time_fraction": 1.0}, "roi.time_fraction"),
    ],
)
def test_mistakes_in_the_first_pass_are_reported(change, message):
    content = tomllib.loads(MINIMAL + ROI)
    content["preprocess"]["spacing_mm"] = [1.0, 1.0, 1.5]
    content["roi"] |= change
    with pytest.raises(VolsegError) as caught:
        parse_recipe(content, where="r.toml")
    assert message in str(caught.value)


def test_a_coarse_patch_has_to_fit_its_network(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(MINIMAL + ROI.replace("[32, 32, 32]", "[32, 30, 32]"))
    (problem,) = check(path)
    assert problem["problem"].startswith("roi.train.patch_shape has 30 voxels along A")


@pytest.mark.parametrize("content", [[], "smoke", 3, None])
def test_a_recipe_that_is_no_table_is_refused(content):
    with pytest.raises(VolsegError, match=r"damaged\.json: 1 mistake: recipe: input should be"):
        parse_recipe(content, where="damaged.json")


def test_values_in_messages_keep_their_capitals():
    content = tomllib.loads(MINIMAL) | {"train": {"patch_shape": [16] * 3, "augment": {}}}
    content["train"]["augment"]["flip_axes"] = ["X"]
    with pytest.raises(VolsegError, match="'R', 'A' or 'S'"):
        parse_recipe(content, where="x.toml")


def test_only_values_that_a_plan_fills_in_are_open():
    content = tomllib.loads(MINIMAL) | {"name": "auto", "description": "auto"}
    assert parse_recipe(content, where="x.toml").open_keys == [
        "preprocess.spacing_mm",
        *(f"preprocess.normalise.{key}" for key in ("low", "high", "mean", "sd")),
    ]


@pytest.mark.parametrize("character", [*map(chr, range(32)), "\x7f", "\u2028", "é"])
def test_any_name_may_stand_in_a_comment(character):
    recipe = load_recipe("smoke")
    line = f"the channel{character}of a file"
    text = recipe_text(recipe, [line], {"train.batch_size": [line], "train": [line]})
    assert parse_recipe(tomllib.loads(text), where="x.toml") == recipe

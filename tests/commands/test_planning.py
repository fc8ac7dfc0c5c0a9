import json
import re

import numpy as np
import pytest
from laws import ball, oblique

import volseg
from volseg.bundle import load_bundle
from volseg.commands.automatic_recipe import recipe_for
from volseg.commands.planning import budget_of
from volseg.errors import VolsegError
from volseg.io.volumes import read_mask, write_volume
from volseg.recipe import load_recipe
from volseg.volume import Geometry, Volume

DECATHLON = {
    "modality": {"0": "MRI"},
    "labels": {"0": "background", "7": "left ball", "300": "shell"},
}


def write_case(folder, number, *, low, images="images", labels="labels", suffix=""):
    """A ball of 7 in a shell of 300, noise of any scale round them."""
    rng = np.random.default_rng(number)
    geometry = Geometry((26, 24, 20), oblique((1.5, 1.5, 2.0)))
    inside, outside = ball(6, geometry), ball(10, geometry)
    mask = np.where(inside, 7, np.where(outside, 300, 0)).astype(np.uint16)
    array = low + 100 * inside + 60 * outside + rng.normal(0, 10, geometry.shape)
    name = f"case_{number}"
    for sub, values, end in ((images, array.astype(np.int16), suffix), (labels, mask, "")):
        (folder / sub).mkdir(parents=True, exist_ok=True)
        write_volume(
            Volume(np.asfortranarray(values), geometry), folder / sub / f"{name}{end}.nii.gz"
        )
    return name


def plain_folder(folder, low=-1000, n=4):
    for number in range(n):
        write_case(folder, number, low=low)
    return folder


def nnunet_folder(folder, n=4):
    for number in range(n):
        write_case(folder, number, low=50, images="imagesTr", labels="labelsTr", suffix="_0000")
    description = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "ball": 7, "shell": 300},
    }
    (folder / "dataset.json").write_text(
        json.dumps(description | {"numTraining": n, "file_ending": ".nii.gz"})
    )
    return folder


def decathlon_folder(folder, n=4):
    names = [
        write_case(folder, number, low=0, images="imagesTr", labels="labelsTr")
        for number in range(n)
    ]
    listed = [
        {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}
        for name in names
    ]
    (folder / "dataset.json").write_text(json.dumps(DECATHLON | {"training": listed, "test": []}))
    return folder


def test_the_recipe_follows_from_the_masks_the_description_and_the_intensities(tmp_path):
    plain = recipe_for(plain_folder(tmp_path / "Liver CT-2"), None)
    assert plain.name == "liver_ct_2"
    assert plain.data.labels == {"label_7": 7, "label_300": 300}
    assert (plain.preprocess.normalise.method, plain.data.intensity_unit) == ("window", "HU")
    assert plain.train.augment.flip_axes == ("R", "A", "S")
    brain = recipe_for(decathlon_folder(tmp_path / "b"), None)
    assert brain.data.labels == {"left ball": 7, "shell": 300}
    assert (brain.preprocess.normalise.method, brain.data.intensity_unit) == ("zscore", "a.u.")
    assert brain.train.augment.flip_axes == ("A", "S")  # a mirrored left ball would be a right one
    assert recipe_for(nnunet_folder(tmp_path / "n"), None).preprocess.normalise.method == "window"
    dark = recipe_for(plain_folder(tmp_path / "m", low=0), None)
    assert dark.preprocess.normalise.method == "zscore"  # nothing says CT, and there is no air


def test_a_plan_gives_a_reason_for_each_line_and_comes_back_from_its_file(tmp_path):
    folder = plain_folder(tmp_path / "d")
    report = volseg.plan(folder, memory="2G", out=tmp_path / "new" / "plan.toml")
    lines = {line["setting"]: line for line in report.reasons}
    assert {
        "spacing",
        "intensities of image",
        "patch",
        "batch",
        "levels",
        "kernels",
        "features",
    } <= lines.keys()
    assert all(line["value"] and line["reason"] for line in lines.values())
    path = tmp_path / "new" / "plan.toml"
    recipe = load_recipe(path)
    assert recipe.model_dump(mode="json") == report.recipe
    assert recipe.open_keys == []
    assert recipe.spacing_mm == (1.5, 1.5, 2.0)
    text = path.read_text()
    assert all(
        f"# {line['setting']} {line['value']}: {line['reason']}\n" in text
        for line in lines.values()
    )
    wrong = re.sub(r"patch_shape = .*", "patch_shape = [16, 16]", text)
    path.with_name("bad.toml").write_text(wrong.replace("batch_size", "bacth_size", 1))
    with pytest.raises(VolsegError, match=r"2 mistakes: .*patch_shape.*bacth_size"):
        load_recipe(path.with_name("bad.toml"))
    with pytest.raises(VolsegError, match="which is a TOML file"):
        volseg.plan(folder, out=tmp_path / "plan.json")


def test_what_the_recipe_states_stays(dataset, tiny_recipe):
    report = volseg.plan(dataset, recipe=tiny_recipe)
    assert {key: report.recipe[key] for key in ("train", "network")} == tiny_recipe.model_dump(
        mode="json", include={"train", "network"}
    )
    lines = report.reasons
    stated = {line["setting"] for line in lines if line["reason"] == "stated by the recipe"}
    assert {"spacing", "patch", "batch", "network", "patches on labels"} <= stated


def test_a_budget_that_nothing_fits_says_which_number_to_change(tmp_path):
    with pytest.raises(VolsegError, match="the budget is") as caught:
        volseg.plan(plain_folder(tmp_path / "d"), memory="100K")
    assert "G" in caught.value.fix
    with pytest.raises(VolsegError, match="--vram must be an amount of memory"):
        volseg.plan(tmp_path / "d", memory="many")


def test_a_gpu_plans_activations_of_two_bytes_and_time_becomes_arithmetic():
    budget = budget_of("cpu", 4 << 30, 10.0)
    assert (budget.memory, budget.half) == (4 << 30, False)
    assert budget.flops is not None
    assert budget_of("cpu", 4 << 30, 20.0).flops == 2 * budget.flops


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(plain_folder, marks=pytest.mark.slow),
        pytest.param(nnunet_folder, marks=pytest.mark.slow),
        pytest.param(decathlon_folder, marks=pytest.mark.slow),
    ],
)
def test_a_folder_trains_without_a_recipe_and_is_cross_validated(layout, tmp_path):
    out = tmp_path / "model"
    folder = layout(tmp_path / "d")
    volseg.train(
        folder, out=out, folds=2, epochs=1, memory="1G", device="cpu", time_budget_seconds=60
    )
    bundle = load_bundle(out)
    assert len(bundle.segmentation_names) == 2
    assert bundle.metrics["networks"] == 2
    lines = (out / "validation.csv").read_text().splitlines()
    assert len(lines) == 1 + 4 * 2  # each case once, by the network that never saw it
    for name in ("curves.png", "validation.png", "history.csv", "history_1.csv", "card.md"):
        assert (out / name).stat().st_size > 0
    volseg.infer(next(folder.rglob("case_0*.nii.gz")), model=out, out=tmp_path / "r", device="cpu")
    values = set(np.unique(np.asarray(read_mask(next((tmp_path / "r" / "masks").iterdir())).array)))
    assert values <= {0, 7, 300}  # the labels' own values


@pytest.mark.slow
def test_a_changed_plan_is_what_is_trained(tmp_path):
    folder = plain_folder(tmp_path / "d")
    path = tmp_path / "plan.toml"
    volseg.plan(folder, memory="1G", out=path)
    text = path.read_text()
    for key, value in {
        "patch_shape": [16, 16, 16],
        "batch_size": 3,
        "features": [4, 6, 8],
        "strides": [[1] * 3, [2] * 3, [2] * 3],
        "kernels": [[3] * 3] * 3,
    }.items():
        text = re.sub(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
    path.write_text(text)
    options = {"folds": 1, "epochs": 1, "device": "cpu", "time_budget_seconds": 20}
    volseg.train(folder, out=tmp_path / "m", recipe=path, **options)
    bundle = load_bundle(tmp_path / "m")
    assert bundle.recipe.batch_size == 3
    assert tuple(bundle.recipe.network.settings["features"]) == (4, 6, 8)
    assert bundle.recipe.patch_shape == (16, 16, 16)
    assert "| batch | 3 | stated by the recipe |" in (tmp_path / "m" / "card.md").read_text()


@pytest.mark.slow
def test_without_a_recipe_the_network_of_the_model_to_start_from_is_taken(tmp_path, model):
    folder = plain_folder(tmp_path / "d")
    volseg.train(folder, out=tmp_path / "m", init=model, folds=2, epochs=1, device="cpu")
    bundle, initial = load_bundle(tmp_path / "m"), load_bundle(model)
    assert bundle.recipe.network == initial.recipe.network
    assert "output_block" in bundle.metrics["began_at_random"]  # three labels now, not one
    assert bundle.recipe.patch_shape == initial.recipe.patch_shape


def test_a_preview_shows_patches_and_trains_nothing(dataset, tiny_recipe, tmp_path):
    report = volseg.train(
        dataset, recipe=tiny_recipe, out=tmp_path / "m", preview=True, device="cpu"
    )
    assert (tmp_path / "m" / "preview.png").read_bytes()[:4] == b"\x89PNG"
    assert report.preview.endswith("preview.png")
    assert not (tmp_path / "m" / "model.json").exists()


def test_all_mistakes_of_a_dataset_are_reported_at_once(tmp_path):
    folder = plain_folder(tmp_path / "d", n=6)
    lines, files = (
        ["subject,image,label,split,patient"],
        "images/case_{0}.nii.gz,labels/case_{0}.nii.gz",
    )
    lines += [f"s{n},{files.format(n)},{'val' if n == 4 else 'train'},p{n % 4}" for n in range(6)]
    lines[2] = lines[2].replace("s1,", "s0,")  # an id twice; patient 0 is in train and in val
    (folder / "cases.csv").write_text("\n".join(lines))
    off_grid = Geometry((26, 24, 20), oblique((1.5, 1.5, 2.5)))
    write_volume(
        Volume(np.zeros(off_grid.shape, np.uint8, order="F"), off_grid),
        folder / "labels/case_2.nii.gz",
    )
    mask = read_mask(folder / "labels/case_3.nii.gz")
    write_volume(
        mask.with_array(np.where(mask.array == 7, 9, mask.array)), folder / "labels/case_3.nii.gz"
    )
    (folder / "images/case_5.nii.gz").write_bytes(b"no scan")
    recipe = recipe_for(plain_folder(tmp_path / "e"), None)
    wrong = ["id 's0' is used for both", "patient 'p0' is in split 'val'", "s2: E_PAIR", "s5: E_"]
    # Without a recipe every value is a label.
    for given, expected in ((recipe, [*wrong, "s3: E_LABELS"]), (None, wrong)):
        with pytest.raises(VolsegError) as caught:
            volseg.train(folder, out=tmp_path / "m", recipe=given, device="cpu")
        assert [words for words in expected if words not in str(caught.value)] == []
        assert not (tmp_path / "m" / "model.json").exists()


def test_empty_masks_and_absent_labels_give_warnings(tmp_path):
    folder = plain_folder(tmp_path / "d")
    recipe = recipe_for(folder, None)
    for number in (0, 1):
        path = folder / "labels" / f"case_{number}.nii.gz"
        mask = read_mask(path)
        write_volume(mask.with_array(np.zeros(mask.array.shape, np.uint16, order="F")), path)
    labels = recipe.data.model_copy(update={"labels": dict(recipe.data.labels) | {"cyst": 12}})
    report = volseg.plan(folder, recipe=recipe.model_copy(update={"data": labels}), memory="1G")
    empty, absent = report.warnings
    assert re.search(r"masks? holds? no labelled voxel", empty)
    assert "no training mask holds cyst" in absent


@pytest.mark.slow
def test_nnunets_ignore_label_and_regions_are_understood(tmp_path):
    folder = nnunet_folder(tmp_path / "n")
    description = json.loads((folder / "dataset.json").read_text())
    description["labels"] = {"background": 0, "ball": 7, "ignore": 300}
    (folder / "dataset.json").write_text(json.dumps(description))
    recipe = recipe_for(folder, None)
    assert (recipe.data.labels, recipe.data.ignore) == ({"ball": 7}, 300)
    description["labels"] = {"background": 0, "all": [7, 300], "ball": 7}
    (folder / "dataset.json").write_text(
        json.dumps(description | {"regions_class_order": [300, 7]})
    )
    recipe = recipe_for(folder, None)
    assert recipe.data.region_classes == ((1, 2), (1,))
    volseg.train(
        folder,
        out=tmp_path / "m",
        folds=1,
        epochs=1,
        memory="1G",
        device="cpu",
        time_budget_seconds=20,
    )
    rows = (tmp_path / "m" / "validation.csv").read_text().splitlines()
    assert {row.split(",")[4] for row in rows[1:]} == {"all", "ball"}


def test_a_stated_budget_that_a_stated_network_exceeds_says_which_batch_fits(
    dataset, tiny_recipe, tmp_path
):
    large = tiny_recipe.model_copy(
        update={"train": tiny_recipe.train.model_copy(update={"batch_size": 32})}
    )
    with pytest.raises(
        VolsegError,
        match=r"takes about .* the budget is .* or batch_size \d+ in the recipe",
    ):
        volseg.plan(dataset, recipe=large, memory="30M")

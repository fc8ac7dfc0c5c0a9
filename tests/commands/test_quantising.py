import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
from bundles import with_recipe

import volseg
from volseg.bundle import load_bundle, save_bundle, segmentation_name
from volseg.commands import quantise, quantising
from volseg.errors import VolsegError
from volseg.options import QuantiseOptions

pytestmark = pytest.mark.skipif(not find_spec("nncf"), reason="nncf is not installed")


@pytest.fixture(scope="module")
def quantised(model, dataset, tmp_path_factory):
    """A copy of the small model with an int8 network, and the report of making it."""
    folder = tmp_path_factory.mktemp("quantised") / "model"
    save_bundle(load_bundle(model), folder)
    return folder, quantise(folder, dataset, cases=3)


@pytest.mark.slow
def test_int8_costs_what_is_stored_beside_it_and_the_model_stays_the_same(quantised, model):
    folder, report = quantised
    assert load_bundle(folder).sha256 == load_bundle(model).sha256
    stored = json.loads((folder / "openvino" / "segmentation.int8.json").read_text())
    assert stored["validation"] == report.validation
    assert stored["calibration"] == {"cases": 3, "patches": 6, "seed": 0}
    scores = stored["validation"]["dice"]["lesion"]
    metrics = load_bundle(folder).metrics
    assert scores["fp32"] == pytest.approx(metrics["validation_dice_lesion"], abs=0.002)
    assert scores["int8"] == pytest.approx(scores["fp32"], abs=0.05)
    assert not (folder / ".quantising").exists()


@pytest.mark.slow
def test_infer_takes_int8_only_when_asked_and_says_so(quantised, dataset, tmp_path):
    folder, _ = quantised
    scan, results = dataset / "images" / "scan_6.nii.gz", tmp_path / "results"
    report = volseg.infer(scan, model=folder, out=results, device="cpu")
    assert report.computed_with == {"backend": "openvino", "precision": "fp32"}
    report = volseg.infer(scan, model=folder, out=results, device="cpu", precision="int8")
    assert report.done == ["scan_6"]  # made with another option, so made again
    assert report.computed_with["precision"] == "int8"
    assert json.loads((results / "run.json").read_text())["options"]["precision"] == "int8"
    assert volseg.infer(scan, model=folder, out=results, device="cpu", precision="int8").kept == [
        "scan_6"
    ]


@pytest.mark.slow
def test_every_network_of_an_ensemble_is_quantised(model, dataset, tmp_path):
    one = load_bundle(model)
    weights = one.weights["segmentation"]
    changed = {
        name: values * (1.02 if name.endswith("weight") else 1) for name, values in weights.items()
    }
    folder = tmp_path / "ensemble"
    save_bundle(replace(one, weights=dict(one.weights) | {segmentation_name(1): changed}), folder)
    report = quantise(folder, dataset, cases=2)
    scores = report.validation["dice"]["lesion"]
    assert scores["int8"] == pytest.approx(scores["fp32"], abs=0.05)
    report = volseg.infer(
        dataset / "images" / "scan_6.nii.gz",
        model=folder,
        out=tmp_path / "out",
        device="cpu",
        precision="int8",
    )
    computed = report.computed_with
    assert (computed["precision"], computed["networks"]) == ("int8", "2")
    assert len(computed["network_sha256"].split(",")) == 2


def test_a_model_of_regions_is_not_quantised(model, dataset, tmp_path):
    one = load_bundle(model)
    data = one.recipe.data.model_copy(
        update={"regions_class_order": tuple(one.recipe.data.labels.values())}
    )
    folder = tmp_path / "regions"
    save_bundle(replace(one, recipe=one.recipe.model_copy(update={"data": data})), folder)
    with pytest.raises(VolsegError, match="regions"):
        quantise(folder, dataset)


@pytest.mark.slow
def test_the_command_prints_what_each_precision_costs(quantised, dataset):
    folder, _ = quantised
    done = run("quantise", folder, dataset, "--cases", "2", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["calibration"]["cases"] == 2
    done = run(
        "infer", dataset / "images" / "scan_6.nii.gz", "--model", folder, "--precision", "fp8"
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "volseg", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_openvino_segments_what_torch_segments(model, dataset, tmp_path):
    from volseg.io.volumes import read_mask

    masks = []
    for backend in ("torch", "openvino"):
        report = volseg.infer(
            dataset / "images", model=model, out=tmp_path / backend, device="cpu", backend=backend
        )
        assert report.computed_with["backend"] == backend
        masks.append(
            [read_mask(path).array for path in sorted((tmp_path / backend / "masks").iterdir())]
        )
    agreement = [np.mean(a == b) for a, b in zip(*masks, strict=True)]
    assert len(agreement) == 8
    assert min(agreement) > 0.9999


def test_a_prepared_folder_of_another_spacing_is_refused(quantised, dataset, tiny_recipe, tmp_path):
    coarse = tiny_recipe.model_copy(
        update={
            "preprocess": tiny_recipe.preprocess.model_copy(update={"spacing_mm": (3.0, 3.0, 3.0)})
        }
    )
    volseg.preprocess(dataset, recipe=coarse, out=tmp_path / "prepared")
    with pytest.raises(VolsegError, match=r"other \[data\], \[preprocess\]"):
        quantise(quantised[0], tmp_path / "prepared")


def test_the_models_own_recipe_prepares_the_cases(model, dataset, tmp_path):
    bundle = load_bundle(model)
    coarse = with_recipe(bundle, preprocess={"spacing_mm": (2.5, 2.5, 2.5)})
    sizes = []
    for name, changed in (("fine", bundle), ("coarse", coarse)):
        options = QuantiseOptions(model, dataset)
        training, _ = quantising._prepared_cases(changed, tmp_path / name, options)
        sizes.append(training[0].mask.shape)
    assert all(fine > coarse for fine, coarse in zip(*sizes, strict=True))

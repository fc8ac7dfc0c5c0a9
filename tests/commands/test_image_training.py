"""Classifiers of images, from files to a model and its predictions, through the commands."""

from __future__ import annotations

import json
import shutil

import nibabel
import numpy as np
import pytest
from image_sets import (
    SHAPES,
    folder_of_classes,
    rows_of,
    scans_of_lesions,
    table_of_images,
    write_rows,
)
from PIL import Image

import volseg
from volseg.commands import baseline_tables
from volseg.commands.image_sources import FileSource
from volseg.commands.image_start import Start
from volseg.errors import VolsegError
from volseg.image_bundle import load_image_bundle
from volseg.io.prepared_images import read_prepared_images
from volseg.recipe import ClassifyRecipe, parse_image_recipe
from volseg.training.baselines import load_baselines
from volseg.training.check import image_recipe_problems

TINY = {"name": "cnn_small", "features": (8, 16)}


def recipe(target, train=None, **sections):
    """Return a recipe with a tiny network, which leaves the targets to the plan."""
    content = {
        "task": "classify",
        "name": "shapes",
        "description": "Shapes.",
        "data": {"target": target},
        "network": TINY,
        "train": {"epochs": 4, "patience": 100} | (train or {}),
    }
    return ClassifyRecipe.model_validate(content | sections)


def weights_of(folder):
    weights = load_image_bundle(folder).weights
    return {
        f"{name}.{key}": tensor.numpy()
        for name in weights
        if name != "judgement"
        for key, tensor in weights[name].items()
    }


def are_equal(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return table_of_images(tmp_path_factory.mktemp("table") / "data")


@pytest.fixture(scope="module")
def model(table, tmp_path_factory):
    """A model that has learned the two shapes."""
    out = tmp_path_factory.mktemp("model") / "m"
    volseg.train(table, recipe=recipe("shape", {"epochs": 25}), out=out)
    return out


def test_shapes_are_learned_and_the_test_split_is_not_touched(model, table, tmp_path):
    bundle = load_image_bundle(model)
    assert bundle.recipe.data.names == SHAPES and not bundle.recipe.open_keys
    assert bundle.metrics["validation_auc"] > 0.8
    validated = {row["case_id"] for row in rows_of(model / "validation.csv")}
    splits = {row["image"]: row["split"] for row in rows_of(table / "cases.csv")}
    assert {splits[f"images/{name}.png"] for name in validated} == {"val"}
    result = volseg.infer(table, model=model, out=tmp_path / "r")
    rows = rows_of(tmp_path / "r" / "classes.csv")
    assert len(rows) == 48 and result.exit_code == 0
    for row in rows:
        probabilities = [float(row[f"probability_{name}"]) for name in SHAPES]
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        assert row["class_name"] == SHAPES[int(np.argmax(probabilities))]
        assert row["class_name"] in row["confidence_set"].split("|")
        ranked = [SHAPES[k] for k in np.argsort(probabilities)[::-1]]
        assert row["top_classes"] == "|".join(ranked)


@pytest.mark.parametrize(
    ("target", "score"), [("area", "mae"), pytest.param("labels", "auc", marks=pytest.mark.slow)]
)
def test_numbers_and_several_labels_are_learned_too(target, score, table, tmp_path):
    report = volseg.train(table, recipe=recipe(target), out=tmp_path / "m")
    assert f"validation_{score}" in report.metrics
    volseg.infer(table, model=tmp_path / "m", out=tmp_path / "r")
    if target == "area":
        for row in rows_of(tmp_path / "r" / "values.csv"):
            assert float(row["value_low"]) < float(row["value"]) < float(row["value_high"])
    else:
        names = load_image_bundle(tmp_path / "m").recipe.data.names
        assert names == ("disc", "large", "square")
        for row in rows_of(tmp_path / "r" / "classes.csv"):
            present = [name for name in names if float(row[f"probability_{name}"]) >= 0.5]
            assert row["class_name"] == "|".join(present)
        judgement = load_image_bundle(tmp_path / "m").judgement
        for row in rows_of(tmp_path / "r" / "classes.csv"):
            p = np.array([[float(row[f"probability_{name}"]) for name in names]])
            inside = judgement.sets.sets(p)[0]
            assert row["confidence_set"] == "|".join(np.array(names)[inside])
        summary = volseg.evaluate(
            reference=table, predicted=tmp_path / "r", target="labels", out=tmp_path / "e"
        ).summary
        assert set(summary["confidence_sets"]["coverage_of_class"]) == set(names)


def test_a_folder_per_class_needs_no_recipe(tmp_path):
    folder_of_classes(tmp_path / "data", n=8)
    report = volseg.train(tmp_path / "data", out=tmp_path / "m", epochs=1)
    assert report.exit_code == 0
    card = (tmp_path / "m" / "card.md").read_text(encoding="utf-8")
    assert "disc" in card and "| images.pixels | 32 |" in card


@pytest.mark.slow
def test_a_plan_is_a_recipe_and_a_prepared_folder_trains_to_the_same_weights(table, tmp_path):
    stated = recipe("shape", {"epochs": 2})
    plan = volseg.plan(table, recipe=stated, out=tmp_path / "plan.toml")
    assert plan.cases == 24 and all(line["reason"] for line in plan.reasons)
    volseg.preprocess(table, recipe=stated, out=tmp_path / "prepared")
    for name, dataset, given in (
        ("stated", table, stated),
        ("planned", table, tmp_path / "plan.toml"),
        ("loaded", tmp_path / "prepared", None),
    ):
        volseg.train(dataset, recipe=given, out=tmp_path / name)
    weights = weights_of(tmp_path / "stated")
    assert are_equal(weights, weights_of(tmp_path / "planned"))
    assert are_equal(weights, weights_of(tmp_path / "loaded"))


@pytest.mark.slow
def test_an_interrupted_run_resumes_to_the_weights_of_an_unbroken_one(table, tmp_path):
    stated = recipe("shape", {"epochs": 3, "augment": {"mixup": 0.2}})
    volseg.train(table, recipe=stated, out=tmp_path / "whole")

    def interrupt(stage, done, detail):
        if detail.startswith("epoch 2"):
            raise KeyboardInterrupt

    stopped = volseg.train(table, recipe=stated, out=tmp_path / "parts", progress=interrupt)
    assert stopped.interrupted
    with pytest.raises(VolsegError, match="interrupted training run"):
        volseg.train(table, recipe=stated, out=tmp_path / "parts")
    volseg.train(table, recipe=stated, out=tmp_path / "parts", resume=True)
    assert are_equal(weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts"))
    assert not list((tmp_path / "parts" / ".training").rglob("*.npy"))


@pytest.mark.slow
def test_another_data_set_or_recipe_is_not_resumed(table, tmp_path):
    """The images of the interrupted run are kept, and would be trained on unasked."""
    stated = recipe("shape", {"epochs": 3})

    def interrupt(stage, done, detail):
        if detail.startswith("epoch 2"):
            raise KeyboardInterrupt

    data = shutil.copytree(table, tmp_path / "data")
    volseg.train(data, recipe=stated, out=tmp_path / "m", progress=interrupt)
    before = (tmp_path / "m" / "model.json").read_bytes()
    cells = (data / "cases.csv").read_text(encoding="utf-8")
    other = recipe("shape", {"epochs": 3}, images={"pixels": 16})
    (data / "cases.csv").write_text(cells.replace("disc", "ring", 1), encoding="utf-8")
    for dataset, given, difference in (
        (table_of_images(tmp_path / "other", seed=1), stated, "the data set"),
        (data, stated, "what it says of its images"),
        (table, other, r"\[images\] of the recipe"),
    ):
        with pytest.raises(VolsegError, match=difference) as error:
            volseg.train(dataset, recipe=given, out=tmp_path / "m", resume=True)
        assert error.value.code == "E_PREPARED" and "another --out" in error.value.fix
    assert (tmp_path / "m" / "model.json").read_bytes() == before
    (tmp_path / "moved").mkdir()
    moved = shutil.move(table_of_images(tmp_path / "same"), tmp_path / "moved")
    volseg.train(moved, recipe=stated, out=tmp_path / "m", resume=True)


def test_images_prepared_for_a_refused_call_are_not_trained_on(model, table, tmp_path):
    other = table_of_images(tmp_path / "other", n=24, seed=1)
    with pytest.raises(VolsegError, match="its classes differ"):
        volseg.train(table, recipe=recipe("labels"), teacher=model, out=tmp_path / "m")
    volseg.train(other, recipe=recipe("shape", {"epochs": 1}), out=tmp_path / "m", resume=True)
    assert load_image_bundle(tmp_path / "m").fingerprint.n_images == 12


@pytest.mark.slow
def test_folds_keep_patients_together_and_validate_every_image_once(table, tmp_path):
    stated = recipe("shape", {"epochs": 1})
    volseg.train(table, recipe=stated, out=tmp_path / "m", folds=3)
    rows = rows_of(tmp_path / "m" / "validation.csv")
    assert len(rows) == len({row["case_id"] for row in rows}) == 36  # all but the test split
    folds_of = {}
    for row in rows:
        folds_of.setdefault(row["patient"], set()).add(row["fold"])
    assert all(len(folds) == 1 for folds in folds_of.values())
    assert len(load_image_bundle(tmp_path / "m").network_names) == 3


def test_a_bad_image_is_a_failed_row_and_a_second_call_does_only_what_is_missing(
    model, table, tmp_path
):
    shutil.copytree(table / "images", tmp_path / "images")
    (tmp_path / "images" / "000.png").write_bytes(b"\x89PNG broken")
    result = volseg.infer(tmp_path / "images", model=model, out=tmp_path / "r")
    assert list(result.failed) == ["000"] and result.exit_code == 3 and len(result.done) == 47
    before = {row["case_id"]: row for row in rows_of(tmp_path / "r" / "classes.csv")}
    assert before["000"]["status"] == "failed" and before["000"]["error"].startswith("E_")
    shutil.copy(table / "images" / "000.png", tmp_path / "images")
    again = volseg.infer(tmp_path / "images", model=model, out=tmp_path / "r")
    assert list(again.done) == ["000"] and len(again.kept) == 47
    after = {row["case_id"]: row for row in rows_of(tmp_path / "r" / "classes.csv")}
    assert after["000"]["status"] == "done" and after["001"] == before["001"]


def test_an_image_that_triggers_a_bug_is_a_failed_row_and_the_others_continue(
    model, table, tmp_path, monkeypatch
):
    network_input = FileSource.network_input

    def with_bug(source, case, settings):
        if case.id == "002":
            raise ZeroDivisionError("a bug")
        return network_input(source, case, settings)

    monkeypatch.setattr(FileSource, "network_input", with_bug)
    images = sorted((table / "images").glob("*.png"))[:4]
    result = volseg.infer(images, model=model, out=tmp_path / "r", pages=False)
    assert list(result.done) == ["000", "001", "003"] and result.exit_code == 3
    row = rows_of(tmp_path / "r" / "classes.csv")[2]
    assert row["status"] == "failed" and row["error"].startswith("E_BUG: unexpected ZeroDivision")
    (trace,) = (tmp_path / "r" / ".volseg").glob("*.traceback.txt")
    assert "with_bug" in trace.read_text(encoding="utf-8") and str(trace) in row["error"]


def test_predictions_of_another_target_are_not_replaced_and_those_of_another_model_are_named(
    model, table, tmp_path
):
    images = sorted((table / "images").glob("*.png"))
    volseg.infer(images[:4], model=model, out=tmp_path / "r", pages=False)
    other = shutil.copytree(model, tmp_path / "other")
    content = json.loads((other / "model.json").read_text(encoding="utf-8"))
    content["recipe"]["name"] = "second"
    (other / "model.json").write_text(json.dumps(content), encoding="utf-8")
    result = volseg.infer(images[2:6], model=other, out=tmp_path / "r", pages=False)
    assert [text for text in result.warnings if text.startswith("W_STALE")] == [
        "W_STALE: the table also holds 2 images that an earlier call predicted with another model "
        "or other options (000, 001); give another --out for a table without them"
    ]
    assert len(rows_of(tmp_path / "r" / "classes.csv")) == 6
    content["recipe"]["data"]["target"] = "outline"
    (other / "model.json").write_text(json.dumps(content), encoding="utf-8")
    before = (tmp_path / "r" / "classes.csv").read_bytes()
    with pytest.raises(
        VolsegError, match=r"predictions of shape .*, and second@\w+ predicts outline"
    ):
        volseg.infer(images, model=other, out=tmp_path / "r")
    assert (tmp_path / "r" / "classes.csv").read_bytes() == before


def test_masks_and_classes_do_not_share_a_results_folder(model, table, tmp_path):
    scan, mask = (f"sample_data/{kind}/phantom_15.nii.gz" for kind in ("images", "labels"))
    volseg.measure(image=scan, mask=mask, out=tmp_path / "r", pages=False)
    with pytest.raises(VolsegError, match="holds the results of measure"):
        volseg.infer(table, model=model, out=tmp_path / "r")


@pytest.mark.slow
def test_a_model_knows_the_images_that_it_learned_from(tmp_path):
    """Also under another name, where the data set states no split, and slice by slice."""
    data = folder_of_classes(tmp_path / "data", n=8)
    volseg.train(data, recipe=recipe("class", {"epochs": 1}), out=tmp_path / "m")
    held_out = {row["case_id"] for row in rows_of(tmp_path / "m" / "validation.csv")}
    learned = {path.stem for path in data.rglob("*.png")} - held_out
    new = folder_of_classes(tmp_path / "new", n=2, seed=1)
    shutil.copy(next(data.rglob(f"{min(learned)}.png")), new / SHAPES[0] / "renamed.png")
    for inputs, expected in ((data, learned), (new, {"renamed"})):
        out = tmp_path / f"{inputs.name}_results"
        result = volseg.infer(inputs, model=tmp_path / "m", out=out, pages=False)
        (warning,) = (text for text in result.warnings if text.startswith("W_TRAINING"))
        assert f"{len(expected)} image" in warning
        run = json.loads((out / "run.json").read_text(encoding="utf-8"))
        assert set(run["training_images"]) == expected
        judged = volseg.evaluate(reference=inputs, predicted=out, out=tmp_path / "e")
        (warning,) = (text for text in judged.warnings if text.startswith("W_TRAINING"))
        assert f"{len(expected)} training case" in warning
    (only,) = (new / SHAPES[0]).glob("renamed.png")
    only.unlink()
    result = volseg.infer(new, model=tmp_path / "m", out=tmp_path / "fresh", pages=False)
    assert not any(text.startswith("W_TRAINING") for text in result.warnings)


def test_baselines_predict_the_same_images_and_a_second_call_computes_none_of_them_again(
    model, table, tmp_path, monkeypatch
):
    results = tmp_path / "r"
    volseg.infer(table, model=model, out=results)
    fitted = [baseline for baseline in load_baselines(model) if not baseline.reason]
    rows = rows_of(results / "baselines.csv")
    assert len(fitted) == 5 and len(rows) == 48 * 5 * 2
    prepared = tmp_path / "prepared"
    volseg.preprocess(table, recipe=load_image_bundle(model).recipe, out=prepared)
    images, _ = read_prepared_images(prepared)  # without the test split
    predicted = {baseline.name: baseline.predict(images.pixels) for baseline in fitted}
    for number, case in enumerate(images.cases):
        for row in (row for row in rows if row["case_id"] == case.id):
            expected = predicted[row["baseline"]][number, SHAPES.index(row["class_name"])]
            assert float(row["probability"]) == pytest.approx(expected, abs=1e-5)
    run = json.loads((results / "run.json").read_text(encoding="utf-8"))
    assert run["baselines"] == [baseline.name for baseline in fitted]
    before = (results / "baselines.csv").read_bytes()
    computed = []
    monkeypatch.setattr(baseline_tables, "image_features", computed.append)
    again = volseg.infer(table, model=model, out=results)
    assert len(again.kept) == 48 and not computed
    assert (results / "baselines.csv").read_bytes() == before
    monkeypatch.undo()
    (results / "baselines.csv").unlink()
    assert len(volseg.infer(table, model=model, out=results).done) == 48
    assert (results / "baselines.csv").read_bytes() == before
    summary = volseg.evaluate(
        reference=table, predicted=results, target="shape", out=tmp_path / "e"
    ).summary
    assert list(summary["baselines"]) == run["baselines"]


def test_a_model_without_baselines_has_no_table_of_them(table, tmp_path):
    stated = recipe("area", {"epochs": 1, "baselines": False})
    volseg.train(table, recipe=stated, out=tmp_path / "m")
    volseg.infer(table, model=tmp_path / "m", out=tmp_path / "r")
    assert not (tmp_path / "r" / "baselines.csv").exists()


def test_check_recomputes_the_prediction_of_the_reference_image(model, tmp_path):
    assert volseg.check(model) == []
    shutil.copytree(model, tmp_path / "m")
    description = json.loads((tmp_path / "m" / "model.json").read_text(encoding="utf-8"))
    description["recipe"]["infer"]["tta_axes"] = ["horizontal"]
    (tmp_path / "m" / "model.json").write_text(json.dumps(description), encoding="utf-8")
    assert [problem["code"] for problem in volseg.check(tmp_path / "m")] == ["E_REFERENCE"]


def test_check_of_a_model_lists_the_images_whose_class_it_contradicts(model, tmp_path):
    shutil.copytree(model, tmp_path / "m")
    lines = [
        f"i{n},i{n},0,{SHAPES[n % 2]},{0.9 - 0.8 * (n % 2)},{0.1 + 0.8 * (n % 2)}"
        for n in range(20)
    ]
    lines += ["likely,p,0,disc,0.08,0.92", "sure,p,0,disc,0.05,0.95", "open,p,0,disc,0.4,0.6"]
    head = "case_id,patient,fold,target,probability_disc,probability_square"
    (tmp_path / "m" / "validation.csv").write_text("\n".join([head, *lines]))
    summary, *listed = volseg.check(tmp_path / "m")
    assert {problem["code"] for problem in (summary, *listed)} == {"W_LABEL"}
    assert "2 of 23 validation images may have a wrong class: sure" in summary["problem"]
    assert [problem["where"] for problem in listed] == ["sure", "likely"]
    text = "is labelled 'disc' (probability 0.050), but looks like 'square' (probability 0.950)"
    assert listed[0]["problem"].startswith(text)
    assert load_image_bundle(model).metrics["doubtful_labels"] == 0
    (tmp_path / "m" / "validation.csv").write_text("case_id,target\n1,disc\n")
    assert [problem["code"] for problem in volseg.check(tmp_path / "m")] == ["E_ROW"]


@pytest.mark.slow
def test_planted_label_errors_are_named_by_training_in_folds(tmp_path):
    """Of 12 errors in 240 images, 7 were found, and nothing else."""
    deeper = {"name": "cnn_small", "features": (8, 16, 32)}
    data = folder_of_classes(tmp_path / "data", n=120)
    rng = np.random.default_rng(0)
    for shape, other in (SHAPES, SHAPES[::-1]):
        for number in rng.choice(120, 6, replace=False):
            name = f"{shape}_{number:03}.png"
            (data / shape / name).rename(data / other / name)
    report = volseg.train(
        data,
        recipe=recipe("class", {"epochs": 30, "baselines": False}, network=deeper),
        out=tmp_path / "m",
        folds=3,
    )
    (warning,) = (text for text in report.warnings if text.startswith("W_LABEL"))
    listed = [problem["where"] for problem in volseg.check(tmp_path / "m")[1:]]
    assert warning.startswith(f"W_LABEL: {len(listed)} of 240 validation images")
    folders = {path.stem: path.parent.name for path in data.glob("*/*.png")}
    flipped = [name for name in listed if not name.startswith(folders[name])]
    assert len(flipped) >= 5 and len(flipped) / len(listed) > 0.7


def test_a_recipe_of_the_other_task_is_refused(table, tmp_path):
    with pytest.raises(VolsegError) as refusal:
        volseg.train(table, recipe="smoke", out=tmp_path / "m")
    assert refusal.value.code in ("E_DATASET", "E_TASK")


def test_a_target_that_is_not_stated_or_not_there_is_refused(table, tmp_path):
    with pytest.raises(VolsegError, match="shape, area, labels"):
        volseg.train(table, out=tmp_path / "m")
    with pytest.raises(VolsegError, match="colour"):
        volseg.train(table, target="colour", out=tmp_path / "m")
    assert not (tmp_path / "m" / "model.json").exists()


@pytest.mark.slow
def test_what_cannot_start_or_teach_is_named(model, table, tmp_path):
    other = recipe("shape", network={"name": "cnn_small", "features": (12, 24)})
    with pytest.raises(VolsegError, match=f"^{model}: the weights do not fit the network"):
        volseg.train(table, recipe=other, init=model, out=tmp_path / "m")
    with pytest.raises(VolsegError, match="--target area: 'shapes' has the target 'shape'"):
        volseg.train(table, target="area", teacher=model, out=tmp_path / "m")


@pytest.mark.slow
def test_a_student_learns_from_a_teacher_and_a_vgg_is_pruned_and_fine_tuned(table, tmp_path):
    vgg = {"name": "vgg", "depth": 11, "widths": [8, 8, 16, 16, 16, 16, 16, 16]}
    large = recipe("shape", {"epochs": 1}, network=vgg)
    volseg.train(table, recipe=large, out=tmp_path / "vgg")
    volseg.train(
        table,
        target="shape",
        init=tmp_path / "vgg",
        prune=0.5,
        out=tmp_path / "pruned",
        epochs=1,
    )
    sizes = [
        sum(tensor.size for tensor in weights_of(tmp_path / name).values())
        for name in ("vgg", "pruned")
    ]
    assert sizes[1] < 0.35 * sizes[0]
    taught = volseg.train(table, teacher=tmp_path / "vgg", out=tmp_path / "student", epochs=1)
    student = load_image_bundle(tmp_path / "student")
    assert taught.exit_code == 0 and student.recipe.network.name == "cnn_small"
    assert student.recipe.network.settings["features"][0] == 8  # a quarter of the usual width
    assert student.recipe.images == load_image_bundle(tmp_path / "vgg").recipe.images
    with pytest.raises(VolsegError, match="classes differ"):
        volseg.train(
            table, recipe=recipe("labels"), teacher=tmp_path / "vgg", out=tmp_path / "other"
        )


@pytest.mark.slow
def test_pretrained_weights_are_a_start(table, tmp_path):
    report = volseg.pretrain(table, recipe=recipe("shape", {"epochs": 1}), out=tmp_path / "p")
    assert report.metrics["training_images"] == 24
    lines = []
    volseg.train(
        table,
        recipe=recipe("shape", {"epochs": 1}),
        init=tmp_path / "p",
        out=tmp_path / "m",
        announce=lines.append,
    )
    (summary,) = (line for line in lines if "tensors" in line)
    assert "2 random" in summary  # the head alone
    size = Start.read(tmp_path / "p").seen.pixels
    assert load_image_bundle(tmp_path / "m").recipe.images.pixels == size == 32


@pytest.mark.slow
def test_no_model_is_trained_over_another(model, table, tmp_path):
    """Their files have the same names, and volseg may overwrite what it wrote."""
    volseg.pretrain(table, recipe=recipe("shape", {"epochs": 1}), out=tmp_path / "p")
    trained = shutil.copytree(model, tmp_path / "m")

    def interrupt(stage, done, detail):
        if detail.startswith("epoch 2"):
            raise KeyboardInterrupt

    stated = recipe("shape", {"epochs": 3})
    volseg.train(table, recipe=stated, out=tmp_path / "i", progress=interrupt)
    folders = {tmp_path / "p": "finished", trained: "finished", tmp_path / "i": "interrupted"}
    for folder, problem in folders.items():
        before = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
        for command in (volseg.pretrain, volseg.train):
            with pytest.raises(VolsegError, match=f"^{folder}: holds an? {problem}") as error:
                command(table, recipe=stated, out=folder)
            assert error.value.code == "E_EXISTS"
        assert before == {path: path.read_bytes() for path in folder.rglob("*.safetensors")}


@pytest.mark.parametrize("line", ['loss.name = "focl"', 'monitor = "aucc"', 'loss.name = "mae"'])
def test_check_of_a_recipe_names_a_misspelt_loss_or_score(line, tmp_path):
    """Its target is left to the plan, so only the name is wrong for certain."""
    path = tmp_path / "r.toml"
    head = 'task = "classify"\nname = "x"\ndescription = "X."\n[data]\ntarget = "shape"\n'
    path.write_text(f'{head}[network]\nname = "cnn_small"\n[train]\n{line}\n', encoding="utf-8")
    (problem,) = volseg.check(path)
    assert problem["code"] == "E_RECIPE" and "is unknown" in problem["problem"]


def test_check_with_a_recipe_names_each_cell_that_is_no_class_of_it(table):
    stated = recipe("shape").model_dump()
    stated["data"] |= {"kind": "classes", "classes": ["disc", "triangle"]}
    problems = volseg.check(table, ClassifyRecipe.model_validate(stated))
    wrong = [problem for problem in problems if problem["code"] == "E_TARGET"]
    assert len(wrong) == 24 and all("'square'" in problem["problem"] for problem in wrong)
    assert not [p for p in volseg.check(table, recipe("shape")) if p["code"].startswith("E_")]


@pytest.mark.slow
def test_each_lesion_of_a_scan_is_classified_from_slices_in_three_planes(tmp_path):
    scans = scans_of_lesions(tmp_path / "data")
    stated = recipe(
        "kind",
        {"epochs": 12},
        data={"input": "lesion", "target": "kind"},
        images={
            "pixels": 16,
            "field_of_view_mm": 16,
            "normalise": {"method": "window", "low": -200, "high": 200},
        },
    )
    report = volseg.train(scans, recipe=stated, out=tmp_path / "m")
    assert report.metrics["validation_auc"] == 1.0
    volseg.infer(scans, model=tmp_path / "m", out=tmp_path / "r")
    rows = rows_of(tmp_path / "r" / "classes.csv")
    kinds = {row["image"][7:10]: row["kind"] for row in rows_of(scans / "cases.csv")}
    assert len(rows) == 16 and {"s02_1", "s02_2"} <= {row["case_id"] for row in rows}
    right = [row["class_name"] == kinds[row["case_id"][:3]] for row in rows]
    assert np.mean(right) > 0.9
    page = tmp_path / "r" / "report.html"
    assert page.stat().st_size > 20_000
    pictures = page.read_text().count("/9j/")  # how base64 of a JPEG begins
    page.unlink()
    assert volseg.report(tmp_path / "r").done == ["report.html"]
    assert page.read_text().count("/9j/") == pictures > 10
    with pytest.raises(VolsegError, match="no scan has a mask"):
        volseg.infer(scans / "images" / "s00.nii.gz", model=tmp_path / "m", out=tmp_path / "x")


@pytest.mark.slow
def test_a_fusion_weighs_the_measurement_that_tells_the_classes(tmp_path):
    scans = scans_of_lesions(tmp_path / "data", n=24)
    stated = recipe(
        "kind",
        {"epochs": 1, "augment": {"mask_jitter_mm": 1.0}},
        data={"input": "lesion", "target": "kind"},
        images={
            "pixels": 16,
            "field_of_view_mm": 16,
            "normalise": {"method": "window", "low": -200, "high": 200},
        },
        fusion={"measurements": ["volume_ml", "intensity_mean", "sphericity"]},
    )
    report = volseg.train(scans, recipe=stated, out=tmp_path / "m", folds=2)
    assert report.metrics["validation_auc"] == 1.0
    fusion = load_image_bundle(tmp_path / "m").judgement.fusion
    weights = dict(zip(("image", *fusion.names), np.abs(fusion.weights).tolist(), strict=True))
    del weights["image"]
    assert max(weights, key=lambda name: weights[name]) == "intensity_mean"
    assert not [p for p in volseg.check(tmp_path / "m") if p["code"].startswith("E_")]
    volseg.infer(scans, model=tmp_path / "m", out=tmp_path / "r")
    kinds = {row["image"][7:10]: row["kind"] for row in rows_of(scans / "cases.csv")}
    rows = rows_of(tmp_path / "r" / "classes.csv")
    assert all(row["class_name"] == kinds[row["case_id"][:3]] for row in rows)
    with pytest.raises(VolsegError, match=r"too few for \[fusion\]: a fusion needs 5 lesions"):
        volseg.train(scans, recipe=stated, out=tmp_path / "few")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"fusion": {"measurements": ["volume_ml"]}}, 'fusion needs input = "lesion"'),
        ({"train": {"augment": {"mask_jitter_mm": 1}}}, "mask_jitter_mm needs input"),
        (
            {
                "data": {"input": "lesion", "target": "x", "kind": "number"},
                "fusion": {"measurements": ["volume_ml"]},
            },
            "fusion needs two classes",
        ),
    ],
)
def test_what_only_lesions_of_two_classes_have_is_refused_elsewhere(sections, message):
    content = recipe("x").model_dump() | sections
    with pytest.raises(VolsegError, match=message):
        parse_image_recipe(content, where="test")


def test_an_unknown_measurement_is_named():
    stated = recipe(
        "x", data={"input": "lesion", "target": "x"}, fusion={"measurements": ["volum"]}
    )
    (problem,) = image_recipe_problems(stated)
    assert "measurement 'volum' is unknown" in problem.problem
    assert "volume_ml" in problem.fix


@pytest.mark.slow
def test_a_preview_shows_augmented_images_and_trains_nothing(table, tmp_path):
    report = volseg.train(table, recipe=recipe("shape"), out=tmp_path / "m", preview=True)
    with Image.open(report.preview) as picture:
        assert picture.width > 300 and np.unique(np.asarray(picture.convert("L"))).size > 50
    assert not (tmp_path / "m" / "model.json").exists()


def test_report_rebuilds_the_page_of_classified_images_and_keeps_it_without_them(
    model, table, tmp_path
):
    data = shutil.copytree(table, tmp_path / "data")
    results, page = tmp_path / "results", tmp_path / "results" / "report.html"
    volseg.infer(data, model=model, out=results)
    first, tables = page.read_text(), (results / "classes.csv").read_bytes()
    page.unlink()
    assert volseg.report(results).done == ["report.html"]
    assert (results / "classes.csv").read_bytes() == tables
    before, jpeg = page.read_text(), "/9j/"  # how base64 of a JPEG begins
    assert len(before) == len(first) and before.count(jpeg) == first.count(jpeg) > 10
    shutil.rmtree(data)
    kept = volseg.report(results)
    assert kept.kept == ["report.html"] and page.read_text() == before
    assert any("earlier page stays" in warning for warning in kept.warnings)
    with pytest.raises(VolsegError, match="a review is of lesions"):
        volseg.report(results, review=results / "classes.csv")
    for damage in ("{", "[]", '{"target": "shape"}'):
        (results / "run.json").write_text(damage)
        with pytest.raises(VolsegError, match=r"run\.json: cannot be read"):
            volseg.report(results)
        assert page.read_text() == before


@pytest.mark.parametrize("content", [b"", b"x\n1\n", b"case_id,class\na,disc\n", None])
def test_a_table_that_is_none_leaves_the_page(content, model, table, tmp_path):
    volseg.infer(table, model=model, out=tmp_path)
    page, path = (tmp_path / "report.html").read_bytes(), tmp_path / "classes.csv"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(VolsegError, match=f"{path}: cannot be read") as error:
        volseg.report(tmp_path)
    assert error.value.code == "E_ROW" and (tmp_path / "report.html").read_bytes() == page


def test_few_patients_are_divided_as_far_as_they_can_be(tmp_path):
    data = table_of_images(tmp_path / "data", n=12)
    rows = [{**row, "split": ""} for row in rows_of(data / "cases.csv")]
    for row in rows:
        row["patient"] = f"p{int(row['image'][7:10]) // 2 % 3}"
    write_rows(data / "cases.csv", rows)
    volseg.train(data, recipe=recipe("shape", {"epochs": 1}), out=tmp_path / "m", folds=3)
    validated = rows_of(tmp_path / "m" / "validation.csv")
    assert len(validated) == 12
    assert all(len({r["fold"] for r in validated if r["patient"] == f"p{n}"}) == 1 for n in (0, 1))
    with pytest.raises(VolsegError, match=r"3 patients .* divided into 4 parts"):
        volseg.train(data, recipe=recipe("shape"), out=tmp_path / "n", folds=4)
    assert volseg.plan(data, recipe=recipe("shape")).recipe["data"]["classes"] == list(SHAPES)


def test_a_data_set_without_training_images_is_named(tmp_path):
    data = table_of_images(tmp_path / "data", n=12)
    rows = rows_of(data / "cases.csv")
    for column, cell, problem in (
        ("split", "test", "every image is of the test split"),
        ("split", "val", "0 training and 12 validation images are too few"),
        ("shape", "", "column 'shape' is blank"),
        ("shape", "disc", "column 'shape' holds only 'disc'"),
    ):
        write_rows(data / "cases.csv", [{**row, "split": "", column: cell} for row in rows])
        with pytest.raises(VolsegError, match=f"^{data}: {problem}"):
            volseg.plan(data, recipe=recipe("shape"))


def test_the_plan_normalises_intensities_as_the_files_allow(tmp_path):
    rng = np.random.default_rng(0)
    data = folder_of_classes(tmp_path / "png", n=6)
    volumes = {"ct": rng.normal(-400, 300, (6, 24, 24)), "mr": rng.gamma(2, 200, (6, 24, 24))}
    planned = {"png": volseg.plan(data)}
    for name, arrays in volumes.items():
        folder = tmp_path / name
        for number, array in enumerate(arrays):
            path = folder / ("ab"[number % 2]) / f"{number}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array.astype(np.float32)).save(path)
        planned[name] = volseg.plan(folder)
    methods = {n: report.recipe["images"]["normalise"]["method"] for n, report in planned.items()}
    assert methods == {"png": "scale", "ct": "window", "mr": "percentile"}
    (line,) = (one for one in planned["ct"].reasons if one["key"] == "images.normalise")
    assert "0.5 to the 99.5 percentile" in line["reason"]


def test_an_image_that_the_recipe_cannot_scale_is_left_out_by_name(tmp_path):
    data = folder_of_classes(tmp_path / "data", n=8)
    Image.fromarray(np.ones((32, 32), np.float32)).save(data / "disc" / "float.tif")
    scaled = recipe("class", {"epochs": 1}, images={"normalise": {"method": "scale"}})
    report = volseg.train(data, recipe=scaled, out=tmp_path / "m")
    assert report.metrics["training_images"] + report.metrics["validation_images"] == 16
    assert any("W_LEFT_OUT: images" in text and "float" in text for text in report.warnings)


def test_a_class_that_validation_lacks_is_a_warning(tmp_path):
    data = folder_of_classes(tmp_path / "data", n=6)
    for split, shapes in (("train", SHAPES), ("val", SHAPES[:1])):
        for shape in shapes:
            (data / split).mkdir(exist_ok=True)
            shutil.copytree(data / shape, data / split / shape)
    for shape in SHAPES:
        shutil.rmtree(data / shape)
    for path in (data / "val").rglob("*.png"):
        path.rename(path.with_name(f"v{path.name}"))
    (remark,) = (r for r in volseg.plan(data).warnings if r.startswith("W_CLASS_SPLIT"))
    assert f"no validation image is of {SHAPES[1]}, so nothing says how well" in remark


def test_an_image_that_cannot_be_read_is_named_and_the_others_are_trained_on(tmp_path):
    data = folder_of_classes(tmp_path / "data", n=8)
    (data / "disc" / "disc_003.png").write_bytes(b"\x89PNG broken")
    lines = []
    report = volseg.train(
        data, recipe=recipe("class", {"epochs": 1}), out=tmp_path / "m", announce=lines.append
    )
    assert any(line.startswith("failed: disc_003: E_") for line in lines)
    assert any("W_LEFT_OUT: images" in text and "disc_003" in text for text in report.warnings)
    assert report.metrics["training_images"] + report.metrics["validation_images"] == 15


@pytest.mark.parametrize("target", [pytest.param("label", marks=pytest.mark.slow), "kind"])
@pytest.mark.slow
def test_slices_are_judged_by_the_data_set_that_they_were_trained_on(target, tmp_path):
    """A row of the table is a scan, and a prediction is a slice of it."""
    scans = scans_of_lesions(tmp_path / "data", n=8)
    volseg.train(scans, recipe=recipe(target, {"epochs": 1}), out=tmp_path / "m")
    volseg.infer(scans, model=tmp_path / "m", out=tmp_path / "r")
    volseg.evaluate(reference=scans, predicted=tmp_path / "r", out=tmp_path / "e")
    truths = {row["case_id"]: row for row in rows_of(tmp_path / "e" / "evaluation.csv")}
    assert len(truths) == 8 * 14
    for row in rows_of(scans / "cases.csv"):
        mask = nibabel.nifti1.load(scans / row["label"]).get_fdata()
        for index in range(14):
            name = f"{row['image'][7:10]}_s{index:03}"
            has_label = "with label" if mask[..., index].any() else "without label"
            assert truths[name]["reference"] == (row["kind"] if target == "kind" else has_label)
            assert truths[name]["patient"] == row["image"][7:10]


@pytest.mark.slow
def test_lesions_are_judged_by_the_class_of_their_scan(tmp_path):
    scans = scans_of_lesions(tmp_path / "data", n=8)
    data = {"target": "kind", "input": "lesion"}
    trained = recipe("kind", {"epochs": 1}, data=data)
    volseg.train(scans, recipe=trained, out=tmp_path / "m")
    volseg.infer(scans, model=tmp_path / "m", out=tmp_path / "r")
    volseg.evaluate(reference=scans, predicted=tmp_path / "r", out=tmp_path / "e")
    truths = {row["case_id"]: row for row in rows_of(tmp_path / "e" / "evaluation.csv")}
    kinds = {row["image"][7:10]: row["kind"] for row in rows_of(scans / "cases.csv")}
    assert truths.keys() == {row["case_id"] for row in rows_of(tmp_path / "r" / "classes.csv")}
    assert all(row["reference"] == kinds[name[:3]] for name, row in truths.items())
    assert all(row["patient"] == name[:3] for name, row in truths.items())

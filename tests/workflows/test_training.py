import csv
import shutil

import numpy as np
import pytest
import torch

import volseg
from volseg.bundle import load_bundle
from volseg.errors import VolsegError
from volseg.io.prepared import PreparedCase
from volseg.workflows.training import split_cases


def history(out):
    with (out / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def weights(out):
    return load_bundle(out).weights["segmentation"]


def test_the_model_learned_and_its_folder_holds_nothing_unfinished(model):
    metrics = load_bundle(model).metrics
    assert metrics["validation_dice_lesion"] > 0.7
    assert metrics["validation_cases"] == 2
    assert metrics["classifier_training_lesions"] == 3  # the fourth training case is of grade 3
    lines = history(model)
    assert float(lines[-1]["loss"]) < 0.6 * float(lines[0]["loss"])
    assert not (model / ".training").exists()


def test_a_prepared_folder_and_the_dataset_train_to_the_same_weights(dataset, model, tiny_recipe, tmp_path):
    volseg.preprocess(dataset, recipe=tiny_recipe, out=tmp_path / "p")
    volseg.train(tmp_path / "p", out=tmp_path / "m", device="cpu")
    for name, tensor in weights(model).items():
        torch.testing.assert_close(weights(tmp_path / "m")[name], tensor, atol=1e-4, rtol=1e-3)


class Interrupt(Exception):
    pass


def test_an_interrupted_run_resumes_to_the_weights_of_an_unbroken_one(dataset, model, tiny_recipe, tmp_path):
    def stop_in_epoch_3(stage, share, detail):
        if detail.startswith("epoch 3"):
            raise Interrupt

    out = tmp_path / "m"
    with pytest.raises(Interrupt):
        volseg.train(dataset, recipe=tiny_recipe, out=out, device="cpu", progress=stop_in_epoch_3)
    with pytest.raises(VolsegError, match="add --resume"):
        volseg.train(dataset, recipe=tiny_recipe, out=out, device="cpu")
    with pytest.raises(VolsegError, match="belongs to a run with another recipe, seed"):
        volseg.train(dataset, recipe=tiny_recipe, out=out, device="cpu", resume=True, fold=1)
    volseg.train(dataset, recipe=tiny_recipe, out=out, device="cpu", resume=True)
    assert [line["epoch"] for line in history(out)] == [line["epoch"] for line in history(model)]
    for name, tensor in weights(model).items():
        torch.testing.assert_close(weights(out)[name], tensor, atol=1e-4, rtol=1e-3)


def test_a_finished_model_is_not_overwritten(dataset, model, tiny_recipe):
    with pytest.raises(VolsegError, match="holds a finished model"):
        volseg.train(dataset, recipe=tiny_recipe, out=model)


def test_patience_and_the_time_budget_end_a_run_with_a_usable_model(dataset, tiny_recipe, tmp_path):
    frozen = tiny_recipe.model_copy(update={"train": tiny_recipe.train.model_copy(update={"learning_rate": 1e-12})})
    volseg.train(dataset, recipe=frozen, out=tmp_path / "a", epochs=30, patience=1, device="cpu")
    assert len(history(tmp_path / "a")) < 6
    volseg.train(dataset, recipe=tiny_recipe, out=tmp_path / "b", epochs=10_000, time_budget_seconds=8, device="cpu")
    assert float(history(tmp_path / "b")[-1]["seconds"]) < 30
    assert float(history(tmp_path / "b")[-1]["learning_rate"]) < tiny_recipe.train.learning_rate / 2
    assert load_bundle(tmp_path / "b").segmentation_network() is not None


def test_folds_part_the_patients_and_every_patient_is_held_out_once():
    records = [{"patient": f"p{n // 2}", "split": "train"} for n in range(22)]
    cases = [PreparedCase(str(n), None, None, {}, None, record) for n, record in enumerate(records)]
    held_out = []
    for fold in range(5):
        training, validation = split_cases(cases, fold, seed=0)
        sides = [{case.record["patient"] for case in side} for side in (training, validation)]
        assert not sides[0] & sides[1]
        assert len(training) + len(validation) == 22
        held_out += sorted(sides[1])
    assert sorted(held_out) == sorted({record["patient"] for record in records})


def test_a_run_starts_from_the_weights_of_another_model(dataset, model, tiny_recipe, tmp_path):
    still = tiny_recipe.model_copy(update={"train": tiny_recipe.train.model_copy(update={"learning_rate": 1e-12})})
    volseg.train(dataset, recipe=still, out=tmp_path / "m", init=model, fold=2, epochs=1, device="cpu")
    for name, tensor in weights(model).items():
        torch.testing.assert_close(weights(tmp_path / "m")[name], tensor, atol=1e-5, rtol=1e-5)
    wider = type(tiny_recipe.network)(**tiny_recipe.network.model_dump() | {"features": [16, 24, 24]})
    with pytest.raises(VolsegError, match=r"only \d+ of the \d+ tensors"):
        volseg.train(dataset, recipe=tiny_recipe.model_copy(update={"network": wider}), out=tmp_path / "n", init=model)


def test_another_seed_gives_other_weights(dataset, model, tiny_recipe, tmp_path):
    volseg.train(dataset, recipe=tiny_recipe, out=tmp_path / "m", seed=1, epochs=1, device="cpu")
    first = next(iter(weights(model)))
    assert not np.allclose(weights(model)[first], weights(tmp_path / "m")[first])


def test_a_class_without_a_training_case_leaves_the_model_without_classifier(dataset, tiny_recipe, tmp_path):
    shutil.copytree(dataset, tmp_path / "data")
    table = tmp_path / "data" / "cases.csv"
    table.write_text("\n".join(line[:-1] + "1" if line[-1] == "5" else line for line in table.read_text().splitlines()))
    volseg.train(tmp_path / "data", recipe=tiny_recipe, out=tmp_path / "m", epochs=1, device="cpu")
    bundle = load_bundle(tmp_path / "m")
    assert bundle.classifier_network() is None
    assert bundle.metrics["classifier"] == "not trained: no training case of class high"


def test_requests_that_make_no_sense_are_refused(dataset, model, tiny_recipe, tmp_path):
    with pytest.raises(VolsegError, match="needs a recipe"):
        volseg.train(dataset, out=tmp_path / "m")
    volseg.preprocess(dataset, recipe=tiny_recipe, out=tmp_path / "p")
    with pytest.raises(VolsegError, match="was prepared for recipe 'tiny'"):
        volseg.train(tmp_path / "p", recipe="smoke", out=tmp_path / "m")
    with pytest.raises(VolsegError, match="longer than the time budget"):
        volseg.train(dataset, recipe=tiny_recipe, out=tmp_path / "n", time_budget_seconds=1e-3)

import csv
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import volseg
from volseg.bundle import load_bundle
from volseg.commands.prepared import load_prepared, split_cases
from volseg.errors import VolsegError
from volseg.io.prepared import PreparedCase
from volseg.io.volumes import read_mask, write_volume
from volseg.recipe import Loss
from volseg.training import validator
from volseg.training.checkpoint import load_checkpoint, save_checkpoint
from volseg.training.validate import ScanPredictor, validate


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


@pytest.mark.slow
def test_a_prepared_folder_and_the_dataset_train_to_the_same_weights(
    dataset, model, tiny_recipe, tmp_path
):
    volseg.preprocess(dataset, recipe=tiny_recipe, out=tmp_path / "p")
    volseg.train(tmp_path / "p", out=tmp_path / "m", device="cpu")
    for name, tensor in weights(model).items():
        torch.testing.assert_close(weights(tmp_path / "m")[name], tensor, atol=1e-4, rtol=1e-3)


class Interrupt(Exception):
    pass


def test_an_interrupted_run_resumes_to_the_weights_of_an_unbroken_one(
    dataset, model, tiny_recipe, tmp_path
):
    def stop_in_epoch_3(stage, share, detail):
        if detail.startswith("epoch 3"):
            raise Interrupt

    out = tmp_path / "m"
    with pytest.raises(Interrupt):
        volseg.train(dataset, recipe=tiny_recipe, out=out, device="cpu", progress=stop_in_epoch_3)
    with pytest.raises(VolsegError, match="add --resume"):
        volseg.train(dataset, recipe=tiny_recipe, out=out, device="cpu")
    with pytest.raises(VolsegError, match="belongs to a run with another recipe, seed, fold"):
        volseg.train(dataset, recipe=tiny_recipe, out=out, device="cpu", resume=True, fold=1)
    volseg.train(dataset, recipe=tiny_recipe, out=out, device="cpu", resume=True)
    assert [line["epoch"] for line in history(out)] == [line["epoch"] for line in history(model)]
    for name, tensor in weights(model).items():
        assert torch.equal(weights(out)[name], tensor)


DAMAGE = {
    "of no run": lambda tensors, state: state.pop("identity"),
    "a state of other names": lambda tensors, state: state.update(mood="good"),
    "averages of another network": lambda tensors, state: tensors.update(
        {"averaged.other": torch.ones(3)}
    ),
    "averages of another shape": lambda tensors, state: tensors.update(
        {next(key for key in tensors if key.startswith("averaged.")): torch.ones(3, 7)}
    ),
    "moments of nothing": lambda tensors, state: tensors.update({"optimizer.first": torch.ones(3)}),
}


@pytest.mark.slow
def test_a_checkpoint_that_another_program_changed_is_refused_in_one_line(
    dataset, quick_recipe, tmp_path
):
    def stop_in_epoch_2(stage, share, detail):
        if detail.startswith("epoch 2"):
            raise Interrupt

    out = tmp_path / "m"
    with pytest.raises(Interrupt):
        volseg.train(dataset, recipe=quick_recipe, out=out, device="cpu", progress=stop_in_epoch_2)
    (path,) = (out / ".training").rglob("last.safetensors")
    for damage in DAMAGE.values():
        tensors, state = load_checkpoint(path)
        kept = path.read_bytes()
        damage(tensors, state)
        save_checkpoint(path, tensors, state)
        with pytest.raises(
            VolsegError, match=r"last\.safetensors: not a usable checkpoint"
        ) as caught:
            volseg.train(dataset, recipe=quick_recipe, out=out, device="cpu", resume=True)
        assert caught.value.code == "E_CKPT"
        path.write_bytes(kept)


@pytest.mark.slow
def test_ctrl_c_ends_with_a_usable_model_and_resume_goes_on(dataset, model, tiny_recipe, tmp_path):
    def press_in_epoch_2(stage, share, detail):
        if stage == "Training" and detail.startswith("epoch 2"):
            raise KeyboardInterrupt

    out = tmp_path / "m"
    report = volseg.train(
        dataset, recipe=tiny_recipe, out=out, device="cpu", progress=press_in_epoch_2
    )
    assert report.interrupted
    assert report.metrics["stopped"] == "interrupted"
    assert load_bundle(out).segmentation_network() is not None
    with pytest.raises(
        VolsegError, match="holds an interrupted training run; to fix: add --resume"
    ):
        volseg.train(dataset, recipe=tiny_recipe, out=out, device="cpu")
    report = volseg.train(dataset, recipe=tiny_recipe, out=out, device="cpu", resume=True)
    assert not report.interrupted
    assert "stopped" not in load_bundle(out).metrics
    for name, tensor in weights(model).items():
        assert torch.equal(weights(out)[name], tensor)


@pytest.mark.slow
def test_ctrl_c_before_the_first_validation_leaves_a_usable_model_too(
    dataset, tiny_recipe, tmp_path, monkeypatch
):
    monkeypatch.setattr(validator, "VALIDATION_FRACTION", 1e-6)  # no epoch can afford validation

    def press(stage, share, detail):
        if stage == "Training" and detail.startswith("epoch 1"):
            raise KeyboardInterrupt

    report = volseg.train(
        dataset,
        recipe=changed(tiny_recipe, steps_per_epoch=1),
        out=tmp_path / "m",
        device="cpu",
        time_budget_seconds=3600,
        progress=press,
    )
    assert report.interrupted
    assert history(tmp_path / "m")[0]["validation_dice"] == ""
    assert load_bundle(tmp_path / "m").segmentation_network() is not None


@pytest.fixture(scope="module")
def quick_recipe(tiny_recipe):
    """Return a recipe for tests that need no model that learned anything."""
    return changed(tiny_recipe, steps_per_epoch=3)


def changed(recipe, **train):
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=train)})


def test_a_diverging_loss_is_an_error_that_says_what_to_do(dataset, quick_recipe, tmp_path):
    wild = changed(quick_recipe, learning_rate=1e30, max_grad_norm=1e30)
    with pytest.raises(VolsegError, match=r"the loss became .* lower train.learning_rate"):
        volseg.train(dataset, recipe=wild, out=tmp_path / "m", device="cpu")
    assert not (tmp_path / "m" / "model.json").exists()


@pytest.mark.parametrize(
    "train",
    [
        pytest.param(
            {"optimizer": "sgd", "schedule": "poly", "learning_rate": 1e-2}, marks=pytest.mark.slow
        ),
        {"accumulate": 2, "l1": 1e-6},
        pytest.param(
            {"loss": Loss(overlap="tversky", focal_gamma=1.0, label_smoothing=0.05)},
            marks=pytest.mark.slow,
        ),
        pytest.param({"loss": Loss(overlap="generalised_dice")}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_every_optimizer_and_loss_learns(train, dataset, tiny_recipe, tmp_path):
    volseg.train(
        dataset,
        recipe=changed(tiny_recipe, steps_per_epoch=8, **train),
        out=tmp_path / "m",
        epochs=2,
        device="cpu",
    )
    lines = history(tmp_path / "m")
    assert float(lines[-1]["loss"]) < float(lines[0]["loss"])
    assert 0 <= float(lines[0]["waiting_share"]) < 1


@pytest.mark.slow
def test_deep_supervision_and_dropout_are_for_training_alone(dataset, quick_recipe, tmp_path):
    settings = quick_recipe.network.model_dump() | {"deep_supervision": 1, "dropout": 0.1}
    deep = quick_recipe.model_copy(update={"network": type(quick_recipe.network)(**settings)})
    volseg.train(dataset, recipe=deep, out=tmp_path / "m", epochs=2, device="cpu")
    network = load_bundle(tmp_path / "m").segmentation_network().eval()
    images = torch.randn(1, 1, 16, 16, 16)
    with torch.inference_mode():
        assert network(images).shape == (1, 2, 16, 16, 16)
        assert torch.equal(network(images), network(images))


@pytest.mark.slow
def test_frozen_layers_stay_and_a_pattern_that_matches_none_is_refused(
    dataset, model, quick_recipe, tmp_path
):
    options = {"recipe": quick_recipe, "init": model, "epochs": 1, "device": "cpu"}
    volseg.train(dataset, out=tmp_path / "m", freeze=["input_block.*"], **options)
    before, after = weights(model), weights(tmp_path / "m")
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) == name.startswith("input_block.")
    with pytest.raises(VolsegError, match="no layer matches 'encoder"):
        volseg.train(
            dataset,
            recipe=quick_recipe,
            out=tmp_path / "n",
            freeze=["encoder.*"],
            epochs=1,
            device="cpu",
        )


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(dataset, tiny_recipe, tmp_path):
    steady = changed(tiny_recipe, batch_size=2, steps_per_epoch=4)
    volseg.train(
        dataset,
        recipe=steady,
        out=tmp_path / "two",
        devices=2,
        epochs=2,
        device="cpu",
        precision="fp32",
    )
    volseg.train(
        dataset,
        recipe=changed(steady, batch_size=4),
        out=tmp_path / "one",
        epochs=2,
        device="cpu",
        precision="fp32",
    )
    for one, two in zip(history(tmp_path / "one"), history(tmp_path / "two"), strict=True):
        assert float(two["loss"]) == pytest.approx(float(one["loss"]), abs=1e-4)


@pytest.mark.slow
def test_voxels_that_are_ignored_may_hold_anything(dataset, tiny_recipe, tmp_path):
    shutil.copytree(dataset, tmp_path / "data")
    for path in (tmp_path / "data" / "labels").iterdir():
        mask = read_mask(path)
        array = np.asfortranarray(mask.array)
        array[:, :6] = 9
        write_volume(mask.with_array(array), path)
    with pytest.raises(VolsegError, match="holds values"):
        volseg.train(tmp_path / "data", recipe=tiny_recipe, out=tmp_path / "n", device="cpu")
    ignoring = tiny_recipe.model_copy(
        update={"data": tiny_recipe.data.model_copy(update={"ignore": 9})}
    )
    report = volseg.train(tmp_path / "data", recipe=ignoring, out=tmp_path / "m", device="cpu")
    assert report.metrics["validation_dice_lesion"] > 0.6


def test_a_finished_model_is_not_overwritten(dataset, model, tiny_recipe):
    with pytest.raises(VolsegError, match="holds a finished model"):
        volseg.train(dataset, recipe=tiny_recipe, out=model)


@pytest.mark.slow
def test_patience_and_the_time_budget_end_a_run_with_a_usable_model(
    dataset, quick_recipe, tmp_path
):
    frozen = quick_recipe.model_copy(
        update={"train": quick_recipe.train.model_copy(update={"learning_rate": 1e-12})}
    )
    volseg.train(dataset, recipe=frozen, out=tmp_path / "a", epochs=30, patience=1, device="cpu")
    assert len(history(tmp_path / "a")) < 6
    endless = changed(quick_recipe, steps_per_epoch=100)
    volseg.train(
        dataset, recipe=endless, out=tmp_path / "b", epochs=50, time_budget_seconds=15, device="cpu"
    )
    assert float(history(tmp_path / "b")[-1]["seconds"]) < 40
    assert (
        float(history(tmp_path / "b")[-1]["learning_rate"]) < quick_recipe.train.learning_rate / 2
    )
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


@pytest.mark.slow
def test_a_run_starts_from_the_weights_of_another_model(dataset, model, quick_recipe, tmp_path):
    still = quick_recipe.model_copy(
        update={"train": quick_recipe.train.model_copy(update={"learning_rate": 1e-12})}
    )
    volseg.train(
        dataset, recipe=still, out=tmp_path / "m", init=model, fold=2, epochs=1, device="cpu"
    )
    for name, tensor in weights(model).items():
        torch.testing.assert_close(weights(tmp_path / "m")[name], tensor, atol=1e-5, rtol=1e-5)
    wider = type(quick_recipe.network)(
        **quick_recipe.network.model_dump() | {"features": [16, 24, 24]}
    )
    with pytest.raises(VolsegError, match=r"only \d+ of the \d+ tensors"):
        volseg.train(
            dataset,
            recipe=quick_recipe.model_copy(update={"network": wider}),
            out=tmp_path / "n",
            init=model,
        )


@pytest.mark.slow
def test_another_seed_gives_other_weights(dataset, quick_recipe, tmp_path):
    for out, seed in (("a", 0), ("b", 1)):
        volseg.train(
            dataset, recipe=quick_recipe, out=tmp_path / out, seed=seed, epochs=1, device="cpu"
        )
    first, other = (weights(tmp_path / out) for out in "ab")
    assert not all(torch.allclose(first[name], other[name]) for name in first)


@pytest.mark.slow
def test_the_metrics_of_the_card_are_those_of_the_saved_weights(dataset, tiny_recipe, tmp_path):
    """One of two cases is validated in training; best and last weights are compared on both."""
    recipe = changed(tiny_recipe, validation_cases=1)
    volseg.preprocess(dataset, recipe=recipe, out=tmp_path / "p")
    volseg.train(tmp_path / "p", out=tmp_path / "m", device="cpu")
    bundle = load_bundle(tmp_path / "m")
    _, _, cases = load_prepared(tmp_path / "p", None)
    _, held_out = split_cases(cases, None, 0)
    network = bundle.segmentation_network()
    overlap = recipe.infer.overlap
    predictor = ScanPredictor(network, bundle.recipe, torch.device("cpu"), overlap)
    rows = validate(predictor, held_out)
    with (tmp_path / "m" / "validation.csv").open(newline="") as file:
        written = {row["case_id"]: float(row["dice"]) for row in csv.DictReader(file)}
    assert written == {row.case_id: pytest.approx(row.dice, abs=1e-4) for row in rows}
    assert "4 training cases" in (tmp_path / "m" / "card.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_data_that_go_bad_midway_leave_the_best_weights_before(dataset, quick_recipe, tmp_path):
    volseg.preprocess(dataset, recipe=quick_recipe, out=tmp_path / "p")

    def spoil(stage, share, detail):
        if detail.startswith("epoch 2"):
            for number in range(4):
                path = tmp_path / "p" / "cases" / f"scan_{number}" / "image.npy"
                np.load(path, mmap_mode="r+")[:] = np.nan

    report = volseg.train(tmp_path / "p", out=tmp_path / "m", device="cpu", progress=spoil)
    assert "the loss became nan" in report.metrics["stopped"]
    assert report.metrics["best_epoch"] <= 2
    assert len(history(tmp_path / "m")) == 2
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "m").values())


@pytest.mark.slow
def test_warnings_about_the_data_come_before_the_first_step(dataset, quick_recipe, tmp_path):
    shutil.copytree(dataset, tmp_path / "data")
    path = tmp_path / "data" / "labels" / "scan_1.nii.gz"
    mask = read_mask(path)
    write_volume(mask.with_array(np.zeros_like(mask.array)), path)
    events = []
    options = {"recipe": quick_recipe, "epochs": 1, "device": "cpu", "announce": events.append}
    volseg.train(
        tmp_path / "data", out=tmp_path / "m", progress=lambda *now: events.append(now), **options
    )
    first = next(index for index, entry in enumerate(events) if entry[0] == "Training")
    assert any("W_EMPTY" in entry for entry in events[:first] if isinstance(entry, str))


@pytest.mark.slow
def test_a_class_without_a_training_case_leaves_the_model_without_classifier(
    dataset, quick_recipe, tmp_path
):
    shutil.copytree(dataset, tmp_path / "data")
    table = tmp_path / "data" / "cases.csv"
    table.write_text(
        "\n".join(
            line[:-1] + "1" if line[-1] == "5" else line for line in table.read_text().splitlines()
        )
    )
    volseg.train(tmp_path / "data", recipe=quick_recipe, out=tmp_path / "m", epochs=1, device="cpu")
    bundle = load_bundle(tmp_path / "m")
    assert bundle.classifier_network() is None
    assert bundle.metrics["classifier"] == "not trained: no training case of class high"


def test_requests_that_make_no_sense_are_refused(dataset, model, tiny_recipe, tmp_path):
    with pytest.raises(VolsegError, match="exclude each other"):
        volseg.train(dataset, recipe=tiny_recipe, out=tmp_path / "o", fold=1, folds=3)
    volseg.preprocess(dataset, recipe=tiny_recipe, out=tmp_path / "p")
    with pytest.raises(VolsegError, match="was prepared for recipe 'tiny'"):
        volseg.train(tmp_path / "p", recipe="smoke", out=tmp_path / "m")
    single = changed(tiny_recipe, patch_shape=(4, 4, 4))  # as often as its strides halve it
    with pytest.raises(VolsegError, match="single voxel at the network's coarsest level"):
        volseg.train(dataset, recipe=single, out=tmp_path / "single")
    with pytest.raises(VolsegError, match="there is no such recipe"):
        volseg.train(dataset, recipe="smok", out=tmp_path / "never")
    assert not (tmp_path / "never").exists()
    with pytest.raises(VolsegError, match=r"the time budget of 0\.001 s is too short"):
        volseg.train(dataset, recipe=tiny_recipe, out=tmp_path / "n", time_budget_seconds=1e-3)


@pytest.mark.slow
def test_torchrun_starts_the_ranks_and_one_of_them_speaks(dataset, tiny_recipe, tmp_path):
    recipe = tmp_path / "r.json"
    recipe.write_text(changed(tiny_recipe, steps_per_epoch=2).model_dump_json())
    script = tmp_path / "run.py"
    script.write_text(
        "import json, sys, volseg\n"
        "from volseg.recipe import parse_recipe\n"
        "recipe = parse_recipe(json.load(open(sys.argv[1])), where='r')\n"
        "options = {'epochs': 1, 'device': 'cpu', 'precision': 'fp32'}\n"
        "report = volseg.train(sys.argv[2], recipe=recipe, out=sys.argv[3], **options)\n"
        "sys.stdout.write(str(report.rank or 'leads') + chr(10))\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--master-port=0",
        "--rdzv-backend=c10d",
    ]
    command += [
        "--rdzv-endpoint=127.0.0.1:0",
        str(script),
        str(recipe),
        str(dataset),
        str(tmp_path / "m"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == ["1", "leads"]
    assert load_bundle(tmp_path / "m").metrics["steps"] == 2


@pytest.mark.slow
def test_a_channel_that_some_cases_lack_is_zero_there(dataset, tiny_recipe, tmp_path):
    with (dataset / "cases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row |= {"image": None, "image_ct": dataset / row["image"], "label": dataset / row["label"]}
        row["image_other"] = "" if row["subject"] in ("scan_1", "scan_6") else row["image_ct"]
    names = ["subject", "image_ct", "image_other", "label", "split", "grade"]
    with (tmp_path / "cases.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    two = tiny_recipe.data.model_copy(update={"channels": ("ct", "other")})
    strict = tiny_recipe.model_copy(update={"data": two, "classify": None})
    with pytest.raises(VolsegError, match="the cell of 'image_other' is empty"):
        volseg.train(tmp_path, recipe=strict, out=tmp_path / "m", device="cpu")
    dropping = strict.train.augment.model_copy(update={"channel_drop_probability": 0.3})
    lenient = changed(strict, augment=dropping).model_copy(
        update={"data": two.model_copy(update={"missing": "empty"})}
    )
    volseg.preprocess(tmp_path, recipe=lenient, out=tmp_path / "p")
    assert not np.load(tmp_path / "p" / "cases" / "scan_1" / "image.npy")[1].any()
    assert np.load(tmp_path / "p" / "cases" / "scan_0" / "image.npy")[1].any()
    report = volseg.train(tmp_path / "p", out=tmp_path / "m", device="cpu")
    assert report.metrics["validation_dice_lesion"] > 0.6
    report = volseg.infer(
        tmp_path / "cases.csv", model=tmp_path / "m", out=tmp_path / "r", device="cpu"
    )
    assert "scan_6" in report.done and not report.failed


@pytest.mark.slow
def test_a_run_is_resumed_with_the_folds_that_it_was_begun_with(dataset, quick_recipe, tmp_path):
    def press_in_fold_2(stage, share, detail):
        if stage.startswith("Training fold 2"):
            raise KeyboardInterrupt

    out = tmp_path / "m"
    options = {"recipe": quick_recipe, "out": out, "epochs": 1, "device": "cpu"}
    report = volseg.train(dataset, folds=3, progress=press_in_fold_2, **options)
    assert report.interrupted
    assert len(load_bundle(out).segmentation_names) == 1  # a half-trained network has no vote
    with pytest.raises(VolsegError, match="holds a run with another number of folds"):
        volseg.train(dataset, resume=True, **options)
    report = volseg.train(dataset, folds=3, resume=True, **options)
    assert not report.interrupted
    assert len(load_bundle(out).segmentation_names) == 3
    with pytest.raises(VolsegError, match="give --folds 6 or fewer"):
        volseg.train(dataset, recipe=quick_recipe, folds=7, out=tmp_path / "n", device="cpu")


@pytest.mark.slow
def test_ctrl_c_in_the_last_validation_keeps_what_was_trained(
    dataset, quick_recipe, tmp_path, monkeypatch
):
    def pressed(predictor, cases, **options):
        if predictor.overlap == quick_recipe.infer.overlap:
            raise KeyboardInterrupt
        return validate(predictor, cases, **options)

    monkeypatch.setattr(validator, "validate", pressed)
    report = volseg.train(dataset, recipe=quick_recipe, out=tmp_path / "m", epochs=1, device="cpu")
    assert report.interrupted
    assert load_bundle(tmp_path / "m").segmentation_network() is not None


def test_a_budget_counts_for_a_prepared_folder_too(dataset, tiny_recipe, tmp_path):
    volseg.preprocess(dataset, recipe=changed(tiny_recipe, batch_size=32), out=tmp_path / "p")
    with pytest.raises(VolsegError, match=r"the budget is 0\.03 GB"):
        volseg.train(tmp_path / "p", out=tmp_path / "m", memory="30M", device="cpu")


def edit_array(path, change):
    if path.exists():  # not every case has slices
        np.save(path, change(np.load(path)))


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda case: edit_array(case / "mask.npy", lambda mask: np.zeros((3, 3), np.uint8)),
            "mask.npy is uint8",
        ),
        (lambda case: edit_array(case / "mask.npy", lambda mask: mask + 9), "holds class"),
        (lambda case: edit_array(case / "image.npy", lambda image: image * np.nan), "not finite"),
        (
            lambda case: edit_array(
                case / "image.npy", lambda image: np.concatenate([image, image])
            ),
            "2 channels, not 1",
        ),
        (
            lambda case: edit_array(case / "slices.npy", lambda slices: slices[:1]),
            "slices of shape",
        ),
        (lambda case: (case / "foreground_1.npy").unlink(), "voxels of 0 labels, not 1"),
        (
            lambda case: edit_json(case / "case.json", **{"class": "nonsense"}),
            "class 'nonsense', not one of",
        ),
    ],
)
def test_a_prepared_folder_of_a_stranger_is_refused_in_one_line(
    spoil, words, dataset, tiny_recipe, tmp_path
):
    volseg.preprocess(dataset, recipe=tiny_recipe, out=tmp_path / "p")
    for case in (tmp_path / "p" / "cases").iterdir():
        spoil(case)
    with pytest.raises(VolsegError, match=words) as refusal:
        volseg.train(tmp_path / "p", out=tmp_path / "m", device="cpu", epochs=1)
    assert refusal.value.code == "E_PREPARED" and "\n" not in str(refusal.value)

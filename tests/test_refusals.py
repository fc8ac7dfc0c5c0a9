"""Bad input of any kind is refused soon, in one line with a code, and never with a traceback."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from command_line import Stream, run
from conftest import TINY
from mutations import KINDS, mask, outcome, scan, untrained_model
from nnunet_folder import architecture, checkpoint, configuration, plans, state_dict, write_model

from volseg import cli
from volseg.bundle import load_bundle
from volseg.io import header, volumes
from volseg.io.cases import ID_PATTERN
from volseg.io.layouts import find_scans
from volseg.networks import build_network
from volseg.recipe import shipped_recipes
from volseg.recipe.section import SpacingMm
from volseg.terminal import printing
from volseg.volume import Geometry, Volume

DEEP = "[" * 100_000 + "]" * 100_000
SECONDS = 5.0  # for a refusal, on a machine that is busy with other work
ENCODINGS = (
    "ascii",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("cp1252", "latin-1")),
)
OTHER_COMMANDS = ("columns --json", "selftest", "--help", "check /nowhere")


@contextmanager
def soon(seconds=SECONDS):
    """Fail if the block takes longer, also if it waits for ever."""

    def late(number, frame):
        raise TimeoutError(f"{seconds} s have passed")

    earlier = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 4 * seconds)
    began = time.process_time()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
    assert time.process_time() - began < seconds


def refused(*arguments, code=2, words=""):
    """Return the output of a command after checking its exit code and its error message."""
    with soon():
        exit_code, text = outcome(arguments)
    assert exit_code in ((code,) if isinstance(code, int) else code), text
    assert "Traceback" not in text
    notes = ("using the model", "memory:", "tiles:")
    lines = [line for line in text.splitlines() if not line.startswith(notes)]
    assert any(re.search(r"\[?E_[A-Z0-9]+\]?", line) for line in lines), text
    assert re.search(words, text), text
    return text


def shell(command, **environment):
    environment = {name: value for name, value in environment.items() if value is not None}
    python = f"{sys.executable} -m volseg"
    return subprocess.run(
        ["bash", "-c", command.replace("volseg", python)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    return untrained_model(tmp_path_factory.mktemp("untrained") / "model")


@pytest.fixture
def bundle(untrained, tmp_path):
    return shutil.copytree(untrained, tmp_path / "model")


def changed(bundle, *keys, value):
    """Change a value in the model.json of a bundle; return the bundle."""
    content = json.loads((bundle / "model.json").read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (bundle / "model.json").write_text(json.dumps(content))
    return bundle


# ---- models


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        (["weights_sha256"], {}, "weights_sha256"),
        (["weights_sha256"], {"classifier": "0" * 64}, "no network"),
        (
            ["weights_sha256"],
            {"segmentation": "0" * 64, "../../etc/passwd": "0" * 64},
            "weights_sha256",
        ),
        (["recipe", "train", "patch_shape"], [10**9] * 3, "patch_shape"),
        (["recipe", "train", "patch_shape"], [4096, 4096, 4096], "voxels"),
        (["recipe", "train", "patch_shape"], [640, 640, 640], "E_RAM"),
        (["recipe", "train", "patch_shape"], [17, 17, 17], "E_CKPT"),
        (["recipe", "train", "batch_size"], 10**9, "batch_size"),
        (["recipe", "infer", "batch_size"], 10**9, "batch_size"),
        (["recipe", "infer", "margin"], 10**9, "margin"),
        (["recipe", "train", "batch_size"], 10**399, "400 digits"),
        (["recipe", "preprocess", "spacing_mm"], [1e-6] * 3, "spacing_mm"),
        (["recipe", "preprocess", "spacing_mm"], [float("nan")] * 3, "NaN"),
        (["recipe", "network", "features"], [10**9] * 3, "network"),
        (["recipe", "network", "features"], [4096] * 3, "E_RAM|E_CKPT"),
        (
            ["recipe", "preprocess", "normalise"],
            {"method": "window", "low": -200, "high": 300, "sd": 1e-300},
            "sd",
        ),
        (["recipe", "preprocess", "normalise"], {"method": "window"}, "normalise.low, .* open"),
        (["recipe", "task"], "translate", "task: .translate. is unknown; known tasks are segment"),
        (["metrics"], [1], "metrics"),
        *(
            (["metrics"], {name: value}, rf"metrics: {name} is ")
            for name, values in {
                "training_cases": ("many", 2.5, -1, True, None),
                "validation_cases": ("x", [1, 2]),
                "validation_dice_lesion": ("x", {"mean": 0.5}),
                "validation_dice_lesion_95": (["a", "b"], [0.1], [0.1, 0.2, 0.3]),
                "nnunet_validation_dice_fold_0": ("x", [0.1, 0.2]),
                "warnings": (["text"], {}),
            }.items()
            for value in values
        ),
        (["recipe", "data", "labels"], {"n" * 100_000: 3}, "labels"),
    ],
)
def test_a_model_with_absurd_numbers_is_refused_before_anything_is_allocated(
    bundle, tmp_path, keys, value, words
):
    changed(bundle, *keys, value=value)
    refused("check", bundle, words=words)
    image = scan(tmp_path / "scan.nii.gz")
    options = ["--model", bundle, "--out", tmp_path / "out", "--backend", "torch"]
    refused("infer", image, *options, words=words)
    assert not (tmp_path / "out" / "masks").exists()


def test_a_scan_whose_prepared_grid_would_be_too_fine_is_a_failed_row(bundle, tmp_path):
    changed(bundle, "recipe", "preprocess", "spacing_mm", value=[0.01] * 3)
    values = np.random.default_rng(0).integers(-1000, 300, (400, 400, 40)).astype(np.int16)
    geometry = Geometry(values.shape, np.diag([1.0, 1, 5, 1]))
    volume = Volume(np.asfortranarray(values), geometry)
    volumes.write_volume(volume, tmp_path / "scan.nii.gz")
    options = ["--model", bundle, "--out", tmp_path / "out", "--backend", "torch"]
    refused("infer", tmp_path / "scan.nii.gz", *options, code=4, words="E_RAM.*machine has")


def test_weights_that_are_not_finite_are_refused_in_models_and_checkpoints(bundle, tmp_path):
    network = load_bundle(bundle).segmentation_network()
    weights = {name: tensor.detach().clone() for name, tensor in network.named_parameters()}
    next(iter(weights.values())).view(-1)[0] = float("inf")
    from volseg.networks import copy_weights

    with pytest.raises(Exception, match=r"1 of the .* are NaN or infinite"):
        copy_weights(network, weights)
    state = state_dict()
    state["decoder.seg_layers.1.bias"][1] = float("nan")
    folder = write_model(tmp_path, folds={"0": checkpoint(state)})
    out, words = tmp_path / "imported", "1 of the 3 weights of 'head.bias' are NaN"
    refused("import-nnunet", folder, "--out", out, words=words)
    assert not out.exists()


def test_a_network_too_large_for_any_machine_is_refused_before_it_is_built():
    levels = {"strides": [[1, 1, 1]] * 3, "kernels": [[63, 63, 63]] * 3}
    stages = {"n_conv_per_stage": [2] * 3, "n_conv_per_stage_decoder": [2] * 2}
    for name, settings in {
        "unet3d": {"features": [4000] * 3} | levels,
        "cnn2d": {"features": [60_000, 60_000]},
        "nnunet_plain": {"features": [4096] * 3} | levels | stages,
    }.items():
        with (
            soon(),
            pytest.raises(Exception, match=r"weights of .* GB, and this machine|largest number"),
        ):
            build_network(name, in_channels=1, out_channels=2, **settings)


# ---- nnU-Net


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": architecture(features_per_stage=[10**9] * 3)}, "network"),
        ({"architecture": architecture(features_per_stage=[4096, 4096, 4096])}, "E_CKPT|E_RAM"),
        (
            {"architecture": architecture(n_conv_per_stage=[4000, 4000, 4000])},
            "n_conv_per_stage.0 = 4000: input should be less than or equal to 64",
        ),
        ({"patch_size": [10**4] * 3}, "patch_shape"),
        ({"patch_size": [4000] * 3}, "voxels"),
        ({"batch_size": 10**9}, "batch_size"),
        ({"spacing": [1e-6] * 3}, "spacing_mm"),
    ],
)
def test_absurd_plans_of_nnunet_are_refused_soon(tmp_path, changes, words):
    folder = write_model(tmp_path, plans_json=plans({"3d_fullres": configuration(**changes)}))
    refused("import-nnunet", folder, "--out", tmp_path / "out", words=words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", "9" * 400, '"text"', "null"])
def test_a_mean_that_is_not_a_number_is_refused(tmp_path, value):
    folder = write_model(tmp_path)
    text = (folder / "plans.json").read_text().replace('"mean": 40.0', f'"mean": {value}')
    (folder / "plans.json").write_text(text)
    refused("import-nnunet", folder, "--out", tmp_path / "out", words="E_NNUNET")


def repacked(folder, data, *, compression=zipfile.ZIP_DEFLATED):
    """Replace the pickle in the checkpoint of a trained folder."""
    path = folder / "fold_0" / "checkpoint_final.pth"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, data if name.endswith("/data.pkl") else content)
    return path


def test_a_checkpoint_that_unpacks_to_very_many_opcodes_is_refused_soon(tmp_path):
    folder = write_model(tmp_path)
    path = repacked(folder, b"\x80\x02" + b"N0" * 30_000_000 + b"N.")
    assert path.stat().st_size < 200_000
    words = "E_CKPT.* unpacks to 60,000,004"
    refused("import-nnunet", folder, "--out", tmp_path / "out", words=words)


def test_other_damage_of_a_checkpoint_is_refused_soon(tmp_path):
    for number, data in enumerate(
        [
            b"\x80\x02" + b"(" * 100_000 + b"N.",
            b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",  # lists in lists
            b"\x80\x02\x8b\xff\xff\xff\x7f",
            b"\x80\x02J\xff",
            pickle.dumps({"network_weights": {"a": 1}, "init_args": [], "trainer_name": 3}, 2),
            b"",
        ]
    ):
        folder = write_model(tmp_path / str(number))
        repacked(folder, data, compression=zipfile.ZIP_STORED)
        refused("import-nnunet", folder, "--out", tmp_path / "out", words="E_CKPT|E_PICKLE")


def test_a_tensor_that_claims_to_be_larger_than_its_numbers_is_refused_before_it_is_copied(
    tmp_path,
):
    state = state_dict()
    state["decoder.seg_layers.1.bias"] = torch.zeros(1).expand(10**12)
    folder = write_model(tmp_path, folds={"0": checkpoint(state)})
    refused("import-nnunet", folder, "--out", tmp_path / "out", words="E_CKPT")


# ---- recipes and plans


def recipe_with(tmp_path, old, new):
    text = shipped_recipes()["smoke"].read_text(encoding="utf-8")
    assert len(re.findall(old, text)) >= 1, text
    (tmp_path / "recipe.toml").write_text(re.sub(old, new, text, count=1))
    return tmp_path / "recipe.toml"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (r"(?m)^batch_size = \d+", "batch_size = 1000000000", "batch_size"),
        (r"(?m)^batch_size = \d+", "batch_size = 4096\naccumulate = 1", "E_BUDGET|GB"),
        (r"(?m)^patch_shape = .*", "patch_shape = [1000000000, 16, 16]", "patch_shape"),
        (r"(?m)^patch_shape = .*", "patch_shape = [4096, 4096, 16]", "E_BUDGET|GB"),
        (r"(?m)^epochs = \d+", "epochs = 1000000000000", "epochs"),
        (r"(?m)^epochs = \d+", f"epochs = {'9' * 400}", "bits"),
        (r"(?m)^epochs = \d+", f"epochs = {'9' * 5000}", "TOML"),
        (r"(?m)^epochs = \d+", "epochs = " + "[" * 5000, "nested"),
        (r"(?m)^epochs = \d+", "epochs = 2\nl1 = nan", "l1"),
        (r"(?m)^features = .*", "features = [1000000000, 16, 32]", "largest number"),
        (r"(?m)^features = .*", f"features = {[8] * 5000}", "values"),
        (r"(?m)^spacing_mm = .*", "spacing_mm = [1e-6, 1.0, 1.0]", "spacing_mm"),
        (r"(?m)^description = .*", f'description = "{"d" * 100_000}"', "description"),
    ],
)
def test_a_recipe_that_would_take_all_memory_is_refused_before_it_takes_any(
    tmp_path, dataset, old, new, words
):
    recipe = recipe_with(tmp_path, old, new)
    refused("check", recipe, words=words)
    refused("train", dataset, "--recipe", recipe, "--out", tmp_path / "model", words=words)


def test_recipes_and_scans_have_the_same_limits_of_spacing():
    bounds = {type(bound).__name__: bound for bound in SpacingMm.__metadata__[0].metadata}
    assert (bounds["Ge"].ge, bounds["Le"].le) == (
        header.MIN_SPACING_MM,
        header.MAX_SPACING_MM,
    )


# ---- JSON that is nested


def test_nested_json_is_one_line_in_every_file_that_a_command_reads(tmp_path, bundle):
    image = scan(tmp_path / "scan.nii.gz")
    pair = ["--image", image, "--mask", mask(tmp_path / "mask.nii.gz")]
    (tmp_path / "deep.json").write_text(DEEP)
    deep, out = tmp_path / "deep.json", ["--out", tmp_path / "out"]
    refused("measure", *pair, *out, "--label-names", deep, words="E_LABELS.*nested")
    for name in ("plans.json", "dataset.json"):
        folder = write_model(tmp_path / name)
        (folder / name).write_text(DEEP)
        refused("import-nnunet", folder, "--out", tmp_path / "m", words="nested")
    (bundle / "model.json").write_text(DEEP)
    refused("check", bundle, words="nested")
    refused("infer", image, "--model", bundle, "--out", tmp_path / "out", words="nested")
    path, commands = KINDS["dataset.json of scans"](tmp_path / "raw")
    path.write_text(DEEP)
    for command in commands:
        refused(*command, words="nested")


def test_nested_records_count_as_damaged(tmp_path):
    image, out = scan(tmp_path / "scan.nii.gz"), tmp_path / "out"
    pair = ["measure", "--image", image, "--mask", mask(tmp_path / "mask.nii.gz"), "--out", out]
    assert outcome(pair)[0] == 0
    (out / ".volseg" / "scan.json").write_text(DEEP)
    (out / "run.json").write_text(DEEP)
    for arguments in (["report", out], pair):
        with soon():
            code, text = outcome(arguments)
        assert code in (0, 2, 3, 4), text
        assert "Traceback" not in text
    (out / "run.json").unlink()  # it was changed, so volseg would not replace it
    assert outcome(pair)[0] == 0
    assert json.loads((out / ".volseg" / "scan.json").read_text())["case"]["n_lesions"] == 2
    assert len((out / ".volseg" / "scan.rows.jsonl").read_text().splitlines()) == 2


# ---- pipes and devices in place of files


def test_a_pipe_or_a_device_in_place_of_a_file_is_named_and_never_waited_for(
    tmp_path, untrained, dataset
):
    pipe, image = tmp_path / "pipe", scan(tmp_path / "scan.nii.gz")
    os.mkfifo(pipe)
    for name in ("pipe.nii.gz", "pipe.csv", "pipe.toml", "pipe.json"):
        (tmp_path / name).symlink_to(pipe)
    (tmp_path / "cases.csv").write_text("subject,image\na,pipe.nii.gz\nb,/dev/zero\n")
    pair = ["--image", image, "--mask", mask(tmp_path / "mask.nii.gz"), "--out", tmp_path / "out"]
    for arguments in (
        ["infer", tmp_path / "pipe.nii.gz"],
        ["infer", "/dev/zero"],
        ["infer", tmp_path / "pipe.csv"],
        ["infer", tmp_path / "cases.csv"],
        ["check", tmp_path / "pipe.nii.gz"],
        ["check", "/dev/stdin"] if not os.path.isfile("/dev/stdin") else ["check", "/dev/null"],
        ["check", tmp_path / "pipe.csv"],
        ["check", tmp_path / "pipe.toml"],
        ["plan", tmp_path / "pipe.csv"],
        ["train", dataset, "--recipe", tmp_path / "pipe.toml", "--out", tmp_path / "m"],
        ["measure", *pair[:2], "--mask", tmp_path / "pipe.nii.gz", "--out", tmp_path / "out"],
        ["measure", *pair, "--label-names", tmp_path / "pipe.json"],
        ["measure", *pair, "--label-names", tmp_path / "pipe.csv"],
        ["measure", "--cases", tmp_path / "pipe.csv", "--out", tmp_path / "out"],
    ):
        infer = ["--model", untrained, "--out", tmp_path / "out"]
        options = infer if arguments[0] == "infer" else []
        text = refused(*arguments, *options, code=(2, 4), words="is a (pipe|device), not a file")
        assert "does not exist" not in text


def test_a_model_of_pipes_is_refused(bundle, tmp_path):
    for name in ("segmentation.safetensors", "model.json"):
        (bundle / name).unlink()
        os.mkfifo(bundle / name)
        options = ["--model", bundle, "--out", tmp_path / "out"]
        image = scan(tmp_path / "scan.nii.gz")
        refused("infer", image, *options, words="E_CKPT.*a pipe, not a file")


# ---- names


@pytest.mark.parametrize("name", ["CON", "con", "nul", "COM1", "Lpt9.x", "AUX", "a.", "PRN.nii"])
def test_ids_that_windows_cannot_store_are_refused_in_tables_and_corrected_in_file_names(
    tmp_path, name, untrained
):
    scan(tmp_path / "image.nii.gz")
    (tmp_path / "cases.csv").write_text(f"subject,image\n{name},image.nii.gz\n")
    options = ["--model", untrained, "--out", tmp_path / "out"]
    text = refused("infer", tmp_path, *options, words="not a valid file name")
    suggested = re.search(r"'([^']*)' would be", text)[1]
    assert re.fullmatch(ID_PATTERN, suggested)
    folder = tmp_path / "scans"
    folder.mkdir()
    (case,) = find_scans([scan(folder / f"{name}.nii.gz")])
    assert re.fullmatch(ID_PATTERN, case.id)
    assert unquote(case.id) == name


def test_names_that_only_look_like_devices_are_valid():
    for name in ("console", "COM10", "aux1", "a.con", "nulla.x", "c", "x.y-z_9"):
        assert re.fullmatch(ID_PATTERN, name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": {"background": 0, "whole": ["one", 2], "core": [2]}}, "whole"),
        ({"labels": {"background": 0, "whole": [1, 2.5], "core": [2]}}, "whole"),
        ({"labels": {"background": 0, "whole": [1, [2]], "core": [2]}}, "whole"),
        ({"labels": {"background": 0, "whole": [], "core": [2]}}, "whole"),
        ({"labels": {"background": 0, "whole": None, "core": [2]}}, "whole"),
        ({"labels": ["background", "whole"]}, "labels"),
        ({"regions_class_order": ["one", 2]}, "regions_class_order"),
        ({"regions_class_order": "12"}, "regions_class_order"),
        ({"channel_names": {"0": ["CT"]}}, "channel_names"),
    ],
)
def test_labels_and_regions_that_are_not_numbers_are_refused_by_check_and_training(
    tmp_path, changes, words
):
    path, _ = KINDS["dataset.json of scans"](tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused("check", path.parent, words=words)
    refused("plan", path.parent, words=words)
    refused("train", path.parent, "--out", tmp_path / "m", words=words)


def test_a_label_name_of_100_kb_is_refused_and_shortened_in_figures(tmp_path):
    image, out = scan(tmp_path / "scan.nii.gz"), tmp_path / "out"
    labels = mask(tmp_path / "mask.nii.gz")
    pair = ["measure", "--image", image, "--mask", labels, "--out", out, "--figures"]
    (tmp_path / "names.json").write_text(json.dumps({"1": "n" * 100_000}))
    (tmp_path / "names.csv").write_text(f"label,name\n1,{'n' * 100_000}\n")
    for name in ("names.json", "names.csv"):
        text = refused(*pair, "--label-names", tmp_path / name, words="E_LABELS.*200 characters")
        assert len(text) < 1000
    from volseg.pages.figures import overlay_png

    volume, ids = volumes.read_volume(image), volumes.read_mask(tmp_path / "mask.nii.gz")
    from segmented_scans import segmented

    from volseg.measurement.lesions import measure_lesions
    from volseg.postprocessing.lesions import label_lesions

    names = {1: "n" * 100_000, 2: "half \ud800 of a pair"}
    lesions = label_lesions(ids.array, volume.geometry, objects="labels")
    rows = measure_lesions(segmented(volume, lesions, label_names=names))
    with soon():
        assert (
            overlay_png(volume, ids.array, rows, title="t" * 100_000, window=(0.0, 1.0))[:4]
            == b"\x89PNG"
        )


LONG = "a" * 5000


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", LONG],
        ["check", f"{LONG}.nii.gz"],
        ["infer", LONG],
        ["infer", f"{LONG}.csv"],
        ["infer", "SCAN", "--model", LONG],
        ["infer", "SCAN", "--out", LONG],
        ["measure", "--image", LONG, "--mask", LONG],
        ["measure", "--cases", LONG],
        ["measure", "--image", "SCAN", "--mask", "SCAN", "--label-names", LONG],
        ["measure", "--image", "SCAN", "--mask", "SCAN", "--recipe", LONG],
        ["evaluate", "--reference", LONG, "--predicted", LONG, "--out", "OUT"],
        ["compare", LONG, LONG, "--out", "OUT"],
        ["report", LONG],
        ["plan", LONG],
        ["train", LONG, "--out", LONG],
        ["train", "DATA", "--recipe", LONG, "--out", "OUT"],
        ["preprocess", LONG, "--recipe", "smoke", "--out", LONG],
        ["import-nnunet", LONG, "--out", "OUT"],
        ["quantise", LONG, LONG],
    ],
)
def test_a_path_of_5000_letters_is_one_line(tmp_path, arguments, dataset, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"SCAN": scan(tmp_path / "scan.nii.gz"), "OUT": tmp_path / "out", "DATA": dataset}
    with soon():
        code, text = outcome([places.get(word, word) for word in arguments])
    assert code in (2, 4, 5), text
    assert "Traceback" not in text
    assert "E_" in text


# ---- output


@pytest.mark.parametrize(
    "arguments",
    [
        "train --help",
        "columns",
        *(pytest.param(words, marks=pytest.mark.slow) for words in OTHER_COMMANDS),
    ],
)
def test_a_full_disk_under_stdout_is_exit_code_5_and_one_line(arguments):
    for unbuffered in ("1", ""):
        done = shell(f"volseg {arguments} > /dev/full", PYTHONUNBUFFERED=unbuffered)
        assert done.returncode == 5, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert done.stderr.startswith(
            "error: E_STDOUT: stdout cannot be written (No space left on device); to fix:"
        )


def test_a_closed_stdout_and_one_without_a_reader_are_exit_code_5_and_one_line():
    done = shell("volseg columns >&-")
    assert (done.returncode, len(done.stderr.splitlines())) == (5, 1)
    assert "stdout is closed" in done.stderr
    done = shell("set -o pipefail; volseg columns | head -c 1", PYTHONUNBUFFERED="")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (5, "l", 1), done.stderr
    assert "its reader has closed it" in done.stderr


@pytest.mark.slow
def test_a_stderr_that_cannot_be_written_does_not_stop_the_work(tmp_path):
    pair = f"--image {scan(tmp_path / 'scan.nii.gz')} --mask {mask(tmp_path / 'mask.nii.gz')}"
    folder = tmp_path / "out"
    # The command announces its memory and a doubted unit on stderr.
    done = shell(f"volseg measure {pair} --out {folder} 2>/dev/full")
    assert done.returncode == 0
    assert (folder / "lesions.csv").is_file()


def test_files_do_not_get_the_numbers_of_closed_streams():
    code = (
        "import os; from volseg.terminal import _open_closed_descriptors as o; o(); "
        "print(os.open('/dev/null', 0) > 2)"
    )
    done = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "{code}" 2>&- <&-'], capture_output=True, text=True
    )
    assert done.stdout.strip() == "True"


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_command_prints_in_an_encoding_without_arrows(tmp_path, untrained, encoding):
    image, out = scan(tmp_path / "scän.nii.gz"), tmp_path / "r → ☃"
    pair = ["--image", image, "--mask", mask(tmp_path / "mask.nii.gz")]
    model = ["--model", untrained, "--backend", "torch"]
    commands = {
        ("columns",): 0,
        ("selftest",): 0,
        ("check", tmp_path / "☃ 😀.nii.gz"): 2,
        ("check", untrained): 0,
        ("infer", image, *model, "--out", out / "i"): 0,
        ("infer", tmp_path / "☃.nii.gz", *model, "--out", out / "i"): 2,
        ("measure", *pair, "--out", out / "a"): 0,
        ("measure", *pair, "--out", out / "b", "--calcium"): 0,
        ("report", out / "a"): 0,
        ("compare", out / "a", out / "b", "--out", out / "c", "--no-registration"): 0,
        ("import-nnunet", write_model(tmp_path / "☃"), "--out", out / "n"): 0,
    }
    names = [command.name or command.callback.__name__ for command in cli.app.registered_commands]
    commands |= {(name, "--help"): 0 for name in names}
    for command, expected in commands.items():
        done = run(*command, encoding=encoding)
        code, text, messages = done.returncode, done.stdout, done.stderr
        assert code == expected, (command, messages)
        assert "Traceback" not in messages
        assert text or messages
    text = run("measure", *pair, "--out", out / "a", "--json", encoding=encoding).stdout
    assert json.loads(text)["out"] == str(out / "a")


@pytest.mark.slow
def test_training_works_in_an_encoding_without_arrows(tmp_path, dataset):
    encoding = "ascii"
    recipe, model = tmp_path / "recipe.toml", tmp_path / "☃"
    recipe.write_text(TINY.replace("epochs = 5", "epochs = 1"))
    done = run("plan", dataset, encoding=encoding)
    assert done.returncode == 0, done.stderr
    options = ["--recipe", "hippocampus_mri", "--out", tmp_path / "p"]
    done = run("preprocess", dataset, *options, encoding=encoding)
    assert "Traceback" not in done.stderr
    options = ["--recipe", recipe, "--out", model]
    done = run("train", dataset, *options, encoding=encoding)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("a model, validation Dice: ")
    assert last.endswith(f" -> {str(model)[:-1]}\\u2603")
    assert (model / "model.json").is_file()


def test_characters_that_an_encoding_lacks_are_printed_as_their_look_alikes(monkeypatch):
    for encoding, expected in {
        "ascii": "-> 3 x 4 <= -1 \\u2603 '\\udcff'",
        "cp1252": "-> 3 × 4 <= -1 \\u2603 '\\udcff'",
    }.items():
        stream = Stream(encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        with printing():
            print("→ 3 × 4 ≤ −1 ☃ '\udcff'")
        assert stream.text.splitlines() == [expected]


def test_a_message_stays_on_one_line_with_any_name_in_it(tmp_path):
    name = tmp_path / "a\nb\r\x1b[2Jc.nii.gz"
    text = refused("check", name)
    assert len(text.splitlines()) == 2  # the problem and the count
    assert "\x1b" not in text
    image = scan(tmp_path / "scan.nii.gz")
    text = refused("infer", "--model", name, image, "--out", tmp_path / "out")
    assert len(text.splitlines()) == 1


# ---- the environment


@pytest.mark.slow
def test_figures_are_drawn_with_any_backend_in_the_environment(tmp_path):
    pair = f"--image {scan(tmp_path / 'scan.nii.gz')} --mask {mask(tmp_path / 'mask.nii.gz')}"
    command = f"volseg measure {pair} --out {tmp_path}/out --figures"
    done = shell(command, MPLBACKEND="nonsense")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "figures" / "scan.png").is_file()


@pytest.mark.parametrize(
    ("number", "kinds"),
    [
        (5, ["label names"]),
        pytest.param(250, [], marks=pytest.mark.slow),
    ],
    ids=["some", "many"],
)
@pytest.mark.slow
def test_no_value_in_a_json_file_makes_a_traceback_or_takes_the_memory(tmp_path, number, kinds):
    script, root = Path(__file__).parent / "mutations.py", str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, script, tmp_path, str(number), "3", *kinds],
        capture_output=True,
        text=True,
        timeout=3600,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([root, *sys.path])},
    )
    assert done.returncode == 0, done.stderr
    for kind, result in json.loads(done.stdout).items():
        assert result["tried"] >= 5, kind
        assert result["wrong"] == [], kind

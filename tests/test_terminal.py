"""What a command says on the terminal, while it runs and when it is done."""

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from command_line import run
from typer.testing import CliRunner

from volseg import commands
from volseg.bundle import load_bundle, model_card
from volseg.cli.announcer import MAX_FAILURES, MAX_REMARKS, Announcer
from volseg.cli.app import app
from volseg.cli.show import show_details
from volseg.errors import VolsegError
from volseg.options import COMMANDS, declare
from volseg.options.declare import settings_of
from volseg.options.shared import failure_line, remark_line
from volseg.reports import RunReport, TrainReport


def write(path, array):
    path.parent.mkdir(exist_ok=True, parents=True)
    nib.save(nib.Nifti1Image(array, np.diag([1.0, 1.0, 2.0, 1.0])), path)
    return path


def two_cubes(folder, names):
    """Write scans in HU and masks with a cube of 4³ and one of 2³ voxels: 0.144 mL per scan."""
    mask = np.zeros((16, 16, 16), np.uint8)
    mask[2:6, 2:6, 2:6] = 1
    mask[10:12, 10:12, 10:12] = 2
    rng = np.random.default_rng(1)
    for name in names:
        scan = rng.integers(-1000, 1000, mask.shape).astype(np.int16)
        write(folder / "images" / f"{name}.nii.gz", scan)
        write(folder / "labels" / f"{name}.nii.gz", mask)
    return folder


def measured(folder, out, *more, unit=("--unit", "HU")):
    masks = ["--image", folder / "images", "--mask", folder / "labels"]
    return run("measure", *masks, "--out", out, *unit, *more)


def test_the_last_lines_say_what_came_out_and_where(tmp_path):
    data, out = two_cubes(tmp_path / "d", ["a", "b", "c"]), tmp_path / "r"
    done = measured(data, out)
    assert f"3 scans: 6 lesions, 0.432 mL → {out / 'report.html'}\n" in done.stdout
    assert f"{out / 'lesions.csv'}: a row per lesion\n" in done.stdout
    (data / "images" / "b.nii.gz").write_bytes(b"damaged")
    done = measured(data, out, "--no-report")
    assert done.returncode == 3
    line = f"2 scans: 4 lesions, 0.288 mL, 2 of them already complete, 1 failed → {out}\n"
    assert line in done.stdout


def test_training_ends_with_its_metrics_in_words_and_does_not_repeat_its_warnings(capsys):
    metrics = {"best_epoch": 3, "warnings": "W_DICE: low", "training_cases": 6}
    show_details(TrainReport(out=Path("m"), metrics=metrics, warnings=["W_DICE: low"]))
    assert capsys.readouterr().out == "best epoch: 3\ntraining cases: 6\n"


def test_json_counts_and_warns(tmp_path):
    data = two_cubes(tmp_path / "d", ["a", "b", "c"])
    done = measured(data, tmp_path / "r", "--json", unit=())
    content = json.loads(done.stdout)
    assert content["counts"] == {
        "done": 3,
        "kept": 0,
        "failed": 0,
        "warnings": 3,
        "lesions": 6,
        "volume_ml": pytest.approx(0.432),
    }
    assert [text[:10] for text in content["warnings"]] == [f"W_UNIT: {name}:" for name in "abc"]
    assert content["text"].startswith("3 scans: 6 lesions, 0.432 mL, 3 warnings →")


def test_values_that_are_objects_are_structures_everywhere(tmp_path):
    data, out = two_cubes(tmp_path / "d", ["a"]), tmp_path / "r"
    done = measured(data, out, "--objects", "labels")
    assert "1 scan: 2 structures, 0.144 mL" in done.stdout
    assert "lesion" not in re.sub(r"\S*lesions\.csv.*", "", done.stdout)
    page = (out / "report.html").read_text()
    assert "found 2 structures in 1 scan" in page
    assert re.search(r"<h2[^>]*>Structures</h2>", page)
    assert "2 structures" in (out / "viewer" / "a.html").read_text()


def test_warnings_and_failures_are_announced_when_they_occur_and_once(tmp_path):
    data = two_cubes(tmp_path / "d", ["a", "b", "c"])
    (data / "labels" / "b.nii.gz").write_bytes(b"damaged")
    events = []
    report = commands.measure(
        image=data / "images",
        mask=data / "labels",
        out=tmp_path / "r",
        progress=lambda stage, done, name: events.append(name),
        announce=events.append,
    )
    of_cases = [event for event in events if re.match(r"warning: W_UNIT|failed|[abc]$", event)]
    assert [event.partition(": ")[0] for event in of_cases] == [
        "warning", "a", "failed", "b", "warning", "c"
    ]  # fmt: skip
    assert {remark_line(text) for text in report.warnings} <= set(events)
    done = measured(data, tmp_path / "cli", unit=())
    for text in ("W_UNIT: a:", "W_UNIT: c:", "failed: b:"):
        assert done.stderr.count(text) == 1
    assert "W_UNIT" not in done.stdout


def test_many_lines_of_one_kind_are_counted(capsys, tmp_path):
    announcer = Announcer()
    warnings = [f"W_UNIT: case_{n}: a guess" for n in range(MAX_REMARKS + 3)]
    failed = {f"case_{n}": "E_SHAPE: too small" for n in range(MAX_FAILURES + 2)}
    for text in warnings[:2]:
        announcer(remark_line(text))
    announcer(failure_line("case_0", failed["case_0"]))
    announcer("memory: 1 GB")
    report = RunReport(out=tmp_path, warnings=warnings, failed=failed)
    announcer.finish(report)
    lines = capsys.readouterr().err.splitlines()
    assert sum("a guess" in line for line in lines) == MAX_REMARKS
    assert sum(line.startswith("failed: case_") for line in lines) == MAX_FAILURES
    assert len(set(lines)) == len(lines)
    assert lines[-2:] == [
        "W_UNIT: 3 more warnings; --json lists all of them",
        "failed: 2 more; --json lists all of them",
    ]


def test_a_note_is_announced_but_is_no_warning(capsys, tmp_path):
    note = "N_HEAD: t.csv: column 'Mask' is read as 'label'"
    report = RunReport(out=tmp_path, done=["a"], warnings=[note, "W_NAN: a: …"])
    report = replace(report, done=["a", "b"])  # sets the notes apart only once
    assert (report.notes, report.warnings) == ([note], ["W_NAN: a: …"])
    assert report.headline == f"2 cases, 1 warning → {tmp_path}"
    assert report.counts["warnings"] == 1 and report.as_json()["notes"] == [note]
    announcer = Announcer()
    announcer(remark_line(note))
    announcer.finish(report)
    assert capsys.readouterr().err.splitlines() == [f"note: {note}", "warning: W_NAN: a: …"]


@pytest.mark.parametrize("name", ["plan", "preprocess", "measure", "evaluate", "check"])
def test_a_head_in_other_words_is_a_note_of_every_command(name, tmp_path):
    data = two_cubes(tmp_path / "d", ["a", "b", "c", "e", "f"])
    table = tmp_path / "t.csv"
    rows = [f"{data}/images/{x}.nii.gz,{data}/labels/{x}.nii.gz" for x in "abcef"]
    table.write_text("\n".join(["Image,Mask", *rows]))
    inputs = {
        "plan": [str(table)],
        "preprocess": [str(table), "--out", str(tmp_path / "out")],
        "measure": ["--cases", str(table), "--unit", "a.u.", "--out", str(tmp_path / "out")],
        "evaluate": [f"--reference={table}", f"--predicted={table}", f"--out={tmp_path / 'out'}"],
        "check": [str(table)],
    }
    done = CliRunner().invoke(app, [name, *inputs[name]])
    lines = [line for line in done.output.splitlines() if "N_HEAD" in line]
    assert done.exit_code == 0
    assert lines == [f"note: N_HEAD: {table}: column 'Mask' is read as 'label'"]
    assert "warning" not in done.output


@pytest.mark.parametrize("name", COMMANDS)
def test_a_missing_file_is_noticed_before_anything_is_loaded(name, tmp_path):
    converters = {key: setting.converter for key, setting in settings_of(COMMANDS[name])}
    inputs = [key for key, one in converters.items() if one in declare.INPUT_CONVERTERS]
    paths = (declare.path, declare.paths, declare.optional_path)
    assert inputs
    assert {key for key, one in converters.items() if one in paths} <= {"out"}
    for key in inputs:
        missing = tmp_path / f"missing_{key}"
        given = dict.fromkeys(inputs, tmp_path) | {key: missing}
        given |= {"out": tmp_path / "out"} if "out" in converters else {}
        with pytest.raises(VolsegError, match=f"{missing}: does not exist; to fix: check the path"):
            getattr(commands, name)(**given)


def test_a_misspelt_scan_costs_no_import_of_torch(tmp_path):
    code = (
        "import sys, volseg\n"
        "try:\n    volseg.infer(sys.argv[1])\n"
        "except volseg.VolsegError as error:\n    print(error, 'torch' in sys.modules)"
    )
    scan = tmp_path / "scna.nii.gz"
    done = subprocess.run([sys.executable, "-c", code, scan], capture_output=True, text=True)
    assert done.stdout == f"{scan}: does not exist; to fix: check the path False\n"


def test_plan_and_columns_fit_80_columns(dataset):
    for arguments in (("columns",), ("plan", dataset)):
        done = run(*arguments, COLUMNS="80")
        lines = done.stdout.splitlines()
        assert len(lines) > 20, done.stderr
        assert max(map(len, lines)) <= 80
        assert not set("│┃━") & set(done.stdout)


def test_without_a_recipe_nothing_is_said_to_come_from_one(model, tmp_path):
    data = tmp_path / "mr"
    mask = np.zeros((24, 24, 24), np.uint8)
    mask[8:16, 8:16, 8:16] = 1
    for number in range(3):  # intensities that are not those of CT
        scan = np.random.default_rng(number).gamma(4, 30, mask.shape).astype(np.float32) + mask
        write(data / "images" / f"p{number}.nii.gz", scan)
        write(data / "labels" / f"p{number}.nii.gz", mask)
    report = commands.plan(data)
    assert "intensities of image" in {reason["setting"] for reason in report.reasons}
    texts = [reason["reason"] for reason in report.reasons]
    assert not [text for text in texts if "recipe" in text]
    bundle, stated = load_bundle(model), {"intended_use", "limits", "data_source"}
    texts = {name: report.recipe[name] for name in stated}
    card = model_card(replace(bundle, recipe=bundle.recipe.model_copy(update=texts)))
    assert "a folder named 'mr'; it was trained without a recipe" in card
    assert "ot stated" not in card


def test_half_precision_is_suggested_once_per_model(model, dataset, tmp_path, monkeypatch):
    from volseg.inference import export

    monkeypatch.setattr(export, "find_half_type", lambda: "bf16")
    assert "--precision fp16" in export.half_precision_hint(model)
    monkeypatch.setattr(export, "find_half_type", lambda: None)
    assert export.half_precision_hint(model) == ""
    scan = next((dataset / "images").iterdir())
    done = run("infer", scan, "--model", model, "--out", tmp_path / "r", "--backend", "openvino")
    assert done.returncode == 0, done.stderr
    assert "fp16" not in done.stderr + done.stdout


def test_the_time_is_estimated_before_the_first_scan_is_done(model, dataset, tmp_path):
    events, started = [], time.monotonic()
    commands.infer(
        dataset / "images",
        model=model,
        out=tmp_path / "r",
        announce=lambda text: events.append((time.monotonic() - started, text)),
        progress=lambda stage, done, text: events.append((time.monotonic() - started, text)),
    )
    texts = [text for _, text in events]
    estimate = next(
        n for n, text in enumerate(texts) if re.search(r"about .* (s|min|second)", text)
    )
    first_done = next(n for n, text in enumerate(texts) if "measuring" in text)
    assert estimate < first_done

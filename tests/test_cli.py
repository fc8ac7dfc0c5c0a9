import contextlib
import io
import json
import os
import pty
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import run
from nnunet_folder import write_model

from volseg import commands, options, reports
from volseg.cli import progress
from volseg.cli.show import show

COMMANDS = (
    *(name.replace("_", "-") for name in options.COMMANDS),
    "check",
    "columns",
    "selftest",
)


def test_help_needs_neither_torch_nor_a_second_of_cpu_time():
    code = (
        "import sys; from volseg.cli import app; app(['--help'], standalone_mode=False); "
        "print('torch' in sys.modules, 'monai' in sys.modules)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.rstrip().endswith("False False")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    code = "import sys, volseg; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False"


def test_a_command_loads_only_the_libraries_that_it_uses():
    libraries = {"torch", "matplotlib", "openvino", "skimage", "pandas", "SimpleITK"}
    code = f"import sys, volseg.commands; print({libraries} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


def test_the_list_of_commands_cuts_no_sentence_off():
    lines = run("--help").stdout.partition("Commands:\n")[2].splitlines()
    assert {line.split()[0] for line in lines} == set(COMMANDS)
    assert all(line.endswith(".") and not line.endswith("...") for line in lines)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_page_with_every_option_explained(command):
    done = run(command, "--help", COLUMNS="200")
    assert done.returncode == 0
    options = [line for line in done.stdout.splitlines() if re.match(r"\s+--\w", line)]
    assert options
    assert all(len(line.split("  ", 2)[-1].split()) > 2 or "--help" in line for line in options)


def test_one_line_and_exit_code_2_for_a_wrong_request(tmp_path):
    for arguments in (
        ["train", tmp_path, "--recipe", "nonsense", "--out", tmp_path / "m"],
        ["train", tmp_path, "--recipe", "smoke", "--out", tmp_path / "m", "--time-budget", "soon"],
        ["infer", tmp_path / "nowhere.nii.gz", "--out", tmp_path / "r", "--model", tmp_path],
    ):
        done = run(*arguments)
        assert done.returncode == 2, done.stderr
        assert done.stdout == ""
        # A busy machine logs that the step is still running.
        lines = [line for line in done.stderr.splitlines() if "still running" not in line]
        assert len(lines) == 1
        assert "to fix:" in lines[0]


def test_infer_prints_json_and_4_for_a_refused_scan_without_a_trace(model, tmp_path):
    scan = tmp_path / "scan.nii.gz"
    scan.write_bytes(b"\x1f\x8b damaged")
    done = run("infer", scan, "--model", model, "--out", tmp_path / "r", "--json")
    assert done.returncode == 4
    assert list(json.loads(done.stdout)["failed"]) == ["scan"]
    assert "Traceback" not in done.stderr
    done = run("infer", scan, "--model", model, "--out", tmp_path / "r")
    lines = done.stderr.splitlines()
    assert sum(line.startswith("failed: scan: E_") for line in lines) == 1


def test_the_main_job_by_hand(model, dataset, tmp_path):
    out = tmp_path / "r"
    done = run("infer", dataset / "images", "--model", model, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["done"]) == 8
    masks = ["--reference", dataset / "labels", "--predicted", out]
    done = run("evaluate", *masks, "--out", tmp_path / "e", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["mean_dice"] > 0.7
    done = run("measure", "--cases", dataset / "cases.csv", "--out", tmp_path / "m")
    assert done.returncode == 0, done.stderr
    assert "26 neighbours" in done.stdout
    done = run("check", dataset / "cases.csv")
    assert (done.returncode, "no problem found" in done.stdout) == (0, True)


def test_a_model_of_nnunet_is_imported_once_and_refused_in_one_line(tmp_path):
    folder = write_model(tmp_path)
    done = run("import-nnunet", folder, "--out", tmp_path / "m", "--folds", "0", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["model"]["labels"] == "kidney = 1, tumour = 2"
    assert report["done"] == ["dataset007_test_3d_fullres"]
    for arguments in (["--out", tmp_path / "m"], ["--out", tmp_path / "n", "--folds", "0,7"]):
        done = run("import-nnunet", folder, *arguments)
        assert done.returncode == 2
        assert len(done.stderr.strip().splitlines()) == 1
        assert "to fix:" in done.stderr
    assert not (tmp_path / "n").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a pseudo-terminal")
@pytest.mark.slow
def test_bars_move_by_tiles_on_a_terminal_and_are_not_drawn_into_a_pipe(model, dataset, tmp_path):
    scans = [dataset / "images" / f"scan_{n}.nii.gz" for n in (6, 7)]
    piped = run("infer", *scans, "--model", model, "--out", tmp_path / "piped")
    assert piped.returncode == 0
    words = [line.split(":")[0] for line in piped.stderr.splitlines()]
    # Only CPUs with half precision announce it; a busy machine logs progress in between.
    announced = [word for word in words if word not in ("precision", "Segmenting")]
    assert announced == ["memory", "tiles", "time"]
    assert "Segmenting" not in piped.stdout
    ours, theirs = pty.openpty()
    command = ["infer", *scans, "--model", model, "--out", tmp_path / "shown"]
    with subprocess.Popen(
        [sys.executable, "-m", "volseg", *command],
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "120"},
    ) as process:
        os.close(theirs)
        shown = read_all(ours)
    assert process.returncode == 0
    assert re.search(r"Segmenting.*scan_7\s*\n", shown), shown
    assert re.search(r"Tiles.*scan_7: \d+ tiles done, measuring\s*\n", shown), shown


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_name_with_markup_or_a_line_end_is_shown_as_it_is_on_a_terminal(monkeypatch):
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    with progress.progress_on_stderr() as report:
        report("Reading [/b]", 0.5, "a[/b]c :x: [red]d\ne\x1b[2J")
    assert "Reading [/b]" in shown.getvalue()
    assert "a[/b]c :x: [red]d\\ne\\x1b[2J" in shown.getvalue()


def test_a_label_with_markup_is_shown_as_it_is_in_a_table(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    mean = {"mean": None, "mean_95": None, "no_mean_95": ""}
    names = ("dice", "hd95_mm", "nsd_1mm", "nsd_2mm", "volume_error_ml")
    label = {"name": "a[/b]:x:\x1b", "n": 3, "metrics": dict.fromkeys(names, mean), "n_missed": 1}
    label["detection"] = {"f1": mean}
    summary = {
        "labels": {"1": label},
        "n_patients": 3,
        "patients": "a patient per case",
        "not_predicted": [],
        "settings": {"objects": "components"},
    }
    show(reports.EvaluateReport(out=Path("nowhere"), summary=summary))
    printed = capsys.readouterr()
    assert "a[/b]:x:\\x1b" in printed.out and "\x1b" not in printed.out + printed.err


def read_all(terminal):
    """Read a terminal until its other side is closed, which Linux reports as an error."""
    parts = []
    with contextlib.suppress(OSError):
        while part := os.read(terminal, 65536):
            parts.append(part)
    os.close(terminal)
    return b"".join(parts).decode()


def test_a_file_in_place_of_the_output_folder_is_exit_code_2(model, dataset, tmp_path):
    (tmp_path / "file").write_text("in the way")
    scan = dataset / "images" / "scan_0.nii.gz"
    done = run("infer", scan, "--model", model, "--out", tmp_path / "file")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and "error: E_EXISTS: " in done.stderr


def test_cuda_where_there_is_none_is_exit_code_5(model, dataset, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    scan = dataset / "images" / "scan_0.nii.gz"
    done = run("infer", scan, "--model", model, "--out", tmp_path, "--device", "cuda")
    assert done.returncode == 5


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_batch_leaves_a_table_with_pending_rows(
    number, code, model, dataset, tmp_path
):
    out = tmp_path / "r"
    command = ["infer", str(dataset / "images"), "--model", str(model), "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "volseg", *command],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if list((out / "masks").glob("scan_*")):
            break
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(30) == code
    statuses = [line.split(",")[1] for line in (out / "cases.csv").read_text().splitlines()[1:]]
    assert len(statuses) == 8
    assert "pending" in statuses
    assert not list(out.rglob(".tmp-*"))


def test_columns_prints_every_column():
    done = run("columns", "--json")
    tables = json.loads(done.stdout)
    assert {"name": "volume_mm3", "unit": "mm³"}.items() <= tables["lesions.csv"][5].items()
    assert "volume_mm3" in run("columns", COLUMNS="200").stdout


def test_the_version_is_that_of_the_package():
    import volseg

    assert run("--version").stdout.strip() == volseg.__version__
    assert Path(volseg.__file__).name == "__init__.py"


def test_a_log_gets_a_line_of_progress_with_the_time_left_now_and_then(monkeypatch, capsys):
    clock = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    lines = progress.Lines()
    for seconds, fraction in ((40, 0.5), (60, 0.6), (80, 0.7), (90, 0.75), (120, 0.9)):
        clock[0] = 1000.0 + seconds
        lines.show("Training", fraction, f"epoch {seconds}")
    assert capsys.readouterr().err.splitlines() == [
        "Training: 50%, epoch 40",
        "Training: 60%, 0:01:20 left, epoch 60",
        "Training: 70%, 0:01:00 left, epoch 80",
        "Training: 90%, 0:00:20 left, epoch 120",
    ]


@pytest.mark.parametrize("module", ["typer", "volseg.cli", "volseg.errors"])
def test_ctrl_c_while_the_command_is_loaded_is_130_and_no_trace(module):
    code = f"""
import sys
class Pressed:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Pressed())
from volseg.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_that_python_drops_is_not_lost(name, code):
    # Python ignores what is raised in the callback of a weak reference, e.g. during an import.
    program = f"""
import signal, sys, time, weakref
import volseg.cli
from volseg.__main__ import main
class Thing:
    pass
def load():
    thing = Thing()
    reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.{name}))
    del thing
    for _ in range(1000):
        time.sleep(0.01)
volseg.cli.main = load
main()
"""
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")
    assert time.monotonic() - started < 9


@pytest.mark.slow
def test_ctrl_c_ends_training_with_a_usable_model_and_resume_goes_on(
    dataset, tiny_recipe, tmp_path
):
    # A prepared folder brings its recipe.
    slow = tiny_recipe.model_copy(
        update={
            "train": tiny_recipe.train.model_copy(
                update={"epochs": 400, "patience": 400, "steps_per_epoch": 3}
            )
        }
    )
    commands.preprocess(dataset, recipe=slow, out=tmp_path / "p")
    out = tmp_path / "m"
    command = ["train", tmp_path / "p", "--out", out, "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "volseg", *map(str, command), "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (out / "history.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    report = json.loads(stdout)
    assert (report["interrupted"], report["exit_code"]) == (True, 130)
    assert "add --resume to continue" in stderr
    scan = dataset / "images" / "scan_7.nii.gz"
    assert commands.infer(scan, model=out, out=tmp_path / "r").exit_code == 0
    epochs = len((out / "history.csv").read_text().splitlines())
    commands.train(tmp_path / "p", out=out, device="cpu", resume=True, epochs=epochs + 1)
    assert len((out / "history.csv").read_text().splitlines()) == epochs + 2

"""Each setting is declared once: the function, the command line and the documentation agree."""

import dataclasses
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.main import get_command
from typer.testing import CliRunner

import volseg
from volseg.cli import app
from volseg.errors import VolsegError
from volseg.options import COMMANDS
from volseg.options.declare import Range, amount, seconds, settings_of

COMMANDS_AND_SETTINGS = [
    pytest.param(command, settings, name, setting, id=f"{command}-{name}")
    for command, settings in COMMANDS.items()
    for name, setting in settings_of(settings)
]
NEEDED = {
    "dataset": "d",
    "out": "o",
    "model": "m",
    "scans": "s",
    "folders": "s",
    "results": "r",
    "folder": "f",
}
NEEDED |= {"reference": "a", "predicted": "b", "baseline": "a", "followup": "b"}


def required(settings):
    return {
        field.name: NEEDED[field.name]
        for field in dataclasses.fields(settings)
        if field.default is dataclasses.MISSING
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_the_function_and_the_command_line_take_the_same_settings(command):
    declared = [name for name, _ in settings_of(COMMANDS[command])]
    parameters = inspect.signature(getattr(volseg, command)).parameters
    callbacks = {"progress", "announce", "spent_seconds"}
    assert [name for name in parameters if name not in callbacks] == declared
    line = get_command(app).commands[command.replace("_", "-")]
    assert [parameter.name for parameter in line.params] == [*declared, "as_json"]


@pytest.mark.parametrize(("command", "settings", "name", "setting"), COMMANDS_AND_SETTINGS)
def test_a_setting_has_the_same_help_everywhere(command, settings, name, setting):
    assert setting.help.endswith(".")
    assert f"{name}: {setting.help}" in getattr(volseg, command).__doc__
    printed = CliRunner().invoke(app, [command.replace("_", "-"), "--help"]).stdout
    assert " ".join(setting.help.split()[:3]) in " ".join(printed.split())


@pytest.mark.parametrize(("command", "settings", "name", "setting"), COMMANDS_AND_SETTINGS)
def test_a_value_that_is_not_allowed_is_refused_by_name_by_both(command, settings, name, setting):
    if not setting.values:
        return
    is_range = isinstance(setting.values, Range)
    allowed = setting.values.least if is_range else setting.values[-1]
    wrong = allowed - 1 if is_range else "unknown"
    with pytest.raises(VolsegError, match=f"{setting.flag_of(name)} must be ") as refused:
        settings(**required(settings), **{name: wrong})
    assert refused.value.code == "E_USAGE"
    assert getattr(settings(**required(settings), **{name: allowed}), name) == allowed
    arguments = [value for key, value in required(settings).items() if key != "out"]
    line = [command.replace("_", "-"), *arguments, setting.flag_of(name), str(wrong)]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 2 or isinstance(done.exception, VolsegError)  # `main` exits with 2


@pytest.mark.parametrize("command", COMMANDS)
def test_what_was_stated_is_what_differs_from_the_defaults(command):
    settings = COMMANDS[command]
    plain = settings(**required(settings))
    assert plain.stated() == {
        name: [value] if name in ("scans", "folders") else value
        for name, value in required(settings).items()
    }
    json.dumps(plain.stated())
    if "max_ram" in dict(settings_of(settings)):
        assert settings(**required(settings), max_ram="1.5G").stated()["max_ram"] == 3 << 29


@pytest.mark.parametrize("text", ["", "four", "-1G", "0", "G", "4 Gi", "nan", "inf"])
def test_amounts_and_durations_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="write it as"):
        amount(text)
    with pytest.raises(ValueError, match="write it as"):
        seconds(text)
    for number in (0, -5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="write it as"):
            amount(number)
        with pytest.raises(ValueError, match="write it as"):
            seconds(number)


def test_amounts_and_durations():
    assert [amount(text) for text in ("4G", "500m", "1.5 K", "2GB", "4096", 4096, None)] == [
        4 << 30,
        500 << 20,
        1536,
        2 << 30,
        4096,
        4096,
        None,
    ]
    assert [seconds(text) for text in ("90s", "20m", "1.5h", "7", 7.5, None)] == [
        90,
        1200,
        5400,
        7,
        7.5,
        None,
    ]


def test_completion_can_be_installed(tmp_path):
    home = {
        "HOME": str(tmp_path),
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    line = f"{sys.executable} -m volseg --install-completion; true"
    done = subprocess.run(
        ["bash", "-c", line], env=home, capture_output=True, text=True, check=False
    )
    assert "completion installed" in done.stdout, done.stderr
    assert list(Path(tmp_path).rglob(".bash_completions/*"))


def test_no_lymph_nodes_differs_from_the_default():
    assert COMMANDS["compare"]("a", "b", out="c").lymph_nodes is None
    assert COMMANDS["compare"]("a", "b", out="c", lymph_nodes=()).lymph_nodes == ()
    assert COMMANDS["compare"]("a", "b", out="c", lymph_nodes="node").lymph_nodes == ("node",)


@pytest.mark.parametrize(
    ("command", "wrong", "problem"),
    [
        ("train", {"epochs": 2.5}, "--epochs must be a number"),
        ("train", {"epochs": "5"}, "--epochs must be a number"),
        ("train", {"seed": None}, "--seed must be a number"),
        ("train", {"seed": -1}, "--seed must be 0 to 4294967295, got -1"),
        ("infer", {"model": 3}, "--model must be a path, got 3"),
        ("infer", {"inside": "lung"}, "--inside must be scan or body, got 'lung'"),
        ("infer", {"overlap": 1}, "--overlap must be ≥ 0 and < 1, got 1"),
        ("infer", {"max_ram": "4"}, "--max-ram must be an amount of memory, got '4'"),
        ("infer", {"max_ram": "a; b"}, "--max-ram must be an amount of memory, got 'a; b'"),
        ("compare", {"max_distance_mm": float("inf")}, "--max-distance must be ≥ 0 mm and finite"),
    ],
)
def test_values_of_the_wrong_kind_are_refused_by_name(command, wrong, problem):
    with pytest.raises(VolsegError, match=problem) as refused:
        COMMANDS[command](**(required(COMMANDS[command]) | wrong))
    assert refused.value.code == "E_USAGE"


def test_numbers_of_numpy_are_numbers():
    settings = COMMANDS["infer"]("a", overlap=np.float32(0.25), tta=np.bool_(False))
    assert settings.stated() == {"scans": ["a"], "overlap": 0.25, "tta": False}
    assert COMMANDS["train"]("d", out="o", seed=np.int32(3)).seed == 3
    names = COMMANDS["measure"](label_names={np.uint8(3): "ball"}).stated()["label_names"]
    assert names == {"3": "ball"}


def test_a_wrong_call_names_the_function_and_help_what_it_accepts():
    with pytest.raises(TypeError, match=r"infer\(\) got an unexpected keyword argument 'foo'"):
        volseg.infer("a", foo=1)
    signature = inspect.signature(volseg.infer)
    assert signature.return_annotation == "CasesReport"
    assert signature.parameters["max_ram"].annotation == "float | str | None"
    assert "progress: Called with" in volseg.infer.__doc__ and "Raises:" in volseg.infer.__doc__

"""A few random runs of `benchmarks/random_runs.py`: no user file is lost, however a run ends."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_dataset
from nnunet_folder import write_model
from random_runs import COMMANDS, check_run, make_world

WITHOUT_A_MODEL = ("measure", "measure-cases", "evaluate", "compare")


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small").resolve()
    return make_world(folder, write_dataset, write_model, WITHOUT_A_MODEL)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_lost_by_a_random_run(seed, small_world):
    run, faults, _ = check_run(seed, small_world, 2.0, WITHOUT_A_MODEL)
    assert faults == [], run


@pytest.mark.slow
def test_nothing_is_lost_by_random_runs_of_every_command():
    # In a process of its own, as it forks: threads of OpenVINO from other tests would not be there.
    script = Path(__file__).parents[2] / "benchmarks" / "random_runs.py"
    command = [sys.executable, str(script), "--runs", str(2 * len(COMMANDS))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr

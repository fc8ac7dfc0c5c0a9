"""A few random runs of `benchmarks/random_runs.py`: no user file is lost, however a run ends."""

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
def test_nothing_is_lost_by_random_runs_of_every_command(tmp_path):
    template = make_world(tmp_path.resolve(), write_dataset, write_model)
    for seed in range(2 * len(COMMANDS)):
        run, faults, _ = check_run(seed, template)
        assert faults == [], run

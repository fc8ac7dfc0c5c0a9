import pytest

from volseg.errors import EnvironmentProblem, ScanError
from volseg.execute.local import run


def test_a_failure_is_an_outcome_and_the_others_go_on():
    def invert(number):
        if number == 0:
            raise ScanError("zero", fix="another number", code="E_ZERO")
        return 1 / number

    outcomes = list(run(invert, [1, 0, 2]))
    assert [outcome.value for outcome in outcomes] == [1.0, None, 0.5]
    assert [outcome.error and outcome.error.code for outcome in outcomes] == [None, "E_ZERO", None]


def test_running_out_of_memory_is_a_failed_case():
    def greedy(_):
        raise MemoryError("400 GiB")

    (outcome,) = run(greedy, ["scan"])
    assert outcome.error is not None
    assert outcome.error.code == "E_OOM"


def test_a_full_disk_stops_the_batch_and_a_bug_is_not_hidden():
    def full(_):
        raise EnvironmentProblem("disk full", fix="free space", code="E_DISK")

    with pytest.raises(EnvironmentProblem):
        list(run(full, [1, 2]))
    with pytest.raises(ZeroDivisionError):
        list(run(lambda n: 1 / n, [0]))

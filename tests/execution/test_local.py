import weakref
from threading import Event

import pytest

from volseg.errors import EnvironmentProblem, ScanError
from volseg.execution.local import run, run_overlapped


def test_a_failure_is_an_outcome_and_the_other_items_continue():
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


def test_the_memory_of_a_failed_item_is_freed_before_the_next_one():
    class Scan:
        pass

    alive = []

    def work(number, read):
        scan = Scan()
        alive.append(weakref.ref(scan))
        try:
            raise RuntimeError("CUDA error: out of memory")
        except RuntimeError as error:
            if number == 1:
                raise
            raise ScanError("no", fix="yes", code="E_NO") from error
        finally:
            assert [ref() is None for ref in alive[:-1]] == [True] * (len(alive) - 1)

    outcomes = list(run_overlapped(lambda n: n, work, lambda n, value: None, range(4)))
    codes = [outcome.error and outcome.error.code for outcome in outcomes]
    assert codes == ["E_NO", "E_OOM", "E_NO", "E_NO"]


def test_a_full_disk_stops_the_batch_and_a_bug_is_an_outcome_with_its_traceback():
    def full(_):
        raise EnvironmentProblem("disk full", fix="free space", code="E_DISK")

    with pytest.raises(EnvironmentProblem):
        list(run(full, [1, 2]))
    bug, result = run(lambda n: 1 / n, [0, 1])
    assert bug.error is not None
    assert bug.error.code == "E_BUG"
    assert "ZeroDivisionError: division by zero" in bug.error.trace
    assert result.value == 1


def test_reading_ahead_and_writing_behind_happen_during_the_work():
    events = []
    next_is_read, last_may_be_written = Event(), Event()

    def read(number):
        if number == 2:
            next_is_read.set()
        return number * 10

    def work(number, value):
        if number == 1:
            assert next_is_read.wait(10)  # during the work on this item
        if number == 2:
            last_may_be_written.set()  # so the first item is written during this work
            assert written.wait(10)
        return value + 1

    written = Event()

    def write(number, value):
        if number == 1:
            assert last_may_be_written.wait(10)
            written.set()
        events.append((number, value))

    outcomes = list(run_overlapped(read, work, write, [1, 2, 3]))
    assert [(outcome.item, outcome.error) for outcome in outcomes] == [(n, None) for n in (1, 2, 3)]
    assert events == [(1, 11), (2, 21), (3, 31)]


@pytest.mark.parametrize("stage", ["read", "work", "write"])
def test_a_failure_in_any_part_affects_only_that_item(stage):
    def failing(name):
        def part(number, value=0):
            if name == stage and number == 2:
                raise ScanError("bad", fix="another", code="E_BAD")
            if name == "write":
                done.append(number)

        return part

    done = []
    outcomes = list(run_overlapped(failing("read"), failing("work"), failing("write"), [1, 2, 3]))
    assert [outcome.error and outcome.error.code for outcome in outcomes] == [None, "E_BAD", None]
    assert done == [1, 3]


def test_a_full_disk_stops_the_overlapped_batch_too():
    def full(number, _):
        if number == 2:
            raise EnvironmentProblem("disk full", fix="free space", code="E_DISK")

    done = []
    with pytest.raises(EnvironmentProblem):
        done.extend(run_overlapped(lambda n: n, lambda n, _: n, full, range(100)))
    assert len(done) <= 2
    assert list(run_overlapped(lambda n: n, lambda n, _: n, full, [])) == []

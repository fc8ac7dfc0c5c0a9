import pytest

from volseg.execution.threads import AGAIN_SECONDS, Threads


class Machine:
    """Simulated steps whose time depends on the number of threads, with their own clock."""

    def __init__(self, seconds, most, first=None):
        self.now, self.n, self.seconds = 0.0, 0, seconds
        self.threads = Threads(most, self.set, first=first, clock=lambda: self.now)
        self.used = []

    def set(self, n):
        self.n = n

    def run(self, steps):
        for _ in range(steps):
            taken = self.seconds(self.n)
            self.now += taken
            self.used.append(self.n)
            self.threads.took(taken)


@pytest.mark.parametrize("first", [1, 4, 16, None])
def test_an_idle_machine_gets_all_threads_and_a_busy_one_few(first):
    idle = Machine(lambda n: 1.6 / n, 16, first)
    idle.run(40)
    assert idle.n == 16 and idle.threads.is_settled
    busy = Machine(lambda n: 1.0 / min(n, 2) + 0.3 * max(0, n - 2), 16, first)
    busy.run(40)
    assert busy.n == 2 and busy.threads.is_settled


def test_the_number_follows_a_machine_that_becomes_busy_or_idle():
    machine = Machine(lambda n: 1.0 / n, 8)
    machine.run(20)
    assert machine.n == 8
    machine.seconds = lambda n: 1.0 if n == 1 else 3.0 * n
    machine.run(40)
    assert machine.n == 1
    machine.seconds = lambda n: 1.0 / n
    machine.run(600)
    assert machine.n == 8


def test_much_slower_threads_cost_one_step():
    machine = Machine(lambda n: 0.2 if n == 1 else 6.0, 2, first=1)
    machine.run(20)
    assert machine.used.count(2) == 1 and machine.n == 1


def test_one_thread_is_never_changed_and_trials_get_rarer():
    alone = Machine(lambda n: 1.0, 1)
    alone.run(200)
    assert set(alone.used) == {1}
    machine = Machine(lambda n: 1.0 if n == 1 else 5.0, 2, first=1)
    machine.run(int(40 * AGAIN_SECONDS))
    assert 3 <= machine.used.count(2) <= 8


def test_measurements_of_another_network_are_discarded():
    machine = Machine(lambda n: 1.0 / n, 2, first=1)
    machine.run(3)
    assert machine.threads.fastest == 1.0
    machine.threads.begin()
    machine.seconds = lambda n: 100.0 / n
    machine.run(6)
    assert machine.n == 2

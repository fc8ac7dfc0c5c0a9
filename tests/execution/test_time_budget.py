import math
import subprocess
import sys
import time

from volseg.execution.time_budget import TimeBudget, process_age


def test_a_budget_is_counted_from_its_start_and_at_least_a_second_is_left():
    budget = TimeBudget(seconds=10, started=time.monotonic() - 4)
    assert 5.5 < budget.left() <= 6
    assert 2.5 < budget.left(3) <= 3
    assert budget.left(100) == 1.0
    assert TimeBudget(seconds=None).left() is None
    assert TimeBudget(seconds=None).ends == math.inf


def test_the_age_of_a_process_is_counted_from_its_start():
    code = (
        "import time; time.sleep(1.5); from volseg.execution.time_budget import process_age; "
        "print(process_age())"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 1.4 < float(done.stdout) < time.monotonic() - began + 0.1


def test_without_proc_the_age_is_the_cpu_time(tmp_path):
    assert 0 < process_age(tmp_path) <= time.process_time()


def test_a_program_may_have_any_name(tmp_path):
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "uptime").write_text("1000.00 1.00\n")
    fields = ["S", *["0"] * 18, "40000", *["0"] * 30]
    (tmp_path / "proc" / "self" / "stat").write_text(f"7 (a) b ) {' '.join(fields)}\n")
    import os

    assert process_age(tmp_path) == 1000 - 40000 / os.sysconf("SC_CLK_TCK")

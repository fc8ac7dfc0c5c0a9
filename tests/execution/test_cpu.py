import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from volseg.execution.cpu import drop_mapped_pages, lazy_zeros, physical_cores

GROUP, CFS = "sys__fs__cgroup__", "cpu__cpu.cfs_"


def machine(root, siblings, **files):
    """Make a Linux file system with the given hyperthreads per CPU and further files."""
    for cpu, threads in enumerate(siblings):
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{threads}\n")
    for path, text in files.items():
        file = root / path.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return root


def test_two_hyperthreads_count_as_one_core(tmp_path):
    root = machine(tmp_path, ["0,4", "1,5", "2,6", "3,7"] * 2)
    assert physical_cores(range(8), root) == 4
    assert physical_cores([0, 4], root) == 1  # a process bound to one core
    assert physical_cores([0, 1, 5], root) == 2


def test_without_a_topology_every_cpu_counts(tmp_path):
    assert physical_cores(range(6), tmp_path) == 6
    assert physical_cores([], tmp_path) == 1


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"sys__fs__cgroup__cpu.max": "200000 100000"}, 2),
        ({"sys__fs__cgroup__cpu.max": "150000 100000"}, 2),
        ({"sys__fs__cgroup__cpu.max": "max 100000"}, 8),
        ({f"{GROUP}job__cpu.max": "300000 100000", "proc__self__cgroup": "0::/job/step"}, 3),
        ({f"{GROUP}{CFS}quota_us": "100000", f"{GROUP}{CFS}period_us": "100000"}, 1),
        ({f"{GROUP}{CFS}quota_us": "-1", f"{GROUP}{CFS}period_us": "100000"}, 8),
    ],
)
def test_a_container_limit_lowers_the_number_of_cores(files, cores, tmp_path):
    root = machine(tmp_path, [str(cpu) for cpu in range(8)], **files)
    assert physical_cores(range(8), root) == cores


def test_this_machine_has_between_one_core_and_its_number_of_cpus():
    assert 1 <= physical_cores() <= (os.cpu_count() or 1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_pages_of_a_mapped_file_are_dropped_and_reloaded(tmp_path):
    path = tmp_path / "wéights of a network.bin"
    np.arange(8 << 20, dtype=np.int32).tofile(path)
    mapped = np.memmap(path, np.int32, mode="r")
    before = _resident("RssFile")
    total = int(mapped.sum(dtype=np.int64))
    assert _resident("RssFile") - before > 30 << 10
    drop_mapped_pages(path)
    assert _resident("RssFile") - before < 2 << 10
    assert int(mapped.sum(dtype=np.int64)) == total


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_large_blocks_are_returned_when_freed():
    code = """
import sys
from volseg.execution.cpu import release_large_blocks
from volseg.execution.cpu import resident_bytes
import numpy as np
if sys.argv[1] == "yes":
    release_large_blocks()
np.ones(31 << 20, np.uint8)  # freed; from here on glibc would put blocks of this size on the heap
kept = [np.ones(31 << 20, np.uint8) for _ in range(8)]
wedge = np.ones(1 << 20, np.uint8)
before = resident_bytes()
del kept
print((before - resident_bytes()) >> 20)
"""
    returned_mb = {}
    for answer in ("yes", "no"):
        command = [sys.executable, "-c", code, answer]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        returned_mb[answer] = int(done.stdout)
    assert returned_mb["yes"] >= 8 * 31 - 2
    assert returned_mb["no"] < returned_mb["yes"] - 100


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_zeros_take_memory_only_where_they_are_written():
    code = """
from volseg.execution.cpu import keep_freed_memory, lazy_zeros
from volseg.execution.cpu import resident_bytes
import numpy as np
keep_freed_memory()
np.ones(120 << 20, np.uint8)  # freed, and kept for the next block
held = [resident_bytes()]
zeros = lazy_zeros((1024, 1024, 100), np.uint8)
held.append(resident_bytes())
zeros[..., 7] = 1
held.append(resident_bytes())
assert zeros[..., 7].all() and not zeros[..., 8:].any() and not zeros[..., :7].any()
print(*(after - before >> 20 for before, after in zip(held, held[1:])))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    made, written = map(int, done.stdout.split())
    assert made <= 1
    assert 1 <= written <= 4


def test_lazy_zeros_are_a_normal_array():
    zeros = lazy_zeros((3, 4, 5), np.uint16)
    assert (zeros.shape, zeros.dtype) == ((3, 4, 5), np.uint16)
    assert zeros.flags.f_contiguous and zeros.flags.writeable
    assert not zeros.any()
    assert lazy_zeros((0, 4, 5), np.uint8).shape == (0, 4, 5)
    with pytest.raises(MemoryError, match="no room"):
        lazy_zeros((1 << 20, 1 << 20, 1 << 20), np.uint8)


def _resident(kind: str) -> int:
    """Return a kind of resident memory of this process, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind))

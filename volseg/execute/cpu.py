"""Make one process use its CPU well. Called by the workflows, never at import."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

# glibc's mallopt parameters, from malloc.h, and madvise's, from mman.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4
MADV_DONTNEED = 4
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
LARGE_BLOCK = 8 << 20  # bytes, of an array that is worth a call of the kernel


def give_back_freed_memory() -> None:
    """Give the kernel what glibc keeps of freed blocks, so that what the process holds is what it needs."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks for the next layer of a network instead of giving them back to the kernel.

    A third to a half of an eager forward pass on a CPU is otherwise page faults. Elsewhere than on glibc it does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)
    mallopt(M_TOP_PAD, 256 << 20)


def give_back_large_blocks() -> None:
    """Let glibc give each large block back to the kernel as soon as it is freed; by itself it comes to keep those of up to 32 MB."""
    if sys.platform.startswith("linux"):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)


def give_back_mapped(path: Path) -> None:
    """Let the kernel drop the pages of a file that is mapped for reading; whoever still asks for them gets them from the file."""
    if not sys.platform.startswith("linux"):
        return
    madvise = ctypes.CDLL(None).madvise
    for line in os.fsdecode(Path("/proc/self/maps").read_bytes()).splitlines():
        addresses, access, *_, name = line.split(maxsplit=5)
        if name == str(path.resolve()) and "w" not in access:
            start, stop = (int(address, 16) for address in addresses.split("-"))
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), MADV_DONTNEED)


def untouched_zeros(shape: tuple[int, ...], dtype: npt.DTypeLike) -> np.ndarray:
    """Zeros in Fortran order that take memory only where they are written.

    `np.zeros` writes every one of them where malloc has freed memory to take them from, as after `keep_freed_memory`.

    Raises:
        MemoryError: there is no room for them.
    """
    dtype, n = np.dtype(dtype), math.prod(shape)
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if sys.platform != "win32" else {}
    try:
        pages = mmap.mmap(-1, max(1, n * dtype.itemsize), **private)
    except OSError as error:
        raise MemoryError(f"no room for {n} values of {dtype}") from error
    return np.frombuffer(pages, dtype, n).reshape(shape, order="F")


def physical_cores(cpus: Iterable[int] | None = None, root: Path = Path("/")) -> int:
    """Cores that this process may use, at least 1: two hyperthreads share one set of arithmetic units and count once.

    Args:
        cpus: logical CPUs; None for those on which this process may run.
        root: where `sys` and `proc` are mounted. Without them (not Linux) every logical CPU counts.

    A container's limit of CPU time (cgroup) lowers the number: more threads than that only wait for each other.
    """
    if cpus is None:
        cpus = (
            os.sched_getaffinity(0)
            if hasattr(os, "sched_getaffinity")
            else range(os.cpu_count() or 1)
        )
    topology = root / "sys/devices/system/cpu"
    cores = {
        _read(topology / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in cpus
    }
    return max(1, min([len(cores), *(math.ceil(limit) for limit in _cpu_limits(root))]))


def idle_cores() -> int:
    """Cores that other programs leave to this process, at least 1, by the load of the last minute."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return max(
        1, round(physical_cores() - max(0.0, load - 1))
    )  # one of those that run is this process


def total_memory(root: Path = Path("/")) -> int:
    """Bytes of main memory that this process may use: the machine's, or what its control group allows."""
    lines = dict(
        line.split(":", 1) for line in _read(root / "proc/meminfo").splitlines() if ":" in line
    )
    found = [int(lines["MemTotal"].split()[0]) * 1024] if "MemTotal" in lines else []
    folders = [folder / "memory.max" for folder in _groups(root)]
    texts = [
        _read(path) for path in (*folders, root / "sys/fs/cgroup/memory/memory.limit_in_bytes")
    ]
    found += [int(text) for text in texts if text.isdigit()]
    return min(found) if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def resident_bytes() -> int:
    """Memory that this process holds now; its largest so far where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def enough_bytes(size: int) -> str:
    """A round amount over this one, as the options take it."""
    return f"{math.ceil(size / 2**30 * 10 + 0.5) / 10:g}G"


def parse_bytes(text: str) -> int:
    """`4G`, `500M`, `1.5g` or a number of bytes.

    Raises:
        ValueError: none of these.

    >>> parse_bytes("1.5G")
    1610612736
    """
    unit = text[-1:].upper()
    number = float(text[:-1]) * UNITS[unit] if unit in UNITS else float(text)
    if not 0 < number < math.inf:
        raise ValueError(f"{text} is not an amount of memory")
    return round(number)


def _groups(root: Path) -> Iterator[Path]:
    """Folders of the control groups of this process, innermost first."""
    groups = root / "sys/fs/cgroup"
    own = next(
        (
            line[3:]
            for line in _read(root / "proc/self/cgroup").splitlines()
            if line.startswith("0::")
        ),
        "/",
    )
    folder = groups / own.strip("/")
    while folder.is_relative_to(groups):
        yield folder
        folder = folder.parent


def _cpu_limits(root: Path) -> Iterator[float]:
    """CPUs' worth of time per second that the control groups of this process allow, innermost group first."""
    for folder in _groups(root):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit():
            yield int(quota) / int(period)
    groups = root / "sys/fs/cgroup"
    quota, period = (
        _read(groups / f"cpu/cpu.cfs_{name}_us") for name in ("quota", "period")
    )  # control groups v1
    if quota.isdigit() and period.isdigit():  # -1 is no limit
        yield int(quota) / int(period)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory is full: that of the machine, or of a GPU, which torch and OpenVINO say in words."""
    words = ("out of memory", "not enough memory", "allocate memory", "bad_alloc")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)

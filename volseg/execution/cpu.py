"""Memory allocation and CPU count of this process. Called by the commands, never at import."""

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
LARGE_BLOCK = 8 << 20  # bytes; for larger arrays, a call to the kernel pays off


def trim_freed_memory() -> None:
    """Return the freed blocks that glibc keeps to the kernel."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks for the next layer of a network.

    Otherwise page faults take a third to a half of an eager forward pass on a CPU. Does nothing
    without glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)
    mallopt(M_TOP_PAD, 256 << 20)


def release_large_blocks() -> None:
    """Let glibc return large blocks to the kernel when freed; its default keeps up to 32 MB."""
    if sys.platform.startswith("linux"):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)


def drop_mapped_pages(path: Path) -> None:
    """Let the kernel drop the pages of a file mapped for reading; it reloads them on access."""
    if not sys.platform.startswith("linux"):
        return
    madvise = ctypes.CDLL(None).madvise
    for line in os.fsdecode(Path("/proc/self/maps").read_bytes()).splitlines():
        addresses, access, *_, name = line.split(maxsplit=5)
        if name == str(path.resolve()) and "w" not in access:
            start, stop = (int(address, 16) for address in addresses.split("-"))
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), MADV_DONTNEED)


def lazy_zeros(shape: tuple[int, ...], dtype: npt.DTypeLike) -> np.ndarray:
    """Return zeros in Fortran order that take memory only where they are written.

    `np.zeros` writes all of them if malloc reuses freed memory, as after `keep_freed_memory`.

    Raises:
        MemoryError: they do not fit into memory.
    """
    dtype, n = np.dtype(dtype), math.prod(shape)
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if sys.platform != "win32" else {}
    try:
        pages = mmap.mmap(-1, max(1, n * dtype.itemsize), **private)
    except OSError as error:
        raise MemoryError(f"no room for {n} values of {dtype}") from error
    return np.frombuffer(pages, dtype, n).reshape(shape, order="F")


def physical_cores(cpus: Iterable[int] | None = None, root: Path = Path("/")) -> int:
    """Count the physical cores that this process may use, at least 1.

    Two hyperthreads share their arithmetic units and count as one. A CPU limit of a container
    (cgroup) lowers the number, since more threads would only wait for each other.

    Args:
        cpus: logical CPUs; None for those on which this process may run.
        root: where `sys` and `proc` are mounted. Without them (not Linux) every logical CPU counts.
    """
    if cpus is None:
        has_affinity = hasattr(os, "sched_getaffinity")
        cpus = os.sched_getaffinity(0) if has_affinity else range(os.cpu_count() or 1)
    folder, file = root / "sys/devices/system/cpu", "topology/thread_siblings_list"
    cores = {_read(folder / f"cpu{cpu}" / file) or str(cpu) for cpu in cpus}
    return max(1, min([len(cores), *(math.ceil(limit) for limit in _cpu_limits(root))]))


def idle_cores() -> int:
    """Estimate the cores that are idle, at least 1, from the load of the last minute."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    others = max(0.0, load - 1)  # one of the running processes is this one
    return max(1, round(physical_cores() - others))


def total_memory(root: Path = Path("/")) -> int:
    """Return the bytes of main memory that the machine has or the control group allows."""
    meminfo = _read(root / "proc/meminfo").splitlines()
    lines = dict(line.split(":", 1) for line in meminfo if ":" in line)
    limits = [int(lines["MemTotal"].split()[0]) * 1024] if "MemTotal" in lines else []
    paths = [folder / "memory.max" for folder in _groups(root)]
    paths.append(root / "sys/fs/cgroup/memory/memory.limit_in_bytes")
    limits += [int(text) for text in map(_read, paths) if text.isdigit()]
    return min(limits) if limits else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def resident_bytes() -> int:
    """Return the resident memory of this process; its peak if the system does not report it."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def enough_bytes(size: int) -> str:
    """Format a slightly larger, rounded amount of memory as `--max-ram` takes it."""
    return f"{math.ceil(size / 2**30 * 10 + 0.5) / 10:g}G"


def _groups(root: Path) -> Iterator[Path]:
    """Yield the folders of the control groups of this process, innermost first."""
    groups = root / "sys/fs/cgroup"
    lines = _read(root / "proc/self/cgroup").splitlines()
    group = next((line[3:] for line in lines if line.startswith("0::")), "/")
    folder = groups / group.strip("/")
    while folder.is_relative_to(groups):
        yield folder
        folder = folder.parent


def _cpu_limits(root: Path) -> Iterator[float]:
    """Yield the CPU limit of each control group of this process, in CPUs, innermost first."""
    for folder in _groups(root):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit():
            yield int(quota) / int(period)
    # Control groups v1
    folder = root / "sys/fs/cgroup/cpu"
    quota, period = (_read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    if quota.isdigit() and period.isdigit():  # -1 means no limit
        yield int(quota) / int(period)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def is_out_of_memory(error: Exception) -> bool:
    """Check whether an error means that the machine or a GPU is out of memory.

    torch and OpenVINO raise generic errors, so their messages are searched.
    """
    words = ("out of memory", "not enough memory", "allocate memory", "bad_alloc")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)

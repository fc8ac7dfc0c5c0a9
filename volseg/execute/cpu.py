"""Make one process use its CPU well. Called by the workflows before torch is imported, never at import."""

from __future__ import annotations

import ctypes
import sys

# glibc's mallopt parameters, from malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


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

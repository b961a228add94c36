"""Memory that direct I/O can write into."""

from __future__ import annotations

import mmap
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

PAGE = mmap.PAGESIZE
HUGE_PAGE = 2 << 20


def aligned_empty(nbytes: int, alignment: int = PAGE) -> NDArray[np.uint8]:
    """`nbytes` writable bytes, zero at first, whose address is a multiple of `alignment` (a power
    of two). Nothing is committed before it is touched. Large ones ask for huge pages: a device
    fills one piece of memory faster than four."""
    slack = max(alignment - PAGE, 0)
    pages = mmap.mmap(-1, max(nbytes + slack, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes >= HUGE_PAGE:
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(pages, dtype=np.uint8)
    start = -memory.ctypes.data % alignment
    return memory[start : start + nbytes]

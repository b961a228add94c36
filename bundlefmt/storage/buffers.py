"""Memory that direct I/O can write into."""

from __future__ import annotations

import mmap

import numpy as np
from numpy.typing import NDArray

PAGE = mmap.PAGESIZE


def aligned_empty(nbytes: int, alignment: int = PAGE) -> NDArray[np.uint8]:
    """`nbytes` writable bytes, zero at first, whose address is a multiple of `alignment` (a power
    of two). Anonymous pages: nothing is committed before it is touched."""
    slack = max(alignment - PAGE, 0)
    memory = np.frombuffer(mmap.mmap(-1, max(nbytes + slack, 1)), dtype=np.uint8)
    start = -memory.ctypes.data % alignment
    return memory[start : start + nbytes]

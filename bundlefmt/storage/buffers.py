"""Memory that direct I/O can write into."""

from __future__ import annotations

import mmap
from collections import deque
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

PAGE = mmap.PAGESIZE
HUGE_PAGE = 2 << 20
KEPT = 4  # pieces of recycled memory: two being read into, one in use, one to spare
LARGEST = 16 << 20  # of them; the kernel clears fresh memory at some 10 GB/s


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


class Recycled:
    """Memory for one batch after the other: what was used and is no longer looked at is used again,
    so that no batch waits for the kernel to clear fresh pages. At most `KEPT` pieces of at most
    `LARGEST` bytes are kept."""

    def __init__(self) -> None:
        self._free: deque[NDArray[np.uint8]] = deque(maxlen=KEPT)  # the oldest gives way

    @property
    def nbytes(self) -> int:
        """Bytes that are kept and in no use."""
        return sum(memory.nbytes for memory in tuple(self._free))

    def empty(self, nbytes: int) -> NDArray[np.uint8]:
        """`nbytes` writable bytes, whatever they hold, from a page on. They are used again once
        neither this array nor any view of it is left."""
        if nbytes > LARGEST:
            return aligned_empty(nbytes)
        size = max(1 << (nbytes - 1).bit_length(), PAGE)
        return np.asarray(_Lease(self._taken(size), self._free))[:nbytes]

    def _taken(self, size: int) -> NDArray[np.uint8]:
        # Leases end at any moment and in any thread, so every step has to be one of the deque's.
        for _ in range(len(self._free)):
            try:
                memory = self._free.popleft()
            except IndexError:
                break
            if memory.nbytes == size:
                return memory
            self._free.append(memory)
        return aligned_empty(size)


class _Lease:
    """What all views of recycled memory have as their base."""

    def __init__(self, memory: NDArray[np.uint8], free: deque[NDArray[np.uint8]]) -> None:
        self._memory = memory
        self._free = free
        self.__array_interface__ = memory.__array_interface__

    def __del__(self) -> None:
        self._free.append(self._memory)

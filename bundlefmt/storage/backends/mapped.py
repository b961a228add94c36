"""`mmap`: the file as memory, with the kernel told what will be needed.

Facts: to touch a page that cannot be had is a SIGBUS, which ends the process: the file was cut, or
the device failed. The kernel's own copying from memory to memory (process_vm_readv, man 2) meets
the same fault as an error. What it did not bring is then read like any file, which tells why.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from bundlefmt.errors import ReadError
from bundlefmt.storage.backends.base import MAX_VIEWS, Engine, Requests
from bundlefmt.storage.backends.engines import Pool
from bundlefmt.storage.backends.pread import Buffered


class _Span(ctypes.Structure):
    """struct iovec"""

    _fields_ = (("start", ctypes.c_void_p), ("length", ctypes.c_size_t))


_process_vm_readv = ctypes.CDLL(None, use_errno=True).process_vm_readv
_process_vm_readv.restype = ctypes.c_ssize_t
_process_vm_readv.argtypes = (
    *(ctypes.c_int, ctypes.POINTER(_Span), ctypes.c_ulong),
    *(ctypes.POINTER(_Span), ctypes.c_ulong, ctypes.c_ulong),
)


class Mapped(Buffered):
    """A shared mapping with MADV_RANDOM; each batch is announced with MADV_WILLNEED."""

    name = "mmap"
    _map: mmap.mmap | None = None

    def _start(self) -> Engine:
        try:
            self._map = mmap.mmap(self._fd, 0, prot=mmap.PROT_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise ReadError(f"cannot be mapped: {error}", file=self.path) from error
        self._map.madvise(mmap.MADV_RANDOM)
        self._size = len(self._map)
        self._begin = _address(np.frombuffer(self._map, dtype=np.uint8))
        two = np.zeros(2, dtype=np.uint8)
        if _copy(_address(two), [two[1:]], 1) != 1:
            reason = os.strerror(ctypes.get_errno())
            raise ReadError(f"cannot be mapped: process_vm_readv: {reason}", file=self.path)
        return Pool(self.path, self.in_flight, self._read)

    def _prepare(self, requests: Requests) -> None:
        assert self._map is not None
        ends = np.minimum(requests.offsets + requests.sizes, self._size)
        pages = requests.offsets - requests.offsets % mmap.PAGESIZE
        inside = pages < ends
        spans = zip(pages[inside].tolist(), (ends - pages)[inside].tolist(), strict=True)
        with suppress(OSError, ValueError):  # reads find what is wrong; ValueError: just closed
            for page, length in spans:
                self._map.madvise(mmap.MADV_WILLNEED, page, length)

    def _read_at_once(self, offset: int, size: int, views: Sequence[NDArray[np.uint8]]) -> bool:
        if offset + size > self._size or len(views) > MAX_VIEWS:
            return False
        return _copy(self._begin + offset, views, size) == size

    def _release(self) -> None:
        super()._release()
        if self._map is not None:
            self._map.close()


def _address(memory: NDArray[np.uint8]) -> int:
    return int(memory.__array_interface__["data"][0])


def _copy(start: int, views: Sequence[NDArray[np.uint8]], size: int) -> int:
    """From an address on into the views; how many bytes, or -1. Without the GIL, so threads fault
    side by side."""
    into = (_Span * len(views))(*[_Span(_address(view), view.nbytes) for view in views])
    return int(_process_vm_readv(os.getpid(), into, len(views), _Span(start, size), 1, 0))

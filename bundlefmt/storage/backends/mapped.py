"""`mmap`: the file as memory, with the kernel told what will be needed."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

import numpy as np

from bundlefmt.errors import ReadError
from bundlefmt.layout.arithmetic import round_down
from bundlefmt.storage.backends.base import DEFAULT_THREADS, Backend, Request


class Mapped(Backend):
    """A shared mapping with MADV_RANDOM; each batch is announced with MADV_WILLNEED."""

    name = "mmap"

    def __init__(self, path: str | os.PathLike[str], threads: int = DEFAULT_THREADS) -> None:
        super().__init__(path, threads)
        self._fd = self._open(os.O_RDONLY)
        try:
            self._map = mmap.mmap(self._fd, 0, prot=mmap.PROT_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            os.close(self._fd)
            raise ReadError(f"cannot be mapped: {error}", file=self.path) from error
        self._map.madvise(mmap.MADV_RANDOM)
        self._bytes = np.frombuffer(self._map, dtype=np.uint8)

    def _prepare(self, requests: Sequence[Request]) -> None:
        # Touching a page that the file no longer has is a SIGBUS, not an error: look first.
        size = os.fstat(self._fd).st_size
        for request in requests:
            end = request.offset + request.length
            if end > min(size, self._bytes.nbytes):
                raise ReadError(
                    "read past the end",
                    file=self.path,
                    offset=request.offset,
                    expected=f"{request.length} bytes",
                    found=max(size - request.offset, 0),
                )
        for request in requests:
            start = round_down(request.offset, mmap.PAGESIZE)
            end = request.offset + request.length
            self._map.madvise(mmap.MADV_WILLNEED, start, end - start)

    def _read(self, request: Request) -> int:
        at = request.offset
        for view in request.views:  # NumPy copies without the GIL, so threads fault side by side
            view[:] = self._bytes[at : at + view.nbytes]
            at += view.nbytes
        return at - request.offset

    def _release(self) -> None:
        del self._bytes
        self._map.close()
        os.close(self._fd)

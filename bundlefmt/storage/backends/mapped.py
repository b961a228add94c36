"""`mmap`: the file as memory, with the kernel told what will be needed."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bundlefmt.errors import ReadError
from bundlefmt.storage.backends.base import Backend, Requests
from bundlefmt.storage.backends.engines import Pool


class Mapped(Backend):
    """A shared mapping with MADV_RANDOM; each batch is announced with MADV_WILLNEED."""

    name = "mmap"

    def __init__(
        self,
        path: str | os.PathLike[str],
        threads: int,
        queue_depth: int,
        memory: NDArray[np.uint8] | None = None,
    ) -> None:
        super().__init__(path, threads, queue_depth, memory)
        self._fd = self._open(os.O_RDONLY)
        try:
            self._map = mmap.mmap(self._fd, 0, prot=mmap.PROT_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            os.close(self._fd)
            raise ReadError(f"cannot be mapped: {error}", file=self.path) from error
        self._map.madvise(mmap.MADV_RANDOM)
        self._bytes = np.frombuffer(self._map, dtype=np.uint8)
        self._engine = Pool(self.path, threads, self._read)

    def _prepare(self, requests: Requests) -> None:
        # Touching a page that the file no longer has is a SIGBUS, not an error: look first.
        size = os.fstat(self._fd).st_size
        ends = requests.offsets + requests.sizes
        beyond = np.flatnonzero(ends > min(size, self._bytes.nbytes))
        if beyond.size:
            offset, end = int(requests.offsets[beyond[0]]), int(ends[beyond[0]])
            raise ReadError(
                "read past the end",
                file=self.path,
                offset=offset,
                expected=f"{end - offset} bytes",
                found=max(size - offset, 0),
            )
        pages = requests.offsets - requests.offsets % mmap.PAGESIZE
        for page, length in zip(pages.tolist(), (ends - pages).tolist(), strict=True):
            self._map.madvise(mmap.MADV_WILLNEED, page, length)

    def _read(self, offset: int, views: Sequence[NDArray[np.uint8]]) -> int:
        at = offset
        for view in views:  # NumPy copies without the GIL, so threads fault side by side
            view[:] = self._bytes[at : at + view.nbytes]
            at += view.nbytes
        return at - offset

    def _release(self) -> None:
        del self._bytes
        self._map.close()
        os.close(self._fd)

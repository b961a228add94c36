"""Positional scatter reads: `buffered` through the page cache, `direct` past it, and `uring` with
direct reads queued by one thread instead of many.

With the native core its engines serve them; without it, `buffered` and `direct` are served by
threads of Python, and there is no `uring`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bundlefmt import native
from bundlefmt.errors import ReadError, UsageError
from bundlefmt.layout.arithmetic import round_down, round_up
from bundlefmt.storage.backends.base import MAX_VIEWS, Backend, Engine
from bundlefmt.storage.backends.engines import Native, Pool, read_error
from bundlefmt.storage.buffers import aligned_empty
from bundlefmt.storage.device import probe_direct

_ATTEMPTS = 8  # of a read that brings nothing and names no error


class Buffered(Backend):
    """preadv through the page cache."""

    name = "buffered"
    _flags = os.O_RDONLY

    def __init__(
        self,
        path: str | os.PathLike[str],
        threads: int,
        queue_depth: int,
        memory: NDArray[np.uint8] | None = None,
    ) -> None:
        super().__init__(path, threads, queue_depth, memory)
        self._fd = self._open(self._flags)
        try:
            self._engine = self._start()
        except (ReadError, UsageError):
            self._release()
            raise

    def _start(self) -> Engine:
        if native.core is None:
            return Pool(self.path, self.in_flight, self._read)
        try:
            return self._native("threads")
        except RuntimeError as error:
            raise ReadError(f"too few threads: {error}", file=self.path) from error

    def _native(self, kind: str) -> Engine:
        alignments = self.offset_alignment, self.memory_alignment
        return Native(kind, self.path, self._fd, self.in_flight, *alignments, self._memory)

    def _release(self) -> None:
        os.close(self._fd)

    def _read(self, offset: int, views: Sequence[NDArray[np.uint8]]) -> int:
        size = sum([view.nbytes for view in views])
        if not self._read_at_once(offset, size, views):
            self._fill(views, offset, size)
        return size

    def _read_at_once(self, offset: int, size: int, views: Sequence[NDArray[np.uint8]]) -> bool:
        """The common case, in few steps: whether one call filled all views. If not, the caller
        finds out why."""
        try:
            return os.preadv(self._fd, views, offset) == size
        except OSError:
            return False

    def _fill(self, views: Sequence[NDArray[np.uint8]], offset: int, needed: int) -> None:
        """Read from `offset` into the views until `needed` bytes have come."""
        done = attempts = 0
        while done < needed:
            rest = _after(views, done) if done else views
            try:
                count = os.preadv(self._fd, rest[:MAX_VIEWS], offset + done)
            except (BlockingIOError, InterruptedError):
                count = 0
            except OSError as error:
                raise read_error(self.path, offset, needed, done, error.errno or 0) from error
            if done + count < needed:  # go on from where the next read may start
                count = round_down(count, self.offset_alignment)
            attempts = 0 if count else attempts + 1
            if attempts == _ATTEMPTS:
                raise read_error(self.path, offset, needed, done, 0)
            done += count


class Direct(Buffered):
    """preadv with O_DIRECT, widened to the alignment that the device wants."""

    name = "direct"
    _flags = Buffered._flags | os.O_DIRECT

    def __init__(
        self,
        path: str | os.PathLike[str],
        threads: int,
        queue_depth: int,
        memory: NDArray[np.uint8] | None = None,
    ) -> None:
        direct = probe_direct(path)
        if direct.refusal is not None:
            raise ReadError(f"direct I/O is not to be had: {direct.refusal}", file=path)
        self.offset_alignment = direct.offset_alignment
        self.memory_alignment = direct.memory_alignment
        super().__init__(path, threads, queue_depth, memory)

    def _read(self, offset: int, views: Sequence[NDArray[np.uint8]]) -> int:
        # Misaligned memory is left to the kernel to refuse: looking at each address costs more.
        size = sum([view.nbytes for view in views])
        aligned = not (offset | size) % self.offset_alignment
        if aligned and self._read_at_once(offset, size, views):
            return size
        start = round_down(offset, self.offset_alignment)
        skipped = offset - start
        widened = round_up(skipped + size, self.offset_alignment)
        scratch = aligned_empty(widened, self.memory_alignment)
        self._fill([scratch], start, skipped + size)
        at = skipped
        for view in views:
            view[:] = scratch[at : at + view.nbytes]
            at += view.nbytes
        return widened


class Uring(Direct):
    """O_DIRECT reads through one io_uring of `queue_depth`, with which `memory` is registered."""

    name = "uring"
    queued = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        threads: int,
        queue_depth: int,
        memory: NDArray[np.uint8] | None = None,
    ) -> None:
        if native.core is None:
            raise ReadError(f"no io_uring without the native core: {native.reason}", file=path)
        super().__init__(path, threads, queue_depth, memory)

    def _start(self) -> Engine:
        try:
            return self._native("uring")
        except RuntimeError as error:
            raise ReadError(f"no io_uring: {error}", file=self.path) from error


def _after(views: Sequence[NDArray[np.uint8]], done: int) -> list[NDArray[np.uint8]]:
    """What of the views is left to fill when `done` bytes have come."""
    rest = []
    for view in views:
        rest += [view[done:]] if done < view.nbytes else []
        done = max(done - view.nbytes, 0)
    return rest

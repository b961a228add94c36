"""`direct` and `buffered`: positional scatter reads, past the page cache or through it."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bundlefmt.errors import ReadError
from bundlefmt.layout.arithmetic import round_down, round_up
from bundlefmt.storage.backends.base import DEFAULT_THREADS, MAX_VIEWS, Backend, Request
from bundlefmt.storage.buffers import aligned_empty
from bundlefmt.storage.device import probe_direct

_ATTEMPTS = 8  # of a read that brings nothing and names no error


class Buffered(Backend):
    """preadv through the page cache."""

    name = "buffered"
    _flags = os.O_RDONLY

    def __init__(self, path: str | os.PathLike[str], threads: int = DEFAULT_THREADS) -> None:
        super().__init__(path, threads)
        self._fd = self._open(self._flags)

    def _read(self, request: Request) -> int:
        if not self._read_at_once(request):
            self._fill(request.views, request.offset, request.length)
        return request.length

    def _read_at_once(self, request: Request) -> bool:
        """The common case, in few steps: whether one call filled all views. If not, the caller
        finds out why."""
        try:
            return os.preadv(self._fd, request.views, request.offset) == request.length
        except OSError:
            return False

    def _release(self) -> None:
        os.close(self._fd)

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
                raise ReadError(
                    f"read failed: {error.strerror}",
                    file=self.path,
                    offset=offset + done,
                    expected=f"{needed - done} bytes",
                ) from error
            if done + count < needed:  # go on from where the next read may start
                count = round_down(count, self.offset_alignment)
            attempts = 0 if count else attempts + 1
            if attempts == _ATTEMPTS:
                raise ReadError(
                    "read came up short",
                    file=self.path,
                    offset=offset,
                    expected=f"{needed} bytes",
                    found=done,
                )
            done += count


class Direct(Buffered):
    """preadv with O_DIRECT, widened to the alignment that the device wants."""

    name = "direct"
    _flags = Buffered._flags | os.O_DIRECT

    def __init__(self, path: str | os.PathLike[str], threads: int = DEFAULT_THREADS) -> None:
        direct = probe_direct(path)
        if direct.refusal is not None:
            raise ReadError(f"direct I/O is not to be had: {direct.refusal}", file=path)
        self.offset_alignment = direct.offset_alignment
        self.memory_alignment = direct.memory_alignment
        super().__init__(path, threads)

    def _read(self, request: Request) -> int:
        # Misaligned memory is left to the kernel to refuse: looking at each address costs more.
        length = request.length
        if not (request.offset | length) % self.offset_alignment and self._read_at_once(request):
            return length
        start = round_down(request.offset, self.offset_alignment)
        skipped = request.offset - start
        widened = round_up(skipped + length, self.offset_alignment)
        scratch = aligned_empty(widened, self.memory_alignment)
        self._fill([scratch], start, skipped + length)
        at = skipped
        for view in request.views:
            view[:] = scratch[at : at + view.nbytes]
            at += view.nbytes
        return widened


def _after(views: Sequence[NDArray[np.uint8]], done: int) -> list[NDArray[np.uint8]]:
    """What of the views is left to fill when `done` bytes have come."""
    rest = []
    for view in views:
        rest += [view[done:]] if done < view.nbytes else []
        done = max(done - view.nbytes, 0)
    return rest

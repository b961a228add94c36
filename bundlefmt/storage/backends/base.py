"""The interface of a read backend: a batch of requests goes in, filled memory comes out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from bundlefmt.errors import ReadError, UsageError

DEFAULT_THREADS = 32  # the paper's number of reading threads
MAX_VIEWS = 1024  # of one scatter read: IOV_MAX on Linux


class Request:
    """Contiguous bytes of the file, from `offset` on, scattered over `views` in turn: 1-D,
    writable, contiguous uint8 arrays. `tag` is the caller's own."""

    __slots__ = ("length", "offset", "tag", "views")

    def __init__(self, offset: int, views: Sequence[NDArray[np.uint8]], tag: Any = None) -> None:
        self.offset = offset
        self.views = views
        self.tag = tag
        self.length = sum([view.nbytes for view in views])


class Batch:
    """Requests in flight. `latencies` holds nanoseconds per finished request."""

    def __init__(self, requests: Sequence[Request], check: Callable[[Request], None] | None):
        self.latencies: list[int] = []
        self.bytes_read = 0
        self._queue = iter(requests)  # workers draw from it; next() is atomic under the GIL
        self._check = check
        self._futures: list[Future[int]] = []
        self._failure: BaseException | None = None

    def wait(self) -> None:
        """Return when every request is served. If one failed: stop handing out new ones, wait for
        those in flight, then raise its error."""
        wait(self._futures)
        if self._failure is not None:
            raise self._failure
        self.bytes_read = sum(future.result() for future in self._futures)

    def _work(self, read: Callable[[Request], int]) -> int:
        """One worker's share: requests until none is left; returns the bytes that it read."""
        # Between two reads a worker holds the GIL, and others wait for it: few steps, all local.
        total = 0
        clock, check, finished = time.perf_counter_ns, self._check, self.latencies.append
        try:
            for request in self._queue:
                start = clock()
                total += read(request)
                if check is not None:
                    check(request)
                finished(clock() - start)
                if self._failure is not None:
                    break
        except BaseException as error:
            self._failure = error
        return total


class Backend:
    """A way to read a file. Any offset, length and memory may be asked for; what is aligned to
    `offset_alignment` and `memory_alignment` needs no copy.

    A subclass says how one request is read (`_read`) and, if need be, what to do with a batch
    beforehand (`_prepare`).
    """

    name: ClassVar[str]
    offset_alignment = 1
    memory_alignment = 1

    def __init__(self, path: str | os.PathLike[str], threads: int = DEFAULT_THREADS) -> None:
        if threads < 1:
            raise UsageError(
                "no threads to read with", field="threads", expected="1 or more", found=threads
            )
        self.path = os.fspath(path)
        self.threads = threads
        self._pool: ThreadPoolExecutor | None = ThreadPoolExecutor(threads, "bundlefmt-read")

    def submit(
        self, requests: Sequence[Request], check: Callable[[Request], None] | None = None
    ) -> Batch:
        """Start reading. `check` is called with each request as its bytes arrive, on the thread
        that read them; what it raises fails the batch."""
        if self._pool is None:
            raise UsageError("the reader is closed", file=self.path)
        self._prepare(requests)
        batch = Batch(requests, check)
        batch._futures = [
            self._pool.submit(batch._work, self._read)
            for _ in range(min(self.threads, len(requests)))
        ]
        return batch

    def close(self) -> None:
        """Wait for what is in flight, then let go of the file. May be called twice."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
            self._release()

    def _open(self, flags: int) -> int:
        try:
            return os.open(self.path, flags | os.O_CLOEXEC)
        except OSError as error:
            raise ReadError(f"cannot open: {error.strerror}", file=self.path) from error

    def _prepare(self, requests: Sequence[Request]) -> None:
        """Called with each batch before its requests are read."""

    def _read(self, request: Request) -> int:
        """Fill the request's views; returns the bytes that were read for it."""
        raise NotImplementedError

    def _release(self) -> None:
        """Give back what the backend holds of the file."""
        raise NotImplementedError

"""What serves batches: the native core's engines, and a pool of Python threads."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import count, pairwise
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from bundlefmt import native
from bundlefmt.errors import ReadError, UsageError
from bundlefmt.storage.backends.base import SPARE, Batch, Damaged, Process, Requests

Read = Callable[[int, Sequence[NDArray[np.uint8]]], int]


class Native:
    """An engine of the native core: `threads`, or `uring`. Raises UsageError for more in flight
    than it takes, RuntimeError where there is no io_uring, or too few threads."""

    def __init__(
        self,
        kind: str,
        path: str,
        fd: int,
        in_flight: int,
        offset_alignment: int,
        memory_alignment: int,
        memory: NDArray[np.uint8] | None,
    ) -> None:
        assert native.core is not None
        if in_flight > native.core.MAX_IN_FLIGHT:
            raise UsageError(
                "too many reads at once",
                field="threads, queue_depth",
                expected=f"at most {native.core.MAX_IN_FLIGHT}",
                found=in_flight,
            )
        self._path = path
        self._engine = native.core.Engine(
            kind, fd, in_flight, offset_alignment, memory_alignment, memory
        )

    def submit(self, requests: Requests) -> Batch:
        *tables, checks, spare = requests
        batch = self._engine.submit(*tables, *(checks or ()), spare=spare)
        return _NativeBatch(self._path, batch, requests)

    def close(self) -> None:
        self._engine.close()


class _NativeBatch:
    def __init__(self, path: str, batch: Any, requests: Requests) -> None:
        self._path = path
        self._process = Process()
        # Goes before the requests and their memory do: what frees that is then Python alone.
        self._batch = batch
        self._requests = requests

    @property
    def latencies(self) -> list[int]:
        return self._batch.latencies  # type: ignore[no-any-return]

    @property
    def bytes_read(self) -> int:
        return self._batch.bytes_read  # type: ignore[no-any-return]

    @property
    def finished(self) -> int:
        return self._batch.finished  # type: ignore[no-any-return]

    def wait(self) -> None:
        self._process.require(self._path)
        failure = self._batch.wait()
        if failure is None:
            return
        kind, request, number, came, row, found = failure
        if kind == "damaged":
            assert self._requests.checks is not None
            raise Damaged(row, int(self._requests.checks.expected[row]), found)
        offset, size = int(self._requests.offsets[request]), int(self._requests.sizes[request])
        raise read_error(self._path, offset, size, came, number)


class Pool:
    """Threads of Python, each of which takes up a request when it has served one. `read` fills
    views from an offset on and returns the bytes that it read for them."""

    def __init__(self, path: str, threads: int, read: Read) -> None:
        self._path = path
        self._threads = threads
        self._read = read
        self._pool = ThreadPoolExecutor(threads, "bundlefmt-read")

    def submit(self, requests: Requests) -> Batch:
        batch = _PoolBatch(self._path, requests, self._read)
        workers = min(self._threads, requests.offsets.size)
        batch.futures = [self._pool.submit(batch.work) for _ in range(workers)]
        return batch

    def close(self) -> None:
        self._pool.shutdown()


class _PoolBatch:
    def __init__(self, path: str, requests: Requests, read: Read) -> None:
        self._path = path
        self._process = Process()
        self.latencies: list[int] = []
        self.bytes_read = 0
        self.finished = 0
        self.futures: list[Future[tuple[int, int]]] = []
        self._read = read
        self._memory = requests.memory
        self._offsets = requests.offsets.tolist()
        spare = (requests.starts == SPARE).tolist()
        starts = np.maximum(requests.starts, 0)
        slices = map(slice, starts.tolist(), (starts + requests.lengths).tolist())
        homes = [requests.spare if unwanted else requests.memory for unwanted in spare]
        views = list(zip(homes, slices, strict=True))
        self._views = [views[a:b] for a, b in pairwise(requests.bounds.tolist())]
        self._checks = requests.checks
        self._next = count()  # next() is atomic under the GIL
        self._failure: BaseException | None = None

    def wait(self) -> None:
        self._process.require(self._path)
        wait(self.futures)
        if self._failure is not None:
            raise self._failure
        for future in self.futures:
            nbytes, end = future.result()
            self.bytes_read += nbytes
            self.finished = max(self.finished, end)

    def work(self) -> tuple[int, int]:
        """One thread's share: requests until none is left; returns the bytes that it read, and
        when it had them."""
        # Between two reads a thread holds the GIL, and others wait for it: few steps, all local.
        total = end = 0
        clock, finished = time.perf_counter_ns, self.latencies.append
        try:
            for request in self._next:
                if request >= len(self._offsets) or self._failure is not None:
                    break
                start = clock()
                views = [home[view] for home, view in self._views[request]]
                total += self._read(self._offsets[request], views)
                if self._checks is not None:
                    self._check(request)
                end = clock()
                finished(end - start)
        except BaseException as error:
            self._failure = error
        return total, end

    def _check(self, request: int) -> None:
        assert self._checks is not None
        bounds, starts, length, expected = self._checks
        for row in range(bounds[request], bounds[request + 1]):
            start = starts[row]
            found = xxhash.xxh3_64_intdigest(self._memory[start : start + length])
            if found != expected[row]:
                raise Damaged(row, int(expected[row]), found)


def read_error(path: str, offset: int, size: int, came: int, number: int) -> ReadError:
    """A request of `size` bytes of which `came` are there: an errno, or 0 where there were no
    more."""
    if number:
        return ReadError(
            f"read failed: {os.strerror(number)}",
            file=path,
            offset=offset + came,
            expected=f"{size - came} bytes",
        )
    return ReadError(
        "read came up short", file=path, offset=offset, expected=f"{size} bytes", found=came
    )

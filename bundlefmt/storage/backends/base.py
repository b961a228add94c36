"""The interface of a read backend: a batch of requests goes in, filled memory comes out."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from bundlefmt.errors import BundleError, ReadError, UsageError, integer

DEFAULT_THREADS = 32  # the paper's number of reading threads
DEFAULT_QUEUE_DEPTH = 128
MAX_VIEWS = 1024  # of one scatter read: IOV_MAX on Linux
SPARE = -1  # where a view starts whose bytes nobody wants

Table = NDArray[np.int64]


class Checks(NamedTuple):
    """Rows of `length` bytes at `starts` in the memory, and the xxh3-64 that each must have once
    it has come: rows bounds[k] .. bounds[k + 1] - 1 come with request k."""

    bounds: Table
    starts: Table
    length: int
    expected: NDArray[np.uint64]


class Requests(NamedTuple):
    """Request k is contiguous bytes of the file, from offsets[k] on, scattered in turn over the
    views bounds[k] .. bounds[k + 1] - 1; view v is memory[starts[v]:][:lengths[v]], or where
    starts[v] is SPARE spare[:lengths[v]], which all may share since nobody looks at it. `memory`
    and `spare` are writable, contiguous uint8 arrays."""

    memory: NDArray[np.uint8]
    offsets: Table
    bounds: Table
    starts: Table
    lengths: Table
    checks: Checks | None = None
    spare: NDArray[np.uint8] = np.empty(0, dtype=np.uint8)

    @property
    def sizes(self) -> Table:
        """Bytes of each request."""
        ends = np.concatenate([[0], np.cumsum(self.lengths)])
        return np.diff(ends[self.bounds])


def whole_rows(rows: NDArray[np.uint8], offsets: Table) -> Requests:
    """A request for each row of a contiguous array [n, bytes]."""
    bounds = np.arange(rows.shape[0] + 1)
    width = rows.shape[1]
    return Requests(
        rows.reshape(-1), offsets, bounds, bounds[:-1] * width, np.full(rows.shape[0], width)
    )


class Damaged(Exception):
    """A row whose xxh3-64 is not what its check says."""

    def __init__(self, row: int, expected: int, found: int) -> None:
        super().__init__(row, expected, found)
        self.row = row
        self.expected = expected
        self.found = found


class Batch(Protocol):
    """Requests in flight."""

    @property
    def latencies(self) -> list[int]:
        """Nanoseconds per request, once all are served."""

    @property
    def bytes_read(self) -> int:
        """Of the file, once all are served."""

    @property
    def finished(self) -> int:
        """When the last request was served, as `time.perf_counter_ns` counts; 0 before that, and
        where there was none."""

    def wait(self) -> None:
        """Return when every request is served. If one failed: stop handing out new ones, wait for
        those in flight, then raise its ReadError, or Damaged. Raises UsageError in a child of the
        process that submitted it."""


def land(batches: Iterable[Batch]) -> None:
    """Wait for batches that nobody comes for: none of them is to fill memory later."""
    for batch in batches:
        with suppress(BundleError):
            batch.wait()


class Process:
    """The one that made this object. A child of it has none of its threads: what they would do,
    it can never wait for."""

    def __init__(self) -> None:
        self._id = os.getpid()

    @property
    def ours(self) -> bool:
        """Whether it is the one that asks."""
        return os.getpid() == self._id

    def require(self, path: str) -> None:
        """Raise UsageError unless it is."""
        if not self.ours:
            raise UsageError("the reader was opened by another process", file=path)


class Engine(Protocol):
    """What serves batches."""

    def submit(self, requests: Requests) -> Batch:
        """Start reading. Raises RuntimeError once closed."""

    def close(self) -> None:
        """Wait for what is in flight."""


class Backend:
    """A way to read a file. Any offset, length and memory may be asked for; what is aligned to
    `offset_alignment` and `memory_alignment` needs no copy. At most `in_flight` requests are with
    the device at once: one for each thread, or, where it is `queued`, `queue_depth` of one thread.
    Most of them read into `memory`, if one is given.

    A subclass opens the file, says what serves its batches (`_engine`) and, if need be, what to do
    with a batch beforehand (`_prepare`).
    """

    name: ClassVar[str]
    queued: ClassVar[bool] = False
    offset_alignment = 1
    memory_alignment = 1
    _engine: Engine | None = None

    def __init__(
        self,
        path: str | os.PathLike[str],
        threads: int,
        queue_depth: int,
        memory: NDArray[np.uint8] | None = None,
    ) -> None:
        threads = integer(threads, "threads", 1)
        queue_depth = integer(queue_depth, "queue_depth", 1)
        flat = isinstance(memory, np.ndarray) and memory.dtype == np.uint8 and memory.ndim == 1
        if memory is not None and not (flat and memory.flags.c_contiguous):
            raise UsageError(
                "no memory to read into",
                field="memory",
                expected="contiguous uint8 [n]",
                found=type(memory).__name__,
            )
        self.path = os.fspath(path)
        self.in_flight = queue_depth if self.queued else threads
        self._memory = memory
        self._process = Process()
        self._closing = threading.Lock()

    def submit(self, requests: Requests) -> Batch:
        """Start reading. The memory must not be touched until the batch is there. Raises UsageError
        once closed, and in a child of the process that opened this."""
        self._process.require(self.path)
        engine = self._engine
        if engine is None:
            raise UsageError("the reader is closed", file=self.path)
        self._prepare(requests)
        try:
            return engine.submit(requests)
        except RuntimeError as error:  # by another thread, meanwhile
            raise UsageError("the reader is closed", file=self.path) from error

    def close(self) -> None:
        """Wait for what is in flight, then let go of the file. May be called twice, by a child of
        the process that opened this too: it lets go of its own hold of the file."""
        if self._process.ours:
            with self._closing:
                if self._engine is not None:
                    self._engine.close()
                    self._let_go()
        elif self._engine is not None:
            self._let_go()

    def _let_go(self) -> None:
        self._engine = None
        self._release()

    def _open(self, flags: int) -> int:
        try:
            return os.open(self.path, flags | os.O_CLOEXEC)
        except OSError as error:
            raise ReadError(f"cannot open: {error.strerror}", file=self.path) from error

    def _prepare(self, requests: Requests) -> None:
        """Called with each batch before its requests are read."""

    def _release(self) -> None:
        """Give back what the backend holds of the file."""
        raise NotImplementedError

"""The batch reader: neuron ids in, bundles out (spec, section 7).

Strategy: ids become slots of the group's region; slots that touch become one request, scattered
over the rows of the result by its views; the backend widens what the device wants wider. Every
bundle is checked against its xxh3-64 on the thread that read it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from bundlefmt.errors import FormatError, UsageError
from bundlefmt.layout.arithmetic import round_down
from bundlefmt.layout.encodings import numbers_in
from bundlefmt.layout.header import Group
from bundlefmt.layout.order import slots_of
from bundlefmt.storage.backends import MAX_VIEWS, Backend, Batch, Request
from bundlefmt.storage.buffers import aligned_empty

# A longer run is split so that several threads share it. 256 KiB and up reach an NVMe's
# sequential rate: `bundlefmt bench --chunk-size 64K,256K,1M` measures it again.
MAX_REQUEST = 1 << 20

Neurons = Sequence[int] | NDArray[np.integer[Any]]


class Catalogue(Protocol):
    """What the reader needs to know of a file."""

    path: str

    def group(self, layer: int, expert: int | None = None) -> Group: ...
    def checksums(self, group: Group) -> NDArray[np.uint64]: ...
    def order(self, group: Group) -> NDArray[np.uint32] | None: ...


@dataclass
class ReadStats:
    """Counters since a reader was opened, of batches that have succeeded."""

    requests: int = 0
    bundles: int = 0
    bytes_asked: int = 0  # of the parts that callers wanted, each bundle of a batch once
    bytes_read: int = 0
    seconds: float = 0.0  # spent waiting for reads

    @property
    def read_amplification(self) -> float:
        """Bytes read / bytes asked for; 0 when nothing was asked for."""
        return self.bytes_read / self.bytes_asked if self.bytes_asked else 0.0


@dataclass(frozen=True)
class Bundles:
    """The bundles of one batch. `raw` is uint8 [n, stride]; row k is the bundle of neurons[k]."""

    group: Group
    neurons: NDArray[np.int64]
    raw: NDArray[np.uint8]

    def part(self, name: str) -> NDArray[Any]:
        """A part's numbers [n, d_model]: a view of `raw` in the stored type for f32, f16 and
        bf16, float32 for block encodings. Raises UsageError when the bundles do not hold it."""
        part = self.group.part(name)
        if part is None or part.offset is None:
            raise UsageError(
                "the bundles do not hold this part",
                field=f"{self.group.label}, {name}",
                expected=", ".join(held.name for held in self.group.bundled),
            )
        return numbers_in(self.raw[:, part.offset : part.offset + part.length], part.encoding)

    @property
    def gate(self) -> NDArray[Any]:
        """`part("gate")`"""
        return self.part("gate")

    @property
    def up(self) -> NDArray[Any]:
        """`part("up")`"""
        return self.part("up")

    @property
    def down(self) -> NDArray[Any]:
        """`part("down")`"""
        return self.part("down")


class Pending:
    """A batch in flight. `latencies` holds nanoseconds per request, once it is there."""

    def __init__(
        self,
        reads: Batch,
        bundles: Bundles,
        asked: ReadStats,
        stats: ReadStats,
        duplicates: tuple[NDArray[np.int64], NDArray[np.int64]],
    ):
        self._reads = reads
        self._bundles = bundles
        self._asked = asked
        self._stats = stats
        self._duplicates = duplicates
        self._done = False

    @property
    def latencies(self) -> list[int]:
        """Nanoseconds that each request took."""
        return self._reads.latencies

    def result(self) -> Bundles:
        """Wait for the batch. Raises ReadError or FormatError once nothing of it is in flight."""
        if not self._done:
            start = time.perf_counter()
            self._reads.wait()
            self._stats.seconds += time.perf_counter() - start
            self._stats.requests += self._asked.requests
            self._stats.bundles += self._asked.bundles
            self._stats.bytes_asked += self._asked.bytes_asked
            self._stats.bytes_read += self._reads.bytes_read
            twins, firsts = self._duplicates
            if twins.size:
                self._bundles.raw[twins] = self._bundles.raw[firsts]
            self._done = True
        return self._bundles


class _Placed(NamedTuple):
    """Where each bundle of a batch lies and goes: ascending `slots`, slot k into
    target[rows[k]]."""

    group: Group
    slots: NDArray[np.int64]
    rows: NDArray[np.int64]
    target: NDArray[np.uint8]

    def requests(self, skip: int) -> list[Request]:
        """One request per run of touching slots, none longer than MAX_REQUEST, each from the
        `skip`-th byte of its first bundle on; its tag is its slice of `slots`."""
        count, stride = self.slots.size, self.group.stride
        longest = min(max(MAX_REQUEST // stride, 1), MAX_VIEWS)
        index = np.arange(count)
        apart = np.ones(count, dtype=bool)
        apart[1:] = self.slots[1:] != self.slots[:-1] + 1
        in_run = index - np.maximum.accumulate(np.where(apart, index, 0))
        bounds = [*np.flatnonzero(in_run % longest == 0).tolist(), count]
        offsets = (self.slots * stride + (self.group.bundles.offset + skip)).tolist()
        return [
            Request(offsets[a], self._views(a, b, skip), slice(a, b)) for a, b in pairwise(bounds)
        ]

    def _views(self, a: int, b: int, skip: int) -> list[NDArray[np.uint8]]:
        """The memory for slots[a:b], rows that touch as one view."""
        if b - a == 1:
            return [self.target[self.rows[a]][skip:]]
        rows = self.rows[a:b]
        if self.target.strides[0] == self.group.stride:
            breaks = np.flatnonzero(rows[1:] != rows[:-1] + 1) + 1
        else:
            breaks = np.arange(1, rows.size)
        bounds = [0, *breaks.tolist(), rows.size]
        views = [self.target[rows[i] : rows[i] + (j - i)].reshape(-1) for i, j in pairwise(bounds)]
        views[0] = views[0][skip:]
        return views


class Reader:
    """Serves batches of neurons from one bundle file through one backend; a context manager.

    `backend` is the backend in effect and `fallback` why it is not the first choice (None when
    it is). `verify` checks every bundle that is read. The file must stay open meanwhile.
    """

    def __init__(
        self, file: Catalogue, backend: Backend, *, fallback: str | None = None, verify: bool = True
    ) -> None:
        self.backend = backend.name
        self.threads = backend.threads
        self.fallback = fallback
        self.verify = verify
        self.stats = ReadStats()
        self._file = file
        self._backend = backend
        self._checksums: dict[tuple[int, int | None], NDArray[np.uint64]] = {}
        self._slots: dict[tuple[int, int | None], NDArray[np.uint32] | None] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for what is in flight, then close. May be called twice."""
        self._backend.close()

    def read(
        self,
        layer: int,
        neurons: Neurons,
        *,
        expert: int | None = None,
        out: NDArray[np.uint8] | None = None,
        known: NDArray[np.uint8] | None = None,
    ) -> Bundles:
        """The bundles of those neurons, in that order; an id may stand in the batch repeatedly.

        `out`, uint8 [n, at least stride] with contiguous rows, takes the bundles (rows aligned to
        the device are written without a copy). `known`, uint8 [neurons of the group, k], holds
        the first k bytes of every bundle: they are copied from there, and only the rest is read.

        Raises UsageError for a group, id or `out` that cannot be served, ReadError when the
        device fails, FormatError when a bundle is not what its checksum says.
        """
        return self.submit(layer, neurons, expert=expert, out=out, known=known).result()

    def submit(
        self,
        layer: int,
        neurons: Neurons,
        *,
        expert: int | None = None,
        out: NDArray[np.uint8] | None = None,
        known: NDArray[np.uint8] | None = None,
    ) -> Pending:
        """Like `read`, without waiting: several batches can be in flight."""
        group = self._file.group(layer, expert)
        ids = self._check_ids(group, neurons)
        rows = self._check_out(group, ids.size, out)
        held = 0
        if known is not None:
            held = self._check_known(group, known)
            rows[:, :held] = known[ids]
        slots = self._slots_of(group, ids)
        by_slot = np.argsort(slots, kind="stable")
        sorted_slots = slots[by_slot]
        fresh = np.ones(ids.size, dtype=bool)
        fresh[1:] = sorted_slots[1:] != sorted_slots[:-1]
        placed = _Placed(group, sorted_slots[fresh], by_slot[fresh], rows)
        duplicates = (by_slot[~fresh], placed.rows[np.cumsum(fresh) - 1][~fresh])
        skip = round_down(held, self._backend.offset_alignment)
        requests = placed.requests(skip)
        check = self._checker(placed, ids) if self.verify else None
        reads = self._backend.submit(requests, check)
        asked = ReadStats(
            requests=len(requests),
            bundles=placed.rows.size,
            bytes_asked=placed.rows.size * (group.used - held),
        )
        return Pending(reads, Bundles(group, ids, rows), asked, self.stats, duplicates)

    def _check_ids(self, group: Group, neurons: Neurons) -> NDArray[np.int64]:
        try:
            ids = np.asarray(neurons)
        except ValueError:  # nested lists of different lengths
            ids = np.empty((0, 0))
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise UsageError(
                "neurons are a sequence of integers",
                field="neurons",
                found=f"{ids.dtype} of shape {ids.shape}",
            )
        if ids.size and not (ids.min() >= 0 and ids.max() < group.neurons):
            raise UsageError(
                "no such neuron",
                file=self._file.path,
                field=group.label,
                expected=f"0..{group.neurons - 1}",
                found=int(ids.min() if ids.min() < 0 else ids.max()),
            )
        return ids.astype(np.int64)

    def _check_known(self, group: Group, known: NDArray[np.uint8]) -> int:
        """How many bytes of each bundle are known."""
        if (
            known.dtype != np.uint8
            or known.ndim != 2
            or known.shape[0] != group.neurons
            or known.shape[1] > group.used
        ):
            raise UsageError(
                "not the first bytes of this group's bundles",
                field="known",
                expected=f"uint8 [{group.neurons}, at most {group.used}]",
                found=f"{known.dtype} {list(known.shape)}",
            )
        return int(known.shape[1])

    def _check_out(
        self, group: Group, count: int, out: NDArray[np.uint8] | None
    ) -> NDArray[np.uint8]:
        if out is None:
            return aligned_empty(count * group.stride).reshape(count, group.stride)
        fits = (
            out.dtype == np.uint8
            and out.ndim == 2
            and out.shape[0] == count
            and out.shape[1] >= group.stride
            and out.strides[1] == 1
            and out.flags.writeable
        )
        if not fits:
            raise UsageError(
                "out cannot take the bundles",
                field="out",
                expected=f"writable uint8 [{count}, {group.stride}] with contiguous rows",
                found=f"{out.dtype} {list(out.shape)}, strides {out.strides}",
            )
        return out[:, : group.stride]

    def _slots_of(self, group: Group, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        key = (group.layer, group.expert)
        if key not in self._slots:
            order = self._file.order(group)
            self._slots[key] = None if order is None else slots_of(order)
        table = self._slots[key]
        return ids if table is None else table[ids].astype(np.int64)

    def _checker(self, placed: _Placed, ids: NDArray[np.int64]) -> Callable[[Request], None]:
        """A function that compares a request's bundles with the group's checksums."""
        group = placed.group
        key = (group.layer, group.expert)
        if key not in self._checksums:
            self._checksums[key] = self._file.checksums(group)
        expected = self._checksums[key][placed.slots].tolist()
        rows = placed.rows.tolist()

        def check(request: Request) -> None:
            for k in range(request.tag.start, request.tag.stop):
                found = xxhash.xxh3_64_intdigest(placed.target[rows[k]])
                if found != expected[k]:
                    raise FormatError(
                        "bundle damaged",
                        file=self._file.path,
                        field=f"{group.label}, neuron {ids[rows[k]]}",
                        offset=group.bundles.offset + int(placed.slots[k]) * group.stride,
                        expected=f"{expected[k]:016x}",
                        found=f"{found:016x}",
                    )

        return check

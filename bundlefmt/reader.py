"""The batch reader: neuron ids in, bundles out (spec, section 7).

Strategy: ids become slots of the group's region; slots that touch, or that only a small gap parts,
become one request, scattered over the rows of the result by its views; what lies in a gap goes into
spare memory; the backend widens what the device wants wider. Every bundle that was asked for is
checked against its xxh3-64 as soon as it has come. All of it is arrays: nothing here is
done neuron by neuron.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from bundlefmt.errors import FormatError, UsageError
from bundlefmt.layout.arithmetic import round_down
from bundlefmt.layout.encodings import numbers_in
from bundlefmt.layout.header import Group
from bundlefmt.layout.order import slots_of
from bundlefmt.storage.backends import (
    MAX_VIEWS,
    SPARE,
    Backend,
    Batch,
    Checks,
    Damaged,
    Requests,
)
from bundlefmt.storage.buffers import Recycled, aligned_empty

# A longer run is split so that several threads share it. 256 KiB and up reach an NVMe's
# sequential rate: `bundlefmt bench --chunk-size 64K,256K,1M` measures it again.
MAX_REQUEST = 1 << 20

_LATEST = 512  # spans that one which is told of late may still overlap

Neurons = Sequence[int] | NDArray[np.integer[Any]]


class Catalogue(Protocol):
    """What the reader needs to know of a file."""

    path: str

    def group(self, layer: int, expert: int | None = None) -> Group: ...
    def checksums(self, group: Group) -> NDArray[np.uint64]: ...
    def order(self, group: Group) -> NDArray[np.uint32] | None: ...


@dataclass
class ReadStats:
    """Counters since a reader was opened, of batches that have succeeded: its own, and those of
    others that read for the same model."""

    requests: int = 0
    bundles: int = 0
    bytes_asked: int = 0  # of the parts that callers wanted, each bundle of a batch once
    bytes_read: int = 0
    seconds: float = 0.0  # spent waiting for reads
    busy_seconds: float = 0.0  # during which reads were in flight

    def __post_init__(self) -> None:
        self._latest: list[tuple[int, int]] = []  # spans that do not touch, ascending, in ns
        self._adding = threading.Lock()

    @property
    def read_amplification(self) -> float:
        """Bytes read / bytes asked for; 0 when nothing was asked for."""
        return self.bytes_read / self.bytes_asked if self.bytes_asked else 0.0

    def add(self, asked: ReadStats, batch: Batch, began: int, waited: float) -> None:
        """All of a batch is there: it was to read what was `asked`, was submitted at `began` (as
        `time.perf_counter_ns` counts), and was waited for so many seconds."""
        with self._adding:
            self.requests += asked.requests
            self.bundles += asked.bundles
            self.bytes_asked += asked.bytes_asked
            self.bytes_read += batch.bytes_read
            self.seconds += waited
            if batch.finished > began:
                self._in_flight(began, batch.finished)

    def _in_flight(self, began: int, ended: int) -> None:
        """Reads were, meanwhile: what others have not counted yet is counted as busy."""
        at = len(self._latest)
        while at and self._latest[at - 1][1] >= began:
            at -= 1
        later = self._latest[at:]
        touching = [span for span in later if span[0] <= ended]
        first = min([began, *(span[0] for span in touching)])
        last = max([ended, *(span[1] for span in touching)])
        counted = sum(span[1] - span[0] for span in touching)
        self.busy_seconds += (last - first - counted) / 1e9
        self._latest[at:] = [(first, last), *later[len(touching) :]]
        del self._latest[:-_LATEST]

    def since(self, before: ReadStats) -> ReadStats:
        """What has been added since these counters were `before`."""
        return ReadStats(
            *(getattr(self, f.name) - getattr(before, f.name) for f in fields(ReadStats))
        )


@dataclass(frozen=True)
class Bundles:
    """The bundles of one batch: the bundle of neurons[k] is row rows[k] of `raw`, uint8 [any,
    stride]. Unless the caller chose the rows, that is row k."""

    group: Group
    neurons: NDArray[np.int64]
    raw: NDArray[np.uint8]
    rows: NDArray[np.int64]

    def part(self, name: str) -> NDArray[Any]:
        """A part's numbers, one vector per row of `raw` [any, d_model]: a view of it in the stored
        type for f32, f16 and bf16, float32 for block encodings. Raises UsageError when the bundles
        do not hold it."""
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


class _Placed(NamedTuple):
    """Where each bundle of a batch lies and goes: ascending `slots`, the k-th of which holds
    neuron ids[k] and goes into row rows[k] of the bundles; `twins` are rows whose neuron stands in
    the batch before, in the rows `firsts`."""

    bundles: Bundles
    slots: NDArray[np.int64]
    ids: NDArray[np.int64]
    rows: NDArray[np.int64]
    twins: NDArray[np.int64]
    firsts: NDArray[np.int64]

    def requests(
        self, skip: int, gap: int, spare: NDArray[np.uint8], checksums: NDArray[np.uint64] | None
    ) -> Requests:
        """One request per run of slots with at most `gap` bytes between two, none longer than
        MAX_REQUEST, each from the `skip`-th byte of its first bundle on. What lies in the gaps goes
        into `spare`."""
        group, count, stride = self.bundles.group, self.slots.size, self.bundles.group.stride
        memory, starts = _as_memory(self.bundles.raw, self.rows)
        longest = min(max(MAX_REQUEST // stride, 1), MAX_VIEWS)
        steps = np.diff(self.slots)
        far = steps > gap // stride + 1
        runs = _edges(far, count)
        firsts = self.slots[runs[:-1]]
        if count and (self.slots[runs[1:] - 1] - firsts).max() >= longest:
            # A run is cut every `longest` slots, of which each is at most one view.
            turn = (self.slots - np.repeat(firsts, np.diff(runs))) // longest
            far |= turn[1:] != turn[:-1]
            runs = _edges(far, count)
            firsts = self.slots[runs[:-1]]
        views = _edges(far | (steps > 1) | (np.diff(starts) != stride), count)
        joints = views[1:-1] - 1
        bounds = _edges(far[joints], views.size - 1)
        view_starts, view_lengths = starts[views[:-1]], np.diff(views) * stride
        if gap >= stride:
            # A gap is a view, too, before the one that it parts from those before.
            gaps = np.where(far[joints], 0, (steps[joints] - 1) * stride)
            before = np.flatnonzero(gaps)
            view_starts = np.insert(view_starts, before + 1, SPARE)
            view_lengths = np.insert(view_lengths, before + 1, gaps[before])
            bounds += np.searchsorted(before + 1, bounds)
        if skip:
            view_starts[bounds[:-1]] += skip
            view_lengths[bounds[:-1]] -= skip
        return Requests(
            memory,
            firsts * stride + (group.bundles.offset + skip),
            bounds,
            view_starts,
            view_lengths,
            None if checksums is None else Checks(runs, starts, stride, checksums[self.slots]),
            spare,
        )


def _edges(apart: NDArray[np.bool_], count: int) -> NDArray[np.int64]:
    """Where runs of `count` things in a row begin, and where the last one ends: apart[k] parts the
    k-th thing from the next."""
    inner = np.flatnonzero(apart)
    edges = np.zeros(inner.size + 2 if count else 1, dtype=np.int64)
    edges[1:-1] = inner + 1
    edges[-1] = count
    return edges


def _kind(given: object) -> str:
    """What somebody gave in place of an array that fits."""
    if not isinstance(given, np.ndarray):
        return type(given).__name__
    return f"{given.dtype} {list(given.shape)}, strides {given.strides}"


def _as_memory(
    rows: NDArray[np.uint8], some: NDArray[np.int64]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The bytes from the lowest row's first to the highest row's last, and where in them some of
    the rows begin."""
    count, step = rows.shape[0], rows.strides[0]
    if rows.flags.c_contiguous:
        return rows.reshape(-1), some * step
    if step < 0:
        rows = rows[::-1]
    length = abs(step) * (count - 1) + rows.shape[1] if count else 0
    return as_strided(rows, (length,), (1,)), some * step - min(step * (count - 1), 0)


class Pending:
    """A batch in flight."""

    def __init__(
        self,
        path: str,
        began: int,
        reads: Batch,
        placed: _Placed,
        asked: ReadStats,
        stats: ReadStats,
    ) -> None:
        self._path = path
        self._began = began
        self._reads = reads
        self._placed = placed
        self._asked = asked
        self._stats = stats
        self._done = False
        self._counts = iter((True,))  # whoever waits for the batch first

    @property
    def latencies(self) -> list[int]:
        """Nanoseconds that each request took, once all are there."""
        return self._reads.latencies

    @property
    def span(self) -> tuple[int, int]:
        """When the batch was submitted and when its last read was done, as `time.perf_counter_ns`
        counts; the same moment when it had nothing to read. Known once all are there."""
        return self._began, max(self._reads.finished, self._began)

    def result(self) -> Bundles:
        """Wait for the batch. Raises ReadError or FormatError once nothing of it is in flight."""
        bundles = self._placed.bundles
        if not self._done:
            start = time.perf_counter()
            try:
                self._reads.wait()
            except Damaged as damage:
                raise self._error(damage) from None
            waited = time.perf_counter() - start
            if next(self._counts, False):
                self._stats.add(self._asked, self._reads, self._began, waited)
            if self._placed.twins.size:
                bundles.raw[self._placed.twins] = bundles.raw[self._placed.firsts]
            self._done = True
        return bundles

    def _error(self, damage: Damaged) -> FormatError:
        group, slot = self._placed.bundles.group, int(self._placed.slots[damage.row])
        neuron = self._placed.ids[damage.row]
        return FormatError(
            "bundle damaged",
            file=self._path,
            field=f"{group.label}, neuron {neuron}",
            offset=group.bundles.offset + slot * group.stride,
            expected=f"{damage.expected:016x}",
            found=f"{damage.found:016x}",
        )


class Reader:
    """Serves batches of neurons from one bundle file through one backend; a context manager.

    `backend` is the backend in effect and `fallback` why it is not the first choice (None when
    it is); `in_flight` is how many requests it has with the device at once. `verify` checks every
    bundle that is asked for. Two of them become one request when at most `gap` bytes of others lie
    between: those are read too, and dropped. The file must stay open meanwhile.
    """

    def __init__(
        self,
        file: Catalogue,
        backend: Backend,
        *,
        fallback: str | None = None,
        verify: bool = True,
        gap: int = 0,
    ) -> None:
        self.backend = backend.name
        self.in_flight = backend.in_flight
        self.fallback = fallback
        self.verify = verify
        self.gap = gap
        self.stats = ReadStats()
        self._file = file
        self._backend = backend
        self._spare = aligned_empty(min(gap, MAX_REQUEST))
        self._memory = Recycled()
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
        rows: NDArray[np.int64] | None = None,
        known: NDArray[np.uint8] | None = None,
    ) -> Bundles:
        """The bundles of those neurons, in that order; an id may stand in the batch repeatedly.
        Their memory is used for another batch once no view of it is left (`storage.buffers`:
        at most 64 MiB are kept for that, until the reader goes).

        `out`, uint8 [n, at least stride] with contiguous rows, takes the bundles (rows aligned to
        the device are written without a copy); with `rows`, an int64 [n], the k-th goes into
        out[rows[k]], and the rest of `out` stays as it is. `known`, uint8 [neurons of the group,
        k], holds the first k bytes of every bundle: they are copied from there, and only the rest
        is read.

        Raises UsageError for a group, id, row or `out` that cannot be served, ReadError when the
        device fails, FormatError when a bundle is not what its checksum says.
        """
        return self.submit(layer, neurons, expert=expert, out=out, rows=rows, known=known).result()

    def submit(
        self,
        layer: int,
        neurons: Neurons,
        *,
        expert: int | None = None,
        out: NDArray[np.uint8] | None = None,
        rows: NDArray[np.int64] | None = None,
        known: NDArray[np.uint8] | None = None,
    ) -> Pending:
        """Like `read`, without waiting: several batches can be in flight."""
        group = self._file.group(layer, expert)
        ids = self._check_ids(group, neurons)
        raw = self._check_out(group, ids.size if rows is None else None, out)
        rows = self._check_rows(rows, ids.size, raw.shape[0])
        held = 0
        if known is not None:
            held = self._check_known(group, known)
            raw[rows, :held] = known[ids]
        placed = self._place(Bundles(group, ids, raw, rows))
        skip = round_down(held, self._backend.offset_alignment)
        checksums = self._checksums_of(group) if self.verify else None
        requests = placed.requests(skip, self.gap, self._spare, checksums)
        asked = ReadStats(
            requests=requests.offsets.size,
            bundles=placed.rows.size,
            bytes_asked=placed.rows.size * (group.used - held),
        )
        began = time.perf_counter_ns()
        reads = self._backend.submit(requests)
        return Pending(self._file.path, began, reads, placed, asked, self.stats)

    def _place(self, bundles: Bundles) -> _Placed:
        slots = self._slots_of(bundles.group, bundles.neurons)
        by_slot = np.argsort(slots, kind="stable")
        slots, ids, rows = slots[by_slot], bundles.neurons[by_slot], bundles.rows[by_slot]
        fresh = np.ones(slots.size, dtype=bool)
        fresh[1:] = slots[1:] != slots[:-1]
        if fresh.all():
            return _Placed(bundles, slots, ids, rows, rows[:0], rows[:0])
        first = rows[fresh][np.cumsum(fresh) - 1]
        return _Placed(bundles, slots[fresh], ids[fresh], rows[fresh], rows[~fresh], first[~fresh])

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
            not isinstance(known, np.ndarray)
            or known.dtype != np.uint8
            or known.ndim != 2
            or known.shape[0] != group.neurons
            or known.shape[1] > group.used
        ):
            raise UsageError(
                "not the first bytes of this group's bundles",
                field="known",
                expected=f"uint8 [{group.neurons}, at most {group.used}]",
                found=_kind(known),
            )
        return int(known.shape[1])

    def _check_out(
        self, group: Group, count: int | None, out: NDArray[np.uint8] | None
    ) -> NDArray[np.uint8]:
        """`out`, or memory of the batch's own; any number of rows where `count` is None."""
        if out is None:
            count = count or 0
            return self._memory.empty(count * group.stride).reshape(count, group.stride)
        fits = (
            isinstance(out, np.ndarray)
            and out.dtype == np.uint8
            and out.ndim == 2
            and count in (None, out.shape[0])
            and out.shape[1] >= group.stride
            and out.strides[1] == 1
            and out.flags.writeable
        )
        if not fits:
            raise UsageError(
                "out cannot take the bundles",
                field="out",
                expected=f"writable uint8 [{'any' if count is None else count}, {group.stride}] "
                "with contiguous rows",
                found=_kind(out),
            )
        return out[:, : group.stride]

    def _check_rows(
        self, rows: NDArray[np.int64] | None, count: int, most: int
    ) -> NDArray[np.int64]:
        if rows is None:
            return np.arange(count)
        fits = isinstance(rows, np.ndarray) and rows.shape == (count,) and rows.dtype == np.int64
        if not fits or (count and not (rows.min() >= 0 and rows.max() < most)):
            raise UsageError(
                "rows do not fit",
                field="rows",
                expected=f"int64 [{count}] of 0..{most - 1}",
                found=_kind(rows),
            )
        return rows

    def _slots_of(self, group: Group, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        key = (group.layer, group.expert)
        if key not in self._slots:
            order = self._file.order(group)
            self._slots[key] = None if order is None else slots_of(order)
        table = self._slots[key]
        return ids if table is None else table[ids].astype(np.int64)

    def _checksums_of(self, group: Group) -> NDArray[np.uint64]:
        key = (group.layer, group.expert)
        if key not in self._checksums:
            self._checksums[key] = self._file.checksums(group)
        return self._checksums[key]

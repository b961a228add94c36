"""How fast a device, or a bundle file on it, serves random reads through each backend.

Every repetition starts cold (the file's cached pages are dropped first), reads other places than
the one before it, and keeps two batches in flight. A latency is one request's, from the moment it
is taken up to the moment its bytes are there.
"""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bundlefmt import native
from bundlefmt.errors import ReadError, UsageError
from bundlefmt.file import BundleFile
from bundlefmt.layout.header import Group
from bundlefmt.measurement import fio, machine
from bundlefmt.measurement.reads import (
    DEFAULT_BATCH,
    ORDERS,
    REPETITIONS,
    Pattern,
    Slots,
    reads_per_repetition,
    timed,
    two_in_flight,
)
from bundlefmt.measurement.target import DEFAULT_SIZE, SEED, target, touched
from bundlefmt.storage.backends import (
    BACKENDS,
    DEFAULT_QUEUE_DEPTH,
    DEFAULT_THREADS,
    open_backend,
    whole_rows,
)
from bundlefmt.storage.device import drop_cache

DEFAULT_CHUNKS = (4 << 10, 16 << 10, 64 << 10)


@dataclass(frozen=True)
class BenchRow:
    """One setting's result. Rates are medians over the repetitions, with their least and most;
    latencies and CPU time are per request."""

    file: str
    reads: str  # "device" or "bundles"
    backend: str
    fallback: str | None  # why it is not the first choice, where `auto` was asked for
    chunk_bytes: int
    neurons_per_chunk: int | None
    threads: int | None  # of all but uring
    queue_depth: int | None  # of uring
    batch: int  # chunks: neurons, where one neuron is a chunk
    order: str
    adjacent: float  # share of a batch's chunks that touch another one of it
    verify: bool
    repetitions: int
    requests: int  # per repetition
    bytes_per_second: float
    least_bytes_per_second: float
    most_bytes_per_second: float
    requests_per_second: float
    latency_median_us: float
    latency_p99_us: float
    cpu_us_per_read: float


@dataclass(frozen=True)
class Bench:
    """All rows; which backends cannot work on the file, and why; fio's rate at each chunk size,
    where it was asked for and fio is installed, and else why there is none; the machine."""

    rows: list[BenchRow]
    unusable: dict[str, str]
    ceilings: list[fio.Ceiling]
    no_ceiling: str | None
    machine: dict[str, Any]


def bench(
    model: str | os.PathLike[str] | None = None,
    *,
    chunk_sizes: Sequence[int] | None = None,
    threads: Sequence[int] = (DEFAULT_THREADS,),
    queue_depths: Sequence[int] = (DEFAULT_QUEUE_DEPTH,),
    backend: str | None = None,
    batch: int = DEFAULT_BATCH,
    order: str = ORDERS[0],
    adjacent: float = 0.0,
    folder: str | os.PathLike[str] = ".",
    size: int = DEFAULT_SIZE,
    verify: bool = True,
    ceiling: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Bench:
    """Random reads of each chunk size, through each backend that works here (or the one named),
    `uring` at each queue depth, the others with each number of threads. With a model: bundles of
    it, as many neighbours per chunk as fill it (one bundle where `chunk_sizes` is None). Without:
    a temporary file of `size` bytes in `folder`. A batch is `batch` chunks in `order`; `adjacent`,
    of a model only, is the share of them that touch another. `ceiling`: fio too.

    Raises UsageError for settings that cannot be, ReadError and WriteError when the device fails.
    """
    native.require()
    pattern = Pattern(batch, order, adjacent)
    pattern.check()
    if model is None and adjacent:
        raise UsageError("only bundles can be adjacent: name a bundle file", field="adjacent")
    rows: list[BenchRow] = []
    with target(model, folder, size) as (path, file):
        usable, unusable = _backends(path, backend)
        counts = {name: queue_depths if name == "uring" else threads for name in usable}
        chunks = chunk_sizes or ([file.groups[0].stride] if file else DEFAULT_CHUNKS)
        total = len(chunks) * sum(map(len, counts.values()))
        for chunk, name in itertools.product(chunks, usable):
            for count in counts[name]:
                setting = _Setting(name, usable[name], chunk, count, pattern, verify)
                rows.append(
                    _bench_device(path, setting) if file is None else _bench_bundles(file, setting)
                )
                progress(len(rows), total)
        wanted = sorted({row.chunk_bytes for row in rows}) if ceiling else []
        ceilings, no_ceiling = _ceilings(path, wanted) if wanted else ([], "not asked for")
        return Bench(rows, unusable, ceilings, no_ceiling, machine.facts(path))


def _backends(path: str, wanted: str | None) -> tuple[dict[str, str | None], dict[str, str]]:
    """The backends to measure, each with why `auto` fell back on it; and why others cannot be."""
    if wanted is not None:
        opened, fallback = open_backend(path, wanted, threads=1)
        opened.close()
        return {opened.name: fallback}, {}
    usable: dict[str, str | None] = {}
    unusable: dict[str, str] = {}
    for name in BACKENDS:
        try:
            open_backend(path, name, threads=1)[0].close()
            usable[name] = None
        except ReadError as error:
            unusable[name] = error.what
    return usable, unusable


def _ceilings(path: str, chunks: Sequence[int]) -> tuple[list[fio.Ceiling], str | None]:
    """fio's at each chunk size, or why there is none."""
    if not fio.installed():
        return [], "fio is not installed"
    try:
        return [fio.run(path, chunk, fio.best_depth(path, chunk)) for chunk in chunks], None
    except ReadError as error:
        return [], error.what


class _Setting(NamedTuple):
    """What a row is measured with; `in_flight`: the queue depth of uring, threads of the others."""

    backend: str
    fallback: str | None
    chunk: int
    in_flight: int
    pattern: Pattern
    verify: bool


class _Session(NamedTuple):
    """An opened file, ready for one timed read of `nbytes`; `read` returns latencies in ns."""

    nbytes: int
    read: Callable[[], list[int]]


def _bench_device(path: str, setting: _Setting) -> BenchRow:
    size, chunk = Path(path).stat().st_size, setting.chunk
    if not 0 < chunk <= size:
        raise UsageError(
            "chunk does not fit the file", field="chunk_size", expected=f"1..{size}", found=chunk
        )
    random = np.random.default_rng(SEED)
    count = min(reads_per_repetition(chunk), size // chunk)
    pattern = setting.pattern._replace(batch=min(setting.pattern.batch, count))
    bounds = range(pattern.batch, count, pattern.batch)
    memory = touched(count, chunk)

    @contextmanager
    def session(repetition: int) -> Iterator[_Session]:
        backend, _ = open_backend(path, setting.backend, setting.in_flight, setting.in_flight)
        places = np.split(random.choice(size // chunk, count, replace=False) * chunk, bounds)
        requests = [
            whole_rows(rows, pattern.ordered(offsets, random))
            for rows, offsets in zip(np.split(memory, bounds), places, strict=True)
        ]

        def read() -> list[int]:
            latencies = []
            for batch in two_in_flight(backend.submit(each) for each in requests):
                batch.wait()
                latencies += batch.latencies
            return latencies

        try:
            yield _Session(memory.nbytes, read)
        finally:
            backend.close()

    row = setting._replace(pattern=pattern, verify=False)
    return _measure(path, session, row, "device", neighbours=None)


def _bench_bundles(file: BundleFile, setting: _Setting) -> BenchRow:
    """Batches from one group after the other."""
    random = np.random.default_rng(SEED)
    stride, least = file.groups[0].stride, min(group.neurons for group in file.groups)
    width = min(max(round(setting.chunk / stride), 1), least)
    pattern = setting.pattern.fitted(least, width)
    wanted = max(reads_per_repetition(width * stride) // pattern.batch, 1)
    count = min(wanted, len(file.groups) * pattern.batches_in(least, width))

    @contextmanager
    def session(repetition: int) -> Iterator[_Session]:
        with file.reader(
            setting.backend,
            verify=setting.verify,
            threads=setting.in_flight,
            queue_depth=setting.in_flight,
        ) as reader:
            batches = [
                (group, neurons, touched(neurons.size, group.stride))
                for group, neurons in _draw(file, pattern, width, count, repetition, random)
            ]
            for group, _, _ in batches:
                reader.read(group.layer, [0], expert=group.expert)  # its tables are read here

            def read() -> list[int]:
                latencies = []
                for pending in two_in_flight(
                    reader.submit(group.layer, neurons, expert=group.expert, out=out)
                    for group, neurons, out in batches
                ):
                    pending.result()
                    latencies += pending.latencies
                return latencies

            yield _Session(sum(out.nbytes for _, _, out in batches), read)

    row = setting._replace(pattern=pattern, chunk=width * stride)
    return _measure(file.path, session, row, "bundles", neighbours=width)


def _draw(
    file: BundleFile,
    pattern: Pattern,
    width: int,
    count: int,
    repetition: int,
    random: np.random.Generator,
) -> Iterator[tuple[Group, Slots]]:
    """Neurons of `count` batches, from as many groups as there are; the next repetition goes on
    with the groups that come after."""
    groups = len(file.groups)
    for k in range(min(count, groups)):
        group = file.groups[(repetition * count + k) % groups]
        order = file.order(group)
        for slots in pattern.draw(group.neurons, width, len(range(k, count, groups)), random):
            yield group, slots if order is None else order[slots].astype(np.int64)


def _measure(
    path: str,
    session: Callable[[int], AbstractContextManager[_Session]],
    setting: _Setting,
    reads: str,
    neighbours: int | None,
) -> BenchRow:
    """Repeat a session's read, cold each time."""
    rates: list[float] = []
    cpu: list[float] = []
    latencies: list[int] = []
    for repetition in range(REPETITIONS):
        with session(repetition) as opened:
            drop_cache(path)
            latest, taken = timed(opened.read)
        rates.append(opened.nbytes / taken.seconds)
        cpu.append(taken.cpu_seconds / len(latest))
        latencies += latest
    rate = statistics.median(rates)
    queued = BACKENDS[setting.backend].queued
    return BenchRow(
        file=path,
        reads=reads,
        backend=setting.backend,
        fallback=setting.fallback,
        chunk_bytes=setting.chunk,
        neurons_per_chunk=neighbours,
        threads=None if queued else setting.in_flight,
        queue_depth=setting.in_flight if queued else None,
        batch=setting.pattern.batch,
        order=setting.pattern.order,
        adjacent=setting.pattern.adjacent,
        verify=setting.verify,
        repetitions=REPETITIONS,
        requests=len(latencies) // REPETITIONS,
        bytes_per_second=rate,
        least_bytes_per_second=min(rates),
        most_bytes_per_second=max(rates),
        requests_per_second=rate / (opened.nbytes / len(latest)),
        latency_median_us=float(np.percentile(latencies, 50)) / 1e3,
        latency_p99_us=float(np.percentile(latencies, 99)) / 1e3,
        cpu_us_per_read=statistics.median(cpu) * 1e6,
    )

"""How fast a device, or a bundle file on it, serves random reads through each backend.

Every measurement starts cold: the file's cached pages are dropped first. A latency is one
request's, from the moment a thread takes it up to the moment its bytes are there.
"""

from __future__ import annotations

import itertools
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bundlefmt.errors import ReadError, UsageError, WriteError
from bundlefmt.file import BundleFile
from bundlefmt.layout.header import Group
from bundlefmt.storage.atomic import require_free_space, scratch_file
from bundlefmt.storage.backends import BACKENDS, DEFAULT_THREADS, open_backend, whole_rows
from bundlefmt.storage.buffers import aligned_empty
from bundlefmt.storage.device import drop_cache

DEFAULT_CHUNKS = (4 << 10, 16 << 10, 64 << 10)
DEFAULT_SIZE = 1 << 30
REPETITIONS = 5

_BYTES_PER_REPETITION = 64 << 20
_MOST_READS = 4096  # per repetition: small chunks need no more for a stable median
_WRITE_STEP = 16 << 20
_SEED = 1


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
    threads: int
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


def bench(
    model: str | os.PathLike[str] | None = None,
    *,
    chunk_sizes: Sequence[int] | None = None,
    threads: Sequence[int] = (DEFAULT_THREADS,),
    backend: str | None = None,
    folder: str | os.PathLike[str] = ".",
    size: int = DEFAULT_SIZE,
    verify: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[BenchRow]:
    """Random reads of each chunk size, through each backend that works here (or the one named),
    with each number of threads. With a model: bundles of it, as many neighbours per read as fill
    the chunk (one bundle where `chunk_sizes` is None). Without: a temporary file of `size` bytes
    in `folder`.

    Raises UsageError for settings that cannot be, ReadError and WriteError when the device fails.
    """
    rows: list[BenchRow] = []
    with _target(model, folder, size) as (path, file):
        backends = _working(path) if backend is None else [backend]
        chunks = chunk_sizes or ([file.groups[0].stride] if file else DEFAULT_CHUNKS)
        for chunk, name, count in itertools.product(chunks, backends, threads):
            if file is None:
                rows.append(_bench_device(path, name, chunk, count))
            else:
                rows.append(_bench_bundles(file, name, chunk, count, verify))
            progress(len(rows), len(chunks) * len(backends) * len(threads))
    return rows


def _working(path: str) -> list[str]:
    """The backends that can read the file."""
    working = []
    for name in BACKENDS:
        with suppress(ReadError):
            open_backend(path, name, threads=1)[0].close()
            working.append(name)
    return working


@contextmanager
def _target(
    model: str | os.PathLike[str] | None, folder: str | os.PathLike[str], size: int
) -> Iterator[tuple[str, BundleFile | None]]:
    """The file to read: the model, or a temporary file full of random bytes."""
    if model is not None:
        with BundleFile(model) as file:
            if not file.groups:
                raise UsageError("a file without bundles", file=model)
            yield file.path, file
        return
    require_free_space(Path(folder), size)
    with scratch_file(folder) as temporary:
        block = np.random.default_rng(_SEED).bytes(_WRITE_STEP)
        try:
            for start in range(0, size, _WRITE_STEP):
                temporary.write(block[: size - start])
            temporary.flush()
        except OSError as error:
            raise WriteError(f"cannot write: {error.strerror}", file=folder) from error
        yield temporary.name, None


def _bench_device(path: str, name: str, chunk: int, threads: int) -> BenchRow:
    size = Path(path).stat().st_size
    if not 0 < chunk <= size:
        raise UsageError(
            "chunk does not fit the file", field="chunk-size", expected=f"1..{size}", found=chunk
        )
    random = np.random.default_rng(_SEED)
    count = min(_reads_per_repetition(chunk), size // chunk)
    memory = aligned_empty(count * chunk).reshape(count, chunk)

    @contextmanager
    def session() -> Iterator[Session]:
        backend, fallback = open_backend(path, name, threads)
        requests = whole_rows(memory, random.choice(size // chunk, count, replace=False) * chunk)

        def read() -> list[int]:
            batch = backend.submit(requests)
            batch.wait()
            return batch.latencies

        try:
            yield Session(backend.name, fallback, count * chunk, read)
        finally:
            backend.close()

    return _measure(path, session, _Setting("device", chunk, None, threads, verify=False))


def _bench_bundles(file: BundleFile, name: str, chunk: int, threads: int, verify: bool) -> BenchRow:
    """Runs of neighbours from every group in turn, all groups' batches in flight at once."""
    random = np.random.default_rng(_SEED)
    first = file.groups[0]
    neighbours = min(
        max(round(chunk / first.stride), 1),
        min(group.neurons for group in file.groups),
    )
    count = _reads_per_repetition(neighbours * first.stride)
    share = max(count // len(file.groups), 1)

    @contextmanager
    def session() -> Iterator[Session]:
        with file.reader(name, verify=verify, threads=threads) as reader:
            batches = []
            for group in file.groups:
                reader.read(group.layer, [0], expert=group.expert)  # its tables are read here
                ids = _runs(file, group, share, neighbours, random)
                out = aligned_empty(ids.size * group.stride).reshape(ids.size, group.stride)
                batches.append((group, ids, out))

            def read() -> list[int]:
                pending = [
                    reader.submit(group.layer, ids, expert=group.expert, out=out)
                    for group, ids, out in batches
                ]
                for batch in pending:
                    batch.result()
                return [latency for batch in pending for latency in batch.latencies]

            yield Session(
                reader.backend, reader.fallback, sum(out.nbytes for _, _, out in batches), read
            )

    setting = _Setting("bundles", neighbours * first.stride, neighbours, threads, verify)
    return _measure(file.path, session, setting)


def _runs(
    file: BundleFile, group: Group, count: int, neighbours: int, random: np.random.Generator
) -> NDArray[np.int64]:
    """Ids of up to `count` random runs of neighbouring bundles, no two of which touch."""
    places = (group.neurons // neighbours + 1) // 2
    starts = random.choice(places, min(count, places), replace=False) * 2 * neighbours
    slots = (starts[:, None] + np.arange(neighbours)).reshape(-1)
    order = file.order(group)
    return slots if order is None else order[slots].astype(np.int64)


class Session(NamedTuple):
    """An opened file, ready for one timed read of `nbytes`; `read` returns latencies in ns."""

    backend: str
    fallback: str | None
    nbytes: int
    read: Callable[[], list[int]]


class _Setting(NamedTuple):
    """What a row was measured with."""

    reads: str
    chunk: int
    neighbours: int | None
    threads: int
    verify: bool


def _measure(
    path: str, session: Callable[[], AbstractContextManager[Session]], setting: _Setting
) -> BenchRow:
    """Repeat a session's read, cold each time."""
    rates: list[float] = []
    cpu: list[float] = []
    latencies: list[int] = []
    for _ in range(REPETITIONS):
        drop_cache(path)
        with session() as opened:
            cpu_before, start = cpu_seconds(), time.perf_counter()
            taken = opened.read()
            rates.append(opened.nbytes / (time.perf_counter() - start))
            cpu.append((cpu_seconds() - cpu_before) / len(taken))
            latencies += taken
    rate = statistics.median(rates)
    return BenchRow(
        file=path,
        reads=setting.reads,
        backend=opened.backend,
        fallback=opened.fallback,
        chunk_bytes=setting.chunk,
        neurons_per_chunk=setting.neighbours,
        threads=setting.threads,
        verify=setting.verify,
        repetitions=REPETITIONS,
        requests=len(latencies) // REPETITIONS,
        bytes_per_second=rate,
        least_bytes_per_second=min(rates),
        most_bytes_per_second=max(rates),
        requests_per_second=rate / (opened.nbytes / len(taken)),
        latency_median_us=float(np.percentile(latencies, 50)) / 1e3,
        latency_p99_us=float(np.percentile(latencies, 99)) / 1e3,
        cpu_us_per_read=statistics.median(cpu) * 1e6,
    )


def _reads_per_repetition(chunk: int) -> int:
    return min(max(_BYTES_PER_REPETITION // chunk, 1), _MOST_READS)


def cpu_seconds() -> float:
    """This process's CPU time."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime

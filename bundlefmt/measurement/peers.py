"""The same batch of neurons through other readers; a new one is one entry in PEERS.

Every repetition starts cold and opens its reader anew, outside the time taken.
"""

from __future__ import annotations

import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bundlefmt.errors import FormatError, ReadError, UsageError
from bundlefmt.file import BundleFile
from bundlefmt.layout.header import Group
from bundlefmt.measurement import REPETITIONS, cpu_seconds
from bundlefmt.measurement.fio import ceiling
from bundlefmt.storage.backends import BACKENDS, Requests, open_backend, whole_rows
from bundlefmt.storage.buffers import aligned_empty
from bundlefmt.storage.device import drop_cache

BATCH = 512  # neurons

Bytes = NDArray[np.uint8]
Read = Callable[[], Bytes]  # the batch's bundles, [neurons, stride]


class Subject(NamedTuple):
    """What every peer reads: slots of one group; `folder` takes copies in other layouts."""

    path: str
    group: Group
    slots: NDArray[np.int64]
    folder: Path

    @property
    def places(self) -> list[tuple[int, int, int]]:
        """Of each part: its offset in a bundle, its length, and where its rows begin in
        a copy with the parts apart."""
        start, found = 0, []
        for part in self.group.bundled:
            found.append((part.offset or 0, part.length, start))
            start += part.length * self.group.neurons
        return found

    def rows(self, flat: Bytes) -> Bytes:
        """The group's bundles [neurons, stride] in a whole file's bytes."""
        start, stride = self.group.bundles.offset, self.group.stride
        return flat[start : start + self.group.neurons * stride].reshape(-1, stride)

    def empty(self) -> Bytes:
        """Memory for the batch."""
        return aligned_empty(self.slots.size * self.group.stride).reshape(-1, self.group.stride)


class Peer(NamedTuple):
    """A reader, the module it needs, and the copy it reads, if it cannot read the file itself."""

    open: Callable[[Subject], AbstractContextManager[Read]]
    needs: str | None = None
    prepare: Callable[[Subject], None] = lambda subject: None


@dataclass(frozen=True)
class PeerRow:
    """One reader's result, medians over the repetitions; `missing` says why there is none."""

    peer: str
    missing: str | None = None
    neurons: int = 0
    bytes_per_second: float = 0.0
    least_bytes_per_second: float = 0.0
    most_bytes_per_second: float = 0.0
    cpu_us_per_read: float = 0.0


def compare(model: str | os.PathLike[str]) -> list[PeerRow]:
    """A random batch of the first group through every reader, and fio's rate as the ceiling.

    Raises FormatError when two readers disagree on the bytes.
    """
    with BundleFile(model) as file:
        if not file.groups:
            raise UsageError("a file without bundles", file=model)
        group, path = file.groups[0], file.path
    count = min(BATCH, group.neurons)
    slots = np.random.default_rng(1).choice(group.neurons, count, replace=False)
    with tempfile.TemporaryDirectory(dir=Path(path).parent, prefix=".bench-") as folder:
        subject = Subject(path, group, slots, Path(folder))
        with _memmap(subject) as read:
            expected = read()
        rows = [_measure(name, peer, subject, expected) for name, peer in PEERS.items()]
    return [*rows, _fio(path, group.stride)]


def _measure(name: str, peer: Peer, subject: Subject, expected: Bytes) -> PeerRow:
    if peer.needs and find_spec(peer.needs) is None:
        return PeerRow(name, missing="not installed")
    rates, cpu = [], []
    asked = subject.slots.size * subject.group.used
    try:
        peer.prepare(subject)
        for _ in range(REPETITIONS):
            for path in (Path(subject.path), *subject.folder.glob("*.copy")):
                drop_cache(path)
            with peer.open(subject) as read:
                cpu_before, start = cpu_seconds(), time.perf_counter()
                found = read()
                rates.append(asked / (time.perf_counter() - start))
                cpu.append((cpu_seconds() - cpu_before) / subject.slots.size * 1e6)
            for offset, length, _ in subject.places:
                part = slice(offset, offset + length)
                if not np.array_equal(found[:, part], expected[:, part]):
                    raise FormatError(f"{name} reads other bytes", file=subject.path)
    except ReadError as error:
        return PeerRow(name, missing=error.what)
    median = statistics.median
    return PeerRow(
        name, None, subject.slots.size, median(rates), min(rates), max(rates), median(cpu)
    )


def _fio(path: str, chunk: int) -> PeerRow:
    try:
        found = ceiling(path, chunk)
    except ReadError as error:
        return PeerRow("fio", missing=error.what)
    if found is None:
        return PeerRow("fio", missing="not installed")
    rate = found.bytes_per_second
    return PeerRow(f"fio, depth {found.depth}", None, 0, rate, rate, rate, found.cpu_us_per_read)


@contextmanager
def _backend(subject: Subject, name: str) -> Iterator[Read]:
    """One of our backends, a whole bundle per read."""
    out = subject.empty()
    offsets = subject.group.bundles.offset + subject.slots * subject.group.stride
    requests = whole_rows(out, offsets)
    with _submitting(subject.path, name, requests, out) as read:
        yield read


@contextmanager
def _unbundled(subject: Subject) -> Iterator[Read]:
    """The backend that `auto` takes, a read for each part of each neuron."""
    out = subject.empty()
    rows = np.arange(subject.slots.size)[:, None] * subject.group.stride
    places, lengths, regions = np.array(subject.places).T
    requests = Requests(
        out.reshape(-1),
        (regions + subject.slots[:, None] * lengths).reshape(-1),
        np.arange(rows.size * lengths.size + 1),
        (rows + places).reshape(-1),
        np.tile(lengths, rows.size),
    )
    with _submitting(str(_copy(subject)), "auto", requests, out) as read:
        yield read


@contextmanager
def _submitting(path: str, name: str, requests: Requests, out: Bytes) -> Iterator[Read]:
    backend, _ = open_backend(path, name)

    def read() -> Bytes:
        backend.submit(requests).wait()
        return out

    try:
        yield read
    finally:
        backend.close()


def _copy(subject: Subject) -> Path:
    return subject.folder / "parts.copy"


def _part_by_part(subject: Subject) -> None:
    """A copy of the group with its parts apart."""
    bundles = subject.rows(np.memmap(subject.path, mode="r"))
    with _copy(subject).open("wb") as file:
        for offset, length, _ in subject.places:
            file.write(bundles[:, offset : offset + length].tobytes())
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _memmap(subject: Subject) -> Iterator[Read]:
    bundles = subject.rows(np.memmap(subject.path, mode="r"))
    yield lambda: np.asarray(bundles[subject.slots])


@contextmanager
def _advised(subject: Subject) -> Iterator[Read]:
    """mmap without readahead, every bundle asked for before the first is touched."""
    with Path(subject.path).open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    mapped.madvise(mmap.MADV_RANDOM)
    bundles = subject.rows(np.frombuffer(mapped, np.uint8))
    first, stride = subject.group.bundles.offset, subject.group.stride

    def read() -> Bytes:
        for slot in subject.slots.tolist():
            at = first + slot * stride
            ahead = at % mmap.PAGESIZE
            mapped.madvise(mmap.MADV_WILLNEED, at - ahead, stride + ahead)
        return bundles[subject.slots]

    yield read


@contextmanager
def _ninja(subject: Subject) -> Iterator[Read]:
    """mmap-ninja opens a folder: a link to the file beside the shape of its bytes, no copy."""
    from mmap_ninja import base, numpy

    folder = subject.folder / "ninja"
    if not folder.exists():
        folder.mkdir()
        (folder / "data.ninja").symlink_to(Path(subject.path).resolve())
        base._str_to_file("uint8", folder / "dtype.ninja")
        base._shape_to_file((Path(subject.path).stat().st_size,), folder / "shape.ninja")
        base._str_to_file("C", folder / "order.ninja")
    bundles = subject.rows(numpy.open_existing(folder))
    yield lambda: np.asarray(bundles[subject.slots])


@contextmanager
def _streamer(subject: Subject) -> Iterator[Read]:
    from runai_model_streamer.file_streamer import FileStreamer
    from runai_model_streamer.file_streamer.requests_iterator import FileChunks

    first, stride = subject.group.bundles.offset, subject.group.stride
    offsets = [first + slot * stride for slot in subject.slots.tolist()]
    out = subject.empty()
    with FileStreamer() as streamer:

        def read() -> Bytes:
            streamer.stream_files([FileChunks(0, subject.path, offsets, [stride] * len(offsets))])
            for _, row, tensor in streamer.get_chunks():
                out[row] = tensor.numpy().view(np.uint8)
            return out

        yield read


PEERS: dict[str, Peer] = {
    **{name: Peer(partial(_backend, name=name)) for name in BACKENDS},
    "bundled": Peer(partial(_backend, name="auto")),
    "unbundled": Peer(_unbundled, prepare=_part_by_part),
    "numpy.memmap": Peer(_memmap),
    "mmap, advised": Peer(_advised),
    "mmap-ninja": Peer(_ninja, "mmap_ninja"),
    "runai-model-streamer": Peer(_streamer, "runai_model_streamer"),
}

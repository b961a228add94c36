"""The same neurons through other readers; a new one is one entry in PEERS.

In each repetition every reader has its turn, in an order drawn anew, then fio, so that a drifting
disk, and what a device remembers of the turn before, hit all alike.
Every turn starts cold, opens its reader anew (outside the time taken), fills the same memory, and
is checked. Repetitions read other neurons each.
"""

from __future__ import annotations

import mmap
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bundlefmt import native
from bundlefmt.errors import FormatError, ReadError, UsageError
from bundlefmt.file import BundleFile
from bundlefmt.layout.arithmetic import round_up
from bundlefmt.layout.header import Group
from bundlefmt.measurement import fio, machine
from bundlefmt.measurement.reads import (
    DEFAULT_BATCH,
    ORDERS,
    REPETITIONS,
    Pattern,
    Slots,
    Taken,
    reads_per_repetition,
    timed,
    two_in_flight,
)
from bundlefmt.reader import Pending
from bundlefmt.storage.atomic import require_free_space
from bundlefmt.storage.backends import (
    BACKENDS,
    DEFAULT_QUEUE_DEPTH,
    DEFAULT_THREADS,
    Requests,
    open_backend,
    whole_rows,
)
from bundlefmt.storage.buffers import KEPT, PAGE, aligned_empty
from bundlefmt.storage.device import drop_cache

FEW = 16  # neurons that safetensors reads: a column of down costs it d_model reads

Bytes = NDArray[np.uint8]
Read = Callable[[], None]  # fills the memory of all batches


class Share(NamedTuple):
    """A batch: slots of a group, and the memory [slots, stride] that takes their bundles."""

    group: Group
    slots: Slots
    out: Bytes

    @property
    def offsets(self) -> Slots:
        """Of each bundle, in the file."""
        return self.group.bundles.offset + self.slots * self.group.stride


class Subject(NamedTuple):
    """What a peer reads, and with which of our settings; `memory` is what all shares lie in,
    `folder` takes copies of the first group in other layouts."""

    file: BundleFile
    shares: list[Share]
    memory: Bytes
    folder: Path
    backend: str
    threads: int
    queue_depth: int

    @property
    def path(self) -> str:
        """The bundle file."""
        return self.file.path

    @property
    def group(self) -> Group:
        """The one that copies hold."""
        return self.file.groups[0]

    @property
    def places(self) -> list[tuple[int, int, int]]:
        """Of each part of the group: its offset in a bundle, its length, and where its rows begin
        in a copy with the parts apart."""
        start, found = 0, []
        for part in self.group.bundled:
            found.append((part.offset or 0, part.length, start))
            start = round_up(start + part.length * self.group.neurons, PAGE)
        return found

    def rows(self, flat: Bytes, group: Group) -> Bytes:
        """A group's bundles [neurons, stride] in a whole file's bytes."""
        start, stride = group.bundles.offset, group.stride
        return flat[start : start + group.neurons * stride].reshape(-1, stride)


class Peer(NamedTuple):
    """A reader, the module it needs, and the copy of one group that it reads, if it cannot read
    the file itself; `scope` is `file`, `group` (the same count of neurons, of one group: as with
    what is compared with a copy) or `few`."""

    open: Callable[[Subject], AbstractContextManager[Read]]
    needs: str | None = None
    prepare: Callable[[Subject], None] | None = None
    scope: str = "file"


@dataclass
class PeerRow:
    """One reader's result; `missing` says why there is none. Rates and times are per repetition;
    a read is a neuron, whatever it takes (of fio: a read as long as a bundle)."""

    peer: str
    missing: str | None = None
    remark: str = ""
    neurons: int = 0  # per repetition
    batch: int = 0
    bytes_per_neuron: int = 0
    neurons_per_second: list[float] = field(default_factory=list)
    cpu_us_per_read: list[float] = field(default_factory=list)
    of_ceiling: float | None = None  # its rate to fio's, of the same repetition; the median
    cpu_of_ceiling: float | None = None

    @property
    def bytes_per_second(self) -> list[float]:
        """Of what was asked for."""
        return [rate * self.bytes_per_neuron for rate in self.neurons_per_second]

    def add(self, neurons: int, taken: Taken) -> None:
        """A repetition."""
        self.neurons_per_second.append(neurons / taken.seconds)
        self.cpu_us_per_read.append(taken.cpu_seconds / neurons * 1e6)


@dataclass(frozen=True)
class Comparison:
    """All rows, fio's the last; ratios of rates between two rows, medians over the repetitions;
    the settings, and the machine."""

    rows: list[PeerRow]
    ratios: dict[str, float]
    settings: dict[str, Any]
    machine: dict[str, Any]


# Ratio -> the two rows.
RATIOS = {
    "bundled / unbundled": ("bundled", "unbundled"),
    "verified / unverified": ("bundlefmt", "bundlefmt, unverified"),
}


def compare(
    model: str | os.PathLike[str],
    *,
    backend: str = "auto",
    threads: int = DEFAULT_THREADS,
    queue_depth: int = DEFAULT_QUEUE_DEPTH,
    batch: int = DEFAULT_BATCH,
    order: str = ORDERS[0],
    adjacent: float = 0.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Batches of neurons from group after group through every reader, and fio as the ceiling.
    `backend` is that of the reader and of what is unbundled.

    Raises UsageError for settings that cannot be, WriteError where there is no room for the
    copies, FormatError when a reader brings other bytes than the file has.
    """
    native.require()
    pattern = Pattern(batch, order, adjacent)
    pattern.check()
    with (
        BundleFile(model) as file,
        tempfile.TemporaryDirectory(dir=Path(file.path).parent, prefix=".bench-") as folder,
    ):
        if not file.groups:
            raise UsageError("a file without bundles", file=model)
        pattern = pattern.fitted(min(group.neurons for group in file.groups), width=1)
        settings = {
            "backend": backend,
            "threads": threads,
            "queue_depth": queue_depth,
            **pattern._asdict(),
            "repetitions": REPETITIONS,
        }
        subject = Subject(file, [], aligned_empty(0), Path(folder), backend, threads, queue_depth)
        rows = _take_turns(subject, pattern, progress)
        return Comparison(rows, _ratios(rows), settings, machine.facts(file.path))


def _ratios(rows: Sequence[PeerRow]) -> dict[str, float]:
    named = {row.peer: row for row in rows if not row.missing}
    return {
        title: _median_ratio(named[a].neurons_per_second, named[b].neurons_per_second)
        for title, (a, b) in RATIOS.items()
        if a in named and b in named
    }


def _median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def _take_turns(
    subject: Subject, pattern: Pattern, progress: Callable[[int, int], None]
) -> list[PeerRow]:
    file = subject.file
    rows = {name: _prepared(name, peer, subject) for name, peer in PEERS.items()}
    ceiling = PeerRow("fio", batch=1, bytes_per_neuron=file.groups[0].stride)
    random = np.random.default_rng(1)
    steps = 0
    for repetition in range(REPETITIONS):
        scopes = _scopes(subject, pattern, repetition, random)
        expected = {scope: _expected(of_scope) for scope, of_scope in scopes.items()}
        for name in random.permutation(list(PEERS)).tolist():
            peer = PEERS[name]
            try:
                if not rows[name].missing:
                    _take_turn(rows[name], peer, scopes[peer.scope], expected[peer.scope])
            except ReadError as error:
                rows[name].missing = error.what
            steps += 1
            progress(steps, REPETITIONS * (len(PEERS) + 1))
        _run_fio(ceiling, subject.path)
        steps += 1
        progress(steps, REPETITIONS * (len(PEERS) + 1))
    if not ceiling.missing:
        for row in rows.values():
            if not row.missing:
                row.of_ceiling = _median_ratio(row.neurons_per_second, ceiling.neurons_per_second)
                row.cpu_of_ceiling = _median_ratio(row.cpu_us_per_read, ceiling.cpu_us_per_read)
    return [*rows.values(), ceiling]


def _prepared(name: str, peer: Peer, subject: Subject) -> PeerRow:
    """A row to fill; `missing` where the peer cannot take part."""
    row = PeerRow(name)
    if peer.needs and find_spec(peer.needs) is None:
        row.missing = "not installed"
    elif peer.prepare is not None:
        try:
            peer.prepare(subject)
        except ReadError as error:
            row.missing = error.what
    return row


def _scopes(
    subject: Subject, pattern: Pattern, repetition: int, random: np.random.Generator
) -> dict[str, Subject]:
    """The batches of one repetition, for every scope; they share memory."""
    groups = subject.file.groups
    first, least = groups[0], min(group.neurons for group in groups)
    wanted = max(reads_per_repetition(first.stride) // pattern.batch, 1)
    count = min(wanted, len(groups) * pattern.batches_in(least, 1))
    drawn: dict[str, list[tuple[Group, Slots]]] = {"file": []}
    for k in range(min(count, len(groups))):
        group = groups[(repetition * count + k) % len(groups)]
        share = len(range(k, count, len(groups)))
        drawn["file"] += [(group, s) for s in pattern.draw(group.neurons, 1, share, random)]
    of_first = min(count, pattern.batches_in(first.neurons, 1))
    drawn["group"] = [(first, s) for s in pattern.draw(first.neurons, 1, of_first, random)]
    drawn["few"] = [(first, drawn["group"][0][1][:FEW])]
    memory = aligned_empty(max(map(_nbytes, drawn.values())))
    return {
        scope: subject._replace(shares=_shares(batches, memory), memory=memory)
        for scope, batches in drawn.items()
    }


def _nbytes(batches: Sequence[tuple[Group, Slots]]) -> int:
    return sum(slots.size * group.stride for group, slots in batches)


def _shares(batches: Sequence[tuple[Group, Slots]], memory: Bytes) -> list[Share]:
    """The batches, one after the other in the memory."""
    shares, start = [], 0
    for group, slots in batches:
        end = start + slots.size * group.stride
        shares.append(Share(group, slots, memory[start:end].reshape(-1, group.stride)))
        start = end
    return shares


def _expected(subject: Subject) -> list[Bytes]:
    flat = np.memmap(subject.path, np.uint8, mode="r")
    return [subject.rows(flat, share.group)[share.slots] for share in subject.shares]


def _take_turn(row: PeerRow, peer: Peer, subject: Subject, expected: list[Bytes]) -> None:
    for path in (Path(subject.path), *subject.folder.glob("*.copy")):
        drop_cache(path)
    for share, bundles in zip(subject.shares, expected, strict=True):
        np.invert(bundles, out=share.out)  # its pages are there, and what is left unread shows
    with peer.open(subject) as read:
        _, taken = timed(read)
    for share, bundles in zip(subject.shares, expected, strict=True):
        for part in share.group.bundled:
            place = slice(part.offset, (part.offset or 0) + part.length)
            if not np.array_equal(share.out[:, place], bundles[:, place]):
                raise FormatError(f"{row.peer} reads other bytes", file=subject.path)
    neurons = sum(share.slots.size for share in subject.shares)
    row.neurons, row.batch = neurons, subject.shares[0].slots.size
    row.bytes_per_neuron = subject.group.used
    row.add(neurons, taken)
    if peer.scope == "few":
        row.remark = f"{neurons} neurons"


def _run_fio(row: PeerRow, path: str) -> None:
    """A second of fio, at the depth that was best in the first repetition."""
    if not fio.installed():
        row.missing = "not installed"
    if row.missing:
        return
    try:
        depth = row.batch if row.neurons else fio.best_depth(path, row.bytes_per_neuron)
        found = fio.run(path, row.bytes_per_neuron, depth)
    except ReadError as error:
        row.missing = error.what
        return
    row.batch, row.neurons = depth, int(found.reads_per_second)
    row.remark = f"depth {depth}"
    row.neurons_per_second.append(found.reads_per_second)
    row.cpu_us_per_read.append(found.cpu_us_per_read)


@contextmanager
def _reader(
    subject: Subject, verify: bool = True, recycled: bool = False, in_flight: int = 2
) -> Iterator[Read]:
    """What callers use: ids in, checked bundles out, in their memory or in what the reader
    recycles; so many batches at once."""
    with subject.file.reader(
        subject.backend,
        verify=verify,
        threads=subject.threads,
        queue_depth=subject.queue_depth,
        memory=None if recycled else subject.memory,
    ) as reader:
        batches = []
        for group, slots, out in subject.shares:
            reader.read(group.layer, [0], expert=group.expert)  # its tables are read here
            order = subject.file.order(group)
            batches.append((group, slots if order is None else order[slots], out))

        if recycled:  # its memory is made here, as that of the others is beforehand
            group, _, out = batches[0]
            any_neurons = np.arange(out.shape[0])
            held = [reader.read(group.layer, any_neurons, expert=group.expert) for _ in range(KEPT)]
            del held

        def submitted() -> Iterator[Pending]:
            for group, neurons, out in batches:
                into = None if recycled else out
                yield reader.submit(group.layer, neurons, expert=group.expert, out=into)

        def read() -> None:
            for pending in submitted() if in_flight == 1 else two_in_flight(submitted()):
                pending.result()

        yield read
        if recycled:  # once more, for whoever compares the bytes
            for pending, (_, _, out) in zip(submitted(), batches, strict=True):
                out[:] = pending.result().raw


@contextmanager
def _backend(subject: Subject, name: str | None = None) -> Iterator[Read]:
    """One of our backends, a whole bundle per read."""
    requests = [whole_rows(share.out, share.offsets) for share in subject.shares]
    with _submitting(subject, subject.path, name or subject.backend, requests) as read:
        yield read


@contextmanager
def _unbundled(subject: Subject) -> Iterator[Read]:
    """The same backend, a read for each part of each neuron."""
    places, lengths, regions = np.array(subject.places).T
    requests = []
    for group, slots, out in subject.shares:
        rows = np.arange(slots.size)[:, None] * group.stride
        requests.append(
            Requests(
                out.reshape(-1),
                (regions + slots[:, None] * lengths).reshape(-1),
                np.arange(rows.size * lengths.size + 1),
                (rows + places).reshape(-1),
                np.tile(lengths, rows.size),
            )
        )
    path = os.fspath(subject.folder / _PARTS)
    with _submitting(subject, path, subject.backend, requests) as read:
        yield read


@contextmanager
def _submitting(subject: Subject, path: str, name: str, requests: list[Requests]) -> Iterator[Read]:
    backend, _ = open_backend(path, name, subject.threads, subject.queue_depth)

    def read() -> None:
        for batch in two_in_flight(backend.submit(each) for each in requests):
            batch.wait()

    try:
        yield read
    finally:
        backend.close()


_PARTS = "parts.copy"
_CHECKPOINT = "checkpoint.safetensors.copy"


def _bundles(subject: Subject) -> Bytes:
    """Of the group that copies hold; there is room for one more of it."""
    group = subject.group
    require_free_space(subject.folder, group.neurons * group.stride)
    return subject.rows(np.memmap(subject.path, np.uint8, mode="r"), group)


def _part_by_part(subject: Subject) -> None:
    """A copy of the group with its parts apart."""
    bundles = _bundles(subject)
    with (subject.folder / _PARTS).open("wb") as file:
        for offset, length, start in subject.places:
            file.seek(start)
            file.write(np.ascontiguousarray(bundles[:, offset : offset + length]))
        file.truncate(round_up(file.tell(), PAGE))
        file.flush()
        os.fsync(file.fileno())


def _checkpoint(subject: Subject) -> None:
    """The group as a checkpoint has it, down across: its numbers as integers of their size, for
    NumPy has no bf16. Raises ReadError for parts in blocks, which no checkpoint has."""
    from safetensors.numpy import save_file

    bundles = _bundles(subject)
    tensors: dict[str, NDArray[Any]] = {}
    for part in subject.group.bundled:
        if part.encoding not in _NUMBERS:
            raise ReadError(f"no checkpoint has {part.encoding}")
        offset = part.offset or 0
        rows = np.ascontiguousarray(bundles[:, offset : offset + part.length])
        rows = rows.view(_NUMBERS[part.encoding])
        tensors[part.name] = np.ascontiguousarray(rows.T) if part.name == "down" else rows
    save_file(tensors, subject.folder / _CHECKPOINT)


_NUMBERS = {"f32": "<u4", "f16": "<u2", "bf16": "<u2"}


@contextmanager
def _memmap(subject: Subject) -> Iterator[Read]:
    flat = np.memmap(subject.path, np.uint8, mode="r")

    def read() -> None:
        for group, slots, out in subject.shares:
            np.take(subject.rows(flat, group), slots, axis=0, out=out, mode="clip")

    yield read


@contextmanager
def _advised(subject: Subject) -> Iterator[Read]:
    """mmap without readahead; a batch's bundles are all asked for, and then those of the next,
    before the first is touched."""
    with Path(subject.path).open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    mapped.madvise(mmap.MADV_RANDOM)
    flat = np.frombuffer(mapped, np.uint8)

    def advised() -> Iterator[Share]:
        for share in subject.shares:
            for at in share.offsets.tolist():
                ahead = at % mmap.PAGESIZE
                mapped.madvise(mmap.MADV_WILLNEED, at - ahead, share.group.stride + ahead)
            yield share

    def read() -> None:
        for group, slots, out in two_in_flight(advised()):
            np.take(subject.rows(flat, group), slots, axis=0, out=out, mode="clip")

    yield read


@contextmanager
def _ninja(subject: Subject) -> Iterator[Read]:
    """mmap-ninja opens a folder: a link to the file beside the shape of its bytes, no copy."""
    from mmap_ninja import numpy

    flat = numpy.open_existing(subject.folder / "ninja")

    def read() -> None:
        for group, slots, out in subject.shares:
            np.take(subject.rows(flat, group), slots, axis=0, out=out, mode="clip")

    yield read


def _link_for_ninja(subject: Subject) -> None:
    from mmap_ninja import base

    folder = subject.folder / "ninja"
    folder.mkdir()
    (folder / "data.ninja").symlink_to(Path(subject.path).resolve())
    base._str_to_file("uint8", folder / "dtype.ninja")
    base._shape_to_file((Path(subject.path).stat().st_size,), folder / "shape.ninja")
    base._str_to_file("C", folder / "order.ninja")


@contextmanager
def _safetensors(subject: Subject) -> Iterator[Read]:
    """A neuron's rows, and its column of down."""
    from safetensors import safe_open

    with safe_open(subject.folder / _CHECKPOINT, "np") as checkpoint:
        tensors = {part: checkpoint.get_slice(part.name) for part in subject.group.bundled}

        def read() -> None:
            for _, slots, out in subject.shares:
                for row, slot in enumerate(slots.tolist()):
                    for part, tensor in tensors.items():
                        this = slice(slot, slot + 1)
                        numbers = tensor[:, this] if part.name == "down" else tensor[this]
                        place = slice(part.offset, (part.offset or 0) + part.length)
                        out[row, place] = numbers.reshape(-1).view(np.uint8)

        yield read


@contextmanager
def _streamer(subject: Subject) -> Iterator[Read]:
    """All batches at once: it has no way to have two in flight."""
    from runai_model_streamer.file_streamer import FileStreamer
    from runai_model_streamer.file_streamer.requests_iterator import FileChunks

    chunks = [
        FileChunks(k, subject.path, share.offsets.tolist(), [share.group.stride] * share.slots.size)
        for k, share in enumerate(subject.shares)
    ]
    with FileStreamer() as streamer:

        def read() -> None:
            streamer.stream_files(chunks)
            for k, row, tensor in streamer.get_chunks():
                subject.shares[k].out[row] = tensor.numpy().view(np.uint8)

        yield read


PEERS: dict[str, Peer] = {
    "bundlefmt": Peer(_reader),
    "bundlefmt, unverified": Peer(partial(_reader, verify=False)),
    "bundlefmt, one batch at a time": Peer(partial(_reader, in_flight=1)),
    "bundlefmt, plain call": Peer(partial(_reader, recycled=True, in_flight=1)),
    "bundlefmt, two plain calls": Peer(partial(_reader, recycled=True)),
    **{name: Peer(partial(_backend, name=name)) for name in BACKENDS},
    "bundled": Peer(_backend, scope="group"),
    "unbundled": Peer(_unbundled, prepare=_part_by_part, scope="group"),
    "numpy.memmap": Peer(_memmap),
    "mmap, advised": Peer(_advised),
    "mmap-ninja": Peer(_ninja, "mmap_ninja", _link_for_ninja),
    "runai-model-streamer": Peer(_streamer, "runai_model_streamer"),
    "safetensors": Peer(_safetensors, "safetensors", _checkpoint, scope="few"),
}

"""The storage layer: aligned memory, direct I/O probed, read backends."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray

from bundlefmt import native
from bundlefmt.errors import ReadError, UsageError
from bundlefmt.storage.backends import (
    BACKENDS,
    Backend,
    Checks,
    Damaged,
    Requests,
    open_backend,
    whole_rows,
)
from bundlefmt.storage.backends.mapped import Mapped
from bundlefmt.storage.buffers import KEPT, LARGEST, PAGE, Recycled, aligned_empty
from bundlefmt.storage.device import device_identity, drop_cache, probe_direct, resident_memory
from tests.conftest import without_sanitizers

PADDED = 256 * 4096  # bytes: as long as a bundle file could be
ODD = PADDED - 1337
GUARD = 0xA5  # around the memory of every request
TWINS = ("direct in Python", "buffered in Python")  # of the native core's engines
SERVED = (*BACKENDS, *TWINS)

_preadv = os.preadv
_open = os.open


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Files of random bytes, by length. Read them, do not change them."""
    folder = tmp_path_factory.mktemp("storage")
    data = np.random.default_rng(7).bytes(PADDED)
    for length in (PADDED, ODD):
        (folder / str(length)).write_bytes(data[:length])
    return {length: folder / str(length) for length in (PADDED, ODD)}


@pytest.fixture
def scratch(tmp_path: Path, files: dict[int, Path]) -> Path:
    """A copy of the padded file that a test may spoil."""
    path = tmp_path / "scratch"
    path.write_bytes(files[PADDED].read_bytes())
    return path


def opened(path: Path, name: str, threads: int = 4, depth: int | None = None) -> Backend:
    """The backend, or a skip where this machine or file system has none such; as deep a queue as
    there are threads where nothing else is said."""
    name, _, twin = name.partition(" in ")
    refusal = probe_direct(path).refusal
    if name in ("direct", "uring") and refusal is not None:
        pytest.skip(f"no direct I/O here: {refusal}")
    with pytest.MonkeyPatch.context() as patch:
        if twin:
            patch.setattr(native, "core", None)
        try:
            return open_backend(path, name, threads, threads if depth is None else depth)[0]
        except ReadError as error:
            if not error.what.startswith("no io_uring"):
                raise
            pytest.skip(error.what)


def scattered(offset: int, lengths: Sequence[int]) -> Requests:
    """One request for views of those lengths, three guard bytes before each and after the last."""
    starts = np.cumsum([0, *lengths], dtype=np.int64) + 3 * np.arange(1, len(lengths) + 2)
    return Requests(
        np.full(starts[-1], GUARD, dtype=np.uint8),
        np.array([offset]),
        np.array([0, len(lengths)]),
        starts[:-1],
        np.array(lengths),
    )


def one(offset: int, memory: NDArray[np.uint8]) -> Requests:
    """One request that fills the memory."""
    return whole_rows(memory.reshape(1, -1), np.array([offset]))


def checked(requests: Requests, data: bytes, wrong: Sequence[int] = ()) -> Requests:
    """Whole rows with the digests that they should have, but for the wrong ones."""
    width = int(requests.lengths[0])
    expected = np.array(
        [xxhash.xxh3_64_intdigest(data[at : at + width]) for at in requests.offsets],
        dtype=np.uint64,
    )
    expected[list(wrong)] ^= np.uint64(1)
    return requests._replace(checks=Checks(requests.bounds, requests.starts, width, expected))


# Aligned memory.


@pytest.mark.parametrize("alignment", [64, 512, 4096, 16384, 65536])
@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 100_000])
def test_aligned_memory_is_aligned_zero_and_writable(nbytes: int, alignment: int) -> None:
    memory = [aligned_empty(nbytes, alignment) for _ in range(4)]
    for number, array in enumerate(memory):
        assert array.shape == (nbytes,)
        assert array.dtype == np.uint8
        assert nbytes == 0 or array.ctypes.data % alignment == 0
        assert not array.any()
        array[:] = number + 1
    assert all((array == number + 1).all() for number, array in enumerate(memory))


@pytest.mark.parametrize(
    ("nbytes", "kept"), [(0, PAGE), (1, PAGE), (100_000, 1 << 17), (LARGEST, LARGEST)]
)
def test_recycled_memory_is_used_again_within_its_bounds(nbytes: int, kept: int) -> None:
    recycled = Recycled()
    used = [recycled.empty(nbytes) for _ in range(2 * KEPT)]
    assert {(array.shape, array.ctypes.data % PAGE) for array in used} == {((nbytes,), 0)}
    places = {array.ctypes.data for array in used}
    assert (len(places), recycled.nbytes) == (2 * KEPT, 0)
    used.clear()
    assert recycled.nbytes == KEPT * kept
    again = [recycled.empty(nbytes) for _ in range(KEPT)]
    assert {array.ctypes.data for array in again} <= places
    assert recycled.nbytes == 0


def test_memory_larger_than_what_is_recycled_is_given_back() -> None:
    recycled = Recycled()
    array = recycled.empty(LARGEST + 1)
    assert array.nbytes == LARGEST + 1
    del array
    assert recycled.nbytes == 0


# Direct I/O, probed and refused.


def test_the_probe_names_alignments_that_are_powers_of_two(files: dict[int, Path]) -> None:
    found = probe_direct(files[PADDED])
    for alignment in (found.memory_alignment, found.offset_alignment):
        assert 1 <= alignment <= 65536
        assert alignment & (alignment - 1) == 0
    assert found.source in ("statx", "logical block size", "default")
    if found.refusal is not None:
        pytest.skip(f"no direct I/O here: {found.refusal}")
    fd = os.open(files[PADDED], os.O_RDONLY | os.O_DIRECT)
    try:  # what the probe says is enough for a read anywhere
        memory = aligned_empty(found.offset_alignment, found.memory_alignment)
        assert os.preadv(fd, [memory], found.offset_alignment) == found.offset_alignment
    finally:
        os.close(fd)


def test_the_probe_of_a_missing_file_says_why(tmp_path: Path) -> None:
    refusal = probe_direct(tmp_path / "missing").refusal
    assert refusal is not None and os.strerror(errno.ENOENT) in refusal


def _open_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return _open(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refusing)


def _read_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(fd: int, views: Any, offset: int) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "preadv", refusing)


@pytest.mark.parametrize(
    ("refuse", "reason"),
    [(_open_refuses, "open with O_DIRECT"), (_read_refuses, "read with O_DIRECT")],
    ids=["open", "read"],
)
def test_where_direct_is_refused_auto_falls_back_and_says_why(
    files: dict[int, Path],
    monkeypatch: pytest.MonkeyPatch,
    refuse: Callable[[pytest.MonkeyPatch], None],
    reason: str,
) -> None:
    if refuse is _read_refuses and probe_direct(files[PADDED]).refusal is not None:
        pytest.skip("no direct I/O here: it cannot get as far as reading")
    with monkeypatch.context() as patch:
        refuse(patch)
        backend, fallback = open_backend(files[PADDED], "auto", 1)
        with pytest.raises(ReadError, match=reason) as caught:
            open_backend(files[PADDED], "direct", 1)
    assert backend.name == "buffered"
    assert fallback is not None
    assert f"{reason}: {os.strerror(errno.EINVAL)}" in fallback
    assert caught.value.file == files[PADDED]
    memory = np.zeros(10, dtype=np.uint8)
    backend.submit(one(5, memory)).wait()
    backend.close()
    assert memory.tobytes() == files[PADDED].read_bytes()[5:15]


def test_auto_takes_io_uring_where_it_works(files: dict[int, Path]) -> None:
    opened(files[PADDED], "uring").close()
    backend, fallback = open_backend(files[PADDED], queue_depth=5)
    backend.close()
    assert (backend.name, backend.in_flight, fallback) == ("uring", 5, None)


def test_auto_takes_direct_where_there_is_no_core_and_says_so(
    files: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(files[PADDED], "direct").close()
    monkeypatch.setattr(native, "core", None)
    monkeypatch.setattr(native, "reason", "as asked")
    backend, fallback = open_backend(files[PADDED], threads=3)
    backend.close()
    assert (backend.name, backend.in_flight) == ("direct", 3)
    assert fallback == "no io_uring without the native core: as asked"
    with pytest.raises(ReadError, match="as asked"):
        open_backend(files[PADDED], "uring")


def test_an_unknown_backend_is_refused_naming_those_there_are(files: dict[int, Path]) -> None:
    with pytest.raises(UsageError, match="auto, uring, direct, buffered, mmap"):
        open_backend(files[PADDED], "io_uring")


def test_io_uring_has_its_depth_in_flight_whatever_the_threads(files: dict[int, Path]) -> None:
    """Reads that go one after the other take in sum about as long as from first to last; those
    that are queued together all wait from the start. The clearest of some tries counts: the
    machine does other things, too."""

    def overlap(threads: int, depth: int) -> float:
        backend = opened(files[PADDED], "uring", threads, depth)
        memory = aligned_empty(8 * 4096).reshape(8, 4096)
        began = time.perf_counter_ns()
        batch = backend.submit(whole_rows(memory, np.arange(8) * 8192))
        batch.wait()
        backend.close()
        return sum(batch.latencies) / (batch.finished - began)

    assert min(overlap(threads=8, depth=1) for _ in range(5)) < 1.5
    assert max(overlap(threads=1, depth=8) for _ in range(5)) > 1.5


@pytest.mark.parametrize("memory", [5, b"12", np.zeros(4), np.zeros((2, 2), np.uint8)], ids=repr)
def test_memory_that_is_none_is_refused(files: dict[int, Path], memory: Any) -> None:
    with pytest.raises(UsageError, match=r"memory: .* expected contiguous uint8 \[n\]"):
        open_backend(files[PADDED], memory=memory)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_needs_a_read_in_flight(files: dict[int, Path], name: str) -> None:
    with pytest.raises(UsageError, match="threads"):
        open_backend(files[PADDED], name, threads=0)
    with pytest.raises(UsageError, match="queue_depth"):
        open_backend(files[PADDED], name, queue_depth=0)


@pytest.mark.skipif(native.core is None, reason=f"no native core: {native.reason}")
def test_more_in_flight_than_the_core_takes_is_refused(files: dict[int, Path]) -> None:
    with pytest.raises(UsageError, match="at most 4096, found 5000"):
        open_backend(files[PADDED], "buffered", threads=5000)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("state", ["missing", "empty"])
def test_a_file_that_cannot_be_served_raises_only_our_errors(
    tmp_path: Path, name: str, state: str
) -> None:
    path = tmp_path / "file"
    if state == "empty":
        path.touch()
    try:
        backend, _ = open_backend(path, name, 1)
        try:
            backend.submit(one(0, np.empty(1, dtype=np.uint8))).wait()
        finally:
            backend.close()
    except (ReadError, UsageError) as error:
        assert str(path) in str(error)
    else:
        pytest.fail("a byte was read where there is none")


# Backends read what the file holds.

SHAPES: dict[str, tuple[int, list[int]]] = {
    "aligned": (8192, [4096]),
    "aligned, long": (4096, [131072]),
    "offset not aligned": (4097, [4096]),
    "length odd": (8192, [777]),
    "offset and length odd": (12345, [6789]),
    "one byte": (511, [1]),
    "first byte": (0, [1]),
    "across a page": (4090, [12]),
    "aligned views": (4096, [512] * 16),
    "odd views": (3000, [1, 2, 3, 500, 4096, 5, 77]),
    "empty views": (100, [0, 5, 0, 0, 6, 0]),
    "2000 aligned views": (4096, [64] * 2000),
    "2000 odd views": (4097, [37] * 2000),
    "nothing": (4096, [0]),
    "last byte": (-1, [1]),
    "last bytes": (-5000, [4096, 904]),
    "last sector": (-512, [512]),
    "all": (0, [-1]),
}


@pytest.mark.parametrize("length", [PADDED, ODD], ids=["padded file", "odd file"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SERVED)
def test_a_request_brings_exactly_the_bytes_of_the_file(
    files: dict[int, Path], name: str, shape: str, length: int
) -> None:
    offset, lengths = SHAPES[shape]
    offset = offset % length
    lengths = [length if n < 0 else n for n in lengths]
    backend = opened(files[length], name)
    requests = scattered(offset, lengths)
    batch = backend.submit(requests)
    batch.wait()
    backend.close()
    expected = scattered(offset, lengths).memory
    data, at = np.fromfile(files[length], dtype=np.uint8), offset
    for start, size in zip(requests.starts, lengths, strict=True):
        expected[start : start + size] = data[at : at + size]
        at += size
    assert (requests.memory == expected).all()
    assert batch.bytes_read >= sum(lengths)
    assert len(batch.latencies) == 1


@pytest.mark.parametrize("name", SERVED)
def test_aligned_requests_into_aligned_memory_read_no_byte_more(
    files: dict[int, Path], name: str
) -> None:
    backend = opened(files[PADDED], name)
    memory = aligned_empty(8 * 4096).reshape(8, 4096)
    batch = backend.submit(whole_rows(memory, np.arange(8) * 8192))
    batch.wait()
    backend.close()
    assert batch.bytes_read == memory.nbytes
    data = files[PADDED].read_bytes()
    assert [row.tobytes() for row in memory] == [data[i * 8192 :][:4096] for i in range(8)]


@pytest.mark.parametrize("name", ["direct", "uring", "direct in Python"])
def test_direct_counts_the_bytes_that_widening_adds(files: dict[int, Path], name: str) -> None:
    backend = opened(files[PADDED], name)
    unit = backend.offset_alignment
    batch = backend.submit(one(unit - 1, np.empty(2, dtype=np.uint8)))
    batch.wait()
    backend.close()
    assert batch.bytes_read == 2 * unit


@pytest.mark.parametrize("in_flight", [1, 3, 32])
@pytest.mark.parametrize("name", SERVED)
def test_every_request_of_a_batch_is_served(
    files: dict[int, Path], name: str, in_flight: int
) -> None:
    data = files[PADDED].read_bytes()
    places = np.random.default_rng(in_flight).integers(0, PADDED - 900, 500)
    memory = np.empty((500, 900), dtype=np.uint8)
    backend = opened(files[PADDED], name, in_flight)
    batch = backend.submit(checked(whole_rows(memory, places), data))
    batch.wait()
    backend.close()
    assert [row.tobytes() for row in memory] == [data[at : at + 900] for at in places]
    assert len(batch.latencies) == 500


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("wrong", [0, 250, 499])
def test_every_row_of_a_batch_is_checked(files: dict[int, Path], name: str, wrong: int) -> None:
    data = files[PADDED].read_bytes()
    memory = np.empty((500, 900), dtype=np.uint8)
    backend = opened(files[PADDED], name)
    good = checked(whole_rows(memory, np.arange(500) * 1700), data)
    bad = checked(good, data, [wrong])
    with pytest.raises(Damaged) as caught:
        backend.submit(bad).wait()
    assert bad.checks is not None and good.checks is not None
    assert caught.value.row == wrong
    assert caught.value.expected == bad.checks.expected[wrong]
    assert caught.value.found == good.checks.expected[wrong]
    backend.submit(good).wait()
    backend.close()


@pytest.mark.parametrize("name", SERVED)
def test_rows_of_one_request_are_checked_one_by_one(files: dict[int, Path], name: str) -> None:
    data = files[PADDED].read_bytes()
    rows = whole_rows(np.empty((6, 512), dtype=np.uint8), np.arange(6) * 512)
    wrong = checked(rows, data, [4]).checks
    assert wrong is not None
    backend = opened(files[PADDED], name)
    together = one(0, rows.memory)._replace(checks=wrong._replace(bounds=np.array([0, 6])))
    with pytest.raises(Damaged) as caught:
        backend.submit(together).wait()
    backend.close()
    assert caught.value.row == 4


@pytest.mark.parametrize("name", SERVED)
def test_an_empty_batch_is_done_at_once(files: dict[int, Path], name: str) -> None:
    backend = opened(files[PADDED], name)
    batch = backend.submit(whole_rows(np.empty((0, 512), dtype=np.uint8), np.arange(0)))
    batch.wait()
    backend.close()
    assert (batch.bytes_read, batch.latencies) == (0, [])


def test_dropping_the_cache_keeps_the_bytes(scratch: Path) -> None:
    before = scratch.read_bytes()
    drop_cache(scratch)
    assert scratch.read_bytes() == before


# Devices that stumble. A fault takes the place of one call of os.preadv.

Fault = Callable[[int, Any, int], int]


def _brings(most: int) -> Fault:
    """The first `most` bytes come, and rubbish after them."""

    def short(fd: int, views: Any, offset: int) -> int:
        count = min(_preadv(fd, views, offset), most)
        left = count
        for view in views:
            view[left:] = GUARD
            left = max(left - view.size, 0)
        return count

    return short


def _raises(number: int) -> Fault:
    def failing(fd: int, views: Any, offset: int) -> int:
        raise OSError(number, os.strerror(number))

    return failing


def stumble(monkeypatch: pytest.MonkeyPatch, faults: Iterator[Fault]) -> None:
    """Let the next calls of preadv meet the faults, one each, and those after them none."""

    def preadv(fd: int, views: Any, offset: int, *flags: Any) -> int:
        return next(faults, _preadv)(fd, views, offset)

    monkeypatch.setattr(os, "preadv", preadv)


PASSING: dict[str, Fault] = {
    "one byte": _brings(1),
    "600 bytes": _brings(600),
    "a page": _brings(4096),
    "no byte": _brings(0),
    "EAGAIN": _raises(errno.EAGAIN),
}


@pytest.mark.parametrize("times", [1, 2, 5])
@pytest.mark.parametrize("fault", PASSING)
@pytest.mark.parametrize("shape", ["aligned, long", "offset and length odd", "odd views"])
@pytest.mark.parametrize("name", TWINS)
def test_a_fault_that_passes_is_not_seen(
    files: dict[int, Path],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    shape: str,
    fault: str,
    times: int,
) -> None:
    offset, lengths = SHAPES[shape]
    ends = np.cumsum(lengths)
    memory = aligned_empty(ends[-1])
    views = np.array([0, len(lengths)]), ends - lengths, np.array(lengths)
    backend = opened(files[PADDED], name, 1)
    stumble(monkeypatch, iter([PASSING[fault]] * times))
    backend.submit(Requests(memory, np.array([offset]), *views)).wait()
    backend.close()
    assert memory.tobytes() == files[PADDED].read_bytes()[offset : offset + sum(lengths)]


@pytest.mark.parametrize("name", TWINS)
def test_an_interrupted_read_is_begun_again(
    files: dict[int, Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    backend = opened(files[PADDED], name, 1)
    memory = np.empty(5000, dtype=np.uint8)
    stumble(monkeypatch, iter([_raises(errno.EINTR)] * 3))
    backend.submit(one(12345, memory)).wait()
    backend.close()
    assert memory.tobytes() == files[PADDED].read_bytes()[12345:17345]


LASTING: dict[str, tuple[Fault, str]] = {
    "EIO": (_raises(errno.EIO), os.strerror(errno.EIO)),
    "EAGAIN": (_raises(errno.EAGAIN), "short"),
    "end of file": (_brings(0), "short"),
}


@pytest.mark.parametrize("fault", LASTING)
@pytest.mark.parametrize("shape", ["aligned", "offset and length odd", "2000 odd views"])
@pytest.mark.parametrize("name", TWINS)
def test_a_fault_that_lasts_is_a_read_error_that_says_where(
    files: dict[int, Path], monkeypatch: pytest.MonkeyPatch, name: str, shape: str, fault: str
) -> None:
    offset, lengths = SHAPES[shape]
    what, message = LASTING[fault]
    backend = opened(files[PADDED], name, 1)
    requests = scattered(offset, lengths)
    with monkeypatch.context() as patch:
        stumble(patch, iter([what] * 100))
        with pytest.raises(ReadError, match=message) as caught:
            backend.submit(requests).wait()
    assert caught.value.file == str(files[PADDED])
    assert caught.value.offset is not None
    assert offset - backend.offset_alignment < caught.value.offset <= offset
    backend.submit(requests).wait()  # the next batch finds the device well again
    backend.close()
    found = b"".join(
        requests.memory[start : start + length].tobytes()
        for start, length in zip(requests.starts, lengths, strict=True)
    )
    assert found == files[PADDED].read_bytes()[offset : offset + sum(lengths)]


@pytest.mark.parametrize("name", SERVED)
def test_a_read_past_the_end_is_a_read_error(files: dict[int, Path], name: str) -> None:
    for length, offset in ((PADDED, PADDED - 4096), (PADDED, PADDED + 4096), (ODD, ODD - 1)):
        backend = opened(files[length], name)
        memory = aligned_empty(8192)
        with pytest.raises(ReadError) as caught:
            backend.submit(one(offset, memory)).wait()
        assert str(files[length]) in str(caught.value)
        backend.submit(one(0, memory)).wait()
        backend.close()
        assert memory.tobytes() == files[length].read_bytes()[:8192]


@pytest.mark.parametrize("name", SERVED)
def test_a_file_cut_while_it_is_open_is_a_read_error(scratch: Path, name: str) -> None:
    backend = opened(scratch, name)
    os.truncate(scratch, 8192)
    with pytest.raises(ReadError):
        backend.submit(one(65536, np.empty(100, dtype=np.uint8))).wait()
    memory = np.empty(100, dtype=np.uint8)
    backend.submit(one(100, memory)).wait()
    backend.close()
    assert memory.tobytes() == scratch.read_bytes()[100:200]


# Errors drain.


def test_a_file_cut_under_its_mapping_is_a_read_error_and_no_signal(scratch: Path) -> None:
    class Cut(Mapped):
        def _prepare(self, requests: Requests) -> None:
            super()._prepare(requests)
            os.truncate(self.path, 4096)

    child = os.fork()
    if not child:
        batch = Cut(scratch, 1, 1).submit(one(8192, np.empty(512, dtype=np.uint8)))
        try:
            batch.wait()
        except ReadError as error:
            os._exit(error.what == "read came up short" and error.offset == 8192)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


@pytest.mark.parametrize("name", SERVED)
def test_after_a_failure_no_new_request_is_begun(files: dict[int, Path], name: str) -> None:
    data = files[PADDED].read_bytes()
    memory = np.full((5, 4096), GUARD, dtype=np.uint8)
    requests = checked(whole_rows(memory, np.arange(5) * 8192), data, [2])
    backend = opened(files[PADDED], name, 1)
    batch = backend.submit(requests)
    for _ in range(2):  # asked again, it fails again
        with pytest.raises(Damaged) as caught:
            batch.wait()
        assert caught.value.row == 2
    backend.close()
    assert [row.tobytes() for row in memory[:3]] == [data[i * 8192 :][:4096] for i in range(3)]
    begun = 4 if name == "uring" else 3  # a ring reads on while it checks
    assert (memory[begun:] == GUARD).all()


@pytest.mark.parametrize("name", SERVED)
def test_when_a_batch_has_failed_nothing_of_it_is_in_flight(
    files: dict[int, Path], name: str
) -> None:
    data = files[PADDED].read_bytes()
    memory = aligned_empty(200 * 4096).reshape(200, 4096)
    backend = opened(files[PADDED], name, 8)
    for first in range(0, 100, 10):
        memory[:] = GUARD
        places = np.random.default_rng(first).permutation(200) * 4096
        with pytest.raises(Damaged):
            backend.submit(checked(whole_rows(memory, places), data, range(first, 200))).wait()
        left = memory.copy()
        backend.submit(one(0, np.empty(100_000, dtype=np.uint8))).wait()
        assert (memory == left).all()
    backend.close()


@pytest.mark.parametrize("name", SERVED)
def test_a_failed_batch_leaves_others_in_flight_alone(files: dict[int, Path], name: str) -> None:
    data = files[PADDED].read_bytes()
    backend = opened(files[PADDED], name, 4)
    memory, places = np.empty((40, 700), dtype=np.uint8), np.arange(40) * 700
    spoilt = whole_rows(np.empty((8, 10), dtype=np.uint8), np.zeros(8, dtype=np.int64))
    before = backend.submit(whole_rows(memory[:20], places[:20]))
    bad = backend.submit(checked(spoilt, data, range(8)))
    after = backend.submit(whole_rows(memory[20:], places[20:]))
    after.wait()
    before.wait()
    with pytest.raises(Damaged):
        bad.wait()
    backend.close()
    assert memory.tobytes() == data[: 40 * 700]


@pytest.mark.parametrize("name", SERVED)
def test_a_closed_backend_refuses_and_may_be_closed_again(
    files: dict[int, Path], name: str
) -> None:
    backend = opened(files[PADDED], name)
    memory = np.empty(4096, dtype=np.uint8)
    batch = backend.submit(one(0, memory))
    backend.close()  # waits for what is in flight
    backend.close()
    assert memory.tobytes() == files[PADDED].read_bytes()[:4096]
    batch.wait()
    with pytest.raises(UsageError, match="closed"):
        backend.submit(one(0, memory))


@pytest.mark.parametrize("name", SERVED)
def test_a_backend_that_is_closed_while_a_batch_is_prepared_refuses_it(
    files: dict[int, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = opened(files[PADDED], name)
    prepare = backend._prepare

    def closing(requests: Requests) -> None:
        backend.close()
        prepare(requests)

    monkeypatch.setattr(backend, "_prepare", closing)
    with pytest.raises(UsageError, match="closed"):
        backend.submit(one(0, np.empty(4096, dtype=np.uint8)))


@pytest.mark.parametrize("name", SERVED)
def test_a_forked_child_is_refused(files: dict[int, Path], name: str) -> None:
    backend = opened(files[PADDED], name)
    child = os.fork()
    if not child:
        try:
            backend.submit(one(0, np.empty(10, dtype=np.uint8)))
        except UsageError:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    backend.close()


@pytest.mark.parametrize("name", SERVED)
def test_a_closed_backend_holds_no_descriptor(files: dict[int, Path], name: str) -> None:
    before = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names, not paths
    backend = opened(files[PADDED], name)
    backend.submit(one(0, np.empty(10, dtype=np.uint8))).wait()
    backend.close()
    assert sorted(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_a_device_is_known_whatever_its_mount_point_is_called(tmp_path: Path) -> None:
    folder = tmp_path / "a\x0c\x1c\udcff b\n\u2028"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "some disk", folder]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting takes root")
    try:
        assert device_identity(folder) == "tmpfs-some\\040disk"
        assert device_identity(tmp_path) != device_identity(folder)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
    for missing in (tmp_path / "missing", "a\0b"):
        with pytest.raises(UsageError, match="no such file"):
            device_identity(missing)


@without_sanitizers("freed memory is kept for a while")
def test_reads_that_are_wider_than_what_is_wanted_take_little_memory(tmp_path: Path) -> None:
    """However many of them are in flight: a limit has no room for more."""
    megabyte, count = 1 << 20, 64
    path = tmp_path / "file"
    path.write_bytes(bytes(megabyte + 4096))
    backend = opened(path, "uring", depth=count)
    memory = np.ones((count, megabyte), dtype=np.uint8)
    backend.submit(whole_rows(memory[:1], np.array([1]))).wait()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what it is now
    before = resident_memory(peak=True)
    batch = backend.submit(whole_rows(memory, np.full(count, 1)))
    batch.wait()
    backend.close()
    assert not memory.any()
    assert batch.bytes_read > memory.nbytes
    assert resident_memory(peak=True) - before < 32 * megabyte

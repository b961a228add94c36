"""The native batch reader: threads and io_uring give the same bytes and the same failures."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray

from bundlefmt import native
from bundlefmt.storage.buffers import aligned_empty

core = native.core
pytestmark = pytest.mark.skipif(core is None, reason=f"no native core: {native.reason}")
CHUNK = 4096
SIZE = 300 * CHUNK + 1000
RANDOM = np.random.default_rng()


@pytest.fixture(scope="module")
def content() -> bytes:
    return RANDOM.bytes(SIZE)


@pytest.fixture
def file(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "data"
    path.write_bytes(content)
    return path


@pytest.fixture(params=["threads", "threads, direct", "uring", "uring, direct"])
def engine(request: pytest.FixtureRequest, file: Path) -> Iterator[Any]:
    kind, _, direct = request.param.partition(", ")
    fd = os.open(file, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    alignment = CHUNK if direct else 1
    try:
        opened = core.Engine(kind, fd, 8, alignment, alignment)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield opened
    opened.close()
    os.close(fd)


def table(*numbers: int) -> NDArray[np.int64]:
    return np.array(numbers, dtype=np.int64)


def evenly(count: int, chunk: int = CHUNK) -> tuple[NDArray[np.int64], ...]:
    """bounds, starts and lengths of requests that fill one chunk each."""
    steps = np.arange(count + 1, dtype=np.int64)
    return steps, steps[:-1] * chunk, np.full(count, chunk, dtype=np.int64)


@pytest.mark.parametrize("shift", [0, 1, 512])
def test_random_reads_arrive_where_they_belong(engine: Any, content: bytes, shift: int) -> None:
    offsets = RANDOM.integers(0, 250, 200) * CHUNK + shift
    memory = aligned_empty(200 * CHUNK + shift)
    batch = engine.submit(memory[shift:], offsets, *evenly(200))
    assert batch.wait() is None
    for offset, row in zip(offsets, memory[shift:].reshape(200, CHUNK), strict=True):
        assert row.tobytes() == content[offset : offset + CHUNK]
    assert len(batch.latencies) == 200
    assert batch.bytes_read >= 200 * CHUNK


def test_reads_go_into_registered_memory_around_it_and_across_its_edge(
    file: Path, content: bytes
) -> None:
    memory = aligned_empty(8 * CHUNK)
    fd = os.open(file, os.O_RDONLY)
    try:
        engine = core.Engine("uring", fd, 4, memory=memory[2 * CHUNK : 5 * CHUNK + 7])
    except RuntimeError as error:
        os.close(fd)
        pytest.skip(str(error))
    offsets = RANDOM.integers(0, SIZE - CHUNK, 8)
    assert engine.submit(memory, offsets, *evenly(8)).wait() is None
    engine.close()
    os.close(fd)
    for offset, row in zip(offsets, memory.reshape(8, CHUNK), strict=True):
        assert row.tobytes() == content[offset : offset + CHUNK]


def test_a_request_is_scattered_over_its_views(engine: Any, content: bytes) -> None:
    memory = aligned_empty(4 * CHUNK)
    starts, lengths = table(3 * CHUNK, 0, CHUNK), table(CHUNK, CHUNK, 100)
    batch = engine.submit(memory, table(CHUNK, 70), table(0, 2, 3), starts, lengths)
    assert batch.wait() is None
    assert memory[3 * CHUNK :].tobytes() == content[CHUNK : 2 * CHUNK]
    assert memory[:CHUNK].tobytes() == content[2 * CHUNK : 3 * CHUNK]
    assert memory[CHUNK : CHUNK + 100].tobytes() == content[70:170]


def test_more_views_than_one_call_takes(engine: Any, content: bytes) -> None:
    memory = aligned_empty(3000 * 16)
    starts = np.arange(3000, dtype=np.int64)[::-1] * 16
    batch = engine.submit(
        memory, table(0), table(0, 3000), starts.copy(), np.full(3000, 16, dtype=np.int64)
    )
    assert batch.wait() is None
    assert memory.reshape(3000, 16)[::-1].tobytes() == content[: 3000 * 16]


def test_the_damaged_bundle_is_named(engine: Any, content: bytes) -> None:
    memory = aligned_empty(8 * CHUNK)
    expected = [xxhash.xxh3_64_intdigest(content[i * CHUNK :][:CHUNK]) for i in range(8)]
    bounds, starts, lengths = evenly(8)
    checks = (bounds, starts, CHUNK)
    good = engine.submit(
        memory, starts, bounds, starts, lengths, *checks, np.array(expected, dtype=np.uint64)
    )
    assert good.wait() is None
    found, expected[5] = expected[5], 1
    bad = engine.submit(
        memory, starts, bounds, starts, lengths, *checks, np.array(expected, dtype=np.uint64)
    )
    assert bad.wait() == ("damaged", 5, 0, 0, 5, found)
    assert good.wait() is None


def test_a_file_that_ends_early_says_how_much_came(engine: Any, content: bytes) -> None:
    memory = aligned_empty(2 * CHUNK)
    batch = engine.submit(memory, table(300 * CHUNK), *evenly(1, 2 * CHUNK))
    kind, request, error, came, _, _ = batch.wait()
    assert (kind, request, error) == ("ended", 0, 0)
    assert came <= 1000
    batch = engine.submit(memory, table(300 * CHUNK), *evenly(1, 1000))
    assert batch.wait() is None
    assert memory[:1000].tobytes() == content[300 * CHUNK :]


def test_the_engine_serves_on_after_a_failure(engine: Any, content: bytes) -> None:
    memory = aligned_empty(64 * CHUNK)
    for _ in range(20):
        bad = engine.submit(memory, np.full(64, 400 * CHUNK), *evenly(64))
        assert bad.wait()[0] == "ended"
        assert engine.submit(memory, table(0), *evenly(1)).wait() is None
        assert memory[:CHUNK].tobytes() == content[:CHUNK]


def test_several_batches_are_in_flight_and_may_be_dropped(engine: Any, content: bytes) -> None:
    kept = []
    for turn in range(20):
        memory = aligned_empty(64 * CHUNK)
        batch = engine.submit(memory, np.arange(64) * CHUNK, *evenly(64))
        if turn % 2:
            kept.append((batch, memory))
        del memory, batch  # memory that is being filled stays until it is
    for batch, memory in kept:
        assert batch.wait() is None
        assert memory.tobytes() == content[: 64 * CHUNK]


def test_a_closed_engine_refuses(engine: Any) -> None:
    memory = aligned_empty(CHUNK)
    last = engine.submit(memory, table(0), *evenly(1))
    engine.close()
    engine.close()
    assert last.wait() is None
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(memory, table(0), *evenly(1))


def test_a_forked_child_is_refused(engine: Any) -> None:
    child = os.fork()
    if not child:
        try:
            engine.submit(aligned_empty(CHUNK), table(0), *evenly(1))
        except RuntimeError:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_an_error_of_the_device_comes_with_its_number() -> None:
    fd = os.open("/proc/self/mem", os.O_RDONLY)  # what is not mapped cannot be read: EIO
    try:
        engine = core.Engine("threads", fd, 2)
        failure = engine.submit(aligned_empty(CHUNK), table(CHUNK), *evenly(1)).wait()
        engine.close()
    finally:
        os.close(fd)
    assert failure[:3] == ("failed", 0, errno.EIO)


BEYOND = [
    # offsets, bounds, starts, lengths
    (table(-1), table(0, 1), table(0), table(CHUNK)),
    (table(1 << 62), table(0, 1), table(0), table(CHUNK)),
    (table((1 << 63) - 1), table(0, 0), table(), table()),
    (table(0), table(0, 1), table(1), table(CHUNK)),
    (table(0), table(0, 1), table(-1), table(10)),
    (table(0), table(0, 1), table(0), table(-1)),
    (table(0), table(0, 1), table(1 << 62), table(1 << 62)),
    (table(0), table(0, 2), table(0), table(CHUNK)),
    (table(0), table(1, 1), table(0), table(CHUNK)),
    (table(0, 0), table(0, 2, 1), table(0), table(CHUNK)),
    (table(0), table(0), table(0), table(CHUNK)),
    (table(0), table(0, 1), table(0, 0), table(CHUNK)),
]


@pytest.mark.parametrize("reads", BEYOND)
def test_reads_beyond_the_memory_are_refused(
    engine: Any, reads: tuple[NDArray[np.int64], ...]
) -> None:
    with pytest.raises(ValueError):
        engine.submit(aligned_empty(CHUNK), *reads)


def test_checks_of_which_a_part_is_missing_are_refused(engine: Any) -> None:
    memory, bounds, starts = aligned_empty(CHUNK), table(0, 1), table(0)
    digest = np.zeros(1, np.uint64)
    for checks in [(bounds, starts, CHUNK), (bounds, None, CHUNK, digest), (None, None, 0, digest)]:
        with pytest.raises(ValueError, match="all of them, or none"):
            engine.submit(memory, table(0), *evenly(1), *checks)


def test_bundles_beyond_the_memory_are_refused(engine: Any) -> None:
    memory, digest = aligned_empty(CHUNK), np.zeros(1, np.uint64)
    for bounds, starts, stride in [
        (table(0, 1), table(1), CHUNK),
        (table(0, 1), table(0), -1),
        (table(0, 2), table(0), CHUNK),
        (table(0, 1), table(0, 0), CHUNK),
    ]:
        with pytest.raises(ValueError):
            engine.submit(memory, table(0), *evenly(1), bounds, starts, stride, digest)


def test_what_nobody_wants_goes_into_spare_memory(engine: Any, content: bytes) -> None:
    memory, spare = aligned_empty(2 * CHUNK), aligned_empty(CHUNK)
    views = table(0, 3), table(CHUNK, -1, 0), table(CHUNK, CHUNK, CHUNK)
    batch = engine.submit(memory, table(CHUNK), *views, spare=spare)
    assert batch.wait() is None
    assert memory.tobytes() == content[3 * CHUNK : 4 * CHUNK] + content[CHUNK : 2 * CHUNK]
    assert batch.bytes_read == 3 * CHUNK
    for given in (None, spare[:-1]):
        with pytest.raises(ValueError, match="beyond the memory"):
            engine.submit(memory, table(CHUNK), *views, spare=given)

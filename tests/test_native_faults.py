"""The native core on a system that stumbles: faults that pass are not seen, others are named."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bundlefmt import native
from tests.conftest import REFUSED, without_sanitizers

pytestmark = [
    pytest.mark.skipif(native.core is None, reason=f"no native core: {native.reason}"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"),
]


def _no_ring() -> str | None:
    """Why there is no io_uring here."""
    if native.core is None:
        return native.reason
    with Path(os.devnull).open() as file:
        try:
            native.core.Engine("uring", file.fileno(), 1).close()
        except RuntimeError as error:
            return str(error)
    return None


NO_RING = _no_ring()
needs_ring = pytest.mark.skipif(NO_RING is not None, reason=str(NO_RING))
ENGINES = ["threads", pytest.param("uring", marks=needs_ring)]
# What is asked for, and in what units the source can be read.
SHAPES = {"as it stands": (100, 1), "aligned": (4096, 4096), "widened": (100, 4096)}

EVER = 1 << 30
# reads before it, times, errno, most bytes -> kind, request, errno, bytes that came; None where
# the fault passes.
READS: dict[str, tuple[tuple[int, int, int, int], list[Any] | None]] = {
    "EINTR": ((0, 3, errno.EINTR, 0), None),
    "EAGAIN": ((0, 3, errno.EAGAIN, 0), None),
    "short, aligned": ((0, 1, 0, 8192), None),
    "short, odd": ((0, 3, 0, 777), None),
    "nothing for ever": ((0, EVER, 0, 0), ["ended", 0, 0, 0]),
    "EIO once": ((0, 1, errno.EIO, 0), ["failed", 0, errno.EIO, 0]),
}

# times, errno, whether the ring takes the reads on all the same
RING: dict[str, tuple[int, int, int]] = {
    "interrupted": (3, errno.EINTR, 0),
    "out of memory": (3, errno.EAGAIN, 0),
    "out of memory, reads under way": (3, errno.EAGAIN, 1),
    "out of memory for ever": (EVER, errno.EAGAIN, 0),
    "out of memory for ever, reads under way": (EVER, errno.EAGAIN, 1),
    "busy for ever": (EVER, errno.EBUSY, 0),
    "broken": (1, errno.EIO, 0),
    "broken, reads under way": (1, errno.EIO, 1),
}

PRELUDE = """
import ctypes, errno, json, os, sys, threading, weakref
import numpy as np
from bundlefmt.native import core
faults = ctypes.CDLL(sys.argv[1])
content = open(sys.argv[2], "rb").read()

def table(*numbers):
    return np.array(numbers, np.int64)

def engine(kind, count=1, alignment=1):
    fd = os.open(sys.argv[2], os.O_RDONLY | (os.O_DIRECT if alignment > 1 else 0))
    return core.Engine(kind, fd, count, alignment, alignment)

def submit(reader, memory, *offsets, length=None):
    "Requests of one view each, one after the other in the memory."
    bounds = np.arange(len(offsets) + 1)
    length = length or memory.size // len(offsets)
    return reader.submit(memory, table(*offsets), bounds, bounds[:-1] * length,
                         np.full(len(offsets), length))

def in_pieces(reader, memory, pieces):
    "One request, scattered over the memory in pieces of 16 bytes."
    return reader.submit(memory, table(0), table(0, pieces), np.arange(pieces) * 16,
                         np.full(pieces, 16))

def stumble(memory, first, times, number, most):
    faults.stumble(first, times, number, most, ctypes.c_void_p(memory.ctypes.data),
                   ctypes.c_size_t(memory.nbytes))
"""

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs code, after the prelude, where faults can be had; what it prints last is JSON."""
    folder = tmp_path_factory.mktemp("faults")
    library, data = folder / "faults.so", folder / "data"
    source = Path(__file__).with_name("faults.c")
    ring = [] if NO_RING else ["-DURING"]
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl", *ring], check=True)
    data.write_bytes(os.urandom(100_000))
    preloaded = f"{os.environ.get('LD_PRELOAD', '')} {library}".strip()

    def run(code: str, *arguments: Any) -> Any:
        done = subprocess.run(
            [sys.executable, "-P", "-c", PRELUDE + code, library, data, *map(str, arguments)],
            env={**os.environ, "LD_PRELOAD": preloaded},
            stdout=subprocess.PIPE,
            timeout=120,
            check=True,
        )
        return json.loads(done.stdout)

    return run


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_read_outlasts_faults_that_pass_and_names_those_that_last(
    run: Run, engine: str, shape: str
) -> None:
    code = """
offset, alignment = json.loads(sys.argv[4])
reader = engine(sys.argv[3], alignment=alignment)
memory = np.frombuffer(core_memory := bytearray(65536 + 4096), np.uint8)
memory = memory[-memory.ctypes.data % 4096:][:65536]
found = {}
for name, fault in json.loads(sys.argv[5]).items():
    memory[:] = 0
    stumble(memory, *fault)
    failure = submit(reader, memory, offset).wait()
    right = memory.tobytes() == content[offset : offset + 65536]
    stumble(memory, 0, 0, 0, 0)
    after = submit(reader, memory, offset).wait()
    found[name] = [failure and failure[:4], right or failure is not None, after]
print(json.dumps(found))
"""
    faults = {name: fault for name, (fault, _) in READS.items()}
    found = run(code, engine, json.dumps(SHAPES[shape]), json.dumps(faults))
    assert found == {name: [failure, True, None] for name, (_, failure) in READS.items()}


@pytest.mark.parametrize("engine", ENGINES)
def test_the_request_that_failed_is_named_and_how_much_of_it_came(run: Run, engine: str) -> None:
    code = """
reader = engine(sys.argv[3])
memory = np.zeros(65536, np.uint8)
stumble(memory, 5, 1, errno.EIO, 0)
of_eight = submit(reader, memory, *range(0, 80000, 10000)).wait()
stumble(memory, 1, 1, errno.EIO, 0)
of_three_calls = in_pieces(reader, memory, 3000).wait()
print(json.dumps([of_eight[:4], of_three_calls[:4]]))
"""
    assert run(code, engine) == [["failed", 5, errno.EIO, 0], ["failed", 0, errno.EIO, 1024 * 16]]


@needs_ring
@pytest.mark.parametrize("fault", RING)
def test_a_ring_that_fails_loses_no_read(run: Run, fault: str) -> None:
    code = """
reader = engine("uring", 4)
memory, offsets = np.zeros(65536, np.uint8), range(0, 80000, 5000)
expected = b"".join(content[offset : offset + 4096] for offset in offsets)
faults.break_ring(*json.loads(sys.argv[3]))
failure = submit(reader, memory, *offsets).wait()
right = memory.tobytes() == expected
after = submit(reader, memory, 7).wait()
right = right and memory.tobytes() == content[7 : 7 + 65536]
reader.close()
try:
    submit(reader, memory, 7)
except RuntimeError as error:
    print(json.dumps([failure, after, right, str(error)]))
"""
    assert run(code, json.dumps(RING[fault])) == [None, None, True, "the reader is closed"]


@needs_ring
@pytest.mark.parametrize("unknown", [1, 2])
def test_a_kernel_that_does_not_know_the_newest_kinds_of_ring_gives_a_plain_one(
    run: Run, unknown: int
) -> None:
    code = """
faults.refuse_ring(int(sys.argv[3]), errno.EINVAL)
reader = engine("uring", 4)
memory, offsets = np.zeros(65536, np.uint8), range(0, 80000, 5000)
failure = submit(reader, memory, *offsets).wait()
right = memory.tobytes() == b"".join(content[offset : offset + 4096] for offset in offsets)
print(json.dumps([failure, right]))
"""
    assert run(code, unknown) == [None, True]


REFUSALS = {
    errno.ENOSYS: "no io_uring: the kernel has none, or it is older than Linux 5.6",
    errno.EPERM: "no io_uring: not permitted (seccomp, or the sysctl kernel.io_uring_disabled)",
    errno.ENOMEM: f"no io_uring: {os.strerror(errno.ENOMEM)}",
}


@pytest.mark.skipif("uring" in REFUSED, reason=str(REFUSED.get("uring")))
@pytest.mark.parametrize("error", REFUSALS)
def test_where_the_kernel_refuses_a_ring_others_read_and_the_reason_is_told(
    run: Run, error: int
) -> None:
    code = """
from bundlefmt.storage.backends import open_backend
faults.refuse_ring(1, int(sys.argv[3]))
backend, reason = open_backend(sys.argv[2])
backend.close()
print(json.dumps([backend.name, reason]))
"""
    assert run(code, error) == ["direct", REFUSALS[error]]


@needs_ring
def test_what_a_broken_ring_has_taken_on_lands_before_the_batch_is_done(run: Run) -> None:
    # Reads of a pipe stay under way until there is something in it, and only a ring can do them.
    code = """
out, into = os.pipe()
reader = core.Engine("uring", out, 1)
memory = np.zeros(4096, np.uint8)
faults.break_ring(int(sys.argv[3]), int(sys.argv[4]), 1)
batch = submit(reader, memory, 0)
os.write(into, content[:4096])
print(json.dumps([batch.wait(), memory.tobytes() == content[:4096]]))
"""
    assert run(code, 1, errno.EIO) == [None, True]
    assert run(code, EVER, errno.EAGAIN) == [None, True]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_that_is_dropped_keeps_its_memory_until_it_is_read(run: Run, engine: str) -> None:
    code = """
reader = engine(sys.argv[3])
out, into = os.pipe()
faults.hold(out)
order, dropping = [], threading.Event()

def let_it_read():
    dropping.wait()
    order.append("read")
    os.write(into, b".")

thread = threading.Thread(target=let_it_read)
thread.start()
memory = np.zeros(65536, np.uint8)
weakref.finalize(memory, order.append, "gone")
batch = submit(reader, memory, 0)
del memory
dropping.set()
del batch
thread.join()
print(json.dumps(order))
"""
    assert run(code, engine) == ["read", "gone"]


@without_sanitizers("they have an allocator of their own")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_request_without_memory_fails_alone(run: Run, engine: str) -> None:
    code = """
reader = engine(sys.argv[3])
memory = np.zeros(16 * 1003, np.uint8)
faults.forbid(ctypes.c_size_t(16 * 1003))  # as much as its table of views takes
failure = in_pieces(reader, memory, 1003).wait()
faults.forbid(ctypes.c_size_t(0))
print(json.dumps([failure[:4], in_pieces(reader, memory, 1003).wait()]))
"""
    assert run(code, engine) == [["failed", 0, errno.ENOMEM, 0], None]


@without_sanitizers("they have an allocator of their own")
def test_a_computation_without_memory_is_a_memory_error(run: Run) -> None:
    code = """
part = core.Part(np.ones((64, 33), np.float32).view(np.uint8), "f32")
h = np.ones((1001, 64), np.float32)
faults.forbid(ctypes.c_size_t(4 * 64 * 1001))  # as much as a thread's own sums take
try:
    core.weighted_sum(h, part, 33, threads=2)
except MemoryError:
    faults.forbid(ctypes.c_size_t(0))
    print(json.dumps(bool((core.weighted_sum(h, part, 33, threads=2) == 64).all())))
"""
    assert run(code)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_thread_that_cannot_be_had_is_an_error(run: Run, engine: str) -> None:
    code = """
faults.refuse_threads(2 if sys.argv[3] == "threads" else 0)
try:
    engine(sys.argv[3], 4)
except RuntimeError as error:
    print(json.dumps(str(error)))
"""
    assert os.strerror(errno.EAGAIN) in run(code, engine)

"""What the benchmarks share: their shapes, a bundle file, and the memory's bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

import bundlefmt
from bundlefmt import native
from bundlefmt.errors import UsageError
from bundlefmt.native import CPUS
from bundlefmt.storage.buffers import aligned_empty
from tools import make_checkpoint

ROUNDS = 15


def pytest_sessionstart() -> None:
    """Stop where there is no core to measure, and nobody asked to do without."""
    try:
        native.require()
    except UsageError as error:
        pytest.exit(str(error), returncode=2)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bundlefmt")
    group.addoption("--d-model", type=int, default=4096, help="numbers in a part")
    group.addoption("--slots", type=int, default=16384, help="bundles in memory")
    group.addoption("--active", type=int, default=2000, help="slots that a token needs")
    group.addoption("--bundle", type=Path, help="a bundle file to read (default: one is made)")


class Shape(NamedTuple):
    """Of one FFN in memory."""

    d_model: int
    slots: int
    active: int


@pytest.fixture(scope="session")
def shape(pytestconfig: pytest.Config) -> Shape:
    return Shape(*(pytestconfig.getoption(name) for name in Shape._fields))


@pytest.fixture(scope="session")
def bundle(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file named by --bundle, or a made one: 8192 bundles of 4 KiB."""
    given: Path | None = pytestconfig.getoption("--bundle")
    if given is not None:
        return given
    folder = tmp_path_factory.mktemp("bundle")
    make_checkpoint.make(folder / "model", 1, d_model=1024, ffn=8192, shard_bytes=1 << 30)
    bundlefmt.pack(folder / "model", folder / "model.bundle")
    return folder / "model.bundle"


Sum = Callable[[NDArray[np.float32]], Any]

# A slice of memory read once, each by its own of NumPy's loops. Which of them is bound by the
# memory and not by its own arithmetic differs between machines: the fastest counts.
SUMS: dict[str, Sum] = {
    "sum of float32": np.sum,
    "sum of int64": lambda piece: np.sum(piece.view(np.int64)),
    "largest int32": lambda piece: np.max(piece.view(np.int32)),
    "dot of two halves": lambda piece: np.dot(*np.split(piece, 2)),
}


class Memory:
    """The memory's own rate: as many threads as the kernels have read `used` of `held` bytes,
    another stretch of them each time, by the fastest of SUMS."""

    def __init__(self, used: int, held: int) -> None:
        part = used // CPUS // 16 * 4  # numbers per thread: halves are whole int64, too
        numbers = aligned_empty(max(held, part * CPUS * 4)).view(np.float32)
        numbers.fill(1)
        self.nbytes = part * CPUS * 4
        self._stretches = cycle(
            np.split(numbers[start : start + part * CPUS], CPUS)
            for start in range(0, numbers.size - part * CPUS + 1, part * CPUS)
        )
        self._pool = ThreadPoolExecutor(CPUS)
        self._loop = SUMS[next(iter(SUMS))]
        taken = {}
        for name, self._loop in SUMS.items():
            taken[name] = median(self.seconds() for _ in range(ROUNDS))
        self.read_by = min(taken, key=lambda name: taken[name])
        self._loop = SUMS[self.read_by]

    def seconds(self) -> float:
        """What one reading takes."""
        stretch = next(self._stretches)
        start = time.perf_counter()
        list(self._pool.map(self._loop, stretch))
        return time.perf_counter() - start

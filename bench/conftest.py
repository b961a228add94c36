"""What the benchmarks share: their shapes, a bundle file, and the memory's bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

import bundlefmt
from bundlefmt.native import CPUS
from tools import make_checkpoint

ROUNDS = 15


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


@pytest.fixture(scope="session")
def bandwidth() -> Callable[[int, int], tuple[float, str]]:
    """Bytes per second at which as many threads as the kernels have read `used` of `held` bytes,
    another stretch of them each time, and by which loop."""
    pool = ThreadPoolExecutor(CPUS)

    def measure(used: int, held: int) -> tuple[float, str]:
        part = used // CPUS // 16 * 4  # numbers per thread: halves are whole int64, too
        memory = np.ones(max(held // 4, part * CPUS), np.float32)
        stretches = [
            np.split(memory[start : start + part * CPUS], CPUS)
            for start in range(0, memory.size - part * CPUS + 1, part * CPUS)
        ]
        rates = {}
        for name, loop in SUMS.items():
            taken = []
            for k in range(ROUNDS + 1):
                start = time.perf_counter()
                list(pool.map(loop, stretches[k % len(stretches)]))
                taken.append(time.perf_counter() - start)
            rates[name] = part * CPUS * 4 / median(taken[1:])
        fastest = max(rates, key=lambda name: rates[name])
        return rates[fastest], fastest

    return measure

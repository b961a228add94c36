"""The kernels' rate in bytes of weights, beside that of a sum over as many bytes of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle
from statistics import median
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bench.conftest import ROUNDS, Memory, Shape
from bundlefmt.layout.encodings import ENCODINGS
from bundlefmt.native import CPUS, core, reason
from bundlefmt.storage.buffers import aligned_empty

pytestmark = pytest.mark.skipif(core is None, reason=f"no native core: {reason}")

ENCODED_ROWS = 256  # repeated over all slots: the arithmetic does not care, encoding takes long


def encoded(encoding: str, d_model: int) -> NDArray[np.uint8]:
    """Some random vectors in an encoding, uint8 [ENCODED_ROWS, bytes of a vector]."""
    numbers = np.random.default_rng(1).standard_normal((ENCODED_ROWS, d_model), dtype=np.float32)
    return ENCODINGS[encoding].encode(numbers / np.float32(np.sqrt(d_model)))


def fill(rows: NDArray[np.uint8], some: NDArray[np.uint8]) -> None:
    """Repeat some rows over all."""
    for start in range(0, len(rows), len(some)):
        rows[start : start + len(some)] = some[: len(rows) - start]


def vector(d_model: int) -> NDArray[np.float32]:
    return np.random.default_rng(2).standard_normal((1, d_model), dtype=np.float32)


def choices(shape: Shape) -> Iterator[NDArray[np.int64]]:
    """Active slots, others each time: what one token needs, the next one finds in no cache."""
    order = np.random.default_rng(3).permutation(shape.slots)
    bounds = range(shape.active, shape.slots, shape.active)
    pieces = [piece for piece in np.split(order, bounds) if piece.size == shape.active]
    return cycle(pieces)


def measure(
    benchmark: Any,
    work: Callable[..., object],
    arguments: Callable[[], tuple[object, ...]],
    used: int,
    held: int,
) -> None:
    """Run the work, in turn with a reading of as much memory; note its rate, and the median of
    what part of the memory's rate it was in each round."""
    memory = Memory(used, held)
    readings = []

    def setup() -> tuple[tuple[object, ...], dict[str, Any]]:
        readings.append(memory.seconds())
        return arguments(), {}

    benchmark.pedantic(work, setup=setup, rounds=ROUNDS, iterations=1, warmup_rounds=1)
    if benchmark.stats is None:  # --benchmark-disable
        return
    taken = benchmark.stats.stats.data
    readings = readings[-len(taken) :]
    shares = [reading / seconds for reading, seconds in zip(readings, taken, strict=True)]
    benchmark.extra_info |= {
        "GB/s": round(used / median(taken) / 1e9, 2),
        "memory GB/s": round(memory.nbytes / median(readings) / 1e9, 2),
        "of memory": round(median(shares) * used / memory.nbytes, 3),
        "memory read by": memory.read_by,
        "threads": CPUS,
    }


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_sparse_ffn(benchmark: Any, shape: Shape, encoding: str) -> None:
    """up and down of the active slots."""
    part = encoded(encoding, shape.d_model)
    width = part.shape[1]
    slots = aligned_empty(shape.slots * 2 * width).reshape(shape.slots, 2 * width)
    fill(slots[:, :width], part)
    fill(slots[:, width:], part)
    up, down = (core.Part(slots[:, at : at + width], encoding) for at in (0, width))
    x, active = vector(shape.d_model), choices(shape)
    measure(
        benchmark,
        lambda chosen: core.ffn(x, chosen, up, None, down, "relu", threads=CPUS),
        lambda: (next(active),),
        shape.active * slots.shape[1],
        slots.nbytes,
    )


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_matrix_vector(benchmark: Any, shape: Shape, encoding: str) -> None:
    part = encoded(encoding, shape.d_model)
    rows = aligned_empty(shape.slots * part.shape[1]).reshape(shape.slots, -1)
    fill(rows, part)
    x, weight = vector(shape.d_model), core.Part(rows, encoding)
    measure(
        benchmark,
        lambda: core.products(x, weight, threads=CPUS),
        tuple,
        rows.nbytes,
        rows.nbytes,
    )


def test_sparse_ffn_in_numpy(benchmark: Any, shape: Shape) -> None:
    """What NumPy offers for f16: gather, convert, multiply."""
    part = encoded("f16", shape.d_model).view(np.float16)
    slots = np.tile(np.concatenate([part, part], axis=1), (-(-shape.slots // len(part)), 1))
    x, active = vector(shape.d_model)[0], choices(shape)

    def ffn(chosen: NDArray[np.int64]) -> NDArray[np.float32]:
        bundles = slots[chosen].astype(np.float32)
        hidden = np.maximum(bundles[:, : shape.d_model] @ x, 0)
        return hidden @ bundles[:, shape.d_model :]

    used = shape.active * slots[0].nbytes
    measure(benchmark, ffn, lambda: (next(active),), used, slots.nbytes)

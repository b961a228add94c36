"""The kernels' rate in bytes of weights, beside that of a sum over as many bytes of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bench.conftest import ROUNDS, Shape
from bundlefmt.layout.encodings import ENCODINGS
from bundlefmt.native import CPUS, core, reason
from bundlefmt.runtime import kernels

pytestmark = pytest.mark.skipif(core is None, reason=f"no native core: {reason}")

ENCODED_ROWS = 256  # repeated over all slots: the arithmetic does not care, encoding takes long
Bandwidth = Callable[[int, int], tuple[float, str]]


def stored(encoding: str, rows: int, d_model: int) -> NDArray[np.uint8]:
    """Random vectors in an encoding, uint8 [rows, bytes of a vector]."""
    numbers = np.random.default_rng(1).standard_normal((ENCODED_ROWS, d_model), dtype=np.float32)
    encoded = ENCODINGS[encoding].encode(numbers / np.float32(np.sqrt(d_model)))
    return np.tile(encoded, (-(-rows // ENCODED_ROWS), 1))[:rows]


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
    against: tuple[float, str],
) -> None:
    """Run the work, and note its rate and what part of the memory's that is."""
    benchmark.pedantic(
        work, setup=lambda: (arguments(), {}), rounds=ROUNDS, iterations=1, warmup_rounds=1
    )
    if benchmark.stats is None:  # --benchmark-disable
        return
    rate = used / benchmark.stats["median"]
    benchmark.extra_info |= {
        "GB/s": round(rate / 1e9, 2),
        "memory GB/s": round(against[0] / 1e9, 2),
        "of memory": round(rate / against[0], 3),
        "memory read by": against[1],
        "threads": CPUS,
    }


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_sparse_ffn(benchmark: Any, shape: Shape, bandwidth: Bandwidth, encoding: str) -> None:
    """up and down of the active slots; SiLU has no zeros, so that every byte counts."""
    part = stored(encoding, shape.slots, shape.d_model)
    slots = np.concatenate([part, part], axis=1)
    width = part.shape[1]
    up, down = (core.Part(slots[:, at : at + width], encoding) for at in (0, width))
    x, active = vector(shape.d_model), choices(shape)
    used = shape.active * slots.shape[1]
    measure(
        benchmark,
        lambda chosen: core.ffn(x, chosen, up, None, down, "silu", threads=CPUS),
        lambda: (next(active),),
        used,
        bandwidth(used, slots.nbytes),
    )


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_matrix_vector(benchmark: Any, shape: Shape, bandwidth: Bandwidth, encoding: str) -> None:
    part = stored(encoding, shape.slots, shape.d_model)
    x, weight = vector(shape.d_model), core.Part(part, encoding)
    against = bandwidth(part.nbytes, part.nbytes)
    measure(benchmark, lambda: core.products(x, weight, threads=CPUS), tuple, part.nbytes, against)


def test_sparse_ffn_in_numpy(
    benchmark: Any, shape: Shape, bandwidth: Bandwidth, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels' twin on f16."""
    monkeypatch.setattr(kernels, "core", None)
    group: Any = SimpleNamespace(activation="silu", activation_threshold=None)
    part = stored("f16", shape.slots, shape.d_model)
    x, active = vector(shape.d_model), choices(shape)

    def ffn(chosen: NDArray[np.int64]) -> NDArray[np.float32]:
        rows = kernels.Part(part[chosen], "f16", None)
        return kernels.ffn(x, rows, None, rows, group)

    used = 2 * shape.active * part.shape[1]
    measure(benchmark, ffn, lambda: (next(active),), used, bandwidth(used, 2 * part.nbytes))

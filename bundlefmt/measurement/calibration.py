"""The device under a path, measured into a profile for the cost model.

Strategy: what the runtime will do is what is measured: one batch after the other through the
reader, by the backend that it would take, between computations and beside one, as a layer's cached
neurons are computed while the others come: whoever serves the reads has to share the cores. In each
round every size and every number of requests has its turn, at places drawn anew, so that a disk
that others use slows down all of them alike; medians over the rounds count. Bundles are not
checked: the reader checks some while others come.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundlefmt import kernels, native
from bundlefmt.errors import UsageError
from bundlefmt.flash import profiles
from bundlefmt.flash.costmodel import VERSION, DeviceProfile, SizeCost
from bundlefmt.layout.header import Group, Part, Region, Span
from bundlefmt.measurement import machine
from bundlefmt.measurement.reads import Pattern, Taken, timed
from bundlefmt.measurement.target import DEFAULT_SIZE, target, touched
from bundlefmt.reader import Pending, Reader
from bundlefmt.storage.backends import Backend, open_backend
from bundlefmt.storage.buffers import PAGE
from bundlefmt.storage.device import device_identity, drop_cache
from bundlefmt.storage.sequential import Sequential

SECONDS = 15.0
SIZES = tuple(4096 << k for k in range(9))  # 4 KiB .. 1 MiB
COUNTS = (1, 4, 16, 64, 256, 512)

_MOST_BYTES = 32 << 20  # of a batch, and of a span read in sequence
_LEAST_SIZE = 2 * _MOST_BYTES  # no two requests of a batch touch
_LEAST_ROUNDS = 3
_MATRIX = (32768, 4096)  # 256 MiB of f16: far more than any cache holds
_BESIDE = 2048  # rows of it, 16 MiB: about what a layer computes from while it reads


@dataclass(frozen=True)
class SizeGap:
    """Up to how many bytes between two bundles of that size it pays to read along."""

    bundle_bytes: int
    break_even_gap: int


@dataclass(frozen=True)
class Calibration:
    """The profile and the file that keeps it; `fallback` says why the backend is not the first
    choice; `gaps` are the model's for each size measured; the machine."""

    profile: DeviceProfile
    path: str
    fallback: str | None
    rounds: int
    gaps: list[SizeGap]
    machine: dict[str, Any]


def calibrate(
    path: str | os.PathLike[str] = ".",
    *,
    size: int = DEFAULT_SIZE,
    seconds: float = SECONDS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """Measure, for about so many `seconds`, the device under a folder, on a temporary file of
    `size` bytes, or that under a bundle file, on the file; and keep what was found in the user's
    cache folder, where `plan` finds it for every file on that device.

    Raises UsageError for settings that cannot be and a file that is too small to measure on,
    ReadError and WriteError when the device fails.
    """
    native.require()
    if not seconds >= 0:
        raise UsageError("out of range", field="seconds", expected="0 or more", found=seconds)
    folder = os.path.isdir(path)  # noqa: PTH112 - a name that is too long is no error
    with target(None if folder else path, path, size) as (file, _):
        _check_size(Path(file).stat().st_size, path, folder)
        memory = touched(1, _MOST_BYTES)[0]
        backend, fallback = open_backend(file, memory=memory)
        try:
            rounds = _Rounds(file, backend, memory)
            done = _repeat(rounds.take, seconds, progress)
        finally:
            backend.close()
        profile = DeviceProfile(
            version=VERSION,
            device=device_identity(file),
            backend=backend.name,
            in_flight=backend.in_flight,
            sizes=[rounds.cost(size) for size in SIZES],
            sequential_bytes_per_second=_MOST_BYTES / _median(rounds.spans),
            compute_bytes_per_second=rounds.weights.nbytes / _median(rounds.products),
        )
        return Calibration(
            profile=profile,
            path=str(profiles.save(profile)),
            fallback=fallback,
            rounds=done,
            gaps=[SizeGap(size, profile.break_even_gap(size)) for size in SIZES],
            machine=machine.facts(file),
        )


def _check_size(size: int, path: str | os.PathLike[str], folder: bool) -> None:
    if size < _LEAST_SIZE:
        raise UsageError(
            "too small to measure a device on" + ("" if folder else ": name its folder instead"),
            file=path,
            field="size" if folder else None,
            expected=f"{_LEAST_SIZE} bytes or more",
            found=size,
        )


def _repeat(take: Callable[[], None], seconds: float, progress: Callable[[int, int], None]) -> int:
    """Round after round, for about so long; returns how many."""
    start, total = time.monotonic(), max(round(seconds), 1)
    for done in itertools.count():
        spent = time.monotonic() - start
        progress(min(int(spent), total), total)
        if done >= _LEAST_ROUNDS and spent >= seconds:
            break
        take()
    return done


@dataclass
class _Whole:
    """A file as a catalogue of one group, whose bundles are all of its bytes, whatever they are."""

    path: str
    bundles: Group

    def group(self, layer: int, expert: int | None = None) -> Group:
        return self.bundles

    def checksums(self, group: Group) -> NDArray[np.uint64]:
        return np.zeros(group.neurons, dtype=np.uint64)

    def order(self, group: Group) -> NDArray[np.uint32] | None:
        return None


def _whole(path: str, stride: int) -> _Whole:
    count = Path(path).stat().st_size // stride
    return _Whole(
        path,
        Group(
            layer=0,
            neurons=count,
            d_model=stride // 4,
            activation="relu",
            stride=stride,
            stride_alignment=stride,
            parts=[Part("up", "f32", stride, offset=0)],
            bundles=Span(0, count * stride),
            checksums=Region(0, 0, "0" * 16),
        ),
    )


class _Rounds:
    """What was taken round after round: `batches`, seconds by size and number of requests; `alone`,
    the largest batch of each size without a computation beside it, for its CPU time; `spans` in
    sequence; `products` with `weights`."""

    def __init__(self, path: str, backend: Backend, memory: NDArray[np.uint8]) -> None:
        self.batches: dict[tuple[int, int], list[float]] = {
            (size, count): []
            for size, count in itertools.product(SIZES, COUNTS)
            if size * count <= memory.nbytes
        }
        self.alone: dict[tuple[int, int], list[Taken]] = {
            (size, max(count for of, count in self.batches if of == size)): [] for size in SIZES
        }
        self.spans: list[Taken] = []
        self.products: list[Taken] = []
        self.weights = touched(_MATRIX[0], 2 * _MATRIX[1]).view(np.float16)
        self._path = path
        self._size = Path(path).stat().st_size
        self._memory = memory
        self._readers = {size: Reader(_whole(path, size), backend, verify=False) for size in SIZES}
        self._sequential = Sequential(backend)
        self._random = np.random.default_rng()

    def take(self) -> None:
        """One round."""
        drop_cache(self._path)
        for setting, seconds in self.batches.items():
            seconds.append(self._beside_computing(*setting))
        for setting, taken in self.alone.items():
            taken.append(self._alone(*setting))
        start = int(self._random.integers(self._size - _MOST_BYTES + 1)) // PAGE * PAGE
        pieces = self._sequential.pieces(start, _MOST_BYTES)
        self.spans.append(timed(lambda: deque(pieces, maxlen=0))[1])
        self.products.append(timed(lambda: self._compute(_MATRIX[0]))[1])

    def _beside_computing(self, size: int, count: int) -> float:
        """Seconds from when a batch is submitted until all of it is there."""
        self._compute(_BESIDE)
        pending = self._submit(size, count)
        self._compute(_BESIDE)
        pending.result()
        began, ended = pending.span
        return (ended - began) / 1e9

    def _alone(self, size: int, count: int) -> Taken:
        return timed(lambda: self._submit(size, count).result())[1]

    def _compute(self, rows: int) -> None:
        """A product with some rows, which hardly any cache still holds from the last time."""
        start = int(self._random.integers(_MATRIX[0] - rows + 1))
        x = np.ones((1, _MATRIX[1]), dtype=np.float32)
        kernels.matmul(x, self.weights[start : start + rows])

    def _submit(self, size: int, count: int) -> Pending:
        (neurons,) = Pattern(count).draw(self._size // size, 1, 1, self._random)
        out = self._memory[: size * count].reshape(count, size)
        return self._readers[size].submit(0, neurons, out=out)

    def cost(self, size: int) -> SizeCost:
        """What the medians say of a size; CPU time is that of the largest batches, alone."""
        counts = [count for of, count in self.batches if of == size]
        seconds = [statistics.median(self.batches[size, count]) for count in counts]
        alone = self.alone[size, counts[-1]]
        cpu = statistics.mean(taken.cpu_seconds for taken in alone) / counts[-1]
        return SizeCost(size, counts, seconds, cpu)


def _median(taken: Sequence[Taken]) -> float:
    return statistics.median(each.seconds for each in taken)

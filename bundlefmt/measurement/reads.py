"""What a measurement reads, in which batches, and what that takes."""

from __future__ import annotations

import resource
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from bundlefmt.errors import UsageError

REPETITIONS = 5
DEFAULT_BATCH = 512
ORDERS = ("random", "sorted")

_BYTES_PER_REPETITION = 256 << 20
_MOST_READS = 16384  # per repetition: small chunks need no more for a stable median

Slots = NDArray[np.int64]
_Batch = TypeVar("_Batch")
_Result = TypeVar("_Result")


class Pattern(NamedTuple):
    """Chunks in a batch, their order (`sorted`: as they lie in the file), and which share of them
    touch another one of the batch."""

    batch: int = DEFAULT_BATCH
    order: str = ORDERS[0]
    adjacent: float = 0.0

    def check(self) -> None:
        """Raise UsageError for a pattern that cannot be."""
        if self.batch < 1:
            raise UsageError(
                "nothing to read", field="batch", expected="1 or more", found=self.batch
            )
        if self.order not in ORDERS:
            raise UsageError(
                "unknown order", field="order", expected=", ".join(ORDERS), found=self.order
            )
        if not 0 <= self.adjacent <= 1:
            raise UsageError("not a share", field="adjacent", expected="0..1", found=self.adjacent)

    @property
    def pairs(self) -> int:
        """Of chunks that touch each other."""
        return min(round(self.adjacent * self.batch / 2), self.batch // 2)

    def batches_in(self, slots: int, width: int) -> int:
        """How many such batches, of chunks `width` slots wide, so many slots hold."""
        return (slots + 1) // (self.batch * (width + 1) - self.pairs)

    def fitted(self, slots: int, width: int) -> Pattern:
        """With a smaller batch where not even one fits."""
        if self.batches_in(slots, width):
            return self
        return self._replace(batch=max((slots + 1) // (width + 1), 1))

    def draw(self, slots: int, width: int, batches: int, random: np.random.Generator) -> Slots:
        """Batches [batches, batch * width] of slots below `slots`, none of them twice: chunks that
        touch are drawn as pairs, and no other two touch, whatever their batch."""
        pairs, singles = self.pairs, self.batch - 2 * self.pairs
        lengths = np.repeat([2 * width, width], [batches * pairs, batches * singles])
        lengths = random.permutation(lengths)
        # What remains of the slots, less one after each run, is dealt out between the runs.
        spread = slots - lengths.sum() + 1
        starts = np.sort(random.choice(spread, lengths.size, replace=False))
        starts += np.cumsum(lengths) - lengths
        paired, single = starts[lengths == 2 * width], starts[lengths == width]
        paired = random.permutation(paired).reshape(batches, pairs)
        single = random.permutation(single).reshape(batches, singles)
        chunks = np.concatenate([paired, paired + width, single], axis=1)
        chunks = self.ordered(chunks, random)
        return (chunks[:, :, None] + np.arange(width)).reshape(batches, -1)

    def ordered(self, places: Slots, random: np.random.Generator) -> Slots:
        """Each row in the order asked for."""
        if self.order == "sorted":
            return np.sort(places, axis=-1)
        return random.permuted(places, axis=-1)


def reads_per_repetition(chunk: int) -> int:
    """How many reads of so many bytes a repetition takes."""
    return min(max(_BYTES_PER_REPETITION // chunk, 1), _MOST_READS)


def two_in_flight(submitted: Iterable[_Batch]) -> Iterator[_Batch]:
    """Each batch to wait for once the next one has been submitted: the device never idles."""
    waiting: deque[_Batch] = deque()
    for batch in submitted:
        waiting.append(batch)
        if len(waiting) == 2:
            yield waiting.popleft()
    yield from waiting


class Taken(NamedTuple):
    """Wall time and this process's CPU time, in seconds."""

    seconds: float
    cpu_seconds: float


def timed(work: Callable[[], _Result]) -> tuple[_Result, Taken]:
    """What the work gives and what it takes."""
    cpu, start = _cpu_seconds(), time.perf_counter()
    result = work()
    return result, Taken(time.perf_counter() - start, _cpu_seconds() - cpu)


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime

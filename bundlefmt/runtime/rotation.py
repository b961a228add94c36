"""Layers whose attention does not fit in memory: their matrices are read anew for every pass.

Two pieces of memory take turns: while one layer computes from the one, the next layer's matrices
are read into the other. After the last comes the first again, for the token after this.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from bundlefmt.errors import FormatError
from bundlefmt.layout import dtypes
from bundlefmt.layout.arithmetic import round_up
from bundlefmt.layout.header import Tensor
from bundlefmt.reader import ReadStats
from bundlefmt.storage.backends import Backend, Batch, land
from bundlefmt.storage.buffers import PAGE, aligned_empty
from bundlefmt.storage.sequential import spanning


def room_for(tensors: Sequence[Tensor]) -> int:
    """Bytes that a layer's matrices take in one of the two pieces of memory."""
    return sum(round_up(tensor.data.length, PAGE) for tensor in tensors)


class _Read(NamedTuple):
    """A matrix on its way into `data`, uint8, since `began` ns."""

    tensor: Tensor
    data: NDArray[np.uint8]
    asked: ReadStats
    began: int
    batch: Batch


class Rotation:
    """The matrices of some layers, which are called `names`; `verify` checks them whenever they
    have been read, `stats` counts what is."""

    def __init__(
        self,
        path: str,
        backend: Backend,
        layers: Mapping[int, Sequence[Tensor]],
        verify: bool,
        stats: ReadStats,
    ) -> None:
        self.names = {tensor.name for tensors in layers.values() for tensor in tensors}
        self._path = path
        self._backend = backend
        self._layers = layers
        self._verify = verify
        self._stats = stats
        order = sorted(layers)
        self._next = dict(zip(order, order[1:] + order[:1], strict=True))
        self._memory = [aligned_empty(max(map(room_for, layers.values()))) for _ in range(2)]
        self._held: int | None = None
        self._matrices: dict[str, NDArray[Any]] = {}
        self._coming: int | None = None
        self._reads: list[_Read] = []

    def need(self, layer: int) -> tuple[int, int] | None:
        """Wait for a layer's matrices, if it is one of these, and begin to read those of the next.
        Returns when they were being read, in ns as `time.perf_counter_ns` counts; None where they
        were not. Raises ReadError, and FormatError for a matrix that is not what its checksum
        says."""
        if layer not in self._layers or layer == self._held:
            return None
        if layer != self._coming:
            self._begin(layer)
        reads = self._reads
        self._held, self._coming, self._matrices = None, None, {}
        self._memory.reverse()  # the first is now that of the layer at hand
        for read in reads:
            start = time.perf_counter()
            read.batch.wait()
            waited = time.perf_counter() - start
            self._stats.add(read.asked, read.batch, read.began, waited)
        self._matrices = {read.tensor.name: self._checked(read) for read in reads}
        self._held = layer
        if self._next[layer] != layer:
            self._begin(self._next[layer])
        return reads[0].began, max(read.batch.finished for read in reads)

    def matrix(self, name: str) -> NDArray[Any]:
        """A matrix of the layer that was needed last, as stored; good until the next is needed."""
        return self._matrices[name]

    def close(self) -> None:
        """Wait for what is being read. May be called twice."""
        self._backend.close()

    def _begin(self, layer: int) -> None:
        """Read into the second memory, once nothing that was begun before is in flight. Whatever
        interrupts this, reads that were begun stay known, and the layer does not count as coming
        until all are."""
        self._coming = None
        land(read.batch for read in self._reads)
        start = 0
        self._reads = []
        for tensor in self._layers[layer]:
            data = self._memory[1][start : start + tensor.data.length]
            start += round_up(tensor.data.length, PAGE)
            requests = spanning(data, tensor.data.offset)
            asked = ReadStats(requests=requests.offsets.size, bytes_asked=data.nbytes)
            began = time.perf_counter_ns()
            batch = self._backend.submit(requests)
            self._reads.append(_Read(tensor, data, asked, began, batch))
        self._coming = layer

    def _checked(self, read: _Read) -> NDArray[Any]:
        tensor, data = read.tensor, read.data
        if self._verify:
            found = xxhash.xxh3_64_hexdigest(data)
            if found != tensor.data.xxh3:
                raise FormatError(
                    "data damaged",
                    file=self._path,
                    field=tensor.name,
                    offset=tensor.data.offset,
                    expected=tensor.data.xxh3,
                    found=found,
                )
        return np.frombuffer(data, dtype=dtypes.DTYPES[tensor.dtype][1]).reshape(tensor.shape)

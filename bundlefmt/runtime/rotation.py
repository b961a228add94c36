"""Layers whose attention does not fit in memory: their matrices are read anew for every pass.

Two pieces of memory take turns: while one layer computes from the one, the next layer's matrices
are read into the other. After the last comes the first again, for the token after this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from bundlefmt.errors import BundleError, FormatError
from bundlefmt.layout import dtypes
from bundlefmt.layout.arithmetic import round_up
from bundlefmt.layout.header import Tensor
from bundlefmt.storage.backends import Backend, Batch
from bundlefmt.storage.buffers import PAGE, aligned_empty
from bundlefmt.storage.sequential import spanning


def room_for(tensors: Sequence[Tensor]) -> int:
    """Bytes that a layer's matrices take in one of the two pieces of memory."""
    return sum(round_up(tensor.data.length, PAGE) for tensor in tensors)


class Rotation:
    """The matrices of some layers, which are called `names`; `verify` checks them whenever they
    have been read."""

    def __init__(
        self, path: str, backend: Backend, layers: Mapping[int, Sequence[Tensor]], verify: bool
    ) -> None:
        self.names = {tensor.name for tensors in layers.values() for tensor in tensors}
        self._path = path
        self._backend = backend
        self._layers = layers
        self._verify = verify
        order = sorted(layers)
        self._next = dict(zip(order, order[1:] + order[:1], strict=True))
        self._memory = [aligned_empty(max(map(room_for, layers.values()))) for _ in range(2)]
        self._held: int | None = None
        self._matrices: dict[str, NDArray[Any]] = {}
        self._coming: int | None = None
        self._reads: list[tuple[Tensor, NDArray[np.uint8], Batch]] = []

    def need(self, layer: int) -> None:
        """Wait for a layer's matrices, if it is one of these, and begin to read those of the next.
        Raises ReadError, and FormatError for a matrix that is not what its checksum says."""
        if layer not in self._layers or layer == self._held:
            return
        if layer != self._coming:
            self._begin(layer)
        self._held, self._matrices = None, {}
        reads, self._reads, self._coming = self._reads, [], None
        self._memory.reverse()  # the first is now that of the layer at hand
        for _, _, batch in reads:
            batch.wait()
        self._matrices = {tensor.name: self._checked(tensor, data) for tensor, data, _ in reads}
        self._held = layer
        if self._next[layer] != layer:
            self._begin(self._next[layer])

    def matrix(self, name: str) -> NDArray[Any]:
        """A matrix of the layer that was needed last, as stored; good until the next is needed."""
        return self._matrices[name]

    def close(self) -> None:
        """Wait for what is being read. May be called twice."""
        self._backend.close()

    def _begin(self, layer: int) -> None:
        """Read into the second memory, once nothing that was begun before goes there."""
        for _, _, batch in self._reads:
            with suppress(BundleError):
                batch.wait()
        start = 0
        self._reads = []
        self._coming = layer
        for tensor in self._layers[layer]:
            data = self._memory[1][start : start + tensor.data.length]
            start += round_up(tensor.data.length, PAGE)
            batch = self._backend.submit(spanning(data, tensor.data.offset))
            self._reads.append((tensor, data, batch))

    def _checked(self, tensor: Tensor, data: NDArray[np.uint8]) -> NDArray[Any]:
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

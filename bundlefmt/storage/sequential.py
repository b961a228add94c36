"""Long spans of a file, piece by piece: the next piece is being read while one is used."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from bundlefmt.storage.backends import Backend, Batch, Requests, land
from bundlefmt.storage.buffers import aligned_empty

PIECE = 8 << 20
_REQUEST = 1 << 20  # long reads are parted: a device serves the parts side by side


class Sequential:
    """Reads spans through a backend into two buffers of its own, in turn."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._buffers = [aligned_empty(PIECE) for _ in range(2)]

    def pieces(
        self, offset: int, length: int, unit: int = 1
    ) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """(offset, bytes) of each piece of the span, uint8, a whole number of units long (but for
        the last, where the span is not); a piece is good until the next is asked for. Raises
        ReadError."""
        step = max(PIECE // unit, 1) * unit
        pending: list[tuple[int, NDArray[np.uint8], Batch]] = []
        try:
            for turn, start in enumerate(range(offset, offset + length, step)):
                out = self._buffer(turn % 2, min(step, offset + length - start))
                pending.append((start, out, self._backend.submit(spanning(out, start))))
                if turn:
                    yield self._arrived(pending)
            while pending:
                yield self._arrived(pending)
        finally:  # whoever stops early leaves no read behind that fills a buffer later
            land(batch for _, _, batch in pending)

    def _buffer(self, index: int, nbytes: int) -> NDArray[np.uint8]:
        if nbytes > self._buffers[index].nbytes:  # one unit larger than a piece
            self._buffers[index] = aligned_empty(nbytes)
        return self._buffers[index][:nbytes]

    def _arrived(
        self, pending: list[tuple[int, NDArray[np.uint8], Batch]]
    ) -> tuple[int, NDArray[np.uint8]]:
        start, out, batch = pending.pop(0)
        batch.wait()
        return start, out


def spanning(out: NDArray[np.uint8], offset: int) -> Requests:
    """The requests that fill contiguous memory with what lies from an offset on."""
    starts = np.arange(0, out.nbytes, _REQUEST)
    bounds = np.arange(starts.size + 1)
    return Requests(out, offset + starts, bounds, starts, np.diff(starts, append=out.nbytes))

"""Bundles streamed past the cache: some are read while those before them are computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from bundlefmt.errors import BundleError
from bundlefmt.layout.header import Group
from bundlefmt.reader import Bundles, Pending, Reader
from bundlefmt.storage.buffers import aligned_empty

# Bytes of bundles in flight, and as many being computed. Large enough for several reads per
# thread; small beside any model.
CHUNK_BYTES = 8 << 20


class Streamer:
    """Streams bundles through two buffers: one is filled while the other is used."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self._buffers = [aligned_empty(CHUNK_BYTES) for _ in range(2)]
        self._flying: list[Pending] = []  # reads into them

    def bundles(
        self, group: Group, ids: NDArray[np.int64], known: NDArray[np.uint8] | None = None
    ) -> Iterator[Bundles]:
        """The bundles of `ids`, in that order, some at a time; the first are begun to be read at
        once; each piece is good until the next is asked for. What was streamed before this is no
        longer to be had. `known` as in `Reader.read`."""
        _land(self._flying)
        flying: list[Pending] = []
        self._flying = flying
        step = max(CHUNK_BYTES // group.stride, 1)

        def submit(turn: int) -> None:
            piece = ids[turn * step : (turn + 1) * step]
            out = self._buffer(turn % 2, piece.size, group.stride)
            flying.append(
                self.reader.submit(group.layer, piece, expert=group.expert, out=out, known=known)
            )

        submit(0)
        return _arriving(flying, submit, -(-ids.size // step))

    def _buffer(self, index: int, count: int, stride: int) -> NDArray[np.uint8]:
        if count * stride > self._buffers[index].nbytes:  # one bundle larger than the buffer
            self._buffers[index] = aligned_empty(count * stride)
        return self._buffers[index][: count * stride].reshape(count, stride)


def _arriving(
    flying: list[Pending], submit: Callable[[int], None], turns: int
) -> Iterator[Bundles]:
    try:
        for turn in range(turns):
            if turn + 1 < turns:
                submit(turn + 1)
            bundles = flying[0].result()
            del flying[0]
            yield bundles
    finally:  # whoever stops early leaves no read behind
        _land(flying)


def _land(flying: list[Pending]) -> None:
    """No read is to fill a buffer later."""
    for batch in flying:
        with suppress(BundleError):
            batch.result()
    flying.clear()

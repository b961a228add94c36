"""The FFN from flash: bundles are read while those that came before are computed.

y = sum over neurons i of  down_i * act(gate_i . x) * (up_i . x)     with a gate
                           down_i * act(up_i . x)                    without

The selector is the part that the activation is applied to: `gate`, or `up` without a gate. In
mode `exact` it is held in DRAM and says which neurons are active; only their bundles are read,
and of those only what is not in DRAM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from bundlefmt import kernels
from bundlefmt.errors import BundleError, FormatError, UsageError
from bundlefmt.file import BundleFile
from bundlefmt.kernels import Floats
from bundlefmt.layout.header import Group, Part
from bundlefmt.reader import Bundles, Pending, Reader
from bundlefmt.storage.buffers import aligned_empty

MODES = ("dense", "exact")

Ids = NDArray[np.int64]

# Told of an FFN's inputs x [tokens, d_model] and activations [tokens, neurons].
Observer = Callable[[Group, Floats, Floats], None]

# Bytes of bundles in flight, and as many being computed. Large enough for several reads per
# thread; small beside any model.
CHUNK_BYTES = 8 << 20


class Streamer:
    """Streams bundles through two buffers: one is filled while the other is used."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self._buffers = [aligned_empty(CHUNK_BYTES) for _ in range(2)]

    def bundles(
        self, group: Group, ids: Ids, known: NDArray[np.uint8] | None = None
    ) -> Iterator[Bundles]:
        """The bundles of `ids`, in that order, some at a time; each piece is good until the next
        is asked for. `known` as in `Reader.read`."""
        step = max(CHUNK_BYTES // group.stride, 1)
        pending: list[Pending] = []
        try:
            for turn, start in enumerate(range(0, ids.size, step)):
                piece = ids[start : start + step]
                out = self._buffer(turn % 2, piece.size, group.stride)
                pending.append(
                    self.reader.submit(
                        group.layer, piece, expert=group.expert, out=out, known=known
                    )
                )
                if turn:
                    yield pending.pop(0).result()
            while pending:
                yield pending.pop(0).result()
        finally:  # whoever stops early leaves no read behind that fills a buffer later
            for batch in pending:
                with suppress(BundleError):
                    batch.result()

    def _buffer(self, index: int, count: int, stride: int) -> NDArray[np.uint8]:
        if count * stride > self._buffers[index].nbytes:  # one bundle larger than the buffer
            self._buffers[index] = aligned_empty(count * stride)
        return self._buffers[index][: count * stride].reshape(count, stride)


class FfnLayer:
    """One layer's FFN, computed from the bundle file."""

    def __init__(self, file: BundleFile, group: Group, streamer: Streamer, mode: str) -> None:
        self._parts = {part.name: part for part in group.parts}
        if not self._parts.keys() >= {"up", "down"}:
            raise FormatError(
                "an FFN needs up and down", field=group.label, found=", ".join(sorted(self._parts))
            )
        self.group = group
        self._streamer = streamer
        self.observer: Observer | None = None
        self._act = kernels.activation(group)
        order = file.order(group)
        self._all: Ids = np.arange(group.neurons) if order is None else order.astype(np.int64)
        self._biases = {part.name: file.bias(group, part.name) for part in group.parts}
        self._resident = {
            part.name: file.resident_part(group, part.name)
            for part in group.parts
            if part.resident is not None
        }
        self._selector = group.parts[0]
        self._gated = self._selector.name == "gate"
        self._known: NDArray[np.uint8] | None = None  # first bytes of every bundle, if in DRAM
        self._held = self._hold_selector() if mode == "exact" else None

    def __call__(self, x: Floats) -> Floats:
        """x [tokens, d_model] -> float32 [tokens, d_model]."""
        ids, active = (self._all, None) if self._held is None else self._active(x, self._held)
        y = np.zeros((x.shape[0], self.group.d_model), dtype=np.float32)
        seen = None
        if self.observer is not None:
            seen = np.zeros((x.shape[0], self.group.neurons), dtype=np.float32)
        done = 0
        for bundles in self._streamer.bundles(self.group, ids, self._known):
            selected = (
                self._part(self._selector, bundles)
                if active is None
                else active[:, done : done + bundles.neurons.size]
            )
            if seen is not None:
                if isinstance(selected, kernels.Part):
                    selected = kernels.activations(x, selected, self.group)
                seen[:, bundles.neurons] = selected
            up = self._part(self._parts["up"], bundles) if self._gated else None
            down = self._part(self._parts["down"], bundles)
            y += kernels.ffn(x, selected, up, down, self.group)
            done += bundles.neurons.size
        if self.observer is not None and seen is not None:
            self.observer(self.group, x, seen)
        bias = self._biases["down"]
        return y if bias is None else y + bias

    def _active(self, x: Floats, held: NDArray[np.uint8]) -> tuple[Ids, Floats]:
        """The neurons active for any token by the selector that is held, in the file's order, and
        their activations."""
        pre = kernels.matmul_encoded(x, held, self._selector.encoding)
        bias = self._biases[self._selector.name]
        activations = self._act(pre if bias is None else pre + bias)
        active: NDArray[np.bool_] = np.any(activations, axis=0)
        ids = self._all[active[self._all]]
        return ids, activations[:, ids]

    def _hold_selector(self) -> NDArray[np.uint8]:
        """The selector in memory, uint8 [neurons, part length]; where it is bundled, it is read
        from the bundles and need not be read again."""
        part = self._selector
        if self.group.activation not in kernels.SPARSE_ACTIVATIONS:
            raise UsageError(
                "mode exact needs an activation with exact zeros: use mode dense",
                field=self.group.label,
                expected=", ".join(kernels.SPARSE_ACTIVATIONS),
                found=self.group.activation,
            )
        if part.offset is None:
            return self._resident[part.name]
        if part.offset:
            raise FormatError("selector not at the bundle's start", field=self.group.label)
        held = np.empty((self.group.neurons, part.length), dtype=np.uint8)
        for bundles in self._streamer.bundles(self.group, self._all):
            held[bundles.neurons] = bundles.raw[:, : part.length]
        self._known = held
        return held

    def _part(self, part: Part, bundles: Bundles) -> kernels.Part:
        """A part of those bundles' neurons, as it is stored."""
        if part.offset is None:
            stored = self._resident[part.name][bundles.neurons]
        else:
            stored = bundles.raw[:, part.offset : part.offset + part.length]
        bias = self._biases[part.name]
        if bias is None or part.name == "down":  # the bias of `down` is one per output
            return kernels.Part(stored, part.encoding, None)
        return kernels.Part(stored, part.encoding, bias[bundles.neurons])

"""The FFN from flash: bundles are read while those that came before are computed.

y = sum over neurons i of  down_i * act(gate_i . x) * (up_i . x)     with a gate
                           down_i * act(up_i . x)                    without

Tokens made one at a time go through the neuron cache, where there is one: what it holds is
computed while the rest is being read into it. Everything else is streamed past it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from bundlefmt import kernels
from bundlefmt.errors import BundleError, FormatError, UsageError
from bundlefmt.file import BundleFile
from bundlefmt.flash import predictor
from bundlefmt.flash.cache import NeuronCache
from bundlefmt.flash.predictor import Predictor
from bundlefmt.kernels import Floats
from bundlefmt.layout.header import Group, Part
from bundlefmt.reader import Bundles, Pending, Reader
from bundlefmt.runtime.selection import (
    Dense,
    Exact,
    Ids,
    Predicted,
    Selected,
    Selecting,
    Selection,
    TopK,
    check,
)
from bundlefmt.storage.buffers import aligned_empty

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
    """One layer's FFN, computed from the bundle file. Raises UsageError for a mode that the layer
    cannot be computed in."""

    def __init__(
        self,
        file: BundleFile,
        group: Group,
        streamer: Streamer,
        selecting: Selecting,
        cache: NeuronCache | None = None,
    ) -> None:
        self._parts: dict[str, Part] = {part.name: part for part in group.parts}
        if not self._parts.keys() >= {"up", "down"}:
            raise FormatError(
                "an FFN needs up and down", field=group.label, found=", ".join(sorted(self._parts))
            )
        self.group = group
        self.cache = cache
        self._streamer = streamer
        self.observer: Observer | None = None
        order = file.order(group)
        self._all: Ids = np.arange(group.neurons) if order is None else order.astype(np.int64)
        self._act = kernels.activation(group)
        biases: dict[str, Floats | None] = {
            part.name: file.bias(group, part.name) for part in group.parts
        }
        self._output_bias = biases.pop("down")
        self._neuron_biases = {name: bias for name, bias in biases.items() if bias is not None}
        self._resident: dict[str, kernels.Part] = {
            part.name: kernels.Part(
                file.resident_part(group, part.name), part.encoding, biases[part.name]
            )
            for part in group.parts
            if part.resident is not None
        }
        self._selector = group.parts[0]
        self._gated = self._selector.name == "gate"
        self._known: NDArray[np.uint8] | None = None  # first bytes of every bundle, if in DRAM
        self._select = self._selection(file, selecting)
        self._slot_biases = {
            name: np.zeros(0 if cache is None else cache.rows.shape[0], dtype=np.float32)
            for name in self._neuron_biases
        }

    def __call__(self, x: Floats) -> Floats:
        """x [tokens, d_model] -> float32 [tokens, d_model]."""
        selected = self._select(x)
        if self.cache is not None and x.shape[0] == 1 and self.observer is None:
            y = self._through_cache(x, selected, self.cache)
        else:
            y = self._streamed(x, selected)
        return y if self._output_bias is None else y + self._output_bias

    def _through_cache(self, x: Floats, selected: Selected, cache: NeuronCache) -> Floats:
        admission = cache.admit(selected.ids)
        missing = selected.ids[admission.missing]
        pending = self._streamer.reader.submit(
            self.group.layer,
            missing,
            expert=self.group.expert,
            out=cache.rows,
            rows=admission.missing_slots,
            known=self._known,
        )
        held = _some(selected, admission.held)
        y = self._sum(x, held, cache.rows, admission.held_slots, self._slot_biases)
        pending.result()
        for name, biases in self._slot_biases.items():
            biases[admission.missing_slots] = self._neuron_biases[name][missing]
        cache.commit(missing, admission.missing_slots)
        read = _some(selected, admission.missing)
        y += self._sum(x, read, cache.rows, admission.missing_slots, self._slot_biases)
        if admission.passed.size:
            y += self._streamed(x, _some(selected, admission.passed))
        return y

    def _streamed(self, x: Floats, selected: Selected) -> Floats:
        y = np.zeros((x.shape[0], self.group.d_model), dtype=np.float32)
        seen = None
        if self.observer is not None:
            seen = np.zeros((x.shape[0], self.group.neurons), dtype=np.float32)
        done = 0
        for bundles in self._streamer.bundles(self.group, selected.ids, self._known):
            biases = {name: bias[bundles.neurons] for name, bias in self._neuron_biases.items()}
            some = _some(selected, slice(done, done + bundles.neurons.size))
            if seen is not None:
                some = self._activated(x, some, bundles.raw, biases)
                seen[:, bundles.neurons] = some.activations
            y += self._sum(x, some, bundles.raw, None, biases)
            done += bundles.neurons.size
        if self.observer is not None and seen is not None:
            self.observer(self.group, x, seen)
        return y

    def _sum(
        self,
        x: Floats,
        selected: Selected,
        raw: NDArray[np.uint8],
        rows: kernels.Rows | None,
        biases: dict[str, Floats],
    ) -> Floats:
        """The sum over selected neurons whose bundles are the rows of `raw`, or those in `rows`,
        as are their biases."""

        def part(name: str) -> kernels.Part | None:
            found = self._parts[name]
            if found.offset is None:
                return None
            stored = raw[:, found.offset : found.offset + found.length]
            return kernels.Part(stored, found.encoding, biases.get(name))

        hidden: kernels.Part | Floats | None = selected.activations
        if hidden is None:
            hidden = part(self._selector.name) or self._act(
                kernels.biased_products(x, self._resident[self._selector.name], selected.ids)
            )
        up = part("up") if self._gated else None
        if self._gated and up is None:
            if isinstance(hidden, kernels.Part):
                hidden = self._act(kernels.biased_products(x, hidden, rows))
            hidden = hidden * kernels.biased_products(x, self._resident["up"], selected.ids)
        down = part("down")
        assert down is not None  # the format keeps no other place for it
        return kernels.ffn(x, hidden, up, down, self.group, rows)

    def _activated(
        self, x: Floats, selected: Selected, raw: NDArray[np.uint8], biases: dict[str, Floats]
    ) -> Selected:
        """The selected neurons, whose bundles are the rows of `raw`, with their activations."""
        if selected.activations is not None:
            return selected
        part = self._selector
        if part.offset is None:
            pre = kernels.biased_products(x, self._resident[part.name], selected.ids)
        else:
            stored = raw[:, part.offset : part.offset + part.length]
            held = kernels.Part(stored, part.encoding, biases.get(part.name))
            pre = kernels.biased_products(x, held)
        return Selected(selected.ids, self._act(pre))

    def _selection(self, file: BundleFile, selecting: Selecting) -> Selection:
        check(selecting.mode, self.group)
        if selecting.mode == "dense":
            return Dense(self._all)
        if selecting.mode == "predict":
            return Predicted(self._all, self._predictor(file))
        selector = kernels.Part(
            self._hold_selector(),
            self._selector.encoding,
            self._neuron_biases.get(self._selector.name),
        )
        if selecting.mode == "topk":
            return TopK(self._all, selector, self._act, selecting.share)
        return Exact(self._all, selector, self._act)

    def _predictor(self, file: BundleFile) -> Predictor:
        found = predictor.load(file, self.group)
        if found is None:
            raise UsageError(
                "mode predict needs a predictor: bundlefmt train-predictors adds one",
                field=self.group.label,
            )
        return found

    def _hold_selector(self) -> NDArray[np.uint8]:
        """The selector in memory, uint8 [neurons, part length]; where it is bundled, it is read
        from the bundles and need not be read again."""
        part = self._selector
        if part.offset is None:
            return self._resident[part.name].stored
        if part.offset:
            raise FormatError("selector not at the bundle's start", field=self.group.label)
        held = np.empty((self.group.neurons, part.length), dtype=np.uint8)
        for bundles in self._streamer.bundles(self.group, self._all):
            held[bundles.neurons] = bundles.raw[:, : part.length]
        self._known = held
        return held


def _some(selected: Selected, which: Ids | slice) -> Selected:
    activations = selected.activations
    return Selected(selected.ids[which], None if activations is None else activations[:, which])

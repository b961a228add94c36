"""The steps that read weights which a token does not need: every one of them, for each token.

All of them are the runtime's decoder over another place for its weights:

naive    one layer's memory, shared by all: a layer is read whole, in large direct reads, and then
         computed; so are the embeddings.
mapped   the file, mapped: the kernel reads what the arithmetic touches and forgets it under
         pressure.
hybrid   what is not FFN in memory, with as many neurons of each FFN as fit; the others are read,
         in large direct reads, and then computed.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bundlefmt.file import BundleFile
from bundlefmt.kernels import Floats
from bundlefmt.layout import dtypes
from bundlefmt.layout.header import Group, Tensor
from bundlefmt.reader import Bundles
from bundlefmt.runtime import memory
from bundlefmt.runtime.attention import AttentionLayer, LayerCache
from bundlefmt.runtime.config import decoder_config
from bundlefmt.runtime.decoder import Decoder
from bundlefmt.runtime.memory import Caching
from bundlefmt.runtime.selection import Ids, Selecting
from bundlefmt.storage.backends import Backend
from bundlefmt.storage.buffers import aligned_empty
from bundlefmt.storage.sequential import spanning

_LARGE = 1 << 20  # smaller tensors (norms, biases) stay in memory
_PAGE = 4096
_LAYER = re.compile(r"\.(?:layers|h)\.(\d+)\.")

Bytes = NDArray[np.uint8]


class Loads:
    """Spans of the file, read into memory; `seconds` and `nbytes` of it since it was made."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.seconds = 0.0
        self.nbytes = 0

    def __call__(self, spans: list[tuple[Bytes, int]]) -> None:
        """Fill each memory with what lies from its offset on."""
        start = time.perf_counter()
        for batch in [self._backend.submit(spanning(out, offset)) for out, offset in spans]:
            batch.wait()
        self.seconds += time.perf_counter() - start
        self.nbytes += sum(out.nbytes for out, _ in spans)


class Dense(NamedTuple):
    """A decoder that computes every neuron; before its logits, `before_head` is called. `loads`
    is what it reads by itself: None where the kernel does."""

    decoder: Decoder
    before_head: Callable[[], None]
    loads: Loads | None


class _Whole:
    """The streamer's interface over rows of bundles that are there: yields them all at once."""

    def __init__(self, rows: Callable[[Group], Bytes]) -> None:
        self._rows = rows

    def bundles(self, group: Group, ids: Ids, known: Bytes | None = None) -> Iterator[Bundles]:
        yield Bundles(group, ids, self._rows(group), ids)


class _Mapped(BundleFile):
    """A bundle file whose large tensors are views of its mapping."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._map = np.memmap(path, dtype=np.uint8, mode="r")

    def tensor(self, name: str) -> NDArray[Any]:
        entry = self.tensor_entry(name)
        if entry.data.length < _LARGE:
            return super().tensor(name)
        return _shaped(self._map[entry.data.offset :][: entry.data.length], entry)

    def rows(self, group: Group) -> Bytes:
        """The group's bundles."""
        return self._map[group.bundles.offset :][: group.bundles.length].reshape(-1, group.stride)


class _Staged(BundleFile):
    """A bundle file whose large tensors lie in memory that layers share: `need(layer)` reads that
    layer's, with its bundles, unless it was the last one read; `need(None)` those of no layer,
    which have a memory of their own."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.loads = Loads(self.backend()[0])
        large = [entry for entry in self.header.tensors if entry.data.length >= _LARGE]
        self._layers = {entry.name: _layer_of(entry.name) for entry in large}
        self._starts: dict[str, int] = {}
        ends: dict[int | None, int] = {}
        for entry in large:
            layer = self._layers[entry.name]
            self._starts[entry.name] = ends.get(layer, 0)
            ends[layer] = ends.get(layer, 0) + -(-entry.data.length // _PAGE) * _PAGE
        self._bundles = {group.layer: ends.get(group.layer, 0) for group in self.groups}
        self._own = aligned_empty(ends.get(None, 0))
        self._shared = aligned_empty(
            max(self._bundles[group.layer] + group.bundles.length for group in self.groups)
        )
        self._shared.fill(0)
        self._latest: int | None = None

    def tensor(self, name: str) -> NDArray[Any]:
        if name not in self._starts:
            return super().tensor(name)
        out, offset = self._span(name)
        if self._layers[name] is None:
            self.loads([(out, offset)])
        return _shaped(out, self.tensor_entry(name))

    def rows(self, group: Group) -> Bytes:
        """The group's bundles."""
        self.need(group.layer)
        return self._rows(group)

    def _rows(self, group: Group) -> Bytes:
        start = self._bundles[group.layer]
        return self._shared[start : start + group.bundles.length].reshape(-1, group.stride)

    def need(self, layer: int | None) -> None:
        """Read what the layer computes with."""
        if layer is not None and layer == self._latest:
            return
        self._latest = layer
        spans = [self._span(name) for name, found in self._layers.items() if found == layer]
        if layer is not None:
            group = self.group(layer)
            spans.append((self._rows(group).reshape(-1), group.bundles.offset))
        self.loads(spans)

    def _span(self, name: str) -> tuple[Bytes, int]:
        data = self.tensor_entry(name).data
        memory = self._own if self._layers[name] is None else self._shared
        return memory[self._starts[name] :][: data.length], data.offset


class _ReadFirst:
    """A layer's attention, for which the layer must be there."""

    def __init__(self, file: _Staged, layer: int, attention: AttentionLayer) -> None:
        self._file = file
        self._layer = layer
        self._attention = attention
        self.new_cache = attention.new_cache

    def __call__(self, x: Floats, cache: LayerCache) -> Floats:
        self._file.need(self._layer)
        return self._attention(x, cache)


class _PartlyHeld:
    """The streamer's interface: the first neurons of each group are in memory, the others come in
    one span."""

    def __init__(self, held: dict[int, Bytes], loads: Loads, groups: list[Group]) -> None:
        self._held = held
        self._loads = loads
        longest = max(group.bundles.length - held[group.layer].nbytes for group in groups)
        self._memory = aligned_empty(longest)
        self._memory.fill(0)
        for group in groups:
            loads([(held[group.layer].reshape(-1), group.bundles.offset)])

    def bundles(self, group: Group, ids: Ids, known: Bytes | None = None) -> Iterator[Bundles]:
        held = self._held[group.layer]
        rest = self._memory[: group.bundles.length - held.nbytes]
        self._loads([(rest, group.bundles.offset + held.nbytes)])
        for rows, some in ((held, ids[: len(held)]), (rest, ids[len(held) :])):
            yield Bundles(group, some, rows.reshape(-1, group.stride), np.arange(some.size))


def naive(path: str, limit: int, tokens: int) -> Dense:
    """The whole model is read for each token."""
    file = _Staged(path)
    decoder = _decoder(file, _Whole(file.rows))
    decoder._layers = [
        layer._replace(attention=_ReadFirst(file, number, layer.attention))
        for number, layer in enumerate(decoder._layers)
    ]
    return Dense(decoder, lambda: file.need(None), file.loads)


def mapped(path: str, limit: int, tokens: int) -> Dense:
    """The whole model is mapped."""
    file = _Mapped(path)
    return Dense(_decoder(file, _Whole(file.rows)), lambda: None, None)


def hybrid(path: str, limit: int, tokens: int) -> Dense:
    """As much of the model as fits is in memory, the rest is read for each token."""
    file = BundleFile(path)
    longest = max(group.bundles.length for group in file.groups)  # at most so much is staged
    config = decoder_config(file.config, len(file.groups))
    caching = Caching(limit - longest, tokens=tokens)
    budget = memory.plan(file, config, Selecting("dense"), caching)
    held = {
        group.layer: aligned_empty(slots * group.stride).reshape(slots, group.stride)
        for group, slots in zip(file.groups, budget.slots, strict=True)
    }
    loads = Loads(file.backend()[0])
    return Dense(_decoder(file, _PartlyHeld(held, loads, file.groups)), lambda: None, loads)


def _decoder(file: BundleFile, streamer: Any) -> Decoder:
    config = decoder_config(file.config, len(file.groups))
    return Decoder(config, file, streamer, Selecting("dense"), [None] * len(file.groups))


def _shaped(data: Bytes, entry: Tensor) -> NDArray[Any]:
    dtype = dtypes.DTYPES[entry.dtype][1]
    return data.view(dtype).reshape(entry.shape)


def _layer_of(name: str) -> int | None:
    found = _LAYER.search(name)
    return None if found is None else int(found[1])

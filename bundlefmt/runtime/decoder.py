"""The decoder: embeddings, layers, logits. One flat path."""

from __future__ import annotations

import operator
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple
from weakref import ReferenceType, ref

import numpy as np

from bundlefmt import kernels
from bundlefmt.errors import UsageError, printable
from bundlefmt.file import BundleFile
from bundlefmt.flash.cache import NeuronCache
from bundlefmt.kernels import Floats
from bundlefmt.layout.header import Group
from bundlefmt.runtime.attention import AttentionLayer, LayerCache
from bundlefmt.runtime.clock import Clock
from bundlefmt.runtime.config import DecoderConfig
from bundlefmt.runtime.ffn import FfnLayer, Observer
from bundlefmt.runtime.roles import check_ffn
from bundlefmt.runtime.rotation import Rotation
from bundlefmt.runtime.selection import Selecting, Selection
from bundlefmt.runtime.streamer import Streamer
from bundlefmt.runtime.weights import Norm, Weights

_SHOWN = 4  # names of unused tensors
_LONGEST = 1000  # characters of a warning


class Layer(NamedTuple):
    """One layer of the decoder; `ffn_norm` is attention's where the two share one."""

    attention_norm: Norm
    attention: AttentionLayer
    ffn_norm: Norm
    ffn: FfnLayer


class Decoder:
    """A decoder-only model whose FFN is streamed from its bundle file.

    Threads may share it: their passes take turns, and all that a sequence keeps from one pass to
    the next is in its key/value cache. Raises UsageError when the model is not one that this
    runtime computes, FormatError when tensors are missing from the file.
    """

    def __init__(
        self,
        config: DecoderConfig,
        file: BundleFile,
        streamer: Streamer,
        selecting: Selecting,
        caches: Sequence[NeuronCache | None],
        rotation: Rotation | None = None,
        *,
        ahead: bool = True,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.config = config
        self.clock = Clock()
        self._lock = threading.Lock()  # layers share buffers, cache slots, and reads in flight
        self._process = os.getpid()
        self._latest: ReferenceType[LayerCache] | None = None  # that of the last pass
        self._ahead = ahead
        self._rotation = rotation
        weights = Weights(file, config, rotation)
        self._project_in = self._project_out = None
        if config.embed_width != config.d_model:
            self._project_in = weights.linear("project_in")
            self._project_out = weights.linear("project_out")
        self._embed = weights.matrix("embed")
        learned = config.position_offset is not None
        self._positions = weights.matrix("positions") if learned else None
        self._norm = weights.norm("norm") if config.final_norm else None
        self._head = weights.head(self._embed)
        ffn_norm = "ffn_norm" if "ffn_norm" in config.names else "attention_norm"
        self._layers: list[Layer] = []
        for i in range(len(config.layers)):
            progress(i, len(config.layers))
            check_ffn(file.group(i), config)
            first = weights.norm("attention_norm", i)
            attention = AttentionLayer(config, weights, i)
            second = weights.norm(ffn_norm, i)
            fed = second if config.norm_first else first
            ffn = FfnLayer(file, file.group(i), streamer, selecting, fed, self.clock, caches[i])
            self._layers.append(Layer(first, attention, second, ffn))
        _tell_of_unused(file, weights.unused)

    @property
    def vocabulary(self) -> int:
        """How many token ids there are."""
        return int(self._embed.shape[0])

    def observe(self, observer: Observer | None) -> None:
        """From now on tell `observer` of every FFN's inputs and activations."""
        for layer in self._layers:
            layer.ffn.observer = observer

    def select_by(self, make: Callable[[Group, Selection], Selection]) -> None:
        """From now on every FFN takes the neurons that make(group, selection so far) selects: a
        recorded trace's, say."""
        for layer in self._layers:
            layer.ffn.select_by(make)

    def new_cache(self, tokens: int = 16) -> list[LayerCache]:
        """An empty key/value cache, with room for that many tokens."""
        return [layer.attention.new_cache(tokens) for layer in self._layers]

    def forward(self, ids: Sequence[int], cache: list[LayerCache]) -> Floats:
        """Hidden states float32 [tokens, width of the head] of tokens that follow the cache."""
        before = cache[0].length
        tokens = self.check(ids, before)
        with self.exclusive():
            self._latest = ref(cache[0])
            return self._pass(tokens, before, cache)

    def _pass(self, tokens: list[int], before: int, cache: list[LayerCache]) -> Floats:
        self.clock.start()
        x = kernels.widened(self._embed[tokens])
        if self._project_in is not None:
            x = self._project_in(x)
        if self._positions is not None and self.config.position_offset is not None:
            start = before + self.config.position_offset
            x = x + kernels.widened(self._positions[start : start + len(tokens)])
        self.clock.lap("head")
        for layer, seen in zip(self._layers, cache, strict=True):
            x = self._block(layer, x, seen)
        if self._norm is not None:
            x = self._norm(x)
        x = x if self._project_out is None else self._project_out(x)
        self.clock.lap("head")
        return x

    def drop(self, tokens: int, cache: list[LayerCache]) -> None:
        """Forget the last `tokens` of the last pass, as if they had not been in it."""
        with self.exclusive():
            last = self._latest is not None and self._latest() is cache[0]
            for layer, seen in zip(self._layers, cache, strict=True):
                seen.drop(tokens)
                if last:  # else later passes have counted on what the cache holds
                    layer.ffn.drop(tokens)

    def _block(self, layer: Layer, x: Floats, seen: LayerCache) -> Floats:
        """x [tokens, d_model] after one layer."""
        first = self.config.norm_first
        if self.config.parallel:
            # The FFN's input is known before attention runs, so its reads come first.
            fed = layer.ffn.begin(layer.ffn_norm(x))
            mixed = self._attention(layer, layer.attention_norm(x), seen)
            return x + fed() + mixed
        if self._ahead and first:
            layer.ffn.read_ahead(layer.ffn_norm(x))
        x = x + self._attention(layer, layer.attention_norm(x) if first else x, seen)
        x = x if first else layer.attention_norm(x)
        x = x + layer.ffn(layer.ffn_norm(x) if first else x)
        return x if first else layer.ffn_norm(x)

    def _attention(self, layer: Layer, x: Floats, seen: LayerCache) -> Floats:
        index = layer.ffn.group.layer
        if self._rotation is not None:
            span = self._rotation.need(index)
            self.clock.lap("wait", index)
            if span is not None:
                self.clock.read(index, span)
        y = layer.attention(x, seen)
        self.clock.lap("attention", index)
        return y

    def logits(self, hidden: Floats) -> Floats:
        """Hidden states [tokens, width] -> float32 [tokens, vocabulary]."""
        with self.exclusive():
            self.clock.start()
            logits = self._head(hidden)
            self.clock.lap("head")
            return logits

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """No other thread computes meanwhile. Raises UsageError in a process that was forked from
        the one that loaded the model: it has none of its reading threads. Numbers that are none
        are told of where a token is chosen or scored, not by NumPy as they come up."""
        if os.getpid() != self._process:
            raise UsageError("the model was loaded by another process: load it after the fork")
        with self._lock, np.errstate(over="ignore", invalid="ignore"):
            yield

    def check(self, ids: Sequence[int], others: int = 0) -> list[int]:
        """The ids as plain integers. Raises UsageError unless they are tokens of the model, and fit
        its context together with so many others."""
        try:
            count = len(ids) + others
            if count > self.config.context:
                raise UsageError(
                    "more tokens than the model's context",
                    expected=f"at most {self.config.context}",
                    found=count,
                )
            tokens = [operator.index(token) for token in ids]
        except TypeError:
            raise UsageError(
                "tokens are a sequence of integers", field="ids", found=repr(ids)[:40]
            ) from None
        if not tokens:
            raise UsageError("no tokens", field="ids", expected="one or more")
        wrong = [token for token in tokens if not 0 <= token < self.vocabulary]
        if wrong:
            raise UsageError(
                "no such token", field="ids", expected=f"0..{self.vocabulary - 1}", found=wrong[0]
            )
        return tokens


def _tell_of_unused(file: BundleFile, names: Sequence[str]) -> None:
    """Warn of tensors that the model is computed without, as adapters that were not merged are."""
    if names:
        count = "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"
        shown = ", ".join(map(printable, names[:_SHOWN])) + (", ..." if names[_SHOWN:] else "")
        message = f"{printable(file.path)}: {count} not used: {shown}"
        warnings.warn(message[:_LONGEST], stacklevel=2)

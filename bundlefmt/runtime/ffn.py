"""The FFN from flash: what is in memory is computed while the rest is being read.

y = sum over neurons i of  down_i * act(gate_i . x) * (up_i . x)     with a gate
                           down_i * act(up_i . x)                    without

A few tokens at a time go through the neuron cache, where there is one: what it holds is computed
while the rest is being read into it. Reads begin as soon as anything is known of the neurons: in a
parallel block before attention, elsewhere with a guess for a single token (`read_ahead`). The many
tokens of a prompt stream a layer's neurons past the cache, and leave in it what they used last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bundlefmt import kernels
from bundlefmt.errors import BundleError, FormatError
from bundlefmt.file import BundleFile
from bundlefmt.flash import predictor
from bundlefmt.flash.cache import Admission, NeuronCache
from bundlefmt.flash.predictor import Predictor
from bundlefmt.flash.readahead import ReadAhead
from bundlefmt.kernels import Floats
from bundlefmt.layout.header import Group, Part
from bundlefmt.reader import Bundles, Pending
from bundlefmt.runtime.clock import Clock
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
from bundlefmt.runtime.streamer import Streamer
from bundlefmt.runtime.weights import Norm

# Told of an FFN's inputs x [tokens, d_model] and activations [tokens, neurons].
Observer = Callable[[Group, Floats, Floats], None]


class Lying(NamedTuple):
    """Where neurons' bundles are: they are the rows of `raw`, uint8 [any, stride], or those in
    `rows`; so are their biases, by part."""

    raw: NDArray[np.uint8]
    biases: dict[str, Floats]
    rows: kernels.Rows | None = None

    def part(self, part: Part) -> kernels.Part | None:
        """A part of every row; None for one that is resident."""
        if part.offset is None:
            return None
        stored = self.raw[:, part.offset : part.offset + part.length]
        return kernels.Part(stored, part.encoding, self.biases.get(part.name))


class FfnLayer:
    """One layer's FFN, computed from the bundle file. Raises UsageError for a mode that the layer
    cannot be computed in."""

    def __init__(
        self,
        file: BundleFile,
        group: Group,
        streamer: Streamer,
        selecting: Selecting,
        norm: Norm,
        clock: Clock,
        cache: NeuronCache | None = None,
    ) -> None:
        self._parts: dict[str, Part] = {part.name: part for part in group.parts}
        if not self._parts.keys() >= {"up", "down"}:
            raise FormatError(
                "an FFN needs up and down", field=group.label, found=", ".join(sorted(self._parts))
            )
        self.group = group
        self.cache = cache
        self.observer: Observer | None = None
        self._streamer = streamer
        self._clock = clock
        self._ahead = ReadAhead(group.neurons, group.stride)
        # Reads into the cache: those begun before their neurons were known, and the others. They
        # are kept until they have ended, for then their slots may go to others.
        self._early: Pending | None = None
        self._late: Pending | None = None
        self._last: tuple[int, Selected, Admission] | None = None  # pass of several tokens
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
        self._select = self._selection(file, selecting, norm)
        self._slot_biases = (
            {} if cache is None else {name: cache.beside(name) for name in self._neuron_biases}
        )

    def __call__(self, x: Floats) -> Floats:
        """x [tokens, d_model] -> float32 [tokens, d_model]."""
        return self.begin(x)()

    def select_by(self, make: Callable[[Group, Selection], Selection]) -> None:
        """From now on the neurons are those that make(group, selection so far) selects."""
        self._select = make(self.group, self._select)

    def read_ahead(self, x: Floats) -> None:
        """Begin to read what a token probably needs, with what the FFN's input would be if the
        attention before it added nothing."""
        if self.cache is None:
            return
        self._drop_early(self.cache)
        if x.shape[0] > 1 or not self._takes_cache(x):
            return
        if not self._ahead.worth_guessing(self._select.guess_bytes):
            return
        guess = self._select.guess(x)
        if guess is not None:
            self._ahead.guess(self.cache.absent(guess))
        self._clock.lap("predict", self.group.layer)
        if guess is not None and self._ahead.pays:
            expected, slots = self.cache.expect(guess)
            self._early = self._submit(expected, self.cache.rows, slots)
            self._clock.lap("manage", self.group.layer)

    def begin(self, x: Floats) -> Callable[[], Floats]:
        """Choose the neurons for x [tokens, d_model], and begin to read them; what is returned
        computes: float32 [tokens, d_model]."""
        selected = self._select(x)
        self._last = None
        _ended(
            self._late
        )  # an error may have left them, and their slots are about to be given back
        self._late = None
        self._clock.lap("predict", self.group.layer)
        if self.cache is None or not self._takes_cache(x):
            pieces = self._streamer.bundles(self.group, selected.ids, self._known)
            return lambda: self._biased(self._streamed(x, selected, pieces))
        cache = self.cache
        admission = cache.admit(selected.ids)
        if x.shape[0] == 1:
            self._ahead.learn(selected.ids, selected.ids.size - admission.held.size)
        else:
            self._last = x.shape[0], selected, admission
        missing = selected.ids[admission.missing]
        self._late = pending = self._submit(missing, cache.rows, admission.missing_slots)
        passing = None
        if admission.passed.size:
            passed = selected.ids[admission.passed]
            passing = self._streamer.bundles(self.group, passed, self._known)
        self._clock.lap("manage", self.group.layer)
        return lambda: self._biased(
            self._through_cache(x, selected, cache, admission, pending, passing)
        )

    def drop(self, tokens: int) -> None:
        """The last `tokens` of the last pass were for nothing: the cache is not to count them."""
        if self.cache is not None and self._last is not None:
            passed, selected, admission = self._last
            kept = [selected.used_by(token) for token in range(passed - tokens)]
            self.cache.settle(admission, kept)
            self._last = None

    def _takes_cache(self, x: Floats) -> bool:
        return x.shape[0] <= kernels.FEW_TOKENS and self.observer is None

    def _biased(self, y: Floats) -> Floats:
        return y if self._output_bias is None else y + self._output_bias

    def _submit(self, ids: Ids, rows: NDArray[np.uint8], slots: Ids) -> Pending:
        return self._streamer.reader.submit(
            self.group.layer,
            ids,
            expert=self.group.expert,
            out=rows,
            rows=slots,
            known=self._known,
        )

    def _through_cache(
        self,
        x: Floats,
        selected: Selected,
        cache: NeuronCache,
        admission: Admission,
        pending: Pending,
        passing: Iterator[Bundles] | None,
    ) -> Floats:
        """What is held is computed while the rest comes: first what was expected, then what was
        not."""
        clock, layer = self._clock, self.group.layer

        def sum_of(which: Ids, slots: Ids) -> Floats:
            y = self._sum(x, selected.some(which), Lying(cache.rows, self._slot_biases, slots))
            clock.lap("ffn", layer)
            return y

        y = sum_of(admission.held, admission.held_slots)
        if self._early is not None:
            self._arrive_early(self._early, cache)
            clock.lap("manage", layer)
            y += sum_of(admission.coming, admission.coming_slots)
        self._arrive(pending)
        self._late = None
        cache.commit(selected.ids[admission.missing], admission.missing_slots)
        clock.lap("manage", layer)
        y += sum_of(admission.missing, admission.missing_slots)
        if passing is not None:
            y += self._streamed(x, selected.some(admission.passed), passing)
        return y

    def _arrive(self, pending: Pending) -> None:
        """Wait for reads."""
        bundles = pending.result()
        self._clock.lap("wait", self.group.layer)
        self._clock.read(self.group.layer, pending.span)
        self._fill_biases(bundles.neurons, bundles.rows)

    def _arrive_early(self, early: Pending, cache: NeuronCache) -> None:
        """Wait for what was read ahead; once that has failed, it does not come."""
        try:
            self._arrive(early)
        except BundleError:
            self._drop_early(cache)
            raise
        cache.arrived()
        self._early = None

    def _drop_early(self, cache: NeuronCache) -> None:
        """Nobody comes for what was read ahead: an error was raised meanwhile."""
        _ended(self._early)
        self._early = None
        cache.forget_expected()

    def _fill_biases(self, neurons: Ids, slots: Ids) -> None:
        for name, biases in self._slot_biases.items():
            biases[slots] = self._neuron_biases[name][neurons]

    def _streamed(self, x: Floats, selected: Selected, pieces: Iterator[Bundles]) -> Floats:
        """The sum over selected neurons, read past the cache; those that a prompt uses last go into
        it as they come by."""
        y = np.zeros((x.shape[0], self.group.d_model), dtype=np.float32)
        seen = None
        if self.observer is not None:
            seen = np.zeros((x.shape[0], self.group.neurons), dtype=np.float32)
        many = x.shape[0] > kernels.FEW_TOKENS
        keeps = self.cache is not None and many and self.observer is None
        if keeps and self.cache is not None:
            self.cache.advance(x.shape[0])
        done = 0
        for bundles in pieces:
            self._clock.lap("wait", self.group.layer)
            biases = {name: bias[bundles.neurons] for name, bias in self._neuron_biases.items()}
            lying = Lying(bundles.raw, biases)
            some = selected.some(slice(done, done + bundles.neurons.size))
            if seen is not None or keeps:
                some = Selected(some.ids, self._activations(x, some, lying))
            if seen is not None:
                seen[:, bundles.neurons] = some.activations
            y += self._sum(x, some, lying)
            self._clock.lap("ffn", self.group.layer)
            if keeps and some.activations is not None:
                self._keep(bundles, some.activations)
                self._clock.lap("manage", self.group.layer)
            done += bundles.neurons.size
        if self.observer is not None and seen is not None:
            self.observer(self.group, x, seen)
        return y

    def _keep(self, bundles: Bundles, activations: Floats) -> None:
        """Offer the cache bundles that are at hand, by the last of the tokens that uses each."""
        assert self.cache is not None
        used = activations[::-1] != 0
        some = np.flatnonzero(used.any(axis=0))
        kept, slots = self.cache.offer(bundles.neurons[some], used[:, some].argmax(axis=0))
        neurons = bundles.neurons[some[kept]]
        self.cache.rows[slots] = bundles.raw[some[kept]]
        self._fill_biases(neurons, slots)
        self.cache.commit(neurons, slots)

    def _sum(self, x: Floats, selected: Selected, lying: Lying) -> Floats:
        """The sum over selected neurons."""
        hidden: kernels.Part | Floats | None = None
        up = lying.part(self._parts["up"]) if self._gated else None
        apart = self._gated and up is None
        if not apart and selected.activations is None and selected.mask is None:
            hidden = lying.part(self._selector)
        if hidden is None:
            hidden = self._activations(x, selected, lying)
            if apart:
                hidden = hidden * self._products(self._parts["up"], x, selected.ids, lying)
        down = lying.part(self._parts["down"])
        assert down is not None  # the format keeps no other place for it
        return kernels.ffn(x, hidden, up, down, self.group, lying.rows)

    def _activations(self, x: Floats, selected: Selected, lying: Lying) -> Floats:
        """The selected neurons' activations [tokens, neurons]."""
        if selected.activations is not None:
            return selected.activations
        activations = self._act(self._products(self._selector, x, selected.ids, lying))
        if selected.mask is None:
            return activations
        return np.where(selected.mask, activations, np.float32(0))

    def _products(self, part: Part, x: Floats, ids: Ids, lying: Lying) -> Floats:
        """x times a part of neurons, bias added: [tokens, neurons]."""
        found = lying.part(part)
        if found is None:
            return kernels.biased_products(x, self._resident[part.name], ids)
        return kernels.biased_products(x, found, lying.rows)

    def _selection(self, file: BundleFile, selecting: Selecting, norm: Norm) -> Selection:
        check(selecting.mode, self.group)
        if selecting.mode == "dense":
            return Dense(self._all)
        if selecting.mode == "predict":
            return Predicted(self._all, self._predictor(file, norm))
        selector = kernels.Part(
            self._hold_selector(),
            self._selector.encoding,
            self._neuron_biases.get(self._selector.name),
        )
        if selecting.mode == "topk":
            return TopK(self._all, selector, self._act, selecting.share)
        return Exact(self._all, selector, self._act)

    def _predictor(self, file: BundleFile, norm: Norm) -> Predictor:
        """The file's own; where it has none, one that needs no training."""
        found = predictor.load(file, self.group)
        if found is None:
            selector = predictor.read_selector(file, self._streamer.reader, self.group)
            found = predictor.untrained_on_random(selector, norm.__call__)
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


def _ended(pending: Pending | None) -> None:
    """Wait for reads that nobody comes for any more."""
    if pending is not None:
        with suppress(BundleError):
            pending.result()

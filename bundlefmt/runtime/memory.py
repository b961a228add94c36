"""What a model needs of memory besides the neuron cache, and the caches that a budget affords."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bundlefmt.errors import UsageError
from bundlefmt.file import BundleFile
from bundlefmt.flash import predictor
from bundlefmt.flash.budget import Budget, Needs, divide, left_of, sharing
from bundlefmt.flash.cache import NeuronCache, caches
from bundlefmt.flash.policies import Lfu, Lru, Policy, Window, Worth
from bundlefmt.layout.header import Group
from bundlefmt.reader import MAX_REQUEST
from bundlefmt.runtime.config import DecoderConfig
from bundlefmt.runtime.rotation import room_for
from bundlefmt.runtime.selection import Selecting
from bundlefmt.runtime.streamer import CHUNK_BYTES
from bundlefmt.runtime.weights import attention_matrices
from bundlefmt.storage.backends import DEFAULT_THREADS
from bundlefmt.storage.buffers import aligned_empty
from bundlefmt.storage.device import probe_direct, resident_memory

POLICIES = ("lfu", "lru", "window", "none")

_FEWEST_STREAMED = 3  # layers: with two pieces of memory for them, fewer spare nothing
_LEAST_CACHE = 0.05  # of all bundles: a smaller cache costs more reads than streaming saves memory
_TABLE_BYTES = 64  # per neuron: checksum, biases, places, worth; what its slot has of those
# Bundles that do not lie as the device reads are first read elsewhere, wider: a request by each
# thread; io_uring takes half of that.
_WIDENED_BYTES = DEFAULT_THREADS * MAX_REQUEST
_TOKENS = 2048  # of the longest text, where neither the caller nor the model says


@dataclass(frozen=True)
class Caching:
    """A process's memory in bytes, and how the neuron cache uses what is left of it: `policy` is
    one of POLICIES (with `none` there is no such cache: reads go through the operating system's,
    which keeps what it has room for), `window` that of policy window, `tokens` the longest text,
    prompt included (None: the model's context, at most 2048), `reserved` the bytes that others in
    the process are yet to take. Raises UsageError for what cannot be."""

    memory: int
    policy: str = "lfu"
    window: int | None = None
    tokens: int | None = None
    reserved: int = 0

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise UsageError(
                "unknown policy", field="policy", expected=", ".join(POLICIES), found=self.policy
            )
        if (self.policy == "window") != (self.window is not None):
            raise UsageError(
                "a window belongs to policy window, and policy window needs one",
                field="window",
                found=self.window,
            )
        if self.window is not None and self.window < 1:
            raise UsageError("no window", field="window", expected="1 or more", found=self.window)

    def tokens_of(self, config: DecoderConfig) -> int:
        """The longest text that the budget is for."""
        return self.tokens or min(config.context or _TOKENS, _TOKENS)

    def backend(self, wanted: str) -> str:
        """How to read: the operating system can keep only what goes through its cache."""
        return "buffered" if self.policy == "none" and wanted == "auto" else wanted

    def new_policy(self, worth: Worth) -> Policy:
        """The policy of one group's cache, which keeps its worth there."""
        if self.window is not None:
            return Window(worth, self.window)
        return Lfu(worth) if self.policy == "lfu" else Lru(worth)


class Caches(NamedTuple):
    """The neuron cache of each group, None where there is none, and the memory of them all."""

    groups: Sequence[NeuronCache | None]
    memory: NDArray[np.uint8] | None


def plan(file: BundleFile, config: DecoderConfig, selecting: Selecting, caching: Caching) -> Budget:
    """How the memory is divided: as few layers as possible are streamed, so many that the neuron
    cache has room to be of use. Raises UsageError when it is too little."""
    wanted = needs(file, config, selecting, caching.tokens_of(config))
    wanted = replace(wanted, process=wanted.process + caching.reserved)
    cached = [] if caching.policy == "none" else file.groups
    useful = _LEAST_CACHE * sum(group.bundles.length for group in cached)
    matrices = [attention_matrices(file, config, layer) for layer in range(len(config.layers))]
    rooms = {layer: room_for(found) for layer, found in enumerate(matrices) if found}
    streamed: tuple[int, ...] = ()
    spared = wanted
    for count in range(_FEWEST_STREAMED, len(rooms) + 1):
        if left_of(caching.memory, spared) >= useful:
            break
        streamed = tuple(list(rooms)[turn * len(rooms) // count] for turn in range(count))
        spared = replace(
            wanted,
            resident=wanted.resident - sum(rooms[layer] for layer in streamed),
            buffers=wanted.buffers + 2 * max(rooms[layer] for layer in streamed),
        )
    budget = divide(caching.memory, spared, cached, streamed)
    return budget if cached else replace(budget, slots=(0,) * len(file.groups))


def needs(file: BundleFile, config: DecoderConfig, selecting: Selecting, tokens: int) -> Needs:
    """What the model needs to make a text of that many tokens, prompt included. The process is
    measured as it is now."""
    groups = file.groups
    left_out = set()  # what only mode predict loads
    if selecting.mode != "predict":
        left_out = {name for entry in file.header.predictors for name in (entry.a, entry.b)}
    resident = sum(
        tensor.data.decoded_length or tensor.data.length
        for tensor in file.header.tensors
        if tensor.name not in left_out
    )
    parts = sum(
        group.neurons * part.length
        for group in groups
        for part in group.parts
        if part.resident is not None
    )
    selectors = sum(
        group.neurons * group.parts[0].length
        for group in groups
        if selecting.holds_selector and group.parts[0].resident is None
    )
    untrained = [
        group
        for group in groups
        if selecting.mode == "predict" and not predictor.trained(file, group)
    ]
    selectors += sum(predictor.predictor_bytes(group) for group in untrained)
    widest = max(group.neurons for group in groups)
    unit = probe_direct(file.path).offset_alignment
    widened = _WIDENED_BYTES if any(group.stride % unit for group in groups) else 0
    activations = tokens * 4 * (4 * config.d_model + 2 * widest)
    return Needs(
        process=resident_memory(),
        resident=resident + parts,
        selectors=selectors,
        kv_cache=sum(tokens * 8 * layer.kv_heads * config.head_dim for layer in config.layers),
        buffers=2 * CHUNK_BYTES
        + widened
        + activations
        + _TABLE_BYTES * sum(group.neurons for group in groups)
        + max((predictor.untrained_bytes(group) for group in untrained), default=0),
    )


def make_caches(budget: Budget, groups: Sequence[Group], caching: Caching) -> Caches:
    """The caches that a budget affords. They are pieces of one memory, which a reader can
    register."""
    memory = aligned_empty(budget.cache)
    made: dict[int, NeuronCache] = {}
    start = 0
    for alike in sharing(groups):
        stride = groups[alike[0]].stride
        slots = sum(budget.slots[index] for index in alike)
        rows = memory[start : start + slots * stride].reshape(slots, stride)
        start += slots * stride
        if slots:
            neurons = [groups[index].neurons for index in alike]
            made |= zip(alike, caches(rows, neurons, caching.new_policy), strict=True)
    return Caches([made.get(index) for index in range(len(groups))], memory)

"""What a model needs of memory besides the neuron cache, and the caches that a budget affords.

Strategy: a limit is divided before anything is loaded, by figures that follow from the file and the
options alone, so that `plan` and `run` come to the same. Only the process's own size is measured.
It varies by some pages from start to start: it is rounded up to the least that a run takes, or to
steps beside which pages are small, and the limit that a refusal names has room for one step more
where the next start may need it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bundlefmt.errors import UsageError, integer
from bundlefmt.file import BundleFile
from bundlefmt.flash import predictor
from bundlefmt.flash.budget import Budget, Needs, divide, least_limit, left_of, sharing
from bundlefmt.flash.cache import NeuronCache, caches
from bundlefmt.flash.policies import Lfu, Lru, Policy, Window, Worth
from bundlefmt.layout.arithmetic import round_up
from bundlefmt.layout.header import Group, Tensor
from bundlefmt.reader import MAX_REQUEST
from bundlefmt.runtime.config import DecoderConfig
from bundlefmt.runtime.rotation import room_for
from bundlefmt.runtime.scratch import blas_bytes, logits_bytes, pass_bytes
from bundlefmt.runtime.selection import Selecting
from bundlefmt.runtime.streamer import CHUNK_BYTES
from bundlefmt.runtime.weights import attention_matrices
from bundlefmt.storage.backends import DEFAULT_THREADS
from bundlefmt.storage.buffers import aligned_empty
from bundlefmt.storage.device import probe_direct, resident_memory
from bundlefmt.storage.heap import return_freed

POLICIES = ("lfu", "lru", "window", "none")

MIB = 1 << 20
_MOST_BYTES = sys.maxsize
_MOST_TOKENS = 1 << 32
_MOST_THREADS = 1 << 16
_FEWEST_STREAMED = 3  # layers: with two pieces of memory for them, fewer spare nothing
_LEAST_CACHE = 0.05  # of all bundles: a smaller cache costs more reads than streaming saves memory
_TABLE_BYTES = 64  # per neuron: checksum, biases, places, worth; what its slot has of those
# Bundles that do not lie as the device reads are first read elsewhere, wider: a request by each
# thread; io_uring takes half of what 32 threads do.
_WIDENED_BYTES = MAX_REQUEST
_STACK_BYTES = 64 << 10  # of a reading thread: what it touches of its stack, and the kernel's own
_TOKENS = 2048  # of the longest text, where neither the caller nor the model says
# The interpreter and the libraries that a run imports take 50 MiB (Linux, Python 3.11).
_LEAST_PROCESS = 64 << 20
_PROCESS_STEP = 16 << 20
_PROCESS_VARIES = 1 << 20  # from start to start


@dataclass(frozen=True)
class Caching:
    """A process's memory in bytes, and how the neuron cache uses what is left of it: `policy` is
    one of POLICIES (with `none` there is no such cache: reads go through the operating system's,
    which keeps what it has room for), `window` that of policy window, `tokens` the longest text,
    prompt included (None: the model's context, at most 2048), `reserved` the bytes that others in
    the process are yet to take, `threads` how many may read. Raises UsageError for what cannot
    be."""

    memory: int
    policy: str = "lfu"
    window: int | None = None
    tokens: int | None = None
    reserved: int = 0
    threads: int = DEFAULT_THREADS

    def __post_init__(self) -> None:
        integer(self.memory, "memory", 0, _MOST_BYTES)
        integer(self.reserved, "reserved", 0, _MOST_BYTES)
        integer(self.threads, "threads", 1, _MOST_THREADS)
        if self.tokens is not None:
            integer(self.tokens, "tokens", 1, _MOST_TOKENS)
        if self.policy not in POLICIES:
            raise UsageError(
                "unknown policy", field="policy", expected=", ".join(POLICIES), found=self.policy
            )
        if (self.policy == "window") != (self.window is not None):
            raise UsageError(
                f"policy {self.policy} takes {'a' if self.window is None else 'no'} window",
                field="window",
                expected="a number of tokens" if self.window is None else "none",
                found="none" if self.window is None else self.window,
            )
        if self.window is not None:
            integer(self.window, "window", 1, _MOST_TOKENS)

    def tokens_of(self, config: DecoderConfig) -> int:
        """The longest text that the budget is for."""
        return self.tokens or min(config.context, _TOKENS)

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


def plan(
    file: BundleFile,
    config: DecoderConfig,
    selecting: Selecting,
    caching: Caching,
    process: int | None = None,
) -> Budget:
    """How the memory is divided: as few layers as possible are streamed, so many that the neuron
    cache has room to be of use. `process` is what `process_bytes` said before (None: as it is now).
    Raises UsageError, naming the least that works, when it is too little."""
    wanted = needs(file, config, selecting, caching, process)
    cached = [] if caching.policy == "none" else file.groups
    useful = _LEAST_CACHE * sum(group.bundles.length for group in cached)
    streamed: tuple[int, ...] = ()
    spared = wanted
    for some, fewer in _streamings(file, config, wanted):
        if left_of(caching.memory, spared) >= useful:
            break
        if fewer.total < spared.total:
            streamed, spared = some, fewer
    if left_of(caching.memory, spared) < 0:
        least = named(least_limit(spared.total))
        raise UsageError(
            f"too little memory for this model in mode {selecting.mode} and a text of "
            f"{caching.tokens_of(config):,} tokens",
            field="memory",
            expected=f"at least {least // MIB} MiB ({least} bytes): --memory {least // MIB}MiB",
            found=f"{caching.memory / MIB:.1f} MiB ({caching.memory} bytes)",
        )
    budget = divide(caching.memory, spared, cached, streamed)
    return budget if cached else replace(budget, slots=(0,) * len(file.groups))


def least_memory(file: BundleFile, config: DecoderConfig, wanted: Needs) -> int:
    """The smallest limit for a model with these needs, in bytes, if all layers are streamed."""
    others = (fewer.total for _, fewer in _streamings(file, config, wanted))
    return least_limit(min([wanted.total, *others]))


def named(least: int) -> int:
    """A limit in whole MiB that works at the next start too, which finds the process by some pages
    larger."""
    varied = process_bytes(_PROCESS_VARIES) - process_bytes()
    return round_up(least + varied + varied // 128, MIB)


def _streamings(
    file: BundleFile, config: DecoderConfig, wanted: Needs
) -> Iterator[tuple[tuple[int, ...], Needs]]:
    """More and more layers whose attention is streamed, and the needs that remain."""
    matrices = [attention_matrices(file, config, layer) for layer in range(len(config.layers))]
    rooms = {layer: room_for(found) for layer, found in enumerate(matrices) if found}
    for count in range(_FEWEST_STREAMED, len(rooms) + 1):
        streamed = tuple(list(rooms)[turn * len(rooms) // count] for turn in range(count))
        yield (
            streamed,
            replace(
                wanted,
                resident=wanted.resident - sum(rooms[layer] for layer in streamed),
                buffers=wanted.buffers + 2 * max(rooms[layer] for layer in streamed),
            ),
        )


def process_bytes(more: int = 0) -> int:
    """What this process takes now, and so much more: the same for all processes that have done
    nearly the same so far."""
    return max(_LEAST_PROCESS, round_up(resident_memory() + more, _PROCESS_STEP))


def needs(
    file: BundleFile,
    config: DecoderConfig,
    selecting: Selecting,
    caching: Caching,
    process: int | None = None,
) -> Needs:
    """What the model needs to make a text, in a `process` of so many bytes (None: measured as it
    is now)."""
    groups = file.groups
    tokens = caching.tokens_of(config)
    left_out = set()  # what only mode predict loads
    if selecting.mode != "predict":
        left_out = {name for entry in file.header.predictors for name in (entry.a, entry.b)}
    tensors = [tensor for tensor in file.header.tensors if tensor.name not in left_out]
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
    unit = probe_direct(file.path).offset_alignment
    widened = _WIDENED_BYTES if any(group.stride % unit for group in groups) else 0
    widest = max((group.neurons for group in untrained), default=0)
    rows = max((tensor.shape[0] for tensor in tensors if tensor.shape), default=0)
    computing = pass_bytes(config, groups, selecting, tokens) + logits_bytes(rows)
    loading = max(
        (
            *map(_decoding_bytes, tensors),
            *(predictor.untrained_bytes(group) for group in untrained),
        ),
        default=0,
    )
    return Needs(
        process=(process_bytes() if process is None else process) + caching.reserved,
        resident=sum(map(_loaded_bytes, tensors)) + parts,
        selectors=selectors,
        kv_cache=sum(tokens * 8 * layer.kv_heads * config.head_dim for layer in config.layers),
        buffers=2 * min(CHUNK_BYTES, max(group.bundles.length for group in groups))
        + max(caching.threads, DEFAULT_THREADS) * (widened + _STACK_BYTES)
        + blas_bytes(max(tokens, widest))
        + _TABLE_BYTES * sum(group.neurons for group in groups)
        + max(computing, loading),
    )


def _loaded_bytes(tensor: Tensor) -> int:
    """What a resident tensor takes once it is loaded: vectors are widened to float32, and what is
    decoded piece by piece grows in steps of an eighth."""
    if tensor.data.decoded_length is not None:
        return tensor.data.decoded_length * 9 // 8
    return max(tensor.data.length, 4 * tensor.shape[0] if len(tensor.shape) == 1 else 0)


def _decoding_bytes(tensor: Tensor) -> int:
    """What it takes besides until it is decoded."""
    return 0 if tensor.data.decoded_length is None else tensor.data.length


def make_caches(budget: Budget, groups: Sequence[Group], caching: Caching) -> Caches:
    """The caches that a budget affords. They are pieces of one memory, which a reader can
    register. From now on the process returns what it frees, as the budget supposes."""
    return_freed()
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

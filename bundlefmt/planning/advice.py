"""What would make a token cheaper.

Strategy: each advice is planned as if it had been followed, by the figures of the plan itself, and
given only where that reads less.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from bundlefmt.errors import UsageError
from bundlefmt.file import BundleFile
from bundlefmt.flash import reuse
from bundlefmt.flash.budget import Budget, Needs, least_limit
from bundlefmt.flash.reuse import Reuse
from bundlefmt.layout.arithmetic import round_up
from bundlefmt.layout.encodings import ENCODINGS
from bundlefmt.layout.header import Group
from bundlefmt.layout.planner import choose_stride, place_parts
from bundlefmt.planning.activity import assumed
from bundlefmt.planning.token import Costs
from bundlefmt.runtime import memory as memory_of
from bundlefmt.runtime import selection
from bundlefmt.runtime.config import DecoderConfig
from bundlefmt.runtime.memory import MIB, Caching
from bundlefmt.runtime.selection import Selecting

_WINDOWS = (2, 5, 10, 20, 50, 100, 200)  # tokens
_FEWER_BITS = "q8_0"
_LEAST_SAVED = 0.01  # of what a token reads
_LEAST_BYTES = 4096  # that a token reads less: a page


@dataclass(frozen=True)
class Advice:
    """A change, and what it would do, where that can be told: the memory that it takes in bytes,
    the window in tokens that this affords (None: all neurons are held), bytes read per token."""

    change: str
    memory: int | None = None
    window: int | None = None
    bytes_per_token: float | None = None


@dataclass(frozen=True)
class Divided:
    """A model's memory, divided as a run in a `process` of so many bytes divides it."""

    file: BundleFile
    config: DecoderConfig
    selecting: Selecting
    caching: Caching
    process: int

    @cached_property
    def budget(self) -> Budget:
        """Raises UsageError when it is too little."""
        return memory_of.plan(self.file, self.config, self.selecting, self.caching, self.process)

    @cached_property
    def needs(self) -> Needs:
        """With nothing streamed."""
        return memory_of.needs(self.file, self.config, self.selecting, self.caching, self.process)

    @property
    def least_memory(self) -> int:
        """The smallest limit that works, in bytes, as refusals name it."""
        return memory_of.named(memory_of.least_memory(self.file, self.config, self.needs))

    def within(self, limit: int) -> Divided:
        """The same with another limit in bytes."""
        return replace(self, caching=replace(self.caching, memory=limit))

    def limit_for(self, cache: int) -> int:
        """A limit that affords a neuron cache of so many bytes with nothing streamed."""
        return round_up(least_limit(self.needs.total, cache), MIB)

    @property
    def holds_all(self) -> bool:
        """Whether every neuron has a slot."""
        slots = self.budget.slots
        return all(n >= g.neurons for n, g in zip(slots, self.file.groups, strict=True))


def memory(divided: Divided, used: Sequence[Reuse], costs: Costs) -> Iterator[Advice]:
    """How much would afford the next longer window, or all neurons."""
    groups, budget = divided.file.groups, divided.budget
    if divided.holds_all or divided.caching.policy == "none":
        return
    whole = sum(group.bundles.length for group in groups)
    neurons = sum(group.neurons for group in groups)
    now = reuse.window(used, sum(budget.slots))
    read = costs.token(budget.slots, budget.streamed).bytes_read
    shares = [sum(float(found.held[window]) for found in used) / neurons for window in _WINDOWS]
    # Each group has whole slots only, so that some bytes more are needed for the same share.
    rounding = sum(group.stride for group in groups)
    for share in [*shares, 1.0]:
        cache = min(int(share * whole) + rounding, whole)
        followed = divided.within(divided.limit_for(cache))
        if followed.caching.memory <= budget.limit:
            continue
        slots, streamed = followed.budget.slots, followed.budget.streamed
        then = costs.token(slots, streamed).bytes_read
        window = reuse.window(used, sum(slots))
        if _saves(then, read) and (followed.holds_all or window > now):
            all_held = None if followed.holds_all else window
            yield Advice("more memory", followed.caching.memory, all_held, then)
            return


def encoding(divided: Divided, costs: Costs) -> Iterator[Advice]:
    """What fewer bits for each number would do."""
    groups, budget = divided.file.groups, divided.budget
    block = ENCODINGS[_FEWER_BITS].block
    if divided.holds_all or any(group.d_model % block for group in groups):
        return
    now = sum(group.bundles.length for group in groups)
    scale = sum(group.neurons * _stride(group, _FEWER_BITS) for group in groups) / now
    if scale < 1:
        slots = [
            min(int(count / scale), group.neurons)
            for count, group in zip(budget.slots, groups, strict=True)
        ]
        then = costs.token(slots, budget.streamed, scale).bytes_read
        if _saves(then, costs.token(budget.slots, budget.streamed).bytes_read):
            yield Advice(f"pack --dtype {_FEWER_BITS}", bytes_per_token=then)


def _stride(group: Group, encoding: str) -> int:
    """Of the group, were it packed in that encoding."""
    _, used = place_parts([encoding] * len(group.bundled), group.d_model)
    return choose_stride(used)[0]


def choosing(divided: Divided, costs: Costs) -> Iterator[Advice]:
    """Which modes read less within the same memory."""
    file, mode, budget = divided.file, divided.selecting.mode, divided.budget
    read = costs.token(budget.slots, budget.streamed).bytes_read
    training = "" if file.header.predictors else "train-predictors, then "
    changes = {
        "exact": "--mode exact reads only active neurons",
        "predict": f"{training}--mode predict holds no selectors, as an approximation",
    }
    for other in {"dense": ("exact", "predict"), "exact": ("predict",)}.get(mode, ()):
        followed = replace(divided, selecting=Selecting(other))
        try:
            for group in file.groups:
                selection.check(other, group)
            slots, streamed = followed.budget.slots, followed.budget.streamed
        except UsageError:  # not of this model, or not within this memory
            continue
        used = assumed(file, followed.selecting).groups
        then = Costs(file, divided.config, followed.selecting, used).token(slots, streamed)
        if _saves(then.bytes_read, read):
            yield Advice(changes[other], bytes_per_token=then.bytes_read)


def _saves(then: float, now: float) -> bool:
    return now - then > max(_LEAST_SAVED * now, _LEAST_BYTES)

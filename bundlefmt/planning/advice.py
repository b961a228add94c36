"""What would make a token cheaper."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bundlefmt.file import BundleFile
from bundlefmt.flash import reuse
from bundlefmt.flash.budget import Budget
from bundlefmt.flash.reuse import Reuse
from bundlefmt.kernels import SPARSE_ACTIVATIONS
from bundlefmt.layout.encodings import ENCODINGS
from bundlefmt.layout.header import Group
from bundlefmt.layout.planner import choose_stride, place_parts
from bundlefmt.planning.token import STREAMING, Costs
from bundlefmt.runtime.selection import Selecting

_WINDOWS = (2, 5, 10, 20, 50, 100, 200)  # tokens
_FEWER_BITS = "q8_0"
_SLACK = 1.02  # of a larger limit more is kept free


@dataclass(frozen=True)
class Advice:
    """A change, and what it would do, where that can be told: the memory that it takes in bytes,
    the window in tokens that this affords (None: all neurons are held), bytes read per token."""

    change: str
    memory: int | None = None
    window: int | None = None
    bytes_per_token: float | None = None


def memory(
    groups: Sequence[Group], budget: Budget, used: Sequence[Reuse], costs: Costs
) -> Iterator[Advice]:
    """How much would afford the next longer window."""
    if _holds_all(groups, budget):
        return
    whole = sum(group.bundles.length for group in groups)
    neurons = sum(group.neurons for group in groups)
    now = reuse.window(used, sum(budget.slots))
    for window in _WINDOWS:
        share = sum(float(found.held[window]) for found in used) / neurons
        if window > now and budget.cache < share * whole < whole:
            break
    else:
        window, share = None, 1.0
    slots = [math.ceil(group.neurons * share) for group in groups]
    needed = max(count / group.neurons for count, group in zip(slots, groups, strict=True)) * whole
    more = needed - budget.cache + costs.token(slots, budget.streamed).stages[STREAMING]
    yield Advice(
        "more memory",
        budget.limit + math.ceil(more * _SLACK),
        window,
        costs.token(slots).bytes_read,
    )


def encoding(groups: Sequence[Group], budget: Budget, costs: Costs) -> Iterator[Advice]:
    """What fewer bits for each number would do."""
    block = ENCODINGS[_FEWER_BITS].block
    if _holds_all(groups, budget) or any(group.d_model % block for group in groups):
        return
    now = sum(group.bundles.length for group in groups)
    then = sum(group.neurons * _stride(group, _FEWER_BITS) for group in groups)
    if then < now:
        scale = then / now
        slots = [int(count / scale) for count in budget.slots]
        read = costs.token(slots, budget.streamed, scale).bytes_read
        yield Advice(f"pack --dtype {_FEWER_BITS}", bytes_per_token=read)


def _stride(group: Group, encoding: str) -> int:
    """Of the group, were it packed in that encoding."""
    _, used = place_parts([encoding] * len(group.bundled), group.d_model)
    return choose_stride(used)[0]


def choosing(file: BundleFile, selecting: Selecting) -> Iterator[Advice]:
    """Which modes need less."""
    if any(group.activation not in SPARSE_ACTIVATIONS for group in file.groups):
        return
    if selecting.mode == "dense":
        yield Advice("--mode exact reads only active neurons")
    if selecting.mode in ("dense", "exact"):
        training = "" if file.header.predictors else "train-predictors, then "
        yield Advice(f"{training}--mode predict holds no selectors, as an approximation")


def _holds_all(groups: Sequence[Group], budget: Budget) -> bool:
    return all(count >= group.neurons for count, group in zip(budget.slots, groups, strict=True))

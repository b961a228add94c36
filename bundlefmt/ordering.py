"""A file whose neurons that fire together lie together: made from a trace, judged on its rest."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bundlefmt.convert.progress import Progress, silent
from bundlefmt.convert.reorder import rewrite
from bundlefmt.errors import UsageError, naming
from bundlefmt.file import BundleFile
from bundlefmt.flash.order import Requests, make_order, requests
from bundlefmt.flash.traces import Trace, parted
from bundlefmt.layout.header import Group
from bundlefmt.layout.order import slots_of
from bundlefmt.storage.atomic import refuse_existing

# An NVMe's random 4 KiB read takes as long as some 32 KiB more of a long one do: compare the rates
# of `bundlefmt bench --chunk-size 4K,1M`.
GAP = 32 << 10
_FEWEST_TOKENS = 100


@dataclass(frozen=True)
class Reads:
    """What a token that reads each of its active neurons costs, mean over the tokens: requests;
    bundles that were wanted, per request; and unwanted bytes that are read along."""

    requests: float
    run_length: float
    unwanted_bytes: float


@dataclass(frozen=True)
class Reordered:
    """One layer, or all together (`layer` None), before and after; `..._gap` with gaps read over.
    `active` is the number of active neurons of a token."""

    layer: int | None
    neurons: int
    active: float
    before: Reads
    after: Reads
    before_gap: Reads
    after_gap: Reads


@dataclass(frozen=True)
class ReorderReport:
    """The file that was written, and what its order saves on the part of the trace that it was not
    made from: `tokens` of them. `gap` in bytes."""

    path: str
    file_bytes: int
    tokens: int
    gap: int
    seconds: float
    total: Reordered
    layers: list[Reordered]


def reorder(
    path: str | os.PathLike[str],
    traces: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    gap: int = GAP,
    force: bool = False,
    progress: Progress = silent,
) -> ReorderReport:
    """Write a bundle file (default: the model's name with `.ordered.bundle`) that differs from
    `path` in the order of the neurons alone, which is made from the first nine tenths of a trace of
    this model, and counted on the rest. `gap` is what the report reads over, in bytes.

    A run computes neurons in the file's order: its sums differ by float32 rounding. Raises
    UsageError for a trace of another model or too short, and what `rewrite` raises.
    """
    start = time.perf_counter()
    if gap < 0:
        raise UsageError("out of range", field="gap", expected="0 or more", found=gap)
    recorded = Trace(traces)
    if recorded.info.tokens < _FEWEST_TOKENS:
        raise UsageError(
            "too few tokens to make an order from",
            file=traces,
            expected=f"{_FEWEST_TOKENS} or more",
            found=recorded.info.tokens,
        )
    tokens = parted(recorded.info.tokens)[1].size
    with BundleFile(path) as file, naming(path):
        target = Path(out) if out is not None else Path(path).with_suffix(".ordered.bundle")
        refuse_existing(target, force=force)
        job = _Reorder(file, recorded, gap)
        file_bytes = rewrite(file, target, job.order, force=force, progress=progress)
    return ReorderReport(
        path=os.fspath(target),
        file_bytes=file_bytes,
        tokens=tokens,
        gap=gap,
        seconds=time.perf_counter() - start,
        total=_row(None, job.counted, tokens),
        layers=[_row(found.group.layer, [found], tokens) for found in job.counted],
    )


@dataclass(frozen=True)
class _Counted:
    """What the held-out tokens read of a group: before, after, and both with gaps read over."""

    group: Group
    requests: list[Requests]


class _Reorder:
    """The orders of a file's groups, made one at a time, and what each of them saves."""

    def __init__(self, file: BundleFile, recorded: Trace, gap: int) -> None:
        self.counted: list[_Counted] = []
        self._file = file
        self._recorded = recorded
        self._gap = gap
        self._traced = {group.label: i for i, group in enumerate(recorded.groups_of(file))}
        self._seen, self._held_out = parted(recorded.info.tokens)

    def order(self, group: Group) -> NDArray[np.uint32]:
        """The group's new order; the one that it has where it was not traced."""
        stored = self._file.order(group)
        before = np.arange(group.neurons, dtype=np.uint32) if stored is None else stored
        if group.label not in self._traced:
            return before
        trace = self._recorded.layer(self._traced[group.label])
        after = make_order(trace, self._seen)
        counts = [
            requests(trace, self._held_out, slots_of(order), gap)
            for gap in (0, self._gap // group.stride)
            for order in (before, after)
        ]
        self.counted.append(_Counted(group, counts))
        return after


def _row(layer: int | None, counted: Sequence[_Counted], tokens: int) -> Reordered:
    """What groups cost together, mean over the tokens."""
    before, after, before_gap, after_gap = (
        _reads([(found.requests[i], found.group.stride) for found in counted], tokens)
        for i in range(4)
    )
    return Reordered(
        layer=layer,
        neurons=sum(found.group.neurons for found in counted),
        active=sum(found.requests[0].neurons for found in counted) / tokens,
        before=before,
        after=after,
        before_gap=before_gap,
        after_gap=after_gap,
    )


def _reads(counts: Sequence[tuple[Requests, int]], tokens: int) -> Reads:
    """Of several groups' counts, each with its stride."""
    number = sum(count.requests for count, _ in counts)
    return Reads(
        requests=number / tokens,
        run_length=sum(count.neurons for count, _ in counts) / max(number, 1),
        unwanted_bytes=sum(count.unwanted * stride for count, stride in counts) / tokens,
    )

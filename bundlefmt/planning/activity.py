"""Which neurons tokens need: as a trace tells, or as is assumed where there is none."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bundlefmt import kernels
from bundlefmt.errors import UsageError
from bundlefmt.file import BundleFile
from bundlefmt.flash import predictor, reuse
from bundlefmt.flash.policies import Lfu, unused
from bundlefmt.flash.reuse import Reuse
from bundlefmt.flash.traces import LayerTrace, Trace
from bundlefmt.layout.header import Group
from bundlefmt.runtime.selection import Selecting

TRACED_MODES = ("exact", "predict")

_MOST_TOKENS = 2048  # of a trace: more change the means by little

Progress = Callable[[int, int], None]
Tokens = Iterator[NDArray[np.integer[Any]]]


class Activity(NamedTuple):
    """Each group's; `origin` is `every` (neuron), `traced` or `assumed`, `remark` says what."""

    groups: list[Reuse]
    origin: str
    remark: str


def activity(
    file: BundleFile,
    selecting: Selecting,
    traces: str | os.PathLike[str] | None,
    progress: Progress,
) -> Activity:
    """What a mode will need of a file's groups. Raises UsageError for a trace that is of another
    model, or says nothing of the mode."""
    if traces is not None:
        return _traced(file, selecting, Trace(traces), progress)
    return assumed(file, selecting)


def assumed(file: BundleFile, selecting: Selecting) -> Activity:
    """What a mode needs of a file's groups by the paper's shares; in mode dense, every neuron."""
    groups = file.groups
    if selecting.mode == "dense":
        return Activity([reuse.every(group.neurons) for group in groups], "every", "all neurons")
    share = {"exact": reuse.ACTIVE_SHARE, "predict": reuse.PREDICTED_SHARE}.get(
        selecting.mode, selecting.share
    )
    return Activity(
        [reuse.assumed(group.neurons, share) for group in groups],
        "assumed",
        f"{100 * share:.1f} % of the neurons for a token, reuse as OPT-6.7B's in the paper",
    )


def _traced(file: BundleFile, selecting: Selecting, trace: Trace, progress: Progress) -> Activity:
    if selecting.mode not in TRACED_MODES:
        raise UsageError(
            "a trace says nothing of this mode",
            field="mode",
            expected=", ".join(TRACED_MODES),
            found=selecting.mode,
        )
    traced, count = trace.groups_of(file), min(trace.info.tokens, _MOST_TOKENS)
    if traced != list(file.groups):
        raise UsageError("a trace of some layers only", file=trace.path)
    found = []
    for index, group in enumerate(traced):
        progress(index, len(traced))
        layer = trace.layer(index)
        tokens = _active(layer) if selecting.mode == "exact" else _predicted(file, group, layer)
        policy = Lfu(unused(group.neurons))  # what a cache is given where nobody says
        found.append(reuse.observed(group.neurons, islice(tokens, count), count // 2, policy))
    return Activity(found, "traced", f"{count:,} tokens of {trace.path}, the latter half counted")


def _active(layer: LayerTrace) -> Tokens:
    for start, end in zip(layer.starts, layer.ends, strict=True):
        yield layer.ids[start:end]


def _predicted(file: BundleFile, group: Group, layer: LayerTrace) -> Tokens:
    found = predictor.load(file, group)
    if found is None:
        raise UsageError(
            "a trace says nothing of predictors that were not trained: plan without it",
            field=group.label,
        )
    inputs = (
        kernels.widened(layer.inputs[start : start + predictor.TOKENS])
        for start in range(0, layer.inputs.shape[0], predictor.TOKENS)
    )
    return map(np.flatnonzero, chain.from_iterable(found.predicted(x) for x in inputs))

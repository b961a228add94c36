"""What the planner and the cost model foresee of a run's reads, from the trace that it replays."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, repeat

from bench.paper.figures import PAPER
from bench.paper.records import Caching
from bench.paper.traces import HISTORY, Trace, fit
from bundlefmt.file import BundleFile
from bundlefmt.flash import profiles, reuse
from bundlefmt.flash.policies import Lfu, unused
from bundlefmt.planning.token import READING, STREAMING, Costs
from bundlefmt.runtime.config import decoder_config
from bundlefmt.runtime.selection import Selecting

_TOKENS = 64  # after the history, that are counted


@dataclass(frozen=True)
class Reads:
    """Per token: bytes, and seconds of I/O (None: nobody has calibrated the device)."""

    nbytes: float
    seconds: float | None


class Planner:
    """Plans for one model's file, with neurons used as the synthetic trace uses them (that of
    layer 0 stands for all: they are drawn alike)."""

    def __init__(self, bundle: str, model: str) -> None:
        paper = PAPER[model]
        with BundleFile(bundle) as file:
            config = decoder_config(file.config, len(file.groups))
            neurons = file.groups[0].neurons
            generator = fit(paper.predicted, paper.held, paper.fresh, paper.window)
            trace = Trace(generator, 1, neurons, _TOKENS)
            tokens = chain(trace.history(0), (trace.ids(0, token) for token in range(_TOKENS)))
            used = reuse.observed(neurons, tokens, HISTORY, Lfu(unused(neurons)))
            every = list(repeat(used, len(file.groups)))
            self._costs = Costs(file, config, Selecting("predict"), every)
        self._profile = profiles.load(bundle)

    def reads(self, caching: Caching) -> Reads:
        """With a cache of that size, and attention streamed of those layers."""
        token = self._costs.token(caching.slots, caching.streamed)
        if self._profile is None:
            return Reads(token.bytes_read, None)
        by_stage = token.seconds(self._profile)
        return Reads(token.bytes_read, by_stage[READING] + by_stage[STREAMING])

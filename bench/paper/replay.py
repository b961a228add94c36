"""A model that runs by a trace: each FFN computes the neurons that the trace names, after a
product with a random predictor of the paper's rank, whose cost and memory are thus real."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bench.paper.figures import PaperModel
from bench.paper.traces import Trace
from bundlefmt.flash.predictor import Predictor
from bundlefmt.kernels import Floats
from bundlefmt.layout.header import Group
from bundlefmt.runtime.generate import Model
from bundlefmt.runtime.selection import Ids, Selected, Selection

_TURNS = 4  # in which a cache is filled
_BLOCK = 1 << 20  # random numbers, repeated: a product's cost is the same for all numbers


def random_predictors(groups: list[Group], paper: PaperModel) -> list[Predictor]:
    """One per layer, float16, of the paper's ranks."""
    numbers = np.random.default_rng(1).standard_normal(_BLOCK, dtype=np.float32) / 64
    block = numbers.astype(np.float16)
    ranks = [paper.rank_of(group.layer, len(groups)) for group in groups]
    return [
        Predictor(_repeated(block, rank, group.d_model), _repeated(block, group.neurons, rank), 0.5)
        for group, rank in zip(groups, ranks, strict=True)
    ]


def _repeated(block: NDArray[np.float16], rows: int, columns: int) -> NDArray[np.float16]:
    return np.resize(block, (rows, columns))


class Replayed:
    """One layer's selection: tokens made one at a time need what the trace names, the many of a
    prompt need all. Guesses are the trace's early ones, of that recall and share of wrong ones;
    they cost a product, too."""

    def __init__(
        self, layer: int, predictor: Predictor, trace: Trace, early: tuple[float, float]
    ) -> None:
        self._layer = layer
        self._predictor = predictor
        self._trace = trace
        self._early = [trace.early(layer, token, *early) for token in range(trace.tokens)]
        self._all: Ids = np.arange(trace.neurons)
        self._token = 0

    def __call__(self, x: Floats) -> Selected:
        if x.shape[0] > 1:
            return Selected(self._all, None)
        self._predictor.predicted(x)
        ids = self._trace.ids(self._layer, self._token)
        self._token += 1
        return Selected(ids, None)

    def guess(self, x: Floats) -> Ids | None:
        self._predictor.predicted(x)
        return self._early[self._token]


class _Fixed:
    """Always the same neurons."""

    def __init__(self, ids: Ids) -> None:
        self._selected = Selected(np.sort(ids), None)

    def __call__(self, x: Floats) -> Selected:
        return self._selected

    def guess(self, x: Floats) -> Ids | None:
        return None


def fill_caches(model: Model, trace: Trace) -> None:
    """Bring the neuron caches into the state in which the trace's history leaves them: what it used
    last, the oldest first."""
    slots = {
        group.layer: 0 if cache is None else cache.rows.shape[0]
        for group, cache in zip(model.file.groups, model.caches, strict=True)
    }
    if not any(slots.values()):
        return
    for turn in range(_TURNS):

        def piece(group: Group, selection: Selection, turn: int = turn) -> Selection:
            recent = trace.recent(group.layer, slots[group.layer])
            return _Fixed(np.array_split(recent[::-1], _TURNS)[turn])

        model.decoder.select_by(piece)
        model.decoder.forward([0], model.decoder.new_cache(1))

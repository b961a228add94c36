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
    """Tokens made one at a time need what the trace names, the many of a prompt need all."""

    def __init__(self, group: Group, predictor: Predictor, trace: Trace) -> None:
        self._layer = group.layer
        self._all: Ids = np.arange(group.neurons)
        self._predictor = predictor
        self._trace = trace
        self._token = 0

    def __call__(self, x: Floats) -> Selected:
        if x.shape[0] > 1:
            return Selected(self._all, None)
        self._predictor.predicted(x)
        ids = self._trace.ids(self._layer, self._token)
        self._token += 1
        return Selected(ids, None)


class Recent:
    """What a cache with `slots` slots holds before the trace's first token."""

    def __init__(self, group: Group, trace: Trace, slots: int) -> None:
        self._ids = trace.recent(group.layer, slots)

    def __call__(self, x: Floats) -> Selected:
        return Selected(self._ids, None)


def fill_caches(model: Model, trace: Trace) -> None:
    """Bring the neuron caches into the state in which so many tokens before leave them."""
    slots = {
        group.layer: 0 if cache is None else cache.rows.shape[0]
        for group, cache in zip(model.file.groups, model.caches, strict=True)
    }

    def recent(group: Group, selection: Selection) -> Selection:
        return Recent(group, trace, slots[group.layer])

    model.decoder.select_by(recent)
    model.decoder.forward([0], model.decoder.new_cache(1))


def replay(model: Model, predictors: list[Predictor], trace: Trace) -> None:
    """From now on the model's FFNs compute what the trace names."""
    by_layer = {
        group.layer: predictor
        for group, predictor in zip(model.file.groups, predictors, strict=True)
    }

    def replayed(group: Group, selection: Selection) -> Selection:
        return Replayed(group, by_layer[group.layer], trace)

    model.decoder.select_by(replayed)

"""A model that runs by a trace: each FFN computes the neurons that the trace names, after a
product with a random predictor of the paper's rank, whose cost and memory are thus real."""

from __future__ import annotations

import numpy as np

from bench.paper.figures import PaperModel
from bench.paper.traces import HISTORY, Trace
from bundlefmt import kernels
from bundlefmt.flash.predictor import Predictor, encoding_of
from bundlefmt.kernels import Floats
from bundlefmt.layout.encodings import ENCODINGS
from bundlefmt.layout.header import Group
from bundlefmt.runtime.generate import Model
from bundlefmt.runtime.selection import Ids, Selected

_READ = 24  # tokens that bring the page cache into its steady state
_BLOCK = 1 << 20  # random numbers, repeated: a product's cost is the same for all numbers


def random_predictors(groups: list[Group], paper: PaperModel) -> list[Predictor]:
    """One per layer, of the paper's ranks, stored as a trained one is."""
    block = np.random.default_rng(1).standard_normal(_BLOCK, dtype=np.float32) / 64
    encoded = {name: ENCODINGS[name].encode(block) for name in ("f16", "q8_0")}

    def predictor(rank: int, group: Group) -> Predictor:
        encoding = encoding_of(rank, group.d_model)
        a, b = (
            np.resize(encoded[encoding], (rows, ENCODINGS[encoding].nbytes(columns)))
            for rows, columns in ((rank, group.d_model), (group.neurons, rank))
        )
        return Predictor(kernels.Part(a, encoding), kernels.Part(b, encoding), 0.5)

    return [predictor(paper.rank_of(group.layer, len(groups)), group) for group in groups]


class Replayed:
    """One layer's selection: tokens made one at a time need what the trace names, the many of a
    prompt need all. Guesses are the trace's early ones, of that recall and share of wrong ones;
    they cost a product, too."""

    def __init__(
        self, layer: int, predictor: Predictor, trace: Trace, early: tuple[float, float]
    ) -> None:
        self.guess_bytes = predictor.nbytes
        self._layer = layer
        self._predictor = predictor
        self._trace = trace
        guesses = (trace.early(layer, token, *early) for token in range(trace.tokens))
        self._early = [guess.astype(np.uint16) for guess in guesses]  # counts within the limit
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
        return self._early[self._token].astype(np.int64)


def fill_caches(model: Model, trace: Trace) -> None:
    """Bring the neuron caches, or the page cache where there are none, into the state in which the
    trace's history leaves them. The neurons' biases are left at zero: they cost as much."""
    layers = list(zip(model.file.groups, model.caches, strict=True))
    histories = [trace.history(group.layer) for group, _ in layers]
    for token, used in enumerate(zip(*histories, strict=True)):
        for (group, cache), ids in zip(layers, used, strict=True):
            if cache is not None:
                admission = cache.admit(ids)
                cache.commit(ids[admission.missing], admission.missing_slots)
            elif token >= HISTORY - _READ:
                model.reader.read(group.layer, ids)
    for group, cache in layers:
        if cache is not None:
            held = cache.neurons
            slots = cache.slots_of(held)
            model.reader.submit(group.layer, held, out=cache.rows, rows=slots).result()

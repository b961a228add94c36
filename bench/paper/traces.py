"""SYNTHETIC activation traces: which neurons a predictor names, token by token.

Each neuron is a two-state chain of its own. It is on for a share p of the tokens, its popularity
(logit-normal over the neurons: few that are nearly always on, many that hardly ever are), and goes
off after a token with a probability `leave`, the same for all; so it comes on with
p * leave / (1 - p). Two numbers, the popularity's spread and `leave`, are fitted to what the paper
says of a window of tokens: the share of the FFN that it holds, and the share that the token after
it needs anew. Layers are independent of each other, as no real model's are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Shares = NDArray[np.float64]

HISTORY = 256  # tokens before the first: what a cache in its steady state has seen
_QUANTILES = 500  # of the popularity, where it is integrated over
_STEPS = 30  # of a bisection
_WIDEST = 6.0  # spread of the popularity


class Reuse(NamedTuple):
    """The generator's numbers: the mean popularity, its spread, the probability to go off."""

    density: float
    spread: float
    leave: float

    def union(self, tokens: int) -> float:
        """The expected share of neurons that are on for any of so many tokens in a row."""
        on = popularity(self.density, self.spread, _QUANTILES)
        return float(np.mean(1 - (1 - on) * (1 - self._comes(on)) ** (tokens - 1)))

    def fresh(self, window: int) -> float:
        """The expected share that a token needs and none of the `window` before it did."""
        return self.union(window + 1) - self.union(window)

    def _comes(self, on: Shares) -> Shares:
        return np.minimum(on * self.leave / (1 - on), 1.0)


def popularity(density: float, spread: float, count: int) -> Shares:
    """Quantiles of a logit-normal distribution with that mean, ascending."""
    normal = NormalDist()
    deviations = np.array([normal.inv_cdf((i + 0.5) / count) for i in range(count)])

    def shares(middle: float) -> Shares:
        return 1 / (1 + np.exp(-(middle + spread * deviations)))

    return shares(_bisect(lambda middle: float(shares(middle).mean()) - density, -40.0, 40.0))


def fit(density: float, held: float, fresh: float, window: int) -> Reuse:
    """The generator of which a window of `window` tokens holds a share `held` of the neurons, and
    the token after it needs a share `fresh` anew (nearly, where no generator does just that)."""

    def leaving(spread: float) -> Reuse:
        leave = _bisect(lambda leave: Reuse(density, spread, leave).union(window) - held, 0.01, 1.0)
        return Reuse(density, spread, leave)

    return leaving(_bisect(lambda spread: fresh - leaving(spread).fresh(window), 0.1, _WIDEST))


def _bisect(rising: Callable[[float], float], low: float, high: float) -> float:
    """Where a rising function is 0, or the end that is nearest to it."""
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class Statistics:
    """Of a trace, as shares of a layer's neurons; by window from 1 token on: what it holds, and
    what the token after it needs anew. `persisting`: of a token's neurons, the share that the next
    one needs too; `jaccard`: common / either, of neighbouring tokens."""

    predicted: float
    held: list[float]
    fresh: list[float]
    persisting: float
    jaccard: float


class Trace:
    """The neurons that each layer needs for each token: SYNTHETIC."""

    def __init__(self, reuse: Reuse, layers: int, neurons: int, tokens: int, seed: int = 0) -> None:
        self.layers, self.neurons, self.tokens = layers, neurons, tokens
        self._seed = seed
        self._bits = np.empty((layers, tokens, -(-neurons // 8)), dtype=np.uint8)
        self._popular = np.empty((layers, neurons), dtype=np.float32)
        self._leave = np.float32(reuse.leave)
        popular = popularity(reuse.density, reuse.spread, neurons).astype(np.float32)
        for layer in range(layers):
            self._popular[layer] = np.random.default_rng([seed, layer]).permutation(popular)
            told = islice(self._chain(layer), HISTORY, HISTORY + tokens)
            for token, on in enumerate(told):
                self._bits[layer, token] = np.packbits(on)

    def _chain(self, layer: int) -> Iterator[NDArray[np.bool_]]:
        """Which neurons are on: the HISTORY tokens before the first, then the others."""
        random = np.random.default_rng([self._seed, layer, 0])
        popular, leave = self._popular[layer], self._leave
        come = np.minimum(popular * leave / (1 - popular), 1)
        on = random.random(self.neurons, dtype=np.float32) < popular
        while True:
            drawn = random.random(self.neurons, dtype=np.float32)
            on = np.where(on, drawn >= leave, drawn < come)
            yield on

    def _on(self, layer: int, token: int) -> NDArray[np.bool_]:
        return np.unpackbits(self._bits[layer, token], count=self.neurons).astype(bool)

    def ids(self, layer: int, token: int) -> Ids:
        """The neurons, ascending."""
        return np.flatnonzero(self._on(layer, token))

    def history(self, layer: int) -> Iterator[Ids]:
        """The neurons of the HISTORY tokens before the first, ascending, token by token. They are
        drawn anew each time, and take no memory."""
        return map(np.flatnonzero, islice(self._chain(layer), HISTORY))

    def early(self, layer: int, token: int, recall: float, wrong: float) -> Ids:
        """An early guess at the neurons: a share `recall` of them, drawn evenly, and so many
        others that they make a share `wrong` of the guess, drawn by popularity (who is often on is
        often nearly on: an assumption). Ascending."""
        random = np.random.default_rng([self._seed, layer, 1, token])
        on = self._on(layer, token)
        right, others = np.flatnonzero(on), np.flatnonzero(~on)
        found = random.choice(right, round(recall * right.size), replace=False)
        count = min(round(found.size * wrong / (1 - wrong)), others.size)
        # Weighted, without replacement: the largest u ** (1 / weight).
        keys = np.log(random.random(others.size)) / self._popular[layer, others]
        mistaken = others[np.argsort(-keys)[:count]]
        return np.sort(np.append(found, mistaken))

    def statistics(self, windows: int = 8) -> Statistics:
        """What this trace is like, over all layers and tokens."""
        on = np.unpackbits(self._bits, axis=2, count=self.neurons).astype(bool)
        held, fresh = [], []
        for window in range(1, windows + 1):
            starts = range(self.tokens - window)
            unions = [on[:, start : start + window].any(axis=1) for start in starts]
            held.append(float(np.mean(unions)))
            fresh.append(
                float(
                    np.mean([on[:, s + window] & ~u for s, u in zip(starts, unions, strict=True)])
                )
            )
        both = (on[:, 1:] & on[:, :-1]).sum()
        either = (on[:, 1:] | on[:, :-1]).sum()
        return Statistics(
            float(on.mean()), held, fresh, float(both / on[:, :-1].sum()), float(both / either)
        )

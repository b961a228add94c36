"""How soon tokens use the same neurons again, and so what a cache of some size has to read.

Strategy: a cache holds the last token's neurons and, beside them, those worth most by its policy,
as many as there is room for. Worth does not depend on the cache's size, so what one cache holds
every larger one does, too (nearly: a neuron that made place for the last token's may be worth more
than they are). A neuron's stack distance (Mattson et al., 1970) is its place in that order: it is
there in every cache of at least that many slots. One pass over a trace therefore tells the misses
of every size at once, and the sizes of the windows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundlefmt.flash.policies import Policy

Means = NDArray[np.float64]

# OPT-6.7B in the paper (section 3.1): a predictor names 9.5 % of the neurons for a token, and 24 %
# for five in a row, 2.4 % new ones with each: a power law through the first two gives the third.
PREDICTED_SHARE = 0.095
ACTIVE_SHARE = 0.03
_GROWTH = 0.576

_MOST_WINDOW = 256  # tokens
_SEED = 1
_PIECES = 256  # that a group's curve is cut into


@dataclass(frozen=True)
class Reuse:
    """One group's neurons, means per token: how many are active; `held`, how many different ones
    k tokens in a row use, by k from 0 on; `misses`, how many are to be read, by the slots of the
    cache from 0 to all."""

    active: float
    held: Means
    misses: Means


def observed(
    neurons: int, tokens: Iterable[NDArray[np.integer[Any]]], warm_up: int, policy: Policy
) -> Reuse:
    """From each token's active neurons, in turn, with a policy that is new; the first
    `warm_up` tokens only fill the cache. Neurons that no token used before are read whatever the
    size of the cache."""
    last = np.full(neurons, -1, dtype=np.int64)
    distances = np.zeros(neurons + 2, dtype=np.int64)  # how often; the last is of first uses
    held = np.zeros(_MOST_WINDOW + 1)
    random = np.random.default_rng(_SEED)
    latest = np.empty(0, dtype=np.int64)
    active = counted = 0
    for token, some in enumerate(tokens):
        ids = some.astype(np.int64)
        if token >= warm_up:
            counted += 1
            active += ids.size
            ages = np.where(last < 0, 0, token - last)
            of_age = np.bincount(ages, minlength=_MOST_WINDOW + 1)
            of_age[0] = 0  # never used
            held += np.cumsum(of_age)[: _MOST_WINDOW + 1]
            worth = -policy.worth
            worth[latest] = -np.inf
            ordered = np.sort(worth)
            first, end = (ordered.searchsorted(worth[ids], side) for side in ("left", "right"))
            # Those worth the same have no order: each takes one of their places.
            place = first + 1 + (random.random(ids.size) * (end - first)).astype(np.int64)
            distance = np.where(last[ids] < 0, neurons + 1, place)
            distances += np.bincount(distance, minlength=neurons + 2)
        last[ids], latest = token, ids
        policy.use(ids, token)
    counted = max(counted, 1)
    return Reuse(active / counted, held / counted, (active - np.cumsum(distances)[:-1]) / counted)


def window(reuse: Iterable[Reuse], slots: int) -> int:
    """How many tokens' active neurons, of all groups, so many slots hold."""
    held = sum((found.held for found in reuse), np.zeros(_MOST_WINDOW + 1))
    return int(np.searchsorted(held, slots, side="right")) - 1


def shared(reuse: Sequence[Reuse], slots: int) -> list[int]:
    """How many of the slots that groups share each of them has, if every slot goes where it spares
    most misses: nearly what a cache comes to that evicts what is worth least."""
    gains, sizes, groups = [], [], []
    for index, found in enumerate(reuse):
        places = np.unique(np.linspace(0, found.misses.size - 1, _PIECES + 1).astype(np.int64))
        size = np.diff(places).astype(np.float64)
        gains.append(_falling(-np.diff(found.misses[places]) / size, size))
        sizes.append(size)
        groups.append(np.full(size.size, index))
    order = np.argsort(-np.concatenate(gains), kind="stable")
    size = np.concatenate(sizes)[order]
    given = np.clip(slots - (np.cumsum(size) - size), 0, size)
    counts = np.bincount(np.concatenate(groups)[order], weights=given, minlength=len(reuse))
    return [int(count) for count in counts]


def _falling(gains: Means, sizes: Means) -> Means:
    """Gains per slot, piece by piece, each no more than the one before it: pieces that gain more
    than those before them are taken together with them (pool adjacent violators)."""
    runs: list[tuple[float, float, int]] = []  # gain of all, slots, pieces
    for gain, size in zip(gains * sizes, sizes, strict=True):
        runs.append((gain, size, 1))
        while len(runs) > 1 and runs[-1][0] * runs[-2][1] > runs[-2][0] * runs[-1][1]:
            last, before = runs.pop(), runs.pop()
            runs.append((last[0] + before[0], last[1] + before[1], last[2] + before[2]))
    return np.repeat([gain / size for gain, size, _ in runs], [count for *_, count in runs])


def assumed(neurons: int, share: float) -> Reuse:
    """For tokens that each use a `share` of the neurons, with the paper's reuse between them."""
    slots = np.arange(neurons + 1)
    held = _grown(neurons, share, np.arange(_MOST_WINDOW + 1))
    window = (slots / (neurons * share)) ** (1 / _GROWTH)
    misses = _grown(neurons, share, window + 1) - slots
    return Reuse(neurons * share, held, np.minimum.accumulate(np.maximum(misses, 0)))


def every(neurons: int) -> Reuse:
    """For tokens that each use all of the neurons, in the order of the file: what has a slot
    stays."""
    held = np.full(_MOST_WINDOW + 1, float(neurons))
    held[0] = 0
    return Reuse(neurons, held, np.arange(neurons, -1.0, -1.0))


def _grown(neurons: int, share: float, tokens: Means | NDArray[np.int64]) -> Means:
    """How many different neurons so many tokens in a row use."""
    return np.minimum(neurons * share * tokens**_GROWTH, neurons)

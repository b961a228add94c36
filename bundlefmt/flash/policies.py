"""Which bundle gives way when a slot is needed; a new policy is one class and one entry here.

A policy gives every neuron of a group a number, its worth, in the cache or not; of the neurons in
the cache that the latest tokens did not use, those worth least are evicted first, whatever group
they belong to.
"""

from __future__ import annotations

import math
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from bundlefmt.errors import UsageError

# Of a use's weight in LFU, in tokens. With it, caches of 10 to 50 % of a small OPT's FFN missed
# least, 5 to 17 % less than LRU; from 16 to 128 it hardly matters.
_HALF_LIFE = 64
_FADING = math.log(2) / _HALF_LIFE

Ids = NDArray[np.int64]
Tokens = NDArray[np.int64]
Worth = NDArray[np.float64]


class Policy(Protocol):
    """Keeps `worth`, float64 [neurons], for one group, in memory that it is given; that of a neuron
    which no token has used is minus infinity."""

    name: ClassVar[str]
    worth: Worth

    def use(self, ids: Ids, token: int | Tokens) -> None:
        """The token, or one for each of the different neurons, uses these."""

    def expired(self, token: int) -> NDArray[np.bool_] | None:
        """Which neurons are to be let go though nobody needs their slots; None for none."""


def unused(neurons: int) -> Worth:
    """The worth of neurons that no token has used."""
    return np.full(neurons, -np.inf)


class Lru:
    """Least recently used: a window of as many tokens as there is room for."""

    name: ClassVar[str] = "lru"

    def __init__(self, worth: Worth) -> None:
        self.worth = worth

    def use(self, ids: Ids, token: int | Tokens) -> None:
        self.worth[ids] = token

    def expired(self, token: int) -> NDArray[np.bool_] | None:
        return None


class Window(Lru):
    """The paper's window: neurons that none of the last `length` tokens used are let go, even
    where there is room; with less room than they need, the oldest go first (section 3.1)."""

    name: ClassVar[str] = "window"

    def __init__(self, worth: Worth, length: int) -> None:
        super().__init__(worth)
        if length < 1:
            raise UsageError("no window", field="window", expected="1 or more", found=length)
        self._length = length

    def expired(self, token: int) -> NDArray[np.bool_] | None:
        gone: NDArray[np.bool_] = self.worth < token - self._length
        return gone


class Lfu:
    """Least frequently used, of late: each use counts for half as much _HALF_LIFE tokens later. A
    neuron that comes back is worth what it was. A worth is the logarithm of such a count, with all
    of them measured at token 0, so that time changes none of them."""

    name: ClassVar[str] = "lfu"

    def __init__(self, worth: Worth) -> None:
        self.worth = worth

    def use(self, ids: Ids, token: int | Tokens) -> None:
        self.worth[ids] = np.logaddexp(self.worth[ids], np.multiply(_FADING, token))

    def expired(self, token: int) -> NDArray[np.bool_] | None:
        return None

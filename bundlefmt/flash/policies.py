"""Which bundle gives way when a slot is needed; a new policy is one class and one entry here.

A policy gives every slot a number, its worth; of the slots that the token at hand does not use,
those worth least are evicted first.
"""

from __future__ import annotations

import math
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from bundlefmt.errors import UsageError

# Of a use's weight in LFU, in tokens. With it, caches of 10 to 50 % of a small OPT's FFN missed
# least, 3 to 13 % less than LRU; from 8 to 128 it hardly matters.
_HALF_LIFE = 32
_FADING = math.log(2) / _HALF_LIFE

Slots = NDArray[np.int64]
Tokens = NDArray[np.int64]
Worth = NDArray[np.float64]


class Policy(Protocol):
    """Keeps `worth`, float64 [slots], for one group's cache."""

    name: ClassVar[str]
    worth: Worth

    def touch(self, slots: Slots, token: int | Tokens) -> None:
        """The token, or one for each of the slots, uses these slots, which were filled before."""

    def fill(self, slots: Slots, token: int | Tokens) -> None:
        """These slots are filled anew, for that token, or each for one of its own."""

    def worth_when_filled(self, tokens: Tokens) -> Worth:
        """What slots would be worth if they were filled for these tokens."""

    def expired(self, token: int) -> NDArray[np.bool_] | None:
        """Which slots are to be freed though nobody needs them; None for none."""


class Lru:
    """Least recently used: a window of as many tokens as there is room for."""

    name: ClassVar[str] = "lru"

    def __init__(self, slots: int) -> None:
        self.worth = np.zeros(slots)

    def touch(self, slots: Slots, token: int | Tokens) -> None:
        self.worth[slots] = token

    fill = touch

    def worth_when_filled(self, tokens: Tokens) -> Worth:
        return tokens.astype(np.float64)

    def expired(self, token: int) -> NDArray[np.bool_] | None:
        return None


class Window(Lru):
    """The paper's window: neurons that none of the last `length` tokens used are let go, even
    where there is room; with less room than they need, the oldest go first (section 3.1)."""

    name: ClassVar[str] = "window"

    def __init__(self, slots: int, length: int) -> None:
        super().__init__(slots)
        if length < 1:
            raise UsageError("no window", field="window", expected="1 or more", found=length)
        self._length = length

    def expired(self, token: int) -> NDArray[np.bool_] | None:
        gone: NDArray[np.bool_] = self.worth < token - self._length
        return gone


class Lfu:
    """Least frequently used, of late: each use counts for half as much _HALF_LIFE tokens later. A
    worth is the logarithm of such a count, with all of them measured at token 0, so that time
    changes none of them."""

    name: ClassVar[str] = "lfu"

    def __init__(self, slots: int) -> None:
        self.worth = np.zeros(slots)

    def touch(self, slots: Slots, token: int | Tokens) -> None:
        self.worth[slots] = np.logaddexp(self.worth[slots], _FADING * token)

    def fill(self, slots: Slots, token: int | Tokens) -> None:
        self.worth[slots] = _FADING * token

    def worth_when_filled(self, tokens: Tokens) -> Worth:
        return np.multiply(_FADING, tokens, dtype=np.float64)

    def expired(self, token: int) -> NDArray[np.bool_] | None:
        return None

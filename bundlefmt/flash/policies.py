"""Which bundle gives way when a slot is needed; a new policy is one class and one entry here.

A policy gives every slot a number, its worth; of the slots that the token at hand does not use,
those worth least are evicted first.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from bundlefmt.errors import UsageError

_HALF_LIFE = 64  # tokens after which LFU forgets half of what it has counted

Slots = NDArray[np.int64]
Tokens = NDArray[np.int64]


class Policy(Protocol):
    """Keeps `worth`, int64 [slots], for one group's cache."""

    name: ClassVar[str]
    worth: NDArray[np.int64]

    def touch(self, slots: Slots, token: int | Tokens) -> None:
        """The token, or one for each of the slots, uses these slots, which were filled before."""

    def fill(self, slots: Slots, token: int | Tokens) -> None:
        """These slots are filled anew, for that token, or each for one of its own."""

    def worth_when_filled(self, tokens: Tokens) -> NDArray[np.int64]:
        """What slots would be worth if they were filled for these tokens."""

    def expired(self, token: int) -> NDArray[np.bool_] | None:
        """Which slots are to be freed though nobody needs them; None for none."""


class Lru:
    """Least recently used: a window of as many tokens as there is room for."""

    name: ClassVar[str] = "lru"

    def __init__(self, slots: int) -> None:
        self.worth = np.zeros(slots, dtype=np.int64)

    def touch(self, slots: Slots, token: int | Tokens) -> None:
        self.worth[slots] = token

    fill = touch

    def worth_when_filled(self, tokens: Tokens) -> NDArray[np.int64]:
        return tokens

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
    """Least frequently used, with counts that fade."""

    name: ClassVar[str] = "lfu"

    def __init__(self, slots: int) -> None:
        self.worth = np.zeros(slots, dtype=np.int64)
        self._faded = 0

    def touch(self, slots: Slots, token: int | Tokens) -> None:
        self._fade(token)
        self.worth[slots] += 2

    def fill(self, slots: Slots, token: int | Tokens) -> None:
        self._fade(token)
        self.worth[slots] = 2

    def worth_when_filled(self, tokens: Tokens) -> NDArray[np.int64]:
        return np.full(tokens.size, 2)

    def expired(self, token: int) -> NDArray[np.bool_] | None:
        return None

    def _fade(self, token: int | Tokens) -> None:
        latest = int(np.max(token, initial=0))
        if latest - self._faded >= _HALF_LIFE:
            self.worth >>= 1
            self._faded = latest

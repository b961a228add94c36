"""Whether neurons that a token will probably need are worth reading before that is known.

Facts: the FFN's input differs from what it would be without the attention before it by what
attention adds, mostly little, so a predictor that is fed with the one names most of the neurons
that it names for the other. What it names wrongly costs the device time that is needed elsewhere.
Strategy: guess for every token, and count, but read only where guesses have been good.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MOST_WASTED = 0.25  # of what is read ahead
_MEMORY = 0.9  # share of the count that is kept from one token to the next

Ids = NDArray[np.int64]


class ReadAhead:
    """One group's guesses: neurons that are not in the cache and may be needed."""

    def __init__(self, neurons: int) -> None:
        self._guess: Ids | None = None
        self._needed = np.zeros(neurons, dtype=np.bool_)
        self._guessed = self._useful = 0.0

    @property
    def pays(self) -> bool:
        """Whether at most MOST_WASTED of the latest guesses would have been read in vain; not
        before there was one."""
        return self._useful >= (1 - MOST_WASTED) * self._guessed > 0

    def guess(self, ids: Ids) -> None:
        """These neurons are not in the cache, and are thought to be needed next."""
        self._guess = ids

    def learn(self, needed: Ids) -> None:
        """These neurons are needed."""
        if self._guess is None:
            return
        self._needed[needed] = True
        useful = int(np.count_nonzero(self._needed[self._guess]))
        self._needed[needed] = False
        self._useful = _MEMORY * self._useful + useful
        self._guessed = _MEMORY * self._guessed + self._guess.size
        self._guess = None

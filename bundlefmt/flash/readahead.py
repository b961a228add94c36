"""Whether neurons that a token will probably need are worth reading before that is known.

Facts: the FFN's input differs from what it would be without the attention before it by what
attention adds, mostly little, so a predictor that is fed with the one names most of the neurons
that it names for the other. What it names wrongly costs the device time that is needed elsewhere,
and the guess itself is a product with the predictor's weights. What a token lacks is read anyhow
while the rest is computed. Strategy: guess where it is so much that reading it takes longer than
the rest and the guess together, and count, but read only where guesses have been good.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MOST_WASTED = 0.25  # of what is read ahead
_MEMORY = 0.9  # share of the count that is kept from one token to the next
# Weights in memory are multiplied so many times faster than bundles are read: of memory's and an
# NVMe drive's rates about the least (`bundlefmt calibrate` prints a machine's).
_FASTER = 10

Ids = NDArray[np.int64]


class ReadAhead:
    """One group's guesses: neurons that are not in the cache and may be needed. A bundle has
    `stride` bytes."""

    def __init__(self, neurons: int, stride: int) -> None:
        self._stride = stride
        self._surplus: float | None = None  # bundles that could be computed while a token waits
        self._guess: Ids | None = None
        self._needed = np.zeros(neurons, dtype=np.bool_)
        self._guessed = self._useful = 0.0

    def worth_guessing(self, guess_bytes: int) -> bool:
        """Whether a guess, which is computed from so many bytes of weights, may save more than it
        costs."""
        return self._surplus is None or self._surplus * self._stride >= guess_bytes

    @property
    def pays(self) -> bool:
        """Whether at most MOST_WASTED of the latest guesses would have been read in vain; not
        before there was one."""
        return self._useful >= (1 - MOST_WASTED) * self._guessed > 0

    def guess(self, ids: Ids) -> None:
        """These neurons are not in the cache, and are thought to be needed next."""
        self._guess = ids

    def learn(self, needed: Ids, lacked: int) -> None:
        """These neurons are needed; so many of them were not in the cache before anything was
        read."""
        surplus = _FASTER * lacked - (needed.size - lacked)
        before = surplus if self._surplus is None else self._surplus
        self._surplus = _MEMORY * before + (1 - _MEMORY) * surplus
        if self._guess is None:
            return
        self._needed[needed] = True
        useful = int(np.count_nonzero(self._needed[self._guess]))
        self._needed[needed] = False
        self._useful = _MEMORY * self._useful + useful
        self._guessed = _MEMORY * self._guessed + self._guess.size
        self._guess = None

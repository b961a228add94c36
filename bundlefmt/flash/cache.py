"""The neuron cache: bundles kept in DRAM from token to token, where reads put them and where the
kernels compute from them. Nothing is ever moved (cf. the paper's section 3.3, whose rows are).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bundlefmt.flash.policies import Policy

Ids = NDArray[np.int64]
Slots = NDArray[np.int64]


@dataclass
class CacheStats:
    """Counters since a cache was made, in neurons."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    passed: int = 0  # misses for which there was no slot

    @property
    def hit_rate(self) -> float:
        """Hits / neurons asked for; 0 when none was."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 0.0


class Admission(NamedTuple):
    """What a token's neurons meet in the cache: those at the positions `held` of the ids that were
    asked for lie in the slots `held_slots`; those at `missing` are to be read into
    `missing_slots`; those at `passed` find no room and are to be read elsewhere."""

    held: Ids
    held_slots: Slots
    missing: Ids
    missing_slots: Slots
    passed: Ids


class NeuronCache:
    """Slots for the bundles of one group.

    `rows`, uint8 [slots, stride], is the memory. A token first asks for its neurons (`admit`),
    then reads the missing ones into their slots, then says so (`commit`); before that they are not
    in the cache, so a read that fails leaves nothing behind.
    """

    def __init__(self, neurons: int, rows: NDArray[np.uint8], policy: Policy) -> None:
        self.rows = rows
        self.stats = CacheStats()
        self._policy = policy
        self._slot_of = np.full(neurons, -1, dtype=np.int32)
        self._neuron_in = np.full(rows.shape[0], -1, dtype=np.int32)
        self._token = 0

    @property
    def neurons(self) -> Ids:
        """The neurons that are in the cache, ascending."""
        return np.flatnonzero(self._slot_of >= 0)

    def admit(self, ids: Ids) -> Admission:
        """Look up the different neurons that the next token uses, and make room for those that are
        not there."""
        self._token += 1
        self._expire()
        slots = self._slot_of[ids].astype(np.int64)
        held = np.flatnonzero(slots >= 0)
        missing = np.flatnonzero(slots < 0)
        held_slots = slots[held]
        self._policy.touch(held_slots, self._token)
        room = self._make_room(missing.size, held_slots)
        self.stats.hits += held.size
        self.stats.misses += missing.size
        self.stats.passed += missing.size - room.size
        return Admission(held, held_slots, missing[: room.size], room, missing[room.size :])

    def commit(self, ids: Ids, slots: Slots) -> None:
        """The bundles of these neurons have been read into these slots, which `admit` gave."""
        self._slot_of[ids] = slots
        self._neuron_in[slots] = ids
        self._policy.fill(slots, self._token)

    def _expire(self) -> None:
        expired = self._policy.expired(self._token)
        if expired is not None:
            self._empty(np.flatnonzero(expired & (self._neuron_in >= 0)))

    def _make_room(self, count: int, kept: Slots) -> Slots:
        """Up to `count` empty slots: what is empty first, then what is worth least, but none of
        those `kept`."""
        empty = np.flatnonzero(self._neuron_in < 0)[:count]
        wanted = count - empty.size
        if not wanted:
            return empty
        free = self._neuron_in >= 0
        free[kept] = False
        candidates = np.flatnonzero(free)
        if wanted < candidates.size:
            worth = self._policy.worth[candidates]
            candidates = candidates[np.argpartition(worth, wanted)[:wanted]]
        self._empty(candidates)
        self.stats.evictions += candidates.size
        return np.concatenate([empty, candidates])

    def _empty(self, slots: Slots) -> None:
        self._slot_of[self._neuron_in[slots]] = -1
        self._neuron_in[slots] = -1

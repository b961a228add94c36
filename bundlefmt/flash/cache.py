"""The neuron cache: bundles kept in DRAM from token to token, where reads put them and where the
kernels compute from them. Nothing is ever moved (cf. the paper's section 3.3, whose rows are).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bundlefmt.flash.policies import Policy, Worth

Ids = NDArray[np.int64]
Slots = NDArray[np.int64]

_NONE: NDArray[np.int64] = np.empty(0, dtype=np.int64)


@dataclass
class CacheStats:
    """Counters since a cache was made, in neurons."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    passed: int = 0  # misses for which there was no slot
    ahead: int = 0  # neurons read before it was known that they were needed
    ahead_used: int = 0  # of them, those that were

    @property
    def hit_rate(self) -> float:
        """Hits / neurons asked for; 0 when none was."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 0.0


class Admission(NamedTuple):
    """What a token's neurons `ids`, worth `worth` until then, meet in the cache: those at the
    positions `held` lie in the slots `held_slots`; those at `coming` were expected, and are being
    read into `coming_slots`; those at `missing` are to be read into `missing_slots`; those at
    `passed` find no room and are to be read elsewhere."""

    ids: Ids
    worth: Worth
    held: Ids
    held_slots: Slots
    coming: Ids
    coming_slots: Slots
    missing: Ids
    missing_slots: Slots
    passed: Ids


class NeuronCache:
    """Slots for the bundles of one group.

    `rows`, uint8 [slots, stride], is the memory. A token first asks for its neurons (`admit`),
    then reads the missing ones into their slots, then says so (`commit`); before that they are not
    in the cache, so a read that fails leaves nothing behind. Neurons that it will probably use can
    be read before that (`expect`, then `arrived`), and what a prompt has used be put in (`offer`).
    """

    def __init__(self, neurons: int, rows: NDArray[np.uint8], policy: Policy) -> None:
        self.rows = rows
        self.stats = CacheStats()
        self._policy = policy
        self._slot_of = np.full(neurons, -1, dtype=np.int32)
        self._neuron_in = np.full(rows.shape[0], -1, dtype=np.int32)
        self._token = 0
        self._latest = _NONE  # the neurons of that token
        self._expected = _NONE, _NONE
        self._expected_slot_of = np.full(neurons, -1, dtype=np.int32)

    @property
    def neurons(self) -> Ids:
        """The neurons that are in the cache, ascending."""
        return np.flatnonzero(self._slot_of >= 0)

    def slots_of(self, ids: Ids) -> Slots:
        """Where neurons lie; -1 for those that are not in the cache."""
        return self._slot_of[ids].astype(np.int64)

    def admit(self, ids: Ids) -> Admission:
        """Look up the different neurons that the next token uses, and make room for those that are
        not there."""
        self._token += 1
        self._expire()
        slots = self.slots_of(ids)
        ahead = self._expected_slot_of[ids].astype(np.int64)
        held = np.flatnonzero(slots >= 0)
        coming = np.flatnonzero(ahead >= 0)
        missing = np.flatnonzero((slots < 0) & (ahead < 0))
        held_slots = slots[held]
        worth = self._policy.worth[ids]
        self._policy.use(ids, self._token)
        self._latest = ids
        room = self._make_room(missing.size, held_slots)
        self.stats.hits += held.size
        self.stats.misses += coming.size + missing.size
        self.stats.passed += missing.size - room.size
        self.stats.ahead_used += coming.size
        return Admission(
            ids,
            worth,
            held,
            held_slots,
            coming,
            ahead[coming],
            missing[: room.size],
            room,
            missing[room.size :],
        )

    def absent(self, ids: Ids) -> Ids:
        """Those of different neurons that are not in the cache."""
        return ids[self.slots_of(ids) < 0]

    def expect(self, ids: Ids) -> tuple[Ids, Slots]:
        """Make room for those of the different neurons that are not in the cache, before the next
        token asks: as many of them as there is room for, and the slots to read them into. What was
        expected before and has not arrived is no longer expected. What the last token used gives
        way last: the next one often uses it too, guessed or not."""
        self.forget_expected()
        absent = self.absent(ids)
        slots, latest = self.slots_of(ids), self.slots_of(self._latest)
        room = self._make_room(absent.size, slots[slots >= 0], latest[latest >= 0])
        expected = absent[: room.size]
        self._expected = expected, room
        self._expected_slot_of[expected] = room
        self.stats.ahead += room.size
        return self._expected

    def arrived(self) -> None:
        """What was expected has been read, whether a token came for it or not."""
        ids, slots = self._expected
        self.forget_expected()
        self._hold(ids, slots)

    def forget_expected(self) -> None:
        """What was expected does not come, and its slots are empty."""
        self._expected_slot_of[self._expected[0]] = -1
        self._expected = _NONE, _NONE

    def advance(self, tokens: int) -> None:
        """So many tokens go by without asking: a prompt's."""
        self._token += tokens
        self._expire()

    def offer(self, ids: Ids, ages: Ids) -> tuple[Ids, Slots]:
        """Different neurons whose bundles are at hand, last used `ages` tokens ago: the positions
        of those to be copied, and into which slots; they take what is empty, and what is worth
        less than they are. The cache holds them from now on."""
        slots = self.slots_of(ids)
        self._policy.use(ids, self._token - ages)
        best = np.flatnonzero(slots < 0)
        best = best[np.argsort(-self._policy.worth[ids[best]], kind="stable")]
        empty = np.flatnonzero(self._neuron_in < 0)
        filled = np.flatnonzero(self._neuron_in >= 0)
        filled = filled[np.argsort(self._worth_in(filled), kind="stable")]
        worth = self._policy.worth[ids[best[empty.size :]]]
        rivals = min(worth.size, filled.size)
        better = worth[:rivals] > self._worth_in(filled[:rivals])
        room = np.concatenate([empty, filled[:rivals][better]])[: best.size]
        best = best[: room.size]
        self._empty(room[self._neuron_in[room] >= 0])
        self._hold(ids[best], room)
        return best, room

    def commit(self, ids: Ids, slots: Slots) -> None:
        """The bundles of these neurons have been read into these slots, which `admit` gave."""
        self._hold(ids, slots)

    def _hold(self, ids: Ids, slots: Slots) -> None:
        self._slot_of[ids] = slots
        self._neuron_in[slots] = ids

    def settle(self, admission: Admission, kept: Iterable[Ids]) -> None:
        """The last `admit` was for several tokens, of which these were kept, with the neurons that
        each used: count those, token by token, and none besides."""
        self._policy.worth[admission.ids] = admission.worth
        self._latest = _NONE
        self._token -= 1
        for ids in kept:
            self._token += 1
            self._policy.use(ids, self._token)
            self._latest = ids

    def _expire(self) -> None:
        expired = self._policy.expired(self._token)
        if expired is not None:
            self._empty(self.slots_of(np.flatnonzero(expired & (self._slot_of >= 0))))

    def _make_room(self, count: int, kept: Slots, spared: Slots = _NONE) -> Slots:
        """Up to `count` empty slots: what is empty first, then what is worth least, last those
        `spared`, and none of those `kept`."""
        vacant = self._neuron_in < 0
        vacant[self._expected[1]] = False
        empty = np.flatnonzero(vacant)[:count]
        wanted = count - empty.size
        if not wanted:
            return empty
        free = self._neuron_in >= 0
        free[kept] = False
        candidates = np.flatnonzero(free)
        if wanted < candidates.size:
            late = np.zeros(self._neuron_in.size, dtype=np.bool_)
            late[spared] = True
            worth = np.where(late[candidates], np.inf, self._worth_in(candidates))
            candidates = candidates[np.argpartition(worth, wanted)[:wanted]]
        self._empty(candidates)
        self.stats.evictions += candidates.size
        return np.concatenate([empty, candidates])

    def _worth_in(self, slots: Slots) -> Worth:
        """Of the neurons in these slots."""
        return self._policy.worth[self._neuron_in[slots]]

    def _empty(self, slots: Slots) -> None:
        self._slot_of[self._neuron_in[slots]] = -1
        self._neuron_in[slots] = -1

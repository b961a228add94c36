"""The neuron cache: bundles kept in DRAM from token to token, where reads put them and where the
kernels compute from them. Nothing is ever moved (cf. the paper's section 3.3, whose rows are).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bundlefmt.flash.policies import Policy, Worth
from bundlefmt.flash.pool import SlotPool
from bundlefmt.kernels import Floats

Ids = NDArray[np.int64]
Slots = NDArray[np.int64]

_NONE: NDArray[np.int64] = np.empty(0, dtype=np.int64)


@dataclass
class CacheStats:
    """Counters since a cache was made, in neurons."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0  # of any group's neurons, for this one's
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
    """One group's part of a pool of slots. Made by `caches`.

    A token first asks for its neurons (`admit`), then reads the missing ones into their slots, then
    says so (`commit`); before that they are not in the cache, so a read that fails leaves nothing
    behind. Neurons that it will probably use can be read before that (`expect`, then `arrived`),
    and what a prompt has used be put in (`offer`, then `commit`). Slots that were handed out for a
    token or a prompt and not filled are vacant again with the next: by then no read may be under
    way to them.
    """

    def __init__(self, pool: SlotPool, first: int, neurons: int, policy: Policy) -> None:
        self.stats = CacheStats()
        self._pool = pool
        self._first = first
        self._policy = policy
        self._slot_of = pool.slot_of[first : first + neurons]
        self._token = 0
        self._latest = _NONE  # the neurons of that token
        self._awaited = _NONE
        self._expected = _NONE, _NONE
        self._expected_slot_of = np.full(neurons, -1, dtype=np.int32)

    @property
    def rows(self) -> NDArray[np.uint8]:
        """The pool's memory, uint8 [slots, stride]."""
        return self._pool.rows

    @property
    def neurons(self) -> Ids:
        """The neurons that are in the cache, ascending."""
        return np.flatnonzero(self._slot_of >= 0)

    def beside(self, name: str) -> Floats:
        """Float32 [slots] of that name, for numbers that belong to the bundles."""
        return self._pool.beside(name)

    def slots_of(self, ids: Ids) -> Slots:
        """Where neurons lie; -1 for those that are not in the cache."""
        return self._slot_of[ids].astype(np.int64)

    def admit(self, ids: Ids) -> Admission:
        """Look up the different neurons that the next token uses, and make room for those that are
        not there."""
        self._give_back()
        self._token += 1
        self._expire()
        slots = self.slots_of(ids)
        ahead = self._expected_slot_of[ids].astype(np.int64)
        held = np.flatnonzero(slots >= 0)
        coming = np.flatnonzero(ahead >= 0)
        missing = np.flatnonzero((slots < 0) & (ahead < 0))
        held_slots = slots[held]
        worth = self._policy.worth[ids]
        self._use(ids)
        self._awaited = room = self._make_room(missing.size, held_slots)
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
        expected before and has not arrived is no longer expected."""
        self.forget_expected()
        slots = self.slots_of(ids)
        absent = ids[slots < 0]
        room = self._make_room(absent.size, slots[slots >= 0])
        expected = absent[: room.size]
        self._expected = expected, room
        self._expected_slot_of[expected] = room
        self.stats.ahead += room.size
        return self._expected

    def arrived(self) -> None:
        """What was expected has been read, whether a token came for it or not."""
        ids, slots = self._expected
        self._pool.hold(self._first + ids, slots)
        self._expected_slot_of[ids] = -1
        self._expected = _NONE, _NONE

    def forget_expected(self) -> None:
        """What was expected does not come, and its slots are vacant."""
        (ids, slots), self._expected = self._expected, (_NONE, _NONE)
        self._expected_slot_of[ids] = -1
        self._pool.vacate(slots)

    def advance(self, tokens: int) -> None:
        """So many tokens go by without asking: a prompt's."""
        self._token += tokens
        self._turn_to(_NONE)
        self._expire()

    def offer(self, ids: Ids, ages: Ids) -> tuple[Ids, Slots]:
        """Different neurons whose bundles are at hand, last used `ages` tokens ago: the positions
        of those to be copied, and into which slots; they take what is vacant, and what is worth
        less than they are."""
        self._give_back()
        slots = self.slots_of(ids)
        self._policy.use(ids, self._token - ages)
        self._pool.weigh(self._first + ids)
        best = np.flatnonzero((slots < 0) & (self._expected_slot_of[ids] < 0))
        best = best[np.argsort(-self._policy.worth[ids[best]], kind="stable")]
        vacant = self._pool.claim(best.size)
        worth = self._policy.worth[ids[best[vacant.size :]]]
        rivals = self._pool.least(worth.size, slots[slots >= 0])
        better = worth[: rivals.size] > self._pool.worth_in(rivals)
        self._pool.take(rivals[better])
        self._awaited = room = np.concatenate([vacant, rivals[better]])
        return best[: room.size], room

    def commit(self, ids: Ids, slots: Slots) -> None:
        """The bundles of these neurons are in these slots, which `admit` or `offer` gave."""
        self._pool.hold(self._first + ids, slots)
        self._awaited = _NONE

    def settle(self, admission: Admission, kept: Iterable[Ids]) -> None:
        """The last `admit` was for several tokens, of which these were kept, with the neurons that
        each used: count those, token by token, and none besides."""
        self._policy.worth[admission.ids] = admission.worth
        self._token -= 1
        self._turn_to(_NONE)
        for ids in kept:
            self._token += 1
            self._use(ids)

    def _give_back(self) -> None:
        """The slots that nobody filled."""
        slots, self._awaited = self._awaited, _NONE
        self._pool.vacate(slots)

    def _use(self, ids: Ids) -> None:
        """The token at hand uses these."""
        self._policy.use(ids, self._token)
        self._turn_to(ids)

    def _turn_to(self, ids: Ids) -> None:
        """These are the neurons in use."""
        self._pool.use(self._first + ids, self._first + self._latest)
        self._latest = ids

    def _expire(self) -> None:
        expired = self._policy.expired(self._token)
        if expired is not None:
            self._pool.vacate(self.slots_of(np.flatnonzero(expired & (self._slot_of >= 0))))

    def _make_room(self, count: int, kept: Slots) -> Slots:
        """Up to `count` slots, none of those `kept`; what was in them gives way."""
        room = self._pool.claim(count)
        if room.size == count:
            return room
        rivals = self._pool.least(count - room.size, kept)
        self._pool.take(rivals)
        self.stats.evictions += rivals.size
        return np.concatenate([room, rivals])


def caches(
    rows: NDArray[np.uint8], neurons: Sequence[int], new_policy: Callable[[Worth], Policy]
) -> list[NeuronCache]:
    """The caches of groups of so many `neurons` each, which share the slots `rows`, uint8 [slots,
    stride]; `new_policy` makes a policy that keeps its worth in what it is given. Tokens ask one
    group after the other, so that a worth means the same in all of them."""
    pool = SlotPool(rows, sum(neurons))
    starts = accumulate(neurons, initial=0)
    return [
        NeuronCache(pool, first, count, new_policy(pool.worth[first : first + count]))
        for first, count in zip(starts, neurons, strict=False)
    ]

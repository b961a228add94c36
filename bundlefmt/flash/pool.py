"""The slots of the neuron cache, which the groups share: a layer whose tokens need many neurons
has many.

Strategy: of all groups' neurons those worth least give way first, but none that a group's latest
token used. The next token often uses it again, and its group says so only when its turn comes;
without this, sharing costs more than it gains. To find what is worth least takes a pass over all
worths, so one pass queues enough for some layers, and who was used since is left out.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bundlefmt.flash.policies import Worth, unused
from bundlefmt.kernels import Floats

_QUEUED = 64  # one slot in so many; with longer queues more is overlooked that is worth less
_NEAR = 256  # slots of the queue's head that are looked at before all of it is
_FORESIGHT = 4  # queues
_MOST = float(np.finfo(np.float64).max)  # that a neuron is worth

Neurons = NDArray[np.int64]  # of all groups, one after the other
Slots = NDArray[np.int64]

_NONE: NDArray[np.int64] = np.empty(0, dtype=np.int64)


class SlotPool:
    """`rows`, uint8 [slots, stride], is the memory for bundles of so many `neurons` in all. Tables
    by neuron: `slot_of`, -1 for one that is in no slot, and `worth`, as a policy keeps it (`weigh`
    is to be told of changes)."""

    def __init__(self, rows: NDArray[np.uint8], neurons: int) -> None:
        slots = rows.shape[0]
        self.rows = rows
        self.slot_of = np.full(neurons, -1, dtype=np.int32)
        self.worth = unused(neurons)
        self._in_use = np.zeros(neurons, dtype=np.bool_)
        self._neuron_in = np.full(slots, -1, dtype=np.int32)
        self._vacant = np.arange(slots, dtype=np.int32)[::-1].copy()  # the first of these, a stack
        self._vacancies = slots
        self._kept = np.zeros(slots, dtype=np.bool_)  # for as long as a call takes
        # What slots are worth, infinity for those without a neuron or with one in use; and those
        # that are to give way next, with their worth when they were queued.
        self._price = np.full(slots, np.inf)
        self._queue = _NONE
        self._queued = np.empty(0)
        self._limit = -_MOST
        self._beside: dict[str, Floats] = {}

    def beside(self, name: str) -> Floats:
        """Float32 [slots] of that name, for numbers that belong to the bundles."""
        return self._beside.setdefault(name, np.zeros(self.rows.shape[0], dtype=np.float32))

    def claim(self, count: int) -> Slots:
        """Up to `count` slots that were vacant; they are the caller's, to fill or to vacate."""
        before = self._vacancies
        self._vacancies -= min(count, before)
        return self._vacant[self._vacancies : before][::-1].astype(np.int64)

    def least(self, count: int, kept: Slots) -> Slots:
        """Up to `count` slots with neurons in them that are not in use, in the order in which they
        give way; none of those `kept`."""
        self._kept[kept] = True
        found = self._from_queue(count)
        if found.size < count:
            self._fill_queue(max(count, self.rows.shape[0] // _QUEUED))
            found = self._from_queue(count)
        self._kept[kept] = False
        return found

    def take(self, slots: Slots) -> None:
        """What is in these slots is there no more; they are the caller's, to fill or to vacate."""
        gone = self._neuron_in[slots]
        self.slot_of[gone[gone >= 0]] = -1
        self._neuron_in[slots] = -1
        self._price[slots] = np.inf

    def vacate(self, slots: Slots) -> None:
        """Nobody is going to fill these slots, or needs what is in them."""
        self.take(slots)
        before = self._vacancies
        self._vacancies += slots.size
        self._vacant[before : self._vacancies] = slots[::-1]  # neighbours come out in order

    def hold(self, neurons: Neurons, slots: Slots) -> None:
        """The neurons are in these slots, which were taken."""
        self.slot_of[neurons] = slots
        self._neuron_in[slots] = neurons
        self.weigh(neurons)

    def use(self, neurons: Neurons, before: Neurons) -> None:
        """A group's latest token uses these neurons, the one before it those."""
        self._in_use[before] = False
        self._in_use[neurons] = True
        self.weigh(np.concatenate([before, neurons]))

    def weigh(self, neurons: Neurons) -> None:
        """The worth of these neurons has changed."""
        slots = self.slot_of[neurons]
        held = slots >= 0
        neurons, slots = neurons[held], slots[held]
        self._price[slots] = np.where(self._in_use[neurons], np.inf, self.worth[neurons])

    def worth_in(self, slots: Slots) -> Worth:
        """Of the neurons in these slots."""
        return self.worth[self._neuron_in[slots]]

    def _from_queue(self, count: int) -> Slots:
        """The first `count` that are still worth what they were, and may go. Mostly those near the
        queue's head will do; who is kept and stands before them is not asked again."""
        near = self._queue[: 2 * count + _NEAR]
        good = (self._price[near] == self._queued[: near.size]) & ~self._kept[near]
        places = np.flatnonzero(good)[:count]
        if places.size == count:
            gone = places[0] if count else 0
            self._queue, self._queued = self._queue[gone:], self._queued[gone:]
            return near[places]
        same = self._price[self._queue] == self._queued
        self._queue, self._queued = self._queue[same], self._queued[same]
        return self._queue[~self._kept[self._queue]][:count]

    def _fill_queue(self, count: int) -> None:
        """Queue the `count` that are worth least and may go. A pass that had to sort all by worth
        finds a few times as many, below a limit that the passes after it can make do with."""
        slots = np.flatnonzero((self._price <= self._limit) & ~self._kept)
        if slots.size < count:
            slots = np.flatnonzero((self._price <= _MOST) & ~self._kept)
            price, many = self._price[slots], _FORESIGHT * count
            self._limit = float(np.partition(price, many)[many]) if many < price.size else _MOST
            slots = slots[price <= self._limit]
        if count < slots.size:  # many may be worth the same
            slots = slots[np.argpartition(self._price[slots], count)[:count]]
        price = self._price[slots]
        order = np.argsort(price)
        self._queue, self._queued = slots[order], price[order]

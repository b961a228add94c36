"""Orders: which neuron lies in which slot of a group's region (spec, sections 4.3 and 7)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def is_permutation(order: NDArray[np.uint32]) -> bool:
    """Whether the table holds each of 0 .. len - 1 once."""
    if not (order < order.size).all():
        return False
    return bool(np.bincount(order, minlength=order.size).max(initial=1) == 1)


def slots_of(order: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The inverse of an order: the slot in which each neuron lies."""
    slots = np.empty_like(order)
    slots[order] = np.arange(order.size, dtype=order.dtype)
    return slots

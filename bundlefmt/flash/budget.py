"""How a process's memory is divided: what it cannot do without, and the neuron cache from what is
left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from bundlefmt.layout.header import Group

_SLACK = 10 << 20  # what allocators keep, and tables too small to be counted
_SLACK_SHARE = 256  # and one part in so many of the limit: twice what page tables take
_CACHE_SHARE = 100  # and one in so many of the cache: the kernel's own of registered memory, tables


@dataclass(frozen=True)
class Needs:
    """What a model cannot do without, in bytes: the process before it is loaded, resident tensors,
    selectors and predictors, keys and values, and buffers."""

    process: int
    resident: int
    selectors: int
    kv_cache: int
    buffers: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Budget:
    """A limit divided, in bytes; `slots` is what each group adds to the neuron cache's, which
    groups share, and `streamed` the layers whose attention finds no room, and is read anew for
    every pass."""

    limit: int
    needs: Needs
    slack: int
    cache: int
    slots: tuple[int, ...]
    streamed: tuple[int, ...] = ()


def left_of(limit: int, needs: Needs) -> int:
    """What the neuron cache can have; below 0 when the limit is too small."""
    return limit - needs.total - _slack(limit)


def divide(
    limit: int, needs: Needs, groups: Sequence[Group], streamed: tuple[int, ...] = ()
) -> Budget:
    """Give the neuron cache what is left of a limit that affords the needs: slots for the same
    share of each group's neurons."""
    left = max(left_of(limit, needs), 0)
    all_bytes = sum(group.bundles.length for group in groups)
    share = min(left / with_slack(all_bytes), 1.0) if all_bytes else 0.0
    slots = tuple(int(group.neurons * share) for group in groups)
    cache = sum(n * group.stride for n, group in zip(slots, groups, strict=True))
    slack = _slack(limit) + with_slack(cache) - cache
    return Budget(limit, needs, slack, cache, slots, streamed)


def sharing(groups: Sequence[Group]) -> list[list[int]]:
    """The positions of groups that share slots: those whose bundles have one stride."""
    return [
        [index for index, group in enumerate(groups) if group.stride == stride]
        for stride in sorted({group.stride for group in groups})
    ]


def least_limit(used: int, cache: int = 0) -> int:
    """The smallest limit that affords so many bytes, and a cache of so many beside them."""
    return (used + with_slack(cache) + _SLACK) * _SLACK_SHARE // (_SLACK_SHARE - 1) + 1


def with_slack(cache: int) -> int:
    """A cache of so many bytes, and what comes with it."""
    return cache + cache // _CACHE_SHARE


def _slack(limit: int) -> int:
    return _SLACK + limit // _SLACK_SHARE

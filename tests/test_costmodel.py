"""The cost model's arithmetic, and how neurons are used again: tables of cases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from bundlefmt.errors import FormatError
from bundlefmt.flash import reuse
from bundlefmt.flash.cache import caches
from bundlefmt.flash.costmodel import (
    VERSION,
    Batch,
    DeviceProfile,
    SizeCost,
    decode,
    encode,
)
from bundlefmt.flash.policies import Lfu, Lru, Policy, unused

US = 1e-6


def a_profile(*sizes: tuple[int, float, float], **changes: Any) -> DeviceProfile:
    """Of sizes (bytes, latency in µs, µs per request), measured for one request and for 100; by
    default one where a request costs 10 µs and one more for each KiB, and a batch nothing."""
    rows = sizes or tuple((1024 << k, 0.0, 10.0 + (1 << k)) for k in range(11))
    costs = [
        SizeCost(size, [1, 100], [(latency + n * each) * US for n in (1, 100)], 5 * US)
        for size, latency, each in rows
    ]
    settings: dict[str, Any] = {
        "version": VERSION,
        "device": "a disk-8",
        "backend": "uring",
        "in_flight": 128,
        "sizes": costs,
        "sequential_bytes_per_second": 2e9,
        "compute_bytes_per_second": 2e10,
    }
    return DeviceProfile(**settings | changes)


# Batches.


TABLE = ((4096, 100.0, 10.0), (16384, 200.0, 40.0))  # one takes 110 or 240 µs; 100 1100 or 4200


@pytest.mark.parametrize(
    ("requests", "nbytes", "microseconds"),
    [
        (0, 4096, 0),
        (1, 4096, 110),
        (100, 4096, 1100),
        (10, 4096, (110 * 1100) ** 0.5),  # half way between logarithms
        (0.5, 4096, 55),  # every other token needs one
        (200, 4096, 2200),  # beyond the largest batch its rate stays
        (1, 1, 110),  # what is smaller costs what the smallest does
        (1, 16384, 240),
        (1, 8192, (110 * 240) ** 0.5),
        (100, 8192, (1100 * 4200) ** 0.5),
        (1, 65536, 960),  # what is larger goes at the rate of the largest
    ],
)
def test_batches_are_interpolated_log_on_log(
    requests: float, nbytes: int, microseconds: float
) -> None:
    profile = a_profile(*TABLE)
    assert profile.batch_seconds(requests, nbytes) == pytest.approx(microseconds * US)
    assert profile.predict([Batch(requests, requests * nbytes)] * 3) == pytest.approx(
        3 * microseconds * US
    )


def test_a_tokens_batches_follow_one_another() -> None:
    batches = [Batch(1, 4096), Batch(0, 0), Batch(100, 100 * 16384)]
    assert a_profile(*TABLE).predict(batches) == pytest.approx((110 + 4200) * US)
    assert a_profile(*TABLE).predict([]) == 0


def test_each_of_many_requests_costs_its_share_of_the_largest_batch() -> None:
    profile = a_profile(*TABLE)
    assert profile.seconds_per_request(4096) == pytest.approx(11 * US)
    assert profile.seconds_per_request(65536) == pytest.approx(4 * 42 * US)
    assert profile.cpu_seconds(10_000) == pytest.approx(5 * US)


@pytest.mark.parametrize("bundle", [1 << 10, 4 << 10, 16 << 10, 64 << 10])
def test_the_break_even_gap_costs_as_much_as_one_more_request(bundle: int) -> None:
    gap = a_profile().break_even_gap(bundle)
    assert gap == pytest.approx(10 << 10, rel=0.15)  # 10 µs at 1 µs for each KiB


@pytest.mark.parametrize(
    ("sizes", "bundle", "gap"),
    [
        (((4096, 0, 10), (65536, 0, 160)), 4096, 0),  # twice the bytes cost twice as much
        (((4096, 0, 10), (65536, 0, 10)), 4096, 65536 - 8192),  # bytes cost nothing
        (((4096, 0, 10), (65536, 0, 500)), 4096, 0),
        (((4096, 0, 10), (65536, 0, 10)), 65536, 0),  # nothing larger was measured
    ],
)
def test_gaps_where_bytes_are_dear_or_free(
    sizes: Sequence[tuple[int, float, float]], bundle: int, gap: int
) -> None:
    assert a_profile(*sizes).break_even_gap(bundle) == pytest.approx(gap, abs=1)


# Profiles.


def test_a_profile_comes_back_from_its_json() -> None:
    assert decode(encode(a_profile())) == a_profile()


DAMAGE: dict[str, tuple[bytes, bytes]] = {
    "no JSON": (b"{", b""),
    "no version": (b'"version"', b'"edition"'),
    "another version": (b'"version": %d' % VERSION, b'"version": 1'),
    "no sizes": (b'"sizes"', b'"lengths"'),
    "a negative time": (b'"cpu_seconds": ', b'"cpu_seconds": -'),
    "no batches": (b'"counts"', b'"numbers"'),
    "counts that do not ascend": (b"1,\n        100", b"100,\n        1"),
    "more counts than seconds": (b"1,\n        100", b"1,\n        2,\n        100"),
    "counts of nothing": (b"1,\n        100", b"0,\n        100"),
    "no rate": (b"2000000000.0", b"0"),
    "no number": (b"2000000000.0", b"1e999"),
    "text for a number": (b"2000000000.0", b'"fast"'),
    "sizes that do not ascend": (b'"bytes": 2048', b'"bytes": 1024'),
    "no UTF-8": (b"a disk", b"\xff\xfe"),
}


@pytest.mark.parametrize(("old", "new"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_profile_is_refused_with_the_remedy(old: bytes, new: bytes) -> None:
    data = encode(a_profile())
    assert old in data
    with pytest.raises(FormatError, match="bundlefmt calibrate makes a new one"):
        decode(data.replace(old, new, 1))


@pytest.mark.parametrize("length", range(0, 400, 13))
def test_a_profile_that_was_cut_off_is_refused(length: int) -> None:
    with pytest.raises(FormatError):
        decode(encode(a_profile())[:length])


def test_unknown_fields_of_a_profile_are_left_alone() -> None:
    fields = msgspec.json.decode(encode(a_profile())) | {"colour": "blue"}
    assert decode(msgspec.json.encode(fields)) == a_profile()


# Reuse.

Tokens = list[NDArray[np.int64]]
NEURONS = 400


def drawn(neurons: int, count: int, active: int, seed: int = 1) -> Iterator[NDArray[np.int64]]:
    """Tokens that keep half of the active neurons of the one before."""
    random = np.random.default_rng(seed)
    weights = random.pareto(2.0, neurons) + 0.05
    ids = random.choice(neurons, active, replace=False)
    for _ in range(count):
        kept = random.permutation(ids)[: active // 2]
        weighted = weights.copy()
        weighted[kept] = 0
        fresh = random.choice(
            neurons, active - kept.size, replace=False, p=weighted / weighted.sum()
        )
        ids = np.sort(np.concatenate([kept, fresh]))
        yield ids


def replayed(tokens: Tokens, slots: int, warm_up: int, policy: type[Policy]) -> float:
    """Misses per token of the cache that the runtime has."""
    rows = np.empty((slots, 1), dtype=np.uint8)
    (cache,) = caches(rows, [NEURONS], policy)
    before = 0
    for token, ids in enumerate(tokens):
        if token == warm_up:
            before = cache.stats.misses
        admission = cache.admit(ids)
        cache.commit(ids[admission.missing], admission.missing_slots)
    return (cache.stats.misses - before) / (len(tokens) - warm_up)


@pytest.mark.parametrize("policy", [Lru, Lfu])
@pytest.mark.parametrize("slots", [0, 1, 20, 60, 100, 200, 399, NEURONS])
def test_stack_distances_tell_the_misses_of_the_cache(slots: int, policy: type[Policy]) -> None:
    tokens = list(drawn(NEURONS, 300, 60))
    found = reuse.observed(NEURONS, tokens, 100, policy(unused(NEURONS)))
    expected = replayed(tokens, slots, 100, policy)
    assert found.misses[slots] == pytest.approx(expected, rel=0.05, abs=0.5)


gains = st.lists(st.integers(0, 20), min_size=1, max_size=40).map(lambda g: sorted(g, reverse=True))


@given(st.lists(gains, min_size=1, max_size=5), st.floats(0, 1))
def test_shared_slots_go_where_they_spare_most(spared: list[list[int]], share: float) -> None:
    """`spared`: by each slot of a group, one after the other."""
    used = [
        reuse.Reuse(sum(group), np.zeros(1), sum(group) - np.cumsum([0.0, *group]))
        for group in spared
    ]
    slots = int(share * sum(map(len, spared)))
    counts = reuse.shared(used, slots)
    assert sum(counts) == slots
    found = sum(sum(group[:count]) for group, count in zip(spared, counts, strict=True))
    assert found == sum(sorted((gain for group in spared for gain in group), reverse=True)[:slots])


def test_a_slot_that_spares_little_may_be_before_one_that_spares_much() -> None:
    late = reuse.Reuse(9, np.zeros(1), np.array([9.0, 9, 9, 0]))  # of use only when all are there
    even = reuse.Reuse(6, np.zeros(1), np.array([6.0, 4, 2, 0]))
    assert reuse.shared([late, even], 3) == [3, 0]


def test_what_tokens_use_is_counted() -> None:
    tokens = [np.array(ids) for ids in ([0, 1], [2, 3], [0, 1], [2, 3], [0, 5])]
    found = reuse.observed(8, tokens, 2, Lru(unused(8)))
    assert found.active == 2
    assert found.held[:3].tolist() == [0, 2, 4]
    # What comes back comes back after two others; the last token's 5 was never used before.
    assert found.misses[:3].tolist() == [2, 2, 2]
    assert found.misses[4:].tolist() == pytest.approx([1 / 3] * 5)
    assert [reuse.window([found], slots) for slots in (0, 1, 2, 3)] == [0, 0, 1, 1]


def test_the_assumed_reuse_is_the_papers() -> None:
    found = reuse.assumed(16384, reuse.PREDICTED_SHARE)
    share = found.held / 16384
    assert share[1] == pytest.approx(0.095)
    assert share[5] == pytest.approx(0.24, rel=0.01)  # a window of five
    slots = round(0.24 * 16384)
    assert reuse.window([found], slots) in (4, 5)
    assert reuse.window([found, found], 2 * slots) == reuse.window([found], slots)
    assert found.misses[slots] / 16384 == pytest.approx(0.024, rel=0.15)


@pytest.mark.parametrize("made", [reuse.assumed(100, 0.1), reuse.assumed(7, 1.0), reuse.every(9)])
def test_more_slots_never_miss_more_and_all_slots_miss_nothing(made: reuse.Reuse) -> None:
    assert made.misses[0] == pytest.approx(made.active)
    assert (np.diff(made.misses) <= 0).all()
    assert made.misses[-1] == 0
    assert (np.diff(made.held) >= 0).all()

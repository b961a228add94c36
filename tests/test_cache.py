"""The neuron cache against a plain model of it: what it holds is what its policy says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bundlefmt.errors import UsageError
from bundlefmt.flash.cache import Admission, NeuronCache, caches
from bundlefmt.flash.policies import Lfu, Lru, Policy, Window, Worth, unused
from bundlefmt.flash.readahead import ReadAhead
from bundlefmt.runtime.memory import POLICIES, Caching

NEURONS = 40
MAKERS: dict[str, Callable[[Worth], Policy]] = {
    "lru": Lru,
    "lfu": Lfu,
    "window": lambda worth: Window(worth, 2),
}
policies = pytest.mark.parametrize("policy", MAKERS)
tokens = st.lists(st.sets(st.integers(0, NEURONS - 1), max_size=20), max_size=30)


def new_cache(slots: int, policy: str = "lru") -> NeuronCache:
    (cache,) = caches(np.zeros((slots, 8), dtype=np.uint8), [NEURONS], MAKERS[policy])
    return cache


def content_of(neurons: NDArray[np.int64]) -> NDArray[np.uint8]:
    """What stands for these neurons' bundles."""
    return np.repeat(neurons[:, None], 8, axis=1).astype(np.uint8)


def ids_of(neurons: set[int]) -> NDArray[np.int64]:
    return np.array(sorted(neurons), dtype=np.int64)


def use(cache: NeuronCache, *neurons: int) -> Admission:
    """One token: ask, read what is missing, say so."""
    ids = ids_of(set(neurons))
    admission = cache.admit(ids)
    missing = ids[admission.missing]
    cache.rows[admission.missing_slots] = content_of(missing)
    cache.commit(missing, admission.missing_slots)
    return admission


@policies
@given(asked=tokens, slots=st.integers(1, 25))
@settings(max_examples=50, deadline=None)
def test_every_neuron_of_a_token_is_held_missing_or_passed(
    policy: str, asked: list[set[int]], slots: int
) -> None:
    cache = new_cache(slots, policy)
    for neurons in asked:
        ids = ids_of(neurons)
        found = use(cache, *neurons)
        together = np.concatenate([found.held, found.missing, found.passed])
        assert sorted(together.tolist()) == list(range(ids.size))
        assert (cache.rows[found.held_slots] == content_of(ids[found.held])).all()
        used = np.concatenate([found.held_slots, found.missing_slots])
        assert np.unique(used).size == used.size <= slots
        assert cache.neurons.size <= slots
        assert found.passed.size == max(ids.size - slots, 0)


@given(asked=tokens, slots=st.integers(20, 25))
@settings(max_examples=50, deadline=None)
def test_lru_holds_the_latest_tokens_neurons(asked: list[set[int]], slots: int) -> None:
    cache = new_cache(slots)
    for neurons in asked:
        use(cache, *neurons)
    latest: set[int] = set()
    for neurons in reversed(asked):
        if len(latest | neurons) > slots:
            break
        latest |= neurons
    assert latest <= set(cache.neurons.tolist())


@given(asked=tokens)
@settings(max_examples=50, deadline=None)
def test_a_window_with_room_holds_its_tokens_neurons_and_no_others(asked: list[set[int]]) -> None:
    cache = new_cache(NEURONS, "window")
    for neurons in asked:
        use(cache, *neurons)
    assert set(cache.neurons.tolist()) == set().union(*asked[-3:])  # the last and two before it


@given(asked=tokens, together=tokens.filter(len), later=tokens, data=st.data())
@settings(max_examples=50, deadline=None)
def test_a_window_is_of_the_tokens_that_were_kept(
    asked: list[set[int]], together: list[set[int]], later: list[set[int]], data: st.DataObject
) -> None:
    kept = together[: data.draw(st.integers(1, len(together)))]
    at_once, one_by_one = new_cache(NEURONS, "window"), new_cache(NEURONS, "window")
    for neurons in [{0}, {0}, *asked]:
        use(at_once, *neurons)
        use(one_by_one, *neurons)
    at_once.settle(use(at_once, *set().union(*together)), [ids_of(neurons) for neurons in kept])
    for neurons in kept:
        use(one_by_one, *neurons)
    for neurons in [{0}, *later]:
        use(at_once, *neurons)
        use(one_by_one, *neurons)
        assert at_once.neurons.tolist() == one_by_one.neurons.tolist()


@pytest.mark.parametrize("kept", [3, 4])
@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_what_was_read_for_tokens_that_were_dropped_goes_first(policy: str, kept: int) -> None:
    cache = new_cache(4, policy)
    use(cache, 1, 2)
    cache.settle(use(cache, 1, 2, 3, 4), [ids_of({1}), ids_of({1, kept})])
    use(cache, 5)
    assert cache.neurons.tolist() == [1, 2, kept, 5]


def test_lfu_holds_what_is_used_often() -> None:
    cache = new_cache(3, "lfu")
    for other in range(10, 20):
        use(cache, 1, 2)
        use(cache, other)
    assert {1, 2} <= set(cache.neurons.tolist())


def test_lfu_counts_a_neuron_s_uses_while_it_was_not_in_the_cache_too() -> None:
    cache = new_cache(2, "lfu")
    for neurons in ({1}, {2, 3}, {1}, {2, 3}, {1}):
        use(cache, *neurons)  # 1 is evicted in between
    use(cache, 4)
    use(cache, 5)
    assert 1 in cache.neurons


def test_a_read_that_fails_leaves_no_neuron_in_its_slot() -> None:
    cache = new_cache(2)
    use(cache, 1, 2)
    cache.admit(np.array([3, 4]))  # and never committed
    assert cache.neurons.size == 0
    assert use(cache, 1).missing.size == 1


def test_a_neuron_in_use_is_never_evicted_for_another_of_the_same_token() -> None:
    cache = new_cache(3)
    use(cache, 1, 2, 3)
    found = use(cache, 1, 4, 5, 6)
    assert (found.held.size, found.missing.size, found.passed.size) == (1, 2, 1)
    assert 1 in cache.neurons


def expect(cache: NeuronCache, *neurons: int) -> None:
    ids, slots = cache.expect(np.array(sorted(neurons), dtype=np.int64))
    cache.rows[slots] = content_of(ids)


def use_expected(cache: NeuronCache, *neurons: int) -> Admission:
    """One token some of whose neurons were expected."""
    ids = np.array(sorted(neurons), dtype=np.int64)
    admission = cache.admit(ids)
    cache.arrived()
    missing = ids[admission.missing]
    cache.rows[admission.missing_slots] = content_of(missing)
    cache.commit(missing, admission.missing_slots)
    return admission


@policies
@given(guesses=tokens, asked=tokens, slots=st.integers(1, 25))
@settings(max_examples=50, deadline=None)
def test_whatever_was_expected_every_neuron_is_found_in_its_slot(
    policy: str, guesses: list[set[int]], asked: list[set[int]], slots: int
) -> None:
    cache = new_cache(slots, policy)
    for guess, neurons in zip(guesses, asked, strict=False):
        expect(cache, *guess)
        ids = np.array(sorted(neurons), dtype=np.int64)
        found = use_expected(cache, *neurons)
        together = [found.held, found.coming, found.missing, found.passed]
        assert sorted(np.concatenate(together).tolist()) == list(range(ids.size))
        for which, where in (
            (found.held, found.held_slots),
            (found.coming, found.coming_slots),
            (found.missing, found.missing_slots),
        ):
            assert (cache.rows[where] == content_of(ids[which])).all()
        used = np.concatenate([found.held_slots, found.coming_slots, found.missing_slots])
        assert np.unique(used).size == used.size <= slots


def test_what_was_expected_is_not_read_twice_and_is_there_for_the_next_token() -> None:
    cache = new_cache(4)
    expect(cache, 1, 2, 3)
    found = use_expected(cache, 2, 5)
    assert (found.coming.size, found.missing.size) == (1, 1)
    assert use(cache, 1, 2, 3, 5).held.size == 4
    assert (cache.stats.ahead, cache.stats.ahead_used) == (3, 1)


def test_what_the_last_token_used_makes_no_room_for_what_is_expected() -> None:
    cache = new_cache(4, "lfu")
    for _ in range(3):
        use(cache, 1, 2)
    use(cache, 3, 4)
    expect(cache, 5, 6, 7)  # 1 and 2 were used more often, but not now
    assert cache.neurons.tolist() == [3, 4]
    assert use_expected(cache, 5, 6, 7).coming.size == 2


def test_what_was_expected_and_never_came_is_not_in_the_cache() -> None:
    cache = new_cache(4)
    expect(cache, 1, 2)
    cache.forget_expected()
    assert cache.neurons.size == 0
    assert use(cache, 1, 2, 3, 4).missing.size == 4


def offer(cache: NeuronCache, ids: NDArray[np.int64], ages: NDArray[np.int64]) -> None:
    """A piece of a prompt goes by."""
    kept, where = cache.offer(ids, ages)
    cache.rows[where] = content_of(ids[kept])
    cache.commit(ids[kept], where)


@given(
    used=st.lists(st.integers(0, 9), min_size=NEURONS, max_size=NEURONS),
    pieces=st.integers(1, 5),
    slots=st.integers(1, NEURONS),
)
@settings(max_examples=50, deadline=None)
def test_a_prompt_leaves_what_was_used_last(used: list[int], pieces: int, slots: int) -> None:
    cache = new_cache(slots)
    cache.advance(10)
    ages = np.array(used)
    for ids in np.array_split(np.arange(NEURONS), pieces):
        offer(cache, ids, ages[ids])
    held = cache.neurons
    assert held.size == slots
    assert sorted(ages[held].tolist()) == sorted(used)[:slots]
    found = use(cache, *held.tolist())
    assert found.held.size == slots
    assert (cache.rows[found.held_slots] == content_of(held)).all()


def test_guesses_are_read_only_while_they_are_good() -> None:
    ahead = ReadAhead(NEURONS, 100)
    assert not ahead.pays  # nothing is known yet
    few, many = np.arange(4), np.arange(20)
    ahead.guess(few)
    ahead.learn(np.array([0, 1, 2, 30]), 4)
    assert ahead.pays
    for _ in range(3):
        ahead.guess(many)
        ahead.learn(few, 3)
    assert not ahead.pays
    for _ in range(40):
        ahead.guess(few)
        ahead.learn(many, 20)
    assert ahead.pays


@pytest.mark.parametrize(("lacked", "worth"), [(0, False), (2, False), (5, True), (25, True)])
def test_a_guess_is_made_where_reading_takes_longer_than_it_and_what_is_held(
    lacked: int, worth: bool
) -> None:
    ahead = ReadAhead(NEURONS, stride=100)
    needed = np.arange(25)
    assert ahead.worth_guessing(1 << 30)  # nothing is known yet
    for other in (25 - lacked, lacked):
        for _ in range(100):
            ahead.learn(needed, other)
    assert ahead.worth_guessing(10 * 100) == worth
    assert not ahead.worth_guessing(1 << 30)


def test_the_counters_add_up() -> None:
    cache = new_cache(2)
    use(cache, 1, 2)
    use(cache, 2, 3, 4)
    stats = cache.stats
    assert (stats.hits, stats.misses, stats.evictions, stats.passed) == (1, 4, 1, 1)
    assert stats.hit_rate == 1 / 5
    assert new_cache(1).stats.hit_rate == 0


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"policy": "random"}, "policy"),
        ({"policy": "window"}, "window"),
        ({"policy": "window", "window": 0}, "window"),
        ({"policy": "lru", "window": 4}, "window"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(settings: dict[str, object], field: str) -> None:
    with pytest.raises(UsageError, match=field):
        Caching(1 << 30, **settings)  # type: ignore[arg-type]


def test_every_policy_can_be_asked_for() -> None:
    for name in set(POLICIES) - {"none"}:
        caching = Caching(1 << 30, name, window=3 if name == "window" else None)
        assert caching.new_policy(unused(4)).name == name


def shared_caches(slots: int, policy: str = "lfu", groups: int = 2) -> list[NeuronCache]:
    """Of groups of NEURONS each, that share the slots."""
    rows = np.zeros((slots, 8), dtype=np.uint8)
    return caches(rows, [NEURONS] * groups, MAKERS[policy])


@dataclass
class Turn:
    """What happens to one group: neurons are guessed, then used, and kept if all goes well; or they
    go by in a prompt."""

    group: int
    guess: set[int]
    neurons: set[int]
    how: str


turns = st.builds(
    Turn,
    st.integers(0, 2),
    st.sets(st.integers(0, NEURONS - 1), max_size=20),
    st.sets(st.integers(0, NEURONS - 1), max_size=20),
    st.sampled_from(["used", "fails", "early read fails", "prompt", "prompt fails", "dropped"]),
)


@policies
@given(turns=st.lists(turns, max_size=40), slots=st.integers(1, NEURONS))
@settings(max_examples=200, deadline=None)
def test_groups_that_share_slots_never_share_one_and_lose_none(
    policy: str, turns: list[Turn], slots: int
) -> None:
    groups = shared_caches(slots, policy, groups=3)
    for turn in turns:
        cache, ids = groups[turn.group], ids_of(turn.neurons)
        mark = 64 * turn.group  # a group's bundles are those of no other group
        if turn.how.startswith("prompt"):
            cache.advance(20)
            kept, where = cache.offer(ids, ids % 7)
            cache.rows[where] = content_of(ids[kept]) + mark
            if turn.how == "prompt":
                cache.commit(ids[kept], where)
        else:
            expected, where = cache.expect(ids_of(turn.guess))
            cache.rows[where] = content_of(expected) + mark
            if turn.how == "early read fails":
                cache.forget_expected()
            found = cache.admit(ids)
            cache.arrived()
            if turn.how != "fails":
                cache.rows[found.missing_slots] = content_of(ids[found.missing]) + mark
                cache.commit(ids[found.missing], found.missing_slots)
            if turn.how == "dropped":
                cache.settle(found, [])
        lying = [each.slots_of(each.neurons) for each in groups]
        used = np.concatenate(lying)
        assert np.unique(used).size == used.size <= slots
        for number, (each, places) in enumerate(zip(groups, lying, strict=True)):
            assert (each.rows[places] == content_of(each.neurons) + 64 * number).all()
    for cache in groups:
        cache.admit(ids_of(set()))  # nothing is in use
    assert groups[0].admit(np.arange(slots)).passed.size == 0


def test_a_neuron_that_is_expected_is_not_taken_from_a_prompt_too() -> None:
    cache = new_cache(8)
    expect(cache, 1, 2)
    offer(cache, np.arange(4), np.zeros(4, dtype=np.int64))
    found = use_expected(cache, 0, 1, 2, 3)
    assert (found.held.tolist(), found.coming.tolist()) == ([0, 3], [1, 2])


@pytest.mark.parametrize("policy", [Lru, Lfu])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.5, 4.0])
def test_sharing_slots_misses_no_more_than_a_part_for_each(
    policy: type[Policy], share: float
) -> None:
    """`share`: slots / what one token uses in all groups."""
    random = np.random.default_rng(5)
    active = [2, 4, 8, 16]
    slots = int(share * sum(active))
    weights = random.pareto(1.5, (len(active), NEURONS)) + 0.05
    tokens = [
        [
            np.sort(random.choice(NEURONS, count, replace=False, p=weight / weight.sum()))
            for count, weight in zip(active, weights, strict=True)
        ]
        for _ in range(200)
    ]

    def misses(groups: list[NeuronCache]) -> int:
        for token in tokens:
            for cache, ids in zip(groups, token, strict=True):
                found = cache.admit(ids)
                cache.commit(ids[found.missing], found.missing_slots)
        return sum(cache.stats.misses for cache in groups)

    def rows(count: int) -> NDArray[np.uint8]:
        return np.zeros((count, 8), dtype=np.uint8)

    together = misses(caches(rows(slots), [NEURONS] * len(active), policy))
    parts = [caches(rows(slots // len(active)), [NEURONS], policy)[0] for _ in active]
    assert together <= 1.02 * misses(parts)


def test_a_group_that_needs_many_slots_has_many() -> None:
    busy, idle = shared_caches(24)
    for token in range(20):
        use(busy, *range(20))
        use(idle, token % 2)
    assert busy.neurons.size == 20
    assert idle.neurons.tolist() == [0, 1]
    assert busy.stats.misses == 20


def test_what_a_group_used_last_gives_way_to_no_other() -> None:
    first, second = shared_caches(3)
    for _ in range(3):
        use(second, 0)
    use(second, 1)
    use(first, 0)
    use(first, 1)
    assert second.neurons.tolist() == [0, 1]
    assert use(first, 2, 3).missing.size == 2
    assert second.neurons.tolist() == [1]  # 0 was used more often, but is not in use
    assert use(first, 4, 5, 6).passed.size == 1


def test_slots_that_were_never_filled_are_vacant_again() -> None:
    first, second = shared_caches(4)
    first.admit(np.arange(4))  # and never committed
    assert second.admit(np.arange(2)).passed.size == 2  # reads may be under way to all of them
    use(first)
    assert use(second, 5, 6, 7, 8).missing.size == 4

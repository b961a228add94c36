"""Neuron order: what fires together comes to lie together, and requests are counted right."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bundlefmt.flash.order import make_order, requests
from bundlefmt.flash.traces import LayerTrace, TracedLayer
from bundlefmt.layout.order import is_permutation, slots_of


def traced(active: NDArray[np.bool_]) -> LayerTrace:
    """A layer's trace with that activity [tokens, neurons]."""
    ids = np.nonzero(active)[1].astype(np.uint32)
    ends = np.cumsum(active.sum(axis=1), dtype=np.int64)
    info = TracedLayer(0, active.shape[1], 1, "relu", ids.size)
    inputs = np.zeros((active.shape[0], 1), dtype=np.float16)
    return LayerTrace(info, inputs, ids, np.concatenate([[0], ends[:-1]]), ends)


def planted(clusters: int, size: int, tokens: int, fired: int) -> tuple[NDArray[np.bool_], ...]:
    """Activity [tokens, neurons] in which `fired` clusters fire for each token, each cluster whole
    or not at all, and which cluster each neuron belongs to."""
    random = np.random.default_rng(7)
    cluster_of = random.permutation(np.repeat(np.arange(clusters), size))
    chosen = random.permuted(np.tile(np.arange(clusters) < fired, (tokens, 1)), axis=1)
    return chosen[:, cluster_of], cluster_of


def everything(active: NDArray[np.bool_]) -> NDArray[np.int64]:
    return np.arange(active.shape[0])


def test_planted_clusters_come_to_lie_together() -> None:
    active, cluster_of = planted(clusters=30, size=8, tokens=600, fired=3)
    trace, seen, held_out = traced(active), np.arange(540), np.arange(540, 600)
    before = np.arange(240, dtype=np.uint32)
    order = make_order(trace, seen)
    assert np.count_nonzero(np.diff(cluster_of[order])) == 29
    assert requests(trace, held_out, before, 0).requests > 60 * 20
    found = requests(trace, held_out, slots_of(order), 0)
    assert found.neurons == 60 * 24
    assert found.requests <= 60 * 3


def test_clusters_are_found_in_noise() -> None:
    active, cluster_of = planted(clusters=30, size=8, tokens=2000, fired=3)
    random = np.random.default_rng(8)
    active &= random.random(active.shape) < 0.7
    active |= random.random(active.shape) < 0.01
    order = make_order(traced(active), everything(active))
    assert np.count_nonzero(np.diff(cluster_of[order])) < 40


def test_neurons_that_fire_together_are_not_parted_by_one_that_always_fires() -> None:
    active = np.zeros((100, 3), dtype=bool)
    active[:, 0] = active[:10, 1] = active[1:11, 2] = True  # 10 times with 0, 9 with each other
    order = make_order(traced(active), everything(active))
    assert order[1] != 0


def test_neurons_that_never_fire_come_last() -> None:
    active, _ = planted(clusters=10, size=4, tokens=200, fired=2)
    active[:, [3, 17, 20]] = False
    order = make_order(traced(active), everything(active))
    assert sorted(order[-3:].tolist()) == [3, 17, 20]


def test_counting_in_pieces_gives_the_same_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    active = np.random.default_rng(9).random((300, 50)) < 0.2
    slots = np.random.default_rng(9).permutation(50).astype(np.uint32)
    whole = requests(traced(active), everything(active), slots, 1)
    monkeypatch.setattr("bundlefmt.flash.order._TOKENS", 11)
    assert requests(traced(active), everything(active), slots, 1) == whole


def test_a_long_trace_is_gone_through_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bundlefmt.flash.order._MOST_TOKENS", 100)
    active = np.random.default_rng(9).random((1000, 50)) < 0.2
    found = make_order(traced(active), everything(active))
    np.testing.assert_array_equal(found, make_order(traced(active[::10]), np.arange(100)))


@st.composite
def _activity(draw: st.DrawFn) -> NDArray[np.bool_]:
    tokens, neurons = draw(st.integers(1, 12)), draw(st.integers(1, 20))
    share = draw(st.sampled_from([0, 0.1, 0.5, 1]))
    return np.random.default_rng(draw(st.integers(0, 99))).random((tokens, neurons)) < share


@settings(max_examples=200, deadline=None)
@given(active=_activity())
def test_every_neuron_stands_in_the_order_once(active: NDArray[np.bool_]) -> None:
    order = make_order(traced(active), everything(active))
    assert order.dtype == np.uint32
    assert order.size == active.shape[1]
    assert is_permutation(order)


@settings(max_examples=200, deadline=None)
@given(active=_activity(), gap=st.sampled_from([0, 1, 2, 5, 10**9]), data=st.data())
def test_requests_are_the_runs_of_each_token(
    active: NDArray[np.bool_], gap: int, data: st.DataObject
) -> None:
    slots = np.array(data.draw(st.permutations(range(active.shape[1]))), dtype=np.uint32)
    tokens = np.array(data.draw(st.lists(st.integers(0, len(active) - 1), max_size=9)), dtype=int)
    runs = unwanted = 0
    for token in tokens:
        wanted = sorted(slots[np.flatnonzero(active[token])].tolist())
        for k, slot in enumerate(wanted):
            between = slot - wanted[k - 1] - 1
            if k and between <= gap:
                unwanted += between
            else:
                runs += 1
    found = requests(traced(active), tokens, slots, gap)
    assert (found.requests, found.unwanted) == (runs, unwanted)
    assert found.neurons == active[tokens].sum()

"""Synthetic traces have the statistics that they are asked for."""

from __future__ import annotations

import numpy as np
import pytest

from bench.paper.figures import PAPER
from bench.paper.traces import HISTORY, Reuse, Trace, fit


@pytest.mark.parametrize("name", PAPER)
def test_a_generator_is_found_for_what_the_paper_says(name: str) -> None:
    asked = PAPER[name]
    found = fit(asked.predicted, asked.held, asked.fresh, asked.window)
    assert found.union(1) == pytest.approx(asked.predicted, rel=0.01)
    assert found.union(asked.window) == pytest.approx(asked.held, rel=0.02)
    assert found.fresh(asked.window) == pytest.approx(asked.fresh, rel=0.05)


def test_a_trace_is_like_its_generator() -> None:
    reuse = Reuse(density=0.1, spread=1.5, leave=0.5)
    found = Trace(reuse, layers=4, neurons=4096, tokens=40).statistics()
    assert found.predicted == pytest.approx(0.1, rel=0.05)
    for window in (1, 2, 5, 8):
        assert found.held[window - 1] == pytest.approx(reuse.union(window), rel=0.05)
        assert found.fresh[window - 1] == pytest.approx(reuse.fresh(window), rel=0.1)
    assert found.persisting == pytest.approx(0.5, rel=0.05)


@pytest.fixture(scope="module")
def trace() -> Trace:
    return Trace(Reuse(0.1, 1.5, 0.5), layers=2, neurons=2048, tokens=8)


def test_a_trace_is_the_same_each_time_and_differs_by_layer_and_seed(trace: Trace) -> None:
    again = Trace(Reuse(0.1, 1.5, 0.5), layers=2, neurons=2048, tokens=8)
    other = Trace(Reuse(0.1, 1.5, 0.5), layers=2, neurons=2048, tokens=8, seed=1)
    assert np.array_equal(trace.ids(1, 7), again.ids(1, 7))
    assert not np.array_equal(trace.ids(1, 7), trace.ids(0, 7))
    assert not np.array_equal(trace.ids(1, 7), other.ids(1, 7))


@pytest.mark.parametrize(("recall", "wrong"), [(0.85, 0.15), (0.5, 0.0), (1.0, 0.5)])
def test_an_early_guess_is_as_good_as_is_said(trace: Trace, recall: float, wrong: float) -> None:
    for layer in range(2):
        needed, guessed = trace.ids(layer, 3), trace.early(layer, 3, recall, wrong)
        right = np.intersect1d(needed, guessed).size
        assert right / needed.size == pytest.approx(recall, abs=0.01)
        assert 1 - right / guessed.size == pytest.approx(wrong, abs=0.01)


def test_the_history_leads_up_to_the_first_token(trace: Trace) -> None:
    """Its last token shares with the first one as much as any two in a row do."""
    tokens = list(trace.history(0))
    assert len(tokens) == HISTORY
    assert all(np.array_equal(*both) for both in zip(tokens, trace.history(0), strict=True))
    kept = np.isin(trace.ids(0, 0), tokens[-1]).mean()
    assert kept == pytest.approx(0.5, abs=0.15)  # those that go off after a token: 0.5
    assert kept > np.isin(trace.ids(0, 0), tokens[0]).mean()

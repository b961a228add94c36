"""One model, many sequences: threads may share it, generations may alternate."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bundlefmt
from bundlefmt.errors import UsageError
from bundlefmt.runtime.generate import Model
from tests.test_memory import least_memory

THREADS = 4
NEW = 12
PROMPTS = [[50 + i, 60, 70 - i, 80] for i in range(8)] + [[7 * i % 90 for i in range(40)]]

OPTIONS: dict[str, dict[str, Any]] = {
    "dense": {"mode": "dense"},
    "exact": {"mode": "exact"},
    "topk": {"mode": "topk"},
    "small cache": {"mode": "exact", "tokens": 256},
    "window": {"mode": "exact", "tokens": 256, "policy": "window", "window": 2},
}

pytestmark = pytest.mark.usefixtures("steady_process")


@pytest.fixture(params=OPTIONS)
def model(request: pytest.FixtureRequest, demo_bundle: Path) -> Any:
    options = OPTIONS[request.param]
    memory = None
    if "tokens" in options:
        memory = least_memory(demo_bundle, **options) + (1 << 20)
    with bundlefmt.load_model(demo_bundle, memory=memory, **options) as model:
        yield model


def in_threads(work: Callable[[int], Any], count: int) -> list[Any]:
    """What `work` gives for 0..count - 1, in threads that begin together."""
    together = threading.Barrier(THREADS)

    def begin(index: int) -> Any:
        if index < THREADS:
            together.wait()
        return work(index)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(begin, range(count)))


def _is_token(token: int | None) -> bool:
    return token is not None  # zip_longest's filling


def test_threads_that_share_a_model_get_the_tokens_that_each_gets_alone(model: Model) -> None:
    expected = [model.generate(prompt, NEW) for prompt in PROMPTS]
    turns = [i % len(PROMPTS) for i in range(4 * len(PROMPTS))]
    made = in_threads(lambda i: model.generate(PROMPTS[turns[i]], NEW), len(turns))
    assert made == [expected[turn] for turn in turns]


def test_threads_that_share_a_model_get_the_logits_that_each_gets_alone(model: Model) -> None:
    expected = [model.logits(prompt) for prompt in PROMPTS]
    for found, alone in zip(
        in_threads(lambda i: model.logits(PROMPTS[i]), len(PROMPTS)), expected, strict=True
    ):
        np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-4)


def test_generations_that_alternate_are_those_made_one_after_the_other(model: Model) -> None:
    expected = [model.generate(prompt, NEW) for prompt in PROMPTS[:2]]
    pairs = zip_longest(*(model.tokens(prompt, NEW) for prompt in PROMPTS[:2]))
    first, second = zip(*pairs, strict=True)
    assert [[*filter(_is_token, first)], [*filter(_is_token, second)]] == expected


def test_threads_that_share_a_draft_get_the_text_without_one(demo_bundle: Path) -> None:
    with (
        bundlefmt.load_model(demo_bundle, mode="exact") as model,
        bundlefmt.load_model(demo_bundle) as draft,
    ):
        expected = [model.generate(prompt, NEW) for prompt in PROMPTS]
        made = in_threads(lambda i: model.generate(PROMPTS[i], NEW, draft=draft), len(PROMPTS))
        assert made == expected
        assert model.draft_stats.made == sum(len(text) - 1 for text in expected)


def test_texts_at_once_keep_within_the_memory_together(demo_bundle: Path) -> None:
    memory = least_memory(demo_bundle, mode="dense", tokens=64)
    with bundlefmt.load_model(demo_bundle, memory=memory, tokens=64) as model:
        first = model.tokens(PROMPTS[0], 40)
        with pytest.raises(UsageError, match="at most 21, beside other texts, found 43"):
            model.tokens(PROMPTS[0], 40)
        assert len(list(first)) == 40
        del first
        assert len(model.generate(PROMPTS[0], 40)) == 40


def test_a_model_that_is_closed_meanwhile_ends_its_generations_with_an_error(
    demo_bundle: Path,
) -> None:
    model = bundlefmt.load_model(demo_bundle)
    text = model.tokens(PROMPTS[0], 100)
    next(text)
    model.close()
    with pytest.raises(UsageError, match="closed"):
        next(text)


@pytest.mark.parametrize("ids", [None, 5, iter([1, 2]), range(10**12), ["a"], [1.5], [[1, 2]]])
def test_what_is_no_sequence_of_tokens_is_refused(ids: Any, demo_bundle: Path) -> None:
    with bundlefmt.load_model(demo_bundle) as model:
        for use in (model.logits, model.generate):
            with pytest.raises(UsageError):
                use(ids)
        with pytest.raises(UsageError, match="a loaded model"):
            model.generate([1], draft=demo_bundle)


def test_a_forked_process_is_refused_the_model_of_its_parent(demo_bundle: Path) -> None:
    with bundlefmt.load_model(demo_bundle) as model:
        child = os.fork()
        if not child:
            try:
                model.generate(PROMPTS[0], 1)
            except UsageError as error:
                os._exit(0 if "load it after the fork" in str(error) else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert len(model.generate(PROMPTS[0], 2)) == 2

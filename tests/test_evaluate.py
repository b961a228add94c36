"""A text's score is what the model's logits say, counted once per token."""

from __future__ import annotations

import json
import math
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bundlefmt
from bundlefmt.cli import main
from bundlefmt.runtime.evaluate import windows
from bundlefmt.runtime.text import Tokenizer
from tests.conftest import ROOT

TASK = ROOT / "tests" / "lm_eval_task"
TEXT = "ROMEO:\nBut, soft! what light through yonder window breaks? Café — ☃\n" * 12


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def by_hand(path: Path, ids: list[int], context: int) -> float:
    """Mean nats per token from `Model.logits`, a prediction at a time."""
    total = 0.0
    stride = context // 2
    with bundlefmt.load_model(path) as model:
        for target in range(1, len(ids)):
            turn = max(-((context - target) // stride), 0)  # windows after the first
            begin = turn * stride
            last = model.logits(ids[begin:target])[-1].astype(np.float64)
            total -= last[ids[target]] - last.max() - math.log(np.exp(last - last.max()).sum())
    return total / (len(ids) - 1)


@pytest.mark.parametrize("context", [2, 3, 8, 9, 64])
def test_perplexity_is_that_of_the_logits(demo_bundle: Path, text: Path, context: int) -> None:
    report = bundlefmt.evaluate(demo_bundle, text, max_tokens=40, context=context)
    with bundlefmt.open(demo_bundle) as file:
        ids = Tokenizer(file).encode(TEXT)[:40]
    assert report.tokens == 39
    assert report.nll == pytest.approx(by_hand(demo_bundle, ids, context), rel=1e-5)
    assert report.perplexity == pytest.approx(math.exp(report.nll))


@pytest.mark.parametrize("width", [2, 3, 8, 9, 512])
@pytest.mark.parametrize("tokens", [2, 3, 9, 10, 17, 100, 1025])
def test_each_token_is_scored_once_with_half_a_window_before_it(tokens: int, width: int) -> None:
    found = list(windows(tokens, width))
    scored = [token for window in found for token in range(window.first, window.end + 1)]
    assert scored == list(range(1, tokens))
    assert all(window.end - window.begin <= width for window in found)
    assert found[0].begin == 0
    for before, window in pairwise(found):
        assert window.first - window.begin > width // 2
        assert before.end + 1 == window.first


@pytest.mark.parametrize("one_at_a_time", [None, True])
def test_exact_agrees_with_dense(demo_bundle: Path, text: Path, one_at_a_time: bool | None) -> None:
    report = bundlefmt.evaluate(
        demo_bundle, text, mode="exact", max_tokens=150, context=64, one_at_a_time=one_at_a_time
    )
    assert report.dense is not None and report.kl is not None
    assert abs(report.kl) < 1e-6
    assert report.top1_agreement == 1
    assert report.nll == pytest.approx(report.dense.nll, abs=1e-5)
    assert report.bytes_read_per_token < report.ffn_bytes / 2
    assert report.dense.mode == "dense" and report.dense.dense is None


def test_one_token_at_a_time_reads_for_each_what_generation_reads(
    demo_bundle: Path, text: Path
) -> None:
    whole = bundlefmt.evaluate(demo_bundle, text, max_tokens=33, context=32)
    single = bundlefmt.evaluate(demo_bundle, text, max_tokens=33, context=32, one_at_a_time=True)
    assert (whole.tokens_at_once, single.tokens_at_once) == (32, 1)
    assert whole.bytes_read_per_token * 32 == single.bytes_read_per_token == single.ffn_bytes
    assert single.nll == pytest.approx(whole.nll, abs=1e-5)


def test_a_cache_scores_the_same_and_reads_less(demo_bundle: Path, text: Path) -> None:
    options: dict[str, Any] = {"mode": "exact", "max_tokens": 65, "context": 64}
    plenty = 1 << 40
    cold = bundlefmt.evaluate(demo_bundle, text, one_at_a_time=True, **options)
    window, all_kept = (
        bundlefmt.evaluate(demo_bundle, text, memory=plenty, **policy, **options)
        for policy in ({"policy": "window", "window": 2}, {})
    )
    assert cold.tokens_at_once == window.tokens_at_once == all_kept.tokens_at_once == 1
    assert cold.nll == pytest.approx(window.nll) == pytest.approx(all_kept.nll)
    read = [report.bytes_read_per_token for report in (all_kept, window, cold)]
    assert read == sorted(set(read))


def test_a_text_shorter_than_a_window_is_one_window(demo_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("ROMEO: what")
    heard: list[tuple[int, int]] = []
    report = bundlefmt.evaluate(
        demo_bundle, tmp_path / "short.txt", progress=lambda *done: heard.append(done)
    )
    assert heard == [(report.tokens, report.tokens)]
    assert report.context == 256 > report.tokens


def test_bits_per_byte_are_of_the_bytes_scored(demo_bundle: Path, text: Path) -> None:
    report = bundlefmt.evaluate(demo_bundle, text)
    with bundlefmt.open(demo_bundle) as file:
        tokenizer = Tokenizer(file)
        ids = tokenizer.encode(TEXT)
    assert report.text_bytes == len(TEXT.encode()) - len(tokenizer.decode(ids[:1]).encode())
    bits = report.nll * report.tokens / math.log(2)
    assert report.bits_per_byte == pytest.approx(bits / report.text_bytes)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", {}, "text is empty"),
        (b"A", {}, "nothing to score"),
        (b"good \xff bad", {}, "at byte 5: text is not UTF-8"),
        (None, {}, "cannot be read"),
        (b"ROMEO:", {"max_tokens": 1}, "max_tokens"),
        (b"ROMEO:", {"context": 1}, "context"),
        (b"ROMEO:", {"context": -5, "memory": 1 << 30}, "context"),
        (b"ROMEO:", {"context": "8"}, "context"),
        (b"ROMEO:", {"max_tokens": 2.5}, "max_tokens"),
        (b"ROMEO:", {"context": 257}, "context"),
        (b"ROMEO:", {"mode": "guess"}, "unknown mode"),
        (b"ROMEO:", {"memory": 1}, "too little memory"),
        (b"ROMEO:", {"memory": 1, "policy": "window"}, "window"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    content: bytes | None,
    options: dict[str, Any],
    message: str,
    demo_bundle: Path,
    tmp_path: Path,
) -> None:
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(bundlefmt.UsageError, match=message):
        bundlefmt.evaluate(demo_bundle, tmp_path / "text.txt", **options)


def test_the_command_prints_what_the_function_returns(
    demo_bundle: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = ["eval", str(demo_bundle), "--text", str(text), "--max-tokens", "30"]
    assert main([*work, "--mode", "exact", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    report = bundlefmt.evaluate(demo_bundle, text, mode="exact", max_tokens=30)
    assert found["nll"] == report.nll
    assert found["dense"]["mode"] == "dense"
    cached = ["--memory", "1T", "--policy", "window", "--window", "3", "--one-at-a-time"]
    assert main([*work, *cached, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens_at_once"] == 1
    assert main([*work, "--mode", "exact"]) == 0
    assert "same likeliest token 100.00 %" in capsys.readouterr().out


# lm-eval


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """lm-eval, kept from the network, in the folder of its task's data."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.chdir(TASK)
    return pytest.importorskip("lm_eval", reason="lm-eval is not installed: '.[lm-eval]'")


@pytest.fixture
def adapter(harness: Any, demo_bundle: Path) -> Any:
    from bundlefmt.integrations.lm_eval import BundleLM

    return BundleLM(str(demo_bundle), mode="exact")


def request(*args: Any) -> Any:
    from types import SimpleNamespace

    return SimpleNamespace(args=args)


def test_lm_eval_scores_a_local_task(harness: Any, demo_bundle: Path) -> None:
    from lm_eval.tasks import TaskManager

    import bundlefmt.integrations.lm_eval  # noqa: F401 - registers the model

    found = harness.simple_evaluate(
        model="bundlefmt",
        model_args=f"path={demo_bundle},mode=exact",
        tasks=["verona"],
        task_manager=TaskManager(include_path=str(TASK), include_defaults=False),
        bootstrap_iters=0,
    )
    assert found["results"]["verona"]["acc,none"] == 1


def test_the_adapters_likelihoods_are_those_of_the_logits(adapter: Any, demo_bundle: Path) -> None:
    ((found, greedy),) = adapter.loglikelihood([request("ROMEO:", " what light")])
    context, whole = adapter.tok_encode("ROMEO:"), adapter.tok_encode("ROMEO: what light")
    with bundlefmt.load_model(demo_bundle) as model:
        logits = model.logits(whole).astype(np.float64)
    shares = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    at = range(len(context) - 1, len(whole) - 1)
    assert found == pytest.approx(sum(shares[i, whole[i + 1]] for i in at), abs=1e-3)
    assert greedy == all(logits[i].argmax() == whole[i + 1] for i in at)


def test_a_rolling_likelihood_is_that_after_the_first_token_of_all(adapter: Any) -> None:
    (rolling,) = adapter.loglikelihood_rolling([request("ROMEO: what light")])
    ((whole, _),) = adapter.loglikelihood([request("", "ROMEO: what light")])
    assert rolling == pytest.approx(whole)
    (longer,) = adapter.loglikelihood_rolling([request(TEXT)])
    assert longer < whole


def test_generation_for_lm_eval_stops_before_a_stop_sequence(adapter: Any) -> None:
    (free,) = adapter.generate_until([request("ROMEO:", {"max_gen_toks": 24})])
    stop = free[5:8]
    options = {"max_gen_toks": 24, "until": [stop]}
    assert adapter.generate_until([request("ROMEO:", options)]) == [free[: free.index(stop)]]


@pytest.mark.parametrize("name", ["fifo", "/dev/zero", "no\0name", "\ud800", "."])
def test_only_a_regular_file_is_a_text(demo_bundle: Path, tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(bundlefmt.UsageError, match="cannot be read"):
        bundlefmt.evaluate(demo_bundle, os.path.join(tmp_path, name))  # noqa: PTH118

"""A memory limit holds, and changes nothing in what a model says."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import bundlefmt
from bundlefmt.errors import FormatError, UsageError
from bundlefmt.flash.budget import Needs, divide
from bundlefmt.flash.predictor import read_selector, untrained
from bundlefmt.flash.readahead import MOST_WASTED
from bundlefmt.layout.header import Predictor
from bundlefmt.runtime import attention as attention_of
from bundlefmt.runtime import memory as memory_of
from bundlefmt.runtime import scratch
from bundlefmt.runtime.config import decoder_config
from bundlefmt.runtime.generate import Model
from bundlefmt.runtime.memory import POLICIES, Caching, make_caches, needs
from bundlefmt.runtime.memory import least_memory as smallest
from bundlefmt.runtime.selection import Selecting
from bundlefmt.runtime.weights import attention_matrices
from bundlefmt.storage.backends import Batch, Requests
from tests.conftest import FIXTURES, without_sanitizers

PLENTY = 1 << 40
PROMPT = [1, 2, 3, 4, 5]

pytestmark = pytest.mark.usefixtures("steady_process")


def least_memory(path: Path, mode: str = "dense", share: float = 0.3, **options: Any) -> int:
    """The smallest limit that works, to the byte."""
    with bundlefmt.open(path) as file:
        config = decoder_config(file.config, len(file.groups))
        wanted = needs(file, config, Selecting(mode, share), Caching(1, **options))
        return smallest(file, config, wanted)


def cached(path: Path, memory: int, **options: Any) -> Model:
    return bundlefmt.load_model(path, memory=memory, tokens=64, **options)


def text(path: Path, **options: Any) -> list[int]:
    with bundlefmt.load_model(path, **options) as model:
        return model.generate(PROMPT, 24)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mode", ["dense", "exact"])
def test_every_policy_gives_the_same_text(demo_bundle: Path, mode: str, policy: str) -> None:
    window = 2 if policy == "window" else None
    options = {"mode": mode, "tokens": 64, "policy": policy, "window": window}
    some = least_memory(demo_bundle, **options) + (1 << 20)
    expected = text(demo_bundle)
    for memory in (some, PLENTY):
        assert text(demo_bundle, memory=memory, **options) == expected


def test_without_a_cache_of_its_own_reads_go_through_the_operating_systems(
    demo_bundle: Path,
) -> None:
    with cached(demo_bundle, PLENTY, mode="exact", policy="none") as model:
        assert model.reader.backend == "buffered"
        assert all(cache is None for cache in model.caches)
        assert model.budget is not None
        assert model.budget.cache == 0


@pytest.mark.parametrize("resident", [None, "gate", "up"])
def test_parts_in_dram_and_neurons_in_the_cache_meet(tmp_path: Path, resident: str | None) -> None:
    path = tmp_path / "llama.bundle"
    bundlefmt.pack(FIXTURES / "llama", path, resident=resident)
    with bundlefmt.load_model(path) as model:
        expected = model.logits(PROMPT)
    for mode in ("dense", "topk"):
        with cached(path, PLENTY, mode=mode, share=1.0) as model:
            found = step_by_step(model, PROMPT)
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
            assert sum(cache.stats.hits for cache in model.caches if cache) > 0


def step_by_step(model: Model, ids: list[int]) -> Any:
    """The logits of tokens that are fed one at a time."""
    seen = model.decoder.new_cache()
    hidden = [model.decoder.forward([token], seen) for token in ids]
    return model.decoder.logits(np.concatenate(hidden))


def test_a_cache_that_holds_all_reads_each_neuron_once(demo_bundle: Path) -> None:
    with cached(demo_bundle, PLENTY, mode="exact") as model:
        before = model.reader.stats.bundles
        step_by_step(model, PROMPT)
        read = model.reader.stats.bundles - before
        held = sum(cache.neurons.size for cache in model.caches if cache)
        assert read == held > 0
        step_by_step(model, PROMPT)
        assert model.reader.stats.bundles == before + read


def test_a_prompt_leaves_in_the_cache_what_its_last_tokens_used(demo_bundle: Path) -> None:
    prompt = PROMPT * 4  # more than the few tokens that go through the cache
    with cached(demo_bundle, PLENTY, mode="exact") as model:
        model.logits(prompt)
        before = model.reader.stats.bundles
        step_by_step(model, prompt)
        assert model.reader.stats.bundles == before
    memory = least_memory(demo_bundle, mode="exact", tokens=64) + (1 << 19)
    with cached(demo_bundle, memory, mode="exact") as model:
        seen = model.decoder.new_cache()
        model.decoder.forward(prompt, seen)
        held = [set(cache.neurons.tolist()) for cache in model.caches if cache]
        used: list[set[int]] = []
        model.decoder.observe(lambda group, x, a: used.append(set(np.flatnonzero(a[-1]).tolist())))
        model.decoder.forward(prompt, model.decoder.new_cache())
        for last, cache in zip(used, held, strict=True):
            assert last <= cache or not cache - last  # nothing else where not all of it fits


@pytest.fixture(scope="module")
def guessable(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with predictors so small that guesses are worth what they cost."""
    path = Path(shutil.copy(demo_bundle, tmp_path_factory.mktemp("guessable")))
    entries, tensors = [], {}
    with bundlefmt.open(path) as file, file.reader() as reader:
        for group in file.groups:
            inputs = np.random.default_rng(1).standard_normal((512, group.d_model), np.float32)
            found = untrained(read_selector(file, reader, group), inputs, 32, 0.95)
            names = f"a{group.layer}", f"b{group.layer}"
            tensors |= {names[0]: found.a.stored, names[1]: found.b.stored}
            entry = Predictor(group.layer, *names, found.threshold, encoding="q8_0")
            entries.append(entry)
    bundlefmt.append(path, tensors=tensors, predictors=entries)
    return path


def test_reading_ahead_changes_no_token(guessable: Path) -> None:
    memory = least_memory(guessable, mode="predict", tokens=64) + (1 << 19)

    def made(ahead: bool) -> list[int]:
        with cached(guessable, memory, mode="predict", ahead=ahead) as model:
            found = model.generate(PROMPT, 48)
            assert any(cache.stats.ahead for cache in model.caches if cache) == ahead
            return found

    assert made(ahead=True) == made(ahead=False)


def test_what_is_read_ahead_is_mostly_used(guessable: Path) -> None:
    memory = least_memory(guessable, mode="predict", tokens=64) + (1 << 19)
    with cached(guessable, memory, mode="predict") as model:
        model.generate(PROMPT, 48)
        ahead = sum(cache.stats.ahead for cache in model.caches if cache)
        used = sum(cache.stats.ahead_used for cache in model.caches if cache)
        assert used >= (1 - MOST_WASTED) * ahead > 0


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("prompt", [PROMPT[:1], PROMPT, PROMPT * 4], ids=len)
def test_after_a_read_that_failed_the_model_goes_on(
    guessable: Path, tmp_path: Path, ahead: bool, prompt: list[int]
) -> None:
    """Whether the read was begun ahead or not, and whatever pass comes next: once the file is whole
    again, so is the text."""
    path = Path(shutil.copy(guessable, tmp_path))
    whole = path.read_bytes()
    memory = least_memory(path, mode="predict", tokens=64) + (1 << 20)
    with cached(path, memory, mode="predict", ahead=ahead) as model:
        expected = model.generate(prompt, 24)
        (last,) = (cache for cache in model.caches[-1:] if cache)
        assert (last.stats.ahead > 0) == ahead
        tokens = model.tokens([9, 8, 7], 24)
        next(tokens)  # the prompt goes by without reading ahead
        with path.open("r+b") as damaged:
            group = model.file.groups[-1]  # this layer's guesses pay
            damaged.seek(group.bundles.offset)
            damaged.write(bytes(group.bundles.length))
        with pytest.raises(FormatError, match="bundle damaged"):
            list(tokens)
        path.write_bytes(whole)
        assert model.generate(prompt, 24) == expected


def test_a_limit_with_no_room_for_a_cache_still_computes(demo_bundle: Path) -> None:
    memory = least_memory(demo_bundle, mode="exact", tokens=64)
    with cached(demo_bundle, memory + (1 << 16), mode="exact") as model:
        assert model.budget is not None
        assert model.budget.cache < 1 << 20
        assert model.generate(PROMPT, 24) == text(demo_bundle)


@pytest.mark.parametrize("mode", ["dense", "exact", "predict"])
def test_attention_that_does_not_fit_is_streamed(demo_bundle: Path, mode: str) -> None:
    memory = least_memory(demo_bundle, mode=mode, tokens=64)
    expected = text(demo_bundle, mode=mode)
    with cached(demo_bundle, memory, mode=mode) as model:
        assert model.budget is not None
        assert len(model.budget.streamed) == len(model.caches)
        assert model.generate(PROMPT, 24) == expected
    with cached(demo_bundle, memory + (1 << 20), mode=mode) as model:
        assert model.budget is not None
        assert not model.budget.streamed
        assert model.generate(PROMPT, 24) == expected


def test_streamed_attention_is_counted(demo_bundle: Path) -> None:
    with cached(demo_bundle, least_memory(demo_bundle, tokens=64)) as model:
        config = decoder_config(model.file.config, len(model.file.groups))
        attention = sum(
            matrix.data.length
            for layer in range(len(config.layers))
            for matrix in attention_matrices(model.file, config, layer)
        )
        cache = model.decoder.new_cache()
        model.decoder.forward([1], cache)
        before = replace(model.reader.stats)
        model.decoder.forward([2], cache)
        found = model.reader.stats.since(before)
        bundles = found.bundles * model.file.groups[0].stride
        assert found.bytes_read >= found.bytes_asked == bundles + attention
        assert found.busy_seconds > 0


@pytest.mark.parametrize("read", range(8))
def test_interrupted_reads_of_attention_are_begun_again(
    read: int, demo_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = least_memory(demo_bundle, tokens=64)
    with cached(demo_bundle, memory) as model, bundlefmt.load_model(demo_bundle) as whole:
        assert model.decoder._rotation is not None
        backend = model.decoder._rotation._backend
        submit_all, begun = backend.submit, itertools.count()

        def submit(requests: Requests) -> Batch:
            if next(begun) == read:
                raise KeyboardInterrupt
            return submit_all(requests)

        monkeypatch.setattr(backend, "submit", submit)
        with pytest.raises(KeyboardInterrupt):
            model.logits([1])
        np.testing.assert_allclose(model.logits([2]), whole.logits([2]), rtol=1e-4, atol=1e-4)


def test_damage_to_streamed_attention_is_found(demo_bundle: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(demo_bundle, tmp_path))
    memory = least_memory(path, tokens=64)
    with bundlefmt.open(path) as file:
        (name,) = (name for name in file.tensor_names if name.endswith("1.self_attn.q_proj.weight"))
        offset = file.tensor_entry(name).data.offset
    with cached(path, memory) as model:
        assert model.generate(PROMPT, 2)
        with path.open("r+b") as damaged:
            damaged.seek(offset)
            byte = damaged.read(1)[0]
            damaged.seek(offset)
            damaged.write(bytes([byte ^ 1]))
        with pytest.raises(FormatError, match=rf"{re.escape(name)}.*damaged"):
            model.generate(PROMPT, 2)


def test_topk_of_all_neurons_is_dense_and_of_some_reads_less(small_bundle: Path) -> None:
    with bundlefmt.load_model(small_bundle) as model:
        expected = model.logits(PROMPT)
    with bundlefmt.load_model(small_bundle, mode="topk", share=1.0) as model:
        np.testing.assert_allclose(model.logits(PROMPT), expected, rtol=1e-4, atol=1e-5)
    with bundlefmt.load_model(small_bundle, mode="topk", share=0.25) as model:
        neurons = model.file.groups[0].neurons
        before = model.reader.stats.bundles
        model.logits([1])
        assert model.reader.stats.bundles - before == 2 * round(neurons / 4)


def test_predict_is_refused_for_an_activation_without_zeros(small_bundle: Path) -> None:
    with pytest.raises(UsageError, match=r"layer 0.*exact zeros"):
        bundlefmt.load_model(small_bundle, mode="predict")


def test_predictors_that_need_no_training_find_most_of_what_is_active(demo_bundle: Path) -> None:
    """Where the file has none, mode predict makes them of the weights and drawn inputs alone."""
    with bundlefmt.load_model(demo_bundle) as model:
        dense = model.logits(PROMPT)
    with bundlefmt.load_model(demo_bundle, mode="predict") as model:
        before = model.reader.stats.bundles
        found = step_by_step(model, PROMPT)
        read = model.reader.stats.bundles - before
        neurons = sum(group.neurons for group in model.file.groups)
    assert read < 0.5 * neurons * len(PROMPT)
    off = np.linalg.norm(found - dense) / np.linalg.norm(dense)
    assert off < 0.1


def with_random_predictors(path: Path) -> None:
    """Predictors that name half of the neurons for a token, and others for another."""
    random = np.random.default_rng(5)
    with bundlefmt.open(path) as file:
        groups = file.groups
    entries, tensors = [], {}
    for group in groups:
        names = f"a{group.layer}", f"b{group.layer}"
        tensors[names[0]] = random.standard_normal((8, group.d_model)).astype(np.float32)
        tensors[names[1]] = random.standard_normal((group.neurons, 8)).astype(np.float32)
        entries.append(Predictor(group.layer, *names, threshold=0.5))
    bundlefmt.append(path, tensors=tensors, predictors=entries)


@pytest.mark.parametrize("memory", [None, "some", PLENTY])
@pytest.mark.parametrize(
    ("case", "resident"), [("opt", None), ("llama-fatrelu", None), ("llama-fatrelu", "gate")]
)
def test_each_of_a_few_tokens_gets_the_neurons_predicted_for_it_alone(
    case: str, resident: str | None, memory: Any, tmp_path: Path
) -> None:
    path = tmp_path / "model.bundle"
    bundlefmt.pack(FIXTURES / case, path, resident=resident)
    with_random_predictors(path)
    options: dict[str, Any] = {"mode": "predict", "tokens": 64}
    if memory == "some":
        memory = least_memory(path, **options) + (1 << 14)
    with bundlefmt.load_model(path, memory=memory, **options) as model:
        apart = step_by_step(model, PROMPT)
        before = model.reader.stats.bundles
        np.testing.assert_allclose(model.logits(PROMPT), apart, rtol=1e-3, atol=1e-5)
        groups = model.file.groups
        assert model.reader.stats.bundles - before < sum(group.neurons for group in groups)
    with bundlefmt.load_model(path) as model:
        assert np.abs(model.logits(PROMPT) - apart).max() > 1e-3


@pytest.mark.parametrize("memory", [None, PLENTY])
def test_predict_reads_and_computes_what_the_predictors_name(
    demo_bundle: Path, tmp_path: Path, memory: int | None
) -> None:
    """Predictors of zeros name nothing at a threshold of a half, and all below it."""
    path = Path(shutil.copy(demo_bundle, tmp_path))
    with bundlefmt.open(path) as file:
        groups = file.groups
    entries, tensors = [], {}
    for group in groups:
        a = np.zeros((1, group.d_model), dtype=np.float32)
        b = np.zeros((group.neurons, 1), dtype=np.float32)
        names = f"a{group.layer}", f"b{group.layer}"
        tensors |= dict(zip(names, (a, b), strict=True))
        entries.append(Predictor(group.layer, *names, threshold=0.5))
    bundlefmt.append(path, tensors=tensors, predictors=entries)
    with bundlefmt.load_model(path, mode="predict", memory=memory, tokens=64) as model:
        before = model.reader.stats.bundles
        step_by_step(model, [1])
        assert model.reader.stats.bundles == before  # sigmoid(0) is not above 0.5

    always = [msgspec.structs.replace(entry, threshold=0.25) for entry in entries]
    bundlefmt.append(path, predictors=always)
    with bundlefmt.load_model(path) as model:
        expected = model.logits(PROMPT)
    with bundlefmt.load_model(path, mode="predict", memory=memory, tokens=64) as model:
        np.testing.assert_allclose(step_by_step(model, PROMPT), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("share", [0, -1, 1.5, float("nan")])
def test_a_share_that_cannot_be_is_refused(small_bundle: Path, share: float) -> None:
    with pytest.raises(UsageError, match="share"):
        bundlefmt.load_model(small_bundle, mode="topk", share=share)


def test_a_longer_text_than_was_divided_for_is_refused(demo_bundle: Path) -> None:
    with (
        bundlefmt.load_model(demo_bundle, memory=PLENTY, tokens=8) as model,
        pytest.raises(UsageError, match="at most 8"),
    ):
        model.generate(PROMPT, 5)


def test_what_is_left_of_a_limit_goes_to_the_groups_by_their_bytes(demo_bundle: Path) -> None:
    with bundlefmt.open(demo_bundle) as file:
        groups = file.groups
    all_bytes = sum(group.bundles.length for group in groups)
    limit = 1 << 30
    slack = divide(limit, Needs(0, 0, 0, 0, 0), []).slack
    for left in (0, all_bytes // 3, all_bytes, 2 * all_bytes):
        budget = divide(limit, Needs(1, 2, 3, 4, limit - slack - left - 10), groups)
        assert budget.cache <= left
        assert budget.needs.total + budget.slack + budget.cache <= budget.limit
        for slots, group in zip(budget.slots, groups, strict=True):
            afforded = min(left / all_bytes, 1)
            assert 0.98 * group.neurons * afforded - 1 <= slots <= group.neurons * afforded


def test_groups_of_one_stride_share_their_slots(demo_bundle: Path) -> None:
    with bundlefmt.open(demo_bundle) as file:
        groups = list(file.groups)
    groups[1] = msgspec.structs.replace(groups[1], stride=2 * groups[1].stride)
    budget = divide(1 << 30, Needs(0, 0, 0, 0, 0), groups)
    found = make_caches(budget, groups, Caching(1 << 30))
    for cache, group in zip(found.groups, groups, strict=True):
        assert cache is not None
        assert cache.rows.shape[1] == group.stride
        alike = [
            slots for slots, g in zip(budget.slots, groups, strict=True) if g.stride == group.stride
        ]
        assert cache.rows.shape[0] == sum(alike)
    first, other = found.groups[0], found.groups[1]
    assert first is not None and other is not None
    assert not np.shares_memory(first.rows, other.rows)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("memory", value) for value in (0, -1, 10**30, 1e9, float("nan"), True, "7GiB", [])),
        *(("tokens", value) for value in (0, -5, 1.5, "x", True, 10**30)),
        *(("reserved", value) for value in (-1, None, 2.0, 10**30)),
        *(("window", value) for value in (0, -1, 2.5, "x")),
        ("policy", "fifo"),
        ("threads", 1.5),
    ],
)
def test_sizes_that_cannot_be_are_refused(demo_bundle: Path, name: str, value: Any) -> None:
    options: dict[str, Any] = {"memory": PLENTY, name: value}
    if name == "window":
        options["policy"] = "window"
    with pytest.raises(UsageError, match=name):
        bundlefmt.load_model(demo_bundle, **options)
    if name != "reserved":
        with pytest.raises(UsageError, match=name):
            bundlefmt.plan(demo_bundle, **options)


@pytest.mark.parametrize("before", [50 << 20, (80 << 20) - 4096, (80 << 20) - (1 << 19), 95 << 20])
def test_the_limit_that_is_named_works_in_a_process_larger_by_some_pages(
    demo_bundle: Path, monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    monkeypatch.setattr(memory_of, "resident_memory", lambda: before)
    with pytest.raises(UsageError, match="too little memory") as refused:
        bundlefmt.load_model(demo_bundle, memory=1)
    (named,) = re.findall(r"--memory (\d+)MiB", str(refused.value))
    monkeypatch.setattr(memory_of, "resident_memory", lambda: before + (1 << 19))
    with bundlefmt.load_model(demo_bundle, memory=int(named) << 20) as model:
        assert model.budget is not None


def test_what_passes_take_is_counted_for_the_queries_that_attention_takes() -> None:
    assert scratch._QUERIES == attention_of._QUERIES


def test_only_streaming_that_spares_memory_is_done(
    demo_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one layer is much larger than the others, room for two of it costs more than they all
    take."""
    rooms = iter([10, 10, 10, 10, 10_000] * 100)
    monkeypatch.setattr(memory_of, "room_for", lambda matrices: next(rooms) << 10)
    least = least_memory(demo_bundle, tokens=64)
    with cached(demo_bundle, least) as model:
        assert model.budget is not None
        assert model.budget.needs.total <= least
        assert model.budget.streamed == (0, 1, 2, 3)


@without_sanitizers("they keep memory of their own")
@pytest.mark.parametrize("mode", ["dense", "predict"])
def test_the_process_keeps_within_the_least_that_is_named(demo_bundle: Path, mode: str) -> None:
    command = [sys.executable, "-P", "-m", "bundlefmt", "run", str(demo_bundle), "--mode", mode]
    command += ["--prompt", "ROMEO: " * 30, "--max-new-tokens", "8", "--json", "--memory"]
    alone = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # quicker beside other tests
    refused = subprocess.run([*command, "1M"], capture_output=True, text=True, env=alone)
    (least,) = re.findall(r"--memory (\d+)MiB", refused.stderr)
    command += [f"{least}MiB"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=alone)
    assert json.loads(done.stdout)["peak_memory"] <= int(least) << 20

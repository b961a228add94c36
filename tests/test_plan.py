"""What `plan` says is what `run` does."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import bundlefmt
from bundlefmt.cli import main
from bundlefmt.errors import FormatError, UsageError
from bundlefmt.flash import profiles
from bundlefmt.flash.budget import least_limit
from bundlefmt.flash.costmodel import VERSION, DeviceProfile, SizeCost
from bundlefmt.flash.traces import Trace
from bundlefmt.layout.header import Predictor
from bundlefmt.planning import Plan, advice
from bundlefmt.reader import ReadStats
from bundlefmt.runtime import generate
from bundlefmt.runtime import memory as memory_of
from bundlefmt.runtime.draft import draft_bytes
from bundlefmt.runtime.text import Tokenizer
from bundlefmt.storage.device import device_identity
from tests.conftest import DEMO, FIXTURES, SHARED, without_sanitizers

PLENTY = 1 << 40
MODEL = SHARED / "data" / "opt-relu-16m"
needs_model = pytest.mark.skipif(not MODEL.is_dir(), reason="the trained model is not there")


@pytest.fixture(autouse=True)
def uncalibrated(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who has calibrated nothing, and a process of the same size each time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(memory_of, "resident_memory", lambda: 100 << 20)


def calibrated(path: Path) -> DeviceProfile:
    """From now on the device under the file has a profile: of round figures."""
    profile = DeviceProfile(
        version=VERSION,
        device=device_identity(path),
        backend="uring",
        in_flight=128,
        sizes=[SizeCost(4096, [1], [1e-4], 1e-6), SizeCost(1 << 20, [1], [1e-3], 1e-6)],
        sequential_bytes_per_second=1e9,
        compute_bytes_per_second=1e10,
    )
    profiles.save(profile)
    return profile


def room_for(path: Path, held: float, **options: Any) -> int:
    """A limit whose cache holds about that share of the FFN."""
    whole = bundlefmt.plan(path, PLENTY, **options)
    least = PLENTY - whole.split["unused"] - whole.split["slack"] - whole.split["cache"]
    return least_limit(least, int(held * whole.ffn_bytes)) + 4096


def least_of(refusal: UsageError) -> int:
    """The smallest limit that works, as the refusal of a smaller one names it."""
    (found,) = re.findall(r"\((\d+) bytes\): --memory", str(refusal))
    return int(found)


def test_a_model_on_a_calibrated_device_reads_small_gaps_along(
    demo_bundle: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copy(demo_bundle, tmp_path))

    def reads() -> ReadStats:
        with bundlefmt.load_model(path, mode="exact") as model:
            before = replace(model.reader.stats)
            model.logits([1])
            return model.reader.stats.since(before)

    apart = reads()
    profile = calibrated(path)
    with bundlefmt.open(path) as file:
        assert profile.break_even_gap(file.groups[0].stride) > 4096
    together = reads()
    assert together.requests < apart.requests
    assert apart.bytes_read < together.bytes_read <= apart.bytes_read + 4096 * apart.requests


@pytest.mark.parametrize("mode", ["dense", "exact", "topk"])
@pytest.mark.parametrize("share", [0.06, 0.5, 1.0])
def test_the_split_is_the_whole_memory_and_what_a_load_makes_of_it(
    demo_bundle: Path, mode: str, share: float
) -> None:
    memory = room_for(demo_bundle, share, mode=mode, tokens=64)
    planned = bundlefmt.plan(demo_bundle, memory, mode=mode, tokens=64)
    assert sum(planned.split.values()) == memory == planned.memory
    assert planned.cached_share == pytest.approx(share, abs=0.02)
    with bundlefmt.load_model(demo_bundle, mode=mode, memory=memory, tokens=64) as model:
        assert model.budget is not None
        assert planned.split["cache"] == model.budget.cache


@pytest.mark.parametrize("memory", [1, 1 << 20, 100 << 20])
def test_too_little_memory_is_refused_as_a_load_refuses_it(demo_bundle: Path, memory: int) -> None:
    said = []
    for refusing in (bundlefmt.plan, bundlefmt.load_model):
        with pytest.raises(UsageError, match=r"at least \d+ MiB") as refused:
            refusing(demo_bundle, memory=memory, mode="exact")
        said.append(str(refused.value))
    assert said[0] == said[1]
    least = least_of(refused.value)
    planned = bundlefmt.plan(demo_bundle, least, mode="exact")
    assert planned.least_memory == least
    assert "a text of 256 tokens" in said[0] and planned.tokens == 256
    with bundlefmt.load_model(demo_bundle, memory=least, mode="exact") as model:
        assert model.budget is not None and model.budget.limit == least
    with pytest.raises(UsageError, match="too little memory"):
        bundlefmt.plan(demo_bundle, least - 2 * memory_of.MIB, mode="exact")


def test_a_text_that_no_run_takes_is_not_planned(demo_bundle: Path) -> None:
    assert bundlefmt.plan(demo_bundle, PLENTY, tokens=256).tokens == 256
    with pytest.raises(UsageError, match=r"tokens: out of range: expected 1\.\.256, found 257"):
        bundlefmt.plan(demo_bundle, PLENTY, tokens=257)


@pytest.mark.parametrize(("then", "now", "saves"), [(0, 65, False), (0, 8192, True)])
def test_less_than_a_page_is_no_saving(then: float, now: float, saves: bool) -> None:
    assert advice._saves(then, now) == saves


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of several families, one with its attention compressed, one with a part resident."""
    folder = tmp_path_factory.mktemp("models")
    made: dict[str, tuple[Path, dict[str, Any]]] = {
        "demo": (DEMO, {"zstd": True}),
        "opt": (FIXTURES / "opt", {}),
        "llama": (FIXTURES / "llama", {"dtype": "q8_0"}),
        "fatrelu": (FIXTURES / "llama-fatrelu", {"resident": "gate"}),
        "phi": (FIXTURES / "phi", {}),
        "falcon": (FIXTURES / "falcon", {}),
    }
    for name, (checkpoint, options) in made.items():
        bundlefmt.pack(checkpoint, folder / f"{name}.bundle", **options)
    return {name: folder / f"{name}.bundle" for name in made}


SPARSE = ("demo", "opt", "fatrelu")
GRID = [
    (model, mode)
    for model in ("demo", "opt", "llama", "fatrelu", "phi", "falcon")
    for mode in ("dense", "topk", *(("exact", "predict") if model in SPARSE else ()))
]


@pytest.mark.parametrize(("model", "mode"), GRID)
def test_plan_and_a_load_divide_every_limit_alike(
    models: dict[str, Path], model: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = SimpleNamespace(exclusive=nullcontext)
    monkeypatch.setattr(generate, "Decoder", lambda *given, **options: nothing)  # to be loaded
    path = models[model]
    for policy, window, tokens, threads in (
        ("lfu", None, 16, 32),
        ("window", 3, 100, 32),
        ("none", None, 64, 64),
    ):
        options: dict[str, Any] = {"mode": mode, "policy": policy, "window": window}
        options |= {"tokens": tokens, "threads": threads}
        planned = bundlefmt.plan(path, PLENTY, **options)
        least = planned.least_memory
        for memory in (least, least + 50_000, least * 11 // 10, least + planned.ffn_bytes, PLENTY):
            planned = bundlefmt.plan(path, memory, **options)
            with bundlefmt.load_model(path, memory=memory, **options) as loaded:
                budget = loaded.budget
            assert budget is not None
            found = {**asdict(budget.needs), "slack": budget.slack, "cache": budget.cache}
            unused = memory - sum(found.values())
            assert planned.split == {**found, "unused": unused} and unused >= 0
            assert planned.streamed == list(budget.streamed)
            assert (planned.tokens, planned.least_memory) == (tokens, least)
        refusals = []
        for refusing in (bundlefmt.plan, bundlefmt.load_model):
            with pytest.raises(UsageError, match="too little memory") as refused:
                refusing(path, memory=1 << 20, **options)
            refusals.append(str(refused.value))
        assert refusals[0] == refusals[1]
        assert least_of(refused.value) == least


@pytest.mark.parametrize(
    "lie",
    [{"max_position_embeddings": 100_000}, {"hidden_size": 64}, {"enable_bias": False}],
    ids=str,
)
def test_what_a_load_refuses_is_not_planned(lie: dict[str, Any], tmp_path: Path) -> None:
    config = json.loads((FIXTURES / "opt" / "config.json").read_text())
    shutil.copytree(FIXTURES / "opt", tmp_path / "opt")
    bundlefmt.pack(tmp_path / "opt", tmp_path / "model.bundle")
    bundlefmt.append(
        tmp_path / "model.bundle", blobs={"config.json": json.dumps(config | lie).encode()}
    )
    said = []
    for refusing in (bundlefmt.plan, bundlefmt.load_model):
        with pytest.raises(FormatError) as refused:
            refusing(tmp_path / "model.bundle", memory=PLENTY)
        said.append(str(refused.value))
    assert said[0] == said[1]


def test_plan_counts_a_draft_as_a_run_does(models: dict[str, Path]) -> None:
    path = models["demo"]
    with bundlefmt.open(path) as file:
        reserved = draft_bytes(path, Tokenizer(file), 64, 32)
        ffn = sum(group.bundles.length for group in file.groups)
    assert reserved > ffn
    planned = bundlefmt.plan(path, PLENTY, tokens=64, draft=path)
    with bundlefmt.load_model(path, memory=PLENTY, tokens=64, reserved=reserved) as loaded:
        assert loaded.budget is not None
        assert planned.split["process"] == loaded.budget.needs.process
    alone = bundlefmt.plan(path, PLENTY, tokens=64)
    assert planned.split["process"] - alone.split["process"] == reserved


@without_sanitizers("they keep memory of their own")
@pytest.mark.parametrize("options", [["--mode", "predict"], ["--draft", "itself"]])
def test_the_commands_name_one_least_memory_and_it_works(
    demo_bundle: Path, options: list[str]
) -> None:
    """Two processes, each measured by itself."""

    def said(command: str, *more: str) -> subprocess.CompletedProcess[str]:
        given = [str(demo_bundle) if option == "itself" else option for option in options]
        line = [sys.executable, "-P", "-m", "bundlefmt", command, str(demo_bundle), *given, *more]
        alone = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # quicker beside other tests
        return subprocess.run(line, capture_output=True, text=True, env=alone)

    prompt = ["--prompt", "ROMEO:", "--max-new-tokens", "8"]
    refused = said("run", *prompt, "--memory", "1M")
    (tokens,) = re.findall(r"a text of (\d+) tokens", refused.stderr)
    planned = said("plan", "--tokens", tokens, "--memory", "1M")
    assert (refused.returncode, planned.returncode) == (2, 2)
    tails = [done.stderr.partition("too little")[2] for done in (refused, planned)]
    assert tails[0] == tails[1]
    (least,) = re.findall(r"--memory (\d+MiB)", refused.stderr)
    done = said("run", *prompt, "--json", "--memory", least)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["peak_memory"] <= int(least.removesuffix("MiB")) << 20


@pytest.mark.parametrize("share", [0.5, 0.7, 0.95])
@pytest.mark.parametrize("mode", ["dense", "topk"])
def test_a_model_that_nearly_fits_is_planned(wide_bundle: Path, mode: str, share: float) -> None:
    """In fewer bits all of its neurons would find room."""
    memory = room_for(wide_bundle, share, tokens=64, mode=mode)
    planned = bundlefmt.plan(wide_bundle, memory, tokens=64, mode=mode)
    (advised,) = [line for line in planned.advice if line.change.startswith("pack")]
    assert advised.bytes_per_token is not None
    assert advised.bytes_per_token < planned.bytes_per_token


@pytest.mark.parametrize("share", [0.0, 0.06, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("mode", ["dense", "exact", "predict", "topk"])
def test_every_advice_does_what_it_says(wide_bundle: Path, mode: str, share: float) -> None:
    options: dict[str, Any] = {"tokens": 64}
    memory = room_for(wide_bundle, share, mode=mode, **options)
    planned = bundlefmt.plan(wide_bundle, memory, mode=mode, **options)
    for line in planned.advice:
        if line.bytes_per_token is None:
            assert line.change.startswith(("trace", "calibrate"))
            continue
        assert line.bytes_per_token < 0.99 * planned.bytes_per_token
        if line.memory is not None:
            assert line.memory > memory
            followed = bundlefmt.plan(wide_bundle, line.memory, mode=mode, **options)
            held = followed.cached_share == 1
            assert held if line.window is None else followed.window == line.window > planned.window
        elif "--mode" in line.change:
            other = re.findall(r"--mode (\w+)", line.change)[0]
            followed = bundlefmt.plan(wide_bundle, memory, mode=other, **options)
        else:
            continue
        assert followed.bytes_per_token == pytest.approx(line.bytes_per_token)


def test_there_is_nothing_to_advise_where_the_operating_system_caches(demo_bundle: Path) -> None:
    planned = bundlefmt.plan(demo_bundle, PLENTY, policy="none", tokens=64)
    assert not [line for line in planned.advice if line.memory is not None]


@pytest.mark.parametrize("share", [0.06, 0.3])
def test_a_traces_misses_are_those_of_a_run_over_the_same_text(
    demo_bundle: Path, demo_traces: Path, share: float
) -> None:
    tokens = Trace(demo_traces).info.tokens
    memory = room_for(demo_bundle, share, mode="exact", tokens=tokens)
    options: dict[str, Any] = {"mode": "exact", "memory": memory, "tokens": tokens}
    planned = bundlefmt.plan(demo_bundle, traces=demo_traces, **options)
    assert planned.activity == "traced"
    with bundlefmt.load_model(demo_bundle, **options) as model:
        assert model.budget is not None and not model.budget.streamed
        ids = Tokenizer(model.file).encode((DEMO / "README.md").read_text())[:tokens]
        seen = model.decoder.new_cache(tokens)
        for token in ids[: tokens // 2]:
            model.decoder.forward([token], seen)
        before = replace(model.reader.stats)
        for token in ids[tokens // 2 :]:
            model.decoder.forward([token], seen)
        read = (model.reader.stats.bundles - before.bundles) / (tokens - tokens // 2)
        requests = (model.reader.stats.requests - before.requests) / (tokens - tokens // 2)
        group = model.file.groups[0]
    known = group.parts[0].length
    assert planned.requests_per_token == pytest.approx(requests, rel=0.2)
    assert planned.bytes_per_token == pytest.approx(read * (group.stride - known), rel=0.07, abs=99)


def test_dense_reads_what_the_cache_does_not_hold(demo_bundle: Path) -> None:
    for share in (0.06, 0.25, 1.0):
        memory = room_for(demo_bundle, share, tokens=64)
        planned = bundlefmt.plan(demo_bundle, memory, tokens=64)
        left = (1 - planned.cached_share) * planned.ffn_bytes
        assert planned.bytes_per_token == pytest.approx(left)
        assert (planned.activity, planned.active_share) == ("every", 1.0)
        assert (planned.requests_per_token == 0) == (share == 1.0)


def test_neurons_that_touch_are_one_request(small_bundle: Path) -> None:
    options: dict[str, Any] = {"mode": "topk", "share": 0.9, "tokens": 64}
    planned = bundlefmt.plan(small_bundle, room_for(small_bundle, 0.0, **options) - 4096, **options)
    assert planned.hit_rate == 0
    with bundlefmt.load_model(small_bundle, mode="topk", share=0.9) as model:
        before = replace(model.reader.stats)
        for token in range(40):
            model.logits([token])
        stats = model.reader.stats
    bundles, requests = stats.bundles - before.bundles, stats.requests - before.requests
    assert requests < bundles / 4
    assert planned.requests_per_token == pytest.approx(requests / 40, rel=0.1)


@pytest.mark.parametrize(
    ("fixture", "tied"), [("opt", True), ("llama", False), ("phi", False), ("persimmon", False)]
)
def test_a_token_takes_all_that_is_resident_but_embeddings(
    tmp_path: Path, fixture: str, tied: bool
) -> None:
    path = tmp_path / "model.bundle"
    bundlefmt.pack(FIXTURES / fixture, path)
    stages = {stage.name: stage.bytes for stage in bundlefmt.plan(path, PLENTY).stages}
    unused = ("embed_positions.weight", *(() if tied else ("embed_tokens.weight",)))
    with bundlefmt.open(path) as file:
        tensors = {name: file.tensor(name).nbytes for name in file.tensor_names}
    used = [nbytes for name, nbytes in tensors.items() if not name.endswith(unused)]
    assert stages["attention and head"] == sum(used) < sum(tensors.values())


def test_attention_that_does_not_fit_is_planned_to_be_streamed(demo_bundle: Path) -> None:
    profile = calibrated(demo_bundle)
    memory = room_for(demo_bundle, 0.0, mode="exact", tokens=64)
    planned = bundlefmt.plan(demo_bundle, memory, mode="exact", tokens=64)
    with bundlefmt.load_model(demo_bundle, mode="exact", memory=memory, tokens=64) as model:
        assert model.budget is not None
        assert planned.streamed == list(model.budget.streamed) != []
        names = [name for name in model.file.tensor_names if "self_attn" in name]
        matrices = [name for name in names if len(model.file.tensor_entry(name).shape) == 2]
        every = sum(model.file.tensor(name).nbytes for name in matrices)
    stages = {stage.name: stage for stage in planned.stages}
    streaming, reading = stages["reading attention"], stages["reading neurons"]
    assert streaming.bytes == pytest.approx(every * len(planned.streamed) / 5)
    expected = 1e3 * streaming.bytes / profile.sequential_bytes_per_second
    assert streaming.milliseconds == pytest.approx(expected)
    assert planned.bytes_per_token == pytest.approx(streaming.bytes + reading.bytes)
    plenty = bundlefmt.plan(demo_bundle, PLENTY, mode="exact", tokens=64)
    assert plenty.streamed == []


def test_without_a_trace_the_papers_shares_are_assumed_and_said(demo_bundle: Path) -> None:
    planned = bundlefmt.plan(demo_bundle, PLENTY, mode="exact")
    assert (planned.activity, planned.active_share) == ("assumed", pytest.approx(0.03))
    assert "paper" in planned.activity_from
    topk = bundlefmt.plan(demo_bundle, PLENTY, mode="topk", share=0.2)
    assert (topk.activity, topk.active_share) == ("assumed", pytest.approx(0.2))


def test_without_a_profile_there_are_bytes_and_no_times(demo_bundle: Path) -> None:
    planned = bundlefmt.plan(demo_bundle, PLENTY, mode="exact")
    assert planned.milliseconds_per_token is None
    assert planned.untimed is not None
    assert {stage.milliseconds for stage in planned.stages} == {None}
    assert any(line.change.startswith("calibrate") for line in planned.advice)


def test_a_damaged_profile_is_said_and_the_rest_is_planned(demo_bundle: Path) -> None:
    calibrated(demo_bundle)
    profiles.profile_path(device_identity(demo_bundle)).write_text("{")
    planned = bundlefmt.plan(demo_bundle, PLENTY, mode="exact")
    assert planned.milliseconds_per_token is None
    assert planned.untimed is not None and "bundlefmt calibrate makes a new one" in planned.untimed


def test_times_are_those_of_the_profile(demo_bundle: Path) -> None:
    profile = calibrated(demo_bundle)
    memory = room_for(demo_bundle, 0.1, mode="exact")
    planned = bundlefmt.plan(demo_bundle, memory, mode="exact")
    stages = {stage.name: stage for stage in planned.stages}
    for name, stage in stages.items():
        if name != "reading neurons":
            expected = stage.bytes / profile.compute_bytes_per_second
            assert stage.milliseconds == pytest.approx(1e3 * expected)
    reading = stages["reading neurons"]
    # Every request is smaller than the smallest that was measured.
    assert reading.milliseconds == pytest.approx(1e3 * reading.requests * 1e-4)
    assert planned.milliseconds_per_token is not None
    whole = sum(stage.milliseconds or 0 for stage in planned.stages)
    assert reading.milliseconds < planned.milliseconds_per_token < whole
    assert planned.untimed is None


def test_more_memory_reads_less_and_affords_a_longer_window(
    demo_bundle: Path, demo_traces: Path
) -> None:
    calibrated(demo_bundle)
    options: dict[str, Any] = {"mode": "exact", "tokens": 64, "traces": demo_traces}
    plans = [
        bundlefmt.plan(
            demo_bundle, room_for(demo_bundle, share, mode="exact", tokens=64), **options
        )
        for share in (0.06, 0.1, 0.2, 0.4, 0.8, 1.0)
    ]
    for less, more in itertools.pairwise(plans):
        assert more.bytes_per_token <= less.bytes_per_token
        assert more.hit_rate >= less.hit_rate
        assert more.window >= less.window
    assert [line for line in plans[-1].advice if line.bytes_per_token is not None] == []


@pytest.mark.parametrize("share", [0.0, 0.06, 0.2])
def test_the_memory_advised_does_what_is_promised(
    demo_bundle: Path, demo_traces: Path, share: float
) -> None:
    options: dict[str, Any] = {"mode": "exact", "tokens": 64, "traces": demo_traces}
    memory = room_for(demo_bundle, share, mode="exact", tokens=64)
    planned = bundlefmt.plan(demo_bundle, memory, **options)
    (advised,) = [line for line in planned.advice if line.change == "more memory"]
    assert advised.memory is not None and advised.memory > memory
    followed = bundlefmt.plan(demo_bundle, advised.memory, **options)
    assert advised.bytes_per_token is not None
    if planned.streamed:  # the memory for two layers becomes free
        assert followed.bytes_per_token <= advised.bytes_per_token
    else:
        assert followed.bytes_per_token == pytest.approx(advised.bytes_per_token, rel=0.03)
    if advised.window is None:
        assert followed.cached_share == 1
    else:
        assert followed.window >= advised.window > planned.window


def test_fewer_bits_are_advised_where_bundles_become_smaller(demo_bundle: Path) -> None:
    memory = room_for(demo_bundle, 0.1, tokens=64)
    planned = bundlefmt.plan(demo_bundle, memory, tokens=64)  # of 512 bytes: 272 take a sector too
    assert not [line for line in planned.advice if line.change.startswith("pack")]


@needs_model
def test_fewer_bits_do_at_least_what_is_promised(tmp_path: Path) -> None:
    path, fewer = tmp_path / "opt.bundle", tmp_path / "fewer.bundle"
    bundlefmt.pack(MODEL, path)
    bundlefmt.pack(MODEL, fewer, dtype="q8_0")
    memory = room_for(path, 0.3, tokens=64)
    planned = bundlefmt.plan(path, memory, tokens=64)
    (advised,) = [line for line in planned.advice if line.change == "pack --dtype q8_0"]
    followed = bundlefmt.plan(fewer, memory, tokens=64)
    assert advised.bytes_per_token is not None
    # Smaller bundles need smaller buffers, which the advice leaves out.
    assert followed.bytes_per_token <= 1.02 * advised.bytes_per_token < planned.bytes_per_token


def test_a_mode_that_the_model_cannot_run_in_is_refused(
    demo_bundle: Path, small_bundle: Path, demo_traces: Path
) -> None:
    with pytest.raises(UsageError, match="exact zeros"):
        bundlefmt.plan(small_bundle, PLENTY, mode="exact")
    with pytest.raises(UsageError, match=r"layer 0.*not trained"):
        bundlefmt.plan(demo_bundle, PLENTY, mode="predict", traces=demo_traces)
    with pytest.raises(UsageError, match="says nothing of this mode"):
        bundlefmt.plan(demo_bundle, PLENTY, traces=demo_traces)


def test_a_trace_of_another_model_is_refused(demo_traces: Path, tmp_path: Path) -> None:
    bundlefmt.pack(FIXTURES / "opt", tmp_path / "opt.bundle")
    with pytest.raises(UsageError, match="another model"):
        bundlefmt.plan(tmp_path / "opt.bundle", PLENTY, mode="exact", traces=demo_traces)


def test_predictors_are_asked_for_what_the_trace_saw(
    demo_bundle: Path, demo_traces: Path, tmp_path: Path
) -> None:
    """Predictors of zeros name all neurons below a threshold of a half, and none above it."""
    path = Path(shutil.copy(demo_bundle, tmp_path))
    with bundlefmt.open(path) as file:
        groups = file.groups
    entries, tensors = [], {}
    for group in groups:
        names = f"a{group.layer}", f"b{group.layer}"
        tensors[names[0]] = np.zeros((1, group.d_model), dtype=np.float32)
        tensors[names[1]] = np.zeros((group.neurons, 1), dtype=np.float32)
        threshold = 0.25 if group.layer == 0 else 0.75
        entries.append(Predictor(group.layer, *names, threshold=threshold))
    bundlefmt.append(path, tensors=tensors, predictors=entries)
    planned = bundlefmt.plan(path, PLENTY, mode="predict", traces=demo_traces)
    assert planned.active_share == pytest.approx(groups[0].neurons / 5120)
    stages = {stage.name: stage.bytes for stage in planned.stages}
    assert stages["choosing neurons"] == sum(array.nbytes for array in tensors.values())
    without = bundlefmt.plan(demo_bundle, PLENTY).stages
    assert stages["attention and head"] in {stage.bytes for stage in without}


def test_json_holds_the_whole_plan(
    demo_bundle: Path, demo_traces: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calibrated(demo_bundle)
    args = ["plan", str(demo_bundle), "--memory", "1GiB", "--mode", "exact"]
    assert main([*args, "--traces", str(demo_traces), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == set(Plan.__dataclass_fields__)
    assert found["activity"] == "traced"
    assert all(stage["milliseconds"] >= 0 for stage in found["stages"])


@needs_model
def test_a_trained_model_is_planned_on_a_trace(tmp_path: Path) -> None:
    path, traces = tmp_path / "opt.bundle", tmp_path / "opt.traces"
    bundlefmt.pack(MODEL, path)
    bundlefmt.trace(path, SHARED / "data" / "peps-heldout.txt", traces, max_tokens=1000)
    calibrated(path)
    options: dict[str, Any] = {"mode": "exact", "tokens": 256}
    memory = room_for(path, 0.3, **options)
    planned = bundlefmt.plan(path, memory, traces=traces, **options)
    assert 0.03 < planned.active_share < 0.10
    assert 0.5 < planned.hit_rate < 1
    assert planned.window > 2
    assert planned.bytes_per_token < 0.05 * planned.ffn_bytes

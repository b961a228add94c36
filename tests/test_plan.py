"""What `plan` says is what `run` does."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bundlefmt
from bundlefmt.cli import main
from bundlefmt.errors import UsageError
from bundlefmt.flash import profiles
from bundlefmt.flash.budget import least_limit
from bundlefmt.flash.costmodel import VERSION, DeviceProfile, SizeCost
from bundlefmt.flash.traces import Trace
from bundlefmt.layout.header import Predictor
from bundlefmt.planning import Plan
from bundlefmt.reader import ReadStats
from bundlefmt.runtime import memory as memory_of
from bundlefmt.runtime.text import Tokenizer
from bundlefmt.storage.device import device_identity
from tests.conftest import DEMO, FIXTURES, SHARED

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
    assert bundlefmt.plan(demo_bundle, least, mode="exact").cached_share == 0


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
    with pytest.raises(UsageError) as refused:
        bundlefmt.plan(small_bundle, 1, **options)
    planned = bundlefmt.plan(small_bundle, least_of(refused.value), **options)
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


@pytest.mark.parametrize("share", [0.0, 0.06, 0.2, 0.9])
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
def test_fewer_bits_do_what_is_promised(tmp_path: Path) -> None:
    path, fewer = tmp_path / "opt.bundle", tmp_path / "fewer.bundle"
    bundlefmt.pack(MODEL, path)
    bundlefmt.pack(MODEL, fewer, dtype="q8_0")
    memory = room_for(path, 0.3, tokens=64)
    planned = bundlefmt.plan(path, memory, tokens=64)
    (advised,) = [line for line in planned.advice if line.change == "pack --dtype q8_0"]
    followed = bundlefmt.plan(fewer, memory, tokens=64)
    assert followed.bytes_per_token < 0.6 * planned.bytes_per_token
    assert followed.bytes_per_token == pytest.approx(advised.bytes_per_token, rel=0.02)


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

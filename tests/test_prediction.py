"""Traces say what was active; predictors find it; the file is whole whatever happens."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmap_ninja import RaggedMmap
from numpy.typing import NDArray
from safetensors.numpy import load_file

import bundlefmt
from bundlefmt.errors import FormatError, UsageError
from bundlefmt.flash import predictor as predictors
from bundlefmt.flash.predictor import (
    Predictor,
    Selector,
    as_stored,
    calibrated,
    quality,
    untrained,
)
from bundlefmt.flash.traces import LayerTrace, Trace, new_trace
from bundlefmt.layout.header import Group
from tests.conftest import FIXTURES, ROOT

TEXT = ROOT / "spec" / "bundle-v1.md"
TOKENS = 2000

needs_torch = pytest.mark.skipif(
    find_spec("torch") is None, reason="needs PyTorch: pip install '.[train]'"
)


@dataclass
class Pass:
    """One layer's pass, as an observer is told of it."""

    group: Group
    x: NDArray[np.float32]
    activations: NDArray[np.float32]


def observed(path: Path, ids: list[int], mode: str) -> tuple[list[Pass], NDArray[np.float32]]:
    """What an observer is told of a run, and the run's logits."""
    passes: list[Pass] = []
    with bundlefmt.load_model(path, mode=mode) as model:
        model.decoder.observe(lambda *told: passes.append(Pass(*told)))
        return passes, model.logits(ids)


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("opt") / "opt.bundle"
    bundlefmt.pack(FIXTURES / "opt", path)
    return path


@pytest.fixture(scope="module")
def demo_trace(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "demo.traces"
    bundlefmt.trace(demo_bundle, TEXT, path, max_tokens=TOKENS)
    return path


@pytest.fixture(scope="module")
def short_trace(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("short") / "demo.traces"
    bundlefmt.trace(demo_bundle, TEXT, path, max_tokens=200)
    return path


@pytest.fixture
def demo(demo_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the demo model's bundle file, to be changed."""
    return Path(shutil.copy(demo_bundle, tmp_path / "demo.bundle"))


def selector_of(path: Path, layer: int) -> Selector:
    with bundlefmt.open(path) as file, file.reader() as reader:
        return predictors.read_selector(file, reader, file.group(layer))


def everything(trace: LayerTrace) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """A layer's inputs and what was active, of all tokens."""
    return trace.inputs.astype(np.float32), trace.active(np.arange(trace.inputs.shape[0]))


# Observers

IDS = list(range(4, 68))


@pytest.mark.parametrize("mode", ["dense", "exact"])
def test_an_observer_is_told_the_activations_of_every_layer(mode: str, opt: Path) -> None:
    passes, _ = observed(opt, IDS, mode)
    assert [told.group.layer for told in passes] == [0, 1, 2]
    weights = load_file(FIXTURES / "opt" / "model.safetensors")
    for told in passes:
        (stem,) = (n[:-6] for n in weights if n.endswith(f"layers.{told.group.layer}.fc1.weight"))
        by_hand = told.x @ weights[f"{stem}weight"].T + weights[f"{stem}bias"]
        np.testing.assert_allclose(told.activations, np.maximum(by_hand, 0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["dense", "exact"])
def test_an_observed_run_gives_the_same_logits(mode: str, opt: Path) -> None:
    with bundlefmt.load_model(opt, mode=mode) as model:
        np.testing.assert_allclose(observed(opt, IDS, mode)[1], model.logits(IDS), atol=1e-5)


def test_a_gated_layer_is_observed_by_its_gate(tmp_path: Path) -> None:
    path = tmp_path / "llama.bundle"
    bundlefmt.pack(FIXTURES / "llama3-rope", path)  # a ReLU Llama
    weights = load_file(FIXTURES / "llama3-rope" / "model.safetensors")
    for told in observed(path, IDS, "dense")[0]:
        gate = f"model.layers.{told.group.layer}.mlp.gate_proj"
        by_hand = told.x @ weights[f"{gate}.weight"].T + weights[f"{gate}.bias"]
        np.testing.assert_allclose(told.activations, np.maximum(by_hand, 0), rtol=1e-4, atol=1e-5)


# Traces


def test_a_trace_names_the_neurons_whose_activation_is_not_zero(opt: Path, tmp_path: Path) -> None:
    passes, _ = observed(opt, IDS, "dense")
    with (
        bundlefmt.load_model(opt) as model,
        new_trace(tmp_path / "x", model.file.superblock.file_id, model.file.groups) as writer,
    ):
        model.decoder.observe(writer.record)
        model.logits(IDS)
        writer.finish()
    trace = Trace(tmp_path / "x")
    assert trace.info.tokens == len(IDS)
    for index, told in enumerate(passes):
        layer = trace.layer(index)
        inputs, active = everything(layer)
        np.testing.assert_array_equal(active, told.activations != 0)
        np.testing.assert_allclose(inputs, told.x, rtol=1e-3, atol=1e-6)
        ragged = RaggedMmap(tmp_path / "x" / f"layer-{index}" / "active")
        for token, row in enumerate(told.activations):
            np.testing.assert_array_equal(ragged[token], np.flatnonzero(row))


def test_exact_reads_the_neurons_that_a_trace_names(demo_bundle: Path, demo_trace: Path) -> None:
    trace = Trace(demo_trace)
    window = np.arange(64)
    named = sum(
        int(trace.layer(index).active(window).any(axis=0).sum())
        for index in range(len(trace.info.layers))
    )
    from bundlefmt.runtime.text import Tokenizer

    with bundlefmt.load_model(demo_bundle, mode="exact") as model:
        ids = Tokenizer(model.file).encode(TEXT.read_text())[: window.size]
        before = model.reader.stats.bundles
        model.logits(ids)
        read = model.reader.stats.bundles - before
    assert abs(read - named) <= named // 1000  # sums in another order end just above or below zero


def test_a_trace_reports_the_share_that_was_active(demo_bundle: Path, tmp_path: Path) -> None:
    report = bundlefmt.trace(demo_bundle, TEXT, tmp_path / "x", max_tokens=700)
    assert report.tokens == 700
    trace = Trace(report.path)
    for index, layer in enumerate(report.layers):
        _, active = everything(trace.layer(index))
        assert active.shape == (700, layer.neurons)
        assert layer.active_share == pytest.approx(active.mean())
    assert 0 < report.layers[1].active_share < report.layers[0].active_share < 0.3


@pytest.mark.parametrize("silent", [0, 3, 6])
def test_tokens_without_active_neurons_are_rows_without_numbers(
    silent: int, opt: Path, tmp_path: Path
) -> None:
    with bundlefmt.open(opt) as file:
        groups = file.groups[:1]
    random = np.random.default_rng(1)
    activations = random.standard_normal((6, 72)).clip(0).astype(np.float32)
    activations[:silent] = 0
    x = random.standard_normal((6, 32)).astype(np.float32)
    with new_trace(tmp_path / "x", bytes(16), groups) as writer:
        for token in range(6):
            writer.record(groups[0], x[token : token + 1], activations[token : token + 1])
        writer.finish()
    inputs, active = everything(Trace(tmp_path / "x").layer(0))
    np.testing.assert_array_equal(active, activations != 0)
    np.testing.assert_array_equal(inputs, x.astype(np.float16).astype(np.float32))


def test_tokens_come_in_the_order_that_was_asked_for(demo_trace: Path) -> None:
    layer = Trace(demo_trace).layer(0)
    _, active = everything(layer)
    chosen = np.random.default_rng(1).permutation(TOKENS)[:500]
    np.testing.assert_array_equal(layer.active(chosen), active[chosen])


def test_an_interrupted_trace_leaves_nothing(demo_bundle: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done:
            assert len(list(tmp_path.iterdir())) == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bundlefmt.trace(demo_bundle, TEXT, tmp_path / "x", max_tokens=600, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_trace_left_is_removed_by_the_next(demo_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / ".x.123-00000000.partial" / "layer-0").mkdir(parents=True)
    bundlefmt.trace(demo_bundle, TEXT, tmp_path / "x", max_tokens=1)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_trace_is_not_written_over(demo_bundle: Path, demo_trace: Path) -> None:
    before = (demo_trace / "trace.json").read_bytes()
    with pytest.raises(UsageError, match="already there"):
        bundlefmt.trace(demo_bundle, TEXT, demo_trace, max_tokens=1)
    assert (demo_trace / "trace.json").read_bytes() == before


def test_a_model_without_exact_zeros_is_not_traced(small_bundle: Path, tmp_path: Path) -> None:
    with (
        bundlefmt.open(small_bundle) as file,
        pytest.raises(UsageError, match=r"no neuron is inactive.*silu"),
        new_trace(tmp_path / "x", bytes(16), file.groups),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def cut_inputs(folder: Path) -> None:
    (folder / "layer-0" / "inputs" / "data.ninja").write_bytes(b"\0" * 64)


def cut_ids(folder: Path) -> None:
    (folder / "layer-0" / "active" / "data.ninja").write_bytes(b"\0" * 64)


def ids_past_the_end(folder: Path) -> None:
    path = folder / "layer-0" / "active" / "data.ninja"
    path.write_bytes(b"\xff" * path.stat().st_size)


def no_ids(folder: Path) -> None:
    shutil.rmtree(folder / "layer-0" / "active")


def more_tokens(folder: Path) -> None:
    info = json.loads((folder / "trace.json").read_text())
    (folder / "trace.json").write_text(json.dumps(info | {"tokens": TOKENS + 1}))


def no_json(folder: Path) -> None:
    (folder / "trace.json").write_text("{")


def another_version(folder: Path) -> None:
    info = json.loads((folder / "trace.json").read_text())
    (folder / "trace.json").write_text(json.dumps(info | {"version": 2}))


@pytest.mark.parametrize(
    "damage",
    [cut_inputs, cut_ids, ids_past_the_end, no_ids, more_tokens, no_json, another_version],
)
def test_a_damaged_trace_is_refused(
    damage: Callable[[Path], None], demo_trace: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(demo_trace, tmp_path / "x"))
    damage(folder)
    with pytest.raises(FormatError):
        Trace(folder).layer(0)


# Predictors


def random_predictor(
    threshold: float, rank: int = 3, d_model: int = 8
) -> tuple[Predictor, NDArray[np.float32]]:
    random = np.random.default_rng(1)
    a, b, x = (
        random.standard_normal(shape, dtype=np.float32)
        for shape in ((rank, d_model), (20, rank), (5, d_model))
    )
    return replace(as_stored(a, b), threshold=threshold), x


@pytest.mark.parametrize("threshold", [0.0, 1e-9, 0.25, 0.5, 0.875, 1.0])
@pytest.mark.parametrize(
    ("encoding", "rank", "d_model"), [("f16", 3, 8), ("f16", 32, 40), ("q8_0", 32, 64)]
)
def test_a_prediction_is_the_formula_of_the_specification(
    encoding: str, rank: int, d_model: int, threshold: float
) -> None:
    predictor, x = random_predictor(threshold, rank, d_model)
    assert predictor.a.encoding == predictor.b.encoding == encoding
    a, b = (matrix.astype(float) for matrix in predictor.matrices())
    scores = b @ (a @ x.astype(float).T)
    expected = (1 / (1 + np.exp(-scores)) > threshold).T
    np.testing.assert_array_equal(predictor.predicted(x), expected)
    np.testing.assert_array_equal(predictor.active(x), np.flatnonzero(expected.any(axis=0)))
    np.testing.assert_array_equal(predictor.active(x[:1]), np.flatnonzero(expected[0]))


@pytest.mark.parametrize("recall", [0.5, 0.9, 0.99, 1.0])
def test_a_calibrated_threshold_finds_the_wanted_share_and_hardly_more(recall: float) -> None:
    random = np.random.default_rng(2)
    predictor, _ = random_predictor(0.5)
    x = random.standard_normal((400, 8)).astype(np.float32)
    active = predictor.scores(x) + random.standard_normal((400, 20)) > 1
    found = quality(calibrated(predictor, [(x, active)], recall), [(x, active)])
    assert recall <= found.recall <= recall + 0.01


def test_where_nothing_is_active_nothing_is_predicted() -> None:
    predictor, x = random_predictor(0.5)
    silent = [(x, np.zeros((5, 20), dtype=np.bool_))]
    silenced = calibrated(predictor, silent, 0.95)
    assert quality(silenced, silent) == (0, 0, 0, 100)
    assert quality(silenced, silent).recall == quality(silenced, silent).precision == 1


@pytest.mark.parametrize("layer", range(5))
def test_an_untrained_predictor_finds_what_the_trace_names(
    layer: int, demo_bundle: Path, demo_trace: Path
) -> None:
    inputs, active = everything(Trace(demo_trace).layer(layer))
    selector = selector_of(demo_bundle, layer)
    ratios = []
    for rank in (8, 32, 128):
        predictor = untrained(selector, inputs[::2], rank, 0.95)
        assert [matrix.shape for matrix in predictor.matrices()] == [(rank, 128), (1024, rank)]
        found = quality(predictor, [(inputs[1::2], active[1::2])])
        assert found.recall >= 0.9
        ratios.append(found.predicted / found.active)
    assert ratios[0] > ratios[1] > 0.98 * ratios[2]
    assert ratios[2] < 1.1


def test_an_untrained_predictor_needs_no_more_inputs_than_there_are(demo_bundle: Path) -> None:
    x = np.random.default_rng(3).standard_normal((6, 128)).astype(np.float32)
    predictor = untrained(selector_of(demo_bundle, 1), x, 64, 0.95)
    assert np.isfinite(predictor.scores(x)).all()


@pytest.mark.parametrize("rank", [-1, 0, 1, 129])
def test_a_rank_out_of_range_is_refused(rank: int, demo_bundle: Path) -> None:
    x = np.ones((4, 128), dtype=np.float32)
    with pytest.raises(UsageError, match=r"rank.*2\.\.128"):
        untrained(selector_of(demo_bundle, 0), x, rank, 0.95)


def test_a_selector_is_the_matrix_of_the_checkpoint(opt: Path, tmp_path: Path) -> None:
    weights = load_file(FIXTURES / "opt" / "model.safetensors")
    (stem,) = (name[:-6] for name in weights if name.endswith("layers.1.fc1.weight"))
    resident = tmp_path / "resident.bundle"
    bundlefmt.pack(FIXTURES / "opt", resident, resident="up")
    for path in (opt, resident):
        selector = selector_of(path, 1)
        np.testing.assert_array_equal(selector.weights, weights[f"{stem}weight"])
        np.testing.assert_array_equal(selector.bias, weights[f"{stem}bias"])


# Training


@needs_torch
def test_trained_predictors_are_in_the_file_and_meet_the_recall(
    demo: Path, demo_trace: Path, tmp_path: Path
) -> None:
    report = bundlefmt.train_predictors(demo, demo_trace, rank=32, recall=0.9)
    assert report.generation == 2
    assert bundlefmt.verify(demo).ok
    trace = Trace(demo_trace)
    held_out = slice(TOKENS * 9 // 10, None)
    with bundlefmt.open(demo) as file:
        for index, layer in enumerate(report.layers):
            predictor = predictors.load(file, file.group(index))
            assert predictor is not None
            assert predictor.a.encoding == predictor.b.encoding == "q8_0"
            assert [matrix.shape for matrix in predictor.matrices()] == [(32, 128), (1024, 32)]
            inputs, active = everything(trace.layer(index))
            found = quality(predictor, [(inputs[held_out], active[held_out])])
            assert found.recall == pytest.approx(layer.recall, abs=1e-3)
            assert found.precision == pytest.approx(layer.precision, abs=1e-3)
            assert 0.9 <= layer.recall < 0.91
            assert layer.predicted_per_active == pytest.approx(layer.recall / layer.precision)


@needs_torch
def test_training_does_better_than_its_start(demo_bundle: Path, demo_trace: Path) -> None:
    from bundlefmt.flash.training import Training, samples, train

    held_out = np.arange(TOKENS * 9 // 10, TOKENS)
    for index in (1, 4):
        layer, selector = Trace(demo_trace).layer(index), selector_of(demo_bundle, index)
        _, trained = train(layer, selector, Training(rank=8, recall=0.95, epochs=4))
        inputs, _ = everything(layer)
        start = untrained(selector, inputs[: held_out[0]], 8, 0.95)
        start = calibrated(start, samples(layer, held_out), 0.95)
        assert trained.precision > quality(start, samples(layer, held_out)).precision


@needs_torch
def test_training_again_replaces(demo: Path, short_trace: Path) -> None:
    bundlefmt.train_predictors(demo, short_trace, rank=8, epochs=1)
    report = bundlefmt.train_predictors(
        demo, short_trace, rank=4, last_layers=2, last_rank=16, epochs=1
    )
    assert [layer.rank for layer in report.layers] == [4, 4, 4, 16, 16]
    assert bundlefmt.verify(demo).ok
    with bundlefmt.open(demo) as file:
        assert len(file.header.predictors) == 5
        assert sum(name.startswith("bundlefmt.predictor.") for name in file.tensor_names) == 10
        loaded = [predictors.load(file, group) for group in file.groups]
        ranks = [found.a.stored.shape[0] for found in loaded if found is not None]
    assert ranks == [4, 4, 4, 16, 16]


@needs_torch
def test_a_file_with_predictors_computes_and_unpacks_as_before(
    demo: Path, demo_bundle: Path, short_trace: Path, tmp_path: Path
) -> None:
    bundlefmt.train_predictors(demo, short_trace, rank=8, epochs=1)
    with bundlefmt.load_model(demo) as model, bundlefmt.load_model(demo_bundle) as old:
        np.testing.assert_array_equal(model.logits(IDS), old.logits(IDS))
    assert bundlefmt.unpack(demo, tmp_path / "after").identical


@needs_torch
def test_an_interrupted_training_leaves_the_file_as_it_was(demo: Path, short_trace: Path) -> None:
    before = demo.read_bytes()

    def interrupt(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bundlefmt.train_predictors(demo, short_trace, rank=8, epochs=1, progress=interrupt)
    assert demo.read_bytes() == before


WRONG: dict[str, dict[str, Any]] = {
    "rank out of range": {"rank": 129},
    "rank": {"rank": 1},
    "last rank out of range": {"last_layers": 1, "last_rank": 0},
    "last layers": {"last_layers": 6, "last_rank": 8},
    "last layers without a rank": {"last_layers": 1},
    "a last rank for no layers": {"last_rank": 8},
    "recall": {"recall": 1.0},
    "epochs": {"epochs": 0},
}


@needs_torch
@pytest.mark.parametrize("wrong", WRONG)
def test_settings_that_cannot_be_are_refused(wrong: str, demo: Path, short_trace: Path) -> None:
    before = demo.read_bytes()
    with pytest.raises(UsageError):
        bundlefmt.train_predictors(demo, short_trace, **WRONG[wrong])
    assert demo.read_bytes() == before


@needs_torch
def test_a_trace_of_another_model_is_refused(
    opt: Path, demo_bundle: Path, demo_trace: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="another model"):
        bundlefmt.train_predictors(opt, demo_trace, rank=8)
    bundlefmt.trace(demo_bundle, TEXT, tmp_path / "short", max_tokens=50)
    with pytest.raises(UsageError, match="too few tokens"):
        bundlefmt.train_predictors(demo_bundle, tmp_path / "short", rank=8)
    with pytest.raises(UsageError, match=r"trace\.json: no trace"):
        bundlefmt.train_predictors(demo_bundle, tmp_path, rank=8)


def test_missing_pytorch_is_named_with_its_extra(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ["torch", *(name for name in sys.modules if name.startswith("torch."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=r"pip install 'bundlefmt\[train\]'"):
        bundlefmt.train_predictors(demo, tmp_path)
    assert list(tmp_path.iterdir()) == [demo]

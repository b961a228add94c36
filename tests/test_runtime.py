"""The loop computes what the reference implementations compute."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

import bundlefmt
from bundlefmt import kernels
from bundlefmt.reader import Reader
from bundlefmt.runtime.attention import AttentionLayer
from bundlefmt.runtime.config import decoder_config
from bundlefmt.runtime.generate import Model
from bundlefmt.runtime.streamer import Streamer
from bundlefmt.storage.buffers import aligned_empty
from tests.conftest import FIXTURES, SHARED
from tests.references import openelm

RELU = (
    "opt",
    "opt-post-norm",
    "llama3-rope",
    "llama-fatrelu",
    "phi-relu",
    "persimmon",
    "falcon-bias",
    "falcon-grouped",
    "falcon-sequential",
)
GENERATING = (*RELU, "llama", "mistral", "qwen2", "qwen3", "phi", "falcon")
TOLERANCE = 1e-4  # of the largest logit


def assert_close(found: NDArray[Any], expected: NDArray[Any]) -> None:
    """The largest difference is within TOLERANCE of the largest logit."""
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


def packed(case: str, folder: Path, **options: Any) -> Path:
    path = folder / f"{case}.bundle"
    bundlefmt.pack(FIXTURES / case, path, **options)
    return path


def reference(case: str) -> dict[str, NDArray[Any]]:
    with np.load(FIXTURES / case / "reference.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


@pytest.mark.parametrize("case", GENERATING)
def test_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    expected = reference(case)
    ids = [*expected["prompt"].tolist(), *expected["decoded"].tolist()]
    with bundlefmt.load_model(packed(case, tmp_path)) as model:
        assert_close(model.logits(ids), expected["logits"])


@pytest.mark.parametrize("case", GENERATING)
def test_greedy_tokens_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    expected = reference(case)
    with bundlefmt.load_model(packed(case, tmp_path)) as model:
        assert model.generate(expected["prompt"].tolist(), 16) == expected["decoded"].tolist()


@pytest.mark.parametrize("case", GENERATING)
def test_decoding_token_by_token_gives_the_logits_of_the_whole(case: str, tmp_path: Path) -> None:
    expected = reference(case)
    prompt, decoded = expected["prompt"].tolist(), expected["decoded"].tolist()
    with bundlefmt.load_model(packed(case, tmp_path)) as model:
        cache = model.decoder.new_cache()
        rows = [model.decoder.logits(model.decoder.forward(prompt, cache))]
        rows += [model.decoder.logits(model.decoder.forward([token], cache)) for token in decoded]
        assert_close(np.concatenate(rows), expected["logits"])


@pytest.mark.parametrize("resident", [None, "up"])
@pytest.mark.parametrize("case", RELU)
def test_exact_gives_the_logits_of_the_reference(
    case: str, resident: str | None, tmp_path: Path
) -> None:
    if resident == "up" and case.startswith("llama"):
        resident = "gate"
    expected = reference(case)
    ids = [*expected["prompt"].tolist(), *expected["decoded"].tolist()]
    path = packed(case, tmp_path, resident=resident)
    with bundlefmt.load_model(path, mode="exact") as model:
        assert_close(model.logits(ids), expected["logits"])
        before = model.reader.stats.bytes_read
        assert model.generate(ids[:64], 16) == ids[64:]
        assert model.reader.stats.bytes_read > before


@pytest.mark.parametrize(
    ("case", "changes"), [("falcon", {"activation": "relu"}), ("phi", {"hidden_act": "relu"})]
)
def test_exact_gives_the_dense_logits_of_a_relufied_model_and_reads_less(
    case: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    path = edited_config(case, tmp_path, **changes)
    with (
        bundlefmt.load_model(path) as dense,
        bundlefmt.load_model(path, mode="exact") as exact,
    ):
        before = exact.reader.stats.bytes_read
        assert_close(exact.logits([50]), dense.logits([50]))
        assert 0 < exact.reader.stats.bytes_read - before < dense.reader.stats.bytes_read
        ids = reference(case)["prompt"].tolist()
        assert_close(exact.logits(ids), dense.logits(ids))
        assert exact.generate(ids, 16) == dense.generate(ids, 16)


def test_a_llama_of_prosparse_is_a_llama(tmp_path: Path) -> None:
    expected = reference("llama-fatrelu")
    path = edited_config("llama-fatrelu", tmp_path, model_type="sparsellama")
    with bundlefmt.load_model(path, mode="exact") as model:
        assert model.file.header.family == "llama"
        assert model.generate(expected["prompt"].tolist(), 16) == expected["decoded"].tolist()


def test_one_group_of_heads_with_one_norm_is_multi_query(tmp_path: Path) -> None:
    expected = reference("falcon")
    path = edited_config(
        "falcon",
        tmp_path,
        new_decoder_architecture=True,
        num_kv_heads=1,
        num_ln_in_parallel_attn=1,
        parallel_attn=False,
    )
    ids = [*expected["prompt"].tolist(), *expected["decoded"].tolist()]
    with bundlefmt.load_model(path) as model:
        assert_close(model.logits(ids), expected["logits"])


@pytest.mark.parametrize(
    ("case", "order"),
    [("falcon", ["ffn", "attention"] * 2), ("falcon-sequential", ["attention", "ffn"] * 2)],
)
def test_the_ffn_of_a_parallel_block_reads_before_attention_runs(
    case: str, order: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    attend, submit = AttentionLayer.__call__, Reader.submit

    def noted_attention(self: AttentionLayer, *inputs: Any) -> Any:
        called.append("attention")
        return attend(self, *inputs)

    def noted_reads(self: Reader, *inputs: Any, **named: Any) -> Any:
        called.append("ffn")
        return submit(self, *inputs, **named)

    monkeypatch.setattr(AttentionLayer, "__call__", noted_attention)
    monkeypatch.setattr(Reader, "submit", noted_reads)
    with bundlefmt.load_model(packed(case, tmp_path)) as model:
        model.logits([50])
    assert called == order


@pytest.mark.parametrize("backend", ["direct", "buffered", "mmap"])
def test_every_backend_gives_the_same_tokens(backend: str, tmp_path: Path) -> None:
    expected = reference("llama")
    with bundlefmt.load_model(packed("llama", tmp_path), backend=backend, threads=2) as model:
        assert model.generate(expected["prompt"].tolist(), 16) == expected["decoded"].tolist()


@pytest.mark.parametrize("resident", [None, "gate", "up"])
def test_dense_takes_a_resident_part_from_memory(resident: str | None, tmp_path: Path) -> None:
    expected = reference("llama")
    with bundlefmt.load_model(packed("llama", tmp_path, resident=resident)) as model:
        assert model.generate(expected["prompt"].tolist(), 16) == expected["decoded"].tolist()


def test_half_precision_bundles_stay_near_the_reference(tmp_path: Path) -> None:
    expected = reference("llama")
    ids = [*expected["prompt"].tolist(), *expected["decoded"].tolist()]
    for dtype, tolerance in (("bf16", 0.05), ("f16", 0.01), ("q8_0", 0.05)):
        path = packed("llama", tmp_path, dtype=dtype, force=True)
        with bundlefmt.load_model(path) as model:
            difference = np.abs(model.logits(ids) - expected["logits"]).max()
            assert 0 < difference <= tolerance * np.abs(expected["logits"]).max()


# OpenELM


@pytest.fixture(scope="module")
def openelm_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("openelm")
    config = openelm.small_config()
    save_file(openelm.random_checkpoint(config, seed=3), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    bundlefmt.pack(folder, folder / "openelm.bundle")
    return folder / "openelm.bundle"


def test_openelm_logits_are_those_of_the_float64_reference(openelm_bundle: Path) -> None:
    config = openelm.small_config()
    tensors = openelm.random_checkpoint(config, seed=3)
    prompt = np.random.default_rng(5).integers(0, config["vocab_size"], 64).tolist()
    with bundlefmt.load_model(openelm_bundle) as model:
        ids = prompt + model.generate(prompt, 16)
        assert_close(model.logits(ids), openelm.logits(config, tensors, ids))


def test_openelm_layers_have_widths_and_heads_of_their_own(openelm_bundle: Path) -> None:
    with bundlefmt.load_model(openelm_bundle) as model:
        widths = [group.neurons for group in model.file.groups]
        heads = [layer.heads for layer in model.decoder.config.layers]
    assert len(set(widths)) == len(widths)
    assert len(set(heads)) == len(heads)


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        ("270M", 271_527_168),
        ("450M", 457_179_136),
        ("1.1B", 1_079_891_456),
        ("3B", 3_036_647_424),
    ],
)
def test_published_openelm_configurations_have_their_parameters(size: str, parameters: int) -> None:
    config = openelm.PUBLISHED[size]
    assert openelm.parameter_count(config) == parameters
    # The loop's reading of the same config, with the widths of the reference's tensors.
    decoder = decoder_config(config, config["num_transformer_layers"])
    shapes = openelm.tensor_shapes(config)
    d, dim = decoder.d_model, decoder.head_dim
    total = config["vocab_size"] * d + d
    for i, layer in enumerate(decoder.layers):
        neurons = shapes[f"transformer.layers.{i}.ffn.proj_2.weight"][1]
        attention = (layer.heads + 2 * layer.kv_heads) * dim * d + layer.heads * dim * d
        total += attention + 3 * neurons * d + 2 * d + 2 * dim
    assert total == parameters


# The real trained model, and the demo


def tokens_and_bytes(path: Path, mode: str, ids: list[int]) -> tuple[list[int], int, int]:
    """The tokens of a greedy run, the bytes read for it, and those of a dense pass per token."""
    with bundlefmt.load_model(path, mode=mode) as model:
        before = model.reader.stats.bytes_read
        made = model.generate(ids, 48)
        return made, model.reader.stats.bytes_read - before, ffn_bytes(model)


def ffn_bytes(model: Model) -> int:
    return sum(group.bundles.length for group in model.file.groups)


def test_exact_gives_the_dense_tokens_of_the_demo_model_and_reads_less(demo_bundle: Path) -> None:
    ids = list(range(40, 60))
    dense, dense_bytes, _ = tokens_and_bytes(demo_bundle, "dense", ids)
    exact, exact_bytes, _ = tokens_and_bytes(demo_bundle, "exact", ids)
    assert exact == dense
    assert exact_bytes < dense_bytes / 2


@pytest.mark.skipif(
    not (SHARED / "data" / "opt-relu-16m").is_dir(), reason="the trained model is not at hand"
)
def test_exact_gives_the_dense_tokens_of_a_trained_model_and_reads_less(tmp_path: Path) -> None:
    path = tmp_path / "model.bundle"
    bundlefmt.pack(SHARED / "data" / "opt-relu-16m", path)
    ids = list(range(300, 316))
    dense, dense_bytes, whole = tokens_and_bytes(path, "dense", ids)
    exact, exact_bytes, _ = tokens_and_bytes(path, "exact", ids)
    assert exact == dense
    assert dense_bytes == len(dense) * whole
    assert exact_bytes < dense_bytes / 2


# Kernels


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_every_16_bit_pattern_widens_to_its_value(dtype: Any) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    finite = every[np.isfinite(every.astype(np.float32))]
    for patterns in (every, finite):
        np.testing.assert_array_equal(kernels.widened(patterns), patterns.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 700, 96), (2, 5, 70_000), (1, 0, 8)])
def test_products_with_stored_weights_are_those_of_float64(
    shape: tuple[int, int, int], dtype: Any
) -> None:
    tokens, rows, width = shape
    random = np.random.default_rng(1)
    weight = random.standard_normal((rows, width)).astype(dtype)
    x = random.standard_normal((tokens, width)).astype(np.float32)
    h = random.standard_normal((tokens, rows)).astype(np.float32)
    wide = weight.astype(np.float64)
    np.testing.assert_allclose(kernels.matmul(x, weight), x @ wide.T, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(kernels.weighted_sum(h, weight), h @ wide, rtol=1e-4, atol=1e-3)


# Sampling and limits


def test_the_same_seed_gives_the_same_text(demo_bundle: Path) -> None:
    with bundlefmt.load_model(demo_bundle, mode="exact") as model:
        runs = [
            model.generate([50, 60], 12, temperature=1.0, top_p=0.9, seed=seed)
            for seed in (1, 1, 2)
        ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_a_vanishing_nucleus_is_greedy(demo_bundle: Path) -> None:
    with bundlefmt.load_model(demo_bundle) as model:
        greedy = model.generate([50, 60], 8)
        assert model.generate([50, 60], 8, temperature=1.0, top_p=1e-9, seed=4) == greedy


def test_generation_stops_with_the_end_of_text_token(tmp_path: Path) -> None:
    expected = reference("llama")
    decoded = expected["decoded"].tolist()
    folder = tmp_path / "model"
    folder.mkdir()
    config = json.loads((FIXTURES / "llama" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": [decoded[3], 1]}))
    shutil.copy(FIXTURES / "llama" / "model.safetensors", folder)
    bundlefmt.pack(folder, tmp_path / "model.bundle")
    with bundlefmt.load_model(tmp_path / "model.bundle") as model:
        made = model.generate(expected["prompt"].tolist(), 16)
    assert made == decoded[: decoded.index(decoded[3]) + 1]


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([], {}, "no tokens"),
        ([-1], {}, "no such token"),
        ([10**6], {}, "no such token"),
        ([50] * 300, {}, "more tokens than the model's context"),
        ([50], {"temperature": -1.0}, "temperature"),
        ([50], {"temperature": float("nan")}, "temperature"),
        ([50], {"top_p": 0.0}, "top_p"),
        ([50], {"max_new_tokens": -1}, "max_new_tokens"),
    ],
)
def test_what_cannot_be_generated_is_refused(
    ids: list[int], options: dict[str, Any], message: str, demo_bundle: Path
) -> None:
    with (
        bundlefmt.load_model(demo_bundle) as model,
        pytest.raises(bundlefmt.UsageError, match=message),
    ):
        model.generate(ids, **options)


def test_exact_is_refused_for_an_activation_without_zeros(small_bundle: Path) -> None:
    with pytest.raises(bundlefmt.UsageError, match=r"exact zeros.*found silu"):
        bundlefmt.load_model(small_bundle, mode="exact")


@pytest.mark.parametrize("case", ["bert", "mixtral", "gpt2"])
def test_a_model_that_the_loop_does_not_compute_is_refused_by_name(
    case: str, tmp_path: Path
) -> None:
    path = packed(case, tmp_path)
    with pytest.raises(bundlefmt.UsageError, match=f"found {case}"):
        bundlefmt.load_model(path)


def test_an_unknown_rope_scaling_is_refused_by_name() -> None:
    config = json.loads((FIXTURES / "llama" / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 1e4, "rope_type": "yarn", "factor": 2.0}
    with pytest.raises(bundlefmt.UsageError, match="found yarn"):
        decoder_config(config, 2)


@pytest.mark.parametrize(
    ("rope", "pairs", "theta"),
    [
        ({"rope_parameters": {"rope_theta": 25000.0, "partial_rotary_factor": 0.4}}, 16, 25000.0),
        ({"rope_theta": 25000.0, "partial_rotary_factor": 0.4}, 16, 25000.0),
        ({"partial_rotary_factor": 0.4, "rope_scaling": None}, 16, 10000.0),
        ({}, 20, 10000.0),
    ],
    ids=str,
)
def test_older_and_newer_configs_say_how_much_of_a_head_turns(
    rope: dict[str, Any], pairs: int, theta: float
) -> None:
    config = json.loads((FIXTURES / "phi" / "config.json").read_text())
    del config["rope_parameters"]
    found = decoder_config({**config, "hidden_size": 160, **rope}, 2).rope  # heads of 80 numbers
    assert found is not None
    expected = theta ** (-np.arange(pairs) / pairs)
    np.testing.assert_allclose(found.frequencies, expected)


def test_positions_by_alibi_are_refused_by_name() -> None:
    config = json.loads((FIXTURES / "falcon" / "config.json").read_text())
    with pytest.raises(bundlefmt.UsageError, match="alibi"):
        decoder_config(config | {"alibi": True}, 2)


def test_a_damaged_bundle_stops_the_run_with_its_place(demo_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.bundle"
    data = bytearray(demo_bundle.read_bytes())
    with bundlefmt.open(demo_bundle) as file:
        group = file.group(2)
    data[group.bundles.offset + 7 * group.stride + 3] ^= 1
    path.write_bytes(data)
    with (
        bundlefmt.load_model(path) as model,
        pytest.raises(bundlefmt.FormatError, match="layer 2, neuron 7"),
    ):
        model.generate([50], 1)


def edited_config(case: str, folder: Path, **changes: Any) -> Path:
    """The case's checkpoint with other values in its config.json, packed."""
    model = folder / "model"
    model.mkdir()
    config = json.loads((FIXTURES / case / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps(config))
    shutil.copy(FIXTURES / case / "model.safetensors", model)
    bundlefmt.pack(model, folder / "model.bundle")
    return folder / "model.bundle"


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 3},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 3},
        {"hidden_size": 64},
        {"hidden_size": "wide"},
        {"head_dim": 7},
        {"head_dim": 1 << 40},
        {"num_hidden_layers": 3},
        {"num_hidden_layers": 10**9},
        {"max_position_embeddings": "x"},
        {"rms_norm_eps": None},
        {"sliding_window": -4, "model_type": "mistral"},
        {"eos_token_id": [[1]]},
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_its_tensors_is_a_format_error(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(bundlefmt.FormatError):
        bundlefmt.load_model(edited_config("llama", tmp_path, **changes))


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("falcon", {"multi_query": False}),
        ("falcon", {"parallel_attn": False}),
        ("falcon", {"new_decoder_architecture": True}),
        ("falcon-grouped", {"num_kv_heads": 4}),
        ("falcon-grouped", {"num_kv_heads": 3}),
        ("falcon-grouped", {"num_ln_in_parallel_attn": 1}),
        ("falcon-sequential", {"multi_query": True}),
        ("persimmon", {"num_attention_heads": 2}),
        *(
            ("phi", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": factor}})
            for factor in (0, 0.32, 1.5, -1, "half", float("inf"), None)
        ),
    ],
    ids=str,
)
def test_a_block_that_the_config_shapes_otherwise_than_its_tensors_is_a_format_error(
    case: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(bundlefmt.FormatError):
        bundlefmt.load_model(edited_config(case, tmp_path, **changes))


@pytest.mark.parametrize("model_type", [["llama"], None, 3])
def test_a_model_type_that_is_no_name_is_refused(model_type: Any, tmp_path: Path) -> None:
    path = edited_config("llama", tmp_path)  # pack refuses it, too
    config = json.dumps({"model_type": model_type}).encode()
    bundlefmt.append(path, blobs={"config.json": config})
    with pytest.raises(bundlefmt.UsageError, match="model_type"):
        bundlefmt.load_model(path)


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        ({"model_type": "mistral", "sliding_window": 8}, [8, 8, 8]),
        ({"model_type": "mistral", "sliding_window": None}, [None] * 3),
        ({"model_type": "qwen2", "sliding_window": 8}, [None] * 3),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True}, [None] * 3),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 8,
                "use_sliding_window": True,
                "max_window_layers": 1,
            },
            [None, 8, 8],
        ),
        (
            {
                "model_type": "qwen3",
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            [8, None, 8],
        ),
    ],
)
def test_sliding_windows_hold_for_the_layers_that_the_config_means(
    config: dict[str, Any], windows: list[int | None]
) -> None:
    numbers = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_hidden_layers": 3,
        "rms_norm_eps": 1e-6,
    }
    decoder = decoder_config({**numbers, **config}, 3)
    assert [layer.window for layer in decoder.layers] == windows


def test_more_tokens_than_the_context_are_refused_before_the_first(demo_bundle: Path) -> None:
    with bundlefmt.load_model(demo_bundle) as model:
        with pytest.raises(bundlefmt.UsageError, match="context"):
            model.tokens([50] * 250, 20)
        assert model.reader.stats.bytes_read == 0
        assert len(model.generate([50] * 250, 7)) <= 7


def test_a_long_prompt_gives_the_logits_of_its_pieces(demo_bundle: Path) -> None:
    ids = np.random.default_rng(2).integers(3, 1000, 256)
    with bundlefmt.load_model(demo_bundle) as model:
        whole = model.logits(ids)
        cache = model.decoder.new_cache()
        pieces = [
            model.decoder.logits(model.decoder.forward(piece.tolist(), cache))
            for piece in np.split(ids, [3, 200])
        ]
        assert_close(np.concatenate(pieces), whole)


def test_stopping_early_leaves_no_read_behind(demo_bundle: Path) -> None:
    with bundlefmt.load_model(demo_bundle) as model:
        group = model.file.group(0)
        streamer = Streamer(model.reader)
        streamer._buffers = [aligned_empty(4 * group.stride) for _ in range(2)]
        ids = np.tile(np.arange(group.neurons), 20)
        pieces = streamer.bundles(group, ids)
        next(pieces)
        pieces.close()
        before = model.reader.stats.bundles
        assert before > 0
        again = next(streamer.bundles(group, np.array([7, 3])))
        assert again.raw.tobytes() == model.reader.read(0, [7, 3]).raw.tobytes()


def test_the_end_of_text_tokens_of_the_generation_config_count(tmp_path: Path) -> None:
    expected = reference("llama")
    decoded = expected["decoded"].tolist()
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(FIXTURES / "llama" / name, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": decoded[2]}))
    bundlefmt.pack(folder, tmp_path / "model.bundle")
    with bundlefmt.load_model(tmp_path / "model.bundle") as model:
        made = model.generate(expected["prompt"].tolist(), 16)
    assert made == decoded[: decoded.index(decoded[2]) + 1]

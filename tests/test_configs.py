"""A config.json means what it means to the model's class, or is refused in one line; so do the
names of the resident tensors."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import bundlefmt
from bundlefmt.errors import BundleError, FormatError, UsageError
from bundlefmt.file import BundleFile
from bundlefmt.runtime.config import DEFAULTS, DecoderConfig, decoder_config
from bundlefmt.runtime.roles import unused
from tests.conftest import FIXTURES
from tests.references import openelm

Config = dict[str, Any]
Tensors = dict[str, NDArray[Any]]

IDS = list(range(3, 60))
# The types that have a class in transformers, and a fixture of the name.
CASES = ("opt", "llama", "mistral", "qwen2", "qwen3", "phi", "persimmon", "falcon")


def config_of(case: str, **changes: Any) -> Config:
    config: Config = json.loads((FIXTURES / case / "config.json").read_text())
    return config | changes


def tensors_of(case: str) -> Tensors:
    return dict(load_file(FIXTURES / case / "model.safetensors"))


def described(tensors: Tensors) -> dict[str, SimpleNamespace]:
    return {
        name: SimpleNamespace(dtype="F32", shape=list(tensor.shape))
        for name, tensor in tensors.items()
    }


def why_not(config: Config, layers: int, tensors: Any) -> str | None:
    """Why the model is refused; None where it is computed."""
    try:
        unused(config, layers, tensors)
    except BundleError as error:
        return str(error)
    return None


def packed(folder: Path, config: Config, tensors: Tensors) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    bundlefmt.pack(folder, folder / "model.bundle", force=True)
    return folder / "model.bundle"


def logits(path: Path) -> NDArray[np.float32]:
    with bundlefmt.load_model(path) as model:
        return model.logits(IDS)


def fixture_logits(case: str, folder: Path) -> NDArray[np.float32]:
    return logits(packed(folder / "whole", config_of(case), tensors_of(case)))


def assert_close(found: NDArray[Any], expected: NDArray[Any]) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


# What an absent key means

# model_type, layers -> what a config.json without any other key means. Written down from the
# classes of transformers 5.24 and Apple's OpenELM.
BARE = {
    "opt": (12, {"d_model": 768, "head_dim": 64, "context": 2048, "tied": True, "eos": {2}}),
    "llama": (32, {"d_model": 4096, "head_dim": 128, "context": 2048, "norm_epsilon": 1e-6}),
    "sparsellama": (32, {"d_model": 4096, "tied": False, "norm_epsilon": 1e-6, "eos": {2}}),
    "mistral": (32, {"d_model": 4096, "head_dim": 128, "context": 131072, "eos": {2}}),
    "qwen2": (32, {"head_dim": 128, "context": 32768, "tied": False, "eos": set()}),
    "qwen3": (32, {"head_dim": 128, "head_norms": True, "norm_epsilon": 1e-6, "eos": set()}),
    "openelm": (12, {"d_model": 2048, "head_dim": 128, "tied": False, "head_norms": False}),
    "phi": (24, {"d_model": 2048, "head_dim": 64, "norm_epsilon": 1e-5, "head_norms": False}),
    "persimmon": (36, {"head_dim": 64, "norm_epsilon": 1e-5, "head_norms": True, "tied": False}),
    "falcon": (32, {"d_model": 4544, "head_dim": 64, "tied": True, "eos": {11}, "parallel": True}),
}
# Its first layer: heads, key/value heads, window; and the pairs of a head that turn.
BARE_ATTENTION = {
    "opt": (12, 12, None, None),
    "llama": (32, 32, None, 64),
    "sparsellama": (32, 32, None, 64),
    "mistral": (32, 8, 4096, 64),
    "qwen2": (32, 32, None, 64),
    "qwen3": (32, 32, None, 64),
    "openelm": (16, 16, None, 64),
    "phi": (32, 32, None, 16),
    "persimmon": (64, 64, None, 16),
    "falcon": (71, 1, None, 32),
}


@pytest.mark.parametrize("model_type", BARE)
def test_absent_keys_have_the_defaults_of_the_class(model_type: str) -> None:
    layers, expected = BARE[model_type]
    decoder = decoder_config({"model_type": model_type}, layers)
    assert {key: getattr(decoder, key) for key in expected} == expected
    first = decoder.layers[0]
    heads, kv_heads, window, pairs = BARE_ATTENTION[model_type]
    assert (first.heads, first.kv_heads, first.window) == (heads, kv_heads, window)
    assert (decoder.rope and decoder.rope.frequencies.size) == pairs
    if decoder.rope is not None:
        assert math.isclose(
            decoder.rope.frequencies[1], 10000 ** (-1 / decoder.rope.frequencies.size)
        )


# Keys of the classes that change nothing that is computed here, or are read by `pack`.
_NO_MATTER = {
    "activation",
    "activation_function",
    "attention_dropout",
    "bos_token_id",
    "dropout",
    "embd_pdrop",
    "ffn_dim",
    "ffn_hidden_size",
    "hidden_act",
    "hidden_dropout",
    "init_std",
    "initializer_range",
    "intermediate_size",
    "layerdrop",
    "pad_token_id",
    "pretraining_tp",
    "resid_pdrop",
    "rope_parameters",
    "use_cache",
    "vocab_size",
}


@pytest.mark.parametrize("model_type", CASES)
def test_the_defaults_are_those_of_transformers_and_no_key_is_overlooked(model_type: str) -> None:
    hf = pytest.importorskip("transformers")
    common = {field.name for field in fields(hf.PreTrainedConfig)}
    known = {field.name: field.default for field in fields(hf.CONFIG_MAPPING[model_type])}
    ours = DEFAULTS[model_type]
    assert known.keys() - common - ours.keys() <= _NO_MATTER
    # What is no field is looked up in the class's code, which does without.
    assert ours == {key: known.get(key) for key in ours}


def meaning(decoder: DecoderConfig) -> tuple[object, ...]:
    turning = None if decoder.rope is None else decoder.rope.frequencies.tolist()
    return replace(decoder, rope=None), turning


# Without the key the config denies what the tensors hold.
CONTRADICTED = {"llama3-rope": {"attention_bias", "mlp_bias"}}


@pytest.mark.parametrize("case", [*CASES, "llama3-rope"])
def test_each_absent_or_null_key_means_to_us_what_it_means_to_transformers(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers")
    path = packed(tmp_path / "model", config_of(case), tensors_of(case))
    whole = config_of(case)
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(FIXTURES / case / "model.safetensors")

    def theirs(config: Config) -> Any:
        """The class's own view of a config, None where it refuses it."""
        try:
            return hf.CONFIG_MAPPING[config["model_type"]](**config).to_dict()
        except Exception:
            return None

    def their_logits(config: Config) -> NDArray[np.float32] | None:
        (folder / "config.json").write_text(json.dumps(config))
        try:
            model, report = hf.AutoModelForCausalLM.from_pretrained(
                folder, output_loading_info=True
            )
            with torch.no_grad():
                found: NDArray[np.float32] = model(torch.tensor([IDS])).logits[0].numpy()
        except Exception:
            return None
        return None if report["missing_keys"] else found

    refused = set()
    keys = whole.keys() & {*DEFAULTS[whole["model_type"]], "rope_parameters"}
    for key in keys:
        for config in ({k: v for k, v in whole.items() if k != key}, whole | {key: None}):
            view = theirs(config)
            if view is None:
                continue
            monkeypatch.setattr(BundleFile, "config", config)
            try:
                decoder = decoder_config(config, whole["num_hidden_layers"])
                same = meaning(decoder) == meaning(decoder_config(whole, len(decoder.layers)))
                if same and view == theirs(whole):
                    continue
                found = logits(path)
            except BundleError:
                if their_logits(config) is not None:
                    refused.add(key)
                continue
            expected = their_logits(config)
            if expected is not None:
                assert_close(found, expected)
    assert refused == CONTRADICTED.get(case, set())


# Older config.json files, as they are on the Hub, without what changes nothing: heads, key/value
# heads, numbers of a head, pairs that turn, window, context.
PUBLISHED: list[tuple[Config, tuple[int, int, int, int | None, int | None, int]]] = [
    (
        {
            "model_type": "opt",
            "_remove_final_layer_norm": False,
            "do_layer_norm_before": False,
            "hidden_size": 1024,
            "max_position_embeddings": 2048,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "prefix": "</s>",
            "word_embed_proj_dim": 512,
        },
        (16, 16, 64, None, None, 2048),
    ),
    (
        {
            "model_type": "llama",
            "attention_bias": False,
            "eos_token_id": [128001, 128008, 128009],
            "head_dim": 64,
            "hidden_size": 2048,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
        },
        (32, 8, 64, 32, None, 131072),
    ),
    (
        {
            "model_type": "mistral",
            "hidden_size": 4096,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
        },
        (32, 8, 128, 64, 4096, 32768),
    ),
    (
        {
            "model_type": "qwen2",
            "hidden_size": 896,
            "max_position_embeddings": 32768,
            "max_window_layers": 24,
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "use_mrope": False,
            "use_sliding_window": False,
        },
        (14, 2, 64, 32, None, 32768),
    ),
    (
        {
            "model_type": "qwen3",
            "attention_bias": False,
            "head_dim": 128,
            "hidden_size": 1024,
            "max_position_embeddings": 40960,
            "max_window_layers": 28,
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "use_sliding_window": False,
        },
        (16, 8, 128, 64, None, 40960),
    ),
    (
        {
            "model_type": "phi",
            "hidden_size": 2560,
            "layer_norm_eps": 1e-05,
            "max_position_embeddings": 2048,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "partial_rotary_factor": 0.4,
            "qk_layernorm": False,
            "rope_scaling": None,
            "rope_theta": 10000.0,
        },
        (32, 32, 80, 16, None, 2048),
    ),
    (
        {
            "model_type": "persimmon",
            "hidden_size": 4096,
            "num_attention_heads": 64,
            "num_hidden_layers": 36,
            "partial_rotary_factor": 0.5,
            "qk_layernorm": True,
            "rope_scaling": None,
            "rope_theta": 25000.0,
        },
        (64, 64, 64, 16, None, 16384),
    ),
    (
        {
            "model_type": "falcon",
            "alibi": False,
            "apply_residual_connection_post_layernorm": False,
            "hidden_size": 8192,
            "new_decoder_architecture": True,
            "num_attention_heads": 128,
            "num_hidden_layers": 60,
            "num_kv_heads": 8,
            "parallel_attn": True,
        },
        (128, 8, 64, 32, None, 2048),
    ),
]


@pytest.mark.parametrize(
    ("config", "expected"),
    PUBLISHED,
    ids=lambda part: part["model_type"] if isinstance(part, dict) else "",
)
def test_published_configs_are_understood(
    config: Config, expected: tuple[int, int, int, int | None, int | None, int]
) -> None:
    decoder = decoder_config(config, config["num_hidden_layers"])
    first = decoder.layers[0]
    pairs = None if decoder.rope is None else decoder.rope.frequencies.size
    found = (first.heads, first.kv_heads, decoder.head_dim, pairs, first.window, decoder.context)
    assert found == expected


# Rotary positions

LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
DEFAULT = {"rope_type": "default", "rope_theta": 500.0}


@pytest.mark.parametrize(
    ("given", "theta", "factor"),
    [
        ({"rope_scaling": LINEAR, "rope_parameters": DEFAULT}, 10000.0, 4.0),
        ({"rope_scaling": LINEAR, "rope_parameters": DEFAULT, "rope_theta": 100.0}, 100.0, 4.0),
        ({"rope_scaling": LINEAR | {"rope_theta": 50.0}, "rope_theta": 100.0}, 50.0, 4.0),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 10000.0, 2.0),
        ({"rope_scaling": None, "rope_parameters": DEFAULT, "rope_theta": 100.0}, 500.0, 1.0),
        ({"rope_scaling": {}, "rope_parameters": DEFAULT}, 500.0, 1.0),
        ({"rope_parameters": {"type": "linear", "rope_type": "default"}}, 10000.0, 1.0),
        ({"rope_parameters": None, "rope_theta": 100.0}, 100.0, 1.0),
        ({}, 10000.0, 1.0),
    ],
    ids=str,
)
def test_rope_scaling_replaces_rope_parameters_as_a_whole(
    given: Config, theta: float, factor: float
) -> None:
    config = config_of("llama")
    del config["rope_parameters"]
    rope = decoder_config(config | given, 2).rope
    assert rope is not None
    np.testing.assert_allclose(rope.frequencies, theta ** (-np.arange(4) / 4) / factor)


def test_the_context_of_old_comes_from_beside_the_rotary_positions_first() -> None:
    def first(**changes: Any) -> float:
        rope = decoder_config(config_of("llama", **changes), 2).rope
        assert rope is not None
        return float(rope.frequencies[1])  # 0.1: a wave of 63 tokens

    inside = {"original_max_position_embeddings": 32}
    slowed, kept = 0.1 / 8, 0.1
    assert first(rope_scaling=LLAMA3 | inside) == pytest.approx(slowed)
    assert first(rope_scaling=LLAMA3 | inside, original_max_position_embeddings=512) == kept
    assert first(rope_scaling=LLAMA3, max_position_embeddings=32) == pytest.approx(slowed)
    assert first(rope_scaling=LLAMA3, max_position_embeddings=512) == kept


# What is refused

MOE = {"num_local_experts": 8}
UNSUPPORTED: list[tuple[str, Config, str]] = [
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type.*yarn"),
    ("qwen2", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    ("llama", {"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
    ("qwen3", {"rope_parameters": {"full_attention": DEFAULT}}, "rope_parameters"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("falcon", {"rope_scaling": LINEAR | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config.*gptq"),
    ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping.*found 50"),
    ("llama", {"embedding_multiplier": 12.0}, "embedding_multiplier.*expected 1, found 12"),
    ("llama", {"attention_multiplier": 0.0078125}, "attention_multiplier"),
    ("mistral", {"logits_scaling": 8}, "logits_scaling"),
    ("mistral", {"residual_multiplier": 0.2}, "residual_multiplier"),
    ("llama", MOE, "num_local_experts"),
    ("llama", {"qk_layernorm": True}, "qk_layernorm"),
    ("llama", {"sliding_window": 8}, "sliding_window"),
    ("llama", {"per_layer_config": {"0": {"num_key_value_heads": 1}}}, "per_layer_config"),
    ("mistral", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
    ("qwen2", {"layer_types": ["linear_attention", "full_attention"]}, "layer_types.*linear"),
    ("qwen2", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
    ("opt", {"num_key_value_heads": 2}, "num_key_value_heads"),
    ("persimmon", {"head_dim": 16}, "head_dim"),
    ("persimmon", {"use_parallel_residual": True}, "use_parallel_residual"),
    ("falcon", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn"),
    ("falcon", {"multi_query": False, "num_kv_heads": 2}, "num_kv_heads"),
    ("falcon", {"alibi": True}, "alibi"),
    ("falcon", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection"),
]


@pytest.mark.parametrize(("case", "changes", "message"), UNSUPPORTED, ids=str)
def test_what_is_not_computed_is_refused_by_name(case: str, changes: Config, message: str) -> None:
    config = config_of(case, **changes)
    with pytest.raises(UsageError, match=message):
        decoder_config(config, config["num_hidden_layers"])


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("llama", {"pretraining_tp": 2, "torch_dtype": "bfloat16", "use_cache": False}),
        ("llama", {"quantization_config": None, "embedding_multiplier": 1.0, "alibi": False}),
        ("llama", {"sliding_window": 8, "use_sliding_window": False}),
        ("llama", {"num_nextn_predict_layers": 1, "layer_types": ["full_attention"] * 2}),
        ("mistral", {"layer_types": ["sliding_attention"] * 2, "head_dim": None}),
    ],
    ids=str,
)
def test_keys_that_change_nothing_are_left_alone(case: str, changes: Config) -> None:
    assert meaning(decoder_config(config_of(case, **changes), 2)) == meaning(
        decoder_config(config_of(case), 2)
    )


LIES = (-1, 0, 1 << 40, 10**30, 1.5, float("nan"), float("inf"), True, "4", "x" * 5000, [], {}, [4])


@pytest.mark.parametrize("case", [*CASES, "openelm"])
def test_a_value_of_another_kind_is_refused_by_its_key(case: str) -> None:
    config = openelm.small_config() if case == "openelm" else config_of(case)
    layers = config.get("num_hidden_layers", 4)
    integers = {
        "hidden_size",
        "model_dim",
        "num_hidden_layers",
        "num_transformer_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "max_context_length",
        "num_gqa_groups",
    }
    for key in sorted(config.keys() & integers):
        for lie in (*LIES, None):
            with pytest.raises(
                FormatError, match=f"config.json, {key}: .*expected .*found"
            ) as info:
                decoder_config(config | {key: lie}, layers)
            assert len(str(info.value)) < 300


@pytest.mark.parametrize(
    ("case", "key", "lies"),
    [
        ("llama", "rms_norm_eps", (-1e-6, float("nan"), None, "1e-6", True, [])),
        ("phi", "layer_norm_eps", (float("inf"), None, "1e-5")),
        ("falcon", "layer_norm_epsilon", (float("-inf"), None, {})),
        ("llama", "rope_theta", (0, -1.0, float("nan"), None, "10000")),
        ("phi", "partial_rotary_factor", (None, "half", 0, 9)),
        ("llama", "rope_scaling", ("linear", 4, [4], {"rope_type": "linear"})),
        ("llama", "rope_scaling", (LINEAR | {"factor": 0}, LINEAR | {"factor": "4"})),
        ("llama", "rope_scaling", (LLAMA3 | {"low_freq_factor": 4.0},)),
        ("llama", "tie_word_embeddings", (1, "false", [])),
        ("llama", "num_key_value_heads", (0, -2, 3, 1.0, "2")),
        ("qwen3", "head_dim", (None, 0, 7, 1 << 20, "16")),
        ("mistral", "sliding_window", (0, -1, 1.0, "8", True)),
        ("qwen2", "layer_types", ("full_attention", [], ["full_attention"])),
        ("opt", "word_embed_proj_dim", (-1, 0, "32")),
        ("opt", "enable_bias", (1, "true")),
        ("llama", "eos_token_id", ("2", 2.0, True, [[2]], {"2": 2})),
        ("openelm", "num_query_heads", ([2, 4, 6], [2, 4, 6, 6], 8)),
        ("openelm", "qkv_multipliers", ("1", [], [0.5], [1, -1], None)),
        ("openelm", "ffn_with_glu", (False,)),
        ("openelm", "normalization_layer_name", ("layer_norm", None)),
    ],
    ids=str,
)
def test_a_value_that_cannot_be_is_refused(case: str, key: str, lies: tuple[Any, ...]) -> None:
    config = openelm.small_config() if case == "openelm" else config_of(case)
    if key in ("rope_theta", "partial_rotary_factor"):
        del config["rope_parameters"]
    layers = config.get("num_hidden_layers", 4)
    for lie in lies:
        with pytest.raises(BundleError):
            decoder_config(config | {key: lie}, layers)


def test_end_of_text_tokens_of_the_wrong_kind_are_refused_by_their_file(tmp_path: Path) -> None:
    for tokens in ("2", 2.0, True, [[2]]):
        lie = json.dumps({"eos_token_id": tokens})
        (tmp_path / "generation_config.json").write_text(lie)
        path = packed(tmp_path, config_of("llama"), tensors_of("llama"))
        with pytest.raises(FormatError, match=r"generation_config\.json, eos_token_id"):
            bundlefmt.load_model(path)


def test_learned_positions_have_a_row_for_every_token_of_the_context(tmp_path: Path) -> None:
    for context in (127, 129, 100_000):
        path = packed(
            tmp_path, config_of("opt", max_position_embeddings=context), tensors_of("opt")
        )
        with pytest.raises(
            FormatError, match=rf"embed_positions.*\[{context + 2}, 32\].*\[130, 32\]"
        ):
            bundlefmt.load_model(path)


def test_a_text_longer_than_any_memory_is_refused(tmp_path: Path) -> None:
    config = config_of("llama", max_position_embeddings=(1 << 31) - 1)
    with bundlefmt.load_model(packed(tmp_path, config, tensors_of("llama"))) as model:
        assert len(model.generate(IDS, 2)) == 2
        with pytest.raises(UsageError, match="not enough memory"):
            model.decoder.new_cache(1 << 60)


def test_heads_are_counted_by_openelm_from_its_multipliers() -> None:
    config = openelm.small_config()
    whole = decoder_config(config, 4)
    bare = {k: v for k, v in config.items() if k not in ("num_query_heads", "num_kv_heads")}
    assert decoder_config(bare, 4).layers == whole.layers
    assert [layer.heads for layer in whole.layers] == config["num_query_heads"]


# Tensors and their roles


def renamed(tensors: Tensors, old: str, new: str) -> Tensors:
    return {name.replace(old, new, 1): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("case", ["opt", "falcon", "llama3-rope", "phi-relu"])
def test_tied_embeddings_may_be_saved_as_the_head_alone(case: str, tmp_path: Path) -> None:
    tensors = tensors_of(case)
    (embed,) = (
        name for name in tensors if name.endswith(("embed_tokens.weight", "word_embeddings.weight"))
    )
    tensors["lm_head.weight"] = tensors.pop(embed)
    config = config_of(case, tie_word_embeddings=True)
    assert_close(logits(packed(tmp_path / "head", config, tensors)), fixture_logits(case, tmp_path))


def test_a_head_of_its_own_counts_even_where_the_config_ties_it(tmp_path: Path) -> None:
    # So transformers does: two tensors that differ are not tied.
    config = config_of("llama", tie_word_embeddings=True)
    assert_close(
        logits(packed(tmp_path, config, tensors_of("llama"))), fixture_logits("llama", tmp_path)
    )


@pytest.mark.parametrize(
    ("case", "changes", "head"),
    [
        ("llama", {}, "lm_head.weight"),
        ("llama", {"tie_word_embeddings": None}, "lm_head.weight"),
        ("falcon", {"tie_word_embeddings": False}, "lm_head.weight"),
        ("opt", {"tie_word_embeddings": False}, "lm_head.weight"),
    ],
)
def test_a_missing_head_is_refused(case: str, changes: Config, head: str) -> None:
    tensors = tensors_of(case)
    tensors.pop("lm_head.weight", None)
    config = config_of(case, **changes)
    reason = why_not(config, config["num_hidden_layers"], described(tensors))
    assert reason is not None
    assert reason.startswith(f"{head}: the model has no head")


def test_the_score_of_a_classifier_is_no_head(tmp_path: Path) -> None:
    tensors = tensors_of("llama")
    tensors["score.weight"] = tensors.pop("lm_head.weight")[:1]
    with pytest.raises(FormatError, match=r"lm_head.weight: .*no head.*found score.weight"):
        bundlefmt.load_model(packed(tmp_path, config_of("llama"), tensors))


def test_norms_without_weights_of_their_own_are_as_those_with_ones(tmp_path: Path) -> None:
    tensors = tensors_of("opt")
    norms = [name for name in tensors if "layer_norm" in name]
    plain = {
        name: np.full_like(tensor, name.endswith("weight")) if name in norms else tensor
        for name, tensor in tensors.items()
    }
    expected = logits(packed(tmp_path / "ones", config_of("opt"), plain))
    bare = {name: tensor for name, tensor in tensors.items() if name not in norms}
    config = config_of("opt", layer_norm_elementwise_affine=False)
    assert_close(logits(packed(tmp_path / "none", config, bare)), expected)


def test_an_opt_without_biases_is_as_one_with_zeros(tmp_path: Path) -> None:
    tensors = tensors_of("opt")
    biases = [name for name in tensors if name.endswith("bias") and "layer_norm" not in name]
    plain = tensors | {name: np.zeros_like(tensors[name]) for name in biases}
    expected = logits(packed(tmp_path / "zeros", config_of("opt"), plain))
    bare = {name: tensor for name, tensor in tensors.items() if name not in biases}
    path = packed(tmp_path / "none", config_of("opt", enable_bias=False), bare)
    assert_close(logits(path), expected)


@pytest.mark.parametrize(
    ("case", "old", "new"),
    [
        ("llama", "model.", ""),
        ("llama", "model.", "language_model.model."),
        ("opt", "model.decoder.", "decoder."),
        ("falcon", "transformer.", ""),
    ],
)
def test_one_prefix_is_found_whatever_it_is(case: str, old: str, new: str, tmp_path: Path) -> None:
    tensors = renamed(tensors_of(case), old, new)
    assert (
        why_not(config_of(case), config_of(case)["num_hidden_layers"], described(tensors)) is None
    )


def test_openelm_has_a_head_of_its_own_where_it_does_not_share(tmp_path: Path) -> None:
    config = openelm.small_config()
    tensors = openelm.random_checkpoint(config, seed=3)
    apart = {name: value for name, value in config.items() if not name.startswith("share_")}
    assert "no head" in str(why_not(apart, 4, described(tensors)))
    doubled = {"lm_head.weight": 2 * tensors["transformer.token_embeddings.weight"]}
    expected = 2 * openelm.logits(config, tensors, IDS).astype(np.float32)
    assert_close(logits(packed(tmp_path, apart, tensors | doubled)), expected)


def test_openelm_runs_without_its_prefix(tmp_path: Path) -> None:
    config = openelm.small_config()
    tensors = openelm.random_checkpoint(config, seed=3)
    path = packed(tmp_path, config, renamed(tensors, "transformer.", ""))
    assert_close(logits(path), openelm.logits(config, tensors, IDS).astype(np.float32))


FURTHER = {  # what checkpoints hold besides the model: layers for further tokens, a second reader
    "mtp.layers.0.input_layernorm.weight": (32,),
    "mtp.layers.0.self_attn.o_proj.weight": (32, 32),
    "mtp.norm.weight": (32,),
    "model.layers.2.input_layernorm.weight": (32,),
    "model.layers.2.self_attn.q_proj.weight": (32, 32),
    "model.layers.2.eh_proj.weight": (32, 64),
    "vision.embed_tokens.weight": (96, 32),
}


def test_tensors_of_other_parts_are_not_taken_for_the_models(tmp_path: Path) -> None:
    further = {name: np.full(shape, 9, np.float32) for name, shape in FURTHER.items()}
    path = packed(tmp_path / "mtp", config_of("llama"), tensors_of("llama") | further)
    with pytest.warns(UserWarning, match=r"7 tensors are not used: .*\.\.\.$"):
        found = logits(path)
    assert_close(found, fixture_logits("llama", tmp_path))
    assert FURTHER.keys() <= {
        *unused(config_of("llama"), 2, described(tensors_of("llama") | further))
    }


def test_two_models_in_one_file_are_refused_by_name() -> None:
    tensors = tensors_of("llama")
    both = renamed(tensors, "model.", "one.model.") | renamed(tensors, "model.", "two.model.")
    reason = why_not(config_of("llama"), 2, described(both))
    assert reason is not None
    assert "two tensors for one role" in reason
    assert "one.model.layers.0" in reason
    assert "two.model.layers.0" in reason


def test_what_an_adapter_left_behind_is_said_and_not_computed(tmp_path: Path) -> None:
    stem = "model.layers.1.self_attn.q_proj.lora"
    left = {f"{stem}_{part}.weight": np.ones((4, 32), np.float32) for part in "AB"}
    path = packed(tmp_path / "lora", config_of("llama"), tensors_of("llama") | left)
    with pytest.warns(UserWarning, match=f"2 tensors are not used: {stem}_A.weight, {stem}_B"):
        found = logits(path)
    assert_close(found, fixture_logits("llama", tmp_path))


def test_buffers_that_follow_from_the_config_are_no_left_overs(tmp_path: Path) -> None:
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    path = packed(tmp_path, config_of("llama"), tensors_of("llama") | buffers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(path)


LAYER = "model.layers.0.self_attn"


@pytest.mark.parametrize(
    ("case", "config", "added", "removed", "message"),
    [
        ("llama", {}, f"{LAYER}.q_proj.bias", None, "by its config"),
        ("llama", {}, f"{LAYER}.q_norm.weight", None, "by its config"),
        ("llama", {}, "lm_head.bias", None, "by its config"),
        ("llama", {"attention_bias": True}, None, None, "q_proj.bias: no such resident tensor"),
        ("mistral", {}, f"{LAYER}.k_proj.bias", None, "by its config"),
        ("qwen2", {}, None, f"{LAYER}.k_proj.bias", "k_proj.bias: no such resident tensor"),
        ("qwen2", {}, f"{LAYER}.o_proj.bias", None, "by its config"),
        ("qwen3", {}, None, f"{LAYER}.k_norm.weight", "k_norm.weight: no such resident tensor"),
        ("phi", {}, None, "lm_head.bias", "lm_head.bias: no such resident tensor"),
        ("opt", {}, None, "model.decoder.layers.0.self_attn.q_proj.bias", "q_proj.bias: no such"),
        ("opt", {"layer_norm_elementwise_affine": False}, None, None, "by its config"),
        ("opt", {"_remove_final_layer_norm": True}, None, None, "by its config"),
        ("opt", {"word_embed_proj_dim": 24}, None, None, r"expected \[96, 24\], found \[96, 32\]"),
        ("opt-post-norm", {"word_embed_proj_dim": None}, None, None, "expected .*32.*found"),
        (
            "llama",
            {},
            f"{LAYER}.q_proj.base_layer.weight",
            f"{LAYER}.q_proj.weight",
            "q_proj.weight: no such resident tensor: found .*base_layer",
        ),
    ],
)
def test_tensors_that_contradict_the_config_are_refused(
    case: str, config: Config, added: str | None, removed: str | None, message: str
) -> None:
    tensors = tensors_of(case)
    if removed is not None:
        del tensors[removed]
    if added is not None:
        tensors[added] = np.ones(32, np.float32)
    whole = config_of(case, **config)
    with pytest.raises(FormatError, match=message):
        unused(whole, whole["num_hidden_layers"], described(tensors))


@pytest.mark.parametrize(
    ("case", "changes"), [("llama", {"mlp_bias": True}), ("llama3-rope", {"mlp_bias": False})]
)
def test_biases_of_the_ffn_that_contradict_the_config_are_refused(
    case: str, changes: Config, tmp_path: Path
) -> None:
    path = packed(tmp_path, config_of(case), tensors_of(case))
    config = json.dumps(config_of(case, **changes)).encode()
    bundlefmt.append(path, blobs={"config.json": config})
    with pytest.raises(FormatError, match="FFN does not fit the config"):
        bundlefmt.load_model(path)


def test_why_not_says_nothing_of_what_runs_and_one_line_of_what_does_not() -> None:
    for case in CASES:
        config = config_of(case)
        tensors = described(tensors_of(case))
        layers = config["num_hidden_layers"]
        assert why_not(config, layers, tensors) is None
        assert why_not(config, layers + 1, tensors)
        assert "model_type" in str(why_not(config | {"model_type": "bloom"}, layers, tensors))


def test_weights_of_a_dtype_that_is_not_computed_are_refused() -> None:
    tensors = described(tensors_of("llama"))
    tensors[f"{LAYER}.q_proj.weight"].dtype = "F8_E4M3"
    assert "found F8_E4M3" in str(why_not(config_of("llama"), 2, tensors))

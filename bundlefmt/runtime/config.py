"""What a decoder computes, as data: one entry per `model_type` that runs.

Names of tensors stand here by role ({i} is the layer); they are matched by suffix, since prefixes
come and go. Numbers come from the model's config.json.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundlefmt.errors import FormatError, UsageError

_MAX_HEAD_DIM = 1 << 16  # no model is near it: a config that lies makes no large table


@dataclass(frozen=True)
class Attention:
    """One layer's attention: heads, key/value heads, and how far back a token sees (None: to the
    start)."""

    heads: int
    kv_heads: int
    window: int | None = None


@dataclass(frozen=True)
class Rope:
    """Rotary positions: one frequency per pair of a head's first numbers, float64 [pairs]; what
    is left of the head does not turn."""

    frequencies: NDArray[np.float64]


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only model. `norm` is `layer` or `rms`; `norm_first` says whether a block's norm
    stands before it or after the residual sum, `final_norm` whether one follows the last layer,
    `head_norms` whether q and k have one per head. In a `parallel` block the FFN has the block's
    input, as attention has, and no sum of the two; where it has no norm of its own, it shares
    attention's. The rows of a fused qkv projection are all queries, all keys, all values, or, when
    `qkv_by_group`, those of one key/value head after the other: its queries, its key, its value.
    Learned positions start at row `position_offset`."""

    d_model: int
    head_dim: int
    layers: tuple[Attention, ...]
    names: Mapping[str, str]
    norm: str
    norm_epsilon: float
    norm_first: bool = True
    final_norm: bool = True
    head_norms: bool = False
    parallel: bool = False
    qkv_by_group: bool = False
    rope: Rope | None = None
    position_offset: int | None = None
    context: int | None = None
    eos: frozenset[int] = frozenset()


# role -> suffix of the tensor's name. A head that a checkpoint lacks is tied to the embeddings;
# biases and projections that it lacks are left out.
_LLAMA_NAMES = {
    "embed": "embed_tokens.weight",
    "head": "lm_head",
    "norm": "norm",
    "attention_norm": "layers.{i}.input_layernorm",
    "ffn_norm": "layers.{i}.post_attention_layernorm",
    "q": "layers.{i}.self_attn.q_proj",
    "k": "layers.{i}.self_attn.k_proj",
    "v": "layers.{i}.self_attn.v_proj",
    "out": "layers.{i}.self_attn.o_proj",
    "q_norm": "layers.{i}.self_attn.q_norm",
    "k_norm": "layers.{i}.self_attn.k_norm",
}

_OPT_NAMES = {
    "embed": "embed_tokens.weight",
    "positions": "embed_positions.weight",
    "project_in": "project_in",
    "project_out": "project_out",
    "head": "lm_head",
    "norm": "decoder.final_layer_norm",
    "attention_norm": "decoder.layers.{i}.self_attn_layer_norm",
    "ffn_norm": "decoder.layers.{i}.final_layer_norm",
    "q": "decoder.layers.{i}.self_attn.q_proj",
    "k": "decoder.layers.{i}.self_attn.k_proj",
    "v": "decoder.layers.{i}.self_attn.v_proj",
    "out": "decoder.layers.{i}.self_attn.out_proj",
}

_OPENELM_NAMES = {
    "embed": "transformer.token_embeddings.weight",
    "head": "lm_head",
    "norm": "transformer.norm",
    "attention_norm": "layers.{i}.attn_norm",
    "ffn_norm": "layers.{i}.ffn_norm",
    "qkv": "layers.{i}.attn.qkv_proj",
    "out": "layers.{i}.attn.out_proj",
    "q_norm": "layers.{i}.attn.q_norm",
    "k_norm": "layers.{i}.attn.k_norm",
}

_PHI_NAMES = {
    "embed": "embed_tokens.weight",
    "head": "lm_head",
    "norm": "final_layernorm",
    "attention_norm": "layers.{i}.input_layernorm",
    "q": "layers.{i}.self_attn.q_proj",
    "k": "layers.{i}.self_attn.k_proj",
    "v": "layers.{i}.self_attn.v_proj",
    "out": "layers.{i}.self_attn.dense",
    "q_norm": "layers.{i}.self_attn.q_layernorm",
    "k_norm": "layers.{i}.self_attn.k_layernorm",
}

_PERSIMMON_NAMES = {
    "embed": "embed_tokens.weight",
    "head": "lm_head",
    "norm": "final_layernorm",
    "attention_norm": "layers.{i}.input_layernorm",
    "ffn_norm": "layers.{i}.post_attention_layernorm",
    "qkv": "layers.{i}.self_attn.query_key_value",
    "out": "layers.{i}.self_attn.dense",
    "q_norm": "layers.{i}.self_attn.q_layernorm",
    "k_norm": "layers.{i}.self_attn.k_layernorm",
}

_FALCON_NAMES = {
    "embed": "word_embeddings.weight",
    "head": "lm_head",
    "norm": "ln_f",
    "attention_norm": "h.{i}.input_layernorm",
    "qkv": "h.{i}.self_attention.query_key_value",
    "out": "h.{i}.self_attention.dense",
}
_FALCON_SEQUENTIAL = {"ffn_norm": "h.{i}.post_attention_layernorm"}
_FALCON_TWO_NORMS = {"attention_norm": "h.{i}.ln_attn", "ffn_norm": "h.{i}.ln_mlp"}


def decoder_config(config: Mapping[str, Any], layers: int) -> DecoderConfig:
    """The decoder that a config.json describes, of a file with FFNs for that many layers.

    Raises UsageError for a `model_type` or variant that this runtime does not compute, FormatError
    for a config that lacks a number or does not fit the file.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _DECODERS:
        raise UsageError(
            "this runtime does not compute such models",
            field="config.json, model_type",
            expected=", ".join(sorted(_DECODERS)),
            found=model_type,
        )
    try:
        decoder = _DECODERS[model_type](config, layers)
        _check(decoder, layers)
        return decoder
    except KeyError as error:
        raise FormatError(
            "missing from the config", field=f"config.json, {error.args[0]}"
        ) from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise FormatError(f"config not understood: {error}", field="config.json") from None


def _check(decoder: DecoderConfig, layers: int) -> None:
    """Refuse what no model has; ValueError says what."""
    if len(decoder.layers) != layers:
        raise ValueError(f"{len(decoder.layers)} layers, where the file has {layers}")
    if not 1 <= decoder.head_dim <= _MAX_HEAD_DIM:
        raise ValueError(f"heads of {decoder.head_dim} numbers")
    if decoder.rope is not None and 2 * decoder.rope.frequencies.size > decoder.head_dim:
        raise ValueError(f"rotary positions beyond heads of {decoder.head_dim} numbers")
    for layer in decoder.layers:
        if layer.heads < 1 or layer.kv_heads < 1 or layer.heads % layer.kv_heads:
            raise ValueError(f"{layer.heads} heads over {layer.kv_heads} key/value heads")
        if layer.window is not None and layer.window < 1:
            raise ValueError(f"a window of {layer.window} tokens")


def _layers(config: Mapping[str, Any], layers: int) -> int:
    """The config's number of layers, held against the file's before anything is made of it."""
    if int(config["num_hidden_layers"]) != layers:
        raise ValueError(f"{config['num_hidden_layers']} layers, where the file has {layers}")
    return layers


def _heads(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Heads, key/value heads, and how many numbers a head has."""
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    return heads, kv_heads, int(config.get("head_dim") or config["hidden_size"] // heads)


def _llama(config: Mapping[str, Any], layers: int) -> DecoderConfig:
    heads, kv_heads, head_dim = _heads(config)
    return DecoderConfig(
        d_model=int(config["hidden_size"]),
        head_dim=head_dim,
        layers=tuple(
            Attention(heads, kv_heads, window)
            for window in _windows(config, _layers(config, layers))
        ),
        names=_LLAMA_NAMES,
        norm="rms",
        norm_epsilon=float(config["rms_norm_eps"]),
        head_norms=config["model_type"] == "qwen3",
        rope=_rope(config, head_dim),
        context=_context(config, "max_position_embeddings"),
        eos=eos_of(config),
    )


def _opt(config: Mapping[str, Any], layers: int) -> DecoderConfig:
    heads = int(config["num_attention_heads"])
    norm_first = bool(config.get("do_layer_norm_before", True))
    return DecoderConfig(
        d_model=int(config["hidden_size"]),
        head_dim=int(config["hidden_size"]) // heads,
        layers=(Attention(heads, heads),) * _layers(config, layers),
        names=_OPT_NAMES,
        norm="layer",
        norm_epsilon=1e-5,
        norm_first=norm_first,
        final_norm=norm_first and not config.get("_remove_final_layer_norm", False),
        position_offset=2,
        context=_context(config, "max_position_embeddings"),
        eos=eos_of(config),
    )


def _openelm(config: Mapping[str, Any], layers: int) -> DecoderConfig:
    head_dim = int(config["head_dim"])
    pairs = zip(config["num_query_heads"], config["num_kv_heads"], strict=True)
    return DecoderConfig(
        d_model=int(config["model_dim"]),
        head_dim=head_dim,
        layers=tuple(Attention(int(heads), int(kv_heads)) for heads, kv_heads in pairs),
        names=_OPENELM_NAMES,
        norm="rms",
        norm_epsilon=1e-6,
        head_norms=bool(config.get("normalize_qk_projections", True)),
        rope=Rope(_frequencies(float(config.get("rope_freq_constant", 10000)), head_dim)),
        context=_context(config, "max_context_length"),
        eos=eos_of(config),
    )


def _phi(config: Mapping[str, Any], layers: int) -> DecoderConfig:
    heads, kv_heads, head_dim = _heads(config)
    return DecoderConfig(
        d_model=int(config["hidden_size"]),
        head_dim=head_dim,
        layers=(Attention(heads, kv_heads),) * _layers(config, layers),
        names=_PHI_NAMES,
        norm="layer",
        norm_epsilon=float(config["layer_norm_eps"]),
        head_norms=bool(config.get("qk_layernorm", False)),
        parallel=True,
        rope=_rope(config, head_dim, turning=0.5),
        context=_context(config, "max_position_embeddings"),
        eos=eos_of(config),
    )


def _persimmon(config: Mapping[str, Any], layers: int) -> DecoderConfig:
    heads, kv_heads, head_dim = _heads(config)
    return DecoderConfig(
        d_model=int(config["hidden_size"]),
        head_dim=head_dim,
        layers=(Attention(heads, kv_heads),) * _layers(config, layers),
        names=_PERSIMMON_NAMES,
        norm="layer",
        norm_epsilon=float(config["layer_norm_eps"]),
        head_norms=bool(config.get("qk_layernorm", True)),
        qkv_by_group=True,
        rope=_rope(config, head_dim, turning=0.5),
        context=_context(config, "max_position_embeddings"),
        eos=eos_of(config),
    )


def _falcon(config: Mapping[str, Any], layers: int) -> DecoderConfig:
    """The 7B (one key/value head, one norm), the 40B (groups, `new_decoder_architecture`, a norm
    each for attention and FFN), the 11B (groups, one norm), and blocks that are not parallel."""
    if config.get("alibi"):
        raise UsageError(
            "positions that this runtime does not compute",
            field="config.json, alibi",
            expected="false: rotary positions",
            found=True,
        )
    heads, _, head_dim = _heads(config)
    grouped = bool(config.get("new_decoder_architecture", False))
    parallel = grouped or bool(config.get("parallel_attn", True))
    if grouped:
        kv_heads = int(config.get("num_kv_heads") or heads)
    else:
        kv_heads = 1 if config.get("multi_query", True) else heads
    if not parallel:
        names = _FALCON_NAMES | _FALCON_SEQUENTIAL
    elif grouped and (config.get("num_ln_in_parallel_attn") or 2) == 2:
        names = _FALCON_NAMES | _FALCON_TWO_NORMS
    else:
        names = _FALCON_NAMES
    return DecoderConfig(
        d_model=int(config["hidden_size"]),
        head_dim=head_dim,
        layers=(Attention(heads, kv_heads),) * _layers(config, layers),
        names=names,
        norm="layer",
        norm_epsilon=float(config["layer_norm_epsilon"]),
        parallel=parallel,
        qkv_by_group=True,
        rope=_rope(config, head_dim),
        context=_context(config, "max_position_embeddings"),
        eos=eos_of(config),
    )


_DECODERS: dict[str, Callable[[Mapping[str, Any], int], DecoderConfig]] = {
    "opt": _opt,
    "llama": _llama,
    "sparsellama": _llama,  # ProSparse's
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "openelm": _openelm,
    "phi": _phi,
    "persimmon": _persimmon,
    "falcon": _falcon,
}


def eos_of(config: Mapping[str, Any]) -> frozenset[int]:
    """The end-of-text tokens that a config names: one, several, or none."""
    found = config.get("eos_token_id")
    return frozenset(found if isinstance(found, list) else [] if found is None else [found])


def _context(config: Mapping[str, Any], key: str) -> int | None:
    found = config.get(key)
    return None if found is None else int(found)


def _windows(config: Mapping[str, Any], layers: int) -> list[int | None]:
    """Each layer's sliding window. Mistral's holds for all layers; Qwen's must be switched on, and
    holds from layer `max_window_layers` on unless `layer_types` says for which."""
    window = config.get("sliding_window")
    mistral = config["model_type"] == "mistral"
    if window is None or not config.get("use_sliding_window", mistral):
        return [None] * layers
    full = 0 if mistral else int(config.get("max_window_layers", layers))
    kinds = config.get("layer_types") or (
        ["full_attention"] * min(full, layers) + ["sliding_attention"] * (layers - full)
    )
    return [int(window) if kind == "sliding_attention" else None for kind in kinds]


def _rope(config: Mapping[str, Any], head_dim: int, turning: float = 1.0) -> Rope:
    """Rotary positions by `rope_parameters` (newer configs) or `rope_theta` and `rope_scaling`.
    `turning` is the share of a head that turns where the config does not say."""
    parameters = {
        "rope_theta": config.get("rope_theta", 10000.0),
        "partial_rotary_factor": config.get("partial_rotary_factor", turning),
        **(config.get("rope_scaling") or {}),
        **(config.get("rope_parameters") or {}),
    }
    width = int(head_dim * float(parameters["partial_rotary_factor"]))
    frequencies = _frequencies(float(parameters["rope_theta"]), width)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "linear":
        return Rope(frequencies / float(parameters["factor"]))
    if kind == "llama3":
        return Rope(_llama3(frequencies, parameters))
    if kind != "default":
        raise UsageError(
            "rope scaling that this runtime does not compute",
            field="config.json, rope_scaling",
            expected="default, linear, llama3",
            found=kind,
        )
    return Rope(frequencies)


def _frequencies(theta: float, width: int) -> NDArray[np.float64]:
    """The frequencies of `width` numbers that turn in pairs."""
    if not 2 <= width <= _MAX_HEAD_DIM or width % 2:
        raise ValueError(f"rotary positions over {width} numbers of a head")
    exponents = np.arange(0, width, 2, dtype=np.float64) / width
    frequencies: NDArray[np.float64] = theta**-exponents
    return frequencies


def _llama3(frequencies: NDArray[np.float64], parameters: Mapping[str, Any]) -> NDArray[np.float64]:
    """Llama 3.1's scaling: long wavelengths are slowed by `factor`, short ones kept, those in
    between blended."""
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    context = float(parameters["original_max_position_embeddings"])
    turns = context * frequencies / (2 * math.pi)  # turns that a pair makes in the old context
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (kept + (1 - kept) / float(parameters["factor"]))

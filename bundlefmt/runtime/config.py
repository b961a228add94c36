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


@dataclass(frozen=True)
class Attention:
    """One layer's attention: heads, key/value heads, and how far back a token sees (None: to the
    start)."""

    heads: int
    kv_heads: int
    window: int | None = None


@dataclass(frozen=True)
class Rope:
    """Rotary positions: one frequency per pair of a head's numbers, float64 [head_dim / 2]."""

    frequencies: NDArray[np.float64]


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only model. `norm` is `layer` or `rms`; `norm_first` says whether a block's norm
    stands before it or after the residual sum. Learned positions start at row
    `position_offset`."""

    d_model: int
    head_dim: int
    layers: tuple[Attention, ...]
    names: Mapping[str, str]
    norm: str
    norm_epsilon: float
    norm_first: bool = True
    rope: Rope | None = None
    position_offset: int | None = None
    context: int | None = None
    eos: frozenset[int] = frozenset()


# role -> suffix of the tensor's name. A role that a checkpoint lacks is left out of the
# arithmetic where that makes sense (biases, projections, q/k norms, a final norm).
_LLAMA_NAMES = {
    "embed": "embed_tokens.weight",
    "head": "lm_head.weight",
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
    "head": "lm_head.weight",
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
    "head": "lm_head.weight",
    "norm": "transformer.norm",
    "attention_norm": "layers.{i}.attn_norm",
    "ffn_norm": "layers.{i}.ffn_norm",
    "qkv": "layers.{i}.attn.qkv_proj",
    "out": "layers.{i}.attn.out_proj",
    "q_norm": "layers.{i}.attn.q_norm",
    "k_norm": "layers.{i}.attn.k_norm",
}


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a config.json describes.

    Raises UsageError for a `model_type` or variant that this runtime does not compute, FormatError
    for a config that lacks a number.
    """
    model_type = config.get("model_type")
    if model_type not in _DECODERS:
        raise UsageError(
            "this runtime does not compute such models",
            field="config.json, model_type",
            expected=", ".join(sorted(_DECODERS)),
            found=model_type,
        )
    try:
        return _DECODERS[model_type](config)
    except KeyError as error:
        raise FormatError(
            "missing from the config", field=f"config.json, {error.args[0]}"
        ) from None
    except (TypeError, ValueError) as error:
        raise FormatError(f"config not understood: {error}", field="config.json") from None


def _llama(config: Mapping[str, Any]) -> DecoderConfig:
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    return DecoderConfig(
        d_model=int(config["hidden_size"]),
        head_dim=head_dim,
        layers=tuple(Attention(heads, kv_heads, window) for window in _windows(config)),
        names=_LLAMA_NAMES,
        norm="rms",
        norm_epsilon=float(config["rms_norm_eps"]),
        rope=_rope(config, head_dim),
        context=config.get("max_position_embeddings"),
        eos=_eos(config),
    )


def _opt(config: Mapping[str, Any]) -> DecoderConfig:
    heads = int(config["num_attention_heads"])
    return DecoderConfig(
        d_model=int(config["hidden_size"]),
        head_dim=int(config["hidden_size"]) // heads,
        layers=(Attention(heads, heads),) * int(config["num_hidden_layers"]),
        names=_OPT_NAMES,
        norm="layer",
        norm_epsilon=1e-5,
        norm_first=bool(config.get("do_layer_norm_before", True)),
        position_offset=2,
        context=int(config["max_position_embeddings"]),
        eos=_eos(config),
    )


def _openelm(config: Mapping[str, Any]) -> DecoderConfig:
    head_dim = int(config["head_dim"])
    pairs = zip(config["num_query_heads"], config["num_kv_heads"], strict=True)
    return DecoderConfig(
        d_model=int(config["model_dim"]),
        head_dim=head_dim,
        layers=tuple(Attention(int(heads), int(kv_heads)) for heads, kv_heads in pairs),
        names=_OPENELM_NAMES,
        norm="rms",
        norm_epsilon=1e-6,
        rope=Rope(_frequencies(float(config.get("rope_freq_constant", 10000)), head_dim)),
        context=config.get("max_context_length"),
        eos=_eos(config),
    )


_DECODERS: dict[str, Callable[[Mapping[str, Any]], DecoderConfig]] = {
    "opt": _opt,
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "openelm": _openelm,
}


def _eos(config: Mapping[str, Any]) -> frozenset[int]:
    found = config.get("eos_token_id")
    return frozenset(found if isinstance(found, list) else [] if found is None else [found])


def _windows(config: Mapping[str, Any]) -> list[int | None]:
    """Each layer's sliding window. Qwen's `use_sliding_window` must be on for it to count."""
    layers = int(config["num_hidden_layers"])
    window = config.get("sliding_window")
    if window is None or not config.get("use_sliding_window", True):
        return [None] * layers
    kinds = config.get("layer_types") or ["sliding_attention"] * layers
    return [int(window) if kind == "sliding_attention" else None for kind in kinds]


def _rope(config: Mapping[str, Any], head_dim: int) -> Rope:
    """Rotary positions by `rope_parameters` (newer configs) or `rope_theta` and `rope_scaling`."""
    parameters = {
        "rope_theta": config.get("rope_theta", 10000.0),
        **(config.get("rope_scaling") or {}),
        **(config.get("rope_parameters") or {}),
    }
    frequencies = _frequencies(float(parameters["rope_theta"]), head_dim)
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


def _frequencies(theta: float, head_dim: int) -> NDArray[np.float64]:
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
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

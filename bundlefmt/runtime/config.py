"""What a decoder computes, as data: one entry per `model_type` that runs.

Names of tensors stand here by role ({i} is the layer), without the prefix that a checkpoint gives
them all. Numbers come from the model's config.json; what it leaves out is what the model's class in
transformers (OpenELM: in Apple's code) takes for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bundlefmt.errors import FormatError, UsageError
from bundlefmt.runtime.fields import Fields, is_number
from bundlefmt.runtime.rope import MAX_HEAD_DIM, Rope, frequencies_of, rope_of

ATTENTION_ROLES = frozenset({"qkv", "q", "k", "v", "out"})  # of its linear maps
_NONE: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Attention:
    """One layer's attention: heads, key/value heads, and how far back a token sees (None: to the
    start)."""

    heads: int
    kv_heads: int
    window: int | None = None


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only model. `norm` is `layer` or `rms`, with weights of its own where `affine`;
    `norm_first` says whether a block's norm stands before it or after the residual sum,
    `final_norm` whether one follows the last layer, `head_norms` whether q and k have one per head.
    `biased` are the roles of the linear maps that have a bias, with `ffn` for those of the FFN.
    Embeddings are `embed_width` wide, and projected where that is not d_model; with `tied`, they
    are the head too. In a `parallel` block the FFN has the block's input, as attention has, and no
    sum of the two; where it has no norm of its own, it shares attention's. The rows of a fused qkv
    projection are all queries, all keys, all values, or, when `qkv_by_group`, those of one
    key/value head after the other: its queries, its key, its value. Learned positions start at row
    `position_offset`. `base` is the prefix that transformers gives the tensors of `names`."""

    d_model: int
    head_dim: int
    layers: tuple[Attention, ...]
    base: str
    names: Mapping[str, str]
    norm: str
    norm_epsilon: float
    embed_width: int
    context: int
    tied: bool
    eos: frozenset[int]
    biased: frozenset[str] = frozenset()
    affine: bool = True
    norm_first: bool = True
    final_norm: bool = True
    head_norms: bool = False
    parallel: bool = False
    qkv_by_group: bool = False
    rope: Rope | None = None
    position_offset: int | None = None


# role -> name of the tensors, without prefix and `.weight` or `.bias`
_LLAMA_NAMES = {
    "embed": "embed_tokens",
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
    "embed": "embed_tokens",
    "positions": "embed_positions",
    "project_in": "project_in",
    "project_out": "project_out",
    "head": "lm_head",
    "norm": "final_layer_norm",
    "attention_norm": "layers.{i}.self_attn_layer_norm",
    "ffn_norm": "layers.{i}.final_layer_norm",
    "q": "layers.{i}.self_attn.q_proj",
    "k": "layers.{i}.self_attn.k_proj",
    "v": "layers.{i}.self_attn.v_proj",
    "out": "layers.{i}.self_attn.out_proj",
}

_OPENELM_NAMES = {
    "embed": "token_embeddings",
    "head": "lm_head",
    "norm": "norm",
    "attention_norm": "layers.{i}.attn_norm",
    "ffn_norm": "layers.{i}.ffn_norm",
    "qkv": "layers.{i}.attn.qkv_proj",
    "out": "layers.{i}.attn.out_proj",
    "q_norm": "layers.{i}.attn.q_norm",
    "k_norm": "layers.{i}.attn.k_norm",
}

_PHI_NAMES = {
    "embed": "embed_tokens",
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
    "embed": "embed_tokens",
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
    "embed": "word_embeddings",
    "head": "lm_head",
    "norm": "ln_f",
    "attention_norm": "h.{i}.input_layernorm",
    "qkv": "h.{i}.self_attention.query_key_value",
    "out": "h.{i}.self_attention.dense",
}
_FALCON_SEQUENTIAL = {"ffn_norm": "h.{i}.post_attention_layernorm"}
_FALCON_TWO_NORMS = {"attention_norm": "h.{i}.ln_attn", "ffn_norm": "h.{i}.ln_mlp"}

# model_type -> what its class takes for a key of config.json that is absent: all keys that the
# decoder is computed by, besides the rotary ones (`runtime.rope`).
_LLAMA_DEFAULTS: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}
_QWEN_DEFAULTS: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
    "tie_word_embeddings": False,
    "eos_token_id": None,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "opt": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 2048,
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "word_embed_proj_dim": None,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
    },
    "llama": _LLAMA_DEFAULTS,
    "sparsellama": _LLAMA_DEFAULTS,
    "mistral": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": None,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
    },
    "qwen2": _QWEN_DEFAULTS | {"head_dim": None},
    "qwen3": _QWEN_DEFAULTS | {"head_dim": 128, "attention_bias": False},
    "openelm": {
        "model_dim": 2048,
        "num_transformer_layers": 12,
        "head_dim": 128,
        "qkv_multipliers": 1.0,
        "num_gqa_groups": 1,
        "num_query_heads": None,
        "num_kv_heads": None,
        "max_context_length": 2048,
        "ffn_with_glu": True,
        "normalization_layer_name": "rms_norm",
        "normalize_qk_projections": False,
        "share_input_output_layers": False,
        "rope_freq_constant": 10000,
        "eos_token_id": 2,
    },
    "phi": {
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "qk_layernorm": False,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
    },
    "persimmon": {
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "max_position_embeddings": 16384,
        "layer_norm_eps": 1e-5,
        "qk_layernorm": True,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
    },
    "falcon": {
        "hidden_size": 4544,
        "n_embed": None,
        "num_hidden_layers": 32,
        "num_attention_heads": 71,
        "num_kv_heads": None,
        "num_ln_in_parallel_attn": None,
        "max_position_embeddings": 2048,
        "layer_norm_epsilon": 1e-5,
        "alibi": False,
        "new_decoder_architecture": False,
        "multi_query": True,
        "parallel_attn": True,
        "bias": False,
        "tie_word_embeddings": True,
        "eos_token_id": 11,
    },
}

# Keys by which models of other types compute something else. A config that has one, set, for a type
# that does not know it was not made for what would be computed. They must be false, empty or null;
_SWITCHES = (
    "add_cross_attention",
    "alibi",
    "apply_residual_connection_post_layernorm",
    "attention_chunk_size",
    "attention_multiplier",
    "attn_logit_softcapping",
    "clip_qkv",
    "compression_config",
    "final_logit_softcapping",
    "is_encoder_decoder",
    "n_routed_experts",
    "no_rope_layers",
    "num_experts",
    "num_local_experts",
    "per_layer_config",
    "pruned_heads",
    "qk_layernorm",
    "quantization_config",
    "query_pre_attn_scalar",
    "rope_interleaved",
    "use_alibi",
    "use_parallel_residual",
)
# these 1, or null.
_FACTORS = (
    "embedding_multiplier",
    "logit_scale",
    "logits_scaling",
    "residual_multiplier",
    "rotary_pct",
)


def decoder_config(config: Mapping[str, Any], layers: int) -> DecoderConfig:
    """The decoder that a config.json describes, of a file with FFNs for that many layers.

    Raises UsageError for a `model_type` or variant that this runtime does not compute, FormatError
    for values of the wrong kind, and for a config that does not fit the file.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _DECODERS:
        raise UsageError(
            "unsupported model type",
            field="config.json, model_type",
            expected=", ".join(sorted(_DECODERS)),
            found=str(model_type)[:60],
        )
    fields = Fields(config, DEFAULTS[model_type])
    decoder = _DECODERS[model_type](fields, config, layers)
    _check_heads(decoder)
    _refuse_strange_keys(decoder, fields, config)
    return decoder


def eos_of(config: Mapping[str, Any], file: str = "config.json") -> frozenset[int]:
    """The end-of-text tokens that a config names: one, several, or none. `file` is its name, for
    the FormatError that other values raise."""
    found = config.get("eos_token_id")
    tokens = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(token) is int for token in tokens):
        raise FormatError(
            "value not understood",
            field=f"{file}, eos_token_id",
            expected="an integer, a list of them, or null",
            found=repr(found)[:60],
        )
    return frozenset(tokens)


def _check_heads(decoder: DecoderConfig) -> None:
    """Refuse heads that cannot be."""
    if not 1 <= decoder.head_dim <= MAX_HEAD_DIM:
        raise FormatError(
            "heads of a size that no model has",
            field="config.json",
            expected=f"1 to {MAX_HEAD_DIM} numbers",
            found=decoder.head_dim,
        )
    for layer in decoder.layers:
        if layer.heads % layer.kv_heads:
            raise FormatError(
                "query heads are not shared evenly",
                field="config.json",
                expected=f"a multiple of {layer.kv_heads} key/value heads",
                found=layer.heads,
            )


def _refuse_strange_keys(decoder: DecoderConfig, fields: Fields, config: Mapping[str, Any]) -> None:
    """Refuse keys that the model's class does not know, where they mean something else than what
    it computes."""
    first = decoder.layers[0]
    kind = "full_attention" if first.window is None else "sliding_attention"
    computed: dict[str, Any] = dict.fromkeys(_FACTORS, 1)
    computed["head_dim"] = decoder.head_dim
    computed["num_key_value_heads"] = first.kv_heads
    computed["layer_types"] = [kind] * len(decoder.layers)
    if config.get("use_sliding_window") is not False:
        computed["sliding_window"] = None
    for key, value in computed.items():
        if not fields.knows(key) and config.get(key) not in (None, value):
            raise fields.unsupported(key, str(value)[:60])
    for key in _SWITCHES:
        if not fields.knows(key) and config.get(key):
            raise fields.unsupported(key, "none")


def _layers(fields: Fields, layers: int, key: str = "num_hidden_layers") -> int:
    """The config's number of layers, held against the file's before anything is made of it."""
    if fields.integer(key) != layers:
        raise fields.wrong(key, f"{layers}, the layers of the file")
    return layers


def _eos(fields: Fields) -> frozenset[int]:
    return eos_of({"eos_token_id": fields.value("eos_token_id")})


def _plain_head_dim(fields: Fields) -> int:
    """The numbers of a head where d_model is divided among them."""
    return fields.integer("hidden_size") // fields.integer("num_attention_heads")


def _kv_heads(fields: Fields, heads: int) -> int:
    return fields.optional_integer("num_key_value_heads") or heads


def _llama(fields: Fields, config: Mapping[str, Any], layers: int) -> DecoderConfig:
    decoder = _like_llama(fields, config, [None] * _layers(fields, layers))
    biased = ATTENTION_ROLES if fields.flag("attention_bias") else _NONE
    return replace(decoder, biased=biased | {"ffn"} if fields.flag("mlp_bias") else biased)


def _mistral(fields: Fields, config: Mapping[str, Any], layers: int) -> DecoderConfig:
    window = fields.optional_integer("sliding_window")
    return _like_llama(fields, config, [window] * _layers(fields, layers))


def _qwen2(fields: Fields, config: Mapping[str, Any], layers: int) -> DecoderConfig:
    decoder = _like_llama(fields, config, _windows(fields, layers))
    return replace(decoder, biased=ATTENTION_ROLES - {"out"})


def _qwen3(fields: Fields, config: Mapping[str, Any], layers: int) -> DecoderConfig:
    fields.integer("head_dim")  # null is refused here
    decoder = _like_llama(fields, config, _windows(fields, layers))
    biased = ATTENTION_ROLES if fields.flag("attention_bias") else _NONE
    return replace(decoder, biased=biased, head_norms=True)


def _like_llama(
    fields: Fields, config: Mapping[str, Any], windows: Sequence[int | None]
) -> DecoderConfig:
    """What Llama and its successors have in common; one window per layer."""
    heads = fields.integer("num_attention_heads")
    kv_heads = _kv_heads(fields, heads)
    head_dim = fields.optional_integer("head_dim") or _plain_head_dim(fields)
    context = fields.integer("max_position_embeddings")
    return DecoderConfig(
        d_model=fields.integer("hidden_size"),
        head_dim=head_dim,
        layers=tuple(Attention(heads, kv_heads, window) for window in windows),
        base="model.",
        names=_LLAMA_NAMES,
        norm="rms",
        norm_epsilon=fields.number("rms_norm_eps", zero=True),
        embed_width=fields.integer("hidden_size"),
        context=context,
        tied=fields.flag("tie_word_embeddings"),
        eos=_eos(fields),
        rope=rope_of(config, head_dim, context),
    )


def _windows(fields: Fields, layers: int) -> list[int | None]:
    """Each layer's sliding window in a Qwen. It must be switched on, and holds from layer
    `max_window_layers` on unless `layer_types` says for which."""
    layers = _layers(fields, layers)
    window = None
    if fields.flag("use_sliding_window"):
        window = fields.optional_integer("sliding_window")
    kinds = fields.value("layer_types")
    if kinds is None:
        full = layers if window is None else fields.integer("max_window_layers", least=0)
        return [None if layer < full else window for layer in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise fields.wrong("layer_types", f"a list of {layers}, one for each layer")
    known = ("full_attention",) if window is None else ("full_attention", "sliding_attention")
    if not all(kind in known for kind in kinds):
        raise fields.unsupported("layer_types", " or ".join(known))
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _opt(fields: Fields, config: Mapping[str, Any], layers: int) -> DecoderConfig:
    layers = _layers(fields, layers)
    heads, d_model = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    norm_first = fields.flag("do_layer_norm_before")
    return DecoderConfig(
        d_model=d_model,
        head_dim=_plain_head_dim(fields),
        layers=(Attention(heads, heads),) * layers,
        base="model.decoder.",
        names=_OPT_NAMES,
        norm="layer",
        norm_epsilon=1e-5,
        embed_width=fields.optional_integer("word_embed_proj_dim") or d_model,
        context=fields.integer("max_position_embeddings"),
        tied=fields.flag("tie_word_embeddings"),
        eos=_eos(fields),
        biased=ATTENTION_ROLES | {"ffn"} if fields.flag("enable_bias") else _NONE,
        affine=fields.flag("layer_norm_elementwise_affine"),
        norm_first=norm_first,
        final_norm=norm_first and not fields.flag("_remove_final_layer_norm"),
        position_offset=2,
    )


def _openelm(fields: Fields, config: Mapping[str, Any], layers: int) -> DecoderConfig:
    layers = _layers(fields, layers, "num_transformer_layers")
    if not fields.flag("ffn_with_glu"):
        raise fields.unsupported("ffn_with_glu", "true")
    if fields.value("normalization_layer_name") != "rms_norm":
        raise fields.unsupported("normalization_layer_name", "rms_norm")
    d_model, head_dim = fields.integer("model_dim"), fields.integer("head_dim")
    theta = fields.number("rope_freq_constant")
    return DecoderConfig(
        d_model=d_model,
        head_dim=head_dim,
        layers=tuple(_openelm_attention(fields, layers)),
        base="transformer.",
        names=_OPENELM_NAMES,
        norm="rms",
        norm_epsilon=1e-6,
        embed_width=d_model,
        context=fields.integer("max_context_length"),
        tied=fields.flag("share_input_output_layers"),
        eos=_eos(fields),
        head_norms=fields.flag("normalize_qk_projections"),
        rope=Rope(frequencies_of(theta, head_dim)),
    )


def _openelm_attention(fields: Fields, layers: int) -> list[Attention]:
    """The heads of each layer. They follow from `qkv_multipliers`, one for all layers or those of
    the first and the last, with equal steps between; lists of heads beside it only repeat them."""
    d_model, head_dim = fields.integer("model_dim"), fields.integer("head_dim")
    groups = fields.integer("num_gqa_groups")
    given = fields.value("qkv_multipliers")
    ends = given if isinstance(given, list) else [given, given]
    if len(ends) != 2 or not all(is_number(end) for end in ends):
        raise fields.wrong("qkv_multipliers", "a number above 0, or a list of two")
    multipliers = [round(float(step), 2) for step in np.linspace(ends[0], ends[1], num=layers)]
    heads = [_divisible(d_model * step, head_dim * groups) // head_dim for step in multipliers]
    found = [Attention(count, count // groups) for count in heads]
    for key, counts in (
        ("num_query_heads", [layer.heads for layer in found]),
        ("num_kv_heads", [layer.kv_heads for layer in found]),
    ):
        if fields.value(key) not in (None, counts):
            raise fields.wrong(key, f"{str(counts)[:60]}, by qkv_multipliers")
    return found


def _divisible(value: float, divisor: int) -> int:
    """The multiple of `divisor` nearest to `value`, yet never below nine tenths of it."""
    nearest = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * value else nearest


def _phi(fields: Fields, config: Mapping[str, Any], layers: int) -> DecoderConfig:
    layers = _layers(fields, layers)
    heads = fields.integer("num_attention_heads")
    kv_heads = _kv_heads(fields, heads)
    head_dim = fields.optional_integer("head_dim") or _plain_head_dim(fields)
    context = fields.integer("max_position_embeddings")
    return DecoderConfig(
        d_model=fields.integer("hidden_size"),
        head_dim=head_dim,
        layers=(Attention(heads, kv_heads),) * layers,
        base="model.",
        names=_PHI_NAMES,
        norm="layer",
        norm_epsilon=fields.number("layer_norm_eps", zero=True),
        embed_width=fields.integer("hidden_size"),
        context=context,
        tied=fields.flag("tie_word_embeddings"),
        eos=_eos(fields),
        biased=ATTENTION_ROLES | {"ffn", "head"},
        head_norms=fields.flag("qk_layernorm"),
        parallel=True,
        rope=rope_of(config, head_dim, context, turning=0.5),
    )


def _persimmon(fields: Fields, config: Mapping[str, Any], layers: int) -> DecoderConfig:
    layers = _layers(fields, layers)
    heads, head_dim = fields.integer("num_attention_heads"), _plain_head_dim(fields)
    context = fields.integer("max_position_embeddings")
    return DecoderConfig(
        d_model=fields.integer("hidden_size"),
        head_dim=head_dim,
        layers=(Attention(heads, heads),) * layers,
        base="model.",
        names=_PERSIMMON_NAMES,
        norm="layer",
        norm_epsilon=fields.number("layer_norm_eps", zero=True),
        embed_width=fields.integer("hidden_size"),
        context=context,
        tied=fields.flag("tie_word_embeddings"),
        eos=_eos(fields),
        biased=ATTENTION_ROLES | {"ffn"},
        head_norms=fields.flag("qk_layernorm"),
        qkv_by_group=True,
        rope=rope_of(config, head_dim, context, turning=0.5),
    )


def _falcon(fields: Fields, config: Mapping[str, Any], layers: int) -> DecoderConfig:
    """The 7B (one key/value head, one norm), the 40B (groups, `new_decoder_architecture`, a norm
    each for attention and FFN), the 11B (groups, one norm), and blocks that are not parallel."""
    layers = _layers(fields, layers)
    if fields.flag("alibi"):
        raise fields.unsupported("alibi", "false: rotary positions")
    d_model = fields.optional_integer("n_embed") or fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    head_dim = d_model // heads
    context = fields.integer("max_position_embeddings")
    grouped = fields.flag("new_decoder_architecture")
    parallel = grouped or fields.flag("parallel_attn")
    norms = fields.optional_integer("num_ln_in_parallel_attn") or (2 if grouped else 1)
    if parallel and norms != 1 and not (grouped and norms == 2):
        raise fields.unsupported("num_ln_in_parallel_attn", "1, or 2 in the new architecture")
    kv_heads = fields.optional_integer("num_kv_heads") or heads
    if not grouped and fields.flag("multi_query"):
        kv_heads = 1
    elif not grouped and kv_heads != heads:
        raise fields.unsupported("num_kv_heads", f"{heads}, the number of heads")
    if not parallel:
        names = _FALCON_NAMES | _FALCON_SEQUENTIAL
    else:
        names = _FALCON_NAMES | (_FALCON_TWO_NORMS if norms == 2 else {})
    return DecoderConfig(
        d_model=d_model,
        head_dim=head_dim,
        layers=(Attention(heads, kv_heads),) * layers,
        base="transformer.",
        names=names,
        norm="layer",
        norm_epsilon=fields.number("layer_norm_epsilon", zero=True),
        embed_width=d_model,
        context=context,
        tied=fields.flag("tie_word_embeddings"),
        eos=_eos(fields),
        biased=ATTENTION_ROLES | {"ffn"} if fields.flag("bias") else _NONE,
        parallel=parallel,
        qkv_by_group=True,
        rope=rope_of(config, head_dim, context),
    )


_DECODERS: dict[str, Callable[[Fields, Mapping[str, Any], int], DecoderConfig]] = {
    "opt": _opt,
    "llama": _llama,
    "sparsellama": _llama,  # ProSparse's
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "openelm": _openelm,
    "phi": _phi,
    "persimmon": _persimmon,
    "falcon": _falcon,
}

"""Families of models: which tensors of a checkpoint are FFN weights, and which neuron is where.

A family is one entry of FAMILIES. Tensor names are matched by suffix, since prefixes such as
`model.` come and go between checkpoints of one family. Activations are those that transformers'
classes compute: each reads one key of config.json, and has one default where it is absent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bundlefmt.checkpoints.sources import SourceTensor
from bundlefmt.errors import FormatError, UsageError
from bundlefmt.layout.constants import PartName


@dataclass(frozen=True)
class PartRule:
    """Where the vectors of one part lie: in the tensor whose name ends with `suffix` ({i} is the
    layer, {e} the expert), one neuron per index of `axis`; `half` of a tensor that fuses two
    parts along that axis (None: the whole of it)."""

    suffix: str
    axis: int = 0
    half: int | None = None


@dataclass(frozen=True)
class FfnRule:
    """The tensors of one kind of FFN."""

    parts: Mapping[PartName, PartRule]


@dataclass(frozen=True)
class Family:
    """A family: its name, the `model_type`s that use its names and its activation, and its kinds of
    FFN.

    `activation` is what its classes compute where config.json lacks `activation_key`; of the
    `undefaulted`, whose code is not transformers' own, that is not known. `beside` are the names,
    below a layer's, of what belongs to its FFNs and is no part of a neuron: norms, routers, shared
    experts. `biased` says whether FFNs have biases, or which key of config.json does, and what
    holds where that is absent. `head` is the output head's name (None: it has none), which is tied
    to the embeddings if config.json's `tie_key`, by default `tied`, says so.
    """

    name: str
    model_types: tuple[str, ...]
    rules: tuple[FfnRule, ...]
    activation: str
    activation_key: str = "hidden_act"
    beside: tuple[str, ...] = ()
    biased: bool | tuple[str, bool] = False
    head: str | None = "lm_head"
    tied: bool = False
    tie_key: str = "tie_word_embeddings"
    undefaulted: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)  # activations that mean another here


@dataclass(frozen=True)
class PartSource:
    """A part's vectors in a checkpoint: neuron i's is `tensor[start + i]` along `axis`; `bias`
    names the tensor of its biases."""

    tensor: SourceTensor
    axis: int
    start: int
    bias: str | None


@dataclass(frozen=True)
class Ffn:
    """One FFN of a checkpoint: it becomes one group."""

    layer: int
    expert: int | None
    neurons: int
    d_model: int
    parts: dict[PartName, PartSource]


@dataclass(frozen=True)
class Activation:
    """An activation function by name, with its threshold where it has one (fatrelu)."""

    name: str
    threshold: float | None = None


def _gated(stem: str, gate: str, up: str, down: str) -> FfnRule:
    return FfnRule(
        {
            "gate": PartRule(f"{stem}.{gate}.weight"),
            "up": PartRule(f"{stem}.{up}.weight"),
            "down": PartRule(f"{stem}.{down}.weight", axis=1),
        }
    )


def _fused(stem: str, gate_up: str, down: str) -> FfnRule:
    return FfnRule(
        {
            "gate": PartRule(f"{stem}.{gate_up}.weight", half=0),
            "up": PartRule(f"{stem}.{gate_up}.weight", half=1),
            "down": PartRule(f"{stem}.{down}.weight", axis=1),
        }
    )


def _plain(up: str, down: str) -> FfnRule:
    return FfnRule({"up": PartRule(f"{up}.weight"), "down": PartRule(f"{down}.weight", axis=1)})


def _conv1d(up: str, down: str) -> FfnRule:  # Conv1D weights are [in, out]
    return FfnRule({"up": PartRule(f"{up}.weight", axis=1), "down": PartRule(f"{down}.weight")})


_LLAMA_MLP = _gated("layers.{i}.mlp", "gate_proj", "up_proj", "down_proj")

FAMILIES = (
    Family(
        "opt",
        ("opt",),
        (_plain("decoder.layers.{i}.fc1", "decoder.layers.{i}.fc2"),),
        "relu",
        "activation_function",
        biased=("enable_bias", True),
        tied=True,
    ),
    Family(
        "llama",
        ("llama", "sparsellama", "mistral", "qwen2", "qwen3"),
        (_LLAMA_MLP,),
        "silu",
        biased=("mlp_bias", False),
        undefaulted=("sparsellama",),  # ProSparse's
    ),
    Family(
        "gemma",
        ("gemma",),
        (_LLAMA_MLP,),
        "gelu_tanh",
        tied=True,
        aliases={"gelu": "gelu_tanh"},  # which is what its oldest configs mean
    ),
    Family(
        "gemma2",
        ("gemma2", "gemma3_text"),
        (_LLAMA_MLP,),
        "gelu_tanh",
        "hidden_activation",
        beside=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
        tied=True,
    ),
    Family(
        "phi",
        ("phi",),
        (_plain("layers.{i}.mlp.fc1", "layers.{i}.mlp.fc2"),),
        "gelu_new",
        biased=True,
    ),
    Family("phi3", ("phi3",), (_fused("layers.{i}.mlp", "gate_up_proj", "down_proj"),), "silu"),
    Family(
        "falcon",
        ("falcon",),
        (_plain("h.{i}.mlp.dense_h_to_4h", "h.{i}.mlp.dense_4h_to_h"),),
        "gelu",
        "activation",
        beside=("ln_mlp",),
        biased=("bias", False),
        tied=True,
    ),
    Family(
        "gpt_neox",
        ("gpt_neox",),
        (_plain("layers.{i}.mlp.dense_h_to_4h", "layers.{i}.mlp.dense_4h_to_h"),),
        "gelu",
        biased=True,
        head="embed_out",
    ),
    Family(
        "persimmon",
        ("persimmon",),
        (_plain("layers.{i}.mlp.dense_h_to_4h", "layers.{i}.mlp.dense_4h_to_h"),),
        "relu2",
        biased=True,
    ),
    Family(
        "gpt2",
        ("gpt2",),
        (_conv1d("h.{i}.mlp.c_fc", "h.{i}.mlp.c_proj"),),
        "gelu_new",
        "activation_function",
        biased=True,
        tied=True,
    ),
    Family(
        "bert",
        ("bert",),
        (_plain("encoder.layer.{i}.intermediate.dense", "encoder.layer.{i}.output.dense"),),
        "gelu",
        biased=True,
        head=None,
    ),
    Family(
        "openelm",
        ("openelm",),
        (_fused("layers.{i}.ffn", "proj_1", "proj_2"),),
        "silu",
        "activation_fn_name",
        beside=("ffn_norm",),
        tie_key="share_input_output_layers",
    ),
    Family(
        "mixtral",
        ("mixtral",),
        (_gated("layers.{i}.block_sparse_moe.experts.{e}", "w1", "w3", "w2"),),
        "silu",
        beside=("block_sparse_moe.gate",),
    ),
    Family(
        "qwen3_moe",
        ("qwen3_moe", "qwen2_moe", "olmoe"),
        (_gated("layers.{i}.mlp.experts.{e}", "gate_proj", "up_proj", "down_proj"), _LLAMA_MLP),
        "silu",
        beside=("mlp.gate", "mlp.shared_expert", "mlp.shared_expert_gate", "mlp.shared_experts"),
    ),
    Family(
        "nemotron",
        ("nemotron",),
        (_plain("layers.{i}.mlp.up_proj", "layers.{i}.mlp.down_proj"),),
        "relu2",
        biased=("mlp_bias", False),
    ),
)

# Hugging Face's names for activations -> ours (spec, section 4); others are refused.
_ACTIVATIONS = {
    "relu": "relu",
    "relu2": "relu2",
    "squared_relu": "relu2",
    "fatrelu": "fatrelu",
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_new",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
}
UNKNOWN = "unknown"  # the activation of a checkpoint that does not say


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json says of the language model: of a composite model, its `text_config`."""
    inner = config.get("text_config")
    outer = config.get("model_type")
    if inner is None or any(outer in family.model_types for family in FAMILIES):
        return config
    if not isinstance(inner, dict):
        raise FormatError(
            "not a JSON object", field="config.json, text_config", found=repr(inner)[:80]
        )
    return inner


def model_type_of(config: Mapping[str, Any]) -> str | None:
    """The language model's `model_type`, None where config.json has none."""
    found = language_config(config).get("model_type")
    if found is not None and not isinstance(found, str):
        raise UsageError("not a name", field="config.json, model_type", found=repr(found)[:80])
    return found


def activation_of(family: Family, config: Mapping[str, Any]) -> Activation:
    """The activation of a model's FFNs: what config.json says, else the default of its
    `model_type`'s class, else `unknown`. Raises FormatError for one that the format does not know.
    """
    language = language_config(config)
    key = family.activation_key
    if key not in language:
        model_type = model_type_of(config)
        known = model_type in family.model_types and model_type not in family.undefaulted
        return Activation(family.activation if known else UNKNOWN)
    found = language[key]
    name = _ACTIVATIONS.get(family.aliases.get(found, found)) if isinstance(found, str) else None
    if name is None:
        raise FormatError(
            "activation not known to the format",
            field=f"config.json, {key}",
            expected=", ".join(_ACTIVATIONS),
            found=repr(found),
        )
    threshold = language.get("hidden_act_param") if name == "fatrelu" else None
    if threshold is None:
        return Activation(name)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float):
        raise FormatError(
            "not a number", field="config.json, hidden_act_param", found=repr(threshold)
        )
    if not abs(threshold) < 1e38:
        raise FormatError(
            "not a finite number", field="config.json, hidden_act_param", found=repr(threshold)
        )
    return Activation(name, float(threshold))


def head_of(family: Family, config: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """Where the output head's weights are: a tensor's name, `tied` (to the embeddings) or
    `missing`; None for a family without one."""
    if family.head is None:
        return None
    suffix = f"{family.head}.weight"
    for name in names:
        if name == suffix or name.endswith(f".{suffix}"):
            return name
    places = (language_config(config), config)
    said = [place[family.tie_key] for place in places if family.tie_key in place]
    return "tied" if (said[0] if said else family.tied) else "missing"

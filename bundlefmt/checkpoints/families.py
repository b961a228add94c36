"""Families of models: which tensors of a checkpoint are FFN weights, and which neuron is where.

A family is one entry of FAMILIES. Tensor names are matched by suffix, since prefixes such as
`model.` come and go between checkpoints of one family.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bundlefmt.checkpoints.sources import SourceTensor
from bundlefmt.errors import FormatError
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
    """A family: its name, the `model_type`s that use its names, its kinds of FFN, and the
    activation where config.json does not say (by one of `activation_keys`)."""

    name: str
    model_types: tuple[str, ...]
    rules: tuple[FfnRule, ...]
    activation: str
    activation_keys: tuple[str, ...] = ("hidden_act", "hidden_activation", "activation_function")
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
    Family("opt", ("opt",), (_plain("decoder.layers.{i}.fc1", "decoder.layers.{i}.fc2"),), "relu"),
    Family("llama", ("llama", "sparsellama", "mistral", "qwen2", "qwen3"), (_LLAMA_MLP,), "silu"),
    Family(
        "gemma",
        ("gemma", "gemma2", "gemma3_text"),
        (_LLAMA_MLP,),
        "gelu_tanh",
        aliases={"gelu": "gelu_tanh"},
    ),
    Family("phi", ("phi",), (_plain("layers.{i}.mlp.fc1", "layers.{i}.mlp.fc2"),), "gelu_new"),
    Family("phi3", ("phi3",), (_fused("layers.{i}.mlp", "gate_up_proj", "down_proj"),), "silu"),
    Family(
        "falcon",
        ("falcon",),
        (_plain("h.{i}.mlp.dense_h_to_4h", "h.{i}.mlp.dense_4h_to_h"),),
        "gelu",
        ("activation",),
    ),
    Family(
        "gpt_neox",
        ("gpt_neox",),
        (_plain("layers.{i}.mlp.dense_h_to_4h", "layers.{i}.mlp.dense_4h_to_h"),),
        "gelu",
    ),
    Family(
        "persimmon",
        ("persimmon",),
        (_plain("layers.{i}.mlp.dense_h_to_4h", "layers.{i}.mlp.dense_4h_to_h"),),
        "relu2",
    ),
    Family(
        "gpt2",
        ("gpt2",),
        (_conv1d("h.{i}.mlp.c_fc", "h.{i}.mlp.c_proj"),),
        "gelu_new",
        ("activation_function",),
    ),
    Family(
        "bert",
        ("bert",),
        (_plain("encoder.layer.{i}.intermediate.dense", "encoder.layer.{i}.output.dense"),),
        "gelu",
    ),
    Family(
        "openelm",
        ("openelm",),
        (_fused("layers.{i}.ffn", "proj_1", "proj_2"),),
        "silu",
        ("activation_fn_name",),
    ),
    Family(
        "mixtral",
        ("mixtral",),
        (_gated("layers.{i}.block_sparse_moe.experts.{e}", "w1", "w3", "w2"),),
        "silu",
    ),
    Family(
        "qwen3_moe",
        ("qwen3_moe", "qwen2_moe", "olmoe"),
        (_gated("layers.{i}.mlp.experts.{e}", "gate_proj", "up_proj", "down_proj"), _LLAMA_MLP),
        "silu",
    ),
    Family(
        "nemotron",
        ("nemotron",),
        (_plain("layers.{i}.mlp.up_proj", "layers.{i}.mlp.down_proj"),),
        "relu2",
    ),
)

# Hugging Face's names for activations -> ours (spec, section 4).
_ACTIVATIONS = {
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "squared_relu": "relu2",
}


def find_ffns(
    tensors: Mapping[str, SourceTensor], config: Mapping[str, Any]
) -> tuple[Family, list[Ffn]]:
    """The family of a checkpoint and its FFNs, by layer and expert.

    The config's `model_type` decides where it names a known family, else the tensors' names do.
    Raises FormatError when no family fits (naming tensors that were seen), or when an FFN is
    incomplete or its shapes disagree.
    """
    model_type = config.get("model_type")
    named = [family for family in FAMILIES if model_type in family.model_types]
    for family in named or FAMILIES:
        ffns = _ffns_of(family, tensors, strict=bool(named))
        if ffns:
            return family, ffns
    seen = ", ".join(list(tensors)[:6]) or "none"
    raise FormatError(
        "no FFN tensors of a known family",
        field=f"model_type {model_type}" if model_type else "tensors",
        expected=", ".join(family.name for family in named or FAMILIES),
        found=seen,
    )


def activation_of(family: Family, config: Mapping[str, Any]) -> Activation:
    """The activation of a model's FFNs."""
    found = next((config[key] for key in family.activation_keys if config.get(key)), None)
    name = family.activation if found is None else str(found)
    name = family.aliases.get(name, name)
    threshold = config.get("hidden_act_param") if name == "fatrelu" else None
    if threshold is not None and not isinstance(threshold, int | float):
        field = "config.json, hidden_act_param"
        raise FormatError("not a number", field=field, found=repr(threshold))
    return Activation(_ACTIVATIONS.get(name, name), threshold)


def _ffns_of(family: Family, tensors: Mapping[str, SourceTensor], *, strict: bool) -> list[Ffn]:
    """The family's FFNs among the tensors; [] when there are none, or, unless `strict`, when a
    part is missing."""
    ffns: dict[tuple[int, int | None], Ffn] = {}
    for rule in family.rules:
        found = {name: _matches(part.suffix, tensors) for name, part in rule.parts.items()}
        keys = sorted({key for matches in found.values() for key in matches}, key=_sort_key)
        for layer, expert in keys:
            missing = [name for name, matches in found.items() if (layer, expert) not in matches]
            if missing:
                if not strict:
                    return []
                suffix = rule.parts[missing[0]].suffix.format(i=layer, e=expert)
                raise FormatError("missing FFN tensor", field=suffix, found="no such tensor")
            parts = {name: matches[layer, expert] for name, matches in found.items()}
            ffns[layer, expert] = _assemble(layer, expert, rule.parts, parts, tensors)
    return [ffns[key] for key in sorted(ffns, key=_sort_key)]


def _sort_key(key: tuple[int, int | None]) -> tuple[int, int]:
    layer, expert = key
    return layer, -1 if expert is None else expert


def _matches(
    suffix: str, tensors: Mapping[str, SourceTensor]
) -> dict[tuple[int, int | None], SourceTensor]:
    """(layer, expert) -> tensor, for the names that end with `suffix`."""
    escaped = re.escape(suffix)
    for index in ("i", "e"):
        escaped = escaped.replace(re.escape(f"{{{index}}}"), rf"(?P<{index}>\d+)")
    pattern = re.compile(rf"(?:.*\.)?{escaped}")
    found: dict[tuple[int, int | None], SourceTensor] = {}
    for name, tensor in tensors.items():
        if match := pattern.fullmatch(name):
            numbers = match.groupdict()
            key = (int(numbers["i"]), int(numbers["e"]) if "e" in numbers else None)
            if key in found:
                raise FormatError(
                    "two tensors for one part", field=name, found=f"also {found[key].name}"
                )
            found[key] = tensor
    return found


def _assemble(
    layer: int,
    expert: int | None,
    rules: Mapping[PartName, PartRule],
    weights: Mapping[PartName, SourceTensor],
    tensors: Mapping[str, SourceTensor],
) -> Ffn:
    """The FFN that these weights make up, its shapes checked against each other."""
    shapes: dict[PartName, tuple[int, int]] = {}
    parts: dict[PartName, PartSource] = {}
    for name, rule in rules.items():
        tensor = weights[name]
        if len(tensor.shape) != 2:
            raise FormatError(
                "not a matrix",
                file=tensor.path,
                field=tensor.name,
                found=f"shape {list(tensor.shape)}",
            )
        neurons, d_model = tensor.shape[rule.axis], tensor.shape[1 - rule.axis]
        if rule.half is not None:
            if neurons % 2:
                raise FormatError(
                    "a fused tensor of odd length",
                    file=tensor.path,
                    field=tensor.name,
                    found=f"shape {list(tensor.shape)}",
                )
            neurons //= 2
        shapes[name] = (neurons, d_model)
        bias = f"{tensor.name.removesuffix('.weight')}.bias"
        parts[name] = PartSource(
            tensor, rule.axis, (rule.half or 0) * neurons, bias if bias in tensors else None
        )
    leader, wanted = next(iter(shapes.items()))
    for name, shape in shapes.items():
        if shape != wanted or 0 in shape:
            raise FormatError(
                "FFN tensors disagree on [neurons, d_model]",
                file=weights[name].path,
                field=weights[name].name,
                expected=f"{list(wanted)}, as its {leader}",
                found=list(shape),
            )
    return Ffn(layer, expert, *wanted, parts)

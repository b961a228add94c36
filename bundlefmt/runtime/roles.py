"""Which resident tensor has which role, told by names and shapes alone.

The names of a checkpoint's tensors are those of its model's class under one prefix, which is found
once. So tensors of other parts of a checkpoint (layers that predict further tokens, adapters,
other heads) are never taken for the model's, and what is missing is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from bundlefmt.errors import FormatError
from bundlefmt.layout.header import Group
from bundlefmt.runtime.config import DecoderConfig, decoder_config

_DTYPES = ("F32", "F16", "BF16")
_FIRST = "out"  # the role by whose tensor in layer 0 the prefix is found
# Ends of names of buffers that older checkpoints hold: they follow from the config.
_BUFFERS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", "version")


class Described(Protocol):
    """A tensor as a header describes it."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> Sequence[int]: ...


class Role(NamedTuple):
    """A role in the model, in a layer or outside them; the shape of its weights and the length of
    its bias, each None where it has none."""

    name: str
    layer: int | None
    weight: tuple[int, ...] | None
    bias: int | None


@dataclass(frozen=True)
class Roles:
    """The names of a model's tensors, weights and biases by role and layer; a role that has none of
    them is not there. `unused` are the names of tensors without a role."""

    weights: Mapping[tuple[str, int | None], str]
    biases: Mapping[tuple[str, int | None], str]
    unused: tuple[str, ...]


def unused(config: Mapping[str, Any], layers: int, tensors: Mapping[str, Described]) -> list[str]:
    """Names of tensors that a model with that config.json, that many layers of FFNs, and these
    other tensors is computed without; those of FFNs are among them. Raises what `decoder_config`
    and `find` raise for a model that this runtime does not compute."""
    return list(find(decoder_config(config, layers), tensors).unused)


def find(config: DecoderConfig, tensors: Mapping[str, Described]) -> Roles:
    """The tensors of each role.

    Raises FormatError for one that is missing, or has another shape or dtype than the config
    says, and for one that is there where the config says that the model has none.
    """
    prefix = prefix_of(config, tensors)
    head = _head(config, prefix, tensors)
    embed = stem_of(config, prefix, "embed")
    has_head = f"{head}.weight" in tensors
    if not has_head and not config.tied:
        other = f"{prefix.removesuffix(config.base)}score.weight"
        raise FormatError(
            "the model has no head, and its embeddings are not tied",
            field=f"{head}.weight",
            expected="such a tensor",
            found=other if other in tensors else "none",
        )
    if config.tied and has_head and f"{embed}.weight" not in tensors:
        embed = head
    entry = tensors.get(f"{embed}.weight")
    vocabulary = entry.shape[0] if entry is not None and entry.shape else 1
    weights: dict[tuple[str, int | None], str] = {}
    biases: dict[tuple[str, int | None], str] = {}
    for role in _roles(config, vocabulary):
        key = role.name, role.layer
        stem = stem_of(config, prefix, *key)
        if role.name == "embed":
            stem = embed
        elif role.name == "head":
            stem = head if has_head else embed
        if role.weight is not None:
            weights[key] = _checked(f"{stem}.weight", role.weight, tensors)
        if role.bias is not None:
            stem = head if role.name == "head" else stem
            biases[key] = _checked(f"{stem}.bias", (role.bias,), tensors)
    used = {*weights.values(), *biases.values()}
    left = [name for name in tensors if name not in used and not name.endswith(_BUFFERS)]
    _refuse_unwanted(config, prefix, head, left)
    return Roles(weights, biases, tuple(left))


def check_ffn(group: Group, config: DecoderConfig) -> None:
    """Raises FormatError for an FFN that does not fit between the layers, or has biases where the
    config says that it has none, or none where it has."""
    if group.d_model != config.d_model:
        raise FormatError(
            "FFN does not fit the config",
            field=f"{group.label}, d_model",
            expected=config.d_model,
            found=group.d_model,
        )
    for part in group.parts:
        if (part.bias is not None) != ("ffn" in config.biased):
            raise FormatError(
                "FFN does not fit the config",
                field=f"{group.label}, {part.name}",
                expected="a bias" if part.bias is None else "no bias",
                found=part.bias or "none",
            )


def prefix_of(config: DecoderConfig, names: Iterable[str]) -> str:
    """What stands before all names of the model's tensors: that of its class, whole or as where
    the class without a head was saved, or else any that is the only one. Raises FormatError where
    there is none, or several."""
    first = f"{config.names[_FIRST].format(i=0)}."
    found: dict[str, str] = {}
    for name in names:
        before, anchor, _ = name.partition(first)
        if anchor and (not before or before.endswith(".")):
            found.setdefault(before, name)
    for prefix in (config.base, _short(config)):
        if prefix in found:
            return prefix
    if not found:
        raise FormatError("no such resident tensor", field=f"{config.base}{first}weight")
    if len(found) > 1:
        one, other, *_ = found.values()
        raise FormatError("two tensors for one role", field=one, found=other)
    return next(iter(found))


def stem_of(config: DecoderConfig, prefix: str, role: str, layer: int | None = None) -> str:
    """The name of a role's tensors without `.weight` and `.bias`."""
    return prefix + config.names[role].format(i=layer)


def _short(config: DecoderConfig) -> str:
    """The prefix where the class without a head was saved."""
    return config.base.partition(".")[2]


def _head(config: DecoderConfig, prefix: str, tensors: Mapping[str, Described]) -> str:
    """The head stands beside the rest of the model, not within its prefix."""
    own = config.base if prefix.endswith(config.base) else _short(config)
    stems = [prefix.removesuffix(own) + config.names["head"], config.names["head"]]
    return next((stem for stem in stems if f"{stem}.weight" in tensors), stems[0])


def _roles(config: DecoderConfig, vocabulary: int) -> Iterator[Role]:
    """All roles of a model with that many tokens."""
    d_model, width = config.d_model, config.embed_width

    def linear(name: str, layer: int | None, outputs: int, inputs: int) -> Role:
        return Role(name, layer, (outputs, inputs), outputs if name in config.biased else None)

    def norm(name: str, layer: int | None, numbers: int) -> Role:
        weight = (numbers,) if config.affine else None
        return Role(
            name, layer, weight, numbers if config.affine and config.norm == "layer" else None
        )

    yield Role("embed", None, (vocabulary, width), None)
    if config.position_offset is not None:
        yield Role("positions", None, (config.context + config.position_offset, d_model), None)
    if width != d_model:
        yield linear("project_in", None, d_model, width)
        yield linear("project_out", None, width, d_model)
    if config.final_norm:
        yield norm("norm", None, d_model)
    yield linear("head", None, vocabulary, width)
    for layer, attention in enumerate(config.layers):
        q, kv = attention.heads * config.head_dim, attention.kv_heads * config.head_dim
        yield norm("attention_norm", layer, d_model)
        if "ffn_norm" in config.names:
            yield norm("ffn_norm", layer, d_model)
        if "qkv" in config.names:
            yield linear("qkv", layer, q + 2 * kv, d_model)
        else:
            yield linear("q", layer, q, d_model)
            yield linear("k", layer, kv, d_model)
            yield linear("v", layer, kv, d_model)
        yield linear("out", layer, d_model, q)
        if config.head_norms:
            yield norm("q_norm", layer, config.head_dim)
            yield norm("k_norm", layer, config.head_dim)


def _checked(name: str, shape: tuple[int, ...], tensors: Mapping[str, Described]) -> str:
    """The name, once its tensor fits."""
    if name not in tensors:
        stem = f"{name.rpartition('.')[0]}."
        found = next((other for other in tensors if other.startswith(stem)), "none")
        raise FormatError("no such resident tensor", field=name, found=found)
    entry = tensors[name]
    if entry.dtype not in _DTYPES:
        raise FormatError(
            "weights of a dtype that this runtime does not compute with",
            field=name,
            expected=", ".join(_DTYPES),
            found=entry.dtype,
        )
    if tuple(entry.shape) != shape or 0 in shape:
        raise FormatError(
            "tensor does not fit the config",
            field=name,
            expected=list(shape),
            found=list(entry.shape),
        )
    return name


def _refuse_unwanted(config: DecoderConfig, prefix: str, head: str, left: Iterable[str]) -> None:
    """Refuse tensors with a role that, as the config says, the model does not have."""
    layers = range(len(config.layers))
    stems = {stem_of(config, prefix, role, layer) for role in config.names for layer in layers}
    for name in left:
        stem, _, kind = name.rpartition(".")
        if kind in ("weight", "bias") and stem in stems | {head}:
            raise FormatError(
                "a tensor that the model does not have by its config",
                field=name,
                expected="none",
                found="such a tensor",
            )

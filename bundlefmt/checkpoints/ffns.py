"""The FFNs of a checkpoint, found by the rules of its family, whole or refused.

Strategy: the family is what config.json's `model_type` says, or what the caller says. By names
alone, one is taken only if all families that fit find the same. Layers are counted under one
prefix: what lies beside them (vision towers, layers for multi-token prediction) has no groups. In
these layers nothing that looks like an FFN's may be left over, since a family that does not know
of it would compute another function.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from bundlefmt.checkpoints.families import (
    FAMILIES,
    Family,
    Ffn,
    PartRule,
    PartSource,
    language_config,
    model_type_of,
)
from bundlefmt.checkpoints.names import by_template, numbers, template
from bundlefmt.checkpoints.sources import SourceTensor
from bundlefmt.errors import FormatError, UsageError
from bundlefmt.layout.constants import PartName

_LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_transformer_layers")
_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")
_QUANTISED = ("quantization_config", "compression_config", "quantization")

# Beginnings of names of what stands beside a language model, with layers of its own.
_OTHER_STACKS = ("mtp", "nextn", "vision", "visual", "audio", "image", "multi_modal")
_MOST_STACKS = 64
_LIKE_FFN = re.compile(
    r"expert|mlp|ffn|feed_?forward|moe|router|sub_?norm|intermediate|(?:^|\.)(?:fc\d|c_fc)", re.I
)
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h)\.(0|[1-9][0-9]{0,8})\.")
_LEFT_OVER = re.compile(r"lora_|adapter")
_TASK_HEADS = ("score", "classifier", "qa_outputs", "v_head", "reward_head")

# Of tensors that an index lists and no shard has: buffers that no model loads, and what all need.
_BUFFER = re.compile(r"(?:inv_freq|position_ids|masked_bias|att(?:n|ention)\.bias)$")
_ALWAYS = re.compile(r"embed|wte|wpe|norm|ln_f")

_Key = tuple[int, int | None]  # layer, expert


def find_ffns(
    tensors: Mapping[str, SourceTensor], config: Mapping[str, Any], family: str | None = None
) -> tuple[Family, list[Ffn]]:
    """The family of a checkpoint and its FFNs, by layer and expert; `family` names it where the
    caller says so.

    Raises FormatError when no family fits (naming tensors that were seen), when an FFN is
    incomplete or its shapes disagree, when the layers hold more than the family's rules cover, or
    the weights are quantised; UsageError when the family has to be said.
    """
    for key in _QUANTISED:
        if config.get(key):
            method = config[key].get("quant_method") if isinstance(config[key], dict) else None
            raise FormatError(
                "a quantised checkpoint: dequantise it first, or pack the model it was made from",
                field=f"config.json, {key}",
                found=method or "quantised weights",
            )
    model_type = model_type_of(config)
    chosen = _named(family) if family is not None else _family_of(model_type)
    if chosen is not None:
        ffns = _ffns_of(chosen, tensors, by_template(tensors), config)
        if not ffns:
            raise _none_found([chosen], tensors, model_type)
        if model_type in chosen.model_types:
            _require_biases(chosen, ffns, language_config(config))
        return chosen, ffns
    if model_type is not None:
        raise _unknown_type(model_type, tensors, config)
    return _by_names(tensors, config)


def layers_of(config: Mapping[str, Any]) -> int | None:
    """How many layers config.json says that the language model has."""
    return _count(config, _LAYER_KEYS)


def is_adapters(name: str) -> bool:
    """Whether a tensor is an adapter's (LoRA), left in the weights."""
    return _LEFT_OVER.search(name) is not None


def is_unused(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor's name tells that a language model computes nothing from it: it is an
    adapter's, a task's head, of a layer beyond config.json's number, or of what stands beside."""
    steps = name.split(".")
    if is_adapters(name) or steps[0] in _TASK_HEADS:
        return True
    layers = layers_of(config)
    number = _LAYER.search(name)
    if layers is not None and number is not None and int(number.group(1)) >= layers:
        return True
    return any(step.startswith(_OTHER_STACKS) for step in steps)


def needed(
    unfound: Iterable[str], tensors: Iterable[str], config: Mapping[str, Any], head: str | None
) -> str | None:
    """The first of these names, of tensors that are not there, that the model needs: it stands in
    other layers, it is of the embeddings or a norm, or it is the untied output head."""
    there = by_template(tensors)
    for name in unfound:
        if _BUFFER.search(name) or is_unused(name, config):
            continue
        in_layers = template(name) != name and template(name) in there
        if in_layers or (template(name) == name and _ALWAYS.search(name)):
            return name
        if head == "missing" and name.endswith(("lm_head.weight", "embed_out.weight")):
            return name
    return None


def _named(name: str) -> Family:
    for family in FAMILIES:
        if family.name == name:
            return family
    known = ", ".join(family.name for family in FAMILIES)
    raise UsageError("unknown family", field="family", expected=known, found=name)


def _family_of(model_type: str | None) -> Family | None:
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def _unknown_type(
    model_type: str, tensors: Mapping[str, SourceTensor], config: Mapping[str, Any]
) -> UsageError:
    """The error for a model_type that no family has, naming the nearest one."""
    what = "no family has this model_type, and none is near it; --family NAME says which to take"
    near = ""
    templates = by_template(tensors)
    for family in FAMILIES:
        try:
            if _ffns_of(family, tensors, templates, config):
                what = (
                    f"no family has this model_type; the nearest is {family.name}: --family "
                    f"{family.name} (family={family.name!r}) packs it, if its FFNs compute the same"
                )
                break
        except FormatError as error:
            near = near or (
                f"no family has this model_type; the nearest is {family.name}, which does not fit "
                f"({error}); --family NAME says which to take"
            )
    else:
        what = near or what
    return UsageError(what, field="config.json, model_type", found=model_type)


def _by_names(
    tensors: Mapping[str, SourceTensor], config: Mapping[str, Any]
) -> tuple[Family, list[Ffn]]:
    fits: list[tuple[Family, list[Ffn]]] = []
    errors: list[FormatError] = []
    templates = by_template(tensors)
    for family in FAMILIES:
        try:
            if ffns := _ffns_of(family, tensors, templates, config):
                fits.append((family, ffns))
        except FormatError as error:
            errors.append(error)
    if not fits:
        # One that names a file is of a family whose parts are all there: it says more.
        errors.sort(key=lambda error: error.file is None)
        raise errors[0] if errors else _none_found(FAMILIES, tensors, None)
    family, ffns = fits[0]
    if any(other != ffns for _, other in fits) or not all(map(_oriented, ffns)):
        raise UsageError(
            "no model_type, and names that do not tell: say --family NAME (family=NAME)",
            field="config.json, model_type",
            expected=" or ".join(family.name for family, _ in fits),
            found="none",
        )
    return family, ffns


def _oriented(ffn: Ffn) -> bool:
    """Whether shapes alone tell rows from columns of what a family stores as [in, out]."""
    up = ffn.parts["up"]
    return up.axis == 0 or (up.bias is not None and ffn.neurons != ffn.d_model)


def _none_found(
    families: Iterable[Family], tensors: Mapping[str, SourceTensor], model_type: str | None
) -> FormatError:
    seen = ", ".join(list(tensors)[:6]) or "none"
    return FormatError(
        "no FFN tensors of a known family",
        field=f"model_type {model_type}" if model_type else "tensors",
        expected=", ".join(family.name for family in families),
        found=seen,
    )


def _count(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    language = language_config(config)
    for key in keys:
        found = language.get(key)
        if found is None:
            continue
        if isinstance(found, bool) or not isinstance(found, int) or found < 1:
            raise FormatError(
                "not a count", field=f"config.json, {key}", expected="1 or more", found=repr(found)
            )
        return found
    return None


def _ffns_of(
    family: Family,
    tensors: Mapping[str, SourceTensor],
    templates: Mapping[str, list[str]],
    config: Mapping[str, Any],
) -> list[Ffn]:
    """The family's FFNs among the tensors, by layer and expert; [] when there are none."""
    layers = layers_of(config)
    stacks = _stacks(family, templates, tensors)
    prefix = _stack_of(stacks, layers)
    if prefix is None:
        return []
    ffns: dict[_Key, Ffn] = {}
    for rule, found in zip(family.rules, stacks[prefix], strict=True):
        keys = {key for matches in found.values() for key in matches}
        keys = {key for key in keys if layers is None or key[0] < layers}
        for key in sorted(keys, key=_sort_key):
            layer, expert = key
            for name, matches in found.items():
                if key not in matches:
                    suffix = rule.parts[name].suffix.format(i=layer, e=expert)
                    raise FormatError("missing FFN tensor", field=suffix, found="no such tensor")
            parts = {name: matches[key] for name, matches in found.items()}
            ffns[key] = _assemble(layer, expert, rule.parts, parts, tensors)
    _require_all(ffns, layers, _count(config, _EXPERT_KEYS))
    _require_nothing_else(family, prefix, templates, layers)
    return [ffns[key] for key in sorted(ffns, key=_sort_key)]


def _sort_key(key: _Key) -> tuple[int, int]:
    layer, expert = key
    return layer, -1 if expert is None else expert


_Found = list[dict[PartName, dict[_Key, SourceTensor]]]  # for each rule: part -> FFN -> tensor


def _stacks(
    family: Family, templates: Mapping[str, list[str]], tensors: Mapping[str, SourceTensor]
) -> dict[str, _Found]:
    """The tensors that the family's rules match, by what stands before the rules' suffixes."""
    stacks: dict[str, _Found] = {}
    for r, rule in enumerate(family.rules):
        for part, where in rule.parts.items():
            suffix = where.suffix.format(i="{}", e="{}")
            depth = suffix.count("{}")
            for shape, names in templates.items():
                if shape != suffix and not shape.endswith(f".{suffix}"):
                    continue
                before = shape.removesuffix(suffix)
                for name in names:
                    found = numbers(name)
                    prefix = before.format(*found[:-depth])
                    key = (found[-depth], found[-1] if depth > 1 else None)
                    if prefix not in stacks:
                        if len(stacks) == _MOST_STACKS:
                            raise FormatError("layers under too many prefixes", field=name)
                        stacks[prefix] = [{n: {} for n in rule.parts} for rule in family.rules]
                    stacks[prefix][r][part][key] = tensors[name]
    return stacks


def _stack_of(stacks: Mapping[str, _Found], layers: int | None) -> str | None:
    """The prefix of the language model's layers, None when there is none. Raises FormatError when
    it might be either of two."""

    def beside(prefix: str) -> bool:
        return any(step.startswith(_OTHER_STACKS) for step in prefix.split("."))

    prefixes = [prefix for prefix in stacks if not beside(prefix)]
    if len(prefixes) > 1 and layers is not None:
        seen = {prefix: _layers_in(stacks[prefix]) for prefix in prefixes}
        whole = [prefix for prefix in prefixes if len(seen[prefix]) >= layers]
        prefixes = whole if len(whole) == 1 else prefixes
    if len(prefixes) > 1:
        one, other = (_first(stacks[prefix]) for prefix in prefixes[:2])
        raise FormatError("two tensors for one part", field=other.name, found=f"also {one.name}")
    return prefixes[0] if prefixes else None


def _layers_in(found: _Found) -> set[int]:
    return {key[0] for rule in found for matches in rule.values() for key in matches}


def _first(found: _Found) -> SourceTensor:
    return next(tensor for rule in found for part in rule.values() for tensor in part.values())


def _require_all(ffns: Mapping[_Key, Ffn], layers: int | None, experts: int | None) -> None:
    """Raise FormatError unless there is an FFN in every layer, all experts of those that have any,
    and each bias in all layers or in none."""
    found: defaultdict[int, list[int | None]] = defaultdict(list)
    for layer, expert in ffns:
        found[layer].append(expert)
    if not found:
        return
    count = max(found) + 1 if layers is None else layers
    if len(found) != count:
        first = next(layer for layer in range(count) if layer not in found)
        raise FormatError(
            f"no FFN in layer {first}", expected=f"{count} layers with one", found=len(found)
        )
    for layer, members in found.items():
        if members == [None]:
            continue
        if None in members:
            raise FormatError(f"a dense FFN beside experts in layer {layer}")
        wanted = max(len(members), experts or 0, *(1 + e for e in members if e is not None))
        if len(members) != wanted:
            raise FormatError(
                f"experts missing in layer {layer}", expected=wanted, found=len(members)
            )
    biased: dict[tuple[bool, PartName], bool] = {}
    for ffn in ffns.values():
        for name, part in ffn.parts.items():
            kind = (ffn.expert is None, name)
            if biased.setdefault(kind, part.bias is not None) != (part.bias is not None):
                raise FormatError(
                    "a bias in some FFNs and not in others",
                    field=f"{part.tensor.name.removesuffix('.weight')}.bias",
                )


def _require_biases(family: Family, ffns: Iterable[Ffn], language: Mapping[str, Any]) -> None:
    """Raise FormatError unless the FFNs have biases as the model's class has."""
    wanted = family.biased
    if isinstance(wanted, tuple):
        wanted = bool(language.get(*wanted))
    for ffn in ffns:
        for part in ffn.parts.values():
            if (part.bias is not None) != wanted:
                raise FormatError(
                    "FFNs with biases, which the model has not by its config.json"
                    if part.bias
                    else "FFNs without biases, which the model has by its config.json",
                    field=f"{part.tensor.name.removesuffix('.weight')}.bias",
                )


def _require_nothing_else(
    family: Family, prefix: str, templates: Mapping[str, list[str]], layers: int | None
) -> None:
    """Raise FormatError for a tensor of an FFN in these layers that the family has no rule for."""
    suffixes = [part.suffix for rule in family.rules for part in rule.parts.values()]
    layer, _, _ = suffixes[0].partition("{i}.")
    known = {suffix.format(i="{}", e="{}").partition("{}.")[2] for suffix in suffixes}
    known |= {f"{name.removesuffix('.weight')}.bias" for name in known}
    stems = {name.removesuffix(".weight").removesuffix(".bias") for name in known}
    for shape, names in templates.items():
        _, found, rest = shape.partition(f"{layer}{{}}.")
        if not found or rest in known or is_adapters(rest):
            continue
        if any(rest == name or rest.startswith(f"{name}.") for name in family.beside):
            continue
        if not _LIKE_FFN.search(rest) and not any(rest.startswith(f"{s}.") for s in stems):
            continue
        for name in names:
            start = f"{prefix}{layer}"
            number = name.removeprefix(start).partition(".")[0]
            if name.startswith(start) and (layers is None or int(number) < layers):
                raise FormatError(
                    f"a tensor of an FFN that the family {family.name} has no rule for", field=name
                )


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
    for name, part in parts.items():
        if part.bias is not None:
            _require_bias(name, part, tensors[part.bias], wanted[1])
    return Ffn(layer, expert, *wanted, parts)


def _require_bias(name: PartName, part: PartSource, bias: SourceTensor, d_model: int) -> None:
    """Raise FormatError unless a part's bias has one number for each output of its weights."""
    outputs = d_model if name == "down" else part.tensor.shape[part.axis]
    if bias.shape == (outputs,):
        return
    what = "a bias that does not fit its weights"
    if bias.shape == (part.tensor.shape[0],) and (part.axis == 1) != (name == "down"):
        what += ": they are [out, in] (nn.Linear), not [in, out] (Conv1D)"
    raise FormatError(
        what, file=bias.path, field=bias.name, expected=[outputs], found=list(bias.shape)
    )

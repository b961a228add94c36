"""What is found in a checkpoint: every family's neurons, and one clear line for what is amiss."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import bundlefmt
from bundlefmt.checkpoints.families import FAMILIES, Family, activation_of
from bundlefmt.checkpoints.ffns import find_ffns
from bundlefmt.checkpoints.sources import open_checkpoint
from bundlefmt.errors import BundleError, FormatError, UsageError
from bundlefmt.file import BundleFile
from bundlefmt.layout.header import Group
from tests.conftest import FIXTURES
from tests.references import openelm

Array = NDArray[Any]

GATED = ("gate", "up", "down")
PLAIN = ("up", "down")


class Case(NamedTuple):
    """What a fixture must be found to be."""

    family: str
    activation: str
    parts: tuple[str, ...]
    layers: int = 2
    neurons: int = 72
    experts: int = 0
    biases: tuple[str, ...] = ()
    threshold: float | None = None


CASES = {
    "bert": Case("bert", "gelu", PLAIN, biases=PLAIN),
    "falcon": Case("falcon", "gelu", PLAIN),
    "falcon-bias": Case("falcon", "relu", PLAIN, biases=PLAIN),
    "falcon-grouped": Case("falcon", "relu", PLAIN),
    "falcon-sequential": Case("falcon", "relu", PLAIN),
    "gemma": Case("gemma", "gelu_tanh", GATED),
    "gpt2": Case("gpt2", "gelu_new", PLAIN, biases=PLAIN),
    "gpt_neox": Case("gpt_neox", "gelu", PLAIN, biases=PLAIN),
    "llama": Case("llama", "silu", GATED),
    "llama-fatrelu": Case("llama", "fatrelu", GATED, threshold=0.3),
    "llama3-rope": Case("llama", "relu", GATED, biases=GATED),
    "mistral": Case("llama", "silu", GATED),
    "mixtral": Case("mixtral", "silu", GATED, neurons=40, experts=3),
    "opt": Case("opt", "relu", PLAIN, layers=3, biases=PLAIN),
    "opt-post-norm": Case("opt", "relu", PLAIN, layers=3, biases=PLAIN),
    "persimmon": Case("persimmon", "relu2", PLAIN, biases=PLAIN),
    "phi": Case("phi", "gelu_new", PLAIN, biases=PLAIN),
    "phi-relu": Case("phi", "relu", PLAIN, biases=PLAIN),
    "phi3": Case("phi3", "silu", GATED),
    "qwen2": Case("llama", "silu", GATED),
    "qwen3": Case("llama", "silu", GATED),
    "qwen3_moe": Case("qwen3_moe", "silu", GATED, neurons=40, experts=3),
}


def gelu_erf(x: Array) -> Array:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "fatrelu": lambda x: np.where(x > 0.3, x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": gelu_erf,
    "gelu_new": gelu_tanh,
    "gelu_tanh": gelu_tanh,
}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every fixture, packed."""
    folder = tmp_path_factory.mktemp("bundles")
    for case in CASES:
        bundlefmt.pack(FIXTURES / case, folder / f"{case}.bundle")
    return {case: folder / f"{case}.bundle" for case in CASES}


def weights_of(case: str) -> dict[str, Array]:
    return load_file(FIXTURES / case / "model.safetensors")


def family_of(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


def matrices(file: BundleFile, group: Group) -> dict[str, Array]:
    """The parts [neurons, d_model] of a group, read as bundles."""
    with file.reader() as reader:
        batch = reader.read(group.layer, np.arange(group.neurons), expert=group.expert)
        return {part.name: batch.part(part.name) for part in group.bundled}


def ffn(file: BundleFile, group: Group, x: Array) -> Array:
    """The FFN of section 1 of the specification, from the bundles and the biases that the parts
    name, in float64."""
    x = x.astype(np.float64)
    parts = {name: rows.astype(np.float64) for name, rows in matrices(file, group).items()}
    biases: dict[str, Array] = {}
    for part in group.parts:
        if part.bias is not None:
            whole = file.tensor(part.bias).astype(np.float64)
            start = 0 if part.name == "down" or part.source is None else part.source.start
            width = group.d_model if part.name == "down" else group.neurons
            biases[part.name] = whole[start : start + width]
    up = x @ parts["up"].T + biases.get("up", 0)
    act = ACTIVATIONS[group.activation]
    gated = "gate" in parts
    hidden = act(x @ parts["gate"].T + biases.get("gate", 0)) * up if gated else act(up)
    out: Array = hidden @ parts["down"] + biases.get("down", 0)
    return out


# Families


def test_the_table_covers_every_fixture() -> None:
    assert set(CASES) == {path.name for path in FIXTURES.iterdir()}


@pytest.mark.parametrize("case", CASES)
def test_the_bundles_compute_what_transformers_computes(
    case: str, bundles: dict[str, Path]
) -> None:
    with np.load(FIXTURES / case / "reference.npz") as arrays:
        expected = {name: arrays[name] for name in arrays.files if name.startswith("ffn_")}
    with bundlefmt.open(bundles[case]) as file:
        for group in file.groups:
            label = f"{group.layer}" if group.expert is None else f"{group.layer}_{group.expert}"
            wanted = expected.pop(f"ffn_out_{label}")
            found = ffn(file, group, expected.pop(f"ffn_in_{label}"))
            assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert not expected, "an FFN without a group"


@pytest.mark.parametrize("case", CASES)
def test_groups_are_the_ffns_of_the_model(case: str, bundles: dict[str, Path]) -> None:
    expected = CASES[case]
    experts = range(expected.experts) if expected.experts else [None]
    with bundlefmt.open(bundles[case]) as file:
        assert file.header.family == expected.family
        found = [(group.layer, group.expert) for group in file.groups]
        assert found == [(i, e) for i in range(expected.layers) for e in experts]
        for group in file.groups:
            assert (group.neurons, group.d_model) == (expected.neurons, 32)
            assert group.activation == expected.activation
            assert group.activation_threshold == expected.threshold
            assert tuple(part.name for part in group.parts) == expected.parts
            assert tuple(part.name for part in group.parts if part.bias) == expected.biases
            assert {part.encoding for part in group.parts} == {"f32"}


@pytest.mark.parametrize("case", CASES)
def test_neurons_are_rows_and_columns_of_their_sources(case: str, bundles: dict[str, Path]) -> None:
    weights = weights_of(case)
    with bundlefmt.open(bundles[case]) as file:
        for group in file.groups:
            for name, rows in matrices(file, group).items():
                part = group.part(name)
                assert part is not None and part.source is not None
                source = weights[part.source.tensor]
                source = source.T if part.source.axis else source
                start = part.source.start
                np.testing.assert_array_equal(rows, source[start : start + group.neurons])


@pytest.mark.parametrize("case", CASES)
def test_every_other_tensor_is_resident_bit_for_bit(case: str, bundles: dict[str, Path]) -> None:
    weights = weights_of(case)
    with bundlefmt.open(bundles[case]) as file:
        bundled = {
            part.source.tensor for group in file.groups for part in group.parts if part.source
        }
        assert bundled
        assert set(file.tensor_names) == weights.keys() - bundled
        for name in file.tensor_names:
            found = file.tensor(name)
            assert (found.dtype, found.shape) == (weights[name].dtype, weights[name].shape)
            assert found.tobytes() == weights[name].tobytes()


def test_openelm_layers_have_their_own_widths_and_the_gate_first(tmp_path: Path) -> None:
    config = openelm.small_config()
    tensors = openelm.random_checkpoint(config, seed=3)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    bundlefmt.pack(tmp_path, tmp_path / "openelm.bundle")
    shapes = openelm.layer_shapes(4, 64, 8, (0.5, 4.0), (0.25, 1.0), 2, 16)
    with bundlefmt.open(tmp_path / "openelm.bundle") as file:
        assert file.header.family == "openelm"
        assert [group.neurons for group in file.groups] == [shape.neurons for shape in shapes]
        for i, group in enumerate(file.groups):
            assert (group.d_model, group.activation) == (64, "silu")
            fused = tensors[f"transformer.layers.{i}.ffn.proj_1.weight"]
            down = tensors[f"transformer.layers.{i}.ffn.proj_2.weight"]
            parts = matrices(file, group)
            np.testing.assert_array_equal(parts["gate"], fused[: group.neurons])
            np.testing.assert_array_equal(parts["up"], fused[group.neurons :])
            np.testing.assert_array_equal(parts["down"], down.T)
            x = np.random.default_rng(i).standard_normal((4, 64))
            layer = {"ffn.proj_1": fused.astype(float), "ffn.proj_2": down.astype(float)}
            np.testing.assert_allclose(ffn(file, group, x), openelm.ffn(layer, x), rtol=1e-9)


NAMED = {  # fixtures whose tensor names alone tell how the neurons lie -> the family found
    "bert": "bert",
    "falcon": "falcon",
    "gpt2": "gpt2",
    "gpt_neox": "gpt_neox",
    "llama3-rope": "llama",
    "mixtral": "mixtral",
    "opt": "opt",
    "persimmon": "gpt_neox",  # the same names: only config.json tells them apart
    "phi": "phi",
    "phi3": "phi3",
    "qwen3": "llama",
    "qwen3_moe": "qwen3_moe",
}


@pytest.mark.parametrize("case", NAMED)
def test_a_family_is_found_by_its_tensors_where_there_is_no_config(
    case: str, tmp_path: Path, bundles: dict[str, Path]
) -> None:
    shutil.copy(FIXTURES / case / "model.safetensors", tmp_path / "weights.safetensors")
    bundlefmt.pack(tmp_path / "weights.safetensors")
    with (
        bundlefmt.open(tmp_path / "weights.bundle") as file,
        bundlefmt.open(bundles[case]) as expected,
    ):
        assert file.header.family == NAMED[case]
        assert file.config == {}
        assert_same_bundles(file, expected)


def assert_same_bundles(found: BundleFile, expected: BundleFile) -> None:
    assert len(found.groups) == len(expected.groups)
    for a, b in zip(found.groups, expected.groups, strict=True):
        assert (a.layer, a.expert, a.neurons, a.stride) == (b.layer, b.expert, b.neurons, b.stride)
        np.testing.assert_array_equal(found.checksums(a), expected.checksums(b))
        one, other = matrices(found, a), matrices(expected, b)
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


RENAMED = [
    # fixture, prefix dropped, prefix added
    ("bert", "", "bert."),
    ("falcon", "transformer.", ""),
    ("gpt2", "transformer.", ""),
    ("gpt_neox", "gpt_neox.", ""),
    ("llama", "model.", ""),
    ("llama", "", "language_model."),
    ("mixtral", "model.", ""),
    ("opt", "model.", ""),
    ("persimmon", "model.", "language_model.model."),
    ("phi", "model.", ""),
    ("phi3", "model.", ""),
    ("qwen3_moe", "", "model."),
]


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize(("case", "dropped", "added"), RENAMED)
def test_a_prefix_more_or_less_changes_nothing(
    case: str,
    dropped: str,
    added: str,
    with_config: bool,
    tmp_path: Path,
    bundles: dict[str, Path],
) -> None:
    renamed = {added + name.removeprefix(dropped): a for name, a in weights_of(case).items()}
    save_file(renamed, tmp_path / "model.safetensors")
    if with_config:
        shutil.copy(FIXTURES / case / "config.json", tmp_path)
    bundlefmt.pack(tmp_path, tmp_path / "renamed.bundle")
    with (
        bundlefmt.open(tmp_path / "renamed.bundle") as file,
        bundlefmt.open(bundles[case]) as expected,
    ):
        assert_same_bundles(file, expected)
        biases = [part.bias for group in file.groups for part in group.parts if part.bias]
        assert set(biases) <= set(file.tensor_names)
        assert len(biases) == len(CASES[case].biases) * len(file.groups)


@pytest.mark.parametrize(
    ("config", "activation", "threshold"),
    [
        ({}, "unknown", None),
        ({"model_type": "llama"}, "silu", None),
        ({"model_type": "strange"}, "unknown", None),
        ({"hidden_act": "swish"}, "silu", None),
        ({"model_type": "llama", "hidden_act": "relu"}, "relu", None),
        ({"hidden_act": "gelu_pytorch_tanh"}, "gelu_tanh", None),
        ({"model_type": "llama", "hidden_activation": "relu"}, "silu", None),
        ({"hidden_act": "fatrelu", "hidden_act_param": 0.01}, "fatrelu", 0.01),
        ({"hidden_act": "silu", "hidden_act_param": 0.01}, "silu", None),
        ({"hidden_act": "relu", "text_config": {"model_type": "llama"}}, "silu", None),
        ({"hidden_act": "relu", "text_config": {"hidden_act": "gelu"}}, "gelu", None),
    ],
)
def test_the_config_names_the_activation(
    config: Mapping[str, Any], activation: str, threshold: float | None
) -> None:
    found = activation_of(family_of("llama"), config)
    assert (found.name, found.threshold) == (activation, threshold)


@pytest.mark.parametrize("value", ["mish", "quick_gelu", "", None, 1, ["relu"], {"name": "relu"}])
def test_an_activation_that_the_format_does_not_know_is_refused(value: Any) -> None:
    with pytest.raises(FormatError, match="hidden_act: activation not known"):
        activation_of(family_of("llama"), {"model_type": "llama", "hidden_act": value})


# The activation that transformers' classes (5.24) compute, by what config.json says.
COMPUTED = {
    # model_type: (the key that its class reads, what it computes where that is absent)
    "opt": ("activation_function", "relu"),
    "llama": ("hidden_act", "silu"),
    "mistral": ("hidden_act", "silu"),
    "qwen2": ("hidden_act", "silu"),
    "qwen3": ("hidden_act", "silu"),
    "gemma": ("hidden_act", "gelu_tanh"),
    "gemma2": ("hidden_activation", "gelu_tanh"),
    "gemma3_text": ("hidden_activation", "gelu_tanh"),
    "phi": ("hidden_act", "gelu_new"),
    "phi3": ("hidden_act", "silu"),
    "falcon": ("activation", "gelu"),
    "gpt_neox": ("hidden_act", "gelu"),
    "persimmon": ("hidden_act", "relu2"),
    "gpt2": ("activation_function", "gelu_new"),
    "bert": ("hidden_act", "gelu"),
    "mixtral": ("hidden_act", "silu"),
    "qwen3_moe": ("hidden_act", "silu"),
    "qwen2_moe": ("hidden_act", "silu"),
    "olmoe": ("hidden_act", "silu"),
    "nemotron": ("hidden_act", "relu2"),
    "openelm": ("activation_fn_name", "silu"),  # code of the Hub
    "sparsellama": ("hidden_act", "unknown"),  # code of the Hub
}
KEYS = ("hidden_act", "hidden_activation", "activation_function", "activation")


def test_the_table_of_activations_covers_every_model_type() -> None:
    assert set(COMPUTED) == {name for family in FAMILIES for name in family.model_types}


@pytest.mark.parametrize("model_type", COMPUTED)
def test_an_activation_is_what_the_models_class_computes(model_type: str) -> None:
    key, default = COMPUTED[model_type]
    family = next(family for family in FAMILIES if model_type in family.model_types)
    named = {"model_type": model_type}
    assert activation_of(family, named).name == default
    assert activation_of(family, {**named, key: "relu"}).name == "relu"
    tanh = model_type == "gemma"  # whose class takes gelu for its oldest configs' word for it
    assert activation_of(family, {**named, key: "gelu"}).name == ("gelu_tanh" if tanh else "gelu")
    for other in KEYS:
        if other != key:
            assert activation_of(family, {**named, other: "relu"}).name == default
    with pytest.raises(FormatError, match=f"config.json, {key}"):
        activation_of(family, {**named, key: None})


def test_a_fatrelu_model_keeps_its_threshold(tmp_path: Path) -> None:
    copy_of("llama", tmp_path, hidden_act="fatrelu", hidden_act_param=0.01)
    bundlefmt.pack(tmp_path, tmp_path / "x.bundle")
    with bundlefmt.open(tmp_path / "x.bundle") as file:
        for group in file.groups:
            assert (group.activation, group.activation_threshold) == ("fatrelu", 0.01)


def test_bert_attention_output_is_no_ffn() -> None:
    checkpoint = open_checkpoint(FIXTURES / "bert")
    _, ffns = find_ffns(checkpoint.tensors, checkpoint.config)
    used = {part.tensor.name for found in ffns for part in found.parts.values()}
    assert any("attention.output.dense" in name for name in checkpoint.tensors)
    assert not any("attention" in name for name in used)


def test_layers_stand_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    one = {
        name: array
        for name, array in weights_of("llama").items()
        if name.startswith("model.layers.0.mlp")
    }
    tensors = {
        name.replace("layers.0", f"layers.{i}"): array + i
        for i in range(12)
        for name, array in one.items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    bundlefmt.pack(tmp_path, tmp_path / "x.bundle")
    with bundlefmt.open(tmp_path / "x.bundle") as file:
        assert [group.layer for group in file.groups] == list(range(12))


# Shards


def shard(
    case: str, folder: Path, second: Callable[[str], bool], index: bool = True
) -> dict[str, str]:
    """The fixture as two shards, `second` telling which tensors go into the second one; returns
    the weight map."""
    weights = weights_of(case)
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    weight_map = {name: names[second(name)] for name in weights}
    for shard_name in names:
        part = {name: weights[name] for name, home in weight_map.items() if home == shard_name}
        save_file(part, folder / shard_name, metadata={"format": "pt"})
    shutil.copy(FIXTURES / case / "config.json", folder)
    if index:
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}, indent=2)
        )
    return weight_map


@pytest.mark.parametrize("given", ["", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    ("case", "second"),
    [
        ("llama", lambda name: "layers.1" in name or "layers.0.mlp.down" in name),
        ("phi3", lambda name: "gate_up_proj" in name),
        ("mixtral", lambda name: name.endswith(("w2.weight", "1.w3.weight"))),
        ("gpt2", lambda name: "c_proj" in name),
    ],
)
def test_an_ffn_across_two_shards_gives_the_bundles_of_the_single_file(
    case: str,
    second: Callable[[str], bool],
    given: str,
    tmp_path: Path,
    bundles: dict[str, Path],
) -> None:
    shard(case, tmp_path, second)
    bundlefmt.pack(tmp_path / given, tmp_path / "x.bundle")
    assert bundlefmt.verify(tmp_path / "x.bundle").ok
    with bundlefmt.open(tmp_path / "x.bundle") as file, bundlefmt.open(bundles[case]) as single:
        assert_same_bundles(file, single)
        assert set(file.tensor_names) == set(single.tensor_names)
        assert len(file.header.sources) == 2
        assert "model.safetensors.index.json" in file.blob_names
    report = bundlefmt.unpack(tmp_path / "x.bundle", tmp_path / "out")
    assert report.identical
    for name in report.files:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / name).read_bytes()
    assert len(report.files) == 4


# What is amiss gets one clear line


def copy_of(case: str, folder: Path, **config: Any) -> None:
    """A fixture's weights and config, some of its keys changed."""
    shutil.copy(FIXTURES / case / "model.safetensors", folder)
    known = json.loads((FIXTURES / case / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(known | config))


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def safetensors(header: Mapping[str, Any] | bytes, data: int | bytes = 0) -> bytes:
    """A file of that header, and that data (or that many zero bytes)."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + (bytes(data) if isinstance(data, int) else data)


UP, DOWN = "layers.0.mlp.fc1.weight", "layers.0.mlp.fc2.weight"
SOUND = {UP: entry("F32", [3, 4], 0, 48), DOWN: entry("F32", [4, 3], 48, 96)}


def single(content: bytes) -> Callable[[Path], None]:
    """A folder whose weights are these bytes."""

    def make(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(content)

    return make


def with_entries(size: int, **entries: dict[str, Any]) -> Callable[[Path], None]:
    """A folder whose weights are SOUND with other entries under `up`, `down`, or more."""
    names = {"up": UP, "down": DOWN}
    header = SOUND | {names.get(name, name): value for name, value in entries.items()}
    return single(safetensors(header, size))


def without_down(folder: Path) -> None:
    weights = weights_of("llama")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors")
    shutil.copy(FIXTURES / "llama" / "config.json", folder)


def unknown_family(folder: Path) -> None:
    zeros = np.zeros((2, 2), np.float32)
    save_file({"blocks.0.strange.weight": zeros, "head": zeros}, folder / "model.safetensors")


def known_type_without_ffn(folder: Path) -> None:
    copy_of("llama", folder, model_type="gpt2")


def weightless(folder: Path) -> None:
    shutil.copy(FIXTURES / "llama" / "config.json", folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")


def two_without_index(folder: Path) -> None:
    shard("llama", folder, lambda name: "down" in name, index=False)


def missing_shard(folder: Path) -> None:
    shard("llama", folder, lambda name: "down" in name)
    (folder / "model-00002-of-00002.safetensors").unlink()


def in_two_shards(folder: Path) -> None:
    shard("llama", folder, lambda name: "down" in name)
    both = folder / "model-00001-of-00002.safetensors"
    name = "model.layers.0.mlp.down_proj.weight"
    save_file(load_file(both) | {name: weights_of("llama")[name]}, both)


def not_in_its_shard(folder: Path) -> None:
    weight_map = shard("llama", folder, lambda name: "down" in name)
    weight_map["model.layers.0.mlp.down_proj.weight"] = "model-00001-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def index_of(value: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps(value))

    return make


def config_of(text: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        shutil.copy(FIXTURES / "llama" / "model.safetensors", folder)
        (folder / "config.json").write_text(text)

    return make


LFS = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    b"size 12345\n"
)

AMISS: dict[str, tuple[Callable[[Path], None], type[BundleError], list[str]]] = {
    "Git-LFS pointer": (
        single(LFS),
        FormatError,
        ["model.safetensors", "Git-LFS pointer", "git lfs pull"],
    ),
    "empty file": (single(b""), FormatError, ["model.safetensors", "empty file"]),
    "a few bytes": (
        single(b"\1\2\3"),
        FormatError,
        ["model.safetensors", "not a safetensors file"],
    ),
    "empty folder": (
        lambda folder: None,
        UsageError,
        ["folder without weights", "expected model.safetensors", "found nothing"],
    ),
    "folder without weights": (
        weightless,
        UsageError,
        ["folder without weights", "expected model.safetensors", "found config.json, pytorch"],
    ),
    "two files without an index": (
        two_without_index,
        UsageError,
        ["several safetensors files and no index", "model.safetensors.index.json"],
    ),
    "missing shard": (
        missing_shard,
        FormatError,
        ["model-00002-of-00002.safetensors", "missing shard", "model.safetensors.index.json"],
    ),
    "tensor in two shards": (
        in_two_shards,
        FormatError,
        ["model.layers.0.mlp.down_proj.weight", "tensor in two files", "00001-of-00002"],
    ),
    "tensor not in its shard": (
        not_in_its_shard,
        FormatError,
        ["model-00001-of-00002", "model.layers.0.mlp.down_proj.weight", "not in its shard"],
    ),
    "shard outside the folder": (
        index_of({"weight_map": {"a": "../model.safetensors"}}),
        FormatError,
        ["weight_map", "not a plain file name", "../model.safetensors"],
    ),
    "index without a map": (index_of({}), FormatError, ["index.json", "weight_map"]),
    "index of an empty map": (
        index_of({"weight_map": {}}),
        FormatError,
        ["index.json", "names no shard"],
    ),
    "index that is a list": (index_of([1]), FormatError, ["index.json", "not a JSON object"]),
    "config that is no JSON": (config_of("{"), FormatError, ["config.json", "not JSON"]),
    "config that is a list": (config_of("[]"), FormatError, ["config.json", "not a JSON object"]),
    "unknown family": (
        unknown_family,
        FormatError,
        ["no FFN tensors of a known family", "expected opt, llama", "blocks.0.strange.weight"],
    ),
    "tensors unlike the model_type": (
        known_type_without_ffn,
        FormatError,
        ["model_type gpt2", "no FFN tensors", "found ", "weight"],
    ),
    "missing down_proj": (
        without_down,
        FormatError,
        ["missing FFN tensor", "layers.1.mlp.down_proj.weight"],
    ),
    "header length past the end": (
        single((1000).to_bytes(8, "little") + b"{}"),
        FormatError,
        ["header length at byte 0", "expected 2..2", "found 1000"],
    ),
    "header length of 2^63": (
        single((1 << 63).to_bytes(8, "little") + b"{}"),
        FormatError,
        ["header length at byte 0", f"found {1 << 63}"],
    ),
    "header that is no JSON": (
        single(safetensors(b"{nonsense")),
        FormatError,
        ["at byte 8", "not a safetensors header"],
    ),
    "header that is a list": (
        single(safetensors(b"[1, 2]")),
        FormatError,
        ["at byte 8", "not a safetensors header"],
    ),
    "header nested deeply": (
        single(safetensors(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")),
        FormatError,
        ["at byte 8", "not a safetensors header"],
    ),
    "negative shape": (
        with_entries(96, up=entry("F32", [-3, -4], 0, 48)),
        FormatError,
        ["at byte 8", "not a safetensors header"],
    ),
    "overlap": (
        with_entries(92, down=entry("F32", [4, 3], 44, 92)),
        FormatError,
        [DOWN, "overlap or leave a gap", "expected data at byte"],
    ),
    "gap": (
        with_entries(100, down=entry("F32", [4, 3], 52, 100)),
        FormatError,
        [DOWN, "overlap or leave a gap", "expected data at byte"],
    ),
    "gap at the start": (
        with_entries(100, up=entry("F32", [3, 4], 4, 52), down=entry("F32", [4, 3], 52, 100)),
        FormatError,
        [UP, "overlap or leave a gap", "expected data at byte"],
    ),
    "shape unlike the length": (
        with_entries(96, up=entry("F32", [3, 5], 0, 48)),
        FormatError,
        [UP, "data_offsets do not fit", "expected 60 bytes", "found 48"],
    ),
    "dtype unlike the length": (
        with_entries(96, up=entry("F16", [3, 4], 0, 48)),
        FormatError,
        [UP, "data_offsets do not fit", "expected 24 bytes", "found 48"],
    ),
    "offsets turned round": (
        with_entries(96, up=entry("F32", [3, 4], 48, 0)),
        FormatError,
        [UP, "data_offsets do not fit", "found -48"],
    ),
    "shape beyond 64 bits": (
        with_entries(96, up=entry("F32", [1 << 40, 1 << 40], 0, 48)),
        FormatError,
        [UP, "data_offsets do not fit", f"expected {1 << 82} bytes"],
    ),
    "unknown dtype": (
        with_entries(96, up=entry("F31", [3, 4], 0, 48)),
        FormatError,
        [UP, "unknown dtype", "found F31"],
    ),
    "cut short": (
        single(safetensors(SOUND, 95)),
        FormatError,
        ["file cut short", "expected", "bytes, found"],
    ),
    "bytes at the end": (
        single(safetensors(SOUND, 97)),
        FormatError,
        ["bytes after the last tensor", "bytes, found"],
    ),
    "FFN of I8": (
        with_entries(60, up=entry("I8", [3, 4], 0, 12), down=entry("F32", [4, 3], 12, 60)),
        FormatError,
        [UP, "dtype that bundles cannot hold", "expected F32, F16, BF16", "found I8"],
    ),
    "FFN that is no matrix": (
        with_entries(96, up=entry("F32", [3, 2, 2], 0, 48)),
        FormatError,
        [UP, "not a matrix", "[3, 2, 2]"],
    ),
    "FFN without neurons": (
        with_entries(0, up=entry("F32", [0, 4], 0, 0), down=entry("F32", [4, 0], 0, 0)),
        FormatError,
        [UP, "disagree", "found [0, 4]"],
    ),
    "FFN of two widths": (
        with_entries(112, down=entry("F32", [4, 4], 48, 112)),
        FormatError,
        [DOWN, "disagree", "expected [3, 4]", "found [4, 4]"],
    ),
    "fused tensor of odd length": (
        single(
            safetensors(
                {
                    "layers.0.mlp.gate_up_proj.weight": entry("F32", [5, 4], 0, 80),
                    "layers.0.mlp.down_proj.weight": entry("F32", [4, 2], 80, 112),
                },
                112,
            )
        ),
        FormatError,
        ["gate_up_proj", "odd length", "[5, 4]"],
    ),
    "two tensors for one part": (
        with_entries(144, **{f"other.{UP}": entry("F32", [3, 4], 96, 144)}),
        FormatError,
        [f"other.{UP}", "two tensors for one part", f"also {UP}"],
    ),
}


@pytest.mark.parametrize("name", AMISS)
def test_what_is_amiss_is_said_in_one_line(name: str, tmp_path: Path) -> None:
    make, kind, fragments = AMISS[name]
    folder = tmp_path / "model"
    folder.mkdir()
    make(folder)
    with pytest.raises(BundleError) as caught:
        bundlefmt.pack(folder, tmp_path / "x.bundle")
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert message.startswith(str(folder))
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_path_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    for name in ("nowhere", "model.safetensors", "model.safetensors.index.json"):
        with pytest.raises(UsageError) as caught:
            bundlefmt.pack(tmp_path / name, tmp_path / "x.bundle")
        assert name in str(caught.value)
        assert "o such file" in str(caught.value)


@pytest.mark.parametrize("value", ["much", [1], {"a": 1}])
def test_an_activation_threshold_that_is_no_number_is_a_fault_of_the_config(
    value: Any, tmp_path: Path
) -> None:
    copy_of("llama", tmp_path, hidden_act="fatrelu", hidden_act_param=value)
    with pytest.raises(FormatError, match="hidden_act_param"):
        bundlefmt.pack(tmp_path, tmp_path / "x.bundle")


def test_control_characters_in_tensor_names_are_escaped_in_messages(tmp_path: Path) -> None:
    evil = "\x1b[2J\nlayers.0"
    single(safetensors({evil: entry("F32", [1], 0, 4)}, 4))(tmp_path)
    with pytest.raises(FormatError) as caught:
        bundlefmt.pack(tmp_path, tmp_path / "x.bundle")
    assert str(caught.value).isprintable()
    assert r"\x1b[2J\nlayers.0" in str(caught.value)


# Models that no family knows, or that hold more than it knows

UNKNOWN_TYPES = {
    # model_type: fixture that it looks like, the nearest family
    "deepseek_v3": ("qwen3_moe", "qwen3_moe"),
    "glm4_moe": ("qwen3_moe", "qwen3_moe"),
    "bitnet": ("llama", "llama"),
    "bloom": ("falcon", "falcon"),
    "strange": ("llama", "llama"),
    "Llama": ("llama", "llama"),
}


@pytest.mark.parametrize("model_type", UNKNOWN_TYPES)
def test_a_model_type_of_no_family_is_not_guessed(model_type: str, tmp_path: Path) -> None:
    case, nearest = UNKNOWN_TYPES[model_type]
    copy_of(case, tmp_path, model_type=model_type)
    with pytest.raises(UsageError) as caught:
        bundlefmt.pack(tmp_path, tmp_path / "x.bundle", dry_run=True)
    message = str(caught.value)
    assert f"--family {nearest}" in message
    assert f"found {model_type}" in message
    assert "\n" not in message


def test_a_family_that_is_named_is_taken(tmp_path: Path, bundles: dict[str, Path]) -> None:
    copy_of("llama", tmp_path, model_type="strange")
    report = bundlefmt.pack(tmp_path, tmp_path / "x.bundle", family="llama")
    assert (report.family, report.activation) == ("llama", "silu")  # as config.json says
    with (
        bundlefmt.open(tmp_path / "x.bundle") as file,
        bundlefmt.open(bundles["llama"]) as expected,
    ):
        assert_same_bundles(file, expected)


def test_no_activation_is_recorded_that_was_not_read_or_known(tmp_path: Path) -> None:
    """BLOOM looks like Falcon, and its tanh stands in no config."""
    copy_of("falcon", tmp_path, model_type="bloom")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["activation"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = bundlefmt.pack(tmp_path, tmp_path / "x.bundle", family="falcon")
    assert report.activation == "unknown"
    assert any("activation" in note for note in report.notes)


@pytest.mark.parametrize("family", ["nonsense", "", "deepseek_v3"])
def test_a_family_that_is_not_there_is_the_callers_fault(family: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"family: unknown family: expected opt, llama"):
        bundlefmt.pack(FIXTURES / "llama", tmp_path / "x.bundle", family=family)


@pytest.mark.parametrize("model_type", ["gpt_neo", "gpt_bigcode", "gpt2", None])
def test_linear_weights_under_the_names_of_gpt2_are_refused(
    model_type: str | None, tmp_path: Path
) -> None:
    """They are [out, in], where GPT-2's Conv1D has [in, out]."""
    turned = {
        name: np.ascontiguousarray(array.T) if ".mlp.c_" in name else array
        for name, array in weights_of("gpt2").items()
    }
    save_file(turned, tmp_path / "model.safetensors")
    config = json.loads((FIXTURES / "gpt2" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    with pytest.raises(BundleError, match=r"c_fc\.bias.*nn\.Linear") as caught:
        bundlefmt.pack(tmp_path, tmp_path / "x.bundle", dry_run=True)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("without", ["biases", "config"])
def test_names_alone_do_not_tell_which_way_a_square_matrix_lies(
    without: str, tmp_path: Path
) -> None:
    square = np.ones((8, 8), np.float32)
    tensors = {f"h.0.mlp.{name}.weight": square for name in ("c_fc", "c_proj")}
    if without == "config":
        tensors |= {f"h.0.mlp.{name}.bias": square[0] for name in ("c_fc", "c_proj")}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="--family NAME"):
        bundlefmt.pack(tmp_path, tmp_path / "x.bundle")
    assert bundlefmt.pack(tmp_path, tmp_path / "x.bundle", family="gpt2").neurons == 8


UNCOVERED = [
    # fixture, a tensor more in a layer
    ("llama", "model.layers.1.mlp.ffn_sub_norm.weight"),
    ("llama", "model.layers.1.mlp.experts.0.gate_proj.weight"),
    ("llama", "model.layers.1.block_sparse_moe.experts.0.w1.weight"),
    ("llama", "model.layers.1.mlp.gate_proj.weight_scale"),
    ("llama", "model.layers.1.mlp.gate.weight"),
    ("llama", "model.layers.1.feed_forward.w1.weight"),
    ("opt", "model.decoder.layers.1.fc1.weight_scale"),
    ("opt", "model.decoder.layers.1.fc3.weight"),
    ("bert", "encoder.layer.1.output.dense.scale"),
    ("mixtral", "model.layers.1.block_sparse_moe.shared_expert.up_proj.weight"),
    ("gpt2", "transformer.h.1.mlp.c_gate.weight"),
]


@pytest.mark.parametrize(("case", "name"), UNCOVERED)
def test_a_tensor_of_an_ffn_that_the_family_has_no_rule_for_is_refused(
    case: str, name: str, tmp_path: Path
) -> None:
    copy_of(case, tmp_path)
    more = {name: np.ones(4, np.float32)}
    save_file(weights_of(case) | more, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match="no rule for") as caught:
        bundlefmt.pack(tmp_path, tmp_path / "x.bundle", dry_run=True)
    assert name in str(caught.value)


BESIDE = [
    # fixture, the names of an FFN more
    ("llama", "model.layers.2.mlp.{}_proj.weight"),  # for multi-token prediction
    ("llama", "mtp.layers.0.mlp.{}_proj.weight"),
    ("llama", "model.mtp.layers.0.mlp.{}_proj.weight"),
    ("llama", "visual.layers.0.mlp.{}_proj.weight"),
    ("llama", "draft.layers.0.mlp.{}_proj.weight"),  # one layer, where the model has two
]


@pytest.mark.parametrize(("case", "name"), BESIDE)
def test_layers_beside_the_models_have_no_groups(
    case: str, name: str, tmp_path: Path, bundles: dict[str, Path]
) -> None:
    copy_of(case, tmp_path)
    weights = weights_of(case)
    more = {name.format(part): weights[f"model.layers.0.mlp.{part}_proj.weight"] for part in GATED}
    save_file(weights | more, tmp_path / "model.safetensors")
    bundlefmt.pack(tmp_path, tmp_path / "x.bundle")
    with bundlefmt.open(tmp_path / "x.bundle") as file, bundlefmt.open(bundles[case]) as expected:
        assert_same_bundles(file, expected)
        assert more.keys() <= set(file.tensor_names)
    assert bundlefmt.unpack(tmp_path / "x.bundle", tmp_path / "out").identical


def test_two_stacks_of_layers_that_might_both_be_the_models_are_refused(tmp_path: Path) -> None:
    copy_of("llama", tmp_path)
    weights = weights_of("llama")
    save_file(
        weights | {f"other.{n}": a for n, a in weights.items()}, tmp_path / "model.safetensors"
    )
    with pytest.raises(FormatError, match="two tensors for one part"):
        bundlefmt.pack(tmp_path, tmp_path / "x.bundle")


def composite(folder: Path, **outer: Any) -> None:
    """A `gemma3`-like checkpoint: the language model's config is one of several."""
    tower = "vision_tower.encoder.layers.0.mlp"
    zeros = np.zeros((8, 4), np.float32)
    weights = {f"language_model.{name}": a for name, a in weights_of("gemma").items()}
    weights |= {f"{tower}.fc1.weight": zeros, f"{tower}.fc2.weight": zeros.T.copy()}
    save_file(weights, folder / "model.safetensors")
    inner = json.loads((FIXTURES / "gemma" / "config.json").read_text())
    inner |= {"model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh"}
    del inner["hidden_act"]
    config = {"model_type": "gemma3", "text_config": inner, "vision_config": {"hidden_act": "relu"}}
    (folder / "config.json").write_text(json.dumps(config | outer))


@pytest.mark.parametrize("outer", [{}, {"hidden_act": "silu"}, {"hidden_activation": "relu"}])
def test_the_text_config_of_a_composite_model_counts(outer: dict[str, str], tmp_path: Path) -> None:
    composite(tmp_path, **outer)
    report = bundlefmt.pack(tmp_path, tmp_path / "x.bundle")
    assert (report.activation, report.layers, report.neurons) == ("gelu_tanh", 2, 144)
    assert not report.runs
    assert all(name.startswith("vision_tower.") for name in report.unused)
    assert len(report.unused) == 2


@pytest.mark.parametrize("text", [{"model_type": "mllama_text_model"}, {"model_type": 7}, [1], "x"])
def test_a_text_config_that_no_family_knows_is_refused(text: Any, tmp_path: Path) -> None:
    composite(tmp_path, text_config=text)
    with pytest.raises(BundleError, match=r"config\.json"):
        bundlefmt.pack(tmp_path, tmp_path / "x.bundle")


def test_shared_experts_stay_resident_and_the_report_says_so(tmp_path: Path) -> None:
    copy_of("qwen3_moe", tmp_path, model_type="qwen2_moe")
    name = "model.layers.{}.mlp.shared_expert.up_proj.weight"
    more = {name.format(i): np.ones((8, 32), np.float32) for i in range(2)}
    save_file(weights_of("qwen3_moe") | more, tmp_path / "model.safetensors")
    report = bundlefmt.pack(tmp_path, tmp_path / "x.bundle")
    assert report.groups == 6
    assert report.notes == ["shared experts stay resident: 2 tensors"]


INCOMPLETE = [
    # fixture, config keys, tensors left out, what is said
    ("llama", {"num_hidden_layers": 3}, "-", "no FFN in layer 2"),
    ("llama", {}, "layers.1.mlp", "no FFN in layer 1"),
    ("llama", {}, "layers.0.mlp", "no FFN in layer 0"),
    ("gpt2", {"n_layer": 3}, "-", "no FFN in layer 2"),
    ("mixtral", {"num_local_experts": 4}, "-", "experts missing in layer 0"),
    ("mixtral", {}, "layers.1.block_sparse_moe.experts.2", "experts missing in layer 1"),
    ("qwen3_moe", {}, "layers.1.mlp.experts.0", "experts missing in layer 1"),
    ("opt", {}, "layers.1.fc1.bias", "a bias in some FFNs and not in others"),
    ("llama3-rope", {}, "layers.1.mlp.down_proj.bias", "a bias in some FFNs and not in others"),
    ("llama3-rope", {"mlp_bias": False}, "-", "FFNs with biases"),
    ("llama", {"mlp_bias": True}, "-", "FFNs without biases"),
    ("opt", {"enable_bias": False}, "-", "FFNs with biases"),
    ("falcon", {"bias": True}, "-", "FFNs without biases"),
    ("falcon-bias", {"bias": None}, "-", "FFNs with biases"),
    ("phi", {}, "mlp.fc1.bias", "FFNs without biases"),
    ("llama", {"num_hidden_layers": "2"}, "-", "not a count"),
    ("llama", {"num_hidden_layers": True}, "-", "not a count"),
    ("llama", {"num_hidden_layers": 10**400}, "-", "no FFN in layer 2"),
    ("llama", {"quantization_config": {"quant_method": "bitnet"}}, "-", "quantised.*found bitnet"),
    ("llama", {"quantization": {"bits": 4}}, "-", "quantised checkpoint"),
]


@pytest.mark.parametrize(("case", "config", "left_out", "said"), INCOMPLETE)
def test_a_checkpoint_that_is_not_whole_is_refused(
    case: str, config: dict[str, Any], left_out: str, said: str, tmp_path: Path
) -> None:
    copy_of(case, tmp_path, **config)
    kept = {name: array for name, array in weights_of(case).items() if left_out not in name}
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match=said):
        bundlefmt.pack(tmp_path, tmp_path / "x.bundle", dry_run=True)


# What a pack says of the model

HEADS = [
    # fixture, config keys, tensors left out, the head
    ("llama", {}, "-", "lm_head.weight"),
    ("llama", {}, "lm_head", "missing"),
    ("llama", {"tie_word_embeddings": True}, "lm_head", "tied"),
    ("llama", {"tie_word_embeddings": None}, "lm_head", "missing"),
    ("opt", {}, "-", "tied"),
    ("opt", {"tie_word_embeddings": False}, "-", "missing"),
    ("falcon", {}, "-", "tied"),
    ("gpt_neox", {}, "-", "embed_out.weight"),
    ("gpt_neox", {}, "embed_out", "missing"),
    ("bert", {}, "-", None),
]


@pytest.mark.parametrize(("case", "config", "left_out", "head"), HEADS)
def test_the_report_says_where_the_output_head_is(
    case: str, config: dict[str, Any], left_out: str, head: str | None, tmp_path: Path
) -> None:
    copy_of(case, tmp_path, **config)
    kept = {name: array for name, array in weights_of(case).items() if left_out not in name}
    save_file(kept, tmp_path / "model.safetensors")
    report = bundlefmt.pack(tmp_path, tmp_path / "x.bundle", dry_run=True)
    assert report.head == head
    assert any("no output head" in note for note in report.notes) is (head == "missing")


@pytest.mark.parametrize("case", ["llama", "mixtral"])  # one that runs, one that does not
def test_the_report_names_tensors_that_nobody_uses(case: str, tmp_path: Path) -> None:
    copy_of(case, tmp_path)
    more = [f"model.layers.0.self_attn.q_proj.lora_{side}.weight" for side in "AB"]
    more += ["score.weight"]
    ones = np.ones((4, 32), np.float32)
    save_file(weights_of(case) | dict.fromkeys(more, ones), tmp_path / "model.safetensors")
    report = bundlefmt.pack(tmp_path, tmp_path / "x.bundle", dry_run=True)
    assert sorted(report.unused) == sorted(more)
    assert report.unused_bytes == 3 * ones.nbytes
    assert any("adapter" in note for note in report.notes)
    assert report.runs is (case == "llama")
    assert (report.why_not is None) is (case == "llama")
    assert bundlefmt.pack(FIXTURES / case, tmp_path / "x.bundle", dry_run=True).unused == []


def test_the_report_says_which_share_of_the_weights_became_units(tmp_path: Path) -> None:
    report = bundlefmt.pack(FIXTURES / "llama", tmp_path / "x.bundle", dry_run=True)
    weights = weights_of("llama")
    used = sum(array.nbytes for name, array in weights.items() if ".mlp." in name)
    assert report.unit_share == used / sum(array.nbytes for array in weights.values())


# Odd but valid headers


def text_of(entries: Mapping[str, Any], padding: int = 0) -> bytes:
    return json.dumps(entries).encode() + b" " * padding


def odd_dtypes() -> bytes:
    entries = SOUND | {
        "a.scalar": entry("F32", [], 96, 100),
        "b.position_ids": entry("I64", [2, 2], 100, 132),
        "c.mask": entry("BOOL", [3], 132, 135),
        "d.half": entry("F16", [1], 135, 137),
        "e.bytes": entry("U8", [5], 137, 142),
        "f.fp8": entry("F8_E4M3", [4], 142, 146),
        "g.fp4": entry("F4", [3, 2], 146, 149),
        "h.none": entry("F32", [0, 7], 149, 149),
        "i.complex": entry("C64", [1], 149, 157),
    }
    return safetensors(text_of(entries), bytes(range(157)))


def misaligned() -> bytes:
    text = text_of(SOUND)
    return safetensors(text + b" " * ((2 - len(text)) % 4), bytes(range(96)))


def unsorted_names() -> bytes:
    entries = {
        "z": entry("F32", [1], 96, 100),
        DOWN: entry("F32", [4, 3], 48, 96),
        "a": entry("F32", [0], 48, 48),
        UP: entry("F32", [3, 4], 0, 48),
    }
    return safetensors(text_of(entries), bytes(range(100)))


def long_padding() -> bytes:
    return safetensors(text_of(SOUND, padding=3000), bytes(range(96)))


def odd_metadata() -> bytes:
    entries = {"__metadata__": {"format": "pt", "ü\u0007": "…"}} | SOUND
    return safetensors(text_of(entries), bytes(range(96)))


@pytest.mark.parametrize(
    "make", [odd_dtypes, misaligned, unsorted_names, long_padding, odd_metadata]
)
@pytest.mark.parametrize("options", [{}, {"zstd": True}, {"resident": "up"}])
def test_odd_but_valid_files_come_back_byte_for_byte(
    make: Callable[[], bytes], options: dict[str, Any], tmp_path: Path
) -> None:
    content = make()
    (tmp_path / "odd.safetensors").write_bytes(content)
    bundlefmt.pack(tmp_path / "odd.safetensors", **options)
    assert bundlefmt.verify(tmp_path / "odd.bundle").ok
    report = bundlefmt.unpack(tmp_path / "odd.bundle", tmp_path / "out")
    assert report.identical
    assert (tmp_path / "out" / "odd.safetensors").read_bytes() == content


def test_resident_tensors_of_odd_dtypes_are_readable(tmp_path: Path) -> None:
    (tmp_path / "odd.safetensors").write_bytes(odd_dtypes())
    bundlefmt.pack(tmp_path / "odd.safetensors")
    with bundlefmt.open(tmp_path / "odd.bundle") as file:
        assert file.tensor("a.scalar").shape == ()
        assert file.tensor("b.position_ids").dtype == np.int64
        assert file.tensor("c.mask").dtype == np.bool_
        assert file.tensor("h.none").shape == (0, 7)
        assert bytes(file.tensor_bytes("g.fp4")) == bytes(range(146, 149))
        with pytest.raises(UsageError, match="no NumPy type"):
            file.tensor("g.fp4")

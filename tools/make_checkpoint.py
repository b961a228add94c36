"""Write a checkpoint of a known model's shape with random float16 weights, for measuring.

    python tools/make_checkpoint.py --layers 4 opt-like
    python tools/make_checkpoint.py --model llama-2-7b llama-like

Its tensors are cut from one block of random numbers, each from another place: what is written is
as fast as the disk and does not compress, and no two tensors are equal.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

BLOCK = 1 << 23  # random numbers
STEP = 1000003  # from a tensor's first number to the next one's; odd, so that all differ

SHARD_BYTES = 5 << 30
DEFAULT = "opt-6.7b"  # 13 GB

Shapes = dict[str, tuple[int, ...]]


class Model(NamedTuple):
    """A model's shape. `tensors`: Hugging Face name -> axes, by letter, as `sizes` has them ({i}
    is the layer); `numbers`: a config's key -> the letter of its number; `config`: the rest."""

    layers: int
    d_model: int
    ffn: int
    vocab: int
    head: int  # width of an attention head
    tensors: dict[str, str]
    numbers: dict[str, str]
    config: dict[str, Any]

    def sizes(self) -> dict[str, int]:
        """What the letters stand for."""
        heads = max(self.d_model // self.head, 1)
        head = self.d_model // heads
        return {
            "L": self.layers,
            "d": self.d_model,
            "f": self.ffn,
            "v": self.vocab,
            "a": heads,
            "h": head,
            "q": self.d_model + 2 * head,  # all queries, one key, one value
            "t": 3 * self.d_model,  # queries, keys, values
            "p": 2050,  # OPT's learned positions
        }


def _linear(name: str, axes: str, bias: bool = True) -> dict[str, str]:
    both = {f"{name}.weight": axes, f"{name}.bias": axes[0]}
    return both if bias else {f"{name}.weight": axes}


def _each(names: str, of: str, axes: str, bias: bool = True) -> dict[str, str]:
    """Several linear maps (or norms) of the same shape; `of` is the name with {} for each."""
    return {
        tensor: found
        for name in names.split()
        for tensor, found in _linear(of.replace("{}", name), axes, bias).items()
    }


_OPT = "model.decoder"
_FALCON = "transformer.h.{i}"
_LAYER = "model.layers.{i}"
_COMMON = {"hidden_size": "d", "num_hidden_layers": "L", "num_attention_heads": "a"}
_COMMON |= {"vocab_size": "v"}

MODELS = {
    "opt-6.7b": Model(
        layers=32,
        d_model=4096,
        ffn=16384,
        vocab=50272,
        head=128,
        tensors={f"{_OPT}.embed_tokens.weight": "vd", f"{_OPT}.embed_positions.weight": "pd"}
        | _each("k v q out", f"{_OPT}.layers.{{i}}.self_attn.{{}}_proj", "dd")
        | _linear(f"{_OPT}.layers.{{i}}.fc1", "fd")
        | _linear(f"{_OPT}.layers.{{i}}.fc2", "df")
        | _each("self_attn_layer_norm final_layer_norm", f"{_OPT}.layers.{{i}}.{{}}", "d")
        | _linear(f"{_OPT}.final_layer_norm", "d"),
        numbers=_COMMON | {"ffn_dim": "f", "word_embed_proj_dim": "d"},
        config={
            "architectures": ["OPTForCausalLM"],
            "model_type": "opt",
            "activation_function": "relu",
            "do_layer_norm_before": True,
            "enable_bias": True,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
            "bos_token_id": 2,
            "eos_token_id": 2,
            "pad_token_id": 1,
        },
    ),
    "falcon-7b": Model(  # relufied
        layers=32,
        d_model=4544,
        ffn=18176,
        vocab=65024,
        head=64,
        tensors={"transformer.word_embeddings.weight": "vd"}
        | _linear(f"{_FALCON}.self_attention.query_key_value", "qd", bias=False)
        | _linear(f"{_FALCON}.self_attention.dense", "dd", bias=False)
        | _linear(f"{_FALCON}.mlp.dense_h_to_4h", "fd", bias=False)
        | _linear(f"{_FALCON}.mlp.dense_4h_to_h", "df", bias=False)
        | _linear(f"{_FALCON}.input_layernorm", "d")
        | _linear("transformer.ln_f", "d"),
        numbers=_COMMON | {"ffn_hidden_size": "f"},
        config={
            "architectures": ["FalconForCausalLM"],
            "model_type": "falcon",
            "activation": "relu",
            "alibi": False,
            "bias": False,
            "layer_norm_epsilon": 1e-5,
            "max_position_embeddings": 2048,
            "multi_query": True,
            "new_decoder_architecture": False,
            "parallel_attn": True,
            "tie_word_embeddings": True,
            "bos_token_id": 11,
            "eos_token_id": 11,
        },
    ),
    "persimmon-8b": Model(
        layers=36,
        d_model=4096,
        ffn=16384,
        vocab=262144,
        head=64,
        tensors={"model.embed_tokens.weight": "vd"}
        | _linear(f"{_LAYER}.self_attn.query_key_value", "td")
        | _linear(f"{_LAYER}.self_attn.dense", "dd")
        | _each("q k", f"{_LAYER}.self_attn.{{}}_layernorm", "h")
        | _linear(f"{_LAYER}.mlp.dense_h_to_4h", "fd")
        | _linear(f"{_LAYER}.mlp.dense_4h_to_h", "df")
        | _each("input post_attention", f"{_LAYER}.{{}}_layernorm", "d")
        | _linear("model.final_layernorm", "d")
        | _linear("lm_head", "vd", bias=False),
        numbers=_COMMON | {"intermediate_size": "f"},
        config={
            "architectures": ["PersimmonForCausalLM"],
            "model_type": "persimmon",
            "hidden_act": "relu2",
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": 16384,
            "partial_rotary_factor": 0.5,
            "qk_layernorm": True,
            "rope_theta": 25000.0,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "phi-2": Model(  # relufied
        layers=32,
        d_model=2560,
        ffn=10240,
        vocab=51200,
        head=80,
        tensors={"model.embed_tokens.weight": "vd"}
        | _each("q k v", f"{_LAYER}.self_attn.{{}}_proj", "dd")
        | _linear(f"{_LAYER}.self_attn.dense", "dd")
        | _linear(f"{_LAYER}.mlp.fc1", "fd")
        | _linear(f"{_LAYER}.mlp.fc2", "df")
        | _linear(f"{_LAYER}.input_layernorm", "d")
        | _linear("model.final_layernorm", "d")
        | _linear("lm_head", "vd"),
        numbers=_COMMON | {"intermediate_size": "f"},
        config={
            "architectures": ["PhiForCausalLM"],
            "model_type": "phi",
            "hidden_act": "relu",
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "partial_rotary_factor": 0.4,
            "qk_layernorm": False,
            "tie_word_embeddings": False,
            "bos_token_id": 50256,
            "eos_token_id": 50256,
        },
    ),
    "llama-2-7b": Model(  # with FATReLU
        layers=32,
        d_model=4096,
        ffn=11008,
        vocab=32000,
        head=128,
        tensors={"model.embed_tokens.weight": "vd"}
        | _each("q k v o", f"{_LAYER}.self_attn.{{}}_proj", "dd", bias=False)
        | _each("gate up", f"{_LAYER}.mlp.{{}}_proj", "fd", bias=False)
        | _linear(f"{_LAYER}.mlp.down_proj", "df", bias=False)
        | _each("input post_attention", f"{_LAYER}.{{}}_layernorm", "d", bias=False)
        | _linear("model.norm", "d", bias=False)
        | _linear("lm_head", "vd", bias=False),
        numbers=_COMMON | {"intermediate_size": "f", "num_key_value_heads": "a"},
        config={
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "fatrelu",
            "hidden_act_param": 0.01,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
}


def shapes(model: Model) -> Shapes:
    """Hugging Face name -> shape of every tensor, layer by layer."""
    sizes = model.sizes()
    found: Shapes = {}
    for layered, names in itertools.groupby(model.tensors, key=lambda name: "{i}" in name):
        some = list(names)
        for layer in range(model.layers if layered else 1):
            for name in some:
                axes = model.tensors[name]
                found[name.replace("{i}", str(layer))] = tuple(sizes[axis] for axis in axes)
    return found


def config(model: Model) -> dict[str, Any]:
    """The model's config.json."""
    sizes = model.sizes()
    numbers = {key: sizes[letter] for key, letter in model.numbers.items()}
    return {**model.config, **numbers, "dtype": "float16"}


def shards(tensors: Shapes, most_bytes: int) -> list[Shapes]:
    """The tensors in order, cut where a shard would grow beyond `most_bytes`."""
    found: list[Shapes] = [{}]
    size = 0
    for name, shape in tensors.items():
        size += nbytes(shape)
        if found[-1] and size > most_bytes:
            found.append({})
            size = nbytes(shape)
        found[-1][name] = shape
    return found


def nbytes(shape: tuple[int, ...]) -> int:
    return 2 * math.prod(shape)


class Weights:
    """Random numbers without end, from one block of them."""

    def __init__(self, seed: int) -> None:
        numbers = np.random.default_rng(seed).standard_normal(BLOCK, dtype=np.float32)
        self._block = (numbers * np.float32(0.02)).astype("<f2")
        self._start = 0

    def tensor(self, count: int) -> Iterator[memoryview]:
        """The bytes of the next tensor, of `count` numbers."""
        at = self._start
        self._start = (self._start + STEP) % BLOCK
        while count:
            piece = self._block[at : at + count]
            yield memoryview(piece)
            count -= len(piece)
            at = 0


def write_shard(file: BinaryIO, tensors: Shapes, weights: Weights) -> None:
    """Write one safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        begin, end = end, end + nbytes(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for shape in tensors.values():
        for piece in weights.tensor(math.prod(shape)):
            file.write(piece)


def make(
    folder: Path,
    layers: int | None = None,
    d_model: int | None = None,
    ffn: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    seed: int = 0,
    model: str = DEFAULT,
) -> None:
    """Write the checkpoint's files into a folder; of the model's own shape where none is given."""
    shape = MODELS[model]
    asked: dict[str, Any] = {"layers": layers, "d_model": d_model, "ffn": ffn}
    shape = shape._replace(**{key: size for key, size in asked.items() if size is not None})
    folder.mkdir(parents=True, exist_ok=True)
    tensors = shapes(shape)
    weights = Weights(seed)
    cut = shards(tensors, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(cut, 1):
        name = f"model-{number:05}-of-{len(cut):05}.safetensors"
        with (folder / name).open("wb") as file:
            write_shard(file, shard, weights)
        weight_map |= dict.fromkeys(shard, name)
    index = {
        "metadata": {"total_size": sum(map(nbytes, tensors.values()))},
        "weight_map": weight_map,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(config(shape), indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder to write the checkpoint to")
    parser.add_argument("--model", choices=MODELS, default=DEFAULT, help="whose shape it has")
    parser.add_argument("--layers", type=int, help="how many, if not as many as the model has")
    parser.add_argument("--d-model", type=int, help="width of the model, if another")
    parser.add_argument("--ffn", type=int, help="neurons per layer, if others")
    parser.add_argument(
        "--shard-bytes", type=int, default=SHARD_BYTES, help="most bytes of a shard"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random block")
    args = parser.parse_args()
    shape = args.layers, args.d_model, args.ffn
    make(args.folder, *shape, args.shard_bytes, args.seed, args.model)


if __name__ == "__main__":
    main()

"""Write a checkpoint of OPT-6.7B's shape with random float16 weights, for measuring.

    python tools/make_checkpoint.py --layers 4 opt-like

Its tensors are cut from one block of random numbers, each from another place: what is written is
as fast as the disk and does not compress, and no two tensors are equal.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

VOCAB = 50272
POSITIONS = 2048
HEAD = 128  # width of an attention head
BLOCK = 1 << 23  # random numbers
STEP = 1000003  # from a tensor's first number to the next one's; odd, so that all differ

Shapes = dict[str, tuple[int, ...]]


def shapes(layers: int, d_model: int, ffn: int) -> Shapes:
    """Hugging Face name -> shape of every tensor."""
    prefix = "model.decoder"
    found: Shapes = {
        f"{prefix}.embed_tokens.weight": (VOCAB, d_model),
        f"{prefix}.embed_positions.weight": (POSITIONS + 2, d_model),
    }
    for layer in range(layers):
        block = f"{prefix}.layers.{layer}"
        linears = {f"self_attn.{name}_proj": (d_model, d_model) for name in ("k", "v", "q", "out")}
        linears |= {"fc1": (ffn, d_model), "fc2": (d_model, ffn)}
        for name, shape in linears.items():
            found[f"{block}.{name}.weight"] = shape
            found[f"{block}.{name}.bias"] = shape[:1]
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            found[f"{block}.{name}.weight"] = found[f"{block}.{name}.bias"] = (d_model,)
    found[f"{prefix}.final_layer_norm.weight"] = (d_model,)
    found[f"{prefix}.final_layer_norm.bias"] = (d_model,)
    return found


def config(layers: int, d_model: int, ffn: int) -> dict[str, Any]:
    """The model's config.json."""
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "enable_bias": True,
        "dtype": "float16",
        "ffn_dim": ffn,
        "hidden_size": d_model,
        "word_embed_proj_dim": d_model,
        "max_position_embeddings": POSITIONS,
        "num_attention_heads": max(d_model // HEAD, 1),
        "num_hidden_layers": layers,
        "tie_word_embeddings": True,
        "vocab_size": VOCAB,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


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
    folder: Path, layers: int, d_model: int, ffn: int, shard_bytes: int, seed: int = 0
) -> None:
    """Write the checkpoint's files into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = shapes(layers, d_model, ffn)
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
    text = json.dumps(config(layers, d_model, ffn), indent=2) + "\n"
    (folder / "config.json").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder to write the checkpoint to")
    parser.add_argument("--layers", type=int, default=32, help="13 GB with the default 32")
    parser.add_argument("--d-model", type=int, default=4096, help="width of the model")
    parser.add_argument("--ffn", type=int, default=16384, help="neurons per layer")
    parser.add_argument("--shard-bytes", type=int, default=5 << 30, help="most bytes of a shard")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random block")
    args = parser.parse_args()
    make(args.folder, args.layers, args.d_model, args.ffn, args.shard_bytes, args.seed)


if __name__ == "__main__":
    main()

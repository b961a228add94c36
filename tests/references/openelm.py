"""OpenELM in float64 NumPy, written to be read: what faster code is held against.

OpenELM (arXiv 2404.14619) is a decoder whose layers differ in width: the number of FFN neurons and
of attention heads grows linearly over the layers. This file has the arithmetic of those widths, the
four published configurations, the tensors of a checkpoint, and the model's logits computed plainly,
the whole sequence at once, with no cache.

Facts:

- Every norm is an RMSNorm (eps 1e-6). Queries and keys are normed per head, before the rotary
  embedding (rotate-half form). Nothing has a bias. The output matrix is the token embedding.
- `qkv_proj` holds the rows of all query heads, then all key heads, then all value heads.
- `proj_1` holds the rows of the gate, then those of up.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Config = dict[str, Any]
Tensors = dict[str, NDArray[np.float32]]
Array = NDArray[np.float64]

RMS_EPS = 1e-6


@dataclass(frozen=True)
class LayerShape:
    """Widths of one layer."""

    neurons: int
    query_heads: int
    kv_heads: int


def make_divisible(value: float, divisor: int) -> int:
    """The multiple of `divisor` nearest to `value`, yet never below nine tenths of it."""
    nearest = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * value else nearest


def multipliers(low_high: tuple[float, float], num_layers: int) -> list[float]:
    """One multiplier per layer, from low to high in equal steps, to 2 decimals."""
    return [round(float(m), 2) for m in np.linspace(*low_high, num=num_layers)]


def layer_shapes(
    num_layers: int,
    d_model: int,
    head_dim: int,
    ffn_multipliers: tuple[float, float],
    qkv_multipliers: tuple[float, float],
    num_gqa_groups: int,
    ffn_dim_divisor: int = 256,
) -> list[LayerShape]:
    """The widths of every layer, from the (low, high) multipliers (section 2 of the paper).

    Queries are `num_gqa_groups` times as many as keys, so their number is a multiple of it.
    """
    shapes = []
    for ffn, qkv in zip(
        multipliers(ffn_multipliers, num_layers),
        multipliers(qkv_multipliers, num_layers),
        strict=True,
    ):
        query_heads = make_divisible(d_model * qkv, head_dim * num_gqa_groups) // head_dim
        neurons = make_divisible(d_model * ffn, ffn_dim_divisor)
        shapes.append(LayerShape(neurons, query_heads, query_heads // num_gqa_groups))
    return shapes


def make_config(
    num_layers: int,
    d_model: int,
    head_dim: int,
    ffn_multipliers: tuple[float, float] = (0.5, 4.0),
    qkv_multipliers: tuple[float, float] = (0.5, 1.0),
    num_gqa_groups: int = 4,
    ffn_dim_divisor: int = 256,
    vocab_size: int = 32000,
    max_context_length: int = 2048,
) -> Config:
    """A configuration with the keys of the `config.json` on the Hugging Face hub."""
    shapes = layer_shapes(
        num_layers,
        d_model,
        head_dim,
        ffn_multipliers,
        qkv_multipliers,
        num_gqa_groups,
        ffn_dim_divisor,
    )
    return {
        "model_type": "openelm",
        "activation_fn_name": "swish",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "ffn_dim_divisor": ffn_dim_divisor,
        "ffn_multipliers": multipliers(ffn_multipliers, num_layers),
        "ffn_with_glu": True,
        "head_dim": head_dim,
        "initializer_range": 0.02,
        "max_context_length": max_context_length,
        "model_dim": d_model,
        "normalization_layer_name": "rms_norm",
        "normalize_qk_projections": True,
        "num_gqa_groups": num_gqa_groups,
        "num_kv_heads": [shape.kv_heads for shape in shapes],
        "num_query_heads": [shape.query_heads for shape in shapes],
        "num_transformer_layers": num_layers,
        "qkv_multipliers": list(qkv_multipliers),
        "rope_freq_constant": 10000,
        "rope_max_length": 2 * max_context_length,
        "share_input_output_layers": True,
        "vocab_size": vocab_size,
    }


PUBLISHED: dict[str, Config] = {
    "270M": make_config(num_layers=16, d_model=1280, head_dim=64),
    "450M": make_config(num_layers=20, d_model=1536, head_dim=64),
    "1.1B": make_config(num_layers=28, d_model=2048, head_dim=64),
    "3B": make_config(num_layers=36, d_model=3072, head_dim=128),
}


def small_config() -> Config:
    """Four layers, no two alike: 32, 112, 176, 256 neurons; 2, 4, 6, 8 heads."""
    return make_config(
        num_layers=4,
        d_model=64,
        head_dim=8,
        qkv_multipliers=(0.25, 1.0),
        num_gqa_groups=2,
        ffn_dim_divisor=16,
        vocab_size=160,
        max_context_length=128,
    )


def tensor_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the checkpoint; matrices are [out, in]."""
    d_model, head_dim = config["model_dim"], config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.token_embeddings.weight": (config["vocab_size"], d_model),
        "transformer.norm.weight": (d_model,),
    }
    for i in range(config["num_transformer_layers"]):
        layer = f"transformer.layers.{i}"
        neurons = make_divisible(config["ffn_multipliers"][i] * d_model, config["ffn_dim_divisor"])
        query_heads, kv_heads = config["num_query_heads"][i], config["num_kv_heads"][i]
        qkv_rows = (query_heads + 2 * kv_heads) * head_dim
        shapes |= {
            f"{layer}.attn_norm.weight": (d_model,),
            f"{layer}.attn.qkv_proj.weight": (qkv_rows, d_model),
            f"{layer}.attn.q_norm.weight": (head_dim,),
            f"{layer}.attn.k_norm.weight": (head_dim,),
            f"{layer}.attn.out_proj.weight": (d_model, query_heads * head_dim),
            f"{layer}.ffn_norm.weight": (d_model,),
            f"{layer}.ffn.proj_1.weight": (2 * neurons, d_model),
            f"{layer}.ffn.proj_2.weight": (d_model, neurons),
        }
    return shapes


def parameter_count(config: Config) -> int:
    """Parameters of the model; the shared embedding counts once."""
    return sum(int(np.prod(shape)) for shape in tensor_shapes(config).values())


def random_checkpoint(config: Config, seed: int) -> Tensors:
    """Random weights under checkpoint names: matrices N(0, 1/fan_in), norms 1 + N(0, 0.1²)."""
    random = np.random.RandomState(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        draw = random.standard_normal(shape)
        value = 1 + 0.1 * draw if len(shape) == 1 else draw / np.sqrt(shape[1])
        tensors[name] = value.astype(np.float32)
    return tensors


def logits(config: Config, tensors: Tensors, ids: NDArray[np.integer] | list[int]) -> Array:
    """Logits [len(ids), vocab]: row t is what the model says after ids[0..t]."""
    weights = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    embeddings = weights["transformer.token_embeddings.weight"]
    x = embeddings[np.asarray(ids)]  # [T, d]
    for i in range(config["num_transformer_layers"]):
        prefix = f"transformer.layers.{i}."
        layer = {
            name.removeprefix(prefix).removesuffix(".weight"): tensor
            for name, tensor in weights.items()
            if name.startswith(prefix)
        }
        heads = config["num_query_heads"][i], config["num_kv_heads"][i]
        x = x + attention(config, layer, heads, rms_norm(x, layer["attn_norm"]))
        x = x + ffn(layer, rms_norm(x, layer["ffn_norm"]))
    return rms_norm(x, weights["transformer.norm.weight"]) @ embeddings.T


def attention(config: Config, layer: dict[str, Array], heads: tuple[int, int], x: Array) -> Array:
    """Causal self-attention of one layer: [T, d] to [T, d]; `heads` is (query, kv)."""
    query_heads, kv_heads = heads
    length, head_dim = len(x), config["head_dim"]
    rows = (x @ layer["attn.qkv_proj"].T).reshape(length, query_heads + 2 * kv_heads, head_dim)
    q, k, v = np.split(rows, [query_heads, query_heads + kv_heads], axis=1)  # [T, heads, head_dim]

    base = config["rope_freq_constant"]
    q = rotate(rms_norm(q, layer["attn.q_norm"]), base)
    k = rotate(rms_norm(k, layer["attn.k_norm"]), base)
    # Query heads 0..g-1 share key head 0, the next g share key head 1, and so on.
    group = query_heads // kv_heads
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)

    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(head_dim)
    future = np.triu(np.ones((length, length), dtype=bool), 1)
    scores = np.where(future, -np.inf, scores)
    mixed = np.einsum("hqk,khd->qhd", softmax(scores), v)
    return mixed.reshape(length, -1) @ layer["attn.out_proj"].T


def ffn(layer: dict[str, Array], x: Array) -> Array:
    """SwiGLU: [T, d] to [T, d]."""
    gate, up = np.split(x @ layer["ffn.proj_1"].T, 2, axis=1)
    return (gate / (1 + np.exp(-gate)) * up) @ layer["ffn.proj_2"].T


def rms_norm(x: Array, weight: Array) -> Array:
    """Scale the last axis to a mean square of 1, then by `weight`."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + RMS_EPS) * weight


def rotate(x: Array, base: float) -> Array:
    """Rotary embedding of [T, heads, head_dim]; dimension j is paired with j + head_dim / 2."""
    length, _, head_dim = x.shape
    frequencies = base ** (-np.arange(0, head_dim, 2) / head_dim)
    angles = np.outer(np.arange(length), frequencies)[:, None, :]  # [T, 1, head_dim / 2]
    cos, sin = np.cos(angles), np.sin(angles)
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def softmax(x: Array) -> Array:
    """Softmax over the last axis."""
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)

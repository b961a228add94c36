"""Attention with a key/value cache."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bundlefmt.runtime import kernels
from bundlefmt.runtime.config import Attention, DecoderConfig, Rope
from bundlefmt.runtime.kernels import Floats
from bundlefmt.runtime.weights import Linear, Weights


class LayerCache:
    """Keys and values of the tokens so far, float32 [kv_heads, tokens, head_dim] each. The memory
    doubles when it is full."""

    def __init__(self, kv_heads: int, head_dim: int) -> None:
        self.length = 0
        self._memory = np.empty((2, kv_heads, 16, head_dim), dtype=np.float32)

    def extend(self, keys: Floats, values: Floats) -> tuple[Floats, Floats]:
        """Add keys and values [kv_heads, n, head_dim]; returns all of them."""
        end = self.length + keys.shape[1]
        if end > self._memory.shape[2]:
            shape = (*self._memory.shape[:2], max(end, 2 * self._memory.shape[2]), keys.shape[2])
            grown = np.empty(shape, dtype=np.float32)
            grown[:, :, : self.length] = self._memory[:, :, : self.length]
            self._memory = grown
        self._memory[0, :, self.length : end] = keys
        self._memory[1, :, self.length : end] = values
        self.length = end
        return self._memory[0, :, :end], self._memory[1, :, :end]


class AttentionLayer:
    """One layer's attention, with grouped key/value heads."""

    def __init__(self, config: DecoderConfig, weights: Weights, layer: int) -> None:
        self.shape: Attention = config.layers[layer]
        self._head_dim = config.head_dim
        self._rope = config.rope
        if "qkv" in config.names:
            self._projections = [weights.linear("qkv", layer)]
        else:
            self._projections = [weights.linear(role, layer) for role in ("q", "k", "v")]
        self._out: Linear = weights.linear("out", layer)
        self._q_norm = weights.optional_norm("q_norm", layer)
        self._k_norm = weights.optional_norm("k_norm", layer)

    def new_cache(self) -> LayerCache:
        """An empty cache for this layer."""
        return LayerCache(self.shape.kv_heads, self._head_dim)

    def __call__(self, x: Floats, cache: LayerCache) -> Floats:
        """x [tokens, d_model] -> [tokens, d_model]; the tokens follow those in the cache."""
        heads, kv_heads = self.shape.heads, self.shape.kv_heads
        tokens, before = x.shape[0], cache.length
        joined = np.concatenate([projection(x) for projection in self._projections], axis=1)
        split = joined.reshape(tokens, heads + 2 * kv_heads, self._head_dim).transpose(1, 0, 2)
        q, k, v = split[:heads], split[heads : heads + kv_heads], split[heads + kv_heads :]
        if self._q_norm is not None and self._k_norm is not None:
            q, k = self._q_norm(q), self._k_norm(k)
        if self._rope is not None:
            angles = _angles(self._rope, before, tokens)
            q, k = _rotate(q, angles), _rotate(k, angles)
        keys, values = cache.extend(k, v)

        grouped = q.reshape(kv_heads, heads // kv_heads * tokens, self._head_dim)
        scores = grouped @ keys.transpose(0, 2, 1) * np.float32(self._head_dim**-0.5)
        scores = scores.reshape(heads, tokens, cache.length)
        scores[:, ~self._visible(before, tokens)] = -np.inf
        shares = kernels.softmax(scores).reshape(kv_heads, -1, cache.length)
        mixed = (shares @ values).reshape(heads, tokens, self._head_dim)
        return self._out(np.ascontiguousarray(mixed.transpose(1, 0, 2)).reshape(tokens, -1))

    def _visible(self, before: int, tokens: int) -> NDArray[np.bool_]:
        """[tokens, before + tokens]: which tokens each new token sees."""
        back = np.arange(before, before + tokens)[:, None] - np.arange(before + tokens)
        visible: NDArray[np.bool_] = back >= 0
        return visible if self.shape.window is None else visible & (back < self.shape.window)


def _angles(rope: Rope, before: int, tokens: int) -> tuple[Floats, Floats]:
    """(cosines, sines) [tokens, head_dim / 2] for the positions from `before` on."""
    angles = np.arange(before, before + tokens)[:, None] * rope.frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _rotate(x: Floats, angles: tuple[Floats, Floats]) -> Floats:
    """Rotate pairs (first half, second half) of x [heads, tokens, head_dim] by the angles."""
    cosines, sines = angles
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate(
        [first * cosines - second * sines, second * cosines + first * sines], axis=-1
    )

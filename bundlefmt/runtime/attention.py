"""Attention with a key/value cache."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bundlefmt import kernels
from bundlefmt.errors import UsageError
from bundlefmt.kernels import Floats
from bundlefmt.runtime.config import Attention, DecoderConfig
from bundlefmt.runtime.rope import Rope
from bundlefmt.runtime.weights import Linear, Norm, Weights

_QUERIES = 256  # tokens of a prompt whose scores are in memory at once


class LayerCache:
    """Keys and values of the tokens so far, float32 [kv_heads, tokens, head_dim] each, with room
    for `tokens` of them. The memory doubles when it is full. Raises UsageError where there is not
    so much memory."""

    def __init__(self, kv_heads: int, head_dim: int, tokens: int) -> None:
        self.length = 0
        try:
            self._memory = np.empty((2, kv_heads, tokens, head_dim), dtype=np.float32)
        except (MemoryError, ValueError):  # ValueError: more than can be addressed
            raise UsageError(
                "not enough memory for the keys and values of so long a text",
                field="tokens",
                found=tokens,
            ) from None

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

    def drop(self, tokens: int) -> None:
        """Forget the last tokens, so many of them."""
        self.length -= tokens


class AttentionLayer:
    """One layer's attention, with grouped key/value heads."""

    def __init__(self, config: DecoderConfig, weights: Weights, layer: int) -> None:
        self.shape: Attention = config.layers[layer]
        self._head_dim = config.head_dim
        self._rope = config.rope
        self._groups = self.shape.kv_heads if config.qkv_by_group else 1
        roles = ("qkv",) if "qkv" in config.names else ("q", "k", "v")
        self._projections = [weights.linear(role, layer) for role in roles]
        self._out: Linear = weights.linear("out", layer)
        self._head_norms: list[Norm] = []
        if config.head_norms:
            self._head_norms = [weights.norm(role, layer) for role in ("q_norm", "k_norm")]

    def new_cache(self, tokens: int) -> LayerCache:
        """An empty cache for this layer, with room for that many tokens."""
        return LayerCache(self.shape.kv_heads, self._head_dim, tokens)

    def __call__(self, x: Floats, cache: LayerCache) -> Floats:
        """x [tokens, d_model] -> [tokens, d_model]; the tokens follow those in the cache."""
        tokens, before = x.shape[0], cache.length
        joined = np.concatenate([projection(x) for projection in self._projections], axis=1)
        q, k, v = self._split(joined)
        if self._head_norms:
            q, k = (norm(heads) for norm, heads in zip(self._head_norms, (q, k), strict=True))
        if self._rope is not None:
            angles = _angles(self._rope, before, tokens)
            q, k = _rotate(q, angles), _rotate(k, angles)
        keys, values = cache.extend(k, v)

        mixed = np.empty(q.shape, dtype=np.float32)
        for start in range(0, tokens, _QUERIES):
            some = slice(start, min(start + _QUERIES, tokens))
            mixed[:, some] = self._mix(q[:, some], keys, values, before + start)
        return self._out(np.ascontiguousarray(mixed.transpose(1, 0, 2)).reshape(tokens, -1))

    def _split(self, joined: Floats) -> list[Floats]:
        """Queries, keys and values [heads, tokens, head_dim] from what the projections give."""
        queries = self.shape.heads // self._groups
        keys = self.shape.kv_heads // self._groups
        tokens = joined.shape[0]
        grouped = joined.reshape(tokens, self._groups, queries + 2 * keys, self._head_dim)
        return [
            part.reshape(tokens, -1, self._head_dim).transpose(1, 0, 2)
            for part in np.split(grouped, [queries, queries + keys], axis=2)
        ]

    def _mix(self, q: Floats, keys: Floats, values: Floats, before: int) -> Floats:
        """Values mixed by attention, for queries [heads, n, head_dim] of the tokens from position
        `before` on."""
        kv_heads, seen = keys.shape[0], before + q.shape[1]
        keys, values = keys[:, :seen], values[:, :seen]
        grouped = q.reshape(kv_heads, -1, self._head_dim)
        scores = grouped @ keys.transpose(0, 2, 1) * np.float32(self._head_dim**-0.5)
        scores = scores.reshape(*q.shape[:2], seen)
        scores[:, ~self._visible(before, q.shape[1])] = -np.inf
        shares = kernels.softmax(scores).reshape(kv_heads, -1, seen)
        mixed: Floats = (shares @ values).reshape(q.shape)
        return mixed

    def _visible(self, before: int, tokens: int) -> NDArray[np.bool_]:
        """[tokens, before + tokens]: which tokens each new token sees."""
        back = np.arange(before, before + tokens)[:, None] - np.arange(before + tokens)
        visible: NDArray[np.bool_] = back >= 0
        return visible if self.shape.window is None else visible & (back < self.shape.window)


def _angles(rope: Rope, before: int, tokens: int) -> tuple[Floats, Floats]:
    """(cosines, sines) [tokens, pairs] for the positions from `before` on."""
    angles = np.arange(before, before + tokens)[:, None] * rope.frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _rotate(x: Floats, angles: tuple[Floats, Floats]) -> Floats:
    """Rotate pairs of x [heads, tokens, head_dim] by the angles: of its first 2 * pairs numbers,
    one of the first half and one of the second. The others stay."""
    cosines, sines = angles
    pairs = cosines.shape[1]
    first, second, rest = np.split(x, [pairs, 2 * pairs], axis=-1)
    return np.concatenate(
        [first * cosines - second * sines, second * cosines + first * sines, rest], axis=-1
    )

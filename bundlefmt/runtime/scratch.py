"""What computing takes of memory besides weights and caches: upper bounds, in bytes.

Facts: the arrays of a long prompt are many times those of a single token. NumPy makes a new array
for each step of an expression, so that several of one size exist at once; which ones, was counted
in the code named at each figure, and measured (`python -m bench.memory_limits`). OpenBLAS copies
blocks of both factors into buffers that it keeps: some for each of its threads, and `Q` numbers for
each row of the larger factor.
"""

from __future__ import annotations

from collections.abc import Sequence

from bundlefmt.layout.header import Group
from bundlefmt.native import CPUS
from bundlefmt.runtime.config import DecoderConfig
from bundlefmt.runtime.selection import Selecting
from bundlefmt.runtime.streamer import CHUNK_BYTES

_QUERIES = 256  # whose scores are in memory at once, as in `attention`
_BLAS_THREAD = 2 << 20
_BLAS_ROW = 4 * 512  # Q is at most 512 (448 where AVX-512 is)
_PER_LOGIT = 64  # sampling's float32, float64 and sorted ones; or those of a draft's proposals


def pass_bytes(
    config: DecoderConfig, groups: Sequence[Group], selecting: Selecting, tokens: int
) -> int:
    """A pass over so many tokens, without its logits."""
    attention = _attention_bytes(config, tokens)
    ffn = max(_ffn_bytes(group, selecting, tokens) for group in groups)
    hidden = 10 * 4 * tokens * config.d_model  # residual, norms and what they are made of
    return hidden + (attention + ffn if config.parallel else max(attention, ffn))


def logits_bytes(vocabulary: int) -> int:
    """The logits of a token, or of the few that a draft proposes, and the choice from them."""
    return _PER_LOGIT * vocabulary


def blas_bytes(rows: int) -> int:
    """What OpenBLAS keeps when factors have up to so many rows."""
    return _BLAS_THREAD * CPUS + _BLAS_ROW * rows


def _attention_bytes(config: DecoderConfig, tokens: int) -> int:
    """Of the layer that takes most (`AttentionLayer.__call__`, `_mix`)."""
    queries = min(tokens, _QUERIES)
    visible = 40 * queries * tokens
    return visible + max(
        4 * tokens * 3 * (layer.heads + 2 * layer.kv_heads) * config.head_dim
        + 4 * 4 * layer.heads * queries * tokens
        for layer in config.layers
    )


def _ffn_bytes(group: Group, selecting: Selecting, tokens: int) -> int:
    """Activations of the neurons that are streamed at once, and of all neurons where the selector
    is in memory (`FfnLayer._streamed`, `Exact`, `TopK`)."""
    at_once = min(group.neurons, max(CHUNK_BYTES // group.stride, 1))
    each = 96 if group.activation == "gelu" else 32  # erf is computed in float64
    streamed = each * tokens * at_once
    if not selecting.holds_selector:
        return streamed
    chosen = 18 if selecting.mode == "topk" else 14
    return tokens * max(chosen * group.neurons, 4 * group.neurons + each * at_once)

"""The arithmetic: the one place where weights meet activations.

Weights stay in memory as they are stored. The native core computes from them as they lie; its
twin in NumPy widens a block of rows at a time to float32, and serves where the core is not there
and for many tokens at once, where BLAS is the faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from bundlefmt.errors import UsageError, integer
from bundlefmt.layout.constants import EncodingName
from bundlefmt.layout.encodings import ENCODINGS, numbers_in
from bundlefmt.layout.header import Group
from bundlefmt.native import CPUS, core

Floats = NDArray[np.float32]
Rows = NDArray[np.int64]
ActivationFunction = Callable[[Floats], Floats]

FEW_TOKENS = 16  # up to here weights decoded anew for every four tokens beat BLAS

_SQRT_HALF = np.float32(0.7071067811865476)
_SQRT_2_OVER_PI = np.float32(0.7978845608028654)
_F16_INFINITY = 0x7C00
_F16_FIELDS = np.int32(-0x70002000)  # 0x8FFFE000: sign, exponent and mantissa, shifted by 13
_F16_REBIAS = np.float32(2.0**112)  # exponent biases: 127 - 15
_BLOCK_NUMBERS = 1 << 17  # widened at a time: half a MiB of float32 stays in the L2 cache
_MOST_THREADS = 1024  # that the native core computes with

_threads = CPUS


def set_threads(count: int, field: str = "threads") -> None:
    """How many threads the native core computes with (default: one per CPU of the process);
    `field` is what an error calls the number."""
    global _threads
    _threads = integer(count, field, 1, _MOST_THREADS)


class Part(NamedTuple):
    """One part of some neurons: uint8 [rows, bytes of a vector] in an encoding, biases [rows]."""

    stored: NDArray[np.uint8]
    encoding: EncodingName
    bias: Floats | None = None


def matmul(x: Floats, weight: NDArray[Any]) -> Floats:
    """x [tokens, n] @ weight.T -> float32 [tokens, m]; weight [m, n] of any stored float type."""
    if _native(x) and weight.dtype in _STORED and weight.flags.c_contiguous:
        return _products(x, weight.view(np.uint8), _STORED[weight.dtype])
    if weight.dtype == np.float32:
        product: Floats = x @ weight.T
        return product
    return _matmul_by_blocks(x, weight, widened)


def matmul_encoded(
    x: Floats, stored: NDArray[np.uint8], encoding: str, rows: Rows | None = None
) -> Floats:
    """`matmul` with a weight in an encoding, uint8 [m, bytes of a row], or with some of its rows;
    block encodings are decoded some rows at a time."""
    if _native(x):
        return _products(x, stored, encoding, rows)
    if rows is not None:
        stored = stored[rows]
    if ENCODINGS[encoding].dtype is not None:
        return matmul(x, numbers_in(stored, encoding))
    return _matmul_by_blocks(x, stored, lambda rows: numbers_in(rows, encoding))


def ffn(
    x: Floats,
    selected: Part | Floats,
    up: Part | None,
    down: Part,
    group: Group,
    rows: Rows | None = None,
) -> Floats:
    """Sum over neurons of down * act(selector . x) * (up . x): float32 [tokens, d_model]; without
    `up`, no such factor. The neurons are the parts' rows, or those of them in `rows`. `selected`
    is the selector, or act(selector . x) [tokens, n] where that is known."""
    if _native(x):
        y: Floats = core.ffn(
            np.ascontiguousarray(x),
            rows,
            core.Part(*selected) if isinstance(selected, Part) else None,
            up and core.Part(*up),
            core.Part(*down),
            group.activation,
            group.activation_threshold or 0.0,
            None if isinstance(selected, Part) else np.ascontiguousarray(selected),
            _threads,
        )
        return y
    if isinstance(selected, Part):
        selected = activation(group)(biased_products(x, selected, rows))
    if up is not None:
        selected = selected * biased_products(x, up, rows)
    stored = down.stored if rows is None else down.stored[rows]
    return weighted_sum(selected, numbers_in(stored, down.encoding))


def activations(x: Floats, selector: Part, group: Group) -> Floats:
    """act(selector . x), float32 [tokens, n]."""
    return activation(group)(biased_products(x, selector))


def biased_products(x: Floats, part: Part, rows: Rows | None = None) -> Floats:
    """part . x + bias of the part's rows, or of those in `rows`: float32 [tokens, n]."""
    product = matmul_encoded(x, part.stored, part.encoding, rows)
    if part.bias is None:
        return product
    return product + (part.bias if rows is None else part.bias[rows])


def _native(x: Floats) -> bool:
    """Whether the native core is the one to compute with these tokens."""
    return core is not None and x.shape[0] <= FEW_TOKENS


def _products(
    x: Floats, stored: NDArray[np.uint8], encoding: str, rows: Rows | None = None
) -> Floats:
    product: Floats = core.products(
        np.ascontiguousarray(x), core.Part(stored, encoding), rows, _threads
    )
    return product


def _matmul_by_blocks(
    x: Floats, rows: NDArray[Any], decode: Callable[[NDArray[Any]], Floats]
) -> Floats:
    """x @ decode(rows).T, some rows at a time."""
    out = np.empty((x.shape[0], rows.shape[0]), dtype=np.float32)
    step = max(_BLOCK_NUMBERS // x.shape[1], 1)
    for start in range(0, rows.shape[0], step):
        np.matmul(x, decode(rows[start : start + step]).T, out=out[:, start : start + step])
    return out


def weighted_sum(h: Floats, rows: NDArray[Any]) -> Floats:
    """h [tokens, m] @ rows [m, n] -> float32 [tokens, n]; rows of any stored float type."""
    if rows.dtype == np.float32:
        total: Floats = h @ rows
        return total
    out = np.zeros((h.shape[0], rows.shape[1]), dtype=np.float32)
    step = max(_BLOCK_NUMBERS // rows.shape[1], 1)
    for start in range(0, rows.shape[0], step):
        out += h[:, start : start + step] @ widened(rows[start : start + step])
    return out


def widened(stored: NDArray[Any]) -> Floats:
    """Numbers of a stored float type as float32."""
    if stored.dtype == ml_dtypes.bfloat16:  # a bf16 is the upper half of a float32
        bits = np.left_shift(stored.view(np.uint16), 16, dtype=np.uint32)
        return bits.view(np.float32)
    if stored.dtype == np.float16 and stored.size:
        return _widened_f16(stored)
    return stored.astype(np.float32, copy=False)


def _widened_f16(stored: NDArray[np.float16]) -> Floats:
    """NumPy's own conversion goes number by number, at a third of the speed of this: move sign,
    exponent and mantissa into their float32 places, then put the exponent's bias right."""
    if (stored.view(np.uint16) & 0x7FFF).max() >= _F16_INFINITY:  # infinities, NaN: no bias fits
        return stored.astype(np.float32)
    bits = np.left_shift(stored.view(np.int16), 13, dtype=np.int32)
    bits &= _F16_FIELDS
    numbers = bits.view(np.float32)
    numbers *= _F16_REBIAS
    return numbers


def layer_norm(x: Floats, weight: Floats, epsilon: float) -> Floats:
    """LayerNorm over the last axis, before its bias."""
    centred: Floats = x - _mean(x)
    variance: Floats = _mean(np.square(centred))
    scaled: Floats = centred / np.sqrt(variance + np.float32(epsilon)) * weight
    return scaled


def rms_norm(x: Floats, weight: Floats, epsilon: float) -> Floats:
    """RMSNorm over the last axis."""
    mean_square: Floats = _mean(np.square(x))
    scaled: Floats = x / np.sqrt(mean_square + np.float32(epsilon)) * weight
    return scaled


def _mean(x: Floats) -> Floats:
    """x.mean(axis=-1, keepdims=True), without what NumPy's own does around it for every token."""
    total: Floats = np.add.reduce(x, axis=-1, keepdims=True)
    return total / np.float32(x.shape[-1])


def softmax(x: Floats) -> Floats:
    """Softmax over the last axis."""
    exponentials = np.exp(x - x.max(axis=-1, keepdims=True))
    normal: Floats = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return normal


def activation(group: Group) -> ActivationFunction:
    """The group's activation function. Raises UsageError for one that is not known here."""
    if group.activation == "fatrelu":
        threshold = np.float32(group.activation_threshold or 0.0)
        return lambda x: np.where(x > threshold, x, np.float32(0))
    if group.activation not in _ACTIVATIONS:
        raise UsageError(
            "activation not known to this runtime",
            field=group.label,
            expected=", ".join([*_ACTIVATIONS, "fatrelu"]),
            found=group.activation,
        )
    return _ACTIVATIONS[group.activation]


_STORED = {
    encoding.dtype: encoding.name for encoding in ENCODINGS.values() if encoding.dtype is not None
}

# Activations that are exactly zero for many inputs: their neurons can be skipped without loss.
SPARSE_ACTIVATIONS = ("relu", "relu2", "fatrelu")


def _relu(x: Floats) -> Floats:
    return np.maximum(x, np.float32(0))


def _silu(x: Floats) -> Floats:
    with np.errstate(over="ignore"):
        y = x / (1 + np.exp(-x))
        return np.asarray(y, dtype=np.float32)


def _gelu(x: Floats) -> Floats:
    return np.asarray(0.5 * x * (1 + _erf(x * _SQRT_HALF)), dtype=np.float32)


def _gelu_tanh(x: Floats) -> Floats:
    inner = _SQRT_2_OVER_PI * (x + 0.044715 * x * x * x)
    return np.asarray(0.5 * x * (1 + np.tanh(inner)), dtype=np.float32)


def _erf(x: Floats) -> Floats:
    """The error function to 1.2e-7 (Numerical Recipes' erfcc, a Chebyshev fit), in float64."""
    z = np.abs(x.astype(np.float64))
    t = 1 / (1 + z / 2)
    series = np.polynomial.polynomial.polyval(
        t,
        [-1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806, 0.27886807, -1.13520398,
         1.48851587, -0.82215223, 0.17087277],
    )  # fmt: skip
    signed = np.copysign(1 - t * np.exp(-z * z + series), x)
    return signed.astype(np.float32)


_ACTIVATIONS: dict[str, ActivationFunction] = {
    "relu": _relu,
    "relu2": lambda x: np.square(_relu(x)),
    "silu": _silu,
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_tanh": _gelu_tanh,
}

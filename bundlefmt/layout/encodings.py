"""Encodings: how the numbers of a vector are stored (spec, section 6).

f32, f16 and bf16 are plain little-endian IEEE 754 (bf16: the upper half of an f32). q8_0 and
q4_0 are ggml's blocks of 32 numbers, byte for byte:

    q8_0: f16 d, 32 x i8 q           x = d * q             34 bytes
    q4_0: f16 d, 16 x u8             x = d * (nibble - 8)  18 bytes
          low nibbles hold numbers 0..15 of the block, high nibbles 16..31
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from bundlefmt.errors import UsageError
from bundlefmt.layout.constants import EncodingName

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Encoding:
    """One way to store a vector. A block of `block` numbers takes `block_bytes` bytes.

    `dtype` is the NumPy type under which the bytes can be viewed as they lie, None for block
    formats. `alignment` is the byte alignment that a vector's first byte needs, `largest` the
    largest number that can be stored.
    """

    name: EncodingName
    block: int
    block_bytes: int
    alignment: int
    largest: float
    dtype: np.dtype[Any] | None
    _encode: Callable[[Floats], Bytes]
    _decode: Callable[[Bytes], Floats]

    def nbytes(self, length: int) -> int:
        """Bytes of a vector of `length` numbers; UsageError when it is no whole number of
        blocks."""
        if length % self.block:
            raise UsageError(
                f"encoding {self.name} stores numbers in blocks of {self.block}",
                field="d_model",
                expected=f"a multiple of {self.block}",
                found=length,
            )
        return length // self.block * self.block_bytes

    def encode(self, numbers: Floats) -> Bytes:
        """float32 [..., n] -> uint8 [..., nbytes(n)]. Values must be finite and in range: see
        `fits`."""
        return self._encode(np.ascontiguousarray(numbers, dtype=np.float32))

    def decode(self, stored: Bytes) -> Floats:
        """uint8 [..., nbytes(n)] -> float32 [..., n]."""
        return self._decode(stored)

    def fits(self, numbers: Floats) -> bool:
        """Whether every number survives `encode`: none overflows, and block formats get no
        infinity or NaN (f32, f16 and bf16 keep those)."""
        finite = np.isfinite(numbers)
        if self.dtype is None and not finite.all():
            return False
        return bool(np.max(np.abs(numbers), initial=0.0, where=finite) <= self.largest)


_F16_MAX = 65504.0
_BF16_MAX = float.fromhex("0x1.fep127")


def _float_encoding(name: EncodingName, dtype: Any, largest: float) -> Encoding:
    kind = np.dtype(dtype)

    def encode(numbers: Floats) -> Bytes:
        with np.errstate(invalid="ignore"):  # NaN stays NaN
            return np.ascontiguousarray(numbers.astype(kind)).view(np.uint8)

    def decode(stored: Bytes) -> Floats:
        numbers: Floats = stored.view(kind).astype(np.float32)
        return numbers

    return Encoding(name, 1, kind.itemsize, kind.itemsize, largest, kind, encode, decode)


def _blocks(numbers: Floats) -> Floats:
    return numbers.reshape(*numbers.shape[:-1], -1, 32)


def _scaled(blocks: Floats, scales: Floats) -> Floats:
    """Blocks divided by their scales (as ggml does: by the reciprocal), 0 where the scale is 0 or
    so small that it has no finite reciprocal: as an f16 it is 0."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scales
    return blocks * np.where(np.isfinite(inverse), inverse, np.float32(0))


def _stored_blocks(stored: Bytes, block_bytes: int) -> Bytes:
    return stored.reshape(*stored.shape[:-1], stored.shape[-1] // block_bytes, block_bytes)


def _pack(scales: Floats, quants: NDArray[Any]) -> Bytes:
    d = scales.astype(np.float16).view(np.uint8)
    packed = np.concatenate([d, quants.view(np.uint8)], axis=-1)
    return packed.reshape(*packed.shape[:-2], -1)


def _encode_q8_0(numbers: Floats) -> Bytes:
    blocks = _blocks(numbers)
    scales = np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127)
    scaled = _scaled(blocks, scales)
    # C's roundf: halves away from zero.
    whole = np.trunc(scaled)
    rounded = whole + np.trunc(2 * (scaled - whole))
    return _pack(scales, rounded.astype(np.int8))


def _decode_q8_0(stored: Bytes) -> Floats:
    blocks = _stored_blocks(stored, 34)
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float32)
    numbers = scales * blocks[..., 2:].view(np.int8).astype(np.float32)
    return numbers.reshape(*stored.shape[:-1], blocks.shape[-2] * 32)


def _encode_q4_0(numbers: Floats) -> Bytes:
    blocks = _blocks(numbers)
    at = np.abs(blocks).argmax(axis=-1, keepdims=True)
    scales = np.take_along_axis(blocks, at, axis=-1) / np.float32(-8)
    shifted = np.trunc(_scaled(blocks, scales) + np.float32(8.5))
    nibbles = np.clip(shifted, 0, 15).astype(np.uint8)
    return _pack(scales, nibbles[..., :16] | (nibbles[..., 16:] << 4))


def _decode_q4_0(stored: Bytes) -> Floats:
    blocks = _stored_blocks(stored, 18)
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float32)
    nibbles = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], axis=-1)
    numbers = scales * (nibbles.astype(np.float32) - np.float32(8))
    return numbers.reshape(*stored.shape[:-1], blocks.shape[-2] * 32)


ENCODINGS: dict[str, Encoding] = {
    encoding.name: encoding
    for encoding in (
        _float_encoding("f32", np.float32, float(np.finfo(np.float32).max)),
        _float_encoding("f16", np.float16, _F16_MAX),
        _float_encoding("bf16", ml_dtypes.bfloat16, _BF16_MAX),
        Encoding("q8_0", 32, 34, 2, 127 * _F16_MAX, None, _encode_q8_0, _decode_q8_0),
        Encoding("q4_0", 32, 18, 2, 8 * _F16_MAX, None, _encode_q4_0, _decode_q4_0),
    )
}


def numbers_in(stored: Bytes, encoding: str) -> NDArray[Any]:
    """Vectors uint8 [..., n] as numbers: a view in the stored type for f32, f16 and bf16, new
    float32 memory for block encodings."""
    kind = ENCODINGS[encoding]
    return kind.decode(stored) if kind.dtype is None else stored.view(kind.dtype)


def all_finite(stored: Bytes, encoding: str) -> bool:
    """Whether vectors uint8 [..., n] hold neither infinities nor NaN."""
    kind = ENCODINGS[encoding]
    if kind.dtype is not None:
        return bool(np.isfinite(stored.view(kind.dtype)).all())
    scales = np.ascontiguousarray(_stored_blocks(stored, kind.block_bytes)[..., :2])
    return bool(np.isfinite(scales.view(np.float16)).all())

"""The dtypes of resident tensors, under the names that safetensors gives them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from bundlefmt.layout.constants import EncodingName

# name -> (bits of one number, NumPy type or None where NumPy has none of that width)
DTYPES: dict[str, tuple[int, np.dtype[Any] | None]] = {
    "BOOL": (8, np.dtype(np.bool_)),
    "U8": (8, np.dtype(np.uint8)),
    "I8": (8, np.dtype(np.int8)),
    "U16": (16, np.dtype("<u2")),
    "I16": (16, np.dtype("<i2")),
    "U32": (32, np.dtype("<u4")),
    "I32": (32, np.dtype("<i4")),
    "U64": (64, np.dtype("<u8")),
    "I64": (64, np.dtype("<i8")),
    "F16": (16, np.dtype("<f2")),
    "F32": (32, np.dtype("<f4")),
    "F64": (64, np.dtype("<f8")),
    "C64": (64, np.dtype("<c8")),
    "BF16": (16, np.dtype(ml_dtypes.bfloat16)),
    "F8_E4M3": (8, np.dtype(ml_dtypes.float8_e4m3fn)),
    "F8_E5M2": (8, np.dtype(ml_dtypes.float8_e5m2)),
    "F8_E8M0": (8, np.dtype(ml_dtypes.float8_e8m0fnu)),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "F4": (4, None),
}

NAMES = {dtype: name for name, (_, dtype) in DTYPES.items() if dtype is not None}

# The dtypes whose bytes are a bundle encoding as they lie.
ENCODING_OF: dict[str, EncodingName] = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor, rounded up to whole bytes; KeyError for an unknown dtype."""
    return -(-math.prod(shape) * DTYPES[dtype][0] // 8)

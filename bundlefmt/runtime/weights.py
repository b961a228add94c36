"""Resident tensors by role."""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from bundlefmt.errors import FormatError
from bundlefmt.file import BundleFile
from bundlefmt.runtime import kernels
from bundlefmt.runtime.config import DecoderConfig

_STORED = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


class Linear(NamedTuple):
    """y = x @ weight.T + bias; weight [out, in] as stored."""

    weight: NDArray[Any]
    bias: NDArray[np.float32] | None

    def __call__(self, x: kernels.Floats) -> kernels.Floats:
        y = kernels.matmul(x, self.weight)
        if self.bias is not None:
            y += self.bias
        return y


class Norm(NamedTuple):
    """A LayerNorm (with a bias) or an RMSNorm (without)."""

    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    epsilon: float

    def __call__(self, x: kernels.Floats) -> kernels.Floats:
        if self.bias is None:
            return kernels.rms_norm(x, self.weight, self.epsilon)
        return kernels.layer_norm(x, self.weight, self.bias, self.epsilon)


class Weights:
    """A bundle file's resident tensors, found by the roles of a DecoderConfig."""

    def __init__(self, file: BundleFile, config: DecoderConfig) -> None:
        self._file = file
        self._config = config
        self._names = file.tensor_names

    def matrix(self, role: str) -> NDArray[Any]:
        """A matrix as stored. Raises FormatError when it is not there."""
        found = self._find(self._config.names[role])
        if found is None:
            raise self._missing(self._config.names[role])
        return found

    def optional_matrix(self, role: str) -> NDArray[Any] | None:
        """A matrix as stored, None when it is not there."""
        suffix = self._config.names.get(role)
        return None if suffix is None else self._find(suffix)

    def linear(self, role: str, layer: int | None = None) -> Linear:
        """A linear map. Raises FormatError when it is not there."""
        linear = self.optional_linear(role, layer)
        if linear is None:
            raise self._missing(f"{self._stem(role, layer)}.weight")
        return linear

    def optional_linear(self, role: str, layer: int | None = None) -> Linear | None:
        """A linear map, None when it is not there."""
        stem = self._stem(role, layer)
        weight = None if stem is None else self._find(f"{stem}.weight")
        return None if weight is None else Linear(weight, self._vector(f"{stem}.bias"))

    def norm(self, role: str, layer: int | None = None) -> Norm:
        """A norm. Raises FormatError when it is not there."""
        norm = self.optional_norm(role, layer)
        if norm is None:
            raise self._missing(f"{self._stem(role, layer)}.weight")
        return norm

    def optional_norm(self, role: str, layer: int | None = None) -> Norm | None:
        """A norm, None when it is not there."""
        stem = self._stem(role, layer)
        weight = None if stem is None else self._vector(f"{stem}.weight")
        if weight is None:
            return None
        bias = self._vector(f"{stem}.bias") if self._config.norm == "layer" else None
        return Norm(weight, bias, self._config.norm_epsilon)

    def _stem(self, role: str, layer: int | None) -> str | None:
        suffix = self._config.names.get(role)
        return None if suffix is None else suffix.format(i=layer)

    def _vector(self, suffix: str) -> NDArray[np.float32] | None:
        found = self._find(suffix)
        return None if found is None else kernels.widened(found)

    def _find(self, suffix: str) -> NDArray[Any] | None:
        names = [name for name in self._names if name == suffix or name.endswith(f".{suffix}")]
        if not names:
            return None
        if len(names) > 1:
            raise FormatError(
                "two tensors for one role", file=self._file.path, field=names[0], found=names[1]
            )
        array = self._file.tensor(names[0])
        if array.dtype not in _STORED:
            raise FormatError(
                "weights of a dtype that this runtime does not compute with",
                file=self._file.path,
                field=names[0],
                expected="F32, F16, BF16",
                found=self._file.tensor_entry(names[0]).dtype,
            )
        return array

    def _missing(self, suffix: str) -> FormatError:
        return FormatError("no such resident tensor", file=self._file.path, field=suffix)

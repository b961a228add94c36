"""Resident tensors by role."""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from bundlefmt import kernels
from bundlefmt.errors import FormatError
from bundlefmt.file import BundleFile
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
    """A LayerNorm (`kind` is `layer`) or an RMSNorm (`rms`)."""

    kind: str
    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    epsilon: float

    def __call__(self, x: kernels.Floats) -> kernels.Floats:
        if self.kind == "rms":
            return kernels.rms_norm(x, self.weight, self.epsilon)
        y = kernels.layer_norm(x, self.weight, self.epsilon)
        return y if self.bias is None else y + self.bias


class Weights:
    """A bundle file's resident tensors, found by the roles of a DecoderConfig. What is asked for
    and not there, or there in another shape, is a FormatError."""

    def __init__(self, file: BundleFile, config: DecoderConfig) -> None:
        self._file = file
        self._config = config
        self._names = file.tensor_names

    def matrix(self, role: str, width: int | None = None) -> NDArray[Any]:
        """A matrix [any, width] as stored."""
        found = self.optional_matrix(role, width)
        if found is None:
            raise self._missing(self._config.names[role])
        return found

    def optional_matrix(self, role: str, width: int | None = None) -> NDArray[Any] | None:
        """A matrix [any, width] as stored, None when it is not there."""
        suffix = self._config.names.get(role)
        return None if suffix is None else self._find(suffix, (None, width))

    def linear(self, role: str, layer: int, outputs: int, inputs: int) -> Linear:
        """A layer's linear map, with its bias where there is one."""
        stem = self._config.names[role].format(i=layer)
        weight = self._find(f"{stem}.weight", (outputs, inputs))
        if weight is None:
            raise self._missing(f"{stem}.weight")
        return Linear(weight, self._vector(f"{stem}.bias", outputs))

    def projection(self, role: str) -> Linear | None:
        """A linear map between embeddings and layers; None when the model has none."""
        stem = self._config.names.get(role)
        weight = None if stem is None else self._find(f"{stem}.weight", (None, None))
        return None if weight is None else Linear(weight, None)

    def head(self, embed: NDArray[Any]) -> Linear:
        """The map from hidden states to logits: the embeddings' own weights where there are no
        others, with its bias where there is one."""
        stem = self._config.names["head"]
        found = self._find(f"{stem}.weight", (None, embed.shape[1]))
        weight = embed if found is None else found
        return Linear(weight, self._vector(f"{stem}.bias", weight.shape[0]))

    def norm(self, role: str, width: int, layer: int | None = None) -> Norm:
        """A norm over `width` numbers."""
        stem = self._config.names[role].format(i=layer)
        weight = self._vector(f"{stem}.weight", width)
        if weight is None:
            raise self._missing(f"{stem}.weight")
        bias = self._vector(f"{stem}.bias", width) if self._config.norm == "layer" else None
        return Norm(self._config.norm, weight, bias, self._config.norm_epsilon)

    def _vector(self, suffix: str, length: int) -> NDArray[np.float32] | None:
        found = self._find(suffix, (length,))
        return None if found is None else kernels.widened(found)

    def _find(self, suffix: str, shape: tuple[int | None, ...]) -> NDArray[Any] | None:
        """The tensor whose name ends so; None in `shape` stands for any length."""
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
        fits = array.ndim == len(shape) and all(
            wanted in (None, length) for wanted, length in zip(shape, array.shape, strict=True)
        )
        if not fits or 0 in array.shape:
            raise FormatError(
                "tensor does not fit the config",
                file=self._file.path,
                field=names[0],
                expected=["any" if length is None else length for length in shape],
                found=list(array.shape),
            )
        return array

    def _missing(self, name: str) -> FormatError:
        return FormatError("no such resident tensor", file=self._file.path, field=name)

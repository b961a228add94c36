"""Resident tensors by role."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bundlefmt import kernels
from bundlefmt.errors import FormatError
from bundlefmt.file import BundleFile
from bundlefmt.layout.header import Tensor
from bundlefmt.runtime.config import DecoderConfig
from bundlefmt.runtime.rotation import Rotation

_DTYPES = ("F32", "F16", "BF16")
_ATTENTION = {"qkv", "q", "k", "v", "out"}  # the roles of its matrices


class Linear(NamedTuple):
    """y = x @ weight.T + bias; weight [out, in] as stored: in memory, or, where it is a name, the
    rotation's matrix of that name."""

    weight: NDArray[Any] | str
    bias: NDArray[np.float32] | None
    rotation: Rotation | None = None

    def __call__(self, x: kernels.Floats) -> kernels.Floats:
        weight = self.weight
        if isinstance(weight, str):
            assert self.rotation is not None
            weight = self.rotation.matrix(weight)
        y = kernels.matmul(x, weight)
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


def attention_matrices(file: BundleFile, config: DecoderConfig, layer: int) -> list[Tensor]:
    """The matrices of a layer's attention that can be read straight into memory: those stored
    without a codec."""
    found = []
    for role in _ATTENTION & config.names.keys():
        name = _name(file, f"{config.names[role].format(i=layer)}.weight")
        if name is not None and file.tensor_entry(name).data.codec == "raw":
            found.append(file.tensor_entry(name))
    return sorted(found, key=lambda tensor: tensor.data.offset)


def _name(file: BundleFile, suffix: str) -> str | None:
    """The one tensor whose name ends so; None when there is none."""
    names = [name for name in file.tensor_names if name == suffix or name.endswith(f".{suffix}")]
    if len(names) > 1:
        raise FormatError(
            "two tensors for one role", file=file.path, field=names[0], found=names[1]
        )
    return names[0] if names else None


class Weights:
    """A bundle file's resident tensors, found by the roles of a DecoderConfig. What is asked for
    and not there, or there in another shape, is a FormatError. The matrices of a rotation are left
    to it."""

    def __init__(
        self,
        file: BundleFile,
        config: DecoderConfig,
        rotation: Rotation | None = None,
    ) -> None:
        self._file = file
        self._config = config
        self._rotation = rotation

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
        name = self._named(f"{stem}.weight", (outputs, inputs))
        if name is None:
            raise self._missing(f"{stem}.weight")
        rotates = self._rotation is not None and name in self._rotation.names
        weight = name if rotates else self._file.tensor(name)
        return Linear(weight, self._vector(f"{stem}.bias", outputs), self._rotation)

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
        name = self._named(suffix, shape)
        return None if name is None else self._file.tensor(name)

    def _named(self, suffix: str, shape: tuple[int | None, ...]) -> str | None:
        """The name that ends so, of a tensor that fits."""
        name = _name(self._file, suffix)
        if name is None:
            return None
        entry = self._file.tensor_entry(name)
        if entry.dtype not in _DTYPES:
            raise FormatError(
                "weights of a dtype that this runtime does not compute with",
                file=self._file.path,
                field=name,
                expected=", ".join(_DTYPES),
                found=entry.dtype,
            )
        fits = len(entry.shape) == len(shape) and all(
            wanted in (None, length) for wanted, length in zip(shape, entry.shape, strict=True)
        )
        if not fits or 0 in entry.shape:
            raise FormatError(
                "tensor does not fit the config",
                file=self._file.path,
                field=name,
                expected=["any" if length is None else length for length in shape],
                found=list(entry.shape),
            )
        return name

    def _missing(self, name: str) -> FormatError:
        return FormatError("no such resident tensor", file=self._file.path, field=name)

"""What a model computes with besides its FFNs, loaded from resident tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bundlefmt import kernels
from bundlefmt.file import BundleFile
from bundlefmt.layout.header import Tensor
from bundlefmt.runtime.config import ATTENTION_ROLES, DecoderConfig
from bundlefmt.runtime.roles import find, prefix_of, stem_of
from bundlefmt.runtime.rotation import Rotation


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
    prefix = prefix_of(config, file.tensor_names)
    names = {
        f"{stem_of(config, prefix, role, layer)}.weight"
        for role in ATTENTION_ROLES & config.names.keys()
    }
    found = [
        tensor
        for tensor in file.header.tensors
        if tensor.name in names and tensor.data.codec == "raw"
    ]
    return sorted(found, key=lambda tensor: tensor.data.offset)


class Weights:
    """A bundle file's resident tensors by the roles of a DecoderConfig; raises what `roles.find`
    raises. The matrices of a rotation are left to it."""

    def __init__(
        self,
        file: BundleFile,
        config: DecoderConfig,
        rotation: Rotation | None = None,
    ) -> None:
        self._file = file
        self._config = config
        self._rotation = rotation
        self._roles = find(config, {tensor.name: tensor for tensor in file.header.tensors})

    @property
    def unused(self) -> list[str]:
        """Names of resident tensors that nothing is computed from."""
        header = self._file.header
        biases = {part.bias for group in header.groups for part in group.parts}
        predictors = {name for entry in header.predictors for name in (entry.a, entry.b)}
        return [name for name in self._roles.unused if name not in biases | predictors]

    def matrix(self, role: str) -> NDArray[Any]:
        """A matrix as stored."""
        return self._file.tensor(self._roles.weights[role, None])

    def linear(self, role: str, layer: int | None = None) -> Linear:
        """A linear map, with its bias where it has one."""
        name = self._roles.weights[role, layer]
        rotates = self._rotation is not None and name in self._rotation.names
        weight = name if rotates else self._file.tensor(name)
        return Linear(weight, self._bias(role, layer), self._rotation)

    def head(self, embed: NDArray[Any]) -> Linear:
        """The map from hidden states to logits. Where its weights are those of the embeddings, they
        are `embed`."""
        names = self._roles.weights
        tied = names["head", None] == names["embed", None]
        weight = embed if tied else self._file.tensor(names["head", None])
        return Linear(weight, self._bias("head", None))

    def norm(self, role: str, layer: int | None = None) -> Norm:
        """A norm; without weights of its own it has ones."""
        name = self._roles.weights.get((role, layer))
        if name is None:
            weight = np.ones(self._config.d_model, dtype=np.float32)
        else:
            weight = kernels.widened(self._file.tensor(name))
        return Norm(self._config.norm, weight, self._bias(role, layer), self._config.norm_epsilon)

    def _bias(self, role: str, layer: int | None) -> NDArray[np.float32] | None:
        name = self._roles.biases.get((role, layer))
        return None if name is None else kernels.widened(self._file.tensor(name))

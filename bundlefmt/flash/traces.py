"""Traces: which neurons were active for each token of a dense run, and the FFN's inputs then.

A trace is a folder: `trace.json`; and for layer i `layer-i/active`, a ragged array of uint32, the
active neurons of each token in ascending order, and `layer-i/inputs`, float16 [tokens, d_model]:
folders that `mmap_ninja.RaggedMmap` and `mmap_ninja.numpy` open. What is written goes to disk as it
comes, so that memory does not grow with the text.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from bundlefmt.errors import FormatError, UsageError
from bundlefmt.file import BundleFile
from bundlefmt.flash.arrays import ArrayWriter, open_array, write_small
from bundlefmt.kernels import SPARSE_ACTIVATIONS, Floats
from bundlefmt.layout.header import Group
from bundlefmt.storage.atomic import new_folder
from bundlefmt.storage.regular import read_regular

VERSION = 1
_INFO = "trace.json"
_HELD_OUT = 0.1  # of the tokens: the last ones, whose text nothing has been learnt from
_F16 = np.finfo(np.float16)
_MOST_INFO = 16 << 20  # bytes of trace.json
_IDS_AT_A_TIME = 1 << 20

_Natural = Annotated[int, Meta(ge=0, lt=1 << 48)]
_Positive = Annotated[int, Meta(ge=1, lt=1 << 48)]
_Word = Annotated[str, Meta(max_length=64)]


class TracedLayer(msgspec.Struct, frozen=True):
    """What a layer's arrays hold."""

    layer: _Natural
    neurons: _Positive
    d_model: _Positive
    activation: _Word
    active: _Natural  # of all tokens together


class TraceInfo(msgspec.Struct, frozen=True):
    """trace.json: the model, by the `file_id` of its bundle file in hex, and what was recorded."""

    version: int
    file_id: _Word
    tokens: _Positive
    layers: Annotated[list[TracedLayer], Meta(min_length=1)]


@dataclass(frozen=True)
class LayerTrace:
    """One layer of a trace. `inputs` is float16 [tokens, d_model]; token t's active neurons are
    ids[starts[t] : ends[t]]."""

    info: TracedLayer
    inputs: NDArray[np.float16]
    ids: NDArray[np.uint32]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]

    def fired(self, tokens: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
        """(k, neuron) of every neuron that was active for tokens[k]: two arrays."""
        counts = self.ends[tokens] - self.starts[tokens]
        rows = np.repeat(np.arange(tokens.size), counts)
        within = np.arange(rows.size) - np.repeat(np.cumsum(counts) - counts, counts)
        return rows, self.ids[np.repeat(self.starts[tokens], counts) + within]

    def active(self, tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which neurons were active: [tokens, neurons]."""
        active = np.zeros((tokens.size, self.info.neurons), dtype=np.bool_)
        active[self.fired(tokens)] = True
        return active


def parted(tokens: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A trace's tokens: those to learn from, and those held out to see how well it went."""
    seen = round(tokens * (1 - _HELD_OUT))
    return np.arange(seen), np.arange(seen, tokens)


class Trace:
    """A recorded trace. Raises UsageError when `path` holds none, FormatError for a damaged one."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        info = self.path / _INFO
        try:
            content = read_regular(info, _MOST_INFO)
        except OSError as error:
            raise UsageError(f"no trace: {error.strerror}", file=info) from error
        try:
            self.info = msgspec.json.decode(content, type=TraceInfo)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise FormatError(f"not understood: {error}", file=info) from None
        if self.info.version != VERSION:
            raise FormatError(
                "a trace of another version", file=info, expected=VERSION, found=self.info.version
            )
        layers = [layer.layer for layer in self.info.layers]
        if len(set(layers)) < len(layers):
            raise FormatError("a layer is there twice", file=info, field="layers")

    def layer(self, index: int) -> LayerTrace:
        """The index-th of the layers that were recorded. Raises FormatError unless its arrays are
        what trace.json says, and name neurons that are there, each once for a token."""
        info, tokens = self.info.layers[index], self.info.tokens
        folder = self.path / f"layer-{info.layer}"
        trace = LayerTrace(
            info,
            open_array(folder / "inputs", "float16", (tokens, info.d_model)),
            open_array(folder / "active", "uint32", (info.active,)),
            open_array(folder / "active" / "starts", "int64", (tokens,)),
            open_array(folder / "active" / "ends", "int64", (tokens,)),
        )
        _check(trace, folder / "active")
        return trace

    def groups_of(self, file: BundleFile) -> list[Group]:
        """The file's groups that were traced, in turn. Raises UsageError when it was another
        model's."""
        if self.info.file_id != file.superblock.file_id.hex():
            raise UsageError(
                "a trace of another model",
                file=self.path,
                expected=file.superblock.file_id.hex(),
                found=self.info.file_id,
            )
        groups = [file.group(layer.layer) for layer in self.info.layers]
        for group, layer in zip(groups, self.info.layers, strict=True):
            if (group.neurons, group.d_model) != (layer.neurons, layer.d_model):
                raise UsageError("a trace of another shape", file=self.path, field=group.label)
        return groups


def _check(trace: LayerTrace, folder: Path) -> None:
    starts, ends, ids = trace.starts, trace.ends, trace.ids
    if not (
        np.array_equal(starts[1:], ends[:-1])
        and (starts[0], ends[-1]) == (0, ids.size)
        and (starts <= ends).all()
    ):
        raise FormatError("starts and ends that do not part the ids by token", file=folder)
    for first in range(0, ids.size, _IDS_AT_A_TIME):
        piece = ids[max(first - 1, 0) : first + _IDS_AT_A_TIME]
        if piece.max() >= trace.info.neurons:
            raise FormatError(
                "no such neuron",
                file=folder,
                expected=f"less than {trace.info.neurons}",
                found=piece.max(),
            )
        falls = np.flatnonzero(piece[1:] <= piece[:-1]) + max(first, 1)
        if not np.isin(falls, starts).all():
            raise FormatError("a token's neurons are not in ascending order", file=folder)


class TraceWriter:
    """Records into a folder. `record` is the observer that a decoder tells of its FFNs."""

    def __init__(self, folder: Path, file_id: bytes, groups: Sequence[Group]) -> None:
        if not groups:
            raise UsageError("no FFN to trace")
        for group in groups:
            if group.activation not in SPARSE_ACTIVATIONS:
                raise UsageError(
                    "no neuron is inactive with this activation",
                    field=group.label,
                    expected=", ".join(SPARSE_ACTIVATIONS),
                    found=group.activation,
                )
        self._folder = folder
        self._file_id = file_id
        self._layers = {group.layer: _LayerWriter(folder, group) for group in groups}

    def record(self, group: Group, x: Floats, activations: Floats) -> None:
        """One pass through a layer: its inputs [tokens, d_model], activations [tokens, neurons]."""
        self._layers[group.layer].extend(x, activations != 0)

    def finish(self) -> TraceInfo:
        """Say what was written, in trace.json too. Raises FormatError unless every layer has had
        the same tokens, one at least."""
        tokens = max(layer.tokens for layer in self._layers.values())
        for index, layer in self._layers.items():
            if layer.tokens != max(tokens, 1):
                raise FormatError(
                    "the model does not compute this layer for each token",
                    field=f"layer {index}",
                    expected=f"{max(tokens, 1)} tokens",
                    found=layer.tokens,
                )
        layers = [layer.finish() for layer in self._layers.values()]
        info = TraceInfo(VERSION, self._file_id.hex(), tokens, layers)
        write_small(self._folder / _INFO, msgspec.json.format(msgspec.json.encode(info)))
        return info


class _LayerWriter:
    def __init__(self, folder: Path, group: Group) -> None:
        layer = folder / f"layer-{group.layer}"
        layer.mkdir()
        self._group = group
        self._inputs = ArrayWriter(layer / "inputs", "float16", (group.d_model,))
        self._folder = layer / "active"
        self._ids = ArrayWriter(self._folder, "uint32")
        self._starts, self._ends, self._flattened_shapes = (
            ArrayWriter(self._folder / name, "int64")
            for name in ("starts", "ends", "flattened_shapes")
        )
        self._shapes = ArrayWriter(self._folder / "shapes", "int64", (1,))

    @property
    def tokens(self) -> int:
        return self._inputs.rows

    def extend(self, x: Floats, active: NDArray[np.bool_]) -> None:
        if np.isnan(x).any():
            raise FormatError("not a number (NaN) in the FFN's inputs", field=self._group.label)
        self._inputs.extend(x.clip(_F16.min, _F16.max))
        counts = np.count_nonzero(active, axis=1)
        ends = self._ids.rows + np.cumsum(counts)
        self._ids.extend(np.nonzero(active)[1])
        self._starts.extend(ends - counts)
        self._ends.extend(ends)
        self._flattened_shapes.extend(counts)
        self._shapes.extend(counts[:, np.newaxis])

    def finish(self) -> TracedLayer:
        for array in (
            self._inputs,
            self._ids,
            self._starts,
            self._ends,
            self._flattened_shapes,
            self._shapes,
        ):
            array.finish()
        (self._folder / "type.ninja").write_bytes(b"ragged")
        write_small(self._folder / "shapes_are_flat.ninja", (1).to_bytes(4, "little"))
        group = self._group
        return TracedLayer(
            group.layer, group.neurons, group.d_model, group.activation, self._ids.rows
        )


@contextmanager
def new_trace(
    path: str | os.PathLike[str], file_id: bytes, groups: Sequence[Group]
) -> Iterator[TraceWriter]:
    """A trace that takes the name `path` when the block, which finishes it, ends well; when the
    block raises, nothing is left.

    Raises UsageError when `path` exists or an activation has no zeros, WriteError when the device
    refuses.
    """
    with new_folder(path) as folder:
        yield TraceWriter(folder, file_id, groups)

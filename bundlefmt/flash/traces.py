"""Traces: which neurons were active for each token of a dense run, and the FFN's inputs then.

A trace is a folder: `trace.json`; and for layer i `layer-i/active`, a ragged array of uint32, the
active neurons of each token in ascending order (`mmap_ninja.RaggedMmap`), and `layer-i/inputs`,
float16 [tokens, d_model] (`mmap_ninja.numpy`). What is written goes to disk as it comes, so that
memory does not grow with the text.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from bundlefmt.errors import FormatError, UsageError
from bundlefmt.file import BundleFile
from bundlefmt.kernels import SPARSE_ACTIVATIONS, Floats
from bundlefmt.layout.header import Group
from bundlefmt.storage.atomic import new_folder

VERSION = 1
_INFO = "trace.json"
_HELD_OUT = 0.1  # of the tokens: the last ones, whose text nothing has been learnt from
_F16 = np.finfo(np.float16)


class TracedLayer(msgspec.Struct, frozen=True):
    """What a layer's arrays hold."""

    layer: int
    neurons: int
    d_model: int
    activation: str
    active: int  # of all tokens together


class TraceInfo(msgspec.Struct, frozen=True):
    """trace.json: the model, by the `file_id` of its bundle file in hex, and what was recorded."""

    version: int
    file_id: str
    tokens: int
    layers: list[TracedLayer]


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
        _mmap_ninja()
        try:
            self.info = msgspec.json.decode((self.path / _INFO).read_bytes(), type=TraceInfo)
        except OSError as error:
            raise UsageError(f"no trace: {error.strerror}", file=self.path / _INFO) from error
        except msgspec.MsgspecError as error:
            raise FormatError(f"not understood: {error}", file=self.path / _INFO) from None
        if self.info.version != VERSION:
            raise FormatError(
                "a trace of another version",
                file=self.path / _INFO,
                expected=VERSION,
                found=self.info.version,
            )

    def layer(self, index: int) -> LayerTrace:
        """The index-th of the layers that were recorded."""
        info = self.info.layers[index]
        folder = self.path / f"layer-{info.layer}"
        ninja = _mmap_ninja()
        try:
            ragged = ninja.RaggedMmap(folder / "active")
            inputs = ninja.numpy.open_existing(folder / "inputs")
            trace = LayerTrace(info, inputs, ragged.memmap, ragged.starts, ragged.ends)
        except (OSError, ValueError) as error:
            raise FormatError(f"not a trace's arrays: {error}", file=folder) from error
        self._check(trace, folder)
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

    def _check(self, trace: LayerTrace, folder: Path) -> None:
        info, tokens = trace.info, self.info.tokens
        whole = (
            trace.inputs.shape == (tokens, info.d_model)
            and trace.starts is not None
            and trace.starts.shape == trace.ends.shape == (tokens,)
            and trace.ids.shape == (info.active,)
            and np.array_equal(trace.starts[1:], trace.ends[:-1])
            and (trace.starts[0], trace.ends[-1]) == (0, info.active)
            and (trace.starts <= trace.ends).all()
            and int(trace.ids.max(initial=0)) < info.neurons
        )
        if not whole:
            raise FormatError("arrays unlike what trace.json says", file=folder)


class TraceWriter:
    """Records into a folder. `record` is the observer that a decoder tells of its FFNs."""

    def __init__(self, folder: Path, file_id: bytes, groups: Sequence[Group]) -> None:
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
        """Write what is still held, and trace.json."""
        layers = [layer.finish() for layer in self._layers.values()]
        tokens = next(layer.tokens for layer in self._layers.values())
        info = TraceInfo(VERSION, self._file_id.hex(), tokens, layers)
        (self._folder / _INFO).write_bytes(msgspec.json.format(msgspec.json.encode(info)))
        return info


class _LayerWriter:
    def __init__(self, folder: Path, group: Group) -> None:
        self._folder = folder / f"layer-{group.layer}"
        self._folder.mkdir()
        self._group = group
        self._held: list[NDArray[np.uint32]] = []
        self._active = 0
        self.tokens = 0

    def extend(self, x: Floats, active: NDArray[np.bool_]) -> None:
        ninja, folder = _mmap_ninja().numpy, self._folder / "inputs"
        inputs = x.clip(_F16.min, _F16.max).astype(np.float16)
        if self.tokens:
            ninja.extend_dir(folder, inputs)
        else:
            ninja.from_ndarray(folder, inputs)
        self.tokens += x.shape[0]
        self._held += [np.flatnonzero(row).astype(np.uint32) for row in active]
        count = int(np.count_nonzero(active))
        self._active += count
        if count:  # a RaggedMmap that begins with no numbers at all reads wrong ones later
            self._flush()

    def finish(self) -> TracedLayer:
        if self._held:
            self._flush()
        group = self._group
        return TracedLayer(
            group.layer, group.neurons, group.d_model, group.activation, self._active
        )

    def _flush(self) -> None:
        # Opened anew each time: kept open, the arrays of many layers are too many open files.
        _mmap_ninja().RaggedMmap(self._folder / "active", mode="r+").extend(self._held)
        self._held = []


@contextmanager
def new_trace(
    path: str | os.PathLike[str], file_id: bytes, groups: Sequence[Group]
) -> Iterator[TraceWriter]:
    """A trace that takes the name `path` when the block, which finishes it, ends well; when the
    block raises, nothing is left.

    Raises UsageError when `path` exists or an activation has no zeros, WriteError when the device
    refuses.
    """
    _mmap_ninja()
    with new_folder(path) as folder:
        yield TraceWriter(folder, file_id, groups)


def _mmap_ninja() -> Any:
    try:
        import mmap_ninja
        import mmap_ninja.numpy
    except ImportError:
        raise UsageError(
            "traces need mmap-ninja", expected="pip install 'bundlefmt[train]'"
        ) from None
    return mmap_ninja

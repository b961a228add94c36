"""Checkpoints on disk: safetensors files, sharded or not, and the small files beside them.

Facts: a safetensors file is an 8-byte little-endian length, that many bytes of JSON (padded with
spaces), then the tensors' bytes without gaps. Its header may leave the data misaligned and may
list tensors in another order than their offsets. What a hub download leaves behind when Git LFS
was not installed is a pointer: about 135 bytes of text under the weights' name.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from bundlefmt.errors import FormatError, ReadError, UsageError
from bundlefmt.layout import dtypes

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# Small files that travel with the weights, as blobs.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
)

_MAX_HEADER = 100 << 20  # safetensors' own limit
_LFS = b"version https://git-lfs.github.com/spec/"
_CHUNK = 16 << 20

_Natural = Annotated[int, Meta(ge=0)]


class _Entry(msgspec.Struct):
    """One tensor of a safetensors header."""

    dtype: str
    shape: Annotated[list[_Natural], Meta(max_length=64)]
    data_offsets: tuple[_Natural, _Natural]


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of a checkpoint: where its bytes lie."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int

    def chunks(self) -> Iterator[NDArray[np.uint8]]:
        """The tensor's bytes, in pieces of bounded size."""
        for start in range(0, self.nbytes, _CHUNK):
            yield self.read(start, min(_CHUNK, self.nbytes - start))

    def read(self, start: int = 0, length: int | None = None) -> NDArray[np.uint8]:
        """`length` of the tensor's bytes from `start` on (all that follow when None)."""
        wanted = self.nbytes - start if length is None else length
        data = np.empty(wanted, dtype=np.uint8)
        view = memoryview(data)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset + start)
                while view:
                    count = file.readinto(view)
                    if not count:
                        raise ReadError(
                            "file ends early",
                            file=self.path,
                            field=self.name,
                            expected=f"{wanted} bytes",
                            found=wanted - len(view),
                        )
                    view = view[count:]
        except OSError as error:
            raise ReadError(
                f"read failed: {error.strerror}", file=self.path, field=self.name
            ) from error
        return data


@dataclass(frozen=True)
class SafetensorsFile:
    """One weights file: its header, verbatim, and its tensors in the order of their offsets."""

    path: Path
    header: bytes
    tensors: tuple[SourceTensor, ...]


@dataclass(frozen=True)
class Checkpoint:
    """Weights files, config and companions (name -> content) of one model."""

    path: Path
    files: tuple[SafetensorsFile, ...]
    tensors: dict[str, SourceTensor]
    companions: dict[str, bytes]
    config: dict[str, Any]


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint at `path`: a safetensors file, a folder, or a sharded index.

    Raises UsageError when there is none, FormatError when its files break their formats' rules.
    """
    given = Path(path)
    weights, index = _weights_of(given)
    files = tuple(read_safetensors(file) for file in weights)
    tensors: dict[str, SourceTensor] = {}
    for file in files:
        for tensor in file.tensors:
            if tensor.name in tensors:
                raise FormatError(
                    "tensor in two files",
                    file=file.path,
                    field=tensor.name,
                    found=tensors[tensor.name].path.name,
                )
            tensors[tensor.name] = tensor
    if index is not None:
        _check_index(index, tensors)
    folder = weights[0].parent
    beside = [folder / name for name in COMPANIONS if (folder / name).is_file()]
    beside += [index] if index is not None else []
    companions = {path.name: _content(path) for path in beside}
    config = read_json(folder / "config.json") if "config.json" in companions else {}
    return Checkpoint(given, files, tensors, companions, config)


def read_safetensors(path: Path) -> SafetensorsFile:
    """A safetensors file's header, checked: types, lengths, full coverage, no overlap."""
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        if size == 0:
            raise FormatError("empty file", file=path, expected="safetensors")
        if (start + file.read(len(_LFS) - 8)) == _LFS:
            raise FormatError(
                "a Git-LFS pointer, not the weights: fetch them with `git lfs pull`", file=path
            )
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER):
            raise FormatError(
                "not a safetensors file",
                file=path,
                field="header length",
                offset=0,
                expected=f"2..{max(min(size - 8, _MAX_HEADER), 2)}",
                found=length,
            )
        file.seek(8)
        header = file.read(length)
    tensors = parse_header(path, header)
    end = max((tensor.offset + tensor.nbytes for tensor in tensors), default=8 + length)
    if end != size:
        what = "file cut short" if size < end else "bytes after the last tensor"
        raise FormatError(what, file=path, expected=f"{end} bytes", found=size)
    return SafetensorsFile(path, header, tensors)


def parse_header(path: Path, header: bytes) -> tuple[SourceTensor, ...]:
    """The tensors that a safetensors header describes, by offset, checked: known dtypes, lengths
    that fit, data without gaps or overlap. `path` is the file that they are in."""
    try:
        raw = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        entries = {
            name: msgspec.json.decode(value, type=_Entry)
            for name, value in raw.items()
            if name != "__metadata__"
        }
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"not a safetensors header: {error}", file=path, offset=8) from None
    base = 8 + len(header)
    tensors = []
    for name, entry in entries.items():
        begin, end = entry.data_offsets
        if entry.dtype not in dtypes.DTYPES:
            raise FormatError("unknown dtype", file=path, field=name, found=entry.dtype)
        expected = dtypes.nbytes(entry.dtype, entry.shape)
        if end - begin != expected:
            raise FormatError(
                "data_offsets do not fit dtype and shape",
                file=path,
                field=name,
                expected=f"{expected} bytes",
                found=end - begin,
            )
        tensors.append(
            SourceTensor(name, entry.dtype, tuple(entry.shape), path, base + begin, end - begin)
        )
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    ends = [base, *(tensor.offset + tensor.nbytes for tensor in tensors)]
    for end, tensor in zip(ends, tensors, strict=False):
        if tensor.offset != end:
            raise FormatError(
                "tensors overlap or leave a gap",
                file=path,
                field=tensor.name,
                offset=tensor.offset,
                expected=f"data at byte {end}",
            )
    return tuple(tensors)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; FormatError when it is not one."""
    try:
        value = json.loads(_content(path))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not JSON: {error}", file=path) from None
    if not isinstance(value, dict):
        raise FormatError("not a JSON object", file=path)
    return value


def _weights_of(path: Path) -> tuple[list[Path], Path | None]:
    """The weights files that `path` stands for, at least one, and the index that names them."""
    if path.suffix == ".json":
        return _shards_of(path), path
    if path.is_dir():
        if (path / INDEX).is_file():
            return _shards_of(path / INDEX), path / INDEX
        if (path / SINGLE).is_file():
            return [path / SINGLE], None
        found = sorted(path.glob("*.safetensors"))
        if len(found) == 1:
            return found, None
        names = ", ".join(sorted(file.name for file in path.iterdir())[:8])
        what = "several safetensors files and no index" if found else "a folder without weights"
        raise UsageError(what, file=path, expected=f"{SINGLE} or {INDEX}", found=names or "nothing")
    return [path], None


def _shards_of(index: Path) -> list[Path]:
    names = sorted(set(_weight_map(index).values()))
    for name in names:
        if Path(name).name != name:
            raise FormatError("not a plain file name", file=index, field="weight_map", found=name)
        if not (index.parent / name).is_file():
            raise FormatError("missing shard", file=index.parent / name, field=f"in {index.name}")
    if not names:
        raise FormatError("an index that names no shard", file=index, field="weight_map")
    return [index.parent / name for name in names]


def _weight_map(index: Path) -> dict[str, str]:
    if not index.is_file():
        raise UsageError("no such file", file=index)
    weight_map = read_json(index).get("weight_map")
    try:
        return msgspec.convert(weight_map, dict[str, str])
    except msgspec.ValidationError as error:
        raise FormatError(f"not a sharded index: {error}", file=index, field="weight_map") from None


def _check_index(index: Path, tensors: dict[str, SourceTensor]) -> None:
    for name, shard in _weight_map(index).items():
        if name not in tensors or tensors[name].path.name != shard:
            raise FormatError("tensor not in its shard", file=index.parent / shard, field=name)


def _opened(path: Path) -> BinaryIO:
    try:
        file = path.open("rb")
    except OSError as error:
        raise UsageError(f"cannot open: {error.strerror}", file=path) from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UsageError("not a regular file", file=path)
    return file


def _content(path: Path) -> bytes:
    with _opened(path) as file:
        return file.read()

"""Checkpoints on disk: safetensors files, sharded or not, and the small files beside them.

Facts: a safetensors file is an 8-byte little-endian length, that many bytes of JSON (padded with
spaces), then the tensors' bytes without gaps. Its header may leave the data misaligned and may
list tensors in another order than their offsets. What a hub download leaves behind when Git LFS
was not installed is a pointer: about 135 bytes of text under the weights' name. A folder may hold
`model.safetensors` beside the index of shards that it replaced: transformers takes the former, and
minds no key of an index that no shard has.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from bundlefmt.checkpoints import foreign
from bundlefmt.checkpoints.files import File, Folder, exists
from bundlefmt.errors import FormatError, ReadError, UsageError
from bundlefmt.layout import dtypes
from bundlefmt.layout.constants import MAX_BLOB_LENGTH, MAX_INTEGER

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# Small files that travel with the weights, as blobs.
COMPANIONS = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")

_MAX_CONFIG = 24 << 20  # it is parsed: a list of nothing takes 20 times its text in memory
_MAX_INDEX = 32 << 20
_MAX_HEADER = 100 << 20  # safetensors' own limit
_MOST_MARKS = 1 << 21  # commas and opening brackets, eight for a tensor: bounds time and memory
_LFS = b"version https://git-lfs.github.com/spec/"
_CHUNK = 16 << 20
_NAMES_SHOWN = 8

_Natural = Annotated[int, Meta(ge=0, le=MAX_INTEGER)]


class _Entry(msgspec.Struct):
    """One tensor of a safetensors header."""

    dtype: str
    shape: Annotated[list[_Natural], Meta(max_length=64)]
    data_offsets: tuple[_Natural, _Natural]


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor of a checkpoint: where its bytes lie. Without an open file it cannot be read."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int
    file: File | None = None

    def chunks(self) -> Iterator[NDArray[np.uint8]]:
        """The tensor's bytes, in pieces of bounded size."""
        for start in range(0, self.nbytes, _CHUNK):
            yield self.read(start, min(_CHUNK, self.nbytes - start))

    def read(self, start: int = 0, length: int | None = None) -> NDArray[np.uint8]:
        """`length` of the tensor's bytes from `start` on (all that follow when None)."""
        if self.file is None:
            raise ReadError("no open file", file=self.path, field=self.name)
        data = np.empty(self.nbytes - start if length is None else length, dtype=np.uint8)
        self.file.read_into(memoryview(data), self.offset + start, self.name)
        return data


@dataclass(frozen=True)
class SafetensorsFile:
    """One weights file: its header, verbatim, and its tensors in the order of their offsets."""

    path: Path
    header: bytes
    tensors: tuple[SourceTensor, ...]


@dataclass(frozen=True)
class Checkpoint:
    """Weights files, config and companions (name -> content) of one model, open until `close`.

    `unfound` are the tensors that the index lists and no shard has; `notes` say what else lies in
    the folder and is not of the checkpoint.
    """

    path: Path
    folder: Folder
    files: tuple[SafetensorsFile, ...]
    tensors: dict[str, SourceTensor]
    companions: dict[str, bytes]
    config: dict[str, Any]
    unfound: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def require_unchanged(self) -> None:
        """Raise ReadError when a file of it is not what it was when it was opened."""
        self.folder.require_unchanged()

    def close(self) -> None:
        """Close its files."""
        self.folder.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint at `path`: a safetensors file, a folder, or a sharded index.

    Raises UsageError when there is none, FormatError when its files break their formats' rules.
    """
    given = Path(path)
    if not exists(given):
        raise _nothing_at(path)
    try:
        folder = Folder(given if given.is_dir() else given.parent)
    except OSError as error:
        raise UsageError(f"cannot open: {error.strerror}", file=given) from error
    try:
        return _open(given, folder)
    except BaseException:
        folder.close()
        raise


def _open(given: Path, folder: Folder) -> Checkpoint:
    notes: list[str] = []
    companions = {
        name: folder.open(name).content(_MAX_CONFIG if name == CONFIG else MAX_BLOB_LENGTH)
        for name in COMPANIONS
        if folder.has(name)
    }
    config = _json(folder.path / CONFIG, companions[CONFIG]) if CONFIG in companions else {}
    weights, index = _weights_of(given, folder, config.get("transformers_weights"), notes)
    files = tuple(_read(file) for file in weights)
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
    unfound: tuple[str, ...] = ()
    if index is not None:
        unfound = _unfound(index, folder, tensors)
        companions[index.path.name] = index.carried()
    adapters = [name for name in _ADAPTERS if folder.has(name)]
    if adapters:
        notes.append(f"left out, an adapter beside the model: {', '.join(adapters)}")
    if tensors and all(".lora_" in name for name in tensors):
        raise UsageError(f"these are {foreign.ADAPTER}", file=given)
    return Checkpoint(given, folder, files, tensors, companions, config, unfound, tuple(notes))


def read_safetensors(path: Path) -> SafetensorsFile:
    """A safetensors file's header, checked: types, lengths, full coverage, no overlap. The file
    stays open for as long as its tensors are there."""
    return _read(File(path))


def _read(file: File) -> SafetensorsFile:
    path, size = file.path, file.size
    start = file.read(0, len(_LFS))
    if size == 0:
        raise FormatError("empty file", file=path, expected="safetensors")
    if start == _LFS:
        raise FormatError(
            "a Git-LFS pointer, not the weights: fetch them with `git lfs pull`", file=path
        )
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER):
        if what := foreign.content(start, path.name):
            raise UsageError(what, file=path, expected="safetensors")
        raise FormatError(
            "not a safetensors file",
            file=path,
            field="header length",
            offset=0,
            expected=f"2..{max(min(size - 8, _MAX_HEADER), 2)}",
            found=length,
        )
    header = file.read(8, length)
    tensors = parse_header(path, header, file)
    end = max((tensor.offset + tensor.nbytes for tensor in tensors), default=8 + length)
    if end != size:
        what = "file cut short" if size < end else "bytes after the last tensor"
        raise FormatError(what, file=path, expected=f"{end} bytes", found=size)
    return SafetensorsFile(path, header, tensors)


def parse_header(path: Path, header: bytes, file: File | None = None) -> tuple[SourceTensor, ...]:
    """The tensors that a safetensors header describes, by offset, checked: known dtypes, lengths
    that fit, data without gaps or overlap. `path` is the file that they are in, `file` the same,
    open, where they are to be read."""
    marks = sum(map(header.count, (b",", b"[", b"{")))
    if marks > _MOST_MARKS:
        raise FormatError(
            "too many values",
            file=path,
            offset=8,
            expected=f"at most {_MOST_MARKS} commas and opening brackets",
            found=marks,
        )
    try:
        raw = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        msgspec.json.decode(raw.get("__metadata__", b"{}"), type=dict[str, str])
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
            SourceTensor(
                name, entry.dtype, tuple(entry.shape), path, base + begin, end - begin, file
            )
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


def _json(path: Path, content: bytes) -> dict[str, Any]:
    """A JSON object; FormatError when it is not one."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not JSON: {error}", file=path) from None
    if not isinstance(value, dict):
        raise FormatError("not a JSON object", file=path)
    return value


@dataclass(frozen=True)
class _Index:
    """A sharded checkpoint's index: its content, and which shard each tensor is in."""

    path: Path
    content: bytes
    weight_map: dict[str, str]

    def carried(self) -> bytes:
        """The index as a blob, beside shards that lie in no folder of their own."""
        if not any("/" in shard for shard in self.weight_map.values()):
            return self.content
        flat = {name: Path(shard).name for name, shard in self.weight_map.items()}
        return json.dumps(json.loads(self.content) | {"weight_map": flat}, indent=2).encode()


def _weights_of(
    given: Path, folder: Folder, said: object, notes: list[str]
) -> tuple[list[File], _Index | None]:
    """The weights files that `given` stands for, at least one, and the index that names them;
    `said` is the name of either, where config.json says it."""
    named = folder.adopt(File(given)) if folder.path != given else None
    if named is None and isinstance(said, str):
        named = folder.open(said)
    if named is not None:
        is_index = named.path.suffix == ".json"
        return _shards_of(named, folder, notes) if is_index else ([named], None)
    if folder.has(SINGLE):
        if folder.has(INDEX):
            notes.append(f"{SINGLE} was taken; left out: {INDEX} and its shards")
        return [folder.open(SINGLE)], None
    if folder.has(INDEX):
        return _shards_of(folder.open(INDEX), folder, notes)
    names = folder.names()
    found = [name for name in names if name.endswith(".safetensors") and name not in _ADAPTERS]
    if len(found) == 1:
        return [folder.open(found[0])], None
    what = "several safetensors files and no index" if found else "a folder without weights"
    if not found and (other := foreign.folder(names)):
        what = f"{what} in safetensors; it holds {other}"
    more = ["..."] if len(names) > _NAMES_SHOWN else []
    shown = ", ".join(names[:_NAMES_SHOWN] + more) or "nothing"
    raise UsageError(what, file=given, expected=f"{SINGLE} or {INDEX}", found=shown)


def _shards_of(file: File, folder: Folder, notes: list[str]) -> tuple[list[File], _Index]:
    content = file.content(_MAX_INDEX)
    weight_map = _json(file.path, content).get("weight_map")
    try:
        weight_map = msgspec.convert(weight_map, dict[str, str])
    except msgspec.ValidationError as error:
        raise FormatError(
            f"not a sharded index: {error}", file=file.path, field="weight_map"
        ) from None
    names = sorted(set(weight_map.values()))
    if not names:
        raise FormatError("an index that names no shard", file=file.path, field="weight_map")
    for name in names:
        if any(step in ("", ".", "..") for step in name.split("/")):
            raise FormatError(
                "not a plain file name, nor one below this folder",
                file=file.path,
                field="weight_map",
                found=name,
            )
        if not folder.has(name):
            raise FormatError(
                "missing shard", file=folder.path / name, field=f"in {file.path.name}"
            )
    seen: dict[str, str] = {}
    for name in names:
        if (other := seen.setdefault(Path(name).name, name)) != name:
            raise FormatError(
                "two shards of one file name: a bundle file keeps names without folders",
                file=folder.path / name,
                found=f"also {other}",
            )
    if seen.keys() != set(names):
        notes.append(f"{file.path.name} is carried for shards without folders")
    return [folder.open(name) for name in names], _Index(file.path, content, weight_map)


def _unfound(index: _Index, folder: Folder, tensors: dict[str, SourceTensor]) -> tuple[str, ...]:
    """The tensors that the index lists and no shard has. Raises FormatError for one in another
    shard than the index says."""
    for name, shard in index.weight_map.items():
        if name in tensors and tensors[name].path != folder.path / shard:
            raise FormatError("tensor not in its shard", file=folder.path / shard, field=name)
    return tuple(name for name in index.weight_map if name not in tensors)


def _nothing_at(path: str | os.PathLike[str]) -> UsageError:
    repository = foreign.hub_id(os.fspath(path))
    if repository is None:
        return UsageError("no such file or folder", file=path)
    return UsageError(
        "no such file or folder; a model on the Hub has to be fetched first: "
        f"`hf download {repository} --local-dir {repository.partition('/')[2]}`",
        file=path,
    )

"""A bundle file back into the files that it was packed from."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
from numpy.typing import NDArray

from bundlefmt.checkpoints.sources import SourceTensor, parse_header
from bundlefmt.convert.progress import Progress, silent
from bundlefmt.errors import FormatError, naming
from bundlefmt.file import BundleFile
from bundlefmt.layout import dtypes
from bundlefmt.layout.encodings import numbers_in
from bundlefmt.layout.header import Group, Part, Region, Source, SourceFile
from bundlefmt.reader import Reader
from bundlefmt.storage.atomic import new_files, write_all

_CHUNK_BYTES = 32 << 20  # of bundles in memory at a time

Placement = tuple[Group, Part, Source]


@dataclass(frozen=True)
class UnpackReport:
    """What `unpack` wrote. `identical` says whether every file is byte for byte the original;
    `reencoded` names the tensors that hold the stored values, in the dtype of these, instead."""

    path: str
    folder: str
    files: list[str]
    identical: bool
    reencoded: list[str]
    bytes_written: int
    seconds: float


def unpack(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    progress: Progress = silent,
) -> UnpackReport:
    """Write the original files into `folder`, which is made if need be.

    Files are byte-identical where nothing was re-encoded. A tensor that was comes back in the
    dtype of its encoding (f32, f16, bf16), or as F32 for block encodings: the stored values,
    exactly. All files appear, or none. Raises UsageError when a file is already there, FormatError
    when the bundle file is damaged or does not hold a tensor, WriteError when the device refuses.
    """
    start = time.perf_counter()
    with BundleFile(path) as file, file.reader() as reader, naming(path):
        outputs = _outputs(file)
        names = [*file.blob_names, *(output.name for output in outputs)]
        nbytes = sum(output.nbytes for output in outputs)
        nbytes += sum(_decoded_length(blob.data) for blob in file.header.blobs)
        with new_files(folder, names, needed=nbytes) as written, ExitStack() as stack:
            for name in file.blob_names:
                with _created(written / name) as out:
                    write_all(out.fileno(), file.blob(name), 0)
            for output in outputs:
                output.fd = stack.enter_context(_created(written / output.name)).fileno()
            _Unpack(file, outputs, progress).write(reader)
    reencoded = [name for output in outputs for name in output.reencoded]
    return UnpackReport(
        path=os.fspath(path),
        folder=os.fspath(folder),
        files=names,
        identical=not reencoded,
        reencoded=reencoded,
        bytes_written=nbytes,
        seconds=time.perf_counter() - start,
    )


def _created(path: Path) -> BinaryIO:
    return path.open("xb", buffering=0)


def _decoded_length(region: Region) -> int:
    return region.length if region.decoded_length is None else region.decoded_length


def _outputs(file: BundleFile) -> list[_Output]:
    """The safetensors files to write. Raises FormatError when two of them hold one tensor."""
    sources: dict[str, list[Placement]] = defaultdict(list)
    for group in file.groups:
        for part in group.parts:
            if part.source is not None:
                sources[part.source.tensor].append((group, part, part.source))
    resident = set(file.tensor_names)
    outputs = [_Output(file, source, resident, sources) for source in file.header.sources]
    seen: set[str] = set()
    for output in outputs:
        for name in output.tensors:
            if name in seen:
                raise FormatError("tensor in two source files", field=name)
            seen.add(name)
    return outputs


class _Output:
    """One safetensors file to write: its header and where each tensor goes."""

    def __init__(
        self,
        file: BundleFile,
        source: SourceFile,
        resident: set[str],
        sources: Mapping[str, list[Placement]],
    ) -> None:
        self.name = source.name
        self.fd = -1
        self.header = bytes(file.region(source.header, source.name))
        original = parse_header(Path(source.name), self.header)
        self.placements = {
            tensor.name: _tiling(tensor, sources.get(tensor.name, []))
            for tensor in original
            if tensor.name not in resident
        }
        for tensor in original:
            if tensor.name in resident:
                _check_resident(file, tensor)
        stored = {tensor.name: _stored_dtype(self.placements, tensor) for tensor in original}
        self.reencoded = [
            tensor.name
            for tensor in original
            if any(
                part.encoding != dtypes.ENCODING_OF.get(tensor.dtype)
                for _, part, _ in self.placements.get(tensor.name, [])
            )
        ]
        if self.reencoded:
            self.header = _restated(self.header, original, stored)
        self.tensors = {
            tensor.name: tensor for tensor in parse_header(Path(self.name), self.header)
        }
        self.nbytes = 8 + len(self.header) + sum(tensor.nbytes for tensor in self.tensors.values())


def _tiling(tensor: SourceTensor, parts: list[Placement]) -> list[Placement]:
    """The parts that make up a tensor, in order. Raises FormatError unless they tile it."""
    found = sorted(parts, key=lambda placement: placement[2].start)
    end = 0
    for group, _, source in found:
        fits = len(tensor.shape) == 2 and (
            source.axis == found[0][2].axis
            and tensor.shape[1 - source.axis] == group.d_model
            and source.start == end
        )
        if not fits:
            break
        end += group.neurons
    else:
        if found and end == tensor.shape[found[0][2].axis]:
            return found
    raise FormatError(
        "the file does not hold this tensor whole",
        field=tensor.name,
        expected=f"parts that tile shape {list(tensor.shape)}",
        found=f"{len(found)} parts",
    )


def _check_resident(file: BundleFile, tensor: SourceTensor) -> None:
    """Raise FormatError unless the resident tensor of that name is like the one in the source."""
    entry = file.tensor_entry(tensor.name)
    if (entry.dtype, tuple(entry.shape)) != (tensor.dtype, tensor.shape):
        raise FormatError(
            "the resident tensor is unlike the one that was packed",
            field=tensor.name,
            expected=f"{tensor.dtype} {list(tensor.shape)}",
            found=f"{entry.dtype} {entry.shape}",
        )


def _stored_dtype(placements: dict[str, list[Placement]], tensor: SourceTensor) -> str:
    """The dtype in which a tensor's stored values can be written exactly."""
    if tensor.name not in placements:
        return tensor.dtype
    names = {name: dtype for dtype, name in dtypes.ENCODING_OF.items()}
    stored = {names.get(part.encoding, "F32") for _, part, _ in placements[tensor.name]}
    return stored.pop() if len(stored) == 1 else "F32"


def _restated(header: bytes, original: tuple[SourceTensor, ...], stored: dict[str, str]) -> bytes:
    """A safetensors header with other dtypes: the same tensors in the same order."""
    entries: dict[str, Any] = {}
    found = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
    if "__metadata__" in found:
        entries["__metadata__"] = found["__metadata__"]  # as it is, whatever it says
    end = 0
    for tensor in original:
        nbytes = dtypes.nbytes(stored[tensor.name], tensor.shape)
        entries[tensor.name] = {
            "dtype": stored[tensor.name],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + nbytes],
        }
        end += nbytes
    data = msgspec.json.encode(entries)
    return data + b" " * (-len(data) % 8)


class _Unpack:
    """One unpacking under way."""

    def __init__(self, file: BundleFile, outputs: list[_Output], progress: Progress) -> None:
        self._file = file
        self._outputs = outputs
        self._progress = progress
        self._done = 0
        self._total = sum(output.nbytes for output in outputs)

    def write(self, reader: Reader) -> None:
        """Write every safetensors file into its descriptor."""
        homes: dict[str, _Output] = {}
        for output in self._outputs:
            self._put(output, 0, len(output.header).to_bytes(8, "little") + output.header)
            homes |= dict.fromkeys(output.placements, output)
            for tensor in output.tensors.values():
                if tensor.name not in output.placements:
                    self._put(output, tensor.offset, self._file.tensor_bytes(tensor.name))
        for group in self._file.groups:
            columns: dict[str, NDArray[Any]] = {}
            for part, start, numbers in self._rows(group, reader):
                source = part.source
                if source is None or source.tensor not in homes:
                    continue
                output = homes[source.tensor]
                tensor = output.tensors[source.tensor]
                kind = dtypes.DTYPES[tensor.dtype][1]
                rows = np.ascontiguousarray(numbers, dtype=kind)
                if source.axis == 0:
                    at = (source.start + start) * rows.strides[0]
                    self._put(output, tensor.offset + at, rows.view(np.uint8))
                    continue
                if source.tensor not in columns:
                    columns[source.tensor] = np.empty((group.d_model, group.neurons), dtype=kind)
                columns[source.tensor][:, start : start + len(rows)] = rows.T
            for part in group.parts:
                if part.source is not None and part.source.tensor in columns:
                    self._put_columns(homes[part.source.tensor], part.source, columns)

    def _rows(self, group: Group, reader: Reader) -> Iterator[tuple[Part, int, NDArray[Any]]]:
        """(part, first neuron, numbers [n, d_model]) for all parts of a group, by neuron."""
        for part in group.parts:
            if part.resident is not None:
                yield part, 0, numbers_in(self._file.resident_part(group, part.name), part.encoding)
        step = max(_CHUNK_BYTES // group.stride, 1)
        for start in range(0, group.neurons, step):
            neurons = np.arange(start, min(start + step, group.neurons))
            bundles = reader.read(group.layer, neurons, expert=group.expert)
            for part in group.bundled:
                yield part, start, bundles.part(part.name)

    def _put_columns(
        self, output: _Output, source: Source, columns: dict[str, NDArray[Any]]
    ) -> None:
        """Write a part's columns into their tensor, whole or (of a fused one) row by row."""
        tensor, matrix = output.tensors[source.tensor], columns[source.tensor]
        if matrix.shape == tensor.shape:
            self._put(output, tensor.offset, matrix.view(np.uint8))
            return
        width = tensor.shape[1] * matrix.itemsize
        for row, numbers in enumerate(matrix):
            at = tensor.offset + row * width + source.start * matrix.itemsize
            self._put(output, at, numbers.view(np.uint8))

    def _put(self, output: _Output, offset: int, data: Any) -> None:
        self._done += write_all(output.fd, data, offset)
        self._progress(self._done, self._total)

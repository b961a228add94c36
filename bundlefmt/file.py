"""An open bundle file: its header, its small tables, its resident tensors and blobs."""

from __future__ import annotations

import functools
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

from bundlefmt.errors import FormatError, ReadError, UsageError, integer, naming
from bundlefmt.layout import dtypes, structure, superblock
from bundlefmt.layout.constants import DATA_OFFSET, MAX_INTEGER, MAX_ZSTD_WINDOW
from bundlefmt.layout.header import Group, Header, Region, Span, Tensor
from bundlefmt.layout.header import decode as decode_header
from bundlefmt.layout.order import is_permutation
from bundlefmt.layout.superblock import Superblock
from bundlefmt.reader import Reader
from bundlefmt.storage.backends import (
    DEFAULT_QUEUE_DEPTH,
    DEFAULT_THREADS,
    Backend,
    open_backend,
)
from bundlefmt.storage.buffers import aligned_empty
from bundlefmt.storage.regular import open_descriptor
from bundlefmt.storage.sequential import spanning

_INTEGERS = (int, np.integer)
_ZSTD_STEP = 64  # compressed bytes at a time: at most 16 blocks of 128 KiB come out of them
_MAX_DOCUMENT = 16 << 20  # bytes of JSON, which may take thirty times as many once it is parsed
_LONG = 1 << 20  # spans that come at the rate of the device, and leave the page cache alone


class BundleFile:
    """A bundle file, open for reading; a context manager.

    `header`, `superblock` are what the file declares, checked; `groups` its groups; `config` the
    model's config.json as a dict ({} when there is none). Raises UsageError when `path` is not a
    file, FormatError when it is not a valid bundle file. Bulk data is checked when it is read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = _as_text(path)
        self._backend: Backend | None = None
        try:
            self._fd = open_descriptor(self.path)
        except IsADirectoryError as error:
            why = "a folder, not a bundle file: `bundlefmt pack` makes one of a checkpoint"
            raise UsageError(why, file=self.path) from error
        except OSError as error:
            raise UsageError(f"cannot open: {error.strerror}", file=self.path) from error
        try:
            with naming(self.path):
                self.superblock, self.header = self._read_header()
                structure.check(self.superblock, self.header)
        except BaseException:
            self.close()
            raise
        self._groups = {(group.layer, group.expert): group for group in self.header.groups}
        self._tensors = {tensor.name: tensor for tensor in self.header.tensors}
        self._blobs = {blob.name: blob for blob in self.header.blobs}

    def __enter__(self) -> BundleFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file. May be called twice, by two threads at once too."""
        # A descriptor that was closed may be another file's before this thread goes on.
        backend, self._backend = self._backend, None
        fd, self._fd = self._fd, -1
        if backend is not None:
            backend.close()
        if fd >= 0:
            os.close(fd)

    @property
    def groups(self) -> list[Group]:
        """The groups, in the header's order."""
        return self.header.groups

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The model's config.json; {} when the file carries none."""
        return self.document("config.json")

    def group(self, layer: int, expert: int | None = None) -> Group:
        """The group of that layer (and expert). Raises UsageError when there is none."""
        integers = isinstance(layer, _INTEGERS) and isinstance(expert, (*_INTEGERS, type(None)))
        if not integers or (layer, expert) not in self._groups:
            raise UsageError(
                "no such group",
                file=self.path,
                field="layer" if expert is None else "layer, expert",
                expected=self._what_there_is(layer if integers else None),
                found=layer if expert is None else (layer, expert),
            )
        return self._groups[layer, expert]

    def _what_there_is(self, layer: int | None) -> str:
        experts = [g.expert for g in self.groups if g.layer == layer and g.expert is not None]
        if experts:
            return f"layer {layer} with an expert in {min(experts)}..{max(experts)}"
        layers = [group.layer for group in self.groups]
        return f"a layer in {min(layers)}..{max(layers)}" if layers else "a file with groups"

    @property
    def tensor_names(self) -> list[str]:
        """Names of the resident tensors, in the header's order."""
        return list(self._tensors)

    def tensor_entry(self, name: str) -> Tensor:
        """The header's entry of a resident tensor. Raises UsageError when there is none."""
        if not isinstance(name, str) or name not in self._tensors:
            raise UsageError("no such resident tensor", file=self.path, field=str(name))
        return self._tensors[name]

    def tensor(self, name: str) -> NDArray[Any]:
        """A resident tensor in its own dtype and shape, checked against its checksum.

        Raises UsageError for a name that is not there and for a dtype that NumPy has no type for,
        FormatError for a wrong checksum.
        """
        entry = self.tensor_entry(name)
        dtype = dtypes.DTYPES[entry.dtype][1]
        if dtype is None:
            raise UsageError(
                f"dtype {entry.dtype} has no NumPy type: tensor_bytes() gives it as it lies",
                file=self.path,
                field=name,
            )
        return np.frombuffer(self.tensor_bytes(name), dtype=dtype).reshape(entry.shape)

    def tensor_bytes(self, name: str) -> memoryview:
        """A resident tensor's bytes, decoded from its codec, checked."""
        return self.region(self.tensor_entry(name).data, name)

    @property
    def blob_names(self) -> list[str]:
        """Names of the blobs, in the header's order."""
        return list(self._blobs)

    def blob(self, name: str) -> bytes:
        """A carried file's bytes, checked. Raises UsageError for a name that is not there."""
        if not isinstance(name, str) or name not in self._blobs:
            raise UsageError("no such blob", file=self.path, field=str(name))
        data = self._blobs[name].data
        if data.codec == "raw":
            return bytes(self._checked(data, name))
        whole = io.BytesIO()  # which gives its bytes away without a copy
        for piece in self.decoded_pieces(data, name):
            whole.write(piece)
        return whole.getvalue()

    def document(self, name: str) -> dict[str, Any]:
        """A carried JSON file as a dict; {} when there is none of that name. Raises FormatError
        when it is not a JSON object of at most 16 MiB."""
        if name not in self.blob_names:
            return {}
        data = self._blobs[name].data
        length = data.length if data.decoded_length is None else data.decoded_length
        if length > _MAX_DOCUMENT:
            expected = f"at most {_MAX_DOCUMENT} bytes"
            self._refuse("too long", field=name, expected=expected, found=length)
        try:
            document = json.loads(self.blob(name))
        except (ValueError, RecursionError) as error:
            self._refuse(f"not JSON: {error}", field=name)
        if not isinstance(document, dict):
            self._refuse("not a JSON object", field=name)
        return document

    def resident_part(self, group: Group, name: str) -> NDArray[np.uint8]:
        """A part that lies outside the bundles: uint8 [neurons, part length], by neuron."""
        part = group.part(name)
        if part is None or part.resident is None:
            raise UsageError(
                "no such resident part", file=self.path, field=f"{group.label}, {name}"
            )
        data = self.region(part.resident, f"{group.label}, {name}")
        return np.frombuffer(data, dtype=np.uint8).reshape(group.neurons, part.length)

    def bias(self, group: Group, name: str) -> NDArray[np.float32] | None:
        """A part's biases: one per neuron (gate, up) or per output (down); None without any."""
        part = group.part(name)
        if part is None or part.bias is None:
            return None
        bias: NDArray[np.float32] = self.tensor(part.bias).astype(np.float32)
        if name == "down":
            return bias
        start = part.source.start if part.source is not None else 0
        return bias[start : start + group.neurons]

    def checksums(self, group: Group) -> NDArray[np.uint64]:
        """The group's table: xxh3-64 of each bundle over its stride, by slot of the region."""
        data = self.region(group.checksums, f"{group.label}, checksums")
        return np.frombuffer(data, dtype="<u8")

    def order(self, group: Group) -> NDArray[np.uint32] | None:
        """order[j] is the neuron in slot j of the region; None when slot j holds neuron j.

        Raises FormatError when the table is not a permutation.
        """
        if group.order is None:
            return None
        data = self.region(group.order, f"{group.label}, order")
        order = np.frombuffer(data, dtype="<u4")
        if not is_permutation(order):
            self._refuse("order is not a permutation", field=group.label, span=group.order)
        return order

    def reader(
        self,
        backend: str = "auto",
        *,
        verify: bool = True,
        threads: int = DEFAULT_THREADS,
        queue_depth: int = DEFAULT_QUEUE_DEPTH,
        memory: NDArray[np.uint8] | None = None,
        gap: int = 0,
    ) -> Reader:
        """A batch reader of this file's bundles. See `Reader`. `uring` has `queue_depth` reads in
        flight, the other backends one for each of their `threads`. `memory` (contiguous uint8),
        of which most batches' `out` will be a part, is registered with the kernel where that helps.
        Bundles with at most `gap` bytes of others between them are one request.

        Raises UsageError for an unknown backend or a gap below zero, ReadError when the backend
        asked for by name cannot work here.
        """
        gap = integer(gap, "gap", 0, MAX_INTEGER)
        opened, fallback = self.backend(backend, threads, queue_depth, memory)
        return Reader(self, opened, fallback=fallback, verify=verify, gap=gap)

    def backend(
        self,
        name: str = "auto",
        threads: int = DEFAULT_THREADS,
        queue_depth: int = DEFAULT_QUEUE_DEPTH,
        memory: NDArray[np.uint8] | None = None,
    ) -> tuple[Backend, str | None]:
        """What `open_backend` gives for this file, and raises; ReadError, too, when another file
        has its name by now, UsageError when this one is closed."""
        self._require_open()
        opened, fallback = open_backend(self.path, name, threads, queue_depth, memory)
        try:
            same = os.path.samestat(os.fstat(self._fd), Path(self.path).stat())
        except OSError:
            same = False
        if not same:
            opened.close()
            raise ReadError("another file has taken this name meanwhile", file=self.path)
        return opened, fallback

    def region(self, region: Region, field: str) -> memoryview:
        """A region's bytes, checked against its checksum and decoded from its codec."""
        if region.codec == "raw":
            return self._checked(region, field)
        data = bytearray()
        for piece in self.decoded_pieces(region, field):
            data += piece
        return memoryview(data)

    def read(self, span: Span, field: str) -> memoryview:
        """The bytes of a span, unchecked. Raises ReadError when they cannot all be read,
        UsageError when the file is closed."""
        self._require_open()
        if span.length >= _LONG:
            return self._read_past_the_cache(span)
        view = memoryview(bytearray(span.length))
        done = 0
        try:
            while done < span.length:
                count = os.preadv(self._fd, [view[done:]], span.offset + done)
                if count == 0:
                    raise ReadError(
                        "file ends early",
                        file=self.path,
                        field=field,
                        offset=span.offset + done,
                        expected=f"{span.length - done} more bytes",
                    )
                done += count
        except OSError as error:
            raise ReadError(
                f"read failed: {error.strerror}", file=self.path, field=field, offset=span.offset
            ) from error
        return view

    def _read_past_the_cache(self, span: Span) -> memoryview:
        backend = self._backend
        if backend is None:
            backend, _ = self.backend()
            # Of the backends of several threads one is kept; the others are closed when they have
            # served.
            self._backend = self._backend or backend
        memory = aligned_empty(span.length)
        backend.submit(spanning(memory, span.offset)).wait()
        if backend is not self._backend:
            backend.close()
        return memoryview(memory)

    def _require_open(self) -> None:
        if self._fd < 0:
            raise UsageError("the file is closed", file=self.path)

    def _read_header(self) -> tuple[Superblock, Header]:
        size = os.fstat(self._fd).st_size
        if size < DATA_OFFSET:
            raise FormatError(
                "too short to be a bundle file",
                field="superblock",
                expected=f"at least {DATA_OFFSET} bytes",
                found=size,
            )
        _, chosen = superblock.choose(bytes(self.read(Span(0, DATA_OFFSET), "superblock")))
        if size < chosen.file_length:
            raise FormatError(
                "file cut short",
                field="superblock.file_length",
                expected=f"{chosen.file_length} bytes",
                found=size,
            )
        data = bytes(self.read(Span(chosen.header_offset, chosen.header_length), "header"))
        actual = xxhash.xxh3_64_intdigest(data)
        if actual != chosen.header_xxh3:
            raise FormatError(
                "header damaged",
                field="header",
                offset=chosen.header_offset,
                expected=f"{chosen.header_xxh3:016x}",
                found=f"{actual:016x}",
            )
        return chosen, decode_header(data)

    def decoded_pieces(self, region: Region, field: str) -> Iterator[bytes]:
        """What a compressed region's bytes, checked against its checksum, decode to, piece by
        piece: memory follows the bytes that really come, never what is declared."""
        data = self._checked(region, field)
        declared, length = region.decoded_length or 0, 0
        decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW)
        frame = decompressor.decompressobj()
        try:
            for start in range(0, len(data), _ZSTD_STEP):
                rest = bytes(data[start : start + _ZSTD_STEP])
                while rest and length <= declared:
                    if frame.eof:
                        frame = decompressor.decompressobj()
                    piece = frame.decompress(rest)
                    rest = frame.unused_data if frame.eof else b""
                    length += len(piece)
                    yield piece
        except zstandard.ZstdError as error:
            self._refuse(f"zstd: {error}", field=field, span=region)
        if length <= declared and not frame.eof:
            self._refuse("the last zstd frame is not whole", field=field, span=region)
        if length != declared:
            self._refuse(
                "decodes to another length",
                field=field,
                span=region,
                expected=f"{declared} bytes",
                found="more" if length > declared else length,
            )

    def _checked(self, region: Region, field: str) -> memoryview:
        data = self.read(region, field)
        actual = xxhash.xxh3_64_hexdigest(data)
        if actual != region.xxh3:
            self._refuse(
                "data damaged", field=field, span=region, expected=region.xxh3, found=actual
            )
        return data

    def _refuse(
        self, what: str, *, field: str, span: Span | None = None, **compared: Any
    ) -> NoReturn:
        raise FormatError(
            what, file=self.path, field=field, offset=span.offset if span else None, **compared
        )


def _as_text(path: str | os.PathLike[str]) -> str:
    try:
        return os.fsdecode(path)
    except TypeError:
        raise UsageError("not a path", found=type(path).__name__) from None

"""A bundle file written anew, its neurons in another order (spec, section 4.3).

Strategy: bundles are read in the order in which they are written, some at a time; every other
region is copied as it lies, piece by piece. All that is read is checked against its checksum.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import cycle

import msgspec
import numpy as np
from numpy.typing import NDArray

from bundlefmt import __version__
from bundlefmt.convert.progress import Progress, silent
from bundlefmt.convert.writer import RegionWriter
from bundlefmt.errors import FormatError
from bundlefmt.file import BundleFile
from bundlefmt.layout.arithmetic import round_up
from bundlefmt.layout.constants import DATA_OFFSET, ORDER_BYTES
from bundlefmt.layout.header import Group, Region
from bundlefmt.reader import Reader
from bundlefmt.storage.atomic import replacing
from bundlefmt.storage.buffers import aligned_empty
from bundlefmt.storage.sequential import Sequential

_CHUNK_BYTES = 8 << 20  # of bundles in memory at a time, twice

Order = NDArray[np.uint32]


def rewrite(
    file: BundleFile,
    path: str | os.PathLike[str],
    orders: Callable[[Group], Order],
    *,
    force: bool = False,
    progress: Progress = silent,
) -> int:
    """Write a file like `file` in which slot j of each group holds neuron orders(group)[j]; returns
    its length. `orders` is asked for each group when its turn comes.

    Everything else stays, the file_id among it, since nothing that goes by neuron changes; what
    older generations left behind is dropped. The file appears whole or not at all. Raises
    FormatError for a damaged file, and what `replacing` raises.
    """
    alignment = file.superblock.alignment
    tables = sum(round_up(group.neurons * ORDER_BYTES, alignment) for group in file.groups)
    needed = file.superblock.file_length + tables
    with (
        closing(file.backend()[0]) as backend,
        file.reader() as reader,
        replacing(path, force=force, needed=needed) as out,
    ):
        writer = RegionWriter(out.fileno(), alignment, DATA_OFFSET)
        return _Rewrite(file, Sequential(backend), reader, writer, progress).write(orders)


class _Rewrite:
    """One rewriting under way."""

    def __init__(
        self,
        file: BundleFile,
        sequential: Sequential,
        reader: Reader,
        writer: RegionWriter,
        progress: Progress,
    ) -> None:
        self._file = file
        self._sequential = sequential
        self._reader = reader
        self._writer = writer
        self._progress = progress
        self._done = 0

    def write(self, orders: Callable[[Group], Order]) -> int:
        """Write the whole file; returns its length."""
        replaced, header = msgspec.structs.replace, self._file.header
        renewed = replaced(
            header,
            tensors=[replaced(t, data=self._copy(t.data, t.name)) for t in header.tensors],
            groups=[self._group(group, orders(group)) for group in header.groups],
            blobs=[replaced(blob, data=self._copy(blob.data, blob.name)) for blob in header.blobs],
            sources=[replaced(s, header=self._copy(s.header, s.name)) for s in header.sources],
            retired=[],
            writer=f"bundlefmt {__version__}",
        )
        block = self._writer.header(renewed, 1, self._file.superblock.file_id)
        self._writer.superblock(block, slots=(0, 1))
        return block.file_length

    def _group(self, group: Group, order: Order) -> Group:
        bundles, checksums = self._writer.bundles(self._bundles(group, order))
        return msgspec.structs.replace(
            group,
            parts=[
                part
                if part.resident is None
                else msgspec.structs.replace(
                    part, resident=self._copy(part.resident, f"{group.label}, {part.name}")
                )
                for part in group.parts
            ],
            bundles=bundles,
            checksums=checksums,
            order=self._writer.region(lambda: [order.astype("<u4")]),
        )

    def _bundles(self, group: Group, order: Order) -> Iterator[NDArray[np.uint8]]:
        """The group's bundles in that order, uint8 [n, stride] at a time; a chunk's memory is used
        again for the next but one."""
        step = max(_CHUNK_BYTES // group.stride, 1)
        shape = (min(step, group.neurons), group.stride)
        buffers = cycle([aligned_empty(shape[0] * shape[1]).reshape(shape) for _ in range(2)])
        for start, buffer in zip(range(0, group.neurons, step), buffers, strict=False):
            neurons = order[start : start + step]
            chunk = buffer[: neurons.size]
            self._reader.read(group.layer, neurons, expert=group.expert, out=chunk)
            yield chunk
            self._advance(chunk.nbytes)

    def _copy(self, region: Region, field: str) -> Region:
        """A region's bytes, as they lie, in the new file."""

        def pieces() -> Iterator[NDArray[np.uint8]]:
            for _, data in self._sequential.pieces(region.offset, region.length):
                yield data
                self._advance(data.nbytes)

        copied = self._writer.region(pieces)
        if copied.xxh3 != region.xxh3:
            raise FormatError(
                "data damaged",
                file=self._file.path,
                field=field,
                offset=region.offset,
                expected=region.xxh3,
                found=copied.xxh3,
            )
        return msgspec.structs.replace(region, offset=copied.offset)

    def _advance(self, nbytes: int) -> None:
        self._done += nbytes
        self._progress(self._done, self._file.superblock.file_length)

"""Regions appended to a file, and the superblocks that bring them into force (spec, section 3)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from typing import Any

import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

from bundlefmt.convert.overlap import overlapped
from bundlefmt.layout import header as headers
from bundlefmt.layout import structure
from bundlefmt.layout.arithmetic import round_up
from bundlefmt.layout.checksums import row_digests
from bundlefmt.layout.constants import SLOT_OFFSETS
from bundlefmt.layout.header import Header, Region, Span
from bundlefmt.layout.superblock import Superblock
from bundlefmt.storage.atomic import write_all

Chunks = Callable[[], Iterable[Any]]  # called anew for each pass; yields buffers

_ZSTD_LEVEL = 3


class RegionWriter:
    """Appends regions at aligned offsets of an open file, from `end` on.

    What lies between regions is left unwritten: the file must hold nothing beyond `end`, so that
    gaps read as zero.
    """

    def __init__(self, fd: int, alignment: int, end: int) -> None:
        self.alignment = alignment
        self.end = end
        self._fd = fd

    def region(self, chunks: Chunks, *, zstd: bool = False) -> Region:
        """Append the chunks as one region; with `zstd`, compressed where that saves bytes."""
        start = round_up(self.end, self.alignment)
        length, digest = self._write(start, chunks())
        if zstd and length:
            # Compressed bytes take the place of the raw ones only if they are fewer.
            packed_length, packed_digest = self._write(start, _compressed(chunks()), limit=length)
            if packed_length < length:
                os.ftruncate(self._fd, start + packed_length)
                self.end = start + packed_length
                return Region(start, packed_length, packed_digest, "zstd", length)
            self._write(start, chunks())
            os.ftruncate(self._fd, start + length)
        self.end = start + length
        return Region(start, length, digest)

    def bundles(self, chunks: Iterable[NDArray[np.uint8]]) -> tuple[Span, Region]:
        """Append bundles, uint8 [n, stride] at a time, then their checksum table. A chunk is in
        use until the next but one is asked for."""
        start = self.end = round_up(self.end, self.alignment)
        digests: list[NDArray[np.uint64]] = []

        def write(chunk: NDArray[np.uint8]) -> NDArray[np.uint64]:
            found = row_digests(chunk)
            self._put(np.ascontiguousarray(chunk), self.end)
            self.end += chunk.nbytes
            return found

        # Closed here, whatever happens: nothing may write once the caller closes the file.
        with closing(overlapped(write, chunks)) as results:
            digests += results
        table = np.concatenate(digests or [np.empty(0, np.uint64)]).astype("<u8", copy=False)
        return Span(start, self.end - start), self.region(lambda: [table])

    def header(self, header: Header, generation: int, file_id: bytes) -> Superblock:
        """Append the header and the padding of the file's end; returns the superblock that will
        bring it into force. Raises FormatError for a header that no reader would accept."""
        data = headers.encode(header)
        region = self.region(lambda: [data])
        length = round_up(self.end, self.alignment)
        os.ftruncate(self._fd, length)
        superblock = Superblock(
            alignment=self.alignment,
            generation=generation,
            file_length=length,
            header_offset=region.offset,
            header_length=region.length,
            header_xxh3=int(region.xxh3, 16),
            file_id=file_id,
        )
        structure.check(superblock, headers.decode(data))
        return superblock

    def superblock(self, superblock: Superblock, slots: Iterable[int]) -> None:
        """Write a superblock into the slots of those indices."""
        for index in slots:
            write_all(self._fd, superblock.encode(), SLOT_OFFSETS[index])

    def _write(
        self, offset: int, chunks: Iterable[Any], limit: int | None = None
    ) -> tuple[int, str]:
        """Write the chunks from `offset` on, stopping once `limit` bytes are reached; returns
        length and xxh3-64."""
        digest = xxhash.xxh3_64()
        length = 0
        for chunk in chunks:
            digest.update(chunk)
            length += self._put(chunk, offset + length)
            if limit is not None and length >= limit:
                break
        return length, digest.hexdigest()

    def _put(self, data: Any, offset: int) -> int:
        """Write a buffer and set off its way to the device; returns how many bytes."""
        count = write_all(self._fd, data, offset)
        # Of pages that are dirty, DONTNEED starts the writing: less is left for fsync to wait for.
        with suppress(OSError):  # a file system, or a kernel, may take no advice
            os.posix_fadvise(self._fd, offset, count, os.POSIX_FADV_DONTNEED)
        return count


def _compressed(chunks: Iterable[Any]) -> Iterator[bytes]:
    compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compressobj()
    for chunk in chunks:
        if step := compressor.compress(chunk):
            yield step
    yield compressor.flush()

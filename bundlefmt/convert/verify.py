"""The proof that a bundle file is whole: its structure, and every byte of it vouched for."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from bundlefmt.convert.progress import Progress, silent
from bundlefmt.errors import BundleError, FormatError, naming
from bundlefmt.file import BundleFile
from bundlefmt.layout import structure, superblock
from bundlefmt.layout.checksums import row_digests
from bundlefmt.layout.constants import DATA_OFFSET, SLOT_LENGTH, SLOT_OFFSETS
from bundlefmt.layout.header import Group, Region, Span
from bundlefmt.layout.structure import Extent
from bundlefmt.storage.sequential import Sequential

_SHORT = 64 << 10  # spans read through the page cache, which brings their neighbours along
_MOST_FAULTS = 100  # kept by name; the rest are counted


@dataclass
class VerifyReport:
    """What `verify` found. `faults` holds the first hundred messages, `fault_count` counts all;
    `notes` are no faults. Sizes in bytes."""

    path: str
    quick: bool
    faults: list[str] = field(default_factory=list)
    fault_count: int = 0
    notes: list[str] = field(default_factory=list)
    generation: int = 0
    file_bytes: int = 0
    checked_bytes: int = 0
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether no fault was found."""
        return self.fault_count == 0


def verify(
    path: str | os.PathLike[str], *, quick: bool = False, progress: Progress = silent
) -> VerifyReport:
    """Check a bundle file: superblocks, header, structure, every checksum, orders, zero gaps and
    padding. `quick` leaves out the bulk: bundles, resident tensors and parts, retired regions and
    gaps.

    Faults of the file are reported, not raised. Raises UsageError when there is no such file,
    ReadError when the device fails.
    """
    start = time.perf_counter()
    report = VerifyReport(os.fspath(path), quick)
    try:
        file = BundleFile(path)
    except FormatError as error:
        _note_fault(report, error)
    else:
        with file, closing(file.backend()[0]) as backend:
            _Check(file, Sequential(backend), report, progress).run()
    report.seconds = time.perf_counter() - start
    return report


def _note_fault(report: VerifyReport, error: BundleError) -> None:
    report.fault_count += 1
    if len(report.faults) < _MOST_FAULTS:
        report.faults.append(str(error))


class _Check:
    """One verification under way, of a file whose header is sound."""

    def __init__(
        self, file: BundleFile, sequential: Sequential, report: VerifyReport, progress: Progress
    ) -> None:
        self._file = file
        self._sequential = sequential
        self._report = report
        self._progress = progress

    def run(self) -> None:
        """Check the whole file, front to back."""
        current = self._file.superblock
        self._report.generation = current.generation
        self._report.file_bytes = Path(self._file.path).stat().st_size
        self._superblocks()
        extents = sorted(
            structure.extents(self._file.header), key=lambda extent: extent.span.offset
        )
        cursor = DATA_OFFSET
        for extent in extents:
            self._attempt(extent)
            if extent.span.length:  # an empty one may lie anywhere
                self._gap(cursor, extent.span.offset)
                cursor = extent.span.offset + extent.span.length
        self._gap(cursor, current.header_offset)
        self._gap(current.header_offset + current.header_length, current.file_length)
        self._count(current.header_length)
        extra = self._report.file_bytes - current.file_length
        if extra:
            self._report.notes.append(
                f"{extra} bytes after the end at byte {current.file_length}: what an interrupted "
                "update leaves; the next update drops them"
            )

    def _superblocks(self) -> None:
        for offset in SLOT_OFFSETS:
            slot = bytes(self._file.read(Span(offset, SLOT_LENGTH), "superblock"))
            try:
                with naming(self._file.path):
                    superblock.decode(slot, offset)
            except FormatError as error:
                self._fault(error)
            self._zero(slot[superblock.LENGTH :], offset + superblock.LENGTH, "superblock")
            self._count(SLOT_LENGTH)

    def _attempt(self, extent: Extent) -> None:
        if self._report.quick and not extent.small:
            return
        try:
            self._extent(extent)
        except FormatError as error:
            self._fault(error)

    def _extent(self, extent: Extent) -> None:
        span, group = extent.span, extent.group
        if isinstance(span, Region):
            if span.codec != "raw":
                for _ in self._file.decoded_pieces(span, extent.field):
                    pass  # each piece is checked as it comes, and dropped
                self._count(span.length)
            else:
                self._region(span, extent.field)
            if extent.small and group is not None:
                self._file.order(group)
        elif group is not None:
            self._bundles(group)

    def _region(self, region: Region, field: str) -> None:
        digest = xxhash.xxh3_64()
        for _, data in self._pieces(region, field):
            digest.update(data)
        if digest.hexdigest() != region.xxh3:
            raise FormatError(
                "data damaged",
                file=self._file.path,
                field=field,
                offset=region.offset,
                expected=region.xxh3,
                found=digest.hexdigest(),
            )

    def _bundles(self, group: Group) -> None:
        try:
            expected = self._file.checksums(group)
            order = self._file.order(group)
        except FormatError:
            return  # the tables are checked at their own places: that tells
        holes = _holes(group)
        for offset, data in self._pieces(group.bundles, group.label, group.stride):
            first = (offset - group.bundles.offset) // group.stride
            rows = data.reshape(-1, group.stride)
            found = row_digests(rows)
            for row in np.flatnonzero(found != expected[first : first + len(rows)]).tolist():
                slot = first + row
                neuron = slot if order is None else int(order[slot])
                self._fault(
                    FormatError(
                        "bundle damaged",
                        file=self._file.path,
                        field=f"{group.label}, neuron {neuron}",
                        offset=group.bundles.offset + slot * group.stride,
                        expected=f"{expected[slot]:016x}",
                        found=f"{found[row]:016x}",
                    )
                )
            for begin, end in holes:
                dirty = np.flatnonzero(rows[:, begin:end].any(axis=1))
                if dirty.size:
                    at = offset + int(dirty[0]) * group.stride
                    self._zero(rows[dirty[0], begin:end], at + begin, "bundle padding")

    def _gap(self, begin: int, end: int) -> None:
        if self._report.quick:
            return
        for offset, data in self._pieces(Span(begin, end - begin), "gap"):
            self._zero(data, offset, "gap")

    def _zero(self, data: bytes | NDArray[np.uint8], offset: int, field: str) -> None:
        """Note a fault at the first byte that is not zero of what lies at `offset`."""
        found = np.flatnonzero(np.frombuffer(data, dtype=np.uint8))
        if found.size:
            self._fault(
                FormatError(
                    "a byte that must be zero is not",
                    file=self._file.path,
                    field=field,
                    offset=offset + int(found[0]),
                )
            )

    def _pieces(
        self, span: Span, field: str, unit: int = 1
    ) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """(offset, bytes) of the span in pieces of whole units."""
        if span.length > _SHORT:
            for offset, data in self._sequential.pieces(span.offset, span.length, unit):
                yield offset, data
                self._count(data.nbytes)
        elif span.length:
            yield span.offset, np.frombuffer(self._file.read(span, field), dtype=np.uint8)
            self._count(span.length)

    def _fault(self, error: FormatError) -> None:
        _note_fault(self._report, error)

    def _count(self, nbytes: int) -> None:
        self._report.checked_bytes += nbytes
        self._progress(self._report.checked_bytes, self._file.superblock.file_length)


def _holes(group: Group) -> list[tuple[int, int]]:
    """The ranges of a bundle that no part uses."""
    bounds = [0]
    for part in group.bundled:
        offset = part.offset or 0
        bounds += [offset, offset + part.length]
    bounds.append(group.stride)
    return [(begin, end) for begin, end in list(pairwise(bounds))[::2] if begin < end]

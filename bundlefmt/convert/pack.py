"""A checkpoint into a bundle file.

Strategy: one group at a time, a bounded number of neurons at a time. Parts whose neurons are rows
are read row by row; of a part whose neurons are columns (`down` of an nn.Linear) the whole matrix
is held in memory while its group is written, since its columns cannot be read alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundlefmt import __version__
from bundlefmt.checkpoints.families import (
    Activation,
    Family,
    activation_of,
    find_ffns,
)
from bundlefmt.checkpoints.sources import Checkpoint, open_checkpoint
from bundlefmt.convert.plan import GroupPlan, plan_group
from bundlefmt.convert.progress import Progress, silent
from bundlefmt.convert.rows import CHUNK_NUMBERS, PartRows
from bundlefmt.convert.writer import RegionWriter
from bundlefmt.errors import UsageError, naming
from bundlefmt.layout.arithmetic import round_up
from bundlefmt.layout.constants import CHECKSUM_BYTES, DATA_OFFSET
from bundlefmt.layout.header import Blob, Group, Header, Part, Region, Source, SourceFile, Tensor
from bundlefmt.layout.planner import region_alignment
from bundlefmt.storage.atomic import refuse_existing, replacing

_HEADER_ALLOWANCE = 1 << 10  # bytes of header per region, in the estimate of disk needed


@dataclass(frozen=True)
class PackReport:
    """What a pack wrote, or with `dry_run` would write. Sizes in bytes; `file_bytes` of a dry
    run is the most that the file can take."""

    source: str
    path: str
    family: str
    activation: str
    layers: int
    groups: int
    neurons: int
    source_bytes: int
    bundle_bytes: int
    padding_bytes: int
    resident_bytes: int
    file_bytes: int
    dry_run: bool
    seconds: float


def pack(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str] | None = None,
    *,
    dtype: str = "keep",
    align: str = "auto",
    resident: str | None = None,
    zstd: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = silent,
) -> PackReport:
    """Write the bundle file of a checkpoint: a safetensors file, a folder or a sharded index.

    `path` defaults to the source's name with `.bundle`, beside it. `dtype` is the encoding of the
    bundles, `keep` the checkpoint's own. `align` is the stride's alignment. `resident` names a
    part (`gate` or `up`) to leave out of the bundles; it keeps the checkpoint's encoding. `zstd`
    compresses resident tensors and blobs. The file appears whole or not at all.

    Raises UsageError, FormatError (the checkpoint's fault), WriteError (disk full).
    """
    start = time.perf_counter()
    checkpoint = open_checkpoint(source)
    target = Path(path) if path is not None else default_path(checkpoint)
    with naming(checkpoint.path):
        family, ffns = find_ffns(checkpoint.tensors, checkpoint.config)
        activation = activation_of(family, checkpoint.config)
    plans = [plan_group(ffn, dtype, align, resident) for ffn in ffns]
    job = _Pack(checkpoint, family, activation, plans, align, zstd, progress)
    refuse_existing(target, force=force or dry_run)
    _refuse_sources(target, checkpoint)
    if not dry_run:
        needed = job.most_bytes()
        with naming(target), replacing(target, force=force, needed=needed) as file:
            file_bytes = job.write(file.fileno())
    return PackReport(
        source=str(checkpoint.path),
        path=str(target),
        family=family.name,
        activation=activation.name,
        layers=len({plan.ffn.layer for plan in plans}),
        groups=len(plans),
        neurons=sum(plan.ffn.neurons for plan in plans),
        source_bytes=sum(tensor.nbytes for tensor in checkpoint.tensors.values()),
        bundle_bytes=sum(plan.ffn.neurons * plan.stride for plan in plans),
        padding_bytes=sum(plan.ffn.neurons * (plan.stride - plan.used) for plan in plans),
        resident_bytes=job.resident_bytes(),
        file_bytes=job.most_bytes() if dry_run else file_bytes,
        dry_run=dry_run,
        seconds=time.perf_counter() - start,
    )


def default_path(checkpoint: Checkpoint) -> Path:
    """`model.bundle` beside `model.safetensors`; `folder.bundle` beside `folder`."""
    path = checkpoint.path
    if path.is_dir():
        path = path.resolve()
        return path.with_name(f"{path.name}.bundle")
    return path.with_name(f"{path.name.split('.safetensors')[0]}.bundle")


def _refuse_sources(target: Path, checkpoint: Checkpoint) -> None:
    """Raise UsageError when `target` is one of the checkpoint's own files."""
    own = [file.path for file in checkpoint.files]
    own += [own[0].with_name(name) for name in checkpoint.companions]
    for path in own:
        if target.exists() and path.exists() and target.samefile(path):
            raise UsageError("this is the checkpoint itself", file=target)


@dataclass
class _Pack:
    """One pack under way."""

    checkpoint: Checkpoint
    family: Family
    activation: Activation
    plans: list[GroupPlan]
    align: str
    zstd: bool
    progress: Progress

    def __post_init__(self) -> None:
        bundled = {part.source.tensor.name for plan in self.plans for part in plan.parts}
        self._residents = [
            tensor
            for file in self.checkpoint.files
            for tensor in file.tensors
            if tensor.name not in bundled
        ]
        self._done = 0
        self._total = self.resident_bytes() + sum(
            plan.ffn.neurons * plan.stride for plan in self.plans
        )

    def resident_bytes(self) -> int:
        """Decoded bytes of resident tensors and resident parts."""
        return sum(tensor.nbytes for tensor in self._residents) + sum(
            plan.ffn.neurons * part.length
            for plan in self.plans
            for part in plan.parts
            if part.offset is None
        )

    def most_bytes(self) -> int:
        """The most bytes that the file can take."""
        alignment = region_alignment(self.align)
        sizes = [tensor.nbytes for tensor in self._residents]
        sizes += [len(data) for data in self.checkpoint.companions.values()]
        sizes += [len(file.header) for file in self.checkpoint.files]
        for plan in self.plans:
            neurons = plan.ffn.neurons
            sizes += [neurons * plan.stride, neurons * CHECKSUM_BYTES]
            sizes += [neurons * part.length for part in plan.parts if part.offset is None]
        sizes.append(_HEADER_ALLOWANCE * (len(sizes) + 1))
        return round_up(DATA_OFFSET, alignment) + sum(round_up(size, alignment) for size in sizes)

    def write(self, fd: int) -> int:
        """Write the whole file; returns its length."""
        writer = RegionWriter(fd, region_alignment(self.align), DATA_OFFSET)
        tensors = [
            Tensor(
                tensor.name,
                tensor.dtype,
                list(tensor.shape),
                writer.region(self._watched(tensor.chunks), zstd=self.zstd),
            )
            for tensor in self._residents
        ]
        header = Header(
            family=self.family.name,
            tensors=tensors,
            groups=[self._write_group(writer, plan) for plan in self.plans],
            blobs=[
                Blob(name, self._small(writer, data))
                for name, data in self.checkpoint.companions.items()
            ],
            sources=[
                SourceFile(file.path.name, self._small(writer, file.header))
                for file in self.checkpoint.files
            ],
            writer=f"bundlefmt {__version__}",
        )
        superblock = writer.header(header, generation=1, file_id=os.urandom(16))
        writer.superblock(superblock, slots=(0, 1))
        return superblock.file_length

    def _small(self, writer: RegionWriter, data: bytes) -> Region:
        return writer.region(lambda: [data], zstd=self.zstd)

    def _write_group(self, writer: RegionWriter, plan: GroupPlan) -> Group:
        ffn = plan.ffn
        residents: dict[str, Region] = {
            part.name: writer.region(self._watched(PartRows(part, ffn).chunks))
            for part in plan.parts
            if part.offset is None
        }
        bundles, checksums = writer.bundles(self._bundles(plan))
        return Group(
            layer=ffn.layer,
            expert=ffn.expert,
            neurons=ffn.neurons,
            d_model=ffn.d_model,
            activation=self.activation.name,
            activation_threshold=self.activation.threshold,
            stride=plan.stride,
            stride_alignment=plan.stride_alignment,
            parts=[
                Part(
                    part.name,
                    part.encoding,
                    part.length,
                    part.offset,
                    residents.get(part.name),
                    Source(part.source.tensor.name, part.source.axis, part.source.start),
                    part.source.bias,
                )
                for part in plan.parts
            ],
            bundles=bundles,
            checksums=checksums,
        )

    def _bundles(self, plan: GroupPlan) -> Iterator[NDArray[np.uint8]]:
        """The group's bundles, uint8 [n, stride] at a time; a chunk's memory is used again for
        the next but one."""
        bundled = [
            (PartRows(part, plan.ffn), part.offset, part.offset + part.length)
            for part in plan.parts
            if part.offset is not None
        ]
        step = max(CHUNK_NUMBERS // (plan.ffn.d_model * len(bundled)), 1)
        shape = (min(step, plan.ffn.neurons), plan.stride)
        buffers = cycle([np.zeros(shape, dtype=np.uint8) for _ in range(2)])
        for start, buffer in zip(range(0, plan.ffn.neurons, step), buffers, strict=False):
            chunk = buffer[: min(step, plan.ffn.neurons - start)]
            for rows, begin, end in bundled:
                rows.copy(start, chunk[:, begin:end])
            yield chunk
            self._advance(chunk.nbytes)

    def _watched(self, chunks: Callable[[], Iterator[Any]]) -> Callable[[], Iterator[Any]]:
        """The chunks, counted as they go by in the first pass."""
        counted = False

        def passing() -> Iterator[Any]:
            nonlocal counted
            first, counted = not counted, True
            for chunk in chunks():
                yield chunk
                if first:
                    self._advance(chunk.nbytes)

        return passing

    def _advance(self, nbytes: int) -> None:
        self._done += nbytes
        self.progress(self._done, self._total)

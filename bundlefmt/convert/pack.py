"""A checkpoint into a bundle file.

Strategy: one group at a time, a bounded number of neurons at a time. Parts whose neurons are rows
are read row by row; of a part whose neurons are columns (`down` of an nn.Linear) the whole matrix
is held in memory while its group is written, since its columns cannot be read alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundlefmt import __version__
from bundlefmt.checkpoints.families import UNKNOWN, Activation, Family, activation_of, head_of
from bundlefmt.checkpoints.ffns import find_ffns, is_adapters, is_unused, needed
from bundlefmt.checkpoints.files import exists, hub_repository, resolved
from bundlefmt.checkpoints.sources import Checkpoint, SourceTensor, open_checkpoint
from bundlefmt.convert.plan import GroupPlan, plan_group
from bundlefmt.convert.progress import Progress, silent
from bundlefmt.convert.rows import CHUNK_NUMBERS, PartRows
from bundlefmt.convert.writer import RegionWriter
from bundlefmt.errors import FormatError, UsageError, naming
from bundlefmt.layout.arithmetic import round_up
from bundlefmt.layout.constants import CHECKSUM_BYTES, DATA_OFFSET, MAX_NAME_LENGTH
from bundlefmt.layout.header import Blob, Group, Header, Part, Region, Source, SourceFile, Tensor
from bundlefmt.layout.planner import region_alignment
from bundlefmt.storage.atomic import refuse_existing, replacing

_HEADER_ALLOWANCE = 1 << 10  # bytes of header per region, in the estimate of disk needed

# Of config.json, the number of layers and the tensors: why `run` does not compute the model (None:
# it does), and the names of the tensors that it does not use.
Judge = Callable[[Mapping[str, Any], int, Mapping[str, SourceTensor]], tuple[str | None, list[str]]]


@dataclass(frozen=True)
class PackReport:
    """What a pack wrote, or with `dry_run` would write. Sizes in bytes; `file_bytes` of a dry
    run is the most that the file can take.

    `unit_share` is the share of the weights' bytes that became units. `head` is the output head's
    tensor, `tied` or `missing` (None: the family has none). `unused` names the resident tensors
    that nothing is computed from. `runs` says whether `run` computes the model (None: nobody was
    asked), `why_not` why it does not. `notes` are one line each.
    """

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
    unit_share: float
    head: str | None
    unused: list[str]
    unused_bytes: int
    runs: bool | None
    why_not: str | None
    notes: list[str]
    dry_run: bool
    seconds: float


def pack(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str] | None = None,
    *,
    judge: Judge | None = None,
    family: str | None = None,
    dtype: str = "keep",
    align: str = "auto",
    resident: str | None = None,
    zstd: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = silent,
) -> PackReport:
    """As `bundlefmt.pack`; `judge` tells what `run` makes of the model."""
    start = time.perf_counter()
    with open_checkpoint(source) as checkpoint:
        target = Path(path) if path is not None else default_path(checkpoint)
        exists(target)
        config = checkpoint.config
        with naming(checkpoint.path):
            found, ffns = find_ffns(checkpoint.tensors, config, family)
            activation = activation_of(found, config)
            head = head_of(found, config, checkpoint.tensors)
            _require_listed(checkpoint, head)
        _require_names(checkpoint)
        plans = [plan_group(ffn, dtype, align, resident) for ffn in ffns]
        layers = len({ffn.layer for ffn in ffns})
        job = _Pack(checkpoint, found, activation, plans, align, zstd, progress)
        runs = why_not = told = None
        if judge is not None:
            why_not, told = judge(config, layers, checkpoint.tensors)
            runs = why_not is None
        unused = job.unused(told if runs else None)
        refuse_existing(target, force=force or dry_run)
        _refuse_target(target, checkpoint)
        if not dry_run:
            needed = job.most_bytes()
            with naming(target), replacing(target, force=force, needed=needed) as file:
                file_bytes = job.write(file.fileno())
                checkpoint.require_unchanged()
        source_bytes = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
        return PackReport(
            source=str(checkpoint.path),
            path=str(target),
            family=found.name,
            activation=activation.name,
            layers=layers,
            groups=len(plans),
            neurons=sum(plan.ffn.neurons for plan in plans),
            source_bytes=source_bytes,
            bundle_bytes=sum(plan.ffn.neurons * plan.stride for plan in plans),
            padding_bytes=sum(plan.ffn.neurons * (plan.stride - plan.used) for plan in plans),
            resident_bytes=job.resident_bytes(),
            file_bytes=job.most_bytes() if dry_run else file_bytes,
            unit_share=job.bundled_bytes() / source_bytes,
            head=head,
            unused=unused,
            unused_bytes=sum(checkpoint.tensors[name].nbytes for name in unused),
            runs=runs,
            why_not=why_not,
            notes=[*checkpoint.notes, *_notes(checkpoint, activation, head)],
            dry_run=dry_run,
            seconds=time.perf_counter() - start,
        )


def default_path(checkpoint: Checkpoint) -> Path:
    """`model.bundle` beside `model.safetensors`; `folder.bundle` beside `folder`; of a model in the
    Hub's cache, `name.bundle` in the current folder."""
    folder = resolved(checkpoint.folder.path)
    repository = hub_repository(folder)
    if repository is not None:
        here = resolved(Path())
        if here.is_relative_to(repository.parent):
            raise UsageError(
                "this folder is in the Hub's cache, which takes no other files: give -o (path)",
                file=here,
            )
        return Path(f"{repository.name.rpartition('--')[2]}.bundle")
    path = checkpoint.path
    if checkpoint.folder.path == path:
        return folder.parent / f"{folder.name or 'model'}.bundle"
    return path.with_name(f"{path.name.split('.safetensors')[0]}.bundle")


def _require_listed(checkpoint: Checkpoint, head: str | None) -> None:
    """Raise FormatError when the index lists a tensor that the model needs and no shard has."""
    name = needed(checkpoint.unfound, checkpoint.tensors, checkpoint.config, head)
    if name is not None:
        raise FormatError(
            "tensor not in its shard: the index lists it, and the model needs it", field=name
        )


def _require_names(checkpoint: Checkpoint) -> None:
    """Raise FormatError for file names that a bundle file cannot carry."""
    seen: set[str] = set()
    for name in [file.path.name for file in checkpoint.files] + list(checkpoint.companions):
        length = len(name.encode("utf-8", "surrogatepass"))
        plain = length <= MAX_NAME_LENGTH and "\\" not in name and _is_text(name)
        if not plain or name in seen:
            raise FormatError(
                "a file of this name cannot be carried",
                file=checkpoint.folder.path / name,
                expected="a plain name of Unicode text, that no other file has",
            )
        seen.add(name)


def _is_text(name: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in name)


def _notes(checkpoint: Checkpoint, activation: Activation, head: str | None) -> Iterator[str]:
    """What else there is to say of a checkpoint."""
    if activation.name == UNKNOWN:
        yield "the checkpoint does not say which activation the FFNs have"
    if head == "missing":
        yield "no output head: it is not tied to the embeddings, and its weights are not there"
    if adapters := [name for name in checkpoint.tensors if is_adapters(name)]:
        yield f"an adapter in the weights is not used: {len(adapters)} tensors, as {adapters[0]}"
    if shared := [name for name in checkpoint.tensors if "shared_expert" in name]:
        yield f"shared experts stay resident: {len(shared)} tensors"
    if checkpoint.unfound:
        first = checkpoint.unfound[0]
        yield f"the index lists {len(checkpoint.unfound)} tensors that no shard has, as {first}"


def _refuse_target(target: Path, checkpoint: Checkpoint) -> None:
    """Raise UsageError when `target` is one of the checkpoint's own files."""
    for file in checkpoint.folder.files:
        if target.exists() and file.path.exists() and target.samefile(file.path):
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

    def bundled_bytes(self) -> int:
        """Bytes, in the checkpoint, of what becomes units."""
        kept = {tensor.name for tensor in self._residents}
        return sum(
            tensor.nbytes for name, tensor in self.checkpoint.tensors.items() if name not in kept
        )

    def unused(self, told: list[str] | None) -> list[str]:
        """Names of resident tensors that nothing is computed from: those told, where that is
        known, else those whose names say so."""
        biases = {part.source.bias for plan in self.plans for part in plan.parts}
        names = [tensor.name for tensor in self._residents if tensor.name not in biases]
        if told is None:
            return [name for name in names if is_unused(name, self.checkpoint.config)]
        known = set(told)
        return [name for name in names if name in known]

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

"""Adding to a bundle file in place, so that a crash at any moment leaves the old state whole
(spec, section 8)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from bundlefmt.convert.writer import RegionWriter
from bundlefmt.errors import UsageError, WriteError, naming
from bundlefmt.file import BundleFile
from bundlefmt.layout import dtypes, superblock
from bundlefmt.layout.constants import DATA_OFFSET
from bundlefmt.layout.header import Blob, Header, Predictor, Region, Tensor
from bundlefmt.layout.superblock import Superblock
from bundlefmt.storage.atomic import lock


def append(
    path: str | os.PathLike[str],
    *,
    tensors: Mapping[str, NDArray[Any]] | None = None,
    blobs: Mapping[str, bytes] | None = None,
    predictors: Sequence[Predictor] = (),
) -> Superblock:
    """Add resident tensors, blobs and predictors to a bundle file, or replace those of the same
    name (predictors: of the same group), as its next generation; returns the new superblock.

    Raises UsageError when another writer has the file, or the name has passed to another file
    meanwhile, FormatError when the file is not valid or would not be, WriteError when the device
    refuses.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", error)
        raise UsageError(f"cannot open for writing: {why}", file=path) from error
    try:
        lock(fd)
        with naming(path):
            return _append(fd, path, tensors or {}, blobs or {}, predictors)
    except BlockingIOError as error:
        raise UsageError("another writer has this file", file=path) from error
    except OSError as error:
        raise WriteError(f"cannot write: {error.strerror}", file=path) from error
    finally:
        os.close(fd)


def _append(
    fd: int,
    path: str | os.PathLike[str],
    tensors: Mapping[str, NDArray[Any]],
    blobs: Mapping[str, bytes],
    predictors: Sequence[Predictor],
) -> Superblock:
    with BundleFile(path) as file:
        header, current = file.header, file.superblock
    slot, locked = superblock.choose(os.pread(fd, DATA_OFFSET, 0))
    if locked != current:
        raise _replaced(path)
    os.ftruncate(fd, current.file_length)  # what an interrupted update left
    try:
        following = _append_regions(fd, header, current, tensors, blobs, predictors)
        os.fsync(fd)
        _require_named(fd, path)
    except BaseException:
        os.ftruncate(fd, current.file_length)
        raise
    writer = RegionWriter(fd, current.alignment, following.file_length)
    writer.superblock(following, slots=[1 - slot])
    os.fsync(fd)
    _require_named(fd, path)
    return following


def _require_named(fd: int, path: str | os.PathLike[str]) -> None:
    """Raise UsageError unless `path` still leads to the open file."""
    try:
        named = os.path.samestat(os.fstat(fd), os.stat(path))  # noqa: PTH116
    except FileNotFoundError:
        named = False
    if not named:
        raise _replaced(path)


def _replaced(path: str | os.PathLike[str]) -> UsageError:
    return UsageError(
        "another file has taken this name meanwhile: what was added is not in it", file=path
    )


def _append_regions(
    fd: int,
    header: Header,
    current: Superblock,
    tensors: Mapping[str, NDArray[Any]],
    blobs: Mapping[str, bytes],
    predictors: Sequence[Predictor],
) -> Superblock:
    """Append what is new and the header; returns the superblock that will bring it into force."""
    writer = RegionWriter(fd, current.alignment, current.file_length)
    replaced = [tensor.data for tensor in header.tensors if tensor.name in tensors]
    replaced += [blob.data for blob in header.blobs if blob.name in blobs]
    replaced = [Region(region.offset, region.length, region.xxh3) for region in replaced]
    old_header = Region(current.header_offset, current.header_length, f"{current.header_xxh3:016x}")
    aimed = {(predictor.layer, predictor.expert) for predictor in predictors}
    updated = msgspec.structs.replace(
        header,
        tensors=[tensor for tensor in header.tensors if tensor.name not in tensors]
        + [_tensor(writer, name, array) for name, array in tensors.items()],
        blobs=[blob for blob in header.blobs if blob.name not in blobs]
        + [Blob(name, _region(writer, data)) for name, data in blobs.items()],
        predictors=[old for old in header.predictors if (old.layer, old.expert) not in aimed]
        + list(predictors),
        retired=[*header.retired, *replaced, old_header],
    )
    return writer.header(updated, current.generation + 1, current.file_id)


def _tensor(writer: RegionWriter, name: str, array: NDArray[Any]) -> Tensor:
    if array.dtype not in dtypes.NAMES:
        raise UsageError("dtype not known to the format", field=name, found=array.dtype)
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return Tensor(name, dtypes.NAMES[array.dtype], list(array.shape), _region(writer, data))


def _region(writer: RegionWriter, data: Any) -> Region:
    return writer.region(lambda: [data])

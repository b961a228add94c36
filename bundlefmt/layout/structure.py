"""What a header must hold to beyond its types (spec, sections 4 and 5).

`faults` checks a header against its superblock alone, in Python integers, before anything that
the header describes is read: a header that passes describes a file whose every region lies inside
the file, alone, at the right length.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from bundlefmt.errors import FormatError, UsageError
from bundlefmt.layout import dtypes
from bundlefmt.layout.constants import (
    CHECKSUM_BYTES,
    DATA_OFFSET,
    MAX_BLOB_LENGTH,
    MAX_NAME_LENGTH,
    ORDER_BYTES,
    PARTS,
    STRIDE_ALIGNMENTS,
)
from bundlefmt.layout.encodings import ENCODINGS
from bundlefmt.layout.header import Group, Header, Part, Region, Span, Tensor
from bundlefmt.layout.superblock import Superblock


class Extent(NamedTuple):
    """A span of the file with the header field that declares it. `group` is given for bundles and
    orders; `small` says that it is a table or a carried file rather than bulk, `packable` that it
    may have a codec."""

    field: str
    span: Span
    group: Group | None = None
    small: bool = False
    packable: bool = False


def extents(header: Header) -> Iterator[Extent]:
    """Every span that the header declares, in the header's order."""
    for i, group in enumerate(header.groups):
        field = f"groups[{i}]"
        yield Extent(f"{field}.bundles", group.bundles, group)
        yield Extent(f"{field}.checksums", group.checksums, small=True)
        if group.order is not None:
            yield Extent(f"{field}.order", group.order, group, small=True)
        for j, part in enumerate(group.parts):
            if part.resident is not None:
                yield Extent(f"{field}.parts[{j}].resident", part.resident)
    for i, tensor in enumerate(header.tensors):
        yield Extent(f"tensors[{i}].data", tensor.data, packable=True)
    for i, blob in enumerate(header.blobs):
        yield Extent(f"blobs[{i}].data", blob.data, small=True, packable=True)
    for i, source in enumerate(header.sources):
        yield Extent(f"sources[{i}].header", source.header, small=True, packable=True)
    for i, region in enumerate(header.retired):
        yield Extent(f"retired[{i}]", region)


def check(superblock: Superblock, header: Header) -> None:
    """Raise the first of `faults`."""
    for fault in faults(superblock, header):
        raise fault


def faults(superblock: Superblock, header: Header) -> Iterator[FormatError]:
    """Every rule that the header breaks, as FormatErrors."""
    yield from _group_faults(header)
    yield from _tensor_faults(header)
    yield from _carried_faults(header)
    yield from _bias_faults(header)
    yield from _predictor_faults(header)
    yield from _region_faults(superblock, header)


def _wrong(what: str, field: str, expected: object, found: object) -> FormatError:
    return FormatError(what, field=f"header.{field}", expected=expected, found=found)


def _group_faults(header: Header) -> Iterator[FormatError]:
    seen: set[tuple[int, int | None]] = set()
    dense = {group.layer for group in header.groups if group.expert is None}
    for i, group in enumerate(header.groups):
        field = f"groups[{i}]"
        if (group.layer, group.expert) in seen or (
            group.expert is not None and group.layer in dense
        ):
            yield _wrong("two groups for one FFN", field, "one group", group.label)
        seen.add((group.layer, group.expert))
        if group.stride_alignment not in STRIDE_ALIGNMENTS:
            yield _wrong(
                "stride alignment not allowed",
                f"{field}.stride_alignment",
                f"a power of two in {STRIDE_ALIGNMENTS[0]}..{STRIDE_ALIGNMENTS[-1]}",
                group.stride_alignment,
            )
        elif group.stride % group.stride_alignment:
            yield _wrong(
                "stride is not aligned",
                f"{field}.stride",
                f"a multiple of {group.stride_alignment}",
                group.stride,
            )
        yield from _part_faults(field, group)
        lengths = [
            ("bundles", group.bundles, group.neurons * group.stride),
            ("checksums", group.checksums, group.neurons * CHECKSUM_BYTES),
        ]
        if group.order is not None:
            lengths.append(("order", group.order, group.neurons * ORDER_BYTES))
        lengths += [
            (f"parts[{j}].resident", part.resident, group.neurons * part.length)
            for j, part in enumerate(group.parts)
            if part.resident is not None
        ]
        for name, span, expected in lengths:
            if span.length != expected:
                yield _wrong("wrong length", f"{field}.{name}.length", expected, span.length)


def _part_faults(field: str, group: Group) -> Iterator[FormatError]:
    names = [part.name for part in group.parts]
    if names != [name for name in PARTS if name in names]:
        yield _wrong("parts out of order or twice", f"{field}.parts", "gate, up, down", names)
    end = 0
    for j, part in enumerate(group.parts):
        yield from _part_length_faults(f"{field}.parts[{j}]", part, group.d_model)
        if (part.offset is None) == (part.resident is None):
            yield _wrong(
                "a part is either in the bundle or resident",
                f"{field}.parts[{j}]",
                "one of offset and resident",
                "both" if part.resident else "neither",
            )
        elif part.offset is not None:
            alignment = ENCODINGS[part.encoding].alignment
            if part.offset < end or part.offset % alignment:
                yield _wrong(
                    "part out of place",
                    f"{field}.parts[{j}].offset",
                    f"a multiple of {alignment}, at least {end}",
                    part.offset,
                )
            end = part.offset + part.length
    if not 0 < end <= group.stride:
        yield _wrong(
            "the parts do not fill a bundle", f"{field}.stride", f"1..{group.stride} bytes", end
        )


def _part_length_faults(field: str, part: Part, d_model: int) -> Iterator[FormatError]:
    try:
        length = ENCODINGS[part.encoding].nbytes(d_model)
    except UsageError as error:
        yield _wrong(error.what, f"{field}.encoding", error.expected, error.found)
    else:
        if part.length != length:
            yield _wrong("wrong length", f"{field}.length", length, part.length)


def _tensor_faults(header: Header) -> Iterator[FormatError]:
    names: set[str] = set()
    for i, tensor in enumerate(header.tensors):
        field = f"tensors[{i}]"
        if tensor.name in names:
            yield _wrong("two tensors of one name", f"{field}.name", "one", tensor.name)
        names.add(tensor.name)
        if tensor.dtype not in dtypes.DTYPES:
            known = ", ".join(dtypes.DTYPES)
            yield _wrong("unknown dtype", f"{field}.dtype", f"one of {known}", tensor.dtype)
            continue
        expected = dtypes.nbytes(tensor.dtype, tensor.shape)
        decoded = _decoded_length(tensor.data)
        if decoded != expected:
            yield _wrong("wrong length", f"{field}.data", f"{expected} bytes", decoded)


def _decoded_length(region: Region) -> int | None:
    return region.length if region.codec == "raw" else region.decoded_length


def _carried_faults(header: Header) -> Iterator[FormatError]:
    seen: set[str] = set()
    carried = [(f"blobs[{i}]", "data", b.name, b.data) for i, b in enumerate(header.blobs)]
    carried += [(f"sources[{i}]", "header", s.name, s.header) for i, s in enumerate(header.sources)]
    for entry, place, name, region in carried:
        field = f"{entry}.name"
        length = _decoded_length(region) or 0
        if length > MAX_BLOB_LENGTH:
            yield _wrong("too long", f"{entry}.{place}", f"at most {MAX_BLOB_LENGTH} bytes", length)
        if (
            name in (".", "..")
            or any(c in name for c in "/\\\0")
            or (len(name.encode("utf-8", "surrogatepass")) > MAX_NAME_LENGTH)
        ):
            yield _wrong("not a plain file name", field, "no path, no NUL", repr(name))
        if name in seen:
            yield _wrong("two files of one name", field, "one", repr(name))
        seen.add(name)


def _bias_faults(header: Header) -> Iterator[FormatError]:
    tensors = {tensor.name: tensor for tensor in header.tensors}
    for i, group in enumerate(header.groups):
        for j, part in enumerate(group.parts):
            if part.bias is None:
                continue
            start = part.source.start if part.source is not None else 0
            needed = group.d_model if part.name == "down" else start + group.neurons
            found = _vector_length(tensors.get(part.bias))
            if found < needed or (part.name == "down" and found > needed):
                yield _wrong(
                    "bias missing or of the wrong shape",
                    f"groups[{i}].parts[{j}].bias",
                    f"a resident F32, F16 or BF16 tensor of {needed} numbers",
                    part.bias,
                )


def _vector_length(tensor: Tensor | None) -> int:
    """How many numbers a tensor of one axis and a float type holds; -1 for anything else."""
    if tensor is None or tensor.dtype not in dtypes.ENCODING_OF or len(tensor.shape) != 1:
        return -1
    return tensor.shape[0]


def _predictor_faults(header: Header) -> Iterator[FormatError]:
    groups = {(group.layer, group.expert): group for group in header.groups}
    tensors = {tensor.name: tensor for tensor in header.tensors}
    seen: set[tuple[int, int | None]] = set()
    for i, predictor in enumerate(header.predictors):
        field = f"predictors[{i}]"
        group = groups.get((predictor.layer, predictor.expert))
        if group is None:
            yield _wrong("no such group", field, "a group of the file", predictor.layer)
            continue
        if (predictor.layer, predictor.expert) in seen:
            yield _wrong("two predictors for one group", field, "one", group.label)
        seen.add((predictor.layer, predictor.expert))
        a, b = tensors.get(predictor.a), tensors.get(predictor.b)
        rank = a.shape[0] if a is not None and a.shape else 0
        matrices = {"a": (a, rank, group.d_model), "b": (b, group.neurons, rank)}
        for name, (tensor, rows, columns) in matrices.items():
            if tensor is None or not rank or not _holds(tensor, rows, columns, predictor.encoding):
                yield _wrong(
                    "not this predictor's matrix",
                    f"{field}.{name}",
                    f"{rows or 'rank'} rows of {columns or 'rank'} numbers, "
                    + (f"each in U8 as {predictor.encoding}" if predictor.encoding else "floats"),
                    "no tensor" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}",
                )


def _holds(tensor: Tensor, rows: int, columns: int, encoding: str | None) -> bool:
    """Whether a tensor is a matrix of that shape: floats, or rows of bytes in an encoding."""
    if encoding is None:
        return tensor.dtype in dtypes.ENCODING_OF and list(tensor.shape) == [rows, columns]
    blocks, rest = divmod(columns, ENCODINGS[encoding].block)
    row = blocks * ENCODINGS[encoding].block_bytes
    return tensor.dtype == "U8" and not rest and list(tensor.shape) == [rows, row]


def _region_faults(superblock: Superblock, header: Header) -> Iterator[FormatError]:
    placed: list[Extent] = []
    for extent in extents(header):
        span, field = extent.span, extent.field
        if span.offset % superblock.alignment or span.offset < DATA_OFFSET:
            yield _wrong(
                "region out of place",
                f"{field}.offset",
                f"a multiple of {superblock.alignment}, at least {DATA_OFFSET}",
                span.offset,
            )
        if span.offset + span.length > superblock.header_offset:
            yield _wrong(
                "region past the end of the data",
                field,
                f"at most byte {superblock.header_offset}",
                span.offset + span.length,
            )
        if isinstance(span, Region) and span.codec != "raw" and not extent.packable:
            yield _wrong("codec not allowed here", f"{field}.codec", "raw", span.codec)
        if isinstance(span, Region) and span.codec != "raw" and not span.length:
            yield _wrong("nothing to decode", f"{field}.length", "at least 1", 0)
        if isinstance(span, Region) and (span.codec == "raw") != (span.decoded_length is None):
            yield _wrong(
                "decoded_length goes with a codec",
                f"{field}.decoded_length",
                "none" if span.codec == "raw" else "a length",
                span.decoded_length,
            )
        if span.length:
            placed.append(extent)
    placed.sort(key=lambda extent: extent.span.offset)
    for before, after in pairwise(placed):
        end = before.span.offset + before.span.length
        if after.span.offset < end:
            yield _wrong(
                f"region overlaps {before.field}",
                f"{after.field}.offset",
                f"at least {end}",
                after.span.offset,
            )

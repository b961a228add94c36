"""What a pack will write for each FFN: encodings, places in the bundle, stride."""

from __future__ import annotations

from dataclasses import dataclass

from bundlefmt.checkpoints.families import Ffn, PartSource
from bundlefmt.errors import FormatError, UsageError
from bundlefmt.layout import dtypes
from bundlefmt.layout.constants import PARTS, EncodingName, PartName
from bundlefmt.layout.encodings import ENCODINGS
from bundlefmt.layout.planner import choose_stride, place_parts

DTYPES = ("keep", *ENCODINGS)


@dataclass(frozen=True)
class PartPlan:
    """One part of a group: its source, its encoding, and its place in the bundle (None: the part
    is resident)."""

    name: PartName
    source: PartSource
    encoding: EncodingName
    length: int
    offset: int | None


@dataclass(frozen=True)
class GroupPlan:
    """One group as it will be written; `used` are the bytes of a bundle before its padding."""

    ffn: Ffn
    parts: tuple[PartPlan, ...]
    used: int
    stride: int
    stride_alignment: int


def plan_group(ffn: Ffn, dtype: str, align: str, resident: str | None) -> GroupPlan:
    """The plan of one FFN; the options are those of `pack`.

    Raises UsageError for options that cannot be served, FormatError for tensors that cannot.
    """
    if dtype not in DTYPES:
        raise UsageError("unknown dtype", field="dtype", expected=", ".join(DTYPES), found=dtype)
    if resident is not None and (resident == "down" or resident not in ffn.parts):
        raise UsageError(
            "this part cannot be made resident",
            field="resident",
            expected=" or ".join(name for name in ffn.parts if name != "down"),
            found=resident,
        )
    encodings = {name: _encoding_of(part) for name, part in ffn.parts.items()}
    bundled = [name for name in PARTS if name in ffn.parts and name != resident]
    if dtype != "keep":
        encodings |= dict.fromkeys(bundled, ENCODINGS[dtype].name)
    try:
        places, used = place_parts([encodings[name] for name in bundled], ffn.d_model)
    except UsageError as error:
        error.file, error.field = ffn.parts["down"].tensor.path, ffn.parts["down"].tensor.name
        raise
    offsets = {name: offset for name, (offset, _) in zip(bundled, places, strict=True)}
    parts = tuple(
        PartPlan(
            name,
            ffn.parts[name],
            encodings[name],
            ENCODINGS[encodings[name]].nbytes(ffn.d_model),
            offsets.get(name),
        )
        for name in PARTS
        if name in ffn.parts
    )
    stride, stride_alignment = choose_stride(used, align)
    return GroupPlan(ffn, parts, used, stride, stride_alignment)


def _encoding_of(part: PartSource) -> EncodingName:
    tensor = part.tensor
    try:
        return dtypes.ENCODING_OF[tensor.dtype]
    except KeyError:
        raise FormatError(
            "FFN tensor of a dtype that bundles cannot hold",
            file=tensor.path,
            field=tensor.name,
            expected=", ".join(dtypes.ENCODING_OF),
            found=tensor.dtype,
        ) from None

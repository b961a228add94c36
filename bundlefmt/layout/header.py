"""The header: UTF-8 JSON that describes every region of the file (spec, section 4).

These types are the schema: spec/header.schema.json is generated from them. Optional fields are
left out of the JSON when they have their default. What a type cannot say (that regions do not
overlap, that lengths agree) is checked by `layout.structure`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from bundlefmt.errors import FormatError
from bundlefmt.layout.constants import (
    FEATURES,
    MAX_HEADER_DEPTH,
    MAX_HEADER_MARKS,
    MAX_INTEGER,
    MAX_NAME_LENGTH,
    MAX_NEURONS,
    BlockEncodingName,
    EncodingName,
    PartName,
)

Count = Annotated[int, Meta(ge=0, le=MAX_INTEGER)]
Positive = Annotated[int, Meta(ge=1, le=MAX_INTEGER)]
Xxh3 = Annotated[str, Meta(pattern="^[0-9a-f]{16}$", description="xxh3-64, seed 0, hex")]
FileName = Annotated[str, Meta(min_length=1, max_length=MAX_NAME_LENGTH)]

Shape = Annotated[list[Count], Meta(max_length=64)]


class Span(Struct, frozen=True, omit_defaults=True):
    """Bytes of the file: `length` of them from `offset` on."""

    offset: Count
    length: Count


class Region(Span, frozen=True, omit_defaults=True):
    """A span with the xxh3-64 of its bytes as they lie in the file. With a codec, they decode to
    `decoded_length` bytes."""

    xxh3: Xxh3
    codec: Literal["raw", "zstd"] = "raw"
    decoded_length: Count | None = None


class Source(Struct, frozen=True, omit_defaults=True):
    """Where a part's vectors came from: neuron i's is `tensor[start + i]` along `axis`."""

    tensor: str
    axis: Annotated[int, Meta(ge=0, le=1)] = 0
    start: Count = 0


class Part(Struct, frozen=True, omit_defaults=True):
    """One vector of every neuron of a group, `length` bytes long: at `offset` in each bundle, or
    outside the bundles, one after the other by neuron, in the region `resident`. `bias` names the
    resident tensor of biases: neuron i's is at `source.start + i` (gate, up), or d_model numbers
    added to the FFN's output (down)."""

    name: PartName
    encoding: EncodingName
    length: Positive
    offset: Count | None = None
    resident: Region | None = None
    source: Source | None = None
    bias: str | None = None


Parts = Annotated[list[Part], Meta(min_length=1, max_length=3)]


class Group(Struct, frozen=True, omit_defaults=True):
    """All bundles of one FFN: of a layer, or of one expert of a layer."""

    layer: Count
    neurons: Annotated[int, Meta(ge=1, le=MAX_NEURONS)]
    d_model: Positive
    activation: str
    stride: Positive
    stride_alignment: Positive
    parts: Parts
    bundles: Span
    checksums: Region
    expert: Count | None = None
    activation_threshold: float | None = None
    order: Region | None = None

    def part(self, name: str) -> Part | None:
        """The part of that name, None where the group has none."""
        return next((part for part in self.parts if part.name == name), None)

    @property
    def bundled(self) -> list[Part]:
        """The parts that lie in the bundles, in their order."""
        return [part for part in self.parts if part.offset is not None]

    @property
    def used(self) -> int:
        """Bytes of a bundle before its padding."""
        return max((part.offset or 0) + part.length for part in self.bundled)

    @property
    def label(self) -> str:
        """`layer 3` or `layer 3, expert 7`."""
        expert = "" if self.expert is None else f", expert {self.expert}"
        return f"layer {self.layer}{expert}"


class Tensor(Struct, frozen=True, omit_defaults=True):
    """A resident tensor, row-major, little-endian; `dtype` as safetensors names it."""

    name: str
    dtype: str
    shape: Shape
    data: Region


class Blob(Struct, frozen=True, omit_defaults=True):
    """A file carried as it is: config.json, tokenizer.json and the like."""

    name: FileName
    data: Region


class SourceFile(Struct, frozen=True, omit_defaults=True):
    """A safetensors file that was packed: `header` is its JSON, verbatim with its padding."""

    name: FileName
    header: Region


class Predictor(Struct, frozen=True, omit_defaults=True):
    """A low-rank predictor of active neurons: neuron i is predicted active for the input x of the
    FFN when sigmoid(b @ (a @ x))[i] > threshold. `a` [rank, d_model] and `b` [neurons, rank] name
    resident tensors of a float type or, with a block encoding, U8 tensors whose rows are vectors
    in it."""

    layer: Count
    a: str
    b: str
    threshold: Annotated[float, Meta(ge=0, le=1)]
    expert: Count | None = None
    encoding: BlockEncodingName | None = None


class Header(Struct, frozen=True, omit_defaults=True):
    """The whole header."""

    family: str
    groups: list[Group]
    tensors: list[Tensor]
    blobs: list[Blob]
    sources: list[SourceFile]
    required_features: list[str] = []
    predictors: list[Predictor] = []
    retired: list[Region] = []
    writer: str | None = None


def encode(header: Header) -> bytes:
    """The header as JSON bytes. Raises FormatError when a name in it is not text."""
    try:
        return msgspec.json.encode(header)
    except UnicodeEncodeError as error:
        raise FormatError(
            "a name that UTF-8 cannot hold", field="header", found=ascii(error.object)
        ) from None


def decode(data: bytes) -> Header:
    """The header in JSON bytes.

    Raises FormatError for what is not UTF-8 JSON of the right types, for duplicate keys, nesting
    deeper than MAX_HEADER_DEPTH, more values than MAX_HEADER_MARKS allows, and required features
    that this version does not know.
    """
    _check_json(data)
    try:
        header = msgspec.json.decode(data, type=Header)
    except msgspec.MsgspecError as error:
        raise FormatError(f"header refused: {error}", field="header") from None
    unknown = [name for name in header.required_features if name not in FEATURES]
    if unknown:
        raise FormatError(
            "the file needs a feature that this reader does not have",
            field="header.required_features",
            expected=f"features among {sorted(FEATURES)}",
            found=unknown[0],
        )
    return header


def schema() -> dict[str, Any]:
    """The JSON Schema of the header."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "bundlefmt header, version 1",
        **msgspec.json.schema(Header),
    }


def _check_json(data: bytes) -> None:
    """Refuse what a typed decoder would let pass: duplicate keys, deep nesting, NaN; and so many
    values that they would take ages and gigabytes."""
    marks = sum(map(data.count, (b",", b"[", b"{")))
    if marks > MAX_HEADER_MARKS:
        raise FormatError(
            "too many values in the header",
            field="header",
            expected=f"at most {MAX_HEADER_MARKS} commas and opening brackets",
            found=marks,
        )

    def depth(value: Any) -> int:
        if isinstance(value, _Depth):
            return value.levels
        return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0

    def visit(pairs: Iterable[tuple[str, Any]]) -> _Depth:
        seen: set[str] = set()
        levels = 0
        for key, value in pairs:
            if key in seen:
                raise FormatError("duplicate key in the header", field="header", found=repr(key))
            seen.add(key)
            levels = max(levels, depth(value))
        return _Depth(levels + 1)

    def refuse(constant: str) -> None:
        raise FormatError("not a JSON number", field="header", found=constant)

    def finite(text: str) -> float:
        if math.isinf(float(text)):
            raise FormatError("a number that is not finite", field="header", found=text[:20])
        return 0.0

    try:
        levels = depth(
            json.loads(
                data.decode("utf-8"),
                object_pairs_hook=visit,
                parse_constant=refuse,
                parse_float=finite,
            )
        )
    except RecursionError:
        levels = MAX_HEADER_DEPTH + 1
    except UnicodeDecodeError as error:
        raise FormatError("header is not UTF-8", field="header", found=error.reason) from None
    except ValueError as error:
        raise FormatError(f"header is not JSON: {error}", field="header") from None
    if levels > MAX_HEADER_DEPTH:
        raise FormatError(
            "header nested too deeply",
            field="header",
            expected=f"at most {MAX_HEADER_DEPTH} levels",
        )


class _Depth:
    """How many levels of objects and arrays a decoded value held; stands in for the value."""

    def __init__(self, levels: int) -> None:
        self.levels = levels

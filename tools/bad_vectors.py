"""The bad test vectors: each is the good file `plain` with one thing wrong, and the field that the
error must name. A new one is one entry in BAD_OPEN or BAD_VERIFY."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np

from bundlefmt.layout import superblock
from bundlefmt.layout.constants import SLOT_LENGTH
from tools.alterations import (
    Json,
    added,
    edited,
    flipped,
    header_of,
    resealed,
    rle_frame,
    with_byte,
    with_header,
    with_superblock,
)


def retire_sources(header: Json) -> None:
    """Leave the source files out, their bytes accounted for."""
    header["retired"] = [source["header"] for source in header["sources"]]
    header["sources"] = []


def dirty_padding(data: bytes) -> bytes:
    """A bundle with a byte set that no part uses, its checksums right."""
    header = header_of(data)
    group = header["groups"][0]
    group["d_model"] = 4
    for part in group["parts"]:
        part["length"] = 16
    retire_sources(header)
    return with_header(data, json.dumps(header, separators=(",", ":")).encode())


def bad_order(data: bytes) -> bytes:
    """An order in which a neuron stands twice."""
    header = header_of(data)
    tensor = header["tensors"].pop(0)["data"]
    content = np.array([0, 1, 1, 3], dtype="<u4").tobytes()
    header["groups"][0]["order"] = {**tensor, "length": len(content)}
    retire_sources(header)
    data = with_header(data, json.dumps(header, separators=(",", ":")).encode())
    return resealed(data, header["groups"][0]["order"], content)


def wrong_decoded_length(data: bytes) -> bytes:
    """A zstd frame that decodes to fewer bytes than declared."""
    header = header_of(data)
    region = header["blobs"][0]["data"]
    frame = rle_frame(0x20, 100)
    at, length = region["offset"], region["length"]
    data = data[:at] + bytes(length) + data[at + length :]
    region |= {"codec": "zstd", "decoded_length": 101, "length": len(frame)}
    data = with_header(data, json.dumps(header, separators=(",", ":")).encode())
    return resealed(data, region, frame)


def expert_twice(header: Json) -> None:
    """One expert with two groups."""
    group(header)["expert"] = 0
    again = json.loads(json.dumps(group(header)))
    header["groups"].append(again)


def group(header: Json) -> Json:
    """The header's first group."""
    found: Json = header["groups"][0]
    return found


def part(header: Json, at: int = 0) -> Json:
    """A part of the first group."""
    found: Json = group(header)["parts"][at]
    return found


# name -> (the change, the field that the error must name). Refused when the file is opened.
BAD_OPEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "superblock"),
    "slots-cut": (lambda data: data[:8191], "superblock"),
    "magic": (lambda data: b"\0" * 8192 + data[8192:], "superblock.magic"),
    "slots-damaged": (
        lambda data: with_byte(with_byte(data, 0x10, 9), 4096 + 0x10, 9),
        "superblock.checksum",
    ),
    "major": (lambda data: with_superblock(data, major=2), "superblock.major"),
    "alignment": (lambda data: with_superblock(data, alignment=5000), "superblock.alignment"),
    "generation-zero": (lambda data: with_superblock(data, generation=0), "superblock.generation"),
    "slots-contradict": (
        lambda data: with_superblock(data, slots=[1], file_id=bytes(16)),
        "superblock",
    ),
    "newer-major": (
        lambda data: with_superblock(data, slots=[1], generation=2, major=2),
        "superblock.major",
    ),
    "newest-header-damaged": (
        lambda data: with_superblock(data, slots=[1], generation=2, header_xxh3=0),
        "header",
    ),
    "header-unaligned": (
        lambda data: with_superblock(
            data, header_offset=superblock.decode(data[:SLOT_LENGTH]).header_offset + 8
        ),
        "superblock.header_offset",
    ),
    "header-too-long": (
        lambda data: with_superblock(data, header_length=1 << 40),
        "superblock.header_length",
    ),
    "file-length": (
        lambda data: with_superblock(data, file_length=1 << 62),
        "superblock.file_length",
    ),
    "cut-short": (lambda data: data[:-1], "superblock.file_length"),
    "header-damaged": (
        lambda data: with_byte(data, superblock.decode(data[:SLOT_LENGTH]).header_offset, 0x5B),
        "header",
    ),
    "not-json": (lambda data: with_header(data, b"{not json}"), "header"),
    "not-utf8": (lambda data: with_header(data, b'{"family":"\xff"}'), "header"),
    "not-an-object": (lambda data: with_header(data, b"[]"), "header"),
    "duplicate-key": (added('"family":"x"'), "header"),
    "nan": (added('"x":NaN'), "header"),
    "nested": (added('"x":' + "[" * 100 + "]" * 100), "header"),
    "missing-field": (edited(lambda h: h.pop("groups")), "header"),
    "wrong-type": (edited(lambda h: h.update(family=3)), "header"),
    "negative": (edited(lambda h: group(h)["bundles"].update(offset=-4096)), "header"),
    "integer-too-large": (edited(lambda h: group(h).update(layer=1 << 53)), "header"),
    "unknown-feature": (
        edited(lambda h: h.update(required_features=["warp"])),
        "header.required_features",
    ),
    "unknown-encoding": (edited(lambda h: part(h).update(encoding="f8")), "header"),
    "unknown-dtype": (
        edited(lambda h: h["tensors"][0].update(dtype="F128")),
        "header.tensors[0].dtype",
    ),
    "huge-count": (
        edited(lambda h: group(h).update(neurons=1 << 32)),
        "header.groups[0].bundles.length",
    ),
    "past-the-end": (
        edited(
            lambda h: (
                group(h).update(neurons=1 << 30),
                group(h)["bundles"].update(length=64 << 30),
                group(h)["checksums"].update(length=8 << 30),
            )
        ),
        "header.groups[0].bundles",
    ),
    "overlap": (
        edited(lambda h: h["blobs"][0]["data"].update(offset=group(h)["bundles"]["offset"])),
        "header.blobs[0].data.offset",
    ),
    "region-unaligned": (
        edited(lambda h: h["blobs"][0]["data"].update(offset=8192 + 512)),
        "header.blobs[0].data.offset",
    ),
    "region-in-slots": (
        edited(lambda h: h["blobs"][0]["data"].update(offset=4096)),
        "header.blobs[0].data.offset",
    ),
    "two-groups": (edited(lambda h: h["groups"].append(group(h))), "header.groups[1]"),
    "stride-alignment": (
        edited(lambda h: group(h).update(stride_alignment=32)),
        "header.groups[0].stride_alignment",
    ),
    "stride-unaligned": (
        edited(lambda h: group(h).update(stride_alignment=128)),
        "header.groups[0].stride",
    ),
    "part-past-stride": (
        edited(lambda h: part(h, 1).update(offset=64)),
        "header.groups[0].stride",
    ),
    "parts-overlap": (
        edited(lambda h: part(h, 1).update(offset=0)),
        "header.groups[0].parts[1].offset",
    ),
    "parts-order": (
        edited(lambda h: group(h)["parts"].reverse()),
        "header.groups[0].parts",
    ),
    "part-length": (
        edited(lambda h: part(h).update(length=16)),
        "header.groups[0].parts[0].length",
    ),
    "part-nowhere": (
        edited(lambda h: part(h).pop("offset")),
        "header.groups[0].parts[0]",
    ),
    "block-length": (
        edited(lambda h: part(h).update(encoding="q4_0")),
        "header.groups[0].parts[0].encoding",
    ),
    "codec-on-table": (
        edited(lambda h: group(h)["checksums"].update(codec="zstd", decoded_length=32)),
        "header.groups[0].checksums.codec",
    ),
    "codec-without-length": (
        edited(lambda h: h["blobs"][0]["data"].update(codec="zstd")),
        "header.blobs[0].data.decoded_length",
    ),
    "tensor-length": (
        edited(lambda h: h["tensors"][0].update(shape=[4])),
        "header.tensors[0].data",
    ),
    "tensor-twice": (
        edited(lambda h: h["tensors"].append({**h["tensors"][0]})),
        "header.tensors[1].name",
    ),
    "blob-path": (
        edited(lambda h: h["blobs"][0].update(name="../evil")),
        "header.blobs[0].name",
    ),
    "blob-twice": (
        edited(lambda h: h["sources"][0].update(name="config.json")),
        "header.sources[0].name",
    ),
    "expert-twice": (edited(expert_twice), "header.groups[1]"),
    "bias-nowhere": (
        edited(lambda h: part(h).update(bias="missing")),
        "header.groups[0].parts[0].bias",
    ),
    "bias-short": (
        edited(lambda h: part(h).update(bias="norm")),
        "header.groups[0].parts[0].bias",
    ),
    "blob-too-long": (
        edited(
            lambda h: h["blobs"][0]["data"].update(codec="zstd", decoded_length=(256 << 20) + 1)
        ),
        "header.blobs[0].data",
    ),
    "source-too-long": (
        edited(
            lambda h: h["sources"][0]["header"].update(codec="zstd", decoded_length=(256 << 20) + 1)
        ),
        "header.sources[0].header",
    ),
    "unknown-codec": (
        edited(lambda h: h["blobs"][0]["data"].update(codec="lz4", decoded_length=9)),
        "header",
    ),
    "predictor-nowhere": (
        edited(
            lambda h: h.update(
                predictors=[{"layer": 9, "a": "norm", "b": "norm", "threshold": 0.5}]
            )
        ),
        "header.predictors[0]",
    ),
    "predictor-encoding": (
        edited(
            lambda h: h.update(
                predictors=[
                    {"layer": 0, "a": "norm", "b": "norm", "threshold": 0.5, "encoding": "q8_0"}
                ]
            )
        ),
        "header.predictors[0].a",
    ),
}

# Likewise. The file opens; `verify` finds the fault.
BAD_VERIFY: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "slot-damaged": (lambda data: with_byte(data, 4096 + 0x10, 9), "superblock.checksum"),
    "slot-not-zero": (lambda data: with_byte(data, 0x50, 1), "superblock"),
    "bundle-damaged": (flipped(lambda h: group(h)["bundles"]["offset"] + 70), "layer 0, neuron 1"),
    "table-damaged": (flipped(lambda h: group(h)["checksums"]["offset"]), "groups[0].checksums"),
    "tensor-damaged": (flipped(lambda h: h["tensors"][0]["data"]["offset"]), "tensors[0].data"),
    "blob-damaged": (flipped(lambda h: h["blobs"][0]["data"]["offset"]), "blobs[0].data"),
    "gap-not-zero": (flipped(lambda h: group(h)["bundles"]["offset"] + 4095), "gap"),
    "end-not-zero": (lambda data: data[:-1] + b"\1", "gap"),
    "padding-not-zero": (dirty_padding, "bundle padding"),
    "order-not-permutation": (bad_order, "layer 0"),
    "decoded-length": (wrong_decoded_length, "blobs[0].data"),
}

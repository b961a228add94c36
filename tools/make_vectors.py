"""Makes the test vectors of the format: spec/vectors/*.bundle with their contents as JSON, and
spec/vectors/bad/*.bundle with the error that each must give.

    python tools/make_vectors.py [FOLDER]     # default: spec/vectors

Everything is fixed: making them again gives the same bytes. A new good file is one function in
GOOD, a new bad one is one entry in the tables below it.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from bundlefmt.convert.unpack import unpack
from bundlefmt.convert.update import append
from bundlefmt.convert.writer import RegionWriter
from bundlefmt.file import BundleFile
from bundlefmt.layout import dtypes, superblock
from bundlefmt.layout.arithmetic import round_up
from bundlefmt.layout.constants import DATA_OFFSET, PARTS, SLOT_LENGTH
from bundlefmt.layout.encodings import ENCODINGS
from bundlefmt.layout.header import (
    Blob,
    Group,
    Header,
    Part,
    Predictor,
    Region,
    Source,
    SourceFile,
    Tensor,
)
from bundlefmt.layout.planner import place_parts

VECTORS = Path(__file__).resolve().parent.parent / "spec" / "vectors"
FILE_ID = bytes(range(16))
ALIGNMENT = 4096

Json = dict[str, Any]


# The good files


class Builder:
    """A bundle file under construction."""

    def __init__(self, path: Path, alignment: int) -> None:
        self.path = path
        self._file = path.open("xb")
        self._writer = RegionWriter(self._file.fileno(), alignment, DATA_OFFSET)
        self.groups: list[Group] = []
        self.tensors: list[Tensor] = []
        self.blobs: list[Blob] = []
        self.sources: list[SourceFile] = []

    def region(self, data: bytes) -> Region:
        """Append a region."""
        return self._writer.region(lambda: [data])

    def tensor(self, name: str, array: NDArray[Any]) -> None:
        """Append a resident tensor."""
        self.raw_tensor(name, dtypes.NAMES[array.dtype], array.shape, array.tobytes())

    def raw_tensor(self, name: str, dtype: str, shape: Sequence[int], data: bytes) -> None:
        """Append a resident tensor of any dtype."""
        self.tensors.append(Tensor(name, dtype, list(shape), self.region(data)))

    def group(
        self,
        layer: int,
        *,
        neurons: int,
        d_model: int,
        encoding: str,
        parts: Sequence[str] = ("up", "down"),
        resident: str | None = None,
        expert: int | None = None,
        alignment: int = 64,
        activation: str = "relu",
        order: Sequence[int] | None = None,
        sources: Mapping[str, Source] | None = None,
        biases: Mapping[str, str] | None = None,
    ) -> None:
        """Append a group of invented numbers."""
        kind = ENCODINGS[encoding]
        stored = {
            name: kind.encode(numbers(neurons, d_model, seed=layer * 7 + (expert or 0) + at))
            for at, name in enumerate(parts)
        }
        bundled = [name for name in parts if name != resident]
        places, used = place_parts([encoding] * len(bundled), d_model)
        stride = round_up(used, alignment)
        bundles = np.zeros((neurons, stride), dtype=np.uint8)
        for name, (offset, length) in zip(bundled, places, strict=True):
            bundles[:, offset : offset + length] = stored[name]
        residents = {resident: self.region(stored[resident].tobytes())} if resident else {}
        span, checksums = self._writer.bundles([bundles if order is None else bundles[list(order)]])
        offsets = {name: offset for name, (offset, _) in zip(bundled, places, strict=True)}
        self.groups.append(
            Group(
                layer=layer,
                expert=expert,
                neurons=neurons,
                d_model=d_model,
                activation=activation,
                stride=stride,
                stride_alignment=alignment,
                parts=[
                    Part(
                        name,
                        encoding,
                        kind.nbytes(d_model),
                        offsets.get(name),
                        residents.get(name),
                        (sources or {}).get(name),
                        (biases or {}).get(name),
                    )
                    for name in PARTS
                    if name in parts
                ],
                bundles=span,
                checksums=checksums,
                order=None
                if order is None
                else self.region(np.array(order, dtype="<u4").tobytes()),
            )
        )

    def source(self, name: str, tensors: Sequence[tuple[str, str, Sequence[int]]]) -> None:
        """Append a safetensors header that describes (name, dtype, shape) tensors."""
        entries: Json = {}
        end = 0
        for tensor, dtype, shape in tensors:
            length = dtypes.nbytes(dtype, shape)
            entries[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + length]}
            end += length
        data = json.dumps(entries, separators=(",", ":")).encode()
        self.sources.append(SourceFile(name, self.region(data + b" " * (-len(data) % 8))))

    def close(self) -> None:
        """Write header and superblocks."""
        header = Header(
            family="example",
            groups=self.groups,
            tensors=self.tensors,
            blobs=self.blobs,
            sources=self.sources,
        )
        self._writer.superblock(self._writer.header(header, 1, FILE_ID), slots=(0, 1))
        self._file.close()


def numbers(neurons: int, d_model: int, seed: int) -> NDArray[np.float32]:
    """Invented numbers that f16 and bf16 hold exactly."""
    index = np.arange(neurons * d_model).reshape(neurons, d_model)
    return (((index * 37 + seed * 11) % 64 - 32) / 8).astype(np.float32)


def rle_frame(byte: int, count: int) -> bytes:
    """A zstd frame of one run-length block: `count` (at most 255) times `byte`."""
    block = (1 | 1 << 1 | count << 3).to_bytes(3, "little")
    return b"\x28\xb5\x2f\xfd\x20" + bytes([count]) + block + bytes([byte])


def plain(builder: Builder) -> None:
    """f32, no gate; a resident tensor, a blob and a source file."""
    builder.tensor("norm", np.array([1.5, -2.0, 0.25], dtype=np.float32))
    sources = {"up": Source("0.up"), "down": Source("0.down", axis=1)}
    builder.group(0, neurons=4, d_model=8, encoding="f32", sources=sources)
    builder.blobs.append(Blob("config.json", builder.region(b'{"model_type": "example"}')))
    builder.source(
        "model.safetensors",
        [("0.up", "F32", [4, 8]), ("norm", "F32", [3]), ("0.down", "F32", [8, 4])],
    )


def gated_f16(builder: Builder) -> None:
    """f16 with a gate, and padding in each bundle."""
    builder.group(0, neurons=5, d_model=8, encoding="f16", parts=PARTS, activation="silu")


def gated_bf16(builder: Builder) -> None:
    """bf16 with a gate; two layers of different widths."""
    builder.group(0, neurons=3, d_model=16, encoding="bf16", parts=PARTS, activation="silu")
    builder.group(1, neurons=6, d_model=16, encoding="bf16", parts=PARTS, activation="silu")


def q8_0(builder: Builder) -> None:
    """q8_0, no gate."""
    builder.group(0, neurons=3, d_model=64, encoding="q8_0")


def q4_0(builder: Builder) -> None:
    """q4_0 with a gate."""
    builder.group(0, neurons=3, d_model=32, encoding="q4_0", parts=PARTS, activation="silu")


def ordered(builder: Builder) -> None:
    """An order: slot j holds neuron order[j]."""
    builder.group(0, neurons=6, d_model=8, encoding="f32", order=[4, 0, 5, 2, 1, 3])


def experts(builder: Builder) -> None:
    """A dense layer, then a layer of three experts."""
    builder.group(0, neurons=4, d_model=8, encoding="f16", parts=PARTS, activation="silu")
    for expert in range(3):
        builder.group(
            1,
            expert=expert,
            neurons=2,
            d_model=8,
            encoding="f16",
            parts=PARTS,
            activation="silu",
        )


def resident_gate(builder: Builder) -> None:
    """The gate outside the bundles."""
    builder.group(
        0, neurons=4, d_model=16, encoding="f16", parts=PARTS, resident="gate", alignment=512
    )


def zstd(builder: Builder) -> None:
    """A resident tensor under the zstd codec."""
    builder.group(0, neurons=2, d_model=8, encoding="f32")
    frame = rle_frame(0x3C, 48)
    region = builder.region(frame)
    data = Region(region.offset, region.length, region.xxh3, "zstd", 48)
    builder.tensors.append(Tensor("packed", "F16", [2, 12], data))


def fused(builder: Builder) -> None:
    """A resident gate and an up from one fused matrix, with biases and an order."""
    for name, count in (("gate_up.bias", 6), ("down.bias", 8)):
        builder.tensor(name, np.arange(count, dtype=np.float16) / 4)
    sources = {
        "gate": Source("gate_up"),
        "up": Source("gate_up", start=3),
        "down": Source("down", axis=1),
    }
    biases = {"gate": "gate_up.bias", "up": "gate_up.bias", "down": "down.bias"}
    builder.group(
        0,
        neurons=3,
        d_model=8,
        encoding="f16",
        parts=PARTS,
        activation="gelu_tanh",
        order=[2, 0, 1],
        resident="gate",
        sources=sources,
        biases=biases,
    )
    builder.source(
        "model.safetensors",
        [
            ("down", "F16", [8, 3]),
            ("gate_up.bias", "F16", [6]),
            ("gate_up", "F16", [6, 8]),
            ("down.bias", "F16", [8]),
        ],
    )


def odd_tensors(builder: Builder) -> None:
    """A single number, an empty tensor, four bits a number, a name beyond ASCII; regions aligned
    to 16384."""
    builder.raw_tensor("scalar", "I64", [], (-3).to_bytes(8, "little", signed=True))
    builder.raw_tensor("empty", "F32", [0, 5], b"")
    builder.raw_tensor("four bits", "F4", [3], b"\x21\x03")
    builder.raw_tensor("größe", "BOOL", [2], b"\x01\x00")


def newer_minor(builder: Builder) -> None:
    """Made whole here; `make` gives it a minor version and keys that this reader ignores."""
    builder.group(0, neurons=2, d_model=8, encoding="f32")


def two_generations(builder: Builder) -> None:
    """Made whole here, then updated by `make`: slot 1 is in force."""
    builder.group(0, neurons=4, d_model=8, encoding="f16")
    builder.blobs.append(Blob("note.txt", builder.region(b"first")))


def interrupted_update(builder: Builder) -> None:
    """Made whole here; `make` adds what a crashed update leaves after the end."""
    builder.group(0, neurons=2, d_model=8, encoding="f32")


GOOD: tuple[Callable[[Builder], None], ...] = (
    plain,
    gated_f16,
    gated_bf16,
    q8_0,
    q4_0,
    ordered,
    experts,
    resident_gate,
    zstd,
    fused,
    odd_tensors,
    newer_minor,
    two_generations,
    interrupted_update,
)


def update(path: Path) -> None:
    """The second generation of `two_generations`."""
    a = np.arange(16, dtype=np.float32).reshape(2, 8) / 8
    b = np.arange(8, dtype=np.float32).reshape(4, 2) - 4
    append(
        path,
        tensors={"predictors.0.a": a, "predictors.0.b": b},
        blobs={"note.txt": b"second"},
        predictors=[Predictor(0, "predictors.0.a", "predictors.0.b", 0.5)],
    )


def contents(path: Path) -> Json:
    """What a reader must find in a good file: numbers by neuron, other bytes in hex."""
    with BundleFile(path) as file, file.reader("buffered") as reader:
        block = file.superblock
        groups = []
        for group in file.groups:
            neurons = list(range(group.neurons))
            bundles = reader.read(group.layer, neurons, expert=group.expert)
            parts = {
                part.name: np.asarray(bundles.part(part.name), dtype=np.float64).tolist()
                for part in group.bundled
            }
            for part in group.parts:
                if part.resident is not None:
                    stored = file.resident_part(group, part.name)
                    parts[part.name] = ENCODINGS[part.encoding].decode(stored).tolist()
            groups.append({"layer": group.layer, "expert": group.expert, "parts": parts})
        return {
            "generation": block.generation,
            "alignment": block.alignment,
            "file_id": block.file_id.hex(),
            "groups": groups,
            "tensors": {
                tensor.name: {
                    "dtype": tensor.dtype,
                    "shape": tensor.shape,
                    "bytes": file.tensor_bytes(tensor.name).hex(),
                }
                for tensor in file.header.tensors
            },
            "blobs": {name: file.blob(name).hex() for name in file.blob_names},
            "restored": restored(path),
            "predictors": [
                {"layer": p.layer, "a": p.a, "b": p.b, "threshold": p.threshold}
                for p in file.header.predictors
            ],
        }


def restored(path: Path) -> dict[str, str]:
    """The source files, in hex."""
    with BundleFile(path) as file:
        names = [source.name for source in file.header.sources]
    with tempfile.TemporaryDirectory() as folder:
        unpack(path, folder)
        return {name: (Path(folder) / name).read_bytes().hex() for name in names}


# The bad files: each is the file `plain` with one thing wrong.


def with_superblock(data: bytes, slots: Iterable[int] = (0, 1), **fields: Any) -> bytes:
    """The file with other superblock fields, their checksum right."""
    changed = bytearray(data)
    encoded = replace(superblock.decode(data[:SLOT_LENGTH]), **fields).encode()
    for slot in slots:
        changed[slot * SLOT_LENGTH : (slot + 1) * SLOT_LENGTH] = encoded
    return bytes(changed)


def with_header(data: bytes, header: bytes) -> bytes:
    """The file with another header, every length and checksum about it right."""
    block = superblock.decode(data[:SLOT_LENGTH])
    length = round_up(block.header_offset + len(header), ALIGNMENT)
    changed = (data[: block.header_offset] + header).ljust(length, b"\0")
    return with_superblock(
        changed,
        file_length=length,
        header_length=len(header),
        header_xxh3=xxhash.xxh3_64_intdigest(header),
    )


def header_of(data: bytes) -> Json:
    """The file's header as JSON."""
    block = superblock.decode(data[:SLOT_LENGTH])
    end = block.header_offset + block.header_length
    header: Json = json.loads(data[block.header_offset : end])
    return header


def edited(edit: Callable[[Json], Any]) -> Callable[[bytes], bytes]:
    """A change of the header's JSON."""

    def change(data: bytes) -> bytes:
        header = header_of(data)
        edit(header)
        return with_header(data, json.dumps(header, separators=(",", ":")).encode())

    return change


def added(text: str) -> Callable[[bytes], bytes]:
    """Text put in as the header's first member, as it is."""

    def change(data: bytes) -> bytes:
        header = json.dumps(header_of(data), separators=(",", ":"))
        return with_header(data, ("{" + text + "," + header[1:]).encode())

    return change


def flipped(place: Callable[[Json], int]) -> Callable[[bytes], bytes]:
    """One bit flipped, at an offset that the header tells."""

    def change(data: bytes) -> bytes:
        at = place(header_of(data))
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    return change


def resealed(data: bytes, region: Json, content: bytes) -> bytes:
    """The file with other content in a region, its checksum in the header right."""
    header = header_of(data)
    at = region["offset"]
    changed = data[:at] + content + data[at + len(content) :]
    text = json.dumps(header, separators=(",", ":"))
    text = text.replace(region["xxh3"], xxhash.xxh3_64_hexdigest(content))
    return with_header(changed, text.encode())


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
}


def with_byte(data: bytes, at: int, value: int) -> bytes:
    """The file with one byte changed."""
    return data[:at] + bytes([value]) + data[at + 1 :]


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


def make(folder: Path) -> None:
    """Write all vectors into an empty or missing folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for build in GOOD:
        path = folder / f"{build.__name__.replace('_', '-')}.bundle"
        builder = Builder(path, 16384 if build is odd_tensors else ALIGNMENT)
        build(builder)
        builder.close()
        if build is two_generations:
            update(path)
        if build is newer_minor:
            later = added('"later":{"x":[1.5,null]}')(path.read_bytes())
            path.write_bytes(with_superblock(later, minor=7))
        if build is interrupted_update:
            path.write_bytes(path.read_bytes() + b"half of an update")
        path.with_suffix(".json").write_text(json.dumps(contents(path), indent=1) + "\n")
    sound = (folder / "plain.bundle").read_bytes()
    bad = folder / "bad"
    bad.mkdir()
    errors: dict[str, Json] = {}
    for stage, table in (("open", BAD_OPEN), ("verify", BAD_VERIFY)):
        for name, (change, field) in table.items():
            (bad / f"{name}.bundle").write_bytes(change(sound))
            errors[name] = {"refused_by": stage, "field": field}
    (bad / "errors.json").write_text(json.dumps(errors, indent=1) + "\n")


def main() -> None:
    """Replace the vectors' folder."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else VECTORS
    with tempfile.TemporaryDirectory(dir=folder.parent) as fresh:
        make(Path(fresh) / "vectors")
        shutil.rmtree(folder, ignore_errors=True)
        (Path(fresh) / "vectors").rename(folder)


if __name__ == "__main__":
    main()

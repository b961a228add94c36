"""A second reader of bundle files, written from spec/bundle-v1.md alone.

It shares no code with bundlefmt, so that the tests of spec/vectors show whether the document says
enough. It holds the file as one buffer and takes views of it: what it allocates beside them follows
from the bytes that are there, or that have been decoded so far. Section numbers are those of the
specification.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import xxhash
import zstandard

SLOTS = (0, 4096)
SLOT_SIZE, SLOT_USED, REGIONS_START = 4096, 80, 8192
MAGIC = bytes.fromhex("89424e444c0d0a1a")
ALIGNMENTS = (4096, 16384, 65536)
STRIDE_ALIGNMENTS = [1 << n for n in range(6, 17)]
MAX_HEADER, MAX_NESTING, MAX_INTEGER, MAX_NEURONS = 1 << 26, 32, (1 << 53) - 1, 1 << 32
MAX_WINDOW = 1 << 23  # RFC 8878, 3.1.1.1.2: what a zstd decoder should support
ZSTD_STEP = 256  # bytes fed at once: at most 64 blocks, so at most 8 MiB come out

# name: (numbers in a block, bytes of a block, alignment)
ENCODINGS = {
    "f32": (1, 4, 4),
    "f16": (1, 2, 2),
    "bf16": (1, 2, 2),
    "q8_0": (32, 34, 2),
    "q4_0": (32, 18, 2),
}
PLAIN_DTYPES = {
    "f32": np.dtype("<f4"),
    "f16": np.dtype("<f2"),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}
RESTORED = {name.upper(): dtype for name, dtype in PLAIN_DTYPES.items()}
DTYPE_BITS = {
    **dict.fromkeys(["BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"], 8),
    **dict.fromkeys(["U16", "I16", "F16", "BF16"], 16),
    **dict.fromkeys(["U32", "I32", "F32"], 32),
    **dict.fromkeys(["U64", "I64", "F64", "C64"], 64),
    **dict.fromkeys(["F6_E2M3", "F6_E3M2"], 6),
    "F4": 4,
}

# Section 4, as `field: type` or `field: type = default`. `[T]` is an array of T; `T?` is T or null,
# and null is its default.
FIELDS = {
    "Header": """family: string, groups: [Group], tensors: [Tensor], blobs: [Blob],
        sources: [SourceFile], required_features: [string] = [], predictors: [Predictor] = [],
        retired: [Region] = [], writer: string?""",
    "Span": "offset: integer, length: integer",
    "Region": """offset: integer, length: integer, xxh3: string, codec: string = "raw",
        decoded_length: integer?""",
    "Group": """layer: integer, expert: integer?, neurons: integer, d_model: integer,
        activation: string, activation_threshold: number?, stride: integer,
        stride_alignment: integer, parts: [Part], bundles: Span, checksums: Region,
        order: Region?""",
    "Part": """name: string, encoding: string, length: integer, offset: integer?,
        resident: Region?, source: Source?, bias: string?""",
    "Source": "tensor: string, axis: integer = 0, start: integer = 0",
    "Tensor": "name: string, dtype: string, shape: [integer], data: Region",
    "Blob": "name: string, data: Region",
    "SourceFile": "name: string, header: Region",
    "Predictor": """layer: integer, expert: integer?, a: string, b: string, threshold: number,
        encoding: string?""",
}


def parse_fields(text: str) -> dict[str, tuple[str, str | None]]:
    """Field -> its type and its default as JSON, None where it is required."""
    rows = re.findall(r"(\w+): ([\w\[\]]+\??)(?: = ([^,]+))?", text)
    return {
        name: (of, default or ("null" if of[-1] == "?" else None)) for name, of, default in rows
    }


TYPES = {name: parse_fields(text) for name, text in FIELDS.items()}


class Refused(Exception):
    """The file breaks the specification; the message says where."""


def require(holds: bool, reason: str) -> None:
    if not holds:
        raise Refused(reason)


def xxh3(data: Any) -> int:
    return int(xxhash.xxh3_64_intdigest(data))


# --- the superblock, section 3


@dataclass(frozen=True)
class Superblock:
    major: int
    minor: int
    alignment: int
    generation: int
    file_length: int
    header_offset: int
    header_length: int
    header_xxh3: int
    file_id: bytes


def read_slot(slot: memoryview) -> Superblock:
    """The superblock in a slot; Refused if the slot is not valid."""
    magic, *fields, checksum = struct.unpack("<8s2HI5Q16sQ", slot[:SLOT_USED])
    block = Superblock(*fields)
    end = block.header_offset + block.header_length
    require(magic == MAGIC, "slot: magic")
    require(checksum == xxh3(slot[:0x48]), "slot: checksum")
    require(block.major == 1, "slot: major")
    require(block.alignment in ALIGNMENTS, "slot: alignment")
    require(1 <= block.generation <= MAX_INTEGER, "slot: generation")
    require(2 <= block.header_length <= MAX_HEADER, "slot: header_length")
    require(block.header_offset >= REGIONS_START, "slot: header_offset")
    require(block.header_offset % block.alignment == 0, "slot: header_offset")
    require(block.file_length == end + -end % block.alignment <= MAX_INTEGER, "slot: file_length")
    return block


def intact(slot: memoryview) -> bool:
    (checksum,) = struct.unpack_from("<Q", slot, 0x48)
    return slot[:8] == MAGIC and checksum == xxhash.xxh3_64_intdigest(slot[:0x48])


def current_superblock(data: memoryview) -> Superblock:
    require(len(data) >= REGIONS_START, "file: shorter than its two slots")
    slots = [data[start : start + SLOT_SIZE] for start in SLOTS]
    found = [read_slot(slot) for slot in slots if intact(slot)]
    require(bool(found), "no intact slot")
    first, last = found[0], found[-1]
    require(first.file_id == last.file_id, "slots: different file_id")
    require(first.alignment == last.alignment, "slots: different alignment")
    require(first.generation != last.generation or first == last, "slots: one generation twice")
    newest = max(found, key=lambda block: block.generation)
    require(len(data) >= newest.file_length, "file: shorter than file_length")
    return newest


# --- the header, section 4


def parse_json(text: bytes) -> Any:
    require(sum(map(text.count, (b",", b"[", b"{"))) <= 1 << 22, "json: too many values")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        require(len(dict(pairs)) == len(pairs), "json: a key twice")
        return dict(pairs)

    def finite(number: str) -> float:
        require(math.isfinite(float(number)), f"json: {number}")
        return float(number)

    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=unique,
            parse_float=finite,
            parse_constant=finite,
        )
    except (ValueError, RecursionError) as error:
        raise Refused(f"json: {error}") from None
    level = [value]
    for depth in range(1, MAX_NESTING + 2):
        level = [item for item in level if isinstance(item, dict | list)]
        require(depth <= MAX_NESTING or not level, "json: nested too deep")
        level = [x for c in level for x in (c.values() if isinstance(c, dict) else c)]
    return value


def typed(value: Any, kind: str, where: str) -> Any:
    """The value with defaults filled in and unknown keys gone, if it is of that type."""
    if kind.endswith("?"):
        return None if value is None else typed(value, kind[:-1], where)
    if kind.startswith("["):
        require(isinstance(value, list), f"{where}: not an array")
        return [typed(item, kind[1:-1], f"{where}[{i}]") for i, item in enumerate(value)]
    if kind in TYPES:
        require(isinstance(value, dict), f"{where}: not an object")
        result = {}
        for name, (of, default) in TYPES[kind].items():
            require(name in value or default is not None, f"{where}.{name}: missing")
            item = value[name] if name in value else json.loads(default or "null")
            result[name] = typed(item, of, f"{where}.{name}")
        return result
    if kind == "string":
        require(isinstance(value, str), f"{where}: not a string")
        require(not re.search("[\ud800-\udfff]", value), f"{where}: not Unicode text")
    elif kind == "integer":
        require(type(value) is int and 0 <= value <= MAX_INTEGER, f"{where}: not an integer")
    else:
        require(type(value) in (int, float), f"{where}: not a number")
    return value


def encoded_length(encoding: str, numbers: int, where: str) -> int:
    require(encoding in ENCODINGS, f"{where}.encoding: unknown")
    block, size, _ = ENCODINGS[encoding]
    require(numbers % block == 0, f"{where}: not a multiple of the encoding's block")
    return numbers // block * size


def check_group(group: dict[str, Any], where: str) -> None:
    neurons, stride, parts = group["neurons"], group["stride"], group["parts"]
    require(1 <= neurons <= MAX_NEURONS, f"{where}.neurons: out of range")
    require(group["d_model"] >= 1, f"{where}.d_model: out of range")
    require(group["stride_alignment"] in STRIDE_ALIGNMENTS, f"{where}.stride_alignment")
    require(stride % group["stride_alignment"] == 0, f"{where}.stride: not a multiple")
    require(group["bundles"]["length"] == neurons * stride, f"{where}.bundles.length")
    require(group["checksums"]["length"] == neurons * 8, f"{where}.checksums.length")
    require(not group["order"] or group["order"]["length"] == neurons * 4, f"{where}.order.length")
    names = [part["name"] for part in parts]
    require(len(names) >= 1, f"{where}.parts: none")
    require(names == [n for n in ("gate", "up", "down") if n in names], f"{where}.parts: order")
    end = 0
    for i, part in enumerate(parts):
        at, inside = f"{where}.parts[{i}]", part["offset"] is not None
        require(inside != (part["resident"] is not None), f"{at}: offset or resident")
        length = encoded_length(part["encoding"], group["d_model"], at)
        require(part["length"] == length, f"{at}.length")
        require(not part["source"] or part["source"]["axis"] in (0, 1), f"{at}.source.axis")
        if inside:
            require(part["offset"] >= end, f"{at}.offset: overlaps or out of order")
            require(part["offset"] % ENCODINGS[part["encoding"]][2] == 0, f"{at}.offset: alignment")
            end = part["offset"] + length
        else:
            require(part["resident"]["length"] == neurons * length, f"{at}.resident.length")
    require(0 < end <= stride, f"{where}.stride: {end} bytes of parts do not fit")


def check_tensor(tensor: dict[str, Any], where: str) -> None:
    bits = DTYPE_BITS.get(tensor["dtype"])
    require(bits is not None, f"{where}.dtype: unknown")
    require(len(tensor["shape"]) <= 64, f"{where}.shape: too many")
    size = -(-math.prod(tensor["shape"]) * (bits or 0) // 8)
    region = tensor["data"]
    decoded = region["length"] if region["codec"] == "raw" else region["decoded_length"]
    require(decoded == size, f"{where}.data: {decoded} bytes for a tensor of {size}")


def check_file_name(name: str, where: str) -> None:
    require(name not in ("", ".", "..") and not set(name) & set("/\\\0"), f"{where}: no file name")
    require(len(name.encode()) <= 255, f"{where}: too long")


def check_biases(header: dict[str, Any]) -> None:
    tensors = {tensor["name"]: tensor for tensor in header["tensors"]}
    for i, group in enumerate(header["groups"]):
        for part in group["parts"]:
            if part["bias"] is None:
                continue
            where = f"header.groups[{i}]: bias of {part['name']}"
            require(part["bias"] in tensors, f"{where}: no such tensor")
            tensor = tensors[part["bias"]]
            require(tensor["dtype"] in ("F32", "F16", "BF16"), f"{where}: dtype")
            require(len(tensor["shape"]) == 1, f"{where}: not one axis")
            if part["name"] == "down":
                require(tensor["shape"] == [group["d_model"]], f"{where}: length")
            else:
                start = part["source"]["start"] if part["source"] else 0
                require(tensor["shape"][0] >= start + group["neurons"], f"{where}: length")


def check_predictors(header: dict[str, Any]) -> None:
    groups = {(g["layer"], g["expert"]): g for g in header["groups"]}
    tensors = {t["name"]: t for t in header["tensors"]}
    seen = set()
    for i, predictor in enumerate(header["predictors"]):
        where, key = f"header.predictors[{i}]", (predictor["layer"], predictor["expert"])
        require(key in groups and key not in seen, f"{where}: no group, or one twice")
        require({predictor["a"], predictor["b"]} <= set(tensors), f"{where}: no such tensor")
        a, b = tensors[predictor["a"]], tensors[predictor["b"]]
        require(len(a["shape"]) == 2 and a["shape"][0] >= 1, f"{where}.a: shape")
        rank, d_model, encoding = a["shape"][0], groups[key]["d_model"], predictor["encoding"]
        a_row, b_row = d_model, rank
        require(encoding in (None, "q8_0", "q4_0"), f"{where}.encoding")
        if encoding is not None:
            a_row = encoded_length(encoding, d_model, f"{where}.a")
            b_row = encoded_length(encoding, rank, f"{where}.b")
        require(a["shape"] == [rank, a_row], f"{where}.a: shape")
        require(b["shape"] == [groups[key]["neurons"], b_row], f"{where}.b: shape")
        floats = ("F32", "F16", "BF16") if encoding is None else ("U8",)
        require(a["dtype"] in floats and b["dtype"] in floats, f"{where}: dtype")
        require(0 <= predictor["threshold"] <= 1, f"{where}.threshold")
        seen.add(key)


def regions(header: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Every region that the header declares: where, the Span or Region, may it have a codec."""
    for i, group in enumerate(header["groups"]):
        yield f"groups[{i}].bundles", group["bundles"], False
        yield f"groups[{i}].checksums", group["checksums"], False
        if group["order"]:
            yield f"groups[{i}].order", group["order"], False
        for j, part in enumerate(group["parts"]):
            if part["resident"]:
                yield f"groups[{i}].parts[{j}].resident", part["resident"], False
    for name, field in (("tensors", "data"), ("blobs", "data"), ("sources", "header")):
        for i, item in enumerate(header[name]):
            yield f"{name}[{i}].{field}", item[field], True
    for i, region in enumerate(header["retired"]):
        yield f"retired[{i}]", region, False


def check_regions(header: dict[str, Any], block: Superblock) -> None:
    spans = []
    for where, region, codec_allowed in regions(header):
        offset, end = region["offset"], region["offset"] + region["length"]
        require(offset % block.alignment == 0 and offset >= REGIONS_START, f"{where}.offset")
        require(end <= block.header_offset, f"{where}: past the header's start")
        codec = region.get("codec", "raw")
        require(codec == "raw" or (codec == "zstd" and codec_allowed), f"{where}.codec")
        has_decoded = region.get("decoded_length") is not None
        require(has_decoded == (codec != "raw"), f"{where}.decoded_length")
        require(bool(re.fullmatch("[0-9a-f]{16}", region.get("xxh3", "0" * 16))), f"{where}.xxh3")
        if end > offset:
            spans.append((offset, end, where))
    for (_, end, _), (offset, _, where) in pairwise(sorted(spans)):
        require(end <= offset, f"{where}.offset: overlaps another region")


def check_header(value: Any, block: Superblock) -> dict[str, Any]:
    header: dict[str, Any] = typed(value, "Header", "header")
    require(not header["required_features"], f"unknown: {header['required_features']}")
    keys = [(group["layer"], group["expert"]) for group in header["groups"]]
    dense = {layer for layer, expert in keys if expert is None}
    require(len(set(keys)) == len(keys), "header.groups: a group twice")
    require(
        not any(layer in dense for layer, expert in keys if expert is not None), "header.groups"
    )
    for i, group in enumerate(header["groups"]):
        check_group(group, f"header.groups[{i}]")
    for i, tensor in enumerate(header["tensors"]):
        check_tensor(tensor, f"header.tensors[{i}]")
    names = [tensor["name"] for tensor in header["tensors"]]
    require(len(set(names)) == len(names), "header.tensors: a name twice")
    names = [item["name"] for item in header["blobs"] + header["sources"]]
    require(len(set(names)) == len(names), "header.blobs, header.sources: a name twice")
    for region in [b["data"] for b in header["blobs"]] + [s["header"] for s in header["sources"]]:
        length = region["length"] if region["codec"] == "raw" else region["decoded_length"]
        require(length is None or length <= 1 << 28, "header.blobs, header.sources: too long")
    for name in names:
        check_file_name(name, f"file {name!r}")
    check_regions(header, block)
    check_biases(header)
    check_predictors(header)
    return header


# --- reading, sections 4.2, 6 and 7


def unzstd(data: memoryview, length: int) -> bytes:
    """All frames decoded, in small steps, so that a lying frame ends soon after `length`."""
    out, at = bytearray(), 0
    while at < len(data) or at == 0:
        frame = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).decompressobj()
        while not frame.eof:
            require(at < len(data), "a frame is cut short")
            try:
                out += frame.decompress(data[at : at + ZSTD_STEP])
            except zstandard.ZstdError as error:
                raise Refused(str(error)) from None
            require(len(out) <= length, f"decodes to more than {length} bytes")
            at = min(at + ZSTD_STEP, len(data))
        at -= len(frame.unused_data)
    require(len(out) == length, f"decodes to {len(out)} bytes, not {length}")
    return bytes(out)


def decode(encoding: str, raw: np.ndarray) -> np.ndarray:
    """The numbers in the last axis of an array of bytes; f16 and bf16 stay what they are."""
    raw = np.ascontiguousarray(raw)
    if encoding in PLAIN_DTYPES:
        return raw.view(PLAIN_DTYPES[encoding])
    blocks = raw.reshape(*raw.shape[:-1], -1, ENCODINGS[encoding][1])
    scale = np.ascontiguousarray(blocks[..., :2]).view("<f2").astype(np.float32)
    codes = blocks[..., 2:]
    if encoding == "q8_0":
        numbers = codes.view(np.int8)
    else:
        numbers = np.concatenate([codes & 15, codes >> 4], axis=-1).view(np.int8) - np.int8(8)
    return (scale * numbers).reshape(*raw.shape[:-1], -1)


@dataclass(frozen=True)
class SpecFile:
    """An open file; a group is named by its index in the header."""

    data: memoryview
    superblock: Superblock
    header: dict[str, Any]

    def read(self, region: dict[str, Any]) -> memoryview:
        """The bytes of a region, checked and decoded."""
        data = self.data[region["offset"] : region["offset"] + region["length"]]
        require(xxh3(data) == int(region["xxh3"], 16), f"bytes at {region['offset']}: checksum")
        if region["codec"] == "raw":
            return data
        return memoryview(unzstd(data, region["decoded_length"]))

    def tensor(self, name: str) -> bytes:
        return bytes(self.read({t["name"]: t["data"] for t in self.header["tensors"]}[name]))

    def blob(self, name: str) -> bytes:
        return bytes(self.read({b["name"]: b["data"] for b in self.header["blobs"]}[name]))

    def slots(self, index: int) -> np.ndarray:
        """The slot of each neuron of a group."""
        group = self.header["groups"][index]
        slots = np.arange(group["neurons"], dtype=np.uint32)
        if group["order"]:
            order = np.frombuffer(self.read(group["order"]), "<u4")
            require(np.array_equal(np.sort(order), slots), "order: not a permutation")
            slots = np.argsort(order)
        return slots

    def bundles(self, index: int, slots: Iterable[int]) -> Iterator[np.ndarray]:
        """The bundles in some slots of a group, each checked, as bytes."""
        group = self.header["groups"][index]
        checksums = np.frombuffer(self.read(group["checksums"]), "<u8")
        for slot in map(int, slots):
            start = group["bundles"]["offset"] + slot * group["stride"]
            bundle = np.frombuffer(self.data[start : start + group["stride"]], np.uint8)
            require(xxh3(bundle) == int(checksums[slot]), f"slot {slot}: checksum")
            yield bundle

    def part(self, index: int, part: dict[str, Any], neurons: slice) -> np.ndarray:
        """One part of some neurons of a group: numbers [neurons, d_model]."""
        length = part["length"]
        if part["resident"]:
            table = np.frombuffer(self.read(part["resident"]), np.uint8)
            return decode(part["encoding"], table.reshape(-1, length)[neurons])
        bundles = self.bundles(index, self.slots(index)[neurons])
        rows = [bundle[part["offset"] : part["offset"] + length] for bundle in bundles]
        return decode(part["encoding"], np.array(rows))

    def neuron(self, index: int, i: int) -> dict[str, np.ndarray]:
        """The parts of neuron i of a group, resident ones among them, d_model numbers each."""
        parts = self.header["groups"][index]["parts"]
        return {part["name"]: self.part(index, part, slice(i, i + 1))[0] for part in parts}

    def restore(self, name: str) -> bytes:
        """The safetensors file of a source, by section 7."""
        header = bytes(self.read({s["name"]: s["header"] for s in self.header["sources"]}[name]))
        resident = {tensor["name"] for tensor in self.header["tensors"]}
        entries = parse_json(header)
        out = bytearray()
        try:
            entries.pop("__metadata__", None)
            tensors = [(*e["data_offsets"], e["dtype"], e["shape"], n) for n, e in entries.items()]
            for begin, end, dtype, shape, tensor in sorted(tensors):
                require(len(out) == begin, f"{tensor}: a gap or an overlap")
                out += (
                    self.tensor(tensor) if tensor in resident else self.matrix(tensor, dtype, shape)
                )
                require(len(out) == end, f"{tensor}: not as long as its data_offsets say")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise Refused(f"{name}: not a safetensors header: {error}") from None
        return struct.pack("<Q", len(header)) + header + out

    def matrix(self, tensor: str, dtype: str, shape: list[int]) -> bytes:
        """A matrix put together from the parts that came from it."""
        pieces = []
        for index, group in enumerate(self.header["groups"]):
            for part in group["parts"]:
                if part["source"] and part["source"]["tensor"] == tensor:
                    pieces.append((part["source"]["start"], part["source"]["axis"], index, part))
        pieces.sort(key=lambda piece: piece[:3])
        blocks, end = [], 0
        for start, axis, index, part in pieces:
            require((start, axis) == (end, pieces[0][1]), f"{tensor}: its parts do not tile it")
            blocks.append(self.part(index, part, slice(None)).astype(RESTORED[dtype], copy=False))
            end += len(blocks[-1])
        require(bool(blocks), f"{tensor}: neither resident nor made of parts")
        matrix = np.concatenate(blocks)
        matrix = matrix.T if pieces[0][1] else matrix
        require(list(matrix.shape) == shape, f"{tensor}: shape")
        return matrix.tobytes()


def open_file(data: Any) -> SpecFile:
    """Open a bundle file that is in memory (bytes or mmap), or raise Refused."""
    view = memoryview(data)
    block = current_superblock(view)
    text = view[block.header_offset : block.header_offset + block.header_length]
    require(xxh3(text) == block.header_xxh3, "header: checksum")
    return SpecFile(view, block, check_header(parse_json(bytes(text)), block))


# --- verifying, section 10


def check_zero(data: memoryview) -> None:
    require(not np.frombuffer(data, np.uint8).any(), "unused bytes are not zero")


def check_bundles(file: SpecFile, index: int) -> None:
    group = file.header["groups"][index]
    file.slots(index)
    unused = np.ones(group["stride"], bool)
    for part in group["parts"]:
        if part["offset"] is not None:
            unused[part["offset"] : part["offset"] + part["length"]] = False
    for bundle in file.bundles(index, range(group["neurons"])):
        require(not bundle[unused].any(), "unused bytes are not zero")


def checks(file: SpecFile) -> Iterator[tuple[str, Callable[[], Any]]]:
    """All that verify does beside opening the file: what, and a call that may raise Refused."""
    block = file.superblock
    for at in SLOTS:
        yield f"slot at {at}", partial(read_slot, file.data[at : at + SLOT_SIZE])
        yield f"slot at {at}", partial(check_zero, file.data[at + SLOT_USED : at + SLOT_SIZE])
    used = [(block.header_offset, block.header_length), (block.file_length, 0)]
    for where, region, _ in regions(file.header):
        used.append((region["offset"], region["length"]))
        if "xxh3" in region:
            yield where, partial(file.read, region)
    for index in range(len(file.header["groups"])):
        yield f"groups[{index}]", partial(check_bundles, file, index)
    end = REGIONS_START
    for offset, length in sorted(used):
        yield f"gap at {end}", partial(check_zero, file.data[end : max(end, offset)])
        end = max(end, offset + length)


def verify(data: Any) -> list[str]:
    """Everything that is wrong with a file; nothing found means that every byte is vouched for."""
    faults = []
    try:
        for where, check in checks(open_file(data)):
            try:
                check()
            except Refused as refused:
                faults.append(f"{where}: {refused}")
    except Refused as refused:
        faults.append(str(refused))
    return faults

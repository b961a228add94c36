"""Changes to a bundle file's bytes that keep every checksum about them right: for test vectors and
tests of files that lie."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import xxhash

from bundlefmt.layout import superblock
from bundlefmt.layout.arithmetic import round_up
from bundlefmt.layout.constants import SLOT_LENGTH

Json = dict[str, Any]


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
    length = round_up(block.header_offset + len(header), block.alignment)
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


def with_byte(data: bytes, at: int, value: int) -> bytes:
    """The file with one byte changed."""
    return data[:at] + bytes([value]) + data[at + 1 :]


def rle_frame(byte: int, count: int) -> bytes:
    """A zstd frame of one run-length block: `count` (at most 255) times `byte`."""
    block = (1 | 1 << 1 | count << 3).to_bytes(3, "little")
    return b"\x28\xb5\x2f\xfd\x20" + bytes([count]) + block + bytes([byte])

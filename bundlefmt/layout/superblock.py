"""The superblock: 80 bytes that say which header is in force (spec, section 3).

Strategy: a file has two slots. A writer that changes a file writes the slot that is *not* in
force, so that at every moment one slot is whole; a reader takes the valid slot with the higher
generation. A slot's used bytes lie within one 512-byte sector, which a device writes whole or
not at all.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import xxhash

from bundlefmt.errors import FormatError
from bundlefmt.layout.arithmetic import round_up
from bundlefmt.layout.constants import (
    DATA_OFFSET,
    MAJOR,
    MAX_HEADER_LENGTH,
    MAX_INTEGER,
    MINOR,
    REGION_ALIGNMENTS,
    SLOT_LENGTH,
    SLOT_OFFSETS,
)

MAGIC = b"\x89BNDL\r\n\x1a"
_FIELDS = struct.Struct("<8sHHIQQQQQ16s")
_CHECKSUM = struct.Struct("<Q")
LENGTH = _FIELDS.size + _CHECKSUM.size  # used bytes of a slot; the rest is zero

# (name, offset, bytes), as spec/bundle-v1.md tabulates them.
FIELDS = (
    ("magic", 0x00, 8),
    ("major", 0x08, 2),
    ("minor", 0x0A, 2),
    ("alignment", 0x0C, 4),
    ("generation", 0x10, 8),
    ("file_length", 0x18, 8),
    ("header_offset", 0x20, 8),
    ("header_length", 0x28, 8),
    ("header_xxh3", 0x30, 8),
    ("file_id", 0x38, 16),
    ("checksum", 0x48, 8),
)


@dataclass(frozen=True)
class Superblock:
    """One slot's content; offsets and lengths in bytes."""

    alignment: int
    generation: int
    file_length: int
    header_offset: int
    header_length: int
    header_xxh3: int
    file_id: bytes
    major: int = MAJOR
    minor: int = MINOR

    def encode(self) -> bytes:
        """The slot's SLOT_LENGTH bytes."""
        fields = _FIELDS.pack(
            MAGIC,
            self.major,
            self.minor,
            self.alignment,
            self.generation,
            self.file_length,
            self.header_offset,
            self.header_length,
            self.header_xxh3,
            self.file_id,
        )
        used = fields + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields))
        return used.ljust(SLOT_LENGTH, b"\0")


def decode(slot: bytes, offset: int = 0) -> Superblock:
    """The superblock in a slot's bytes; `offset` is where the slot starts, for messages.

    Raises FormatError when the slot is not a valid superblock of a version this code reads.
    """
    if len(slot) < SLOT_LENGTH:
        raise FormatError(
            "file too short for its superblock",
            field="superblock",
            offset=offset,
            expected=f"{SLOT_LENGTH} bytes",
            found=len(slot),
        )
    magic, major, minor, *values = _FIELDS.unpack(slot[: _FIELDS.size])
    if magic != MAGIC:
        raise FormatError(
            "not a bundle file",
            field="superblock.magic",
            offset=offset,
            expected=MAGIC.hex(" "),
            found=magic.hex(" "),
        )
    (stored,) = _CHECKSUM.unpack(slot[_FIELDS.size : LENGTH])
    actual = xxhash.xxh3_64_intdigest(slot[: _FIELDS.size])
    if stored != actual:
        raise FormatError(
            "superblock damaged",
            field="superblock.checksum",
            offset=offset + _FIELDS.size,
            expected=f"{actual:016x}",
            found=f"{stored:016x}",
        )
    if major != MAJOR:
        raise FormatError(
            "a version this reader does not know",
            field="superblock.major",
            offset=offset + 0x08,
            expected=MAJOR,
            found=major,
        )
    names = [name for name, _, _ in FIELDS[3:-1]]
    superblock = Superblock(**dict(zip(names, values, strict=True)), major=major, minor=minor)
    _check(superblock, offset)
    return superblock


def choose(slots: bytes) -> tuple[int, Superblock]:
    """The index and content of the slot in force, from a file's first DATA_OFFSET bytes.

    Raises FormatError when no slot is intact, or when an intact one breaks a rule or contradicts
    the other.
    """
    found: list[tuple[int, Superblock]] = []
    for index, offset in enumerate(SLOT_OFFSETS):
        slot = slots[offset : offset + SLOT_LENGTH]
        if _intact(slot):
            found.append((index, decode(slot, offset)))
    if not found:
        decode(slots[:SLOT_LENGTH])  # raises what is wrong with the first
    if len(found) == 2:
        (_, a), (_, b) = found
        if (a.file_id, a.alignment) != (b.file_id, b.alignment) or (
            a.generation == b.generation and a != b
        ):
            raise FormatError(
                "the two superblocks contradict each other",
                field="superblock",
                offset=SLOT_OFFSETS[1],
                expected=f"file {a.file_id.hex()} at another generation than {a.generation}",
                found=f"file {b.file_id.hex()} at generation {b.generation}",
            )
    return max(found, key=lambda entry: entry[1].generation)


def _intact(slot: bytes) -> bool:
    """Whether magic and checksum are right: what a torn or damaged slot fails."""
    (stored,) = _CHECKSUM.unpack(slot[_FIELDS.size : LENGTH])
    return slot.startswith(MAGIC) and stored == xxhash.xxh3_64_intdigest(slot[: _FIELDS.size])


def _check(superblock: Superblock, offset: int) -> None:
    """Raise FormatError for values that no valid file has."""
    s = superblock
    end = s.header_offset + s.header_length
    rules = (
        ("alignment", s.alignment in REGION_ALIGNMENTS, f"one of {REGION_ALIGNMENTS}"),
        ("generation", 1 <= s.generation <= MAX_INTEGER, f"1..{MAX_INTEGER}"),
        (
            "header_offset",
            s.header_offset >= DATA_OFFSET and s.header_offset % (s.alignment or 1) == 0,
            f"a multiple of {s.alignment}, at least {DATA_OFFSET}",
        ),
        ("header_length", 2 <= s.header_length <= MAX_HEADER_LENGTH, f"2..{MAX_HEADER_LENGTH}"),
        (
            "file_length",
            s.file_length <= MAX_INTEGER and s.file_length == round_up(end, s.alignment or 1),
            "the header's end, rounded up to the alignment",
        ),
    )
    places = {name: place for name, place, _ in FIELDS}
    for name, holds, expected in rules:
        if not holds:
            raise FormatError(
                "value out of range",
                field=f"superblock.{name}",
                offset=offset + places[name],
                expected=expected,
                found=getattr(s, name),
            )

"""The numbers of format version 1. spec/bundle-v1.md holds the same ones; a test compares them."""

from __future__ import annotations

from typing import Literal

PartName = Literal["gate", "up", "down"]
BlockEncodingName = Literal["q8_0", "q4_0"]
EncodingName = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]

MAJOR = 1
MINOR = 0

SLOT_OFFSETS = (0, 4096)  # of the two superblock slots
SLOT_LENGTH = 4096
DATA_OFFSET = 8192  # first byte after the slots: no region starts below it

REGION_ALIGNMENTS = (4096, 16384, 65536)
STRIDE_ALIGNMENTS = tuple(1 << n for n in range(6, 17))  # 64 .. 65536

MAX_HEADER_LENGTH = 64 << 20
MAX_HEADER_DEPTH = 32
MAX_HEADER_MARKS = 1 << 22  # commas and opening brackets: bounds what its values take in memory
MAX_INTEGER = (1 << 53) - 1  # what every JSON reader holds exactly
MAX_NEURONS = 1 << 32  # an order is a table of u32
MAX_NAME_LENGTH = 255  # of a blob or source file, in UTF-8 bytes
MAX_BLOB_LENGTH = 256 << 20  # decoded bytes of a blob or a source's header

MAX_ZSTD_WINDOW = 8 << 20  # bytes that a decoder may be made to reserve

PARTS: tuple[PartName, ...] = ("gate", "up", "down")  # in the order in which a bundle holds them
CHECKSUM_BYTES = 8  # one xxh3-64 in a checksum table
ORDER_BYTES = 4  # one u32 in an order table

FEATURES: frozenset[str] = frozenset()  # `required_features` that version 1 knows

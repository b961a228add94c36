"""Where things go: strides, parts in a bundle, regions in a file (spec, section 5)."""

from __future__ import annotations

from collections.abc import Sequence

from bundlefmt.errors import UsageError
from bundlefmt.layout.arithmetic import round_up
from bundlefmt.layout.constants import REGION_ALIGNMENTS
from bundlefmt.layout.encodings import ENCODINGS

PAGE = 4096
SECTOR = 512
MAX_WASTE = 0.125  # padding / used bytes, above which `auto` leaves page alignment
ALIGNMENTS = ("auto", "512", "4096", "16384", "65536")


def place_parts(encodings: Sequence[str], d_model: int) -> tuple[list[tuple[int, int]], int]:
    """(offset, length) of each part inside a bundle, and the bytes that they use together.

    Raises UsageError when `d_model` is no whole number of an encoding's blocks.
    """
    places: list[tuple[int, int]] = []
    end = 0
    for name in encodings:
        encoding = ENCODINGS[name]
        offset = round_up(end, encoding.alignment)
        places.append((offset, encoding.nbytes(d_model)))
        end = offset + places[-1][1]
    return places, end


def choose_stride(used: int, align: str = "auto") -> tuple[int, int]:
    """(stride, stride alignment) for a bundle of `used` bytes.

    `auto` takes page alignment unless its padding would waste more than 12.5 %, then sectors.
    """
    if align not in ALIGNMENTS:
        raise UsageError(
            "alignment not offered", field="align", expected=", ".join(ALIGNMENTS), found=align
        )
    if align != "auto":
        return round_up(used, int(align)), int(align)
    paged = round_up(used, PAGE)
    if paged - used <= MAX_WASTE * used:
        return paged, PAGE
    return round_up(used, SECTOR), SECTOR


def region_alignment(align: str) -> int:
    """The file's region alignment for that choice of stride alignment."""
    return max(REGION_ALIGNMENTS[0], 0 if align == "auto" else int(align))

"""The specification, the schema, the vectors and the code say the same."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from bundlefmt import kernels
from bundlefmt.layout import constants, dtypes, header, superblock
from bundlefmt.layout.encodings import ENCODINGS
from tests.conftest import ROOT, VECTORS
from tools import make_spec, make_vectors

TEXT = (ROOT / "spec" / "bundle-v1.md").read_text()

Table = list[dict[str, str]]


def tables() -> list[Table]:
    """The document's tables, each a list of rows by column name."""
    found: list[Table] = []
    columns: list[str] = []
    for line in TEXT.splitlines():
        if not line.startswith("|"):
            columns = []
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not columns:
            columns = cells
            found.append([])
        elif not set(line) <= set("|- "):
            found[-1].append(dict(zip(columns, cells, strict=True)))
    return found


def table(*columns: str) -> Table:
    """The one table with exactly these columns."""
    (match,) = [found for found in tables() if tuple(found[0]) == columns]
    return match


def numbers(cell: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", cell)]


def test_the_schema_and_the_example_are_fresh() -> None:
    assert make_spec.SCHEMA.read_text() == make_spec.schema_text()
    assert make_spec.DOCUMENT.read_text() == make_spec.document_text()


def test_making_the_vectors_again_gives_the_same_bytes(tmp_path: Path) -> None:
    make_vectors.make(tmp_path / "vectors")
    made = {path.relative_to(tmp_path / "vectors") for path in tmp_path.rglob("*.*")}
    kept = {path.relative_to(VECTORS) for path in VECTORS.rglob("*.*")}
    assert made == kept
    for name in kept:
        assert (tmp_path / "vectors" / name).read_bytes() == (VECTORS / name).read_bytes(), name


def test_the_superblock_table_is_the_codes() -> None:
    rows = table("offset", "bytes", "field", "meaning")
    listed = [(row["field"], int(row["offset"], 16), int(row["bytes"])) for row in rows]
    assert listed == list(superblock.FIELDS)
    assert bytes.fromhex(rows[0]["meaning"].strip("`")) == superblock.MAGIC
    assert numbers(rows[1]["meaning"])[0] == constants.MAJOR
    assert numbers(rows[2]["meaning"])[0] == constants.MINOR
    assert tuple(numbers(rows[3]["meaning"])) == constants.REGION_ALIGNMENTS
    assert sum(row[2] for row in listed) == superblock.LENGTH


def test_the_encoding_table_is_the_codes() -> None:
    rows = table("encoding", "block", "bytes", "alignment", "content")
    assert [
        (row["encoding"], int(row["block"]), int(row["bytes"]), int(row["alignment"]))
        for row in rows
    ] == [
        (encoding.name, encoding.block, encoding.block_bytes, encoding.alignment)
        for encoding in ENCODINGS.values()
    ]


def test_the_dtype_table_is_the_codes() -> None:
    rows = table("dtype", "bits")
    assert {row["dtype"]: int(row["bits"]) for row in rows} == {
        name: bits for name, (bits, _) in dtypes.DTYPES.items()
    }


def test_the_limits_are_the_codes() -> None:
    limits = {row["limit"]: tuple(numbers(row["value"])) for row in table("limit", "value")}
    assert limits == {
        "superblock slots at": constants.SLOT_OFFSETS,
        "first byte of regions": (constants.DATA_OFFSET,),
        "region alignments": constants.REGION_ALIGNMENTS,
        "stride alignments, least": (constants.STRIDE_ALIGNMENTS[0],),
        "stride alignments, greatest": (constants.STRIDE_ALIGNMENTS[-1],),
        "header length, greatest": (constants.MAX_HEADER_LENGTH,),
        "header nesting, greatest": (constants.MAX_HEADER_DEPTH,),
        "`,`, `[` and `{` in the header, greatest number": (constants.MAX_HEADER_MARKS,),
        "integer, greatest": (constants.MAX_INTEGER,),
        "neurons of a group, greatest": (constants.MAX_NEURONS,),
        "file name, greatest number of bytes": (constants.MAX_NAME_LENGTH,),
        "blob or source header, greatest number of bytes, decoded": (constants.MAX_BLOB_LENGTH,),
        "zstd window, greatest": (constants.MAX_ZSTD_WINDOW,),
    }


# The field tables of section 4, in the document's order.
STRUCTS = (
    header.Header,
    header.Span,
    header.Region,
    header.Group,
    header.Part,
    header.Source,
    header.Tensor,
    header.Blob,
    header.SourceFile,
    header.Predictor,
)


@pytest.mark.parametrize("index", range(len(STRUCTS)), ids=[s.__name__ for s in STRUCTS])
def test_the_field_tables_are_the_types(index: int) -> None:
    found = [rows for rows in tables() if tuple(rows[0]) == ("field", "type", "default", "meaning")]
    assert len(found) == len(STRUCTS)
    fields = msgspec.structs.fields(STRUCTS[index])
    expected = {}
    for field in fields:
        if field.default_factory is not msgspec.NODEFAULT:
            expected[field.name] = "[]"
        elif field.default is msgspec.NODEFAULT:
            expected[field.name] = ""
        else:
            expected[field.name] = msgspec.json.encode(field.default).decode()
    assert {row["field"]: row["default"] for row in found[index]} == expected


def test_every_activation_of_the_spec_is_computed() -> None:
    (row,) = [row for rows in tables() for row in rows if row.get("field") == "activation"]
    named = set(re.findall(r"`(\w+)`", row["meaning"]))
    assert named == {*kernels._ACTIVATIONS, "fatrelu"}


@pytest.mark.parametrize("word", ["MUST", "MUST NOT", "SHOULD", "MAY"])
def test_the_document_uses_the_words_it_defines(word: str) -> None:
    assert word in TEXT
